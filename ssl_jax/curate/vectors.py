# SPDX-License-Identifier: Apache-2.0
"""Embeddings of images from a Parquet file, as unit vectors on the disk."""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from etils import epath

from ssl_jax.data import columns, files, fingerprint
from ssl_jax.evals import features
from ssl_jax.run import errors, hashing, launch, storage

BATCH = 4096  # rows of a Parquet file at a time


@dataclasses.dataclass(frozen=True)
class Settings:
    feature: str = ''  # column of embeddings: cls or patch; default the first there is
    # Subtract the mean of the pool, for features that all point one way (MAE, pixels).
    centre: bool = False


@dataclasses.dataclass(frozen=True)
class Vectors:
    """Unit vectors of the images that have one."""

    x: np.ndarray  # float32 (n, d), a memory map
    ids: np.ndarray  # int64 (n,), ascending: which image of the source
    digest: str  # of file and settings
    feature: str  # the column


def load(file: str, source: Any, place: epath.Path, name: str, settings: Settings) -> Vectors:
    """Unit vectors from a Parquet file, kept in `place` for the next call.

    Args:
      file: with a column of lists of numbers, all of one length, and perhaps `id`, which image of
        the source a row is of; without it row i is of image i.
      source: of the images.
      place: for NAME.npy and NAME.json.
      name: of the set.
      settings: column, and whether the mean is subtracted: that of the set called 'pool', which
        has to be loaded first.

    Raises:
      UserError: the file has no such column, is of other images, or has NaN.
    """
    files.require(file)
    column = _column(file, settings.feature)
    _check_source(file, source)
    stamp = fingerprint.of_files('embeddings', [file])
    pool = place / 'pool.json'
    mean = json.loads(storage.read(pool))['mean'] if name != 'pool' and settings.centre else None
    key = hashing.digest(stamp, column, settings.centre, mean, source.fingerprint)
    about, array = place / f'{name}.json', place / f'{name}.npy'
    if launch.is_main():
        place.mkdir(parents=True, exist_ok=True)
        stored = json.loads(storage.read(about)) if storage.exists(about) else {}
        if stored.get('key') != key:
            storage.remove(about)  # what it says of the arrays ends here
            mean = _write(file, column, len(source), place, name, settings, mean)
            storage.atomic_write(about, json.dumps(dict(key=key, mean=mean)) + '\n')
    launch.main_number(0)  # the others wait
    x, ids = np.load(array, mmap_mode='r'), np.load(place / f'{name}.ids.npy')
    return Vectors(x, ids, key, column)


def _column(file, wanted):
    """The column of embeddings of a Parquet file."""
    lists = pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list
    schema = columns.opened(file).schema_arrow
    found = [f.name for f in schema if any(test(f.type) for test in lists)]
    if wanted and wanted not in found:
        raise errors.UserError(
            f'{file} has no embeddings {wanted!r}{errors.nearest(wanted, found)}'
        )
    if not found:
        raise errors.UserError(
            f'{file} has no column of lists of numbers: write one with `ssl_jax features`.'
        )
    return wanted or ('cls' if 'cls' in found else found[0])


def _check_source(file, source):
    """Raises if `ssl_jax features` wrote the file for other images."""
    stored = (columns.opened(file).schema_arrow.metadata or {}).get(b'ssl_jax')
    stored = json.loads(stored) if stored else {}
    content = fingerprint.content
    if 'data' in stored and content(stored['data']) != content(source.fingerprint):
        raise errors.UserError(
            f'{file} has features of {stored["images"]:,} other images than {source.describe(0)} '
            f'...: give the features of these, or --model.'
        )


def _write(file, column, images, place, name, settings, mean):
    """Writes the unit vectors and ids of a set; returns the mean that was subtracted, or None."""
    n = columns.opened(file).metadata.num_rows
    if not n:
        raise errors.UserError(f'{file} has no rows: write it again.')
    ids, total, rows = [], 0, 0
    for some, of in _batches(file, column):
        features.check_finite(name, some)
        ids.append(np.arange(rows, rows + len(some)) if of is None else of)
        rows += len(some)
        total = total + some.sum(axis=0, dtype=np.float64)
    ids = np.concatenate(ids).astype(np.int64)
    if (np.diff(ids) <= 0).any() or ids[0] < 0 or ids[-1] >= images:
        raise errors.UserError(
            f'{file} has {n:,} rows and the set {images:,} images: `id` must be ascending and '
            f'count in the set.'
        )
    if settings.centre and mean is None:
        mean = (total / n).tolist()
    with storage.atomic_file(place / f'{name}.npy') as temporary:
        shape = n, len(some[0])
        out = np.lib.format.open_memmap(temporary, 'w+', np.float32, shape)
        begin = 0
        for some, _ in _batches(file, column):
            some = some.astype(np.float64) - (0 if mean is None else np.asarray(mean))
            length = np.sqrt(np.square(some).sum(axis=1, keepdims=True))
            out[begin : begin + len(some)] = some / np.maximum(length, 1e-12)
            begin += len(some)
        out.flush()
        del out
    with storage.atomic_file(place / f'{name}.ids.npy') as temporary, open(temporary, 'wb') as f:
        np.save(f, ids)
    return mean


def _batches(file, column) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """(embeddings (b, d), ids (b,) or None) of a Parquet file, in order."""
    whole = columns.opened(file)
    named = 'id' in whole.schema_arrow.names
    names, width = [column, *(['id'] if named else [])], None
    for batch in whole.iter_batches(BATCH, columns=names):
        lists = batch.column(column)
        values = np.asarray(lists.flatten(), np.float32)
        width = width or len(values) // max(1, len(lists))
        if lists.null_count or len(values) != width * len(lists) or not width:
            raise errors.UserError(
                f'The column {column!r} of {file} has lists of different lengths: give one vector '
                f'of one length in each row.'
            )
        yield values.reshape(-1, width), np.asarray(batch.column('id')) if named else None


class Rows:
    """Some rows of an array, read when they are asked for."""

    def __init__(self, x: np.ndarray, rows: np.ndarray):
        self._x, self._rows = x, rows
        self.shape = len(rows), x.shape[1]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i) -> np.ndarray:
        return self._x[self._rows[i]]
