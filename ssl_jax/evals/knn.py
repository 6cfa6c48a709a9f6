# SPDX-License-Identifier: Apache-2.0
"""Exact weighted k-nearest-neighbour classification of frozen features, on the device.

Two protocols, both on L2-normalised features with cosine similarity and temperature T:

  pixio:   votes(c) = sum over the k nearest j with label c of exp(s_j / T)
  dinov2:  votes(c) = the same sum of softmax(s / T) taken over the max(ks) nearest, cut to k

They rank the classes alike (one is the other times a positive number per query); the second makes
probabilities that do not sum to 1 for smaller k.  Which features go in (Pixio: mean of the
un-normed class tokens, k = 10; DINO and DINOv2: normed class token) is the caller's choice.

Reference: Wu et al., arXiv 1805.01978; Pixio `evaluation/eval_knn.py`; DINOv2 `eval/knn.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

PROTOCOLS = ('pixio', 'dinov2')
AXES = ('data', 'fsdp')
# Similarities of one chunk of queries on one device: 2^27 float32 are 512 MiB.
CHUNK_ELEMENTS = 2**27


def knn(
    train_x,
    train_y,
    test_x,
    test_y,
    *,
    ks=(10, 20, 100, 200),
    temperature=0.07,
    num_classes,
    protocol='pixio',
    mesh=None,
    chunk=None,
):
    """Accuracy of weighted kNN for every k at once.

    Args:
      train_x, train_y: (n, d) features and (n,) labels of the database.
      test_x, test_y: (m, d) and (m,), the queries.
      ks: neighbour counts; a k beyond n uses all n.
      num_classes: labels are 0..num_classes-1.
      protocol: one of PROTOCOLS.
      mesh: shards the database over its data and fsdp axes; the result does not depend on it.
      chunk: queries per call; by default what fits in CHUNK_ELEMENTS.

    Returns:
      {k: {'top1': percent, 'top5': percent}}; 'top5' counts the best min(5, k) classes, ties go to
      the smaller class number, as in both official codes.
    """
    ranks = _ranks(
        train_x, train_y, test_x, test_y, ks, temperature, num_classes, protocol, mesh, chunk
    )
    return {
        k: {'top1': 100.0 * float((r < 1).mean()), 'top5': 100.0 * float((r < min(5, k)).mean())}
        for k, r in ranks.items()
    }


def votes(similarities, labels, ks, temperature, num_classes, protocol='pixio'):
    """Class votes of sorted neighbours.

    Args:
      similarities: (q, kmax) cosines, largest first.
      labels: int (q, kmax) labels of these neighbours.
      ks: neighbour counts, each at most kmax.

    Returns:
      {k: (q, num_classes) float32}; for 'pixio' divided by exp(s_1 / T), which changes no ranking
      and keeps small temperatures from overflowing.
    """
    logits = similarities / temperature
    weights = jnp.exp(logits - logits[:, :1])
    if protocol == 'dinov2':
        weights = weights / weights.sum(axis=1, keepdims=True)

    def add(total, neighbour):
        weight, label = neighbour  # (q,), (q,)
        return total + weight[:, None] * jax.nn.one_hot(label, num_classes), None

    out, start = {}, 0
    total = jnp.zeros((similarities.shape[0], num_classes), jnp.float32)
    for k in sorted(set(ks)):
        total, _ = jax.lax.scan(add, total, (weights[:, start:k].T, labels[:, start:k].T))
        out[k], start = total, k
    return out


def normalize(x):
    """Rows scaled to unit length, as torch's `F.normalize`: x / max(|x|, 1e-12)."""
    x = jnp.asarray(x, jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _ranks(train_x, train_y, test_x, test_y, ks, temperature, num_classes, protocol, mesh, chunk):
    """{k: int (m,)}: how many classes are voted above the true one."""
    train_x, test_x = np.asarray(train_x, np.float32), np.asarray(test_x, np.float32)
    train_y, test_y = np.asarray(train_y, np.int32), np.asarray(test_y, np.int32)
    _check(train_x, train_y, test_x, test_y, ks, num_classes, protocol)
    n, m = len(train_x), len(test_x)
    shards = int(np.prod([mesh.shape[a] for a in AXES])) if mesh is not None else 1
    rows = -(-n // shards)  # of the database on one device
    chunk = chunk or int(np.clip(CHUNK_ELEMENTS // rows, 16, 1024))
    chunk = min(chunk, m)

    pad = rows * shards - n
    database = (
        np.pad(train_x, ((0, pad), (0, 0))),
        np.pad(train_y, (0, pad)),
        np.arange(rows * shards) < n,
    )
    replicated = None
    if mesh is not None:
        replicated = NamedSharding(mesh, P())
        database = [_put(x, NamedSharding(mesh, P(AXES))) for x in database]
    else:
        database = [jax.device_put(x, jax.local_devices()[0]) for x in database]
    used = tuple(min(k, n) for k in ks)
    step = functools.partial(
        _chunk_ranks,
        ks=used,
        temperature=float(temperature),
        num_classes=num_classes,
        protocol=protocol,
        mesh=mesh,
    )
    pieces = []
    for start in range(0, m, chunk):
        x, y = test_x[start : start + chunk], test_y[start : start + chunk]
        short = chunk - len(x)  # the last chunk is filled up so that one shape is compiled
        x, y = np.pad(x, ((0, short), (0, 0))), np.pad(y, (0, short))
        if mesh is not None:
            x, y = _put(x, replicated), _put(y, replicated)
        pieces.append(step(*database, x, y))
        if len(pieces) > 1:  # read one late: the device stays busy, see checksums.IN_FLIGHT
            pieces[-2] = np.asarray(pieces[-2])
    pieces = np.concatenate([np.asarray(p) for p in pieces], axis=1)[:, :m]
    return {k: pieces[i] for i, k in enumerate(ks)}


def _put(x, sharding):
    # Unlike device_put this also works where the mesh spans processes: all hold the whole array.
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


@functools.partial(
    jax.jit, static_argnames=('ks', 'temperature', 'num_classes', 'protocol', 'mesh')
)
def _chunk_ranks(train_x, train_y, valid, x, y, *, ks, temperature, num_classes, protocol, mesh):
    """(len(ks), q) ranks of the true class for one chunk of queries."""
    kmax = max(ks)
    similarities, labels = neighbours(train_x, train_y, valid, x, kmax, mesh)
    per_k = votes(similarities, labels, ks, temperature, num_classes, protocol)
    out = []
    for k in ks:
        own = jnp.take_along_axis(per_k[k], y[:, None], axis=1)  # (q, 1)
        first = jnp.arange(num_classes) < y[:, None]
        above = (per_k[k] > own) | ((per_k[k] == own) & first)
        out.append(above.sum(axis=1))
    return jnp.stack(out)


def neighbours(train_x, train_y, valid, x, k, mesh=None):
    """The k nearest database rows of every query, by cosine similarity.

    Args:
      train_x, train_y, valid: (n, d), int (n,), bool (n,); rows that are not valid never count.
        Sharded over the mesh's data and fsdp axes if there is a mesh.
      x: (q, d) queries.
      k: at most the number of valid rows.

    Returns:
      similarities (q, k), largest first, ties in database order, and labels (q, k).
    """

    def nearest(train_x, train_y, valid, x):
        s = jnp.einsum('qd,nd->qn', normalize(x), normalize(train_x), precision='highest')
        s = jnp.where(valid, s, -jnp.inf)
        s, index = jax.lax.top_k(s, min(k, s.shape[1]))
        return s, train_y[index]

    if mesh is None:
        return nearest(train_x, train_y, valid, x)

    def local(train_x, train_y, valid, x):
        # Each device's best k suffice for the best k of all; the shards come back in database
        # order and top_k takes the first of equals, so ties fall as on one device.
        s, labels = nearest(train_x, train_y, valid, x)
        s = jax.lax.all_gather(s, AXES, axis=1, tiled=True)
        labels = jax.lax.all_gather(labels, AXES, axis=1, tiled=True)
        s, index = jax.lax.top_k(s, k)
        return s, jnp.take_along_axis(labels, index, axis=1)

    rows = P(AXES)
    merged = jax.shard_map(
        local, mesh=mesh, in_specs=(rows, rows, rows, P()), out_specs=(P(), P()), check_vma=False
    )
    return merged(train_x, train_y, valid, x)


def _check(train_x, train_y, test_x, test_y, ks, num_classes, protocol):
    if protocol not in PROTOCOLS:
        raise ValueError(f'kNN protocol {protocol!r} is unknown; choose one of {PROTOCOLS}.')
    if not ks or min(ks) < 1:
        raise ValueError(f'ks={ks} must name at least one neighbour count, each 1 or more.')
    for name, x, y in (('train', train_x, train_y), ('test', test_x, test_y)):
        if x.ndim != 2 or len(x) != len(y) or not len(x):
            raise ValueError(
                f'{name} features {x.shape} and labels {y.shape} do not belong together; '
                f'pass (n, d) features with n >= 1 and n labels.'
            )
        if y.min() < 0 or y.max() >= num_classes:
            raise ValueError(
                f'{name} labels span {y.min()}..{y.max()} but num_classes={num_classes}; '
                f'check that both splits use the same class order.'
            )
        if not np.isfinite(x).all():
            raise ValueError(
                f'{name} features have NaN or inf in {(~np.isfinite(x)).any(1).sum()} of {len(x)} '
                f'rows; look for non-finite parameters in the checkpoint.'
            )
    if train_x.shape[1] != test_x.shape[1]:
        raise ValueError(
            f'train features have {train_x.shape[1]} columns and test features '
            f'{test_x.shape[1]}; extract both with the same model.'
        )
