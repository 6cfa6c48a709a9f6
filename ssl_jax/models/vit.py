# SPDX-License-Identifier: Apache-2.0
"""Vision Transformer of all methods.

Differences from the original ViT: any number of class tokens, each with a position row; register
tokens without position; a patch embedding that is a matrix product on patches, so hidden patches
are dropped before it; blocks as one scan with stacked parameters; relative position biases (BEiT),
rotary positions (DINOv3), keys without bias (both).

References:
  Dosovitskiy et al., arXiv 2010.11929; MAE `models_mae.py`; Pixio `pixio.py`;
  DINOv2 `models/vision_transformer.py`; BEiT `modeling_pretrain.py`
"""

from collections.abc import Sequence
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax import sharding
from ssl_jax.kernels import ops
from ssl_jax.kernels.segments import Segment, join, split
from ssl_jax.kernels.tpu import attention as tpu_attention
from ssl_jax.kernels.tpu import rows as tpu_rows
from ssl_jax.models import blocks as blocks_lib
from ssl_jax.models import patches as patches_lib
from ssl_jax.models import pos_embed, rope
from ssl_jax.run import errors

Size = Literal['Ti', 'S', 'B', 'L', 'H', '1B', '5B', 'g']
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
    # Of DINOv3 alone, with SwiGLU, see `methods.dinov3`.
    'S+': (384, 12, 6),
    'L+': (1024, 24, 16),
    'H+': (1280, 32, 20),
    '7B': (4096, 40, 32),
}


class PatchEmbed(nn.Module):
    """Linear map of patches (B, N, p*p*3) -> (B, N, D), equal to a convolution of stride p."""

    embed_dim: int
    dtype: Any
    kernel_init: Any
    zero_bias: bool = False

    @nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        # MAE and DINOv2 keep torch's default initializer for the bias of this convolution.
        bias_init = blocks_lib.torch_uniform(patches.shape[-1])
        proj = blocks_lib.Dense(
            self.embed_dim,
            dtype=self.dtype,
            kernel_init=self.kernel_init or bias_init,
            bias_init=nn.initializers.zeros if self.zero_bias else bias_init,
            name='proj',
        )
        return proj(patches)


class ViT(nn.Module):
    """Normalised images (B, H, W, 3) -> dict of tokens."""

    embed_dim: int
    depth: int
    num_heads: int
    patch_size: int = 16  # pixels
    img_size: int = 224  # pixels per side that the position table is for; it is resized for others
    mlp_ratio: float = 4.0  # hidden width of the MLP / embed_dim
    num_cls_tokens: int = 1  # the sequence is class tokens, registers, patches
    num_register_tokens: int = 0
    # 'learned' or 'sincos' (fixed, MAE), tables; 'rope' (rotary, DINOv3), or 'none'.
    pos_embed: str = 'learned'
    pos_resize: str = 'bicubic'  # see `pos_embed.resize_weights`
    # Relative position biases of attention: one table for all blocks ('shared', BEiT in
    # pretraining), one per block ('layer', in fine-tuning), or None.
    rel_pos: str | None = None
    rel_resize: str = 'spline'  # see `pos_embed.relative_weights`
    key_bias: bool = True  # not in BEiT and DINOv3
    ffn: str = 'mlp'  # or 'swiglu'
    layer_scale: float | None = None  # initial gamma; None for no LayerScale
    mask_token: bool = False  # it replaces masked patch embeddings (iBOT, BEiT)
    drop_path: float = 0.0  # rate of stochastic depth, see `blocks.drop_path_keep`
    drop_path_uniform: bool = False
    # 'mae' (Xavier, cls N(0, .02)), 'dinov2' (N(0, .02), cls and registers N(0, 1e-6)), 'dinov3'
    # (all N(0, .02)) or 'beit' (N(0, .02) within one deviation; `init_params` scales it by depth).
    init_scheme: str = 'mae'
    eps: float = 1e-6  # of the norms
    # The final norm is that of the mean of the patch tokens, and tokens have none (`fc_norm` of
    # MAE and BEiT after fine-tuning).
    pooled_norm: bool = False
    dtype: Any = jnp.float32
    remat: str = 'none'  # a key of `blocks.REMAT`

    @nn.compact
    def __call__(
        self,
        images: jax.Array | tuple[jax.Array, ...],
        *,
        ids_keep: jax.Array | None = None,
        mask: jax.Array | None = None,
        drop_keys: jax.Array | None = None,
        drop: jax.Array | tuple[jax.Array, ...] | None = None,
        pos_scale: jax.Array | None = None,
        capture: Sequence[int] = (),
    ) -> dict[str, jax.Array] | list[dict[str, jax.Array]]:
        """Runs the encoder on images of one size, or on crops of several sizes at once.

        Args:
          images: (B, H, W, 3), multiples of patch_size; or a tuple of (B, n, H, W, 3), one per
            size. The tokens of all crops of a row then share the dense layers in one pass, while
            each crop attends to itself.
          ids_keep: (B, K) patches to keep; others are dropped before the embedding (MAE). None
            keeps all.
          mask: bool (B, N), patches whose embedding becomes the mask token (iBOT); (B, n, N) for
            the first of several sizes.
          drop_keys: (B,), one key per row for per-image stochastic depth; None for none.
          drop: stochastic depth drawn by the caller, see `blocks.Block`.
          pos_scale: factor of the coordinates of rotary positions; None for 1.
          capture: indices of blocks whose raw outputs are returned (one size only).

        Returns:
          dict of
            cls_tokens (B, C, D), reg_tokens (B, R, D), patch_tokens (B, K or N, D): after the final
              norm, if it is that of tokens;
            pooled (B, D): the final norm of the mean of the patch tokens, only with `pooled_norm`;
            pre_norm (B, C + R + patches, D): before the final norm;
            blocks (len(capture), B, ., D): only with `capture`.
          For several sizes, a list of dicts with a crop axis after B.
        """
        if capture and max(capture) >= self.depth:
            raise errors.UserError(
                f'capture={capture} names a block beyond depth {self.depth}: use 0 to '
                f'{self.depth - 1}.'
            )
        single = not isinstance(images, tuple)
        if single:
            images = (images[:, None],)
            mask = mask if mask is None else mask[:, None]
        parts = self._embed(images, ids_keep, mask)
        # If images skip branches, or for the kernels of long images, each image starts in a new
        # register (8 rows).
        long = max(p.shape[2] for p in parts) > tpu_attention.SHORT and not self.rel_pos
        multiple = tpu_rows.SUBLANES if isinstance(drop, tuple) or long else 1
        segments = tuple(Segment(*p.shape[1:3], -p.shape[2] % multiple) for p in parts)
        x = sharding.constrain(join(parts, segments))  # (B, all tokens, D)

        if drop_keys is not None and self.drop_path:
            num_images = sum(s.images for s in segments)
            drop = blocks_lib.drop_path_keep(
                drop_keys, self.depth, self.drop_path, self.drop_path_uniform, num_images
            )
        window = self._window(images, ids_keep) if self.rel_pos else None
        grids = [self._grid(crops) for crops in images]
        rotation = self._rotation(grids, segments, drop, pos_scale, ids_keep)
        shared = (None, rotation) if rotation else ()
        if self.rel_pos == 'shared':
            shape = (blocks_lib.relative_rows((window[1],) * 2), self.num_heads)
            table = self.param('rel_pos_bias', nn.initializers.zeros, shape)
            shared = (blocks_lib.relative_bias(table, *window),)
        same = ('num_heads', 'mlp_ratio', 'ffn', 'layer_scale', 'eps', 'dtype', 'key_bias', 'remat')
        blocks = blocks_lib.block_stack(
            self.depth,
            name='blocks',
            shared=len(shared),
            window=window if self.rel_pos == 'layer' else None,
            kernel_init=self._inits[0],
            capture=bool(capture),
            segments=segments,
            **{field: getattr(self, field) for field in same},
        )
        x, captured = blocks(x, drop, *shared)
        norm = blocks_lib.LayerNorm(self.eps, name='norm')
        tokens = split(x, segments)
        normed = tokens if self.pooled_norm else split(norm(x), segments)
        parts = list(map(self._named, normed, tokens))
        if self.pooled_norm:
            for part in parts:
                part['pooled'] = norm(part['patch_tokens'].astype(jnp.float32).mean(axis=-2))
        if not single:
            return parts
        out = jax.tree.map(lambda t: t[:, 0], parts[0])
        if capture:
            out['blocks'] = captured[jnp.asarray(list(capture))]
        return out

    @property
    def _inits(self):
        """Initializers of kernels, of class tokens and registers, and of the mask token."""
        normal = nn.initializers.normal(0.02)
        return {
            'mae': (nn.initializers.xavier_uniform(), normal, nn.initializers.zeros),
            'dinov2': (normal, nn.initializers.normal(1e-6), nn.initializers.zeros),
            'dinov3': (normal, normal, nn.initializers.zeros),
            'beit': (blocks_lib.truncated_normal,) * 3,
        }[self.init_scheme]

    def _embed(self, images, ids_keep, mask):
        """Tokens with positions, (B, n, C + R + patches, D) per size."""
        batch, c, r = images[0].shape[0], self.num_cls_tokens, self.num_register_tokens
        kernel_init, token_init, mask_init = self._inits
        dinov2 = self.init_scheme in ('dinov2', 'dinov3')
        beit = self.init_scheme == 'beit'

        # Replicated before rows are gathered, or their channels would go to all chips and back.
        table = None if self.pos_embed == 'rope' else sharding.whole(self.position_table())
        patches, positions = [], []
        for crops in images:
            n, height, width = crops.shape[1:4]
            grid = self._grid(crops)
            x = patches_lib.patchify(crops.reshape(-1, height, width, 3), self.patch_size)
            patches.append(x.reshape(batch, n, *x.shape[1:]))  # (B, n, N, p*p*3)
            if table is None:
                positions.append(jnp.zeros((1, c + grid[0] * grid[1], self.embed_dim)))
            else:
                positions.append(pos_embed.resize(table, grid, c, self.pos_resize))
        patch_positions = [pos[:, None, c:] for pos in positions]
        if ids_keep is not None:
            patches = [jnp.take_along_axis(patches[0], ids_keep[:, None, :, None], axis=2)]
            patch_positions = [positions[0][0, c:][ids_keep][:, None]]  # (B, 1, K, D)
        counts = [Segment(*p.shape[1:3]) for p in patches]
        embed = PatchEmbed(
            self.embed_dim, self.dtype, None if dinov2 else kernel_init, beit, name='patch_embed'
        )
        tokens = split(embed(join(patches, counts)), counts)
        if self.mask_token:
            token = self.param('mask_token', mask_init, (1, self.embed_dim))
            if mask is not None:
                tokens[0] = jnp.where(mask[..., None], token.astype(self.dtype), tokens[0])

        def parameter(name, count):
            return self.param(name, token_init, (1, count, self.embed_dim))[:, None]

        registers = [parameter('register_tokens', r)] if r else []
        cls_token = parameter('cls_token', c) if c else None
        parts = []
        for x, pos, patch_pos in zip(tokens, positions, patch_positions, strict=True):
            prefix = [cls_token + pos[:, None, :c]] if c else []
            prefix = [
                jnp.broadcast_to(p, (*x.shape[:2], *p.shape[2:])).astype(x.dtype)
                for p in prefix + registers
            ]
            parts.append(jnp.concatenate([*prefix, x + patch_pos.astype(x.dtype)], axis=2))
        return parts

    def _named(self, y, x):
        """Tokens (..., C + R + N, D) after and before the final norm -> dict of `__call__`."""
        c, r = self.num_cls_tokens, self.num_register_tokens
        return {
            'cls_tokens': y[..., :c, :],
            'reg_tokens': y[..., c : c + r, :],
            'patch_tokens': y[..., c + r :, :],
            'pre_norm': x,
        }

    def _grid(self, crops):
        """(h, w) in patches of crops (B, n, H, W, 3)."""
        return tuple(side // self.patch_size for side in crops.shape[2:4])

    def _rotation(self, grids, segments, drop, scale, ids_keep):
        """`rope.tables` of the tokens that attention sees; None without rotary positions."""
        if self.pos_embed != 'rope':
            return None
        if ids_keep is not None:
            raise errors.UserError(
                "pos_embed='rope' is for whole images, not for some of their patches; use a method "
                'that shows the encoder whole images, such as dinov3.'
            )
        if isinstance(drop, tuple):
            kept = zip(segments, drop, strict=True)
            segments = [s._replace(images=ids.shape[-1]) for s, ids in kept]
        prefix = self.num_cls_tokens + self.num_register_tokens
        return rope.tables(grids, prefix, segments, self.embed_dim // self.num_heads, scale)

    @property
    def has_table(self) -> bool:
        """Whether positions are a table that is added to the tokens."""
        return self.pos_embed in ('learned', 'sincos')

    def _window(self, images, ids_keep):
        """`blocks.Attention.window`; checks that the images are whole and of one size."""
        if len(images) > 1 or ids_keep is not None:
            raise errors.UserError(
                f'relative positions are for whole images of one size, not for '
                f'{"crops of several sizes" if len(images) > 1 else "some of their patches"}; use '
                f'a method that shows the encoder whole images, such as beit.'
            )
        if self.num_cls_tokens != 1 or self.num_register_tokens:
            raise errors.UserError(
                f'relative positions need one class token and no registers, not '
                f'{self.num_cls_tokens} and {self.num_register_tokens}: set num_cls_tokens=1 and '
                f'num_register_tokens=0.'
            )
        return self._grid(images[0]), self.img_size // self.patch_size, self.rel_resize

    def position_table(self) -> jax.Array:
        """Position table (1, C + M*M, D) in float32 for the native grid of M x M patches."""
        native = self.img_size // self.patch_size
        if self.pos_embed == 'sincos':
            return jnp.asarray(pos_embed.sincos(self.embed_dim, native, self.num_cls_tokens))
        shape = (1, self.num_cls_tokens + native**2, self.embed_dim)
        if self.pos_embed == 'none':
            return jnp.zeros(shape)
        beit = self.init_scheme == 'beit'
        init = blocks_lib.truncated_normal if beit else nn.initializers.normal(0.02)
        return self.param('pos_embed', init, shape)


def final_norm(params: dict, tokens: jax.Array, eps: float = 1e-6) -> jax.Array:
    """Applies the final norm to tokens (B, ., D), as Pixio does to every tapped block."""
    return blocks_lib.LayerNorm(eps).apply({'params': params['norm']}, tokens)


def last_attention(vit: ViT, params: dict, images: jax.Array) -> jax.Array:
    """Attention weights of the last block, (B, heads, tokens, tokens) float32, rows sum to 1.

    Tokens are ordered cls, registers, patches: [:, :, 0, C + R:] is the attention of the class
    token to patches. All weights are in memory at once, so pass few images.

    References:
      DINO `visualize_attention.py`
    """
    # A block of zero parameters adds nothing, so the output is the last block's input.
    skipped = jax.tree.map(lambda p: p.at[-1].set(0), params['blocks'])
    x = vit.apply({'params': {**params, 'blocks': skipped}}, images)['pre_norm']
    last = jax.tree.map(lambda p: p[-1], params['blocks'])
    x = blocks_lib.LayerNorm(vit.eps).apply({'params': last['norm1']}, x)
    dense = last['attn']['qkv']
    bias = dense.get('bias')
    if bias is None:
        q_bias, v_bias = (dense[name] for name in blocks_lib.QKV_BIASES)
        bias = jnp.concatenate([q_bias, jnp.zeros_like(q_bias), v_bias])
    qkv = ops.dense(*(a.astype(vit.dtype) for a in (x, dense['kernel'], bias)))
    if vit.pos_embed == 'rope':
        grid = tuple(side // vit.patch_size for side in images.shape[1:3])
        prefix, head_dim = x.shape[1] - grid[0] * grid[1], vit.embed_dim // vit.num_heads
        tables = rope.tables([grid], prefix, [Segment(1, x.shape[1])], head_dim)
        qkv = rope.rotate(qkv.reshape(-1, qkv.shape[-1]), vit.num_heads, *tables)
    q, k, _ = jnp.split(qkv.reshape(*x.shape[:2], 3 * vit.num_heads, -1), 3, axis=2)
    logits = jnp.einsum('bnhd,bmhd->bhnm', q, k, preferred_element_type=jnp.float32)
    logits = logits * q.shape[-1] ** -0.5
    if vit.rel_pos:
        table = (params if vit.rel_pos == 'shared' else last['attn'])['rel_pos_bias']
        grid = tuple(side // vit.patch_size for side in images.shape[1:3])
        side = vit.img_size // vit.patch_size
        logits = logits + blocks_lib.relative_bias(table, grid, side, vit.rel_resize)
    return jax.nn.softmax(logits, axis=-1)


def flops_per_image(embed_dim: int, depth: int, num_tokens: int, mlp_ratio: float = 4.0) -> float:
    """Forward FLOPs of the blocks for one image: 2 per multiply-add, attention included."""
    dense = 2 * num_tokens * embed_dim**2 * (4 + 2 * mlp_ratio)
    attention = 4 * num_tokens**2 * embed_dim
    return depth * (dense + attention)


def init_params(vit: ViT, rng: jax.Array) -> dict:
    """Parameters of a fresh ViT, float32."""
    params = vit.init(rng, jnp.zeros((1, vit.img_size, vit.img_size, 3)))['params']
    if vit.init_scheme == 'beit':
        params = {**params, 'blocks': blocks_lib.rescale_residuals(params['blocks'])}
    return params
