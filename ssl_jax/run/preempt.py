# SPDX-License-Identifier: Apache-2.0
"""Ending a run on SIGTERM, SIGINT or SIGHUP: at the next step, on all processes at the same one.

A handler sets a flag, which costs nothing to poll. `timeout` and some schedulers send a signal
twice, so more of them change nothing; only Ctrl-C, again after PATIENCE, ends the process at once.
With several processes jax's preemption service spreads a SIGTERM to one process, and all end at the
same step. It listens to SIGTERM below Python, and a Python handler would take the signal away; so
only SIGINT and SIGHUP have a handler, which sends SIGTERM. (A SIGTERM while several processes
compile therefore ends the run at the first step; nothing is lost by then.)
"""

import concurrent.futures
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils

from ssl_jax.run import launch

POLL_SECONDS = 0.1
PATIENCE = 1.0  # seconds in which a second Ctrl-C counts as the first


class Stopped(BaseException):
    """A signal asked the run to end. No error: `except Exception` lets it pass."""


class Preemption:
    """``with Preemption() as p:`` catches SIGTERM, SIGINT and SIGHUP while inside.

    Attributes:
      requested: whether the run should end, as far as this process knows; cheap. With several
        processes it turns true in `agreed` alone, hence at the same step everywhere.
    """

    def __init__(self):
        self.requested = False
        self._first = None  # time of the first signal
        self._interrupts = False  # whether a signal raises `Stopped` at once
        self._old = {}
        self._is_multi = jax.process_count() > 1

    def __enter__(self):
        if self._is_multi and not jax.config.jax_enable_preemption_service:
            raise RuntimeError(
                'jax_enable_preemption_service is off, so SIGTERM could not end all '
                f'{jax.process_count()} processes at the same step; set '
                'JAX_ENABLE_PREEMPTION_SERVICE=1 before jax.distributed.initialize().'
            )
        if threading.current_thread() is threading.main_thread():  # elsewhere Python forbids it
            numbers = [signal.SIGINT]
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup sets it
                numbers.append(signal.SIGHUP)
            if not self._is_multi:
                numbers.append(signal.SIGTERM)
            for number in numbers:
                self._old[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def interrupts(self) -> Iterator[None]:
        """A block of the main thread that may wait long, for data for example.

        A signal raises `Stopped` in it, also one that came before. Not with several processes:
        the others would wait for this one.
        """
        self._interrupts = not self._is_multi
        try:
            if self._interrupts and self.requested:
                raise Stopped
            yield
        finally:
            self._interrupts = False

    def agreed(self, step: int) -> bool:
        """Whether the run should end before `step`; the same answer on all processes.

        Every process has to ask at every step.
        """
        if self._is_multi and not self.requested:
            self.requested = multihost_utils.reached_preemption_sync_point(step)
        return self.requested

    def _on_signal(self, number, _):
        name, now = signal.Signals(number).name, time.monotonic()
        if self._first is not None:
            if number == signal.SIGINT and now - self._first > PATIENCE:
                launch.say(f'\nSecond {name}: leaving at once, without saving.')
                os._exit(128 + number)
            return
        self._first = now
        launch.say(f'\n{name}: saving at the next step; another Ctrl-C leaves at once.')
        if self._is_multi:
            os.kill(os.getpid(), signal.SIGTERM)
            return
        self.requested = True
        if self._interrupts:
            self._interrupts = False
            raise Stopped


def run_interruptible(fn: Callable[[], Any], p: Preemption) -> Any:
    """Returns `fn()`, a long call that holds no Python code; gives up when `p.requested`.

    XLA compiles for minutes and Python runs signal handlers only between its own instructions, on
    the main thread; so `fn` runs in a daemon thread and this thread polls. The thread cannot be
    killed: after `Stopped`, end the process with `exit_now`.

    Raises:
      Stopped: if a signal came first; else whatever `fn` raises.
    """
    future = concurrent.futures.Future()

    def work():
        try:
            future.set_result(fn())
        except BaseException as e:
            future.set_exception(e)

    threading.Thread(target=work, name='interruptible', daemon=True).start()
    while not concurrent.futures.wait([future], POLL_SECONDS).done:
        if p.requested:
            raise Stopped
    return future.result()


def exit_now(code: int) -> None:
    """Ends the process with `code` at once, whatever threads still compile; flushes output."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)
