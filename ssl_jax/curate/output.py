# SPDX-License-Identifier: Apache-2.0
"""What a curation writes: the manifest, what was dropped, the table, the pictures."""

import dataclasses
import json
from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa
from etils import epath

from ssl_jax.curate import pictures
from ssl_jax.curate.steps import State, Work
from ssl_jax.data import manifest
from ssl_jax.evals import feature_file, task
from ssl_jax.run import storage

ROWS = 65_536  # of a manifest at a time


def write(path: epath.Path, work: Work, state: State, specs: dict[str, Mapping]) -> None:
    """Writes the manifest and, in the folder of the work, dropped.parquet and report.txt.

    Args:
      path: of the manifest.
      work, state: after all stages.
      specs: of the sets, see `sources.open_source`.
    """
    source, ids = work.sets['pool'], work.pool.ids
    made = dict(sets=specs, stages=state.table, settings=work.settings)
    made = json.loads(json.dumps(made, default=dataclasses.asdict))
    manifest.write(path, _kept(work, state), source, specs['pool'], **made)
    lost = np.setdiff1d(np.arange(len(source)), ids)
    images = np.concatenate([lost, ids[~state.kept]])
    rows = np.concatenate([np.full(len(lost), -1), np.flatnonzero(~state.kept)])
    order = np.argsort(images, kind='stable')
    tables = _dropped(work, state, images[order], rows[order])
    manifest.write_tables(work.folder / 'dropped.parquet', tables)
    text = '\n'.join(table(work, state)) + '\n'
    storage.atomic_write(work.folder / 'report.txt', text)


def _kept(work, state) -> Iterator[pa.Table]:
    kept = np.flatnonzero(state.kept)
    for first in range(0, len(kept), ROWS):
        rows = kept[first : first + ROWS]
        ids, cluster = work.pool.ids[rows], state.cluster[rows]
        yield manifest.table(
            ids,
            image=_names(work, np.full(len(rows), work.number('pool')), rows),
            copies=pa.array(state.copies[rows], pa.int64()),
            query_set=_texts(list(work.sets), state.query_set[rows]),
            query=_names(work, state.query_set[rows], state.query[rows]),
            similarity=_numbers(state.query_similarity[rows]),
            cluster=pa.array(cluster, pa.int64(), mask=cluster < 0),
        )


def _dropped(work, state, images, rows) -> Iterator[pa.Table]:
    source, stages = work.sets['pool'], [line[0] for line in state.table]
    for first in range(0, max(1, len(images)), ROWS):
        part, some = rows[first : first + ROWS], images[first : first + ROWS]
        held = part >= 0  # the others have no embedding
        like_set = np.where(held, state.like_set[part], -1)
        yield manifest.table(
            some,
            image=pa.array([feature_file.name_of(source, int(i)) for i in some], pa.string()),
            stage=_texts(stages, np.where(held, state.stage[part], 0)),
            like_set=_texts(list(work.sets), like_set),
            like=_names(work, like_set, np.where(held, state.like[part], -1)),
            similarity=_numbers(np.where(held, state.similarity[part], np.nan)),
        )


def _texts(names, numbers):
    return pa.array([names[i] if i >= 0 else None for i in numbers.tolist()], pa.string())


def _numbers(x):
    return pa.array(x.astype(np.float32), pa.float32(), mask=np.isnan(x))


def _names(work, numbers, rows):
    """Names of images: row r of a set; null where r < 0."""
    sets = list(work.sets)
    found = [
        feature_file.name_of(work.sets[sets[k]], int(work.vectors[sets[k]].ids[r]))
        if r >= 0
        else None
        for k, r in zip(numbers.tolist(), rows.tolist(), strict=True)
    ]
    return pa.array(found, pa.string())


def table(work: Work, state: State) -> list[str]:
    """Lines: how many images each stage left, how many it dropped, and why."""
    cells = [('stage', 'left', 'dropped', 'why'), ('pool', f'{len(work.sets["pool"]):,}', '', '')]
    cells += [(name, f'{left:,}', f'{gone:,}', why) for name, left, gone, why in state.table]
    cells.append(('manifest', f'{int(state.kept.sum()):,}', '', ''))
    return task.aligned(cells, {1, 2})


def draw(work: Work, state: State) -> None:
    """Draws pairs around the thresholds, similarities, clusters, and what was dropped."""
    source, ids, place = work.sets['pool'], work.pool.ids, work.folder / 'pictures'
    if storage.exists(place):  # of other settings
        storage.remove_folder(place)
    edges, nearest, values, marks = state.edges, state.nearest, {}, {}

    def ours(rows):
        return lambda p: pictures.tile(source, ids[rows[p]])

    if edges is not None:
        values['in the pool'] = edges['near'][np.isfinite(edges['near'])]
        threshold = work.settings['dedup'].threshold
        if threshold is not None:
            marks['dedup.threshold'] = threshold
            note = f'Pairs of the pool around dedup.threshold={threshold:g}, by cosine.'
            path = place / 'pairs.png'
            pictures.pairs(ours(edges['a']), ours(edges['b']), edges['s'], threshold, note, path)
    if nearest is not None:
        values['to evaluation sets'] = nearest['similarity']
        threshold = marks['against.threshold'] = work.settings['against'].threshold

        def theirs(p):
            name = list(work.sets)[nearest['set'][p]]
            return pictures.tile(work.sets[name], work.vectors[name].ids[nearest['row'][p]])

        note = (
            f'Images of the pool, each with the nearest of the evaluation sets, around '
            f'against.threshold={threshold:g}, by cosine.'
        )
        rows, path = np.arange(len(ids)), place / 'against.png'
        pictures.pairs(ours(rows), theirs, nearest['similarity'], threshold, note, path)
    if any(map(len, values.values())):
        pictures.similarities(values, marks, place / 'similarities.png')
    rows = np.flatnonzero(state.cluster >= 0)
    if len(rows):
        found = source, state.cluster[rows], ids[rows], state.kept[rows]
        pictures.clusters(*found, place / 'clusters.png')
    by_stage = {line[0]: ids[state.stage == i] for i, line in enumerate(state.table)}
    by_stage['manifest'] = ids[state.kept]
    pictures.dropped(source, by_stage, place / 'dropped.png')
