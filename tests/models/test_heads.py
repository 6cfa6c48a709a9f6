# SPDX-License-Identifier: Apache-2.0
"""Projection heads: sizes, starting values, precision, and where prototypes live on a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from jax.sharding import PartitionSpec as P

from ssl_jax import sharding
from ssl_jax.models import heads

HEAD = heads.DINOHead(48, hidden_dim=64, bottleneck_dim=16)


def init(head, dim=32):
    return head.init(jax.random.key(0), jnp.zeros((1, dim)))['params']


@pytest.mark.parametrize(
    'prototypes,bottleneck,dim,count',
    [
        (65536, 256, 1024, 23_662_848),
        (131072, 384, 1024, 57_545_088),
        (131072, 384, 1536, 58_593_664),
    ],
)
def test_official_heads_have_the_official_number_of_parameters(prototypes, bottleneck, dim, count):
    head = heads.DINOHead(prototypes, bottleneck_dim=bottleneck)
    shapes = jax.eval_shape(lambda: init(head, dim))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == count


def test_starting_values_are_the_official_ones():
    params = init(heads.DINOHead(512, hidden_dim=256, bottleneck_dim=64))
    for name in ('mlp_0', 'mlp_2', 'mlp_4'):
        assert float(params[name]['kernel'].std()) == pytest.approx(0.02, rel=0.05)
        assert not np.any(params[name]['bias'])
    v = params['last_layer']['weight_v']
    assert float(jnp.abs(v).max()) <= 64**-0.5
    assert float(v.std()) == pytest.approx(64**-0.5 / 3**0.5, rel=0.02)
    np.testing.assert_array_equal(params['last_layer']['weight_g'], np.ones((1, 512)))


def test_logits_are_magnitudes_times_cosines():
    params = init(HEAD)
    params['last_layer']['weight_g'] = jnp.full((1, 48), 3.0)
    scaled = {**params['last_layer'], 'weight_v': 7 * params['last_layer']['weight_v']}
    x = jax.random.normal(jax.random.key(1), (200, 32))
    logits = HEAD.apply({'params': params}, x)
    assert 1 < float(jnp.abs(logits).max()) <= 3
    again = HEAD.apply({'params': {**params, 'last_layer': scaled}}, x)
    np.testing.assert_allclose(again, logits, rtol=1e-5, atol=1e-6)


def test_class_and_patch_tokens_may_go_through_in_one_call():
    params = {'params': init(HEAD)}
    cls = jax.random.normal(jax.random.key(1), (5, 2, 32))
    patches = jax.random.normal(jax.random.key(2), (5, 9, 32))
    both = HEAD.apply(params, jnp.concatenate([cls, patches], axis=1))
    np.testing.assert_allclose(both[:, :2], HEAD.apply(params, cls), atol=1e-6)
    np.testing.assert_allclose(both[:, 2:], HEAD.apply(params, patches), atol=1e-6)


def test_a_token_of_zeros_gives_finite_logits_and_gradients():
    params = init(HEAD)
    grads = jax.grad(lambda p: HEAD.apply({'params': p}, jnp.zeros((1, 32))).sum())(params)
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads))


def test_a_bfloat16_head_has_float32_logits_and_gradients_near_the_full_ones():
    params = init(HEAD)
    x = jax.random.normal(jax.random.key(1), (64, 32))
    cotangent = jax.random.normal(jax.random.key(2), (64, 48))

    def run(head):
        def value(params):
            logits = head.apply({'params': params}, x)
            assert logits.dtype == jnp.float32
            return (logits * cotangent).sum(), logits

        return jax.grad(value, has_aux=True)(params)

    full, half = run(HEAD), run(HEAD.clone(dtype=jnp.bfloat16))
    np.testing.assert_allclose(half[1], full[1], atol=0.02)
    # Products in bfloat16 must not round the logits themselves to bfloat16.
    assert np.any(half[1] != half[1].astype(jnp.bfloat16).astype(jnp.float32))
    for a, b in zip(jax.tree.leaves(half[0]), jax.tree.leaves(full[0]), strict=True):
        assert a.dtype == jnp.float32
        assert float(jnp.abs(a - b).max()) < 0.05 * float(jnp.abs(b).max())


def test_no_matrix_product_of_a_bfloat16_head_has_a_float32_factor():
    head, params = HEAD.clone(dtype=jnp.bfloat16), init(HEAD)
    loss = jax.grad(lambda p, x: jnp.square(head.apply({'params': p}, x)).sum(), argnums=(0, 1))
    products = []

    def collect(jaxpr):
        for e in jaxpr.eqns:
            if e.primitive.name == 'dot_general':
                products.append([v.aval for v in e.invars])
            for sub in core.jaxprs_in_params(e.params):
                collect(sub)

    collect(jax.make_jaxpr(loss)(params, jnp.zeros((8, 32))).jaxpr)
    products = [pair for pair in products if all(a.ndim == 2 for a in pair)]
    assert len(products) >= 12
    assert all(a.dtype == jnp.bfloat16 for pair in products for a in pair)


def test_prototypes_are_split_over_the_tensor_axis():
    mesh = {'data': 2, 'fsdp': 2, 'tensor': 2}
    for where in ('dino_head', 'teacher/ibot_head', 'opt_state/mu/dino_head'):
        spec = sharding.spec_for(f'{where}/last_layer/weight_v', (384, 131072), mesh)
        assert spec == P('fsdp', 'tensor')
        spec = sharding.spec_for(f'{where}/last_layer/weight_g', (1, 131072), mesh)
        assert spec == P(None, 'tensor')
    only_fsdp = {'data': 1, 'fsdp': 8, 'tensor': 1}
    assert sharding.spec_for('h/last_layer/weight_v', (384, 131072), only_fsdp) == P(None, 'fsdp')


def test_flops_of_a_token_count_every_matrix():
    assert heads.flops_per_token(HEAD, 32) == 2 * (32 * 64 + 64 * 64 + 64 * 16 + 16 * 48)
    flat = heads.DINOHead(20, bottleneck_dim=8, num_layers=1)
    assert heads.flops_per_token(flat, 32) == 2 * (32 * 8 + 8 * 20)
