# SPDX-License-Identifier: Apache-2.0
"""The decoder of MAE and Pixio: visible tokens and mask tokens in, pixels of every patch out."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ssl_jax import sharding
from ssl_jax.models import blocks as blocks_lib
from ssl_jax.models import pos_embed


class Decoder(nn.Module):
    """(latent, ids_restore) -> predicted pixels (B, N, p*p*3).

    Class tokens go through the decoder and are dropped from its output; the mask token has no
    embedding besides its position.

    Attributes:
      out_dim: p * p * 3.  num_patches: N of the training size.  pos_embed: 'sincos' or 'learned'.

    Reference: MAE `models_mae.py: forward_decoder`; Pixio `models_pixio.py: forward_decoder`.
    """

    embed_dim: int
    depth: int
    num_heads: int
    num_patches: int
    num_cls_tokens: int
    out_dim: int
    pos_embed: str = 'learned'
    mlp_ratio: float = 4.0
    eps: float = 1e-6
    dtype: Any = jnp.float32
    remat: str = 'none'

    @nn.compact
    def __call__(self, latent, ids_restore):
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

        # Raster order: token j is visible token ids_restore[j], or the mask token beyond them.
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
            ffn='mlp',
            layer_scale=None,
            eps=self.eps,
            dtype=self.dtype,
            kernel_init=nn.initializers.xavier_uniform(),
            capture=False,
        )
        x, _ = blocks(x, None)
        x = blocks_lib.LayerNorm(self.eps, name='decoder_norm')(x)
        return blocks_lib.Dense(self.out_dim, name='decoder_pred', **dense)(x)[:, c:]
