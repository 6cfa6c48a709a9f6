# SPDX-License-Identifier: Apache-2.0
"""Images in ArrayRecord files, read directly or through TFDS (which needs no TensorFlow for it).

ArrayRecord's own reader takes files in Google's buckets too: one request per record.
"""

import functools
import os
import re
from collections.abc import Sequence
from typing import NamedTuple

import msgpack
import numpy as np

from ssl_jax.data import files, fingerprint, host, shards
from ssl_jax.run import bucket, errors, hashing, patience, storage, threads


class _Records(NamedTuple):
    """Records of a file, as ArrayRecord wants it said."""

    filename: str
    skip: int
    take: int
    examples_in_shard: int


class ArrayRecord:
    """ArrayRecord files whose records are images.

    A record is either an encoded image (the bytes of a JPEG, PNG, ... file) or a msgpack map
    {'image': such bytes, 'label': int}. Labels need names, from `classes` or from `classes.txt`
    beside the first file; without names they are not read.

    Args:
      path: file, glob, or folder (searched recursively), on a disk or in a bucket.
      split: for a folder, take the files of this split: train.array_record, ...
      classes: names in label order.
      purpose: chooses the split if `split` does not, see `splits.PURPOSES`.
    """

    @files.one_listing()
    def __init__(
        self,
        path: str,
        split: str | None = None,
        classes: Sequence | None = None,
        purpose: str = 'train',
    ):
        module = errors.extra('array_record.python.array_record_data_source', 'arrayrecord')
        self.files, self.notes = shards.expand(path, split, '.array_record', purpose)[0]
        self.remote = storage.is_remote(self.files[0])
        if bucket.scheme(self.files[0]) == 's3':
            raise errors.UserError(
                f'{path}: ArrayRecord files are read from a disk or from gs://, not from s3://: '
                'copy them to a disk.'
            )
        folder = os.path.dirname(self.files[0])
        if files.exists(os.path.join(folder, 'features.json')):
            raise errors.UserError(
                f'{folder} was written by TensorFlow Datasets: read it with source=tfds, '
                'name=<data set> and path=<data_dir>.'
            )
        counts = list(threads.at_once(_count, self.files, 16))
        if not sum(counts):
            raise errors.UserError(f'{self.files[0]} has no records: give a file with images.')
        # With their numbers, or it would open all again, and take one that it cannot for empty.
        self._records = module.ArrayRecordDataSource(
            [_Records(f, 0, n, n) for f, n in zip(self.files, counts, strict=True)]
        )
        names = classes or files.read_class_names(self.files[0])
        labelled = names and 'label' in _unpack(_read(self._records, 0, self.files[0]))
        self.classes = tuple(str(n) for n in names) if labelled else None
        names = map(os.path.basename, self.files)
        self.fingerprint = fingerprint.of_files('array_record', self.files, *names, len(self))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> dict:
        item = _unpack(_read(self._records, i, self.files[0]))
        if self.classes is None:
            item.pop('label', None)
        return item

    def describe(self, i: int) -> str:
        more = ' ...' if len(self.files) > 1 else ''
        return f'{files.printable(self.files[0])}{more} record {i}'


def _count(file):
    """The number of records in a file."""
    module = errors.extra('array_record.python.array_record_module', 'arrayrecord')

    def count():
        reader = module.ArrayRecordReader(file)
        found = reader.num_records()
        if not found and not reader.ok():  # a file that it cannot open is empty to it
            reader.read([0])  # says why
        return found

    try:
        return _translated(count, file)
    except host.DecodeError as e:
        raise errors.UserError(f'{file} is no readable ArrayRecord file: {e}.') from None


def _read(records, i, file):
    """Record i; waits while a bucket does not answer."""
    return _translated(functools.partial(records.__getitem__, i), file)


def _translated(call, file):
    """call(), with the errors of ArrayRecord, all RuntimeErrors, as what they stand for.

    Raises:
      DecodeError: the record is damaged.
      FileNotFoundError: the file, or one beside it, is gone.
      OSError: a disk does not answer.
      UserError: a bucket did not answer for longer than the patience.
    """

    def translated():
        try:
            return call()
        except RuntimeError as e:
            reason = ' '.join(str(e).split())
            if re.search('Corrupted|should be at least', reason):
                raise host.DecodeError(reason) from e
            absent = re.search('Not Found|No such file', reason)
            raise (FileNotFoundError if absent else OSError)(reason) from e

    if not storage.is_remote(file):
        return translated()
    return patience.patiently(file, translated, 'start again when the bucket answers')


def _unpack(record):
    """dict(image=bytes[, label=int]) of a record."""
    # A msgpack map of 1 to 15 entries begins with 0x81 ... 0x8f; so does PNG, with 0x89.
    if 0x81 <= record[0] <= 0x8F and record[:4] != b'\x89PNG':
        return msgpack.unpackb(record)
    return {'image': record}


class Tfds:
    """A data set that TensorFlow Datasets has prepared as ArrayRecord or Parquet.

    Args:
      name: e.g. 'imagenet2012', 'imagenet2012:5.1.0'.
      path: TFDS' data_dir, on a disk or in a bucket; default ~/tensorflow_datasets.
      split: e.g. 'train', 'train[:10%]'.
    """

    def __init__(self, name: str, path: str | None = None, split: str = 'train'):
        tfds = errors.extra('tensorflow_datasets', 'tfds')
        where = f'in {path or "~/tensorflow_datasets"}'
        try:
            builder = tfds.builder(name, data_dir=path)
        except tfds.core.DatasetNotFoundError:
            hint = errors.nearest(name, _prepared(path) or tfds.list_builders())
            raise errors.UserError(f'TFDS has no data set {name!r} {where}{hint}') from None
        if not builder.data_path.exists():
            raise FileNotFoundError(
                f'The TFDS data set {name!r} is not prepared {where}: run '
                f"tfds.builder({name!r}).download_and_prepare(file_format='array_record') "
                'once, where TensorFlow is installed.'
            )
        features = builder.info.features
        images = [k for k, f in features.items() if isinstance(f, tfds.features.Image)]
        if not images:
            raise errors.UserError(
                f'The TFDS data set {name!r} has no images: {", ".join(features)}.'
            )
        labels = [k for k, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
        self._image, self._label = images[0], labels[0] if labels else None
        base = split.split('[')[0]
        if base not in builder.info.splits and '+' not in base:
            hint = errors.nearest(base, builder.info.splits)
            raise errors.UserError(f'The TFDS data set {name!r} has no split {base!r}{hint}')
        try:
            self._records = builder.as_data_source(
                split, decoders={k: tfds.decode.SkipDecoding() for k in images}
            )
        except NotImplementedError:
            raise errors.UserError(
                f'The TFDS data set {name!r} lies {where} in a format without random access: '
                "prepare it with file_format='array_record'."
            ) from None
        self.classes = tuple(features[self._label].names) if labels else None
        self._name = f'{builder.info.full_name} {split}'
        self._folder = os.fspath(builder.data_path)
        self.remote = storage.is_remote(self._folder)
        self.fingerprint = hashing.digest('tfds', self._name, len(self))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> dict:
        record = _read(self._records, i, self._folder)
        item = {'image': record[self._image]}
        if self._label is not None:
            item['label'] = int(np.asarray(record[self._label]))
        return item

    def describe(self, i: int) -> str:
        return f'{self._name} record {i}'


def _prepared(path):
    path = path or '~/tensorflow_datasets'
    if storage.is_remote(path):
        return bucket.names(path)
    path = os.path.expanduser(path)
    return sorted(os.listdir(path)) if os.path.isdir(path) else []
