# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.evals import knn


def make_data(n=203, m=37, d=9, classes=7, seed=0):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(classes, d))
    y = rng.integers(0, classes, n + m)
    x = (centres[y] + 1.3 * rng.normal(size=(n + m, d))).astype(np.float32)
    return x[:n], y[:n], x[n:], y[n:]


def brute_force(train_x, train_y, test_x, test_y, k, temperature, classes):
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    similarity = unit(test_x.astype(np.float64)) @ unit(train_x.astype(np.float64)).T
    top1 = top5 = 0
    for s, label in zip(similarity, test_y, strict=True):
        votes = np.zeros(classes)
        for j in np.argsort(-s, kind='stable')[:k]:
            votes[train_y[j]] += np.exp(s[j] / temperature)
        order = np.argsort(-votes, kind='stable')
        top1 += order[0] == label
        top5 += label in order[: min(5, k)]
    return {'top1': 100 * top1 / len(test_y), 'top5': 100 * top5 / len(test_y)}


def mesh_of(data, fsdp):
    if len(jax.devices()) < data * fsdp:
        pytest.skip(f'needs {data * fsdp} devices, this process sees {len(jax.devices())}')
    auto = (jax.sharding.AxisType.Auto,) * 3
    devices = jax.devices()[: data * fsdp]
    return jax.make_mesh((data, fsdp, 1), ('data', 'fsdp', 'tensor'), auto, devices=devices)


def test_accuracy_equals_brute_force():
    data = make_data()
    got = knn.knn(*data, ks=(20, 1, 5), temperature=0.07, num_classes=7)
    for k in (20, 1, 5):
        assert got[k] == pytest.approx(brute_force(*data, k, 0.07, 7)), k


def test_k_beyond_the_database_uses_every_row():
    data = make_data(n=23)
    got = knn.knn(*data, ks=(10, 200), num_classes=7)
    assert got[200] == pytest.approx(brute_force(*data, 23, 0.07, 7))


def test_chunks_do_not_change_the_result(monkeypatch):
    data = make_data(m=37)
    whole = knn.knn(*data, ks=(5, 20), num_classes=7)
    monkeypatch.setattr(knn, 'CHUNK_ELEMENTS', 1)  # the least: 16 queries
    assert knn.knn(*data, ks=(5, 20), num_classes=7) == whole


@pytest.mark.parametrize('n', [203, 16, 13, 5])
def test_sharded_database_gives_the_result_of_one_device(n):
    mesh = mesh_of(4, 2)
    data = make_data(n=n)
    one = knn.knn(*data, ks=(1, 10, 100), num_classes=7)
    assert knn.knn(*data, ks=(1, 10, 100), num_classes=7, mesh=mesh) == one


def test_ties_fall_to_the_first_database_row_on_any_mesh():
    mesh = mesh_of(4, 2)
    x = np.tile(np.eye(4, dtype=np.float32), (8, 1))  # every direction eight times
    valid, labels = np.ones(32, bool), np.arange(32)
    for k in (3, 8, 20):
        _, one = knn.neighbours(x, labels, valid, x[:4], k, mesh_of(1, 1))
        with jax.set_mesh(mesh):
            _, many = jax.jit(lambda *a, k=k: knn.neighbours(*a, k, mesh))(x, labels, valid, x[:4])
        np.testing.assert_array_equal(one, many)
        np.testing.assert_array_equal(one[1][: min(k, 8)], np.arange(1, 32, 4)[: min(k, 8)])


def test_equal_votes_go_to_the_smaller_class():
    train = np.eye(2, dtype=np.float32)
    query = np.ones((2, 2), np.float32)  # equally near to both rows
    got = knn.knn(train, [1, 0], query, [0, 1], ks=(2,), num_classes=2)
    assert got[2]['top1'] == 50.0


def test_small_temperature_does_not_overflow():
    data = make_data()
    got = knn.knn(*data, ks=(1, 20), temperature=1e-3, num_classes=7)
    assert got[20]['top1'] == pytest.approx(got[1]['top1'], abs=3.0)


def test_votes_are_exponentials_of_similarity_over_temperature():
    s = jnp.asarray([[0.9, 0.8, 0.5]])
    got = knn.votes(s, jnp.asarray([[0, 1, 0]]), (1, 3), 0.1, 2)
    p = np.exp([0, -1, -4])  # relative to the nearest
    np.testing.assert_allclose(got[3][0], [p[0] + p[2], p[1]], rtol=1e-6)
    np.testing.assert_allclose(got[1][0], [p[0], 0], rtol=1e-6)


def test_labels_of_another_class_list_are_refused():
    train_x, train_y, test_x, test_y = make_data()
    with pytest.raises(ValueError, match='class order'):
        knn.knn(train_x, train_y, test_x, test_y + 5, num_classes=7)


def test_non_finite_features_are_refused():
    train_x, train_y, test_x, test_y = make_data()
    test_x[3, 1] = np.nan
    with pytest.raises(ValueError, match='test features have NaN or inf in 1 of 37'):
        knn.knn(train_x, train_y, test_x, test_y, num_classes=7)


def golden_accuracy(z):
    return knn.knn(
        z['in/knn_train'],
        z['in/knn_train_labels'],
        z['in/knn_test'],
        z['in/knn_test_labels'],
        ks=tuple(z.hyper['knn_k']),
        temperature=z.hyper['knn_temperature'],
        num_classes=z.hyper['knn_classes'],
    )


def test_golden_pixio_eval_heads_metrics_knn_accuracy(golden):
    z = golden('pixio_eval_heads_metrics')
    got = golden_accuracy(z)
    for k in z.hyper['knn_k']:
        z.check(f'out/knn_top1_k{k}', np.float32(got[k]['top1']))
        z.check(f'out/knn_top5_k{k}', np.float32(got[k]['top5']))


def test_golden_dinov2_eval_depth_knn_linear_knn_accuracy(golden):
    z = golden('dinov2_eval_depth_knn_linear')
    got = golden_accuracy(z)
    for k in z.hyper['knn_k']:
        z.check(f'out/knn_top1_k{k}', np.float32(got[k]['top1']))


def test_golden_dinov2_eval_depth_knn_linear_knn_probabilities(golden):
    z = golden('dinov2_eval_depth_knn_linear')
    train, labels, ks = z['in/knn_train'], z['in/knn_train_labels'], tuple(z.hyper['knn_k'])
    valid = np.ones(len(train), bool)
    s, y = knn.neighbours(train, labels, valid, z['in/knn_test'], max(ks), mesh_of(1, 1))
    votes = knn.votes(s, y, ks, z.hyper['knn_temperature'], z.hyper['knn_classes'])
    # DINOv2 divides all of them by the sum over the largest k.
    total = votes[max(ks)].sum(axis=1, keepdims=True)
    for k in ks:
        z.check(f'out/knn_probas_k{k}', votes[k] / total)
