# SPDX-License-Identifier: Apache-2.0
"""Weighted kNN with few labelled images per class, repeated over random choices of them.

References:
  DINOv2 `eval/knn.py`, `n_per_class_list` and `n_tries`
"""

import dataclasses
from typing import Annotated

import jax
import numpy as np

from ssl_jax.evals import knn
from ssl_jax.fields import Range
from ssl_jax.run import errors


@dataclasses.dataclass(frozen=True)
class Settings:
    """Fields few_shot.FIELD=VALUE of `ssl_jax eval`."""

    per_class: tuple = (1, 2, 5, 10)  # images
    percent: tuple = (1, 10)  # of the images of each class, at least one
    tries: Annotated[int, Range(1, 1000)] = 5  # choices of images
    k: Annotated[int, Range(1, 10000)] = 20  # neighbours
    temperature: Annotated[float, Range(1e-4, 100.0)] = knn.Options.temperature
    seed: Annotated[int, Range(0, 2**31)] = 0  # of the choices


def few_shot(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    *,
    num_classes: int,
    per_class: tuple = Settings.per_class,
    percent: tuple = Settings.percent,
    tries: int = Settings.tries,
    k: int = Settings.k,
    temperature: float = Settings.temperature,
    seed: int = Settings.seed,
    mesh: jax.sharding.Mesh | None = None,
) -> list[dict]:
    """Accuracy of kNN with parts of the training set.

    Args:
      train_x, train_y, test_x, test_y, num_classes, temperature, mesh: see `knn.knn`.
      per_class: numbers n of images of each class; as in DINOv2, n neighbours vote if n < k. An n
        above the size of the smallest class is left out.
      percent: shares of each class, rounded, at least one image; `k` or all of them vote.
      tries: choices of images. In one try a smaller choice is part of a larger one.
      k: neighbours.
      seed: of the choices.

    Returns:
      One dict(shots='5 per class' or '1 %', images, k, tries, top1, top1_std, top5, top5_std) for
      each part; means and sample standard deviations over the tries, in percent.
    """
    if tries < 1:
        raise errors.UserError(f'tries={tries} must be 1 or more.')
    sizes = np.bincount(train_y, minlength=num_classes)
    smallest = sizes[sizes > 0].min()
    parts = [(f'{n} per class', np.minimum(n, sizes), n) for n in per_class if n <= smallest]
    for share in percent:
        counts = np.maximum(1, np.round(share / 100 * sizes)).astype(int)
        parts.append((f'{share:g} %', np.minimum(counts, sizes), k))
    ranks = [_ranks(train_y, np.random.default_rng((seed, i))) for i in range(tries)]
    rows = []
    for shots, counts, most in parts:
        used = int(min(k, most, counts.sum()))
        scores = []
        for rank in ranks:
            some = np.flatnonzero(rank < counts[train_y])
            found = knn.knn(
                train_x[some], train_y[some], test_x, test_y,
                num_classes=num_classes, ks=(used,), temperature=temperature, mesh=mesh,
            )  # fmt: skip
            scores.append([found[used]['top1'], found[used]['top5']])
        mean = np.mean(scores, axis=0)
        std = np.std(scores, axis=0, ddof=1) if tries > 1 else np.zeros(2)
        row = dict(shots=shots, images=int(counts.sum()), k=used, tries=tries)
        for name, a, b in zip(('top1', 'top5'), mean, std, strict=True):
            row |= {name: float(a), f'{name}_std': float(b)}
        rows.append(row)
    return rows


def _ranks(labels, rng):
    """(n,): place of each image in a random order of its class, from 0."""
    order = rng.permutation(len(labels))
    order = order[np.argsort(labels[order], kind='stable')]
    ranks = np.empty(len(labels), int)
    sizes = np.bincount(labels)
    ranks[order] = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return ranks
