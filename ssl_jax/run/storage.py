# SPDX-License-Identifier: Apache-2.0
"""Local and remote paths; atomic files and folders.

A remote path has a scheme (``gs://bucket/run``), see `bucket`. Writes of whole files are atomic
there, so nothing is renamed.
"""

import contextlib
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator

from etils import epath

from ssl_jax.run import bucket


def is_remote(path: epath.PathLike) -> bool:
    """Whether the path is in a bucket.

    Raises:
      UserError: it has a scheme that is misspelled or unknown.
    """
    return bool(bucket.scheme(path))


def absolute(path: epath.PathLike) -> epath.Path:
    """The path for Orbax: absolute if local, unchanged in a bucket."""
    return epath.Path(path if is_remote(path) else os.path.abspath(path))


def atomic_write(path: epath.PathLike, data: str | bytes) -> None:
    """Writes a file, and its folder if needed; a crash leaves the old file or the new one."""
    data = data.encode() if isinstance(data, str) else data
    if is_remote(path):
        return bucket.write(path, data)
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as target:
        pathlib.Path(target).write_bytes(data)


def read(path: epath.PathLike) -> bytes:
    """The content of a file.

    Raises:
      FileNotFoundError: it is absent.
    """
    return bucket.read(path) if is_remote(path) else pathlib.Path(path).read_bytes()


def read_lines(path: epath.PathLike) -> list[str]:
    """Lines of a text file, [] if it is absent; bytes that are not UTF-8 become U+FFFD."""
    try:
        return read(path).decode(errors='replace').splitlines()
    except FileNotFoundError:
        return []


@contextlib.contextmanager
def atomic_file(path: epath.PathLike) -> Iterator[str]:
    """``with atomic_file(PATH) as temporary:`` write to `temporary`; it becomes the local PATH."""
    temporary = f'{path}.{secrets.token_hex(4)}.tmp'  # hosts that share a disk may share pids
    try:
        yield temporary
        with open(temporary, 'rb') as file:
            os.fsync(file)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


@contextlib.contextmanager
def atomic_folder(target: str | os.PathLike) -> Iterator[pathlib.Path]:
    """``with atomic_folder(DIR) as folder:`` fill `folder`; at the end it becomes DIR.

    A folder at DIR is replaced; it stays as it was if the block or the move fails.
    """
    target = pathlib.Path(os.path.abspath(target))
    partial = target.parent / f'.{target.name}.{os.getpid()}.partial'
    old = target.parent / f'.{target.name}.{os.getpid()}.old'
    partial.mkdir(parents=True)
    try:
        yield partial
        if target.exists():
            target.rename(old)
        try:
            partial.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
