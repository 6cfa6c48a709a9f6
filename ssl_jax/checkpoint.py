# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: asynchronous, atomic, verified, restorable on any number of devices.

The only file that knows Orbax. One directory per step holds three items:

- ``model``: ``dict(params, extra)``, all that evaluation and export read;
- ``opt``: ``dict(opt_state, step, skipped)``, what only training reads;
- ``meta``: JSON with the config, versions, PRNG settings, mesh and a checksum of every tensor.

A step counts once its ``commit_success.txt`` exists; that file is written last. Orbax notices
truncated and missing files but loads flipped bytes as numbers (the chunks carry no checksum), so a
32-bit sum of the bits of every tensor is computed on the device before a save and compared after a
restore. A checkpoint that fails any of this is named, and the previous one is used.
"""

import dataclasses
import errno
import functools
import json
import math
import os
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from ssl_jax import version

COMMIT = 'commit_success.txt'
ITEMS = ('model', 'opt')
# Reads are cut to chunks of this size, so that a host reading 1/64 of a tensor that one device
# wrote does not hold all of it.
CHUNK_BYTES = 64 * 2**20


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
            raise ValueError(f'checkpoint.keep is {keep}; it must be at least 1, or the only '
                             'checkpoint would be deleted.')
        self.directory = epath.Path(directory)
        self._keep, self._keep_every = keep, keep_every
        self._bad = set()  # steps found damaged, set aside at the next save
        self._writing = None  # the step that is being saved
        self._deleting = None  # the thread that removes old checkpoints
        self._orbax = None

    def save(self, step, state, meta=None):
        """Starts to save `state` as `step` and returns once it is safe to donate `state`.

        Waits for the previous save first, and raises its error if it failed.

        Args:
          step: the number of finished steps, names the directory.
          state: the train state; its arrays may be donated as soon as this returns.
          meta: JSON-like dict, stored with the versions, PRNG settings and mesh added.

        Returns:
          False if this step is already saved, otherwise True.

        Raises:
          CheckpointError: naming the path and the errno.
        """
        import orbax.checkpoint as ocp

        self.wait()
        step = int(step)
        if not self._agree(step in self._bad or step not in self.steps()):
            return False
        self._set_aside(step)
        items = {k: items_of(state)[k] for k in ITEMS}
        meta = dict(meta or {}, step=step, checksums=checksums(items), **environment(items))
        save_args = ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES)
        args = {
            k: ocp.args.PyTreeSave(v, save_args=jax.tree.map(lambda _: save_args, v))
            for k, v in items.items()
        }
        try:
            if self._orbax is None:
                self._remove_leftovers()
                self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
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
        self._finish(lambda: self._orbax.check_for_errors())

    def wait(self):
        """Blocks until the last save is on disk and old checkpoints are deleted."""
        if self._writing is not None:
            self._finish(lambda: self._orbax.wait_until_finished())
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
        return [s for s in steps(self.directory) if s not in self._bad]

    def latest(self):
        """The newest committed step, or None in a fresh directory.

        Raises:
          CheckpointError: if there are step directories and none is committed, because starting
            afresh beside them would be a surprise. (Not for remote directories, where a first save
            that was interrupted looks like this.)
        """
        found = self.steps()
        if not found and not _is_remote(self.directory):
            broken = _uncommitted(self.directory)
            if broken:
                raise CheckpointError(
                    f'{self.directory} holds step {broken[-1]} but no complete checkpoint '
                    f'({COMMIT} is missing); copy the checkpoint again, or move it away to start '
                    'from step 0.')
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
          CheckpointError: if nothing can be read.
        """
        self.wait()
        items, meta, bad = _restore(self.directory, items_of(abstract_state), step)
        self._bad.update(bad)
        _check_prng(meta, self.directory)
        fields = {**items['model'], **items['opt']}
        return dataclasses.replace(abstract_state, **fields), meta

    def _finish(self, wait):
        if self._orbax is None:
            return
        try:
            wait()
        except Exception as e:
            step, self._writing = self._writing, None
            raise self._write_error(step, e) from e

    def _write_error(self, step, error):
        found = self.steps()
        last = f'step {found[-1]} is intact' if found else 'no earlier checkpoint exists'
        return CheckpointError(
            f'The checkpoint of step {step} could not be written to {self.directory}: '
            f'{_reason(error)}; {last}; free or change the place and start the same command again.')

    def _agree(self, value):
        """Process 0's answer, on all processes: they may see a shared directory differently."""
        if jax.process_count() == 1:
            return value
        return bool(multihost_utils.broadcast_one_to_all(np.int32(value)))

    def _remove_leftovers(self):
        """Deletes what a killed save left; only a run that saves here may, a reader may not."""
        if jax.process_index() == 0 and self.directory.exists():
            for path in self.directory.iterdir():
                if path.name.startswith('deleting-') or '.orbax-checkpoint-tmp' in path.name:
                    path.rmtree()

    def _set_aside(self, step):
        """Gets damaged checkpoints, and an uncommitted one of this step, out of the way."""
        aside, self._bad = self._bad, set()
        if jax.process_index() == 0:
            for s in {*aside, step}:
                path = self.directory / str(s)
                if not path.exists():
                    continue
                if _is_remote(path):
                    path.rmtree()
                else:
                    n = sum(p.name.startswith(f'{s}.damaged') for p in self.directory.iterdir())
                    path.rename(self.directory / f'{s}.damaged{n or ""}')

    def _delete_old(self):
        """Deletes what `keep` and `keep_every` do not protect, in a thread, from process 0."""
        found = self.steps()
        old = [s for s in found[: -self._keep] if not self._keep_every or s % self._keep_every]
        if old and jax.process_index() == 0:
            self._deleting = threading.Thread(target=self._delete, args=(old,), daemon=True)
            self._deleting.start()

    def _delete(self, old):
        for s in old:
            path = self.directory / str(s)
            try:
                if _is_remote(path):
                    (path / COMMIT).unlink()  # half deleted must not look committed
                else:
                    path = path.rename(self.directory / f'deleting-{s}')
                path.rmtree()
            except OSError as e:
                print(f'The old checkpoint {path} could not be deleted: {e}.', flush=True)


def steps(directory):
    """The committed steps below `directory`, ascending."""
    directory = epath.Path(directory)
    if not directory.exists():
        return []
    found = (p for p in directory.iterdir() if p.name.isdigit())
    return sorted(int(p.name) for p in found if (p / COMMIT).exists())


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
    path = epath.Path(path)
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


def environment(items):
    """Versions, PRNG settings, mesh and process count, as JSON."""
    import flax
    import orbax.checkpoint as ocp

    meshes = [x.sharding.mesh.shape for x in jax.tree.leaves(items)
              if isinstance(getattr(x, 'sharding', None), jax.sharding.NamedSharding)]
    return {
        'versions': {'ssl_jax': version.__version__, 'jax': jax.__version__,
                     'flax': flax.__version__, 'orbax': ocp.__version__},
        'prng': _prng(),
        'mesh': dict(meshes[0]) if meshes else {},
        'processes': jax.process_count(),
        'devices': jax.device_count(),
    }


def checksums(tree):
    """A number per tensor that changes with any bit, and with no sharding.

    With u_i the i-th element's bits as an unsigned integer, mixed by an invertible function, it is
    ``Σ_i u_i · (2654435761 · i | 1) mod 2³²``: an odd weight lets every bit of one element count,
    and addition modulo 2³² does not depend on the order in which devices add.

    Args:
      tree: arrays, of jax (then computed where they are) or of numpy.

    Returns:
      dict name -> int, names as in ``params/blocks/norm1/scale``.
    """
    named = _named(tree)
    on_device = {k: v for k, v in named.items() if isinstance(v, jax.Array)}
    sums = {k: int(_checksum(v, np)) for k, v in named.items() if k not in on_device}
    if on_device:
        found = _device_checksums(on_device)
        sums.update({k: int(np.asarray(v.addressable_data(0))) for k, v in found.items()})
    return sums


@jax.jit
def _device_checksums(named):
    return {k: _checksum(v, jnp) for k, v in named.items()}


def _checksum(x, xp):
    """The checksum of one array, uint32, with xp = numpy or jax.numpy."""
    if x.dtype == bool:
        x = x.astype(np.uint8)
    size = x.dtype.itemsize
    bits = np.dtype(f'uint{8 * min(size, 4)}')
    if xp is np:
        x = np.ascontiguousarray(x).reshape(x.shape + (1,)).view(bits)
    else:
        x = jax.lax.bitcast_convert_type(x, bits)
        x = x if size == 8 else x[..., None]
    index, stride = xp.zeros((1,) * x.ndim, np.uint32), 1
    for axis in reversed(range(x.ndim)):  # along each axis, so that no sharded array is reshaped
        shape = [x.shape[axis] if a == axis else 1 for a in range(x.ndim)]
        along = xp.arange(x.shape[axis], dtype=np.uint32).reshape(shape)
        index = index + along * np.uint32(stride % 2**32)
        stride *= x.shape[axis]
    weight = index * np.uint32(2654435761) | np.uint32(1)
    x = x.astype(np.uint32)
    x = (x ^ x >> np.uint32(16)) * np.uint32(0x85EBCA6B)  # the low bits of most floats are zero
    return xp.sum((x ^ x >> np.uint32(13)) * weight, dtype=np.uint32)


def _restore(directory, items, step):
    """Newest sound checkpoint of `items`: (values, meta, [damaged steps])."""
    found = steps(directory)
    if step is not None:
        if step not in found:
            raise CheckpointError(f'{directory} has no complete checkpoint of step {step}; it has '
                                  f'{found or "none"}.')
        found = [step]
    if jax.process_index() == 0 and step is None:
        for s in _uncommitted(directory):
            if not found or s > found[-1]:
                print(f'Checkpoint {directory}/{s} is not complete ({COMMIT} is missing) and is '
                      'ignored.', flush=True)
    reasons = {}
    for s in reversed(found):
        values, meta, reason = _read(epath.Path(directory) / str(s), items)
        if not _anywhere(reason is not None):
            return values, meta, list(reasons)
        reasons[s] = reason or 'another process could not read its part'
        if jax.process_index() == 0 or reason:
            print(f'Checkpoint {directory}/{s} is damaged: {reasons[s]}; trying the one before it.',
                  flush=True)
    listed = '; '.join(f'step {s}: {r}' for s, r in reasons.items())
    raise CheckpointError(
        f'{directory} holds no checkpoint that can be read'
        + (f' ({listed}); move it away to start from step 0.' if reasons else
           '; give a workdir or a checkpoints directory of a run that has saved.'))


def _read(path, items):
    """One step's items: (values, meta, None), or (None, None, why it is damaged)."""
    import orbax.checkpoint as ocp

    handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=16)
    try:
        meta = json.loads((path / 'meta' / 'metadata').read_text())
        trees = {k: handler.metadata(path / k).tree for k in items}
        sums = meta['checksums']
    except Exception as e:
        return None, None, _reason(e)
    for name, abstract in items.items():
        if abstract is not None:
            _compare(path, abstract, trees[name])
    values = {}
    for name, abstract in items.items():
        is_host = abstract is None
        wanted = trees[name] if is_host else abstract
        try:
            values[name] = handler.restore(path / name, args=ocp.args.PyTreeRestore(
                item=wanted if not is_host else None,
                restore_args=jax.tree.map(functools.partial(_restore_args, is_host), wanted)))
        except Exception as e:
            if 'RESOURCE_EXHAUSTED: Out of memory' in str(e) or isinstance(e, MemoryError):
                raise
            return None, None, _reason(e)
        if not is_host:
            values[name] = jax.tree.map(_place, values[name], wanted)
    got = checksums(values)
    wrong = sorted(k for k in got if sums.get(k) != got[k])
    if wrong:
        return None, None, f'{len(wrong)} tensors differ from their checksums, first {wrong[0]}'
    return values, meta, None


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
    spec = list(sharding.spec) + [None] * (x.ndim - len(sharding.spec))
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
        return jax.device_put(x, wanted.sharding)
    # On CPU a restored array may share memory with numpy, which makes donation a copy.
    return jnp.copy(x) if next(iter(x.devices())).platform == 'cpu' else x


def _compare(path, abstract, stored):
    """Raises MismatchError with a list if names, shapes or types differ."""
    want = {k: (tuple(v.shape), np.dtype(v.dtype).name) for k, v in _named(abstract).items()}
    have = {k: (tuple(v.shape), np.dtype(v.dtype).name) for k, v in _named(stored).items()}
    lines = [f'{k} (expected {_spell(want[k])}, found {_spell(have[k])})'
             for k in want if k in have and want[k] != have[k]]
    lines += [f'{k} (expected {_spell(want[k])}, found nothing)' for k in want if k not in have]
    lines += [f'{k} (expected nothing, found {_spell(have[k])})' for k in have if k not in want]
    if lines:
        shown = ', '.join(lines[:20]) + (f' and {len(lines) - 20} more' if len(lines) > 20 else '')
        raise MismatchError(
            f'The checkpoint {path} is of another model: {len(lines)} tensors differ: {shown}; '
            'restore it with the config of its own run, or start in a new workdir.')


def _spell(shape_and_type):
    shape, dtype = shape_and_type
    return f'{dtype}{list(shape)}'


def _named(tree):
    """Leaves by name; attribute, dict and sequence keys look alike, as Orbax stores them."""
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in flat}


def _prng():
    return {'impl': str(jax.config.jax_default_prng_impl),
            'threefry_partitionable': bool(jax.config.jax_threefry_partitionable)}


def _check_prng(meta, directory):
    """The stream of random numbers must go on as it began."""
    if meta['prng'] != _prng():
        raise CheckpointError(
            f'{directory} was trained with the PRNG settings {meta["prng"]} but this process has '
            f'{_prng()}; set jax_default_prng_impl and jax_threefry_partitionable to the former.')


def _anywhere(flag):
    """Whether `flag` is true on any process."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.int32(flag))))


def _uncommitted(directory):
    directory = epath.Path(directory)
    if not directory.exists():
        return []
    found = (p for p in directory.iterdir() if p.name.isdigit())
    return sorted(int(p.name) for p in found if not (p / COMMIT).exists())


def _is_remote(path):
    return '://' in str(path)


def _reason(error):
    """One line for an exception of Orbax or TensorStore, with the errno if there is one."""
    chain, e = [], error
    while e is not None:
        chain.append(e)
        e = e.__cause__ or e.__context__
    for e in chain:
        code = getattr(e, 'errno', None)
        found = re.search(r'OS error (\d+)', str(e))
        code = code or (int(found.group(1)) if found else None)
        if code:
            name = getattr(e, 'filename', None)
            return (f'{os.strerror(code)} ({errno.errorcode.get(code, code)})'
                    + (f' at {name}' if name else ''))
    text = ' '.join(str(error).split())
    return f'{type(error).__name__}: {text[:300]}'
