# SPDX-License-Identifier: Apache-2.0
"""One transform and one check of classes for all evaluations; unreadable images are counted."""

import json
import types

import jax
import ml_collections
import numpy as np
import PIL.Image
import pytest

import tiny
from ssl_jax import encoder, methods, train
from ssl_jax.data import folder as folder_lib
from ssl_jax.data import sources
from ssl_jax.data import stream as stream_lib
from ssl_jax.evals import accuracy, base, command, feature_file, features, knn, pictures, report
from ssl_jax.interop import export, processors
from ssl_jax.run import errors, metrics, weights
from ssl_jax.viz import show

SQUEEZED = dict(image_processor_type='ViTImageProcessor', size=32, resample=2)
NO_LINEAR = dict(ks=(3,), batch_size=8, linear_options=False)


def save_images(folder, n=24, classes='ab', rng=0):
    for i in range(n):
        (folder / classes[i % len(classes)]).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng([rng, i]).integers(0, 256, (40, 61, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / classes[i % len(classes)] / f'{i:02}.png')
    return folder


def loop(train_set, test_set, **fields):
    """A run of one step that is scored by kNN."""
    fields = dict(total_steps=1, warmup_steps=0, eval__every_steps=1, eval__tasks__knn={}) | fields
    sets = dict(data__eval_train=str(train_set), data__eval_test=str(test_set))
    return tiny.config(**fields, **sets)


@pytest.fixture(scope='module')
def squeezed(tmp_path_factory):
    """A folder of transformers whose processor squeezes, and its import."""
    root = tmp_path_factory.mktemp('squeezed')
    tiny.save(tiny.config(), root / 'run')
    folder = export.export(weights.open_run(root / 'run'), 'hf', root / 'hf')
    (folder / processors.FILE).write_text(json.dumps(SQUEEZED))
    # As the hub has it: without what an export of ours says of itself.
    weights.import_weights(folder, root / 'w', log=None)
    return folder, root / 'w'


@pytest.fixture
def seen(monkeypatch):
    """Transforms of all images that are read outside training."""
    seen, real = [], stream_lib.eval_stream

    def recorded(source, transform, *args, **kw):
        seen.append(transform)
        return real(source, transform, *args, **kw)

    monkeypatch.setattr(stream_lib, 'eval_stream', recorded)
    return seen


# One transform


@pytest.mark.slow
def test_eval_features_show_and_fine_tuning_see_what_the_folder_states(squeezed, tmp_path, seen):
    folder, workdir = squeezed
    want = processors.transform_of(0, SQUEEZED)
    assert (want['mode'], want['interpolation']) == ('squash', 'bilinear')
    data = str(save_images(tmp_path / 'data'))
    rows = command.evaluate_run(workdir, data=data, **NO_LINEAR)
    assert rows[0]['protocol']['interpolation'] == 'bilinear, antialiased (Pillow)'
    assert 'both sides 32' in rows[0]['protocol']['crop']
    assert '(resize 32, bilinear, both sides 32' in report.table(rows)
    for model in (folder, workdir):
        out = tmp_path / f'{model.name}.parquet'
        feature_file.extract(model, data, out, log=None)
    show.show(workdir, data, tmp_path / 'pictures', num=4)
    assert len(seen) == 6 and all(transform == want for transform in seen)

    seen.clear()
    c = tiny.base('classifier')
    c.method.update(num_classes=None, drop_path=0.0, randaugment_layers=0, erase_prob=0.0)
    c.data.eval_test, c.init_from = data, str(folder)
    c.data.train = ml_collections.ConfigDict(dict(path=data))
    c = tiny.changed(c, dict(total_steps=1, warmup_steps=0, eval__every_steps=1, batch_size=8))
    train.train(c, tmp_path / 'tuned')
    assert any('test/top1' in row for row in metrics.read(tmp_path / 'tuned'))
    tuned = weights.open_run(tmp_path / 'tuned')
    assert tuned.transform == want
    command.evaluate_run(tmp_path / 'tuned', test=data)
    assert len(seen) >= 2 and all(transform == want for transform in seen)
    again = export.export(tuned, 'official', tmp_path / 'out', what='full')
    fields = json.loads((again / processors.FILE).read_text())
    assert processors.transform_of(0, fields) == want


def test_a_crop_that_is_given_stands(squeezed):
    folder, _ = squeezed
    method = methods.make(tiny.changed(tiny.base('classifier'), dict(method__num_classes=2)))
    opened = weights.header(folder)
    found = method.follow(opened, {'crop_pct', 'interpolation'})
    assert 'crop_pct' not in found and 'interpolation' not in found
    assert (found['crop_mode'], found['library']) == ('squash', 'transformers')


def test_weights_without_a_transform_leave_the_crop_of_the_recipe(squeezed, tmp_path):
    folder, _ = squeezed
    bare = tmp_path / 'bare.safetensors'
    export.files.write(bare, export.files.read(folder).tensors)
    opened = weights.header(bare, num_heads=4)
    assert opened.transform['library'] == 'torchvision'
    method = methods.make(tiny.changed(tiny.base('classifier'), dict(method__num_classes=2)))
    assert not {'crop_pct', 'crop_mode', 'library'} & set(method.follow(opened, set()))


def test_the_loop_sees_what_eval_sees(tmp_path):
    config = tiny.config(eval__size=24)
    tiny.save(config, tmp_path)
    method = methods.make(config)
    look = base.Look.of(config, method, None, tmp_path, None, None)
    transform = look.reading(None)['transform']
    assert transform == weights.open_run(tmp_path).transform and transform['size'] == 24
    assert transform == encoder.load_model(tmp_path).transform


@pytest.mark.parametrize('size,near', [(30, 32), (-16, 8)])
def test_an_evaluation_size_that_is_no_multiple_ends_the_run_before_it_starts(size, near, tmp_path):
    c = tiny.config(eval__size=size)
    with pytest.raises(errors.UserError, match=f'eval.size={size} is not a mul.* 8: use {near}'):
        train.train(c, tmp_path)
    assert not any('loss' in row for row in metrics.read(tmp_path))


def test_eval_and_show_of_a_size_that_is_no_multiple_are_one_sentence(squeezed, tmp_path):
    folder, _ = squeezed
    fields = json.dumps(SQUEEZED | dict(size=30))
    (tmp_path / 'hf').mkdir()
    for file in folder.iterdir():
        (tmp_path / 'hf' / file.name).write_bytes(file.read_bytes())
    (tmp_path / 'hf' / processors.FILE).write_text(fields)
    weights.import_weights(tmp_path / 'hf', tmp_path / 'w', log=None)
    data = str(save_images(tmp_path / 'data'))
    with pytest.raises(errors.UserError, match='size=30 is not a multiple.*use 32'):
        command.evaluate_run(tmp_path / 'w', data=data, **NO_LINEAR)
    with pytest.raises(errors.UserError, match='size=30 is not a multiple.*use 32'):
        show.show(tmp_path / 'w', data, tmp_path / 'pictures')


# One check of classes


def labelled(classes, labels=(0, 1, 0, 1)):
    return sources.Arrays(np.zeros((4, 8, 8, 3), np.uint8), labels, classes)


@pytest.mark.parametrize('test', ['abd', '01', 'ab'])
def test_sets_of_other_classes_end_a_run_before_its_first_step(tmp_path, test):
    sets = [save_images(tmp_path / x, classes=x) for x in ('abc', test)]
    with pytest.raises(errors.UserError, match='name their classes differently'):
        train.train(loop(*sets), tmp_path / 'run')
    assert not any('loss' in row for row in metrics.read(tmp_path / 'run'))


def test_unlabelled_sets_end_a_run_before_its_first_step(tmp_path):
    flat = save_images(tmp_path / 'flat', classes='a') / 'a'
    both = save_images(tmp_path / 'both')
    for sets in ((flat, both), (both, flat)):
        with pytest.raises(errors.UserError, match='have no labels'):
            train.train(loop(*sets), tmp_path / 'run')


def test_numbered_classes_may_lack_the_last_but_not_for_a_head():
    three, two = labelled(('0', '1', '2')), labelled(('0', '1'))
    assert accuracy.check_classes(three.classes, two) == ('0', '1', '2')
    assert accuracy.check_classes(two.classes, three) == ('0', '1', '2')
    assert accuracy.check_classes(three.classes, two, outputs=True) == ('0', '1', '2')
    with pytest.raises(errors.UserError, match='differently'):
        accuracy.check_classes(two.classes, three, outputs=True)
    with pytest.raises(errors.UserError, match='the order'):
        accuracy.check_classes(('a', 'b'), labelled(('b', 'a')))


# Images that cannot be read


class Vanishing(folder_lib.Folder):
    """A folder one of whose files vanishes after it was listed, and one is forbidden."""

    def __getitem__(self, i):
        if i in (0, 5):
            kind = (FileNotFoundError, PermissionError)[i == 5]
            raise kind(2, 'gone' if i == 0 else 'Permission denied', self.describe(i))
        return super().__getitem__(i)


def test_images_that_cannot_be_read_are_left_out_and_said(squeezed, tmp_path, capsys):
    _, workdir = squeezed
    source = Vanishing(str(save_images(tmp_path / 'data')))
    forward = features.raw_pixels(8)
    got, labels = features.extract(forward, source, transform=8, batch_size=5)
    assert len(got['pixels']) == len(labels) == 22
    out = capsys.readouterr().out
    assert '2 of 24 images cannot be read' in out and 'gone' in out and 'Permission' in out

    assert feature_file.extract(workdir, source, tmp_path / 'f.parquet', log=None) == 22
    lines = [json.loads(x) for x in (tmp_path / 'f.parquet.bad.jsonl').read_text().splitlines()]
    assert [x['id'] for x in lines] == [0, 5] and 'gone' in lines[0]['reason']
    assert len(pictures.spread_images(source, 8, 8)) == 8
    rows = report.evaluate({'raw': forward}, source, source, transform=8, log=None, **NO_LINEAR)
    assert rows[0]['protocol']['test']['images'] == 22


def test_accuracy_counts_readable_images_alone(tmp_path, capsys):
    c = tiny.base('classifier')
    c.method.update(num_classes=2, classes=('a', 'b'))
    method = methods.make(tiny.changed(c, {}))
    params, extra = method.init(jax.random.key(0))
    source = Vanishing(str(save_images(tmp_path / 'data')))
    scores = accuracy.accuracy(
        method, params, extra, source, transform=method.transform(), batch_size=8
    )
    assert scores['test']['n'] == 22
    assert '2 of 24 images cannot be read' in capsys.readouterr().out


# k beyond the database


def test_rows_say_how_many_neighbours_there_were(tmp_path, capsys):
    source = sources.open_source(str(save_images(tmp_path / 'data')))
    options = dict(NO_LINEAR, ks=(3, 200))
    rows = report.evaluate(
        {'raw': features.raw_pixels(8)}, source, source, transform=8, log=None, **options
    )
    by_k = {row['k']: row for row in rows if row['eval'] == 'knn'}
    assert by_k[200]['k_used'] == by_k[200]['protocol']['k_used'] == 24
    assert 'k_used' not in by_k[3] and 'k_used' not in by_k[3]['protocol']
    assert 'k=200 (all 24), T=' in report.table(rows) and 'k=3, T=' in report.table(rows)

    data = tmp_path / 'data'
    look = types.SimpleNamespace(config=loop(data, data), method=methods.make(tiny.config()))
    look.train = look.test = source
    knn.check(knn.Options(), look)
    assert 'k=100, 200: all 24 training images vote' in capsys.readouterr().out
    assert knn.Options().ks[-2:] == (100, 200)
