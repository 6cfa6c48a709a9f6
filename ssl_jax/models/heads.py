# SPDX-License-Identifier: Apache-2.0
"""Projection heads of self-distillation."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.kernels import ops
from ssl_jax.models import blocks
from ssl_jax.objectives import losses


class DINOHead(nn.Module):
    """Tokens (..., D) -> logits (..., K) in float32; class and patch tokens may be concatenated.

    An MLP with GELU between its layers, L2 normalisation, then prototypes: column k of the last
    layer is g_k v_k / |v_k|, so that a logit is g_k times a cosine.  Matrix products are computed
    in `dtype`, norms and logits in float32.

    Parameters: mlp_0, mlp_2, ... (or `mlp` where num_layers is 1) with kernel (in, out) and bias;
    last_layer/weight_v (bottleneck, K) and last_layer/weight_g (1, K), which starts at 1.  It is
    trained and decayed in DINOv2; DINO and iBOT freeze it (`norm_last_layer`): name
    `last_layer/weight_g` in `optim.freeze`.

    Attributes:
      out_dim: K, number of prototypes.
      hidden_dim, bottleneck_dim: widths of the MLP and of its output.
      num_layers: linear layers of the MLP, 1 or more.

    Reference: DINO `vision_transformer.py: DINOHead`; DINOv2 `layers/dino_head.py`.
    """

    out_dim: int
    hidden_dim: int = 2048
    bottleneck_dim: int = 256
    num_layers: int = 3
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        last = self.num_layers - 1
        for i in range(self.num_layers):
            x = blocks.Dense(
                self.bottleneck_dim if i == last else self.hidden_dim,
                dtype=self.dtype,
                kernel_init=nn.initializers.normal(0.02),
                fn=ops.gelu_dense if i else ops.dense,
                name=f'mlp_{2 * i}' if last else 'mlp',
            )(x)
        return Prototypes(self.out_dim, self.dtype, name='last_layer')(losses.l2_normalize(x))


class Prototypes(nn.Module):
    """Weight-normed linear layer without bias, (..., b) -> (..., K) in float32."""

    out_dim: int
    dtype: Any

    @nn.compact
    def __call__(self, x):
        b = x.shape[-1]
        v = self.param('weight_v', blocks.torch_uniform(b), (b, self.out_dim))
        g = self.param('weight_g', nn.initializers.ones, (1, self.out_dim))
        # `sum_rows`, as XLA on CPU puts a plain sum into the product below and takes 200 times as
        # long for 65536 prototypes (42 s against 0.2 s for 8 rows).
        norm = jnp.sqrt(jnp.maximum(ops.sum_rows(jnp.square(v)), 1e-24))
        # The matrix is scaled, not the logits: it has fewer rows than they have.
        w = (v * (g / norm)).astype(self.dtype)
        return _float32_product(x.astype(self.dtype), w)


@jax.custom_vjp
def _float32_product(x, w):
    """x w, accumulated and returned in float32; in the gradient all factors have one dtype.

    Differentiated as it stands, it would multiply float32 by bfloat16, which runs as float32.
    """
    return jnp.matmul(x, w, preferred_element_type=jnp.float32)


def _product_forward(x, w):
    return _float32_product(x, w), (x, w)


def _product_backward(residuals, grad):
    x, w = residuals
    grad = grad.astype(x.dtype)
    rows = grad.reshape(-1, grad.shape[-1])
    return grad @ w.T, x.reshape(-1, x.shape[-1]).T @ rows


_float32_product.defvjp(_product_forward, _product_backward)


def flops_per_token(head, in_dim):
    """Forward FLOPs of a `DINOHead` for one token of `in_dim` channels: 2 per multiply-add."""
    hidden = [head.hidden_dim] * (head.num_layers - 1)
    widths = [in_dim, *hidden, head.bottleneck_dim, head.out_dim]
    return 2 * sum(a * b for a, b in zip(widths, widths[1:]))
