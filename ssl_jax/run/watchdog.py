# SPDX-License-Identifier: Apache-2.0
"""Stalls: a phase without progress has the stacks of all threads written, later it ends the run.

`peers.at` and `peers.progress` are the progress: steps, batches of any stream, saves, parts of an
evaluation. A thread looks at them. It needs Python's lock; a call that never gives that back is
ended by a timer of C, which prints the stacks: with several processes soon after the others have
found this one silent (`peers.SILENT_SECONDS`), alone when the run would end. Time in which the
whole process is stopped does not count, except for that timer.

Not seen: what stalls before `train`, and threads and worker processes of the loader by themselves;
the process that waits for them is.
"""

import contextlib
import faulthandler
import os
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator

from etils import epath

from ssl_jax.run import launch, peers, storage

# Before the first step, where big programs compile and large folders are listed, all times are
# longer by SLOW_FACTOR.
SLOW = ('starting', 'listing', 'comparing', 'restoring', 'compiling')
SLOW_FACTOR = 4
WAITING = 'waiting for the device'
# What waits for no other process. In all else the cause may be another, which is left the first
# word.
OWN = ('waiting for the batch', 'step')
TICK_SECONDS = 5.0  # at most between two looks
END_SECONDS = 30.0  # for the sentence to get out, also to the other processes


@contextlib.contextmanager
def watch(
    workdir: epath.PathLike, dump_seconds: float | None, exit_seconds: float | None
) -> Iterator[None]:
    """``with watch(...):`` finds stalls of this process while inside.

    Args:
      workdir: gets ``stacks.<process>.txt``, written from a thread as it may be what stalls; a
        temporary file on this host has them first.
      dump_seconds: without progress until the stacks are written; None or 0: never.
      exit_seconds: without progress until the run ends with code 1, all its processes; None or 0:
        never.
    """
    if not dump_seconds and not exit_seconds:
        yield
        return
    done = threading.Event()
    if exit_seconds:  # here too: the thread may not get to it
        _arm(_limit(exit_seconds, peers.now()), TICK_SECONDS)
    args = done, epath.Path(workdir), dump_seconds, exit_seconds
    thread = threading.Thread(target=_look, args=args, name='watchdog', daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        faulthandler.cancel_dump_traceback_later()


def _look(done, workdir, dump_seconds, exit_seconds):
    tick = min(TICK_SECONDS, *(x / 10 for x in (dump_seconds, exit_seconds) if x))
    seen, stalled, dumped, last = None, 0.0, False, time.monotonic()
    while not done.wait(tick):
        now, state = time.monotonic(), peers.now()
        stalled += min(now - last, 2 * tick)  # a longer pause was one of the whole process
        last = now
        if state is not seen:
            if dumped:
                _say(f'{_who()} goes on: {state.phase}.')
            seen, stalled, dumped = state, 0.0, False
        if exit_seconds:
            wait = peers.others() and not state.phase.startswith(OWN)
            patience = max(2 * tick, exit_seconds / 20) if wait else 0.0
            left = _limit(exit_seconds, state) + patience - stalled
            _arm(left, 2 * tick)
        if dump_seconds and not dumped and stalled > _limit(dump_seconds, state):
            dumped = True
            where = _dump(workdir, state, stalled)
            _say(f'{_what(state, stalled)}; the stacks of all threads are in {where}')
        if exit_seconds and left < 0:
            return _end(workdir, state, stalled, dumped)


def _limit(seconds, state):
    return seconds * (SLOW_FACTOR if state.phase.startswith(SLOW) else 1)


def _arm(seconds, margin):
    """Sets the timer of C, for the case that this thread cannot run then."""
    late = max(0.0, seconds) + margin
    if peers.others():
        late = min(late, peers.SILENT_SECONDS)
    faulthandler.dump_traceback_later(late + END_SECONDS, exit=True, file=2)


def _end(workdir, state, stalled, dumped):
    """Ends the run; by the timer of C where Python cannot."""
    _arm(0.0, 0.0)
    if not dumped:
        _dump(workdir, state, stalled)
    theirs = [f'process {i}: {phase}' for i, phase in sorted(peers.others().items())]
    beside = f' ({"; ".join(theirs[:8])})' if theirs else ''
    name = f'stacks.{peers.index()}.txt'
    peers.fail(
        f'{_what(state, stalled)}{beside}, longer than watchdog.exit_minutes: {name} in the '
        f'workdir says where. When that is mended, start again with the same command.'
    )


def _who():
    return f'process {peers.index()}' if peers.others() else 'this run'


def _what(state, stalled):
    time_ = f'{stalled / 60:.0f} min' if stalled > 300 else f'{stalled:.2g} s'
    return f'{_who()} has not moved for {time_} ({state.phase})'


def _say(sentence):
    launch.say(f'ssl_jax: {sentence}')


def _dump(workdir, state, stalled):
    """Writes the stacks on this host, then from a thread to the workdir; returns both paths."""
    title = f'{time.strftime("%Y-%m-%d %H:%M:%S %Z")}: {_what(state, stalled)}'
    text = f'{title}\n\n{stacks()}\n'
    name = f'stacks.{peers.index()}.txt'
    local = _local(name)
    try:
        with open(local, 'a') as file:
            file.write(text)
    except OSError as error:
        _say(f'{local} cannot be written ({error.strerror}):\n{text}')
        local = 'this output'

    def keep():
        path = workdir / name
        try:
            before = '\n'.join(storage.read_lines(path))
            storage.atomic_write(path, f'{before}\n{text}' if before else text)
        except Exception as error:  # of any library for any bucket: the local file is there
            _say(f'{path} cannot be written ({error})')

    thread = threading.Thread(target=keep, name='watchdog-write', daemon=True)
    thread.start()
    thread.join(TICK_SECONDS)
    return f'{local}, on this host' if thread.is_alive() else f'{workdir / name}, and {local}'


def _local(name):
    return os.path.join(tempfile.gettempdir(), f'ssl_jax.{os.getpid()}.{name}')


def stacks() -> str:
    """The stacks of all threads, the main thread first; equal ones once, with a count.

    No file of sources is read, as its disk may be what stalls.
    """
    names = {t.ident: t.name for t in threading.enumerate()}
    main, found = threading.main_thread().ident, {}
    for ident, frame in sorted(sys._current_frames().items(), key=lambda item: item[0] != main):
        text = ''.join(
            f'  {f.f_code.co_filename}:{line} in {f.f_code.co_qualname}\n'
            for f, line in traceback.walk_stack(frame)
        )
        found.setdefault(text, []).append(names.get(ident, f'{ident}, not of Python'))
    parts = []
    for text, threads in found.items():
        more = f' and {len(threads) - 1} more' if len(threads) > 1 else ''
        parts.append(f'Thread {threads[0]}{more}:\n{text}')
    return '\n'.join(parts)
