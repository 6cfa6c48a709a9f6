# SPDX-License-Identifier: Apache-2.0
"""Threads and processes that fill batches, in bounded memory, and that end when they are told to.

The threads share the rows of the batch that is needed next, so that the first one comes soon and
few are in memory at a time.
"""

import collections.abc
import contextlib
import functools
import mmap
import multiprocessing.connection
import os
import queue
import sys
import threading
import time
import weakref
from typing import Any

import grain
import numpy as np
from absl import flags

from ssl_jax.run import threads

READY = 2  # finished batches that wait for the trainer
CLOSE_SECONDS = 2.0  # for threads to finish their images


def stream(samples: Any, num_threads: int, num_workers: int = 0) -> 'Stream':
    """Stream over the batches of samples.

    Args:
      samples: sequence of {name: array or scalar}, alike in names, shapes and types; row r of batch
        t is samples[t * B + r], with B = len(samples.rows).
      num_threads: of this process, or of each worker.
      num_workers: processes; 0 loads in threads of this process.
    """
    if not num_workers:
        batches = Batches(samples, num_threads, READY)
        # `map` holds nothing but the next index; Grain's own threads would be joined at the end of
        # the interpreter, after all that they have yet to do.
        return Stream(map(batches.get, range(len(batches))), batches.close)
    if not flags.FLAGS.is_parsed():  # in notebooks and pytest; Grain reads one of the flags
        flags.FLAGS.mark_as_parsed()
    name = f'\0ssl_jax-{os.getpid()}-{id(samples)}' if sys.platform == 'linux' else None
    alive = multiprocessing.connection.Listener(name, 'AF_UNIX', backlog=num_workers)
    batches = Batches(samples, num_threads, READY - 1, stride=num_workers)
    dataset = grain.MapDataset.source(batches).to_iter_dataset(grain.ReadOptions(0, 0))
    dataset = dataset.mp_prefetch(
        grain.MultiprocessingOptions(num_workers=num_workers),
        worker_init_fn=functools.partial(_start_worker, os.getpid(), alive.address),
    )
    iterator = iter(dataset)

    def close():
        alive.close()
        iterator.close()

    return Stream(map(_copied, iterator), close)


def _copied(batch):
    """The batch in memory of its own: Grain's must be given back before the program ends."""
    return {name: np.array(value) for name, value in batch.items()}


class Stream(contextlib.AbstractContextManager, collections.abc.Iterator):
    """Iterator over batches that can be closed promptly; the end of the program closes it too."""

    def __init__(self, iterator, close):
        self._iterators = [iterator]  # none once closed
        self._finalizer = weakref.finalize(self, _close, self._iterators, close)

    def __next__(self) -> dict[str, np.ndarray]:
        if not self._iterators:
            raise RuntimeError('The stream is closed.')
        return next(self._iterators[0])

    def close(self) -> None:
        """Stops threads and worker processes; batches in work are abandoned."""
        self._finalizer()

    def __exit__(self, *_):
        self.close()


def _close(iterators, close):
    iterators.clear()  # deleted at the end of the program, Grain's would miss their modules
    close()


class Batches:
    """Random access to the batches of samples; threads fill the rows of one after the other.

    Batch t starts the batches t + stride, t + 2 * stride, ... as well. The threads take rows in the
    order of the stream, so all of them work on the batch that is needed next.

    Args:
      samples: see `stream`.
      num_threads: started with the first batch.
      ready: batches to have finished beside those in work.
      stride: distance to the batch that is asked for next.
    """

    closed = False

    def __init__(self, samples, num_threads, ready, stride=1):
        self._samples, self._num_threads, self._stride = samples, num_threads, stride
        self._size = len(samples.rows)
        self._ahead = ready + -(-num_threads // self._size)
        self._started = {}  # number of a batch -> (list of the batch, queue of its rows' errors)
        self._threads = []
        self._tasks = None  # queues cannot be sent to workers

    def __len__(self):
        return len(self._samples) // self._size

    def __getitem__(self, t):
        """`get` for Grain in a worker; {} of a closed stream."""
        try:
            return self.get(t)
        except Exception:
            if not self.closed:
                raise
            return {}  # after an error Grain leaves shared memory behind; nobody reads this

    def get(self, t):
        """Batch t."""
        if not self._threads:
            self._start()
        for u in range(t, min(t + self._ahead * self._stride, len(self)), self._stride):
            if u not in self._started:
                self._started[u] = [], queue.SimpleQueue()
                for row in range(self._size):
                    self._tasks.put((u, row, *self._started[u]))
        if self.closed:  # by another thread, whose end of the tasks may precede these
            raise RuntimeError('The stream is closed.')
        batch, errors_of_rows = self._started.pop(t)
        for _ in range(self._size):
            error = threads.get(errors_of_rows)
            if error is not None:
                raise error
        return batch[0]

    def close(self):
        """Abandons all batches and ends the threads, unless one hangs in a read."""
        self.closed = True
        for _ in self._threads:
            self._tasks.put(None)
        until = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            if thread is not threading.current_thread():  # which may collect an open stream
                thread.join(max(0.0, until - time.monotonic()))

    def _start(self):
        self._tasks = queue.SimpleQueue()
        for i in range(self._num_threads):
            # A daemon, since others are joined at the end of the program, before `close`.
            thread = threading.Thread(target=self._work, name=f'ssl_jax-loader-{i}', daemon=True)
            thread.start()
            self._threads.append(thread)

    def _work(self):
        while self._fill(self._tasks.get()):
            pass

    def _fill(self, task):
        """Loads a row into its batch; a function, as a thread that waits must hold no batch."""
        if task is None:
            return False
        t, row, batch, errors_of_rows = task
        error = None
        try:
            if self.closed:
                raise RuntimeError('The stream is closed.')
            sample = self._samples[t * self._size + row]
            if not batch:  # other threads may append theirs too: the first counts
                batch.append({k: _rows_like(v, self._size) for k, v in sample.items()})
            if sample.keys() != batch[0].keys():
                raise ValueError(f'A batch has {[*batch[0]]}, but one of its rows {[*sample]}.')
            for name, value in sample.items():
                batch[0][name][row] = value
        except BaseException as e:  # whatever it is, the consumer must not wait for this row
            error = e
        errors_of_rows.put(error)
        return True


def _rows_like(value, size):
    """An array of `size` such values, in pages that return to the system when it is deleted.

    Malloc would take it from the arena of one of many threads, and each arena keeps what it had.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    pages = mmap.mmap(-1, max(1, size * value.nbytes), flags=flags)
    return np.ndarray((size, *value.shape), value.dtype, pages)


def _start_worker(parent, address, *_):
    """Makes the worker stop with the stream or trainer, and keeps it off its accelerator."""
    alive = multiprocessing.connection.Client(address, 'AF_UNIX')
    threading.Thread(target=_stop_with, args=(alive, parent), daemon=True).start()
    os.environ['JAX_PLATFORMS'] = 'cpu'
    if 'jax' in sys.modules:  # Grain imports it, without touching a device
        sys.modules['jax'].config.update('jax_platforms', 'cpu')


def _stop_with(alive, parent):
    """Abandons the batches in work when the stream is closed; ends with the trainer's process.

    Grain would wait for these batches. Linux has PR_SET_PDEATHSIG for the second, but sends it at
    the end of the *thread* that started the worker, and that thread may be short-lived.
    """
    with contextlib.suppress(EOFError, OSError):
        alive.recv_bytes()  # nothing is sent: it returns when the other end is gone
    Batches.closed = True
    while os.getppid() == parent:
        time.sleep(0.1)
    os._exit(1)
