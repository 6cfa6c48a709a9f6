# SPDX-License-Identifier: Apache-2.0
"""Nearest neighbours by cosine: exact on the device mesh, or approximate by Faiss.

The database is split over the devices, each keeps the best k of its part, and these are merged. It
is compared tile by tile, tiles of one shape on any number of devices, so that every similarity has
the same bits on one device and on eight; of equal ones the lower row number is nearer. A database
beyond the memory of the devices comes in blocks, which changes nothing.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from ssl_jax.evals import knn
from ssl_jax.fields import Range
from ssl_jax.run import errors, peers

TILE = 4096  # rows of the database that are compared together, at most
QUERIES = 1024  # at a time
PART = 2**16  # queries for which the database is brought to the devices once


@dataclasses.dataclass(frozen=True)
class Settings:
    k: Annotated[int, Range(1, 10_000)] = 64  # nearest images of each
    engine: Literal['exact', 'faiss'] = 'exact'
    memory: Annotated[float, Range(1e-3, 1e4)] = 4.0  # GiB of each device for embeddings
    # Of Faiss: lists that are looked into, of 4 * sqrt(n).
    probes: Annotated[int, Range(1, 100_000)] = 16


def nearest(
    queries: np.ndarray,
    database: np.ndarray,
    k: int,
    mesh: jax.sharding.Mesh,
    *,
    own: np.ndarray | None = None,
    settings: Settings | None = None,
    start: int = 0,
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """The k nearest rows of the database for each query, in parts of PART queries.

    Args:
      queries: float32 (q, d), L2-normalised, as the database; memory maps are read in blocks.
      database: (n, d).
      k: neighbours; beyond n there are -1 with similarity -inf.
      mesh: over whose data and fsdp axes the database is split.
      own: (q,) row of the database that does not count for a query, or -1; default none.
      settings: default the exact search.
      start: the first query, a multiple of PART.

    Yields:
      Number of the first query; similarities float32 (m, k), at most 1, largest first; rows int64
      (m, k).
    """
    settings = settings or Settings()
    own = np.full(len(queries), -1) if own is None else np.asarray(own)
    search = (_faiss if settings.engine == 'faiss' else _exact)(database, k, mesh, settings)
    for first in range(start, len(queries), PART):
        part = slice(first, first + PART)
        similarity, rows = search(np.asarray(queries[part]), own[part])
        yield first, np.minimum(similarity, 1), rows


def all_nearest(*args, **kwargs) -> tuple[np.ndarray, np.ndarray]:
    """Similarities and rows (q, k) of all queries, see `nearest`."""
    parts = list(nearest(*args, **kwargs))
    return tuple(np.concatenate([part[i] for part in parts]) for i in (1, 2))


def _exact(database, k, mesh, settings):
    """A function of (queries, own) with all of `database` or blocks of it on the mesh."""
    n, d = database.shape
    devices = mesh.shape['data'] * mesh.shape['fsdp']
    tile = int(np.clip(2 ** math.ceil(math.log2(n / 8)), 128, TILE))  # whatever the devices
    tiles = max(1, int(settings.memory * 2**30 / (4 * d * tile)))
    block = min(tiles, math.ceil(n / (tile * devices))) * tile * devices
    put = functools.lru_cache(1)(lambda first: _put(database, first, block, mesh))

    def search(queries, own):
        chunk = min(QUERIES, -(-len(queries) // 64) * 64)
        queries = np.pad(queries, [(0, -len(queries) % chunk), (0, 0)])
        own = np.pad(own, (0, len(queries) - len(own)), constant_values=-1).astype(np.int32)
        found = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1)
        for first in range(0, n, block):
            placed = put(first)
            for at in range(0, len(queries), chunk):
                peers.progress()
                part = slice(at, at + chunk)
                best = found[0][part], found[1][part].astype(np.int32)
                known = queries[part], own[part], *best
                new = _merge(placed, first, n, *known, k=k, tile=tile, mesh=mesh)
                for old, x in zip(found, new, strict=True):
                    old[part] = x
        return found

    def cut(queries, own):
        return tuple(x[: len(queries)] for x in search(queries, own))

    return cut


def _put(database, first, block, mesh):
    """Rows `first` ... of the database on the mesh, filled with zeros to `block`."""
    x = np.asarray(database[first : first + block], np.float32)
    return knn.put_rows(np.pad(x, [(0, block - len(x)), (0, 0)]), mesh)


@functools.partial(jax.jit, static_argnames=('k', 'tile', 'mesh'))
def _merge(block, first, n, queries, own, similarity, rows, *, k, tile, mesh):
    """The k nearest among those found so far and a block that begins at row `first` of n."""

    def local(block, queries, own, similarity, rows):
        begin = first + jax.lax.axis_index(knn.AXES) * len(block)

        def add(best, at):
            x = jax.lax.dynamic_slice_in_dim(block, at * tile, tile)
            s = jnp.einsum('qd,nd->qn', queries, x, precision='highest')
            number = begin + at * tile + jnp.arange(tile, dtype=jnp.int32)
            counts = (number < n) & (number != own[:, None])
            return _best(*best, jnp.where(counts, s, -jnp.inf), number, k), None

        empty = jnp.full_like(similarity, -jnp.inf), jnp.full_like(rows, -1)
        (s, r), _ = jax.lax.scan(add, empty, jnp.arange(len(block) // tile))
        # Devices come in the order of their rows, and `top_k` takes the first of equals.
        s, r = (jax.lax.all_gather(x, knn.AXES, axis=1, tiled=True) for x in (s, r))
        return _best(similarity, rows, s, r, k)

    specs = (P(knn.AXES), P(), P(), P(), P())
    shared = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    return shared(block, queries, own, similarity, rows)


def _best(similarity, rows, more, more_rows, k):
    """The k largest of two sets, those of the first before their equals."""
    more_rows = jnp.broadcast_to(more_rows, more.shape)
    s, at = jax.lax.top_k(jnp.concatenate([similarity, more], axis=1), k)
    return s, jnp.take_along_axis(jnp.concatenate([rows, more_rows], axis=1), at, axis=1)


def _faiss(database, k, mesh, settings):
    """Faiss: an inverted file of 4 sqrt(n) lists, of which `settings.probes` are looked into."""
    del mesh
    faiss = errors.extra('faiss', 'faiss')
    n, d = database.shape
    lists = max(1, min(int(4 * math.sqrt(n)), n // 39))  # Faiss wants 39 rows to learn a list from
    index = faiss.index_factory(d, f'IVF{lists},Flat', faiss.METRIC_INNER_PRODUCT)
    index.nprobe = min(settings.probes, lists)
    learn = np.linspace(0, n - 1, min(n, 256 * lists)).astype(np.int64)
    index.train(np.ascontiguousarray(database[learn]))
    for first in range(0, n, PART):
        index.add(np.ascontiguousarray(database[first : first + PART]))

    def search(queries, own):
        similarity, rows = index.search(np.ascontiguousarray(queries), k + 1)
        similarity = np.where((rows < 0) | (rows == own[:, None]), -np.inf, similarity)
        order = np.lexsort((rows, -similarity), axis=1)[:, :k]
        similarity = np.take_along_axis(similarity, order, 1).astype(np.float32)
        rows = np.where(similarity > -np.inf, np.take_along_axis(rows, order, 1), -1)
        return similarity, rows.astype(np.int64)

    return search
