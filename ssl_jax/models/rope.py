# SPDX-License-Identifier: Apache-2.0
"""Axial rotary positions (DINOv3): queries and keys of patches, turned by their place in the image.

Channel pairs (i, i + d/2) of a head of d channels are turned by an angle. The first d/4 angles are
2 pi y / period, the others 2 pi x / period, with y and x of the centre of the patch in [-1, 1] and
periods from 1 to almost 100. Angle 0, of class tokens, registers and padding, turns nothing. There
is no table to resize: another image size is another set of coordinates.

References:
  DINOv3, arXiv 2508.10104, section 3.2; transformers `models/dinov3_vit/modeling_dinov3_vit.py`
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.kernels.segments import Segment, tokens_per_row
from ssl_jax.run import errors

PERIOD = 100.0  # beyond the longest; coordinates have length 2


def periods(head_dim: int) -> np.ndarray:
    """PERIOD^(2 i / (d/2)) for i = 0, 1, ..., d/4 - 1, float32.

    Raises:
      UserError: head_dim is not a multiple of 4.
    """
    if head_dim % 4:
        raise errors.UserError(
            f"pos_embed='rope' needs heads of a multiple of 4 channels, not {head_dim}: change "
            f'num_heads or embed_dim.'
        )
    return (PERIOD ** (4 * np.arange(head_dim // 4) / head_dim)).astype(np.float32)


def angles(grid: tuple[int, int], head_dim: int, scale: jax.Array | None = None) -> jax.Array:
    """Angles (h * w, head_dim / 2) in radians, float32, patches in raster order.

    Args:
      grid: (h, w) in patches.
      head_dim: d.
      scale: factor of the coordinates, None for 1.
    """
    centres = [(2 * np.arange(n) + 1) / n - 1 for n in grid]
    places = np.stack(np.meshgrid(*centres, indexing='ij'), axis=-1).reshape(-1, 2, 1)
    table = 2 * math.pi * places / periods(head_dim)  # (h * w, 2, d/4)
    table = jnp.asarray(table.reshape(len(table), -1), jnp.float32)
    return table if scale is None else table * scale


def tables(
    grids: Sequence[tuple[int, int]],
    prefix: int,
    segments: Sequence[Segment],
    head_dim: int,
    scale: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines (T, head_dim / 2) of all tokens of a row, float32.

    Args:
      grids: (h, w) in patches, per segment.
      prefix: tokens in front of the patches of an image.
      segments: layout of the T tokens.
      head_dim, scale: see `angles`.
    """
    found = []
    for fn in (jnp.cos, jnp.sin):
        parts = [
            jnp.tile(
                fn(jnp.pad(angles(grid, head_dim, scale), ((prefix, s.padding), (0, 0)))),
                (s.images, 1),
            )
            for grid, s in zip(grids, segments, strict=True)
        ]
        found.append(jnp.concatenate(parts))
    assert len(found[0]) == tokens_per_row(segments)
    return found[0], found[1]


def rotate(qkv: jax.Array, num_heads: int, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turns queries and keys of qkv (B * T, 3 * D), heads of [q | k | v]; computed in float32.

    Args:
      qkv: as `kernels.attention.attention` takes it.
      num_heads: of queries, keys and values each.
      cos, sin: (T, d / 2), see `tables`.
    """
    tokens, half = cos.shape
    x = qkv.reshape(-1, tokens, 3, num_heads, 2, half)
    a, b = (x[:, :, :2, :, i].astype(jnp.float32) for i in (0, 1))  # (B, T, 2, H, d/2)
    cos, sin = (t[:, None, None] for t in (cos, sin))
    turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-2).astype(qkv.dtype)
    return jnp.concatenate([turned, x[:, :, 2:]], axis=2).reshape(qkv.shape)
