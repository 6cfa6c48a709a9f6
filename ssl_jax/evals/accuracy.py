# SPDX-License-Identifier: Apache-2.0
"""Top-1 and top-5 of a classifier on a labelled source, every image counted exactly once."""

import functools

import jax
import numpy as np

from ssl_jax.evals import features


def accuracy(
    method,
    params,
    extra,
    source,
    *,
    batch_size=256,
    mesh=None,
    limit=None,
    size=None,
    should_stop=None,
):
    """{'test': scores[, 'ema': scores]}, the second of the averaged weights.

    Images are cut as MAE does in `util/datasets.py`: short side to size / crop_pct, centre out.

    Args:
      method: with `logits`, `vit`, `crop_pct` and `classes`, see `methods.classifier`.
      params, extra: of the method, on the devices.
      source: labelled, see `data.sources`; its classes must be those of the method.
      size: side in pixels, default the method's.
      batch_size, mesh, limit, should_stop: see `features.extract`.

    Returns:
      For either name top1 and top5 in percent, loss (mean cross-entropy) and n, the images counted;
      those that cannot be decoded are left out.
    """
    check_classes(method.classes, source)
    size = size or method.vit.img_size
    if limit is not None and limit < len(source):
        source = features.Subset(source, features.pick(len(source), limit))
    forward = functools.partial(_jitted(method), params, extra)
    batches = features.batches(
        forward,
        source,
        size=size,
        resize=round(size / method.crop_pct),
        batch_size=min(batch_size, len(source)),
        mesh=mesh,
        should_stop=should_stop,
    )
    totals = {}
    for batch in batches:
        mask = batch['mask']
        for name, logits in batch['features'].items():
            found = totals.setdefault(name, np.zeros(4))
            found += _count(logits[mask], batch['label'][mask])
    if not next(iter(totals.values()))[0]:
        raise ValueError(f'None of the {len(source)} test images could be decoded.')
    return {
        name: dict(top1=100 * one / n, top5=100 * five / n, loss=loss / n, n=int(n))
        for name, (n, one, five, loss) in sorted(totals.items(), key=lambda x: x[0] != 'test')
    }


@functools.lru_cache
def _jitted(method):
    return jax.jit(method.logits)


def _count(logits, labels):
    """(images, in the first place, in the first five, summed cross-entropy) as float64 (4,).

    Ties go to the smaller class number; a row with NaN gets nothing right.
    """
    logits = logits.astype(np.float64)
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    classes = np.arange(logits.shape[1])
    above = (logits > own) | ((logits == own) & (classes < labels[:, None])) | np.isnan(logits)
    rank = above.sum(axis=1)
    top = logits.max(axis=1, keepdims=True)
    loss = np.log(np.exp(logits - top).sum(axis=1)) + (top - own)[:, 0]
    return np.array([len(labels), (rank < 1).sum(), (rank < 5).sum(), loss.sum()])


def check_classes(names, source):
    """Raises where labels of `source` would not mean the classes `names`."""
    theirs = tuple(getattr(source, 'classes', None) or ())
    if 'label' not in source[0] or not theirs:
        raise ValueError(
            f'The test images ({source.describe(0)} is the first) have no labels: put them in one '
            f'folder per class, as the training images.'
        )
    names = tuple(names)
    # Sets without names are numbered 0..max: one may just lack the last classes.
    if theirs != names and not (names[: len(theirs)] == theirs and all(map(str.isdigit, names))):
        odd = sorted(set(theirs) ^ set(names)) or 'the order'
        raise ValueError(
            f'The test images name their classes differently from the training images ({odd}): '
            f'labels would not mean the same, so give both sets the same class folders.'
        )
