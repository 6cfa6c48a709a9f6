# SPDX-License-Identifier: Apache-2.0
"""k-means: points are compared with centroids on the device mesh, means are taken on the host.

Points are assigned in tiles of one shape on any number of devices, and a mean is a float64 sum in
the order of the rows: the clusters are the same, bit for bit, on one device and on eight.

References:
  greedy k-means++: Arthur and Vassilvitskii, 2007, with 2 + log k candidates; as in Vo et al.,
  arXiv 2405.15613.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from scipy import sparse

from ssl_jax.evals import features, knn
from ssl_jax.run import hashing, peers

ITERATIONS = 50
PLUS_PLUS = 4096  # clusters up to which the beginning is k-means++,
SAMPLE, SAMPLES = 32, 2**14  # on SAMPLE points for each cluster, at least on SAMPLES
BLOCK_ELEMENTS = 2**26  # of points on one device at a time
TILE_ELEMENTS = 2**23  # distances of a tile


def fit(
    x: np.ndarray,
    k: int,
    mesh: jax.sharding.Mesh,
    *,
    seed: int = 0,
    iterations: int = ITERATIONS,
    centroids: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Lloyd's algorithm until nothing changes, by L2.

    An empty cluster begins anew at the point that is farthest from its centroid.

    Args:
      x: float32 (n, d).
      k: clusters, at most n.
      mesh: over whose data and fsdp axes points are split.
      seed: of the beginning.
      iterations: at most.
      centroids: (k, d) to begin with; default k-means++, beyond PLUS_PLUS clusters random points.

    Returns:
      centroids float32 (k, d); the cluster of each point, int64 (n,), the nearest of these
      centroids.
    """
    if centroids is None:
        centroids = begin(x, k, seed)
    cluster, distance = assign(x, centroids, mesh)
    for _ in range(iterations):
        centroids = means(x, cluster, k, centroids)
        empty = np.flatnonzero(np.bincount(cluster, minlength=k) == 0)
        centroids[empty] = x[np.sort(np.argsort(-distance, kind='stable')[: len(empty)])]
        before = cluster
        cluster, distance = assign(x, centroids, mesh)
        if not len(empty) and (cluster == before).all():
            break
    return centroids, cluster


def means(x: np.ndarray, cluster: np.ndarray, k: int, instead: np.ndarray) -> np.ndarray:
    """Mean of each cluster, float32 (k, d); rows of `instead` where it has no points."""
    total, count = np.zeros((k, x.shape[1])), np.bincount(cluster, minlength=k)
    rows = max(1, BLOCK_ELEMENTS // x.shape[1])
    for first in range(0, len(x), rows):
        some = np.asarray(x[first : first + rows], np.float64)
        of = cluster[first : first + rows]
        shape = k, len(some)
        total += sparse.csr_matrix((np.ones(len(of)), (of, np.arange(len(of)))), shape) @ some
    mean = total / np.maximum(count, 1)[:, None]
    return np.where(count[:, None] > 0, mean, instead).astype(np.float32)


def assign(
    x: np.ndarray, centroids: np.ndarray, mesh: jax.sharding.Mesh
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centroid of each point, of equal ones the first, and its squared distance.

    Args:
      x: float32 (n, d).
      centroids: (k, d).
      mesh: see `fit`.

    Returns:
      int64 (n,), float32 (n,).
    """
    n, d = x.shape
    devices = mesh.shape['data'] * mesh.shape['fsdp']
    tile = 2 ** int(np.clip(math.log2(TILE_ELEMENTS / len(centroids)), 3, 10))
    tiles = max(1, min(BLOCK_ELEMENTS // (tile * d), math.ceil(n / (tile * devices))))
    block, found = tile * tiles * devices, []
    for first in range(0, n, block):
        peers.progress()
        some = np.asarray(x[first : first + block], np.float32)
        placed = knn.put_rows(np.pad(some, [(0, block - len(some)), (0, 0)]), mesh)
        found.append(_assign(placed, np.asarray(centroids), tile=tile, mesh=mesh))
        if len(found) > 1:  # read one late: the device stays busy
            found[-2] = features.fetch(found[-2])
    found[-1] = features.fetch(found[-1])
    cluster, distance = (np.concatenate(v)[:n] for v in zip(*found, strict=True))
    return cluster.astype(np.int64), distance


@functools.partial(jax.jit, static_argnames=('tile', 'mesh'))
def _assign(x, centroids, *, tile, mesh):
    def local(x, centroids):
        squares = jnp.square(centroids).sum(axis=1)

        def one(points):
            score = squares - 2 * jnp.einsum('nd,kd->nk', points, centroids, precision='highest')
            return jnp.argmin(score, axis=1), score.min(axis=1)

        tiles = x.reshape(-1, tile, x.shape[1])
        cluster, score = jax.lax.map(one, tiles)
        distance = jnp.maximum(score + jnp.square(tiles).sum(axis=2), 0)
        return cluster.reshape(-1), distance.reshape(-1)

    specs = dict(in_specs=(P(knn.AXES), P()), out_specs=P(knn.AXES))
    return jax.shard_map(local, mesh=mesh, **specs, check_vma=False)(x, centroids)


def begin(x: np.ndarray, k: int, seed: int) -> np.ndarray:
    """Centroids (k, d) to begin with: points chosen by k-means++, or at random if they are many."""
    n = len(x)
    order = np.argsort(hashing.mix_range(n, seed), kind='stable')
    if k > PLUS_PLUS:
        return np.array(x[np.sort(order[:k])], np.float32)
    some = np.array(x[np.sort(order[: max(SAMPLE * k, SAMPLES)])], np.float32)
    rng = np.random.Generator(np.random.Philox(seed))
    squares = np.square(some).sum(axis=1)

    def distances(rows):
        away = squares - 2 * some[rows] @ some.T + squares[rows][:, None]
        return np.maximum(away, 0)

    chosen = [int(rng.integers(len(some)))]
    nearest = distances(chosen)[0]
    for _ in range(k - 1):
        total = np.cumsum(nearest, dtype=np.float64)
        draws = rng.random(2 + int(math.log(k))) * total[-1]
        rows = np.minimum(np.searchsorted(total, draws, side='right'), len(some) - 1)
        away = np.minimum(distances(rows), nearest)
        best = int(np.argmin(away.sum(axis=1)))
        chosen.append(int(rows[best]))
        nearest = away[best]
    return some[chosen]
