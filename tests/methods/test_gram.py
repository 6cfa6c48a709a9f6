# SPDX-License-Identifier: Apache-2.0
"""The Gram stage of DINOv2: where the frozen teacher comes from, what it sees, when it changes."""

import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from ssl_jax import config as config_lib
from ssl_jax import methods, sharding, train
from ssl_jax import step as step_lib
from ssl_jax.augment import photometry
from ssl_jax.data import sources
from ssl_jax.methods import base
from ssl_jax.models import vit as vit_lib
from ssl_jax.objectives import gram
from ssl_jax.run import checkpoint, errors, metrics, start, weights
from ssl_jax.run import clock as clock_lib

ON = dict(method__gram_weight=2.0, method__drop_path=0.0)


def equal(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def made(**fields):
    config = tiny.dinov2(**{**ON, **fields})
    return config, methods.make(config, clock_lib.Clock.of(config))


def batch_of(method, size=16):
    rng = np.random.default_rng(0)
    return {
        v.name: rng.integers(0, 256, (size, v.count, v.size, v.size, 3)).astype(np.uint8)
        for v in method.views()
    }


# What the frozen teacher sees.


def test_the_host_cuts_global_crops_at_the_teachers_size_and_nothing_else_changes():
    plain, (_, method) = methods.make(tiny.dinov2()), made()
    assert [v.size for v in method.views()] == [64, 16]
    assert [v.size for v in plain.views()] == [32, 16]
    assert method.transform()['size'] == plain.transform()['size'] == 32


def test_student_and_frozen_teacher_see_the_same_flipped_crop():
    _, method = made(method__flip=0.5, method__jitter_prob=0.0)
    batch = {**batch_of(method), 'row': jnp.arange(16)}
    small, local, plain = jax.jit(method.augment)(batch, jax.random.key(0))
    assert small.shape == (16, 2, 32, 32, 3) and plain.shape == (16, 2, 64, 64, 3)
    assert local.shape == (16, 2, 16, 16, 3)
    shrunk = gram.resize(plain.reshape(32, 64, 64, 3), 32, 'antialias').reshape(small.shape)
    near = np.abs(np.asarray(shrunk - small)).mean(axis=(2, 3, 4))  # clipped at 0 and 255
    assert near.max() < 0.03
    given = gram.resize(batch['global'].reshape(32, 64, 64, 3), 64, 'antialias')
    kept = np.asarray(plain).reshape(32, -1).argmax(1) == np.asarray(given).reshape(32, -1).argmax(
        1
    )
    assert 4 < kept.sum() < 28  # some are flipped


def test_colours_do_not_reach_the_frozen_teacher():
    fields = dict(method__grey_prob=1.0, method__flip=0.0, method__n_local_crops=0)
    _, method = made(**fields)
    batch = {**batch_of(method, 2), 'row': jnp.arange(2)}
    small, _, plain = jax.jit(method.augment)(batch, jax.random.key(0))
    np.testing.assert_allclose(plain, photometry.normalize(batch['global']), atol=1e-6)
    grey = np.asarray(photometry.denormalize(small))
    np.testing.assert_allclose(grey[..., 0], grey[..., 2], atol=1e-5)


# The loss in the step.


def test_the_term_is_that_of_the_masked_student_and_the_copy():
    _, method = made(method__depth=1, method__n_local_crops=0)
    params, extra = jax.jit(method.init)(jax.random.key(0))
    extra['gram'] = jax.tree.map(lambda x: x[..., ::-1], params['backbone'])  # another network
    crops = jax.random.normal(jax.random.key(1), (8, 2, 32, 32, 3))
    plain = jax.random.normal(jax.random.key(2), (8, 2, 64, 64, 3))
    mask = jax.random.bernoulli(jax.random.key(3), 0.4, (8, 2, 16))

    @jax.jit
    def run(params, extra):
        more = dict(temps=(0.1, 0.1), plain_crops=plain)
        total, (_, terms) = method.objective(params, extra, crops, None, mask, **more)
        flat = crops.reshape(16, 32, 32, 3), plain.reshape(16, 64, 64, 3)
        student = method.vit.apply(
            {'params': params['backbone']}, flat[0], mask=mask.reshape(16, 16)
        )
        anchor = gram.targets(method.vit, extra['gram'], flat[1], 4)
        return total, terms, gram.loss(student['patch_tokens'], anchor)

    total, terms, want = run(params, extra)
    names = ('dino_global', 'dino_local', 'ibot', 'koleo', 'gram')
    assert float(total) == pytest.approx(float(sum(terms[k] for k in names)), rel=1e-5)
    assert float(terms['gram']) == pytest.approx(2 * float(want), rel=1e-4) and want > 1e-3


def test_the_copy_is_replaced_by_the_moving_average_at_its_steps():
    _, method = made(method__gram_every=2, method__gram_updates=1)
    shapes = jax.eval_shape(method.init, jax.random.key(0))
    _, extra = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    moved, seen = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), shapes[0]), []
    after_update = jax.jit(method.after_update)
    for step in range(4):
        before = extra
        extra = after_update(moved, extra, step)
        seen.append(equal(extra['gram'], before['gram']))
        if step == 1:
            assert equal(extra['gram'], extra['teacher']['backbone'])
    assert seen == [True, False, True, True]


def test_runs_without_it_have_no_copy_and_exports_never_have_it():
    _, method = made()
    params, extra = jax.eval_shape(method.init, jax.random.key(0))
    without = jax.eval_shape(methods.make(tiny.dinov2()).init, jax.random.key(0))[1]
    assert {*extra} - {*without} == {'gram'}
    assert sorted(method.networks(params, extra)) == ['dino_head', 'encoder', 'ibot_head']


def test_flops_count_the_frozen_teacher():
    costs = [made(method__gram_size=s)[1].flops(4) for s in (32, 64, 96)]
    assert methods.make(tiny.dinov2(method__drop_path=0.0)).flops(4) < costs[0] < costs[1]
    assert costs[2] - costs[1] > costs[1] - costs[0]


@pytest.mark.slow
def test_eight_devices_compute_what_one_does():
    config, method = made(method__gram_every=1)
    found = []
    for devices in (1, 8):
        mesh = sharding.make_mesh(data=-1, devices=jax.devices()[:devices])
        program = step_lib.make_program(config, method, mesh)
        with jax.set_mesh(mesh):
            state = program.init()
            for _ in range(2):
                data = sharding.to_global(batch_of(method), mesh, np.arange(16), 16)
                state, m = program.step(state, data)
        found.append((float(m['gram']), jax.device_get(state.extra['gram'])))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    for a, b in zip(*(jax.tree.leaves(x[1]) for x in found), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


# Start and restart.


def first_state(config, workdir):
    """The first state of a run, without compiling its step."""
    method = methods.make(config, clock_lib.Clock.of(config))
    program = step_lib.make_program(config, method)
    saved = checkpoint.Checkpointer(workdir / 'checkpoints')
    with jax.set_mesh(program.mesh):
        return start.first_state(config, method, program, saved, None)[0]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The workdir of a finished run."""
    path = tmp_path_factory.mktemp('run')
    tiny.save(tiny.dinov2(method__teacher_temp=0.03, method__momentum_teacher=0.9), path, seed=3)
    return path


def test_a_stage_starts_with_the_whole_run_and_anchors_to_its_teacher(run, tmp_path, capsys):
    stage = tiny.dinov2(**ON, init_from=str(run), method__gram_every=3)
    state, run = first_state(stage, tmp_path), weights.open_run(run)
    assert equal(run.params, state.params)  # heads and prototypes too
    assert equal(run.extra['teacher'], state.extra['teacher'])
    assert equal(run.extra['teacher']['backbone'], state.extra['gram'])
    said = capsys.readouterr().out
    assert 'frozen teacher of this start, replaced after steps 3, 6\n' in said
    assert 'random weights' not in said


def prepared(method, **more):
    """What `prepare` makes of a copy of zeros."""
    _, extra = jax.eval_shape(method.init, jax.random.key(0))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), extra)
    given = dict(
        seed=0, fetch=jax.device_get, batches=None, open=weights.open_weights, tensors=None
    )
    return method.prepare(zeros, base.Start(**given, **more))


def test_the_frozen_teacher_may_be_another_run_and_no_run_is_one_sentence(run):
    extra, lines = prepared(made(method__gram_from=str(run), method__gram_updates=0)[1])
    assert equal(weights.open_run(run).extra['teacher']['backbone'], extra['gram'])
    assert lines == [f'gram: frozen teacher {run}, never replaced']
    with pytest.raises(errors.UserError, match='nowhere'):
        prepared(made(method__gram_from='nowhere')[1])


def test_a_copy_of_random_weights_is_named():
    _, method = made()
    assert 'a copy of random weights anchors nothing; give init_from' in prepared(method)[1][1]
    assert len(prepared(method, init_from='runs/mine')[1]) == 1


@pytest.mark.slow
def test_a_later_stage_without_it_takes_all_but_the_copy(tmp_path):
    tiny.save(tiny.dinov2(**ON), tmp_path / 'stage', seed=3)
    run = weights.open_run(tmp_path / 'stage')
    state = first_state(tiny.dinov2(init_from=str(tmp_path / 'stage')), tmp_path / 'later')
    assert 'gram' not in state.extra and equal(run.params, state.params)
    assert equal(run.extra['teacher'], state.extra['teacher'])


@pytest.mark.slow
def test_a_restart_before_an_update_of_the_copy_ends_on_the_same_bits(run, tmp_path):
    fields = {**ON, 'total_steps': 6, 'method__gram_every': 4, 'init_from': str(run)}
    train.train(tiny.dinov2(**fields), tmp_path / 'whole')
    config = tiny.dinov2(**fields, checkpoint__every_steps=3)
    train.train(config, tmp_path / 'killed')
    shutil.rmtree(tmp_path / 'killed' / 'checkpoints' / '6')  # what a kill after step 3 leaves
    third = weights.open_run(tmp_path / 'killed', step=3)
    train.train(config, tmp_path / 'killed')
    whole, again = (weights.open_run(tmp_path / name) for name in ('whole', 'killed'))
    assert again.step == 6 and equal((whole.params, whole.extra), (again.params, again.extra))
    assert not equal(third.extra['gram'], again.extra['gram'])
    rows = [r for r in metrics.read(tmp_path / 'whole') if 'loss' in r]
    assert all(r['gram'] > 0 for r in rows)


# Recipe and checks.


def test_the_repair_takes_network_and_losses_of_the_run_and_its_own_stage(run):
    fields = [f'init_from={run}', 'data.train.source=scenes', 'data.train.n=64', 'method.flip=0.1']
    config = config_lib.load('repair_dinov2', [*fields, 'data.train.size=32'])
    m = start.complete(config, sources.open_source(config.data.train)).method
    ran = weights.header(run).config.method
    own = dict(flip=0.1, momentum_teacher=0.999, final_momentum_teacher=0.999)
    own |= dict(gram_weight=2.0, gram_every=2500, group_size=2)  # 16 images on 8 devices
    assert {k: m[k] for k in m if m[k] != ran[k]} == own
    assert m.teacher_temp == 0.03 and m.dino_out_dim == 64


def test_of_other_weights_the_repair_takes_the_encoder_unless_a_size_is_given():
    method = methods.make(config_lib.load('repair_dinov2'))
    vit = vit_lib.ViT(embed_dim=32, depth=2, num_heads=4, patch_size=8, img_size=32)
    found = method.follow(types.SimpleNamespace(method=None, vit=vit), {'img_size'})
    assert method.follows and found['embed_dim'] == 32 and found['patch_size'] == 8
    assert 'img_size' not in found and 'dino_out_dim' not in found
    assert not methods.make(config_lib.load('repair_dinov2', ['method.size=S'])).follows


@pytest.mark.parametrize(
    ('fields', 'says'),
    [
        (dict(gram_size=60), 'gram_size=60 must be a multiple of method.patch_size=8'),
        (dict(gram_size=24), 'at least method.img_size=32: use gram_size=32'),
        (dict(gram_every=0), 'method.gram_every=0'),
        (dict(gram_updates=-1), 'method.gram_updates=-1'),
        (dict(gram_weight=0.0, gram_from='runs/x'), 'leave gram_from out'),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_one_sentence(fields, says):
    fields = {f'method__{k}': v for k, v in fields.items()}
    with pytest.raises(ValueError) as error:
        config_lib.validate(tiny.dinov2(**{**ON, **fields}))
    assert says in str(error.value)


def test_distillation_has_none():
    sizes = dict(method__teacher_size='S', method__drop_path=0.0, method__gram_weight=1.0)
    with pytest.raises(ValueError, match='has no Gram anchoring: set method.gram_weight=0'):
        config_lib.validate(tiny.dinov2('dinov2_distill', **sizes))
