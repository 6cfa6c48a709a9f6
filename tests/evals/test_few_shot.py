# SPDX-License-Identifier: Apache-2.0
"""kNN with few labelled images: which are drawn, and what is averaged."""

import numpy as np
import pytest

from ssl_jax.evals import few_shot, knn


def make_data(n=240, m=60, classes=4, d=6):
    rng = np.random.default_rng(0)
    y = rng.permutation(np.arange(n + m) % classes)
    x = (rng.normal(size=(classes, d))[y] + rng.normal(size=(n + m, d))).astype(np.float32)
    return x[:n], y[:n], x[n:], y[n:]


@pytest.fixture
def drawn(monkeypatch):
    """Training sets that kNN was called with: [(features, labels, ks)]."""
    calls, real = [], knn.knn

    def watched(x, y, *args, ks, **more):
        calls.append((x, y, ks))
        return real(x, y, *args, ks=ks, **more)

    monkeypatch.setattr(knn, 'knn', watched)
    return calls


def test_every_class_gives_as_many_images_as_asked_and_they_all_vote(drawn):
    data = make_data()
    rows = few_shot.few_shot(*data, num_classes=4, per_class=(1, 5), percent=(10,), tries=3)
    assert [row['shots'] for row in rows] == ['1 per class', '5 per class', '10 %']
    counts = [np.bincount(y, minlength=4).tolist() for _, y, _ in drawn]
    share = np.round(0.1 * np.bincount(data[1])).astype(int).tolist()
    assert counts == 3 * [[1] * 4] + 3 * [[5] * 4] + 3 * [share]
    assert [ks for *_, ks in drawn] == 3 * [(1,)] + 3 * [(5,)] + 3 * [(20,)]
    assert [row['images'] for row in rows] == [4, 20, sum(share)]


def test_mean_and_deviation_are_those_of_the_tries(drawn):
    data = make_data()
    (row,) = few_shot.few_shot(*data, num_classes=4, per_class=(2,), percent=(), tries=4)
    top1 = [
        knn.knn(x, y, *data[2:], num_classes=4, ks=ks)[2]['top1'] for x, y, ks in list(drawn)[:4]
    ]
    assert row['top1'] == pytest.approx(np.mean(top1))
    assert row['top1_std'] == pytest.approx(np.std(top1, ddof=1)) and row['top1_std'] > 0


def test_tries_differ_and_a_larger_choice_contains_the_smaller(drawn):
    few_shot.few_shot(*make_data(), num_classes=4, per_class=(1, 5), percent=(), tries=2)
    sets = [{tuple(row) for row in x.tolist()} for x, *_ in drawn]
    assert sets[0] != sets[1]
    assert sets[0] < sets[2] and sets[1] < sets[3]


def test_a_number_beyond_the_smallest_class_is_left_out_and_a_share_is_at_least_one_image():
    x, y, *test = make_data()
    keep = np.flatnonzero((y != 3) | (np.cumsum(y == 3) <= 3))  # three images of class 3
    rows = few_shot.few_shot(x[keep], y[keep], *test, num_classes=4, percent=(1,), tries=1)
    assert [row['shots'] for row in rows] == ['1 per class', '2 per class', '1 %']
    assert rows[-1]['images'] == 4 and rows[-1]['top1_std'] == 0
