# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: asynchronous, atomic, verified, restorable on any number of devices.

The only file that knows Orbax; `step_dirs` knows where it writes. One directory per step holds
three items:

- ``model``: ``dict(params, extra)``, all that evaluation and export read;
- ``opt``: ``dict(opt_state, step, skipped)``, read by training only;
- ``meta``: JSON with the config, versions, PRNG settings, mesh and a checksum of every tensor.

A step counts once its ``commit_success.txt`` exists; that file is written last. Orbax notices
truncated and missing files but loads flipped bits as numbers (its chunks carry no checksum), so
checksums are computed on the device before a save and compared after a restore. A checkpoint that
fails any of this is named, and the one before it is used. One that cannot be read, as the disk or
the bucket does not answer or refuses, is none of these: it ends the run, or newer steps would be
lost (see `patience`).
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import math
import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from ssl_jax.run import bucket, checksums, errors, launch, patience, step_dirs, storage

COMMIT = step_dirs.COMMIT
EMPTY = '{} holds no checkpoint; give the workdir of a run that has saved one.'

# Tensors are cut into chunks of this size, so a host that reads 1/64 of a tensor that one device
# wrote does not hold all of it.
CHUNK_BYTES = 64 * 2**20
# Devices that hold copies of a tensor share its writing if their parts have this size or more.
# Orbax's default is 0: it cuts every bias on every device, with one program per shape.
SHARED_BYTES = 2**20
# A restore keeps no more than this in flight on the host.
READ_GB = 16
# Of a save in the background. Orbax's 10 minutes are no longer than an outage that is waited out.
SAVE_SECONDS = 3600
# TensorStore sends a request anew after so many seconds without data; else a server that stalls
# stalls the run. It tries 32 times, at most 32 s apart, so it waits out 15 minutes of errors.
os.environ.setdefault('TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS', '60')
os.environ.setdefault('TENSORSTORE_CURL_CONNECT_TIMEOUT_SECONDS', '30')


class CheckpointError(errors.UserError):
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
      keep: number of newest checkpoints that stay.
      keep_every: steps divisible by this stay for ever.
    """

    def __init__(self, directory: epath.PathLike, *, keep: int = 2, keep_every: int | None = None):
        if keep < 1:
            raise errors.UserError(
                f'checkpoint.keep is {keep}; set it to 1 or more, so that a checkpoint remains.'
            )
        self.directory = _absolute(directory)
        self._keep, self._keep_every = keep, keep_every
        self._bad = set()  # steps found damaged, set aside at the next save
        self._saver = None  # Orbax's; only a run that saves has one
        self._known = []  # committed steps, since the first save: no other run changes them
        self._pool = None  # the thread that finishes saves
        self._writing = None  # (the step that is being saved, its future)

    def save(self, step: int, state: Any, meta: dict | None = None) -> bool:
        """Starts to save `state` as `step`; returns once it is safe to donate `state`.

        Waits for the previous save first, and raises its error if it failed.

        Args:
          step: the number of finished steps, names the directory.
          state: the train state.
          meta: JSON-like dict, stored with the versions, PRNG settings and mesh added.

        Returns:
          False if this step is already saved, otherwise True.

        Raises:
          CheckpointError: naming the path and the errno, or the tensors that have NaN or inf: what
            cannot be trained on is not kept, as it would push out what can.
        """
        self.wait()
        if self._saver is None:
            self._known = self.steps() if launch.is_main() else []
        if launch.main_says(step in self._known):
            return False
        items = _items(state)
        sums, bad = checksums.scan(items)
        if bad:
            last = 'none is saved'
            if self._known:
                last = f'the newest finite one is step {self._known[-1]}'
            raise CheckpointError(
                f'The state of step {step} is not saved, as {_listed(bad)}; {last}: start the same '
                f'command again to continue from there, and if it comes again, lower optim.lr or '
                f'optim.clip, or use dtype=float32.'
            )
        meta = checksums.seal({**(meta or {}), 'step': step, **checksums.manifest(items, sums)})
        chunks = ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)
        args = {
            k: ocp.args.PyTreeSave(v, save_args=jax.tree.map(lambda _: chunks, v))
            for k, v in items.items()
        }
        args = ocp.args.Composite(meta=ocp.args.JsonSave(meta), **args)
        with self._named_errors(step):
            self._make_room(step)
            if self._saver is None:
                self._saver = _make_saver()
                self._pool = concurrent.futures.ThreadPoolExecutor(1, 'checkpoint')
            self._saver.save(self.directory / str(step), args=args)
        self._writing = step, self._pool.submit(self._finish, step)
        return True

    def check(self) -> None:
        """Raises CheckpointError if the save in the background has failed; costs nothing."""
        if self._writing is not None and self._writing[1].done():
            self.wait()

    def wait(self) -> None:
        """Blocks until the last save is on disk and checkpoints before it are deleted."""
        if self._writing is not None:
            step, finished = self._writing
            with self._named_errors(step):
                finished.result()
            self._writing = None

    def close(self) -> None:
        """Waits for the last save and stops its threads."""
        try:
            self.wait()
        finally:
            if self._saver is not None:
                self._saver.close()
                self._pool.shutdown()
                self._saver = None

    def steps(self) -> list[int]:
        """Committed steps that are not known to be damaged, ascending."""
        return [s for s in steps(self.directory) if s not in self._bad]

    def latest(self) -> int | None:
        """The newest committed step, or None in a fresh directory.

        Raises:
          CheckpointError: if there are step directories and none is committed: a run must not start
            from step 0 beside them. (Not for a remote directory: an interrupted first save leaves
            this there.)
        """
        found = step_dirs.scan(self.directory)
        committed = [s for s in found if found[s] and s not in self._bad]
        broken = [s for s in found if not found[s]]
        if broken and not committed and not storage.is_remote(self.directory):
            raise CheckpointError(
                f'{self.directory} holds step {broken[-1]} but no complete checkpoint '
                f'({COMMIT} is missing); copy it again, or move it away to start from step 0.'
            )
        return committed[-1] if committed else None

    def restore(self, abstract_state: Any) -> tuple[Any, dict]:
        """Restores the newest sound train state onto the shardings of `abstract_state`.

        Args:
          abstract_state: the state with `jax.ShapeDtypeStruct` leaves that carry a sharding; the
            mesh and the number of devices need not be those of the save.

        Returns:
          (state, meta); all leaves can be donated.

        Raises:
          MismatchError: listing the tensors that differ.
          CheckpointError: if nothing can be read, or the PRNG settings differ.
        """
        self.wait()
        items, meta, bad = _restore(self.directory, _items(abstract_state), None)
        if meta['prng'] != checksums.prng():
            raise CheckpointError(
                f'{self.directory} was trained with the PRNG settings {meta["prng"]} and this '
                f'process has {checksums.prng()}; set jax_default_prng_impl and '
                f'jax_threefry_partitionable as they were, so that the random numbers go on as '
                f'they began.'
            )
        self._bad.update(bad)
        self._known = [s for s in self._known if s not in self._bad]
        return dataclasses.replace(abstract_state, **items['model'], **items['opt']), meta

    def _make_room(self, step):
        """Clears the place of `step`: what is damaged is renamed, what was never saved goes."""
        if launch.is_main():
            if self._saver is None:
                self.directory.mkdir(parents=True, exist_ok=True)
                step_dirs.sweep(self.directory)
            for path in (self.directory / str(s) for s in {*self._bad, step}):
                inside = step_dirs.names(path)
                if storage.is_remote(path) and inside and COMMIT not in inside:
                    step_dirs.delete(path)
                elif inside:
                    step_dirs.set_aside(path)
        self._bad = set()
        launch.main_says(True)  # the others look at the directory after this

    def _finish(self, step):
        """Waits for the save of `step`, then deletes old ones: process 0."""
        self._saver.wait_until_finished()
        self._known = sorted({*self._known, step})
        kept = set(self._known[-self._keep :])
        for old in self._known if launch.is_main() else ():
            if old not in kept and not (self._keep_every and old % self._keep_every == 0):
                try:
                    step_dirs.delete(self.directory / str(old))
                except (OSError, errors.UserError) as e:  # costs space only; the next save tries
                    launch.say(f'{self.directory / str(old)} is not deleted: {e}')
                else:
                    self._known = [s for s in self._known if s != old]

    @contextlib.contextmanager
    def _named_errors(self, step):
        """Makes a CheckpointError of an error while `step` is saved."""
        try:
            yield
        except Exception as e:
            self._writing = None
            # Not asked again: what does not answer would be waited for once more.
            last = f'step {self._known[-1]} is intact' if self._known else 'there is no earlier one'
            then = 'make room or choose another place and start the same command again'
            if patience.passes(e) and storage.is_remote(self.directory):
                then = 'start the same command again once the bucket answers'
            raise CheckpointError(
                f'The checkpoint of step {step} could not be written to {self.directory}: '
                f'{patience.reason(e)}; {last}; {then}.'
            ) from e


def _make_saver():
    """Orbax's, for the three items."""
    types = ocp.type_handlers
    registry = types.create_type_handler_registry(
        (np.number, types.ScalarHandler()),
        (np.ndarray, types.NumpyHandler()),
        (jax.Array, types.ArrayHandler(min_slice_bytes_for_replica_parallel=SHARED_BYTES)),
    )
    trees = {
        name: ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
        for name in ('model', 'opt')
    }
    # An error of a folder made in the background is noticed only after minutes.
    options = ocp.options.AsyncOptions(
        timeout_secs=SAVE_SECONDS, create_directories_asynchronously=False
    )
    handler = ocp.CompositeCheckpointHandler(meta=ocp.JsonCheckpointHandler(), **trees)
    return ocp.AsyncCheckpointer(handler, async_options=options)


class Due:
    """Whether a save is due, agreed by all processes.

    Args:
      every_steps: at any step.
      every_minutes: at logged steps, where hosts can agree cheaply.
    """

    def __init__(self, every_steps: int | None, every_minutes: float | None):
        self.every_steps, self.every_minutes = every_steps, every_minutes
        self.reset()

    def due(self, step: int, at_log: bool) -> bool:
        if self.every_steps and step % self.every_steps == 0:
            return True
        if not self.every_minutes or not at_log:
            return False
        return launch.main_says(time.monotonic() - self.last > 60 * self.every_minutes)

    def reset(self) -> None:
        self.last = time.monotonic()


def steps(directory: epath.PathLike) -> list[int]:
    """The committed steps below `directory`, ascending."""
    return [step for step, committed in step_dirs.scan(directory).items() if committed]


def uncommitted(directory: epath.PathLike) -> list[int]:
    """The steps below `directory` that were not finished, or copied in part."""
    return [step for step, committed in step_dirs.scan(directory).items() if not committed]


def _absolute(path):
    """The path for Orbax, which writes to disks and to gs:// alone."""
    if storage.is_remote(path) and bucket.scheme(path) != 'gs':
        raise errors.UserError(
            f'{path}: checkpoints are on disks and on gs:// only; give a path there.'
        )
    return storage.absolute(path)


def _locate(path, step=None):
    """(parent of the steps, step); `path` as for `restore_model`."""
    path = _absolute(path)
    inside = step_dirs.names(path)
    if 'model' in inside:
        return path.parent, int(path.name)
    return (path / 'checkpoints' if 'checkpoints' in inside else path), step


def step_dir(path: epath.PathLike, step: int) -> epath.Path:
    """The directory of one step; `path` as for `restore_model`."""
    directory, step = _locate(path, step)
    return directory / str(step)


def restore_model(
    path: epath.PathLike, abstract: dict | None = None, step: int | None = None
) -> tuple[dict, dict]:
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
    directory, step = _locate(path, step)
    items, meta, _ = _restore(directory, {'model': abstract}, step)
    return items['model'], meta


def read_meta(path: epath.PathLike) -> dict:
    """The meta of the newest checkpoint, no tensor read; `path` as for `restore_model`.

    Raises:
      CheckpointError: there is none, or none whose meta is sound.
    """
    meta = newest_meta(path)
    if meta is None:
        raise CheckpointError(EMPTY.format(path))
    return meta


def newest_meta(path: epath.PathLike) -> dict | None:
    """The meta of the newest checkpoint whose meta is sound, None if there is none."""
    directory, step = _locate(path)
    for s in reversed(steps(directory)) if step is None else [step]:
        step_path = directory / str(s)
        try:
            return _patiently(step_path, lambda p=step_path: _meta(p))
        except errors.UserError:
            raise
        except Exception:  # damaged; the restore names it
            continue
    return None


def _meta(path):
    """The meta of one step; an error if it is damaged."""
    meta = json.loads(storage.read(path / 'meta' / 'metadata'))
    if checksums.seal(meta) != meta:
        raise ValueError('meta differs from its checksum')
    return meta


def _patiently(path, call):
    """`call`, which reads the step at `path`, while the storage does not answer."""
    then = (
        'nothing was changed, and nothing says that it is damaged: start the same command again '
        'once it can be read, or move it away to use the one before'
    )
    return patience.patiently(f'The checkpoint {path}', call, then)


def _items(state):
    """The state as two items: for evaluation, and for training only."""
    return {
        'model': {'params': state.params, 'extra': state.extra},
        'opt': {'opt_state': state.opt_state, 'step': state.step, 'skipped': state.skipped},
    }


def _restore(directory, items, step):
    """The newest sound checkpoint of `items`: (values, meta, [damaged steps])."""
    found, reasons = step_dirs.scan(directory), {}
    committed = [s for s in found if found[s]]
    if step is not None and step not in committed:
        raise CheckpointError(
            f'{directory} has no complete checkpoint of step {step}; it has {committed or "none"}.'
        )
    for s in found:
        if step is None and not found[s] and s > max(committed, default=0):
            launch.log(f'Checkpoint {directory / str(s)} is ignored: {COMMIT} is missing.')
    for s in reversed(committed) if step is None else [step]:
        values, meta, reason = _read(directory / str(s), items)
        if not launch.any_says(reason is not None):
            for k in (k for k in items if items[k] is not None):
                values[k] = jax.tree.map(_place, values[k], items[k])
            sums, bad = checksums.scan(values)
            wrong = [k for k in sums if meta['tensors'].get(k, {}).get('sum') != sums[k]]
            if not wrong and not bad:
                return values, meta, list(reasons)
            reason = _listed(bad)
            if wrong:
                reason = f'{len(wrong)} tensors differ from their checksums, first {wrong[0]}'
        values = None  # frees the memory for the next
        reasons[s] = reason or 'another process could not read its part'
        if launch.is_main() or reason:
            launch.show(f'Checkpoint {directory / str(s)} is damaged: {reasons[s]}.')
    if not reasons:
        raise CheckpointError(EMPTY.format(directory))
    listed = '; '.join(f'step {s}: {r}' for s, r in reasons.items())
    raise CheckpointError(
        f'{directory} holds no checkpoint that can be read ({listed}); restore a copy, or move '
        f'it away to start from step 0.'
    )


def _listed(bad):
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
    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=READ_GB)

    def read():
        meta = _meta(path)
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
        return values, meta

    try:
        return *_patiently(path, read), None
    except (errors.UserError, MemoryError):
        raise
    except Exception as e:
        if 'Out of memory' in str(e):  # of a device: nothing is wrong with the checkpoint
            raise
        return None, None, patience.reason(e)


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
