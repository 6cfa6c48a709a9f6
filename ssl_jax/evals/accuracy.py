# SPDX-License-Identifier: Apache-2.0
"""Top-1 and top-5 of a classifier on a labelled source, each image counted once."""

import collections
import dataclasses
import functools

import jax
import numpy as np

from ssl_jax.data import sources
from ssl_jax.data import stream as stream_lib
from ssl_jax.evals import features
from ssl_jax.run import errors, launch


@dataclasses.dataclass(frozen=True)
class Options:
    """`eval.tasks.accuracy` has no fields."""


def check(options, look) -> None:
    """Ends a fine-tuning run before its first step if its test images have other classes."""
    del options
    if not look.method.classes:
        return
    if look.test is None:
        launch.log('test      no images: accuracy is not measured; give --test LABELLED')
    else:
        check_classes(look.method.classes, look.test, outputs=True)


def run(options, look, state, step) -> dict[str, float]:
    """test/top1, test/top5 in percent and test/loss of a classifier; ema/... of its average."""
    del options, step
    if not look.method.classes or look.test is None:
        return {}
    reading = look.reading(look.config.eval.max_test)
    scores = accuracy(look.method, state.params, state.extra, look.test, **reading)
    rows = {f'{name}/{k}': x[k] for name, x in scores.items() for k in ('top1', 'top5', 'loss')}
    return {**rows, 'test/images': scores['test']['n']}


def accuracy(
    method, params, extra, source, *, transform: dict, limit: int | None = None, **options
) -> dict[str, dict]:
    """{'test': scores[, 'ema': scores]}, the second of the averaged weights.

    Args:
      method: with `logits` and `classes`, see `methods.classifier`.
      params, extra: of the method, on the devices.
      source: labelled, see `data.sources`; its classes must be those of the method.
      transform, limit, options: see `features.batches`.

    Returns:
      For either name top1 and top5 in percent, loss (mean cross-entropy) and n, the number of
      images; those that do not decode are left out, which is said in the log.
    """
    check_classes(method.classes, source, outputs=True)
    forward = functools.partial(_jitted(method), params, extra)
    source, bad = features.limited(source, limit), []
    totals = collections.defaultdict(lambda: np.zeros(4))
    for batch in features.batches(forward, source, transform=transform, **options):
        mask = batch['mask']
        bad += features.left_out(batch)
        for name, logits in batch['features'].items():
            totals[name] += _count(logits[mask], batch['label'][mask])
    stream_lib.say_left_out(source, bad)
    if not totals['test'][0]:
        raise errors.UserError(f'None of the {len(source)} test images could be decoded.')
    return {
        name: dict(top1=100 * one / n, top5=100 * five / n, loss=loss / n, n=int(n))
        for name, (n, one, five, loss) in sorted(totals.items(), reverse=True)  # test, ema
    }


@functools.lru_cache
def _jitted(method):
    return jax.jit(method.logits)


def _count(logits, labels):
    """(images, in the first place, in the first five, summed cross-entropy) as float64 (4,)."""
    logits = logits.astype(np.float64)
    rank = ranks(logits, labels)
    top = logits.max(axis=1, keepdims=True)
    own = np.take_along_axis(logits - top, labels[:, None], axis=1)[:, 0]
    loss = np.log(np.exp(logits - top).sum(axis=1)) - own
    return np.array([len(labels), (rank < 1).sum(), (rank < 5).sum(), loss.sum()])


def ranks(scores: jax.Array | np.ndarray, labels: jax.Array | np.ndarray):
    """Number of classes that score above the true one, int (..., n).

    Ties go to the smaller class number, NaN counts as above.

    Args:
      scores: (..., n, C).
      labels: int (n,).
    """
    own = scores[..., np.arange(len(labels)), labels][..., None]
    first = np.arange(scores.shape[-1]) < labels[:, None]
    above = (scores > own) | ((scores == own) & first) | (scores != scores)
    return above.sum(axis=-1)


def check_classes(names: tuple | None, source, outputs: bool = False) -> tuple:
    """The classes of both sets; raises where labels of `source` would not mean the classes `names`.

    Args:
      names: of the training images.
      source: test images.
      outputs: whether `names` are all that can be answered, by the head of a classifier.
    """
    names, classes = tuple(names or ()), tuple(source.classes or ())
    if not names:
        raise errors.UserError(
            'The training images have no labels; put them in one folder per class.'
        )
    if not classes:
        raise errors.UserError(
            f'The test images ({source.describe(0)} is the first) have no labels: put them in one '
            f'folder per class, as the training images.'
        )
    sources.check_labels(source)
    # Sets without names are numbered 0..max: one may just lack the last classes.
    shorter, longer = sorted((classes, names), key=len)
    same = longer[: len(shorter)] == shorter and all(map(str.isdigit, longer))
    if classes != names and not (same and (longer == names or not outputs)):
        odd = sorted(set(classes) ^ set(names)) or 'the order'
        raise errors.UserError(
            f'The test images name their classes differently from the training images ({odd}): '
            f'labels would not mean the same, so give both sets the same class folders.'
        )
    return longer


def check_labels(name: str, labels: np.ndarray, num_classes: int) -> None:
    """Raises where labels are not in 0..num_classes-1."""
    if labels.min() < 0 or labels.max() >= num_classes:
        raise errors.UserError(
            f'{name} labels span {labels.min()}..{labels.max()} but num_classes={num_classes}; '
            f'check that both splits use the same class order.'
        )
