# SPDX-License-Identifier: Apache-2.0
"""A loaded encoder answers as the run's own, and a file of features survives its writer."""

import dataclasses
import json
import shutil
import subprocess
import sys

import cv2
import jax
import numpy as np
import pyarrow.parquet as pq
import pytest

import ssl_jax
import tiny
from ssl_jax import cli, encoder
from ssl_jax.augment import photometry
from ssl_jax.data import folder as folder_lib
from ssl_jax.data import host, scenes, sources
from ssl_jax.data import transform as transform_lib
from ssl_jax.evals import feature_file
from ssl_jax.evals import features as features_lib
from ssl_jax.objectives import relax
from ssl_jax.run import errors, weights


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The workdir of a run of 32 px and patches of 8."""
    workdir = tmp_path_factory.mktemp('run')
    tiny.save(tiny.config(), workdir)
    return workdir


@pytest.fixture(scope='module')
def model(run):
    return ssl_jax.load_model(run)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """40 images in two class folders, one that is none and one that is cut off."""
    root = tmp_path_factory.mktemp('images')
    source = scenes.Scenes(40, 40)
    for i in range(40):
        path = root / ('odd' if i % 2 else 'even') / f'{i:02}.jpg'
        path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), source[i]['image'][..., ::-1])
    (root / 'even' / '07.png').write_text('<html>404</html>')
    whole = (root / 'odd' / '15.jpg').read_bytes()
    (root / 'odd' / '15.jpg').write_bytes(whole[: len(whole) // 2])
    return root


def pixels(n=3, height=32, width=32):
    return np.random.default_rng(0).integers(0, 256, (n, height, width, 3)).astype(np.uint8)


def table(path):
    return pq.read_table(path).to_pydict()


# One encoder


def test_importing_the_package_imports_no_jax():
    code = 'import sys, ssl_jax; assert "jax" not in sys.modules and ssl_jax.load_model'
    subprocess.run([sys.executable, '-c', code], check=True)


def test_a_loaded_model_answers_as_the_backbone_of_the_run(run, model):
    vit, params = weights.open_run(run).networks()['encoder']
    want = vit.apply({'params': params}, photometry.normalize(pixels()), capture=(1,))
    got = model(pixels(), blocks=(-1,))
    assert (model.vit, model.size) == (vit, 32)
    assert (model.mean, model.std) == (photometry.MEAN, photometry.STD)
    for name in ('cls_tokens', 'reg_tokens', 'patch_tokens'):
        np.testing.assert_allclose(got[name], want[name], atol=1e-5)
    np.testing.assert_allclose(got['blocks'][-1], want['blocks'][0], atol=1e-5)
    shapes = {k: v.shape for k, v in got.items() if k != 'blocks'}
    assert shapes == dict(
        cls_tokens=(3, 1, 32), reg_tokens=(3, 0, 32), patch_tokens=(3, 16, 32),
        cls=(3, 32), cls_pre=(3, 32), patch=(3, 32), cls_patch=(3, 64),
    )  # fmt: skip


def test_its_named_features_are_those_of_the_evaluations(model):
    want = encoder.make_forward(model.vit, model.params)(pixels())
    got = model(pixels())
    for name in set(want) - {'grid4'}:  # for evaluations only
        np.testing.assert_allclose(got[name], want[name], atol=1e-5)


def test_floating_point_images_are_taken_as_normalised(model):
    want, got = model(pixels()), model(np.asarray(photometry.normalize(pixels())))
    np.testing.assert_allclose(got['cls'], want['cls'], atol=1e-5)


def test_a_model_compiles_once_per_shape(model):
    before = encoder._tokens._cache_size()
    for _ in range(2):
        model(pixels(2))
        model(pixels(2, 32, 48))
    assert encoder._tokens._cache_size() == before + 2


def test_a_model_can_compute_in_another_type(run, model):
    half = ssl_jax.load_model(run, dtype='bfloat16')
    out, want = half(pixels()), model(pixels())
    assert out['patch_tokens'].dtype == 'bfloat16' and out['cls'].dtype == 'float32'
    np.testing.assert_allclose(out['cls'], want['cls'], atol=0.1)


@pytest.mark.parametrize(
    ('images', 'says'),
    [
        (np.zeros((32, 32, 3), np.uint8), 'add an axis with images[None]'),
        (np.zeros((1, 3, 32, 32), np.uint8), '(B, H, W, 3), not (1, 3, 32, 32)'),
        (np.zeros((1, 30, 32, 3), np.uint8), 'into patches of 8 pixels: resize them, for instance'),
        (np.zeros((1, 32, 32, 3), np.int32), 'not int32'),
        ([[1]], 'one array (B, H, W, 3), not list'),
    ],
)
def test_wrong_images_are_one_sentence(model, images, says):
    with pytest.raises(ValueError) as error:
        model(images)
    assert says in str(error.value)


def test_a_block_that_is_not_there_is_one_sentence(model):
    with pytest.raises(ValueError, match='There is no block 2: this encoder has 0 to 1.'):
        model(pixels(), blocks=(2,))


# Importance of pixels

FEW = dict(num_masks=48, batch=16)


@pytest.fixture(scope='module')
def explained(model):
    return jax.device_get(encoder.explain(model, pixels(2), seed=5, **FEW))


def test_it_is_the_estimate_of_the_class_token_of_masked_normalised_images(model, explained):
    key = jax.random.split(jax.random.fold_in(jax.random.key(5), 1), 1)[0]
    keys = [jax.random.fold_in(key, n) for n in range(48)]
    draw = jax.jit(lambda key: relax.soft_mask(key, (32, 32)))
    masks = np.stack([draw(key) for key in keys])
    image = np.asarray(photometry.normalize(pixels(2)))[1]
    whole = np.asarray(model(image[None])['cls'][0], np.float64)
    some = np.asarray(model(image * masks[..., None])['cls'], np.float64)
    s = some @ whole / np.linalg.norm(some, axis=1) / np.linalg.norm(whole)
    want = np.einsum('nyx,n->yx', masks, s) / masks.sum(axis=0)
    np.testing.assert_allclose(explained['importance'][1], want, atol=1e-5)
    around = (s[:, None, None] - want) ** 2
    want = (masks * around).sum(axis=0) / masks.sum(axis=0)
    np.testing.assert_allclose(explained['uncertainty'][1], want, atol=1e-5)


def test_the_same_seed_gives_the_same_maps_and_each_image_has_masks_of_its_own(model, explained):
    twice = np.repeat(pixels(1), 2, axis=0)
    again = encoder.explain(model, twice, seed=5, **FEW)
    np.testing.assert_array_equal(again['importance'][0], explained['importance'][0])
    assert np.abs(again['importance'][0] - again['importance'][1]).max() > 1e-4


def test_patches_are_dropped_where_that_is_asked_for(model):
    """The map of one patch, which every mask shows: 16 patches of one value each."""
    fast = encoder.explain(model, pixels(1), (1, 2), fast=True, cells=4, seed=5, **FEW)
    x = np.asarray(fast['importance'][0])
    np.testing.assert_array_equal(x, np.kron(x[::8, ::8], np.ones((8, 8))))
    key = jax.random.split(jax.random.fold_in(jax.random.key(5), 0), 1)[0]
    draw = jax.jit(lambda key: relax.patch_mask(key, (4, 4), 8, 4, 6))
    masks = np.stack([draw(jax.random.fold_in(key, n)) for n in range(48)])
    ids = np.stack([np.flatnonzero(mask) for mask in masks])
    repeated = np.repeat(photometry.normalize(pixels(1)), 48, axis=0)
    tokens = model.vit.apply({'params': model.params}, repeated, ids_keep=ids)['patch_tokens']
    some = np.asarray(tokens)[np.arange(48), (ids == 6).argmax(axis=1)]
    whole = np.asarray(model(pixels(1))['patch_tokens'])[0, 6]
    s = some @ whole / np.linalg.norm(some, axis=1) / np.linalg.norm(whole)
    want = np.einsum('nyx,n->yx', masks, s) / masks.sum(axis=0)
    np.testing.assert_allclose(x[::8, ::8], want, atol=1e-5)


def test_repeats_are_estimates_with_masks_of_their_own(model):
    out = encoder.explain(model, pixels(1), 'patch', repeats=2, **FEW)
    assert out['spread'].max() > 1e-4
    assert set(np.unique(out['important'])) <= {0, 0.5, 1}


@pytest.mark.parametrize(
    'of,settings,message',
    [
        ('clss', {}, "did you mean 'cls'"),
        ((4, 0), {}, 'the grid is 4x4'),
        ('cls', dict(repeats=0), 'use 1 or more'),
    ],
)
def test_what_cannot_be_explained_is_a_sentence(model, of, settings, message):
    with pytest.raises(errors.UserError, match=message):
        encoder.explain(model, pixels(1), of, **settings)


def test_an_encoder_that_cannot_drop_patches_says_so(model):
    rotary = dataclasses.replace(model, vit=model.vit.clone(pos_embed='rope'))
    with pytest.raises(errors.UserError, match='fast=False'):
        encoder.explain(rotary, pixels(1), fast=True)


# A file of features


@pytest.fixture(scope='module')
def unbroken(model, folder, tmp_path_factory):
    """The file of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp('unbroken') / 'f.parquet'
    feature_file.extract(model, str(folder), out, batch_size=8, log=None)
    return out


def test_rows_keep_their_file_names_labels_and_order(unbroken, model, folder):
    got = table(unbroken)
    even = [f'even/{i:02}.jpg' for i in range(0, 40, 2)]
    odd = [f'odd/{i:02}.jpg' for i in range(1, 40, 2) if i != 15]
    assert got['name'] == even + odd
    assert got['label'] == [0] * 20 + [1] * 19
    source = sources.open_source(str(folder))
    assert [feature_file.name_of(source, i) for i in got['id']] == got['name']
    ends = [host.decode((folder / got['name'][i]).read_bytes()) for i in (0, -1)]
    want = model(np.stack([transform_lib.cut(x, transform_lib.of(32)) for x in ends]))
    for name in ('cls', 'patch'):
        np.testing.assert_allclose([got[name][0], got[name][-1]], want[name], atol=1e-5)
    about = json.loads(pq.read_schema(unbroken).metadata[b'ssl_jax'])
    assert about['classes'] == ['even', 'odd'] and about['size'] == 32


def test_broken_images_are_listed_beside_the_file_with_the_reason(unbroken):
    lines = (unbroken.parent / 'f.parquet.bad.jsonl').read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [f['path'].split('/')[-2:] for f in found] == [['even', '07.png'], ['odd', '15.jpg']]
    assert all(f['reason'] for f in found)
    assert sorted(p.name for p in unbroken.parent.iterdir()) == [
        'f.parquet', 'f.parquet.bad.jsonl',
    ]  # fmt: skip


class Killed(BaseException):
    """Stands for a SIGKILL."""


def killed(monkeypatch, model, folder, out, batches):
    """An extraction that dies after some batches; every batch is a part."""
    real = features_lib.fetch
    left = [batches]

    def dying(tree):
        if not left[0]:
            raise Killed
        left[0] -= 1
        return real(tree)

    with monkeypatch.context() as patch:
        patch.setattr(feature_file, 'PART_SECONDS', 0)
        patch.setattr(features_lib, 'fetch', dying)
        with pytest.raises(Killed):
            feature_file.extract(model, str(folder), out, batch_size=8, log=None)


@pytest.mark.parametrize('batches', [0, 1, 4])
def test_a_killed_extraction_continues_to_the_file_of_an_unbroken_one(
    unbroken, model, folder, tmp_path, monkeypatch, batches
):
    out, lines = tmp_path / 'f.parquet', []
    killed(monkeypatch, model, folder, out, batches)
    assert not out.exists()
    read = []
    real = folder_lib.Folder.__getitem__
    monkeypatch.setattr(folder_lib.Folder, '__getitem__', lambda s, i: read.append(i) or real(s, i))
    feature_file.extract(model, str(folder), out, batch_size=8, log=lines.append)
    assert min(read) == 8 * batches, 'what was done is done again, or not all'
    assert out.read_bytes() == unbroken.read_bytes()
    bad = [tmp_path / 'f.parquet.bad.jsonl', unbroken.parent / 'f.parquet.bad.jsonl']
    assert bad[0].read_text() == bad[1].read_text()
    assert not (tmp_path / 'f.parquet.parts').exists()
    assert any('continuing at image' in line for line in lines) == (batches > 0)


def test_a_kill_while_the_parts_are_joined_costs_nothing(
    unbroken, model, folder, tmp_path, monkeypatch
):
    def die(*_):
        raise Killed

    out = tmp_path / 'f.parquet'
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(feature_file, '_join', die)
        feature_file.extract(model, str(folder), out, batch_size=8, log=None)
    feature_file.extract(model, str(folder), out, batch_size=8, log=None)
    assert out.read_bytes() == unbroken.read_bytes()


def test_row_groups_do_not_depend_on_the_parts(model, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_file, 'ROW_GROUP', 7)
    files = []
    for seconds in (0, 1e9):
        monkeypatch.setattr(feature_file, 'PART_SECONDS', seconds)
        files.append(tmp_path / f'{seconds}.parquet')
        assert feature_file.extract(model, str(folder), files[-1], batch_size=8, log=None) == 39
    assert files[0].read_bytes() == files[1].read_bytes()
    meta = pq.ParquetFile(files[0]).metadata
    assert [meta.row_group(i).num_rows for i in range(meta.num_row_groups)] == [7] * 5 + [4]


def test_parts_of_another_model_data_or_size_are_refused(run, model, folder, tmp_path, monkeypatch):
    out = tmp_path / 'f.parquet'
    killed(monkeypatch, model, folder, out, 1)
    before = sorted(p.name for p in (tmp_path / 'f.parquet.parts').iterdir())
    tiny.save(tiny.config(), tmp_path / 'other', seed=1)
    for model_, data, more, says in (
        (tmp_path / 'other', folder, {}, f'.parts was made with model .* of {run}, not '),
        (model, folder / 'odd', {}, '.parts was made with data'),
        (model, folder, dict(size=64), 'made with size 32, not 64: give another --out, or delete'),
    ):
        with pytest.raises(ValueError, match=says):
            feature_file.extract(model_, str(data), out, **{'batch_size': 8, 'log': None, **more})
    assert sorted(p.name for p in (tmp_path / 'f.parquet.parts').iterdir()) == before


@pytest.mark.parametrize('half_done', [False, True])
def test_images_replaced_under_their_names_are_refused(
    model, folder, tmp_path, monkeypatch, half_done
):
    images, out = tmp_path / 'images', tmp_path / 'f.parquet'
    shutil.copytree(folder, images)
    if half_done:
        killed(monkeypatch, model, images, out, 1)
    else:
        feature_file.extract(model, str(images), out, batch_size=8, log=None)
    photo = sorted(images.rglob('*.png'))[-1]
    photo.write_bytes(photo.read_bytes())  # of the same size at least
    with pytest.raises(ValueError, match='other images, not these .* were written anew'):
        feature_file.extract(model, str(images), out, batch_size=8, log=None)


def test_a_finished_file_is_left_alone_and_another_one_refused(unbroken, model, folder):
    before, lines = unbroken.read_bytes(), []
    assert feature_file.extract(model, str(folder), unbroken, batch_size=8, log=lines.append) == 39
    assert lines == [f'{unbroken} is complete: 39 rows']
    with pytest.raises(ValueError, match='was made with size 32, not 16'):
        feature_file.extract(model, str(folder), unbroken, batch_size=8, size=16, log=None)
    assert unbroken.read_bytes() == before


def test_a_file_of_something_else_is_not_overwritten(model, folder, tmp_path):
    (tmp_path / 'notes.txt').write_text('mine')
    with pytest.raises(ValueError, match='is no file of features: give another --out'):
        feature_file.extract(model, str(folder), tmp_path / 'notes.txt', log=None)
    assert (tmp_path / 'notes.txt').read_text() == 'mine'


def test_a_source_without_labels_and_files_has_neither(model, tmp_path):
    source = sources.Arrays(pixels(5))
    assert feature_file.extract(model, source, tmp_path / 'f.parquet', log=None) == 5
    got = table(tmp_path / 'f.parquet')
    assert list(got) == ['id', 'name', 'cls', 'patch']
    assert got['name'] == [f'array {i}' for i in range(5)]


def test_images_of_which_none_decodes_are_one_sentence(model, tmp_path):
    source = sources.Arrays([b'broken', b''])
    with pytest.raises(ValueError, match='None of the 2 images decodes, see .*bad.jsonl'):
        feature_file.extract(model, source, tmp_path / 'f.parquet', log=None)
    assert not (tmp_path / 'f.parquet').exists()


def test_progress_says_how_much_is_left(model, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_file, 'PROGRESS_SECONDS', 0)
    lines, source = [], sources.Arrays(pixels(32))
    feature_file.extract(model, source, tmp_path / 'f.parquet', batch_size=8, log=lines.append)
    assert lines[1].startswith('16 of 32 images, ') and lines[1].endswith(' left')
    assert lines[-1] == f'{tmp_path}/f.parquet: 32 rows'


def test_the_command_writes_the_file(run, folder, unbroken, tmp_path, capsys):
    out = tmp_path / 'f.parquet'
    command = ['features', '--model', str(run), '--data', str(folder), '--out', str(out)]
    cli.main([*command, '--batch', '8'])
    assert '39 rows; 2 images do not decode, see' in capsys.readouterr().out
    assert out.read_bytes() == unbroken.read_bytes()
    with pytest.raises(SystemExit):
        cli.main([*command, '--size', '30'])
    said = capsys.readouterr().err
    assert 'size=30 is not a multiple of the patch size 8: use 32.' in said
