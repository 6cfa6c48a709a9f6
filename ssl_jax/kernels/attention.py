# SPDX-License-Identifier: Apache-2.0
"""Multi-head self-attention; backward starts from the output and one normalizer per query.

There is a form for CPU (in chunks that stay in cache) and a default; where `kernels.forms` says so,
also one for TPU (kernels in `tpu/attention.py`) and cuDNN's for GPU. A form is chosen at lowering,
see `ops.lowered`, cuDNN's at tracing. Timings are in `experiments/bench`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from ssl_jax import sharding
from ssl_jax.kernels import forms, ops
from ssl_jax.kernels.segments import Segment, join, per_row, split, tokens_per_row
from ssl_jax.kernels.tpu import attention as tpu_attention

NAME = 'attention'  # checkpoint name of output and normalizers, see `models.blocks.REMAT`
CHUNK_BYTES = 4 << 20  # attention weights of one chunk; they stay in the cache near a CPU core
CUDNN_HEAD = 128  # most channels of a head that cuDNN takes; 256 from Hopper on, 128 everywhere


def attention(qkv: jax.Array, num_heads: int, segments: tuple[Segment, ...]) -> jax.Array:
    """Multi-head self-attention within each image, `softmax(q k^T / sqrt(d)) v`.

    The softmax is in float32 for any input dtype. The (N, N) weights are not kept for backward,
    which recomputes them from the logarithm of their normalizer.

    Args:
        qkv: (B * T, 3 * D) tokens. The last axis holds all queries, then all keys, then all values,
            each as `num_heads` heads of `d = D / num_heads` channels (torch's fused order).
        num_heads: a divisor of D.
        segments: layout of the T tokens of a row, one `Segment` per image size.

    Returns:
        (B * T, D) array in the dtype of `qkv`, heads concatenated.

    References:
        Vaswani et al., Attention is all you need, arXiv 1706.03762
        Dao et al., FlashAttention, arXiv 2205.14135 (the backward pass)
    """
    if qkv.shape[-1] % (3 * num_heads):
        raise ValueError(
            f'attention: the last axis of qkv is {qkv.shape[-1]}, not a multiple of 3 * num_heads ='
            f' {3 * num_heads}; pass the projection (B * T, 3 * D) with D divisible by num_heads.'
        )
    if _form(qkv, num_heads, segments) == 'cudnn':
        return _cudnn(qkv, num_heads, segments)
    return _attention(qkv, num_heads, segments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _attention(qkv, num_heads, segments):
    return _attention_forward(qkv, num_heads, segments)[0]


def _attention_forward(qkv, num_heads, segments):
    def kernel(qkv):
        # The backward kernel recomputes the normalizers.
        batch = len(qkv) // tokens_per_row(segments)  # rows of one device
        unused = tuple(jnp.zeros((batch * s.images, num_heads, s.tokens)) for s in segments)
        return _kernel_by_size(tpu_attention.attention, num_heads, segments, qkv), unused

    def by_image(run, qkv):
        forward = functools.partial(_forward, num_heads, None)
        outs, log_totals = zip(
            *[run(forward, part) for part in _images(qkv, segments)], strict=True
        )
        return _rows(outs, segments), log_totals

    out, log_totals = _by_platform(by_image, kernel, num_heads, segments, qkv)
    out, log_totals = (checkpoint_name(x, NAME) for x in (out, log_totals))
    return out, (qkv, out, log_totals)


def _kernel_by_size(kernel, num_heads, segments, *args):
    """kernel(*args, num_heads, segments), in one call if the kernel allows it, else per size."""
    if tpu_attention.takes(args[0], num_heads, segments):
        return kernel(*args, num_heads, segments)
    parts = []
    for images in zip(*[_images(x, segments) for x in args], strict=True):
        batch, tokens, _ = images[0].shape
        rows = [x.reshape(batch * tokens, -1) for x in images]
        parts.append(kernel(*rows, num_heads, (Segment(1, tokens),)).reshape(batch, tokens, -1))
    return _rows(parts, segments)


def _images(x, segments):
    """(B * T, D) -> one (B * n, N, D) per image size."""
    return [part.reshape(-1, *part.shape[2:]) for part in split(per_row(x, segments), segments)]


def _rows(parts, segments):
    """Inverse of `_images`."""
    images = [x.reshape(-1, s.images, *x.shape[1:]) for x, s in zip(parts, segments, strict=True)]
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
        parts = [run(backward, *args) for args in zip(qkv, out, log_totals, grad, strict=True)]
        return _rows(parts, segments)

    return (_by_platform(by_image, kernel, num_heads, segments, *residuals, grad),)


_attention.defvjp(_attention_forward, _attention_backward)


def _form(qkv, num_heads, segments):
    """The hand-written form in use, None for XLA's."""
    batch = len(qkv) // tokens_per_row(segments)

    def pallas():
        return sharding.only_rows(batch) and tpu_attention.fits(qkv, num_heads, segments)

    def cudnn():
        head_dim = qkv.shape[-1] // 3 // num_heads
        supported = qkv.dtype in (jnp.bfloat16, jnp.float16)
        supported &= head_dim % 8 == 0 and head_dim <= CUDNN_HEAD
        return sharding.only_rows(batch) and supported

    fits = {'pallas': pallas, 'cudnn': cudnn}
    return forms.pick('attention', qkv, (num_heads, tuple(segments)), fits)


def _cudnn(qkv, num_heads, segments):
    """cuDNN's attention, one call per image size, with its own gradient.

    It keeps the normalizers itself, without `NAME`: where backward recomputes (`remat`), it runs
    the forward pass again. Each device calls it on its part of the batch.
    """

    def each(x):
        b, n, width = x.shape
        # jax 0.10.2 refuses the gradient of an odd number of tokens: one more, which is masked.
        x = jnp.pad(x, ((0, 0), (0, n % 2), (0, 0)))
        heads = x.reshape(b, -1, 3, num_heads, width // 3 // num_heads)
        q, k, v = (heads[:, :, i] for i in range(3))
        lengths = jnp.full((b,), n, jnp.int32)
        masked = dict(query_seq_lengths=lengths, key_value_seq_lengths=lengths) if n % 2 else {}
        out = jax.nn.dot_product_attention(q, k, v, implementation='cudnn', **masked)
        return out[:, :n].reshape(b, n, -1)

    def of_device(qkv):
        return _rows([each(x) for x in _images(qkv, segments)], segments)

    return sharding.per_device(of_device, 1)(qkv)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def biased_attention(qkv: jax.Array, bias: jax.Array, num_heads: int) -> jax.Array:
    """`attention` with a bias on the logits, `softmax(q k^T / sqrt(d) + bias) v`.

    qkv is (B, N, 3 * D), the result (B, N, D); bias (H, N, N) float32 over (head, query, key) is
    shared by all samples.
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
    """Output (b, N, D) and log normalizers (b, H, N)."""
    q, k, v = _heads(qkv, num_heads)
    logits = _logits(q, k, bias)  # (b, H, N, N)
    top = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(logits - top)
    total = weights.sum(axis=-1, keepdims=True)
    out = jnp.einsum('bhnm,bhmd->bhnd', weights.astype(v.dtype), v, **_FLOAT32) / total
    return _merge(out).astype(qkv.dtype), (top + jnp.log(total))[..., 0]


def _backward(num_heads, bias, qkv, out, log_total, grad):
    """Gradient of qkv, and gradient of the logits (b, H, N, N) in float32."""
    q, k, v = _heads(qkv, num_heads)
    dtype, scale = qkv.dtype, q.shape[-1] ** -0.5
    # The sum over keys of weight * d(weight), computed from the output.
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
    """Runs the form for the platform the program is lowered for.

    `by_image(run, *args)` evaluates `fn(*images)` as `run(fn, *images)`; on a single CPU device
    `run` goes over chunks of images. `kernel(*args)` is for TPU; each device runs it on its part of
    the batch. `args` are arrays (B * T, ...), or tuples with one array per segment.
    """
    batch = len(args[0]) // tokens_per_row(segments)
    default = functools.partial(by_image, lambda fn, *images: fn(*images))
    special = {}
    # A loop over samples that are split over devices would gather the batch.
    in_chunks = any(_chunk(num_heads, s.tokens) < batch * s.images for s in segments)
    if in_chunks and sharding.num_devices() == 1:
        special['cpu'] = functools.partial(by_image, functools.partial(_map_chunks, num_heads))
    if _form(args[0], num_heads, segments) == 'pallas':
        special['tpu'] = sharding.per_device(kernel, len(args))
    return ops.lowered(special, default, *args)


def _chunk(num_heads, tokens):
    """Number of images whose attention weights fit into CHUNK_BYTES."""
    return max(1, CHUNK_BYTES // (4 * num_heads * tokens**2))


def _map_chunks(num_heads, fn, *args):
    """fn over chunks of images; a shorter last chunk is computed separately."""
    batch, tokens, _ = args[0].shape
    chunk = _chunk(num_heads, tokens)
    if chunk >= batch:
        return fn(*args)
    num_chunks = batch // chunk
    chunks = [x[: num_chunks * chunk].reshape(num_chunks, chunk, *x.shape[1:]) for x in args]
    out = jax.lax.map(lambda xs: fn(*xs), chunks)
    out = jax.tree.map(lambda y: y.reshape(num_chunks * chunk, *y.shape[2:]), out)
    if batch % chunk:
        last = fn(*[x[num_chunks * chunk :] for x in args])
        out = jax.tree.map(lambda y, z: jnp.concatenate([y, z]), out, last)
    return out
