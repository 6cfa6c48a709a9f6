# SPDX-License-Identifier: Apache-2.0
"""Predictor of I-JEPA: tokens of a context and positions in, features at these positions out."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax import sharding
from ssl_jax.models import blocks as blocks_lib
from ssl_jax.models import pos_embed


class Predictor(nn.Module):
    """A narrow ViT that sees the context and, for one target block at a time, mask tokens.

    References:
      I-JEPA `src/models/vision_transformer.py: VisionTransformerPredictor`
    """

    out_dim: int  # width of the encoder
    embed_dim: int  # its own width, channels
    depth: int
    num_heads: int
    grid: int  # patches of a side of the image
    mlp_ratio: float = 4.0
    eps: float = 1e-6
    dtype: Any = jnp.float32
    remat: str = 'none'  # a key of `blocks.REMAT`

    @nn.compact
    def __call__(
        self,
        context: jax.Array,
        ids: jax.Array,
        targets: jax.Array,
        count: jax.Array | None = None,
    ) -> jax.Array:
        """Features of M target blocks of each image, float (B, M, T, out_dim).

        Args:
          context: (B, K, out_dim), tokens of the encoder.
          ids: int (B, K), their patches.
          targets: int (B, M, T), patches to predict.
          count: int (), how many of the T are meant: nothing attends to the others. None: all.
        """
        (b, m, t), k, normal = targets.shape, ids.shape[1], nn.initializers.normal(0.02)
        dense = dict(dtype=self.dtype, kernel_init=normal)
        table = jnp.asarray(pos_embed.sincos(self.embed_dim, self.grid, 0))[0]  # (N, D)
        x = blocks_lib.Dense(self.embed_dim, name='embed', **dense)(context)
        x = x + table[ids].astype(x.dtype)
        token = self.param('mask_token', normal, (1, 1, self.embed_dim))
        masks = (token + table[targets]).astype(x.dtype)
        x = jnp.broadcast_to(x[:, None], (b, m, k, self.embed_dim))
        x = jnp.concatenate([x, masks], axis=2).reshape(b * m, k + t, -1)
        bias = ()
        if count is not None:
            hidden = jnp.where(jnp.arange(k + t) < k + count, 0.0, -1e30)
            bias = (jnp.broadcast_to(hidden, (self.num_heads, k + t, k + t)),)
        blocks = blocks_lib.block_stack(
            self.depth,
            remat=self.remat,
            name='blocks',
            shared=len(bias),
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            eps=self.eps,
            **dense,
        )
        x, _ = blocks(sharding.constrain(x), None, *bias)
        x = blocks_lib.LayerNorm(self.eps, name='norm')(x)[:, k:]
        return blocks_lib.Dense(self.out_dim, name='proj', **dense)(x).reshape(b, m, t, -1)
