# SPDX-License-Identifier: Apache-2.0
"""Neighbours and clusters are exact, and the same on one device and on eight."""

import jax
import numpy as np
import pytest

from ssl_jax import sharding
from ssl_jax.curate import kmeans, search, tree


def mesh(devices=1, fsdp=1):
    return sharding.make_mesh(fsdp=fsdp, devices=jax.devices()[:devices])


def unit(n, d=16, seed=0):
    x = np.random.default_rng(seed).normal(size=(n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def blobs(centres, each, spread=0.05, seed=0):
    """Points around unit vectors, `each` (int or list) of them, in the order of the centres."""
    rng = np.random.default_rng(seed)
    x = np.repeat(centres, each, axis=0)
    return (x + spread * rng.normal(size=x.shape)).astype(np.float32)


def reference(queries, database, k, own):
    s = queries.astype(np.float64) @ database.T.astype(np.float64)
    s[np.arange(len(s))[own >= 0], own[own >= 0]] = -np.inf
    order = np.lexsort((np.broadcast_to(np.arange(s.shape[1]), s.shape), -s), axis=1)[:, :k]
    return np.take_along_axis(s, order, 1), order


def test_neighbours_are_those_of_brute_force_without_the_query_itself():
    x = unit(3000)
    own = np.arange(0, 3000, 3)
    s, rows = search.all_nearest(x[own], x, 7, mesh(), own=own)
    want, order = reference(x[own], x, 7, own)
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_allclose(s, want, atol=1e-6)


def test_eight_devices_give_the_bits_of_one_and_of_equal_ones_the_first():
    x = unit(5000)
    x[4000:] = x[:1000]  # every similarity of these twice, on different devices
    x[2500:2600] = x[7]
    own = np.arange(2000)
    one = search.all_nearest(x[own], x, 20, mesh(), own=own)
    for other in (mesh(8), mesh(8, fsdp=4), mesh(3)):
        for a, b in zip(one, search.all_nearest(x[own], x, 20, other, own=own), strict=True):
            np.testing.assert_array_equal(a, b)
    assert one[1][7].tolist() == [2500 + i for i in range(20)]
    assert one[1][8][0] == 4008 and (one[0] <= 1).all()


def test_blocks_and_parts_change_nothing(monkeypatch):
    x = unit(9000, 64)
    x[6000:] = x[:3000]  # equal ones in different blocks
    queries = unit(300, 64, seed=1)
    whole = search.all_nearest(queries, x, 5, mesh(2))
    monkeypatch.setattr(search, 'PART', 128)
    small = search.Settings(memory=2000 * 64 * 4 / 2**30)  # of 9,000 rows, on each of two
    parts = search.all_nearest(queries, x, 5, mesh(2), settings=small)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(a, b)
    rest = search.all_nearest(queries, x, 5, mesh(2), settings=small, start=256)
    np.testing.assert_array_equal(rest[1], whole[1][256:])


def test_more_neighbours_than_rows_are_filled_up():
    x = unit(3)
    s, rows = search.all_nearest(x, x, 4, mesh(8), own=np.arange(3))
    assert (rows[:, 2:] == -1).all() and np.isneginf(s[:, 2:]).all()
    assert sorted(rows[0, :2]) == [1, 2]


def test_faiss_finds_almost_all_neighbours():
    pytest.importorskip('faiss')
    centres = unit(40, 32, seed=2)
    x = blobs(centres, 100)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    own = np.arange(len(x))
    _, exact = search.all_nearest(x, x, 10, mesh(), own=own)
    faiss = search.Settings(engine='faiss')
    s, rows = search.all_nearest(x, x, 10, mesh(), own=own, settings=faiss)
    found = np.mean([len({*a} & {*b}) / 10 for a, b in zip(exact, rows, strict=True)])
    assert found > 0.9 and (rows != own[:, None]).all() and (np.diff(s, axis=1) <= 0).all()


def test_clusters_are_the_same_on_one_device_and_on_eight():
    x = unit(3000)  # without structure: any rounding would move points
    one = kmeans.fit(x, 40, mesh(), seed=3)
    for other in (mesh(8), mesh(8, fsdp=4)):
        for a, b in zip(one, kmeans.fit(x, 40, other, seed=3), strict=True):
            np.testing.assert_array_equal(a, b)
    assert (kmeans.fit(x, 40, mesh(), seed=4)[1] != one[1]).any()


def test_k_means_finds_separate_clusters_of_very_different_sizes():
    centres = unit(12, 32, seed=1)
    sizes = np.array([10, 500, 20, 40, 200, 10, 15, 30, 10, 900, 10, 60])
    truth = np.repeat(np.arange(12), sizes)
    _, cluster = kmeans.fit(blobs(centres, sizes, 0.01), 12, mesh(8))
    assert len({(a, b) for a, b in zip(truth, cluster, strict=True)}) == 12


def test_points_go_to_the_nearest_centroid_and_no_cluster_is_empty():
    x = unit(500)
    x[100:] = x[:400]  # copies, so that clusters become empty
    centroids, cluster = kmeans.fit(x, 90, mesh(2), centroids=np.repeat(x[:1], 90, axis=0))
    assert len(np.unique(cluster)) == 90
    away = np.square(x[:, None] - centroids).sum(axis=2)
    np.testing.assert_allclose(away[np.arange(500), cluster], away.min(axis=1), atol=1e-5)


def test_images_that_are_all_alike_are_clustered_and_sampled_too():
    x = np.repeat(unit(3), 40, axis=0)
    parents, _ = tree.fit(x, (10, 6, 2), tree.Settings(rounds=4), mesh())
    assert len(tree.sample(parents, 30, np.arange(120), seed=0)) == 30


def test_shares_are_as_even_as_the_sizes_allow():
    for total in (0, 1, 7, 40, 99, 1000):
        sizes = np.array([1, 50, 3, 0, 20, 7])
        shares = tree.fill(total, sizes, seed=1)
        assert shares.sum() == min(total, sizes.sum()) and (shares <= sizes).all()
        cut = shares < sizes  # those that had to give have the same share, but for one
        assert not cut.any() or shares[cut].max() - shares[cut].min() <= 1
        assert not cut.any() or (shares[~cut] <= shares[cut].min() + 1).all()


def test_resampling_spreads_clusters_by_area_and_not_by_the_number_of_images():
    """A third of the plane has three quarters of the points."""
    rng = np.random.default_rng(0)
    dense = rng.random((1900, 2)) * [0.3, 1]
    sparse = [0.3, 0] + rng.random((600, 2)) * [0.7, 1]
    x = np.concatenate([dense, sparse]).astype(np.float32)

    def share(rounds):
        parents, _ = tree.fit(x, (200, 20), tree.Settings(rounds=rounds), mesh())
        top = parents[1][parents[0]]
        means = np.array([x[top == k].mean(axis=0) for k in np.unique(top)])
        return (means[:, 0] < 0.3).mean()

    assert share(0) >= 0.45 and share(10) <= 0.35


def test_a_balanced_sample_takes_as_many_from_rare_things_as_from_frequent_ones():
    """Three topics of 2 kinds each; one topic has nine tenths of the images."""
    rng = np.random.default_rng(0)
    topics = np.repeat(10 * np.eye(3, 24), 2, axis=0)
    kinds = topics + np.concatenate([np.zeros((6, 8)), 2 * np.eye(6, 16)], axis=1)
    sizes = np.array([1500, 300, 60, 60, 40, 40])
    truth = np.repeat(np.arange(6), sizes)
    x = (np.repeat(kinds, sizes, axis=0) + 0.1 * rng.normal(size=(2000, 24))).astype(np.float32)
    settings = tree.Settings(rounds=3)
    parents, _ = tree.fit(x, (60, 6, 3), settings, mesh(8))
    top = parents[2][parents[1][parents[0]]]
    assert len({(a // 2, b) for a, b in zip(truth, top, strict=True)}) == 3  # topics are the top
    taken = tree.sample(parents, 180, rng.random(2000), seed=0)
    assert len(np.unique(taken)) == 180
    topic = np.bincount(truth[taken] // 2)
    np.testing.assert_array_equal(topic, [60, 60, 60])
    assert np.bincount(truth[rng.permutation(2000)[:180]] // 2)[0] > 150  # a random one does not
    again = tree.fit(x, (60, 6, 3), settings, mesh())[0]
    for a, b in zip(parents, again, strict=True):
        np.testing.assert_array_equal(a, b)
