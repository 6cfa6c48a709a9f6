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

from ssl_jax import sharding
from ssl_jax.models import tpu_attention, tpu_kernels
from ssl_jax.models.segments import Segment, tokens_per_row

ATTENTION = 'attention'  # name of its output and normalizers, see `layers.REMAT`
# Attention weights of so many bytes at a time stay in the cache of a CPU core's neighbourhood.
CHUNK_BYTES = 4 << 20


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def keep(x, name):
    """x, of which `layers.REMAT` may say by this name that it is kept for the backward pass.

    It is kept as whole numbers of the same bits: floats that are kept and used besides JAX rounds
    to their own precision, which is nothing but a copy, and costs as much where no kernel of XLA's
    is there to do it in passing.
    """
    return _keep_forward(x, name)[0]


def _keep_forward(x, name):
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f'uint{8 * x.dtype.itemsize}'))
    return jax.lax.bitcast_convert_type(checkpoint_name(bits, name), x.dtype), None


keep.defvjp(_keep_forward, lambda name, _, grad: (grad,))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def attention(qkv, num_heads, segments):
    """Multi-head self-attention of each image, ``softmax(q k^T / sqrt(d)) v``.

    The softmax is computed in float32 whatever the dtype of the input. The (N, N) weights are not
    kept for the backward pass; it computes them again from the logarithm of their normalizer.

    Args:
        qkv: (B * T, 3 * D) array, the tokens of image after image; the last axis holds all queries,
            then all keys, then all values, each as ``num_heads`` heads of ``d = D / num_heads``
            channels (torch's fused order).
        num_heads: number of heads, a divisor of D.
        segments: whose the T tokens of a row of the batch are, a `Segment` for one size of image
            after the other.

    Returns:
        (B * T, D) array of the dtype of ``qkv``, heads side by side.

    Raises:
        ValueError: the last axis is not divisible by ``3 * num_heads``.

    References:
        Vaswani et al, `Attention is all you need <https://arxiv.org/abs/1706.03762>`_, 2017
        Dao et al, `FlashAttention <https://arxiv.org/abs/2205.14135>`_, 2022 (the backward pass)
    """
    return _attention_forward(qkv, num_heads, segments)[0]


def _attention_forward(qkv, num_heads, segments):
    if qkv.shape[-1] % (3 * num_heads):
        raise ValueError(
            f'attention: the last axis of qkv is {qkv.shape[-1]}, not a multiple of 3 * num_heads ='
            f' {3 * num_heads}; pass the projection (B * T, 3 * D) with D divisible by num_heads.'
        )

    def kernel(qkv):
        # The kernel of the backward pass finds the normalizers itself.
        batch = len(qkv) // tokens_per_row(segments)  # of one device
        unused = tuple(jnp.zeros((batch * s.images, num_heads, s.tokens)) for s in segments)
        return _kernel_by_size(tpu_attention.attention, num_heads, segments, qkv), unused

    def by_image(run, qkv):
        forward = functools.partial(_forward, num_heads, None)
        outs, log_totals = zip(*[run(forward, part) for part in _images(qkv, segments)])
        return _rows(outs, segments), log_totals

    out, log_totals = _by_platform(by_image, kernel, num_heads, segments, qkv)
    out, log_totals = (checkpoint_name(x, ATTENTION) for x in (out, log_totals))
    return out, (qkv, out, log_totals)


def per_row(x, segments):
    """(B * T, D) -> (B, T, D)."""
    return x.reshape(-1, tokens_per_row(segments), x.shape[-1])


def split(x, segments):
    """(B, T, D) -> for each segment of n images of N tokens (B, n, N, D), without padding."""
    parts, start = [], 0
    for n, tokens, padding in segments:
        rows = n * (tokens + padding)
        part = x[:, start : start + rows].reshape(x.shape[0], n, tokens + padding, x.shape[-1])
        parts.append(part[:, :, :tokens])
        start += rows
    return parts


def join(parts, segments):
    """Inverse of `split`; the padding is zeros."""
    padded = [
        jnp.pad(p, ((0, 0), (0, 0), (0, s.padding), (0, 0))) if s.padding else p
        for p, s in zip(parts, segments)
    ]
    return jnp.concatenate([p.reshape(p.shape[0], -1, p.shape[-1]) for p in padded], axis=1)


def _kernel_by_size(kernel, num_heads, segments, *args):
    """kernel(*args, num_heads, segments); where it does not take them at once, size by size."""
    if tpu_attention.takes(args[0], num_heads, segments):
        return kernel(*args, num_heads, segments)
    parts = []
    for images in zip(*[_images(x, segments) for x in args]):
        batch, tokens, _ = images[0].shape
        rows = [x.reshape(batch * tokens, -1) for x in images]
        parts.append(kernel(*rows, num_heads, (Segment(1, tokens),)).reshape(batch, tokens, -1))
    return _rows(parts, segments)


def _images(x, segments):
    """(B * T, D) -> the images of each size, (B * n, N, D)."""
    return [part.reshape(-1, *part.shape[2:]) for part in split(per_row(x, segments), segments)]


def _rows(parts, segments):
    """Inverse of `_images`."""
    images = [x.reshape(-1, s.images, *x.shape[1:]) for x, s in zip(parts, segments)]
    x = join(images, segments)
    return x.reshape(-1, x.shape[-1])


def _attention_backward(num_heads, segments, residuals, grad):
    def kernel(qkv, out, log_totals, grad):
        del out, log_totals
        return _kernel_by_size(tpu_attention.gradient, num_heads, segments, qkv, grad)

    def backward(*args):
        return _backward(num_heads, None, *args)[0]

    def by_image(run, qkv, out, log_totals, grad):
        qkv, out, grad = (_images(x, segments) for x in (qkv, out, grad))
        parts = [run(backward, *args) for args in zip(qkv, out, log_totals, grad)]
        return _rows(parts, segments)

    return (_by_platform(by_image, kernel, num_heads, segments, *residuals, grad),)


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
    out, log_total = (checkpoint_name(x, ATTENTION) for x in _forward(num_heads, bias, qkv))
    return out, (qkv, bias, out, log_total)


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


def _by_platform(by_image, kernel, num_heads, segments, *args):
    """The form that suits the platform the program is lowered for, of arrays of rows.

    On TPU ``kernel(*args)``, on each device for its own images. Else ``by_image(run, *args)``, that
    calls ``run(fn, *images)`` for ``fn(*images)``: on one CPU this goes in chunks.
    """
    batch = len(args[0]) // tokens_per_row(segments)
    default = functools.partial(by_image, lambda fn, *images: fn(*images))
    forms = {}
    # A loop over samples that several devices hold between them would gather the batch.
    in_chunks = any(_chunk(num_heads, s.tokens) < batch * s.images for s in segments)
    if in_chunks and sharding.num_devices() == 1:
        forms['cpu'] = functools.partial(by_image, functools.partial(_map_chunks, num_heads))
    if sharding.only_rows(batch) and tpu_attention.fits(args[0], num_heads, segments):
        forms['tpu'] = sharding.per_device(kernel, len(args))
    return lowered(forms, default, *args)


def lowered(forms, default, *args):
    """forms[platform](*args) where there is one for the platform that a program is lowered for."""
    return jax.lax.platform_dependent(*args, **forms, default=default) if forms else default(*args)


def _chunk(num_heads, tokens):
    """How many images have attention weights that fit into the cache."""
    return max(1, CHUNK_BYTES // (4 * num_heads * tokens**2))


def _map_chunks(num_heads, fn, *args):
    """fn over chunks of images; a last, shorter chunk goes by itself."""
    batch, tokens, _ = args[0].shape
    chunk = _chunk(num_heads, tokens)
    if chunk >= batch:
        return fn(*args)
    whole = batch // chunk
    head = [x[: whole * chunk].reshape(whole, chunk, *x.shape[1:]) for x in args]
    out = jax.lax.map(lambda xs: fn(*xs), head)
    out = jax.tree.map(lambda y: y.reshape(whole * chunk, *y.shape[2:]), out)
    if batch % chunk:
        last = fn(*[x[whole * chunk :] for x in args])
        out = jax.tree.map(lambda y, z: jnp.concatenate([y, z]), out, last)
    return out


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
    return grad @ kernel.T, d_kernel, _sum_of_stored_rows(rows)


def _sum_of_stored_rows(x):
    """`sum_rows` of an array that is in memory anyway: by a kernel on TPU."""

    def kernel(x):
        return sharding.per_device(tpu_kernels.sum_rows, 1)(x).sum(axis=0).astype(x.dtype)

    return lowered({'tpu': kernel} if _kernels_take(x) else {}, sum_rows, x)


def _kernels_take(x):
    """Whether the TPU kernels for rows take x as the current mesh splits it."""
    rows = (x.shape[0] // sharding.num_devices(), *x.shape[1:])
    return sharding.only_rows(x.shape[0]) and tpu_kernels.rows_fit(rows)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm_and_input(x, scale, bias, eps=1e-6):
    """``(layer_norm(x, ...), x)``: for a residual branch and what it is added to.

    The gradients of both then come together in one pass over the array.
    """
    return _layer_norm_forward(x, scale, bias, eps)[0], x


def _layer_norm_forward(x, scale, bias, eps):
    def plain(x, scale, bias):
        y = x.astype(jnp.float32)
        mean = jnp.mean(y, axis=-1, keepdims=True)
        y = y - mean
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + eps)
        y = y * inverse * scale + bias
        return y.astype(x.dtype), mean[..., 0], inverse[..., 0]

    def kernel(x, scale, bias):
        norm = functools.partial(tpu_kernels.layer_norm, eps=eps)
        y = sharding.per_device(norm, 1, 2)(x, scale[None], bias[None])
        unused = jnp.zeros(x.shape[:-1])  # the kernel of the backward pass finds them itself
        return y, unused, unused

    forms = {'tpu': kernel} if _kernels_take(x) else {}
    y, mean, inverse = lowered(forms, plain, x, scale, bias)
    return y, (x, scale, bias, mean, inverse)


def _layer_norm_backward(eps, residuals, grad, *other):
    """`other`: a gradient that x gets from elsewhere too, or nothing."""

    def plain(scale, mean, inverse, x, grad, *other):
        mean, inverse = mean[..., None], inverse[..., None]
        grad = grad.astype(jnp.float32)
        normal = (x.astype(jnp.float32) - mean) * inverse
        d_normal = grad * scale
        across = jnp.mean(d_normal, axis=-1, keepdims=True)
        along = jnp.mean(d_normal * normal, axis=-1, keepdims=True)
        d_x = (d_normal - across - normal * along) * inverse
        d_x = sum((x.astype(jnp.float32) for x in other), d_x)
        return d_x.astype(x.dtype), sum_rows(grad * normal), sum_rows(grad)

    def kernel(scale, mean, inverse, *arrays):
        del mean, inverse

        def norm(*args):
            return tpu_kernels.layer_norm_gradient(*args[:-1], scale=args[-1], eps=eps)

        split = sharding.per_device(norm, len(arrays), 1)
        d_x, d_scale, d_bias = split(*arrays, scale[None])
        return d_x, d_scale.sum(axis=0), d_bias.sum(axis=0)

    x, scale, bias, mean, inverse = residuals
    forms = {'tpu': kernel} if _kernels_take(x) else {}
    d_x, d_scale, d_bias = lowered(forms, plain, scale, mean, inverse, x, grad, *other)
    return d_x, d_scale.astype(scale.dtype), d_bias.astype(bias.dtype)


def _layer_norm_and_input_forward(x, scale, bias, eps):
    y, residuals = _layer_norm_forward(x, scale, bias, eps)
    return (y, x), residuals


def _layer_norm_and_input_backward(eps, residuals, grads):
    return _layer_norm_backward(eps, residuals, *grads)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)
layer_norm_and_input.defvjp(_layer_norm_and_input_forward, _layer_norm_and_input_backward)
