# SPDX-License-Identifier: Apache-2.0
"""SIGReg and VISReg: published numbers, an independent integral, what has a gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.objectives import sigreg

V, N, D = np.meshgrid(np.arange(3), np.arange(8), np.arange(6), indexing='ij')
Z = (1.3 * np.sin(1 + V + 2 * N + 3 * D)).astype(np.float32)
DIM, SLICE = np.meshgrid(np.arange(6), np.arange(5), indexing='ij')
SLICES = np.cos(1 + 2 * DIM + 5 * SLICE)
SLICES = (SLICES / np.linalg.norm(SLICES, axis=0)).astype(np.float32)

COMPILED = jax.jit(
    lambda z, slices: {
        'sigreg': sigreg.sigreg(z, slices),
        'invariance': sigreg.invariance(z, 2),
        'scale': sigreg.scale(z),
        'centre': sigreg.centre(z),
        'shape': sigreg.shape(z, slices),
        **sigreg.monitors(z),
    }
)
# Of LightlySSL 1.6.0 on these inputs.
LIGHTLY = dict(
    sigreg=2.2723433, invariance=0.59095677, scale=0.008702679, centre=0.01823978, shape=0.21835797
)


def normal(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def direct(z, slices):
    """SIGReg as the formula says, in float64."""
    t = np.linspace(0, 3, 17)
    f = np.exp(-(t**2) / 2)
    angles = (z.astype(np.float64) @ slices)[..., None] * t  # (V, N, S, T)
    error = (np.cos(angles).mean(axis=1) - f) ** 2 + np.sin(angles).mean(axis=1) ** 2
    return 2 * z.shape[1] * np.trapezoid(f * error, t).mean()


@pytest.mark.parametrize('name', sorted(LIGHTLY))
def test_terms_are_those_of_lightly(name):
    assert float(COMPILED(Z, SLICES)[name]) == pytest.approx(LIGHTLY[name], rel=5e-7)


def test_the_regularizer_is_per_view_and_not_over_all_views_at_once():
    together = COMPILED(Z.reshape(1, -1, 6), SLICES)['sigreg']
    assert float(together) == pytest.approx(6.7632791, rel=1e-6)


@pytest.mark.parametrize('size', [1, 30])
def test_sigreg_is_the_integral_also_far_from_the_origin(size):
    z, slices = size * normal((2, 16, 5)), np.asarray(sigreg.directions(jax.random.key(0), 5, 7))
    assert float(COMPILED(z, slices)['sigreg']) == pytest.approx(direct(z, slices), rel=1e-5)


def test_the_gradient_of_the_characteristic_function_is_that_of_cosines_and_sines():
    p = normal((2, 5, 3))
    t = sigreg.STEP * jnp.arange(1.0, sigreg.KNOTS + 1)[:, None, None, None]
    weights = [normal((sigreg.KNOTS, 2, 3), seed) for seed in (1, 2)]

    def weighed(function):
        return jax.jit(
            jax.grad(lambda p: sum((w * x).sum() for w, x in zip(weights, function(p))))  # noqa: B905
        )(p)

    want = weighed(lambda p: (jnp.cos(t * p).mean(axis=2), jnp.sin(t * p).mean(axis=2)))
    np.testing.assert_allclose(weighed(sigreg.characteristic), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('images', [64, 512])
def test_normal_embeddings_have_the_null_value_whatever_the_batch(images):
    slices = sigreg.directions(jax.random.key(0), 32, 64)
    value = float(COMPILED(normal((4, images, 32)), slices)['sigreg'])
    assert value == pytest.approx(1.05, abs=0.08)


def test_embeddings_at_one_point_have_two_fifths_of_the_batch():
    for images in (64, 512):
        value = float(COMPILED(np.zeros((1, images, 4), np.float32), SLICES[:4])['sigreg'])
        assert value == pytest.approx(0.40 * images, rel=0.01)


def test_directions_are_unit_vectors_and_new_for_each_key():
    a, b = (sigreg.directions(jax.random.key(seed), 6, 9) for seed in (0, 1))
    np.testing.assert_allclose(jnp.linalg.norm(a, axis=0), 1, rtol=1e-6)
    assert a.shape == (6, 9) and not np.any(a == b)


def test_every_view_is_pulled_and_the_mean_of_the_global_ones_too():
    """Without stop-gradient a shift of all views changes nothing, so gradients sum to 0."""
    grad = jax.jit(jax.grad(lambda z: sigreg.invariance(z, 2)))(Z)
    np.testing.assert_allclose(grad.sum(axis=0), 0, atol=1e-7)
    assert all(np.abs(view).max() > 1e-3 for view in grad)


def test_scale_still_pulls_where_embeddings_have_collapsed_and_is_finite_at_one_point():
    grad = jax.jit(jax.grad(sigreg.scale))
    far, near = (np.abs(grad(size * Z)).max() for size in (1e-1, 1e-3))
    assert near == pytest.approx(far, rel=0.2)
    assert np.isfinite(grad(np.zeros_like(Z))).all()


def test_shape_knows_no_scale_and_no_centre():
    moved = COMPILED(7 * Z + 3, SLICES)
    assert float(moved['shape']) == pytest.approx(LIGHTLY['shape'], rel=1e-3)
    assert float(moved['scale']) > 1 and float(moved['centre']) > 1


def test_monitors_tell_a_normal_batch_from_a_line_and_a_point():
    slices = np.eye(8, 2, dtype=np.float32)
    spread = COMPILED(np.repeat(normal((1, 400, 8)), 2, axis=0), slices)
    line = COMPILED(normal((2, 400, 1)) * np.ones(8, np.float32), slices)
    point = COMPILED(np.ones((2, 400, 8), np.float32), slices)
    assert float(spread['embedding_std']) == pytest.approx(1, abs=0.05)
    assert 7 < float(spread['embedding_rank']) <= 8
    assert float(line['embedding_rank']) == pytest.approx(1, rel=1e-4)
    assert float(point['embedding_std']) < 1e-5
    assert sigreg.suspect(spread, 8) is None
    assert 'Dimensional collapse' in sigreg.suspect(line, 8)
    assert 'Collapse to a point' in sigreg.suspect(point, 8)
    assert 'nan' in sigreg.suspect(dict(embedding_std=np.nan, embedding_rank=np.nan), 8)


def test_one_image_is_refused_in_one_sentence():
    with pytest.raises(ValueError, match='compare 2 images or more'):
        sigreg.sigreg(Z[:, :1], SLICES)
