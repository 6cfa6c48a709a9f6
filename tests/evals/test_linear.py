# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.evals import linear

OPTIONS = dict(num_classes=4, epochs=8, batch_size=64, lrs=(0.01, 0.1, 1.0))


def make_data(noise=0.5, n=500, m=200, d=12, seed=0):
    rng = np.random.default_rng(seed)
    centres = 3 * rng.normal(size=(4, d))
    y = rng.integers(0, 4, n + m)
    x = (centres[y] + 10 + noise * rng.normal(size=(n + m, d))).astype(np.float32)
    return {'x': x[:n]}, y[:n], {'x': x[n:]}, y[n:]


def test_probe_learns_a_separable_problem():
    _, best, _ = linear.probe(*make_data(), **OPTIONS)
    assert best['test_top1'] == 100.0


def test_lars_learns_it_too_with_more_steps():
    # Its steps are a thousandth of the weight's norm times the rate, so it needs many of them.
    options = dict(epochs=20, warmup_epochs=2, batch_size=16, lrs=(10.0,), optimizer='lars')
    _, best, _ = linear.probe(*make_data(), num_classes=4, **options)
    assert best['test_top1'] == 100.0


def test_probe_gets_chance_on_labels_that_mean_nothing():
    train, train_y, test, _ = make_data()
    _, best, _ = linear.probe(train, train_y, test, np.arange(200) % 4, **OPTIONS)
    assert 10 < best['test_top1'] < 40


def test_choice_is_made_on_held_out_training_images_not_on_test():
    train, train_y, test, test_y = make_data()
    noise = {'x': np.random.default_rng(1).normal(size=train['x'].shape).astype(np.float32)}
    # On test only `bad` is informative, on train only `good`.
    train = {'good': train['x'], 'bad': noise['x']}
    test = {'good': noise['x'][:200], 'bad': test['x']}
    _, best, _ = linear.probe(train, train_y, test, test_y, **OPTIONS)
    assert best['feature'] == 'good'
    assert best['test_top1'] < 60


def test_every_feature_and_rate_has_a_row_and_only_the_choice_has_a_test_score():
    train, train_y, test, test_y = make_data()
    train['half'], test['half'] = train['x'][:, :5], test['x'][:, :5]
    rows, best, _ = linear.probe(train, train_y, test, test_y, **OPTIONS)
    assert {(r['feature'], r['lr']) for r in rows} == {
        (f, lr) for f in ('x', 'half') for lr in OPTIONS['lrs']
    }
    assert not any('test_top1' in r for r in rows)
    assert best['val_top1'] == max(r['val_top1'] for r in rows)


def test_a_rate_of_the_sweep_trains_as_it_would_alone():
    data = make_data(noise=4.0)
    together, *_ = linear.probe(*data, **OPTIONS)
    alone, *_ = linear.probe(*data, **dict(OPTIONS, lrs=(0.1,)))
    assert alone[0]['train_loss'] == pytest.approx(together[1]['train_loss'], rel=1e-5)


def test_same_seed_gives_the_same_rows_and_another_seed_does_not():
    data = make_data(noise=4.0)
    first, *_ = linear.probe(*data, **OPTIONS)
    assert linear.probe(*data, **OPTIONS)[0] == first
    assert linear.probe(*data, **OPTIONS, seed=1)[0] != first


def test_best_rate_at_the_edge_of_the_sweep_is_reported():
    data = make_data(noise=4.0)
    _, best, _ = linear.probe(*data, **dict(OPTIONS, lrs=(1e-6, 1e-5)))
    assert best['at_edge']
    _, best, _ = linear.probe(*data, **dict(OPTIONS, lrs=(1e-9, 0.1, 1e9)))
    assert best['lr'] == 0.1 and not best['at_edge']


def test_diverged_rate_is_not_chosen():
    rows, best, _ = linear.probe(*make_data(), **dict(OPTIONS, lrs=(0.1, 1e38)))
    assert best['lr'] == 0.1
    assert rows[1]['val_top1'] < 50


def test_held_out_part_is_disjoint_and_of_the_stated_size():
    fit, val = linear.split(101, 3)
    assert len(val) == 10 and not set(fit) & set(val) and len(fit) + len(val) == 101


def test_batch_norm_in_training_uses_biased_variance_and_tracks_the_unbiased_one():
    x = np.random.default_rng(0).normal(3, 2, size=(16, 5)).astype(np.float32)
    y, (mean, var) = linear.batch_norm(jnp.asarray(x), (jnp.zeros(5), jnp.ones(5)), train=True)
    np.testing.assert_allclose(y, (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6), rtol=2e-5, atol=1e-5)
    np.testing.assert_allclose(mean, 0.1 * x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(var, 0.9 + 0.1 * x.var(0, ddof=1), rtol=1e-5)


def test_batch_norm_in_evaluation_uses_the_running_pair():
    x = jnp.full((3, 2), 5.0)
    running = jnp.asarray([1.0, 3.0]), jnp.asarray([4.0, 1.0])
    y, same = linear.batch_norm(x, running, train=False)
    np.testing.assert_allclose(y, np.tile([2.0, 2.0], (3, 1)), rtol=1e-6)
    assert same is running


def test_batch_norm_matches_torch():
    torch = pytest.importorskip('torch', reason='torch is the oracle of this test')
    module = torch.nn.BatchNorm1d(5, affine=False, eps=1e-6, momentum=0.1)
    running = jnp.zeros(5), jnp.ones(5)
    for seed in range(3):
        x = np.random.default_rng(seed).normal(3, 2, size=(16, 5)).astype(np.float32)
        y, running = linear.batch_norm(jnp.asarray(x), running, train=True)
        np.testing.assert_allclose(y, module(torch.from_numpy(x)).numpy(), atol=1e-5)
    np.testing.assert_allclose(running[0], module.running_mean.numpy(), rtol=1e-5)
    np.testing.assert_allclose(running[1], module.running_var.numpy(), rtol=1e-5)


def test_one_step_of_sgd_is_the_textbook_step():
    x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
    y = np.arange(8) % 2
    options = dict(num_classes=2, epochs=1, warmup_epochs=0, batch_size=8, optimizer='sgd')
    rates = jnp.asarray([0.0, 0.5])
    head, losses = linear._train(x, y, rates, jax.random.key(0), **options)
    start, moved = np.asarray(head['params']['kernel'], np.float64)
    z = (x - x.mean(0)) / np.sqrt(x.var(0) + 1e-6)
    p = np.exp(z @ start)
    p /= p.sum(1, keepdims=True)
    np.testing.assert_allclose(losses[0], -np.log(p[np.arange(8), y]).mean(), rtol=1e-5)
    gradient = z.T @ (p - np.eye(2)[y]) / 8
    np.testing.assert_allclose(moved, start - 0.5 * gradient, atol=1e-6)


def test_labels_beyond_num_classes_are_refused():
    train, train_y, test, test_y = make_data()
    with pytest.raises(ValueError, match='num_classes=3'):
        linear.probe(train, train_y, test, test_y, **dict(OPTIONS, num_classes=3))


def test_one_training_image_is_refused():
    train, train_y, test, test_y = make_data(n=1)
    with pytest.raises(ValueError, match='1 training image cannot be fitted and held out'):
        linear.probe(train, train_y, test, test_y, **OPTIONS)
