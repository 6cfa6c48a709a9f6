# SPDX-License-Identifier: Apache-2.0
"""Images in Parquet files in Hugging Face layout.

Parquet has no fast access to one row: a row group must be read and decompressed whole. So the
*encoded* image bytes are held as Arrow: in memory if they are small, else in an Arrow file that is
written once and memory-mapped. Decoded images are never kept.
"""

import bisect
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ssl_jax.data import files
from ssl_jax.run import errors, storage

# Encoded bytes up to here stay in memory (per process); CIFAR-10 has 19 MB, ImageNet 140 GB.
MEMORY_BYTES = 2 << 30

_IMAGE_NAMES = ('image', 'img', 'jpg', 'jpeg', 'png', 'webp', 'picture', 'pixel_values')
_LABEL_NAMES = ('label', 'labels', 'fine_label', 'target', 'class', 'cls')


class Parquet:
    """One Parquet file, a glob, or a folder of shards.

    The image column is struct(bytes, path) or raw bytes; where `bytes` is null, `path` is read,
    relative to the Parquet file. Class names come from the Hugging Face metadata, else from
    `classes.txt` beside the file, else they are the numbers; a column of strings has its own.
    A data set whose labels are all -1 (a hidden test set) counts as unlabelled.

    Args:
      path: file, glob, or folder (searched recursively).
      split: for a folder, take the files of this split: train.parquet, train-00000-of-00005.parquet
        or train/0000.parquet.
      image_column, label_column: default: the metadata's, else the usual names.
      cache_dir: where the Arrow file of a large data set goes; default ~/.cache/ssl_jax.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        split: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        cache_dir: str | None = None,
    ):
        self.files = files.expand(path, split, '.parquet')
        metadata = [_metadata(f) for f in self.files]
        schema = metadata[0].schema.to_arrow_schema()
        features = _features(schema)
        self._image = image_column or _image_column(schema, features, self.files[0])
        self._label = label_column or _label_column(schema, features)
        for column in filter(None, (self._image, self._label)):
            if column not in schema.names:
                hint = errors.nearest(column, schema.names)
                raise errors.UserError(f'There is no column {column!r} in {self.files[0]}{hint}')
        if self._label == self._image:
            self._label = None
        self._ends = np.cumsum([m.num_rows for m in metadata]).tolist()
        if not self._ends[-1]:
            raise errors.UserError(f'{self.files[0]} has no rows: give a file with images.')
        names = map(os.path.basename, self.files)
        self.fingerprint = files.fingerprint('parquet', self.files, *names, *self._ends)
        self._labels, self.classes = self._read_labels(features)
        self._cache = None
        if sum(_image_bytes(m, self._image) for m in metadata) > MEMORY_BYTES:
            cache_dir = cache_dir or os.path.expanduser('~/.cache/ssl_jax')
            self._cache = os.path.join(cache_dir, f'{self.fingerprint}-{self._image}.arrow')
        self._load()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> dict:
        i = range(len(self))[i]
        chunk = bisect.bisect_right(self._chunk_ends, i)
        row = i - (self._chunk_ends[chunk - 1] if chunk else 0)
        data = self._bytes[chunk][row].as_py()
        if data is None:
            data = self._read_beside(i, self._chunks[chunk][row].as_py())
        item = {'image': data}
        if self._labels is not None:
            item['label'] = int(self._labels[i])
        return item

    def _read_beside(self, i, value):
        path = value.get('path') if isinstance(value, dict) else None
        if not path:
            return b''
        file = self.files[bisect.bisect_right(self._ends, i)]
        return files.read_bytes(os.path.join(os.path.dirname(file), path))

    def describe(self, i: int) -> str:
        file = bisect.bisect_right(self._ends, i)
        row = i - (self._ends[file - 1] if file else 0)
        return f'{files.printable(self.files[file])} row {row}'

    def __getstate__(self):
        # A worker process opens the files again: nothing large is sent to it.
        opened = ('_chunks', '_bytes', '_chunk_ends')
        return {k: v for k, v in self.__dict__.items() if k not in opened}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._load()

    def _load(self):
        if self._cache:
            if not os.path.exists(self._cache):
                self._write_cache()
            # The batches hold the map; it lives as long as they do.
            reader = pa.ipc.open_file(pa.memory_map(self._cache))
            batches = [reader.get_batch(k) for k in range(reader.num_record_batches)]
            self._chunks = [b.column(0) for b in batches]
        else:
            column = [pq.read_table(f, columns=[self._image]).column(0) for f in self.files]
            self._chunks = [chunk for c in column for chunk in c.chunks]
        # as_py() of a struct builds a dict and takes 20 us, of its bytes 2 us.
        structs = pa.types.is_struct(self._chunks[0].type)
        self._bytes = [c.field('bytes') for c in self._chunks] if structs else self._chunks
        self._chunk_ends = np.cumsum([len(c) for c in self._chunks]).tolist()

    def _write_cache(self):
        print(f'Writing {self._cache}, once, for random access to {self.files[0]} ...', flush=True)
        os.makedirs(os.path.dirname(self._cache), exist_ok=True)
        schema = pa.schema([pq.read_schema(self.files[0]).field(self._image)])
        with (
            storage.atomic_file(self._cache) as temporary,  # two processes may both write
            pa.OSFile(temporary, 'wb') as sink,
            pa.ipc.new_file(sink, schema) as writer,
        ):
            for file in self.files:
                for batch in pq.ParquetFile(file).iter_batches(64, columns=[self._image]):
                    writer.write_batch(pa.RecordBatch.from_arrays([batch.column(0)], [self._image]))

    def _read_labels(self, features):
        if self._label is None:
            return None, None
        columns = [pq.read_table(f, columns=[self._label]).column(0) for f in self.files]
        labels = pa.chunked_array([chunk for c in columns for chunk in c.chunks])
        if pa.types.is_string(labels.type) or pa.types.is_large_string(labels.type):
            values = np.array(labels.to_pylist(), dtype=object)
            names, labels = np.unique(values.astype(str), return_inverse=True)
            return labels.astype(np.int32), tuple(names.tolist())
        if not pa.types.is_integer(labels.type):
            return None, None  # boxes, captions, regression targets: not classes
        labels = labels.fill_null(-1).to_numpy().astype(np.int32)
        if (labels < 0).all():
            return None, None
        names = features.get(self._label, {}).get('names')
        names = names or files.read_class_names(self.files[0])
        return labels, files.class_names(labels, names)


def _metadata(file):
    try:
        return pq.ParquetFile(file).metadata
    except pa.ArrowInvalid as e:
        reason = str(e).split('\n')[0].rstrip('.')
        raise errors.UserError(f'{file} is not a readable Parquet file: {reason}.') from None


def _features(schema):
    """Hugging Face's description of the columns: {column: {'_type': 'Image', ...}}."""
    raw = (schema.metadata or {}).get(b'huggingface')
    try:
        features = json.loads(raw)['info']['features'] if raw else {}
    except (ValueError, KeyError, TypeError):
        features = {}
    return {k: v for k, v in features.items() if isinstance(v, dict)}


def _image_column(schema, features, file):
    tagged = [k for k, v in features.items() if v.get('_type') == 'Image' and k in schema.names]
    if tagged:
        return tagged[0]
    usual = [n for n in _IMAGE_NAMES if n in schema.names and _holds_bytes(schema.field(n).type)]
    binary = [f.name for f in schema if _holds_bytes(f.type)]
    if usual or len(binary) == 1:
        return (usual or binary)[0]
    raise errors.UserError(
        f'Cannot tell which column of {file} holds the images: set image_column to one of '
        f'{", ".join(schema.names)}.'
    )


def _holds_bytes(kind):
    if pa.types.is_struct(kind):
        return kind.get_field_index('bytes') >= 0
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _label_column(schema, features):
    tagged = [k for k, v in features.items() if v.get('_type') == 'ClassLabel']
    names = [n for n in (*tagged, *_LABEL_NAMES) if n in schema.names]
    return names[0] if names else None


def _image_bytes(metadata, column):
    """Uncompressed size of the image column in one file."""
    groups = [metadata.row_group(g).to_dict() for g in range(metadata.num_row_groups)]
    chunks = [chunk for group in groups for chunk in group['columns']]
    images = [c for c in chunks if c['path_in_schema'].split('.')[0] == column]
    return sum(c['total_uncompressed_size'] for c in images)
