# SPDX-License-Identifier: Apache-2.0
"""Multi-head self-attention, with gradients that start from the output and one number per row.

The forms for CPU (in chunks that stay in its cache), TPU (kernels of `tpu_attention`) and all else
are chosen when a program is lowered, see `ops.lowered`. `experiments/bench` has the timings.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ssl_jax import sharding
from ssl_jax.kernels import ops
from ssl_jax.kernels.segments import Segment, join, per_row, split, tokens_per_row
from ssl_jax.kernels.tpu import attention as tpu_attention

NAME = 'attention'  # of its output and normalizers, see `layers.REMAT`
# Attention weights of so many bytes at a time stay in the cache of a CPU core's neighbourhood.
CHUNK_BYTES = 4 << 20


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
    out, log_totals = (checkpoint_name(x, NAME) for x in (out, log_totals))
    return out, (qkv, out, log_totals)


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
    out, log_total = (checkpoint_name(x, NAME) for x in _forward(num_heads, bias, qkv))
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
    return ops.lowered(forms, default, *args)


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
