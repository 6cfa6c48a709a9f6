# SPDX-License-Identifier: Apache-2.0
"""Statistics of features that show a collapse before the accuracy does."""

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp

from ssl_jax.fields import Range
from ssl_jax.run import errors, launch

EPS = 1e-7  # of RankMe
NAMES = ('std', 'rankme', 'rankme_max', 'cosine')


@dataclasses.dataclass(frozen=True)
class Options:
    """Fields of `eval.tasks.monitors`."""

    num_images: Annotated[int, Range(2, 10**6)] = 512


def check(options, look) -> None:
    """Says that one image alone has no monitors."""
    del options
    if len(look.shown) < 2:
        launch.log('monitors  none: they compare two images or more')


def run(options, look, state, step) -> dict[str, float]:
    """features/* of the test images, else of the training images; logs a suspected collapse.

    Nothing for a classifier: its features are meant to collapse onto the classes.
    """
    del step
    if look.method.classes or len(look.shown) < 2:
        return {}
    features, _ = look.extract(look.forward(state), look.shown, options.num_images)
    x = features.get(look.method.monitored, features['patch'])
    values = {k: float(v) for k, v in monitors(x).items()}
    if sentence := suspect(values):
        launch.log(sentence)
    return {f'features/{k}': v for k, v in values.items() if k != 'rankme_max'}


@jax.jit
def monitors(features: jax.Array) -> dict[str, jax.Array]:
    """Spread of a batch of features.

    With z the L2-normalised rows:
      std:     sqrt(d) * mean over dimensions of the standard deviation of z over the batch;
               1 for directions spread evenly over the sphere, 0 if all are the same.
      rankme:  see `rankme`.
      cosine:  mean cosine of two different rows; 1 if all point the same way.

    Args:
      features: (B, d), B at least 2; a few hundred rows or more, as rankme is bounded by B.

    Returns:
      float32 scalars: std, rankme, rankme_max = min(B, d), cosine.

    References:
      std: Chen and He, arXiv 2011.10566, figure 2
    """
    b, d = features.shape
    if b < 2:
        raise errors.UserError(f'Monitors compare images with each other: pass 2 or more, not {b}.')
    x = features.astype(jnp.float32)
    z = x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    # |sum z|^2 holds every pair twice and every row with itself.
    cosine = (jnp.square(z.sum(axis=0)).sum() - jnp.square(z).sum()) / (b * (b - 1))
    return {
        'std': jnp.sqrt(d) * z.std(axis=0).mean(),
        'rankme': rankme(x),
        'rankme_max': jnp.float32(min(b, d)),
        'cosine': cosine,
    }


def rankme(features: jax.Array) -> jax.Array:
    """exp(-sum p log p), p = sigma / |sigma|_1 + eps; between 1 and min(B, d).

    Args:
      features: (B, d), not centred; sigma are its singular values.

    References:
      RankMe: Garrido et al., arXiv 2210.02885, eq. 1
    """
    sigma = jnp.linalg.svd(features.astype(jnp.float32), compute_uv=False)
    p = sigma / jnp.maximum(sigma.sum(), 1e-30) + EPS
    return jnp.exp(-(p * jnp.log(p)).sum())


def suspect(v: dict[str, float]) -> str | None:
    """A sentence on the value of `monitors` that shows a collapse, with advice; None if healthy.

    The limits are far out on purpose: healthy class tokens share a large common direction, which
    alone drives the cosine above 0.9. Early in training any limit can be crossed for a while.
    """
    advice = (
        'halve the learning rate, lengthen the warm-up, and look at kNN before you trust the loss'
    )
    if bad := [name for name, x in v.items() if not math.isfinite(x)]:
        return (
            f'Collapse suspected: {bad[0]} of the features is {v[bad[0]]}; '
            f'resume from an earlier checkpoint with half the learning rate.'
        )
    if v['std'] < 0.03:
        return (
            f'Collapse suspected: feature std is {v["std"]:.3f} (1 = spread evenly, 0 = all images '
            f'alike), mean cosine {v["cosine"]:.4f}; {advice}.'
        )
    if v['cosine'] > 0.999:
        return (
            f'Collapse suspected: the mean cosine between two images is {v["cosine"]:.4f} '
            f'(1 = all alike); {advice}.'
        )
    if v['rankme'] < max(1.5, 0.01 * v['rankme_max']):
        return (
            f'Dimensional collapse suspected: RankMe is {v["rankme"]:.1f} of at most '
            f'{v["rankme_max"]:.0f}; {advice}.'
        )
    return None
