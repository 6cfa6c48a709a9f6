# SPDX-License-Identifier: Apache-2.0
"""Small files of a run in a bucket, written behind its back: metrics, events, lists, pictures.

Objects cannot be appended to, so what grows is written anew, once a minute. One thread does that;
an outage delays it and nothing else: training goes on, and the newest content comes later. On a
disk files are written at once.
"""

import os
import threading
import time
from collections.abc import Callable

from ssl_jax.run import errors, launch, storage

SECONDS = 60.0  # between two writes of what changes all the time, and between tries
FLUSH_SECONDS = 5.0  # that `flush` waits in the middle of a run ...
CLOSE_SECONDS = 30.0  # ... and at its end


class _Queue:
    """What is to be written, newest content only, and the thread that writes it."""

    def __init__(self):
        self.changed = threading.Condition()
        self.waiting = {}  # path: see `put`; until it is written
        self.urgent = False
        self.late = False  # the last try failed, or was waited for in vain
        self.failures = 0
        self.forbidden = set()
        self.thread = None

    def put(self, path, data):
        with self.changed:
            if self._is_forbidden(path):
                return
            self.waiting.pop(path, None)
            self.waiting[path] = data
            if self.thread is None:
                self.thread = threading.Thread(target=self.run, name='uploads', daemon=True)
                self.thread.start()
            self.changed.notify_all()

    def run(self):
        due, failing = time.monotonic() + SECONDS, False
        while True:
            with self.changed:
                while not self.waiting or not (self.urgent or time.monotonic() >= due):
                    left = max(due - time.monotonic(), 0.0) if self.waiting else None
                    self.changed.wait(left)
                self.urgent, batch = False, dict(self.waiting)
            failed = False
            for path, data in batch.items():
                problem = '' if failed and data is None else self._write(path, data)
                if problem and not failed and not failing:
                    again = f'the run goes on, it is tried again every {SECONDS:.0f} s'
                    launch.say(f'{problem}; {again}.')
                failed = failed or bool(problem)
            due = time.monotonic() + SECONDS
            if failing and not failed:
                launch.say('What could not be written to the bucket is there now.')
            failing = failed
            with self.changed:
                self.late, self.failures = failed, self.failures + failed
                self.changed.notify_all()

    def _write(self, path, data):
        """Writes one file; '' or a part of a sentence on what failed."""
        with self.changed:
            if self._is_forbidden(path):
                self.waiting.pop(path, None)
            if path not in self.waiting or self.waiting[path] is not data:  # a newer one waits
                return ''
        problem = ''
        try:
            content = data() if callable(data) else data
        except OSError as error:  # a temporary file is gone: nobody can write this any more
            launch.say(f'{path} is not written ({error}).')
        else:
            try:
                _write(path, content)
            except errors.UserError as error:
                problem = str(error).rstrip('.')
            except Exception as error:  # whatever it is, training matters more
                problem = f'{path} could not be written ({type(error).__name__}: {error})'
        with self.changed:
            if not problem and path in self.waiting and self.waiting[path] is data:
                del self.waiting[path]
        return problem

    def flush(self, seconds):
        with self.changed:
            self.urgent, failures = bool(self.waiting), self.failures
            self.changed.notify_all()
            seconds = 0.0 if self.late and seconds <= FLUSH_SECONDS else seconds
            self.changed.wait_for(
                lambda: not self.waiting or self.failures > failures, max(seconds, 0.0)
            )
            self.late = bool(self.waiting)
            return not self.waiting

    def _is_forbidden(self, path):
        return any(path.startswith(prefix) for prefix in self.forbidden)


def _write(path, data):
    if data is None:
        storage.remove(path)
    else:
        storage.atomic_write(path, data)


_queue = _Queue()


def put(path: str | os.PathLike, data: bytes | Callable[[], bytes] | None) -> None:
    """Writes a file: at once on a disk, soon in a bucket.

    Files are written in the order in which they were put; nothing is deleted after a failure.

    Args:
      path: of the file.
      data: its content, or a function that reads it when it is written; None deletes the file.
    """
    path = os.fspath(path)
    if storage.is_remote(path):
        _queue.put(path, data)
    else:
        _write(path, data() if callable(data) else data)


def flush(seconds: float | None = None) -> bool:
    """Waits until everything is written, `seconds` (`FLUSH_SECONDS`) at most; whether it is.

    During an outage only the first call waits, and those for longer than `FLUSH_SECONDS`.
    """
    return _queue.flush(FLUSH_SECONDS if seconds is None else seconds)


def close() -> None:
    """`flush` at the end of a run; what is not written by then is dropped, with a line."""
    if not flush(CLOSE_SECONDS):
        with _queue.changed:
            names, _queue.waiting = list(_queue.waiting), {}
        more = f' and {len(names) - 1} more' if len(names) > 1 else ''
        launch.say(f'{names[0]}{more} could not be written in {CLOSE_SECONDS:.0f} s.')


def forbid(folder: str | os.PathLike) -> None:
    """From now on nothing below `folder` is written: it is another run's."""
    with _queue.changed:
        _queue.forbidden.add(f'{os.fspath(folder)}/')


def allow(folder: str | os.PathLike) -> None:
    """Ends `forbid`."""
    with _queue.changed:
        _queue.forbidden.discard(f'{os.fspath(folder)}/')
