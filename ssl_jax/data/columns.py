# SPDX-License-Identifier: Apache-2.0
"""A column of encoded images in Parquet files, with access to each row.

Parquet has no fast access to one row: a row group must be read and decompressed whole. So the
*encoded* image bytes are held as Arrow: in memory if they are small, else in an Arrow file that is
written once and memory-mapped. Of files in a bucket each row group is read when one of its rows is
needed first, and kept on the disk up to a limit. Decoded images are never kept.
"""

import bisect
import os
import shutil
import threading
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ssl_jax.data import files, local_cache
from ssl_jax.run import bucket, errors, launch, storage

AT_ONCE = 16  # files of a bucket whose metadata or labels are read at once


class Column:
    """A column of struct(bytes, path), raw bytes, or paths; where `bytes` is null, `path` is read.

    Paths are relative to the Parquet file, or absolute.

    Args:
      shards: the Parquet files.
      name: of the column.
      ends: number of rows up to the end of each file.
      cache: an Arrow file to hold the bytes in; None: memory.
      size: of the bytes.
    """

    def __init__(self, shards: list[str], name: str, ends: list[int], cache: str | None, size: int):
        self.name = name
        self._files, self._ends, self._cache, self._size = shards, ends, cache, size
        self._chunks, self._lock = None, threading.Lock()

    def get(self, i: int) -> bytes:
        """The content of the image file of row `i`, empty if there is none."""
        if self._chunks is None:
            self.load()
        chunk, row = _place(self._chunk_ends, i)
        file = self._files[bisect.bisect_right(self._ends, i)]
        return _content(self._chunks[chunk], self._values[chunk], row, file)

    def __getstate__(self):
        # A worker process opens the files again: nothing large is sent to it.
        opened = ('_chunks', '_values', '_chunk_ends', '_lock')
        return {k: v for k, v in self.__dict__.items() if k not in opened}

    def __setstate__(self, state):
        self.__dict__.update(state, _chunks=None, _lock=threading.Lock())

    def load(self) -> None:
        """Opens the files, once; `get` does so too."""
        with self._lock:
            if self._chunks is None:
                self._load()

    def _load(self):
        if self._cache:
            if not os.path.exists(self._cache):
                self._write_cache()
            # The batches hold the map; it lives as long as they do.
            reader = pa.ipc.open_file(pa.memory_map(self._cache))
            batches = [reader.get_batch(k) for k in range(reader.num_record_batches)]
            chunks = [b.column(0) for b in batches]
        else:
            column = [read(f, self.name) for f in self._files]
            chunks = [chunk for c in column for chunk in c.chunks]
        self._values = [_field(c) for c in chunks]
        self._chunk_ends = np.cumsum([len(c) for c in chunks]).tolist()
        self._chunks = chunks

    def _write_cache(self):
        first = self._files[0]
        launch.show(f'Writing {self._cache}, once, for random access to {first} ...')
        folder = os.path.dirname(self._cache)
        os.makedirs(folder, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < self._size:
            raise errors.UserError(
                f'{folder} has {free / 2**30:.1f} GiB free, and a copy of the images of '
                f'{first} ... takes {self._size / 2**30:.1f} GiB: set cache_dir '
                f'(data.train.cache_dir=DIR) to a larger disk, or give ArrayRecord files, which '
                f'need no copy.'
            )
        schema = pa.schema([opened(first).schema_arrow.field(self.name)])
        with (
            storage.atomic_file(self._cache) as temporary,  # two processes may both write
            pa.OSFile(temporary, 'wb') as sink,
            pa.ipc.new_file(sink, schema) as writer,
        ):
            for file in self._files:
                for batch in opened(file).iter_batches(64, columns=[self.name]):
                    column = batch.column(0).cast(schema.types[0])
                    writer.write_batch(pa.RecordBatch.from_arrays([column], [self.name]))


class Groups:
    """A `Column` of files in a bucket, of which nothing is read before it is needed.

    Args:
      shards, name: see `Column`.
      metadata: of the files.
      cache: of as many items as there are row groups in all files.
    """

    def __init__(self, shards: list[str], name: str, metadata: list, cache: local_cache.Cache):
        self.name, self._files, self._cache = name, shards, cache
        self._groups = [(f, g) for f, m in enumerate(metadata) for g in range(m.num_row_groups)]
        rows = [metadata[f].row_group(g).num_rows for f, g in self._groups]
        self._ends, self._metadata = np.cumsum(rows).tolist(), metadata
        self._locks = _locks()

    def __getstate__(self):
        return {k: v for k, v in self.__dict__.items() if k not in ('_metadata', '_locks')}

    def __setstate__(self, state):
        self.__dict__.update(state, _metadata=[None] * len(state['_files']), _locks=_locks())

    def get(self, i: int) -> bytes:
        """The content of the image file of row `i`, empty if there is none."""
        group, row = _place(self._ends, i)
        column = self._read(group)
        return _content(column, _field(column), row, self._files[self._groups[group][0]])

    def _read(self, group):
        """The column of a row group."""
        with self._locks[group % len(self._locks)]:  # not twice by two threads
            data = self._cache.get(group)
            if data is None:
                at, number = self._groups[group]
                file = opened(self._files[at], self._metadata[at])
                self._metadata[at] = file.metadata
                table = file.read_row_group(number, columns=[self.name]).combine_chunks()
                data = _stream(table)
                self._cache.put(group, data)
        return pa.ipc.open_stream(pa.py_buffer(data)).read_all().column(0).chunk(0)


def _locks():
    return [threading.Lock() for _ in range(256)]


def _stream(table):
    """A table as an Arrow stream."""
    out = pa.BufferOutputStream()
    with pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    return memoryview(out.getvalue())


def _place(ends, i):
    """(chunk, row in it) of row `i`, where chunks end at `ends`."""
    chunk = bisect.bisect_right(ends, i)
    return chunk, i - (ends[chunk - 1] if chunk else 0)


def _content(chunk, values, row, file):
    """The bytes in a row of a column, or of the file that it names; empty without either.

    Args:
      chunk, values: the rows, and their bytes or paths, see `_field`.
      row: number in both.
      file: the Parquet file, which paths are relative to.
    """
    data = values[row].as_py()
    if data is None:
        value = chunk[row].as_py()
        data = value.get('path') if isinstance(value, dict) else None
    if isinstance(data, bytes) or not data:
        return data or b''
    if not data.startswith(('gs://', 's3://')):
        data = os.path.join(os.path.dirname(file), data.removeprefix('file://'))
    return files.read_bytes(data)


def opened(file: str, metadata: Any = None) -> pq.ParquetFile:
    """A Parquet file on a disk or in a bucket."""
    where = bucket.Ranges(file, files.size_and_stamp(file)[0]) if storage.is_remote(file) else file
    return pq.ParquetFile(where, metadata=metadata, pre_buffer=storage.is_remote(file))


def read(file: str, name: str) -> pa.ChunkedArray:
    """A column of a file; nulls if it has none of that name."""
    file = opened(file)
    if name not in file.schema_arrow.names:
        return pa.chunked_array([pa.nulls(file.metadata.num_rows)])
    return file.read(columns=[name]).column(0)


def size_of(metadata: pq.FileMetaData, column: str) -> int:
    """Uncompressed size of a column in one file."""
    groups = [metadata.row_group(g).to_dict() for g in range(metadata.num_row_groups)]
    chunks = [chunk for group in groups for chunk in group['columns']]
    images = [c for c in chunks if c['path_in_schema'].split('.')[0] == column]
    return sum(c['total_uncompressed_size'] for c in images)


def _field(column):
    """The bytes or paths of a column; null where they are in the other field of a struct."""
    # as_py() of a struct builds a dict and takes 20 us, of its bytes 2 us.
    if not pa.types.is_struct(column.type):
        return column
    names = [f.name for f in column.type]
    return column.field('bytes' if 'bytes' in names else 'path')
