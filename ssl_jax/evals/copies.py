# SPDX-License-Identifier: Apache-2.0
"""Copy detection: is the nearest image of an edited photo its original?

Each query is an image after strong edits: a part of it, rotated, in other colours, with something
over it, compressed. The database are all originals. No labels are needed.

References:
  the score and the kinds of edits are those of Douze et al., arXiv 2106.09672 (DISC21).
"""

import dataclasses
import functools
import io
import zlib
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import PIL.ImageEnhance

from ssl_jax.data import fingerprint, host
from ssl_jax.evals import features, retrieval, task
from ssl_jax.fields import Range
from ssl_jax.run import errors, hashing, peers

NEEDS = ''
CANDIDATES = 10  # per query, for micro-AP
GREY = (128, 128, 128)


@dataclasses.dataclass(frozen=True)
class Settings:
    edits: tuple = ('crop', 'rotation', 'colour', 'overlay', 'jpeg')  # one after the other
    seed: Annotated[int, Range(0, 2**31)] = 0  # of the edits


def evaluate(model, data: task.Data, settings: Settings, work: task.Work):
    """Rows of top-1, mAP and micro-AP in percent, one per feature."""
    for name in settings.edits:
        if name not in EDITS:
            raise errors.UserError(f'There is no edit {name!r}{errors.nearest(name, EDITS)}')
    source = features.limited(data.train, work.limit)
    if len(source) < 2:
        raise errors.UserError('Copies are searched among originals: give two images or more.')
    queries = features.Edited(
        source,
        np.arange(len(source)),
        lambda image, i: edit(image, i, settings.seed, settings.edits),
    )
    x, ids, _ = retrieval.embed(model, source, work)
    qx, query_ids, _ = retrieval.embed(model, queries, work)
    kept = np.isin(query_ids, ids)
    own = np.searchsorted(ids, query_ids[kept])
    for name in x:
        about = dict(
            retrieval.protocol(work, name),
            edits=list(settings.edits),
            seed=settings.seed,
            queries=int(kept.sum()),
            database=len(ids),
            micro_ap=f'{CANDIDATES} nearest of each query, one ranking',
            data=fingerprint.content(data.train.fingerprint),
        )
        yield task.row('copies', name, scores(qx[name][kept], own, x[name]), about)


def scores(queries: np.ndarray, own: np.ndarray, database: np.ndarray) -> dict[str, float]:
    """Top-1, mAP and micro-AP in percent.

    Args:
      queries: (q, d), L2-normalised.
      own: (q,) row of the database that is the original.
      database: (n, d), L2-normalised.

    Returns:
      top-1: queries whose nearest image is the original; of equal ones the first in the database
        counts as nearest. mAP: mean of 1 / rank of the original. micro-AP: average precision of one
        ranking of the pairs of all queries and their nearest images.
    """
    count, candidates = len(queries), min(CANDIDATES, len(database))
    chunk = max(1, min(count, retrieval.CHUNK_ELEMENTS // len(database)))
    placed, found = jax.device_put(database), []
    for start in range(0, count, chunk):
        peers.progress()
        x, of = queries[start : start + chunk], own[start : start + chunk]
        found.append([np.asarray(v) for v in _search(x, of, placed, candidates)])
    rank, similarity, index = (np.concatenate(v) for v in zip(*found, strict=True))
    order = np.argsort(-similarity.reshape(-1), kind='stable')
    hit = (index == own[:, None]).reshape(-1)[order]
    precision = np.cumsum(hit) / np.arange(1, len(hit) + 1)
    return {
        'top-1 (%)': 100 * (rank == 1).mean(),
        'mAP (%)': 100 * (1 / rank).mean(),
        'micro-AP (%)': 100 * (precision * hit).sum() / count,
    }


@functools.partial(jax.jit, static_argnums=3)
def _search(x, own, database, candidates):
    """Rank of the original (q,), from 1; similarities and indices of the nearest (q, k)."""
    similarity = jnp.einsum('qd,nd->qn', x, database, precision='highest')
    mine = jnp.take_along_axis(similarity, own[:, None], axis=1)
    before = jnp.arange(len(database)) < own[:, None]
    rank = 1 + (jnp.where(before, similarity >= mine, similarity > mine)).sum(axis=1)
    return rank, *jax.lax.top_k(similarity, candidates)


def edit(image: np.ndarray, i: int, seed: int, edits: tuple) -> np.ndarray:
    """Image `i`, uint8 (H, W, 3), after `edits`; each draws from (seed, its name, i) alone."""
    for name in edits:
        key = [hashing.mix(seed, zlib.crc32(name.encode())), i]
        rng = np.random.Generator(np.random.Philox(key=np.array(key, np.uint64)))
        image = np.ascontiguousarray(EDITS[name](image, rng))
    return image


def _crop(image, rng):
    """A part of 30 to 70 % of the area, see `host.crop_box`."""
    y, x, h, w = host.crop_box(*image.shape[:2], rng, (0.3, 0.7))
    return image[y : y + h, x : x + w]


def _rotation(image, rng):
    """5 to 30 degrees to either side, of the same size, with grey corners."""
    angle = rng.uniform(5, 30) * rng.choice((-1, 1))
    bicubic = PIL.Image.Resampling.BICUBIC
    return np.asarray(PIL.Image.fromarray(image).rotate(angle, bicubic, fillcolor=GREY))


def _colour(image, rng):
    """Brightness and contrast x 0.6 to 1.5, saturation x 0 to 1.8, hue +- a tenth of the circle."""
    hsv = np.array(PIL.Image.fromarray(image).convert('HSV'))
    hsv[:, :, 0] += np.uint8(rng.integers(-25, 26) % 256)
    out = PIL.Image.fromarray(hsv, 'HSV').convert('RGB')
    out = PIL.ImageEnhance.Color(out).enhance(rng.uniform(0, 1.8))
    out = PIL.ImageEnhance.Brightness(out).enhance(rng.uniform(0.6, 1.5))
    return np.asarray(PIL.ImageEnhance.Contrast(out).enhance(rng.uniform(0.6, 1.5)))


def _overlay(image, rng):
    """A rectangle of one colour over 10 to 25 % of the area."""
    y, x, h, w = host.crop_box(*image.shape[:2], rng, (0.1, 0.25))
    image = image.copy()
    image[y : y + h, x : x + w] = rng.integers(0, 256, 3)
    return image


def _jpeg(image, rng):
    """JPEG of quality 8 to 30."""
    data = io.BytesIO()
    PIL.Image.fromarray(image).save(data, 'JPEG', quality=int(rng.integers(8, 31)))
    return np.asarray(PIL.Image.open(data))


EDITS = {
    'crop': _crop,
    'rotation': _rotation,
    'colour': _colour,
    'overlay': _overlay,
    'jpeg': _jpeg,
}
