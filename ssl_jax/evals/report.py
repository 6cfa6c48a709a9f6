# SPDX-License-Identifier: Apache-2.0
"""Classification by features of several encoders side by side: `ssl_jax eval`.

A number without its protocol cannot be compared: k, T, the features, the resolution and the sweep
each move it by points. So every row has its full protocol and a short `protocol_id`; rows with
equal ids are comparable.
"""

import json
import re
from collections.abc import Callable

import jax
import numpy as np

from ssl_jax.data import fingerprint, sources
from ssl_jax.data import transform as transform_lib
from ssl_jax.evals import accuracy, few_shot, knn, linear, logreg, monitors
from ssl_jax.evals import features as features_lib
from ssl_jax.evals import task as task_lib
from ssl_jax.run import hashing, launch

FEATURES = {
    'cls': 'mean of the class tokens after the final norm',
    'cls_pre': 'mean of the class tokens before the final norm',
    'patch': 'mean of the patch tokens after the final norm',
    'cls_patch': 'cls and patch side by side',
    **{
        f'grid{n}': f'means of the patch tokens over {n} x {n} cells of the image, side by side'
        for n in (2, 3, 4)
    },
    'pixels': 'pixels of the (downsized) image',
}
# A cosine of several vectors side by side is that of the longest.
SIDE_BY_SIDE = re.compile(r'cls_patch|cls\d+(_patch)?')
# cls_pre: after BatchNorm hardly different from cls; grid: up to sixteen times as wide for little.
NOT_LINEAR = re.compile(r'cls_pre|grid\d')
MONITORED = 1024  # images
POOLED = ('knn', 'linear', 'few_shot', 'logreg')  # evaluations of features of whole images


def evaluate(
    forwards: dict[str, Callable],
    train_source,
    test_source=None,
    *,
    transform: dict | int,
    batch_size: int = 256,
    mesh: jax.sharding.Mesh | None = None,
    limit: int | None = None,
    tasks: tuple = ('knn', 'linear'),
    ks: tuple = knn.Options.ks,
    temperature: float = knn.Options.temperature,
    linear_options: dict | bool | None = None,
    few_shot_options: dict | None = None,
    logreg_options: dict | None = None,
    normalization: str = 'ImageNet mean and std',
    log: Callable | None = launch.log,
) -> list[dict]:
    """Rows of each forward; images are decoded once for all.

    Args:
      forwards: {model: forward}, e.g. trained, untrained and raw_pixels, see `features`.
      train_source, test_source: labelled; without the second a fifth of the first is the test set,
        chosen by a hash of the image's index.
      transform, batch_size, mesh, limit: see `features.batches`; `limit` holds for each of the two
        sets.
      tasks: of POOLED; monitors are always there.
      ks, temperature: see `knn.knn`.
      linear_options: more arguments of `linear.probe`; False leaves the probe out.
      few_shot_options, logreg_options: more arguments of `few_shot.few_shot`, `logreg.probe`.
      normalization: of the channels by the forwards, for the protocol.
      log: called with each line of progress; None for silence.

    Returns:
      Dicts for JSON: model, eval (of POOLED, or 'monitors'), feature, top1 and top5 in percent (or
      the monitors), protocol, protocol_id; 'linear' and 'logreg' also have the sweep and its best
      row, 'few_shot' the deviations over its tries.
    """
    log = log or (lambda line: None)
    for source in filter(None, (train_source, test_source)):
        sources.check_labels(source)
    split = 'two given sets'
    if test_source is None:
        train_source, test_source = features_lib.split(train_source)
        split = 'one given set: a fifth, chosen by splitmix64 of the index, is the test set'
    num_classes = len(accuracy.check_classes(train_source.classes, test_source))
    transform = transform_lib.of(transform)
    reading = dict(transform=transform, batch_size=batch_size, mesh=mesh, limit=limit)
    train, train_y = _extract('train', forwards, train_source, reading, log)
    test, test_y = _extract('test', forwards, test_source, reading, log)
    common = dict(
        **transform_lib.protocol(transform),
        normalization=normalization,
        split=split,
        train=dict(images=len(train_y), data=fingerprint.content(train_source.fingerprint)),
        test=dict(images=len(test_y), data=fingerprint.content(test_source.fingerprint)),
        num_classes=num_classes,
        chance=100.0 * float(np.bincount(test_y).max()) / len(test_y),
    )
    rows = []
    for model in forwards:
        data = train[model], train_y, test[model], test_y
        for name in train[model]:
            if SIDE_BY_SIDE.fullmatch(name):
                continue
            if 'knn' in tasks:
                rows += (scores := _knn_rows(model, name, data, common, ks, temperature, mesh))
                top1 = ', '.join(f'{row["top1"]:.2f}' for row in scores)
                log(f'{model} {name}: kNN top-1 {top1}')
            if 'few_shot' in tasks and not NOT_LINEAR.fullmatch(name):
                options = few_shot_options or {}
                rows += (scores := _few_shot_rows(model, name, data, common, options, mesh))
                top1 = ', '.join(f'{row["shots"]} {row["top1"]:.2f}' for row in scores)
                log(f'{model} {name}: few-shot kNN top-1 {top1}')
            rows.append(_monitors_row(model, name, test[model][name], common))
        if 'logreg' in tasks:
            rows.append(_logreg_row(model, data, common, logreg_options or {}, mesh, log))
            log(f'{model} {rows[-1]["feature"]}: logistic regression top-1 {rows[-1]["top1"]:.2f}')
        if 'linear' in tasks and linear_options is not False:
            rows.append(_linear_row(model, data, common, linear_options or {}))
            log(f'{model} {rows[-1]["feature"]}: linear top-1 {rows[-1]["top1"]:.2f}')
    return rows


def _extract(name, forwards, source, reading, log):
    """({model: {feature: (n, d)}}, labels (n,)) of a labelled source."""

    def forward(images):
        return {model: f(images) for model, f in forwards.items()}

    features, labels = features_lib.extract(forward, source, **reading)
    log(f'{name}: features of {len(labels)} images')
    return features, labels


def _knn_rows(model, name, data, common, ks, temperature, mesh):
    """One row for each k."""
    train, train_y, test, test_y = data
    scores = knn.knn(
        train[name], train_y, test[name], test_y,
        num_classes=common['num_classes'], ks=ks, temperature=temperature, mesh=mesh,
    )  # fmt: skip
    protocol = dict(
        eval='knn',
        feature=FEATURES.get(name, name),
        similarity='cosine of L2-normalised features',
        weights='pixio',
        temperature=temperature,
        **common,
    )
    rows = []
    for k, score in scores.items():
        ks = dict(k=k) if k <= len(train_y) else dict(k=k, k_used=len(train_y))
        rows.append(class_row(model, 'knn', name, {**ks, **score}, {**protocol, **ks}))
    return rows


def _few_shot_rows(model, name, data, common, options, mesh):
    """One row for each number of labelled images."""
    train, train_y, test, test_y = data
    options = dict(temperature=knn.Options.temperature, seed=0) | options
    found = few_shot.few_shot(
        train[name], train_y, test[name], test_y,
        num_classes=common['num_classes'], mesh=mesh, **options,
    )  # fmt: skip
    protocol = dict(
        eval='few_shot',
        feature=FEATURES.get(name, name),
        similarity='cosine of L2-normalised features',
        weights='pixio',
        temperature=options['temperature'],
        seed=options['seed'],
        deviation='of the sample of tries',
        **common,
    )
    keys = ('shots', 'images', 'k', 'tries')
    return [
        class_row(model, 'few_shot', name, row, {**protocol, **{key: row[key] for key in keys}})
        for row in found
    ]


def _logreg_row(model, data, common, options, mesh, log):
    """Of DINOv2's feature, the class token, or the first that there is."""
    train, train_y, test, test_y = data
    name = 'cls' if 'cls' in train else next(iter(train))
    sweep, best, settings = logreg.probe(
        train[name], train_y, test[name], test_y,
        num_classes=common['num_classes'], mesh=mesh, log=log, **options,
    )  # fmt: skip
    protocol = dict(eval='logreg', feature=FEATURES.get(name, name)) | settings | common
    score = dict(top1=best['test_top1'], top5=best['test_top5'], best=best, sweep=sweep)
    return class_row(model, 'logreg', name, score, protocol)


def _monitors_row(model, name, features, common):
    values = {k: float(v) for k, v in monitors.monitors(features[:MONITORED]).items()}
    protocol = dict(eval='monitors', of=min(len(features), MONITORED), feature=name, **common)
    return class_row(model, 'monitors', name, values, protocol)


def _linear_row(model, data, common, options):
    train, train_y, test, test_y = data
    names = [name for name in train if not NOT_LINEAR.fullmatch(name)]
    sweep, best, settings = linear.probe(
        {name: train[name] for name in names},
        train_y,
        {name: test[name] for name in names},
        test_y,
        num_classes=common['num_classes'],
        **options,
    )
    features = {name: FEATURES.get(name, name) for name in names}
    protocol = dict(eval='linear', features=features) | settings | common
    score = dict(top1=best['test_top1'], top5=best['test_top5'], best=best, sweep=sweep)
    return class_row(model, 'linear', best['feature'], score, protocol)


def class_row(model, kind, feature, values, protocol):
    digest = hashing.text_id(json.dumps(protocol, sort_keys=True))
    row = dict(model=model, eval=kind, feature=feature, **values)
    return dict(row, protocol=protocol, protocol_id=digest)


def table(rows: list[dict]) -> str:
    """The rows as text, the protocol beside each number; monitors are listed below."""
    others = [row for row in rows if 'scores' in row]
    rows = [row for row in rows if 'scores' not in row]
    if others:
        return '\n\n'.join(([table(rows)] if rows else []) + [task_lib.table(others)])
    scored = [row for row in rows if row['eval'] != 'monitors']
    lines = [('model', 'eval', 'feature', 'top-1', 'top-5', 'id', 'protocol')]
    for row in scored:
        top = f'{row["top1"]:.2f}', f'{row["top5"]:.2f}'
        names = row['model'], row['eval'], row['feature']
        lines.append((*names, *top, row['protocol_id'], brief(row)))
    out = task_lib.aligned(lines, (3, 4))
    if scored:
        p = scored[0]['protocol']
        guess = 'by guessing'
        images = f'{p["test"]["images"]} test images'
        if 'train' in p:
            images = f'{p["train"]["images"]} training, {images} ({p["split"]})'
            guess = 'always the most frequent class'
        out += ['', f'{images}, {p["num_classes"]} classes; {guess}: {p["chance"]:.2f}.']
    for row in scored:
        if row['eval'] in ('linear', 'logreg') and row['best']['at_edge']:
            what = 'rate {lr:g}' if row['eval'] == 'linear' else 'C {c:g}'
            out.append(
                f'{row["model"]}: the best {what.format(**row["best"])} is at the edge of the '
                f'sweep; a wider one may do better.'
            )
    for row in rows:
        if row['eval'] == 'monitors':
            numbers = f'std {row["std"]:.3f}, RankMe {row["rankme"]:.1f} of {row["rankme_max"]:.0f}'
            out.append(f'{row["model"]} {row["feature"]}: {numbers}, cosine {row["cosine"]:.3f}')
            if warning := monitors.suspect({k: row[k] for k in monitors.NAMES}):
                out.append(f'  {warning}')
    return '\n'.join(out)


def brief(row):
    """The protocol of a row in one phrase."""
    p = row['protocol']
    kind = p['interpolation'].partition(',')[0]
    cut = '' if p['crop'] == 'centre' else f', {p["crop"]}'
    view = f'{p["resolution"]} px (resize {p["resize"]}, {kind}{cut})'
    if row['eval'] == 'classifier':
        return f'the head of the run, one crop, {view}'
    if row['eval'] == 'knn':  # 'dinov2' is in files of earlier versions
        weights = {'pixio': 'exp(s/T)', 'dinov2': 'softmax(s/T)'}[p['weights']]
        k = f'k={p["k"]}' + (f' (all {p["k_used"]})' if 'k_used' in p else '')
        return f'{k}, T={p["temperature"]:g}, cosine, {weights}, {view}'
    if row['eval'] == 'few_shot':
        return (
            f'{p["shots"]}: {p["images"]} labelled images, mean of {p["tries"]} tries, deviation '
            f'{row["top1_std"]:.2f}, kNN k={p["k"]}, T={p["temperature"]:g}, seed {p["seed"]}, '
            f'{view}'
        )
    if row['eval'] == 'logreg':
        return (
            f'C {row["best"]["c"]:.3g} of {len(p["cs"])} from {min(p["cs"]):g} to {max(p["cs"]):g} '
            f'(held-out train), then all fitted, L2, L-BFGS, seed {p["seed"]}, {view}'
        )
    sweep = f'{len(p["lrs"])} rates {min(p["lrs"]):g}..{max(p["lrs"]):g}'
    return (
        f'lr {row["best"]["lr"]:g} x {p["lr_scale"]:g} of {sweep} x {len(p["features"])} features '
        f'(held-out train), {p["optimizer"].split()[0]}, {p["epochs"]} epochs, '
        f'batch {p["batch_size"]}, BN, no augmentation, seed {p["seed"]}, {view}'
    )
