# SPDX-License-Identifier: Apache-2.0
"""Checksums of tensors, and the manifest of a checkpoint: its tensors, versions and settings.

A checksum is the same on any devices, so it shows whether restored numbers are those saved.
"""

import importlib.metadata
import itertools
import json
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.run import trees

# XLA on CPU starts at most 32 programs per device before the first has ended. One more waits in a
# thread that another device may need for its part of a collective: on sharded tensors of several
# processes that is a deadlock. So no more than these are started without waiting for results.
IN_FLIGHT = 16
SHOWN = 20  # tensors listed in a sentence


def of(tree: Any) -> dict[str, int]:
    """A number per tensor that changes with any bit, and with no sharding.

    With u_i the i-th element's bits as an unsigned integer, mixed by an invertible function, it is
    ``Σ_i u_i · (2654435761 · i | 1) mod 2³²``: an odd weight lets every bit of one element count,
    and addition modulo 2³² does not depend on the order in which devices add.

    Args:
      tree: arrays, of jax (then computed where they are) or of numpy.

    Returns:
      dict name -> int, names as in ``params/blocks/norm1/scale``.
    """
    return scan(tree)[0]


def scan(tree: Any) -> tuple[dict[str, int], dict[str, int]]:
    """The checksums of `of`, and the number of NaN and inf in the tensors that have some."""
    leaves, sums, bad = iter(trees.named(tree).items()), {}, {}
    while some := dict(itertools.islice(leaves, IN_FLIGHT)):
        now = {
            k: _on_device(x) if isinstance(x, jax.Array) else _on_host(x) for k, x in some.items()
        }
        jax.block_until_ready(now)  # only now, so that the devices work on all of these at once
        for name, pair in now.items():
            pair = [x.addressable_data(0) if isinstance(x, jax.Array) else x for x in pair]
            sums[name], bad[name] = map(int, pair)
    return sums, {name: count for name, count in bad.items() if count}


@jax.jit
def _on_device(x):
    """One small program per shape: a program for the whole tree would compile much longer."""
    return _checksum(x, jnp), _count_not_finite(x, jnp)


def _on_host(x):
    return _host_checksum(x), _count_not_finite(x, np)


def _count_not_finite(x, xp):
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return xp.int32(0)
    return xp.sum(~xp.isfinite(x), dtype=xp.int32)


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


def manifest(items: dict, sums: dict[str, int]) -> dict:
    """Tensors with type and checksum, versions, PRNG settings, mesh, devices, processes."""
    tensors = trees.named(items)
    packages = ('ssl_jax', 'jax', 'flax', 'optax', 'orbax-checkpoint')
    versions = {name: importlib.metadata.version(name) for name in packages}
    shardings = [getattr(x, 'sharding', None) for x in tensors.values()]  # numpy has none
    meshes = [s.mesh for s in shardings if isinstance(s, jax.sharding.NamedSharding)]
    return {
        'tensors': {k: {'type': _spell(tensors[k]), 'sum': sums[k]} for k in tensors},
        'versions': versions,
        'prng': prng(),
        'mesh': dict(meshes[0].shape) if meshes else {},
        'devices': jax.device_count(),
        'device': jax.devices()[0].device_kind,
        'processes': jax.process_count(),
    }


def prng() -> dict:
    """The settings that the stream of random numbers depends on."""
    return {
        'impl': str(jax.config.jax_default_prng_impl),
        'threefry_partitionable': bool(jax.config.jax_threefry_partitionable),
    }


def seal(meta: dict) -> dict:
    """`meta` as JSON gives it back, with a checksum of its own; sealing twice changes nothing."""
    meta = json.loads(json.dumps({k: v for k, v in meta.items() if k != 'crc'}, default=str))
    return {**meta, 'crc': zlib.crc32(json.dumps(meta, sort_keys=True).encode())}


def difference(abstract: dict, tensors: dict) -> str:
    """Names, types and shapes that differ, as part of a sentence; '' if none do.

    Args:
      abstract: dict item -> tree of the tensors asked for.
      tensors: 'tensors' of `manifest`; items that `abstract` lacks are left out.
    """
    want = {k: _spell(v) for k, v in trees.named(abstract).items()}
    have = {k: v['type'] for k, v in tensors.items() if k.split('/')[0] in abstract}
    wrong = [k for k in {**want, **have} if want.get(k) != have.get(k)]
    if not wrong:
        return ''
    pairs = [(k, want.get(k, 'nothing'), have.get(k, 'nothing')) for k in wrong[:SHOWN]]
    listed = ', '.join(f'{k} (expected {x}, found {y})' for k, x, y in pairs)
    more = f' and {len(wrong) - SHOWN} more' if len(wrong) > SHOWN else ''
    return f'{len(wrong)} tensors differ: {listed}{more}'


def _spell(x):
    return f'{np.dtype(x.dtype).name}{list(x.shape)}'
