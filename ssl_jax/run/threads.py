# SPDX-License-Identifier: Apache-2.0
"""Calls in threads that nobody has to wait for: when one hangs, a signal still ends the program."""

import collections
import contextlib
import itertools
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

SIGNAL_SECONDS = 0.5  # at most until a signal is handled that came while waiting


def at_once(function: Callable[[Any], Any], items: Iterable, count: int) -> Iterator[Any]:
    """``function(x)`` for each of `items`, in their order, `count` of them at once.

    No more results than `count` wait to be taken. After an error no more calls begin.
    """
    if count == 1:
        yield from map(function, items)
        return
    tasks, running, items, started = queue.SimpleQueue(), collections.deque(), iter(items), 0

    def work():
        while (task := tasks.get()) is not None:
            x, result = task
            try:
                result.put((function(x), None))
            except BaseException as e:  # whatever it is, the other side must not wait
                result.put((None, e))

    try:
        while True:
            for x in itertools.islice(items, count - len(running)):
                running.append(queue.SimpleQueue())
                tasks.put((x, running[-1]))
                if started < count:
                    # A daemon: those of a pool are joined at the end of the program.
                    threading.Thread(target=work, name='ssl_jax-at-once', daemon=True).start()
                    started += 1
            if not running:
                return
            value, error = get(running.popleft())
            if error is not None:
                raise error
            yield value
    finally:
        with contextlib.suppress(queue.Empty):
            while True:
                tasks.get_nowait()
        for _ in range(started):
            tasks.put(None)


def get(q: queue.SimpleQueue) -> Any:
    """The next item; wakes up meanwhile, as a signal may arrive where it interrupts no wait."""
    while True:
        with contextlib.suppress(queue.Empty):
            return q.get(timeout=SIGNAL_SECONDS)
