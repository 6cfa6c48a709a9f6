# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint says about itself: its tensors, the versions and settings that made it."""

import importlib.metadata
import json
import zlib

import jax
import numpy as np

from ssl_jax import version
from ssl_jax.run import checksums

SHOWN = 20  # tensors listed in a sentence


def describe(items):
    """Tensors with type and checksum, versions, PRNG settings, mesh, devices and processes."""
    sums, tensors = checksums.of(items), checksums.named(items)
    packages = ('jax', 'flax', 'optax', 'orbax-checkpoint')
    shardings = (getattr(x, 'sharding', None) for x in tensors.values())  # numpy has none
    meshes = (getattr(s, 'mesh', None) for s in shardings)
    mesh = next((m for m in meshes if m is not None), None)
    return {
        'tensors': {k: {'type': _spell(tensors[k]), 'sum': sums[k]} for k in tensors},
        'versions': {
            'ssl_jax': version.__version__,
            **{k: importlib.metadata.version(k) for k in packages},
        },
        'prng': prng(),
        'mesh': {} if mesh is None else dict(mesh.shape),
        'devices': jax.device_count(),
        'processes': jax.process_count(),
    }


def prng():
    """The settings that the stream of random numbers depends on."""
    return {
        'impl': str(jax.config.jax_default_prng_impl),
        'threefry_partitionable': bool(jax.config.jax_threefry_partitionable),
    }


def seal(meta):
    """`meta` as JSON gives it back, with a checksum of its own; sealing twice changes nothing."""
    meta = json.loads(json.dumps({k: v for k, v in meta.items() if k != 'crc'}, default=str))
    return {**meta, 'crc': zlib.crc32(json.dumps(meta, sort_keys=True).encode())}


def difference(abstract, tensors):
    """Names, types and shapes that differ, as part of a sentence; '' if none do.

    Args:
      abstract: dict item -> tree of what is asked for.
      tensors: the 'tensors' of `describe`; other items than those of `abstract` are left out.
    """
    want = {k: _spell(v) for k, v in checksums.named(abstract).items()}
    have = {k: v['type'] for k, v in tensors.items() if k.split('/')[0] in abstract}
    wrong = [k for k in {**want, **have} if want.get(k) != have.get(k)]
    if not wrong:
        return ''
    listed = ', '.join(
        f'{k} (expected {want.get(k, "nothing")}, found {have.get(k, "nothing")})'
        for k in wrong[:SHOWN]
    )
    more = f' and {len(wrong) - SHOWN} more' if len(wrong) > SHOWN else ''
    return f'{len(wrong)} tensors differ: {listed}{more}'


def _spell(x):
    return f'{np.dtype(x.dtype).name}{list(x.shape)}'
