# SPDX-License-Identifier: Apache-2.0
"""`ssl_jax show` draws what heads predict, where heads were trained."""

import numpy as np
import PIL.Image
import pytest
from etils import epath

import tiny
from ssl_jax import encoder, sharding
from ssl_jax.app import views
from ssl_jax.data import scenes
from ssl_jax.evals import depth, heads, seg_head, task
from ssl_jax.viz import draw
from ssl_jax.viz import show as show_lib


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run with a head for classes and one for depth, each trained for two steps."""
    workdir = tmp_path_factory.mktemp('run')
    tiny.save(tiny.config(), workdir)
    model, source = encoder.load_model(workdir), scenes.Scenes(8, 32)
    work = task.Work(
        sharding.make_mesh(),
        model.transform,
        epath.Path(workdir) / 'evals' / '0' / 'trained',
        8,
        log=lambda *lines: None,
    )
    for module in (seg_head, depth):
        options = dict(steps=2, batch_size=8)
        if module is depth:
            options['dataset'] = 'scenes'
        settings = module.Settings(**options)
        list(module.evaluate(model, task.Data(source, source), settings, work))
    return workdir


def test_predictions_are_drawn_beside_the_truth(run, tmp_path):
    paths = {path.name.split('-')[0]: path for path in show_lib.show(run, out=tmp_path)}
    sheet = np.asarray(PIL.Image.open(paths['seg_head']).convert('RGB'))
    x, y = draw.MARGIN + 128 + draw.GAP, draw.MARGIN + draw.HEADER
    truth = sheet[y : y + 128 : 4, x : x + 128 : 4]
    want = draw.class_colours(11)[scenes.Scenes(8, 32)[0]['segmentation']]
    np.testing.assert_array_equal(truth, want)
    assert PIL.Image.open(paths['depth']).size[0] == PIL.Image.open(paths['seg_head']).size[0]


def test_the_page_has_these_heads_and_they_predict_what_was_kept(run, tmp_path):
    source = scenes.Scenes(8, 32)
    for i in range(8):
        PIL.Image.fromarray(source[i]['image']).save(tmp_path / f'{i}.png')
    look = views.look(run, tmp_path)
    assert [head.name.split('-')[0] for head in look.heads] == ['depth', 'seg_head']
    for head, folder in zip(look.heads, heads.find(run / 'evals' / '0' / 'trained'), strict=True):
        with np.load(folder / 'predictions.npz') as kept:
            np.testing.assert_allclose(
                head.predict(kept['image_0']), kept['prediction_0'], rtol=1e-4
            )
    assert look.heads[1].classes == ('background', *scenes.CLASSES)
    drawn = dict(views.predictions(look, views.picture(look, 0)))
    assert len(drawn) == 2 and all(x.shape[0] > 128 for x in drawn.values())


def test_importance_is_drawn_eight_images_a_picture_beside_attention(run, tmp_path, monkeypatch):
    monkeypatch.setattr(show_lib, 'EXPLAINED', 2)
    images = np.stack([scenes.Scenes(8, 32)[i]['image'] for i in range(3)])
    paths = show_lib.explanations(encoder.load_model(run), images, tmp_path, 10)
    assert [path.name for path in paths] == ['importance_0.png', 'importance_1.png']
    width, height = PIL.Image.open(paths[0]).size
    assert width == 2 * draw.MARGIN + 5 * 128 + 4 * draw.GAP  # with attention
    assert height > PIL.Image.open(paths[1]).size[1] + 128
