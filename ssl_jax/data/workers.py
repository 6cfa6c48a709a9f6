# SPDX-License-Identifier: Apache-2.0
"""What a loader process needs before it may start, and while it runs."""

import functools
import os
import sys
import threading
import time

from absl import flags


def cores():
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()


def make_start():
    """The function that each worker runs first; call it in the trainer.

    Also marks absl's flags as parsed where nobody did (notebooks, pytest): Grain reads one of them
    when it starts a process.
    """
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    return functools.partial(_start, os.getpid())


def _start(parent, *_):
    """Makes the worker die with the trainer, and keeps it off the trainer's accelerator."""
    threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    os.environ['JAX_PLATFORMS'] = 'cpu'
    if 'jax' in sys.modules:  # Grain imports it, without touching a device.
        sys.modules['jax'].config.update('jax_platforms', 'cpu')


def _die_with(parent):
    """Ends this process within a second of its parent, however the parent ended.

    Linux could do it with PR_SET_PDEATHSIG, but that signal comes when the *thread* that started
    the worker ends, and the first batch may well be fetched in a thread that does not last.
    """
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
