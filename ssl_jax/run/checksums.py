# SPDX-License-Identifier: Apache-2.0
"""A checksum per tensor that is the same on any devices, to tell restored numbers from garbage."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

# XLA on CPU starts at most 32 programs per device before the first has ended. One more waits in a
# thread that another device may need for its part of a collective that all wait for: on sharded
# tensors of several processes that is a deadlock. So no more than these are started without
# waiting for their results.
IN_FLIGHT = 16


def of(tree):
    """A number per tensor that changes with any bit, and with no sharding.

    With u_i the i-th element's bits as an unsigned integer, mixed by an invertible function, it is
    ``Σ_i u_i · (2654435761 · i | 1) mod 2³²``: an odd weight lets every bit of one element count,
    and addition modulo 2³² does not depend on the order in which devices add.

    Args:
      tree: arrays, of jax (then computed where they are) or of numpy.

    Returns:
      dict name -> int, names as in ``params/blocks/norm1/scale``.
    """
    leaves, sums = iter(named(tree).items()), {}
    while some := dict(itertools.islice(leaves, IN_FLIGHT)):
        is_device = {k: isinstance(x, jax.Array) for k, x in some.items()}
        now = {k: (_device_checksum if is_device[k] else _host_checksum)(some[k]) for k in some}
        jax.block_until_ready(now)  # only now, so that the devices work on all of these at once
        sums |= {k: int(v.addressable_data(0) if is_device[k] else v) for k, v in now.items()}
    return sums


@jax.jit
def _device_checksum(x):
    """One small program per shape: a program for the whole tree would compile much longer."""
    return _checksum(x, jnp)


def _host_checksum(x):
    """By blocks of rows, so that no copy of a large tensor is made."""
    x = x[None] if x.ndim == 0 else x
    row = max(x[:1].size, 1)
    rows = max(2**22 // row, 1)
    starts = range(0, len(x), rows)
    return sum(int(_checksum(x[i : i + rows], np, i * row)) for i in starts) % 2**32


def _checksum(x, xp, start=0):
    """The checksum of an array whose first element has the index `start`, uint32."""
    if x.dtype == bool:
        x = x.astype(np.uint8)
    size = x.dtype.itemsize
    bits = np.dtype(f'uint{8 * min(size, 4)}')
    if xp is np:
        x = np.ascontiguousarray(x).reshape(x.shape + (1,)).view(bits)
    else:
        x = jax.lax.bitcast_convert_type(x, bits)
        x = x if size == 8 else x[..., None]
    words = 2 if size == 8 else 1
    index = xp.full((1,) * x.ndim, start * words % 2**32, np.uint32)
    stride = 1
    for axis in reversed(range(x.ndim)):  # along each axis, so that no sharded array is reshaped
        shape = [x.shape[axis] if a == axis else 1 for a in range(x.ndim)]
        along = xp.arange(x.shape[axis], dtype=np.uint32).reshape(shape)
        index = index + along * np.uint32(stride % 2**32)
        stride *= x.shape[axis]
    weight = index * np.uint32(2654435761) | np.uint32(1)
    x = x.astype(np.uint32)
    x = (x ^ x >> np.uint32(16)) * np.uint32(0x85EBCA6B)  # the low bits of most floats are zero
    return xp.sum((x ^ x >> np.uint32(13)) * weight, dtype=np.uint32)


def named(tree):
    """dict name -> leaf; attribute, dict and sequence keys look alike, as Orbax stores them."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in flat}
