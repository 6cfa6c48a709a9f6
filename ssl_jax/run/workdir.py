# SPDX-License-Identifier: Apache-2.0
"""What keeps a workdir whole: one run at a time, files written at once, the config beside them.

Paths may be remote (``gs://``). There, files appear whole by themselves, but creating one only if
it is absent is not possible: of two runs started within the same second both may get the lock.
"""

import contextlib
import json
import os
import pathlib
import socket
import sys
import threading
import time

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

LOCK = 'run.lock'
BEAT_SECONDS = 60
# A lock of another host counts as left behind once it has not been touched for so long.
STALE_SECONDS = 10 * 60
ABSENT = '(absent)'
_IMPORTED = time.time()  # when this process started, for people


class LockedError(RuntimeError):
    """Another run uses the workdir."""


@contextlib.contextmanager
def lock(workdir):
    """``with lock(workdir):`` keeps every other run out of `workdir`.

    Process 0 writes ``run.lock`` with host, pid and start time and touches it once a minute. A lock
    whose process is gone (the same host) or that nobody touched for ten minutes (another host) is
    taken over with a printed line. All processes have to call.

    Yields:
      a function that touches the lock; only callers that stop all threads for long need it.

    Raises:
      LockedError: naming host, pid and start of the run that holds the lock.
    """
    path, me, error = epath.Path(workdir) / LOCK, _describe_process(), None
    is_main = jax.process_index() == 0
    if is_main:
        try:
            _acquire(path, me)
        except (LockedError, OSError) as e:
            error = e
    if jax.process_count() > 1:
        refused = multihost_utils.broadcast_one_to_all(np.int32(error is not None))
        if refused and not is_main:
            error = LockedError(f'Process 0 could not lock {workdir}; see what it printed.')
    if error is not None:
        raise error
    done = threading.Event()

    def beat():
        if is_main and _read(path) == me:
            path.write_text(json.dumps(me)) if _is_remote(path) else os.utime(path)

    def keep_beating():
        while not done.wait(BEAT_SECONDS):
            try:
                beat()
            except OSError as e:
                print(f'{path} could not be touched: {e}.', file=sys.stderr, flush=True)

    if is_main:
        threading.Thread(target=keep_beating, name='run.lock', daemon=True).start()
    try:
        yield beat
    finally:
        done.set()
        if is_main and _read(path) == me:
            path.unlink()


def save_config(workdir, config):
    """Writes ``config.json`` and says what differs from the one it replaces.

    Args:
      workdir: folder, made if needed.
      config: a ConfigDict or dict.

    Returns:
      dict dotted field -> (old, new); {} for a new workdir. A field that one side lacks is
      `ABSENT` there.
    """
    path = epath.Path(workdir) / 'config.json'
    config = config.to_dict() if hasattr(config, 'to_dict') else config
    text = json.dumps(config, indent=2, default=str)
    new, old = _flatten(json.loads(text)), None
    if path.exists():
        with contextlib.suppress(ValueError):
            old = _flatten(json.loads(path.read_text()))
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, text + '\n')
    if old is None:
        return {}
    fields = [*new, *(k for k in old if k not in new)]
    changes = {k: (old.get(k, ABSENT), new.get(k, ABSENT)) for k in fields}
    return {k: (a, b) for k, (a, b) in changes.items() if a != b}


def atomic_write(path, text):
    """Writes `text` to `path` so that a reader, or a crash, sees the old file or the new one."""
    path = epath.Path(path)
    if _is_remote(path):
        path.write_text(text)
        return
    temporary = f'{path}.{os.getpid()}.tmp'
    try:
        with open(temporary, 'w') as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def _acquire(path, me):
    """Creates the lock file, taking over a stale one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(3):  # a holder may leave, or another run win the take-over, in between
        if _create(path, json.dumps(me)):
            return
        holder = _read(path)
        reason = _why_stale(path, holder)
        if reason is None:
            break
        print(f'Taking over {path}: {reason}.', flush=True)
        _remove(path, holder)
    raise LockedError(
        f'{path.parent} is in use by {_spell(_read(path))}; stop that run or choose another '
        f'workdir (if it is surely gone, delete {path}).'
    )


def _create(path, text):
    """Writes the file if there is none; whether it did."""
    if _is_remote(path):
        if path.exists():
            return False
        path.write_text(text)
        return True
    try:
        with open(path, 'x') as f:
            f.write(text)
    except FileExistsError:
        return False
    return True


def _remove(path, holder):
    """Deletes the lock of `holder`; if another run was faster, its new lock stays."""
    if _is_remote(path):
        path.unlink(missing_ok=True)
        return
    aside = epath.Path(f'{path}.{os.getpid()}.stale')
    with contextlib.suppress(FileNotFoundError):
        path.rename(aside)  # only one of several runs succeeds
        if _read(aside) != holder:
            os.link(aside, path)
        aside.unlink()


def _why_stale(path, holder):
    """Why the lock may be taken over, or None if its run may live."""
    try:
        age = time.time() - path.stat().mtime
    except FileNotFoundError:
        return 'it has just been released'
    if holder is None:
        return f'it is not readable and {age:.0f} s old' if age > BEAT_SECONDS else None
    me = _describe_process()
    if holder['host'] == me['host']:
        if holder['boot'] != me['boot']:
            return f'{_spell(holder)} ended when the host restarted'
        started = _start_ticks(holder['pid'])
        if started is None:
            return f'{_spell(holder)} is gone'
        if started != holder['ticks']:
            return f'{_spell(holder)} is gone and its pid is used by another process'
        return None
    if age > STALE_SECONDS:
        return f'{_spell(holder)} has not touched it for {age / 60:.0f} minutes'
    return None


def _spell(holder):
    if holder is None:
        return 'a run that is just starting'
    return f'process {holder["pid"]} on {holder["host"]}, started {holder["started"]}'


def _read(path):
    try:
        return json.loads(path.read_text())
    except (ValueError, FileNotFoundError):
        return None


def _describe_process():
    """Host, pid, and what tells this process from a later one with the same pid."""
    boot = pathlib.Path('/proc/sys/kernel/random/boot_id')
    return {
        'host': socket.gethostname(),
        'pid': os.getpid(),
        'ticks': _start_ticks(os.getpid()),
        'boot': boot.read_text().strip() if boot.exists() else '',
        'started': time.strftime('%Y-%m-%d %H:%M:%S %Z', time.localtime(_IMPORTED)),
    }


def _start_ticks(pid):
    """When the process began, in clock ticks after boot; 0 where /proc is missing; None if dead."""
    try:
        stat = pathlib.Path(f'/proc/{pid}/stat').read_text()
    except (FileNotFoundError, ProcessLookupError):
        if pathlib.Path('/proc/self/stat').exists():
            return None
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            pass
        return 0
    fields = stat.rpartition(')')[2].split()  # the name, in parentheses, may hold blanks
    return None if fields[0] == 'Z' else int(fields[19])


def _flatten(tree, prefix=''):
    """Nested dicts as {'a.b': value}; an empty dict is a value."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    flat = {}
    for key, value in tree.items():
        flat |= _flatten(value, f'{prefix}.{key}' if prefix else str(key))
    return flat


def _is_remote(path):
    return '://' in str(path)
