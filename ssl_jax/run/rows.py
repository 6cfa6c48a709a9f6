# SPDX-License-Identifier: Apache-2.0
"""What a run measures, in files: ``metrics.jsonl`` and TensorBoard's events.

On a disk both are appended to. Objects in a bucket cannot be: there a run appends to files in a
temporary folder of its host, and `uploads` writes them to the bucket. ``metrics.jsonl`` then holds
the rows before the start, and ``metrics/<n>.jsonl`` those from the n-th on, some hundred each; at
the end all are in ``metrics.jsonl``.
"""

import functools
import json
import math
import os
import pathlib
import tempfile
import time

from etils import epath

from ssl_jax.run import storage, uploads

FILE, PARTS = 'metrics.jsonl', 'metrics'
PART_BYTES = 1 << 18


def read(path: epath.PathLike) -> list[dict]:
    """The rows of a ``metrics.jsonl``, or of the one in a workdir, with floats where they were.

    Lines that are no rows, as a kill or a bad disk may leave them, are left out.
    """
    return [row for row, _ in _parse(_lines(path))]


class Rows:
    """The metrics of a run.

    Args:
      workdir: rows there after `start_step`, and a torn last line, are removed.
      start_step: the step that training starts from.
    """

    def __init__(self, workdir: epath.PathLike, start_step: int):
        path, lines = epath.Path(workdir) / FILE, _lines(workdir)
        kept = [line for row, line in _parse(lines) if row['step'] <= start_step]
        text = ''.join(f'{line}\n' for line in kept)
        parts = [f'{workdir}/{PARTS}/{name}' for name in storage.names(f'{workdir}/{PARTS}')]
        if not storage.is_remote(path) or parts or kept != lines:
            storage.atomic_write(path, text)
        for part in parts:  # after that: a kill in between costs nothing
            storage.remove(part)
        self._remote = str(workdir) if storage.is_remote(path) else ''
        if self._remote:
            self._folder = tempfile.TemporaryDirectory(prefix='ssl_jax_')
            path = pathlib.Path(self._folder.name) / FILE
            path.write_text(text)
        self.path = path  # of the local file, which has all rows
        self._count, self._size = len(kept), len(text.encode())
        self._first, self._start = self._count, self._size  # of the newest part
        self._parts = []

    def add(self, row: dict) -> None:
        """Appends a row."""
        line = (json.dumps(row, allow_nan=False) + '\n').encode()
        with open(self.path, 'ab') as file:
            file.write(line)
        if not self._remote:
            return
        if self._size - self._start > PART_BYTES:
            self._first, self._start = self._count, self._size
        self._count, self._size = self._count + 1, self._size + len(line)
        part = functools.partial(_slice, self.path, self._start, self._size)
        name = f'{self._remote}/{PARTS}/{self._first:09d}.jsonl'
        self._parts = [*self._parts, name] if name not in self._parts[-1:] else self._parts
        uploads.put(name, part)

    def close(self) -> None:
        """Joins the parts; `uploads.close` waits for it."""
        if self._remote:
            uploads.put(f'{self._remote}/{FILE}', pathlib.Path(self.path).read_bytes())
            for name in self._parts:
                uploads.put(name, None)
            self._folder.cleanup()


def _slice(path, start, end):
    with open(path, 'rb') as file:
        file.seek(start)
        return file.read(end - start)


def _lines(path):
    """Lines of a file of metrics, or of the one in a workdir with its parts."""
    path = os.fspath(path).rstrip('/')
    folder, _, name = path.rpartition('/')
    if name != FILE:
        if name.endswith('.jsonl'):
            return storage.read_lines(path)
        folder = path
    for _ in range(3):
        parts = storage.names(f'{folder or "."}/{PARTS}')
        lines = storage.read_lines(f'{folder or "."}/{FILE}')
        try:
            for part in parts:
                text = storage.read(f'{folder or "."}/{PARTS}/{part}').decode(errors='replace')
                lines = lines[: int(part.partition('.')[0])] + text.splitlines()
            break
        except FileNotFoundError:  # a run that ends has joined its parts in this moment
            continue
    return lines


def _parse(lines):
    """[(row, line)] of the complete rows."""
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
            row['step'] + 0
        except (ValueError, TypeError, KeyError):
            continue
        row = {k: float(v) if v in ('nan', 'inf', '-inf') else v for k, v in row.items()}
        rows.append((row, line))
    return rows


def events(workdir: epath.PathLike, start_step: int):
    """(add, close) of a TensorBoard file in `workdir`; older events after `start_step` are hidden.

    Without tensorboardX's SummaryWriter: the thread in which it writes ends with the first error,
    and then its caller waits for ever.
    """
    from tensorboardX import event_file_writer, summary
    from tensorboardX.proto import event_pb2

    target, temporary = f'{workdir}/tensorboard', None
    folder = target
    if storage.is_remote(workdir):
        temporary = tempfile.TemporaryDirectory(prefix='ssl_jax_')
        folder = temporary.name
    os.makedirs(folder, exist_ok=True)
    writer = event_file_writer.EventsWriter(os.path.join(folder, 'events'), f'.{os.getpid()}')
    log = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    writer.write_event(event_pb2.Event(step=start_step + 1, session_log=log))
    (name,) = os.listdir(folder) if temporary else ('',)

    def add(step, values):
        event = event_pb2.Event(step=step, wall_time=time.time())
        for key, value in values.items():
            if math.isfinite(value):  # else a gap
                event.summary.MergeFrom(summary.scalar(key, value))
        writer.write_event(event)
        writer.flush()
        if temporary:
            uploads.put(f'{target}/{name}', pathlib.Path(folder, name).read_bytes)

    def close():
        writer.close()
        if temporary:
            uploads.put(f'{target}/{name}', pathlib.Path(folder, name).read_bytes())
            temporary.cleanup()

    return add, close
