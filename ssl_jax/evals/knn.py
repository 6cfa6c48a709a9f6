# SPDX-License-Identifier: Apache-2.0
"""Exact weighted k-nearest-neighbour classification of frozen features, on the device.

Features are L2-normalised; with cosine similarity s and temperature T,

  votes(c) = sum over the k nearest j with label c of exp(s_j / T)

as in Pixio. DINO and DINOv2 take a softmax over the max(ks) nearest, cut to k: a positive factor
per query, which ranks the classes alike. Pixio takes the mean of the un-normed class tokens and
k = 10, DINO and DINOv2 the normed class token.

References:
  Wu et al., arXiv 1805.01978; Pixio `evaluation/eval_knn.py`; DINOv2 `eval/knn.py`.
"""

import dataclasses
import functools
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ssl_jax import sharding
from ssl_jax.data import sources
from ssl_jax.evals import accuracy, features
from ssl_jax.fields import Range
from ssl_jax.models import blocks
from ssl_jax.run import errors, launch, peers

AXES = ('data', 'fsdp')
# Similarities of one chunk of queries on one device: 2^27 float32 are 512 MiB.
CHUNK_ELEMENTS = 2**27


@dataclasses.dataclass(frozen=True)
class Options:
    """Fields of `eval.tasks.knn`."""

    ks: tuple = (10, 20, 100, 200)  # neighbours
    temperature: Annotated[float, Range(1e-4, 100.0)] = 0.07  # votes: exp(similarity / temperature)


def check(options, look) -> None:
    """Ends a run before its first step if its two labelled sets differ in their classes."""
    if look.method.classes or look.train is None or look.test is None:
        return
    sources.check_labels(look.train)
    accuracy.check_classes(look.train.classes, look.test)
    n = min(len(look.train), look.config.eval.max_train or len(look.train))
    if beyond := [k for k in options.ks if k > n]:
        launch.log(f'knn       k={", ".join(map(str, beyond))}: all {n} training images vote')


def run(options, look, state, step) -> dict[str, float]:
    """knn/<feature>/<k>: top-1 in percent, where `data.eval_train` and `data.eval_test` are given.

    Nothing for a classifier, which is scored by its own head.
    """
    del step
    if look.method.classes or look.train is None or look.test is None:
        return {}
    forward, rows = look.forward(state), {}
    train, train_y = look.extract(forward, look.train, look.config.eval.max_train)
    test, test_y = look.extract(forward, look.test, look.config.eval.max_test)
    classes = accuracy.check_classes(look.train.classes, look.test)
    fields = dict(num_classes=len(classes), mesh=look.mesh)
    fields.update(dataclasses.asdict(options))
    for name in ('cls_pre', 'cls', 'patch'):
        if name in train:
            scores = knn(train[name], train_y, test[name], test_y, **fields)
            rows |= {f'knn/{name}/{k}': v['top1'] for k, v in scores.items()}
    return rows


def knn(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    *,
    num_classes: int,
    ks: tuple = Options.ks,
    temperature: float = Options.temperature,
    mesh: jax.sharding.Mesh | None = None,
) -> dict[int, dict[str, float]]:
    """Accuracy of weighted kNN for every k at once.

    Args:
      train_x, train_y: (n, d) features and (n,) labels of the database.
      test_x, test_y: (m, d) and (m,), the queries.
      num_classes: labels are 0..num_classes-1.
      ks: neighbour counts; a k beyond n uses all n.
      mesh: shards the database over its data and fsdp axes, default one device; the result does
        not depend on it.

    Returns:
      {k: {'top1': percent, 'top5': percent}}; 'top5' counts the best min(5, k) classes, ties go to
      the smaller class number, as in both official codes.
    """
    train_x, test_x = np.asarray(train_x, np.float32), np.asarray(test_x, np.float32)
    train_y, test_y = np.asarray(train_y, np.int32), np.asarray(test_y, np.int32)
    if not ks or min(ks) < 1:
        raise errors.UserError(f'ks={ks} must name at least one neighbour count, each 1 or more.')
    for name, x, y in (('train', train_x, train_y), ('test', test_x, test_y)):
        accuracy.check_labels(name, y, num_classes)
        features.check_finite(name, x)
    mesh = mesh or sharding.make_mesh(devices=jax.local_devices()[:1])
    n = len(train_x)
    database = [put_rows(x, mesh) for x in (train_x, train_y, np.ones(n, bool))]
    fields = dict(temperature=float(temperature), num_classes=num_classes, mesh=mesh)
    fields['ks'] = tuple(min(k, n) for k in ks)
    ranks = _chunked(lambda *query: _ranks(*database, *query, **fields), n, (test_x, test_y), mesh)
    ranks = np.concatenate(ranks, axis=1)[:, : len(test_x)]
    return {
        k: {'top1': 100.0 * float((r < 1).mean()), 'top5': 100.0 * float((r < min(5, k)).mean())}
        for k, r in zip(ks, ranks, strict=True)
    }


def put_rows(x: np.ndarray, mesh: jax.sharding.Mesh) -> jax.Array:
    """Rows (n, ...) split over the data and fsdp axes, filled up with zeros to a multiple."""
    return _put(_filled(x, mesh.shape['data'] * mesh.shape['fsdp']), P(AXES), mesh)


def put_whole(x: np.ndarray, mesh: jax.sharding.Mesh) -> jax.Array:
    """The array on every device."""
    return _put(np.asarray(x), P(), mesh)


def _put(x, spec, mesh):
    # Unlike device_put this works where the mesh spans processes: all hold the whole array.
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), lambda i: x[i])


def _filled(x, multiple):
    return np.pad(x, [(0, -len(x) % multiple)] + [(0, 0)] * (x.ndim - 1))


def _chunked(f, n, queries, mesh):
    """[f(*chunk)] as numpy arrays; every chunk of the queries has the same shape, the last padded.

    A chunk has as many queries as a device can compare with its part of `n` rows.
    """
    m = len(queries[0])
    rows = -(-n // (mesh.shape['data'] * mesh.shape['fsdp']))
    chunk = min(m, int(np.clip(CHUNK_ELEMENTS // rows, 16, 1024)))
    queries, out = [_filled(x, chunk) for x in queries], []
    for start in range(0, m, chunk):
        peers.progress()
        out.append(f(*(_put(x[start : start + chunk], P(), mesh) for x in queries)))
        if len(out) > 1:  # read one late: the device stays busy, see checksums.IN_FLIGHT
            out[-2] = np.asarray(out[-2])
    return [np.asarray(x) for x in out]


def search(
    train_x: jax.Array,
    valid: jax.Array,
    x: np.ndarray,
    k: int,
    mesh: jax.sharding.Mesh,
    metric: str = 'cosine',
) -> np.ndarray:
    """Row numbers of the k nearest database rows of every query, nearest first.

    Args:
      train_x, valid: (n, d), bool (n,), see `put_rows`; rows that are not valid never count.
      x: (q, d) queries, any number.
      k: at most the number of valid rows.
      metric: see `neighbours`.

    Returns:
      int32 (q, k).
    """
    rows = put_rows(np.arange(len(train_x), dtype=np.int32), mesh)
    fields = dict(k=k, mesh=mesh, metric=metric)
    out = _chunked(lambda q: _nearest(train_x, rows, valid, q, **fields), len(rows), (x,), mesh)
    return np.concatenate(out)[: len(x)]


@functools.partial(jax.jit, static_argnames=('k', 'mesh', 'metric'))
def _nearest(train_x, rows, valid, x, *, k, mesh, metric):
    return neighbours(train_x, rows, valid, x, k, mesh, metric)[1]


@functools.partial(jax.jit, static_argnames=('ks', 'temperature', 'num_classes', 'mesh'))
def _ranks(train_x, train_y, valid, x, y, *, ks, temperature, num_classes, mesh):
    """(len(ks), q): number of classes voted above the true one."""
    similarities, labels = neighbours(train_x, train_y, valid, x, max(ks), mesh)
    scores = votes(similarities, labels, ks, temperature, num_classes)
    return jnp.stack([accuracy.ranks(scores[k], y) for k in ks])


def votes(
    similarities: jax.Array, labels: jax.Array, ks: tuple, temperature: float, num_classes: int
) -> dict[int, jax.Array]:
    """Class votes of sorted neighbours.

    Args:
      similarities: (q, kmax) cosines, largest first.
      labels: int (q, kmax) labels of these neighbours.
      ks: neighbour counts, each at most kmax.

    Returns:
      {k: (q, num_classes) float32}, divided by exp(s_1 / T): this changes no ranking and keeps
      small temperatures from overflowing.
    """
    logits = similarities / temperature
    weights = jnp.exp(logits - logits[:, :1])

    def add(total, neighbour):
        weight, label = neighbour  # (q,), (q,)
        return total + weight[:, None] * jax.nn.one_hot(label, num_classes), None

    out, start = {}, 0
    total = jnp.zeros((similarities.shape[0], num_classes), jnp.float32)
    for k in sorted(set(ks)):
        total, _ = jax.lax.scan(add, total, (weights[:, start:k].T, labels[:, start:k].T))
        out[k], start = total, k
    return out


def neighbours(
    train_x: jax.Array,
    train_y: jax.Array,
    valid: jax.Array,
    x: jax.Array,
    k: int,
    mesh: jax.sharding.Mesh,
    metric: str = 'cosine',
) -> tuple[jax.Array, jax.Array]:
    """The k nearest database rows of every query.

    Args:
      train_x, train_y, valid: (n, d), int (n,), bool (n,), sharded over the data and fsdp axes;
        rows that are not valid never count.
      x: (q, d) queries.
      k: at most the number of valid rows.
      metric: 'cosine' or 'L2'.

    Returns:
      similarities (q, k), cosines or negative squared distances, largest first, ties in database
      order, and labels (q, k).
    """

    def nearest(train_x, train_y, valid, x):
        # Each device's best k suffice for the best k of all; the shards come back in database
        # order and top_k takes the first of equals, so ties fall as on one device.
        query, keys = x, train_x
        if metric == 'cosine':
            query, keys = blocks.l2_normalize(x), blocks.l2_normalize(train_x)
        s = jnp.einsum('qd,nd->qn', query, keys, precision='highest')
        if metric == 'L2':
            s = 2 * s - jnp.square(keys).sum(axis=1) - jnp.square(query).sum(axis=1)[:, None]
        s, index = jax.lax.top_k(jnp.where(valid, s, -jnp.inf), min(k, s.shape[1]))
        s = jax.lax.all_gather(s, AXES, axis=1, tiled=True)
        labels = jax.lax.all_gather(train_y[index], AXES, axis=1, tiled=True)
        s, index = jax.lax.top_k(s, k)
        return s, jnp.take_along_axis(labels, index, axis=1)

    specs = (P(AXES), P(AXES), P(AXES), P())
    shared = jax.shard_map(nearest, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=False)
    return shared(train_x, train_y, valid, x)
