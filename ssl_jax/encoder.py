# SPDX-License-Identifier: Apache-2.0
"""Encoders at work: `load_model` for a few images in Python, `extract` for a data set in a file.

model = ssl_jax.load_model('runs/mine')    # or an HF, timm or official folder or file
out = model(images)                        # uint8 (B, H, W, 3)
out['cls'], out['patch_tokens']            # (B, D), (B, N, D)
"""

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import shutil
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ssl_jax import sharding
from ssl_jax.augment import photometry
from ssl_jax.data import sources, stream
from ssl_jax.evals import features as features_lib
from ssl_jax.interop import load
from ssl_jax.run import checksums, metrics, workdir

COLUMNS = ('cls', 'patch')  # the features that are written, see `evals.features.make_forward`
ROW_GROUP = 4096  # rows of the file that are compressed together
# A part is written after so many seconds or images: what a kill may cost.
PART_SECONDS, PART_IMAGES = 30, 4096
PROGRESS_SECONDS = 10


@dataclasses.dataclass(frozen=True)
class Model:
    """A frozen encoder; call it with images.

    Attributes:
      vit: `models.vit.ViT`.
      params: its parameters, on the device.
      size: side in pixels of the images that it is meant for; it takes others.
      mean, std: of the channels, for values in [0, 1].
      crop: share of the short side that `size` shows in its own evaluations, or None where the
        whole image is squeezed.
      source: where it was loaded from.
    """

    vit: Any
    params: Any
    size: int
    mean: tuple
    std: tuple
    crop: float | None
    source: str

    def __call__(self, images, blocks=()):
        """Named features of images.

        Args:
          images: (B, H, W, 3), sides multiples of the patch size.  uint8 is pixels, and is
            normalised here with `mean` and `std`; floating point is taken as normalised already.
          blocks: numbers of blocks whose raw outputs are wanted too, from 0, negative from the end.

        Returns:
          A dict of jax arrays, compiled once per shape:
          cls_tokens (B, C, D), reg_tokens (B, R, D), patch_tokens (B, N, D) after the final norm,
          patches in raster order; cls, cls_pre, patch (B, D) and cls_patch (B, 2 D), float32, as
          `evals.features.make_forward` defines them (only `patch` without class tokens); blocks,
          where asked, {number: (B, C + R + N, D)} before the final norm.
        """
        _check(self.vit, images)
        depth = self.vit.depth
        for block in blocks:
            if not -depth <= block < depth:
                raise ValueError(f'There is no block {block}: this encoder has 0 to {depth - 1}.')
        numbers = tuple(block % depth for block in blocks)
        out = _tokens(self.vit, self.params, images, self.mean, self.std, numbers)
        if blocks:
            out['blocks'] = dict(zip(blocks, out['blocks']))
        return out


def _check(vit, images):
    if not hasattr(images, 'dtype'):
        raise ValueError(f'Images are one array (B, H, W, 3), not {type(images).__name__}.')
    shape, dtype, p = tuple(images.shape), images.dtype, vit.patch_size
    if len(shape) != 4 or shape[3] != 3:
        hint = ': add an axis with images[None]' if len(shape) == 3 and shape[2] == 3 else ''
        raise ValueError(f'Images have shape (B, H, W, 3), not {shape}{hint}.')
    if dtype != np.uint8 and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f'Images are uint8, or floating point and normalised, not {dtype}.')
    for side in shape[1:3]:
        if side % p or not side:
            raise ValueError(
                f'Images of {shape[1]}x{shape[2]} do not divide into patches of {p} pixels: '
                f'resize them, for instance to {max(round(side / p), 1) * p} instead of {side}.'
            )


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5))  # outside the class: shared by all models
def _tokens(vit, params, images, mean, std, blocks):
    if images.dtype == jnp.uint8:
        images = photometry.normalize(images, mean, std)
    tokens = vit.apply({'params': params}, images, capture=blocks)
    names = ('cls_tokens', 'reg_tokens', 'patch_tokens', 'blocks')
    return {
        **{name: tokens[name] for name in names if name in tokens},
        **features_lib.pooled(vit, tokens),
    }


def load_model(path, *, dtype=None, **hints):
    """Loads an encoder.

    Args:
      path: the workdir of a run, a checkpoint folder, an export, an HF or timm folder, or a file
        of weights, see `interop.load.load_backbone`.
      dtype: in which the layers compute, e.g. 'bfloat16'; default as the run did, else float32.
      hints: see `interop.load.HINTS`, where the tensors leave them open.

    Returns:
      `Model`.

    Raises:
      ValueError: one sentence.
    """
    loaded = load.load_backbone(path, **hints)
    vit, view = loaded.vit, loaded.transform
    if dtype is not None:
        vit = vit.clone(dtype=jnp.dtype(dtype))
    return Model(
        vit=vit,
        params=jax.device_put(loaded.params),
        size=view['size'],
        mean=tuple(view['mean']),
        std=tuple(view['std']),
        crop=view['crop'],
        source=str(path),
    )


def extract(model, data, out, *, size=None, batch_size=64, log=print):
    """Writes the features of a data set to a Parquet file; the same call continues after a kill.

    One row per image, in the order of the source: id (its number), name (its file, relative to the
    folder, or what the source calls it), label where the source has labels, cls and patch (lists
    of float32; only patch without class tokens).  The images are those of the evaluations: short
    side to size / model.crop, central square.  The metadata of the file, key `ssl_jax`, says which
    model, data and size it is of.  Images that do not decode have no row; `out`.bad.jsonl lists
    them with the reason.

    Parts are kept in `out`.parts until all is done.  They hold whole batches, so that the file has
    the bits of an unbroken run on the same device.

    Args:
      model: `Model`, or the path of one.
      data: a source, or a path or spec of `sources.open_source`.
      out: the file, on a local disk.
      size: pixels; default `model.size`.
      batch_size: images, rounded up to a multiple of the devices.
      log: called with each line on the progress; None for silence.

    Returns:
      The number of rows.

    Raises:
      ValueError: in one sentence, also where `out` or its parts are of another model, data or size.
    """
    log = log or (lambda line: None)
    if '://' in str(out):
        raise ValueError(f'{out} is remote: write the features to a disk and copy them.')
    out = pathlib.Path(out)
    if out.is_dir():
        raise ValueError(f'{out} is a folder: give a file, such as {out}/features.parquet.')
    model = model if isinstance(model, Model) else load_model(model)
    source = data if hasattr(data, 'describe') else sources.open_source(data)
    size = size or model.size
    if size % model.vit.patch_size:
        near = max(round(size / model.vit.patch_size), 1) * model.vit.patch_size
        raise ValueError(
            f'size={size} is not a multiple of the patch size {model.vit.patch_size}: use {near}.'
        )
    mesh = sharding.make_mesh(data=1, fsdp=-1)  # parameters split, so that large encoders fit
    batch_size = features_lib.round_up(min(batch_size, len(source)), mesh)
    resize = round(size / (model.crop or 1.0))
    about = _about(model, source, size, resize, batch_size)
    if out.exists():
        _compare(about, _stored(out), out)
        rows = pq.ParquetFile(out).metadata.num_rows
        log(f'{out} is complete: {rows:,} rows')
        return rows
    parts = pathlib.Path(f'{out}.parts')
    bad = pathlib.Path(f'{out}.bad.jsonl')
    parts.mkdir(parents=True, exist_ok=True)
    with workdir.lock(parts):
        if (parts / 'about.json').exists():
            about = _compare(about, json.loads((parts / 'about.json').read_text()), parts)
        else:
            bad.unlink(missing_ok=True)  # of an earlier file
            workdir.atomic_write(parts / 'about.json', json.dumps(about, indent=1) + '\n')
        view = f'short side {resize}, central {size} px' if resize != size else f'{size} px'
        log(f'{model.source}: {len(source):,} images, {view}, batches of {batch_size}')
        params = jax.device_put(model.params, sharding.infer(model.params, mesh))
        forward = features_lib.make_forward(model.vit, params, mean=model.mean, std=model.std)
        start = _done(parts, len(source))
        options = dict(size=size, resize=resize, batch_size=batch_size, mesh=mesh, start=start)
        with contextlib.closing(features_lib.batches(forward, source, **options)) as batches:
            _fill(parts, bad, batches, source, start, log)
        rows = _join(parts, out, about)
        shutil.rmtree(parts)
    listed = _lines(bad)
    log(f'{out}: {rows:,} rows' + (f'; {listed} images do not decode, see {bad}' if listed else ''))
    return rows


def _about(model, source, size, resize, batch_size):
    """What the features depend on, and names for people (`model_path`)."""
    sums = checksums.of(jax.device_get(model.params))
    weights = sources.fingerprint(*(f'{k}={v}' for k, v in sorted(sums.items())))
    return dict(
        model=sources.fingerprint(weights, repr(model.vit), model.mean, model.std),
        model_path=model.source,
        data=source.fingerprint,
        images=len(source),
        classes=list(source.classes) if source.classes is not None else None,
        size=size,
        resize=resize,
        batch_size=batch_size,
    )


def _compare(about, stored, path):
    """`stored`; ValueError where it is of another extraction than `about`."""
    if not stored:
        raise ValueError(f'{path} exists and is no file of features: give another --out.')
    for key in ('model', 'data', 'images', 'size', 'resize', 'batch_size'):
        if about[key] != stored.get(key):
            old, new = stored.get(key), about[key]
            if key == 'model':
                old = f'{old} of {stored.get("model_path")}'
                new = f'{new} of {about["model_path"]}'
            raise ValueError(
                f'{path} was made with {key} {old}, not {new}: give another --out, or delete it.'
            )
    return stored


def _stored(path):
    """`_about` of a finished file; {} if it is none of ours."""
    try:
        return json.loads((pq.read_schema(path).metadata or {})[b'ssl_jax'])
    except (pa.ArrowInvalid, KeyError, ValueError):
        return {}


def _done(parts, total):
    """The first image that no part covers."""
    start = 0
    for path in _part_files(parts):
        first, stop = map(int, path.stem.split('-'))
        if first != start or stop > total:
            raise ValueError(f'{parts} lacks the images {start} to {first}: delete the folder.')
        start = stop
    return start


def _part_files(parts):
    return sorted(parts.glob('*-*.parquet'))


def _fill(parts, bad, batches, source, start, log):
    """Writes parts until the source is done, listing what does not decode first."""
    total, first, done = len(source), start, start
    if start:
        log(f'continuing at image {start:,} of {total:,}')
    if start == total:
        return
    bad = stream.BadImages(source, bad, budget=1.0)
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


def name_of(source, i):
    """What the source calls image `i`; for files in a folder the name below that folder."""
    name, folder = source.describe(i), getattr(source, 'path', None)
    return name.removeprefix(sources.printable(folder).rstrip('/') + '/') if folder else name


def _write(table, path):
    """One part, there whole or not at all, also after a power cut."""
    temporary = path.with_suffix('.partial')
    with open(temporary, 'wb') as f:
        pq.write_table(table, f, use_dictionary=False)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def _join(parts, out, about):
    """Joins the parts; the row groups of the result do not depend on where the parts end."""
    files = _part_files(parts)
    if not sum(pq.ParquetFile(f).metadata.num_rows for f in files):
        raise ValueError(f'None of the {about["images"]} images decodes, see {out}.bad.jsonl.')
    schema = pq.read_schema(files[0]).with_metadata({'ssl_jax': json.dumps(about)})
    temporary, rows = pathlib.Path(f'{out}.partial'), 0
    with pq.ParquetWriter(temporary, schema, use_dictionary=False) as writer:
        waiting = schema.empty_table()
        for i, file in enumerate(files):
            table = pq.read_table(file).replace_schema_metadata(schema.metadata)
            waiting = pa.concat_tables([waiting, table])
            last = i == len(files) - 1
            while len(waiting) >= ROW_GROUP or (last and len(waiting)):
                writer.write_table(waiting.slice(0, ROW_GROUP).combine_chunks())
                rows += min(ROW_GROUP, len(waiting))
                waiting = waiting.slice(ROW_GROUP)
    os.replace(temporary, out)
    return rows


def _lines(path):
    return len(path.read_text().splitlines()) if path.exists() else 0
