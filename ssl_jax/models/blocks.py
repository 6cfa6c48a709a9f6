# SPDX-License-Identifier: Apache-2.0
"""Transformer blocks of all encoders and decoders, and their parts.

Submodules have the names of the torch modules (attn/qkv, mlp/fc1, ls1/gamma), so weight tables only
rename. Parameters are float32; `dtype` is the compute dtype.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from ssl_jax import sharding
from ssl_jax.kernels import attention, ops, subsets
from ssl_jax.kernels.segments import Segment, tokens_per_row
from ssl_jax.models import pos_embed, rope
from ssl_jax.run import errors

# 'dots' keeps the results of attention, of the first layer of the MLP and of the residual sum
# between them; if images skip branches, only the gathered images of both sums. Norms and the fused
# qkv are recomputed, which is faster on a TPU than writing and reading them (experiments/tpu).
HIDDEN, BETWEEN = 'hidden', 'between'
REMAT = {
    'none': None,
    'dots': jax.checkpoint_policies.save_only_these_names(
        attention.NAME, HIDDEN, BETWEEN, subsets.TAKEN
    ),
    'full': jax.checkpoint_policies.nothing_saveable,
}


def torch_uniform(fan_in: int) -> Callable:
    """Initializer U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the default of torch's Conv2d and Linear."""

    def init(key, shape, dtype=jnp.float32):
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


# BEiT's initializer, N(0, 0.02) truncated at one standard deviation.
truncated_normal = nn.initializers.truncated_normal(0.02, lower=-1.0, upper=1.0)


def swiglu_hidden(embed_dim: int, mlp_ratio: float) -> int:
    """Hidden width of DINOv2's SwiGLU: two thirds of the MLP's, rounded up to a multiple of 8."""
    return (int(int(embed_dim * mlp_ratio) * 2 / 3) + 7) // 8 * 8


def l2_normalize(x: jax.Array, eps: float = 1e-12) -> jax.Array:
    """Rows x / max(|x|, eps), (..., D) float32; zeros stay zero, with a finite gradient."""
    x = x.astype(jnp.float32)
    squares = jnp.square(x).sum(axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.maximum(squares, eps**2))


class Dense(nn.Module):
    """fn(x, kernel, bias), with the parameters of `flax.linen.Dense`.

    A LayerScale of the output, `gamma` (features,), is multiplied into kernel and bias. The result
    is the same, but the gradient of gamma comes from that of the kernel, so the output before the
    scale is neither kept nor recomputed.
    """

    features: int  # output width
    dtype: Any
    kernel_init: Callable
    bias_init: Callable = nn.initializers.zeros
    fn: Callable = ops.dense  # or another dense layer of `kernels.ops`

    @nn.compact
    def __call__(self, x: jax.Array, gamma: jax.Array | None = None) -> jax.Array:
        kernel = self.param('kernel', self.kernel_init, (x.shape[-1], self.features))
        bias = self.param('bias', self.bias_init, (self.features,))
        if gamma is not None:
            kernel, bias = kernel * gamma, bias * gamma
        return self.fn(*(a.astype(self.dtype) for a in (x, kernel, bias)))


class LayerNorm(nn.Module):
    """LayerNorm over the last axis with float32 statistics; eps 1e-6 as in all official codes."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x: jax.Array, and_input: bool = False):
        """Returns the norm of x, or (norm, x) if `and_input`, see `ops.layer_norm_and_input`."""
        scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
        bias = self.param('bias', nn.initializers.zeros, (x.shape[-1],))
        norm = ops.layer_norm_and_input if and_input else ops.layer_norm
        return norm(x, scale, bias, self.eps)


QKV_BIASES = ('q_bias', 'v_bias')


class QKV(nn.Module):
    """Fused queries, keys and values, where keys have no bias (BEiT, DINOv3).

    A bias of the keys adds the same number to all logits of a query, which the softmax cancels
    (not with rotary positions).
    """

    dtype: Any
    kernel_init: Callable

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dim = x.shape[-1]
        kernel = self.param('kernel', self.kernel_init, (dim, 3 * dim))
        q_bias, v_bias = (self.param(n, nn.initializers.zeros, (dim,)) for n in QKV_BIASES)
        bias = jnp.concatenate([q_bias, jnp.zeros_like(q_bias), v_bias])
        return ops.dense(*(a.astype(self.dtype) for a in (x, kernel, bias)))


@functools.lru_cache
def relative_index(window: tuple[int, int]) -> np.ndarray:
    """Row of the bias table for every query and key, int (1 + N, 1 + N), N = h * w patches.

    Between patches it is (y_q - y_k + h - 1) (2 w - 1) + x_q - x_k + w - 1. The table has
    (2 h - 1) (2 w - 1) + 3 rows; the last three are class token to patch, patch to class token,
    class to class token.

    References:
      BEiT `modeling_finetune.py: RelativePositionBias`
    """
    h, w = window
    y, x = (a.reshape(-1) for a in np.mgrid[:h, :w])
    last = (2 * h - 1) * (2 * w - 1) + 2
    index = np.full((1 + h * w, 1 + h * w), last)
    index[0, 1:], index[1:, 0] = last - 2, last - 1
    rows, columns = y[:, None] - y + h - 1, x[:, None] - x + w - 1
    index[1:, 1:] = rows * (2 * w - 1) + columns
    return index


def relative_bias(
    table: jax.Array, window: tuple[int, int], side: int | None = None, how: str = 'spline'
) -> jax.Array:
    """Table (rows, H) -> bias of the attention logits, (H, 1 + N, 1 + N) float32.

    Args:
      window: grid (h, w) of patches.
      side: patches of a side of the square that the table is for, if that is not `window`.
      how: rule by which it is resized, see `pos_embed.relative_weights`.
    """
    if side is not None:
        table = pos_embed.resize_relative(table, side, window, how)
    return jnp.moveaxis(table.astype(jnp.float32)[relative_index(window)], -1, 0)


def relative_rows(window: tuple[int, int]) -> int:
    """Number of rows of the table of `relative_bias`."""
    return int(relative_index(window)[0, 0]) + 1


class Attention(nn.Module):
    """Multi-head self-attention; the fused qkv has rows [q | k | v], each head-major.

    The projections run over all tokens at once, attention runs within each image.
    """

    num_heads: int
    dtype: Any
    kernel_init: Callable
    key_bias: bool = True
    # If this layer has relative position biases: (h, w) in patches, side of its table, how it is
    # resized.
    window: tuple | None = None

    @nn.compact
    def __call__(
        self, x, segments: tuple[Segment, ...], bias=None, gamma=None, rotation=None
    ) -> jax.Array:
        """x (B * T, D), see `Block`; bias (H, T, T) of the logits; gamma (D,), see `Dense`.

        rotation: cosines and sines of rotary positions, see `rope.tables`.
        """
        dim = x.shape[-1]
        dense = dict(dtype=self.dtype, kernel_init=self.kernel_init)
        if self.key_bias:
            qkv = Dense(3 * dim, name='qkv', **dense)(x)
        else:
            qkv = QKV(name='qkv', **dense)(x)
        if rotation is not None:
            qkv = rope.rotate(qkv, self.num_heads, *rotation)
        if self.window is not None:
            shape = (relative_rows((self.window[1],) * 2), self.num_heads)
            table = self.param('rel_pos_bias', nn.initializers.zeros, shape)
            bias = relative_bias(table, *self.window)

        if bias is not None:
            images = qkv.reshape(-1, segments[0].tokens, 3 * dim)
            y = attention.biased_attention(images, bias, self.num_heads).reshape(x.shape)
        else:
            y = attention.attention(qkv, self.num_heads, segments)
        return Dense(dim, name='proj', **dense)(y, gamma)


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))) with the exact (erf) GELU."""

    hidden_dim: int
    dtype: Any
    kernel_init: Callable

    @nn.compact
    def __call__(self, x: jax.Array, gamma: jax.Array | None = None) -> jax.Array:
        dense = dict(dtype=self.dtype, kernel_init=self.kernel_init)
        y = checkpoint_name(Dense(self.hidden_dim, name='fc1', **dense)(x), HIDDEN)
        return Dense(x.shape[-1], name='fc2', fn=ops.gelu_dense, **dense)(y, gamma)


class SwiGLU(nn.Module):
    """w3(silu(a) * b) with [a | b] = w12(x); the first half is the gate (DINOv2)."""

    hidden_dim: int
    dtype: Any
    kernel_init: Callable

    @nn.compact
    def __call__(self, x: jax.Array, gamma: jax.Array | None = None) -> jax.Array:
        dense = dict(dtype=self.dtype, kernel_init=self.kernel_init)
        both = checkpoint_name(Dense(2 * self.hidden_dim, name='w12', **dense)(x), HIDDEN)
        gate, value = jnp.split(both, 2, axis=-1)
        return Dense(x.shape[-1], name='w3', **dense)(nn.silu(gate) * value, gamma)


class LayerScale(nn.Module):
    """gamma (dim,), one learned factor per channel of a branch, initially `init`; see `Dense`."""

    init: float

    @nn.compact
    def __call__(self, dim: int) -> jax.Array:
        return self.param('gamma', nn.initializers.constant(self.init), (dim,))


class Block(nn.Module):
    """Pre-norm block: x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x))).

    Tokens are flat, (B * T, D): on TPU a separate axis of N tokens would be padded to a multiple of
    8, or need transposes.
    """

    num_heads: int
    mlp_ratio: float  # hidden width of the MLP / embed_dim
    eps: float  # of the norms
    dtype: Any
    kernel_init: Callable
    segments: tuple[Segment, ...]  # layout of the T tokens of a row
    ffn: str = 'mlp'  # or 'swiglu'
    layer_scale: float | None = None  # initial gamma; None for no LayerScale
    capture: bool = False  # whether to return the output a second time, for the scan to stack
    key_bias: bool = True
    window: tuple | None = None  # see `Attention`

    @nn.compact
    def __call__(self, x: jax.Array, drop, bias: jax.Array | None = None, rotation=None):
        """Returns (x, x if `capture` else None).

        Args:
          x: (B * T, D).
          drop: stochastic depth of the two residual branches, one of
            None: both branches run unchanged;
            (B, n, 2): a factor per image, 0 to drop the branch or 1/(1-rate) to keep it;
            tuple with (B, 2, k) per segment: positions of the k images that go through the branch,
              weighted by n/k; the others skip it at no cost (DINOv2's form).
          bias: (H, T, T) bias of the attention logits.
          rotation: cosines and sines of rotary positions, see `rope.tables`, of the tokens that
            attention sees: those of the k images where `drop` is a tuple.
        """
        dim = x.shape[-1]
        parts = dict(dtype=self.dtype, kernel_init=self.kernel_init)
        attn = Attention(
            self.num_heads, name='attn', key_bias=self.key_bias, window=self.window, **parts
        )
        if self.ffn == 'mlp':
            mlp = Mlp(int(dim * self.mlp_ratio), name='mlp', **parts)
        elif self.ffn == 'swiglu':
            mlp = SwiGLU(swiglu_hidden(dim, self.mlp_ratio), name='mlp', **parts)
        else:
            raise errors.UserError(f"ffn={self.ffn!r} is unknown; use 'mlp' or 'swiglu'.")
        norms = [LayerNorm(self.eps, name=f'norm{i}') for i in (1, 2)]
        gammas = [None, None]
        if self.layer_scale is not None:
            gammas = [LayerScale(self.layer_scale, name=f'ls{i}')(dim) for i in (1, 2)]

        def branch(i, y, segments):
            return attn(y, segments, bias, gammas[0], rotation) if i == 0 else mlp(y, gammas[1])

        for i in (0, 1):
            if isinstance(drop, tuple):
                kept_branch = lambda x, kept, i=i: branch(i, norms[i](x), kept)  # noqa: E731
                x = subsets.residual(kept_branch, x, self.segments, [ids[:, i] for ids in drop])
            else:
                y, x = norms[i](x, and_input=True)
                y = branch(i, y, self.segments)
                if drop is not None:
                    y = y * _per_token(drop[..., i], self.segments).astype(x.dtype)
                x = checkpoint_name(x + y, BETWEEN)
        # One constraint per block keeps activations split over the batch. Without it XLA may
        # replicate them: measured 12.6 GiB against 3.0 GiB per chip on ViT-L.
        x = sharding.constrain(x, multiple=tokens_per_row(self.segments))
        return x, (x if self.capture else None)


def _per_token(factor, segments):
    """Factor per image (B, n) -> per token (B * T, 1)."""
    repeats = np.concatenate([np.full(s.images, s.length) for s in segments])
    factor = jnp.repeat(factor, repeats, axis=1, total_repeat_length=int(repeats.sum()))
    return factor.reshape(-1, 1)


def block_stack(depth, *, remat, name, shared=0, segments=None, **kw) -> Callable:
    """`depth` blocks as one scan: parameters stacked on axis 0, one block compiled.

    Args:
      depth: number of blocks.
      remat: a key of REMAT.
      name: of the stacked module.
      shared: number of arguments of `Block` behind `drop` that are passed, one for all blocks.
      segments: layout of the tokens of a row; None if a row is one image.
      **kw: further fields of `Block`.

    Returns:
      (x, drop, *shared) -> (x, outputs of all blocks or None). x is (B, T, D); drop is that of
      `Block` with a leading depth axis.
    """
    block = Block
    if REMAT[remat] is not None:
        block = nn.remat(Block, policy=REMAT[remat], prevent_cse=False)
    stack = nn.scan(
        block,
        variable_axes={'params': 0},
        split_rngs={'params': True},
        in_axes=(0, *[nn.broadcast] * shared) if shared else 0,
        length=depth,
    )

    def run(x, drop, *more):
        layout = segments or (Segment(1, x.shape[1]),)
        rows = x.reshape(-1, x.shape[-1])
        rows, captured = stack(name=name, segments=layout, **kw)(rows, drop, *more)
        return rows.reshape(x.shape), jax.tree.map(lambda y: y.reshape(depth, *x.shape), captured)

    return run


def rescale_residuals(blocks: dict) -> dict:
    """Divides attn/proj and mlp/fc2 of block i = 1, 2, ... by sqrt(2 i), as BEiT and GPT-2 do."""

    def scaled(dense):
        kernel = dense['kernel']
        factor = (2.0 * jnp.arange(1, len(kernel) + 1)) ** -0.5
        return {**dense, 'kernel': kernel * factor[:, None, None]}

    attn = {**blocks['attn'], 'proj': scaled(blocks['attn']['proj'])}
    return {**blocks, 'attn': attn, 'mlp': {**blocks['mlp'], 'fc2': scaled(blocks['mlp']['fc2'])}}


def drop_path_keep(
    keys: jax.Array, depth: int, rate: float, uniform: bool = False, num_images: int = 1
) -> jax.Array:
    """Factors of per-image stochastic depth, (depth, B, n, 2) float32.

    A factor is 0 with the block's rate, else 1/(1-rate). The two residual branches of a block draw
    independently.

    Args:
      keys: (B,), one key per row of n images.
      depth: number of blocks.
      rate: the rate of block i is linspace(0, rate, depth)[i].
      uniform: whether all blocks have `rate` instead.
      num_images: n.
    """
    rates = np.full(depth, rate) if uniform else np.linspace(0.0, rate, depth)
    kept = jnp.asarray(1.0 - rates, jnp.float32)[:, None, None]  # (depth, 1, 1)
    draws = jax.vmap(lambda key: jax.random.uniform(key, (depth, num_images, 2)))(keys)
    return jnp.where(draws < kept, 1.0 / kept, 0.0).transpose(1, 0, 2, 3)


def drop_path_subsets(keys: jax.Array, depth: int, rate: float, counts: Sequence[int]) -> tuple:
    """Positions of the images that DINOv2's stochastic depth keeps, per segment (depth, B, 2, k).

    k = max(floor(n (1 - rate)), 1) images of a segment of n are kept, the same number in every
    block because shapes are static. Blocks, branches, segments and rows draw independently.

    Args:
      keys: (B,), one key per row.
      depth: number of blocks.
      rate: share of images that skip a branch.
      counts: n of each segment.
    """

    def draw(key, n):
        kept = max(int(n * (1 - rate)), 1)
        return jnp.argsort(jax.random.uniform(key, (depth, 2, n)), axis=-1)[..., :kept]

    def row(key):
        parts = jax.random.split(key, len(counts))
        return tuple(draw(k, n) for k, n in zip(parts, counts, strict=True))

    return tuple(ids.swapaxes(0, 1) for ids in jax.vmap(row)(keys))
