# SPDX-License-Identifier: Apache-2.0
"""DINOv2's stochastic depth: a residual branch applied to a subset of the images.

The kept images are gathered, and the output of the branch is added back at their positions. Each
of the two is the gradient of the other, so there is no scatter, which is slow on a TPU. Images of
one size are consecutive (`Segment`). On TPU, kernels move whole images if each is padded to full
registers and `kernels.forms` says so.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from ssl_jax import sharding
from ssl_jax.kernels import forms, ops
from ssl_jax.kernels.segments import Segment, join, per_row, split
from ssl_jax.kernels.tpu import rows as tpu_rows

TAKEN = 'taken'  # checkpoint name of the gathered images, see `models.blocks.REMAT`


def residual(
    branch: Callable[[jax.Array, tuple[Segment, ...]], jax.Array],
    x: jax.Array,
    segments: tuple[Segment, ...],
    ids: Sequence[jax.Array],
) -> jax.Array:
    """Adds `branch` of a subset of the images to x, scaled by n/k where k of n images are kept.

    Args:
        branch: (tokens of the kept images, their segments) -> array of the same shape.
        x: (B * T, D) tokens.
        segments: layout of the T tokens of a row.
        ids: per segment int (B, k), positions of the kept images among the n of a row.

    References:
        dinov2 `layers/block.py: drop_add_residual_stochastic_depth_list`
    """
    kept = tuple(s._replace(images=i.shape[1]) for s, i in zip(segments, ids, strict=True))
    places = tuple(ids), tuple(where(i, s.images) for s, i in zip(segments, ids, strict=True))
    taken, x = _take_and_input(segments, kept, x, places)
    return _add(segments, kept, x, branch(ops.keep(taken, TAKEN), kept), places)


def where(ids: jax.Array, count: int) -> jax.Array:
    """Position (B, count) of every image among the k kept images; k if it was dropped."""
    dropped = jnp.full((len(ids), count), ids.shape[1], jnp.int32)
    index = jnp.arange(ids.shape[1], dtype=jnp.int32)
    return jax.vmap(lambda a, i: a.at[i].set(index, unique_indices=True))(dropped, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _take_and_input(segments, kept, x, places):
    """(tokens of the kept images, x), so that one pass sums the gradients of both."""
    return move(segments, kept, places[0], False, x), x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _add(segments, kept, x, y, places):
    """x + n/k y, where y holds the tokens of the kept images."""
    return move(kept, segments, places[1], True, y, x)


_take_and_input.defvjp(
    lambda segments, kept, x, places: (_take_and_input(segments, kept, x, places), places),
    lambda segments, kept, places, grads: (move(kept, segments, places[1], False, *grads), None),
)
_add.defvjp(
    lambda segments, kept, x, y, places: (_add(segments, kept, x, y, places), places),
    lambda segments, kept, places, grad: (grad, move(segments, kept, places[0], True, grad), None),
)


def move(
    src: tuple[Segment, ...],
    dst: tuple[Segment, ...],
    ids: Sequence[jax.Array],
    weighted: bool,
    x: jax.Array,
    *other: jax.Array,
) -> jax.Array:
    """Gathers images of x at ids, per segment (B, n), into the layout `dst`; adds `other`.

    An id beyond the last image yields zeros. If `weighted`, images are scaled by n/k, where n is
    the larger number of images of `src` and `dst` and k the smaller.
    """
    weights = tuple(
        max(a.images, b.images) / min(a.images, b.images) if weighted else 1.0
        for a, b in zip(src, dst, strict=True)
    )

    def plain(ids, x, *other):
        x = split(per_row(x, src), _with_padding(src))
        moved = [_gather(p, i, w) for p, i, w in zip(x, ids, weights, strict=True)]
        moved = join(moved, _with_padding(dst)).reshape(-1, moved[0].shape[-1])
        return other[0] + moved if other else moved

    def kernel(ids, x, *other):
        moved = functools.partial(tpu_rows.move_images, src, dst, weights)
        return sharding.per_device(moved, 2 + len(other))(ids, x, *other)

    def fits():
        return sharding.only_rows(len(ids[0])) and tpu_rows.images_fit(x, src)

    static = src, dst, weighted, bool(other)
    form = forms.pick('move_images', x, static, {'pallas': fits})
    return ops.lowered({'tpu': kernel} if form == 'pallas' else {}, plain, ids, x, *other)


def _with_padding(segments):
    """The segments with padding counted as tokens."""
    return tuple(Segment(s.images, s.length) for s in segments)


def _gather(images, ids, weight):
    """Images (B, n, N, D) at ids (B, k), times weight; zeros where an id is beyond the last."""
    last = images.shape[1] - 1
    ids = ids[..., None, None]
    gathered = jnp.take_along_axis(images, jnp.minimum(ids, last), axis=1)
    return jnp.where(ids <= last, gathered * jnp.asarray(weight, images.dtype), 0)
