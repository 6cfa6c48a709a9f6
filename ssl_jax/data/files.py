# SPDX-License-Identifier: Apache-2.0
"""Files of a data set: existence, shards, names of images and classes."""

import contextlib
import glob
import os
import pathlib
import stat
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from ssl_jax.run import errors, hashing, storage

EXTENSIONS = (
    *('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff', '.gif'),
    *('.jpe', '.jfif', '.ppm', '.pgm', '.avif'),
)


SAMPLE, BEGINNING = 64, 2**16  # files and bytes of each that a fingerprint reads


def require(path: str) -> None:
    """Raises FileNotFoundError, with the nearest name that exists, if `path` does not exist."""
    if os.path.exists(path):
        return
    parent = os.path.dirname(os.path.abspath(path))
    while not os.path.isdir(parent):
        path, parent = parent, os.path.dirname(parent)
    hint = errors.nearest(os.path.basename(path), sorted(os.listdir(parent)), f' in {parent}')
    raise FileNotFoundError(f'{path} does not exist{hint}')


def printable(path: str) -> str:
    """A file name as valid Unicode, whatever bytes it has on disk."""
    return os.fsencode(path).decode('utf-8', 'replace')


def expand(path: str | os.PathLike, split: str | None, suffix: str) -> list[str]:
    """Sorted files of a sharded data set: a file, a glob, or a folder (then `suffix`, `split`)."""
    path = os.fspath(path)
    if storage.is_remote(path):
        raise errors.UserError(
            f'{path} is remote: copy *{suffix} files to a disk, or mount the bucket.'
        )
    if glob.has_magic(path):
        files = sorted(glob.glob(path, recursive=True))
        if not files:
            raise FileNotFoundError(f'No file matches {path}: check the pattern.')
        return files
    require(path)
    if os.path.isfile(path):
        return [path]
    names = glob.glob(f'**/*{suffix}*', root_dir=path, recursive=True)
    names = sorted(name for name in names if os.path.isfile(os.path.join(path, name)))
    if not names:
        raise FileNotFoundError(f'There is no *{suffix} file in {path}: check the path.')
    chosen = [name for name in names if not split or _is_of_split(name, split)]
    if not chosen:
        hint = errors.nearest(split, names)
        raise FileNotFoundError(f'No file of split {split!r} in {path}{hint}')
    return [os.path.join(path, name) for name in chosen]


def _is_of_split(name, split):
    """train.parquet, train-00000-of-00005.parquet, data-train.array_record, train/0000.parquet"""
    *folders, file = name.split('/')
    return split in folders or split in file.split('.')[0].split('-')


def read_bytes(path: str) -> bytes:
    """The content of a local or remote file."""
    if storage.is_remote(path):
        return epath.Path(path).read_bytes()
    with open(path, 'rb') as f:
        return f.read()


def fingerprint(kind: str, paths: Sequence[str], *more: Any) -> str:
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


def same_content(a: str, b: str) -> bool:
    """Whether two fingerprints differ in nothing but times of change."""
    return a.partition('+')[0] == b.partition('+')[0]


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
    if not storage.is_remote(path) and _size_and_time(path)[0] < 0:
        return b''
    try:
        with epath.Path(path).open('rb') as file:
            return file.read(BEGINNING)
    except OSError:  # an image that cannot be read is no reason not to start
        return b''


def class_names(labels: np.ndarray | None, classes: Sequence | None = None) -> tuple | None:
    """Names in label order: `classes` if given, else '0' ... 'max'; None without labels."""
    if labels is None:
        return None
    highest = int(labels.max(initial=-1))
    if classes is None:
        return tuple(str(c) for c in range(highest + 1))
    if highest >= len(classes):
        raise errors.UserError(
            f'Label {highest} has no name: there are {len(classes)} class names, '
            f'{highest + 1} or more are needed.'
        )
    return tuple(str(c) for c in classes)


def read_class_names(file: str) -> list[str] | None:
    """The lines of `classes.txt` beside `file`, or None if there is none."""
    path = pathlib.Path(file).with_name('classes.txt')
    if not path.exists():
        return None
    return [line.strip() for line in path.read_text('utf-8').split('\n') if line.strip()]
