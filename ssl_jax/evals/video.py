# SPDX-License-Identifier: Apache-2.0
"""Video: the labels of the first frame are carried through the others by patch similarity.

Every patch takes the labels of the most similar patches nearby, in the first frame and in the last
few; nothing is trained. Scores are those of DAVIS: J, the intersection over union of regions, and
F, the F-measure of their outlines. Each folder of images is one sequence, its frames in the order
of their names.

References:
  Jabri et al., arXiv 2006.14613; DINO `eval_video_segmentation.py`; Perazzi et al., CVPR 2016;
  Pont-Tuset et al., arXiv 1704.00675.
"""

import dataclasses
import functools
import json
import math
import os
import time
from collections.abc import Iterator
from typing import Annotated

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from jax.sharding import PartitionSpec as P

from ssl_jax import sharding
from ssl_jax.data import fingerprint, host, maps
from ssl_jax.evals import features, knn, task
from ssl_jax.fields import Range
from ssl_jax.models import blocks
from ssl_jax.run import errors, hashing, launch, metrics, peers, storage, threads

NEEDS = 'segmentation'
BOUNDARY = 0.008  # of the diagonal: how far an outline may be off, as in DAVIS
MAX_FRAMES = 8  # encoded at a time
CHUNK = 256  # patches that look for their neighbours at a time


@dataclasses.dataclass(frozen=True)
class Settings:
    short_side: Annotated[int, Range(16, 4096)] = 480  # pixels, rounded to whole patches
    frames: Annotated[int, Range(0, 100)] = 7  # last frames that pass labels on, besides the first
    radius: Annotated[int, Range(1, 1000)] = 12  # patches, of a square window
    neighbours: Annotated[int, Range(1, 1000)] = 5  # most similar patches in all frames together
    temperature: Annotated[float, Range(1e-3, 10.0)] = 0.1
    background: int | None = None  # class that is not scored: 0 in DAVIS; None: 'background'


def evaluate(model, data: task.Data, settings: Settings, work: task.Work):
    """One row: J & F, J and F in percent, and J & F of repeating the labels of the first frame."""
    source = data.train
    background = settings.background
    if background is None:
        names = tuple(getattr(source, 'map_classes', None) or ())
        background = names.index('background') if 'background' in names else None
    found = sequences(source, work.limit)
    short = [name for name, frames in found.items() if len(frames) < 3]
    if short:
        raise errors.UserError(
            f'The sequence {short[0] or "of these images"} has {len(found[short[0]])} frames: '
            f'video needs three or more in each folder.'
        )
    about = dict(
        of='patch tokens after the final norm, L2-normalised',
        short_side=_sides(100, 100, settings.short_side, model.patch_size)[0],
        interpolation='bicubic, antialiased (Pillow); labels nearest',
        mean=list(work.transform['mean']),
        std=list(work.transform['std']),
        patch_size=model.patch_size,
        context=f'first and last {settings.frames} frames',
        radius=settings.radius,
        neighbours=settings.neighbours,
        affinity=f'exp(cosine / {settings.temperature:g})',
        decoding='bilinear to pixels, each class scaled from its minimum to its maximum, argmax',
        scored='all frames but the first and the last',
        classes='those of the first frame'
        + (f' without {background}' if background is not None else ''),
        ignore=maps.IGNORED,
        boundary=BOUNDARY,
        average='over frames, then over classes of all sequences',
        sequences=len(found),
        frames=sum(map(len, found.values())),
        data=fingerprint.content(source.fingerprint),
    )
    kept = _Kept(work, about)
    began, total, done = time.monotonic(), about['frames'], 0
    for name, frames in found.items():
        if name not in kept.scores:
            kept.put(name, _sequence(model, source, frames, settings, background, work))
            done += len(frames)
            total_left = total - sum(len(found[k]) for k in kept.scores)
            left = metrics.duration(total_left * (time.monotonic() - began) / done)
            if total_left:
                work.log(f'{len(kept.scores)} of {len(found)} sequences, {left} left')
    objects = [x for scores in kept.scores.values() for x in scores]
    if not objects:
        raise errors.UserError(
            'The first frames have no labelled class that is scored: label them, or set '
            'video.background.'
        )
    j, f, j0, f0 = 100 * np.mean([x[1:] for x in objects], axis=0)
    scores = {'J&F (%)': (j + f) / 2, 'J (%)': j, 'F (%)': f}
    scores['first labels repeated: J&F (%)'] = (j0 + f0) / 2
    of = [
        dict(sequence=name, label=x[0], J=100 * x[1], F=100 * x[2])
        for name, scores in kept.scores.items()
        for x in scores
    ]
    yield task.row('video', 'last', scores, about, objects=of)


class _Kept:
    """Scores of finished sequences, on disk: a restart continues with the next."""

    def __init__(self, work, about):
        digest = hashing.text_id(json.dumps(about, sort_keys=True))
        self._path = work.folder / f'video-{digest}.sequences.json'
        exists = launch.main_number(int(storage.exists(self._path)))
        self.scores = json.loads(storage.read(self._path)) if exists else {}

    def put(self, name, scores):
        self.scores[name] = scores
        if launch.is_main():
            storage.atomic_write(self._path, json.dumps(self.scores) + '\n')


def sequences(source, limit: int | None = None) -> dict[str, list[int]]:
    """{folder: indices of its frames in order}; '' for images without a path.

    Of the first `limit` images; the sequence that ends there is left out if it is too short.
    """
    found = {}
    for i in range(len(source)):
        found.setdefault(os.path.dirname(source.describe(i)), []).append(i)
    if limit is None or limit >= len(source):
        return found
    cut, left = {}, limit
    for name, frames in found.items():
        if min(left, len(frames)) >= 3 or not cut:
            cut[name] = frames[:left]
        left = max(0, left - len(frames))
    return cut


def _sequence(model, source, indices, settings, background, work):
    """[(class, J, F, J and F of the first labels)] of one sequence."""
    p, first, sums, count = model.patch_size, None, 0, 0
    frames = _frames(model, source, indices, settings, work)
    for number, (x, labels, sides) in enumerate(frames):
        peers.progress()
        if first is None:
            first, grid = labels, (sides[0] // p, sides[1] // p)
            classes = [int(c) for c in np.unique(labels) if c != maps.IGNORED]
            scored = [c for c in classes if c != background]
            memory = Memory(x, patch_labels(labels, classes, grid), settings.frames, work.mesh)
            continue
        soft = memory.propagate(x, grid, settings.radius, settings.neighbours, settings.temperature)
        if number == len(indices) - 1:  # DAVIS leaves it out
            break
        index = np.asarray(decode(soft, grid, sides))
        found = np.array([*classes, *[maps.IGNORED] * 256])[index].astype(np.uint8)
        found = cv2.resize(found, labels.shape[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
        rows = [(*region_and_outline(found, labels, c), *region_and_outline(first, labels, c))
                for c in scored]  # fmt: skip
        sums, count = sums + np.array(rows).reshape(-1, 4), count + 1
    return [[c, *map(float, row)] for c, row in zip(scored, sums / count, strict=True)]


def _frames(model, source, indices, settings, work) -> Iterator[tuple]:
    """Yields (L2-normalised tokens (N, D), labels (H, W), (height, width) encoded) per frame."""
    p, size = model.patch_size, None

    def read(i):
        try:
            item = source[i]
            image = host.decode(item['image'])
        except host.DecodeError as error:
            raise errors.UserError(
                f'{source.describe(i)} does not decode ({error}): a video needs all of its frames.'
            ) from error
        labels = np.asarray(item['segmentation'])
        h, w = sides = _sides(*image.shape[:2], settings.short_side, p)
        image = PIL.Image.fromarray(image).resize((w, h), PIL.Image.Resampling.BICUBIC)
        return np.asarray(image), labels, sides

    most = features.round_up(min(MAX_FRAMES, work.batch_size), work.mesh)
    rows = sharding.process_rows(work.mesh, most)
    waiting = []
    for k, frame in enumerate(threads.at_once(read, indices, min(8, launch.cores()))):
        size = size or frame[2]
        if frame[2] != size:
            raise errors.UserError(
                f'{source.describe(indices[k])} has another shape than the frames before it: give '
                f'each sequence a folder of its own.'
            )
        waiting.append(frame)
        if len(waiting) < most and k + 1 < len(indices):
            continue
        images = np.stack([image for image, _, _ in waiting])
        images = np.pad(images, [(0, most - len(images)), (0, 0), (0, 0), (0, 0)])
        with jax.set_mesh(work.mesh):
            out = model(sharding.to_global(images[rows], work.mesh, rows, most))
            tokens = np.asarray(_everywhere(work.mesh)(out['patch_tokens']))
        for x, (_, labels, sides) in zip(tokens, waiting, strict=False):
            yield x, labels, sides
        waiting = []


@functools.lru_cache
def _everywhere(mesh):
    """L2-normalised tokens, whole on every device."""

    return jax.jit(blocks.l2_normalize, out_shardings=sharding.replicated(mesh))


def _sides(height, width, short_side, p):
    """Height and width of an encoded frame: the short side rounded, both in whole patches."""
    scale = max(1, round(short_side / p)) * p / min(height, width)
    return tuple(max(1, round(n * scale / p)) * p for n in (height, width))


def patch_labels(labels: np.ndarray, classes: list, grid: tuple[int, int]) -> np.ndarray:
    """float32 (N, C): one-hot labels of patches, nearest; nothing where the label is ignored.

    C is padded with empty classes to the next power of two: few programs for many sequences.
    """
    small = PIL.Image.fromarray(labels).resize(grid[::-1], PIL.Image.Resampling.NEAREST)
    count = max(4, 1 << math.ceil(math.log2(max(len(classes), 1))))
    numbers = np.array([*classes, *[-1] * (count - len(classes))])
    return (np.asarray(small).reshape(-1, 1) == numbers).astype(np.float32)


class Memory:
    """The first frame and the last few with their soft labels.

    Args:
      tokens: (N, D) of the first frame, L2-normalised.
      labels: (N, C), its labels.
      frames: how many others are kept.
      mesh: splits the patches that look for their neighbours, default one device.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        labels: np.ndarray,
        frames: int,
        mesh: jax.sharding.Mesh | None = None,
    ):
        self._mesh = mesh = mesh or sharding.make_mesh(devices=jax.local_devices()[:1])

        def filled(x):
            return knn.put_whole(np.pad(x[None], [(0, frames), (0, 0), (0, 0)]), mesh)

        self._tokens, self._labels, self._frames = filled(tokens), filled(labels), frames
        self._is_filled = np.arange(frames + 1) < 1

    def propagate(self, tokens, grid, radius, neighbours, temperature) -> jax.Array:
        """Soft labels (N, C) of the next frame, which is kept."""
        tokens, own = knn.put_whole(tokens, self._mesh), knn.put_rows(tokens, self._mesh)
        labels = _propagate(
            self._tokens, self._labels, self._is_filled, own, mesh=self._mesh,
            grid=grid, radius=radius, neighbours=neighbours, temperature=temperature,
        )  # fmt: skip
        if self._frames:
            self._tokens, self._labels = _pushed(self._tokens, self._labels, tokens, labels)
            self._is_filled = np.append(self._is_filled[[0, *range(2, self._frames + 1)]], True)
        return labels


@jax.jit
def _pushed(tokens, labels, new_tokens, new_labels):
    """Replaces the oldest frame but the first."""

    def push(x, new):
        return jnp.concatenate([x[:1], x[2:], new[None]])

    return push(tokens, new_tokens), push(labels, new_labels)


@functools.partial(jax.jit, static_argnames=('grid', 'radius', 'neighbours', 'temperature', 'mesh'))
def _propagate(context, labels, is_filled, tokens, *, grid, radius, neighbours, temperature, mesh):
    """Labels (N, C) of `tokens` (N, D) from `context` (F, N, D) with `labels` (F, N, C).

    The tokens are split over the devices, and filled up with zeros for that.
    """
    frames, n, d = context.shape
    row, column = jnp.divmod(jnp.arange(n), grid[1])
    context, labels = context.reshape(-1, d), labels.reshape(frames * n, -1)

    def one(x, context, labels, is_filled):
        token, at = x
        near = (jnp.abs(row - row[at]) <= radius) & (jnp.abs(column - column[at]) <= radius)
        near = (is_filled[:, None] & near).reshape(-1)
        cosine = jnp.einsum('nd,d->n', context, token, precision='highest')
        cosine = jnp.where(near, cosine, -jnp.inf)
        largest = cosine.max()
        least = _kth_largest(cosine, neighbours, largest)
        # The largest is subtracted, which changes no share and overflows at no temperature.
        share = jnp.where(cosine >= least, jnp.exp((cosine - largest) / temperature), 0.0)
        return jnp.einsum('n,nc->c', share / share.sum(), labels, precision='highest')

    def some(tokens, at, *whole):
        return jax.lax.map(lambda x: one(x, *whole), (tokens, at), batch_size=CHUNK)

    specs, at = (P(knn.AXES),) * 2 + (P(),) * 3, jnp.minimum(jnp.arange(len(tokens)), n - 1)
    each = jax.shard_map(some, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)
    found = each(tokens, at, context, labels, is_filled)[:n]
    return jax.lax.with_sharding_constraint(found, sharding.replicated(mesh))


def _kth_largest(x, k, largest):
    """The k-th largest of x (n,), equal ones counted; much faster than top_k on a CPU."""

    def step(_, value):
        below = jnp.where(x < value, x, -jnp.inf).max()
        return jnp.where((x >= value).sum() < k, below, value)

    return jax.lax.fori_loop(1, k, step, largest)


@functools.partial(jax.jit, static_argnames=('grid', 'sides'))
def decode(soft: jax.Array, grid: tuple[int, int], sides: tuple[int, int]) -> jax.Array:
    """Index of the class of each pixel, uint8 (height, width), from soft labels (N, C)."""
    x = soft.reshape(*grid, -1)
    x = jax.image.resize(x, (*sides, x.shape[-1]), 'linear', antialias=False)
    low, high = x.min(axis=(0, 1)), x.max(axis=(0, 1))
    scaled = (x - low) / jnp.maximum(high - low, 1e-12)
    return jnp.where(high > 0, scaled, 0).argmax(axis=-1).astype(jnp.uint8)


# Scores.


def region_and_outline(found: np.ndarray, truth: np.ndarray, label: int) -> tuple[float, float]:
    """J and F of one class, in [0, 1].

    Args:
      found, truth: uint8 (H, W) classes; pixels that the truth ignores count in neither.
      label: the class.
    """
    counted = truth != maps.IGNORED
    a, b = (found == label) & counted, (truth == label) & counted
    union = (a | b).sum()
    return (float((a & b).sum() / union) if union else 1.0), outline_f(a, b)


def outline_f(found: np.ndarray, truth: np.ndarray) -> float:
    """F-measure of the outlines of two masks, bool (H, W).

    An outline pixel counts where the other outline is within BOUNDARY of the diagonal.
    """
    radius = math.ceil(BOUNDARY * math.hypot(*found.shape))
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    disk = (x * x + y * y <= radius * radius).astype(np.uint8)
    a, b = outline(found), outline(truth)
    if not a.any() or not b.any():
        return float(a.any() == b.any())
    precision = (a & (cv2.dilate(b.astype(np.uint8), disk) > 0)).sum() / a.sum()
    recall = (b & (cv2.dilate(a.astype(np.uint8), disk) > 0)).sum() / b.sum()
    total = precision + recall
    return float(2 * precision * recall / total) if total else 0.0


def outline(mask: np.ndarray) -> np.ndarray:
    """bool (H, W): pixels that differ from their right, lower or lower right neighbour."""
    padded = np.pad(mask, ((0, 1), (0, 1)), mode='edge')
    right, below, corner = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return (mask ^ right) | (mask ^ below) | (mask ^ corner)
