# SPDX-License-Identifier: Apache-2.0
import numpy as np
import pytest

import frozen
from ssl_jax.data import scenes, sources
from ssl_jax.evals import pck, task


def photos(n=6):
    source = scenes.Scenes(n, 96)
    return sources.Arrays([source[i]['image'] for i in range(n)])


def test_features_that_are_the_place_find_every_patch(tmp_path):
    source = sources.Arrays([frozen.position_image()] * 4)
    work = frozen.work(tmp_path, size=64)
    (row,) = frozen.run('pck', frozen.Positions(), task.Data(source), work)
    assert row['scores']['PCK@0.1 (%)'] == 100
    # 3.2 pixels, less than half a patch: thanks to the parabola, which the outermost patches lack.
    assert row['scores']['PCK@0.05 (%)'] > 90
    assert row['scores']['error (px)'] < 1.5
    assert row['scores']['same place: PCK@0.1 (%)'] < 60


def test_the_homography_is_that_of_the_pixels():
    image = frozen.position_image(400)
    side = 100
    for i in range(5):
        first, second = (pck.warp(image, pck.view(0, i, k), side) for k in (0, 1))
        y, x = np.mgrid[5:95:9, 5:95:9]
        points = np.stack([x.ravel(), y.ravel()], axis=1)
        there = pck.apply(pck.homography(0, i, side), points.astype(float))
        inside = ((there > 2) & (there < side - 3)).all(axis=1)
        assert inside.sum() > 10
        colours = first[points[:, 1], points[:, 0]].astype(float)
        found = np.round(there[inside]).astype(int)
        other = second[found[:, 1], found[:, 0]].astype(float)
        # Half a pixel of rounding, in grey levels of a ramp of 255 over the photo.
        assert np.abs(colours[inside] - other)[:, :2].max() < 4


def test_crops_are_a_function_of_seed_and_image_and_stay_inside():
    for i in range(50):
        corners = pck.view(3, i, 0)
        assert (corners > -1e-9).all() and (corners < 1 + 1e-9).all()
        assert (corners == pck.view(3, i, 0)).all()
        assert not np.allclose(corners, pck.view(4, i, 0))
        assert not np.allclose(corners, pck.view(3, i, 1))


def test_nearest_patches_agree_with_brute_force():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 25, 7)).astype(np.float32)
    unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
    got = np.asarray(pck.matches(x, 5))
    for pair in range(2):
        best = (unit[2 * pair] @ unit[2 * pair + 1].T).argmax(axis=1)
        want = np.stack([best % 5, best // 5], axis=1)
        assert (np.abs(got[pair] - want) <= 0.5).all()


def test_the_parabola_finds_a_peak_between_patches():
    grid, peak = 7, np.array([2.3, 3.8])  # column, row
    y, x = np.mgrid[:grid, :grid]
    cosine = 0.9 - 0.01 * ((x - peak[0]) ** 2 + (y - peak[1]) ** 2).ravel()
    query = np.zeros((grid * grid, 2), np.float32)
    query[:, 0] = 1
    keys = np.stack([cosine, np.sqrt(1 - cosine**2)], axis=1).astype(np.float32)
    got = np.asarray(pck.matches(np.stack([query, keys]), grid))[0, 0]
    assert got == pytest.approx(peak, abs=1e-3)


@pytest.mark.slow
def test_one_and_eight_devices_give_the_same_numbers_for_last_and_middle_layers(tmp_path):
    rows = {}
    for devices in (1, 8):
        work = frozen.work(tmp_path / str(devices), devices=devices)
        rows[devices] = frozen.run('pck', frozen.untrained(), task.Data(photos()), work)
    assert [row['feature'] for row in rows[1]] == ['last', 'block 1']
    for a, b in zip(rows[1], rows[8], strict=True):
        assert a['scores'] == pytest.approx(b['scores'], abs=1e-3)
        assert a['protocol_id'] == b['protocol_id']


def test_images_that_do_not_decode_are_left_out(tmp_path):
    images = [frozen.position_image(), b'no image', frozen.position_image()]
    work = frozen.work(tmp_path, size=64)
    (row,) = frozen.run('pck', frozen.Positions(), task.Data(sources.Arrays(images)), work)
    assert row['protocol']['pairs'] == 2
    assert row['scores']['PCK@0.1 (%)'] == 100


def test_similarity_is_one_at_the_same_place_of_the_same_image():
    image = scenes.Scenes(1, 32)[0]['image']
    for model, block in ((frozen.pixels(), None), (frozen.untrained(), 1)):
        found = pck.similarity(model, image, (17, 9), image, block)
        assert found.shape == (4, 4)
        assert found[2, 1] == pytest.approx(1, abs=1e-5) == found.max()
    assert pck.similarity(frozen.pixels(), image, (17, 9), image[:16]).shape == (2, 4)
    with pytest.raises(ValueError, match=r'\(40, 0\) is no pixel'):
        pck.similarity(frozen.pixels(), image, (40, 0), image)
