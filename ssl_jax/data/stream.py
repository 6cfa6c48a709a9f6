# SPDX-License-Identifier: Apache-2.0
"""Streams of batches; training batches are a pure function of the step.

Row r of step t is sample g = t * batch_size + r of one endless sequence. Its image is a function of
(seed, g), by the order of the source (`data.order`); its crops are drawn from a counter-based
generator keyed by (seed, g). So the batches are the same for any number of threads, worker
processes and hosts, a restart needs no iterator state, and every image appears exactly once per
epoch (or as the order of the source says), also where a batch crosses from one epoch into the next.
"""

import contextlib
import functools
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from ssl_jax.data import host, loader, maps, order
from ssl_jax.data import transform as transform_lib
from ssl_jax.run import errors, hashing, launch, storage, uploads

MAX_TRIES = 8  # images tried for one row, the first included, before giving up
MAPS = {'segmentation': np.uint8, 'depth': np.float32}  # per pixel, cut as the image
_IO_PAUSES = (0.1, 0.5, 2.0)  # seconds before each repetition of a failed read


def train_stream(
    source: Any,
    views: Sequence[host.View],
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
    num_threads: int | None = None,
    num_workers: int = 0,
    repeats: int = 1,
) -> loader.Stream:
    """Endless iterator over training batches of numpy arrays; close it, or use it in a `with`.

    A batch is {view.name: uint8 (B, count, size, size, 3), 'id': int64 (B,) index of the image,
    'bad': int64 (B, MAX_TRIES) indices that could not be decoded, padded with -1, and 'label':
    int32 (B,) if the source has labels}, where B = len(rows).

    Memory: besides the batch that was returned at most `loader.READY` finished ones,
    ceil(num_threads / B) in work, and an image per thread. Each worker process has one finished
    batch less, but up to four on their way. Nothing is read before the first next().

    A hash of (seed, g, attempt) chooses the replacement of an image that cannot be decoded, so it
    is the same on any number of threads, processes and hosts. The order draws it from where the
    image came from: from the same source of a mixture, from those that an epoch takes by scores.

    Args:
      source: see `ssl_jax.data.sources`.
      views: at least one.
      batch_size: the global one.
      seed: with `source`, `views`, `batch_size` and `repeats` it determines every batch.
      start_step: the step of the first batch.
      rows: sorted rows of the global batch to load; default all.
      num_threads: per process, over rows of the batch that is needed next; default one per core
        that this process may use, or four where each image is a request to a bucket; 64 at most.
      num_workers: processes; 0 loads in threads of this process. Threads are faster unless the GIL
        is the limit; decoding and resizing release it. Batches are copied once more.
      repeats: consecutive samples with crops of one image; an epoch then has one of `repeats`
        images (repeated augmentation: Hoffer et al., arXiv 1901.09335).

    Raises:
      UserError: if there are fewer images than rows in a batch; from next(), if MAX_TRIES images in
        a row could not be decoded.
    """
    n = order.epoch_size(source)
    if n < batch_size:
        raise errors.UserError(
            f'{n} images are fewer than one batch of {batch_size}: add images or set '
            f'batch_size to {n} or less.'
        )
    threads = num_threads or max(1, num_reading(source, 64) // max(1, num_workers))
    source = maps.images_only(source)
    samples = _TrainSamples(source, batch_size, rows, views, seed, start_step, repeats)
    return loader.stream(samples, threads, num_workers)


def eval_stream(
    source: Any,
    transform: dict | int,
    batch_size: int,
    rows: Sequence[int] | None = None,
) -> loader.Stream:
    """Iterator once over the source, in order: what an encoder sees of every image.

    A batch is {'image': uint8 (B, size, size, 3), 'id': int64 (B,), 'mask': bool (B,)}, and
    'label': int32 (B,), 'segmentation': uint8 (B, size, size), 'depth': float32 (B, size, size) as
    the source has them. The last batch is padded to the same shape; `mask` is False there and
    where an image could not be read or decoded (then it is black, and its other keys are 0);
    'id' is -1 for padding.
    Images are decoded at full size, with the pixels that Pillow gives. Maps are cut as the images;
    one that cannot be read, or of another size than its image, is an error.

    Args:
      source: see `ssl_jax.data.sources`; `maps.images_only` of it where the maps are not needed.
      transform: see `data.transform`; a number of pixels stands for ours of that size.
      batch_size: the global one.
      rows: sorted rows of each global batch to load; default all.
    """
    samples = _EvalSamples(source, batch_size, rows, transform_lib.of(transform))
    return loader.stream(samples, num_reading(source, 16))


def num_reading(source: Any, most: int) -> int:
    """Threads that read: one per core; more where it waits for a bucket most of the time."""
    if getattr(source, 'remote', False):
        return min(64, 4 * launch.cores())
    return min(most, launch.cores())


class TooManyBadImages(errors.UserError):  # noqa: N818  named for the event
    """More images could not be decoded than the budget allows."""


class BadImages:
    """Counts and lists images that cannot be decoded; stops the run beyond a budget.

    The list has one JSON object per distinct image, {"id", "path", "reason"}. A restart reads it;
    entries that no longer name the same image do not count.

    Args:
      source: of the stream.
      path: of the list.
      budget: share of the source that may be bad; one image is always allowed.
    """

    def __init__(self, source: Any, path: epath.PathLike, budget: float):
        self._source = source
        self._path = epath.Path(path)
        self._allowed = max(1, int(budget * len(source)))
        self._lines = storage.read_lines(self._path)
        self._seen = {self._known(line) for line in self._lines} - {None}

    @property
    def count(self) -> int:
        """Distinct bad images so far."""
        return len(self._seen)

    def update(self, batch: dict) -> int:
        """Takes a batch of `train_stream`; returns `count`.

        Raises:
          TooManyBadImages: beyond the budget.
        """
        bad = batch['bad']
        if bad[:, 0].max() < 0:  # the usual case: a first try never fails after a second one
            return self.count
        for i in sorted(set(bad[bad >= 0].tolist()) - self._seen):
            self._seen.add(i)
            entry = {'id': i, 'path': self._source.describe(i), 'reason': _reason(self._source, i)}
            self._write(json.dumps(entry, ensure_ascii=False) + '\n')
            logging.warning('Skipped %s: %s', entry['path'], entry['reason'])
        if self.count > self._allowed:
            uploads.flush()
            raise TooManyBadImages(
                f'{self.count} of {len(self._source)} images cannot be decoded, more than the '
                f'{self._allowed} allowed, listed in {self._path}: repair them, or raise '
                f'data.bad_budget.'
            )
        return self.count

    def _known(self, line):
        """The id of a line of the list, or None if it is torn or now names another image."""
        try:
            entry = json.loads(line)
            i = entry['id']
            same = 0 <= i < len(self._source) and self._source.describe(i) == entry['path']
        except (ValueError, KeyError, TypeError):
            return None
        return i if same else None

    def _write(self, line):
        if storage.is_remote(self._path):  # objects cannot be appended to; the list is short
            self._lines.append(line.rstrip('\n'))
            uploads.put(self._path, ''.join(f'{x}\n' for x in self._lines).encode())
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, 'a+b') as f:
            # A kill may have torn the last line.
            if f.tell() and os.pread(f.fileno(), 1, f.tell() - 1) != b'\n':
                f.write(b'\n')
            f.write(line.encode())


def say_left_out(source: Any, ids: Sequence[int]) -> None:
    """Logs how many images an evaluation leaves out, and why; each sentence once per process."""
    if not len(ids) or not launch.is_main():
        return
    why = '; '.join(f'{source.describe(int(i))}: {_reason(source, int(i))}' for i in ids[:3])
    more = f'; and {len(ids) - 3} more' if len(ids) > 3 else ''
    _say(f'{len(ids)} of {len(source)} images cannot be read and do not count ({why}{more})')


@functools.cache
def _say(line):
    launch.log(line)


def _reason(source, i):
    try:
        host.decode(read(source, i)['image'])
    except (host.DecodeError, OSError) as e:
        return str(e)
    return 'could not be read at first, but can be now'


def min_size(views: Sequence[host.View]) -> int:
    """The short side in pixels to which a JPEG may be decoded without a loss to any crop.

    No crop covers less than scale[0] of the area: with the short side at `size / sqrt(scale[0])` an
    image has all the detail of a square crop of the full one.
    """
    return max(math.ceil(v.size / math.sqrt(v.scale[0])) for v in views)


def generator(seed: int, g: int) -> np.random.Generator:
    """Random numbers of sample `g`."""
    key = np.array([seed & (2**64 - 1), g], np.uint64)
    return np.random.Generator(np.random.Philox(key=key))


def first_good(
    source: Any, seed: int, g: int, repeats: int = 1, min_size: int | None = None
) -> tuple[int, dict, np.ndarray, np.ndarray]:
    """The first image for sample `g` that can be decoded.

    Args:
      source, seed, repeats: see `train_stream`.
      g: number of the sample.
      min_size: see `host.decode`.

    Returns:
      (index, item, pixels, indices of those that could not be decoded, padded with -1).

    Raises:
      UserError: MAX_TRIES images could not be decoded.
    """
    index_of, sample = order.of(source), g // repeats
    bad = np.full(MAX_TRIES, -1, np.int64)
    for attempt in range(MAX_TRIES):
        draw = hashing.mix(seed, g, attempt) if attempt else None
        i = index_of(sample, seed, draw)
        try:
            item = read(source, i)
            return i, item, host.decode(item['image'], min_size), bad
        except (host.DecodeError, OSError) as e:
            bad[attempt], reason = i, str(e)
    raise errors.UserError(
        f'{MAX_TRIES} images in a row could not be decoded, the last being '
        f'{source.describe(i)} ({reason}): check the data set.'
    )


class Samples:
    """Random access to (step, row): element e is row rows[e % B] of step e // B."""

    def __init__(self, source, batch_size, rows):
        self.rows = range(batch_size) if rows is None else [int(row) for row in rows]
        self._source, self._batch_size = source, batch_size

    def __getitem__(self, e):
        step, row = divmod(int(e), len(self.rows))
        return self._sample(step, self.rows[row])


class _TrainSamples(Samples):
    def __init__(self, source, batch_size, rows, views, seed, start_step, repeats):
        super().__init__(source, batch_size, rows)
        self._views, self._seed, self._start, self._repeats = views, seed, start_step, repeats
        self._min_size = min_size(views)

    def __len__(self):
        return (sys.maxsize // self._batch_size - self._start) // 2 * len(self.rows)

    def _sample(self, step, row):
        g = (self._start + step) * self._batch_size + row
        i, item, image, bad = first_good(self._source, self._seed, g, self._repeats, self._min_size)
        rng = generator(self._seed, g)
        sample = {}
        for v in self._views:
            crops = [host.random_resized_crop(image, rng, v.size, v.scale) for _ in range(v.count)]
            sample[v.name] = np.stack(crops)
        sample |= {'id': np.int64(i), 'bad': bad}
        if 'label' in item:
            sample['label'] = np.int32(item['label'])
        return sample


class _EvalSamples(Samples):
    """Images cut by a transform; beyond the end, padding."""

    def __init__(self, source, batch_size, rows, transform):
        super().__init__(source, batch_size, rows)
        self._transform = transform

    def __len__(self):
        return -(-len(self._source) // self._batch_size) * len(self.rows)

    def _sample(self, step, row):
        i = step * self._batch_size + row
        if i >= len(self._source):
            return self._blank(-1)
        try:
            item = read(self._source, i)
            whole = host.decode(item['image'])
        except (host.DecodeError, OSError):
            return self._blank(i)
        maps.check_size(whole, item, tuple(MAPS), self._source.describe(i))
        image = transform_lib.cut(whole, self._transform)
        sample = {'image': image, 'id': np.int64(i), 'mask': np.bool_(True)}
        if 'label' in item:
            sample['label'] = np.int32(item['label'])
        for key, dtype in MAPS.items():
            if key in item:
                sample[key] = transform_lib.cut(item[key], self._transform, 'nearest').astype(dtype)
        return sample

    def _blank(self, i):
        """A row that does not count, with the keys of the others."""
        size = self._transform['size']
        blank = {'image': np.zeros((size, size, 3), np.uint8), 'mask': np.bool_(False)}
        blank['id'] = np.int64(i)
        if 'label' in self._keys:
            blank['label'] = np.int32(0)
        maps = {key: np.zeros((size, size), dtype) for key, dtype in MAPS.items()}
        return blank | {key: x for key, x in maps.items() if key in self._keys}

    @functools.cached_property
    def _keys(self):
        """Keys of the first item that can be read; none if there is no such item."""
        for i in range(len(self._source)):
            with contextlib.suppress(OSError, host.DecodeError):
                return frozenset(self._source[i])
        return frozenset()


def read(source: Any, i: int) -> dict:
    """source[i], read again after a pause on errors that may pass.

    A missing or forbidden file is an error at once.
    """
    for pause in _IO_PAUSES:
        try:
            return source[i]
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        except OSError:
            time.sleep(pause)
    return source[i]
