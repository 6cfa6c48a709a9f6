# SPDX-License-Identifier: Apache-2.0
"""Evaluations of frozen encoders: settings, kept results, what the images must have, the table."""

import dataclasses
import types

import numpy as np
import pytest

from ssl_jax import encoder, sharding
from ssl_jax.data import scenes, sources
from ssl_jax.data import transform as transform_lib
from ssl_jax.evals import task
from ssl_jax.run import errors

TRANSFORM = {**transform_lib.of(16), 'mean': (0.5,) * 3, 'std': (0.25,) * 3}


@dataclasses.dataclass(frozen=True)
class Settings:
    k: int = 3


@pytest.fixture
def calls(monkeypatch):
    """Calls of a made-up evaluation 'count' that needs class maps."""
    found = []

    def evaluate(model, data, settings, work):
        found.append(settings.k)
        yield task.row('count', 'patch', {'n': len(data.train)}, dict(k=settings.k))

    module = types.SimpleNamespace(Settings=Settings, NEEDS='segmentation', evaluate=evaluate)
    monkeypatch.setattr(task, '_module', lambda name: module)
    return found


def work(tmp_path):
    return task.Work(mesh=sharding.make_mesh(), transform=TRANSFORM, folder=tmp_path)


def rows(tmp_path, source=None, **settings):
    data = task.Data(source or scenes.Scenes(4, 16))
    model = encoder.Pixels(4, TRANSFORM)
    return task.run('count', model, data, Settings(**settings), work(tmp_path))


def test_a_result_is_kept_for_the_same_settings_and_images(tmp_path, calls):
    first = rows(tmp_path)
    assert rows(tmp_path) == first and calls == [3]
    rows(tmp_path, k=4)
    rows(tmp_path, scenes.Scenes(6, 16))
    assert calls == [3, 4, 3]


def test_a_file_that_settings_name_stands_for_its_content(tmp_path, calls):
    @dataclasses.dataclass(frozen=True)
    class Named:
        k: int = 3
        truth: str = str(tmp_path / 'truth.json')

    data, model = task.Data(scenes.Scenes(4, 16)), encoder.Pixels(4, TRANSFORM)
    for text in ('{}', '{}', '[]'):
        (tmp_path / 'truth.json').write_text(text)
        task.run('count', model, data, Named(), work(tmp_path))
    assert len(calls) == 2
    folder = dataclasses.replace(Named(), truth=str(tmp_path))  # as `kitti` may be one
    assert task.run('count', model, data, folder, work(tmp_path))


def test_rows_of_other_protocols_have_other_ids(tmp_path, calls):
    ids = [rows(tmp_path, k=k)[0]['protocol_id'] for k in (1, 2, 1)]
    assert ids[0] == ids[2] != ids[1]


def test_images_without_maps_are_named(tmp_path, calls):
    images = np.zeros((2, 16, 16, 3), np.uint8)
    with pytest.raises(errors.UserError, match="'count' needs images with 'segmentation'.*array 0"):
        rows(tmp_path, sources.Arrays(images))
    assert not calls


def test_settings_are_typed_and_the_nearest_name_is_given(calls):
    assert task.settings('count', {'k': '7'}) == Settings(k=7)
    with pytest.raises(errors.UserError, match="'count.kk'.*k"):
        task.settings('count', {'kk': '7'})
    with pytest.raises(errors.UserError, match="'count.k' takes int, not 'two'"):
        task.settings('count', {'k': 'two'})


def test_the_table_has_a_column_per_metric_and_a_line_per_protocol():
    found = [
        dict(task.row('seg', 'patch', {'mIoU': 12.345, 'kappa': 0.5}, dict(k=3)), model='trained'),
        dict(task.row('seg', 'patch', {'mIoU': 9.0}, dict(k=3)), model='raw_pixels'),
        dict(task.row('depth', 'patch', {'RMSE (m)': 0.4567}, dict(steps=10)), model='trained'),
    ]
    lines = task.table(found).splitlines()
    assert lines[0].split() == ['model', 'eval', 'feature', 'mIoU', 'kappa', 'id']
    assert lines[2].split()[3:5] == ['12.35', '0.5'] and lines[3].split()[3] == '9'
    assert sum('k 3' in line for line in lines) == 1
    assert lines[6].split()[-3:] == ['RMSE', '(m)', 'id']
    assert '0.4567' in lines[8]


def test_raw_pixels_are_the_normalised_pixels_of_each_patch():
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    out = encoder.Pixels(4, TRANSFORM)(images, blocks=(1,))
    patch = (images[1, 4:8, 8:12] / 255.0 - 0.5) / 0.25
    assert np.allclose(out['patch_tokens'][1, 6], patch.reshape(-1), atol=1e-5)
    assert out['blocks'][1] is out['patch_tokens']


def test_evaluations_of_class_labels_have_settings_too():
    found = task.settings('few_shot', {'tries': '2', 'per_class': '(1,)'})
    assert (found.tries, found.per_class, found.k) == (2, (1,), 20)
    assert task.settings('logreg', {'cs': '(0.1,1)'}).cs == (0.1, 1)
    assert task.settings('linear', {'optimizer': 'lars'}).optimizer == 'lars'
    assert task.settings('knn', {'ks': '(5,)'}).ks == (5,)
    with pytest.raises(errors.UserError, match="few_shot.trys'.*did you mean 'tries'"):
        task.settings('few_shot', {'trys': '2'})
