# SPDX-License-Identifier: Apache-2.0
"""Scores of maps, scored regions, sliding windows."""

import numpy as np
import pytest

from ssl_jax.evals import dense_scores
from ssl_jax.run import errors


def test_iou_adds_up_over_images_and_leaves_ignored_pixels_out():
    maps = [([0, 0, 1, 1], [0, 1, 1, 255]), ([2, 2, 0, 1], [2, 0, 0, 1])]
    counts = np.sum(
        [dense_scores.intersection_union(np.array(p), np.array(g), 4) for p, g in maps], axis=0
    )
    np.testing.assert_array_equal(counts, [[2, 2, 1, 0], [4, 3, 2, 0]])
    per_class = dense_scores.iou(*counts)
    assert dense_scores.mean_iou(per_class, 'left out') == pytest.approx(
        100 * (0.5 + 2 / 3 + 0.5) / 3
    )
    assert dense_scores.mean_iou(per_class, 'zero') == pytest.approx(100 * (0.5 + 2 / 3 + 0.5) / 4)


def test_windows_of_mmseg_end_at_the_border_and_those_of_pixio_stick_out():
    assert dense_scores.corners(512, 512, 341, True) == [0]
    assert dense_scores.corners(700, 512, 341, True) == [0, 188]
    assert dense_scores.corners(1200, 512, 341, True) == [0, 341, 682, 688]
    assert dense_scores.corners(300, 512, 341, True) == [0]
    assert dense_scores.corners(256, 256, 170, False) == [0, 170]
    assert dense_scores.corners(480, 256, 170, False) == [0, 170, 340]


@pytest.mark.parametrize('shifted', [True, False])
def test_windows_put_together_are_the_image_and_average_where_they_overlap(shifted):
    rng = np.random.default_rng(0)
    images = [
        rng.random(size, np.float32) for size in ((8, 8, 3), (8, 8, 3), (13, 21, 3), (5, 9, 3))
    ]
    shapes = set()

    def same(windows):
        shapes.add(windows.shape)
        return windows

    options = dict(crop=8, stride=5, shifted=shifted, batch_size=3)
    for got, want in zip(dense_scores.sliding(images, same, **options), images, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)
    assert {s[0] for s in shapes} == {3}
    assert shapes == {(3, 8, 8, 3)} if not shifted else (3, 5, 8, 3) in shapes

    def place(windows):  # the row within the window
        rows = np.arange(windows.shape[1], dtype=np.float32)
        return np.broadcast_to(rows[:, None], windows.shape[:3])

    (got,) = dense_scores.sliding([images[2]], place, **options)
    want = [0, 1, 2, 3, 4, 2.5, 3.5, 4.5, 3, 4, 5, 6, 7]  # windows at 0 and 5
    if not shifted:
        want[10:] = [2.5, 3.5, 4.5]  # and 10
    np.testing.assert_allclose(got[:, 0], want)


def test_a_whole_image_is_one_window():
    image = np.ones((5, 7, 3), np.float32)
    (got,) = dense_scores.sliding(
        [image], lambda x: x[..., 0], crop=None, stride=0, shifted=True, batch_size=2
    )
    np.testing.assert_array_equal(got, image[..., 0])


def test_regions_are_the_official_ones():
    depth = np.full((480, 640), 5.0, np.float32)
    depth[100, 100], depth[200, 200] = 0.0, 11.0
    nyu = dense_scores.scored(depth, dense_scores.REGIONS['nyu'])
    assert nyu.sum() == (471 - 45) * (601 - 41) - 2 and nyu[45, 41] and not nyu[44, 41]
    kitti = dense_scores.scored(np.full((352, 1216), 5.0), dense_scores.REGIONS['kitti'])
    rows, columns = np.flatnonzero(kitti.any(axis=1)), np.flatnonzero(kitti.any(axis=0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (143, 348, 43, 1171)
    with pytest.raises(errors.UserError, match='640x480'):
        dense_scores.scored(depth[:100], dense_scores.REGIONS['nyu'])


def test_scores_of_a_known_error():
    gt = np.array([1.0, 2.0, 4.0])
    scores = dense_scores.depth_scores(2 * gt, gt)
    assert scores['AbsRel'] == pytest.approx(1) and scores['RMSE'] == pytest.approx(np.sqrt(7))
    assert scores['log10'] == pytest.approx(np.log10(2))
    assert scores['SiLog'] == pytest.approx(np.log(2) / np.sqrt(2))
    assert (scores['d1'], scores['d3']) == (0, 0)
    assert dense_scores.depth_scores(1.2 * gt, gt)['d1'] == 1
