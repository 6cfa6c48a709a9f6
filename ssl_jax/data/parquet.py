# SPDX-License-Identifier: Apache-2.0
"""Images in Parquet files in Hugging Face layout, with maps or without."""

import bisect
import functools
import json
import os
import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ssl_jax.data import columns, files, fingerprint, host, local_cache, maps, shards
from ssl_jax.run import errors, hashing, storage, threads

# Encoded bytes up to here stay in memory (per process); CIFAR-10 has 19 MB, ImageNet 140 GB.
MEMORY_BYTES = 2 << 30
_IMAGE_NAMES = ('image', 'img', 'jpg', 'jpeg', 'png', 'webp', 'picture', 'pixel_values', 'images')
_PATH_NAMES = ('file_name', 'filename', 'file', 'path', 'filepath', 'image_path', 'image_file')
_LABEL_NAMES = ('label', 'labels', 'fine_label', 'target', 'class', 'cls')
_MAP_NAMES = {  # of columns with image files
    'segmentation': (
        *('segmentation', 'label_map', 'annotation', 'mask', 'segmentation_map', 'semantic'),
        *('semantic_segmentation', 'label', 'labels', 'annotations', 'masks'),
    ),
    'depth': ('depth', 'depth_map'),
}


class Parquet(maps.WithMaps):
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
      segmentation_column, depth_column: of files with maps; default: the usual names.
      map_classes: names of the classes of the maps in order of their index; default: numbers, or
        without labels `classes.txt`.
      ignore, reduce_zero_label, label_values, depth_scale: see `maps.Meaning`; default, as of
        `map_classes`: what `ssl_jax data pack` has written into the metadata.
      cache_dir: where the Arrow file of a large data set goes, or the row groups of one in a
        bucket; default ~/.cache/ssl_jax.
      cache_gb: 10^9 bytes of row groups at most that are kept of files in a bucket; default half of
        what is free on the disk. The others are read again for each image: pack those images as tar
        or ArrayRecord.
      purpose: what the images are for, see `splits.PURPOSES`.
    """

    @files.one_listing()
    def __init__(
        self,
        path: str | os.PathLike,
        split: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
        segmentation_column: str | None = None,
        depth_column: str | None = None,
        map_classes: Sequence | None = None,
        ignore: int | Sequence[int] | None = None,
        reduce_zero_label: bool | None = None,
        label_values: Sequence[int] | None = None,
        depth_scale: float | None = None,
        cache_dir: str | None = None,
        cache_gb: float | None = None,
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
        cache_dir = cache_dir or os.path.expanduser('~/.cache/ssl_jax')

        self.remote, limit = storage.is_remote(self.files[0]), local_cache.limit_of(cache_gb)

        def held(name):
            size = sum(columns.size_of(m, name) for m in metadata)
            where = os.path.join(cache_dir, f'{self.fingerprint}-{name}')
            if self.remote:
                count = sum(m.num_row_groups for m in metadata)
                cache = local_cache.Cache(where, count, limit)
                if size > cache.limit:
                    self.notes = (*self.notes, _beyond(name, size, cache.limit, metadata))
                return columns.Groups(self.files, name, metadata, cache)
            large = size > MEMORY_BYTES
            column = columns.Column(
                self.files, name, self._ends, f'{where}.arrow' if large else None, size
            )
            column.load()
            return column

        self._images = held(self._image)
        own = _map_columns(schemas, self._image, segmentation_column, depth_column)
        self._kinds = tuple(own)
        self._map_columns = {kind: held(name) for kind, name in own.items()}
        known = _packed(schemas[0])
        map_classes = map_classes or known.get('map_classes')
        self._meaning = maps.Meaning.of(
            known,
            ignore=ignore,
            reduce_zero_label=reduce_zero_label,
            label_values=label_values,
            depth_scale=depth_scale,
        )
        if map_classes is None and own and self.labels is None:
            map_classes = files.read_class_names(self.files[0])
        self._names = self._meaning.names(map_classes)
        if own:
            said = ' and '.join(f'{kind} from the column {name!r}' for kind, name in own.items())
            self.notes = (*self.notes, f'maps: {said}')
            content, plus, times = self.fingerprint.partition('+')
            content = hashing.digest(content, *own.items(), self._meaning.key, self._names)
            self.fingerprint = f'{content}{plus}{times}'

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> dict:
        i = range(len(self))[i]
        item = {'image': self._images.get(i)}
        if self.labels is not None:
            item['label'] = int(self.labels[i])
        return item | self._maps(i)

    def describe(self, i: int) -> str:
        file = bisect.bisect_right(self._ends, i)
        row = i - (self._ends[file - 1] if file else 0)
        return f'{files.printable(self.files[file])} row {row}'

    def _map_file(self, kind, i):
        column = self._map_columns[kind]
        where = f'{self.describe(i)}, column {column.name!r},'
        try:
            data = column.get(i)
        except (FileNotFoundError, host.DecodeError) as e:
            raise errors.UserError(f'{where} names a file that is missing ({e}).') from None
        if not data:
            raise errors.UserError(f'{where} has no map: fill it or leave the row out.')
        return data, where

    def _read_labels(self, schemas, features):
        """(int32 labels, class names, sentences for the log); None twice without labels."""
        if self._label is None:
            return None, None, []
        parts, kinds = _each(functools.partial(columns.read, name=self._label), self.files), {}
        for k, (file, schema) in enumerate(zip(self.files, schemas, strict=True)):
            if self._label in schema.names:
                parts[k] = _plain(parts[k])
                kinds.setdefault(_label_kind(parts[k]), file)
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
        labels = pa.chunked_array([chunk for c in parts for chunk in c.cast(to).chunks], to)
        if kind == 'text':
            found = pc.unique(labels).to_pylist()
            names = sorted(name for name in found if name)
            labels = pc.index_in(labels, pa.array(names, to))
        else:
            names = features.get(self._label, {}).get('names')
            names = names or files.read_class_names(self.files[0])
            names = names or (['False', 'True'] if kind == 'bool' else None)
        return files.classes_of(labels.fill_null(-1).to_numpy(), names)


def _beyond(name, size, limit, metadata):
    """A sentence on a column in a bucket that the cache cannot hold."""
    rows, groups = (sum(getattr(m, n) for m in metadata) for n in ('num_rows', 'num_row_groups'))
    return (
        f'column {name!r} has {size / 1e9:.3g} GB, of which {limit / 1e9:.3g} GB are kept here '
        f'(cache_gb); for each other image {rows / groups:.0f} are read: pack them as tar shards, '
        f'or give more disk'
    )


def _each(function, shards):
    """[function(file) for each file], some at once in a bucket, which answers late."""
    return list(
        threads.at_once(function, shards, columns.AT_ONCE if storage.is_remote(shards[0]) else 1)
    )


def _metadata(file):
    try:
        return columns.opened(file).metadata
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


def _packed(schema):
    """What the values of the maps mean, of files of `ssl_jax data pack`; {} of others."""
    try:
        found = json.loads((schema.metadata or {})[b'ssl_jax'])['maps']
    except (KeyError, ValueError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _map_columns(schemas, image, segmentation, depth):
    """{'segmentation': column, 'depth': column} of those that there are."""
    kinds, found = {f.name: _image_kind(f.type) for f in schemas[0]}, {}
    for kind, named in (('segmentation', segmentation), ('depth', depth)):
        usual = [n for n in _MAP_NAMES[kind] if kinds.get(n) in ('bytes', 'structs') and n != image]
        name = named or next(iter(usual), None)
        if name is None:
            continue
        for schema in schemas:
            if name not in schema.names:
                hint = errors.nearest(name, schema.names)
                raise errors.UserError(f'There is no column {name!r} in every file{hint}')
        if kinds[name] not in ('bytes', 'structs', 'paths'):
            raise errors.UserError(
                f'The column {name!r} holds {kinds[name]}: give one map in each row, as the bytes '
                f'of an image file or as its path.'
            )
        found[kind] = name
    return found


def _image_column(schema, features, file):
    kinds = {f.name: _image_kind(f.type) for f in schema}
    of_maps = {name for names in _MAP_NAMES.values() for name in names}
    held = [n for n, kind in kinds.items() if kind in ('bytes', 'structs')]
    held = [n for n in held if n not in of_maps] or held
    tagged = [k for k, v in features.items() if v.get('_type') == 'Image' and k in schema.names]
    tagged = [n for n in tagged if n not in of_maps] or tagged
    if tagged:
        return tagged[0]
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
    for batch in columns.opened(file).iter_batches(64, columns=[column]):
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
    known = {f.name: f.type for schema in schemas for f in schema}
    tagged = [k for k, v in features.items() if v.get('_type') == 'ClassLabel']
    names = [n for n in (*tagged, *_LABEL_NAMES) if n in known]
    maps_of = [n for n in names if n in _MAP_NAMES['segmentation']]
    maps_of = [n for n in maps_of if _image_kind(known[n]) in ('bytes', 'structs')]
    names = [n for n in names if n not in maps_of]
    return names[0] if names else None
