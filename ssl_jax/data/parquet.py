# SPDX-License-Identifier: Apache-2.0
"""Images in Parquet files in Hugging Face layout.

Parquet has no fast access to one row: a row group must be read and decompressed whole. So the
*encoded* image bytes are held as Arrow: in memory if they are small, else, and those of a bucket,
in an Arrow file that is written once and memory-mapped. Decoded images are never kept.
"""

import bisect
import functools
import json
import os
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ssl_jax.data import files, fingerprint, shards
from ssl_jax.run import bucket, errors, launch, storage, threads

# Encoded bytes up to here stay in memory (per process); CIFAR-10 has 19 MB, ImageNet 140 GB.
MEMORY_BYTES = 2 << 30
AT_ONCE = 16  # files, or row groups of one, that are read from a bucket at once,
AHEAD_BYTES = 1 << 30  # if the groups are not too large for that

_IMAGE_NAMES = ('image', 'img', 'jpg', 'jpeg', 'png', 'webp', 'picture', 'pixel_values', 'images')
_PATH_NAMES = ('file_name', 'filename', 'file', 'path', 'filepath', 'image_path', 'image_file')
_LABEL_NAMES = ('label', 'labels', 'fine_label', 'target', 'class', 'cls')


class Parquet:
    """One Parquet file, a glob, or a folder of shards.

    The image column is struct(bytes, path), raw bytes, or paths; where `bytes` is null, `path` is
    read. Paths are relative to the Parquet file, or absolute. Class names come from the Hugging
    Face metadata, else from `classes.txt` beside the file, else they are the numbers, see
    `files.classes_of`; a column of strings has its own. A label that is null or below 0 is missing;
    a data set without any (a hidden test set) counts as unlabelled.

    Args:
      path: file, glob, or folder (searched recursively), on a disk or in a bucket.
      split: for a folder, take the files of this split: train.parquet, train-00000-of-00005.parquet
        or train/0000.parquet; 'all' takes every file. Without it a folder of several splits gives
        that of `purpose`.
      image_column, label_column: default: the metadata's, else the usual names.
      cache_dir: where the Arrow file of a large data set, or of one in a bucket, goes; default
        ~/.cache/ssl_jax.
      purpose: what the images are for, see `splits.PURPOSES`.
    """

    @files.one_listing()
    def __init__(
        self,
        path: str | os.PathLike,
        split: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        cache_dir: str | None = None,
        purpose: str = 'train',
    ):
        choices = shards.expand(path, split, '.parquet', purpose)
        for choice in (*choices, choices[0]):  # the first if none has labels
            self.files = names = choice[0]
            metadata = _each(_metadata, names)
            schemas = [m.schema.to_arrow_schema() for m in metadata]
            features = _features(schemas, names)
            self._image = image_column or _image_column(schemas[0], features, names[0])
            self._label = label_column or _label_column(schemas, features)
            _check_columns(self._image, label_column, schemas, names)
            if self._label == self._image:
                self._label = None
            self.labels, self.classes, said = self._read_labels(schemas, features)
            if len(choices) == 1 or self.labels is not None:
                break
        self.notes = (*choice[1], *said)
        self._ends = np.cumsum([m.num_rows for m in metadata]).tolist()
        if not self._ends[-1]:
            raise errors.UserError(f'{self.files[0]} has no rows: give a file with images.')
        self.fingerprint = fingerprint.of_files(
            'parquet', self.files, *map(os.path.basename, self.files), *self._ends
        )
        self._cache, in_bucket = None, storage.is_remote(self.files[0])
        kind = _image_kind(schemas[0].field(self._image).type)
        self.remote = in_bucket and kind == 'paths'
        self._size = sum(_image_bytes(m, self._image) for m in metadata)
        if in_bucket or self._size > MEMORY_BYTES:
            cache_dir = cache_dir or os.path.expanduser('~/.cache/ssl_jax')
            self._cache = os.path.join(cache_dir, f'{self.fingerprint}-{self._image}.arrow')
        self._load()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> dict:
        i = range(len(self))[i]
        chunk = bisect.bisect_right(self._chunk_ends, i)
        row = i - (self._chunk_ends[chunk - 1] if chunk else 0)
        data = self._values[chunk][row].as_py()
        if data is None:
            value = self._chunks[chunk][row].as_py()
            data = value.get('path') if isinstance(value, dict) else None
        if not isinstance(data, bytes):
            data = self._read_beside(i, data)
        item = {'image': data}
        if self.labels is not None:
            item['label'] = int(self.labels[i])
        return item

    def _read_beside(self, i, path):
        if not path:
            return b''
        if not path.startswith(('gs://', 's3://')):
            file = self.files[bisect.bisect_right(self._ends, i)]
            path = os.path.join(os.path.dirname(file), path.removeprefix('file://'))
        return files.read_bytes(path)

    def describe(self, i: int) -> str:
        file = bisect.bisect_right(self._ends, i)
        row = i - (self._ends[file - 1] if file else 0)
        return f'{files.printable(self.files[file])} row {row}'

    def __getstate__(self):
        # A worker process opens the files again: nothing large is sent to it.
        opened = ('_chunks', '_values', '_chunk_ends')
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
            column = [_column(f, self._image) for f in self.files]
            self._chunks = [chunk for c in column for chunk in c.chunks]
        self._values = [_field(c) for c in self._chunks]
        self._chunk_ends = np.cumsum([len(c) for c in self._chunks]).tolist()

    def _write_cache(self):
        launch.show(f'Writing {self._cache}, once, for random access to {self.files[0]} ...')
        folder = os.path.dirname(self._cache)
        os.makedirs(folder, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < self._size:
            raise errors.UserError(
                f'{folder} has {free / 2**30:.1f} GiB free, and a copy of the images of '
                f'{self.files[0]} ... takes {self._size / 2**30:.1f} GiB: set cache_dir '
                f'(data.train.cache_dir=DIR) to a larger disk, or give ArrayRecord files, which '
                f'need no copy.'
            )
        schema = pa.schema([_open(self.files[0]).schema_arrow.field(self._image)])
        with (
            storage.atomic_file(self._cache) as temporary,  # two processes may both write
            pa.OSFile(temporary, 'wb') as sink,
            pa.ipc.new_file(sink, schema) as writer,
        ):
            for file in self.files:
                for batch in _batches(file, self._image):
                    column = batch.column(0).cast(schema.types[0])
                    writer.write_batch(pa.RecordBatch.from_arrays([column], [self._image]))

    def _read_labels(self, schemas, features):
        """(int32 labels, class names, sentences for the log); None twice without labels."""
        if self._label is None:
            return None, None, []
        columns, kinds = _each(functools.partial(_column, name=self._label), self.files), {}
        for k, (file, schema) in enumerate(zip(self.files, schemas, strict=True)):
            if self._label in schema.names:
                columns[k] = _plain(columns[k])
                kinds.setdefault(_label_kind(columns[k]), file)
        kinds.pop('nothing', None)
        if not kinds:
            return None, None, []
        if len(kinds) > 1:
            (one, first), (two, second), *_ = kinds.items()
            raise errors.UserError(
                f'The column {self._label!r} holds {one} in {first} and {two} in {second}: write '
                f'all files alike, or name another label_column.'
            )
        kind = next(iter(kinds))
        if kind not in ('text', 'bool', 'numbers'):
            return None, None, [f'no labels: the column {self._label!r} holds {kind}']
        to = pa.large_string() if kind == 'text' else pa.int64()
        labels = pa.chunked_array([chunk for c in columns for chunk in c.cast(to).chunks], to)
        if kind == 'text':
            found = pc.unique(labels).to_pylist()
            names = sorted(name for name in found if name)
            labels = pc.index_in(labels, pa.array(names, to))
        else:
            names = features.get(self._label, {}).get('names')
            names = names or files.read_class_names(self.files[0])
            names = names or (['False', 'True'] if kind == 'bool' else None)
        return files.classes_of(labels.fill_null(-1).to_numpy(), names)


def _each(function, shards):
    """[function(file) for each file], some at once in a bucket, which answers late."""
    return list(threads.at_once(function, shards, AT_ONCE if storage.is_remote(shards[0]) else 1))


def _open(file, metadata=None):
    """A pq.ParquetFile on a disk or in a bucket."""
    where = bucket.Ranges(file, files.size_and_stamp(file)[0]) if storage.is_remote(file) else file
    return pq.ParquetFile(where, metadata=metadata, pre_buffer=storage.is_remote(file))


def _column(file, name):
    """A column of a file; nulls if it has none of that name."""
    opened = _open(file)
    if name not in opened.schema_arrow.names:
        return pa.chunked_array([pa.nulls(opened.metadata.num_rows)])
    return opened.read(columns=[name]).column(0)


def _batches(file, name):
    """A column of a file in batches; in a bucket the row groups are read ahead, some at once."""
    opened = _open(file)
    if not storage.is_remote(file):
        yield from opened.iter_batches(64, columns=[name])
        return

    def read(group):
        return _open(file, opened.metadata).read_row_group(group, columns=[name])

    groups = range(opened.num_row_groups)
    largest = max((opened.metadata.row_group(g).total_byte_size for g in groups), default=1)
    count = max(1, min(AT_ONCE, AHEAD_BYTES // max(1, largest)))
    for table in threads.at_once(read, groups, count):
        yield from table.to_batches(64)


def _metadata(file):
    try:
        return _open(file).metadata
    except pa.ArrowInvalid as e:
        reason = str(e).split('\n')[0].rstrip('.')
        raise errors.UserError(f'{file} is not a readable Parquet file: {reason}.') from None


def _features(schemas, shards):
    """Hugging Face's description of the columns: {column: {'_type': 'Image', ...}}."""
    known = {}
    for schema, file in zip(schemas, shards, strict=True):
        raw = (schema.metadata or {}).get(b'huggingface')
        try:
            features = json.loads(raw)['info']['features'] if raw else {}
        except (ValueError, KeyError, TypeError):
            features = {}
        for column, value in features.items():
            if not isinstance(value, dict):
                continue
            if known.setdefault(column, value).get('names') != value.get('names'):
                raise errors.UserError(
                    f'{shards[0]} and {file} name the classes of {column!r} differently: labels '
                    f'would not mean the same.'
                )
    return known


def _image_column(schema, features, file):
    tagged = [k for k, v in features.items() if v.get('_type') == 'Image' and k in schema.names]
    if tagged:
        return tagged[0]
    kinds = {f.name: _image_kind(f.type) for f in schema}
    held = [n for n, kind in kinds.items() if kind in ('bytes', 'structs')]
    paths = [n for n in (*_IMAGE_NAMES, *_PATH_NAMES) if kinds.get(n) == 'paths']
    usual = [n for n in _IMAGE_NAMES if n in held]
    odd = [n for n in _IMAGE_NAMES if n in schema.names]  # `_check_columns` says what is odd
    if usual or len(held) == 1:
        return (usual or held)[0]
    if not held and (paths or odd):
        return (paths or odd)[0]
    raise errors.UserError(
        f'Cannot tell which column of {file} holds the images: set image_column to one of '
        f'{", ".join(schema.names)}.'
    )


def holds_images(file: str) -> bool:
    """Whether a column of a Parquet file may hold images."""
    try:
        schema = _metadata(file).schema.to_arrow_schema()
        image = _image_column(schema, _features([schema], [file]), file)
        _check_columns(image, None, [schema], [file])
    except errors.UserError:
        return False
    return True


def _image_kind(kind):
    """'bytes', 'structs', 'paths', or what else a column of this type holds."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_struct(kind):
        fields = {f.name for f in kind} & {'bytes', 'path'}
        return 'structs' if fields else str(kind)
    if _is_text(kind):
        return 'paths'
    is_bytes = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary)
    return 'bytes' if any(test(kind) for test in is_bytes) else str(kind)


def _is_text(kind):
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _check_columns(image, label, schemas, shards):
    """Raises unless every file has the image column, of one kind that can be read."""
    first = None
    for schema, file in zip(schemas, shards, strict=True):
        if image not in schema.names:
            hint = errors.nearest(image, schema.names)
            raise errors.UserError(f'There is no column {image!r} in {file}{hint}')
        kind = _image_kind(schema.field(image).type)
        if kind not in ('bytes', 'structs', 'paths'):
            raise errors.UserError(
                f'The column {image!r} of {file} holds {kind}: give one image in each row, as the '
                f'bytes of an image file or as its path.'
            )
        first = first or kind
        if kind != first:
            raise errors.UserError(
                f'The column {image!r} holds {first} in {shards[0]} and {kind} in {file}: write '
                f'all files alike.'
            )
        if kind == 'paths' and file == shards[0]:
            _check_path(image, file)
    names = {name for schema in schemas for name in schema.names}
    if label and label not in names:
        hint = errors.nearest(label, sorted(names))
        raise errors.UserError(f'There is no column {label!r} in {shards[0]}{hint}')


def _check_path(column, file):
    """Raises where the first text in the column is no path."""
    for batch in _open(file).iter_batches(64, columns=[column]):
        text = next((x for x in batch.column(0).to_pylist() if x), None)
        if text is None:
            continue
        if re.match(r'(https?|ftp)://', text):
            raise errors.UserError(
                f'The column {column!r} of {file} holds addresses ({text[:60]}): download the '
                f'images and give their paths.'
            )
        if len(text) > 1000 or text.startswith('data:') or not os.path.splitext(text)[1]:
            raise errors.UserError(
                f'The column {column!r} of {file} holds text that is no path of an image '
                f'({text[:30]!r}): give the bytes of the image files (base64 decoded) or paths.'
            )
        return


def _field(column):
    """The bytes or paths of a column; null where they are in the other field of a struct."""
    # as_py() of a struct builds a dict and takes 20 us, of its bytes 2 us.
    if not pa.types.is_struct(column.type):
        return column
    names = [f.name for f in column.type]
    return column.field('bytes' if 'bytes' in names else 'path')


def _plain(column):
    """A column without a dictionary, with nulls for NaN."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), None, column)
    return column


def _label_kind(column):
    """'text', 'bool', 'numbers', 'nothing', or what else a column of labels holds."""
    kind = column.type
    if column.null_count == len(column):
        return 'nothing'
    if _is_text(kind):
        return 'text'
    if pa.types.is_boolean(kind):
        return 'bool'
    if pa.types.is_floating(kind):  # of pandas, where some are missing
        return 'numbers' if pc.all(pc.equal(pc.round(column), column)).as_py() else 'fractions'
    return 'numbers' if pa.types.is_integer(kind) else str(kind)


def _label_column(schemas, features):
    columns = {name for schema in schemas for name in schema.names}
    tagged = [k for k, v in features.items() if v.get('_type') == 'ClassLabel']
    names = [n for n in (*tagged, *_LABEL_NAMES) if n in columns]
    return names[0] if names else None


def _image_bytes(metadata, column):
    """Uncompressed size of the image column in one file."""
    groups = [metadata.row_group(g).to_dict() for g in range(metadata.num_row_groups)]
    chunks = [chunk for group in groups for chunk in group['columns']]
    images = [c for c in chunks if c['path_in_schema'].split('.')[0] == column]
    return sum(c['total_uncompressed_size'] for c in images)
