# SPDX-License-Identifier: Apache-2.0
"""The stream of training batches, as a pure function of the step.

Row r of step t is sample g = t * batch_size + r of one endless sequence.  Its epoch and position
are divmod(g, len(source)); the image is a permutation of the position keyed by (seed, epoch); its
crops are drawn from a counter-based generator keyed by (seed, g).  So the batches are the same for
any number of threads, worker processes and hosts, a restart needs no iterator state, and every
image appears exactly once per epoch, also where a batch crosses from one epoch into the next.
"""

import json
import math
import os
import sys
import time

import grain
import numpy as np
from absl import logging
from etils import epath

from ssl_jax.data import host, workers

MAX_TRIES = 8  # Images tried for one place in a batch, the first included, before giving up.
_IO_PAUSES = (0.1, 0.5, 2.0)  # Seconds before each repetition of a failed read.


def sample_index(g, n, seed):
    """Dataset index of sample `g`: position g % n of the permutation keyed by (seed, g // n)."""
    epoch, position = divmod(g, n)
    if n == 1:
        return 0
    return grain.experimental.index_shuffle(
        position, max_index=n - 1, seed=_hash(seed, epoch), rounds=4
    )


def train_stream(
    source,
    views,
    *,
    batch_size,
    seed,
    start_step=0,
    rows=None,
    num_threads=None,
    num_workers=0,
    prefetch=None,
    repeats=1,
):
    """Endless iterator over training batches of numpy arrays; close it, or use it in a `with`.

    A batch is {view.name: uint8 (B, count, size, size, 3), 'id': int64 (B,) the index used,
    'bad': int64 (B, MAX_TRIES) indices that could not be decoded, padded with -1, and 'label':
    int32 (B,) if the source has labels}, where B = len(rows).

    An image that cannot be decoded is replaced by one chosen by a hash of (seed, g, attempt), so
    that the replacement, too, does not depend on who loads it.

    Args:
      source: see `ssl_jax.data.sources`.
      views: sequence of `View`.
      batch_size: the global one.
      seed: int; with `source`, `views` and `batch_size` it determines every batch.
      start_step: the step of the first batch.
      rows: sorted rows of the global batch to load here; default all.
      num_threads: per process; default one per core.  Each builds a whole batch at a time.
      num_workers: processes; 0 loads in threads of this one, which is faster as long as the GIL is
        not the limit, since decoding and resizing release it.
      prefetch: batches held ready or in work (per process); default num_threads + 1.
      repeats: samples in a row that are of one image, each with crops of its own; an epoch then has
        only every so-manieth image (repeated augmentation: Hoffer et al., arXiv 1901.09335).

    Raises:
      ValueError: if there are fewer images than rows in a batch.
      RuntimeError: from next(), if MAX_TRIES images in a row could not be decoded.
    """
    n = len(source)
    if n < batch_size:
        raise ValueError(
            f'{n} images are fewer than one batch of {batch_size}: add images or set '
            f'batch_size to {n} or less.'
        )
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    num_threads = num_threads or max(1, min(64, workers.cores()) // max(1, num_workers))
    prefetch = prefetch or num_threads + 1
    samples = _TrainSamples(source, tuple(views), batch_size, seed, start_step, rows, repeats)
    dataset = grain.MapDataset.source(samples).batch(len(rows), drop_remainder=True)
    dataset = dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    )
    if num_workers:
        options = grain.MultiprocessingOptions(num_workers=num_workers)
        dataset = dataset.mp_prefetch(options, worker_init_fn=workers.make_start())
    return Stream(dataset, samples)


def eval_stream(source, size, batch_size, resize=None, rows=None):
    """Iterator once over the source, in order: the central crop of every image.

    A batch is {'image': uint8 (B, size, size, 3), 'id': int64 (B,), 'mask': bool (B,)}, and
    'label': int32 (B,), 'segmentation': uint8 (B, size, size), 'depth': float32 (B, size, size) as
    the source has them.  The last batch is padded to the same shape; `mask` is False there and
    where an image could not be decoded (then the image is black).

    Args:
      source: see `ssl_jax.data.sources`.
      size: side of the crop in pixels.
      batch_size: the global one.
      resize: short side before the crop; default `size`.
      rows: sorted rows of each global batch to load here; default all.
    """
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    samples = _EvalSamples(source, size, resize, batch_size, rows)
    dataset = grain.MapDataset.source(samples).batch(len(rows))
    threads = min(16, workers.cores())
    dataset = dataset.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
    )
    return Stream(dataset, samples)


class Stream:
    """Iterator over the batches of a Grain dataset that can be closed promptly."""

    def __init__(self, dataset, samples):
        self._samples = samples
        self._iterator = iter(dataset)

    def __iter__(self):
        return self

    def __next__(self):
        return next(self._iterator)

    def close(self):
        """Stops threads and worker processes; batches in work are abandoned."""
        self._samples.closed = True
        self._iterator.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __del__(self):
        # At interpreter exit the threads would first finish all that was prefetched.
        if '_iterator' in self.__dict__ and not sys.is_finalizing():
            self.close()


class TooManyBadImages(RuntimeError):  # noqa: N818  reads as what happened
    """More images could not be decoded than the budget allows."""


class BadImages:
    """Counts the images that could not be decoded, lists them, and stops the run beyond a budget.

    The list is a file with one JSON object per distinct image, {"id", "path", "reason"}.  It
    outlives a restart; entries that no longer name the same image are dropped from the count.

    Args:
      source: the one the stream reads.
      path: of the list, or None for no file.
      budget: share of the source that may be bad; one image is always allowed.
    """

    def __init__(self, source, path, budget=0.01):
        self._source = source
        self._path = epath.Path(path) if path else None
        self._allowed = max(1, int(budget * len(source)))
        self._seen = set()
        if self._path and self._path.exists():
            self._seen = set(map(self._known, self._path.read_text().splitlines())) - {None}

    @property
    def count(self):
        """Distinct bad images so far."""
        return len(self._seen)

    def update(self, batch):
        """Takes a batch of `train_stream`; returns how many distinct images are bad so far.

        Raises:
          TooManyBadImages: beyond the budget.
        """
        bad = batch['bad']
        if bad[:, 0].max() < 0:  # The usual case: a first try never fails after a second one.
            return len(self._seen)
        for i in sorted(set(bad[bad >= 0].tolist()) - self._seen):
            self._seen.add(i)
            entry = {'id': i, 'path': self._source.describe(i), 'reason': _reason(self._source, i)}
            self._write(json.dumps(entry, ensure_ascii=False) + '\n')
            logging.warning('Skipped %s: %s', entry['path'], entry['reason'])
        if len(self._seen) > self._allowed:
            listed = f', listed in {self._path}' if self._path else f', the last is {entry["path"]}'
            raise TooManyBadImages(
                f'{len(self._seen)} of {len(self._source)} images cannot be decoded, more than the '
                f'{self._allowed} allowed{listed}: repair them, or raise data.bad_budget.'
            )
        return len(self._seen)

    def _known(self, line):
        """The id of a line of the list, or None if it is cut off or means another image now."""
        try:
            entry = json.loads(line)
            i = entry['id']
            same = 0 <= i < len(self._source) and self._source.describe(i) == entry['path']
        except (ValueError, KeyError, TypeError):
            return None
        return i if same else None

    def _write(self, line):
        if self._path is None:
            return
        text = os.fspath(self._path)
        if '://' in text:  # Object stores cannot append; the list is short.
            old = self._path.read_text() if self._path.exists() else ''
            self._path.write_text(old + line)
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(text, 'a+b') as f:
            # After a kill in the middle of a line, start a new one.
            if f.tell() and os.pread(f.fileno(), 1, f.tell() - 1) != b'\n':
                f.write(b'\n')
            f.write(line.encode())


def _reason(source, i):
    try:
        host.decode(read(source, i)['image'])
    except (host.DecodeError, OSError) as e:
        return str(e)
    return 'could not be read at first, but can be now'


class _TrainSamples:
    """Random access to (step, row): element e is row rows[e % B] of step start_step + e // B."""

    closed = False

    def __init__(self, source, views, batch_size, seed, start_step, rows, repeats=1):
        self._source = source
        self._views = views
        self._repeats = repeats
        self._batch_size = batch_size
        self._seed = seed
        self._start = start_step
        self._rows = rows.astype(int).tolist()
        # No crop covers less than scale[0] of the area, so a JPEG decoded with its short side at
        # `size / sqrt(scale[0])` loses no detail that a (square) crop of the full image would keep.
        self._min_size = max(math.ceil(v.size / math.sqrt(v.scale[0])) for v in views)

    def __len__(self):
        return (sys.maxsize // self._batch_size - self._start) // 2 * len(self._rows)

    def __getitem__(self, e):
        if self.closed:
            raise RuntimeError('The stream is closed.')
        step, row = divmod(int(e), len(self._rows))
        g = (self._start + step) * self._batch_size + self._rows[row]
        i, item, image, bad = self._first_good(g)
        rng = np.random.Generator(np.random.Philox(key=_key(self._seed, g)))
        sample = {v.name: _cut(image, v, rng) for v in self._views}
        sample['id'] = np.int64(i)
        sample['bad'] = bad
        if 'label' in item:
            sample['label'] = np.int32(item['label'])
        return sample

    def _first_good(self, g):
        n = len(self._source)
        bad = np.full(MAX_TRIES, -1, np.int64)
        reason = ''
        for attempt in range(MAX_TRIES):
            if attempt == 0:
                i = sample_index(g // self._repeats, n, self._seed)
            else:
                i = _hash(self._seed, g, attempt) % n
            try:
                item = read(self._source, i)
                return i, item, host.decode(item['image'], self._min_size), bad
            except (host.DecodeError, OSError) as e:
                bad[attempt] = i
                reason = str(e)
        raise RuntimeError(
            f'{MAX_TRIES} images in a row could not be decoded, the last being '
            f'{self._source.describe(i)} ({reason}): check the data set.'
        )


class _EvalSamples:
    """Random access to the central crops; beyond the end, padding."""

    closed = False

    def __init__(self, source, size, resize, batch_size, rows):
        self._source = source
        self._size = size
        self._resize = resize
        self._batch_size = batch_size
        self._rows = rows.astype(int).tolist()

    def __len__(self):
        return -(-len(self._source) // self._batch_size) * len(self._rows)

    def __getitem__(self, e):
        if self.closed:
            raise RuntimeError('The stream is closed.')
        step, row = divmod(int(e), len(self._rows))
        i = step * self._batch_size + self._rows[row]
        size = self._size
        real = i < len(self._source)
        i = i if real else 0
        item = read(self._source, i)  # For padding, too: it tells the keys.
        try:
            image = host.decode(item['image'], self._resize or size)
            image = host.resize_center_crop(image, size, self._resize)
        except host.DecodeError:
            image, real = np.zeros((size, size, 3), np.uint8), False
        sample = {'image': image, 'id': np.int64(i), 'mask': np.bool_(real)}
        if 'label' in item:
            sample['label'] = np.int32(item['label'])
        for key, dtype in (('segmentation', np.uint8), ('depth', np.float32)):
            if key in item:
                cut = host.resize_center_crop(item[key], size, self._resize, 'nearest')
                sample[key] = cut.astype(dtype)
        return sample


def read(source, i):
    """source[i], read again after a pause if the read fails in a way that may pass.

    A file that is missing or forbidden will be so in a second, too; that fails at once.
    """
    for pause in _IO_PAUSES:
        try:
            return source[i]
        except (FileNotFoundError, PermissionError, IsADirectoryError):
            raise
        except OSError:
            time.sleep(pause)
    return source[i]


def _cut(image, view, rng):
    """uint8 (count, size, size, 3)."""
    return np.stack(
        [
            host.random_resized_crop(
                image, rng, view.size, view.scale, view.ratio, view.interpolation
            )
            for _ in range(view.count)
        ]
    )


def _key(seed, g):
    return np.array([seed & (2**64 - 1), g], np.uint64)


def _hash(*numbers):
    """32 bits from integers by splitmix64: the same on every machine and in every version."""
    h = 0
    for x in numbers:
        h = (h + x + 0x9E3779B97F4A7C15) & (2**64 - 1)
        h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        h ^= h >> 31
    return h >> 32
