# SPDX-License-Identifier: Apache-2.0
"""Position tables: the fixed sin-cos table and the official ways to resize a table.

A table is (1, P + M*M, D): P prefix rows (class tokens), then patches in raster order.  One of
relative positions (BEiT) is (rows, heads), see `layers.relative_index`.
"""

import functools

import jax.numpy as jnp
import numpy as np
from scipy import interpolate


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


def relative_distances(n_in, n_out):
    """Where BEiT puts the distances -(n_in - 1) .. n_in - 1 among those of n_out patches.

    At 0, ±1, ±(1 + q), ±(1 + q + q²), ...: near distances stay what they are, far ones spread.  The
    ratio q is halved into [1.01, 1.5] so that the farthest reaches n_out - 1.  Both ends are
    official: fewer patches get q = 1.01, which about cuts the middle out of the table, and beyond
    1.5 the farthest falls short of n_out - 1.

    Reference: BEiT `run_class_finetuning.py`.
    """
    low, high = 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        if (1 - q ** (n_in - 1)) / (1 - q) > n_out - 1:
            high = q
        else:
            low = q
    steps = np.cumsum(q ** np.arange(n_in - 1))
    return np.concatenate([-steps[::-1], [0], steps])


@functools.lru_cache
def relative_weights(n_in, n_out):
    """The (2 n_out - 1, 2 n_in - 1) matrix of one axis of `resize_relative`, float64.

    A cubic spline through the values at `relative_distances` (not-a-knot, as FITPACK's) is read at
    whole distances; beyond the farthest it keeps its last value.
    """
    if n_in < 3:
        raise ValueError(
            f'a table of relative positions of {n_in}x{n_in} patches is too small for a cubic '
            f'spline: keep the size of the images, or start from weights with at least 3x3 patches.'
        )
    x = relative_distances(n_in, n_out)
    at = np.clip(np.arange(1 - n_out, n_out), x[0], x[-1])
    return interpolate.CubicSpline(x, np.eye(len(x)), bc_type='not-a-knot')(at)


def resize_relative(table, n_in, n_out):
    """Tables of relative positions for n_in x n_in patches -> for n_out x n_out, numpy float32.

    Args:
      table: (..., (2 n_in - 1)² + 3, heads).  The last three rows, of the class token, stay.

    Reference: BEiT `run_class_finetuning.py`.  timm does it by linear interpolation on the same
    distances, transformers bilinearly on evenly spaced ones.
    """
    table = np.asarray(table)
    if n_in == n_out:
        return table
    weights, d, e = relative_weights(n_in, n_out), 2 * n_in - 1, 2 * n_out - 1
    middle = table[..., : d * d, :].astype(np.float64)
    middle = middle.reshape(*table.shape[:-2], d, d, table.shape[-1])
    middle = np.einsum('yi,xj,...ijh->...yxh', weights, weights, middle, optimize=True)
    middle = middle.reshape(*table.shape[:-2], e * e, table.shape[-1])
    return np.concatenate([middle, table[..., d * d :, :]], axis=-2).astype(np.float32)
