# SPDX-License-Identifier: Apache-2.0
"""Fingerprints of data sets: strings that differ where the images do."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ssl_jax.data import files, host
from ssl_jax.run import hashing, threads

SAMPLE, BEGINNING = 64, 2**16  # files, and bytes of each, that are read


def of_files(kind: str, paths: Sequence[str], *more: Any) -> str:
    """'CONTENT+TIMES': digests of what files hold, as far as that costs little, and of their times.

    CONTENT is of sizes and the beginnings of `SAMPLE` files, evenly spread; a copy on another disk
    or in a bucket has the same. TIMES is of the times of change, which a copy may lose; of objects
    in a bucket of their generations.

    Args:
      kind, more: other parts of CONTENT, such as names.
      paths: the files, in order.
    """
    sizes, times = zip(*map(files.size_and_stamp, paths), strict=True)
    sample = spread(len(paths), SAMPLE)
    beginnings = threads.at_once(lambda i: _beginning(paths[i], sizes[i]), sample, 16)
    return f'{hashing.digest(kind, *more, *sizes, *beginnings)}+{hashing.digest(*times)}'


def content(fingerprint: str) -> str:
    """The part of a fingerprint that a copy of the images has too."""
    return fingerprint.partition('+')[0]


def spread(n: int, count: int) -> list[int]:
    """At most `count` of 0 ... n - 1, evenly spread, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, n - 1, min(count, n))})


def _beginning(path, size):
    try:
        return files.read_bytes(path, min(size, BEGINNING)) if size > 0 else b''
    except (OSError, host.DecodeError):  # an image that cannot be read is no reason not to start
        return b''
