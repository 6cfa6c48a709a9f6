# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: asynchronous, atomic, verified, restorable on any number of devices.

With `restore` the only file that knows Orbax; `step_dirs` knows where it writes. One directory per
step holds three items:

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
import time
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from ssl_jax.run import bucket, checksums, errors, launch, patience, restore, step_dirs, storage
from ssl_jax.run.restore import CheckpointError, MismatchError  # noqa: F401

COMMIT = step_dirs.COMMIT

# Tensors are cut into chunks of this size, so a host that reads 1/64 of a tensor that one device
# wrote does not hold all of it.
CHUNK_BYTES = 64 * 2**20
# Devices that hold copies of a tensor share its writing if their parts have this size or more.
# Orbax's default is 0: it cuts every bias on every device, with one program per shape.
SHARED_BYTES = 2**20
# Of a save in the background. Orbax's 10 minutes are no longer than an outage that is waited out.
SAVE_SECONDS = 3600


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
            self._known = self.steps()
        if launch.main_says(step in self._known):
            return False
        items = _items(state)
        sums, bad = checksums.scan(items)
        if bad:
            last = 'none is saved'
            if self._known:
                last = f'the newest finite one is step {self._known[-1]}'
            raise CheckpointError(
                f'The state of step {step} is not saved, as {restore.listed(bad)}; {last}: start '
                f'the same command again to continue from there, and if it comes again, lower '
                f'optim.lr or optim.clip, or use dtype=float32.'
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
            saver, self._saver = self._saver, None
            if saver is not None:
                with contextlib.suppress(Exception):  # `wait` has raised it
                    saver.close()
                self._pool.shutdown()

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
        if not found and storage.is_remote(self.directory):
            bucket.require(self.directory)
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
        items, meta, bad = restore.newest(self.directory, _items(abstract_state), None)
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
        outer = patience.handled()
        try:
            yield
        except Exception as e:
            self._writing = None
            # Not asked again: what does not answer would be waited for once more.
            last = f'step {self._known[-1]} is intact' if self._known else 'there is no earlier one'
            then = 'make room or choose another place and start the same command again'
            if patience.passes(e, outer) and storage.is_remote(self.directory):
                then = 'start the same command again once the bucket answers'
            raise CheckpointError(
                f'The checkpoint of step {step} could not be written to {self.directory}: '
                f'{patience.reason(e, outer)}; {last}; {then}.'
            ) from e


def _make_saver():
    """Orbax's, for the three items."""
    restore.quiet()
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
    handler = ocp.CompositeCheckpointHandler(
        composite_options=ocp.CompositeOptions(async_options=options),
        meta=ocp.JsonCheckpointHandler(),
        **trees,
    )
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
    items, meta, _ = restore.newest(directory, {'model': abstract}, step)
    return items['model'], meta


def read_meta(path: epath.PathLike) -> dict:
    """The meta of the newest checkpoint, no tensor read; `path` as for `restore_model`.

    Raises:
      CheckpointError: there is none, or none whose meta is sound.
    """
    meta = newest_meta(path)
    if meta is None:
        raise CheckpointError(restore.EMPTY.format(path))
    return meta


def newest_meta(path: epath.PathLike) -> dict | None:
    """The meta of the newest checkpoint whose meta is sound, None if there is none."""
    directory, step = _locate(path)
    for s in reversed(steps(directory)) if step is None else [step]:
        step_path = directory / str(s)
        try:
            return restore.patiently(step_path, lambda p=step_path: restore.meta_of(p))
        except errors.UserError:
            raise
        except Exception:  # damaged; the restore names it
            continue
    return None


def _items(state):
    """The state as two items: for evaluation, and for training only."""
    return {
        'model': {'params': state.params, 'extra': state.extra},
        'opt': {'opt_state': state.opt_state, 'step': state.step, 'skipped': state.skipped},
    }
