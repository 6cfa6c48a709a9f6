# SPDX-License-Identifier: Apache-2.0
"""What the readers of weights share: tensors in a file, and limits that keep broken files cheap.

What a file says of itself is held against its size before anything is allocated.
"""

import contextlib
import dataclasses
import io
import math
import pathlib
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from ssl_jax.run import errors

DIRECTORY_BYTES = 1 << 20  # of a zip archive: 46 and its name per member; read in 0.5 s
DIMENSIONS = 64  # of a tensor; numpy has no more


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in its file: shape, dtype in the file, function that reads it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


def show(name: Any) -> str:
    """A name or error of a file in a sentence: on one line, not too long."""
    text = ''.join(c if c.isprintable() else '?' for c in str(name)[:100])
    return text if len(text) < 100 else f'{text}...'


def check_file(path: pathlib.Path) -> int:
    """Bytes of a file on a disk; refuses others, since opening a pipe waits for its other end."""
    if not path.is_file():
        what = 'a folder' if path.is_dir() else 'a pipe, a socket or a device'
        raise errors.UserError(f'{path} is {what} and not a file; give a file of weights.')
    return path.stat().st_size


def check_shape(shape: tuple[int, ...], dtype: np.dtype, limit: int) -> None:
    """Raises ValueError if no array of `limit` bytes has this shape."""
    if len(shape) > DIMENSIONS:
        raise ValueError(f'a tensor of {len(shape)} dimensions')
    # Nor an empty one, of which numpy counts the other dimensions.
    size = math.prod(n for n in shape if n) * dtype.itemsize
    if any(n < 0 for n in shape) or size > (limit if all(shape) else 2**62):
        raise ValueError(f'a tensor of shape {show(shape)} and {dtype} in {limit} bytes')


class _Directory(io.BufferedReader):
    """A file whose directory zipfile reads at once; refused if that would take long."""

    def read(self, size=-1):
        if size > DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f'a directory of {size:,} bytes')
        return super().read(size)


@contextlib.contextmanager
def open_zip(path: pathlib.Path) -> Iterator[zipfile.ZipFile]:
    """``with open_zip(path) as archive:`` opens a zip archive to read from.

    Raises:
      BadZipFile: it is damaged, in whichever way, or has too many members.
    """
    with _Directory(io.FileIO(path)) as file:
        try:
            archive = zipfile.ZipFile(file)
        except Exception as error:  # zipfile trusts the numbers of its directory
            raise zipfile.BadZipFile(show(error)) from error
        with archive:
            yield archive
