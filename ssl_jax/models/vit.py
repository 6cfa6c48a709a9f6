# SPDX-License-Identifier: Apache-2.0
"""The Vision Transformer of all methods.

What differs from the textbook: any number of class tokens, each with its own position row;
register tokens without position; the patch embedding is a matrix product on patches, so that
masked patches can be left out before it; blocks run as one scan with stacked parameters.

Reference: Dosovitskiy et al., arXiv 2010.11929; MAE `models_mae.py`; Pixio `pixio.py`;
DINOv2 `models/vision_transformer.py`.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ssl_jax import losses, sharding
from ssl_jax.models import layers, pos_embed

# name: (embed_dim, depth, num_heads)
SIZES = {
    'Ti': (192, 12, 3),
    'S': (384, 12, 6),
    'B': (768, 12, 12),
    'L': (1024, 24, 16),
    'H': (1280, 32, 16),
    '1B': (1536, 48, 24),
    '5B': (3072, 48, 32),
    'g': (1536, 40, 24),
}


class PatchEmbed(nn.Module):
    """Linear map of p x p pixel patches, equal to a convolution of stride p.  (B, N, p*p*3)."""

    embed_dim: int
    dtype: Any
    kernel_init: Any

    @nn.compact
    def __call__(self, patches):
        # Both official codes leave torch's default on the bias of this convolution.
        bias_init = layers.torch_uniform(patches.shape[-1])
        proj = layers.Dense(
            self.embed_dim,
            dtype=self.dtype,
            kernel_init=self.kernel_init or bias_init,
            bias_init=bias_init,
            name='proj',
        )
        return proj(patches)


class ViT(nn.Module):
    """Images (B, H, W, 3), normalised -> dict of tokens.

    Attributes:
      embed_dim, depth, num_heads: see SIZES.
      patch_size, img_size: pixels; the position table is for img_size, other sizes resize it.
      num_cls_tokens, num_register_tokens: 0..n each; order in the sequence is cls, reg, patches.
      pos_embed: 'sincos' (fixed, MAE) or 'learned'.
      pos_resize: how the table is resized, see `pos_embed.resize_weights`.
      ffn: 'mlp' or 'swiglu'.  layer_scale: start value of gamma, or None for none.
      mask_token: whether a mask token exists (iBOT, BEiT); it replaces masked patch embeddings.
      drop_path, drop_path_uniform: stochastic depth, see `layers.drop_path_keep`.
      init: 'mae' (Xavier, cls N(0, .02)) or 'dinov2' (N(0, .02), cls and registers N(0, 1e-6)).
      remat: 'none', 'dots' or 'full', see `layers.REMAT`.
    """

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int = 16
    img_size: int = 224
    mlp_ratio: float = 4.0
    num_cls_tokens: int = 1
    num_register_tokens: int = 0
    pos_embed: str = 'learned'
    pos_resize: str = 'bicubic'
    ffn: str = 'mlp'
    layer_scale: float | None = None
    mask_token: bool = False
    drop_path: float = 0.0
    drop_path_uniform: bool = False
    init_scheme: str = 'mae'
    eps: float = 1e-6
    dtype: Any = jnp.float32
    remat: str = 'none'

    @nn.compact
    def __call__(self, images, *, ids_keep=None, mask=None, drop_keys=None, capture=()):
        """Runs the encoder.

        Args:
          images: (B, H, W, 3), multiples of patch_size.
          ids_keep: (B, K) patches to keep, dropped before the embedding (MAE); all if None.
          mask: bool (B, N), patches whose embedding becomes the mask token (iBOT).
          drop_keys: one key per sample (B,); stochastic depth acts only where given.
          capture: block numbers whose raw outputs are wanted.

        Returns:
          cls_tokens (B, C, D), reg_tokens (B, R, D), patch_tokens (B, K or N, D) after the final
          norm; pre_norm (B, C + R + patches, D) before it; blocks (len(capture), B, ., D).
        """
        c, r = self.num_cls_tokens, self.num_register_tokens
        xavier = self.init_scheme == 'mae'
        normal = nn.initializers.normal(0.02)
        token_init = normal if xavier else nn.initializers.normal(1e-6)
        kernel_init = nn.initializers.xavier_uniform() if xavier else normal

        def tokens(name, n, init):
            return self.param(name, init, (1, n, self.embed_dim))

        grid = (images.shape[1] // self.patch_size, images.shape[2] // self.patch_size)
        pos = self.position_table(grid)
        patches = losses.patchify(images, self.patch_size)  # (B, N, p*p*3)
        patch_pos = pos[:, c:]
        if ids_keep is not None:
            patches = jnp.take_along_axis(patches, ids_keep[..., None], axis=1)
            patch_pos = patch_pos[0][ids_keep]  # (B, K, D)
        embed = PatchEmbed(
            self.embed_dim, self.dtype, kernel_init if xavier else None, name='patch_embed'
        )
        x = embed(patches)
        if self.mask_token:
            token = self.param('mask_token', nn.initializers.zeros, (1, self.embed_dim))
            if mask is not None:
                x = jnp.where(mask[..., None], token.astype(x.dtype), x)
        parts = [x + patch_pos.astype(x.dtype)]
        if r:
            parts.insert(0, tokens('register_tokens', r, token_init))
        if c:
            parts.insert(0, tokens('cls_token', c, token_init) + pos[:, :c])
        parts = [jnp.broadcast_to(p, (x.shape[0], *p.shape[1:])).astype(x.dtype) for p in parts]
        x = sharding.constrain(jnp.concatenate(parts, axis=1))  # (B, C + R + K, D)

        keep = None
        if drop_keys is not None and self.drop_path:
            keep = layers.drop_path_keep(
                drop_keys, self.depth, self.drop_path, self.drop_path_uniform
            )
        blocks = layers.block_stack(
            self.depth,
            remat=self.remat,
            name='blocks',
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            ffn=self.ffn,
            layer_scale=self.layer_scale,
            eps=self.eps,
            dtype=self.dtype,
            kernel_init=kernel_init,
            capture=bool(capture),
        )
        x, captured = blocks(x, keep)
        norm = layers.LayerNorm(self.eps, name='norm')
        y = norm(x)
        out = {
            'cls_tokens': y[:, :c],
            'reg_tokens': y[:, c : c + r],
            'patch_tokens': y[:, c + r :],
            'pre_norm': x,
        }
        if capture:
            ids = list(capture)
            if max(ids) >= self.depth:
                raise ValueError(f'capture={capture} names a block beyond depth {self.depth}.')
            out['blocks'] = captured[jnp.asarray(ids)]
        return out

    def position_table(self, grid):
        """The (1, C + h*w, D) table in float32 for a grid of h x w patches."""
        native = self.img_size // self.patch_size
        if self.pos_embed == 'sincos':
            table = jnp.asarray(pos_embed.sincos(self.embed_dim, native, self.num_cls_tokens))
        else:
            shape = (1, self.num_cls_tokens + native**2, self.embed_dim)
            table = self.param('pos_embed', nn.initializers.normal(0.02), shape)
        return pos_embed.resize(table, grid, self.num_cls_tokens, self.pos_resize)


def final_norm(params, tokens, eps=1e-6):
    """The final norm applied to any tokens (B, ., D), as Pixio does to every tapped block."""
    return layers.LayerNorm(eps).apply({'params': params['norm']}, tokens)


def flops_per_image(embed_dim, depth, num_tokens, mlp_ratio=4.0):
    """Forward FLOPs of the blocks for one image: 2 per multiply-add, attention included."""
    dense = 2 * num_tokens * embed_dim**2 * (4 + 2 * mlp_ratio)
    attention = 4 * num_tokens**2 * embed_dim
    return depth * (dense + attention)


def init_params(vit, rng, img_size=None):
    """Parameters of a fresh ViT (float32)."""
    size = img_size or vit.img_size
    return vit.init(rng, jnp.zeros((1, size, size, 3)))['params']
