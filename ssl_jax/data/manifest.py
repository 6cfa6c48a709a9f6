# SPDX-License-Identifier: Apache-2.0
"""Manifests: the images of a pool that a selection kept, by reference, in a Parquet file.

The column `index` (int64, ascending) counts in the pool; others say which image that is and why it
was kept. The metadata of the file, key `ssl_jax_manifest`, is JSON with `pool` (a spec of
`sources.open_source`), `images` and `fingerprint` of the pool, and what made the selection.
"""

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ssl_jax.data import columns, files, fingerprint, subset
from ssl_jax.run import errors, hashing, storage

KEY = b'ssl_jax_manifest'


class Manifest(subset.Subset):
    """The images of a pool that a manifest names.

    Args:
      pool: the opened source.
      path: of the manifest.

    Raises:
      UserError: the pool has other images than when the manifest was made.
    """

    def __init__(self, pool: Any, path: str | os.PathLike):
        path, stored = os.fspath(path), about(path)
        content = fingerprint.content
        if content(pool.fingerprint) != content(stored['fingerprint']):
            raise errors.UserError(
                f'{path} selects from {stored["images"]:,} images of {where(stored["pool"])}, and '
                f'what lies there now are {len(pool):,} other images, or some of them were written '
                f'anew: bring the old ones back, or make the manifest again.'
            )
        table = columns.opened(path).read(columns=['index'])
        indices = table.column('index').to_numpy()
        if not len(indices):
            raise errors.UserError(f'{path} selects no image: make it again.')
        super().__init__(pool, indices)
        of = f'{path}: {len(indices):,} of {len(pool):,} images of {where(stored["pool"])}'
        self.notes = (*getattr(pool, 'notes', ()), of)
        _, plus, times = pool.fingerprint.partition('+')
        digest = hashing.digest('manifest', content(pool.fingerprint), indices.tobytes())
        self.fingerprint = f'{digest}{plus}{times}'


def where(spec: Mapping[str, Any]) -> str:
    """A spec of a source in a word, for messages."""
    return str(spec.get('path') or spec.get('name') or spec.get('source'))


def is_manifest(path: str) -> bool:
    """Whether a Parquet file is a manifest."""
    if not path.endswith('.parquet') or not files.is_file(path):
        return False
    try:
        return KEY in (columns.opened(path).schema_arrow.metadata or {})
    except pa.ArrowInvalid:
        return False  # the source of Parquet files says so


def about(path: str | os.PathLike) -> dict:
    """The metadata of a manifest.

    Raises:
      UserError: the file is no manifest.
    """
    path = os.fspath(path)
    files.require(path)
    if not is_manifest(path):
        raise errors.UserError(
            f'{path} is no manifest: give the one that `ssl_jax data curate` wrote.'
        )
    return json.loads(columns.opened(path).schema_arrow.metadata[KEY])


def write(
    path: str | os.PathLike,
    tables: Iterable[pa.Table],
    pool: Any,
    spec: Mapping[str, Any],
    **more: Any,
) -> None:
    """Writes a manifest.

    Args:
      path: of the file; a crash leaves the old one or the new one.
      tables: its rows in parts, at least one, with a column `index`, int64, ascending over all.
      pool: the opened source.
      spec: how it was opened; a relative path becomes absolute.
      more: what made the selection, for JSON.
    """
    spec = {k: v for k, v in dict(spec).items() if v is not None}
    if 'path' in spec and not storage.is_remote(spec['path']):
        spec['path'] = os.path.abspath(spec['path'])
    said = dict(pool=spec, images=len(pool), fingerprint=pool.fingerprint, **more)
    write_tables(path, tables, {KEY: json.dumps(said)})


def write_tables(
    path: str | os.PathLike, tables: Iterable[pa.Table], metadata: Mapping | None = None
) -> None:
    """Writes tables of one schema, at least one, as one Parquet file, atomically."""
    writer = None
    with storage.atomic_file(path) as temporary:
        for table in tables:
            table = table.replace_schema_metadata(metadata)
            if writer is None:
                writer = pq.ParquetWriter(temporary, table.schema)
            writer.write_table(table)
        writer.close()


def table(index: np.ndarray, **more: Any) -> pa.Table:
    """A part of the rows of a manifest: `index` and further columns."""
    return pa.table({'index': pa.array(index, pa.int64()), **more})
