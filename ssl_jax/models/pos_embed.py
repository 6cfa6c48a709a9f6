# SPDX-License-Identifier: Apache-2.0
"""Position tables: the fixed sin-cos table and the three official ways to resize a table.

A table is (1, P + M*M, D): P prefix rows (class tokens), then patches in raster order.
"""

import functools

import jax.numpy as jnp
import numpy as np


def sincos(embed_dim, grid, num_prefix):
    """MAE's fixed table, float32 (1, num_prefix + grid², embed_dim); prefix rows are zero.

    The first half of the channels encodes the COLUMN, the second half the row (the official
    variable names say the opposite); each half is [sines | cosines] of pos / 10000^(k / (D/4)).

    Reference: MAE `util/pos_embed.py: get_2d_sincos_pos_embed`.
    """
    if embed_dim % 4:
        raise ValueError(f'sin-cos positions need embed_dim divisible by 4, got {embed_dim}.')
    omega = 10000.0 ** (-np.arange(embed_dim // 4, dtype=np.float64) / (embed_dim / 4))
    angles = np.arange(grid, dtype=np.float64)[:, None] * omega  # (grid, D/4)
    half = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)  # (grid, D/2)
    column = np.broadcast_to(half[None], (grid, grid, embed_dim // 2))
    row = np.broadcast_to(half[:, None], (grid, grid, embed_dim // 2))
    table = np.concatenate([column, row], axis=-1).reshape(grid * grid, embed_dim)
    table = np.concatenate([np.zeros((num_prefix, embed_dim)), table])
    return table[None].astype(np.float32)


def _cubic(x, a):
    """Keys' cubic convolution kernel, elementwise."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


@functools.lru_cache
def resize_weights(n_in, n_out, how):
    """The (n_out, n_in) matrix of one axis of a bicubic resize, float32.

    how:
      'bicubic': a = -0.75, half-pixel centres, border clamped, no antialias, scale n_out/n_in
        (MAE fine-tuning and Pixio).
      'offset': the same with scale (n_out + 0.1)/n_in (DINOv2 without registers, DINO, iBOT).
      'antialias': a = -0.5, support widened when shrinking, weights renormalised over the taps
        inside the table (DINOv2 with registers, timm).

    Reference: torch `F.interpolate(mode='bicubic')`; dinov2 `interpolate_pos_encoding`.
    """
    if how == 'antialias':
        scale = max(1.0, n_in / n_out)
        centre = (np.arange(n_out) + 0.5) * n_in / n_out
        taps = _cubic((np.arange(n_in) + 0.5 - centre[:, None]) / scale, -0.5)
        return (taps / taps.sum(axis=1, keepdims=True)).astype(np.float32)
    scale = (n_out + (0.1 if how == 'offset' else 0.0)) / n_in
    x = (np.arange(n_out) + 0.5) / scale - 0.5
    first = np.floor(x).astype(int) - 1
    weights = np.zeros((n_out, n_in))
    for tap in range(4):
        index = np.clip(first + tap, 0, n_in - 1)
        np.add.at(weights, (np.arange(n_out), index), _cubic(x - (first + tap), -0.75))
    return weights.astype(np.float32)


def resize(table, grid, num_prefix, how):
    """Resizes a table to `grid` = (h, w) in float32, prefix rows untouched; differentiable.

    Left alone only where the grid is square and equal to the table's: all official codes resample
    a non-square grid even if its number of patches matches.
    """
    prefix, patches = table[:, :num_prefix], table[:, num_prefix:]
    m = round(patches.shape[1] ** 0.5)
    if grid == (m, m):
        return table
    h, w = grid
    rows = jnp.asarray(resize_weights(m, h, how))
    columns = jnp.asarray(resize_weights(m, w, how))
    patches = jnp.asarray(patches, jnp.float32).reshape(m, m, -1)
    # Weights are exact in float32 only if the products are: never bf16, also on a TPU.
    patches = jnp.einsum('hm,mnd->hnd', rows, patches, precision='highest')
    patches = jnp.einsum('wn,hnd->hwd', columns, patches, precision='highest')
    return jnp.concatenate([prefix, patches.reshape(1, h * w, -1)], axis=1)
