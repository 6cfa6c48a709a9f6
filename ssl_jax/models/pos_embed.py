# SPDX-License-Identifier: Apache-2.0
"""Position tables: the fixed sin-cos table, and the resizing rules of the official codes.

A table is (1, P + M*M, D): P prefix rows (class tokens), then M*M patches in raster order. A table
of relative positions (BEiT) is (rows, heads), see `blocks.relative_index`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from scipy import interpolate

from ssl_jax.run import errors


def sincos(embed_dim: int, grid: int, num_prefix: int) -> np.ndarray:
    """MAE's fixed table, float32 (1, num_prefix + grid², embed_dim); prefix rows are zero.

    The first half of the D channels encodes the COLUMN, the second half the row (the official
    variable names say the opposite). Each half is [sines | cosines] of pos / 10000^(k / (D/4)).

    References:
      MAE `util/pos_embed.py: get_2d_sincos_pos_embed`
    """
    if embed_dim % 4:
        raise errors.UserError(f'sin-cos positions need embed_dim divisible by 4, got {embed_dim}.')
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
def resize_weights(n_in: int, n_out: int, how: str) -> np.ndarray:
    """Matrix (n_out, n_in) of a bicubic resize along one axis, float32.

    Args:
      how: one of
        'bicubic': a = -0.75, half-pixel centres, border clamped, no antialias, scale n_out/n_in
          (MAE fine-tuning and Pixio).
        'offset': the same with scale (n_out + 0.1)/n_in (DINOv2 without registers, DINO, iBOT).
        'antialias': a = -0.5, support widened when shrinking, weights renormalised over the taps
          inside the table (DINOv2 with registers, timm).

    References:
      torch `F.interpolate(mode='bicubic')`; dinov2 `interpolate_pos_encoding`
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


def resize(table: jax.Array, grid: tuple[int, int], num_prefix: int, how: str) -> jax.Array:
    """Resizes a table (1, P + M*M, D) to (1, P + h*w, D) in float32, see `resize_weights`.

    Differentiable; the P prefix rows keep their values. The table is returned unchanged only if
    `grid` (h, w) is its own square grid. All official codes resample a non-square grid even if its
    number of patches matches.
    """
    prefix, patches = table[:, :num_prefix], table[:, num_prefix:]
    m = round(patches.shape[1] ** 0.5)
    if grid == (m, m):
        return table
    rows, columns = (jnp.asarray(resize_weights(m, n, how)) for n in grid)
    patches = jnp.asarray(patches, jnp.float32).reshape(m, m, -1)
    # Float32 products also on a TPU: bf16 would round the table.
    patches = jnp.einsum('hm,mnd->hnd', rows, patches, precision='highest')
    patches = jnp.einsum('wn,hnd->hwd', columns, patches, precision='highest')
    return jnp.concatenate([prefix, patches.reshape(1, -1, patches.shape[-1])], axis=1)


def relative_distances(n_in: int, n_out: int) -> np.ndarray:
    """BEiT's positions of the distances -(n_in - 1) .. n_in - 1 among those of n_out patches.

    The positions are 0, ±1, ±(1 + q), ±(1 + q + q²), ...: near distances hardly move, far ones
    spread. The ratio q is found by bisection of [1.01, 1.5] so that the farthest position is
    n_out - 1. Both limits are official. Fewer patches get q = 1.01, which roughly crops the middle
    of the table; where q would exceed 1.5, the farthest position is below n_out - 1.

    References:
      BEiT `run_class_finetuning.py`
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
def relative_weights(n_in: int, n_out: int, how: str = 'spline') -> np.ndarray:
    """Matrix (2 n_out - 1, 2 n_in - 1) of `resize_relative` along one axis, float64.

    Args:
      how: one of
        'spline': a cubic spline (not-a-knot, as in FITPACK) through the values at
          `relative_distances`, evaluated at integer distances; beyond the farthest position it
          keeps its last value (BEiT's fine-tuning).
        'linear': straight lines through the same points (timm).
        'bilinear': straight lines through evenly spaced values, half-pixel centres, border clamped
          (transformers).

    References:
      BEiT `run_class_finetuning.py`; timm `resize_rel_pos_bias_table`; transformers
      `BeitRelativePositionBias`
    """
    if how == 'bilinear':
        d, e = 2 * n_in - 1, 2 * n_out - 1
        centres = (np.arange(e) + 0.5) * d / e - 0.5
        return np.stack([np.interp(centres, np.arange(d), unit) for unit in np.eye(d)], axis=1)
    if how == 'linear':
        x, points = relative_distances(n_in, n_out), np.arange(1 - n_out, n_out)
        return np.stack([np.interp(points, x, unit) for unit in np.eye(len(x))], axis=1)
    if n_in < 3:
        raise errors.UserError(
            f'a table of relative positions of {n_in}x{n_in} patches is too small for a cubic '
            f'spline: keep the image size, or start from weights with at least 3x3 patches.'
        )
    x = relative_distances(n_in, n_out)
    points = np.clip(np.arange(1 - n_out, n_out), x[0], x[-1])
    return interpolate.CubicSpline(x, np.eye(len(x)), bc_type='not-a-knot')(points)


def resize_relative(
    table: np.ndarray | jax.Array, n_in: int, n_out: int | tuple[int, int], how: str = 'spline'
) -> np.ndarray | jax.Array:
    """Resizes tables of relative positions from n_in x n_in to n_out patches.

    (..., (2 n_in - 1)² + 3, heads) -> float32 (..., (2 h - 1)(2 w - 1) + 3, heads). The last three
    rows, of the class token, are kept.

    Args:
      table: of numpy, or of jax (then it is differentiable).
      n_in: patches of a side of the square that it is for.
      n_out: patches of a side, or (h, w).
      how: see `relative_weights`.
    """
    grid = (n_out, n_out) if isinstance(n_out, int) else tuple(n_out)
    if grid == (n_in, n_in):
        return table
    rows, columns = (relative_weights(n_in, n, how) for n in grid)
    d, e = 2 * n_in - 1, (2 * grid[0] - 1) * (2 * grid[1] - 1)
    middle = table[..., : d * d, :].reshape(*table.shape[:-2], d, d, table.shape[-1])
    equation = 'yi,xj,...ijh->...yxh'
    if isinstance(table, jax.Array):
        rows, columns, middle = (jnp.asarray(x, jnp.float32) for x in (rows, columns, middle))
        middle = jnp.einsum(equation, rows, columns, middle, precision='highest')
        xp = jnp
    else:
        middle = np.einsum(equation, rows, columns, middle.astype(np.float64), optimize=True)
        xp = np
    middle = middle.reshape(*table.shape[:-2], e, table.shape[-1])
    return xp.concatenate([middle, table[..., d * d :, :]], axis=-2).astype(xp.float32)
