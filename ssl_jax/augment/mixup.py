# SPDX-License-Identifier: Apache-2.0
"""Mixup and CutMix of a batch with itself in reverse order, and their soft targets.

Row r of a batch of B is mixed with row B - 1 - r; one draw holds for the whole batch.  The batch is
the global one, so neither mesh nor hosts change what is mixed; with gradient accumulation it is the
micro-batch, which draws for itself.

Reference: Zhang et al., arXiv 1710.09412; Yun et al., arXiv 1905.04899; timm `data/mixup.py`
(mode 'batch').
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special


class Mix(NamedTuple):
    """One draw.

    lam: () float32, share of a row's own image and label; 1 mixes nothing.
    cut: () bool, whether a box is pasted instead of all pixels blended.
    box: (4,) int32, y0, y1, x0, x1 of the pasted box, ends excluded.
    """

    lam: jax.Array
    cut: jax.Array
    box: jax.Array


def draw(key, size, mixup=0.8, cutmix=1.0, prob=1.0, switch_prob=0.5):
    """A `Mix` for images of `size` = (height, width).

    lam ~ Beta(alpha, alpha).  The box of CutMix has sides int(side sqrt(1 - lam)) and a uniform
    centre, is cut off at the image's border, and lam becomes 1 - box area / image area.

    Args:
      key: one key.
      mixup, cutmix: alpha of either; 0 turns it off.
      prob: probability that anything is mixed.
      switch_prob: probability of CutMix where both are on.
    """
    coin, which, beta, centre = jax.random.split(key, 4)
    if mixup and cutmix:
        cut = jax.random.bernoulli(which, switch_prob)
    else:
        cut = jnp.asarray(bool(cutmix))
    u = jax.random.uniform(beta)
    lam = jnp.where(cut, _beta(u, cutmix), _beta(u, mixup))
    lam = jnp.where(jax.random.bernoulli(coin, prob), lam, 1.0).astype(jnp.float32)
    sides = jnp.asarray(size)
    half = (sides * jnp.sqrt(1 - lam)).astype(jnp.int32) // 2
    middle = jax.random.randint(centre, (2,), 0, sides)
    low, high = jnp.clip(middle - half, 0, sides), jnp.clip(middle + half, 0, sides)
    inside = 1 - jnp.prod(high - low) / (size[0] * size[1])
    box = jnp.stack([low[0], high[0], low[1], high[1]])
    return Mix(jnp.where(cut, inside, lam).astype(jnp.float32), cut, box)


def _beta(u, alpha):
    """The quantile u of Beta(alpha, alpha), between 4096 exact ones.

    `jax.random.beta` rejects in loops, which take longer to compile than a small model.
    """
    if not alpha:
        return jnp.ones(())
    grid = np.linspace(0.0, 1.0, 4097)
    table = scipy.special.betaincinv(alpha, alpha, grid)
    return jnp.interp(u, jnp.asarray(grid, jnp.float32), jnp.asarray(table, jnp.float32))


def images(x, mix):
    """(B, H, W, 3) mixed with the same in reverse order."""
    other = x[::-1]
    y, x_ = jnp.arange(x.shape[1])[:, None], jnp.arange(x.shape[2])
    y0, y1, x0, x1 = mix.box
    inside = ((y >= y0) & (y < y1) & (x_ >= x0) & (x_ < x1))[..., None]  # (H, W, 1)
    blended = mix.lam * x + (1 - mix.lam) * other
    return jnp.where(mix.cut, jnp.where(inside, other, x), blended)


def targets(labels, num_classes, mix, smoothing=0.1):
    """Soft targets (B, K) float32 of labels (B,); rows sum to 1.

    lam s(y) + (1 - lam) s(y reversed), where s(y) is 1 - e + e / K at y and e / K elsewhere, e the
    label smoothing.
    """
    off = smoothing / num_classes
    one_hot = jax.nn.one_hot(labels, num_classes) * (1 - smoothing) + off
    return mix.lam * one_hot + (1 - mix.lam) * one_hot[::-1]
