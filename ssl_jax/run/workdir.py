# SPDX-License-Identifier: Apache-2.0
"""Workdir lock: one run at a time.

On a disk it is a kernel lock (`fcntl.flock`), which ends with its process in any case. In a bucket,
and on file systems without kernel locks, it is a lease: an object that its run writes anew every
`BEAT_SECONDS`, each time under the condition that nobody else has written it. Another run takes it
over, under the same condition, when

- its process ran on this machine and has ended: at once;
- it was not renewed for `STALE_SECONDS`, of which the other has watched it for `WATCH_SECONDS`: a
  run that was only cut off from the bucket, for less than `GONE_SECONDS`, comes back within those.

A run that finds its lease taken over ends before it saves again. (On a disk without kernel locks
two that take over a lease within the same millisecond may both get it.)
"""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator

from etils import epath

from ssl_jax.run import bucket, errors, hashing, launch, storage, uploads

LOCK = 'run.lock'
BEAT_SECONDS = 20
STALE_SECONDS = 3 * 60
WATCH_SECONDS = 60
GONE_SECONDS = 15 * 60
POLL_SECONDS = 5
RELEASE_SECONDS = 10  # that the end of a run waits until its lease is gone
_STARTED = time.strftime('%Y-%m-%d %H:%M:%S %Z')  # of this process, for messages


class LockedError(errors.UserError):
    """Another run uses the workdir."""


@contextlib.contextmanager
def lock(workdir: epath.PathLike) -> Iterator[Callable]:
    """``with lock(workdir) as held:`` keeps other runs out of `workdir`.

    Process 0 holds the lock; all processes must call this. `held()` raises a LockedError if another
    run has taken over; it costs nothing. `held(sure=True)` first asks the bucket if the lease may
    have been taken over meanwhile.

    Raises:
      LockedError: with host, pid and start of the run that holds the lock.
    """
    path = epath.Path(workdir) / LOCK
    with contextlib.ExitStack() as stack:
        taking, held, error, waits = _taking(path, stack), None, None, True
        while waits:  # together: in a collective the others would wait too long
            waits = False
            if launch.is_main():
                try:
                    next(taking)
                    waits = True
                except StopIteration as done:
                    held = done.value
                except (errors.UserError, OSError) as e:
                    error = e
            waits = launch.main_says(waits)
        sentence = launch.consult(error and str(error), lambda found: found[0])
        if sentence and error is None:
            error = LockedError(sentence)
        if error is not None:
            raise error
        yield held or _always


def _always(sure=False):
    """`held` of a lock that cannot be lost."""


def _taking(path, stack):
    """Locks `path` until `stack` ends; yields while it waits, returns `held`."""
    if not storage.is_remote(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if stack.enter_context(_flock(path)):
            return _always
    lease = _Lease(path)
    yield from lease.take()
    stack.callback(lease.release)
    return lease.held


@contextlib.contextmanager
def _flock(path):
    """A kernel lock on a file with the name of its holder; False if there are no kernel locks."""
    while True:
        file = open(path, 'a+')  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            is_empty = os.fstat(file.fileno()).st_size == 0
            file.close()
            if e.errno == errno.EWOULDBLOCK:
                raise _locked(path, _parse(storage.read(path))) from e
            if e.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            if is_empty:  # created above
                path.unlink(missing_ok=True)
            yield False
            return
        if _is_at(path, file):  # else the run before removed the file after it was opened
            break
        file.close()
    with file:
        file.truncate(0)
        file.write(json.dumps(_holder()))
        file.flush()
        try:
            yield True
        finally:
            if _is_at(path, file):
                path.unlink()


def _is_at(path, file):
    """Whether `path` is still the open `file`: users delete locks."""
    return path.exists() and os.fstat(file.fileno()).st_ino == os.stat(path).st_ino


class _Lease:
    """See the module."""

    def __init__(self, path):
        self._path, self._holder = path, {**_holder(), 'id': secrets.token_hex(8), 'beat': 0}
        self._stamp = self._renewed = None  # of the last success
        self._taker = None  # who has taken over, as text
        self._beating = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep_beating, name='run.lock', daemon=True)

    def take(self):
        """Generator: yields while another run may hold the lease."""
        first, began, wait = None, time.monotonic(), 0.0
        while True:
            seen = _look(self._path)
            if seen is not None:
                holder = _parse(seen.data)
                if first is not None and first.stamp != seen.stamp:
                    raise _locked(self._path, holder)
                ended = _has_ended(holder)
                if ended is False:
                    raise _locked(self._path, holder)
                if first is None and not ended and seen.age < GONE_SECONDS:
                    wait = max(STALE_SECONDS - seen.age, WATCH_SECONDS)
                    launch.show(
                        f'{self._path} is held by {_spell(holder)}, renewed {seen.age:.0f} s ago: '
                        f'this run starts in {wait:.0f} s, or is refused as soon as that one '
                        f'answers.'
                    )
                first = first or seen
                if (left := began + wait - time.monotonic()) > 0:
                    time.sleep(min(left, POLL_SECONDS))
                    yield
                    continue
                how = 'has ended' if ended else f'left it {seen.age / 60:.0f} minutes ago'
                launch.show(f'Taking over {self._path}: {_spell(holder)} {how}.')
            if self._write(seen.stamp if seen else ''):
                break
            first = first or bucket.Seen(b'', '', 0.0)  # another run was faster
        uploads.allow(self._path.parent)
        self._thread.start()

    def held(self, sure=False):
        """See `lock`."""
        if sure and time.monotonic() - self._renewed > STALE_SECONDS / 2:
            self._beat()
        if self._taker is not None:
            raise LockedError(
                f'{self._path.parent} was taken over by {self._taker} while this run could not '
                f'reach it: this run ends and has written nothing there since.'
            )

    def release(self):
        """Removes the lease, if it still is ours."""
        self._done.set()
        self._thread.join(RELEASE_SECONDS)
        if self._thread.is_alive():
            launch.say(
                f'{self._path} could not be removed, as the bucket does not answer; the workdir is '
                f'free in {STALE_SECONDS / 60:.0f} minutes.'
            )

    def _keep_beating(self):
        while not self._done.wait(BEAT_SECONDS):
            try:
                self._beat()
            except Exception as error:  # it must go on
                launch.say(f'{self._path} could not be renewed ({error}); it is tried again.')
        try:
            if self._taker is None:
                _drop(self._path, self._stamp)
        except Exception as error:
            launch.say(f'{self._path} could not be removed ({error}).')

    def _beat(self):
        with self._beating:
            if self._taker is not None or self._write(self._stamp):
                return
            seen = _look(self._path)
            holder = seen and _parse(seen.data)
            # Users delete locks; and a beat that failed may have been written all the same.
            if (seen is None or (holder or {}).get('id') == self._holder['id']) and self._write(
                seen.stamp if seen else ''
            ):
                return
            self._taker = _spell(holder)
            uploads.forbid(self._path.parent)

    def _write(self, stamp):
        """Writes the lease if it has `stamp`; whether it did."""
        self._holder['beat'] += 1
        found = _swap(self._path, json.dumps(self._holder).encode(), stamp)
        if found:
            self._stamp, self._renewed = found, time.monotonic()
        return bool(found)


def _look(path):
    """`bucket.look`, also of a file on a disk, where the stamp is a hash: each beat differs."""
    if storage.is_remote(path):
        return bucket.look(path)
    try:
        data, age = storage.read(path), max(time.time() - os.stat(path).st_mtime, 0.0)
    except FileNotFoundError:
        return None
    return bucket.Seen(data, hashing.digest(data), age)


def _swap(path, data, stamp):
    """`bucket.swap`, also of a file on a disk, where only the creation is atomic."""
    if storage.is_remote(path):
        return bucket.swap(path, data, stamp)
    if stamp:
        seen = _look(path)
        if seen is None or seen.stamp != stamp:
            return ''
        storage.atomic_write(path, data)
    else:
        try:
            with open(path, 'xb') as file:
                file.write(data)
        except FileExistsError:
            return ''
    return hashing.digest(data)


def _drop(path, stamp):
    """`bucket.remove` with a stamp, also of a file on a disk."""
    if storage.is_remote(path):
        bucket.remove(path, stamp)
    elif (seen := _look(path)) and seen.stamp == stamp:
        storage.remove(path)


def _locked(path, holder):
    return LockedError(
        f'{path.parent} is in use by {_spell(holder)}; stop that run or choose another workdir (if '
        f'it is surely gone, delete {path}).'
    )


def _holder():
    """Host, pid and start of this process, and what tells it from others with the same pid."""
    pid = os.getpid()
    about = {'host': socket.gethostname(), 'pid': pid, 'started': _STARTED}
    return {**about, 'machine': _machine(), 'birth': _birth(pid)}


def _has_ended(holder):
    """Whether the process of a holder has ended; None if it is of another machine."""
    machine = _machine()
    if not machine or (holder or {}).get('machine') != machine:
        return None
    return _birth(holder['pid']) != holder['birth']


def _machine():
    """This machine since its start, and the container that numbers its processes; '' if unknown."""
    try:
        boot = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
        return f'{socket.gethostname()} {boot} {os.readlink("/proc/self/ns/pid")}'
    except OSError:  # no Linux
        return ''


def _birth(pid):
    """When a process started, in ticks since the start of the machine; '' if there is none."""
    try:
        state, *rest = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()
    except OSError:
        return ''
    return '' if state in 'ZX' else rest[18]


def _spell(holder):
    if holder is None:
        return 'a run that is just starting'
    return f'process {holder["pid"]} on {holder["host"]}, started {holder["started"]}'


def _parse(data):
    try:
        found = json.loads(data)
        return found if {'host', 'pid', 'started'} <= found.keys() else None
    except (ValueError, AttributeError):
        return None
