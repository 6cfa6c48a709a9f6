# SPDX-License-Identifier: Apache-2.0
"""Pallas kernels for TPU: attention over many short sequences.

The logits of an image never leave vector memory, and inputs and outputs need no transpose: tokens
stay rows, as in the dense layers, and heads stay side by side in tiles of 128 lanes. A kernel
selects one head of a tile by zeroing the lanes of the other heads. This is free, because the matrix
unit always sums over 128 lanes.

Images of any number of tokens may follow each other without padding. A kernel works on windows of
rows that start at a multiple of 8 and cover one or more images, and masks logits between different
images. Images padded to full registers may have several sizes, with one call per size; the calls
write to different rows of one array.

Gains, as the compiler schedules the kernels, are in `experiments/tpu`.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ssl_jax.kernels.segments import Segment, tokens_per_row
from ssl_jax.kernels.tpu.rows import BLOCK, LANES, MAX_BLOCK, SUBLANES, metadata, padded

# Tokens per image. The logits of a step lie in vector memory: for images of up to SHORT tokens
# those of all queries, for longer images, which must be padded, those of 128 queries at a time.
SHORT, LONG = 384, 2048
LONG_BYTES = 48 << 20  # vector memory for images longer than SHORT; the default is 16 of 128 MiB
_ROWS_BY_ROWS, _ROWS_BY_COLUMNS, _COLUMNS_BY_COLUMNS = (1, 1), (1, 0), (0, 0)  # contracted axes
_NEVER = -1e30  # logit between two images


def fits(qkv: jax.Array, num_heads: int, segments: Sequence[Segment]) -> bool:
    """Whether the kernels support qkv: heads fill whole tiles, and images are not too long."""
    dim = qkv.shape[-1] // 3
    tiled = dim % math.lcm(dim // num_heads, LANES) == 0
    sizes = [s.length for s in segments]
    small = max(_least_bytes(qkv, num_heads, size) for size in sizes) <= MAX_BLOCK
    longest = LONG if padded(segments) else SHORT
    return tiled and small and max(sizes) <= longest


def takes(qkv: jax.Array, num_heads: int, segments: Sequence[Segment]) -> bool:
    """Whether one call supports these image sizes: one size, padded, or few images per row."""
    few = sum(s.images for s in segments) <= 32
    few = few and _least_bytes(qkv, num_heads, tokens_per_row(segments)) <= MAX_BLOCK
    return len(segments) == 1 or padded(segments) or few


def _least_bytes(qkv, num_heads, tokens):
    """Bytes of the smallest block: a multiple of 8 rows and of `tokens`, one tile of heads wide."""
    width = math.lcm(qkv.shape[-1] // 3 // num_heads, LANES)
    return math.lcm(tokens, SUBLANES) * width * qkv.dtype.itemsize


def _dot(a, b, axes):
    """Product of two matrices, contracted over one axis of each, in float32."""
    # The precision a user sets for all products ('highest') is not available for 16-bit numbers.
    precision = jax.lax.Precision.DEFAULT if a.dtype == jnp.bfloat16 else None
    dims = (((axes[0],), (axes[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision, preferred_element_type=jnp.float32)


def attention(qkv, num_heads: int, segments: Sequence[Segment], interpret=False) -> jax.Array:
    """`softmax(q k^T / sqrt(d)) v` within each image, (B * T, D) in the dtype of `qkv`.

    Args:
        qkv: (B * T, 3 * D) array of tokens; queries, keys and values of all heads.
        num_heads: heads of `d = D / num_heads` channels, see `fits`.
        segments: layout of the T tokens of a row.
        interpret: run the kernel in JAX's interpreter, on any platform (for tests).
    """
    return _call(_forward_kernel, 'attention', (qkv,), 1, num_heads, segments, interpret)


def gradient(qkv, grad, num_heads: int, segments: Sequence[Segment], interpret=False) -> jax.Array:
    """Gradient of `qkv` (B * T, 3 * D), given that of the result of `attention` (B * T, D)."""
    arrays, name = (qkv, grad), 'attention_gradient'
    return _call(_gradient_kernel, name, arrays, 3, num_heads, segments, interpret)


def _call(kernel, name, arrays, parts, num_heads, segments, interpret):
    """Runs a kernel with `parts` results (B * T, D), which lie side by side in one array."""
    rows, dim = arrays[0].shape[0], arrays[0].shape[1] // 3
    width = math.lcm(dim // num_heads, LANES)  # lanes of a tile
    tile = width, dim // num_heads, arrays[0].dtype.itemsize
    call = functools.partial(_call_of, kernel, name, arrays, parts, tile, interpret)
    if len(segments) == 1:  # blocks need not follow the rows of the batch
        segments = (segments[0]._replace(images=rows // segments[0].length),)
    if not padded(segments):
        # The last block may read beyond the end, where values are undefined.
        work = _division(segments, rows, *tile)
        return call(work, -(-rows // work.block), None)
    result, first, group = None, 0, tokens_per_row(segments)
    for segment in segments:
        work = _padded_division(segment, *tile)
        last = segment.images * segment.length - work.block
        count = -(-segment.images * segment.length // work.block)

        def row(b, first=first, block=work.block, last=last, count=count):
            # The last block of a size starts early enough to end with it: some images are computed
            # twice.
            start = jnp.minimum(jax.lax.rem(b, count) * block, last)
            return jax.lax.div(b, count) * group + first + start

        result = call(work, rows // group * count, row, result)
        first += segment.images * segment.length
    return result


def _call_of(kernel, name, arrays, parts, tile, interpret, work, blocks, row, into=None):
    """Runs a kernel on `blocks` blocks.

    `row`: block b -> its first row; None if blocks are consecutive. `into`: array that keeps its
    values in all other rows, or None.
    """
    rows, dim = arrays[0].shape[0], arrays[0].shape[1] // 3
    width, dim_head, _ = tile
    tiles, steps = dim // width, work.block // work.group // work.groups
    # All steps along the last dimension of the grid work on the same blocks. Their first result is
    # written in place, the others stay in scratch until `parts - 1` short steps copy them out.
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
        metadata=metadata(blocks * tiles * steps, blocks * tiles, bytes=num_bytes),
    )(*inputs)


def _without(positions, kernel):
    """The kernel without the references at these positions."""
    return lambda *refs: kernel(*[r for i, r in enumerate(refs) if i not in positions])


@dataclasses.dataclass(frozen=True)
class _Division:
    """Division of rows into blocks, steps, groups and windows."""

    rows: int | None  # in total; None if no block reaches beyond the end
    block: int  # rows in vector memory at a time, a multiple of 8 and of `group`
    group: int  # rows after which the image sizes repeat
    groups: int  # per step of the kernel
    # Per window of a group (first row, images, tokens per image, rows per image, cover); `cover`
    # rows from a multiple of 8 hold the window wherever its group starts.
    windows: tuple


@functools.lru_cache
def _division(segments, rows, width, dim_head, itemsize):
    """`_Division` for images without padding."""
    limit = BLOCK // itemsize // width  # rows
    sizes = [(s.images, s.tokens) for s in segments]
    if len(sizes) == 1:  # a group may have any number of images
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
    """`_Division` for images of one size, each padded to full registers."""
    length, limit = segment.length, BLOCK // itemsize // width
    block = _most(length, segment.images, limit)
    images = _images_per_window(length, block // length, block)
    group = images * length
    groups = _groups(block, group, 1, width, dim_head)
    return _Division(None, block, group, groups, ((0, images, segment.tokens, length, group),))


def _groups(block, group, windows, width, dim_head):
    """Groups per step: enough heads to overlap exponentials of one with products of another."""
    wanted, count = -(-32 * dim_head // width // windows), block // group
    return next(n for n in range(min(wanted, count), 0, -1) if count % n == 0)


def _most(unit, count, limit):
    """Rows of a block: the multiple of `unit` up to `limit` that wastes fewest units at the end."""
    wanted = range(max(min(limit // unit, math.ceil(count)), 1), 0, -1)
    return unit * min(wanted, key=lambda n: math.ceil(count / n) * n - count)


def _cover(first, group, rows, block):
    """Rows of a window that starts at a multiple of 8 and holds `rows` wherever a group starts."""
    starts = range(first, block, group)
    most = max(-(-(start % SUBLANES + rows) // SUBLANES) * SUBLANES for start in starts)
    return min(most, block)


def _images_per_window(tokens, count, block):
    """A divisor of count: small windows leave registers half empty, large ones waste logits."""

    def cost(n):  # per image; the constant is the fixed cost of a window
        cover = _cover(0, n * tokens, n * tokens, block)
        return (cover * -(-cover // LANES) * LANES + 3000) / n

    return min((n for n in range(1, count + 1) if count % n == 0), key=cost)


def _windows(block, step, work, refs):
    """Yields (rows of each array, slice of these rows, image) for each window of a step.

    `image(axis)` is the image index of each row, see `_load`; `image` is None if all rows belong to
    one image.
    """
    for i in range(work.groups):
        start = (step * work.groups + i) * work.group
        for first, images, tokens, length, cover in work.windows:
            rows = images * length
            if work.rows is not None:  # up to the end of the array
                rows = jnp.minimum(rows, work.rows - block * work.block - (start + first))
            if work.rows is None and (images, tokens) == (1, length):  # a single image, unpadded
                window = pl.ds(pl.multiple_of(start + first, SUBLANES), cover)
                yield [ref[window, :] for ref in refs], window, None
            else:
                yield _load(start + first, rows, images, tokens, length, cover, refs)


def _load(first, rows, images, tokens, length, size, refs):
    start = jnp.minimum(first & ~(SUBLANES - 1), refs[0].shape[0] - size)
    window = pl.ds(pl.multiple_of(start, SUBLANES), size)

    def image(axis):
        """Image index from 1, int32 (R, 1) or (1, R); 0 for rows of other windows and padding."""
        shape = [1, 1]
        shape[axis] = size
        row = jax.lax.broadcasted_iota(jnp.int32, tuple(shape), axis) - (first - start)
        number, end = jnp.zeros(shape, jnp.int32), jnp.minimum(tokens, rows)
        for i in range(images):
            number += jnp.where(row >= i * length, 1, 0)
            end = jnp.where(row >= i * length, jnp.minimum(i * length + tokens, rows), end)
        return jnp.where(row < end, number, 0)

    valid = image(0) > 0  # zeros elsewhere: a weight of 0 times NaN is still NaN
    return [jnp.where(valid, ref[window, :], 0) for ref in refs], window, image


def _heads(shape, dim_head):
    """Yields (slice of full registers, bool (R, L) of the head's lanes) for each head of a tile."""
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
        for chunk in _queries(len(q)):
            part = q[chunk]
            mask, out, totals = _image_mask(image, chunk, 0), _Tile(part.shape), _Tile(part.shape)
            for lanes, in_head in _heads(part.shape, dim_head):
                head_q = jnp.where(in_head, part[:, lanes], 0)
                logits = mask(_dot(head_q, k[:, lanes], _ROWS_BY_ROWS))
                weights = jnp.exp2((logits - logits.max(axis=1, keepdims=True)) * scale)
                total = weights.sum(axis=1, keepdims=True)
                out.put(
                    lanes, in_head, _dot(weights.astype(v.dtype), v[:, lanes], _ROWS_BY_COLUMNS)
                )
                totals.put(lanes, in_head, jnp.broadcast_to(total, in_head.shape))
            out.columns = [x / total for x, total in zip(out.columns, totals.columns, strict=True)]
            out.store(out_ref, window, chunk, _written(work, image))


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
    # Weights and logits have keys as rows and queries as columns. Sums over keys then add full
    # registers, and only one of the five products, the gradient of the queries, needs a transpose.
    for (q, k, v, grad), window, image in _windows(block, step, work, refs):
        scale, root, written = _log2e(dim_head), dim_head**-0.5, _written(work, image)
        d_q_ref, d_k_ref, d_v_ref = results
        d_k, d_v = _Tile(k.shape), _Tile(v.shape)
        for chunk in _queries(len(q)):
            chunk_q, chunk_grad = q[chunk], grad[chunk]
            mask, d_q = _image_mask(image, chunk, 1), _Tile(chunk_q.shape)
            add = chunk.start > 0
            for (lanes, in_head), (_, q_in_head) in zip(
                _heads(k.shape, dim_head), _heads(chunk_q.shape, dim_head), strict=True
            ):
                head_k, head_v = (jnp.where(in_head, x[:, lanes], 0) for x in (k, v))
                logits = mask(_dot(head_k, chunk_q[:, lanes], _ROWS_BY_ROWS))
                weights = jnp.exp2((logits - logits.max(axis=0, keepdims=True)) * scale)
                weights = weights * (1 / weights.sum(axis=0, keepdims=True))
                d_weights = _dot(head_v, chunk_grad[:, lanes], _ROWS_BY_ROWS)
                product = weights * d_weights
                d_logits = (product - weights * product.sum(axis=0, keepdims=True)).astype(q.dtype)
                weights = weights.astype(q.dtype)
                d_v.put(lanes, in_head, _dot(weights, chunk_grad[:, lanes], _ROWS_BY_COLUMNS), add)
                d_k.put(lanes, in_head, _dot(d_logits, chunk_q[:, lanes], _ROWS_BY_COLUMNS), add)
                d_q.put(lanes, q_in_head, _dot(d_logits, k[:, lanes], _COLUMNS_BY_COLUMNS))
            d_q.store(d_q_ref, window, chunk, written, root)
        d_k.store(d_k_ref, window, slice(0, len(k)), written, root)
        d_v.store(d_v_ref, window, slice(0, len(v)), written)


def _queries(rows):
    """Slices of the rows of a window, each with the queries that are processed together."""
    if rows <= SHORT + SUBLANES:  # a window may start before its image
        return [slice(0, rows)]
    return [slice(i, min(i + LANES, rows)) for i in range(0, rows, LANES)]


def _image_mask(image, queries, axis):
    """Returns logits -> logits with _NEVER between two images; queries lie along `axis`."""
    if image is None:
        return lambda logits: logits
    of_queries = image(axis)[queries] if axis == 0 else image(axis)[:, queries]
    same_image = of_queries == image(1 - axis)
    return lambda logits: jnp.where(same_image, logits, _NEVER)


def _written(work, image):
    """Rows that a window writes, bool (R, 1); None for all of them, padding included."""
    return None if work.rows is None else image(0) > 0


def _log2e(dim_head):
    """Factor of the logits before `exp2`, `log2(e) / sqrt(d)`."""
    return math.log2(math.e) * dim_head**-0.5


class _Tile:
    """Result for all heads of a tile, (R, width) float32, stored as columns of 128 lanes."""

    def __init__(self, shape):
        rows, width = shape
        self.columns = [jnp.zeros((rows, LANES), jnp.float32)] * (width // LANES)

    def put(self, lanes, in_head, values, add=False):
        """Sets the lanes of one head, or adds to them."""
        for j, i in enumerate(range(lanes.start // LANES, lanes.stop // LANES)):
            part = slice(j * LANES, (j + 1) * LANES)
            mask, new, old = in_head[:, part], values[:, part], self.columns[i]
            self.columns[i] = old + jnp.where(mask, new, 0) if add else jnp.where(mask, new, old)

    def store(self, ref, window, chunk, written, factor=1.0):
        """Writes factor times the tile to `ref`, at rows `chunk` of `window`; see `_written`."""
        rows = pl.ds(pl.multiple_of(window.start + chunk.start, SUBLANES), chunk.stop - chunk.start)
        written = None if written is None else written[chunk]
        for i, column in enumerate(self.columns):
            lanes = pl.ds(i * LANES, LANES)
            value = (column * factor).astype(ref.dtype)
            ref[rows, lanes] = (
                value if written is None else jnp.where(written, value, ref[rows, lanes])
            )
