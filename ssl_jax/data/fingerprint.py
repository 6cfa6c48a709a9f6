# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of data sets: strings that differ where the images do."""

import contextlib
import os
import stat
from collections.abc import Sequence
from typing import Any

import numpy as np

from ssl_jax.data import files, host
from ssl_jax.run import hashing, storage

SAMPLE, BEGINNING = 64, 2**16  # files, and bytes of each, that are read


def of_files(kind: str, paths: Sequence[str], *more: Any) -> str:
    """'CONTENT+TIMES': digests of what files hold, as far as that costs little, and of their times.

    CONTENT is of sizes and the beginnings of `SAMPLE` files, evenly spread; a copy on another disk
    has the same. TIMES is of the times of change, which a copy may lose. Files in a bucket have
    neither sizes nor times here, as each would be a request.

    Args:
      kind, more: other parts of CONTENT, such as names.
      paths: the files, in order.
    """
    stats = [_size_and_time(path) for path in paths if not storage.is_remote(path)]
    sizes, times = zip(*stats, strict=True) if stats else ((), ())
    beginnings = (_beginning(paths[i]) for i in spread(len(paths), SAMPLE))
    return f'{hashing.digest(kind, *more, *sizes, *beginnings)}+{hashing.digest(*times)}'


def content(fingerprint: str) -> str:
    """The part of a fingerprint that a copy of the images has too."""
    return fingerprint.partition('+')[0]


def spread(n: int, count: int) -> list[int]:
    """At most `count` of 0 ... n - 1, evenly spread, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, n - 1, min(count, n))})


def _size_and_time(path):
    """(-1, -1) of what is no readable file."""
    with contextlib.suppress(OSError):
        found = os.stat(path)
        if stat.S_ISREG(found.st_mode):
            return found.st_size, found.st_mtime_ns
    return -1, -1


def _beginning(path):
    try:
        return files.read_bytes(path, BEGINNING)
    except (OSError, host.DecodeError):  # an image that cannot be read is no reason not to start
        return b''
