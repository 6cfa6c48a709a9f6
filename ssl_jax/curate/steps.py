# SPDX-License-Identifier: Apache-2.0
"""The stages of a curation, each on what the ones before left of the pool."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np
from etils import epath

from ssl_jax.curate import copies, kmeans, retrieve, search, stages, tree, vectors
from ssl_jax.data import fingerprint, host
from ssl_jax.data import stream as stream_lib
from ssl_jax.run import errors, hashing, launch, storage, threads

BELOW = 0.05  # pairs that are so much less similar than copies are kept too, for the pictures
MIRRORED = 'pool-mirrored'


@dataclasses.dataclass(frozen=True)
class Work:
    """What a curation works with."""

    sets: dict[str, Any]  # {'pool': source, 'query0': ..., 'against0': ...}
    vectors: dict[str, vectors.Vectors]  # of the same, and of the mirrored pool
    settings: dict[str, Any]  # {stage: its settings}
    mesh: jax.sharding.Mesh
    folder: epath.Path  # for results

    @property
    def pool(self) -> vectors.Vectors:
        return self.vectors['pool']

    def names(self, kind: str) -> list[str]:
        """Sets of a kind, 'query' or 'against'."""
        return [name for name in self.sets if name.startswith(kind)]

    def number(self, name: str) -> int:
        """Of a set, see `State`."""
        return list(self.sets).index(name)

    def run(self, name, key, compute, **options):
        """Result of a stage, see `stages.run`."""
        return stages.run(self.folder / 'results', name, key, compute, **options)


@dataclasses.dataclass
class State:
    """What is left of the pool, and why; arrays (n,) over the images with an embedding."""

    kept: np.ndarray  # bool
    stage: np.ndarray  # number in `table` of the stage that dropped an image, -1 for none
    like: np.ndarray  # row of the image that is kept instead, or of one of an evaluation set,
    like_set: np.ndarray  # the number of its set in `Work.sets`,
    similarity: np.ndarray  # and the cosine to it; -1, -1 and NaN where there is none
    copies: np.ndarray  # images that this one stands for, itself among them
    query: np.ndarray  # row of the query that an image was retrieved for, -1 by clusters,
    query_set: np.ndarray  # the number of its set,
    query_similarity: np.ndarray  # and the cosine to it
    cluster: np.ndarray  # -1 where there is none
    table: list  # (stage, left, gone, why)
    edges: dict | None = None  # pairs of similar images, see `find_edges`
    nearest: dict | None = None  # images of evaluation sets, see `keep_out`

    def drop(self, stage: str, gone: np.ndarray, why: str) -> None:
        """Notes that a stage drops the images where `gone` (n,) is true."""
        gone = gone & self.kept
        self.stage[gone] = len(self.table)
        self.kept = self.kept & ~gone
        self.table.append((stage, int(self.kept.sum()), int(gone.sum()), why))


def begin(work: Work) -> State:
    """All images of the pool that have an embedding."""
    n = len(work.pool.ids)
    lost = len(work.sets['pool']) - n
    return State(
        kept=np.ones(n, bool),
        stage=np.full(n, -1, np.int8),
        like=np.full(n, -1),
        like_set=np.full(n, -1, np.int16),
        similarity=np.full(n, np.nan, np.float32),
        copies=np.ones(n, np.int64),
        query=np.full(n, -1),
        query_set=np.full(n, -1, np.int16),
        query_similarity=np.full(n, np.nan, np.float32),
        cluster=np.full(n, -1),
        table=[('embedded', n, lost, 'have no embedding: not decoded' if lost else '')],
    )


def find_edges(work: Work, state: State) -> None:
    """Sets `state.edges`: a < b, s, pairs of similar images; near, at, the nearest of each.

    Pairs go down to `floor`, which is below the thresholds. Parts are kept until all are there.
    """
    of, how = work.settings['dedup'], work.settings['search']
    thresholds = [of.threshold] if of.threshold is not None else []
    if work.names('against') and work.settings['against'].components:
        thresholds.append(work.settings['against'].threshold)
    if not thresholds:
        return
    floor = min(thresholds) - BELOW
    sets = {k: work.vectors[k] for k in ('pool', MIRRORED) if k in work.vectors}
    key = {name: v.digest for name, v in sets.items()} | _searched(how)
    parts = work.folder / f'neighbours-{hashing.text_id(json.dumps([key, floor]))}.parts'

    def compute():
        done = [_parts(v, work, floor, parts / name) for name, v in sets.items()]
        a, b, s = copies.unique([(x['a'], x['b'], x['s']) for part in done for x in part])
        near, at = (np.concatenate([x[k] for x in done[0]]) for k in ('near', 'at'))
        return dict(a=a, b=b, s=s, near=near, at=at, floor=np.float64(floor))

    state.edges = work.run('neighbours', key, compute, fits=lambda x: x['floor'] <= floor)
    for path in work.folder.glob('neighbours-*.parts') if launch.is_main() else ():
        storage.remove_folder(path)


def _searched(how):
    """What of `search.Settings` changes a result."""
    return {k: v for k, v in dataclasses.asdict(how).items() if k != 'memory'}


def _parts(v, work, floor, folder):
    """[{a, b, s, near, at}] of parts of a set, computed or of an earlier call."""
    done, how = [], work.settings['search']
    while launch.main_says(storage.exists(path := folder / f'{len(done):06d}.npz')):
        done.append(stages.read(path))
    own, start = np.searchsorted(work.pool.ids, v.ids), len(done) * search.PART
    found = search.nearest(v.x, work.pool.x, how.k, work.mesh, own=own, settings=how, start=start)
    for first, similarity, rows in found:
        a, b, s = copies.edges(own[first : first + len(rows)], similarity, rows, floor)
        part = dict(a=a, b=b, s=s, near=similarity[:, 0], at=rows[:, 0])
        stages.write(folder / f'{len(done):06d}.npz', **part)
        done.append(part)
        launch.log(f'neighbours   {first + len(rows):,} of {len(v.x):,} images')
    return done


def deduplicate(work: Work, state: State) -> None:
    """Keeps one image of each group of copies."""
    of, source, ids = work.settings['dedup'], work.sets['pool'], work.pool.ids
    if of.threshold is None:
        return
    a, b, s = (state.edges[k] for k in ('a', 'b', 's'))
    above = s > of.threshold
    key = dict(edges=stages.digest(a[above], b[above]), **dataclasses.asdict(of))
    key['images'] = fingerprint.content(source.fingerprint)

    def compute():
        component = copies.components(len(ids), a[above], b[above])
        largest = of.keep == 'largest'
        size = (lambda rows: _pixels(source, ids[rows])) if largest else np.zeros_like
        return dict(keeper=copies.keepers(component, size))

    keeper = work.run('dedup', key, compute)['keeper']
    gone = keeper != np.arange(len(ids))
    state.copies = np.bincount(keeper, minlength=len(ids))
    state.like[gone], state.like_set[gone] = keeper[gone], work.number('pool')
    lost, x = np.flatnonzero(gone), work.pool.x
    for first in range(0, len(lost), search.PART):
        rows = lost[first : first + search.PART]
        state.similarity[rows] = (x[rows] * x[keeper[rows]]).sum(axis=1)
    groups, most = int((state.copies > 1).sum()), int(state.copies.max())
    why = f'copies (cosine above {of.threshold:g}): {groups:,} groups of up to {most:,} images, '
    why += f'the {of.keep} of each stays'
    state.drop('dedup', gone, why)


def _pixels(source, images):
    """Pixels (m,) of images of a source, 0 where one cannot be decoded."""

    def size(i):
        try:
            return int(np.prod(host.decode(stream_lib.read(source, int(i))['image']).shape[:2]))
        except (host.DecodeError, OSError):
            return 0

    return np.array(list(threads.at_once(size, images, stream_lib.num_reading(source, 16))))


def keep_out(work: Work, state: State) -> None:
    """Drops what is like an image of an evaluation set."""
    names = work.names('against')
    if not names:
        return
    of, how, n = work.settings['against'], work.settings['search'], len(work.pool.ids)
    theirs = [work.vectors[name] for name in names]
    key = dict(sets=[v.digest for v in (work.pool, *theirs)], **_searched(how))

    def compute():
        database = np.concatenate([v.x for v in theirs])
        found = search.all_nearest(work.pool.x, database, 1, work.mesh, settings=how)
        return dict(similarity=found[0][:, 0], at=found[1][:, 0])

    found = work.run('against', key, compute)
    hit = gone = found['similarity'] > of.threshold
    if of.components:
        above = state.edges['s'] > of.threshold
        joined = copies.components(n, state.edges['a'][above], state.edges['b'][above])
        gone = copies.touched(joined, hit)
    numbers = np.array([work.number(name) for name in names], np.int16)
    owner = np.repeat(numbers, [len(v.ids) for v in theirs])
    row = np.concatenate([np.arange(len(v.ids)) for v in theirs])
    state.nearest = dict(
        set=owner[found['at']], row=row[found['at']], similarity=found['similarity']
    )
    here = gone & state.kept
    state.like[here] = state.nearest['row'][here]
    state.like_set[here] = state.nearest['set'][here]
    state.similarity[here] = found['similarity'][here]
    why = f'like one of {len(owner):,} images of evaluations (cosine above {of.threshold:g})'
    through = int((here & ~hit).sum())
    state.drop('against', gone, why + (f', {through:,} through others' if through else ''))


def retrieve_like(work: Work, state: State) -> None:
    """Keeps what is like the queries."""
    names = work.names('query')
    if not names:
        return
    of, rows = work.settings['retrieve'], np.flatnonzero(state.kept)
    x = vectors.Rows(work.pool.x, rows)
    key = dict(pool=work.pool.digest, rows=stages.digest(rows))
    wanted, why = np.zeros(len(state.kept), bool), []
    for name in names:
        this = key | dict(queries=work.vectors[name].digest, **dataclasses.asdict(of))
        if retrieve.method(of, len(work.vectors[name].ids)) == 'sample':
            got, how = _by_sample(work, state, name, x, rows, this)
        else:
            got, how = _by_clusters(work, state, name, x, rows, key, this)
        wanted[got] = True
        why.append(f'{len(got):,} for {len(work.vectors[name].ids):,} of {name} ({how})')
    state.drop('retrieve', ~wanted, 'not like the queries; kept ' + ', '.join(why))
    if not wanted.any():
        raise errors.UserError(
            f'No image was retrieved, as no cluster holds {of.min_queries} queries: lower '
            f'retrieve.min_queries or retrieve.clusters, or set retrieve.by=sample.'
        )


def _by_sample(work, state, name, x, rows, key):
    of, how = work.settings['retrieve'], work.settings['search']
    queries = work.vectors[name]

    def compute():
        found = retrieve.by_sample(queries.x, x, of, work.mesh, how)
        return dict(zip(('rows', 'query', 'similarity'), found, strict=True))

    found = work.run(name, key | _searched(how), compute)
    got = rows[found['rows']]
    better = ~(state.query_similarity[got] >= found['similarity'])  # than for an earlier set
    state.query[got[better]] = found['query'][better]
    state.query_set[got[better]] = work.number(name)
    state.query_similarity[got[better]] = found['similarity'][better]
    return got, f'the {of.nearest} nearest of each'


def _by_clusters(work, state, name, x, rows, key, this):
    of, queries = work.settings['retrieve'], work.vectors[name]
    count = retrieve.count(of, len(x))

    def cluster():
        options = dict(seed=of.seed, iterations=of.iterations)
        found = kmeans.fit(x, count, work.mesh, **options)
        return dict(zip(('centroids', 'cluster'), found, strict=True))

    key = key | dict(clusters=count, seed=of.seed, iterations=of.iterations)
    of_pool = work.run('clusters', key, cluster)

    def compute():
        found = retrieve.by_clusters(
            queries.x, of_pool['centroids'], of_pool['cluster'], of, work.mesh
        )
        return dict(zip(('rows', 'held'), found, strict=True))

    found = work.run(name, this, compute)
    got = rows[found['rows']]
    state.query_set[got[state.query_set[got] < 0]] = work.number(name)
    state.cluster[rows] = of_pool['cluster']
    held = int((found['held'] >= of.min_queries).sum())
    return got, f'{held:,} of {count:,} clusters'


def balance(work: Work, state: State) -> None:
    """Takes images evenly from the clusters of hierarchical k-means."""
    of, rows = work.settings['balance'], np.flatnonzero(state.kept)
    if not of.target:
        return
    counts = of.clusters or tree.levels(len(rows))
    if any(b > a or b < 1 for a, b in zip((len(rows), *counts), counts, strict=False)):
        raise errors.UserError(
            f'balance.clusters={counts}: give the lowest level first, each level fewer clusters '
            f'than the one before, and the first at most the {len(rows):,} images.'
        )
    x = vectors.Rows(work.pool.x, rows)
    key = dict(pool=work.pool.digest, rows=stages.digest(rows), counts=counts)
    key |= dict(rounds=of.rounds, iterations=of.iterations, seed=of.seed)

    def compute():
        parents, centroids = tree.fit(x, counts, of, work.mesh)
        away = tree.distances(x, centroids, parents[0])
        return dict(away=away, **{f'parents{i}': p for i, p in enumerate(parents)})

    found = work.run('tree', key, compute)
    parents = [found[f'parents{i}'] for i in range(len(counts))]
    order = hashing.mix_range(len(rows), of.seed) if of.leaf == 'random' else found['away']
    top = parents[0]
    for parent in parents[1:]:
        top = parent[top]
    state.cluster[:] = -1
    state.cluster[rows] = top
    gone = np.ones(len(state.kept), bool)
    gone[rows[tree.sample(parents, of.target, order, of.seed)]] = False
    levels = ' > '.join(f'{k:,}' for k in reversed(counts))
    state.drop('balance', gone, f'more than the share of their cluster ({levels} clusters)')
