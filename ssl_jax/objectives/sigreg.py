# SPDX-License-Identifier: Apache-2.0
"""Objective of LeJEPA: views of an image agree, and embeddings are standard normal.

All functions take embeddings (V, N, D) of V views of N images and compute in float32. Regularizers
are computed per view, over the images of the batch, and averaged over the views.
"""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from ssl_jax.run import errors

# Frequencies t of the integral: multiples of STEP up to 3; at 0 the integrand is 0.
STEP, KNOTS = 3 / 16, 16
EPS = 1e-4  # added to the standard deviation in `shape`


def directions(rng: jax.Array, dim: int, count: int) -> jax.Array:
    """Random unit vectors, the columns of (dim, count) float32, for `sigreg` and `shape`."""
    a = jax.random.normal(rng, (dim, count))
    return a / jnp.linalg.norm(a, axis=0)


def invariance(z: jax.Array, num_global: int) -> jax.Array:
    """mean over v, n, d of (c_nd - z_vnd)², c the mean of the global views; all get gradient.

    Args:
      z: (V, N, D), global views first.
      num_global: number of global views.

    References:
      LeJEPA, arXiv 2511.08544, section 5
    """
    z = z.astype(jnp.float32)
    return jnp.square(z[:num_global].mean(axis=0) - z).mean()


def sigreg(z: jax.Array, slices: jax.Array) -> jax.Array:
    """Sketched isotropic Gaussian regularization: the Epps-Pulley test of random projections.

    For the projections p of the N images onto a unit vector, with f = exp(-t²/2),

      T = N integral over t from -3 to 3 of f ((mean cos(t p) - f)² + (mean sin(t p))²) dt,

    by the trapezoid rule; the mean over unit vectors and views. Embeddings drawn from N(0, I) have
    T = 1.05 on average, whatever N; embeddings that are all 0 have T = 0.40 N.

    Args:
      z: (V, N, D).
      slices: (D, S), see `directions`.

    References:
      LeJEPA, arXiv 2511.08544, section 4 and algorithm 1
    """
    t = STEP * np.arange(1, KNOTS + 1)
    gauss = np.exp(-np.square(t) / 2)
    weights = 2 * STEP * gauss  # twice, for negative t
    weights[-1] /= 2
    real, imaginary = characteristic(_project(z, slices))
    error = jnp.square(real - jnp.asarray(gauss, jnp.float32)[:, None, None])
    error = (error + jnp.square(imaginary)).mean(axis=(1, 2))
    return z.shape[1] * (jnp.asarray(weights, jnp.float32) * error).sum()


@jax.custom_vjp
def characteristic(p: jax.Array) -> tuple[jax.Array, jax.Array]:
    """mean cos(t p) and mean sin(t p) over the images at t = STEP, 2 STEP, ..., KNOTS STEP.

    The cosine and the sine of each t follow from those before by a rotation: on a CPU this takes a
    tenth of the time of 32 functions per number. The gradient rotates again, so that no more
    than a few arrays like `p` are in memory.

    Args:
      p: (V, N, S) float32.

    Returns:
      real and imaginary part of the characteristic function, (KNOTS, V, S).
    """
    return jax.lax.scan(lambda wave, _: (_turn(wave), _means(wave)), _first(p), length=KNOTS)[1]


def _first(p):
    """(cos, sin) of the first t, twice: of this t and of the rotation to the next."""
    wave = (jnp.cos(STEP * p), jnp.sin(STEP * p))
    return wave + wave


def _turn(wave):
    c, s, c1, s1 = wave
    return c * c1 - s * s1, s * c1 + c * s1, c1, s1


def _means(wave):
    return wave[0].mean(axis=1), wave[1].mean(axis=1)


def _characteristic_backward(p, grads):
    def add(carry, part):
        wave, total = carry
        t, real, imaginary = part
        slope = wave[0] * imaginary[:, None] - wave[1] * real[:, None]
        return (_turn(wave), total + t * slope), None

    t = STEP * jnp.arange(1.0, KNOTS + 1)
    (_, total), _ = jax.lax.scan(add, (_first(p), jnp.zeros_like(p)), (t, *grads))
    return (total / p.shape[1],)


characteristic.defvjp(lambda p: (characteristic(p), p), _characteristic_backward)


def scale(z: jax.Array) -> jax.Array:
    """mean (1 - std)² over views and dimensions, std over the images; its gradient never vanishes.

    References:
      VISReg, arXiv 2606.02572, equation 1
    """
    return jnp.square(1 - _std(z.astype(jnp.float32))).mean()


def centre(z: jax.Array) -> jax.Array:
    """mean (mean over the images)² over views and dimensions: VISReg, equation 6."""
    return jnp.square(z.astype(jnp.float32).mean(axis=1)).mean()


def shape(z: jax.Array, slices: jax.Array) -> jax.Array:
    """Squared Wasserstein distance of random projections from N(0, 1), whatever their scale.

    The mean of (p_i - q_i)² with p the sorted projections of standardised embeddings and q_i the
    normal quantile of i / (N + 1). The standard deviation has no gradient.

    Args:
      z: (V, N, D).
      slices: (D, S), see `directions`.

    References:
      VISReg, arXiv 2606.02572, equations 2 and 5
    """
    z, n = z.astype(jnp.float32), z.shape[1]
    std = jax.lax.stop_gradient(_std(z))
    p = _project((z - z.mean(axis=1, keepdims=True)) / (std[:, None] + EPS), slices)
    quantiles = special.ndtri(np.arange(1, n + 1) / (n + 1))
    return jnp.square(jnp.sort(p, axis=1) - jnp.asarray(quantiles, jnp.float32)[:, None]).mean()


def monitors(z: jax.Array) -> dict[str, jax.Array]:
    """Signs of a collapse, without gradient.

    Returns:
      embedding_std: mean over views and dimensions of the standard deviation over the images; 1 if
        the embeddings are standard normal, 0 if all images have the same.
      embedding_rank: (sum of e)² / sum of e² with e the eigenvalues of the covariance of the
        images' embeddings, means over the views: how many dimensions vary, 1 to min(N - 1, D).
    """
    z = jax.lax.stop_gradient(z.astype(jnp.float32))
    x = z.mean(axis=0)
    x = x - x.mean(axis=0)
    small = x @ x.T if len(x) < x.shape[1] else x.T @ x  # either has these eigenvalues
    rank = jnp.square(jnp.trace(small)) / jnp.maximum(jnp.square(small).sum(), 1e-37)
    return {'embedding_std': _std(z).mean(), 'embedding_rank': rank}


def suspect(values: dict[str, float], dim: int) -> str | None:
    """One sentence that names a collapse and a remedy; None if `monitors` look healthy.

    Args:
      values: with those of `monitors`, as floats.
      dim: D.
    """
    std, rank = (float(values[name]) for name in ('embedding_std', 'embedding_rank'))
    if not abs(std) < float('inf'):
        return (
            f'Collapse suspected: embedding_std is {std}; resume from an earlier checkpoint with '
            f'half the learning rate.'
        )
    if std < 0.05:
        return (
            f'Collapse to a point suspected: the embeddings of different images differ by '
            f'{std:.4f} (1 = standard normal), which satisfies the invariance and says nothing '
            f'about the image; raise method.sigreg_weight (0.05).'
        )
    if dim > 4 and rank < 1.2:
        return (
            f'Dimensional collapse suspected: the embeddings vary in {rank:.1f} of {dim} '
            f'dimensions; raise method.sigreg_weight (0.05) or halve the learning rate.'
        )
    return None


def _project(z, slices):
    if z.ndim != 3 or z.shape[1] < 2:
        raise errors.UserError(
            f'the regularizers compare 2 images or more: pass embeddings (V, N, D), not {z.shape}.'
        )
    return jnp.einsum('vnd,ds->vns', z.astype(jnp.float32), slices, precision='highest')


def _std(z):
    """Biased standard deviation over the images, (V, D); its gradient is finite at 0."""
    return jnp.sqrt(jnp.maximum(z.var(axis=1), 1e-12))
