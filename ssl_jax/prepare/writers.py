# SPDX-License-Identifier: Apache-2.0
"""Shards of images as tar, Parquet and ArrayRecord files: the same images give the same bytes."""

import contextlib
import dataclasses
import io
import json
import re
import tarfile
from collections.abc import Callable, Iterator, Sequence

import msgpack
import pyarrow as pa
import pyarrow.parquet as pq

from ssl_jax.prepare import encoded
from ssl_jax.run import errors

ROWS = 100  # in a row group of Parquet: the Hugging Face viewer and random access read whole ones
_SHORT = {'segmentation': 'seg', 'depth': 'depth'}  # of maps in tar files


@dataclasses.dataclass(frozen=True)
class Sample:
    """An image as it is written."""

    index: int  # in the source
    name: str  # relative path in the source, or ''
    extension: str
    image: bytes
    label: int | None  # -1: missing; None: the source has no labels
    maps: dict[str, bytes]


@dataclasses.dataclass(frozen=True)
class About:
    """What the shards of a data set share."""

    classes: Sequence[str] | None
    kinds: Sequence[str]  # of maps
    meaning: dict  # of the values of maps, see `encoded.Encoded.meaning`
    map_extensions: dict[str, str]  # of the first image


Add = Callable[[Sample], None]


@contextlib.contextmanager
def tar(path: str, about: About) -> Iterator[Add]:
    """WebDataset: KEY.jpg, KEY.cls (the number of the class), KEY.seg.png, KEY.depth.png.

    The key is the index in the source and, where it has one, the name.
    """
    del about
    with tarfile.open(path, 'w', format=tarfile.USTAR_FORMAT) as file:

        def member(name, data):
            info = tarfile.TarInfo(name)  # its time and owner are 0
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))

        def add(sample):
            stem = re.sub(r'[^A-Za-z0-9]+', '_', sample.name.rsplit('/', 1)[-1].split('.')[0])[:60]
            key = f'{sample.index:09d}' + (f'_{stem}' if stem.strip('_') else '')
            member(key + sample.extension, sample.image)
            if sample.label is not None and sample.label >= 0:
                member(f'{key}.cls', str(sample.label).encode())
            for kind, data in sample.maps.items():
                member(f'{key}.{_SHORT[kind]}{encoded.map_extension(data)}', data)

        yield add


@contextlib.contextmanager
def parquet(path: str, about: About) -> Iterator[Add]:
    """Hugging Face's layout: struct(bytes, path), labels and their names, a column for each map."""
    file_type = pa.struct([('bytes', pa.binary()), ('path', pa.string())])
    columns = {'image': file_type}
    features = {'image': {'_type': 'Image'}}
    if about.classes is not None:
        columns['label'] = pa.int64()
        features['label'] = {'names': list(about.classes), '_type': 'ClassLabel'}
    for kind in about.kinds:
        columns[kind] = file_type
        plain = {k: {'dtype': v, '_type': 'Value'} for k, v in _PLAIN.items()}
        is_image = about.map_extensions.get(kind) != '.npy'
        features[kind] = {'_type': 'Image'} if is_image else plain
    metadata = {'huggingface': json.dumps({'info': {'features': features}})}
    if about.kinds:
        metadata['ssl_jax'] = json.dumps({'maps': about.meaning})
    schema = pa.schema(columns, metadata)
    statistics = ['label'] if about.classes is not None else False
    options = dict(compression='NONE', use_dictionary=False, write_statistics=statistics)
    with pq.ParquetWriter(path, schema, **options) as writer:
        rows = []

        def write():
            writer.write_table(pa.Table.from_pylist(rows, schema))
            rows.clear()

        def add(sample):
            name = sample.name or f'{sample.index:09d}{sample.extension}'
            row = {'image': {'bytes': sample.image, 'path': name}}
            if sample.label is not None:
                row['label'] = sample.label if sample.label >= 0 else None
            for kind, data in sample.maps.items():
                row[kind] = {'bytes': data, 'path': None}
            rows.append(row)
            if len(rows) == ROWS:
                write()

        yield add
        if rows:
            write()


_PLAIN = {'bytes': 'binary', 'path': 'string'}


@contextlib.contextmanager
def array_record(path: str, about: About) -> Iterator[Add]:
    """Msgpack {'image', 'label'} in groups of one, for random access; no maps."""
    module = errors.extra('array_record.python.array_record_module', 'arrayrecord')
    writer = module.ArrayRecordWriter(path, 'group_size:1')

    def add(sample):
        record = {'image': sample.image}
        if about.classes is not None:
            record['label'] = sample.label
        writer.write(msgpack.packb(record))

    try:
        yield add
    finally:
        writer.close()


FORMATS = {  # --to: (writer, ending of the files)
    'arrayrecord': (array_record, '.array_record'),
    'tar': (tar, '.tar'),
    'parquet': (parquet, '.parquet'),
}
