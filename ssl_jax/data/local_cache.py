# SPDX-License-Identifier: Apache-2.0
"""Bytes that were read from a bucket, kept on a local disk up to a limit, also for later starts.

Training reads every image once per epoch in another order, so nothing is ever evicted: what was
kept first is as likely to be needed next as anything else.
"""

import contextlib
import fcntl
import mmap
import os
import shutil
import threading
import zlib
from typing import Any

import msgpack
import numpy as np

from ssl_jax.data import maps
from ssl_jax.run import errors, launch

FREE = 0.5  # of the disk that is free, taken where no limit is given


class Cache:
    """Items 0 ... n - 1 as bytes; several threads and processes may share it.

    PATH.bytes has the items one after another, PATH.index a row of int64 for each: place, size and
    CRC-32. A row is written after its bytes, and a kill in between leaves the item unkept.

    Args:
      path: beginning of the names of both files; changes when the items change.
      n: number of items.
      limit: bytes, None: half of what is free on the disk.
    """

    def __init__(self, path: str, n: int, limit: int | None):
        if limit is None:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            limit = int(FREE * shutil.disk_usage(os.path.dirname(path)).free)
            with contextlib.suppress(FileNotFoundError):
                limit += os.path.getsize(f'{path}.bytes')
        self.path, self.limit, self._n = path, limit, n
        self._opened, self._lock = None, threading.Lock()

    def __reduce__(self):
        return Cache, (self.path, self._n, self.limit)

    def _open(self):
        with self._lock:
            if self._opened is None:
                os.makedirs(os.path.dirname(self.path), exist_ok=True)
                file = os.open(f'{self.path}.bytes', os.O_RDWR | os.O_CREAT, 0o644)
                index = os.open(f'{self.path}.index', os.O_RDWR | os.O_CREAT, 0o644)
                os.truncate(index, 24 * max(1, self._n))  # zeros where it was shorter
                rows = mmap.mmap(index, 24 * max(1, self._n))
                os.close(index)
                self._rows = np.frombuffer(rows, np.int64).reshape(-1, 3)
                self._checked = np.zeros(self._n, bool)
                self._map, self._opened = None, file
        return self._opened

    def get(self, i: int) -> memoryview | None:
        """The item, mapped from the disk; None if it is not kept."""
        file = self._open()
        start, size, crc = self._rows[i].tolist()
        if not size:
            return None
        with self._lock:
            if self._map is None or len(self._map) < start + size:
                end = os.fstat(file).st_size
                if end < start + size:  # shortened by somebody
                    return None
                self._map = mmap.mmap(file, end, prot=mmap.PROT_READ)
            data = memoryview(self._map)[start : start + size]
        if not self._checked[i]:
            if zlib.crc32(data) != crc:
                return None
            self._checked[i] = True
        return data

    def put(self, i: int, data: bytes) -> None:
        """Keeps an item if there is room."""
        if not 0 < len(data) <= self.limit:
            return
        file = self._open()
        with self._lock:
            fcntl.flock(file, fcntl.LOCK_EX)  # of other processes
            try:
                start = os.fstat(file).st_size
                if start + len(data) > self.limit:
                    return
                os.truncate(file, start + len(data))
                at = start
                while at < start + len(data):
                    at += os.pwrite(file, memoryview(data)[at - start :], at)
                self._rows[i, 0], self._rows[i, 2] = start, zlib.crc32(data)
                self._rows[i, 1] = len(data)  # last: now it counts
            except OSError as error:  # a full disk ends no run
                launch.say(f'{self.path}: nothing more is kept ({error.strerror}).')
                self.limit = 0
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)


def limit_of(gigabytes: float | None) -> int | None:
    """Bytes of `cache_gb`.

    Raises:
      UserError: it is negative.
    """
    if gigabytes is not None and not gigabytes >= 0:
        raise errors.UserError(f'cache_gb={gigabytes} must be 0 or more: 10^9 bytes on the disk.')
    return None if gigabytes is None else int(gigabytes * 1e9)


class Kept:
    """A source in a bucket whose images are kept on a local disk once they were read.

    Args:
      source: see `sources`; its maps are read from the bucket each time.
      cache: of as many items as it has images.
    """

    def __init__(self, source: Any, cache: Cache):
        self._source, self._images, self._cache = source, maps.images_only(source), cache
        self.labels, self.classes = getattr(source, 'labels', None), source.classes

    def __getattr__(self, name):
        if name.startswith('_'):
            raise AttributeError(name)
        return getattr(self._source, name)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> dict:
        found = self._cache.get(i)
        item = self._images[i] if found is None else msgpack.unpackb(found)
        if found is None and isinstance(item['image'], bytes):
            self._cache.put(i, msgpack.packb(item))
        if self.labels is not None:  # `sources.in_classes` may have moved them
            item['label'] = int(self.labels[i])
        has_maps = self._source is not self._images
        return item | self._source._maps(i) if has_maps else item

    def without_maps(self) -> 'Kept':
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__, _source=self._images)
        return new


def keep(source: Any, folder: str | None, gigabytes: float) -> Any:
    """The source, with its images kept on a local disk if it is in a bucket."""
    limit = limit_of(gigabytes)
    if not getattr(source, 'remote', False) or not limit:
        return source
    folder = folder or os.path.expanduser('~/.cache/ssl_jax')
    return Kept(source, Cache(os.path.join(folder, source.fingerprint), len(source), limit))
