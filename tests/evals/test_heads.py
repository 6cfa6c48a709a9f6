# SPDX-License-Identifier: Apache-2.0
"""Heads trained on frozen encoders: what they learn, how they continue, on how many devices."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from ssl_jax import encoder, sharding
from ssl_jax.data import scenes, transform
from ssl_jax.evals import depth, head_spec, heads, seg_head, task
from ssl_jax.models import vit
from ssl_jax.run import errors, peers

SIZE, PATCH = 32, 8
LOOK = {**transform.of(SIZE), 'mean': (0.5, 0.5, 0.5), 'std': (0.25, 0.25, 0.25)}


class Halves:
    """Images of two flat colours, left and right; the class is the colour, and the depth too."""

    classes = None
    map_classes = ('dark', 'bright', 'never')

    def __init__(self, n, seed=0):
        self.n, self.seed = n, seed
        self.fingerprint = f'halves-{n}-{seed}'

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        rng = np.random.default_rng([self.seed, i])
        at = PATCH * int(rng.integers(1, 4))
        segmentation = np.zeros((SIZE, SIZE), np.uint8)
        segmentation[:, at:] = 1
        if rng.random() < 0.5:
            segmentation = 1 - segmentation
        image = np.where(segmentation == 1, 200, 50)[..., None] + rng.integers(-20, 20, 3)
        depth = np.where(segmentation == 1, 4.0, 1.0).astype(np.float32)
        segmentation[:2] = 255
        depth[:2] = 0
        return {'image': image.astype(np.uint8), 'segmentation': segmentation, 'depth': depth}

    def describe(self, i):
        return f'image {i}'


@functools.lru_cache
def model(**fields):
    fields = dict(embed_dim=32, depth=4, num_heads=2, mlp_ratio=2.0, num_cls_tokens=1) | fields
    net = vit.ViT(patch_size=PATCH, img_size=SIZE, **fields)
    init = jax.jit(functools.partial(vit.init_params, net))  # op by op it would compile for long
    return encoder.Model(net, init(jax.random.key(0)), LOOK, 'tiny')


def work(folder, devices=1, **options):
    mesh = sharding.make_mesh(data=1, fsdp=-1, devices=jax.devices()[:devices])  # as of `eval`
    return task.Work(mesh, LOOK, epath.Path(folder), batch_size=12, log=lambda *_: None, **options)


def run(module, net, settings, folder, data=None, **options):
    data = data or task.Data(Halves(64), Halves(16, seed=1))
    rows = task.run(module.__name__.split('.')[-1], net, data, settings, work(folder, **options))
    assert len(rows) == 1
    return rows[0]


SEG = seg_head.Settings(steps=60, batch_size=8, lr=0.02, ratio=(1.0, 1.0))
DEPTH = depth.Settings(steps=150, batch_size=8, lr=0.02)


def test_a_head_on_raw_pixels_finds_the_classes_that_colours_show(tmp_path):
    row = run(seg_head, encoder.Pixels(PATCH, LOOK), SEG, tmp_path)
    assert row['scores']['mIoU'] > 90
    assert row['iou']['dark'] > 90 and row['iou']['never'] is None
    with np.load(epath.Path(row['folder']) / 'predictions.npz') as shown:
        assert shown['prediction_7'].dtype == np.uint8
        assert np.mean(shown['prediction_7'] == shown['truth_7']) > 0.8  # 255 never matches


def test_a_head_on_raw_pixels_finds_the_depth_that_colours_show(tmp_path):
    row = run(depth, encoder.Pixels(PATCH, LOOK), DEPTH, tmp_path)
    assert row['scores']['d1'] > 85 and row['scores']['RMSE'] < 0.7  # constant: 1.5 at best
    with np.load(epath.Path(row['folder']) / 'predictions.npz') as shown:
        assert shown['prediction_0'].shape == (SIZE, SIZE)


SLOW = {
    ('seg_head', 'pixio_dpt'),
    ('depth', 'pixio_dpt'),
    ('depth', 'pixio_linear'),
    ('depth', 'dpt'),
}
KINDS = [
    pytest.param(*kind, marks=[pytest.mark.slow] if kind in SLOW else [])
    for kind in head_spec.RECIPES
    if kind[1] != 'linear'
]


@pytest.mark.parametrize('name, head', KINDS)
def test_every_head_trains_on_every_kind_of_encoder(name, head, tmp_path):
    module = {'seg_head': seg_head, 'depth': depth}[name]
    settings = module.Settings(head=head, steps=2, batch_size=2, channels=8)
    data = task.Data(Halves(4), Halves(2, seed=1))
    # Class tokens and registers, two of them, none, and none because there is no network.
    nets = {
        'linear4': model(num_register_tokens=2),
        'pixio_linear': model(num_cls_tokens=2),
        'pixio_dpt': encoder.Pixels(PATCH, LOOK) if name == 'depth' else model(),
        'dpt': model(num_cls_tokens=0),
    }
    row = run(module, nets[head], settings, tmp_path, data)
    assert np.all(np.isfinite(list(row['scores'].values())))


class Killed(Exception):
    pass


@pytest.mark.parametrize(
    'module, settings',
    [(seg_head, SEG), pytest.param(depth, DEPTH, marks=pytest.mark.slow)],
)
def test_a_killed_training_continues_to_the_same_bits(module, settings, tmp_path, monkeypatch):
    settings = dataclasses.replace(settings, steps=10)
    if module is seg_head:
        settings = dataclasses.replace(settings, ratio=(0.5, 2.0))
    whole = run(module, model(), settings, tmp_path / 'whole')
    steps = []

    def kill():
        steps.append(0)
        if len(steps) == 20:  # of the stream and of the step
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(peers, 'progress', kill)
        with pytest.raises(Killed):
            run(module, model(), settings, tmp_path / 'cut')
    lines = []
    folder = work(tmp_path / 'cut')
    folder = dataclasses.replace(folder, log=lines.append)
    data = task.Data(Halves(64), Halves(16, seed=1))
    (again,) = task.run(whole['eval'], model(), data, settings, folder)
    assert any('continues at step' in line for line in lines)
    assert again['scores'] == whole['scores']
    loaded = [heads.load(row['folder'], model()).variables for row in (whole, again)]
    jax.tree.map(np.testing.assert_array_equal, *loaded)


@pytest.mark.parametrize(
    'module, settings', [(seg_head, SEG), pytest.param(depth, DEPTH, marks=pytest.mark.slow)]
)
def test_eight_devices_give_the_numbers_of_one(module, settings, tmp_path):
    settings = dataclasses.replace(settings, steps=5)
    one = run(module, model(), settings, tmp_path / '1')
    eight = run(module, model(), settings, tmp_path / '8', devices=8)
    for name, value in one['scores'].items():
        assert eight['scores'][name] == pytest.approx(value, rel=2e-3, abs=0.1), name
    a, b = (heads.load(row['folder'], model()).variables for row in (one, eight))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-4, rtol=2e-3)


def test_a_kept_head_predicts_for_any_image_what_it_did_when_it_was_tested(tmp_path):
    settings = dataclasses.replace(SEG, steps=3)
    row = run(seg_head, model(), settings, tmp_path)
    (folder,) = heads.find(tmp_path)
    assert str(folder) == row['folder']
    head = heads.load(folder, model())
    with np.load(folder / 'predictions.npz') as shown:
        for i in range(2):
            found = heads.predict(head, shown[f'image_{i}'])
            np.testing.assert_array_equal(found, shown[f'prediction_{i}'])
    tall = np.zeros((50, 21, 3), np.uint8)
    assert heads.predict(head, tall).shape == (50, 21)


def test_rates_are_those_of_the_official_schedules():
    def rates(name, head, steps, at):
        spec = head_spec.Spec(name, head, (8, 8), steps, 1, 1.0)
        return [float(spec.rate(jnp.int32(s))) for s in at]

    got = rates('seg_head', 'linear', 40000, (0, 750, 1500, 20000))
    assert got == pytest.approx(
        [1e-6, (1 - 750 / 40000) * 0.5, 1 - 1500 / 40000, 0.5], rel=1e-4, abs=1e-7
    )
    got = rates('depth', 'linear', 38400, (0, 12800, 19200))
    assert got == pytest.approx([1e-3, 0.75, 0.5], rel=1e-4)
    got = rates('seg_head', 'pixio_dpt', 100, (0, 1, 51))
    assert got == pytest.approx([1, 1, 0.5**0.9], rel=1e-4)
    got = rates('depth', 'pixio_dpt', 100, (0, 1, 6, 11, 56))
    assert got == pytest.approx([1, 0, 0.5, 1, 0.5**0.9], rel=1e-4)


@pytest.mark.parametrize(
    'depth_of, head, want',
    [(12, 'dpt', (2, 5, 8, 11)), (24, 'dpt', (4, 11, 17, 23)), (40, 'dpt', (9, 19, 29, 39)),
     (24, 'pixio_dpt', (5, 11, 17, 23)), (48, 'pixio_dpt', (11, 23, 35, 47)),
     (12, 'linear', (11,)), (2, 'dpt', (0, 0, 1, 1))],
)  # fmt: skip
def test_blocks_are_those_of_the_official_codes(depth_of, head, want):
    assert head_spec.numbers(head_spec.RECIPES['depth', head], depth_of) == want


def test_what_gets_no_gradient_does_not_decay():
    params = {'scratch': {'refinenet4': {'resConfUnit1': {'conv1': {'bias': jnp.ones(2)}}}}}
    params['scratch']['output_conv_0'] = {'bias': jnp.ones(2)}
    spec = head_spec.Spec('seg_head', 'pixio_dpt', (8, 8), 10, 1, 1.0)
    tx = heads.optimizer(spec, params)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert not np.any(updates['scratch']['refinenet4']['resConfUnit1']['conv1']['bias'])
    assert np.all(updates['scratch']['output_conv_0']['bias'] < 0)


def test_settings_that_cannot_be_are_a_sentence(tmp_path):
    with pytest.raises(errors.UserError, match='patch size 8'):
        run(seg_head, model(), seg_head.Settings(head='pixio_linear', crop=30), tmp_path)
    with pytest.raises(errors.UserError, match='below max_depth'):
        run(depth, model(), depth.Settings(min_depth=20.0), tmp_path)
    with pytest.raises(errors.UserError, match=r'\(416,544\)'):
        run(depth, model(), depth.Settings(crop=(32,)), tmp_path)
    source = Halves(4)
    source.map_classes = ('dark',)
    with pytest.raises(errors.UserError, match='class 1, and the source names 1'):
        run(seg_head, model(), SEG, tmp_path, task.Data(source))
    with pytest.raises(errors.UserError, match='No test image has'):
        settings = dataclasses.replace(DEPTH, steps=1, min_depth=6.0)
        run(depth, model(), settings, tmp_path, task.Data(Halves(8)))


def test_rendered_scenes_are_enough_for_both():
    item = scenes.Scenes(1, 32)[0]
    assert {seg_head.NEEDS, depth.NEEDS} <= set(item)
    assert scenes.Scenes.map_classes
