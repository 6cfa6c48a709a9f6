# SPDX-License-Identifier: Apache-2.0
"""Losses of self-distillation: known values, padding, pairs, and any number of devices."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden import ibot_weights
from ssl_jax import sharding
from ssl_jax.models import heads
from ssl_jax.objectives import losses


def waves(rows, cols, phase):
    """The deterministic matrix of the known values, sin(1.7 i + 0.9 j + 0.3 i j + phase)."""
    i, j = np.arange(rows)[:, None], np.arange(cols)[None]
    return jnp.asarray(np.sin(1.7 * i + 0.9 * j + 0.3 * i * j + phase), jnp.float32)


def normal(shape, seed=0, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


# Known values: the official DINOv2 modules on `waves`, teacher temperature 0.07.

TEACHER, STUDENT = waves(6, 8, 0), waves(6, 8, 0.5)


def test_sinkhorn_of_the_known_matrix():
    q = losses.sinkhorn_knopp(TEACHER, 0.07)
    np.testing.assert_allclose(
        q[0], [0, 0.440815, 0.558933, 0.000251, 1e-6, 0, 0, 1e-6], atol=1.1e-6
    )
    columns = [0.92054, 0.83583, 0.791029, 0.500878, 0.653136, 1.066542, 0.731191, 0.500853]
    np.testing.assert_allclose(q.sum(axis=0), columns, atol=1e-6)


def test_cross_entropy_of_the_known_matrix():
    q = losses.sinkhorn_knopp(TEACHER, 0.07)
    assert float(losses.cross_entropy(q, STUDENT, 0.1).mean()) == pytest.approx(2.9317577, abs=2e-6)


def test_patch_loss_of_the_known_matrix():
    mask = np.zeros((4, 4), bool)
    mask[0, :2] = mask[2] = True
    weights = np.asarray(ibot_weights(jnp.asarray(mask)))[mask]
    np.testing.assert_array_equal(weights, [0.5, 0.5, 0.25, 0.25, 0.25, 0.25])
    q = losses.sinkhorn_knopp(TEACHER, 0.07)
    loss = losses.ibot_loss(q, STUDENT, jnp.asarray(weights), len(mask))
    assert float(loss) == pytest.approx(1.4721146, abs=2e-6)


def test_koleo_of_the_known_matrix():
    assert float(losses.koleo(waves(5, 4, 0))) == pytest.approx(-0.1364126, abs=2e-6)


def test_centring_of_the_known_matrix():
    p = losses.softmax_center(TEACHER, jnp.zeros(8), 0.07)
    np.testing.assert_allclose(
        p[0], [1e-6, 0.06168, 0.937936, 0.000382, 0, 0, 0, 1e-6], atol=1.1e-6
    )
    center = losses.update_center(jnp.zeros(8), losses.mean_rows(TEACHER))
    want = [0.018382, 0.002069, 0.010078, 0.00385, -0.011013, 0.000193, -0.014899, 0.001488]
    np.testing.assert_allclose(center, want, atol=1e-6)


# Values at iteration 0 and after a collapse.


@pytest.mark.parametrize(
    'prototypes,bottleneck,local,glob',
    [
        (65536, 256, 10.0317, 1.2540),
        pytest.param(131072, 384, 10.5900, 1.3237, marks=pytest.mark.slow),
    ],
)
def test_a_fresh_head_under_sinkhorn_starts_at_log_k_plus_fifty_over_bottleneck(
    prototypes, bottleneck, local, glob
):
    """Features of different images share most of their direction, as a fresh encoder's do."""
    head = heads.DINOHead(prototypes, hidden_dim=64, bottleneck_dim=bottleneck)
    dim, batch, num_local = 32, 4, 8
    tokens = normal((1, 1, dim)) + 0.1 * normal((2 + num_local, batch, dim), seed=1)
    mask = jnp.arange(2 * batch) < batch

    @jax.jit
    def terms(params, tokens):
        logits = head.apply(params, tokens)
        targets = losses.sinkhorn_knopp(logits[:2].reshape(2 * batch, -1), 0.04)
        targets = targets.reshape(2, batch, -1)
        patch = losses.ibot_loss(targets, logits[:2], mask.reshape(2, batch), 2 * batch)
        return *losses.dino_loss(targets, logits[:2], logits[2:]), patch

    params = head.init(jax.random.key(0), jnp.zeros((1, dim)))
    got = terms(params, tokens)
    assert float(got[0]) == pytest.approx(glob, rel=0.01)
    assert float(got[1]) == pytest.approx(local, rel=0.01)
    # Half of the crops masked: half of the same cross-entropy.
    want = (math.log(prototypes) + 50 / bottleneck) / 2
    assert float(got[2]) == pytest.approx(want, rel=0.01)


def test_a_uniform_collapse_stands_at_log_k_and_a_constant_one_at_zero():
    k = 65536
    uniform = jnp.zeros((10, 3, k))
    targets = losses.sinkhorn_knopp(uniform[:2].reshape(6, k), 0.07).reshape(2, 3, k)
    terms = losses.dino_loss(targets, uniform[:2], uniform[2:])
    np.testing.assert_allclose(terms, (1.2323, 9.858), rtol=1e-4)
    constant = uniform.at[..., 7].set(10.0)
    targets = losses.softmax_center(constant[:2], 0, 0.07)
    assert float(sum(losses.dino_loss(targets, constant[:2], constant[2:]))) < 1e-6


# Sinkhorn-Knopp.


def textbook_sinkhorn(logits, temp, num_iters=3):
    """The algorithm step by step in float64, (K, n) as in the paper."""
    q = np.exp(np.asarray(logits, np.float64) / temp).T
    k, n = q.shape
    q /= q.sum()
    for _ in range(num_iters):
        q /= q.sum(axis=1, keepdims=True) * k
        q /= q.sum(axis=0, keepdims=True) * n
    return (q * n).T


@pytest.mark.parametrize('num_iters', [1, 3, 10])
def test_sinkhorn_equals_the_textbook(num_iters):
    logits = normal((20, 12), scale=0.2)
    q = losses.sinkhorn_knopp(logits, 0.05, num_iters=num_iters)
    np.testing.assert_allclose(q, textbook_sinkhorn(logits, 0.05, num_iters), rtol=2e-5)


def test_sinkhorn_among_padding_equals_sinkhorn_without_it():
    logits = normal((20, 12), scale=0.2)
    valid = jnp.asarray(np.random.default_rng(3).permutation(20) < 13)
    padded = jnp.where(valid[:, None], logits, jnp.inf)
    q = jax.jit(losses.sinkhorn_knopp)(padded, 0.05, valid)
    np.testing.assert_allclose(q[valid], losses.sinkhorn_knopp(logits[valid], 0.05), rtol=1e-5)
    assert not np.any(q[~valid])


def test_sinkhorn_survives_logits_that_overflow_an_exponential():
    q = losses.sinkhorn_knopp(normal((20, 12), scale=100), 0.01)
    assert np.all(np.isfinite(q))
    np.testing.assert_allclose(q.sum(axis=1), 1, rtol=1e-5)


def test_sinkhorn_of_no_rows_at_all_is_zero():
    q = losses.sinkhorn_knopp(normal((4, 3)), 0.05, jnp.zeros(4, bool))
    np.testing.assert_array_equal(q, np.zeros((4, 3)))


def test_half_precision_logits_are_balanced_in_float32():
    logits = normal((20, 12), scale=0.2).astype(jnp.bfloat16)
    q = losses.sinkhorn_knopp(logits, 0.05)
    np.testing.assert_allclose(q, losses.sinkhorn_knopp(logits.astype(jnp.float32), 0.05))
    assert q.dtype == jnp.float32


# Centre.


def test_the_mean_of_rows_leaves_out_those_that_do_not_exist():
    x = normal((4, 5, 3))
    valid = jnp.asarray(np.random.default_rng(0).random((4, 5)) < 0.5)
    np.testing.assert_allclose(losses.mean_rows(x, valid), np.asarray(x)[valid].mean(0), rtol=1e-5)
    assert not np.any(losses.mean_rows(x, jnp.zeros((4, 5), bool)))


def test_sums_of_rows_of_uneven_parts_have_the_mean_of_the_whole():
    x = normal((4, 5, 3))
    valid = jnp.arange(20).reshape(4, 5) < 7  # five, two, none and none
    parts = [losses.sum_rows(*part) for part in zip(x, valid, strict=True)]
    mean = jax.tree.map(lambda *values: sum(values) / 4, *parts)
    np.testing.assert_allclose(
        losses.mean_of(mean), losses.mean_rows(x, valid), rtol=1e-6, atol=1e-7
    )
    few = jax.tree.map(lambda value: value / 10, parts[1])  # 0.2 rows per part
    np.testing.assert_allclose(losses.mean_of(few), losses.mean_of(parts[1]), rtol=1e-6)


# Pairs.


@pytest.mark.parametrize('num_local', [0, 1, 3])
def test_the_dino_loss_is_the_mean_over_all_pairs_of_different_crops(num_local):
    targets = jax.nn.softmax(normal((2, 5, 7)))
    student = normal((2 + num_local, 5, 7), seed=1)
    pairs = [
        losses.cross_entropy(targets[t], student[s], 0.1).mean()
        for s in range(2 + num_local)
        for t in range(2)
        if s != t
    ]
    terms = losses.dino_loss(targets, student[:2], student[2:])
    assert float(sum(terms)) == pytest.approx(float(np.mean(pairs)), rel=1e-6)
    assert float(terms[0]) == pytest.approx(float(pairs[0] + pairs[1]) / len(pairs), rel=1e-6)


def test_without_local_crops_none_and_an_empty_array_are_the_same():
    targets, student = jax.nn.softmax(normal((2, 5, 7))), normal((2, 5, 7), seed=1)
    for terms in (
        losses.dino_loss(targets, student),
        losses.dino_loss(targets, student, student[:0]),
    ):
        want = losses.cross_entropy(targets[::-1], student, 0.1).mean()
        assert [float(t) for t in terms] == pytest.approx([float(want), 0])


def test_one_global_view_is_refused():
    with pytest.raises(ValueError, match='pairs 2 global views, got 1 of the teacher'):
        losses.dino_loss(normal((1, 5, 7)), normal((2, 5, 7)))


def test_no_gradient_reaches_the_teacher():
    def loss(teacher, student, koleo_rows):
        center = losses.update_center(jnp.zeros(7), losses.mean_rows(teacher))
        a = losses.softmax_center(teacher, center, 0.05)
        b = losses.sinkhorn_knopp(teacher.reshape(10, 7), 0.05).reshape(teacher.shape)
        c = losses.ibot_loss(teacher, student, jnp.ones((2, 5)), 2)
        return sum(losses.dino_loss(a + b + teacher, student)) + c + losses.koleo(koleo_rows)

    grads = jax.grad(loss, argnums=(0, 1, 2))(
        *[normal((2, 5, 7), s) for s in (0, 1)], normal((4, 3))
    )
    assert not np.any(grads[0])
    assert np.any(grads[1]) and np.any(grads[2])


def test_log_softmax_of_half_precision_logits_is_in_float32():
    targets = jax.nn.softmax(normal((4, 4096)))
    logits = normal((4, 4096), seed=1, scale=0.1).astype(jnp.bfloat16)
    want = losses.cross_entropy(targets, logits.astype(jnp.float32), 0.1)
    np.testing.assert_array_equal(losses.cross_entropy(targets, logits, 0.1), want)


# KoLeo.


def test_koleo_without_a_neighbour_is_refused():
    with pytest.raises(ValueError, match='keeps rows apart from each other: pass 2 or more, not 1'):
        losses.koleo(normal((1, 3)))


def test_equal_rows_stay_finite_also_where_the_input_is_float16():
    x = normal((6, 64)).at[1].set(normal((6, 64))[0]).astype(jnp.float16)
    value, grad = jax.value_and_grad(losses.koleo)(x)
    assert np.isfinite(value) and np.all(np.isfinite(grad))


def test_koleo_pushes_the_two_nearest_rows_apart():
    x = jnp.asarray([[1.0, 0.0], [0.99, 0.1], [-1.0, 0.3], [0.0, -1.0]])
    grad = jax.grad(losses.koleo)(x)
    assert float(grad[0, 1]) > 0 > float(grad[1, 1])  # descent lowers row 0, raises row 1


# Devices.


def whole(params, tokens, patches, valid):
    """All terms from tokens (B, 4, D) and patches (B, N, D) on, as a method would add them up."""
    head = heads.DINOHead(32, hidden_dim=24, bottleneck_dim=16)
    logits = head.apply({'params': params}, tokens)
    patch_logits = head.apply({'params': params}, patches)
    targets = losses.sinkhorn_knopp(logits[:, :2].reshape(-1, 32), 0.05)
    targets = jnp.moveaxis(targets.reshape(-1, 2, 32), 1, 0)
    center = losses.update_center(jnp.zeros(32), losses.mean_rows(patch_logits, valid))
    patch_targets = losses.softmax_center(patch_logits, center, 0.05)
    views = jnp.moveaxis(logits, 1, 0)
    return {
        'dino': sum(losses.dino_loss(targets, views[:2], views[2:])),
        'ibot': losses.ibot_loss(patch_targets, patch_logits, ibot_weights(valid), len(tokens)),
        'koleo': losses.koleo(tokens[:, 0] @ params['mlp_0']['kernel']),
        'targets': targets,
        'patch_targets': patch_targets,
        'center': center,
    }


@pytest.mark.parametrize(
    'sizes',
    [
        pytest.param(dict(data=8), marks=pytest.mark.slow),
        pytest.param(dict(data=1, fsdp=8), marks=pytest.mark.slow),
        dict(data=2, fsdp=2, tensor=2),
    ],
    ids=str,
)
def test_every_term_and_its_gradient_is_of_the_global_batch_on_any_mesh(sizes):
    head = heads.DINOHead(32, hidden_dim=24, bottleneck_dim=16)
    params = head.init(jax.random.key(0), jnp.zeros((1, 8)))['params']
    data = (
        normal((16, 4, 8)),
        normal((16, 6, 8), seed=1),
        jnp.asarray(np.random.default_rng(2).random((16, 6)) < 0.4),
    )

    def value(params, data):
        out = whole(params, *data)
        return sum(out[k] for k in ('dino', 'ibot', 'koleo')), out

    def run(mesh):
        shardings = (sharding.infer(params, mesh), sharding.batch_sharding(mesh))
        fn = jax.jit(jax.value_and_grad(value, has_aux=True), in_shardings=shardings)
        with jax.set_mesh(mesh):
            return jax.device_get(fn(*jax.device_put((params, data), shardings)))

    want = run(sharding.make_mesh(data=1, devices=jax.devices()[:1]))
    got = run(sharding.make_mesh(**sizes))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * max(1, np.abs(b).max()))
