# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: asynchronous, atomic, verified, restorable on any number of devices.

The only file that knows Orbax. One directory per step holds three items:

- ``model``: ``dict(params, extra)``, all that evaluation and export read;
- ``opt``: ``dict(opt_state, step, skipped)``, read by training only;
- ``meta``: JSON with the config, versions, PRNG settings, mesh and a checksum of every tensor.

A step counts once its ``commit_success.txt`` exists; that file is written last. Orbax notices
truncated and missing files but loads flipped bits as numbers (its chunks carry no checksum), so
checksums are computed on the device before a save and compared after a restore. A checkpoint that
fails any of this is named, and the one before it is used.
"""

import contextlib
import dataclasses
import errno
import functools
import json
import math
import os
import re
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from ssl_jax.run import checksums, errors, launch, storage

COMMIT = 'commit_success.txt'
BIN = 'deleting'  # Orbax moves old checkpoints there first
EMPTY = '{} holds no checkpoint; give the workdir of a run that has saved one.'

# Tensors are cut into chunks of this size, so a host that reads 1/64 of a tensor that one device
# wrote does not hold all of it.
CHUNK_BYTES = 64 * 2**20
# Devices that hold copies of a tensor share its writing if their parts have this size or more.
# Orbax's default is 0: it cuts every bias on every device, with one program per shape.
SHARED_BYTES = 2**20
# A restore keeps no more than this in flight on the host.
READ_GB = 16


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
        self.directory = storage.absolute(directory)
        self._keep, self._keep_every = keep, keep_every
        self._bad = set()  # steps found damaged, set aside at the next save
        self._writing = None  # the step that is being saved
        self._deleting = None  # the thread that deletes old checkpoints
        self._manager = None  # Orbax's; only a run that saves has one

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
        if launch.main_says(step in self.steps()):
            return False
        items = _items(state)
        sums, bad = checksums.scan(items)
        if bad:
            committed = self.steps()
            last = (
                f'the newest finite one is step {committed[-1]}' if committed else 'none is saved'
            )
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
        with self._named_errors(step):
            self._set_aside({*self._bad, step})
            self._bad = set()
            if self._manager is None:
                self._manager = self._make_manager()
            args = ocp.args.Composite(meta=ocp.args.JsonSave(meta), **args)
            self._manager.save(step, args=args, force=True)
        self._writing = step
        return True

    def check(self) -> None:
        """Raises CheckpointError if the save in the background has failed; costs nothing."""
        # Not `check_for_errors`: Orbax's thread would miss the error, and delete the old steps.
        if self._writing is not None and not self._manager.is_saving_in_progress():
            with self._named_errors(self._writing):
                self._manager.wait_until_finished()

    def wait(self) -> None:
        """Blocks until the last save is on disk and checkpoints before it are deleted."""
        if self._deleting is not None:
            self._deleting.join()
            self._deleting = None
        if self._writing is not None:
            with self._named_errors(self._writing):
                self._manager.wait_until_finished()
            self._writing = None
            # Large folders take time to delete, so training goes on meanwhile.
            self._deleting = threading.Thread(target=self._empty_bin, daemon=True)
            self._deleting.start()

    def close(self) -> None:
        """Waits for the last save and stops Orbax's threads."""
        try:
            self.wait()
            self.wait()  # for the deletion that the first started
        finally:
            if self._manager is not None:
                self._manager.close()
                self._manager = None

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
        committed, broken = self.steps(), uncommitted(self.directory)
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
        return dataclasses.replace(abstract_state, **items['model'], **items['opt']), meta

    def _make_manager(self):
        """Orbax's manager of this directory: temporary folders, commits, retention."""
        remote = storage.is_remote(self.directory)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep,
            keep_period=self._keep_every,
            cleanup_tmp_directories=True,  # of killed saves
            # Renamed first, or a kill could leave half a checkpoint that looks complete.
            todelete_subdir=None if remote else BIN,
            # An error of a folder made in the background is noticed only after minutes.
            async_options=ocp.options.AsyncOptions(create_directories_asynchronously=False),
            save_root_metadata=False,
        )
        types = ocp.type_handlers
        registry = types.create_type_handler_registry(
            (np.number, types.ScalarHandler()),
            (np.ndarray, types.NumpyHandler()),
            (jax.Array, types.ArrayHandler(min_slice_bytes_for_replica_parallel=SHARED_BYTES)),
        )
        handlers = {
            name: ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
            for name in ('model', 'opt')
        }
        handlers['meta'] = ocp.JsonCheckpointHandler()
        self._empty_bin()
        return ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)

    def _set_aside(self, steps):
        """Renames damaged or uncommitted checkpoints to ``<step>.damaged``; deletes remote ones."""
        paths = [p for p in (self.directory / str(s) for s in steps) if p.exists()]
        for path in paths if launch.is_main() else ():
            if storage.is_remote(path):
                path.rmtree()
            else:
                name = f'{path.name}.damaged'
                count = sum(p.name.startswith(name) for p in self.directory.iterdir())
                name = f'{name}{count or ""}'
                path.rename(self.directory / name)
                launch.log(f'Moved the damaged {path} to {name}.')
        launch.main_says(True)  # the others look at the directory after this
        if self._manager is not None:
            self._manager.reload()

    def _empty_bin(self):
        """Deletes renamed checkpoints, also of a killed run: process 0."""
        if launch.is_main() and self.directory.exists():
            for path in self.directory.iterdir():
                if path.name.startswith(BIN):
                    path.rmtree()

    @contextlib.contextmanager
    def _named_errors(self, step):
        """Makes a CheckpointError of an error while `step` is saved."""
        try:
            yield
        except Exception as e:
            self._writing = None
            committed = self.steps()
            last = f'step {committed[-1]} is intact' if committed else 'there is no earlier one'
            raise CheckpointError(
                f'The checkpoint of step {step} could not be written to {self.directory}: '
                f'{_reason(e)}; {last}; make room or choose another place and start '
                f'the same command again.'
            ) from e


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
    return [s for s in _all_steps(directory) if (epath.Path(directory) / str(s) / COMMIT).exists()]


def uncommitted(directory: epath.PathLike) -> list[int]:
    """The steps below `directory` that were not finished, or copied in part."""
    return sorted({*_all_steps(directory)} - {*steps(directory)})


def _all_steps(directory):
    directory = epath.Path(directory)
    names = (p.name for p in directory.iterdir()) if directory.exists() else ()
    return sorted(int(n) for n in names if n.isdigit())


def _locate(path, step=None):
    """(parent of the steps, step); `path` as for `restore_model`."""
    path = storage.absolute(path)
    if (path / 'model').exists():
        return path.parent, int(path.name)
    return (path / 'checkpoints' if (path / 'checkpoints').exists() else path), step


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
    """The meta of the newest checkpoint, no tensor read; `path` as for `restore_model`."""
    directory, step = _locate(path)
    step = max(steps(directory), default=None) if step is None else step
    if step is None:
        raise CheckpointError(EMPTY.format(path))
    return json.loads((directory / str(step) / 'meta' / 'metadata').read_text())


def _items(state):
    """The state as two items: for evaluation, and for training only."""
    return {
        'model': {'params': state.params, 'extra': state.extra},
        'opt': {'opt_state': state.opt_state, 'step': state.step, 'skipped': state.skipped},
    }


def _restore(directory, items, step):
    """The newest sound checkpoint of `items`: (values, meta, [damaged steps])."""
    committed, reasons = steps(directory), {}
    if step is not None and step not in committed:
        raise CheckpointError(
            f'{directory} has no complete checkpoint of step {step}; it has {committed or "none"}.'
        )
    for s in uncommitted(directory):
        if step is None and s > max(committed, default=0):
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
    try:
        meta = json.loads((path / 'meta' / 'metadata').read_text())
        if checksums.seal(meta) != meta:
            raise ValueError('meta differs from its checksum')
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
    except (MismatchError, MemoryError):
        raise
    except Exception as e:
        if 'Out of memory' in str(e):  # of a device: nothing is wrong with the checkpoint
            raise
        return None, None, _reason(e)
    return values, meta, None


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


def _reason(error):
    """One line for an exception of Orbax or TensorStore, with the errno if there is one."""
    e = deepest = error
    while deepest.__cause__ is not None:
        deepest = deepest.__cause__
    while e is not None:
        found = re.search(r"os_error_code='(\d+)'", str(e))
        code = getattr(e, 'errno', None) or (int(found[1]) if found else None)
        if code:
            where = f' at {e.filename}' if getattr(e, 'filename', None) else ''
            return f'{os.strerror(code)} (errno {code}, {errno.errorcode.get(code, "?")}){where}'
        e = e.__cause__ or e.__context__
    return f'{type(deepest).__name__}: {" ".join(str(deepest).split())[:300]}'
