# SPDX-License-Identifier: Apache-2.0
"""Scores are the method's loss of each image; the file continues after a kill, and samples."""

import json

import cv2
import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

import tiny
from ssl_jax import cli, methods
from ssl_jax.augment import photometry
from ssl_jax.data import host, order, scenes, sources
from ssl_jax.data import transform as transform_lib
from ssl_jax.evals import feature_file
from ssl_jax.objectives import losses, masking
from ssl_jax.prepare import score as score_lib
from ssl_jax.run import weights

FLAT, NOISE, BAD = 3, 4, 7


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """22 PNGs of scenes, one of one colour, one of noise; file 7 is no image."""
    root = tmp_path_factory.mktemp('images')
    source = scenes.Scenes(22, 40)
    for i in range(22):
        image = source[i]['image']
        if i == FLAT:
            image = np.full((50, 70, 3), 90, np.uint8)
        if i == NOISE:
            image = np.random.default_rng(0).integers(0, 256, (80, 60, 3), dtype=np.uint8)
        cv2.imwrite(str(root / f'{i:02}.png'), image[..., ::-1])
    (root / f'{BAD:02}.png').write_text('<html>404</html>')
    return root


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The workdir of an untrained MAE with blocks of masked patches."""
    workdir = tmp_path_factory.mktemp('run')
    tiny.save(tiny.config(method__mask_grid=2), workdir)
    return workdir


@pytest.fixture(scope='module')
def scored(run, folder, tmp_path_factory):
    """(file, its table as columns, lines of the log) of an unbroken run."""
    out, lines = tmp_path_factory.mktemp('scores') / 's.parquet', []
    assert score_lib.score(run, str(folder), out, masks=3, batch_size=8, log=lines.append) == 21
    return out, pq.read_table(out).to_pydict(), lines


def test_each_loss_is_that_of_training_on_this_image_with_its_own_masks(run, folder, scored):
    opened = weights.open_run(run)
    method, source = opened.method, sources.open_source(str(folder))
    row = {i: k for k, i in enumerate(scored[1]['id'])}

    @jax.jit
    def reference(image, key):
        image = photometry.normalize(image[None])
        mask = masking.random_masking(key[None], method.grid, method.mask_ratio, method.mask_grid)
        pred = method.forward(opened.params, image, mask)['pred']
        return losses.masked_mse(pred, method.target(image), mask.mask)

    for i in (0, NOISE, 21):
        transform = {**opened.transform, 'size': method.img_size}
        image = transform_lib.cut(host.decode(source[i]['image']), transform)
        own = jax.random.fold_in(jax.random.key(0), i)
        want = np.mean([reference(image, jax.random.fold_in(own, k)) for k in range(3)])
        np.testing.assert_allclose(scored[1]['loss'][row[i]], want, rtol=2e-5)
    # The loss of a batch is the mean over its images.
    images = jax.random.normal(jax.random.key(1), (5, method.img_size, method.img_size, 3))
    one_mask = jax.jit(lambda x: score_lib.image_losses(method, opened.params, x, np.arange(5), 1))
    found = one_mask(images)
    keys = [jax.random.fold_in(jax.random.fold_in(jax.random.key(0), i), 0) for i in range(5)]
    mask = masking.random_masking(
        jax.numpy.stack(keys), method.grid, method.mask_ratio, method.mask_grid
    )
    pred = jax.jit(method.forward)(opened.params, images, mask)['pred']
    whole = losses.masked_mse(pred, method.target(images), mask.mask)
    np.testing.assert_allclose(found.mean(), whole, rtol=1e-5)


def test_a_row_has_size_and_entropy_and_what_does_not_decode_has_none(folder, scored):
    out, found, lines = scored
    assert found['id'] == [i for i in range(22) if i != BAD]
    assert found['name'][:2] == ['00.png', '01.png']
    rows = {i: k for k, i in enumerate(found['id'])}
    assert [found[key][rows[FLAT]] for key in ('height', 'width', 'entropy')] == [50, 70, 0]
    assert 7.9 < found['entropy'][rows[NOISE]] < 8
    half = np.zeros((4, 4, 3), np.uint8)
    half[:2] = 255, 9, 0  # one bit in red and in green, none in blue
    assert score_lib.entropy(half) == pytest.approx(2 / 3)
    listed = (out.parent / f'{out.name}.bad.jsonl').read_text()
    assert json.loads(listed)['id'] == BAD
    about = json.loads(pq.read_schema(out).metadata[b'ssl_jax'])
    assert about['data'] == sources.open_source(str(folder)).fingerprint
    assert about['protocol']['masks'] == 3 and about['protocol']['mask_grid'] == 2
    size = np.minimum(found['loss'], 1).sum()
    assert f'takes {size:,.0f} of 22 images in an epoch' in lines[-1]


def test_a_killed_run_continues_to_the_bytes_of_an_unbroken_one(
    run, folder, scored, tmp_path, monkeypatch
):
    out, real = tmp_path / 's.parquet', feature_file._write
    monkeypatch.setattr(feature_file, 'PART_IMAGES', 8)

    class Killed(BaseException):
        pass

    def dying(table, path):
        real(table, path)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(feature_file, '_write', dying)
        score_lib.score(run, str(folder), out, masks=3, batch_size=8, log=lambda *_: None)
    assert not out.exists()
    lines = []
    score_lib.score(run, str(folder), out, masks=3, batch_size=8, log=lines.append)
    assert 'continuing at image 8 of 22' in lines
    assert out.read_bytes() == scored[0].read_bytes()


def test_a_limit_scores_some_images_as_all_of_them_would_be(run, folder, scored, tmp_path):
    out = tmp_path / 'some.parquet'
    score_lib.score(run, str(folder), out, masks=3, limit=9, batch_size=8, log=lambda *_: None)
    some, rows = pq.read_table(out).to_pydict(), {i: k for k, i in enumerate(scored[1]['id'])}
    assert 8 <= len(some['id']) <= 9 and max(some['id']) > 9
    want = [scored[1]['loss'][rows[i]] for i in some['id']]
    np.testing.assert_allclose(some['loss'], want, rtol=1e-5)
    source = sources.open_source({'path': str(folder), 'scores': str(out)})
    assert f'never {22 - len(some["id"])} without a score' in source.notes[-1]


def test_the_command_writes_what_training_samples_by(run, folder, scored, tmp_path, capsys):
    out = str(tmp_path / 'c.parquet')
    argv = ['data', 'score', '--model', str(run), '--data', str(folder), '--out', out]
    cli.main([*argv, '--masks', '3', '--batch', '8'])
    said = capsys.readouterr().out
    assert f'{out}: 21 rows; 1 images do not decode' in said and 'entropy: 5 % are below' in said
    assert pq.read_table(out).to_pydict() == scored[1]
    source = sources.open_source({'path': str(folder), 'scores': out})
    assert order.epoch_size(source) == round(float(np.minimum(scored[1]['loss'], 1).sum()))


def test_what_gives_no_scores_is_one_sentence(run, folder, scored, tmp_path):
    tiny.save(tiny.dinov2(), tmp_path / 'dinov2')
    with pytest.raises(ValueError, match='reconstructs no pixels: give a run of MAE or Pixio'):
        score_lib.score(tmp_path / 'dinov2', str(folder), tmp_path / 'x.parquet')
    tiny.save(tiny.config(method__mask_grid=2), tmp_path / 'other', seed=1)
    for model, more, sentence in (
        (tmp_path / 'other', {}, 'was made with model'),
        (run, {'masks': 2}, 'was made with protocol'),
    ):
        with pytest.raises(ValueError, match=sentence):
            score_lib.score(model, str(folder), scored[0], **{'masks': 3, 'batch_size': 8, **more})
    assert methods.make(tiny.config()).norm_pix_loss  # so that losses are near 1, not near 0
