# SPDX-License-Identifier: Apache-2.0
"""Correspondence without labels: patches of two crops of one photo, related by a known homography.

For each patch of the first crop the nearest patch of the second is found by the cosine of their
features. PCK@a is the share of patches found within a x the side of the crop of the true place,
among those whose centre is inside both crops.
"""

import dataclasses
import functools
from typing import Annotated

import cv2
import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.data import fingerprint, host
from ssl_jax.data import stream as stream_lib
from ssl_jax.evals import features, task
from ssl_jax.fields import Range
from ssl_jax.models import blocks as blocks_lib
from ssl_jax.run import errors, hashing
from ssl_jax.viz import tokens as tokens_lib

NEEDS = ''
FINAL = 'patch_tokens'  # after the final norm
PAIR_ELEMENTS = 2**26  # similarities of the pairs of a batch
# Of a random crop: side / short side of the photo, rotation, and how far each corner is moved.
SIDE, DEGREES, SHIFT = (0.6, 0.95), 30.0, 0.08


@dataclasses.dataclass(frozen=True)
class Settings:
    blocks: tuple | None = None  # besides the final tokens; None: the block at 3/4 of the depth
    thresholds: tuple = (0.05, 0.1)  # of the side of the crop
    seed: Annotated[int, Range(0, 2**31)] = 0  # of the crops


def evaluate(model, data: task.Data, settings: Settings, work: task.Work):
    """Rows of PCK in percent and the mean error in pixels, one per layer.

    Their last score is that of taking the same place in the second crop.
    """
    source, side = data.train, work.transform['size']
    chosen = np.arange(len(source))
    if work.limit is not None and work.limit < len(source):
        chosen = features.pick(len(source), work.limit)
    blocks = default_blocks(model) if settings.blocks is None else settings.blocks
    p = model.patch_size
    features.check_size(side, p, 'size')
    grid = side // p

    def forward(images):
        return {name: matches(x, grid) for name, x in tokens(model, images, blocks).items()}

    def crop(image, i):
        return warp(image, view(settings.seed, int(chosen[i // 2]), i % 2), side)

    # Both crops of a pair are neighbours in one stream. An odd batch (an odd number of devices, and
    # fewer images) is the only one, so that pairs stay together.
    pairs = features.Edited(source, np.repeat(chosen, 2), crop)
    most = max(1, min(work.batch_size, PAIR_ELEMENTS // grid**4))
    batches = work.batches(
        forward,
        pairs,
        transform={**work.transform, 'mode': 'none'},
        batch_size=2 * features.round_up(most, work.mesh),
        limit=None,
    )
    centres = (np.indices((grid, grid)).reshape(2, -1).T[:, ::-1] + 0.5) * p - 0.5  # (N, 2): x, y
    errors_, same, used, bad = {}, [], 0, []
    for batch in features.told(batches, len(pairs), work.log, 'crops'):
        bad += features.left_out(batch)
        for k in range(0, len(batch['id']) - 1, 2):
            if not batch['mask'][k : k + 2].all():
                continue
            i = int(chosen[batch['id'][k] // 2])
            true = apply(homography(settings.seed, i, side), centres)
            inside = ((true >= -0.5) & (true < side - 0.5)).all(axis=1)
            same.append(_distance(centres, true)[inside])
            for name, found in batch['features'].items():
                error = _distance((found[k // 2] + 0.5) * p - 0.5, true)
                errors_.setdefault(name, []).append(error[inside])
            used += 1
    stream_lib.say_left_out(pairs, bad)
    if not used:
        raise errors.UserError(f'None of the {len(chosen)} images decodes.')
    for name in (FINAL, *(f'block {b}' for b in blocks)):
        found, chance = np.concatenate(errors_[name]), np.concatenate(same)
        scores = {f'PCK@{a:g} (%)': 100 * (found <= a * side).mean() for a in settings.thresholds}
        scores['error (px)'] = found.mean()
        a = max(settings.thresholds)
        scores[f'same place: PCK@{a:g} (%)'] = 100 * (chance <= a * side).mean()
        about = dict(
            similarity='cosine of L2-normalised patch features',
            place='nearest patch, refined by a parabola along each axis',
            resolution=side,
            patch_size=p,
            mean=list(work.transform['mean']),
            std=list(work.transform['std']),
            crops=f'quadrilaterals, side {SIDE} x short side, +-{DEGREES:g} degrees, corners moved '
            f'by {SHIFT:g} of the side; bilinear (OpenCV)',
            pairs=used,
            patches=len(found),
            average='over all patches',
            seed=settings.seed,
            data=fingerprint.content(source.fingerprint),
        )
        yield task.row('pck', 'last' if name == FINAL else name, scores, about)


def default_blocks(model) -> tuple:
    """The block at 3/4 of the depth; nothing where a model has no blocks."""
    depth = getattr(getattr(model, 'vit', None), 'depth', 0)
    return (max(round(0.75 * depth) - 1, 0),) if depth > 1 else ()


def tokens(model, images, blocks: tuple) -> dict[str, jax.Array]:
    """{'patch_tokens' or 'block <n>': (B, N, D)} of the patches."""
    out = model(images, blocks=tuple(blocks))
    n = out[FINAL].shape[1]
    raw = {f'block {b}': x[:, -n:] for b, x in out.get('blocks', {}).items()}
    return {FINAL: out[FINAL], **raw}


def similarity(model, image_a, place: tuple[int, int], image_b, block: int | None = None):
    """Cosine of the patch at a place of one image to all patches of another.

    Args:
      model: `encoder.Model` or `encoder.Pixels`.
      image_a, image_b: uint8 (H, W, 3), sides multiples of the patch size.
      place: (row, column), a pixel of `image_a`.
      block: number of a block; default the patch tokens after the final norm.

    Returns:
      float32 (h, w), one number per patch of `image_b`.
    """
    p = model.patch_size
    (rows, columns), (height, width) = image_b.shape[:2], image_a.shape[:2]
    row, column = place
    if not (0 <= row < height and 0 <= column < width):
        raise errors.UserError(f'{place} is no pixel of an image of {height} x {width} pixels.')
    name, blocks = (FINAL, ()) if block is None else (f'block {block}', (block,))
    a, b = (np.asarray(tokens(model, x[None], blocks)[name][0]) for x in (image_a, image_b))
    query = a[row // p * (width // p) + column // p]
    return tokens_lib.similarity(query, b).reshape(rows // p, columns // p)


@functools.partial(jax.jit, static_argnums=1)
def matches(x: jax.Array, grid: int) -> jax.Array:
    """Where the patches of the first image of each pair are in the second.

    Args:
      x: (B, N, D), the images of a pair one after the other.
      grid: N = grid^2.

    Returns:
      float32 (ceil(B / 2), N, 2): column and row of the patch, refined below one patch by the peak
      of the parabola through it and its two neighbours along each axis.
    """
    x = jnp.pad(blocks_lib.l2_normalize(x), [(0, x.shape[0] % 2), (0, 0), (0, 0)])
    cosine = jnp.einsum('bnd,bmd->bnm', x[0::2], x[1::2], precision='highest')
    best = cosine.argmax(axis=2)

    def at(rows, columns):
        index = jnp.clip(rows, 0, grid - 1) * grid + jnp.clip(columns, 0, grid - 1)
        return jnp.take_along_axis(cosine, index[..., None], axis=2)[..., 0]

    row, column = best // grid, best % grid

    def peak(before, after, place):
        middle = at(row, column)
        curve = 2 * middle - before - after
        shift = jnp.where(curve > 1e-12, (after - before) / (2 * jnp.maximum(curve, 1e-12)), 0.0)
        inner = (place > 0) & (place < grid - 1)
        return place + jnp.where(inner, jnp.clip(shift, -0.5, 0.5), 0.0)

    columns = peak(at(row, column - 1), at(row, column + 1), column)
    rows = peak(at(row - 1, column), at(row + 1, column), row)
    return jnp.stack([columns, rows], axis=-1)


# The crops.


def view(seed: int, i: int, which: int) -> np.ndarray:
    """Corners of a random crop of image `i` in its central square, whose sides are 1.

    Returns:
      (4, 2) x and y of top left, top right, bottom right, bottom left.
    """
    key = np.array([hashing.mix(seed, which), i], np.uint64)
    rng = np.random.Generator(np.random.Philox(key=key))
    side, angle = rng.uniform(*SIDE), np.deg2rad(rng.uniform(-DEGREES, DEGREES))
    corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * side / 2
    corners += rng.uniform(-SHIFT, SHIFT, (4, 2)) * side
    c, s = np.cos(angle), np.sin(angle)
    corners = corners @ np.array([(c, s), (-s, c)])
    corners /= max(1.0, np.ptp(corners, axis=0).max())  # turned squares need more room
    low, high = -corners.min(axis=0), 1 - corners.max(axis=0)
    return corners + rng.uniform(low, np.maximum(high, low))


def homography(seed: int, i: int, side: int) -> np.ndarray:
    """(3, 3) from pixels of the first crop of image `i` to those of the second.

    Centres of pixels have whole numbers.
    """
    first, second = (_to_square(view(seed, i, which), side) for which in (0, 1))
    return np.linalg.inv(second) @ first


def _to_square(corners, side):
    """(3, 3) from pixels of a crop to the square of side 1."""
    ends = np.array([(0, 0), (1, 0), (1, 1), (0, 1)], np.float32) * side - np.float32(0.5)
    return cv2.getPerspectiveTransform(ends, corners.astype(np.float32)).astype(np.float64)


def apply(matrix: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Points (N, 2), x and y, under a homography."""
    out = np.concatenate([points, np.ones((len(points), 1))], axis=1) @ matrix.T
    return out[:, :2] / out[:, 2:]


def warp(image: np.ndarray, corners: np.ndarray, side: int) -> np.ndarray:
    """The crop of an image, uint8 (side, side, 3), from its central square."""
    m = min(image.shape[:2])
    y, x = (image.shape[0] - m) // 2, (image.shape[1] - m) // 2
    square = np.ascontiguousarray(image[y : y + m, x : x + m])
    # Bilinear sampling does not average: what is much larger than the crop is made smaller before.
    if m > 1.5 * side:
        m = round(1.5 * side)
        square = host.resize(square, m)
    to_pixels = np.array([(m, 0, -0.5), (0, m, -0.5), (0, 0, 1)])
    matrix = to_pixels @ _to_square(corners, side)
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpPerspective(
        square, matrix, (side, side), flags=flags, borderMode=cv2.BORDER_REFLECT_101
    )


def _distance(a, b):
    return np.sqrt(np.square(a - b).sum(axis=1))
