# SPDX-License-Identifier: Apache-2.0
"""QB-Heat: what predicts what, powers of the operators, what the encoder may see."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from ssl_jax import config as config_lib
from ssl_jax import methods
from ssl_jax.methods import qb_heat

# One compilation each instead of one per operation.
quarters = jax.jit(qb_heat.quarters, static_argnums=1)
powers = jax.jit(qb_heat.powers, static_argnums=1)
extrapolate = jax.jit(qb_heat.extrapolate, static_argnums=3)


@pytest.fixture(scope='module')
def method():
    c = tiny.base('qb_heat')
    c.method.update(depth=1, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2)
    return methods.make(config_lib.lock(c))  # 4x4 patches of 8 px


@pytest.fixture(scope='module')
def params(method):
    return jax.jit(method.init)(jax.random.key(0))[0]


def matrices(size=6, scale=0.3):
    return (scale * np.random.default_rng(0).normal(size=(4, size, size))).astype(np.float32)


@pytest.mark.parametrize('side', [2, 6, 16])
def test_wherever_the_block_is_each_other_patch_is_predicted_once(side):
    corners = np.indices((side // 2 + 1,) * 2).reshape(2, -1).T
    order = np.asarray(quarters(corners, side))
    assert order.shape == (len(corners), side**2)
    np.testing.assert_array_equal(np.sort(order), np.broadcast_to(np.arange(side**2), order.shape))


def test_a_patch_of_a_corner_block_predicts_those_half_an_image_away():
    order = np.asarray(quarters(np.zeros((1, 2), int), 16)).reshape(4, 8, 8)
    found = [divmod(int(i), 16) for i in order[:, 3, 2]]
    assert found == [(3, 2), (3, 10), (11, 2), (11, 10)]


@pytest.mark.parametrize('steps', [1, 2, 5, 8, 11])
def test_a_power_is_repeated_application_up_to_the_length_of_the_identity(steps):
    found = np.asarray(powers(matrices(), steps))
    for a, move in zip(matrices().astype(np.float64), found, strict=True):
        want = np.eye(6)
        for _ in range(steps):
            want = want + want @ a
        want *= 6**0.5 / np.linalg.norm(want)
        np.testing.assert_allclose(move, want, rtol=1e-4, atol=1e-5)


def test_no_operator_makes_its_power_or_their_gradients_overflow():
    def entry(operators):
        moves = qb_heat.powers(operators, 32)
        return moves[:, 0, 0].sum(), moves

    grad, moves = jax.jit(jax.grad(entry, has_aux=True))(matrices(scale=1e6))
    assert np.isfinite(grad).all()
    np.testing.assert_allclose(np.linalg.norm(moves, axis=(1, 2)), 6**0.5, 1e-5)


def test_operators_of_zero_predict_what_is_visible():
    z = np.random.default_rng(0).normal(size=(2, 4, 6)).astype(np.float32)
    moves = powers(np.zeros((4, 6, 6), np.float32), 2)
    block = quarters(np.array([[0, 1], [2, 1]]), 4)[:, :4]
    out = extrapolate(z, moves, block, 4)
    np.testing.assert_allclose(out, np.tile(z, (1, 4, 1)), rtol=1e-6)


def test_each_patch_moves_in_the_direction_of_its_target_and_diagonally_by_both_orders():
    moves, z = matrices(), np.random.default_rng(1).normal(size=(1, 9, 6)).astype(np.float32)
    order = np.asarray(quarters(np.array([[1, 2]]), 6))  # across both middle lines
    found = np.asarray(extrapolate(z, moves, order[:, :9], 6))
    places = np.stack(np.divmod(order[0].reshape(4, 9), 6), axis=-1)
    sides = set()
    for n, (here, beside, below, both) in enumerate(places.transpose(1, 0, 2)):
        x = moves[qb_heat.RIGHT if beside[1] > here[1] else qb_heat.LEFT]
        y = moves[qb_heat.DOWN if below[0] > here[0] else qb_heat.UP]
        assert tuple(both) == (below[0], beside[1])
        sides.add((beside[1] > here[1], below[0] > here[0]))
        want = [z[0, n], z[0, n] @ x, z[0, n] @ y, z[0, n] @ (x @ y + y @ x) / 2]
        np.testing.assert_allclose(found[0, n::9], want, rtol=1e-4, atol=1e-6)
    assert len(sides) == 4


def test_gradients_reach_all_four_operators_from_the_first_step(method, params):
    images = np.random.default_rng(0).integers(0, 256, (8, 1, 32, 32, 3)).astype(np.uint8)
    batch = {'image': images, 'row': jnp.arange(8)}
    args = (params, {}, batch, jax.random.key(1), jnp.int32(0))
    grads, (_, metrics) = jax.jit(jax.grad(method.loss, has_aux=True))(*args)
    assert (np.abs(grads['operators']).max(axis=(1, 2)) > 1e-6).all()
    assert metrics['operators'] == 0


def test_the_hidden_three_quarters_change_no_prediction(method, params):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(3, 32, 32, 3)).astype(np.float32)
    mask = jax.jit(method.mask)(jax.random.split(jax.random.key(1), 3))
    hidden = np.asarray(mask.mask).reshape(3, 4, 4).repeat(8, axis=1).repeat(8, axis=2)[..., None]
    assert (hidden.mean(axis=(1, 2)) == 0.75).all()
    operators = 0.1 * rng.normal(size=(4, 32, 32)).astype(np.float32)
    forward, params = jax.jit(method.forward), {**params, 'operators': operators}
    found = np.asarray(forward(params, images, mask))
    np.testing.assert_array_equal(found, forward(params, images + 9 * hidden, mask))
    assert np.abs(found - forward(params, images + 9 * (1 - hidden), mask)).max() > 1e-3


def test_of_a_painted_mask_the_block_with_fewest_painted_patches_is_shown(method, params):
    images = np.random.default_rng(0).integers(0, 256, (1, 32, 32, 3)).astype(np.uint8)
    painted = np.ones((4, 4), bool)
    painted[1:3, 2:] = [[False, False], [False, True]]
    order = np.argsort(painted.reshape(1, -1), axis=1, kind='stable')
    made = jax.jit(method.reconstruct_hidden, static_argnums=4)(params, {}, images, order, 3)
    grey = np.asarray(made['masked'] == 0.5).all(axis=-1)[0, ::8, ::8]
    want = np.ones((4, 4), bool)
    want[1:3, 2:] = False
    np.testing.assert_array_equal(grey, want)


def test_an_odd_grid_is_refused_with_an_image_size_that_works(method):
    run = config_lib.default()
    [message] = dataclasses.replace(method, img_size=56).check(run)
    assert 'img_size=56 has 7 patches per side' in message and 'use img_size=64' in message
    assert not list(dataclasses.replace(method, img_size=64).check(run))


@pytest.mark.parametrize('side', [28, 60, 100, 700])
def test_an_inferred_run_has_an_even_grid(side):
    c, _ = config_lib.infer(config_lib.load('images_qb_heat'), 500, (side, side), 'cpu', 1, 2)
    assert c.method.img_size % (2 * c.method.patch_size) == 0
