# SPDX-License-Identifier: Apache-2.0
"""Transformer parts shared by every encoder, decoder and predictor.

Submodules carry the names of the torch modules (attn/qkv, mlp/fc1, ls1/gamma), so that the weight
tables are renames and nothing else.  Parameters are float32; `dtype` is what is computed in.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax import sharding
from ssl_jax.models import ops

REMAT = {
    'none': None,
    'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    'full': jax.checkpoint_policies.nothing_saveable,
}


def torch_uniform(fan_in):
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), what torch's Conv2d and Linear start with."""

    def init(key, shape, dtype=jnp.float32):
        bound = fan_in**-0.5
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def swiglu_hidden(embed_dim, mlp_ratio):
    """Hidden width of DINOv2's SwiGLU: two thirds of the MLP's, rounded up to a multiple of 8."""
    return (int(int(embed_dim * mlp_ratio) * 2 / 3) + 7) // 8 * 8


class Dense(nn.Module):
    """fn(x, kernel, bias), with the parameters of `flax.linen.Dense`; fn from `ops`."""

    features: int
    dtype: Any
    kernel_init: Callable
    bias_init: Callable = nn.initializers.zeros
    fn: Callable = ops.dense

    @nn.compact
    def __call__(self, x):
        kernel = self.param('kernel', self.kernel_init, (x.shape[-1], self.features))
        bias = self.param('bias', self.bias_init, (self.features,))
        return self.fn(*(a.astype(self.dtype) for a in (x, kernel, bias)))


class LayerNorm(nn.Module):
    """LayerNorm over the last axis with float32 statistics; eps 1e-6 as in all official codes."""

    eps: float = 1e-6

    @nn.compact
    def __call__(self, x):
        scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
        bias = self.param('bias', nn.initializers.zeros, (x.shape[-1],))
        return ops.layer_norm(x, scale, bias, self.eps)


class Attention(nn.Module):
    """Multi-head self-attention; the fused qkv has rows [q | k | v], each head-major."""

    num_heads: int
    dtype: Any
    kernel_init: Callable

    @nn.compact
    def __call__(self, x):  # (B, N, D)
        dim = x.shape[-1]
        dense = dict(dtype=self.dtype, kernel_init=self.kernel_init)
        qkv = Dense(3 * dim, name='qkv', **dense)(x)
        return Dense(dim, name='proj', **dense)(ops.attention(qkv, self.num_heads))


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))) with the exact (erf) GELU."""

    hidden_dim: int
    dtype: Any
    kernel_init: Callable

    @nn.compact
    def __call__(self, x):
        dense = dict(dtype=self.dtype, kernel_init=self.kernel_init)
        y = Dense(self.hidden_dim, name='fc1', **dense)(x)
        return Dense(x.shape[-1], name='fc2', fn=ops.gelu_dense, **dense)(y)


class SwiGLU(nn.Module):
    """w3(silu(a) * b) with [a | b] = w12(x); the first half is the gate (DINOv2)."""

    hidden_dim: int
    dtype: Any
    kernel_init: Callable

    @nn.compact
    def __call__(self, x):
        dense = dict(dtype=self.dtype, kernel_init=self.kernel_init)
        gate, value = jnp.split(Dense(2 * self.hidden_dim, name='w12', **dense)(x), 2, axis=-1)
        return Dense(x.shape[-1], name='w3', **dense)(nn.silu(gate) * value)


class LayerScale(nn.Module):
    """x * gamma, one learned factor per channel, started at `init`."""

    init: float

    @nn.compact
    def __call__(self, x):
        gamma = self.param('gamma', nn.initializers.constant(self.init), (x.shape[-1],))
        return x * gamma.astype(x.dtype)


class Block(nn.Module):
    """Pre-norm block: x + ls1(attn(norm1(x))), then x + ls2(mlp(norm2(x))).

    `keep` (B, 2) scales the two residual branches of each sample: 0 drops the branch, 1/(1-rate)
    keeps it (stochastic depth); None keeps both as they are.
    """

    num_heads: int
    mlp_ratio: float
    ffn: str
    layer_scale: float | None
    eps: float
    dtype: Any
    kernel_init: Callable
    capture: bool

    @nn.compact
    def __call__(self, x, keep):
        dim = x.shape[-1]
        parts = dict(dtype=self.dtype, kernel_init=self.kernel_init)

        def residual(x, y, i):
            if self.layer_scale is not None:
                y = LayerScale(self.layer_scale, name=f'ls{i + 1}')(y)
            if keep is not None:
                y = y * keep[:, i, None, None].astype(y.dtype)
            return x + y

        y = LayerNorm(self.eps, name='norm1')(x)
        x = residual(x, Attention(self.num_heads, name='attn', **parts)(y), 0)
        y = LayerNorm(self.eps, name='norm2')(x)
        if self.ffn == 'mlp':
            mlp = Mlp(int(dim * self.mlp_ratio), name='mlp', **parts)
        elif self.ffn == 'swiglu':
            mlp = SwiGLU(swiglu_hidden(dim, self.mlp_ratio), name='mlp', **parts)
        else:
            raise ValueError(f"ffn={self.ffn!r} is unknown; use 'mlp' or 'swiglu'.")
        # One constraint per block keeps activations split over the batch.  Without it XLA may
        # replicate them: measured 12.6 GiB against 3.0 GiB per chip on ViT-L.
        x = sharding.constrain(residual(x, mlp(y), 1))
        return x, (x if self.capture else None)


def block_stack(depth, *, remat, name, **kw):
    """`depth` blocks as one scan: parameters stacked on axis 0, one block compiled.

    Returns a module (x, keep) -> (x, outputs of all blocks or None); keep: (depth, B, 2) or None.
    """
    block = Block
    if REMAT[remat] is not None:
        block = nn.remat(Block, policy=REMAT[remat], prevent_cse=False)
    stack = nn.scan(
        block,
        variable_axes={'params': 0},
        split_rngs={'params': True},
        in_axes=0,
        length=depth,
    )
    return stack(name=name, **kw)


def drop_path_keep(keys, depth, rate, uniform=False):
    """Per-sample stochastic depth, (depth, B, 2): 0 with the block's rate, else 1/(1-rate).

    The rate of block i is linspace(0, rate, depth)[i], or `rate` for all where `uniform`.
    Both residual branches of a block draw independently; one key (B,) per sample.
    """
    rates = np.full(depth, rate) if uniform else np.linspace(0.0, rate, depth)
    kept = jnp.asarray(1.0 - rates, jnp.float32)[:, None]  # (depth, 1)
    draws = jax.vmap(lambda key: jax.random.uniform(key, (depth, 2)))(keys)  # (B, depth, 2)
    return jnp.where(draws < kept, 1.0 / kept, 0.0).transpose(1, 0, 2)
