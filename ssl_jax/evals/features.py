# SPDX-License-Identifier: Apache-2.0
"""Frozen features of a labelled source as numpy arrays, in its order.

A `forward` is any function of uint8 images (B, H, W, 3) that returns {name: float32 (B, d)}, or
nested dicts of it, such as `encoder.make_forward` and `raw_pixels`.
"""

import time
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from ssl_jax import sharding
from ssl_jax.augment import photometry
from ssl_jax.data import host, subset
from ssl_jax.data import maps as maps_lib
from ssl_jax.data import stream as stream_lib
from ssl_jax.methods import base
from ssl_jax.run import errors, hashing, launch, metrics, peers

PROGRESS_SECONDS = 10


class Stopped(Exception):
    """`should_stop` became true in the middle of an extraction; nothing is returned."""


def raw_pixels(size: int = 32) -> Callable:
    """The forward without learning, {'pixels': (B, 3 size^2)}: a baseline for every encoder.

    Images are resized (bilinear, antialiased) to size x size, or kept if they are smaller,
    normalised and flattened.
    """

    @jax.jit
    def forward(images):
        b, h, w, c = images.shape
        small = (b, min(size, h), min(size, w), c)
        x = jax.image.resize(images.astype(jnp.float32), small, 'linear', antialias=True)
        return {'pixels': photometry.normalize(x).reshape(b, -1)}

    return forward


def extract(
    forward: Callable, source, *, limit: int | None = None, **options
) -> tuple[dict, np.ndarray | None]:
    """Features and labels of a source.

    Args:
      forward, source, limit, options: see `batches`.

    Returns:
      The features of `forward` for all images (n, d), and int32 labels (n,), None where the source
      has none. Images that do not decode are left out, which is said in the log.

    Raises:
      ValueError: no image decodes.
    """
    source = limited(source, limit)
    decoded, bad = [], []
    for batch in batches(forward, source, **options):
        decoded.append(jax.tree.map(lambda x, mask=batch['mask']: x[mask], batch))
        bad += left_out(batch)
    stream_lib.say_left_out(source, bad)
    whole = jax.tree.map(lambda *x: np.concatenate(x), *decoded)
    if not len(whole['id']):
        raise errors.UserError(
            f'None of the {len(source)} images of {source.describe(0)} ... decodes.'
        )
    return whole['features'], whole.get('label')


def batches(
    forward: Callable,
    source,
    *,
    transform: dict | int,
    batch_size: int = 256,
    mesh: jax.sharding.Mesh | None = None,
    limit: int | None = None,
    should_stop: Callable | None = None,
    start: int = 0,
    maps: tuple = (),
) -> Iterator[dict]:
    """The features of a source batch by batch.

    Every batch has the same shape (the last is padded), so `forward` is compiled once. Images
    are split over the data and fsdp axes of the mesh; with several processes each decodes its own
    rows and all of them return everything.

    Args:
      forward: see the top of this file.
      source: see `data.sources`.
      transform: see `data.transform`; a number of pixels stands for ours of that size.
      batch_size: at most the source, rounded up to a multiple of the devices that share a batch.
      mesh: default one device.
      limit: number of images at most, chosen by a hash of the index (sources are often sorted by
        class, the first images would be of few classes).
      should_stop: asked before every batch; if true on any process, all raise `Stopped`.
      start: the first image. From a multiple of the batch size (`round_up`) the batches are those
        of the whole source, bit for bit.
      maps: 'segmentation', 'depth': yielded too, cut as the image.

    Yields:
      numpy arrays of one batch as a dict: features (B, d), id (B,), -1 for padding, mask (B,),
      False where a row is padding or did not decode, and label (B,) where the source has labels.
    """
    source = limited(source if maps else maps_lib.images_only(source), limit)
    mesh = mesh or sharding.make_mesh(devices=jax.local_devices()[:1])
    batch_size = round_up(min(batch_size, len(source)), mesh)
    rows = sharding.process_rows(mesh, batch_size)
    rest = subset.Subset(source, np.arange(start, len(source))) if start else source
    pending = None
    with stream_lib.eval_stream(rest, transform, batch_size, rows=rows) as stream:
        for batch in stream:
            if should_stop is not None and launch.any_says(should_stop()):
                raise Stopped
            kept = {k: batch[k] for k in ('id', 'mask', 'label', *maps) if k in batch}
            kept['id'] = np.where(kept['id'] < 0, -1, kept['id'] + start)
            if jax.process_count() > 1:
                kept = sharding.to_global(kept, mesh, rows, batch_size)
            with jax.set_mesh(mesh):
                out = forward(sharding.to_global(batch['image'], mesh, rows, batch_size))
            # Fetched one batch late: the device computes while the host decodes.
            if pending is not None:
                yield fetch(pending)
            pending = {'features': out, **kept}
        if pending is not None:
            yield fetch(pending)


def told(batches: Iterable[dict], total: int, log: Callable, what: str = 'images') -> Iterator:
    """The batches again; says in the log how far they are, if they take long."""
    done, began, shown = 0, None, time.monotonic()
    for batch in batches:
        peers.progress()
        yield batch
        done += int((batch['id'] >= 0).sum())
        now = time.monotonic()
        if began is None:
            began = now, done  # the first batch compiles
        elif now - shown >= PROGRESS_SECONDS and done < total:
            left = (total - done) * (now - began[0]) / (done - began[1])
            log(f'{done:,} of {total:,} {what}, {metrics.duration(left)} left')
            shown = now


def left_out(batch: dict) -> list[int]:
    """Images of a batch that did not decode."""
    return batch['id'][~batch['mask'] & (batch['id'] >= 0)].tolist()


def check_size(size: int, patch_size: int, name: str) -> None:
    """Raises unless images of `size` pixels divide into patches; `name` is the field."""
    if size <= 0 or size % patch_size:
        near = base.near_multiple(size, patch_size)
        raise errors.UserError(
            f'{name}={size} is not a multiple of the patch size {patch_size}: use {near}.'
        )


def check_finite(name: str, x: np.ndarray) -> None:
    """Raises where features (n, d) have NaN or inf; `name` is the set."""
    if bad := (~np.isfinite(x)).any(axis=1).sum():
        raise errors.UserError(
            f'{name} features have NaN or inf in {bad} of {len(x)} rows; look for non-finite '
            f'parameters in the checkpoint.'
        )


def round_up(batch_size: int, mesh: jax.sharding.Mesh) -> int:
    """The next multiple of the devices that share a batch."""
    shards = mesh.shape['data'] * mesh.shape['fsdp']
    return -(-batch_size // shards) * shards


def fetch(tree):
    """Numpy arrays of the whole batch."""
    if jax.process_count() > 1:
        tree = multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(np.asarray, tree)


class Edited(subset.Subset):
    """The images `indices` of another source, edited on the host; without labels and maps.

    Args:
      source, indices: see `subset.Subset`.
      edit: (uint8 (H, W, 3), position in `indices`) -> uint8 (h, w, 3), a pure function.
    """

    map_classes = None

    def __init__(self, source, indices: np.ndarray, edit: Callable):
        super().__init__(maps_lib.images_only(source), indices)
        self.classes, self.labels, self._edit = None, None, edit

    def without_maps(self) -> 'Edited':
        return self

    def __getitem__(self, i: int) -> dict:
        return {'image': self._edit(host.decode(super().__getitem__(i)['image']), i)}


def limited(source, limit: int | None):
    """The source, or `limit` of its images, see `pick`."""
    if limit is None or limit >= len(source):
        return source
    return subset.Subset(source, pick(len(source), limit))


def pick(n: int, count: int) -> np.ndarray:
    """`count` of 0..n-1, ascending: those with the smallest hashes."""
    return np.sort(np.argsort(hashing.mix_range(n, seed=0), kind='stable')[:count])


def split(source) -> tuple[subset.Subset, subset.Subset]:
    """(train, test) of one labelled source; a hash of the index chooses a fifth for test.

    It is the same fifth on every machine and in every version.
    """
    n = len(source)
    if n < 2:
        raise errors.UserError(f'{n} image cannot be split in train and test; give at least two.')
    test = pick(n, min(n - 1, max(1, round(n * 0.2))))
    return subset.Subset(source, np.setdiff1d(np.arange(n), test)), subset.Subset(source, test)
