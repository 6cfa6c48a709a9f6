# SPDX-License-Identifier: Apache-2.0
"""The Gram stage of DINOv2: where the frozen teacher comes from, what it sees, when it changes."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from ssl_jax import config as config_lib
from ssl_jax import methods, sharding, train
from ssl_jax import step as step_lib
from ssl_jax.objectives import gram
from ssl_jax.run import clock as clock_lib
from ssl_jax.run import metrics, start, weights

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
    crops = {}
    for prob in (0.0, 1.0):
        _, method = made(method__jitter_prob=prob, method__n_local_crops=0)
        batch = {**batch_of(method, 2), 'row': jnp.arange(2)}
        crops[prob] = method.augment(batch, jax.random.key(0))
    assert equal(crops[0.0][2], crops[1.0][2])
    assert not np.allclose(crops[0.0][0], crops[1.0][0], atol=0.1)


# The loss in the step.


def test_the_term_is_that_of_the_masked_student_and_gradients_end_at_the_copy():
    _, method = made(method__ibot_weight=0.5)
    params, extra = jax.jit(method.init)(jax.random.key(0))
    extra['gram'] = method.init(jax.random.key(9))[0]['backbone']
    crops = jax.random.normal(jax.random.key(1), (8, 2, 32, 32, 3))
    plain = jax.random.normal(jax.random.key(2), (8, 2, 64, 64, 3))
    mask = jax.random.bernoulli(jax.random.key(3), 0.4, (8, 2, 16))

    def loss(params, copy):
        full = {**extra, 'gram': copy}
        return method.objective(
            params, full, crops, None, mask, temps=(0.1, 0.1), plain_crops=plain
        )

    run = jax.jit(jax.value_and_grad(loss, 1, has_aux=True))
    (total, (_, terms)), grads = run(params, extra['gram'])
    assert not any(np.any(g) for g in jax.tree.leaves(grads))
    names = ('dino_global', 'dino_local', 'ibot', 'koleo', 'gram')
    assert float(total) == pytest.approx(float(sum(terms[k] for k in names)), rel=1e-5)
    tokens = method.vit.apply(
        {'params': params['backbone']}, crops.reshape(16, 32, 32, 3), mask=mask.reshape(16, 16)
    )['patch_tokens']
    anchor = gram.targets(method.vit, extra['gram'], plain.reshape(16, 64, 64, 3), 4)
    want = 2 * float(gram.loss(tokens, anchor))
    assert float(terms['gram']) == pytest.approx(want, rel=1e-4) and want > 1e-3


def test_the_copy_is_replaced_by_the_moving_average_at_its_steps():
    _, method = made(method__gram_every=2, method__gram_updates=1)
    params, extra = jax.jit(method.init)(jax.random.key(0))
    moved = jax.tree.map(lambda p: p + 1, params)
    seen = []
    for step in range(4):
        before = extra
        extra = method.after_update(moved, extra, jnp.int32(step))
        seen.append(equal(extra['gram'], before['gram']))
        if step == 1:
            assert equal(extra['gram'], extra['teacher']['backbone'])
    assert seen == [True, False, True, True]


def test_runs_without_it_have_no_copy_and_exports_never_have_it():
    _, method = made()
    params, extra = method.init(jax.random.key(0))
    assert 'gram' in extra and 'gram' not in methods.make(tiny.dinov2()).init(jax.random.key(0))[1]
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
    saved = train.checkpoint.Checkpointer(workdir / 'checkpoints')
    with jax.set_mesh(program.mesh):
        return start.first_state(config, method, program, saved, None)[0]


def test_a_stage_starts_with_the_whole_run_and_anchors_to_its_teacher(tmp_path, capsys):
    config = tiny.dinov2()
    tiny.save(config, tmp_path / 'run', seed=3)
    run = weights.open_run(tmp_path / 'run')
    stage = tiny.dinov2(**ON, init_from=str(tmp_path / 'run'), method__gram_every=3)
    state = first_state(stage, tmp_path / 'stage')
    assert equal(run.params, state.params)  # heads and prototypes too
    assert equal(run.extra['teacher'], state.extra['teacher'])
    assert equal(run.extra['teacher']['backbone'], state.extra['gram'])
    said = capsys.readouterr().out
    assert 'frozen teacher of this start, replaced after steps 3, 6\n' in said
    assert 'random weights' not in said


def test_the_frozen_teacher_may_be_another_run_and_no_run_is_one_sentence(tmp_path):
    tiny.save(tiny.dinov2(), tmp_path / 'run', seed=3)
    tiny.save(tiny.dinov2(), tmp_path / 'early', seed=4)
    fields = {**ON, 'init_from': str(tmp_path / 'run')}
    stage = tiny.dinov2(**fields, method__gram_from=str(tmp_path / 'early'))
    state = first_state(stage, tmp_path / 'stage')
    early = weights.open_run(tmp_path / 'early').extra['teacher']['backbone']
    assert equal(early, state.extra['gram'])
    with pytest.raises(ValueError, match='nowhere'):
        first_state(tiny.dinov2(**fields, method__gram_from=str(tmp_path / 'nowhere')), tmp_path)


def test_a_copy_of_random_weights_is_named(tmp_path, capsys):
    first_state(tiny.dinov2(**ON), tmp_path)
    assert 'a copy of random weights anchors nothing; give init_from' in capsys.readouterr().out


def test_a_later_stage_without_it_takes_all_but_the_copy(tmp_path):
    tiny.save(tiny.dinov2(**ON), tmp_path / 'stage', seed=3)
    run = weights.open_run(tmp_path / 'stage')
    state = first_state(tiny.dinov2(init_from=str(tmp_path / 'stage')), tmp_path / 'later')
    assert 'gram' not in state.extra and equal(run.params, state.params)
    assert equal(run.extra['teacher'], state.extra['teacher'])


@pytest.mark.slow
def test_a_restart_before_an_update_of_the_copy_ends_on_the_same_bits(tmp_path):
    tiny.save(tiny.dinov2(), tmp_path / 'run', seed=3)
    fields = {**ON, 'total_steps': 6, 'method__gram_every': 4, 'init_from': str(tmp_path / 'run')}
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


def test_the_repair_takes_network_and_losses_of_the_run_and_its_own_stage(tmp_path):
    run = tiny.dinov2(method__teacher_temp=0.03, method__momentum_teacher=0.9)
    tiny.save(run, tmp_path / 'run')
    fields = [f'init_from={tmp_path / "run"}', 'data.train.source=scenes', 'data.train.n=64']
    config = config_lib.load('repair_dinov2', [*fields, 'method.flip=0.1', 'data.train.size=32'])
    source = train.sources.open_source(config.data.train)
    m = start.complete(config, source).method
    own = ('flip', 'momentum_teacher', 'final_momentum_teacher', 'gram_weight', 'gram_every')
    own += ('group_size',)
    for name in set(m) - {*own}:
        assert m[name] == run.method[name], name
    assert [m[name] for name in own] == [0.1, 0.999, 0.999, 2.0, 2500, 16]


def test_a_size_that_is_given_is_not_taken_from_the_weights(tmp_path):
    tiny.save(tiny.config(), tmp_path / 'mae')
    load = [f'init_from={tmp_path / "mae"}']
    found = start.follow(config_lib.load('repair_dinov2', load)).method
    assert (found.embed_dim, found.patch_size, found.img_size) == (32, 8, 32)
    given = start.follow(config_lib.load('repair_dinov2', [*load, 'method.size=S'])).method
    assert (given.embed_dim, given.patch_size) == (384, None)


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
