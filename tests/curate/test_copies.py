# SPDX-License-Identifier: Apache-2.0
"""Groups of copies, and what retrieval takes."""

import jax
import numpy as np

from ssl_jax import sharding
from ssl_jax.curate import copies, retrieve


def test_pairs_come_once_and_not_below_the_floor():
    own = np.array([0, 1, 2, 3])
    similarity = np.array([[0.9, 0.7], [0.9, 0.2], [0.7, 0.69], [1.0, -np.inf]], np.float32)
    rows = np.array([[1, 2], [0, 3], [0, 3], [3, -1]])
    a, b, s = copies.edges(own, similarity, rows, 0.65)
    assert list(zip(a, b, strict=True)) == [(0, 1), (0, 2), (2, 3)]
    np.testing.assert_allclose(s, [0.9, 0.7, 0.69])


def test_of_each_group_the_largest_is_kept_and_of_equals_the_first():
    component = copies.components(8, np.array([0, 2, 5, 6]), np.array([2, 4, 6, 7]))
    assert component.tolist() == [0, 1, 0, 3, 0, 5, 5, 5]
    asked = []

    def size(rows):
        asked.extend(rows.tolist())
        return np.array([9, 9, 9, 1, 5, 4, 9, 9])[rows]

    assert copies.keepers(component, size).tolist() == [0, 1, 0, 3, 0, 6, 6, 6]
    assert sorted(asked) == [0, 2, 4, 5, 6, 7]  # images without copies are not opened
    assert copies.keepers(component, np.zeros_like).tolist() == component.tolist()


def test_a_group_goes_with_the_image_of_an_evaluation_set_in_it():
    component = copies.components(6, np.array([0, 1, 4]), np.array([1, 2, 5]))
    gone = copies.touched(component, np.array([False, False, True, False, False, False]))
    assert gone.tolist() == [True, True, True, False, False, False]


def mesh():
    return sharding.make_mesh(devices=jax.devices())


def unit(angles):
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_the_nearest_of_each_query_are_taken_once_with_the_query_they_are_for():
    pool, queries = unit(np.linspace(0, 2, 21)), unit(np.array([0.02, 0.11, 1.52]))
    settings = retrieve.Settings(nearest=2)
    rows, query, similarity = retrieve.by_sample(queries, pool, settings, mesh(), None)
    assert rows.tolist() == [0, 1, 2, 15, 16] and query.tolist() == [0, 1, 1, 2, 2]
    np.testing.assert_allclose(similarity, (pool[rows] * queries[query]).sum(1), atol=1e-6)


def test_clusters_with_more_than_three_queries_give_images_up_to_the_caps():
    cluster = np.repeat([0, 1, 2, 3], [50, 8, 30, 20])
    centroids = unit(np.array([0.0, 1.0, 2.0, 3.0]))
    queries = unit(np.array([0.0, 0.1, 0.2, 0.1, 1.0, 1.1, 0.9, 2.0, 2.0, 2.1, 1.9]))

    def taken(**fields):
        found = retrieve.by_clusters(
            queries, centroids, cluster, retrieve.Settings(**fields), mesh()
        )
        return found[0], found[1].tolist()

    rows, held = taken(per_cluster=20)
    assert held == [4, 3, 4, 0]
    assert np.bincount(cluster[rows]).tolist() == [20, 0, 20] and len(np.unique(rows)) == 40
    assert np.bincount(cluster[taken(min_queries=3)[0]]).tolist() == [50, 8, 30]
    capped = taken(per_cluster=20, most=25)[0]
    assert len(capped) == 25 and np.isin(capped, rows).all() and (np.diff(capped) > 0).all()
