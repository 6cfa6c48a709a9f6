# SPDX-License-Identifier: Apache-2.0
"""Attention, GELU and LayerNorm of the networks, as plain functions of arrays.

One program text serves every backend: nothing here looks at the backend of the process, because
programs for TPU are also compiled on machines that have none.
"""

import jax
import jax.numpy as jnp


def attention(qkv, num_heads):
    """Multi-head self-attention, ``softmax(q k^T / sqrt(d)) v``, over the fused projection.

    The softmax is computed in float32 whatever the dtype of the input.

    Args:
        qkv: (B, N, 3 * D) array; the last axis holds all queries, then all keys, then all values,
            each as ``num_heads`` heads of ``d = D / num_heads`` channels (torch's fused order).
        num_heads: number of heads, a divisor of D.

    Returns:
        (B, N, D) array of the dtype of ``qkv``, heads side by side.

    Raises:
        ValueError: the last axis is not divisible by ``3 * num_heads``.

    References:
        Vaswani et al, `Attention is all you need <https://arxiv.org/abs/1706.03762>`_, 2017
    """
    batch, tokens, width = qkv.shape
    if width % (3 * num_heads):
        raise ValueError(
            f'attention: the last axis of qkv is {width}, not a multiple of 3 * num_heads = '
            f'{3 * num_heads}; pass the fused projection (B, N, 3 * D), D divisible by num_heads.'
        )
    q, k, v = jnp.moveaxis(qkv.reshape(batch, tokens, 3, num_heads, -1), 2, 0)  # (B, N, H, d) each
    return dot_product_attention(q, k, v).reshape(batch, tokens, width // 3)


def dot_product_attention(q, k, v):
    """``softmax(q k^T / sqrt(d)) v`` for every head, softmax in float32.

    Args:
        q: (B, N, H, d) queries.
        k: (B, M, H, d) keys.
        v: (B, M, H, d) values.

    Returns:
        (B, N, H, d) array of the dtype of ``q``.
    """
    scale = q.shape[-1] ** -0.5
    logits = jnp.einsum('bnhd,bmhd->bhnm', q * scale, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits, axis=-1).astype(q.dtype)
    return jnp.einsum('bhnm,bmhd->bnhd', weights, v)


def gelu(x):
    """Exact GELU, ``x * Phi(x)`` with the normal distribution function Phi (erf, not tanh).

    Args:
        x: array of any shape.

    Returns:
        Array of the shape and dtype of ``x``.

    References:
        Hendrycks and Gimpel, `Gaussian error linear units <https://arxiv.org/abs/1606.08415>`_,
        2016
    """
    y = x.astype(jnp.float32)
    return (0.5 * y * (1.0 + jax.lax.erf(y * 0.5**0.5))).astype(x.dtype)


def layer_norm(x, scale, bias, eps=1e-6):
    """``(x - mean) / sqrt(var + eps) * scale + bias`` over the last axis.

    Statistics are in float32 and the variance is the mean of squared deviations, not
    ``E[x^2] - E[x]^2``, which loses digits where the mean is large.

    Args:
        x: (..., D) array.
        scale: (D,) array.
        bias: (D,) array.
        eps: added to the variance.

    Returns:
        Array of the shape and dtype of ``x``.
    """
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    return (y * scale + bias).astype(x.dtype)
