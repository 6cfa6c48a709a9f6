# SPDX-License-Identifier: Apache-2.0
"""Semantic segmentation by frozen patch features, without training of a network: CAPI's protocol.

kNN: a patch takes over the pixel labels of its k nearest training patches, each pixel the most
frequent of the k. Logistic regression: a patch has the class that is most frequent among its
pixels. Both see standardised features; k, metric and C are chosen on a tenth of the training
images, then all training images are used.

mIoU is the mean of intersection / union over the classes that occur in the labels or in the
predictions of the test images, intersections and unions counted over all their pixels that are not
ignored. Ignored pixels of training patches vote, as in CAPI; where they win, the pixel is a miss of
its class. CAPI's own mean counts these misses as one more class, with an IoU of 0.

References:
  Darcet et al., Cluster and Predict Latent Patches, arXiv 2502.08769; CAPI `eval_segmentation.py`
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np

from ssl_jax import encoder
from ssl_jax.data import host
from ssl_jax.data import maps as maps_lib
from ssl_jax.data import stream as stream_lib
from ssl_jax.data import transform as transform_lib
from ssl_jax.evals import dense_scores, features, knn, linear, logreg, task
from ssl_jax.fields import Range
from ssl_jax.run import errors

NEEDS = 'segmentation'
METRICS = ('cosine', 'L2')
VOTES = 2**23  # counted at a time: 64 MiB


@dataclasses.dataclass(frozen=True)
class Settings:
    """Fields of `seg.FIELD=VALUE`; the defaults are CAPI's."""

    ks: tuple = (1, 3, 10, 30)  # neighbours, with each of METRICS
    cs: tuple = tuple(float(c) for c in 10 ** np.linspace(-6, 5, 8))  # see `logreg`; (): kNN alone
    max_steps: Annotated[int, Range(1, 10**6)] = logreg.Settings.max_steps
    max_patches: Annotated[int, Range(1, 10**9)] = 2**19  # of the training images, see `collect`


@dataclasses.dataclass(frozen=True)
class Options:
    """Fields of `eval.tasks.seg`: kNN alone, of a few images."""

    limit: Annotated[int, Range(2, 10**6)] = 128  # images of each set
    k: Annotated[int, Range(1, 10**4)] = 10
    metric: Literal['cosine', 'L2'] = 'cosine'


def run(options, look, state, step) -> dict[str, float]:
    """seg/miou in percent, where `data.eval_train` and `data.eval_test` have class maps."""
    del step
    if look.method.classes or not _mapped(look.train, look.test):
        return {}
    num_classes = len(maps_lib.class_names(look.train, look.test))
    reading = look.reading(options.limit)
    vit, params = look.method.networks(state.params, state.extra)['encoder']
    model = encoder.Model(vit, params, reading['transform'], 'the run')
    read = functools.partial(features.batches, **reading)
    train = collect(model, read, features.limited(look.train, options.limit), num_classes)
    scaled = standardise(train, np.ones(len(train['x']), bool))
    placed = knn.put_rows(train['x'], look.mesh)
    predict = _by_neighbours(train, placed, look.mesh, num_classes, options.k, options.metric)
    counts = 0
    for x, labels in patches(model, read, features.limited(look.test, options.limit), num_classes):
        counts += tally(_rows(labels), predict(scaled(_rows(x))), num_classes)
    return {'seg/miou': scores(counts)[0]['mIoU']}


def check(options, look) -> None:
    """Ends a run before its first step if its two sets differ in the classes of their maps."""
    del options
    if not look.method.classes and _mapped(look.train, look.test):
        maps_lib.class_names(look.train, look.test)


def _mapped(*sources):
    """Whether all sources have class maps."""
    return all(getattr(source, 'map_classes', None) for source in sources)


def evaluate(model: Any, data: task.Data, settings: Settings, work: task.Work) -> Iterator[dict]:
    """Rows 'kNN' and 'logistic regression', see `task`."""
    train_source, test_source = (features.limited(x, work.limit) for x in data.split())
    if len(train_source) < 2 or not _mapped(train_source, test_source):
        raise errors.UserError(
            f'seg needs two training images or more and class maps in both sets: '
            f'{train_source.describe(0)} ... are {len(train_source)} training images.'
        )
    if not settings.ks or min(settings.ks) < 1 or min(settings.cs, default=1) <= 0:
        raise errors.UserError(
            f'seg.ks={settings.ks} are numbers of neighbours, one or more, each 1 or more, and '
            f'seg.cs={settings.cs} inverse strengths above 0.'
        )
    names = maps_lib.class_names(train_source, test_source)
    num_classes = len(names)

    def read(forward, source, **options):
        return features.told(work.batches(forward, source, **options), len(source), work.log)

    train = collect(model, read, train_source, num_classes, settings.max_patches)
    held = np.isin(train['image'], linear.split(len(train_source), 0)[1])
    scaled = standardise(train, ~held)
    share = f'{len(train["x"])} of {train["total"]} training patches'
    work.log(f'seg: {share}')
    placed = knn.put_rows(train['x'], work.mesh)
    heads = [_knn(train, placed, held, settings, num_classes, work)]
    if settings.cs:
        heads.append(_logreg(train, placed, held, settings, num_classes, work))
    counts, shown = [0] * len(heads), []
    for ids, x, labels in _read(model, read, test_source, num_classes):
        queries = scaled(_rows(x))
        predicted = [head['predict'](queries) for head in heads]
        for i, found in enumerate(predicted):
            counts[i] += tally(_rows(labels), found, num_classes)
        if not shown:
            shown = _shown(test_source, work, ids, labels, predicted[-1], num_classes)
    common = dict(
        **transform_lib.protocol(work.transform),
        normalization=f'mean {work.transform["mean"]}, std {work.transform["std"]}',
        maps='nearest, cut as the images',
        tokens='of patches, after the final norm',
        patch_size=train['patch_size'],
        standardised='by mean and standard deviation of the training patches not held out',
        patches=share if len(train['x']) == train['total'] else f'{share}, by smallest hash',
        dropped='training patches whose most frequent label is ignored',
        selection=f'mIoU on {len(np.unique(train["image"][held]))} training images, then all vote',
        average='IoU over classes in labels or predictions; ignored labels left out',
        num_classes=num_classes,
        limit=work.limit,
        **data.protocol(),
    )
    for head, found in zip(heads, counts, strict=True):
        values, iou = scores(found)
        more = dict(chosen=head['chosen'], sweep=head['sweep'])
        more['iou'] = dict(zip(names, iou, strict=True))
        yield task.row('seg', head['name'], values, {**common, **head['protocol']}, **more)
    about = dict(task='seg', head=heads[-1]['name'], scores=values, classes=names)
    task.keep(work.folder / 'seg', about, shown)


def _shown(source, work, ids, labels, predicted, num_classes):
    """[(image, truth, prediction)] of the first test images, see `task.keep`."""

    def pixels(patches):  # (B, N, m or 1)
        shape = math.isqrt(labels.shape[1]), math.isqrt(labels.shape[2])
        found = np.broadcast_to(patches, labels.shape)[: task.SHOWN]
        found = np.where(found == num_classes, maps_lib.IGNORED, found).astype(np.uint8)
        found = found.reshape(-1, shape[0], shape[0], shape[1], shape[1]).swapaxes(2, 3)
        return found.reshape(len(found), shape[0] * shape[1], -1)

    images = [
        transform_lib.cut(host.decode(source[int(i)]['image']), work.transform)
        for i in ids[: task.SHOWN]
    ]
    predicted = predicted.reshape(*labels.shape[:2], -1)
    return list(zip(images, pixels(labels), pixels(predicted), strict=True))


def _knn(train, placed, held, settings, num_classes, work):
    """k and metric chosen: dict(name, chosen, sweep, protocol, predict)."""
    sweep, use = [], (train['mode'] < num_classes) & ~held
    if not use.any():
        raise errors.UserError('No training patch has a class: the labels of all are ignored.')
    labels = train['labels']
    ks = sorted({min(k, int(use.sum())) for k in settings.ks})
    for metric in METRICS:
        valid = knn.put_rows(use, work.mesh)
        near = knn.search(placed, valid, train['x'][held], ks[-1], work.mesh, metric)
        for k in ks:
            counts = tally(labels[held], vote(labels, near[:, :k], num_classes), num_classes)
            sweep.append(dict(k=k, metric=metric, miou=scores(counts)[0]['mIoU']))
            work.log(f'seg: kNN, k={k}, {metric}: mIoU {sweep[-1]["miou"]:.2f} on held-out images')
    best = max(sweep, key=lambda row: (np.nan_to_num(row['miou'], nan=-1), -row['k']))
    chosen = {key: best[key] for key in ('k', 'metric')}
    return dict(
        name='kNN',
        chosen=chosen,
        sweep=sweep,
        protocol=dict(ks=list(settings.ks), metrics=METRICS, ties='the lowest class'),
        predict=_by_neighbours(train, placed, work.mesh, num_classes, **chosen),
    )


def _by_neighbours(train, placed, mesh, num_classes, k, metric):
    """A function of rows (q, D) that returns labels (q, m)."""
    use = train['mode'] < num_classes
    valid, k = knn.put_rows(use, mesh), min(k, int(use.sum()))

    def predict(queries):
        near = knn.search(placed, valid, queries, k, mesh, metric)
        return vote(train['labels'], near, num_classes)

    return predict


def _logreg(train, x, held, settings, num_classes, work):
    """C chosen and all fitted, see `_knn`."""
    y = knn.put_rows(train['mode'].astype(np.int32), work.mesh)
    use, mesh = train['mode'] < num_classes, work.mesh
    fields = dict(num_classes=num_classes, max_steps=settings.max_steps, mesh=mesh)
    sweep, fitted = [], []
    for c, params, found in logreg.path(x, y, use & ~held, settings.cs, **fields):
        classes = np.asarray(logreg.predict(x, params, mesh=mesh))[: len(held)][held]
        counts = tally(train['labels'][held], classes[:, None], num_classes)
        sweep.append(dict(c=c, miou=scores(counts)[0]['mIoU'], **found))
        fitted.append(params)
        work.log(
            f'seg: logistic regression, C={c:.2g}: mIoU {sweep[-1]["miou"]:.2f} on held-out '
            f'images, {found["steps"]} steps'
        )
    at = max(range(len(sweep)), key=lambda i: (np.nan_to_num(sweep[i]['miou'], nan=-1), -i))
    c = sweep[at]['c']
    params, found = logreg.fit(x, y, use, c, fitted[at], **fields)

    def predict(queries):
        classes = logreg.predict(knn.put_rows(queries, mesh), params, mesh=mesh)
        return np.asarray(classes)[: len(queries), None]

    return dict(
        name='logistic regression',
        chosen=dict(c=c, at_edge=len(sweep) > 1 and at in (0, len(sweep) - 1), **found),
        sweep=sweep,
        protocol=dict(
            **logreg.protocol(settings.cs, settings.max_steps),
            target='the most frequent label of a patch; predictions are repeated to its pixels',
        ),
        predict=predict,
    )


def patches(
    model: Any, read: Callable, source: Any, num_classes: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Patch tokens and the labels of their pixels, batch by batch; undecodable images left out.

    Args:
      model: an `encoder.Model` or `encoder.Pixels`.
      read: `features.batches` without forward and source.
      source: with class maps.
      num_classes: of the maps.

    Yields:
      float32 (B, N, D) and uint8 or uint16 (B, N, m), m the pixels of a patch, `num_classes` where
      they are ignored.
    """
    for _, x, labels in _read(model, read, source, num_classes):
        yield x, labels


def _read(model, read, source, num_classes):
    """The same with the positions (B,) of the images in the source."""

    def forward(images):
        return {'patch': model(images)['patch_tokens'].astype(jnp.float32)}

    bad = []
    for batch in read(forward, source, maps=('segmentation',)):
        bad += features.left_out(batch)
        ids, x, maps = (
            v[batch['mask']]
            for v in (batch['id'], batch['features']['patch'], batch['segmentation'])
        )
        if not len(ids):
            continue
        unknown = (maps >= num_classes) & (maps != maps_lib.IGNORED)
        if unknown.any():
            i = int(np.flatnonzero(unknown.any(axis=(1, 2)))[0])
            raise errors.UserError(
                f'the class map of {source.describe(int(ids[i]))} has the label '
                f'{maps[i][unknown[i]].max()}, but there are {num_classes} classes: labels are 0 '
                f'to {num_classes - 1}, and 255 where ignored.'
            )
        maps = np.where(maps == maps_lib.IGNORED, num_classes, maps.astype(np.uint16))
        grid = math.isqrt(x.shape[1])
        side = maps.shape[1] // grid
        maps = maps.reshape(-1, grid, side, grid, side).swapaxes(2, 3)
        yield ids, x, maps.reshape(*x.shape[:2], side * side)
    stream_lib.say_left_out(source, bad)


def collect(
    model: Any, read: Callable, source: Any, num_classes: int, most: int | None = None
) -> dict:
    """The patches of a source, or `most` of them, those with the smallest hashes.

    Args:
      model, read, source, num_classes: see `patches`.

    Returns:
      x (n, D), labels (n, m), mode (n,), the most frequent label of a patch, image (n,), its
      position in the source, total, the number of patches of the source, and patch_size.
    """
    found, picked = [], None
    for ids, x, labels in _read(model, read, source, num_classes):
        count = x.shape[1]
        if picked is None:
            picked = np.ones(len(source) * count, bool)
            if most is not None and most < len(picked):
                picked[:] = False
                picked[features.pick(len(picked), most)] = True
        keep = picked.reshape(-1, count)[ids]
        x, labels, image = x[keep], labels[keep], np.repeat(ids, count)[keep.ravel()]
        found.append(dict(x=x, labels=labels, image=image, mode=_mode(labels, num_classes)))
    if not found:
        raise errors.UserError(
            f'None of the {len(source)} images of {source.describe(0)} ... decodes.'
        )
    whole = {key: np.concatenate([part[key] for part in found]) for key in found[0]}
    return dict(whole, total=len(picked), patch_size=math.isqrt(whole['labels'].shape[1]))


def standardise(train: dict, fit: np.ndarray) -> Callable:
    """Scales train['x'] in place, and returns the function that scales other rows alike.

    Args:
      train: of `collect`.
      fit: bool (n,), the rows whose mean becomes 0 and standard deviation 1.
    """
    x, count = train['x'], max(int(fit.sum()), 1)
    blocks = [slice(i, i + 2**15) for i in range(0, len(x), 2**15)]  # float64 for few at a time
    mean = sum(x[b][fit[b]].sum(axis=0, dtype=np.float64) for b in blocks) / count
    square = sum(np.square(x[b][fit[b]] - mean).sum(axis=0) for b in blocks) / count
    mean = mean.astype(np.float32)
    std = np.sqrt(np.where(square > 0, square, 1)).astype(np.float32)

    def scaled(rows):
        return (rows - mean) / std

    for b in blocks:
        x[b] = scaled(x[b])
    features.check_finite('train', x)
    return scaled


def vote(labels: np.ndarray, near: np.ndarray, num_classes: int) -> np.ndarray:
    """The most frequent label of each pixel among neighbours, the lowest of equally frequent ones.

    Args:
      labels: (n, m), 0 to num_classes, the last for ignored pixels.
      near: (q, k) rows of `labels`.

    Returns:
      int (q, m).
    """
    (q, k), m, kinds = near.shape, labels.shape[1], num_classes + 1
    step, out = max(1, VOTES // (m * max(kinds, k))), []
    for start in range(0, q, step):
        some = labels[near[start : start + step]]  # (q, k, m)
        bins = np.arange(len(some) * m).reshape(-1, 1, m) * kinds + some
        counts = np.bincount(bins.ravel(), minlength=len(some) * m * kinds)
        out.append(counts.reshape(-1, m, kinds).argmax(axis=2))
    return np.concatenate(out)


def _mode(labels, num_classes):
    """(n, m) -> (n,): the most frequent label of each row."""
    pixels = labels.reshape(-1, 1)
    return vote(pixels, np.arange(len(pixels)).reshape(labels.shape), num_classes)[:, 0]


def _rows(x):
    """(B, N, m) -> (B N, m)."""
    return x.reshape(-1, x.shape[-1])


def tally(labels: np.ndarray, predicted: np.ndarray, num_classes: int) -> np.ndarray:
    """Intersection, union and labelled pixels of each class, int64 (3, num_classes).

    Args:
      labels: (q, m), 0 to num_classes, the last where ignored: these pixels do not count.
      predicted: (q, m) or (q, 1), 0 to num_classes.
    """
    predicted = np.broadcast_to(predicted, labels.shape)
    both, union = dense_scores.intersection_union(predicted, labels, num_classes, num_classes)
    pixels = np.bincount(labels.ravel(), minlength=num_classes)[:num_classes]
    return np.stack([both, union, pixels])


def scores(counts: np.ndarray) -> tuple[dict[str, float], list]:
    """Scores in percent from sums of `tally`.

    Returns:
      {'mIoU', 'pixel accuracy'}, nan without pixels, and the IoU of each class, None where neither
      labels nor predictions have it.
    """
    both, union, pixels = counts
    iou = [None if np.isnan(x) else float(x) for x in dense_scores.iou(both, union)]
    present = [x for x in iou if x is not None]
    mean = sum(present) / len(present) if present else math.nan
    accuracy = 100.0 * float(both.sum() / max(pixels.sum(), 1))
    return {'mIoU': mean, 'pixel accuracy': accuracy}, iou
