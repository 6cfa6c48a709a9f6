# SPDX-License-Identifier: Apache-2.0
"""Whether a workdir can be written, read, listed, locked and deleted, and how fast."""

import contextlib
import os
import shutil
import statistics
import time

import jax
from etils import epath

from ssl_jax.check.rows import Row, caught, sentence
from ssl_jax.run import errors, launch, storage
from ssl_jax.run import workdir as workdir_lib

LARGE = 2**26  # bytes of the file that is timed
SMALL, COUNT = 4096, 10  # bytes and number of small ones, as metrics and metadata are
GIB = 2**30
FIX = 'make it writable by this user, or give another --workdir'
FIX_REMOTE = 'give this machine an account that may write the bucket (docs/pods.md)'


def rows(
    found: list[Row],
    workdir: epath.PathLike,
    saved: int | None = None,
    keep: int = 1,
    lock: bool = True,
) -> None:
    """Appends the rows; what is written lies in a folder of its own and is deleted again.

    Args:
      workdir: of a run; if it is absent, it is made and deleted.
      saved: bytes of a checkpoint, None if unknown.
      keep: number of checkpoints.
      lock: whether to lock it, which all processes do together.
    """
    workdir = epath.Path(workdir)
    remote = storage.is_remote(workdir)
    fix = FIX_REMOTE if remote else FIX
    name = f'.check-{jax.process_index()}-{os.getpid()}'
    made = []
    if not remote:
        made = [p for p in (workdir, *workdir.parents) if not p.exists()]
    try:
        with caught(found, 'workdir', fix):
            storage.require_workdir(workdir)
            if not remote:
                (workdir / name).mkdir(parents=True, exist_ok=True)
            _files(found, workdir / name)
            if launch.is_main() and storage.exists(workdir / workdir_lib.LOCK):
                text = 'run.lock is there: a run uses it, or one was killed'
                found.append(
                    Row('workdir in use', text, verdict='warn', next='start the run: it says who')
                )
        if not remote:
            with caught(found, 'free space'):
                _space(found, workdir, saved, keep)
        if lock:
            _lock(found, workdir / name, fix)
    finally:
        with caught(found, 'delete'):
            if storage.exists(workdir / name):
                storage.remove_folder(workdir / name)
        with contextlib.suppress(OSError):  # the last process leaves an empty one
            for path in made:
                os.rmdir(path)


def _files(found, folder):
    """Writes, reads and lists."""
    data = os.urandom(LARGE)
    start = time.perf_counter()
    storage.atomic_write(folder / 'large', data)
    found.append(Row('write 64 MB', LARGE / 1e6 / (time.perf_counter() - start), 'MB/s'))
    start = time.perf_counter()
    same = storage.read(folder / 'large') == data
    found.append(Row('read it back', LARGE / 1e6 / (time.perf_counter() - start), 'MB/s'))
    if not same:
        raise errors.UserError(f'{folder}: what is read is not what was written.')
    times, names = [], {f'{i}.json' for i in range(COUNT)}
    for file in sorted(names):
        start = time.perf_counter()
        storage.atomic_write(folder / file, data[:SMALL])
        times.append(time.perf_counter() - start)
    milliseconds = 1e3 * statistics.median(times)
    # Of a hundredth of a second nothing depends; a process is odd at twice the time.
    found.append(Row('write 4 kB', milliseconds, 'ms', less_is_better=True, odd=1.0))
    missing = names - {*storage.names(folder)}
    if missing:
        raise errors.UserError(f'{folder}: {min(missing)} was written and is not listed.')
    found.append(Row('list', 'complete'))


def _space(found, workdir, saved, keep):
    """Free bytes of the disk against what the checkpoints need."""
    there = next(p for p in (workdir, *workdir.parents) if p.exists())
    free = shutil.disk_usage(there).free
    row = Row('free space', free / GIB, 'GiB', odd=1.0)
    if saved:
        need = f'{keep} checkpoints of {saved / GIB:.2g} GiB, and one being written'
        verdict = 'bad' if free < 2 * saved else 'warn' if free < (keep + 1) * saved else 'ok'
        fix = 'free space, set checkpoint.keep=1, or give another --workdir'
        row = Row(
            'free space', free / GIB, 'GiB', need, verdict, fix if verdict != 'ok' else '', odd=1.0
        )
    found.append(row)


def _lock(found, folder, fix):
    """Locks the folder; all processes call it, and process 0 does it."""
    try:
        with workdir_lib.lock(folder):
            row = Row('lock', 'kept and given back')
    except Exception as error:
        row = Row('lock', sentence(error), verdict='bad', next=fix)
    if launch.is_main():
        found.append(row)
