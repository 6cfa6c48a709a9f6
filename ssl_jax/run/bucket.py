# SPDX-License-Identifier: Apache-2.0
"""Objects in buckets: ``gs://`` and ``s3://``, one request per call where the service allows it.

`gcs` is the file system behind ``gs://``: it tries again during outages and raises `Unavailable`
after ten minutes. ``s3://`` is s3fs, whose botocore tries again by itself.
"""

import concurrent.futures
import contextlib
import io
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import fsspec

from ssl_jax.run import errors

PAGE = 5000  # objects asked for in one request of a listing; the service may give fewer
EXTRAS = {'gs': ('gcsfs', 'gcs'), 's3': ('s3fs', 's3')}  # scheme: (module, extra of ssl_jax)

for _name in ('gs', 'gcs'):  # imported at the first use
    fsspec.register_implementation(_name, 'ssl_jax.run.gcs.GCSFileSystem', clobber=True)


class Object(NamedTuple):
    """An object of a listing."""

    name: str  # relative to the root of the listing
    size: int
    stamp: str  # changes when the object is written anew


def scheme(path: str | os.PathLike) -> str:
    """'gs' of gs://bucket/run, '' of a local path.

    Raises:
      UserError: a scheme without its two slashes (gs:/run is a local path by accident), or one that
        is not supported.
    """
    path = os.fspath(path)
    found = re.match(r'([A-Za-z][A-Za-z0-9+.-]+):(/{0,2})', path)
    if not found or (not found[2] and found[1].lower() not in EXTRAS) or os.path.exists(path):
        return ''
    name, slashes = found[1].lower(), found[2]
    rest = path[found.end() :].lstrip('/')
    if name not in EXTRAS:
        if slashes != '//':
            return ''
        known = ' and '.join(f'{s}://' for s in EXTRAS)
        raise errors.UserError(f'{path}: {name}:// is not supported; use a local path, {known}.')
    if slashes != '//' or found[1] != name or not rest or path[found.end() :] != rest:
        hint = f'{name}://{rest}' if rest else f'{name}://BUCKET/FOLDER'
        raise errors.UserError(f'{path} names no object in a bucket: did you mean {hint}?')
    return name


def file_system(path: str | os.PathLike) -> Any:
    """The fsspec file system of a remote path.

    Raises:
      UserError: the extra is not installed, or the scheme is unknown.
    """
    name = scheme(path)
    errors.extra(*EXTRAS[name])
    more = {'finalize_on_close': True} if name == 'gs' else {'use_listings_cache': False}
    return fsspec.filesystem('gcs' if name == 'gs' else name, **more)  # as etils asks for it


def read(path: str | os.PathLike, size: int | None = None, start: int = 0) -> bytes:
    """The content of an object, or `size` bytes of it, in one request.

    Raises:
      FileNotFoundError: it is absent.
    """
    path = os.fspath(path)
    limits = (start, start + size) if size else (None, None)
    return file_system(path).cat_file(path, start=limits[0], end=limits[1])


class Ranges(io.RawIOBase):
    """An object as a file that can be read at any place; each read is one request.

    Args:
      path: of the object.
      size: of the object.
    """

    def __init__(self, path: str, size: int):
        self._path, self._size, self._at = path, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}
        self._at = base[whence] + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self._at)
        size = left if size is None or size < 0 else min(size, left)
        data = read(self._path, size, self._at) if size else b''
        self._at += len(data)
        return data


def write(path: str | os.PathLike, data: bytes) -> None:
    """Writes an object; readers see the old one or the new one."""
    path = os.fspath(path)
    file_system(path).pipe_file(path, data)


def create(path: str | os.PathLike, data: bytes) -> bool:
    """Writes an object if it is absent, which the service decides; whether it was.

    `data` must differ between writers.
    """
    path = os.fspath(path)
    try:
        file_system(path).pipe_file(path, data, mode='create')
    except FileExistsError:  # or this is a second try and the answer to the first was lost
        return read(path) == data
    return True


def remove(path: str | os.PathLike) -> None:
    """Deletes an object; nothing if it is absent."""
    path = os.fspath(path)
    with contextlib.suppress(FileNotFoundError):
        file_system(path).rm_file(path)


def exists(path: str | os.PathLike) -> bool:
    """Whether there is an object or a folder at `path`; an outage is an error, not False."""
    path = os.fspath(path)
    return file_system(path).exists(path)


def stat(path: str | os.PathLike) -> Object | None:
    """The object at `path`, None if there is none; a folder is none."""
    path = os.fspath(path)
    try:
        info = file_system(path).info(path)
    except FileNotFoundError:
        return None
    return _object('', info) if info['type'] == 'file' else None


def walk(root: str | os.PathLike) -> Iterator[Object]:
    """All objects below `root`, in the order of their names: one request per page of 1,000 or more.

    Nothing if there are none: folders exist only as parts of names. Objects whose names end with a
    slash, which tools create for folders, are left out.
    """
    root = os.fspath(root).rstrip('/')
    prefix = root.partition('://')[2] + '/'
    for key, info in _gs_items(root) if scheme(root) == 'gs' else _s3_items(root):
        if key.startswith(prefix) and not key.endswith('/'):
            yield _object(key[len(prefix) :], info)


def _gs_items(root):
    """gcsfs keeps all fields of all objects, 3 kB of memory each; this has one page at a time."""
    system, (name, _, key) = file_system(root), root.partition('://')[2].partition('/')
    more = {'prefix': f'{key}/' if key else None, 'maxResults': PAGE}
    more['fields'] = 'nextPageToken,items(name,size,generation)'
    while True:
        page = system.call('GET', 'b/{}/o', name, json_out=True, **more)
        for info in page.get('items', ()):
            yield f'{name}/{info["name"]}', info
        if not page.get('nextPageToken'):
            return
        more['pageToken'] = page['nextPageToken']


def _s3_items(root):
    found = file_system(root).find(root, detail=True)
    yield from ((key, found[key]) for key in sorted(found) if found[key].get('type') == 'file')


def _object(name, info):
    stamp = info.get('generation') or info.get('ETag') or info.get('mtime') or ''
    return Object(name, int(info.get('size') or 0), str(stamp))


def names(folder: str | os.PathLike) -> list[str]:
    """Names directly below a folder, sorted: of its objects and of its folders; [] if absent."""
    folder = os.fspath(folder).rstrip('/')
    try:
        found = file_system(folder).ls(folder, detail=False)
    except FileNotFoundError:
        return []
    base = folder.partition('://')[2]
    keys = {key.rstrip('/') for key in found}
    return sorted({key[len(base) + 1 :] for key in keys if key.startswith(base + '/')})


def copy(folder: str | os.PathLike, target: str | os.PathLike) -> None:
    """Copies all objects below `folder`; the service does it, no byte comes here."""
    folder, target = os.fspath(folder).rstrip('/'), os.fspath(target).rstrip('/')
    system = file_system(folder)
    _each(lambda o: system.cp_file(f'{folder}/{o.name}', f'{target}/{o.name}'), walk(folder))


def remove_folder(folder: str | os.PathLike, first: str = '') -> None:
    """Deletes all objects below `folder`, the one named `first` before the others."""
    folder = os.fspath(folder).rstrip('/')
    found = list(walk(folder))
    if first in [o.name for o in found]:
        remove(f'{folder}/{first}')
    _each(lambda o: remove(f'{folder}/{o.name}'), found)


def _each(call, items):
    """Calls `call` for each item, several at a time."""
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(call, items))


def require(path: str | os.PathLike) -> None:
    """Raises a UserError if the bucket of `path` does not exist or may not be listed."""
    path = os.fspath(path)
    system, name = file_system(path), path.partition('://')[2].partition('/')[0]
    try:
        if scheme(path) == 'gs':
            system.call('GET', 'b/{}/o', name, maxResults=1, json_out=True)
        else:
            system.ls(name)
    except FileNotFoundError as error:
        raise errors.UserError(
            f'{path}: there is no bucket {name!r}; create it or check its name.'
        ) from error
