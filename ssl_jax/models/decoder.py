# SPDX-License-Identifier: Apache-2.0
"""Decoder of MAE and Pixio: visible tokens and mask tokens in, pixels of every patch out."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax import sharding
from ssl_jax.models import blocks as blocks_lib
from ssl_jax.models import pos_embed


class Decoder(nn.Module):
    """(latent, ids_restore) -> predicted pixels (B, N, p*p*3).

    Class tokens pass through the decoder and are dropped from its output. Mask tokens differ only
    by position.

    References:
      MAE `models_mae.py: forward_decoder`; Pixio `models_pixio.py: forward_decoder`
    """

    embed_dim: int
    depth: int
    num_heads: int
    num_patches: int  # N at the training size
    num_cls_tokens: int  # of the encoder
    out_dim: int  # p * p * 3
    pos_embed: str = 'learned'  # or 'sincos'
    mlp_ratio: float = 4.0
    eps: float = 1e-6
    dtype: Any = jnp.float32
    remat: str = 'none'  # a key of `blocks.REMAT`

    @nn.compact
    def __call__(self, latent: jax.Array, ids_restore: jax.Array) -> jax.Array:
        """latent (B, C + K, D_enc), ids_restore (B, N) -> (B, N, out_dim)."""
        c, normal = self.num_cls_tokens, nn.initializers.normal(0.02)
        dense = dict(dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform())
        x = blocks_lib.Dense(self.embed_dim, name='decoder_embed', **dense)(latent)
        mask_token = self.param('mask_token', normal, (1, 1, self.embed_dim)).astype(x.dtype)
        if self.pos_embed == 'sincos':
            grid = round(self.num_patches**0.5)
            pos = jnp.asarray(pos_embed.sincos(self.embed_dim, grid, c))
        else:
            pos = self.param('decoder_pos_embed', normal, (1, c + self.num_patches, self.embed_dim))

        # Raster order: patch j is visible token ids_restore[j], or the mask token if there is none.
        visible = x[:, c:]
        last = visible.shape[1] - 1
        patches = jnp.take_along_axis(visible, jnp.minimum(ids_restore, last)[..., None], axis=1)
        patches = jnp.where((ids_restore > last)[..., None], mask_token, patches)
        x = jnp.concatenate([x[:, :c], patches], axis=1) + pos.astype(x.dtype)
        x = sharding.constrain(x)
        blocks = blocks_lib.block_stack(
            self.depth,
            remat=self.remat,
            name='decoder_blocks',
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            eps=self.eps,
            **dense,
        )
        x, _ = blocks(x, None)
        x = blocks_lib.LayerNorm(self.eps, name='decoder_norm')(x)
        return blocks_lib.Dense(self.out_dim, name='decoder_pred', **dense)(x)[:, c:]
