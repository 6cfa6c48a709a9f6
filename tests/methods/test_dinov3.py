# SPDX-License-Identifier: Apache-2.0
"""What DINOv3 does otherwise than DINOv2 in training."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from ssl_jax import config as config_lib
from ssl_jax import methods, optim
from ssl_jax.models import vit as vit_lib
from ssl_jax.run import clock as clock_lib

CLOCK = clock_lib.Clock(total=8, warmup=2, batch_size=16, num_examples=64)


def make(**fields):
    fields = {f'method__{k}': x for k, x in fields.items()}
    return methods.make(tiny.dinov2('dinov3', method__drop_path=0.0, **fields), CLOCK)


def seen(method, monkeypatch):
    """{'student', 'teacher': pos_scale in one loss}."""
    params, extra = jax.eval_shape(method.init, jax.random.key(0))
    scales, apply = [], vit_lib.ViT.apply

    def spy(self, variables, images, **kw):
        scales.append(('student' if isinstance(images, tuple) else 'teacher', kw.get('pos_scale')))
        return apply(self, variables, images, **kw)

    monkeypatch.setattr(vit_lib.ViT, 'apply', spy)
    batch = {
        v.name: jax.ShapeDtypeStruct((16, v.count, v.size, v.size, 3), jnp.uint8)
        for v in method.views()
    }
    batch['row'] = jax.ShapeDtypeStruct((16,), jnp.int32)
    rng = jax.eval_shape(lambda: jax.random.key(1))
    jax.eval_shape(lambda *args: method.loss(*args, 0)[0], params, extra, batch, rng)
    return dict(scales)


def test_the_student_sees_a_random_scale_of_positions_and_the_teacher_none(monkeypatch):
    scales = seen(make(), monkeypatch)
    assert set(scales) == {'student', 'teacher'}
    assert scales['teacher'] is None and scales['student'].shape == ()
    assert make(rope_rescale=1.0).pos_scale(jax.random.key(0)) is None


def test_the_scale_is_log_uniform_between_its_limits_and_of_the_step_alone():
    method = make(rope_rescale=3.0)
    draws = np.log([float(method.pos_scale(jax.random.key(i))) for i in range(200)])
    assert np.abs(draws).max() <= np.log(3) and np.abs(draws.mean()) < 0.2
    assert np.std(draws) == pytest.approx(2 * np.log(3) / 12**0.5, rel=0.1)
    again = np.log(float(method.pos_scale(jax.random.key(7))))
    assert again == draws[7]


def test_the_local_term_alone_has_the_local_weight():
    assert make(local_weight=0.5, dino_weight=2.0).dino_weights == (2.0, 1.0)
    assert methods.make(tiny.dinov2(method__dino_weight=2.0)).dino_weights == (2.0, 2.0)


def test_prototypes_are_a_plain_matrix_on_unit_vectors():
    method = make()
    head = method.dino_head
    params = jax.jit(head.init)(jax.random.key(0), jnp.zeros((1, 32)))['params']
    assert set(params['last_layer']) == {'weight'}
    assert params['last_layer']['weight'].shape == (16, 64)
    x = jax.random.normal(jax.random.key(1), (3, 32))
    a = head.apply({'params': params}, x)
    doubled = {**params, 'last_layer': {'weight': 2 * params['last_layer']['weight']}}
    np.testing.assert_allclose(head.apply({'params': doubled}, x), 2 * a, rtol=1e-6)
    assert np.abs(a).max() <= np.linalg.norm(params['last_layer']['weight'], axis=0).max()


def test_a_size_brings_its_ffn_and_a_field_overrides_it():
    def vit(*fields):
        return methods.make(config_lib.load('continue_dinov3_vits16', fields)).vit

    assert (vit().ffn, vit().mlp_ratio, vit().num_heads) == ('mlp', 4.0, 6)
    plus, seven = vit('method.size=S+'), vit('method.size=7B')
    assert (plus.ffn, plus.mlp_ratio, plus.embed_dim) == ('swiglu', 6.0, 384)
    assert (seven.ffn, seven.mlp_ratio, seven.num_heads) == ('swiglu', 3.0, 32)
    assert vit('method.size=S+', 'method.mlp_ratio=4').mlp_ratio == 4.0
    assert vit('method.size=S+', 'method.ffn=mlp').ffn == 'mlp'
    with pytest.raises(ValueError, match='S\\+'):
        config_lib.load('scenes_mae', ('method.size=S+',))


def test_heads_that_cannot_be_turned_are_refused_with_what_to_type():
    with pytest.raises(ValueError, match='method.embed_dim=36 .* a multiple of 4: use embed_dim='):
        config_lib.load('scenes_dinov3', ('method.embed_dim=36', 'method.num_heads=6'))


def test_rate_decay_and_momentum_of_the_continued_run_are_constant():
    config = config_lib.load('continue_dinov3_vits16')
    clock = clock_lib.Clock(total=20_000, warmup=2000, batch_size=256, num_examples=10_000)
    schedule, method = optim.schedule(config, clock), methods.make(config, clock)
    late = [schedule(step) for step in (2000, 9000, 19_999)]
    assert {float(x['lr']) for x in late} == {2e-4}
    assert {float(x['weight_decay']) for x in late} == {0.04}
    rates = [float(method.ema_rate(s)) for s in (0, 9000, 19_999)]
    np.testing.assert_allclose(rates, 1 - 0.994, rtol=1e-6)
