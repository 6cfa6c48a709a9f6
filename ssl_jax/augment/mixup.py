# SPDX-License-Identifier: Apache-2.0
"""Mixup and CutMix of a batch with its reverse, and their soft targets.

Row r of a batch of B is mixed with row B - 1 - r, with one draw per batch. This is the global
batch, so the result depends neither on the mesh nor on hosts; with gradient accumulation it is the
micro-batch, with one draw each.

References:
  Zhang et al., arXiv 1710.09412; Yun et al., arXiv 1905.04899; timm `data/mixup.py` (mode 'batch')
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special


class Mix(NamedTuple):
    """One draw of mixup or CutMix."""

    lam: jax.Array  # () float32, weight of a row's original image and label; 1 mixes nothing
    # () bool, whether a box is pasted (CutMix) instead of blending all pixels (mixup).
    cut: jax.Array
    box: jax.Array  # (4,) int32, y0, y1, x0, x1 of the pasted box, ends excluded


def draw(key: jax.Array, size: tuple[int, int], mixup: float = 0.8, cutmix: float = 1.0) -> Mix:
    """Draws a `Mix`.

    lam ~ Beta(alpha, alpha). The box of CutMix has sides int(side sqrt(1 - lam)) and a uniform
    centre, and is clipped to the image; lam becomes 1 - box area / image area.

    Args:
      key: one key.
      size: (height, width) of the images.
      mixup: alpha of mixup; 0 turns it off.
      cutmix: alpha of CutMix; 0 turns it off. If both are on, each has probability 1/2.
    """
    _, which, beta, centre = jax.random.split(key, 4)
    if mixup and cutmix:
        cut = jax.random.bernoulli(which, 0.5)
    else:
        cut = jnp.asarray(bool(cutmix))
    u = jax.random.uniform(beta)
    lam = jnp.where(cut, _beta(u, cutmix), _beta(u, mixup)).astype(jnp.float32)
    sides = jnp.asarray(size)
    half = (sides * jnp.sqrt(1 - lam)).astype(jnp.int32) // 2
    middle = jax.random.randint(centre, (2,), 0, sides)
    low, high = jnp.clip(middle - half, 0, sides), jnp.clip(middle + half, 0, sides)
    inside = 1 - jnp.prod(high - low) / (size[0] * size[1])
    box = jnp.stack([low[0], high[0], low[1], high[1]])
    return Mix(jnp.where(cut, inside, lam).astype(jnp.float32), cut, box)


def _beta(u, alpha):
    """The quantile u of Beta(alpha, alpha), interpolated in a table of 4097 exact quantiles.

    `jax.random.beta` has rejection loops that take longer to compile than a small model.
    """
    if not alpha:
        return jnp.ones(())
    grid = np.linspace(0.0, 1.0, 4097)
    table = scipy.special.betaincinv(alpha, alpha, grid)
    return jnp.interp(u, jnp.asarray(grid, jnp.float32), jnp.asarray(table, jnp.float32))


def images(x: jax.Array, mix: Mix) -> jax.Array:
    """Mixes images (B, H, W, 3) with the batch in reverse order."""
    other = x[::-1]
    row, column = jnp.arange(x.shape[1])[:, None], jnp.arange(x.shape[2])
    y0, y1, x0, x1 = mix.box
    inside = ((row >= y0) & (row < y1) & (column >= x0) & (column < x1))[..., None]  # (H, W, 1)
    blended = mix.lam * x + (1 - mix.lam) * other
    return jnp.where(mix.cut, jnp.where(inside, other, x), blended)


def targets(labels: jax.Array, num_classes: int, mix: Mix, smoothing: float = 0.1) -> jax.Array:
    """Soft targets of a mixed batch: lam s(y) + (1 - lam) s(y reversed).

    s(y) is 1 - e + e / K at y and e / K elsewhere, with label smoothing e.

    Args:
      labels: int (B,).
      num_classes: K.
      mix: the draw that mixed the images.
      smoothing: e.

    Returns:
      (B, K) float32, rows sum to 1.
    """
    off = smoothing / num_classes
    one_hot = jax.nn.one_hot(labels, num_classes) * (1 - smoothing) + off
    return mix.lam * one_hot + (1 - mix.lam) * one_hot[::-1]
