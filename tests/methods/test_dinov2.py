# SPDX-License-Identifier: Apache-2.0
"""DINOv2 in the loop: meshes agree, restarts are bitwise, teachers are what they should be."""

import math
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from ssl_jax import config as config_lib
from ssl_jax import methods, sharding, train
from ssl_jax import step as step_lib
from ssl_jax.kernels import subsets
from ssl_jax.kernels.segments import Segment
from ssl_jax.methods import mae
from ssl_jax.models import vit as vit_lib
from ssl_jax.objectives import masking
from ssl_jax.run import clock as clock_lib
from ssl_jax.run import metrics, weights


def crops(method, size, seed=0):
    rng = np.random.default_rng(seed)
    return {
        v.name: rng.integers(0, 256, (size, v.count, v.size, v.size, 3)).astype(np.uint8)
        for v in method.views()
    }


def losses_on(devices, steps=3, **mesh):
    config = tiny.dinov2()
    clock = clock_lib.Clock.of(config)
    method = methods.make(config, clock)
    mesh = sharding.make_mesh(**mesh, devices=jax.devices()[:devices])
    program = step_lib.make_program(config, method, mesh)
    rows = sharding.process_rows(mesh, config.batch_size)
    found = []
    with jax.set_mesh(mesh):
        state = program.init()
        for step in range(steps):
            batch = crops(method, config.batch_size, step)
            batch = sharding.to_global(
                {k: v[rows] for k, v in batch.items()}, mesh, rows, config.batch_size
            )
            state, m = program.step(state, batch)
            found.append([float(m[k]) for k in ('loss', 'koleo', 'ibot', 'grad_norm')])
        teacher = jax.tree.map(np.asarray, state.extra)
    return np.array(found), teacher


@pytest.fixture(scope='module')
def one_device():
    return losses_on(1)


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [dict(data=2, fsdp=2, tensor=2)], ids=str)
def test_loss_and_teacher_are_equal_on_any_mesh(one_device, mesh):
    losses, extra = losses_on(math.prod(mesh.values()), **mesh)
    np.testing.assert_allclose(losses[0], one_device[0][0], rtol=2e-6)
    np.testing.assert_allclose(losses, one_device[0], rtol=1e-4)
    for a, b in zip(jax.tree.leaves(extra), jax.tree.leaves(one_device[1]), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.slow
def test_a_restart_in_the_middle_ends_on_the_same_bits_teacher_and_centres_included(tmp_path):
    config = tiny.dinov2(total_steps=6)
    train.train(config, tmp_path / 'whole')
    train.train(tiny.dinov2(total_steps=6, checkpoint__every_steps=3), tmp_path / 'all')
    # What a kill after step 3 leaves behind.
    shutil.rmtree(tmp_path / 'all' / 'checkpoints' / '6')
    other = tmp_path / 'other'
    train.train(tiny.dinov2(total_steps=6, resume_from=str(tmp_path / 'all')), other)
    first, second = (weights.open_run(tmp_path / name) for name in ('whole', 'other'))
    assert (first.step, second.step) == (6, 6) and 'dino_center' in first.extra
    for a, b in zip(
        jax.tree.leaves((first.params, first.extra)),
        jax.tree.leaves((second.params, second.extra)),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    rows = [r for r in metrics.read(tmp_path / 'whole') if 'loss' in r and r['step'] > 3]
    again = [r for r in metrics.read(other) if 'loss' in r]
    assert [r['loss'] for r in rows] == [r['loss'] for r in again] and len(rows) == 3


def test_all_crops_in_one_pass_equal_a_pass_for_each_size():
    method = methods.make(tiny.dinov2())
    vit = method.vit
    params = vit_lib.init_params(vit, jax.random.key(0))
    images = [jax.random.normal(jax.random.key(n), (2, n, s, s, 3)) for n, s in ((2, 32), (3, 16))]
    mask = jax.random.bernoulli(jax.random.key(5), 0.4, (2, 2, 16))
    outs = vit.apply({'params': params}, tuple(images), mask=mask)
    for x, m, out in zip(images, (mask.reshape(4, -1), None), outs, strict=True):
        alone = vit.apply({'params': params}, x.reshape(-1, *x.shape[2:]), mask=m)
        for name, value in alone.items():
            together = out[name].reshape(value.shape)
            np.testing.assert_allclose(together, value, atol=2e-5, err_msg=name)


@pytest.mark.parametrize('bottleneck', [64, pytest.param(256, marks=pytest.mark.slow)])
def test_the_first_loss_under_sinkhorn_is_ln_k_plus_50_over_the_bottleneck(bottleneck):
    """Spec section 3.9, within 1 %."""
    c = tiny.dinov2()
    m = dict(centering='sinkhorn_knopp', dino_out_dim=4096, dino_bottleneck_dim=bottleneck)
    with c.unlocked():
        c.method.update(drop_path=0.0, koleo_weight=0.0, **m)
    method = methods.make(c, clock_lib.Clock.of(c))
    params, extra = jax.jit(method.init)(jax.random.key(0))
    batch = {**crops(method, 16), 'row': jnp.arange(16)}
    _, (_, terms) = jax.jit(method.loss)(params, extra, batch, jax.random.key(1), 0)
    want = math.log(4096) + 50 / bottleneck
    assert float(terms['dino_global'] + terms['dino_local']) == pytest.approx(want, rel=0.01)


def test_the_teacher_is_the_moving_average_and_gets_no_gradient():
    method = methods.make(tiny.dinov2(), clock_lib.Clock(10))
    params, extra = method.init(jax.random.key(0))
    moved = jax.tree.map(lambda p: p + 1.0, params)
    after = method.after_update(moved, extra, jnp.int32(0))['teacher']
    share = float(method.ema_rate(0))
    assert share == pytest.approx(1 - 0.98)
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(extra['teacher']), strict=True):
        np.testing.assert_allclose(a, b + share, rtol=1e-5, atol=1e-6)
    still = method.after_update(moved, extra, jnp.int32(10))['teacher']  # momentum 1
    for a, b in zip(jax.tree.leaves(still), jax.tree.leaves(extra['teacher']), strict=True):
        np.testing.assert_array_equal(a, b)


def test_without_local_crops_an_inferred_run_chooses_no_size_for_them_and_has_a_loss():
    """For centred objects, of which a small crop shows none."""
    c = config_lib.load('images_dinov2', ('method.n_local_crops=0',))
    c, decisions = config_lib.infer(c, 2000, (32, 32), 'cpu', 1, 2)
    assert not any('local' in line for line in decisions) and c.method.local_size is None
    method = methods.make(c, clock_lib.Clock.of(c, num_examples=2000))
    assert [(v.name, v.count) for v in method.views()] == [('global', 2)]
    batch = {**crops(method, c.batch_size), 'row': jnp.arange(c.batch_size)}
    state = jax.eval_shape(method.init, jax.random.key(0))
    loss, (_, terms) = jax.eval_shape(method.loss, *state, batch, jax.random.key(1), jnp.int32(0))
    assert loss.shape == () and {'dino_global', 'ibot', 'koleo'} < terms.keys()
    assert method.flops(1) < methods.make(
        tiny.changed(c, {'method__n_local_crops': 4, 'method__local_size': 16})
    ).flops(1)


def test_dropped_images_cost_nothing_and_the_expectation_stays():
    """Half of the images left out: the branch sees half the tokens, those that stay count twice."""
    x = jax.random.normal(jax.random.key(0), (2 * 4 * 5, 8))
    ids = [jnp.array([[0, 2], [1, 3]])]
    seen = []

    def branch(tokens, segments):
        seen.append((tokens.shape, segments))
        return jnp.ones_like(tokens)

    out = subsets.residual(branch, x, (Segment(4, 3, 2),), ids)
    assert seen == [((2 * 10, 8), ((2, 3, 2),))]
    change = np.asarray(out - x).reshape(2, 4, 5, 8)[..., 0, 0]
    np.testing.assert_allclose(change, [[2, 0, 2, 0], [0, 2, 0, 2]], rtol=1e-6)


def test_the_masked_patches_always_fit_the_buffer():
    method = methods.make(tiny.dinov2())
    keys = jax.random.split(jax.random.key(0), 50)
    masks = jax.jit(method.masks, static_argnums=1)(keys, 16)
    counts = np.asarray(masks.sum(axis=(1, 2)))
    assert counts.max() <= method.upper_bound(16) and counts.min() > 0
    taken = masking.masked_indices(masks, method.upper_bound(16))
    np.testing.assert_array_equal(taken.valid.sum(axis=1), counts)


@pytest.mark.slow
def test_the_high_resolution_stage_takes_the_whole_run_and_resizes_positions(tmp_path):
    low = tiny.dinov2()
    tiny.save(low, tmp_path / 'low')
    high = tiny.dinov2(
        method__img_size=48, init_from=str(tmp_path / 'low'), total_steps=1, warmup_steps=0
    )
    with high.unlocked():
        high.optim.lr = 0.0
        high.optim.warm_freeze, high.optim.warm_freeze_steps = (), None
        high.method.momentum_teacher = high.method.final_momentum_teacher = 1.0
    train.train(high, tmp_path / 'high')
    a, b = weights.open_run(tmp_path / 'low'), weights.open_run(tmp_path / 'high')
    for old, new in ((a.params, b.params), (a.extra['teacher'], b.extra['teacher'])):
        assert new['backbone']['pos_embed'].shape == (1, 1 + 36, 32)
        np.testing.assert_array_equal(
            old['dino_head']['last_layer']['weight_v'], new['dino_head']['last_layer']['weight_v']
        )
        np.testing.assert_array_equal(old['backbone']['cls_token'], new['backbone']['cls_token'])


def distilled(teacher, **fields):
    config = tiny.dinov2('dinov2_distill', **fields)
    m = config.method
    m.update(teacher=str(teacher), teacher_ffn='mlp')
    m.update(teacher_embed_dim=32, teacher_depth=2, teacher_num_heads=4)
    m.update(embed_dim=16, depth=1, drop_path=0.0)
    return config


@pytest.mark.slow
def test_distillation_keeps_the_teacher_and_moves_student_and_average(tmp_path):
    tiny.save(tiny.dinov2(), tmp_path / 'big', seed=3)
    config = distilled(tmp_path / 'big', total_steps=4)
    train.train(config, tmp_path / 'small')
    big, small = weights.open_run(tmp_path / 'big'), weights.open_run(tmp_path / 'small')
    for a, b in zip(
        jax.tree.leaves(big.extra['teacher']), jax.tree.leaves(small.extra['teacher']), strict=True
    ):
        np.testing.assert_array_equal(a, b)
    vit, params = small.networks()['encoder']
    assert vit.embed_dim == 16 and params is small.extra['student']['backbone']
    assert np.any(params['pos_embed'] != small.params['backbone']['pos_embed'])


def test_a_teacher_without_heads_is_refused_in_one_sentence(tmp_path):
    tiny.save(tiny.config(), tmp_path / 'mae')
    with pytest.raises(ValueError, match='has no projection heads; give a run of dinov2'):
        train.train(distilled(tmp_path / 'mae'), tmp_path / 'small')


@pytest.mark.parametrize('warmup', ['warmup', 'temperature'])
def test_a_collapse_is_named_with_its_number_once_the_warm_up_is_over(warmup):
    config, clock = tiny.dinov2(), clock_lib.Clock(100, 10 if warmup == 'warmup' else 0)
    if warmup == 'temperature':
        config.method.warmup_teacher_temp_steps = 10
    method = methods.make(config, clock)
    sick = dict(teacher_entropy=0.0, kl_uniform=math.log(64), prototype_use=1 / 32)
    assert method.suspect(sick, 9) is None and method.suspect({}, 10) is None
    sentence = method.suspect(sick, 10)
    assert 'Collapse to' in sentence and '0.000' in sentence


def test_the_loop_names_a_collapse_once_until_it_is_over(tmp_path, capsys, monkeypatch):
    def suspect(method, values, step):
        return f'ill at {step}, {values["loss"]:.1f}' if step in (2, 3, 6) else None

    monkeypatch.setattr(mae.MAE, 'suspect', suspect)
    train.train(tiny.config(), tmp_path)
    said = re.findall(r'step (\d): ill at (\d)', capsys.readouterr().out)
    assert said == [('2', '2'), ('6', '6')]


@pytest.mark.parametrize(
    ('fields', 'says'),
    [
        (dict(method__group_size=6), 'does not consist of groups of method.group_size=6: use 2'),
        (dict(method__local_size=20), 'method.local_size=20 is not a multiple'),
        (dict(method__centering='sinkhorn'), "method.centering='sinkhorn' is unknown"),
        (dict(method__drop_path_uniform=False), 'leaves out equally many images in every block'),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_one_sentence(fields, says):
    with pytest.raises(ValueError) as error:
        config_lib.validate(tiny.dinov2(**fields))
    assert says in str(error.value)


def test_the_small_preset_changes_only_fields_that_exist():
    m = config_lib.default('dinov2').method
    before = set(m)
    config_lib.shared('dinov2').small(m)
    config_lib.shared('dinov2').dino(m)
    assert set(m) == before
