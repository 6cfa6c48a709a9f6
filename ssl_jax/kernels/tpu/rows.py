# SPDX-License-Identifier: Apache-2.0
"""Kernels for TPU (Pallas) that pass once over rows of tokens: LayerNorm, sums, images moved.

What they gain by the compiler's own schedule: experiments/tpu.  Attention's: `tpu_attention`.
"""

import math
import os

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ssl_jax.kernels.segments import tokens_per_row

LANES, SUBLANES = 128, 8  # of a vector register
BLOCK = 2**19  # bytes wanted, of which images make about twice as many at most ...
MAX_BLOCK = 17 * 2**16  # ... for 12 blocks lie in the 16 MiB that a kernel may have


def enabled():
    """False where the environment says SSL_JAX_TPU_KERNELS=0: then XLA makes all of a program."""
    return os.environ.get('SSL_JAX_TPU_KERNELS', '1') != '0'


def padded(segments):
    """Whether every image begins in a new register."""
    return all(s.length % SUBLANES == 0 for s in segments)


def metadata(steps, parallel, num_bytes=None):
    """For `ssl_jax plan`: steps of the grid, parts of it that cores may share, bytes through HBM.

    num_bytes: None where they are those of operands and results.
    """
    said = {'steps': steps, 'parallel': parallel}
    if num_bytes is not None:
        said['bytes'] = num_bytes
    return {key: str(value) for key, value in said.items()}


def images_fit(x, segments):
    """Whether `move_images` takes rows (R, D): padded images that fit vector memory."""
    length = max(s.length for s in segments)
    small = length * LANES * x.dtype.itemsize <= MAX_BLOCK
    return enabled() and padded(segments) and x.shape[1] % LANES == 0 and small


def move_images(sources, results, weights, ids, x, *other, interpret=False):
    """Images of x (B * S, D) at ids, times their weight, plus `other`: (B * T, D).

    Args:
        sources, results: the segments (`Segment`, padded) of S and of T.
        weights: of each segment.
        ids: per segment int (B, n) for n images of the result; beyond the last stands for zeros.
        other: (B * T, D), or nothing.
    """
    out, start, end = None, 0, 0
    size, group = tokens_per_row(sources), tokens_per_row(results)
    for source, result, weight, i in zip(sources, results, weights, ids):
        out = _move(source, result, weight, i, x, other, out, start, end, size, group, interpret)
        start += source.images * source.length
        end += result.images * result.length
    return out


def _move(source, result, weight, ids, x, other, into, start, end, size, group, interpret):
    """`move_images` of one segment, which starts at rows start of x and end of the result."""
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

    def there(b, ids):
        image = jnp.minimum(ids[b], source.images - 1)
        return jax.lax.div(b, count) * size + start + image * length

    def here(b, ids):
        del ids
        return jax.lax.div(b, count) * group + end + jax.lax.rem(b, count) * length

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

    inputs, in_specs, aliases = [x, *other], [spec(there)] + [spec(here)] * len(other), {}
    if into is not None:
        aliases = {1 + len(inputs): 0}
        inputs.append(into)
        in_specs.append(pl.BlockSpec(memory_space=pl.ANY))
    numbers = (min(source.images, count) + (1 + len(other)) * count) * len(ids) * length * dim
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1, grid=grid, in_specs=in_specs, out_specs=spec(here)
        ),
        out_shape=jax.ShapeDtypeStruct((len(ids) * group, dim), x.dtype),
        input_output_aliases=aliases,
        compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'parallel')),
        interpret=interpret,
        name='move_images',
        metadata=metadata(math.prod(grid), math.prod(grid), numbers * x.dtype.itemsize),
    )(ids.reshape(-1), *inputs)


def rows_fit(shape):
    """Whether the kernels below take (R, M): whole registers."""
    whole = len(shape) == 2 and shape[0] % SUBLANES == 0 and shape[1] % LANES == 0
    return enabled() and whole and shape[1] <= BLOCK // 4 // SUBLANES


def _block_of_rows(rows, columns):
    """Rows of a block of at most BLOCK bytes in float32; half of that, if it divides R."""
    most = min(rows, BLOCK // 4 // columns) // SUBLANES * SUBLANES
    return next((n for n in range(most, most // 2, -SUBLANES) if rows % n == 0), most)


def _add_rows(ref, values, left):
    """Adds the first `left` of (R, M) to the eight rows of ref, whole registers; (8, M) for XLA.

    What a last block reads beyond the end is anything, not a number even. None: no block does.
    """
    if left is not None:
        row = jax.lax.broadcasted_iota(jnp.int32, (len(values), 1), 0)
        values = jnp.where(row < left, values, 0)
    ref[...] += values.reshape(-1, SUBLANES, values.shape[-1]).sum(axis=0)


def _left(rows, block, axis):
    """Rows from the block of this step to the end; None where all blocks are whole."""
    return rows - pl.program_id(axis) * block if rows % block else None


def sum_rows(x, interpret=False):
    """(R, M) -> (8, M) float32, which add up to the sum over R.

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


def layer_norm(x, scale, bias, eps, interpret=False):
    """``(x - mean) / sqrt(var + eps) * scale + bias`` of (R, D) with (1, D) float32 each."""

    def kernel(x_ref, scale_ref, bias_ref, y_ref):
        normal, _ = _normalise(x_ref[...], eps)
        y_ref[...] = (normal * scale_ref[...] + bias_ref[...]).astype(y_ref.dtype)

    return _norm_call(kernel, 'layer_norm', (x,), (scale, bias), 0, interpret)[0]


def layer_norm_gradient(x, grad, *other, scale, eps, interpret=False):
    """Gradients of x (R, D), and (8, D) float32 that add up to those of scale and of bias.

    That of x has `other` (R, D) added to it, if given: what it gets from elsewhere.
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
    """One pass over arrays (R, D) beside vectors (1, D); one result (R, D) and some sums (8, D)."""
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
