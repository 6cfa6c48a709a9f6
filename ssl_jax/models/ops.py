# SPDX-License-Identifier: Apache-2.0
"""Attention, dense layers, GELU and LayerNorm of the networks, with gradients made for speed.

Automatic differentiation keeps every intermediate of a softmax or a GELU for the backward pass. On
CPU, memory that is written once and read once costs more than computing its content again (the
kernel zeroes fresh pages, and no cache holds them), so each function here keeps its inputs and a
few numbers per row, and the backward pass starts from those. `experiments/bench` has the timings.

The choice between a form for CPU and one for accelerators is made when a program is lowered, not by
the backend of the process: programs for TPU are also compiled on machines that have none.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

ATTENTION = 'attention'  # name of its output and normalizers, see `layers.REMAT`
# Attention weights of so many bytes at a time stay in the cache of a CPU core's neighbourhood.
CHUNK_BYTES = 4 << 20
LANES = 128  # of a TPU's vector registers, and rows and columns of its matrix unit


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def attention(qkv, num_heads):
    """Multi-head self-attention, ``softmax(q k^T / sqrt(d)) v``, over the fused projection.

    The softmax is computed in float32 whatever the dtype of the input. The (N, N) weights are not
    kept for the backward pass; it computes them again from the logarithm of their normalizer.

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
        Dao et al, `FlashAttention <https://arxiv.org/abs/2205.14135>`_, 2022 (the backward pass)
    """
    return _attention_forward(qkv, num_heads)[0]


def _attention_forward(qkv, num_heads):
    if qkv.shape[-1] % (3 * num_heads):
        raise ValueError(
            f'attention: the last axis of qkv is {qkv.shape[-1]}, not a multiple of 3 * num_heads ='
            f' {3 * num_heads}; pass the projection (B, N, 3 * D) with D divisible by num_heads.'
        )

    forward = functools.partial(_forward, num_heads, None)
    packed = functools.partial(_forward_packed, num_heads)
    out, log_total = _by_platform(forward, packed, num_heads, qkv)
    return _kept(out, qkv, None, log_total)


def _kept(out, qkv, bias, log_total):
    """Output and residuals, named so that rematerialisation can keep what is small of them."""
    out, log_total = (checkpoint_name(x, ATTENTION) for x in (out, log_total))
    return out, (qkv, out, log_total) if bias is None else (qkv, bias, out, log_total)


def _attention_backward(num_heads, residuals, grad):
    def backward(*args):
        return _backward(num_heads, None, *args)[0]

    packed = functools.partial(_backward_packed, num_heads)
    return (_by_platform(backward, packed, num_heads, *residuals, grad),)


attention.defvjp(_attention_forward, _attention_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def biased_attention(qkv, bias, num_heads):
    """`attention` with something added to its logits, ``softmax(q k^T / sqrt(d) + bias) v``.

    Args:
        qkv: (B, N, 3 * D) array.
        bias: (H, N, N) float32 array, of query and key, the same for all samples.
        num_heads: H.

    Returns:
        (B, N, D) array of the dtype of ``qkv``.
    """
    return _forward(num_heads, bias, qkv)[0]


def _biased_forward(qkv, bias, num_heads):
    out, log_total = _forward(num_heads, bias, qkv)
    return _kept(out, qkv, bias, log_total)


def _biased_backward(num_heads, residuals, grad):
    qkv, bias, out, log_total = residuals
    d_qkv, d_logits = _backward(num_heads, bias, qkv, out, log_total, grad)
    return d_qkv, d_logits.sum(axis=0)


biased_attention.defvjp(_biased_forward, _biased_backward)

_FLOAT32 = dict(preferred_element_type=jnp.float32)


def _forward(num_heads, bias, qkv):
    """Output (b, N, D) and the logarithm of the normalizers (b, H, N)."""
    q, k, v = _heads(qkv, num_heads)
    logits = _logits(q, k, bias)  # (b, H, N, N)
    top = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(logits - top)
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum('bhnm,bhmd->bhnd', weights.astype(v.dtype), v, **_FLOAT32) / total
    return _merge(out).astype(qkv.dtype), (top + jnp.log(total))[..., 0]


def _backward(num_heads, bias, qkv, out, log_total, grad):
    """Gradients of qkv and, in float32, of the logits (b, H, N, N)."""
    q, k, v = _heads(qkv, num_heads)
    dtype, scale = qkv.dtype, q.shape[-1] ** -0.5
    # The sum over keys of weight * d(weight), by way of the output.
    inner = (out.astype(jnp.float32) * grad).reshape(*out.shape[:2], num_heads, -1).sum(axis=-1)
    grad = _heads(grad, num_heads, parts=1)[0]
    weights = jnp.exp(_logits(q, k, bias) - log_total[..., None])
    d_v = jnp.einsum('bhnm,bhnd->bhmd', weights.astype(dtype), grad, **_FLOAT32)
    d_weights = jnp.einsum('bhnd,bhmd->bhnm', grad, v, **_FLOAT32)
    d_logits = weights * (d_weights - jnp.swapaxes(inner, 1, 2)[..., None])
    rounded = d_logits.astype(dtype)
    d_q = jnp.einsum('bhnm,bhmd->bhnd', rounded, k, **_FLOAT32) * scale
    d_k = jnp.einsum('bhnm,bhnd->bhmd', rounded, q, **_FLOAT32) * scale
    d_qkv = jnp.concatenate([_merge(d) for d in (d_q, d_k, d_v)], axis=-1).astype(dtype)
    return d_qkv, d_logits


def _heads(x, num_heads, parts=3):
    """(b, N, parts * H * d) -> (parts, b, H, N, d)."""
    x = x.reshape(*x.shape[:2], parts, num_heads, -1)
    return x.transpose(2, 0, 3, 1, 4)


def _merge(x):
    """(b, H, N, d) -> (b, N, H * d)."""
    return jnp.swapaxes(x, 1, 2).reshape(x.shape[0], x.shape[2], -1)


def _logits(q, k, bias):
    logits = jnp.einsum('bhnd,bhmd->bhnm', q, k, **_FLOAT32) * q.shape[-1] ** -0.5
    return logits if bias is None else logits + bias


def _by_platform(fn, packed, num_heads, *args):
    """fn(*args), in the form that suits the platform the program is lowered for.

    On one CPU in chunks of samples whose attention weights fit into its cache; on TPU `packed`,
    where whole heads fill the lanes.
    """
    batch, tokens, dim = args[0].shape
    dim //= 3
    chunk = max(1, CHUNK_BYTES // (4 * num_heads * tokens**2))
    mesh = jax.sharding.get_abstract_mesh()
    forms = {}
    # A loop over samples that several devices hold between them would gather the batch.
    if chunk < batch and (mesh.empty or mesh.size == 1):
        forms['cpu'] = functools.partial(_map_chunks, fn, chunk)
    if dim % LANES == 0 and LANES % (dim // num_heads) == 0 and mesh.shape.get('tensor', 1) == 1:
        forms['tpu'] = packed
    return jax.lax.platform_dependent(*args, **forms, default=fn) if forms else fn(*args)


def _map_chunks(fn, chunk, *args):
    """fn over chunks of the leading axis; a last, shorter chunk goes by itself."""
    batch = args[0].shape[0]
    whole = batch // chunk
    head = [x[: whole * chunk].reshape(whole, chunk, *x.shape[1:]) for x in args]
    out = jax.lax.map(lambda xs: fn(*xs), head)
    out = jax.tree.map(lambda y: y.reshape(whole * chunk, *y.shape[2:]), out)
    if batch % chunk:
        last = fn(*[x[whole * chunk :] for x in args])
        out = jax.tree.map(lambda y, z: jnp.concatenate([y, z]), out, last)
    return out


def _forward_packed(num_heads, qkv):
    """`_forward` with the heads left where they are, side by side in tiles of 128 lanes.

    A head is picked out of its tile by zeros in the other heads' lanes. A TPU's matrix unit sums
    over 128 lanes at a time, so they cost nothing there, while cutting heads of 32 or 64 channels
    out, and putting them together again, moves all of qkv (experiments/tpu).
    """
    scale = (qkv.shape[-1] // 3 // num_heads) ** -0.5
    outs, logs = [], []
    for q, k, v in zip(*_tiles(qkv, 3)):
        out = 0
        for mine in _own_lanes(num_heads, qkv):
            logits = jnp.einsum('bnl,bml->bnm', q * mine, k, **_FLOAT32) * scale
            top = logits.max(axis=-1, keepdims=True)
            weights = jnp.exp(logits - top)
            total = weights.sum(axis=-1, keepdims=True)
            weights = (weights / total).astype(v.dtype)
            out = out + jnp.einsum('bnm,bml->bnl', weights, v * mine, **_FLOAT32)
            logs.append((top + jnp.log(total))[..., 0])
        outs.append(out.astype(qkv.dtype))
    return jnp.concatenate(outs, axis=-1), jnp.stack(logs, axis=1)


def _backward_packed(num_heads, qkv, out, log_total, grad):
    """The gradient of qkv, `_backward` in the form of `_forward_packed`."""
    dtype, scale = qkv.dtype, (qkv.shape[-1] // 3 // num_heads) ** -0.5
    d_qkv, head = [], 0
    for q, k, v, o, d_o in zip(*_tiles(qkv, 3), *_tiles(out, 1), *_tiles(grad, 1)):
        both = o.astype(jnp.float32) * d_o
        d_q = d_k = d_v = 0
        for mine in _own_lanes(num_heads, qkv):
            logits = jnp.einsum('bnl,bml->bnm', q * mine, k, **_FLOAT32) * scale
            weights = jnp.exp(logits - log_total[:, head, :, None])
            inner = (both * mine.astype(jnp.float32)).sum(axis=-1, keepdims=True)
            d_out = d_o * mine
            d_v += jnp.einsum('bnm,bnl->bml', weights.astype(dtype), d_out, **_FLOAT32)
            d_weights = jnp.einsum('bnl,bml->bnm', d_out, v, **_FLOAT32)
            d_logits = (weights * (d_weights - inner)).astype(dtype)
            d_q += jnp.einsum('bnm,bml->bnl', d_logits, k * mine, **_FLOAT32)
            d_k += jnp.einsum('bnm,bnl->bml', d_logits, q * mine, **_FLOAT32)
            head += 1
        d_qkv.append([d.astype(dtype) for d in (d_q * scale, d_k * scale, d_v)])
    return jnp.concatenate([d for part in zip(*d_qkv) for d in part], axis=-1)


def _tiles(x, parts):
    """(b, N, parts * D) -> [part][tile] of (b, N, 128)."""
    tiles = jnp.split(x, x.shape[-1] // LANES, axis=-1)
    each = len(tiles) // parts
    return [tiles[i * each : (i + 1) * each] for i in range(parts)]


def _own_lanes(num_heads, qkv):
    """For each head of a tile, (128,): 1 in its lanes, 0 in those of the others."""
    dim = qkv.shape[-1] // 3 // num_heads
    return (jnp.arange(LANES) // dim == jnp.arange(LANES // dim)[:, None]).astype(qkv.dtype)


@jax.custom_vjp
def dense(x, kernel, bias):
    """``x kernel + bias``.

    Args:
        x: (..., K) array.
        kernel: (K, M) array of the dtype of ``x``.
        bias: (M,) array of the dtype of ``x``.

    Returns:
        (..., M) array of the dtype of ``x``.
    """
    return x @ kernel + bias


def _dense_forward(x, kernel, bias):
    return x @ kernel + bias, (x, kernel)


def _dense_backward(residuals, grad):
    x, kernel = residuals
    return _dense_gradients(x, kernel, grad)


def _dense_gradients(x, kernel, grad):
    rows = grad.reshape(-1, grad.shape[-1])  # (B * N, M)
    d_kernel = _transposed_product(x.reshape(-1, x.shape[-1]), rows)
    return grad @ kernel.T, d_kernel, sum_rows(rows)


def _transposed_product(a, b):
    """a^T b for (R, K) and (R, M), the gradient of a dense layer's kernel.

    XLA on CPU is fastest on products whose left factor has the summed axis last. Transposing the
    narrower factor by itself takes less than what the other forms lose; the barriers keep XLA from
    folding the transposes back into the product.
    """

    def narrow_first(a, b):
        apart = jax.lax.optimization_barrier
        if a.shape[1] <= b.shape[1]:
            return apart(a.T) @ b
        return apart(apart(b.T) @ a).T

    return jax.lax.platform_dependent(a, b, cpu=narrow_first, default=lambda a, b: a.T @ b)


dense.defvjp(_dense_forward, _dense_backward)


def sum_rows(x):
    """(..., M) -> (M,), accumulated in float32.

    XLA on CPU adds up a leading axis about ten times slower than a matrix product does.
    """
    x = x.reshape(-1, x.shape[-1])

    def as_product(x):
        ones = jnp.ones((x.shape[0],), x.dtype)
        return jnp.matmul(ones, x, **_FLOAT32).astype(x.dtype)

    def as_sum(x):
        return x.sum(axis=0, dtype=jnp.float32).astype(x.dtype)

    return jax.lax.platform_dependent(x, cpu=as_product, default=as_sum)


@jax.custom_vjp
def gelu(x):
    """Exact GELU, ``x * Phi(x)`` with the normal distribution function Phi (erf, not tanh).

    Args:
        x: array of any shape.

    Returns:
        Array of the shape and dtype of ``x``; computed in float32.

    References:
        Hendrycks and Gimpel, `Gaussian error linear units <https://arxiv.org/abs/1606.08415>`_,
        2016
    """
    y = x.astype(jnp.float32)
    return (y * _normal_cdf(y)).astype(x.dtype)


def _gelu_forward(x):
    return gelu(x), x


def _gelu_backward(x, grad):
    y = x.astype(jnp.float32)
    density = jnp.exp(-0.5 * y * y) * (0.5 / jnp.pi) ** 0.5
    return (((_normal_cdf(y) + y * density) * grad.astype(jnp.float32)).astype(x.dtype),)


def _normal_cdf(x):
    return 0.5 + 0.5 * jax.lax.erf(x * 0.5**0.5)


gelu.defvjp(_gelu_forward, _gelu_backward)


@jax.custom_vjp
def gelu_dense(x, kernel, bias):
    """``dense(gelu(x), kernel, bias)``, for which only ``x`` is kept, not the activations.

    Args:
        x: (..., K) array.
        kernel: (K, M) array of the dtype of ``x``.
        bias: (M,) array of the dtype of ``x``.

    Returns:
        (..., M) array of the dtype of ``x``.
    """
    return gelu(x) @ kernel + bias


def _gelu_dense_forward(x, kernel, bias):
    return gelu_dense(x, kernel, bias), (x, kernel)


def _gelu_dense_backward(residuals, grad):
    x, kernel = residuals
    d_gelu, d_kernel, d_bias = _dense_gradients(gelu(x), kernel, grad)
    return (*_gelu_backward(x, d_gelu), d_kernel, d_bias)


gelu_dense.defvjp(_gelu_dense_forward, _gelu_dense_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
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
    return _layer_norm_forward(x, scale, bias, eps)[0]


def _layer_norm_forward(x, scale, bias, eps):
    y = x.astype(jnp.float32)
    mean = jnp.mean(y, axis=-1, keepdims=True)
    y = y - mean
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
    y = y * inverse * scale + bias
    return y.astype(x.dtype), (x, scale, bias, mean, inverse)


def _layer_norm_backward(eps, residuals, grad):
    del eps
    x, scale, bias, mean, inverse = residuals
    grad = grad.astype(jnp.float32)
    normal = (x.astype(jnp.float32) - mean) * inverse
    d_normal = grad * scale
    across = jnp.mean(d_normal, axis=-1, keepdims=True)
    along = jnp.mean(d_normal * normal, axis=-1, keepdims=True)
    d_x = (d_normal - across - normal * along) * inverse
    d_scale, d_bias = sum_rows(grad * normal), sum_rows(grad)
    return d_x.astype(x.dtype), d_scale.astype(scale.dtype), d_bias.astype(bias.dtype)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)
