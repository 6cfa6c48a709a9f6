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
import tempfile
from collections.abc import Callable, Iterator

from etils import epath

from ssl_jax.run import bucket, errors


def is_remote(path: epath.PathLike) -> bool:
    """Whether the path is in a bucket.

    Raises:
      UserError: it has a scheme that is misspelled or unknown.
    """
    return bool(bucket.scheme(path))


def require(*paths: epath.PathLike | None) -> None:
    """Asks for the buckets of remote paths, before anything costs time; local paths pass.

    Raises:
      UserError: a bucket does not exist, does not answer or may not be read, an extra is missing,
        or a scheme is misspelled.
    """
    for path in filter(None, paths):
        if is_remote(path):
            bucket.require(path)


def require_workdir(path: epath.PathLike) -> None:
    """`require`, of a workdir.

    Raises:
      UserError: as there, or Orbax cannot save there: 0.12.8 takes s3:// for a local folder.
    """
    if bucket.scheme(path) == 's3':
        raise errors.UserError(
            f'{path} cannot be a workdir, as Orbax saves no checkpoints in s3://; give a local '
            f'folder and copy it there, or one in gs://.'
        )
    require(path)


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


def exists(path: epath.PathLike) -> bool:
    """Whether there is a file or a folder; an outage of a bucket is an error."""
    return bucket.exists(path) if is_remote(path) else os.path.exists(path)


def names(folder: epath.PathLike) -> list[str]:
    """Names directly below a folder, sorted; [] if it is absent."""
    if is_remote(folder):
        return bucket.names(folder)
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def remove(path: epath.PathLike) -> None:
    """Deletes a file; nothing if it is absent."""
    if is_remote(path):
        return bucket.remove(path)
    pathlib.Path(path).unlink(missing_ok=True)


def remove_folder(folder: epath.PathLike) -> None:
    """Deletes a folder with all that is in it."""
    if not is_remote(folder):
        return shutil.rmtree(folder)
    bucket.remove_folder(folder)


@contextlib.contextmanager
def atomic_file(path: epath.PathLike) -> Iterator[str]:
    """``with atomic_file(PATH) as temporary:`` write to the local `temporary`; it becomes PATH."""
    if is_remote(path):
        with tempfile.TemporaryDirectory(prefix='ssl_jax_') as folder:
            yield f'{folder}/file'
            bucket.upload(f'{folder}/file', path)
        return
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
def atomic_folder(target: epath.PathLike) -> Iterator[pathlib.Path]:
    """``with atomic_folder(DIR) as folder:`` fill the local `folder`; at the end it becomes DIR.

    A folder at DIR is replaced; it stays as it was if the block or the move fails. In a bucket its
    objects are replaced one by one.
    """
    if is_remote(target):
        with tempfile.TemporaryDirectory(prefix='ssl_jax_') as folder:
            yield pathlib.Path(folder)
            _upload(pathlib.Path(folder), os.fspath(target).rstrip('/'))
        return
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


def _upload(folder, target):
    """Makes `target` in a bucket equal to a local folder."""
    before = {found.name for found in bucket.walk(target)}
    files = [p for p in sorted(folder.rglob('*')) if p.is_file()]
    names = [p.relative_to(folder).as_posix() for p in files]
    for path, name in zip(files, names, strict=True):
        bucket.upload(path, f'{target}/{name}')
    for name in sorted(before - {*names}):
        bucket.remove(f'{target}/{name}')


def mirror(folder: epath.PathLike, local: pathlib.Path, keep: Callable = lambda name: True) -> None:
    """Files in `local` for those directly in a folder of a bucket: empty ones of the same sizes.

    So that code for disks chooses among them; the content of a chosen one comes with `fetch`.

    Args:
      folder: in a bucket.
      local: an empty folder.
      keep: of a name, whether to make a file for it.
    """
    for found in bucket.files(folder):
        if keep(found.name):
            with open(local / found.name, 'wb') as file:
                file.truncate(found.size)  # takes no space


def fetch(folder: epath.PathLike, path: pathlib.Path) -> None:
    """Fills a file that `mirror` made."""
    bucket.download(f'{os.fspath(folder).rstrip("/")}/{path.name}', path.stat().st_size, path)
