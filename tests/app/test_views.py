# SPDX-License-Identifier: Apache-2.0
"""What the page shows, without the page: of runs, exports and encoders of all kinds."""

import numpy as np
import PIL.Image
import pytest

import tiny
from ssl_jax import cli, encoder
from ssl_jax.app import page, views
from ssl_jax.data import scenes
from ssl_jax.run import errors, weights


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    root, source = tmp_path_factory.mktemp('images'), scenes.Scenes(12, 32)
    for i in range(12):
        PIL.Image.fromarray(source[i]['image']).save(root / f'{i:02}.png')
    return root


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('run') / 'w'
    tiny.save(tiny.config(method__norm_pix_loss=False), workdir)
    return workdir


@pytest.fixture(scope='module')
def look(run, folder):
    return views.look(run, folder)


HALF = np.arange(16).reshape(4, 4) % 2 == 0


def test_an_export_with_its_decoder_reconstructs_as_its_run(run, look, folder, tmp_path):
    out = str(tmp_path / 'hf')
    words = ['--to', 'hf', '--what', 'full', '--out', out]
    cli.main(['export', '--workdir', str(run), *words])
    other = views.look(out, folder)
    for i in (0, 7):
        mine, theirs = (views.reconstruct(x, views.picture(x, i), HALF) for x in (look, other))
        assert mine.keys() == theirs.keys() and 'means' not in mine  # of plain pixels
        for name in mine:
            np.testing.assert_allclose(mine[name], theirs[name].astype(int), atol=1)


@pytest.mark.parametrize('to', ['hf', 'timm', 'official'])
def test_an_encoder_alone_has_views_of_features_and_no_reconstruction(
    run, look, folder, tmp_path, to
):
    cli.main(['export', '--workdir', str(run), '--to', to, '--out', str(tmp_path / to)])
    other = views.look(tmp_path / to, folder)
    assert other.trained is None and not other.heads
    got = views.nearest(other, views.picture(other, 3), 5)
    want = views.nearest(look, views.picture(look, 3), 5)
    assert [i for i, _ in got] == [i for i, _ in want]


def test_an_encoder_with_registers_that_was_not_trained_on_pixels(folder, tmp_path):
    tiny.save(tiny.dinov2(), tmp_path)
    found = views.look(tmp_path, folder)
    assert found.trained is None
    shown = views.picture(found, 2)
    maps = views.attention(found, shown)
    assert maps.shape == (4, 4, 4) and (maps >= 0).all() and maps.sum(axis=(1, 2)).max() < 1
    here = views.similar(found, shown, 3, 0)[0][2]
    assert np.unravel_index(here.argmax(), (4, 4)) == (3, 0)
    assert here.max() == pytest.approx(1, abs=1e-5)


def test_several_class_tokens_attend_together(folder, tmp_path):
    tiny.save(tiny.config(method__num_cls_tokens=4), tmp_path)
    model = encoder.load_model(tmp_path)
    images = np.stack([scenes.Scenes(2, 32)[i]['image'] for i in range(2)])
    assert encoder.attention(model, images).shape == (2, 4, 4, 4)


def test_tokens_have_no_mean_per_position_over_the_images_it_is_taken_of(look):
    images = np.stack([views.picture(look, i).image for i in range(12)])
    for block in look.blocks:
        found = views.tokens(look, images, block)
        assert np.abs(found.mean(axis=0)).max() < 1e-5 < found.std()
    assert look.blocks == ['after the final norm', 'block 2 of 2', 'block 1 of 2']


def test_blocks_are_named_as_they_are_counted(look):
    images = views.picture(look, 0).image[None]
    first = np.asarray(look.model(images, blocks=(0,))['blocks'][0])[:, 1:]
    np.testing.assert_allclose(views._tokens(look, images, 'block 1 of 2'), first)
    with pytest.raises(errors.UserError, match='block 3'):
        views.tokens(look, images, 'block 3 of 2')


@pytest.mark.parametrize('index', [-1, 12, 1e9, float('nan'), None, '0', '../../etc/passwd', [0]])
def test_an_image_is_named_by_its_number_alone(look, index):
    with pytest.raises(errors.UserError, match='There is no image .*0 to 11'):
        views.picture(look, index)


def test_few_images_are_searched_where_told_so_and_none_is_its_own_neighbour(run, folder):
    few = views.look(run, folder, limit=5)
    assert len(few.ids) == 5 and len(few.source) == 12
    for i in range(12):
        near = views.nearest(few, views.picture(few, i), 99)
        assert {j for j, _ in near} == set(few.ids.tolist()) - {i}
        assert sorted((c for _, c in near), reverse=True) == [c for _, c in near]


def test_an_upload_is_near_to_the_same_image_of_the_folder(look, folder):
    shown = views.upload(look, (folder / '04.png').read_bytes(), 'mine')
    index, cosine = views.nearest(look, shown, 1)[0]
    assert index == 4 and cosine == pytest.approx(1, abs=1e-5)


def test_a_patch_is_hidden_if_a_quarter_of_it_is_painted():
    alpha = np.zeros((40, 40), np.uint8)
    alpha[:5, :5] = 255  # 25 of 100 pixels
    alpha[10:14, 10:16] = 1  # 24
    alpha[25:, 30:] = 9
    want = np.zeros((4, 4), bool)
    want[0, 0] = want[2, 3] = want[3, 3] = True
    np.testing.assert_array_equal(views.painted(alpha, (4, 4)), want)
    uneven = views.painted(np.ones((37, 41)), (4, 3))
    assert uneven.shape == (4, 3) and uneven.all()
    with pytest.raises(errors.UserError, match='fewer pixels'):
        views.painted(np.ones((2, 2)), (4, 4))


@pytest.mark.parametrize('value', [False, True])
def test_all_or_nothing_hidden_is_a_sentence(look, value):
    with pytest.raises(errors.UserError, match='every patch' if value else 'no patch'):
        views.reconstruct(look, views.picture(look, 0), np.full((4, 4), value))


def test_the_command_serves_this_machine_alone_unless_told_otherwise(monkeypatch):
    called = []
    monkeypatch.setattr(page, 'explore', lambda *args: called.append(args))
    words = ['explore', '--model', 'm', '--data', 'd']
    cli.main(words)
    cli.main([*words, '--host', '0.0.0.0', '--port', '80', '--limit', '9'])
    assert called == [('m', 'd', '127.0.0.1', 7860, 2000), ('m', 'd', '0.0.0.0', 80, 9)]


def test_a_file_of_weights_holds_all_of_a_method_only_with_its_decoder(run, tmp_path):
    assert weights.whole(weights.open_weights(run))[0].decoder_depth == 1
    cli.main(['export', '--workdir', str(run), '--to', 'hf', '--out', str(tmp_path / 'hf')])
    assert weights.whole(weights.open_weights(tmp_path / 'hf')) is None
