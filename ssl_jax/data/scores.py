# SPDX-License-Identifier: Apache-2.0
"""Soft sampling by scores: hard images are shown more often (Pixio, arXiv 2512.15715, section 3.3).

An image is taken in an epoch if u(seed, epoch, index) <= min(loss, 1), with u uniform in [0, 1),
and never if it is too plain or too small, or has no score. `ssl_jax data score` writes the scores.
"""

import bisect
import io
import json
import os
import threading
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ssl_jax.data import files, fingerprint, order
from ssl_jax.run import errors, hashing, storage

KIND = 'scores'  # in the metadata of the file, key `ssl_jax`
COLUMNS = ('id', 'loss', 'entropy', 'height', 'width')
CHUNK = 1 << 20  # images whose random numbers are in memory at once
KEPT = 4  # lists of epochs that are kept: batches in work may lie in several


class Sampled:
    """Order of soft sampling: those that an epoch takes, in a permutation of (seed, epoch).

    Each process computes the list of an epoch from hashes. A restart counts those of the epochs
    before too.

    Args:
      chance: float32 (n,), the probability of each image to be taken in an epoch, 0 to 1.
    """

    def __init__(self, chance: np.ndarray):
        self._chance = chance
        self.size = float(chance.sum(dtype=np.float64))
        self._lock = threading.Lock()
        self._ends, self._lists = {}, {}

    def __call__(self, sample: int, seed: int, draw: int | None = None) -> int:
        epoch, position, taken = self._find(sample, seed)
        if draw is None:
            return int(taken[order.permuted(position, len(taken), seed, epoch)])
        return int(taken[draw % len(taken)])

    def taken(self, seed: int, epoch: int) -> np.ndarray:
        """Indices of the images of an epoch, ascending."""
        found, stream = [], hashing.mix(seed, epoch)
        for start in range(0, len(self._chance), CHUNK):
            chance = self._chance[start : start + CHUNK]
            u = (hashing.mix_range(len(chance), stream, start) >> np.uint64(11)) * 2.0**-53
            found.append(np.flatnonzero((u <= chance) & (chance > 0)).astype(np.uint32) + start)
        return np.concatenate(found)

    def _find(self, sample, seed):
        """(epoch, position in it, images of the epoch) of a sample."""
        with self._lock:
            ends = self._ends.setdefault(seed, [])
            while not ends or ends[-1] <= sample:
                ends.append((ends[-1] if ends else 0) + len(self._list(seed, len(ends))))
            epoch = bisect.bisect_right(ends, sample)
            begin = ends[epoch - 1] if epoch else 0
            return epoch, sample - begin, self._list(seed, epoch)

    def _list(self, seed, epoch):
        if (seed, epoch) not in self._lists:
            while len(self._lists) >= KEPT:
                del self._lists[next(iter(self._lists))]
            self._lists[seed, epoch] = self.taken(seed, epoch)
        return self._lists[seed, epoch]

    def __getstate__(self):
        return {**self.__dict__, '_lock': None, '_ends': {}, '_lists': {}}

    def __setstate__(self, state):
        self.__dict__.update(state, _lock=threading.Lock())


def sample_by(
    source: Any,
    path: str | os.PathLike,
    min_entropy: float | None = None,
    min_side: int | None = None,
) -> None:
    """Gives a source the order of soft sampling.

    Args:
      source: see `data.sources`; its `order`, `notes` and `fingerprint` are set.
      path: the file of scores, local or in a bucket.
      min_entropy: images with this entropy of colours (bits) or less are never taken; Pixio: 4.5 of
        a histogram that is not public.
      min_side: images with a side of fewer pixels are never taken; Pixio: 320.

    Raises:
      UserError: the file holds no scores, or those of other images, or no image is left.
    """
    table = _read(source, path)
    ids = table['id'].to_numpy()
    loss = table['loss'].to_numpy()
    usable = np.isfinite(loss)
    plain = np.zeros(len(ids), bool)
    small = np.zeros(len(ids), bool)
    if min_entropy is not None:
        plain = table['entropy'].to_numpy() <= min_entropy
    if min_side is not None:
        small = np.minimum(table['height'].to_numpy(), table['width'].to_numpy()) < min_side
    chance = np.zeros(len(source), np.float32)
    kept = usable & ~plain & ~small
    chance[ids[kept]] = np.clip(loss[kept], 0, 1)
    by_scores = Sampled(chance)
    if round(by_scores.size) < 1:
        raise errors.UserError(
            f'{path} leaves no image of {len(source):,}: lower min_entropy or min_side.'
        )
    left_out = {
        'without a score': len(source) - int(usable.sum()),
        f'of entropy {min_entropy} or less': int(plain.sum()),
        f'with a side below {min_side} pixels': int(small.sum()),
    }
    left_out = [f'{n:,} {why}' for why, n in left_out.items() if n]
    source.order = by_scores
    source.notes = (
        *getattr(source, 'notes', ()),
        f'sampled by {path}: an epoch takes {by_scores.size:,.0f} of {len(source):,} images on '
        f'average{"; never " * bool(left_out)}{", ".join(left_out)}',
    )
    content, plus, times = source.fingerprint.partition('+')
    source.fingerprint = f'{hashing.digest(content, chance.tobytes())}{plus}{times}'


def _read(source, path):
    """The table of scores of a source."""
    files.require(os.fspath(path))
    try:
        table = pq.read_table(io.BytesIO(storage.read(path)), columns=list(COLUMNS))
        about = json.loads(table.schema.metadata[b'ssl_jax'])
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError):
        about = {}
    if about.get('kind') != KIND:
        raise errors.UserError(f'{path} holds no scores: make it with `ssl_jax data score`.')
    stated = fingerprint.content(about['data']), about['images']
    if stated != (fingerprint.content(source.fingerprint), len(source)):
        raise errors.UserError(
            f'{path} has the scores of {about["images"]:,} other images than the {len(source):,} '
            f'of {source.describe(0)} ...: score these with `ssl_jax data score`.'
        )
    return table
