# SPDX-License-Identifier: Apache-2.0
"""Images in ArrayRecord files, read directly or through TFDS (which needs no TensorFlow for it)."""

import os

import msgpack
import numpy as np

from ssl_jax.data import sources


class ArrayRecord:
    """ArrayRecord files whose records are images.

    A record is either an encoded image (the bytes of a JPEG, PNG, ... file) or a msgpack map
    {'image': such bytes, 'label': int}, as `write_array_record` makes it.  Labels need names, from
    `classes` or from `classes.txt` beside the first file; without names they are not read.

    Args:
      path: file, glob, or folder (searched recursively).
      split: for a folder, take the files of this split: train.array_record, ...
      classes: names in label order.
    """

    def __init__(self, path, split=None, classes=None):
        import grain

        self.files = sources.expand(path, split, '.array_record')
        folder = os.path.dirname(self.files[0])
        if os.path.exists(os.path.join(folder, 'features.json')):
            raise ValueError(
                f'{folder} was written by TensorFlow Datasets: read it with source=tfds, '
                'name=<data set> and path=<data_dir>.'
            )
        self._records = grain.sources.ArrayRecordDataSource(self.files)
        if not len(self._records):
            raise ValueError(f'{self.files[0]} has no records: give a file with images.')
        names = classes or sources.read_class_names(self.files[0])
        labelled = names and 'label' in _unpack(self._records[0])
        self.classes = tuple(str(n) for n in names) if labelled else None
        sizes = [os.path.getsize(f) for f in self.files]
        names = [os.path.basename(f) for f in self.files]
        self.fingerprint = sources.fingerprint('array_record', *names, *sizes, len(self))

    def __len__(self):
        return len(self._records)

    def __getitem__(self, i):
        item = _unpack(self._records[i])
        if self.classes is None:
            item.pop('label', None)
        return item

    def describe(self, i):
        more = ' ...' if len(self.files) > 1 else ''
        return f'{sources.printable(self.files[0])}{more} record {i}'


def write_array_record(source, path):
    """Writes a source of encoded images to one ArrayRecord file, and its classes beside it.

    Args:
      source: see `sources`; its images must be bytes, since pixels would have to be encoded anew.
      path: of the file, e.g. '/data/train.array_record'; `classes.txt` goes into the same folder.
    """
    from array_record.python import array_record_module

    # One record per chunk: random access then decompresses nothing but what it reads.
    writer = array_record_module.ArrayRecordWriter(os.fspath(path), 'group_size:1')
    try:
        for i in range(len(source)):
            item = source[i]
            if not isinstance(item['image'], bytes):
                raise ValueError(f'{source.describe(i)} is pixels, not a file: encode it first.')
            writer.write(msgpack.packb({k: item[k] for k in ('image', 'label') if k in item}))
    finally:
        writer.close()
    if source.classes:
        classes = os.path.join(os.path.dirname(os.path.abspath(path)), 'classes.txt')
        with open(classes, 'w', encoding='utf-8') as f:
            f.write('\n'.join(source.classes) + '\n')


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

    def __init__(self, name, path=None, split='train'):
        import tensorflow_datasets as tfds

        where = f'in {path or "~/tensorflow_datasets"}'
        try:
            builder = tfds.builder(name, data_dir=path)
        except tfds.core.DatasetNotFoundError:
            hint = sources.nearest(name, _prepared(path) or tfds.list_builders())
            raise ValueError(f'TFDS has no data set {name!r} {where}{hint}') from None
        if not builder.data_path.exists():
            raise FileNotFoundError(
                f'The TFDS data set {name!r} is not prepared {where}: run '
                f"tfds.builder({name!r}).download_and_prepare(file_format='array_record') "
                'once, where TensorFlow is installed.'
            )
        features = builder.info.features
        images = [k for k, f in features.items() if isinstance(f, tfds.features.Image)]
        if not images:
            raise ValueError(f'The TFDS data set {name!r} has no images: {", ".join(features)}.')
        labels = [k for k, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
        self._image, self._label = images[0], labels[0] if labels else None
        base = split.split('[')[0]
        if base not in builder.info.splits and '+' not in base:
            hint = sources.nearest(base, builder.info.splits)
            raise ValueError(f'The TFDS data set {name!r} has no split {base!r}{hint}')
        try:
            self._records = builder.as_data_source(
                split, decoders={k: tfds.decode.SkipDecoding() for k in images}
            )
        except NotImplementedError:
            raise ValueError(
                f'The TFDS data set {name!r} lies {where} in a format without random access: '
                "prepare it with file_format='array_record'."
            ) from None
        self.classes = tuple(features[self._label].names) if labels else None
        self._name = f'{builder.info.full_name} {split}'
        self.fingerprint = sources.fingerprint('tfds', self._name, len(self))

    def __len__(self):
        return len(self._records)

    def __getitem__(self, i):
        record = self._records[i]
        item = {'image': record[self._image]}
        if self._label is not None:
            item['label'] = int(np.asarray(record[self._label]))
        return item

    def describe(self, i):
        return f'{self._name} record {i}'


def _prepared(path):
    path = os.path.expanduser(path or '~/tensorflow_datasets')
    return sorted(os.listdir(path)) if os.path.isdir(path) else []
