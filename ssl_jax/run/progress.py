# SPDX-License-Identifier: Apache-2.0
"""Lines on how far a long pass is, and how long the rest takes."""

import threading
import time
from collections.abc import Callable

from ssl_jax.run import metrics

SECONDS = 10  # between two lines


class Progress:
    """Counts things, from any thread, and logs a line now and then.

    Args:
      total: of the pass.
      log: called with a line.
      what: is counted.
    """

    def __init__(self, total: int, log: Callable[[str], None], what: str = 'images'):
        self._total, self._log, self._what = total, log, what
        self._lock = threading.Lock()
        self._done, self._began = 0, time.monotonic()
        self._shown = self._began

    def add(self, count: int = 1) -> None:
        """Counts what is done."""
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now - self._shown < SECONDS or self._done >= self._total:
                return
            self._shown = now
            rate = self._done / (now - self._began)
            left = metrics.duration((self._total - self._done) / rate)
            of = f'{self._done:,} of {self._total:,} {self._what}'
            self._log(f'{of}, {rate:,.0f}/s, {left} left')
