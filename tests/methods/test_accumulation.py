# SPDX-License-Identifier: Apache-2.0
"""What a method keeps in `extra` moves once per step, as if the batch were whole."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from ssl_jax import methods, optim
from ssl_jax import step as step_lib
from ssl_jax.run import clock as clock_lib

# Nothing that compares the images of a batch, and masks that are a function of the row alone.
ALONE = dict(method__group_size=1, method__koleo_weight=0.0, method__drop_path=0.0)


def run(config, accum_steps, method=None, steps=2):
    """(extra, metrics) after `steps` steps on the same 16 rows, whatever the micro-batches."""
    method = method or methods.make(config, clock_lib.Clock.of(config))
    params, extra = jax.jit(method.init)(jax.random.key(0))
    if 'prepared' in extra:
        extra['word_frequency'] = jnp.full(method.vocab, 1 / method.vocab)
    tx, _ = optim.make(config.optim, params)
    schedule = optim.schedule(config, method.clock)
    step = jax.jit(step_lib.make_step(method, tx, schedule, seed=0, accum_steps=accum_steps))
    rng = np.random.default_rng(0)
    batch = {
        v.name: rng.integers(0, 255, (16, v.count, v.size, v.size, 3), np.uint8)
        for v in method.views()
    }
    state = step_lib.TrainState.create(params, extra, tx)
    for _ in range(steps):
        state, metrics = step(state, batch)
    return state.extra, metrics


def same(whole, parts, *names):
    for name in names:
        assert np.abs(whole[name]).max() > 0.001
        np.testing.assert_allclose(parts[name], whole[name], rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.slow
def test_both_centres_of_dinov2_move_as_with_the_whole_batch():
    config = tiny.dinov2(**ALONE)
    whole, parts = run(config, 1)[0], run(config, 4)[0]
    assert sorted(parts) == ['dino_center', 'ibot_center', 'teacher']
    same(whole, parts, 'dino_center', 'ibot_center')
    for a, b in zip(*map(jax.tree.leaves, (whole['teacher'], parts['teacher'])), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.slow
def test_the_centres_of_a_distilled_student_move_as_with_the_whole_batch():
    sizes = dict(method__teacher_size=None, method__teacher_embed_dim=32, method__teacher_depth=1)
    config = tiny.dinov2('dinov2_distill', **ALONE, **sizes, method__teacher_num_heads=2)
    same(run(config, 1, steps=1)[0], run(config, 2, steps=1)[0], 'dino_center', 'ibot_center')


@pytest.mark.slow
def test_the_frequencies_of_words_move_as_with_the_whole_batch():
    fields = dict(method__vocab=64, method__decoder_depth=1, method__w_nce=0.0)
    config = tiny.changed(tiny.base('splitmask'), fields)
    whole, parts = run(config, 1, steps=1)[0], run(config, 4, steps=1)[0]
    assert np.abs(whole['word_frequency'] - 1 / 64).max() > 1e-4
    np.testing.assert_allclose(parts['word_frequency'], whole['word_frequency'], atol=1e-7)


@pytest.mark.parametrize('accum_steps', [1, pytest.param(2, marks=pytest.mark.slow), 4])
def test_a_change_is_the_mean_over_micro_batches_and_is_made_once(accum_steps):
    config = tiny.config()
    mae = methods.make(config, clock_lib.Clock.of(config))

    @dataclasses.dataclass(frozen=True)
    class Counts(type(mae)):
        def init(self, rng):
            return super().init(rng)[0], {'steps': jnp.zeros(()), 'row': jnp.zeros(())}

        def loss(self, params, extra, batch, rng, step):
            loss, (_, metrics) = super().loss(params, extra, batch, rng, step)
            row = batch['row'].astype(jnp.float32).mean()
            return loss, ({'seen': extra['steps'] + 1, 'row': row}, metrics)

        def after_update(self, params, extra, step):
            extra = dict(extra)
            steps = extra.pop('seen')
            return {**extra, 'steps': steps}

    method = Counts(**{f.name: getattr(mae, f.name) for f in dataclasses.fields(mae)})
    extra, _ = run(config, accum_steps, method, steps=3)
    assert {k: float(v) for k, v in extra.items()} == {'steps': 3, 'row': 7.5}
