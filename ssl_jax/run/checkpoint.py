# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: asynchronous, atomic, verified, restorable on any number of devices.

The only file that knows Orbax. One directory per step holds three items:

- ``model``: ``dict(params, extra)``, all that evaluation and export read;
- ``opt``: ``dict(opt_state, step, skipped)``, what only training reads;
- ``meta``: JSON with the config, versions, PRNG settings, mesh and a checksum of every tensor.

A step counts once its ``commit_success.txt`` exists; that file is written last. Orbax notices
truncated and missing files but loads flipped bits as numbers (its chunks carry no checksum), so
ours are computed on the device before a save and compared after a restore. A checkpoint that fails
any of this is named, and the one before it is used.
"""

import dataclasses
import functools
import json
import math
import threading

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from ssl_jax.run import checksums, manifest, step_dirs

# Tensors are cut into chunks of this size, so that a host that reads 1/64 of a tensor that one
# device wrote does not hold all of it.
CHUNK_BYTES = 64 * 2**20
# Devices that hold copies of a tensor share the writing of it from this size of a part on. Orbax's
# default is 0: every bias cut up on every device, each shape by a program of its own.
SHARED_BYTES = 2**20
# A restore keeps no more than this in flight on the host.
READ_GB = 16


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message is one sentence."""


class MismatchError(CheckpointError):
    """A sound checkpoint holds other tensors than the model asks for."""


class Checkpointer:
    """Saves and restores a train state below one directory.

    The state is a dataclass with the fields ``params, extra, opt_state, step, skipped``. Every
    process calls every method, in the same order. Call `close` in a ``finally``: a save still in
    flight when the interpreter shuts down is lost.

    Args:
      directory: parent of the step directories, local or remote (``gs://``), shared by all hosts.
      keep: how many of the newest checkpoints stay.
      keep_every: steps divisible by this stay for ever.
    """

    def __init__(self, directory, *, keep=2, keep_every=None):
        if keep < 1:
            raise ValueError(
                f'checkpoint.keep is {keep}; set it to 1 or more, so that a checkpoint remains.'
            )
        self.directory = step_dirs.absolute(directory)
        self._keep, self._keep_every = keep, keep_every
        self._bad = set()  # steps found damaged, set aside at the next save
        self._writing = None  # the step that is being saved
        self._deleting = None  # the thread that removes old checkpoints
        self._orbax = None

    def save(self, step, state, meta=None):
        """Starts to save `state` as `step`; returns once it is safe to donate `state`.

        Waits for the previous save first, and raises its error if it failed.

        Args:
          step: the number of finished steps, names the directory.
          state: the train state.
          meta: JSON-like dict, stored with the versions, PRNG settings and mesh added.

        Returns:
          False if this step is already saved, otherwise True.

        Raises:
          CheckpointError: naming the path and the errno.
        """
        import orbax.checkpoint as ocp

        self.wait()
        step = int(step)
        if _from_main(step in self.steps()):
            return False
        items = items_of(state)
        meta = manifest.seal({**(meta or {}), 'step': step, **manifest.describe(items)})
        chunks = ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)
        args = {
            k: ocp.args.PyTreeSave(v, save_args=jax.tree.map(lambda _: chunks, v))
            for k, v in items.items()
        }
        try:
            if self._orbax is None:
                step_dirs.remove_leftovers(self.directory)
                # Folders made in the background fail there, and their waiters wait for minutes.
                options = ocp.options.AsyncOptions(create_directories_asynchronously=False)
                handler = ocp.CompositeCheckpointHandler(
                    meta=ocp.JsonCheckpointHandler(), **{k: _writer() for k in items}
                )
                self._orbax = ocp.AsyncCheckpointer(handler, async_options=options)
            step_dirs.set_aside(self.directory, {*self._bad, step})
            self._bad = set()
            self._orbax.save(
                self.directory / str(step),
                args=ocp.args.Composite(meta=ocp.args.JsonSave(meta), **args),
            )
        except Exception as e:
            raise self._write_error(step, e) from e
        self._writing = step
        return True

    def check(self):
        """Raises CheckpointError if the save in the background has failed; costs nothing."""
        if self._writing is not None:
            self._call(self._orbax.check_for_errors)

    def wait(self):
        """Blocks until the last save is on disk and old checkpoints are deleted."""
        if self._writing is not None:
            self._call(self._orbax.wait_until_finished)
            self._writing = None
            self._delete_old()
        if self._deleting is not None:
            self._deleting.join()
            self._deleting = None

    def close(self):
        """Waits for the last save and stops Orbax's threads."""
        try:
            self.wait()
        finally:
            if self._orbax is not None:
                self._orbax.close()
                self._orbax = None

    def steps(self):
        """Committed steps that are not known to be damaged, ascending."""
        return [s for s in step_dirs.steps(self.directory) if s not in self._bad]

    def latest(self):
        """The newest committed step, or None in a fresh directory.

        Raises:
          CheckpointError: if there are step directories and none is committed, because to start
            afresh beside them would be a surprise. (Not for a remote directory, where a first save
            that was interrupted looks like this.)
        """
        found, broken = self.steps(), step_dirs.uncommitted(self.directory)
        if broken and not found and not step_dirs.is_remote(self.directory):
            raise CheckpointError(
                f'{self.directory} holds step {broken[-1]} but no complete checkpoint '
                f'({step_dirs.COMMIT} is missing); copy it again, or move it away to start from '
                f'step 0.'
            )
        return found[-1] if found else None

    def restore(self, abstract_state, step=None):
        """Restores a train state onto the shardings of `abstract_state`.

        Args:
          abstract_state: the state with `jax.ShapeDtypeStruct` leaves that carry a sharding; the
            mesh and the number of devices need not be those of the save.
          step: which checkpoint; None takes the newest that is sound.

        Returns:
          (state, meta); all leaves may be donated.

        Raises:
          MismatchError: listing the tensors that differ.
          CheckpointError: if nothing can be read, or the PRNG settings are others.
        """
        self.wait()
        items, meta, bad = _restore(self.directory, items_of(abstract_state), step)
        if meta['prng'] != manifest.prng():
            raise CheckpointError(
                f'{self.directory} was trained with the PRNG settings {meta["prng"]} and this '
                f'process has {manifest.prng()}; set jax_default_prng_impl and '
                f'jax_threefry_partitionable as they were, so that the random numbers go on as '
                f'they began.'
            )
        self._bad.update(bad)
        return dataclasses.replace(abstract_state, **items['model'], **items['opt']), meta

    def _call(self, orbax):
        try:
            orbax()
        except Exception as e:
            step, self._writing = self._writing, None
            raise self._write_error(step, e) from e

    def _write_error(self, step, error):
        found = self.steps()
        last = f'step {found[-1]} is intact' if found else 'there is no earlier one'
        return CheckpointError(
            f'The checkpoint of step {step} could not be written to {self.directory}: '
            f'{step_dirs.reason(error)}; {last}; make room or choose another place and start '
            f'the same command again.'
        )

    def _delete_old(self):
        """Deletes what `keep` and `keep_every` do not protect: process 0, in a thread."""
        every = self._keep_every
        old = [s for s in self.steps()[: -self._keep] if not every or s % every]
        if old and jax.process_index() == 0:
            paths = [self.directory / str(s) for s in old]
            self._deleting = threading.Thread(target=step_dirs.delete, args=(paths,), daemon=True)
            self._deleting.start()


def restore_model(path, abstract=None, step=None):
    """Reads parameters and extra alone; the optimizer's moments are not opened.

    Args:
      path: a workdir, its ``checkpoints`` directory, or the directory of one step.
      abstract: ``dict(params, extra)`` of `jax.ShapeDtypeStruct` with shardings; None gives numpy
        arrays on the host.
      step: which checkpoint; None takes the newest that is sound.

    Returns:
      (dict(params, extra), meta)

    Raises:
      CheckpointError: if there is none, or none is sound.
      MismatchError: listing the tensors that differ from `abstract`.
    """
    path = step_dirs.absolute(path)
    if (path / 'model').exists():
        path, step = path.parent, int(path.name)
    elif (path / 'checkpoints').exists():
        path = path / 'checkpoints'
    items, meta, _ = _restore(path, {'model': abstract}, step)
    return items['model'], meta


def items_of(state):
    """The state as two items: what evaluation reads, and what only training reads."""
    return {
        'model': {'params': state.params, 'extra': state.extra},
        'opt': {'opt_state': state.opt_state, 'step': state.step, 'skipped': state.skipped},
    }


def _restore(directory, items, step):
    """The newest sound checkpoint of `items`: (values, meta, [damaged steps])."""
    directory, is_main, reasons = epath.Path(directory), jax.process_index() == 0, {}
    found = step_dirs.steps(directory)
    if step is not None and step not in found:
        raise CheckpointError(
            f'{directory} has no complete checkpoint of step {step}; it has {found or "none"}.'
        )
    for s in step_dirs.uncommitted(directory):
        if is_main and step is None and s > max(found, default=0):
            path = directory / str(s)
            print(f'Checkpoint {path} is ignored: {step_dirs.COMMIT} is missing.', flush=True)
    for s in reversed(found) if step is None else [step]:
        values, meta, reason = _read(directory / str(s), items)
        if not _on_any(reason is not None):
            for k in (k for k in items if items[k] is not None):
                values[k] = jax.tree.map(_place, values[k], items[k])
            reason = _verify(values, meta['tensors'])
            if reason is None:
                return values, meta, list(reasons)
        values = None  # frees the memory for the next
        reasons[s] = reason or 'another process could not read its part'
        if is_main or reason:
            print(f'Checkpoint {directory / str(s)} is damaged: {reasons[s]}.', flush=True)
    if reasons:
        listed = '; '.join(f'step {s}: {r}' for s, r in reasons.items())
        raise CheckpointError(
            f'{directory} holds no checkpoint that can be read ({listed}); restore a copy, or move '
            f'it away to start from step 0.'
        )
    raise CheckpointError(
        f'{directory} holds no checkpoint; give the workdir of a run that has saved one.'
    )


def _writer():
    """Orbax's handler that saves one tree, with SHARED_BYTES; `_read` has the standard one."""
    import orbax.checkpoint as ocp

    types = ocp.type_handlers
    registry = types.create_type_handler_registry(
        (np.number, types.ScalarHandler()),
        (np.ndarray, types.NumpyHandler()),
        (jax.Array, types.ArrayHandler(min_slice_bytes_for_replica_parallel=SHARED_BYTES)),
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _read(path, items):
    """The items of one step: (values, meta, None), or (None, None, why it is damaged).

    No process waits for another in here, since one alone may fail.
    """
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=READ_GB)
    try:
        meta = json.loads((path / 'meta' / 'metadata').read_text())
        if manifest.seal(meta) != meta:
            raise ValueError('meta differs from its checksum')
        known = {k: v for k, v in items.items() if v is not None}
        if difference := manifest.difference(known, meta['tensors']):
            raise MismatchError(
                f'The checkpoint {path} is of another model, {difference}; use the config of that '
                f'run, or start in a new workdir.'
            )
        values = {}
        for name, abstract in items.items():
            wanted = handler.metadata(path / name).tree if abstract is None else abstract
            args = jax.tree.map(functools.partial(_restore_args, abstract is None), wanted)
            args = ocp.args.PyTreeRestore(item=abstract, restore_args=args)
            values[name] = handler.restore(path / name, args=args)
    except (MismatchError, MemoryError):
        raise
    except Exception as e:
        if 'Out of memory' in str(e):  # of a device: nothing is wrong with the checkpoint
            raise
        return None, None, step_dirs.reason(e)
    return values, meta, None


def _verify(values, tensors):
    """Why the values are not those that were saved, or None."""
    wrong = [k for k, v in checksums.of(values).items() if tensors.get(k, {}).get('sum') != v]
    return f'{len(wrong)} tensors differ from their checksums, first {wrong[0]}' if wrong else None


def _restore_args(is_host, x):
    import orbax.checkpoint as ocp

    if is_host:
        return ocp.RestoreArgs(restore_type=np.ndarray)
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


def _place(x, wanted):
    """`x` with the sharding that is wanted, in buffers that can be donated."""
    if not x.sharding.is_equivalent_to(wanted.sharding, x.ndim):
        # One at a time: see checksums.IN_FLIGHT, and two copies of one tensor are enough.
        return jax.block_until_ready(_reshard(wanted.sharding)(x))
    # On CPU a restored array may share memory with numpy, which turns donation into a copy.
    return jnp.copy(x) if next(iter(x.devices())).platform == 'cpu' else x


@functools.cache
def _reshard(sharding):
    return jax.jit(lambda x: x, out_shardings=sharding)


def _from_main(flag):
    """Process 0's flag on all processes, which may see a shared directory differently."""
    return flag if jax.process_count() == 1 else bool(multihost_utils.broadcast_one_to_all(flag))


def _on_any(flag):
    """Whether `flag` is true on any process."""
    return flag if jax.process_count() == 1 else multihost_utils.process_allgather(flag).any()
