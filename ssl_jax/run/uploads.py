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

from ssl_jax.run import launch, storage

SECONDS = 60.0  # between two writes of what changes all the time, and between tries
FLUSH_SECONDS = 5.0  # that `flush` waits in the middle of a run ...
CLOSE_SECONDS = 30.0  # ... and at its end


class _Queue:
    """What is to be written, newest content only, and the thread that writes it."""

    def __init__(self):
        self.changed = threading.Condition()
        self.waiting = {}  # path: see `put`
        self.writing = False
        self.urgent = False
        self.late = False  # the last try failed, or was waited for in vain
        self.failed = False
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
        due = time.monotonic() + SECONDS
        while True:
            with self.changed:
                while not self.waiting or not (self.urgent or time.monotonic() >= due):
                    left = due - time.monotonic() if self.waiting else None
                    self.changed.wait(left if left is None else max(left, 0.0))
                batch, self.waiting = self.waiting, {}
                self.urgent, self.writing = False, True
            error = None
            while batch:
                path, data = next(iter(batch.items()))
                try:
                    if not self._is_forbidden(path):
                        _write(path, data)
                except Exception as e:  # whatever it is, training matters more
                    error = e
                    break
                del batch[path]
            with self.changed:
                if error is not None:
                    old = {k: v for k, v in batch.items() if k not in self.waiting}
                    self.waiting = {**old, **self.waiting}
                self.writing, self.late, failed = False, error is not None, self.failed
                self.failed = error is not None
                self.changed.notify_all()
            due = time.monotonic() + SECONDS
            if error is not None and not failed:
                launch.say(
                    f'{path} could not be written ({type(error).__name__}: {error}); the run goes '
                    f'on, and it is tried again every {SECONDS:.0f} s.'
                )
            elif failed and error is None:
                launch.say('What could not be written to the bucket is there now.')

    def flush(self, seconds):
        with self.changed:
            self.urgent = bool(self.waiting)
            self.changed.notify_all()
            seconds = 0.0 if self.late and seconds <= FLUSH_SECONDS else seconds
            done = self.changed.wait_for(lambda: not self.waiting and not self.writing, seconds)
            self.late = not done
            return done

    def _is_forbidden(self, path):
        return any(path.startswith(prefix) for prefix in self.forbidden)


def _write(path, data):
    if data is None:
        storage.remove(path)
    else:
        storage.atomic_write(path, data() if callable(data) else data)


_queue = _Queue()


def put(path: str | os.PathLike, data: bytes | Callable[[], bytes] | None) -> None:
    """Writes a file: at once on a disk, soon in a bucket.

    Files are written in the order in which they were put.

    Args:
      path: of the file.
      data: its content, or a function that reads it when it is written; None deletes the file.
    """
    path = os.fspath(path)
    _queue.put(path, data) if storage.is_remote(path) else _write(path, data)


def flush(seconds: float = FLUSH_SECONDS) -> bool:
    """Waits until everything is written, `seconds` at most; whether it is.

    During an outage only the first call waits, and those for longer than `FLUSH_SECONDS`.
    """
    return _queue.flush(seconds)


def close() -> None:
    """`flush` at the end of a run; what is not written by then is dropped, with a line."""
    if not flush(CLOSE_SECONDS):
        with _queue.changed:
            names, _queue.waiting = list(_queue.waiting), {}
        shown = f'{names[0]} and {len(names) - 1} more' if len(names) > 1 else ''.join(names)
        launch.say(f'The bucket does not answer: {shown or "the last rows"} could not be written.')


def forbid(folder: str | os.PathLike) -> None:
    """From now on nothing below `folder` is written: it is another run's."""
    with _queue.changed:
        _queue.forbidden.add(f'{os.fspath(folder)}/')


def allow(folder: str | os.PathLike) -> None:
    """Ends `forbid`."""
    with _queue.changed:
        _queue.forbidden.discard(f'{os.fspath(folder)}/')
