# SPDX-License-Identifier: Apache-2.0
"""Forms of multi-head attention on one TPU v5e chip: estimated cycles, forward and backward.

    python experiments/tpu/attention.py --forms now packed stacked --shapes encoder decoder

Measured between two dense layers, whose layouts they have to meet: qkv projection, attention,
output projection, and the gradients of all of it.
"""

import argparse
import functools
import math
import time

import jax
import jax.numpy as jnp
from blocks import SHAPES
from jax.sharding import SingleDeviceSharding

from ssl_jax.models import ops
from ssl_jax.plan import chips, compile, hlo

F32 = dict(preferred_element_type=jnp.float32)


def groups(dim, heads):
    """(groups P, heads per group G): as many heads as 128 lanes hold."""
    g = math.gcd(heads, max(128 // (dim // heads), 1))
    return heads // g, g


def split(x, parts, p):
    """(b, N, parts * D) -> parts arrays (b, N, P, L): tiles of lanes, no head is cut out."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], parts, p, -1), 2, 0)


def own(g, lanes, dtype):
    """(G, L): 1 where a lane belongs to a head of its group."""
    return (jnp.arange(lanes) // (lanes // g) == jnp.arange(g)[:, None]).astype(dtype)


def packed(qkv, heads):
    """Heads stay side by side in 128 lanes; each is picked out by zeros, one product per head.

    The matrix unit contracts 128 lanes at a time, so the zeros cost nothing there.
    """
    return _packed(qkv, heads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _packed(qkv, heads):
    return _packed_forward(qkv, heads)[0]


def _logits(q, k, mask, scale):
    return jnp.einsum('bmpl,bnpl->bpmn', k, q * mask, **F32) * scale


def _packed_forward(qkv, heads):
    p, g = groups(qkv.shape[-1] // 3, heads)
    q, k, v = split(qkv, 3, p)
    scale = (qkv.shape[-1] // 3 // heads) ** -0.5
    out, logs = 0, []
    for i, mask in enumerate(own(g, q.shape[-1], q.dtype)):
        logits = _logits(q, k, mask, scale)  # (b, P, keys, queries)
        top = logits.max(axis=-2, keepdims=True)
        w = jnp.exp(logits - top).astype(v.dtype)
        # Ones in the lanes of the other heads: the product brings the normalizer along.
        part = jnp.einsum('bpmn,bmpl->bnpl', w, jnp.where(mask, v, 1), **F32)
        total = part[..., (q.shape[-1] // g * (i + 1)) % q.shape[-1]]  # (b, n, P)
        out = out + jnp.where(mask, part / total[..., None], 0)
        logs.append(jnp.swapaxes(top[:, :, 0], 1, 2) + jnp.log(total))
    out = out.reshape(*qkv.shape[:2], -1).astype(qkv.dtype)
    return out, (qkv, out, tuple(logs))


def _packed_backward(heads, residuals, grad):
    qkv, out, logs = residuals
    p, g = groups(qkv.shape[-1] // 3, heads)
    q, k, v = split(qkv, 3, p)
    dtype, scale = qkv.dtype, (qkv.shape[-1] // 3 // heads) ** -0.5
    grad, out = split(grad, 1, p)[0], split(out, 1, p)[0]
    both = out.astype(jnp.float32) * grad.astype(jnp.float32)
    d_q = d_k = d_v = 0
    for mask, log_total in zip(own(g, q.shape[-1], dtype), logs):
        log_total = jnp.swapaxes(log_total, 1, 2)[:, :, None]
        w = jnp.exp(_logits(q, k, mask, scale) - log_total)
        mine = grad * mask
        inner = jnp.einsum('bnpl,l->bpn', both, mask.astype(jnp.float32))[:, :, None]
        d_v = d_v + jnp.einsum('bpmn,bnpl->bmpl', w.astype(dtype), mine, **F32)
        d_w = jnp.einsum('bmpl,bnpl->bpmn', v, mine, **F32)
        d_logits = (w * (d_w - inner)).astype(dtype)
        d_q = d_q + jnp.einsum('bpmn,bmpl->bnpl', d_logits, k * mask, **F32)
        d_k = d_k + jnp.einsum('bpmn,bnpl->bmpl', d_logits, q * mask, **F32)
    parts = [(d * s).astype(dtype) for d, s in ((d_q, scale), (d_k, scale), (d_v, 1))]
    flat = [part.reshape(*qkv.shape[:2], -1) for part in parts]
    return (jnp.concatenate(flat, axis=-1),)


_packed.defvjp(_packed_forward, _packed_backward)


def sublanes(qkv, heads):
    """The present form with queries in the lanes: softmax sums over sublanes."""
    b, n, _ = qkv.shape
    q, k, v = qkv.reshape(b, n, 3, heads, -1).transpose(2, 0, 3, 1, 4)
    logits = jnp.einsum('bhmd,bhnd->bhmn', k, q, **F32) * q.shape[-1] ** -0.5
    w = jax.nn.softmax(logits, axis=-2).astype(v.dtype)
    return jnp.einsum('bhmn,bhmd->bnhd', w, v).reshape(b, n, -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def chunked(qkv, heads, chunk=8):
    """The present form on `chunk` images at a time, whose weights stay in on-chip memory."""
    return _chunked_forward(qkv, heads, chunk)[0]


def _chunked_forward(qkv, heads, chunk):
    forward = functools.partial(ops._forward, heads, None)
    out, log_total = ops._map_chunks(forward, chunk, qkv)
    return out, (qkv, out, log_total)


def _chunked_backward(heads, chunk, residuals, grad):
    def backward(*args):
        return ops._backward(heads, None, *args)[0]

    return (ops._map_chunks(backward, chunk, *residuals, grad),)


chunked.defvjp(_chunked_forward, _chunked_backward)
FORMS = {'now': ops.attention, 'chunked': chunked, 'packed': packed, 'sublanes': sublanes}


def measure(form, shape, ops_shown=0):
    """Prints cycles of the gradient of dense, attention, dense."""
    batch, tokens, dim, heads = SHAPES[shape]
    put = SingleDeviceSharding(chips.devices('v5e:1x1')[0])

    def struct(*dims):
        return jax.ShapeDtypeStruct(dims, jnp.bfloat16, sharding=put)

    def loss(x, qkv, proj):
        y = FORMS[form](ops.dense(x, *qkv), heads)
        return jnp.square(ops.dense(y, *proj).astype(jnp.float32)).sum()

    args = (
        struct(batch, tokens, dim),
        (struct(dim, 3 * dim), struct(3 * dim)),
        (struct(dim, dim), struct(dim)),
    )
    started = time.monotonic()
    compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*args).compile()
    found = hlo.operations(hlo.parse(compiled.as_text()))
    cycles = sum(o.cycles * o.times for o in found)
    flops = 3 * batch * (8 * tokens * dim**2 + 4 * tokens**2 * dim)
    mfu = flops / chips.CHIPS['v5e'].flops_per_cycle / cycles
    print(
        f'{shape} {SHAPES[shape]} {form}: {cycles / 1e3:,.0f} k cycles, MFU {mfu:.3f}, compiled in '
        f'{time.monotonic() - started:.0f} s',
        flush=True,
    )
    for o in sorted(found, key=lambda o: -o.cycles * o.times)[:ops_shown]:
        cycles = o.cycles * o.times
        print(f'  {cycles / 1e3:8,.0f} k {o.opcode:<8}{"/".join(compile.scope(o.op_name)[1:])}')


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('--forms', nargs='*', default=list(FORMS))
    parser.add_argument('--shapes', nargs='*', default=['encoder', 'decoder'])
    parser.add_argument('--ops', type=int, default=0)
    args = parser.parse_args()
    for shape in args.shapes:
        for form in args.forms:
            measure(form, shape, args.ops)
