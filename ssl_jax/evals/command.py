# SPDX-License-Identifier: Apache-2.0
"""`ssl_jax eval`: the evaluations of a run's encoder, beside an untrained one and raw pixels."""

import dataclasses
import json

import jax
from etils import epath

from ssl_jax import encoder, sharding
from ssl_jax.augment import photometry
from ssl_jax.data import fingerprint, sources
from ssl_jax.data import transform as transform_lib
from ssl_jax.evals import accuracy, report
from ssl_jax.evals import features as features_lib
from ssl_jax.evals import task as task_lib
from ssl_jax.run import errors, hashing, launch, storage, weights


def evaluate_run(
    workdir,
    *,
    data=None,
    test=None,
    step: int | None = None,
    limit: int | None = None,
    out=None,
    last_blocks: int = 0,
    size: int | None = None,
    tasks: tuple | None = None,
    words: tuple = (),
    **options,
) -> list[dict]:
    """`ssl_jax eval`: the encoder of a run beside the same one untrained, and raw pixels.

    Without `tasks` a fine-tuned run is scored instead, on `test`, `data` or its `data.eval_test`.

    Args:
      workdir: of the run, or a checkpoint folder.
      data: labelled images, a path or spec of `sources.open_source`; default the run's
        `data.eval_train` and `data.eval_test`.
      test: labelled test images; default a fifth of `data`.
      step: of the checkpoint; default the newest.
      limit: number of images of each set at most.
      out: the JSON file; default eval_<step>.json in `workdir`.
      last_blocks: see `encoder.make_forward`.
      size: of the images in pixels; default that of the run.
      tasks: names of `task.names()`, 'knn' or 'linear'; default those that the images allow.
      words: TASK.FIELD=VALUE, see `task.settings`; data.FIELD=VALUE, of both sets, see
        `sources.open_source`.
      options: further arguments of `evaluate`.

    Returns:
      The rows, see `evaluate` and `task.row`.
    """
    workdir = epath.Path(workdir)
    run = weights.open_run(workdir, step)
    if run.method is not None and run.method.classes and not tasks:
        if last_blocks or words or size or (data is not None and test is not None):
            raise errors.UserError(
                'This run is a classifier, which is scored and not probed: give the labelled '
                'images with --test alone.'
            )
        rows = _score_classifier(run, data if test is None else test, limit)
        return _report(rows, run, workdir, out)
    if tasks is not None:
        tasks = _known(tasks)
    settings, of_data = _settings(tasks or (), words)
    train, test_source = _opened(run, workdir, data, test, tasks, of_data)
    if not tasks:
        tasks = _tasks_for(train)
        settings, _ = _settings(tasks, ())
    transform = {**run.transform, 'size': size or run.transform['size']}
    features_lib.check_size(transform['size'], run.vit.patch_size, 'size')
    mesh = sharding.make_mesh(data=1, fsdp=-1)  # parameters split, so that large encoders fit
    encoders = _encoders(run, transform, mesh)
    name = run.config.name or run.config.method.name
    launch.log(f'{name}, step {run.step}, {transform_lib.describe(transform)}')
    if names := train.classes:
        launch.log(f'{len(names)} classes: {", ".join(names[:10])}{", ..." * (len(names) > 10)}')
    rows = []
    if pooled := [name for name in tasks if name in report.POOLED]:
        for name in pooled:
            values = dataclasses.asdict(settings[name])
            options = (values if name == 'knn' else {f'{name}_options': values}) | options
        options = dict(options, transform=transform, mesh=mesh, limit=limit, tasks=tuple(pooled))
        rows += _pooled(encoders, train, test_source, last_blocks, options)
    of, folder = task_lib.Data(train, test_source), workdir / 'evals' / str(run.step)
    if len(pooled) < len(tasks):
        _check_weights(folder, run.meta)
    for name in (name for name in tasks if name not in report.POOLED):
        for model_name, model in encoders.items():
            launch.log(f'{name}: {model_name}')
            work = task_lib.Work(
                mesh=mesh, transform=transform, folder=folder / model_name, limit=limit
            )
            found = task_lib.run(name, model, of, settings[name], work)
            rows += [dict(row, model=model_name) for row in found]
    return _report(rows, run, workdir, out)


def _check_weights(folder, meta):
    """Raises if `folder` has evaluations of other weights: a run that was begun anew."""
    digest = hashing.text_id(json.dumps(meta.get('tensors'), sort_keys=True))
    path = folder / 'weights.txt'
    if launch.main_number(int(storage.exists(path))):
        if storage.read(path).decode().strip() != digest:
            raise errors.UserError(
                f'{folder} holds evaluations of other weights than this checkpoint: delete it, or '
                f'move it away.'
            )
    elif launch.is_main():
        storage.atomic_write(path, digest + '\n')


def _known(tasks):
    """The names of evaluations, checked."""
    known = sorted([*report.POOLED, *task_lib.names()])
    for name in tasks:
        if name not in known:
            raise errors.UserError(f"There is no evaluation '{name}'{errors.nearest(name, known)}")
    return tuple(dict.fromkeys(tasks))


def _tasks_for(source):
    """What the images allow without training a head: class labels, class maps, or neither."""
    if source.classes:
        return 'knn', 'linear'
    return ('seg',) if 'segmentation' in source[0] else ('pck',)


def _settings(tasks, words):
    """({task: its settings}, {field of the data: text}) from words NAME.FIELD=VALUE."""
    given = {name: {} for name in tasks}
    of_data = {}
    for word in words:
        name, equals, text = word.partition('=')
        task, dot, field = name.partition('.')
        if not (equals and dot):
            raise errors.UserError(f"'{word}' is not NAME.FIELD=VALUE, such as depth.steps=500.")
        if task != 'data' and task not in given:
            near = errors.close(task, given)
            hint = f': did you mean {near[0]}?' if near else ': add it to --tasks.'
            raise errors.UserError(f"'{word}' sets {task!r}, which is no evaluation to run{hint}")
        (of_data if task == 'data' else given[task])[field] = text
    return {name: task_lib.settings(name, found) for name, found in given.items()}, of_data


def _opened(run, workdir, data, test, tasks, words):
    """The images to learn from, and those to be scored on or None."""
    if data is None:
        data = run.config.data.eval_train
        test = test or run.config.data.eval_test
    if data is None and tasks and run.method is not None:
        data = run.config.data.train  # the evaluations say what they need
    if data is None:
        raise errors.UserError(
            f'The run in {workdir} names no evaluation set; give labelled images with --data.'
        )
    train, test_source = sources.open_source(sources.with_words(data, words)), None
    launch.log(*sources.lines(train))
    if test is not None:
        test = sources.with_words(test, words)
        test_source = sources.in_classes(sources.open_source(test, 'test'), train.classes)
        launch.log(*sources.lines(test_source))
    return train, test_source


def _encoders(run, transform, mesh):
    """{name: model}: the encoder of the run, a fresh one of the same kind, and raw pixels."""
    # Not with the seed of the run: any fresh encoder, not the start of this one.
    found = {'trained': run.networks()['encoder'], 'untrained': run.untrained(run.config.seed + 1)}
    models = {
        name: encoder.Model(
            vit, jax.device_put(params, sharding.infer(params, mesh)), transform, name
        )
        for name, (vit, params) in found.items()
    }
    return {**models, 'raw_pixels': encoder.Pixels(run.vit.patch_size, transform)}


def _pooled(encoders, train, test, last_blocks, options):
    """Rows of the evaluations of class labels, see `report.evaluate`."""
    mean, std = (options['transform'][name] for name in ('mean', 'std'))
    if (tuple(mean), tuple(std)) != (photometry.MEAN, photometry.STD):
        options.setdefault('normalization', f'mean {mean}, std {std}')
    forwards = {
        name: encoder.make_forward(
            model.vit, model.params, mean=mean, std=std, last_blocks=last_blocks
        )
        for name, model in encoders.items()
        if isinstance(model, encoder.Model)
    }
    forwards['raw_pixels'] = features_lib.raw_pixels()
    return report.evaluate(forwards, train, test, **options)


def _score_classifier(run, test, limit):
    """Rows of a fine-tuned run, on `test` or its own test images.

    'trained' are the weights of the checkpoint, 'ema' their average if the run keeps one.
    """
    test = run.config.data.eval_test if test is None else test
    if test is None:
        raise errors.UserError(
            'This classifier names no test images; give labelled ones with --test.'
        )
    method, view = run.method, run.transform
    source = sources.in_classes(sources.open_source(test, 'test'), method.classes)
    launch.log(*sources.lines(source))
    mesh = sharding.make_mesh(data=1, fsdp=-1)
    params, extra = (jax.device_put(x, sharding.infer(x, mesh)) for x in (run.params, run.extra))
    scores = accuracy.accuracy(
        method, params, extra, source, transform=view, mesh=mesh, limit=limit
    )
    protocol = dict(
        eval='classifier',
        **transform_lib.protocol(view),
        normalization=f'mean {tuple(view["mean"])}, std {tuple(view["std"])}',
        test=dict(images=scores['test']['n'], data=fingerprint.content(source.fingerprint)),
        num_classes=method.num_classes,
        chance=100.0 / method.num_classes,
    )
    names = {'test': 'trained', 'ema': 'ema'}
    return [
        report.class_row(names[name], 'classifier', method.pool, values, protocol)
        for name, values in scores.items()
    ]


def _report(rows, run, workdir, out):
    """The rows with the run's name, printed, and written beside those of other evaluations."""
    rows = [dict(row, run=str(workdir), step=run.step) for row in rows]
    if launch.is_main():
        out = epath.Path(out) if out else workdir / f'eval_{run.step}.json'
        earlier = json.loads(storage.read(out)) if storage.exists(out) else []
        kinds = {row['eval'] for row in rows}
        earlier = [row for row in earlier if row['eval'] not in kinds]
        storage.atomic_write(out, json.dumps(earlier + rows, indent=1) + '\n')
        launch.show(f'\n{report.table(rows)}\n\nwritten to {out}')
    return rows
