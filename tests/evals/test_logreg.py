# SPDX-License-Identifier: Apache-2.0
"""Logistic regression reaches the minimum of its objective, on any number of devices."""

import jax
import numpy as np
import pytest
import scipy.optimize
from scipy.special import log_softmax

from ssl_jax import sharding
from ssl_jax.evals import knn, logreg
from ssl_jax.run import errors


def make_data(n=150, d=6, classes=4, seed=0, spread=1.5):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, d))
    y = rng.integers(0, classes, n)
    return (centres[y] + spread * rng.normal(size=(n, d))).astype(np.float32), y


def objective(flat, x, y, c, classes):
    """Value and gradient of the docstring's sum, in float64."""
    w = flat.reshape(-1, classes)
    log_p = log_softmax(x @ w[:-1] + w[-1], axis=1)
    residual = np.exp(log_p) - np.eye(classes)[y]
    penalty = np.vstack([w[:-1], np.zeros(classes)]) / c
    grad = np.vstack([x.T @ residual, residual.sum(axis=0)]) + penalty
    value = -log_p[np.arange(len(y)), y].sum() + (w[:-1] ** 2).sum() / (2 * c)
    return value, grad.ravel()


def optimum(x, y, c, classes=4):
    x = x.astype(np.float64)
    start = np.zeros((x.shape[1] + 1) * classes)
    options = dict(maxiter=5000, ftol=1e-15, gtol=1e-10)
    found = scipy.optimize.minimize(
        objective, start, (x, y, c, classes), 'L-BFGS-B', jac=True, options=options
    )
    return found.x.reshape(-1, classes)


def fit(x, y, c, weight=None, devices=1, **more):
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    x, y = knn.put_rows(x, mesh), knn.put_rows(y.astype(np.int32), mesh)
    weight = np.ones(x.shape[0]) if weight is None else weight
    params, found = logreg.fit(x, y, weight, c, num_classes=4, mesh=mesh, **more)
    return np.asarray(params), found


@pytest.mark.parametrize('c', [1e-3, 1.0, 30.0])
def test_the_fit_is_the_minimum_that_scipy_finds(c):
    x, y = make_data()
    params, found = fit(x, y, c)
    np.testing.assert_allclose(params - params.mean(1, keepdims=True), optimum(x, y, c), atol=3e-3)
    value, grad = objective(params.astype(np.float64).ravel(), x.astype(np.float64), y, c, 4)
    best, _ = objective(optimum(x, y, c).ravel(), x.astype(np.float64), y, c, 4)
    assert value <= best * (1 + 1e-6)
    assert np.abs(grad).max() / len(y) < 1e-4 and found['gradient'] < 1e-4
    assert found['steps'] < 300


def test_separable_classes_and_features_far_from_standard_are_fitted_too():
    x, y = make_data(spread=0.05)
    params, found = fit(100 * x + 30, y, 1e5)
    guessed = (100 * x + 30) @ params[:-1] + params[-1]
    assert (guessed.argmax(axis=1) == y).all() and np.isfinite(params).all()
    assert found['steps'] < logreg.Settings.max_steps


def test_rows_of_weight_zero_and_padding_do_not_count():
    x, y = make_data()
    keep = np.arange(len(x)) % 3 > 0
    some, _ = fit(x[keep], y[keep], 1.0)
    y[~keep] = 4  # a class that does not exist, as of patches that are ignored
    masked, _ = fit(x, y, 1.0, weight=keep.astype(float))
    np.testing.assert_allclose(masked, some, atol=1e-3)


def test_eight_devices_find_what_one_finds():
    x, y = make_data(n=149)
    one, _ = fit(x, y, 1.0)
    eight, _ = fit(x, y, 1.0, weight=np.ones(149), devices=8)
    np.testing.assert_allclose(one, eight, atol=1e-3)


def test_a_warm_start_changes_the_steps_and_not_the_result():
    x, y = make_data()
    cold, slow = fit(x, y, 1.0)
    start, _ = fit(x, y, 0.9)
    warm, fast = fit(x, y, 1.0, start=start)
    np.testing.assert_allclose(warm, cold, atol=3e-3)
    assert fast['steps'] < slow['steps']


def test_c_is_chosen_on_held_out_images_and_the_choice_is_fitted_to_all():
    x, y = make_data(n=300)
    train, test = (x[:200], y[:200]), (x[200:], y[200:])
    rows, best, protocol = logreg.probe(*train, *test, num_classes=4, cs=(10.0, 1e-6, 0.1))
    assert [row['c'] for row in rows] == [1e-6, 0.1, 10.0]
    assert best['val_top1'] == max(row['val_top1'] for row in rows)
    assert best['c'] == min(r['c'] for r in rows if r['val_top1'] == best['val_top1'])
    guessed = (test[0] @ (w := optimum(*train, best['c']))[:-1] + w[-1]).argmax(axis=1)
    assert best['test_top1'] == pytest.approx(100 * (guessed == test[1]).mean(), abs=1.01)
    assert '20 held-out training images' in protocol['selection']


def test_features_that_are_not_finite_are_an_error():
    x, y = make_data()
    x[3, 2] = np.nan
    with pytest.raises(errors.UserError, match='NaN or inf in 1 of 150 rows'):
        logreg.probe(x, y, x, y, num_classes=4)
