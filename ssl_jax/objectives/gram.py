# SPDX-License-Identifier: Apache-2.0
"""Gram anchoring: a student's patches stay as similar to each other as those of a frozen teacher.

Long self-distillation improves class tokens while patch features lose their locality. The loss is
on similarities alone, so features may still rotate and move with the other losses.

References:
  DINOv3, arXiv 2508.10104, section 4.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ssl_jax.models import blocks, pos_embed
from ssl_jax.models import vit as vit_lib


def loss(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Mean over images and pairs (i, j) of (cosine of student patches - of teacher patches)².

    Args:
      student: (B, N, D) patch tokens after the final norm, masked ones included.
      teacher: (B, N, D') of the same patches; no gradient.

    Returns:
      float32 scalar, 0 to 4.
    """

    def cosines(x):
        x = blocks.l2_normalize(x)
        return jnp.einsum('bid,bjd->bij', x, x, precision='highest')

    return jnp.square(cosines(student) - cosines(jax.lax.stop_gradient(teacher))).mean()


def resize(x: jax.Array, side: int, how: str) -> jax.Array:
    """(B, h, w, C) -> (B, side, side, C) in float32, see `pos_embed.resize_weights`."""
    x = x.astype(jnp.float32)
    rows, columns = (pos_embed.resize_weights(n, side, how) for n in x.shape[1:3])
    x = jnp.einsum('yh,bhwc->bywc', rows, x, precision='highest')
    return jnp.einsum('xw,bywc->byxc', columns, x, precision='highest')


def shrink(crops: jax.Array, size: int) -> jax.Array:
    """Crops (B, S, S, 3) of values in [0, 255] at `size` pixels, antialiased; as they are at S."""
    if crops.shape[1] == size:
        return crops
    return jnp.clip(resize(crops, size, 'antialias'), 0, 255)  # bicubic overshoots at edges


@jax.named_scope('teacher')
def targets(vit: vit_lib.ViT, params: Any, crops: jax.Array, side: int) -> jax.Array:
    """Teacher for `loss`: patch tokens of larger crops, resized to the student's grid.

    Args:
      vit: encoder of both.
      params: the frozen copy.
      crops: (B, S, S, 3), normalised, with neither colour changes nor masks.
      side: patches along a side of the student's crops.

    Returns:
      (B, side², D) float32.
    """
    tokens = vit.apply({'params': params}, crops)['patch_tokens']
    own = crops.shape[1] // vit.patch_size
    if own != side:
        grid = tokens.reshape(-1, own, own, vit.embed_dim)
        tokens = resize(grid, side, 'bicubic').reshape(-1, side**2, vit.embed_dim)
    return jax.lax.stop_gradient(tokens.astype(jnp.float32))


def replaced(copy: Any, teacher: Any, done: jax.Array, every: int, updates: int) -> Any:
    """The frozen copy after `done` steps: `teacher` at the first `updates` multiples of `every`."""
    due = (done % every == 0) & (done <= every * updates)
    return jax.tree.map(lambda old, new: jnp.where(due, new, old), copy, teacher)


def flops(vit: vit_lib.ViT, size: int, side: int) -> float:
    """FLOPs of the anchor for one crop: the teacher's forward at `size` pixels, and the loss."""
    patches = (size // vit.patch_size) ** 2
    tokens = patches + vit.num_cls_tokens + vit.num_register_tokens
    blocks_ = vit_lib.flops_per_image(vit.embed_dim, vit.depth, tokens, vit.mlp_ratio)
    embed = 2 * patches * 3 * vit.patch_size**2 * vit.embed_dim
    pairs = 2 * side**4 * vit.embed_dim  # of the teacher, of the student, and two of its gradient
    return blocks_ + embed + 4 * pairs
