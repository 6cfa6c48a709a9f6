# SPDX-License-Identifier: Apache-2.0
"""Objects in buckets: ``gs://`` and ``s3://``, one request per call where the service allows it.

`gcs` is the file system behind ``gs://``: it tries again during outages and raises `Unavailable`
after ten minutes. ``s3://`` is s3fs, whose botocore tries again by itself.
"""

import concurrent.futures
import contextlib
import datetime
import email.utils
import io
import json
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import fsspec

from ssl_jax.run import errors

PAGE = 5000  # objects asked for in one request of a listing; the service may give fewer
CHUNK = 64 << 20  # bytes of a large object that are read at once
EXTRAS = {'gs': ('gcsfs', 'gcs'), 's3': ('s3fs', 's3')}  # scheme: (module, extra of ssl_jax)

for _name in ('gs', 'gcs'):  # imported at the first use
    fsspec.register_implementation(_name, 'ssl_jax.run.gcs.GCSFileSystem', clobber=True)


class Object(NamedTuple):
    """An object of a listing."""

    name: str  # relative to the root of the listing
    size: int
    stamp: str  # changes when the object is written anew


class Seen(NamedTuple):
    """An object as it was at one moment."""

    data: bytes
    stamp: str  # for `swap`
    age: float  # seconds since it was written, by the clock of the service


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

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def write(path: str | os.PathLike, data: bytes) -> None:
    """Writes an object; readers see the old one or the new one."""
    path = os.fspath(path)
    if scheme(path) == 'gs' and len(data) < CHUNK:
        _post(path, data)
    else:
        file_system(path).pipe_file(path, data)


def _post(path, data, **conditions):
    """One upload, with the name of the object in its address; what the service says of it."""
    system, name, key = _parts(path)
    url = f'{system._location}/upload/storage/v1/b/{name}/o'
    more = dict(name=key, uploadType='media', json_out=True, **conditions)
    return system.call('POST', url, data=data, **more)


def look(path: str | os.PathLike) -> Seen | None:
    """The object of gs:// at `path`, None if it is absent."""
    system, name, key = _parts(os.fspath(path))
    try:
        headers, text = system.call('GET', 'b/{}/o/{}', name, key)
        info = json.loads(text)
        now = email.utils.parsedate_to_datetime(headers['Date'])
        age = (now - datetime.datetime.fromisoformat(info['updated'])).total_seconds()
        more = dict(alt='media', generation=info['generation'])
        data = system.call('GET', 'b/{}/o/{}', name, key, **more)[1]
        return Seen(data, info['generation'], max(age, 0.0))
    except FileNotFoundError:
        return None


def _parts(path):
    """(file system, bucket, name of the object)."""
    name, _, key = path.partition('://')[2].partition('/')
    return file_system(path), name, key


def swap(path: str | os.PathLike, data: bytes, stamp: str) -> str:
    """Writes an object of gs:// if it still has `stamp`, which the service decides.

    Args:
      path: of the object.
      data: must differ between writers, and from what is there.
      stamp: of `look` or of an earlier `swap`; '' if the object must be absent.

    Returns:
      The new stamp; '' if nothing was written.
    """
    path = os.fspath(path)
    try:
        return _post(path, data, ifGenerationMatch=stamp or '0')['generation']
    except FileExistsError:  # maybe of a second try, when the answer to the first was lost
        seen = look(path)
    return seen.stamp if seen and seen.data == data else ''


def remove(path: str | os.PathLike, stamp: str = '') -> None:
    """Deletes an object; nothing if it is absent.

    Args:
      path: of the object.
      stamp: of an object of gs://, which stays if it has another one by now; '' deletes any.
    """
    path = os.fspath(path)
    system, name, key = _parts(path)
    with contextlib.suppress(FileNotFoundError, FileExistsError):
        if stamp:
            system.call('DELETE', 'b/{}/o/{}', name, key, ifGenerationMatch=stamp)
        else:
            system.rm_file(path)


def upload(file: str | os.PathLike, path: str | os.PathLike) -> None:
    """Writes the content of a local file to an object, in parts if it is large."""
    path = os.fspath(path)
    file_system(path).put_file(os.fspath(file), path)


def download(path: str | os.PathLike, size: int, file: str | os.PathLike) -> None:
    """Writes an object of `size` bytes to a local file, in parts: each is tried again alone."""
    path = os.fspath(path)
    system = file_system(path)
    with open(file, 'wb') as out:
        for start in range(0, size, CHUNK):
            out.write(system.cat_file(path, start=start, end=min(start + CHUNK, size)))


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


def files(folder: str | os.PathLike) -> list[Object]:
    """`walk` of the objects directly in a folder."""
    base = os.fspath(folder).rstrip('/').partition('://')[2] + '/'
    found = {info['name']: info for info in _listed(folder) if info.get('type') == 'file'}
    keys = (key for key in sorted(found) if key.startswith(base) and not key.endswith('/'))
    return [_object(key[len(base) :], found[key]) for key in keys]


def names(folder: str | os.PathLike) -> list[str]:
    """Names directly below a folder, sorted: of its objects and of its folders; [] if absent."""
    base = os.fspath(folder).rstrip('/').partition('://')[2] + '/'
    keys = {info['name'].rstrip('/') for info in _listed(folder)}
    return sorted(key[len(base) :] for key in keys if key.startswith(base))


def _listed(folder):
    """What fsspec knows of what is directly in a folder."""
    folder = os.fspath(folder).rstrip('/')
    try:
        return file_system(folder).ls(folder, detail=True)
    except FileNotFoundError:
        return []


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
    system, name, _ = _parts(path)
    try:
        if scheme(path) == 'gs':
            system.call('GET', 'b/{}/o', name, maxResults=1, json_out=True)
        else:
            system.call_s3('list_objects_v2', Bucket=name, MaxKeys=1)
    except FileNotFoundError as error:
        raise errors.UserError(
            f'{path}: there is no bucket {name!r}; create it or check its name.'
        ) from error
    except errors.UserError:
        raise
    except Exception as error:  # of botocore, which has dozens
        lines = ' '.join(str(error).split())[:300]
        raise errors.UserError(
            f'{path} cannot be listed ({type(error).__name__}: {lines}); check its name and the '
            f'credentials of this machine.'
        ) from error
