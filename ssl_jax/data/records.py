# SPDX-License-Identifier: Apache-2.0
"""Images in ArrayRecord files, read directly or through TFDS (which needs no TensorFlow for it)."""

import os
from collections.abc import Sequence

import msgpack
import numpy as np

from ssl_jax.data import files, fingerprint, shards
from ssl_jax.run import errors, hashing


class ArrayRecord:
    """ArrayRecord files whose records are images.

    A record is either an encoded image (the bytes of a JPEG, PNG, ... file) or a msgpack map
    {'image': such bytes, 'label': int}. Labels need names, from `classes` or from `classes.txt`
    beside the first file; without names they are not read.

    Args:
      path: file, glob, or folder (searched recursively).
      split: for a folder, take the files of this split: train.array_record, ...
      classes: names in label order.
      purpose: chooses the split if `split` does not, see `splits.PURPOSES`.
    """

    def __init__(
        self,
        path: str,
        split: str | None = None,
        classes: Sequence | None = None,
        purpose: str = 'train',
    ):
        import grain  # slow: it imports jax

        errors.extra('array_record', 'arrayrecord')
        self.files, self.notes = shards.expand(path, split, '.array_record', purpose)[0]
        folder = os.path.dirname(self.files[0])
        if os.path.exists(os.path.join(folder, 'features.json')):
            raise errors.UserError(
                f'{folder} was written by TensorFlow Datasets: read it with source=tfds, '
                'name=<data set> and path=<data_dir>.'
            )
        self._records = grain.sources.ArrayRecordDataSource(self.files)
        if not len(self._records):
            raise errors.UserError(f'{self.files[0]} has no records: give a file with images.')
        names = classes or files.read_class_names(self.files[0])
        labelled = names and 'label' in _unpack(self._records[0])
        self.classes = tuple(str(n) for n in names) if labelled else None
        names = map(os.path.basename, self.files)
        self.fingerprint = fingerprint.of_files('array_record', self.files, *names, len(self))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> dict:
        item = _unpack(self._records[i])
        if self.classes is None:
            item.pop('label', None)
        return item

    def describe(self, i: int) -> str:
        more = ' ...' if len(self.files) > 1 else ''
        return f'{files.printable(self.files[0])}{more} record {i}'


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
      path: TFDS' data_dir; default ~/tensorflow_datasets.
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
        self.fingerprint = hashing.digest('tfds', self._name, len(self))

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, i: int) -> dict:
        record = self._records[i]
        item = {'image': record[self._image]}
        if self._label is not None:
            item['label'] = int(np.asarray(record[self._label]))
        return item

    def describe(self, i: int) -> str:
        return f'{self._name} record {i}'


def _prepared(path):
    path = os.path.expanduser(path or '~/tensorflow_datasets')
    return sorted(os.listdir(path)) if os.path.isdir(path) else []
