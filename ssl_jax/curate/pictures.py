# SPDX-License-Identifier: Apache-2.0
"""What a curation did, as pictures."""

from collections.abc import Callable

import numpy as np

from ssl_jax.data import host
from ssl_jax.data import transform as transform_lib
from ssl_jax.run import hashing
from ssl_jax.viz import draw

SIDE = 112  # pixels of an image on a sheet
PAIRS = 8  # pairs right below a threshold, right above it, and further above,
PER_ROW = 4  # pairs side by side
ROWS, COLUMNS = 8, 8  # of clusters and their images
MISSING = np.full((SIDE, SIDE, 3), 200, np.uint8)


def tile(source, i: int) -> np.ndarray:
    """Image `i`, its middle, (SIDE, SIDE, 3); grey if it cannot be read."""
    try:
        return transform_lib.cut(host.decode(source[int(i)]['image']), transform_lib.of(SIDE))
    except (host.DecodeError, OSError):
        return MISSING


def chosen(similarity: np.ndarray, threshold: float) -> np.ndarray:
    """Positions of PAIRS pairs right below a threshold, right above, and evenly spread above."""
    order = np.argsort(similarity, kind='stable')
    cut = int((similarity <= threshold).sum())
    below, above, far = order[max(0, cut - PAIRS) : cut], order[cut : cut + PAIRS], []
    if len(rest := order[cut + PAIRS :]):
        far = rest[np.unique(np.linspace(0, len(rest) - 1, PAIRS).astype(int))]
    return np.concatenate([below, above, far]).astype(np.int64)


def pairs(
    left: Callable, right: Callable, similarity: np.ndarray, threshold: float, note: str, path
) -> None:
    """Draws pairs around a threshold, by similarity.

    Args:
      left, right: picture of the first and the second image of pair p.
      similarity: (m,), of all pairs.
      threshold: above it they are copies.
      note: a line below.
      path: of the PNG.
    """
    picked = chosen(similarity, threshold)
    tiles = [np.concatenate([left(p), right(p)], axis=1) for p in picked]
    texts = [
        f'{similarity[p]:.3f} {"copies" if similarity[p] > threshold else "not copies"}'
        for p in picked
    ]
    if tiles:
        rows = [slice(i, i + PER_ROW) for i in range(0, len(tiles), PER_ROW)]
        draw.captioned_sheet([tiles[r] for r in rows], [texts[r] for r in rows], path, note=note)


def clusters(source, cluster: np.ndarray, ids: np.ndarray, kept: np.ndarray, path) -> None:
    """Draws images of some clusters, from the largest to the smallest.

    Args:
      source: the pool.
      cluster: (n,) of each image.
      ids: (n,) which image of the pool.
      kept: bool (n,), whether it is in the manifest.
      path: of the PNG.
    """
    sizes, taken = np.bincount(cluster), np.bincount(cluster, weights=kept)
    order = np.argsort(-sizes, kind='stable')
    order = order[: int((sizes > 0).sum())]
    some = order[np.unique(np.linspace(0, len(order) - 1, ROWS).astype(int))]
    rows, captions = [], []
    for c in some:
        members = _some(np.flatnonzero(cluster == c))
        rows.append([tile(source, ids[i]) for i in members])
        said = [f'{sizes[c]:,} images,', f'{int(taken[c]):,} kept']
        captions.append(said if len(members) > 1 else [f'1 image, {int(taken[c])} kept'])
    note = f'Clusters from the largest to the smallest of {len(order):,}, and some of their images.'
    draw.captioned_sheet(rows, captions, path, note=note)


def dropped(source, by_stage: dict[str, np.ndarray], path) -> None:
    """Draws some of the images that each stage dropped, and of those that are kept.

    Args:
      source: the pool.
      by_stage: {stage: images of the pool}.
      path: of the PNG.
    """
    rows, captions = [], []
    for name, images in by_stage.items():
        if len(images):
            rows.append([tile(source, i) for i in _some(images)])
            captions.append([f'{name}: {len(images):,}'])
    note = 'Some of the images that each stage dropped, and of those that are left.'
    draw.captioned_sheet(rows, captions, path, note=note)


def similarities(values: dict, marks: dict, path) -> None:
    """Draws the histogram of the similarity of each image to its nearest."""
    draw.histogram(values, marks, 'cosine of each image and the nearest other', path)


def _some(x):
    """COLUMNS of an array, chosen by a hash, in order."""
    order = np.argsort(hashing.mix_range(len(x), 0), kind='stable')[:COLUMNS]
    return x[np.sort(order)]
