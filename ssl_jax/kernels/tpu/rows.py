# SPDX-License-Identifier: Apache-2.0
"""Pallas kernels for TPU that pass once over rows of tokens: LayerNorm, sums, image gathers.

Gains, as the compiler schedules them, are in `experiments/tpu`. Attention is in `tpu/attention.py`.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ssl_jax.kernels.segments import Segment, tokens_per_row

LANES, SUBLANES = 128, 8  # of a vector register
BLOCK = 2**19  # target bytes of a block; blocks of whole images reach about twice that
MAX_BLOCK = 17 * 2**16  # limit in bytes: 12 blocks fit into the 16 MiB a kernel may use


def padded(segments: Sequence[Segment]) -> bool:
    """Whether every image starts in a new register."""
    return all(s.length % SUBLANES == 0 for s in segments)


def metadata(steps: int, parallel: int, **more: int) -> dict[str, str]:
    """Metadata of a kernel for `ssl_jax plan`.

    Args:
        steps: steps of the grid.
        parallel: number of parts of the grid that cores may share.
        **more: `bytes`, HBM traffic, unless it equals the bytes of operands and results.
    """
    return {k: str(v) for k, v in {'steps': steps, 'parallel': parallel, **more}.items()}


def images_fit(x: jax.Array, segments: Sequence[Segment]) -> bool:
    """Whether `move_images` supports x (R, D): padded images, blocks that fit vector memory."""
    length = max(s.length for s in segments)
    small = length * LANES * x.dtype.itemsize <= MAX_BLOCK
    return padded(segments) and x.shape[1] % LANES == 0 and small


def move_images(src, dst, weights, ids, x, *other, interpret: bool = False) -> jax.Array:
    """Gathers images of x at ids, scales them by their weight and adds `other`.

    Args:
        src: padded segments of the S tokens of a row of x.
        dst: padded segments of the T tokens of a row of the result.
        weights: one factor per segment.
        ids: per segment int (B, n) for the n images of the result; an id beyond the last image of
            `src` yields zeros.
        x: (B * S, D) array.
        *other: nothing, or one (B * T, D) array.
        interpret: run the kernel in JAX's interpreter, on any platform (for tests).

    Returns:
        (B * T, D) array in the dtype of x.
    """
    out = None
    for k, (weight, i) in enumerate(zip(weights, ids, strict=True)):
        out = _move(src, dst, k, weight, i, x, other, out, interpret)
    return out


def _move(src, dst, k, weight, ids, x, other, into, interpret):
    """`move_images` of segment k; `into`: array with the images of earlier segments, or None."""
    source, result = src[k], dst[k]
    x_start, start = tokens_per_row(src[:k]), tokens_per_row(dst[:k])
    x_size, size = tokens_per_row(src), tokens_per_row(dst)
    dim, length, count = x.shape[1], source.length, result.images
    columns = next(
        n for n in range(dim, 0, -LANES)
        if dim % n == 0 and n * length * x.dtype.itemsize <= MAX_BLOCK
    )  # fmt: skip
    grid = (len(ids) * count, dim // columns)

    def spec(row):
        def index(b, c, ids):
            return pl.multiple_of(row(b, ids), SUBLANES), pl.multiple_of(c * columns, LANES)

        return pl.BlockSpec((pl.Element(length), pl.Element(columns)), index)

    def src_row(b, ids):
        image = jnp.minimum(ids[b], source.images - 1)
        return jax.lax.div(b, count) * x_size + x_start + image * length

    def dst_row(b, ids):
        del ids
        return jax.lax.div(b, count) * size + start + jax.lax.rem(b, count) * length

    def kernel(ids_ref, x_ref, *refs):
        out_ref, present = refs[-1], ids_ref[pl.program_id(0)] < source.images
        rest = refs[0][...] if other else jnp.zeros(out_ref.shape, out_ref.dtype)

        @pl.when(present)
        def _():
            moved = x_ref[...].astype(jnp.float32) * weight
            out_ref[...] = (rest.astype(jnp.float32) + moved).astype(out_ref.dtype)

        @pl.when(jnp.logical_not(present))
        def _():
            out_ref[...] = rest

    inputs, in_specs, aliases = [x, *other], [spec(src_row)] + [spec(dst_row)] * len(other), {}
    if into is not None:
        aliases = {1 + len(inputs): 0}
        inputs.append(into)
        in_specs.append(pl.BlockSpec(memory_space=pl.ANY))
    numbers = (min(source.images, count) + (1 + len(other)) * count) * len(ids) * length * dim
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=grid, in_specs=in_specs, out_specs=spec(dst_row)
        ),
        out_shape=jax.ShapeDtypeStruct((len(ids) * size, dim), x.dtype),
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel')),
        interpret=interpret,
        name='move_images',
        metadata=metadata(math.prod(grid), math.prod(grid), bytes=numbers * x.dtype.itemsize),
    )(ids.reshape(-1), *inputs)


def rows_fit(shape: tuple[int, ...]) -> bool:
    """Whether the kernels below support an array (R, M): full registers, and M not too wide."""
    aligned = len(shape) == 2 and shape[0] % SUBLANES == 0 and shape[1] % LANES == 0
    return aligned and shape[1] <= BLOCK // 4 // SUBLANES


def _block_of_rows(rows, columns):
    """Rows of a block of at most BLOCK float32 bytes; down to half of it if that divides `rows`."""
    most = min(rows, BLOCK // 4 // columns) // SUBLANES * SUBLANES
    return next((n for n in range(most, most // 2, -SUBLANES) if rows % n == 0), most)


def _add_rows(ref, values, left):
    """Adds the first `left` rows of values (R, M) to the eight rows of ref, full registers.

    The last block may read beyond the end, where values are undefined, possibly NaN. left: None if
    no block does.
    """
    if left is not None:
        row = jax.lax.broadcasted_iota(jnp.int32, (len(values), 1), 0)
        values = jnp.where(row < left, values, 0)
    ref[...] += values.reshape(-1, SUBLANES, values.shape[-1]).sum(axis=0)


def _left(rows, block, axis):
    """Rows from the block of this step to the end; None if blocks divide the rows."""
    return rows - pl.program_id(axis) * block if rows % block else None


def sum_rows(x: jax.Array, interpret: bool = False) -> jax.Array:
    """Partial sums over R, (R, M) -> (8, M) float32; the caller sums the eight rows.

    XLA's own reduction takes several times as long.
    """
    rows, width = x.shape
    columns = next(n for n in (512, 256, 128) if width % n == 0)
    block = _block_of_rows(rows, columns)
    grid = (width // columns, -(-rows // block))

    def kernel(x_ref, sum_ref):
        @pl.when(pl.program_id(1) == 0)
        def _():
            sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)

        _add_rows(sum_ref, x_ref[...].astype(jnp.float32), _left(rows, block, 1))

    return pl.pallas_call(
        kernel,
        grid=grid,
        in_specs=[pl.BlockSpec((block, columns), lambda m, r: (r, m))],
        out_specs=pl.BlockSpec((SUBLANES, columns), lambda m, r: (0, m)),
        out_shape=jax.ShapeDtypeStruct((SUBLANES, width), jnp.float32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary')),
        interpret=interpret,
        name='sum_rows',
        metadata=metadata(math.prod(grid), grid[0]),
    )(x)


def layer_norm(x, scale, bias, eps: float, interpret: bool = False) -> jax.Array:
    """`(x - mean) / sqrt(var + eps) * scale + bias` for x (R, D), scale and bias (1, D) float32."""

    def kernel(x_ref, scale_ref, bias_ref, y_ref):
        normal, _ = _normalise(x_ref[...], eps)
        y_ref[...] = (normal * scale_ref[...] + bias_ref[...]).astype(y_ref.dtype)

    return _norm_call(kernel, 'layer_norm', (x,), (scale, bias), 0, interpret)[0]


def layer_norm_gradient(x, grad, *other, scale, eps: float, interpret=False) -> list[jax.Array]:
    """Gradients of `layer_norm`, given that of its result; all arrays (R, D).

    `other`: nothing, or one more gradient of x, which is added.

    Returns:
        Gradient of x (R, D), and partial sums (8, D) float32 of the gradients of scale and bias.
    """
    block = _block_of_rows(*x.shape)

    def kernel(x_ref, grad_ref, *refs):
        *other_refs, scale_ref, d_x_ref, d_scale_ref, d_bias_ref = refs

        @pl.when(pl.program_id(0) == 0)
        def _():
            d_scale_ref[...] = jnp.zeros(d_scale_ref.shape, jnp.float32)
            d_bias_ref[...] = jnp.zeros(d_bias_ref.shape, jnp.float32)

        normal, inverse = _normalise(x_ref[...], eps)
        grad = grad_ref[...].astype(jnp.float32)
        d_normal = grad * scale_ref[...]
        across = jnp.mean(d_normal, axis=1, keepdims=True)
        along = jnp.mean(d_normal * normal, axis=1, keepdims=True)
        d_x = (d_normal - across - normal * along) * inverse
        for ref in other_refs:
            d_x += ref[...].astype(jnp.float32)
        d_x_ref[...] = d_x.astype(d_x_ref.dtype)
        left = _left(len(x), block, 0)
        _add_rows(d_scale_ref, grad * normal, left)
        _add_rows(d_bias_ref, grad, left)

    return _norm_call(kernel, 'layer_norm_gradient', (x, grad, *other), (scale,), 2, interpret)


def _normalise(x, eps):
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=1, keepdims=True)
    inverse = jax.lax.rsqrt(jnp.mean(x * x, axis=1, keepdims=True) + eps)
    return x * inverse, inverse


def _norm_call(kernel, name, arrays, vectors, sums, interpret):
    """One pass over arrays (R, D) and vectors (1, D); returns one (R, D) and `sums` x (8, D)."""
    rows, width = arrays[0].shape
    block = _block_of_rows(rows, width)
    steps = -(-rows // block)
    part = pl.BlockSpec((block, width), lambda r: (r, 0))
    results = [jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype)]
    results += [jax.ShapeDtypeStruct((SUBLANES, width), jnp.float32)] * sums
    return pl.pallas_call(
        kernel,
        grid=(steps,),
        in_specs=[part] * len(arrays) + [pl.BlockSpec((1, width), lambda r: (0, 0))] * len(vectors),
        out_specs=[part] + [pl.BlockSpec((SUBLANES, width), lambda r: (0, 0))] * sums,
        out_shape=results,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=('arbitrary' if sums else 'parallel',)
        ),
        interpret=interpret,
        name=name,
        metadata=metadata(steps, 1 if sums else steps),
    )(*arrays, *vectors)
