# SPDX-License-Identifier: Apache-2.0
"""Images that skip a residual branch, among rows of tokens: DINOv2's stochastic depth.

The images that go through a branch are picked, and what it made of them is added back. Each is the
other's gradient, so there is no scatter, which a TPU does slowly. Images of one size lie one after
the other (`Segment`); on TPU kernels move them whole, if they are padded to whole registers.
"""

import functools

import jax
import jax.numpy as jnp

from ssl_jax import sharding
from ssl_jax.kernels import ops
from ssl_jax.kernels.segments import Segment, join, per_row, split
from ssl_jax.kernels.tpu import rows as tpu_rows

TAKEN = 'taken'  # name of the images that go through a branch, see `layers.REMAT`


def residual(branch, x, segments, ids):
    """x + branch on some images only, times n/k for the k of n images that are kept.

    Args:
        branch: function of the rows of the kept images and their segments, to rows of that shape.
        x: (B * T, D) tpu_rows.
        segments: of the T tokens of a row of the batch, see `Segment`.
        ids: per segment int (B, k), the positions of the kept images among the n of their row.

    Returns:
        (B * T, D) array of the dtype of x.

    References:
        dinov2 `layers/block.py: drop_add_residual_stochastic_depth_list`
    """
    kept = tuple(s._replace(images=i.shape[1]) for s, i in zip(segments, ids))
    places = tuple(ids), tuple(_where(i, s.images) for s, i in zip(segments, ids))
    taken, x = _take_and_input(segments, kept, x, places)
    return _add(segments, kept, x, branch(ops.keep(taken, TAKEN), kept), places)


def _where(ids, count):
    """Positions (B, count) of all images among the kept ones; k for those that are not."""
    absent = jnp.full((len(ids), count), ids.shape[1], jnp.int32)
    number = jnp.arange(ids.shape[1], dtype=jnp.int32)
    return jax.vmap(lambda a, i: a.at[i].set(number, unique_indices=True))(absent, ids)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _take_and_input(segments, kept, x, places):
    """(the rows of the kept images, x): the gradients of both then come together in one pass."""
    return _move(segments, kept, places[0], False, x), x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _add(segments, kept, x, y, places):
    """x + n/k y, where y are rows of the kept images."""
    return _move(kept, segments, places[1], True, y, x)


_take_and_input.defvjp(
    lambda segments, kept, x, places: (_take_and_input(segments, kept, x, places), places),
    lambda segments, kept, places, grads: (
        _move(kept, segments, places[1], False, *grads),
        None,
    ),
)
_add.defvjp(
    lambda segments, kept, x, y, places: (_add(segments, kept, x, y, places), places),
    lambda segments, kept, places, grad: (
        grad,
        _move(segments, kept, places[0], True, grad),
        None,
    ),
)


def _move(sources, results, ids, weighted, x, *other):
    """Images of x at ids, per size (B, n), plus `other`: rows of `results`.

    An id beyond the last image stands for zeros. weighted: images count n/k times, n being the
    larger of the numbers in sources and results.
    """
    weights = tuple(
        max(a.images, b.images) / min(a.images, b.images) if weighted else 1.0
        for a, b in zip(sources, results)
    )

    def plain(ids, x, *other):
        x = split(per_row(x, sources), _whole(sources))
        moved = [_gather(p, i, w) for p, i, w in zip(x, ids, weights)]
        moved = join(moved, _whole(results)).reshape(-1, moved[0].shape[-1])
        return other[0] + moved if other else moved

    def kernel(ids, x, *other):
        move = functools.partial(tpu_rows.move_images, sources, results, weights)
        return sharding.per_device(move, 2 + len(other))(ids, x, *other)

    takes = sharding.only_rows(len(ids[0])) and tpu_rows.images_fit(x, sources)
    forms = {'tpu': kernel} if takes else {}
    return ops.lowered(forms, plain, ids, x, *other)


def _whole(segments):
    """The same with the padding as tokens."""
    return tuple(Segment(s.images, s.length) for s in segments)


def _gather(images, ids, weight):
    """Images (B, n, N, D) at ids (B, k), times weight; zeros where an id is beyond the last."""
    last = images.shape[1] - 1
    ids = ids[..., None, None]
    found = jnp.take_along_axis(images, jnp.minimum(ids, last), axis=1)
    return jnp.where(ids <= last, found * jnp.asarray(weight, images.dtype), 0)
