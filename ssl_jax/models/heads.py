# SPDX-License-Identifier: Apache-2.0
"""Projection heads, for training only."""

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.kernels import ops
from ssl_jax.models import blocks


class BatchNormMLP(nn.Module):
    """Class tokens (..., D) -> embeddings (..., out_dim) in float32 (LeJEPA).

    A linear layer to `in_dim` channels unless the tokens have them, then an MLP of three layers
    with BatchNorm and ReLU between them. BatchNorm is by the mean and variance over all leading
    axes: of the global batch, whatever the devices. There are no running averages, for no one uses
    the head after training. Layers before a norm have no bias, which the norm would subtract.
    """

    out_dim: int
    hidden_dim: int = 2048  # of the two hidden layers
    in_dim: int = 512
    dtype: Any = jnp.float32  # of the matrix products

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def dense(width, x, name, bias=False):
            init = blocks.torch_uniform(x.shape[-1])
            return nn.Dense(width, bias, self.dtype, kernel_init=init, bias_init=init, name=name)(x)

        if x.shape[-1] != self.in_dim:
            x = dense(self.in_dim, x, 'input')
        for i in range(2):
            x = BatchNorm(name=f'norm_{i}')(dense(self.hidden_dim, x, f'mlp_{i}'))
            x = jax.nn.relu(x)
        return dense(self.out_dim, x, 'output', bias=True).astype(jnp.float32)

    def flops_per_token(self, width: int) -> int:
        """Forward FLOPs for one token of `width` channels."""
        widths = [self.in_dim, self.hidden_dim, self.hidden_dim, self.out_dim]
        widths = widths if width == self.in_dim else [width, *widths]
        return 2 * sum(a * b for a, b in itertools.pairwise(widths))


class BatchNorm(nn.Module):
    """(x - mean) / sqrt(variance + 1e-5) * scale + bias in float32, over all axes but the last."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param('scale', nn.initializers.ones, (x.shape[-1],))
        bias = self.param('bias', nn.initializers.zeros, (x.shape[-1],))
        x = x.astype(jnp.float32)
        axes = tuple(range(x.ndim - 1))
        return (x - x.mean(axes)) * (jax.lax.rsqrt(x.var(axes) + 1e-5) * scale) + bias


class DINOHead(nn.Module):
    """Tokens (..., D) -> logits (..., K) in float32; class and patch tokens may be concatenated.

    An MLP with GELU between its layers, L2 normalisation, then prototypes: column k of the last
    layer is g_k v_k / |v_k|, so a logit is g_k times a cosine; without `weight_norm` (DINOv3) it is
    a plain matrix. Matrix products are computed in `dtype`, norms and logits in float32.

    Parameters: mlp_0, mlp_2, ... (`mlp` if num_layers is 1) with kernel (in, out) and bias;
    last_layer/weight_v (bottleneck, K) and last_layer/weight_g (1, K), which starts at 1, or
    last_layer/weight (bottleneck, K). DINOv2
    trains and decays weight_g; DINO and iBOT freeze it (`norm_last_layer`): for that, add
    `last_layer/weight_g` to `optim.freeze`.

    References:
      DINO `vision_transformer.py: DINOHead`; DINOv2 `layers/dino_head.py`
    """

    out_dim: int  # K, number of prototypes
    hidden_dim: int = 2048  # of the MLP
    bottleneck_dim: int = 256  # output width of the MLP
    num_layers: int = 3  # linear layers of the MLP, 1 or more
    weight_norm: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        last = self.num_layers - 1
        for i in range(self.num_layers):
            x = blocks.Dense(
                self.bottleneck_dim if i == last else self.hidden_dim,
                dtype=self.dtype,
                kernel_init=nn.initializers.normal(0.02),
                fn=ops.gelu_dense if i else ops.dense,
                name=f'mlp_{2 * i}' if last else 'mlp',
            )(x)
        last = Prototypes(self.out_dim, self.dtype, self.weight_norm, name='last_layer')
        return last(blocks.l2_normalize(x))


class Prototypes(nn.Module):
    """Linear layer without bias, weight-normed or not, (..., b) -> (..., K) in float32."""

    out_dim: int
    dtype: Any
    weight_norm: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b = x.shape[-1]
        if not self.weight_norm:
            w = self.param('weight', nn.initializers.normal(0.02), (b, self.out_dim))
            return _float32_product(x.astype(self.dtype), w.astype(self.dtype))
        v = self.param('weight_v', blocks.torch_uniform(b), (b, self.out_dim))
        g = self.param('weight_g', nn.initializers.ones, (1, self.out_dim))
        # `sum_rows`, because XLA on CPU fuses a plain sum into the product below and takes 200
        # times as long for 65536 prototypes (42 s against 0.2 s for 8 rows).
        norm = jnp.sqrt(jnp.maximum(ops.sum_rows(jnp.square(v)), 1e-24))
        # Scales the matrix, which has fewer rows than the logits.
        w = (v * (g / norm)).astype(self.dtype)
        return _float32_product(x.astype(self.dtype), w)


@jax.custom_vjp
def _float32_product(x, w):
    """x w, accumulated and returned in float32; the products of its gradient have one dtype.

    Plain differentiation would multiply float32 by bfloat16, which runs as float32.
    """
    return jnp.matmul(x, w, preferred_element_type=jnp.float32)


def _product_backward(residuals, grad):
    x, w = residuals
    grad = grad.astype(x.dtype)
    rows = grad.reshape(-1, grad.shape[-1])
    return grad @ w.T, x.reshape(-1, x.shape[-1]).T @ rows


_float32_product.defvjp(lambda x, w: (_float32_product(x, w), (x, w)), _product_backward)


def flops_per_token(head: DINOHead, in_dim: int) -> int:
    """Forward FLOPs of a `DINOHead` for one token of `in_dim` channels: 2 per multiply-add."""
    hidden = [head.hidden_dim] * (head.num_layers - 1)
    widths = [in_dim, *hidden, head.bottleneck_dim, head.out_dim]
    return 2 * sum(a * b for a, b in itertools.pairwise(widths))
