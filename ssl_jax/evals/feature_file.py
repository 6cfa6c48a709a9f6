# SPDX-License-Identifier: Apache-2.0
"""Features of a data set in a Parquet file: `ssl_jax features`."""

import contextlib
import io
import json
import re
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from ssl_jax import encoder, sharding
from ssl_jax.data import files, sources
from ssl_jax.data import stream as stream_lib
from ssl_jax.data import transform as transform_lib
from ssl_jax.evals import features as features_lib
from ssl_jax.run import checksums, errors, hashing, launch, metrics, storage, uploads
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
      out: the file, local or in a bucket.
      size: pixels; default `model.size`.
      batch_size: images, rounded up to a multiple of the devices.
      log: called with each line of progress; None for silence.

    Returns:
      The number of rows.

    Raises:
      ValueError: an input is wrong, or `out` or its parts are of another model, data or size.
    """
    log = log or (lambda line: None)
    out = epath.Path(out)
    if out.is_dir():
        raise errors.UserError(f'{out} is a folder: give a file, such as {out}/features.parquet.')
    model = model if isinstance(model, encoder.Model) else encoder.load_model(model)
    source = data if hasattr(data, 'describe') else sources.open_source(data, 'all')
    transform = {**model.transform, 'size': size or model.size}
    features_lib.check_size(transform['size'], model.vit.patch_size, 'size')
    mesh = sharding.make_mesh(data=1, fsdp=-1)  # parameters split, so that large encoders fit
    batch_size = features_lib.round_up(min(batch_size, len(source)), mesh)
    about = _about(model, source, transform, batch_size)
    view = transform_lib.describe(transform)

    def tables(start):
        params = jax.device_put(model.params, sharding.infer(model.params, mesh))
        forward = encoder.make_forward(model.vit, params, mean=model.mean, std=model.std)
        options = dict(transform=transform, batch_size=batch_size, mesh=mesh, start=start)
        with contextlib.closing(features_lib.batches(forward, source, **options)) as batches:
            for batch in batches:
                positions = np.arange(start, min(start + len(batch['id']), len(source)))
                mask = batch['mask'][: len(positions)]
                yield _table({**batch, 'id': positions}, mask, source), positions[~mask]
                start += len(positions)

    return build(
        out,
        about,
        tables,
        source=source,
        total=len(source),
        same=('model', 'data', 'images', 'size', 'transform', 'batch_size'),
        lines=[f'{model.source}: {len(source):,} images, {view}, batches of {batch_size}'],
        log=log,
    )


def build(
    out: epath.PathLike,
    about: dict,
    tables: Callable,
    *,
    source,
    total: int,
    same: tuple[str, ...],
    kind: str = 'features',
    lines: Sequence[str] = (),
    log: Callable = launch.log,
) -> int:
    """Writes a Parquet file of one row per image in parts; the same call continues after a kill.

    Args:
      out: the file, local or in a bucket.
      about: its metadata, key `ssl_jax`; with model, model_path, data and images.
      tables: first position -> iterator over (table of the next images, indices of those of them
        that do not decode and have no row).
      source: of the images.
      total: number of images.
      same: entries of `about` that a file and its parts have to agree in.
      kind: what the file holds, for messages.
      lines: for the log, before the first image.
      log: called with each line.

    Returns:
      The number of rows.
    """
    out = epath.Path(out)
    if storage.exists(out):
        stored, rows = _stored(out)
        _compare(about, stored, out, same, kind)
        log(f'{out} is complete: {rows:,} rows')
        return rows
    parts, bad = epath.Path(f'{out}.parts'), f'{out}.bad.jsonl'
    with workdir_lib.lock(parts) as held:
        if storage.exists(parts / 'about.json'):
            stored = json.loads(storage.read(parts / 'about.json'))
            about = _compare(about, stored, parts, same, kind)
        else:
            storage.remove(bad)  # of an earlier file
            storage.atomic_write(parts / 'about.json', json.dumps(about, indent=1) + '\n')
        for line in (*lines, *getattr(source, 'notes', ())):
            log(line)
        start = _done(parts, total)
        if start:
            log(f'continuing at image {start:,} of {total:,}')
        if start < total:
            with contextlib.closing(tables(start)) as found:
                _fill(parts, bad, found, source, (start, total), held, log)
        rows = _join(parts, out, about)
        storage.remove_folder(parts)
    uploads.close()
    listed = len(storage.read_lines(bad))
    log(f'{out}: {rows:,} rows' + (f'; {listed} images do not decode, see {bad}' if listed else ''))
    return rows


def _about(model, source, transform, batch_size):
    """The metadata of the file: what the features depend on, and `model_path` for people."""
    return dict(
        model=digest(model.params, repr(model.vit), model.mean, model.std),
        model_path=model.source,
        data=source.fingerprint,
        images=len(source),
        classes=list(source.classes) if source.classes is not None else None,
        size=transform['size'],
        transform=transform,
        batch_size=batch_size,
    )


def digest(params, *more) -> str:
    """A digest of parameters and of what else a model is."""
    sums = checksums.of(jax.device_get(params))
    return hashing.digest(hashing.digest(*(f'{k}={v}' for k, v in sorted(sums.items()))), *more)


def _compare(about, stored, path, same, kind):
    """`stored`; raises if it is of another extraction than `about`."""
    if not stored or stored.get('kind') != about.get('kind'):
        raise errors.UserError(f'{path} exists and is no file of {kind}: give another --out.')
    for key in same:
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
    """(`_about`, rows) of a finished file; ({}, 0) of any other file."""
    try:
        with path.open('rb') as file:
            found = pq.ParquetFile(file)
            metadata = found.schema_arrow.metadata or {}
            return json.loads(metadata[b'ssl_jax']), found.metadata.num_rows
    except (pa.ArrowInvalid, KeyError, ValueError):
        return {}, 0


def _done(parts, total):
    """Index of the first image that no part covers."""
    start = 0
    for name in _part_names(parts):
        first, stop = map(int, name.removesuffix('.parquet').split('-'))
        if first != start or stop > total:
            raise errors.UserError(
                f'{parts} lacks the images {start} to {first}: delete the folder.'
            )
        start = stop
    return start


def _part_names(parts):
    return [name for name in storage.names(parts) if re.fullmatch(r'\d+-\d+\.parquet', name)]


def _fill(parts, bad, tables, source, of, held, log):
    """Writes parts until all images are done, after the list of those that do not decode."""
    first, total = of
    bad = stream_lib.BadImages(source, bad, budget=1.0)
    collected, done, started = [], first, None
    flushed = shown = time.monotonic()
    for table, left_out in tables:
        if len(left_out):
            bad.update({'bad': np.asarray(left_out)[:, None]})
        collected.append(table)
        done += len(table) + len(left_out)
        now = time.monotonic()
        if done == total or done - first >= PART_IMAGES or now - flushed >= PART_SECONDS:
            held(sure=True)
            uploads.flush()
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
    names, rows, waiting = _part_names(parts), 0, None
    with storage.atomic_file(out) as temporary, contextlib.ExitStack() as stack:
        for name in names:
            table = pq.read_table(io.BytesIO(storage.read(parts / name)))
            table = table.replace_schema_metadata({'ssl_jax': json.dumps(about)})
            if waiting is None:
                writer = pq.ParquetWriter(temporary, table.schema, use_dictionary=False)
                stack.enter_context(writer)
            waiting = table if waiting is None else pa.concat_tables([waiting, table])
            while len(waiting) >= ROW_GROUP or (name == names[-1] and len(waiting)):
                writer.write_table(waiting.slice(0, ROW_GROUP).combine_chunks())
                rows += min(ROW_GROUP, len(waiting))
                waiting = waiting.slice(ROW_GROUP)
        if not rows:
            raise errors.UserError(
                f'None of the {about["images"]} images decodes, see {out}.bad.jsonl.'
            )
    return rows
