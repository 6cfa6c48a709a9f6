# SPDX-License-Identifier: Apache-2.0
"""Kernels for TPU (Pallas): attention of many short sequences.

The logits of an image never leave the chip's vector memory, and nothing moves on the way
in or out. Tokens stay rows as the dense layers have them, heads stay side by side in tiles of 128
lanes. Of a tile, one head is picked out by zeros in the lanes of the others, which costs nothing,
for the matrix unit sums over 128 lanes at a time whatever they hold. Images of any number of tokens
may follow each other without padding: a kernel works on windows of rows that start at a multiple of
8 and cover one image or some, and takes no notice of the logits between different images. Images
that are padded to whole registers may be of several sizes, a call for each; the calls write to
different rows of one array.

What they gain by the compiler's own schedule: experiments/tpu.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ssl_jax.kernels.segments import tokens_per_row
from ssl_jax.kernels.tpu.rows import BLOCK, LANES, MAX_BLOCK, SUBLANES, enabled, metadata, padded

# The logits of a step lie in vector memory: of all queries of images of so many tokens, of 128 at a
# time of longer ones, which have to be padded.
SHORT, LONG = 384, 2048
LONG_BYTES = 48 << 20  # of vector memory for those, instead of 16 MiB of 128
_ROWS_BY_ROWS, _ROWS_BY_COLUMNS, _COLUMNS_BY_COLUMNS = (1, 1), (1, 0), (0, 0)  # what is summed
_NEVER = -1e30  # a logit between two images


def fits(qkv, num_heads, segments):
    """Whether attention's kernels take qkv: whole tiles of heads, and images not too long."""
    dim = qkv.shape[-1] // 3
    whole = dim % math.lcm(dim // num_heads, LANES) == 0
    sizes = [s.length for s in segments]
    small = max(_least_bytes(qkv, num_heads, size) for size in sizes) <= MAX_BLOCK
    longest = LONG if padded(segments) else SHORT
    return enabled() and whole and small and max(sizes) <= longest


def takes(qkv, num_heads, segments):
    """Whether `attention` takes these sizes of images: one, or padded, or few that soon repeat."""
    few = sum(s.images for s in segments) <= 32
    few = few and _least_bytes(qkv, num_heads, tokens_per_row(segments)) <= MAX_BLOCK
    return len(segments) == 1 or padded(segments) or few


def _least_bytes(qkv, num_heads, tokens):
    """Of the smallest block: a multiple of 8 rows of images or groups of so many tokens."""
    width = math.lcm(qkv.shape[-1] // 3 // num_heads, LANES)
    return math.lcm(tokens, SUBLANES) * width * qkv.dtype.itemsize


def _dot(a, b, axes):
    """The product of two matrices, summed over one axis of each, in float32."""
    # What a user asks of products in general ('highest') is not to be had from 16-bit numbers.
    precision = jax.lax.Precision.DEFAULT if a.dtype == jnp.bfloat16 else None
    dims = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision, preferred_element_type=jnp.float32)


def attention(qkv, num_heads, segments, interpret=False):
    """``softmax(q k^T / sqrt(d)) v`` of every image by itself.

    Args:
        qkv: (B * T, 3 * D), the tokens of image after image; queries, keys, values of all heads.
        num_heads: heads of ``d = D / num_heads`` channels, see `fits`.
        segments: whose the T tokens of a row are, a sequence of `Segment`.
        interpret: run the kernel step by step in JAX, on any platform (for tests).

    Returns:
        (B * T, D) of the dtype of ``qkv``.
    """
    kernel, name = _forward_kernel, 'attention'
    return _call(kernel, name, (qkv,), 1, num_heads, segments, interpret)


def gradient(qkv, grad, num_heads, segments, interpret=False):
    """The gradient of ``qkv`` (B * T, 3 * D) from that of `attention`'s result, (B * T, D)."""
    kernel, name = _gradient_kernel, 'attention_gradient'
    return _call(kernel, name, (qkv, grad), 3, num_heads, segments, interpret)


def _call(kernel, name, arrays, parts, num_heads, segments, interpret):
    """`parts` results of (B * T, D) side by side."""
    rows, dim = arrays[0].shape[0], arrays[0].shape[1] // 3
    width = math.lcm(dim // num_heads, LANES)  # of a tile, lanes
    tile = width, dim // num_heads, arrays[0].dtype.itemsize
    call = functools.partial(_call_of, kernel, name, arrays, parts, tile, interpret)
    if len(segments) == 1:  # a row of the batch has no say
        segments = (segments[0]._replace(images=rows // segments[0].length),)
    if not padded(segments):
        # The last block may reach beyond the end: what is read there is anything.
        work = _division(segments, rows, *tile)
        return call(work, -(-rows // work.block), None)
    result, first, group = None, 0, tokens_per_row(segments)
    for segment in segments:
        work = _padded_division(segment, *tile)
        last = segment.images * segment.length - work.block
        count = -(-segment.images * segment.length // work.block)

        def row(b, first=first, block=work.block, last=last, count=count):
            # The last block of a size begins early enough to end with it: some images come twice.
            start = jnp.minimum(jax.lax.rem(b, count) * block, last)
            return jax.lax.div(b, count) * group + first + start

        result = call(work, rows // group * count, row, result)
        first += segment.images * segment.length
    return result


def _call_of(kernel, name, arrays, parts, tile, interpret, work, blocks, row, into=None):
    """`_call` of so many blocks, of which b begins at row(b); other rows as in `into`.

    row: None where block follows block.
    """
    rows, dim = arrays[0].shape[0], arrays[0].shape[1] // 3
    width, dim_head, _ = tile
    tiles, steps = dim // width, work.block // work.group // work.groups
    # Along the last dimension of the grid all steps work on the same blocks, whose results but the
    # first stay in scratch; then come `parts - 1` short ones that copy these to where they belong.
    grid = (blocks, tiles, steps + parts - 1)

    def spec(tile):
        def index(b, t, w):
            return pl.multiple_of(row(b), SUBLANES), pl.multiple_of(tile(t, w) * width, LANES)

        if row is None:
            return pl.BlockSpec((work.block, width), lambda b, t, w: (b, tile(t, w)))
        return pl.BlockSpec((pl.Element(work.block), pl.Element(width)), index)

    inputs = [*[arrays[0]] * 3, *arrays[1:]]
    in_specs = [
        spec(lambda t, w, part=part: part * tiles + t)
        for part in (0, 1, 2, *[0] * (len(arrays) - 1))
    ]
    body, aliases = functools.partial(kernel, dim_head, work, steps), {}
    long = max(cover for *_, cover in work.windows) > SHORT + SUBLANES
    num_bytes = blocks * work.block * dim * (len(in_specs) + parts) * arrays[0].dtype.itemsize
    if into is not None:
        aliases = {len(inputs): 0}
        inputs.append(into)
        in_specs.append(pl.BlockSpec(memory_space=pl.ANY))
        body = _without(aliases, body)
    return pl.pallas_call(
        body,
        grid=grid,
        in_specs=in_specs,
        out_specs=spec(lambda t, w: jnp.maximum(w - (steps - 1), 0) * tiles + t),
        out_shape=jax.ShapeDtypeStruct((rows, parts * dim), arrays[0].dtype),
        scratch_shapes=[pltpu.VMEM((work.block, width), arrays[0].dtype)] * (parts - 1),
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('parallel', 'parallel', 'arbitrary'),
            vmem_limit_bytes=LONG_BYTES if long else None,
        ),
        interpret=interpret,
        name=name,
        metadata=metadata(blocks * tiles * steps, blocks * tiles, num_bytes),
    )(*inputs)


def _without(positions, kernel):
    """The kernel, called without the references at these positions."""
    return lambda *refs: kernel(*[r for i, r in enumerate(refs) if i not in positions])


@dataclasses.dataclass(frozen=True)
class _Division:
    """How rows are divided.

    Attributes:
      rows: all there are, None where no block reaches beyond the end.
      block: rows in vector memory at a time, a multiple of 8 and of `group`.
      group: rows after which sizes of images repeat.
      groups: of a step of the kernel.
      windows: of a group: (first row, images, tokens of each, rows of each, rows that cover them
        from a multiple of 8 wherever the group begins).
    """

    rows: int | None
    block: int
    group: int
    groups: int
    windows: tuple


@functools.lru_cache
def _division(segments, rows, width, dim_head, itemsize):
    """Of images that follow each other without padding."""
    limit = BLOCK // itemsize // width  # rows
    sizes = [(s.images, s.tokens) for s in segments]
    if len(sizes) == 1:  # any number of images is a group
        images, tokens = sizes[0]
        least = SUBLANES // math.gcd(tokens, SUBLANES)
        block = _most(least * tokens, images / least, limit)
        sizes = ((_images_per_window(tokens, block // tokens, block), tokens),)
    group = sum(n * tokens for n, tokens in sizes)
    if len(sizes) > 1:
        least = SUBLANES // math.gcd(group, SUBLANES)
        block = _most(least * group, rows / group / least, limit)
    windows, first = [], 0
    for n, tokens in sizes:
        images = _images_per_window(tokens, n, block)
        for _ in range(n // images):
            cover = _cover(first, group, images * tokens, block)
            windows.append((first, images, tokens, tokens, cover))
            first += images * tokens
    groups = _groups(block, group, len(windows), width, dim_head)
    return _Division(rows, block, group, groups, tuple(windows))


@functools.lru_cache
def _padded_division(segment, width, dim_head, itemsize):
    """Of the images of one size, each of whole registers."""
    length, limit = segment.length, BLOCK // itemsize // width
    block = _most(length, segment.images, limit)
    images = _images_per_window(length, block // length, block)
    group = images * length
    groups = _groups(block, group, 1, width, dim_head)
    return _Division(None, block, group, groups, ((0, images, segment.tokens, length, group),))


def _groups(block, group, windows, width, dim_head):
    """Of a step: enough heads that the exponentials of one run beside the products of another."""
    wanted, count = -(-32 * dim_head // width // windows), block // group
    return next(n for n in range(min(wanted, count), 0, -1) if count % n == 0)


def _most(unit, count, limit):
    """Rows of a block of whole units: as many as it may hold, but few that belong to no image."""
    wanted = range(max(min(limit // unit, math.ceil(count)), 1), 0, -1)
    return unit * min(wanted, key=lambda n: math.ceil(count / n) * n - count)


def _cover(first, group, rows, block):
    """Rows of a window from a multiple of 8 that holds `rows` wherever a group begins."""
    starts = range(first, block, group)
    most = max(-(-(start % SUBLANES + rows) // SUBLANES) * SUBLANES for start in starts)
    return min(most, block)


def _images_per_window(tokens, count, block):
    """A divisor of count: small windows leave registers half empty, large ones waste logits."""

    def cost(n):  # of an image; the constant stands for what a window costs whatever its size
        cover = _cover(0, n * tokens, n * tokens, block)
        return (cover * -(-cover // LANES) * LANES + 3000) / n

    return min((n for n in range(1, count + 1) if count % n == 0), key=cost)


def _windows(block, step, work, refs):
    """For each window of a step: its rows of each array, the rows as a slice, and a function.

    The function is: axis -> the number of the image that a row belongs to; None if all are one's.
    """
    for i in range(work.groups):
        start = (step * work.groups + i) * work.group
        for first, images, tokens, length, cover in work.windows:
            rows = images * length
            if work.rows is not None:  # from here to the end
                rows = jnp.minimum(rows, work.rows - block * work.block - (start + first))
            if work.rows is None and (images, tokens) == (1, length):  # nothing to tell apart
                window = pl.ds(pl.multiple_of(start + first, SUBLANES), cover)
                yield [ref[window, :] for ref in refs], window, None
            else:
                yield _load(start + first, rows, images, tokens, length, cover, refs)


def _load(first, rows, images, tokens, length, size, refs):
    start = jnp.minimum(first & ~(SUBLANES - 1), refs[0].shape[0] - size)
    window = pl.ds(pl.multiple_of(start, SUBLANES), size)

    def image(axis):
        """int32 (R, 1) or (1, R), from 1; 0 for rows of other windows and of no image."""
        shape = [1, 1]
        shape[axis] = size
        row = jax.lax.broadcasted_iota(jnp.int32, tuple(shape), axis) - (first - start)
        number, end = jnp.zeros(shape, jnp.int32), jnp.minimum(tokens, rows)
        for i in range(images):
            number += jnp.where(row >= i * length, 1, 0)
            end = jnp.where(row >= i * length, jnp.minimum(i * length + tokens, rows), end)
        return jnp.where(row < end, number, 0)

    own = image(0) > 0  # zeros elsewhere, for no weight of 0 makes a number of what is none
    return [jnp.where(own, ref[window, :], 0) for ref in refs], window, image


def _heads(shape, dim_head):
    """For each head of a tile: a slice of whole registers, and bool (R, L): its own lanes."""
    rows, width = shape
    for start in range(0, width, dim_head):
        low = start // LANES * LANES
        high = -(-(start + dim_head) // LANES) * LANES
        lane = jax.lax.broadcasted_iota(jnp.int32, (rows, high - low), 1) + low
        yield slice(low, high), (lane >= start) & (lane < start + dim_head)


def _forward_kernel(dim_head, work, steps, q_ref, k_ref, v_ref, out_ref):
    del steps
    refs = q_ref, k_ref, v_ref
    for (q, k, v), window, image in _windows(pl.program_id(0), pl.program_id(2), work, refs):
        scale = _log2e(dim_head)
        for some in _queries(len(q)):
            part = q[some]
            same, out, totals = _same(image, some, 0), _Tile(part.shape), _Tile(part.shape)
            for lanes, mine in _heads(part.shape, dim_head):
                own_q = jnp.where(mine, part[:, lanes], 0)
                logits = same(_dot(own_q, k[:, lanes], _ROWS_BY_ROWS))
                weights = jnp.exp2((logits - logits.max(axis=1, keepdims=True)) * scale)
                total = weights.sum(axis=1, keepdims=True)
                out.put(lanes, mine, _dot(weights.astype(v.dtype), v[:, lanes], _ROWS_BY_COLUMNS))
                totals.put(lanes, mine, jnp.broadcast_to(total, mine.shape))
            out.columns = [x / total for x, total in zip(out.columns, totals.columns)]
            out.store(out_ref, window, some, _own(work, image))


def _gradient_kernel(
    dim_head, work, steps, q_ref, k_ref, v_ref, grad_ref, out_ref, d_k_ref, d_v_ref
):
    block, step = pl.program_id(0), pl.program_id(2)

    @pl.when(step < steps)
    def _():
        refs = q_ref, k_ref, v_ref, grad_ref
        _gradient_step(block, step, dim_head, work, refs, (out_ref, d_k_ref, d_v_ref))

    for i, ref in enumerate((d_k_ref, d_v_ref)):

        @pl.when(step == steps + i)
        def _(ref=ref):
            out_ref[...] = ref[...]


def _gradient_step(block, step, dim_head, work, refs, results):
    # Weights and logits have keys as rows and queries as columns: sums over keys then add whole
    # registers, and of five products only that for the queries has to transpose.
    for (q, k, v, grad), window, image in _windows(block, step, work, refs):
        scale, root, own = _log2e(dim_head), dim_head**-0.5, _own(work, image)
        d_q_ref, d_k_ref, d_v_ref = results
        d_k, d_v = _Tile(k.shape), _Tile(v.shape)
        for some in _queries(len(q)):
            some_q, some_grad = q[some], grad[some]
            same, d_q = _same(image, some, 1), _Tile(some_q.shape)
            keep_k, keep_v = (t.add if some.start else t.put for t in (d_k, d_v))
            for (lanes, mine), (_, of_some) in zip(
                _heads(k.shape, dim_head), _heads(some_q.shape, dim_head)
            ):
                own_k, own_v = (jnp.where(mine, x[:, lanes], 0) for x in (k, v))
                logits = same(_dot(own_k, some_q[:, lanes], _ROWS_BY_ROWS))
                weights = jnp.exp2((logits - logits.max(axis=0, keepdims=True)) * scale)
                weights = weights * (1 / weights.sum(axis=0, keepdims=True))
                d_weights = _dot(own_v, some_grad[:, lanes], _ROWS_BY_ROWS)
                product = weights * d_weights
                d_logits = (product - weights * product.sum(axis=0, keepdims=True)).astype(q.dtype)
                weights = weights.astype(q.dtype)
                keep_v(lanes, mine, _dot(weights, some_grad[:, lanes], _ROWS_BY_COLUMNS))
                keep_k(lanes, mine, _dot(d_logits, some_q[:, lanes], _ROWS_BY_COLUMNS))
                d_q.put(lanes, of_some, _dot(d_logits, k[:, lanes], _COLUMNS_BY_COLUMNS))
            d_q.store(d_q_ref, window, some, own, root)
        d_k.store(d_k_ref, window, slice(0, len(k)), own, root)
        d_v.store(d_v_ref, window, slice(0, len(v)), own)


def _queries(rows):
    """Slices of the rows of a window: as many queries as are looked at together."""
    if rows <= SHORT + SUBLANES:  # a window may begin before its image
        return [slice(0, rows)]
    return [slice(i, min(i + LANES, rows)) for i in range(0, rows, LANES)]


def _same(image, queries, axis):
    """Logits of these queries, which lie along `axis` -> logits, none between two images."""
    if image is None:
        return lambda logits: logits
    of_queries = image(axis)[queries] if axis == 0 else image(axis)[:, queries]
    same = of_queries == image(1 - axis)
    return lambda logits: jnp.where(same, logits, _NEVER)


def _own(work, image):
    """bool (R, 1), the rows that a window writes; None for all, padding included."""
    return None if work.rows is None else image(0) > 0


def _log2e(dim_head):
    """What logits are multiplied by before powers of two: ``log2(e) / sqrt(d)``."""
    return math.log2(math.e) * dim_head**-0.5


class _Tile:
    """The result for all heads of a tile, (R, width) float32, register columns apart."""

    def __init__(self, shape):
        rows, width = shape
        self.columns = [jnp.zeros((rows, LANES), jnp.float32)] * (width // LANES)

    def put(self, lanes, mine, values):
        """Takes over the lanes of one head."""
        for at, i in enumerate(range(lanes.start // LANES, lanes.stop // LANES)):
            part = slice(at * LANES, (at + 1) * LANES)
            self.columns[i] = jnp.where(mine[:, part], values[:, part], self.columns[i])

    def add(self, lanes, mine, values):
        """Adds to the lanes of one head."""
        for at, i in enumerate(range(lanes.start // LANES, lanes.stop // LANES)):
            part = slice(at * LANES, (at + 1) * LANES)
            self.columns[i] += jnp.where(mine[:, part], values[:, part], 0)

    def store(self, ref, window, some, own, factor=1.0):
        """Writes the rows that are this window's own; what else it covers stays as it is.

        some: a slice, of the rows of the window that the tile holds.
        """
        rows = pl.ds(pl.multiple_of(window.start + some.start, SUBLANES), some.stop - some.start)
        own = None if own is None else own[some]
        for i, column in enumerate(self.columns):
            lanes = pl.ds(i * LANES, LANES)
            value = (column * factor).astype(ref.dtype)
            ref[rows, lanes] = value if own is None else jnp.where(own, value, ref[rows, lanes])
