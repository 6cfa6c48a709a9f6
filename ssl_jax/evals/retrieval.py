# SPDX-License-Identifier: Apache-2.0
"""Retrieval: mean average precision of class and pooled features, by cosine similarity.

On labelled images, those of the same class are to be found. On Revisited Oxford and Paris, the
photos of the same building, by their ground truth and protocol:

  gnd.json   {"imlist": [name, ...], "qimlist": [name, ...], "gnd": [{"easy": [index of imlist,
             ...], "hard": [...], "junk": [...], "bbx": [left, top, right, bottom]}, ...]}

References:
  Radenovic et al., arXiv 1803.11285; revisitop `python/evaluate.py`.
"""

import dataclasses
import functools
import importlib
import io
import json
import os
import pickle
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ssl_jax import sharding
from ssl_jax.data import fingerprint, sources, subset
from ssl_jax.data import stream as stream_lib
from ssl_jax.data import transform as transform_lib
from ssl_jax.evals import accuracy, features, knn, task
from ssl_jax.models import blocks
from ssl_jax.run import errors, hashing, peers, storage

NEEDS = ''  # labels, or a ground truth
POOLED = {
    'cls': 'mean of the class tokens after the final norm',
    'patch': 'mean of the patch tokens after the final norm',
}
KAPPAS = (1, 5, 10)
CHUNK_ELEMENTS = 2**25  # similarities at a time
# (relevant, not counted) of the three protocols
DIFFICULTIES = {
    'Easy': (('easy',), ('junk', 'hard')),
    'Medium': (('easy', 'hard'), ('junk',)),
    'Hard': (('hard',), ('junk', 'easy')),
}
# What a pickle of lists, dicts and numpy numbers names; anything else could run code.
_PLAIN = {
    ('numpy._core.multiarray', '_reconstruct'),
    ('numpy._core.multiarray', 'scalar'),
    ('numpy', 'ndarray'),
    ('numpy', 'dtype'),
    ('_codecs', 'encode'),  # bytes, in protocols before 3
    ('builtins', 'bytes'),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    ground_truth: str = ''  # gnd.json or gnd_*.pkl of Revisited Oxford or Paris; '': the labels


def evaluate(model, data: task.Data, settings: Settings, work: task.Work):
    """Rows of mAP and precision in percent, one per feature (and difficulty)."""
    run = _landmarks if settings.ground_truth else _classes
    yield from run(model, data, settings, work)


def embed(model, source, work: task.Work) -> tuple[dict, np.ndarray, np.ndarray | None]:
    """Pooled features of all images of a source that decode.

    Returns:
      {name: float32 (n, d), L2-normalised}, their indices (n,), and labels (n,) or None.
    """

    def forward(images):
        out = model(images)
        return {name: _normalized(out[name]) for name in POOLED if name in out}

    kept, bad = [], []
    batches = work.batches(forward, source, limit=None)
    for batch in features.told(batches, len(source), work.log):
        kept.append(jax.tree.map(lambda x, mask=batch['mask']: x[mask], batch))
        bad += features.left_out(batch)
    stream_lib.say_left_out(source, bad)
    whole = jax.tree.map(lambda *x: np.concatenate(x), *kept)
    if not len(whole['id']):
        raise errors.UserError(
            f'None of the {len(source)} images of {source.describe(0)} ... decodes.'
        )
    return whole['features'], whole['id'], whole.get('label')


_normalized = jax.jit(blocks.l2_normalize)


def protocol(work: task.Work, name: str) -> dict:
    """What rows of pooled features have in common."""
    return dict(
        of=POOLED[name],
        similarity='cosine',
        **transform_lib.protocol(work.transform),
        mean=list(work.transform['mean']),
        std=list(work.transform['std']),
    )


# Labelled images.


def _classes(model, data, settings, work):
    del settings
    database = features.limited(data.train, work.limit)
    queries = features.limited(data.test, work.limit) if data.test is not None else None
    for source in filter(None, (data.train, data.test)):
        sources.check_labels(source)
        if not source.classes:
            raise errors.UserError(
                f'The evaluation retrieval needs labelled images, and {source.describe(0)} has no '
                f'label: give class folders, or retrieval.ground_truth=gnd.json.'
            )
    x, ids, y = embed(model, database, work)
    if queries is None:
        split, qx, qy, own = 'leave one out: each image against all others', x, y, np.arange(len(y))
    else:
        accuracy.check_classes(data.train.classes, data.test)
        split = 'test images against training images'
        qx, _, qy = embed(model, queries, work)
        own = np.full(len(qy), -1)
    for name in x:
        scores, left = class_scores(qx[name], qy, x[name], y, own, work.mesh)
        about = dict(
            protocol(work, name),
            split=split,
            classes=len(data.train.classes),
            average_precision='mean of the precision at each relevant image',
            queries=len(qy) - left,
            database=len(ids),
            data=data.protocol(),
        )
        yield task.row('retrieval', name, scores, about, queries_without_relevant_images=left)


def class_scores(
    queries: np.ndarray,
    labels: np.ndarray,
    database: np.ndarray,
    database_labels: np.ndarray,
    own: np.ndarray,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[dict[str, float], int]:
    """mAP and precision of the nearest, in percent.

    Args:
      queries, labels: (q, d), L2-normalised, and (q,).
      database, database_labels: (n, d), (n,).
      own: (q,) row of the database that is the query itself and does not count, or -1.
      mesh: splits the queries over its data and fsdp axes, default one device.

    Returns:
      The scores, over the queries with a relevant image; the number of the others.
    """
    mesh = mesh or sharding.make_mesh(devices=jax.local_devices()[:1])
    chunk = max(1, min(len(queries), CHUNK_ELEMENTS // len(database)))
    whole, found = [knn.put_whole(x, mesh) for x in (database, database_labels)], []
    for start in range(0, len(queries), chunk):
        peers.progress()
        part = [x[start : start + chunk] for x in (queries, labels, own)]
        some = [knn.put_rows(_filled(x, chunk), mesh) for x in part]
        rows = _average_precision(*some, *whole, mesh=mesh)
        found.append([np.asarray(x)[: len(part[0])] for x in rows])
    ap, relevant, first = (np.concatenate(x) for x in zip(*found, strict=True))
    counts = relevant > 0
    if not counts.any():
        raise errors.UserError(
            'No query has another image of its class: give more images of each class.'
        )
    scores = {'mAP (%)': 100 * ap[counts].mean(), 'P@1 (%)': 100 * first[counts].mean()}
    return scores, int((~counts).sum())


def _filled(x, rows):
    return np.pad(x, [(0, rows - len(x))] + [(0, 0)] * (x.ndim - 1))


@functools.partial(jax.jit, static_argnames='mesh')
def _average_precision(x, y, own, database, labels, *, mesh):
    """(q,) average precision, number of relevant images, whether the nearest is one."""
    rows = jnp.arange(len(labels))
    similarity = jnp.einsum('qd,nd->qn', x, database, precision='highest')
    similarity = jnp.where(rows == own[:, None], -jnp.inf, similarity)
    order = jnp.argsort(-similarity, axis=1, stable=True)
    hit = (labels[order] == y[:, None]) & (order != own[:, None])
    precision = jnp.cumsum(hit, axis=1) / (rows + 1)
    relevant = hit.sum(axis=1)
    found = (precision * hit).sum(axis=1) / jnp.maximum(relevant, 1), relevant, hit[:, 0]
    return jax.lax.with_sharding_constraint(found, sharding.replicated(mesh))


# Revisited Oxford and Paris.


def _landmarks(model, data, settings, work):
    truth = ground_truth(settings.ground_truth)
    if work.limit:
        raise errors.UserError(
            'A ground truth counts all images of its list: leave --limit out with '
            'retrieval.ground_truth.'
        )
    photos = data.train if data.test is None else data.test
    database = subset.Subset(data.train, _named(data.train, truth['imlist'], settings))
    asked = _named(photos, truth['qimlist'], settings)
    boxes = [entry['bbx'] for entry in truth['gnd']]
    queries = features.Edited(photos, asked, functools.partial(_cropped, boxes))
    x, ids, _ = embed(model, database, work)
    qx, query_ids, _ = embed(model, queries, work)
    if len(ids) < len(database) or len(query_ids) < len(queries):
        raise errors.UserError(
            f'{len(database) - len(ids) + len(queries) - len(query_ids)} images of '
            f'{settings.ground_truth} do not decode: repair them, as all of its list count.'
        )
    digest = hashing.digest(json.dumps(truth, sort_keys=True))
    for name in x:
        similarity = qx[name] @ x[name].T
        ranks = np.argsort(-similarity, axis=1, kind='stable')
        for difficulty, parts in DIFFICULTIES.items():
            about = dict(
                protocol(work, name),
                difficulty=difficulty,
                average_precision='revisitop compute_ap, junk removed',
                queries='cropped by bbx',
                scales=1,
                ground_truth=digest,
                data=fingerprint.content(data.train.fingerprint),
            )
            scores, empty = landmark_scores(ranks, truth['gnd'], *parts)
            feature = f'{name} {difficulty}'
            yield task.row('retrieval', feature, scores, about, queries_without_relevant=empty)


def _cropped(boxes, image, i):
    """The part of a query photo that is asked for, as Pillow's crop rounds."""
    left, top, right, bottom = (round(v) for v in boxes[i])
    return image[max(top, 0) : bottom, max(left, 0) : right]


def _named(source, names, settings):
    """Indices of the images with these names, with or without folder and extension."""
    stems = {}
    for i in range(len(source)):
        stems.setdefault(_stem(source.describe(i)), i)
    missing = [name for name in names if _stem(name) not in stems]
    if missing:
        raise errors.UserError(
            f'{len(missing)} of {len(names)} images of {settings.ground_truth} are not in the '
            f'folder, {missing[0]} for one: give --data the folder with all of them.'
        )
    return np.array([stems[_stem(name)] for name in names])


def _stem(name):
    name = os.path.basename(name)
    stem, extension = os.path.splitext(name)
    return stem if extension.lower() in ('.jpg', '.jpeg', '.png') else name


def ground_truth(path: str) -> dict:
    """The ground truth of Revisited Oxford or Paris from its pickle or our JSON.

    The pickle may hold lists, dicts, strings and numpy numbers alone; nothing in it is run.

    Returns:
      imlist, qimlist and gnd, see the top of this file.

    Raises:
      UserError: the file is no such ground truth.
    """
    data = storage.read(epath.Path(path))
    try:
        found = json.loads(data) if path.endswith('.json') else _unpickled(data)
        imlist, qimlist = ([str(x) for x in found[k]] for k in ('imlist', 'qimlist'))
        gnd = [
            {
                **{k: [int(i) for i in entry[k]] for k in ('easy', 'hard', 'junk')},
                'bbx': [float(v) for v in entry['bbx']],
            }
            for entry in found['gnd']
        ]
    except (ValueError, TypeError, KeyError, pickle.UnpicklingError, EOFError) as error:
        raise errors.UserError(
            f'{path} is no ground truth of Revisited Oxford or Paris ({error!r}): give gnd.json or '
            f'the official gnd_*.pkl, see docs/evaluate.md.'
        ) from error
    listed = [i for entry in gnd for k in ('easy', 'hard', 'junk') for i in entry[k]]
    if len(gnd) != len(qimlist) or (listed and not 0 <= min(listed) <= max(listed) < len(imlist)):
        raise errors.UserError(
            f'{path} does not fit itself: {len(qimlist)} queries, {len(gnd)} entries in gnd, '
            f'{len(imlist)} images: download it again.'
        )
    return dict(imlist=imlist, qimlist=qimlist, gnd=gnd)


def _unpickled(data: bytes) -> Any:
    class Plain(pickle.Unpickler):
        def find_class(self, module, name):
            module = module.replace('numpy.core.', 'numpy._core.')
            module = 'builtins' if module == '__builtin__' else module
            if (module, name) not in _PLAIN:
                raise pickle.UnpicklingError(f'it names {module}.{name}')
            return getattr(importlib.import_module(module), name)

    return Plain(io.BytesIO(data)).load()


def landmark_scores(
    ranks: np.ndarray, gnd: Sequence[dict], relevant: tuple, junk: tuple
) -> tuple[dict[str, float], int]:
    """mAP and mean precision at 1, 5, 10 as in the official evaluation, in percent.

    Args:
      ranks: (q, n) indices of images, the most similar first.
      gnd: of each query, see the top of this file.
      relevant, junk: keys of `gnd` whose images count as found, and are skipped.

    Returns:
      The scores over the queries that have relevant images; the number of the others.
    """
    aps, precisions = [], []
    for order, entry in zip(ranks, gnd, strict=True):
        ok = [i for key in relevant for i in entry[key]]
        if not ok:
            continue
        skipped = np.isin(order, [i for key in junk for i in entry[key]])
        found = np.flatnonzero(np.isin(order[~skipped], ok))
        aps.append(average_precision(found, len(ok)))
        # The official code counts no further than the last relevant image.
        depths = [min(found.max() + 1, k) for k in KAPPAS]
        precisions.append([(found < depth).sum() / depth for depth in depths])
    if not aps:
        raise errors.UserError(f'No query has {" or ".join(relevant)} images: look at gnd.')
    means = 100 * np.mean(precisions, axis=0)
    scores = {'mAP (%)': 100 * np.mean(aps)}
    scores |= {f'mP@{k} (%)': mean for k, mean in zip(KAPPAS, means, strict=True)}
    return scores, len(gnd) - len(aps)


def average_precision(positions: np.ndarray, total: int) -> float:
    """Area under precision over recall by trapezoids, as revisitop's `compute_ap`.

    Args:
      positions: ascending ranks of the relevant images, from 0.
      total: number of relevant images.
    """
    count = np.arange(len(positions))
    before = np.where(positions == 0, 1.0, count / np.maximum(positions, 1))
    after = (count + 1) / (positions + 1)
    return float((before + after).sum() / (2 * total))
