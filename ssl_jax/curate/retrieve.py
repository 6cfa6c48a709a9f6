# SPDX-License-Identifier: Apache-2.0
"""Retrieval: images of the pool that are like those of a query set.

DINOv2 takes, for sets of more than a million images, the k nearest of each image (k = 4; 32 for
ImageNet-1k), and for smaller ones 10,000 images of each cluster of the pool (100,000 clusters) that
holds more than three of the set, a million at most.
"""

import dataclasses
from typing import Annotated, Literal

import jax
import numpy as np

from ssl_jax.curate import kmeans, search, tree
from ssl_jax.fields import Range
from ssl_jax.run import hashing

LARGE = 1_000_000  # images of a query set, above which the nearest of each are taken


@dataclasses.dataclass(frozen=True)
class Settings:
    by: Literal['auto', 'sample', 'clusters'] = 'auto'  # auto: clusters up to a million queries
    nearest: Annotated[int, Range(1, 10_000)] = 4  # images for each query, by sample
    # Of the pool, by clusters; 0: 100,000, or one for 100 images if these are fewer.
    clusters: Annotated[int, Range(0, 10**9)] = 0
    min_queries: Annotated[int, Range(1, 10**9)] = 4  # in a cluster, so that it counts
    per_cluster: Annotated[int, Range(1, 10**9)] = 10_000  # images taken from it
    most: Annotated[int, Range(1, 10**12)] = 1_000_000  # images for each query set, by clusters
    iterations: Annotated[int, Range(1, 10_000)] = kmeans.ITERATIONS  # of k-means, at most
    seed: Annotated[int, Range(0, 2**31)] = 0


def method(settings: Settings, queries: int) -> str:
    """'sample' or 'clusters', for a query set of that size."""
    if settings.by != 'auto':
        return settings.by
    return 'sample' if queries > LARGE else 'clusters'


def count(settings: Settings, n: int) -> int:
    """Clusters for a pool of n images."""
    return min(n, settings.clusters or max(1, min(100_000, n // 100)))


def by_sample(
    queries: np.ndarray, x: np.ndarray, settings: Settings, mesh: jax.sharding.Mesh, how
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The nearest images of each query, each once.

    Args:
      queries: (q, d).
      x: (n, d), the pool.
      settings: `nearest` of them.
      mesh: see `search.nearest`.
      how: `search.Settings`.

    Returns:
      Rows of the pool (m,), ascending; the query (m,) that is most similar to it, and its cosine.
    """
    k = min(settings.nearest, len(x))
    similarity, rows = search.all_nearest(queries, x, k, mesh, settings=how)
    query = np.repeat(np.arange(len(queries)), k)
    similarity, rows = similarity.reshape(-1), rows.reshape(-1)
    found = rows >= 0
    query, similarity, rows = query[found], similarity[found], rows[found]
    order = np.lexsort((query, -similarity, rows))
    rows, first = np.unique(rows[order], return_index=True)
    return rows, query[order][first], similarity[order][first]


def by_clusters(
    queries: np.ndarray,
    centroids: np.ndarray,
    cluster: np.ndarray,
    settings: Settings,
    mesh: jax.sharding.Mesh,
) -> tuple[np.ndarray, np.ndarray]:
    """Images of the clusters that hold enough queries.

    Args:
      queries: (q, d).
      centroids, cluster: of the pool, see `kmeans.fit`.
      settings: min_queries, per_cluster, most, seed.
      mesh: see `kmeans.assign`.

    Returns:
      Rows of the pool (m,), ascending, chosen by a hash where a cluster or all of them have too
      many; the number of queries in each cluster (k,).
    """
    held = np.bincount(kmeans.assign(queries, centroids, mesh)[0], minlength=len(centroids))
    counts = np.where(held >= settings.min_queries, settings.per_cluster, 0)
    key = hashing.mix_range(len(cluster), settings.seed)
    rows = tree.first_of_each(cluster, key, counts)
    rows = rows[np.argsort(key[rows], kind='stable')[: settings.most]]
    return np.sort(rows), held
