# SPDX-License-Identifier: Apache-2.0
"""kNN and linear probe of several encoders side by side, every number with its protocol.

A number without its protocol cannot be compared: k, T, the features, the resolution and the sweep
each move it by points.  So every row carries all of it and a short `protocol_id`; two rows are
comparable where the ids are equal.
"""

import hashlib
import json
import re

import jax
import numpy as np
from etils import epath

from ssl_jax import sharding
from ssl_jax.augment import photometry
from ssl_jax.data import sources
from ssl_jax.evals import accuracy, knn, linear, monitors
from ssl_jax.evals import features as features_lib
from ssl_jax.run import runs

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


def evaluate(
    forwards,
    train_source,
    test_source=None,
    *,
    size,
    resize=None,
    batch_size=256,
    mesh=None,
    limit=None,
    ks=(10, 20, 100, 200),
    temperature=0.07,
    knn_protocol='pixio',
    linear_options=None,
    normalization='ImageNet mean and std',
    seed=0,
    should_stop=None,
    log=print,
):
    """Rows of kNN, linear probe and monitors for each forward; images are decoded once for all.

    Args:
      forwards: {model: forward}, e.g. trained, untrained and raw_pixels, see `features`.
      train_source, test_source: labelled; without the second a fifth of the first is the test set,
        chosen by a hash of the image's index.
      size, resize, batch_size, mesh, limit, should_stop: see `features.extract`; `limit` holds for
        each of the two sets.
      ks, temperature, knn_protocol: see `knn.knn`.
      linear_options: more arguments of `linear.probe`; False leaves the probe out.
      normalization: what the forwards do to the channels, for the protocol.
      seed: of the probe.
      log: called with each line of progress; None for silence.

    Returns:
      A list of dicts that JSON can hold: model, eval ('knn', 'linear' or 'monitors'), feature,
      top1 and top5 in percent (or the monitors), protocol, protocol_id; 'linear' also has the
      whole sweep and the choice made.
    """
    log = log or (lambda line: None)
    how = 'two given sets'
    if test_source is None:
        train_source, test_source = features_lib.split(train_source)
        how = 'one given set: a fifth, chosen by splitmix64 of the index, is the test set'
    num_classes = _num_classes(train_source, test_source)
    forward = features_lib.together(forwards)
    options = dict(size=size, resize=resize, batch_size=batch_size, mesh=mesh, limit=limit)
    data = []
    for name, source in (('train', train_source), ('test', test_source)):
        x, y = features_lib.extract(forward, source, should_stop=should_stop, **options)
        if y is None:
            raise ValueError(f'The {name} images have no labels; put them in one folder per class.')
        log(f'{name}: features of {len(y)} images')
        data.append((x, y))
    (train, train_y), (test, test_y) = data
    num_classes = num_classes or int(max(train_y.max(), test_y.max())) + 1
    common = dict(
        resolution=size,
        resize=resize or size,
        crop='centre',
        interpolation='bicubic, antialiased (Pillow)',
        normalization=normalization,
        split=how,
        train=dict(images=len(train_y), data=str(getattr(train_source, 'fingerprint', ''))),
        test=dict(images=len(test_y), data=str(getattr(test_source, 'fingerprint', ''))),
        num_classes=num_classes,
        chance=100.0 * float(np.bincount(test_y).max()) / len(test_y),
    )
    rows = []
    for model in forwards:
        mine = [k.split('/', 1)[1] for k in train if k.split('/', 1)[0] == model]
        for name in mine:
            if SIDE_BY_SIDE.fullmatch(name):
                continue
            x, z = train[f'{model}/{name}'], test[f'{model}/{name}']
            scores = knn.knn(
                x,
                train_y,
                z,
                test_y,
                ks=ks,
                temperature=temperature,
                num_classes=num_classes,
                protocol=knn_protocol,
                mesh=mesh,
            )
            how_knn = dict(
                feature=FEATURES.get(name, name),
                similarity='cosine of L2-normalised features',
                weights=knn_protocol,
                temperature=temperature,
            )
            for k, score in scores.items():
                protocol = dict(eval='knn', k=k, **how_knn, **common)
                rows.append(_row(model, 'knn', name, dict(k=k, **score), protocol))
            values = {k: float(v) for k, v in monitors.monitors(z[:MONITORED]).items()}
            protocol = dict(eval='monitors', of=min(len(z), MONITORED), feature=name, **common)
            rows.append(_row(model, 'monitors', name, values, protocol))
            top1 = ', '.join(f'{score["top1"]:.2f}' for score in scores.values())
            log(f'{model} {name}: kNN top-1 {top1}')
        if linear_options is False:
            continue
        kinds = [name for name in mine if not NOT_LINEAR.fullmatch(name)]
        probe = dict(num_classes=num_classes, seed=seed, **(linear_options or {}))
        sweep, best = linear.probe(
            {k: train[f'{model}/{k}'] for k in kinds},
            train_y,
            {k: test[f'{model}/{k}'] for k in kinds},
            test_y,
            **probe,
        )
        protocol = {
            'eval': 'linear',
            'features': {k: FEATURES.get(k, k) for k in kinds},
            **linear.protocol(len(train_y), **probe),
            **common,
        }
        score = dict(top1=best['test_top1'], top5=best['test_top5'], best=best, sweep=sweep)
        rows.append(_row(model, 'linear', best['feature'], score, protocol))
        log(f'{model} {best["feature"]}: linear top-1 {best["test_top1"]:.2f}')
    return rows


def _row(model, kind, feature, values, protocol):
    text = json.dumps(protocol, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    row = dict(model=model, eval=kind, feature=feature, **values)
    return dict(row, protocol=protocol, protocol_id=digest)


def _num_classes(train_source, test_source):
    """From the class names, which must be the same in both; None where there are none."""
    train, test = (getattr(s, 'classes', None) for s in (train_source, test_source))
    if train and test and tuple(train) != tuple(test):
        # Sets without names are numbered 0..max, so that one may just lack its last classes.
        shorter, longer = sorted((tuple(train), tuple(test)), key=len)
        if longer[: len(shorter)] != shorter or not all(c.isdigit() for c in longer):
            odd = sorted(set(train) ^ set(test)) or 'the order'
            raise ValueError(
                f'The two sets name their classes differently ({odd}); labels would not mean the '
                f'same, so give both sets the same class folders.'
            )
        return len(longer)
    return len(train or test or ()) or None


def table(rows):
    """The rows as text, the protocol beside each number; monitors are listed below."""
    lines = [('model', 'eval', 'feature', 'top-1', 'top-5', 'id', 'protocol')]
    for row in rows:
        if row['eval'] != 'monitors':
            top = f'{row["top1"]:.2f}', f'{row["top5"]:.2f}'
            what = row['model'], row['eval'], row['feature']
            lines.append((*what, *top, row['protocol_id'], brief(row)))
    widths = [max(map(len, column)) for column in zip(*lines)][:-1] + [8]
    out = []
    for i, line in enumerate(lines):
        cells = [
            c.rjust(w) if j in (3, 4) else c.ljust(w) for j, (c, w) in enumerate(zip(line, widths))
        ]
        out.append('  '.join(cells).rstrip())
        if not i:
            out.append('  '.join('-' * w for w in widths))
    scored = [row for row in rows if row['eval'] != 'monitors']
    if scored:
        p = scored[0]['protocol']
        how = 'by guessing'
        images = f'{p["test"]["images"]} test images'
        if 'train' in p:
            images = f'{p["train"]["images"]} training, {images} ({p["split"]})'
            how = 'always the most frequent class'
        out += ['', f'{images}, {p["num_classes"]} classes; {how}: {p["chance"]:.2f}.']
    for row in rows:
        if row['eval'] == 'linear' and row['best']['at_edge']:
            out.append(
                f'{row["model"]}: the best rate {row["best"]["lr"]:g} is at the edge of the sweep; '
                f'a wider one may do better.'
            )
    for row in rows:
        if row['eval'] == 'monitors':
            numbers = f'std {row["std"]:.3f}, RankMe {row["rankme"]:.1f} of {row["rankme_max"]:.0f}'
            out.append(f'{row["model"]} {row["feature"]}: {numbers}, cosine {row["cosine"]:.3f}')
            warning = monitors.suspect({k: row[k] for k in monitors.NAMES})
            if warning:
                out.append(f'  {warning}')
    return '\n'.join(out)


def brief(row):
    """The protocol of a row in one phrase."""
    p = row['protocol']
    view = f'{p["resolution"]} px (resize {p["resize"]}, bicubic)'
    if row['eval'] == 'classifier':
        return f'the head of the run, one crop, {view}'
    if row['eval'] == 'knn':
        weights = {'pixio': 'exp(s/T)', 'dinov2': 'softmax(s/T)'}[p['weights']]
        return f'k={p["k"]}, T={p["temperature"]:g}, cosine, {weights}, {view}'
    sweep = f'{len(p["lrs"])} rates {min(p["lrs"]):g}..{max(p["lrs"]):g}'
    return (
        f'lr {row["best"]["lr"]:g} x {p["lr_scale"]:g} of {sweep} x {len(p["features"])} features '
        f'(held-out train), {p["optimizer"].split()[0]}, {p["epochs"]} epochs, '
        f'batch {p["batch_size"]}, BN, no augmentation, seed {p["seed"]}, {view}'
    )


def write_json(rows, path):
    """Writes the rows as a JSON list; a reader sees the old file or the whole new one."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f'{path.name}.partial'
    partial.write_text(json.dumps(rows, indent=1) + '\n')
    partial.replace(path)


def evaluate_run(
    workdir, *, data=None, test=None, step=None, limit=None, out=None, last_blocks=0, **options
):
    """`ssl_jax eval`: the encoder of a run beside the same one untrained, and raw pixels.

    Args:
      workdir: of the run, or a checkpoint folder.
      data: labelled images, a path or spec of `sources.open_source`; default the run's
        `data.eval_train` and `data.eval_test`.
      test: labelled test images; default a fifth of `data`.
      step: which checkpoint; default the newest.
      limit: at most so many images of each set.
      out: the JSON file; default eval_<step>.json in `workdir`.
      last_blocks: see `features.make_forward`.
      options: further arguments of `evaluate`.

    A fine-tuned run is scored instead, on `test` or its own test images, see `score_classifier`.

    Returns:
      The rows.
    """
    workdir = epath.Path(workdir)
    run = runs.open_run(workdir, step)
    config, transform = run.config, run.transform
    if hasattr(run.method, 'logits'):
        if last_blocks or (data is not None and test is not None):
            raise ValueError(
                'This run is a classifier, which is scored and not probed: give the labelled '
                'images with --test alone.'
            )
        rows = score_classifier(run, test if test is not None else data, limit)
        return _report(rows, run, workdir, out)
    if data is None:
        data, test = config.data.eval_train, test or config.data.eval_test
        if data is None:
            raise ValueError(
                f'The run in {workdir} names no evaluation set; give labelled images with --data.'
            )
    train_source = sources.open_source(data)
    test_source = sources.open_source(test) if test is not None else None
    mesh = sharding.make_mesh(data=1, fsdp=-1)  # parameters split, so that large encoders fit
    # Not with the seed of the run: any fresh encoder, not the start of this one.
    encoders = {'trained': run.backbone(), 'untrained': run.untrained(config.seed + 1)}
    mean, std = transform['mean'], transform['std']
    forwards = {}
    for name, (vit, params) in encoders.items():
        params = jax.device_put(params, sharding.infer(params, mesh))
        forwards[name] = features_lib.make_forward(
            vit, params, mean=mean, std=std, last_blocks=last_blocks
        )
    forwards['raw_pixels'] = features_lib.raw_pixels()
    size = transform['size']
    if (tuple(mean), tuple(std)) != (photometry.MEAN, photometry.STD):
        options.setdefault('normalization', f'mean {mean}, std {std}')
    main = jax.process_index() == 0
    log = print if main else None
    if main:
        print(f'{config.name or config.method.name}, step {run.step}, {size} px')
        if train_source.classes:
            names = list(train_source.classes)
            print(f'{len(names)} classes: {", ".join(names[:10])}{", ..." * (len(names) > 10)}')
    rows = evaluate(
        forwards, train_source, test_source, size=size, mesh=mesh, limit=limit, log=log, **options
    )
    return _report(rows, run, workdir, out)


def score_classifier(run, test=None, limit=None, batch_size=256):
    """Rows of a fine-tuned run: its own head on test images, by default those of the run.

    'trained' are the weights of the checkpoint, 'ema' their average where the run keeps one.
    """
    test = run.config.data.eval_test if test is None else test
    if test is None:
        raise ValueError('This classifier names no test images; give labelled ones with --test.')
    source, method = sources.open_source(test), run.method
    mesh = sharding.make_mesh(data=1, fsdp=-1)
    params, extra = (jax.device_put(x, sharding.infer(x, mesh)) for x in (run.params, run.extra))
    found = accuracy.accuracy(
        method, params, extra, source, size=run.transform['size'], mesh=mesh, limit=limit,
        batch_size=batch_size,
    )  # fmt: skip
    t = run.transform
    protocol = dict(
        eval='classifier',
        resolution=t['size'],
        resize=round(t['size'] / t['crop']),
        crop='centre',
        interpolation='bicubic, antialiased (Pillow)',
        normalization=f'mean {tuple(t["mean"])}, std {tuple(t["std"])}',
        test=dict(images=found['test']['n'], data=str(getattr(source, 'fingerprint', ''))),
        num_classes=method.num_classes,
        chance=100.0 / method.num_classes,
    )
    names = {'test': 'trained', 'ema': 'ema'}
    return [
        _row(names[name], 'classifier', method.pool, scores, protocol)
        for name, scores in found.items()
    ]


def _report(rows, run, workdir, out):
    """The rows with the run's name, written and printed by process 0."""
    rows = [dict(row, run=str(workdir), step=run.step) for row in rows]
    if jax.process_index() == 0:
        out = epath.Path(out) if out else workdir / f'eval_{run.step}.json'
        write_json(rows, out)
        print(f'\n{table(rows)}\n\nwritten to {out}')
    return rows
