# SPDX-License-Identifier: Apache-2.0
"""Which patches are hidden.  Static shapes; noise in, index arrays out."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Mask(NamedTuple):
    ids_keep: jax.Array  # (B, K) visible tokens, in the order of the noise (not raster order)
    ids_restore: jax.Array  # (B, N) position of raster token j in [visible | masked]
    mask: jax.Array  # (B, N) float32, 1 = masked, raster order


def num_blocks(grid, mask_grid):
    """Number of noise values per image for a token `grid` (h, w) cut in blocks of mask_grid²."""
    h, w = grid
    if h % mask_grid or w % mask_grid:
        raise ValueError(
            f'mask_grid={mask_grid} does not divide the token grid {h}x{w}; '
            f'choose a divisor of both sides (1 masks single patches, as MAE does).'
        )
    return (h // mask_grid) * (w // mask_grid)


def from_noise(noise, grid, mask_ratio, mask_grid=1):
    """Masking of MAE (mask_grid 1) and Pixio (square blocks of mask_grid x mask_grid patches).

    The int(blocks * (1 - mask_ratio)) blocks of smallest noise stay visible; each kept block is
    expanded in place, in raster order inside the block.

    Args:
      noise: (B, num_blocks(grid, mask_grid)), uniform, free of ties.
      grid: (h, w) in patches.

    Reference: MAE `models_mae.py: random_masking`; Pixio `models_pixio.py: random_masking`.
    """
    h, w = grid
    blocks = num_blocks(grid, mask_grid)
    if noise.shape[-1] != blocks:
        raise ValueError(f'noise has {noise.shape[-1]} values per image for {blocks} blocks.')
    kept = int(blocks * (1 - mask_ratio))
    order = jnp.argsort(noise, axis=-1)  # (B, blocks)
    if mask_grid > 1:
        # Token ids of every block, (blocks, mask_grid²): blocks in raster order, tokens too.
        ids = np.arange(h * w).reshape(h // mask_grid, mask_grid, w // mask_grid, mask_grid)
        ids = jnp.asarray(ids.transpose(0, 2, 1, 3).reshape(blocks, -1))
        order = ids[order].reshape(noise.shape[0], h * w)
        kept *= mask_grid**2
    ids_restore = jnp.argsort(order, axis=-1)
    return Mask(order[:, :kept], ids_restore, (ids_restore >= kept).astype(jnp.float32))


def random_masking(keys, grid, mask_ratio, mask_grid=1):
    """`from_noise` with uniform noise of one key per sample.  keys (B,)."""
    n = num_blocks(grid, mask_grid)
    noise = jax.vmap(lambda key: jax.random.uniform(key, (n,)))(keys)
    return from_noise(noise, grid, mask_ratio, mask_grid)
