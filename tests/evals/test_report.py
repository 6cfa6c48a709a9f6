# SPDX-License-Identifier: Apache-2.0
import json

import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from ssl_jax.data import sources
from ssl_jax.evals import command, features, report

OPTIONS = dict(
    transform=8, ks=(1, 5), linear_options=dict(epochs=3, batch_size=32, lrs=(0.1, 1.0)), log=None
)


def colours(n=150, seed=0):
    """Images whose class is their main colour channel."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    images = rng.integers(0, 120, (n, 8, 8, 3))
    images[np.arange(n), :, :, labels] += 100
    return sources.Arrays(images.astype(np.uint8), labels, classes=('red', 'green', 'blue'))


def mean_colour(images):
    x = images.astype(jnp.float32).mean(axis=(1, 2))
    return {'patch': x, 'cls': x[:, ::-1]}


def noise(images):
    return {'patch': images.astype(jnp.float32)[:, 0, 0] % 7}


@pytest.fixture(scope='module')
def rows():
    forwards = {'good': mean_colour, 'noise': noise, 'raw_pixels': features.raw_pixels(4)}
    return report.evaluate(forwards, colours(), colours(60, seed=1), **OPTIONS)


def scores(rows, kind):
    return {(r['model'], r['feature'], r.get('k')): r['top1'] for r in rows if r['eval'] == kind}


def test_every_model_gets_knn_linear_and_monitors(rows):
    for model in ('good', 'noise', 'raw_pixels'):
        assert {r['eval'] for r in rows if r['model'] == model} == {'knn', 'linear', 'monitors'}


def test_informative_features_beat_uninformative_ones(rows):
    top1 = {(r['model'], r['eval']): r['top1'] for r in rows if r['eval'] != 'monitors'}
    for kind in ('knn', 'linear'):
        assert top1['good', kind] > 95
        assert top1['noise', kind] < 60


def test_every_row_carries_its_protocol(rows):
    for row in rows:
        p = row['protocol']
        assert (p['resolution'], p['resize'], p['num_classes']) == (8, 8, 3)
        assert p['train']['images'] == 150 and p['test']['images'] == 60
        assert 'bicubic' in p['interpolation'] and 'ImageNet' in p['normalization']
    knn = [r['protocol'] for r in rows if r['eval'] == 'knn']
    assert {p['k'] for p in knn} == {1, 5} and all(p['temperature'] == 0.07 for p in knn)
    linear = [r['protocol'] for r in rows if r['eval'] == 'linear']
    assert all(p['lrs'] == [0.1, 1.0] and p['seed'] == 0 for p in linear)
    assert all('15 held-out training images' in p['selection'] for p in linear)


def test_protocol_ids_are_equal_exactly_for_comparable_rows(rows):
    ids = {}
    for r in rows:
        if (r['eval'], r['feature']) == ('knn', 'patch'):
            ids.setdefault(r['k'], {})[r['model']] = r['protocol_id']
    ones, fives = set(ids[1].values()), set(ids[5].values())
    assert len(ones) == len(fives) == 1 and ones != fives


def test_table_prints_every_score_beside_its_protocol(rows):
    text = report.table(rows)
    for row in rows:
        if row['eval'] == 'monitors':
            continue
        line = [li for li in text.splitlines() if row['protocol_id'] in li and row['model'] in li]
        assert len(line) == 1
        assert f'{row["top1"]:.2f}' in line[0] and '8 px' in line[0]
        assert (f'k={row["k"]}, T=0.07' if row['eval'] == 'knn' else 'lr ') in line[0]
    assert '150 training, 60 test images' in text


def test_one_labelled_set_is_split_by_a_stated_rule():
    rows = report.evaluate({'good': mean_colour}, colours(), **OPTIONS)
    p = rows[0]['protocol']
    assert (p['train']['images'], p['test']['images']) == (120, 30)
    assert 'splitmix64' in p['split']


def test_probe_can_be_left_out():
    options = dict(OPTIONS, linear_options=False)
    assert not scores(report.evaluate({'good': mean_colour}, colours(), **options), 'linear')


def test_sets_with_different_class_names_are_refused():
    other = sources.Arrays(np.zeros((4, 8, 8, 3), np.uint8), [0, 1, 2, 0], ('green', 'red', 'blue'))
    with pytest.raises(ValueError, match='classes differently'):
        report.evaluate({'good': mean_colour}, colours(), other, **OPTIONS)


def test_unlabelled_images_are_refused():
    source = sources.Arrays(np.zeros((8, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match='no labels'):
        report.evaluate({'good': mean_colour}, source, **OPTIONS)


def test_a_run_is_evaluated_beside_an_untrained_twin_and_raw_pixels(tmp_path, capsys):
    tiny.save(tiny.config(), tmp_path, step=7)
    data = dict(source='scenes', n=60, size=32)
    rows = command.evaluate_run(tmp_path, data=data, ks=(5,), batch_size=8, linear_options=False)
    assert {r['model'] for r in rows} == {'trained', 'untrained', 'raw_pixels'}
    assert json.loads((tmp_path / 'eval_7.json').read_text()) == rows
    # The twin has other weights, so the features differ.
    values = {r['model']: r['rankme'] for r in rows if r.get('feature') == 'cls' and 'rankme' in r}
    assert values['trained'] != values['untrained']
    assert 'disc' in capsys.readouterr().out  # class names are shown


def test_a_run_without_an_evaluation_set_asks_for_one(tmp_path):
    tiny.save(tiny.config(), tmp_path)
    with pytest.raises(ValueError, match='--data'):
        command.evaluate_run(tmp_path)
