# SPDX-License-Identifier: Apache-2.0
"""A column of encoded images in Parquet files, with access to each row.

Parquet has no fast access to one row: a row group must be read and decompressed whole. So the
*encoded* image bytes are held as Arrow: in memory if they are small, else, and those of a bucket,
in an Arrow file that is written once and memory-mapped. Decoded images are never kept.
"""

import bisect
import os
import shutil
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ssl_jax.data import files
from ssl_jax.run import bucket, errors, launch, storage, threads

AT_ONCE = 16  # files, or row groups of one, that are read from a bucket at once,
AHEAD_BYTES = 1 << 30  # if the groups are not too large for that


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
        chunk = bisect.bisect_right(self._chunk_ends, i)
        row = i - (self._chunk_ends[chunk - 1] if chunk else 0)
        data = self._values[chunk][row].as_py()
        if data is None:
            value = self._chunks[chunk][row].as_py()
            data = value.get('path') if isinstance(value, dict) else None
        return data if isinstance(data, bytes) else self._read_beside(i, data)

    def _read_beside(self, i, path):
        if not path:
            return b''
        if not path.startswith(('gs://', 's3://')):
            file = self._files[bisect.bisect_right(self._ends, i)]
            path = os.path.join(os.path.dirname(file), path.removeprefix('file://'))
        return files.read_bytes(path)

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
                for batch in batches(file, self.name):
                    column = batch.column(0).cast(schema.types[0])
                    writer.write_batch(pa.RecordBatch.from_arrays([column], [self.name]))


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


def batches(file: str, name: str) -> Iterator[pa.RecordBatch]:
    """A column of a file in batches; in a bucket the row groups are read ahead, some at once."""
    whole = opened(file)
    if not storage.is_remote(file):
        yield from whole.iter_batches(64, columns=[name])
        return

    def read(group):
        return opened(file, whole.metadata).read_row_group(group, columns=[name])

    groups = range(whole.num_row_groups)
    largest = max((whole.metadata.row_group(g).total_byte_size for g in groups), default=1)
    count = max(1, min(AT_ONCE, AHEAD_BYTES // max(1, largest)))
    for table in threads.at_once(read, groups, count):
        yield from table.to_batches(64)


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
