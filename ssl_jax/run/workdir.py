# SPDX-License-Identifier: Apache-2.0
"""Workdir lock: one run at a time.

On a disk it is a kernel lock (`fcntl.flock`), which ends with its process in any case. In a bucket,
and on file systems without kernel locks, it is a lease: a file that is touched once a minute. A
lease is not created atomically: two runs that start within the same second may both get it.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator

from etils import epath

from ssl_jax.run import errors, launch, storage

LOCK = 'run.lock'
BEAT_SECONDS = 60
STALE_SECONDS = 10 * 60  # a lease that was not touched for this long is taken over
_STARTED = time.strftime('%Y-%m-%d %H:%M:%S %Z')  # of this process, for messages


class LockedError(errors.UserError):
    """Another run uses the workdir."""


@contextlib.contextmanager
def lock(workdir: epath.PathLike) -> Iterator[None]:
    """``with lock(workdir):`` keeps other runs out of `workdir`.

    Process 0 holds the lock; all processes must call this.

    Raises:
      LockedError: with host, pid and start of the run that holds the lock.
    """
    path, error = epath.Path(workdir) / LOCK, None
    stack = contextlib.ExitStack()
    if launch.is_main():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_lease(path) if storage.is_remote(path) else _flock(path))
        except (LockedError, OSError) as e:
            error = e
    if launch.main_says(error is not None) and error is None:
        error = LockedError(f'Process 0 could not lock {workdir}; see what it printed.')
    if error is not None:
        raise error
    with stack:
        yield


@contextlib.contextmanager
def _flock(path):
    """A kernel lock on a file with the name of its holder."""
    while True:
        file = open(path, 'a+')  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            is_empty = os.fstat(file.fileno()).st_size == 0
            file.close()
            if e.errno == errno.EWOULDBLOCK:
                raise _locked(path) from e
            if e.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            if is_empty:  # created above
                path.unlink(missing_ok=True)
            with _lease(path):
                yield
            return
        if _is_at(path, file):  # else the run before removed the file after it was opened
            break
        file.close()
    with file:
        file.truncate(0)
        file.write(json.dumps(_holder()))
        file.flush()
        try:
            yield
        finally:
            if _is_at(path, file):
                path.unlink()


def _is_at(path, file):
    """Whether `path` is still the open `file`: users delete locks."""
    return path.exists() and os.fstat(file.fileno()).st_ino == os.stat(path).st_ino


@contextlib.contextmanager
def _lease(path):
    """A file that is touched while its run lives."""
    old, new = _read(path), _holder()
    age = time.time() - path.stat().mtime if path.exists() else STALE_SECONDS
    if age < STALE_SECONDS:
        raise _locked(path)
    if old is not None:
        launch.show(f'Taking over {path}: {_spell(old)} left it {age / 60:.0f} minutes ago.')
    path.write_text(json.dumps(new))
    done = threading.Event()

    def keep_beating():
        while not done.wait(BEAT_SECONDS):
            try:
                if _read(path) == new:
                    path.write_text(json.dumps(new))
            except OSError as e:
                launch.say(f'{path} could not be touched: {e}.')

    threading.Thread(target=keep_beating, name='run.lock', daemon=True).start()
    try:
        yield
    finally:
        done.set()
        if _read(path) == new:
            path.unlink()


def _locked(path):
    return LockedError(
        f'{path.parent} is in use by {_spell(_read(path))}; stop that run or choose another '
        f'workdir (if it is surely gone, delete {path}).'
    )


def _holder():
    """Host, pid and start of this process."""
    return {'host': socket.gethostname(), 'pid': os.getpid(), 'started': _STARTED}


def _spell(holder):
    if holder is None:
        return 'a run that is just starting'
    return f'process {holder["pid"]} on {holder["host"]}, started {holder["started"]}'


def _read(path):
    try:
        return json.loads(path.read_text())
    except (ValueError, FileNotFoundError):
        return None
