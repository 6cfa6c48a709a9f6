# SPDX-License-Identifier: Apache-2.0
"""Features of a data set in a Parquet file: `ssl_jax features`."""

import contextlib
import json
import pathlib
import shutil
import time
from collections.abc import Callable

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ssl_jax import encoder, sharding
from ssl_jax.data import files, sources
from ssl_jax.data import stream as stream_lib
from ssl_jax.data import transform as transform_lib
from ssl_jax.evals import features as features_lib
from ssl_jax.run import checksums, errors, hashing, metrics, storage
from ssl_jax.run import workdir as workdir_lib

COLUMNS = ('cls', 'patch')  # the features that are written, see `encoder.make_forward`
ROW_GROUP = 4096  # rows of the file that are compressed together
# A part is written after this many seconds or images: a kill costs no more.
PART_SECONDS, PART_IMAGES = 30, 4096
PROGRESS_SECONDS = 10


def extract(
    model, data, out, *, size: int | None = None, batch_size: int = 64, log: Callable | None = print
) -> int:
    """Writes the features of a data set to a Parquet file; the same call continues after a kill.

    One row per image, in the order of the source: id (index), name (path relative to the folder,
    or `describe` of the source), label if the source has labels, cls and patch (lists of float32;
    only patch without class tokens). Images are cut as in evaluations, by `model.transform`. The
    metadata of the file, key `ssl_jax`, has the model, the data and the transform. Images that do
    not decode have no row; `out`.bad.jsonl lists them with the reason.

    Parts are kept in `out`.parts until the end. They hold complete batches, so that the file has
    the bits of an unbroken run on the same device.

    Args:
      model: `encoder.Model`, or the path of one.
      data: a source, or a path or spec of `sources.open_source`.
      out: the file, on a local disk.
      size: pixels; default `model.size`.
      batch_size: images, rounded up to a multiple of the devices.
      log: called with each line of progress; None for silence.

    Returns:
      The number of rows.

    Raises:
      ValueError: an input is wrong, or `out` or its parts are of another model, data or size.
    """
    log = log or (lambda line: None)
    if storage.is_remote(out):
        raise errors.UserError(f'{out} is remote: write the features to a disk and copy them.')
    out = pathlib.Path(out)
    if out.is_dir():
        raise errors.UserError(f'{out} is a folder: give a file, such as {out}/features.parquet.')
    model = model if isinstance(model, encoder.Model) else encoder.load_model(model)
    source = data if hasattr(data, 'describe') else sources.open_source(data, 'all')
    transform = {**model.transform, 'size': size or model.size}
    features_lib.check_size(transform['size'], model.vit.patch_size, 'size')
    mesh = sharding.make_mesh(data=1, fsdp=-1)  # parameters split, so that large encoders fit
    batch_size = features_lib.round_up(min(batch_size, len(source)), mesh)
    about = _about(model, source, transform, batch_size)
    if out.exists():
        _compare(about, _stored(out), out)
        rows = pq.ParquetFile(out).metadata.num_rows
        log(f'{out} is complete: {rows:,} rows')
        return rows
    parts = pathlib.Path(f'{out}.parts')
    bad = pathlib.Path(f'{out}.bad.jsonl')
    parts.mkdir(parents=True, exist_ok=True)
    with workdir_lib.lock(parts):
        if (parts / 'about.json').exists():
            about = _compare(about, json.loads((parts / 'about.json').read_text()), parts)
        else:
            bad.unlink(missing_ok=True)  # of an earlier file
            storage.atomic_write(parts / 'about.json', json.dumps(about, indent=1) + '\n')
        view = transform_lib.describe(transform)
        log(f'{model.source}: {len(source):,} images, {view}, batches of {batch_size}')
        for note in getattr(source, 'notes', ()):
            log(note)
        params = jax.device_put(model.params, sharding.infer(model.params, mesh))
        forward = encoder.make_forward(model.vit, params, mean=model.mean, std=model.std)
        start = _done(parts, len(source))
        options = dict(transform=transform, batch_size=batch_size, mesh=mesh, start=start)
        with contextlib.closing(features_lib.batches(forward, source, **options)) as batches:
            _fill(parts, bad, batches, source, start, log)
        rows = _join(parts, out, about)
        shutil.rmtree(parts)
    listed = len(bad.read_text().splitlines()) if bad.exists() else 0
    log(f'{out}: {rows:,} rows' + (f'; {listed} images do not decode, see {bad}' if listed else ''))
    return rows


def _about(model, source, transform, batch_size):
    """The metadata of the file: what the features depend on, and `model_path` for people."""
    sums = checksums.of(jax.device_get(model.params))
    weights = hashing.digest(*(f'{k}={v}' for k, v in sorted(sums.items())))
    return dict(
        model=hashing.digest(weights, repr(model.vit), model.mean, model.std),
        model_path=model.source,
        data=source.fingerprint,
        images=len(source),
        classes=list(source.classes) if source.classes is not None else None,
        size=transform['size'],
        transform=transform,
        batch_size=batch_size,
    )


def _compare(about, stored, path):
    """`stored`; raises if it is of another extraction than `about`."""
    if not stored:
        raise errors.UserError(f'{path} exists and is no file of features: give another --out.')
    for key in ('model', 'data', 'images', 'size', 'transform', 'batch_size'):
        if about[key] != stored.get(key):
            old, new = stored.get(key), about[key]
            if key == 'model':
                old = f'{old} of {stored.get("model_path")}'
                new = f'{new} of {about["model_path"]}'
            if key == 'data':
                old, new = f'{stored.get("images"):,} other images', f'these {about["images"]:,}'
                new += ', or some of them were written anew'
            raise errors.UserError(
                f'{path} was made with {key} {old}, not {new}: give another --out, or delete it.'
            )
    return stored


def _stored(path):
    """`_about` of a finished file; {} of any other file."""
    try:
        return json.loads((pq.read_schema(path).metadata or {})[b'ssl_jax'])
    except (pa.ArrowInvalid, KeyError, ValueError):
        return {}


def _done(parts, total):
    """Index of the first image that no part covers."""
    start = 0
    for path in _part_files(parts):
        first, stop = map(int, path.stem.split('-'))
        if first != start or stop > total:
            raise errors.UserError(
                f'{parts} lacks the images {start} to {first}: delete the folder.'
            )
        start = stop
    return start


def _part_files(parts):
    return sorted(parts.glob('*-*.parquet'))


def _fill(parts, bad, batches, source, start, log):
    """Writes parts until the source is done, after the list of images that do not decode."""
    total, first, done = len(source), start, start
    if start:
        log(f'continuing at image {start:,} of {total:,}')
    if start == total:
        return
    bad = stream_lib.BadImages(source, bad, budget=1.0)
    collected, started, flushed, shown = [], None, time.monotonic(), time.monotonic()
    for batch in batches:
        positions = np.arange(done, min(done + len(batch['id']), total))
        mask = batch['mask'][: len(positions)]
        if not mask.all():
            bad.update({'bad': np.where(mask, -1, positions)[:, None]})
        collected.append(_table({**batch, 'id': positions}, mask, source))
        done += len(positions)
        now = time.monotonic()
        if done == total or done - first >= PART_IMAGES or now - flushed >= PART_SECONDS:
            _write(pa.concat_tables(collected), parts / f'{first:012d}-{done:012d}.parquet')
            collected, first, flushed = [], done, now
        if started is None:
            started = now, done  # the first batch compiles
        elif now - shown >= PROGRESS_SECONDS and done < total:
            rate = (done - started[1]) / (now - started[0])
            left = metrics.duration((total - done) / rate)
            log(f'{done:,} of {total:,} images, {rate:,.0f}/s, {left} left')
            shown = now


def _table(batch, mask, source):
    """The rows of a batch that decoded."""
    ids = batch['id'][mask]
    columns = {
        'id': pa.array(ids, pa.int64()),
        'name': pa.array([name_of(source, int(i)) for i in ids], pa.string()),
    }
    if 'label' in batch:
        columns['label'] = pa.array(batch['label'][: len(mask)][mask], pa.int32())
    for name in COLUMNS:
        if name in batch['features']:
            x = np.asarray(batch['features'][name][: len(mask)][mask], np.float32)
            values = pa.array(x.reshape(-1))
            columns[name] = pa.FixedSizeListArray.from_arrays(values, x.shape[1])
    return pa.table(columns)


def name_of(source, i: int) -> str:
    """`describe` of image `i`; of files in a folder the path below that folder."""
    name, folder = source.describe(i), getattr(source, 'path', None)
    return name.removeprefix(files.printable(folder).rstrip('/') + '/') if folder else name


def _write(table, path):
    """Writes one part atomically, also for a power cut."""
    with storage.atomic_file(path) as temporary:
        pq.write_table(table, temporary, use_dictionary=False)


def _join(parts, out, about):
    """Joins the parts, in row groups that do not depend on the parts; returns the rows."""
    paths = _part_files(parts)
    if not sum(pq.ParquetFile(p).metadata.num_rows for p in paths):
        raise errors.UserError(
            f'None of the {about["images"]} images decodes, see {out}.bad.jsonl.'
        )
    schema = pq.read_schema(paths[0]).with_metadata({'ssl_jax': json.dumps(about)})
    rows = 0
    with (
        storage.atomic_file(out) as temporary,
        pq.ParquetWriter(temporary, schema, use_dictionary=False) as writer,
    ):
        waiting = schema.empty_table()
        for i, file in enumerate(paths):
            table = pq.read_table(file).replace_schema_metadata(schema.metadata)
            waiting = pa.concat_tables([waiting, table])
            last = i == len(paths) - 1
            while len(waiting) >= ROW_GROUP or (last and len(waiting)):
                writer.write_table(waiting.slice(0, ROW_GROUP).combine_chunks())
                rows += min(ROW_GROUP, len(waiting))
                waiting = waiting.slice(ROW_GROUP)
    return rows
