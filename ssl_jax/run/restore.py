# SPDX-License-Identifier: Apache-2.0
"""Reads the newest checkpoint that is sound.

What proves damage lets the checkpoint before it be used: a checksum that differs, a tensor or a
file that is missing or cut off, NaN. What cannot be read now ends the run instead, see `patience`.
"""

import functools
import json
import logging
import math
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from ssl_jax.run import bucket, checksums, errors, launch, patience, step_dirs, storage

EMPTY = '{} holds no checkpoint; give the workdir of a run that has saved one.'
# A restore keeps no more than this in flight on the host.
READ_GB = 16
# After 60 s without data TensorStore sends a request anew; without a limit a server that stalls
# would stall the run. Its default of 32 tries, 1 to 32 s apart, waits out 15 minutes of errors.
os.environ.setdefault('TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS', '60')
os.environ.setdefault('TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS', '30')


class CheckpointError(errors.UserError):
    """A checkpoint could not be written or read; the message is one sentence."""


class MismatchError(CheckpointError):
    """A sound checkpoint holds other tensors than the model asks for."""


def newest(directory, items, step):
    """The newest sound checkpoint of `items`: (values, meta, [damaged steps])."""
    quiet()
    found, reasons = step_dirs.scan(directory), {}
    committed = [s for s in found if found[s]]
    if step is not None and step not in committed:
        raise CheckpointError(
            f'{directory} has no complete checkpoint of step {step}; it has {committed or "none"}.'
        )
    for s in found:
        if step is None and not found[s] and s > max(committed, default=0):
            launch.log(
                f'Checkpoint {directory / str(s)} is ignored: {step_dirs.COMMIT} is missing.'
            )
    for s in reversed(committed) if step is None else [step]:
        values, meta, reason = _read(directory / str(s), items)
        if not launch.any_says(reason is not None):
            for k in (k for k in items if items[k] is not None):
                values[k] = jax.tree.map(_place, values[k], items[k])
            sums, bad = checksums.scan(values)
            wrong = [k for k in sums if meta['tensors'].get(k, {}).get('sum') != sums[k]]
            if not wrong and not bad:
                return values, meta, list(reasons)
            reason = listed(bad)
            if wrong:
                reason = f'{len(wrong)} tensors differ from their checksums, first {wrong[0]}'
        values = None  # frees the memory for the next
        reasons[s] = reason or 'another process could not read its part'
        if launch.is_main() or reason:
            launch.show(f'Checkpoint {directory / str(s)} is damaged: {reasons[s]}.')
    if not reasons:
        if storage.is_remote(directory):
            bucket.require(directory)
        raise CheckpointError(EMPTY.format(directory))
    found = '; '.join(f'step {s}: {r}' for s, r in reasons.items())
    raise CheckpointError(
        f'{directory} holds no checkpoint that can be read ({found}); restore a copy, or move '
        f'it away to start from step 0.'
    )


def listed(bad):
    """Part of a sentence on tensors that are not finite, '' if there are none."""
    if not bad:
        return ''
    name, count = next(iter(bad.items()))
    more = f' (and {len(bad) - 1} other tensors have some)' if len(bad) > 1 else ''
    return f'{name} has NaN or inf in {count:,} numbers{more}'


def _read(path, items):
    """The items of one step: (values, meta, None), or (None, None, why it is damaged).

    No process waits for another, since one alone may fail.
    """
    outer = patience.handled()
    try:
        return *patiently(path, lambda: _read_once(path, items)), None
    except (errors.UserError, MemoryError):
        raise
    except Exception as e:
        if 'Out of memory' in str(e):  # of a device: nothing is wrong with the checkpoint
            raise
        return None, None, patience.reason(e, outer)


def _read_once(path, items):
    """The items of one step: (values, meta)."""
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=READ_GB)
    try:
        meta = meta_of(path)
        known = {k: v for k, v in items.items() if v is not None}
        if difference := checksums.difference(known, meta['tensors']):
            raise MismatchError(
                f'The checkpoint {path} is of another model, {difference}; use the config of that '
                f'run, or start in a new workdir.'
            )
        values = {}
        for name, abstract in items.items():
            if abstract is None:
                tree = handler.metadata(path / name).tree
                args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            else:
                args = jax.tree.map(_restore_args, abstract)
            args = ocp.args.PyTreeRestore(item=abstract, restore_args=args)
            values[name] = handler.restore(path / name, args=args)
    except MismatchError:
        raise
    except Exception:
        step_dirs.probe(path)
        raise
    return values, meta


def _restore_args(x):
    return ocp.ArrayRestoreArgs(sharding=_read_sharding(x), global_shape=x.shape, dtype=x.dtype)


def _read_sharding(x):
    """The sharding to read `x` with: mesh axes over which it is replicated split it further.

    Every device reads its own shard from disk, so a replicated tensor would be read once per
    device; this way it is read once and the devices exchange the rest.
    """
    sharding = x.sharding
    if not isinstance(sharding, jax.sharding.NamedSharding) or x.size * x.dtype.itemsize < 2**16:
        return sharding
    spec = [*sharding.spec, *[None] * (x.ndim - len(sharding.spec))]
    used = {a for axes in spec if axes is not None for a in np.atleast_1d(axes)}
    free = tuple(a for a, n in sharding.mesh.shape.items() if a not in used and n > 1)
    count = math.prod(sharding.mesh.shape[a] for a in free)
    for axis in np.argsort([-n for n in x.shape], kind='stable'):
        if free and spec[axis] is None and x.shape[axis] % count == 0:
            spec[axis] = free
            return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*spec))
    return sharding


def _place(x, abstract):
    """`x` with the sharding of `abstract`, in buffers that can be donated."""
    if not x.sharding.is_equivalent_to(abstract.sharding, x.ndim):
        # One at a time: see checksums.IN_FLIGHT, and two copies of one tensor are enough.
        return jax.block_until_ready(_reshard(abstract.sharding)(x))
    # On CPU a restored array may share memory with numpy, which turns donation into a copy.
    return jnp.copy(x) if next(iter(x.devices())).platform == 'cpu' else x


@functools.cache
def _reshard(sharding):
    return jax.jit(lambda x: x, out_shardings=sharding)


def meta_of(path):
    """The meta of one step; an error if it is damaged."""
    meta = json.loads(storage.read(path / 'meta' / 'metadata'))
    if checksums.seal(meta) != meta:
        raise ValueError('meta differs from its checksum')
    return meta


def patiently(path, call):
    """`call`, which reads the step at `path`, while the storage does not answer."""
    then = (
        'nothing was changed, and nothing says that it is damaged: start the same command again '
        'once it can be read, or move it away to use the one before'
    )
    return patience.patiently(f'The checkpoint {path}', call, then)


@functools.cache
def quiet() -> None:
    """Keeps Orbax and TensorStore from printing an error's traceback up to a dozen times.

    They raise the error as well, and it becomes a sentence. SSL_JAX_TRACEBACK=1 shows all.
    """
    if os.environ.get('SSL_JAX_TRACEBACK'):
        return
    logging.getLogger('absl').addFilter(
        lambda record: record.levelno < logging.ERROR or 'orbax' not in record.pathname
    )
    real = sys.unraisablehook

    def hook(found):  # of reads and writes that end after the one that failed
        if found.object is not None or str(found.exc_value) != 'Event loop is closed':
            real(found)

    sys.unraisablehook = hook
