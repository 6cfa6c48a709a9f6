# SPDX-License-Identifier: Apache-2.0
"""Hierarchical k-means with resampling, and balanced sampling down its tree.

Images gather where the world is photographed most, and k-means puts most of its clusters there.
Clusters of clusters lie evenly: each level clusters the centroids of the one below, and resampling
fits them to the few centroids nearest to each, which flattens the density again. A sample then
takes about as many images from each cluster of the top level, within it from each of the next, and
so on down.

References:
  Vo et al., arXiv 2405.15613.
"""

import dataclasses
from typing import Annotated, Literal

import jax
import numpy as np

from ssl_jax.curate import kmeans
from ssl_jax.fields import Range
from ssl_jax.run import hashing


@dataclasses.dataclass(frozen=True)
class Settings:
    target: Annotated[int, Range(0, 10**12)] = 0  # images to keep; 0: no balancing
    # Clusters of each level from the images up; () for n / 16, and then each a tenth of the last.
    clusters: tuple = ()
    rounds: Annotated[int, Range(0, 1000)] = 10  # of resampling, from the second level
    iterations: Annotated[int, Range(1, 10_000)] = kmeans.ITERATIONS  # of k-means, at most
    leaf: Literal['random', 'closest'] = 'random'  # images of a cluster of the lowest level
    seed: Annotated[int, Range(0, 2**31)] = 0


def levels(n: int) -> tuple[int, ...]:
    """Clusters of each level for n images: a sixteenth, then a tenth, and so on; 3 levels at most.

    Vo et al. have 10 M, 500 k, 50 k and 10 k for 743 M.
    """
    counts = [max(1, n // 16)]
    while len(counts) < 3 and counts[-1] >= 50:
        counts.append(counts[-1] // 10)
    return tuple(counts)


def fit(
    x: np.ndarray, counts: tuple[int, ...], settings: Settings, mesh: jax.sharding.Mesh
) -> tuple[list[np.ndarray], np.ndarray]:
    """Hierarchical k-means.

    Args:
      x: float32 (n, d).
      counts: clusters of each level, ever fewer.
      settings: rounds, iterations, seed.
      mesh: see `kmeans.fit`.

    Returns:
      parents: for each level, the cluster of each image (n,), then of each cluster of the level
        below; centroids of the lowest level (counts[0], d).
    """
    parents, points, lowest, iterations = [], x, None, settings.iterations
    for level, k in enumerate(counts):
        seeds = [hashing.mix(settings.seed, level, i) for i in range(1 + settings.rounds)]
        centroids, cluster = kmeans.fit(points, k, mesh, seed=seeds[0], iterations=iterations)
        for seed in seeds[1:] if level else ():
            # As many from each cluster: these lie more evenly than the points do, and so do
            # clusters of them. From the old centroids k-means would stay where it is.
            kept = _closest(points, centroids, cluster, max(1, round(len(points) / k / 2)))
            if len(kept) < k:  # some clusters are empty
                break
            centroids, _ = kmeans.fit(points[kept], k, mesh, seed=seed, iterations=iterations)
            cluster, _ = kmeans.assign(points, centroids, mesh)
        parents.append(cluster)
        lowest = centroids if lowest is None else lowest
        points = centroids
    return parents, lowest


def distances(x: np.ndarray, centroids: np.ndarray, cluster: np.ndarray) -> np.ndarray:
    """Squared L2 distance (n,) of each point to the centroid of its cluster."""
    out, rows = np.empty(len(x), np.float32), max(1, kmeans.BLOCK_ELEMENTS // x.shape[1])
    for first in range(0, len(x), rows):
        part = slice(first, first + rows)
        out[part] = np.square(x[part] - centroids[cluster[part]]).sum(axis=1)
    return out


def _closest(points, centroids, cluster, count):
    """The `count` points of each cluster that are nearest to its centroid, ascending."""
    away = distances(points, centroids, cluster)
    return np.sort(first_of_each(cluster, away, np.full(len(centroids), count)))


def first_of_each(cluster: np.ndarray, key: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Rows of the counts[c] smallest keys of each cluster c, of equal ones the lower rows."""
    order = np.lexsort((np.arange(len(cluster)), key, cluster))
    sizes = np.bincount(cluster, minlength=len(counts))
    begins = np.cumsum(sizes) - sizes
    rank = np.arange(len(cluster)) - begins[cluster[order]]
    return order[rank < counts[cluster[order]]]


def fill(total: int, sizes: np.ndarray, seed: int) -> np.ndarray:
    """`total` shared among clusters as evenly as their sizes allow, int64 (c,).

    The shares are min(x, size), with x so that they sum up to at most `total`; the rest goes, one
    each, to clusters that have more, chosen by a hash.
    """
    sizes = np.asarray(sizes, np.int64)
    total = min(int(total), int(sizes.sum()))
    low, high = 0, int(sizes.max(initial=0))
    while low < high:
        middle = (low + high + 1) // 2
        if np.minimum(middle, sizes).sum() <= total:
            low = middle
        else:
            high = middle - 1
    shares = np.minimum(low, sizes)
    more = np.flatnonzero(sizes > low)
    order = np.argsort(hashing.mix_range(len(sizes), seed)[more], kind='stable')
    shares[more[order[: total - shares.sum()]]] += 1
    return shares


def sample(parents: list[np.ndarray], target: int, key: np.ndarray, seed: int) -> np.ndarray:
    """Rows (m,), ascending, of a balanced sample of `target` images.

    Args:
      parents: see `fit`.
      target: images; all if there are not more.
      key: (n,), images of a cluster are taken in this order: random numbers or distances.
      seed: of which clusters get one more where shares are uneven.
    """
    sizes = [np.bincount(parents[0])]
    for parent in parents[1:]:
        below = np.pad(sizes[-1], (0, len(parent) - len(sizes[-1])))
        sizes.append(np.bincount(parent, weights=below).astype(np.int64))
    shares = fill(target, sizes[-1], hashing.mix(seed, len(parents)))
    for level in range(len(parents) - 1, 0, -1):
        parent, below = parents[level], np.zeros(len(parents[level]), np.int64)
        size = np.pad(sizes[level - 1], (0, len(parent) - len(sizes[level - 1])))
        order = np.argsort(parent, kind='stable')
        for children in np.split(order, np.flatnonzero(np.diff(parent[order])) + 1):
            of = int(parent[children[0]])
            below[children] = fill(shares[of], size[children], hashing.mix(seed, level, of))
        shares = below
    return np.sort(first_of_each(parents[0], key, shares))
