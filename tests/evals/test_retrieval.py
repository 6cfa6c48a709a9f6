# SPDX-License-Identifier: Apache-2.0
import json
import pickle

import cv2
import jax
import numpy as np
import pytest

import frozen
from ssl_jax import sharding
from ssl_jax.data import sources
from ssl_jax.evals import copies, retrieval, task


def unit(x):
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def slow_class_map(x, y):
    """Leave one out, written as loops."""
    aps = []
    for i in range(len(x)):
        order = sorted((j for j in range(len(x)) if j != i), key=lambda j: (-float(x[i] @ x[j]), j))
        hits, total = 0, 0.0
        for place, j in enumerate(order):
            if y[j] == y[i]:
                hits += 1
                total += hits / (place + 1)
        if hits:
            aps.append(total / hits)
    return 100 * np.mean(aps)


def test_class_map_agrees_with_loops():
    rng = np.random.default_rng(0)
    x, y = unit(rng.normal(size=(40, 6))), rng.integers(0, 5, 40)
    scores, left = retrieval.class_scores(x, y, x, y, np.arange(40))
    assert scores['mAP (%)'] == pytest.approx(slow_class_map(x, y), abs=1e-4)
    assert left == 0


def test_chunks_and_queries_without_relevant_images_change_nothing(monkeypatch):
    rng = np.random.default_rng(1)
    x, y = unit(rng.normal(size=(23, 4))), np.array([*rng.integers(0, 3, 22), 9])
    want = retrieval.class_scores(x, y, x, y, np.arange(23))
    assert want[1] == 1
    monkeypatch.setattr(retrieval, 'CHUNK_ELEMENTS', 23 * 5)
    assert retrieval.class_scores(x, y, x, y, np.arange(23)) == want


def test_queries_on_eight_devices_have_the_same_scores():
    rng = np.random.default_rng(2)
    x, y = unit(rng.normal(size=(45, 6))), rng.integers(0, 5, 45)
    one, eight = (
        retrieval.class_scores(x[:21], y[:21], x, y, np.arange(21), sharding.make_mesh(devices=d))
        for d in (jax.devices()[:1], jax.devices())
    )
    assert one == eight


def test_official_average_precision_by_hand():
    # Relevant at ranks 0 and 2 of two: (1 + 1) / 2 and (1/2 + 2/3) / 2, each half.
    assert retrieval.average_precision(np.array([0, 2]), 2) == pytest.approx((1 + 7 / 12) / 2)
    # One of two is never found; at rank 1: (0 + 1/2) / 2, half.
    assert retrieval.average_precision(np.array([1]), 2) == pytest.approx(0.125)


GND = [
    {'easy': [3], 'hard': [1], 'junk': [0], 'bbx': [0, 0, 4, 4]},
    {'easy': [], 'hard': [2], 'junk': [4], 'bbx': [1, 1, 3, 3]},
]
RANKS = np.array([[0, 1, 3, 2, 4], [4, 0, 2, 1, 3]])


def test_junk_is_removed_before_ranks_are_counted():
    scores, empty = retrieval.landmark_scores(RANKS, GND, *retrieval.DIFFICULTIES['Medium'])
    # First query: junk 0 goes, 1 and 3 are the first two. Second: junk 4 goes, 2 is at rank 1.
    assert scores['mAP (%)'] == pytest.approx(100 * (1 + 0.25) / 2)
    assert scores['mP@1 (%)'] == 50  # of the first query alone
    # No further than the last relevant image: 2 of 2 and 1 of 2.
    assert scores['mP@5 (%)'] == scores['mP@10 (%)'] == 75
    assert empty == 0


def test_easy_and_hard_ignore_each_others_images():
    easy, empty = retrieval.landmark_scores(RANKS, GND, *retrieval.DIFFICULTIES['Easy'])
    assert easy['mAP (%)'] == 100 and empty == 1  # the second query has no easy image
    hard, empty = retrieval.landmark_scores(RANKS, GND, *retrieval.DIFFICULTIES['Hard'])
    assert hard['mAP (%)'] == pytest.approx(100 * (1 + 0.25) / 2) and empty == 0


@pytest.fixture
def landmarks(tmp_path):
    """Five buildings as colours; each query is a photo whose middle shows one of them."""
    colours = np.random.default_rng(0).integers(0, 256, (5, 3))
    folder = tmp_path / 'jpg'
    folder.mkdir()
    for i, colour in enumerate(colours):
        cv2.imwrite(str(folder / f'all_{i}.png'), np.full((40, 40, 3), colour, np.uint8))
    for k, i in enumerate((3, 2)):
        photo = np.full((40, 40, 3), 255 - colours[i], np.uint8)
        photo[10:30, 10:30] = colours[i]
        cv2.imwrite(str(folder / f'query_{k}.png'), photo)
    truth = {
        'imlist': [f'all_{i}' for i in range(5)],
        'qimlist': ['query_0', 'query_1'],
        'gnd': [
            {'easy': [3], 'hard': [], 'junk': [], 'bbx': [10.2, 9.8, 29.9, 30.1]},
            {'easy': [], 'hard': [2], 'junk': [], 'bbx': [10, 10, 30, 30]},
        ],
    }
    return folder, truth


def test_landmarks_are_found_by_the_part_of_the_photo_that_is_asked_for(landmarks, tmp_path):
    folder, truth = landmarks
    path = tmp_path / 'gnd.json'
    path.write_text(json.dumps(truth))
    work = frozen.work(tmp_path)
    data = task.Data(sources.open_source({'path': str(folder)}))
    rows = frozen.run('retrieval', frozen.pixels(), data, work, ground_truth=path)
    assert [row['feature'] for row in rows] == ['patch Easy', 'patch Medium', 'patch Hard']
    assert [row['scores']['mAP (%)'] for row in rows] == [100, 100, 100]
    truth['gnd'][0]['bbx'] = [0, 0, 9, 9]  # another part of the photo, in the wrong colour
    path.write_text(json.dumps(truth))
    rows = frozen.run('retrieval', frozen.pixels(), data, frozen.work(tmp_path / '2'),
                      ground_truth=path)  # fmt: skip
    assert rows[0]['scores']['mAP (%)'] < 100


def test_the_official_pickle_is_read_and_runs_nothing(landmarks, tmp_path):
    _, truth = landmarks
    official = {**truth, 'gnd': [
        {**g, 'easy': np.array(g['easy'], np.int64), 'bbx': [np.float64(v) for v in g['bbx']]}
        for g in truth['gnd']
    ]}  # fmt: skip
    for protocol in (2, 4):
        path = tmp_path / 'gnd_toy.pkl'
        path.write_bytes(pickle.dumps(official, protocol))
        assert retrieval.ground_truth(str(path)) == truth

    class Evil:
        def __reduce__(self):
            return (print, ('run',))

    path.write_bytes(pickle.dumps({'imlist': Evil()}))
    with pytest.raises(ValueError, match=r'builtins.print'):
        retrieval.ground_truth(str(path))


def test_a_missing_photo_is_named(landmarks, tmp_path):
    folder, truth = landmarks
    (folder / 'all_4.png').unlink()
    path = tmp_path / 'gnd.json'
    path.write_text(json.dumps(truth))
    data = task.Data(sources.open_source({'path': str(folder)}))
    with pytest.raises(ValueError, match='1 of 5 images .* all_4'):
        frozen.run('retrieval', frozen.pixels(), data, frozen.work(tmp_path), ground_truth=path)


def coloured(n, seed, labelled=True):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    images = rng.integers(0, 120, (n, 32, 32, 3))
    images[np.arange(n), :, :, labels] += 100
    labels = labels if labelled else None
    return sources.Arrays(images.astype(np.uint8), labels, 'rgb' if labelled else None)


@pytest.mark.slow
def test_class_images_are_found_alike_on_one_and_eight_devices(tmp_path):
    rows = {}
    for devices in (1, 8):
        work = frozen.work(tmp_path / str(devices), devices=devices)
        model = frozen.untrained()
        alone = frozen.run('retrieval', model, task.Data(coloured(30, 0)), work)
        both = task.Data(coloured(30, 0), coloured(11, 1))
        rows[devices] = [*alone, *frozen.run('retrieval', model, both, work)]
    assert [row['feature'] for row in rows[1]] == ['cls', 'patch', 'cls', 'patch']
    assert 'leave one out' in rows[1][0]['protocol']['split']
    assert rows[1][2]['protocol']['queries'] == 11
    assert rows[1][1]['scores']['mAP (%)'] > 50  # by chance about 33
    for a, b in zip(rows[1], rows[8], strict=True):
        assert a['scores'] == pytest.approx(b['scores'], abs=1e-3)


def test_retrieval_without_labels_asks_for_them(tmp_path):
    data = task.Data(coloured(4, 0, labelled=False))
    with pytest.raises(ValueError, match='class folders, or retrieval.ground_truth'):
        frozen.run('retrieval', frozen.pixels(), data, frozen.work(tmp_path))


# Copies.


def test_copy_scores_agree_with_loops():
    rng = np.random.default_rng(0)
    database = unit(rng.normal(size=(15, 5)))
    own = np.array([3, 7, 7, 0, 14])
    queries = unit(database[own] + 0.6 * rng.normal(size=(5, 5)))
    similarity = queries @ database.T
    ranks = [1 + (s > s[o]).sum() for s, o in zip(similarity, own, strict=True)]
    got = copies.scores(queries, own, database)
    assert got['top-1 (%)'] == 100 * np.mean([r == 1 for r in ranks])
    assert got['mAP (%)'] == pytest.approx(100 * np.mean([1 / r for r in ranks]))
    pairs = []
    for q, s in enumerate(similarity):
        pairs += [(-s[i], i == own[q]) for i in np.argsort(-s)[: copies.CANDIDATES]]
    hits, area = 0, 0.0
    for place, (_, hit) in enumerate(sorted(pairs)):
        hits += hit
        area += hit * hits / (place + 1)
    assert got['micro-AP (%)'] == pytest.approx(100 * area / 5)


def test_equal_features_do_not_count_as_found():
    same = np.full((4, 2), 0.5**0.5, np.float32)
    assert copies.scores(same, np.arange(4), same)['top-1 (%)'] == 25


@pytest.mark.parametrize('name', copies.EDITS)
def test_an_edit_changes_the_image_and_depends_on_seed_and_image_alone(name):
    image = frozen.position_image(64)
    edited = copies.edit(image, 5, 0, (name,))
    assert edited.shape != image.shape or (edited != image).mean() > 0.03
    assert edited.dtype == np.uint8 and edited.shape[2] == 3
    assert (edited == copies.edit(image, 5, 0, (name,))).all()
    for i, seed in ((6, 0), (5, 1)):
        other = copies.edit(image, i, seed, (name,))
        assert other.shape != edited.shape or (other != edited).any()


def test_unedited_copies_are_all_found_and_edited_ones_are_not(tmp_path):
    data = task.Data(coloured(24, 3, labelled=False))
    scores = {}
    for edits in ('()', "('jpeg',)", "('crop', 'rotation', 'colour', 'overlay', 'jpeg')"):
        work = frozen.work(tmp_path)
        (row,) = frozen.run('copies', frozen.pixels(), data, work, edits=edits)
        scores[edits] = row['scores']['top-1 (%)']
        assert row['protocol']['queries'] == 24
    assert list(scores.values()) == sorted(scores.values(), reverse=True)
    assert max(scores.values()) == 100 > 60 > min(scores.values())


def test_copies_are_found_alike_on_one_and_eight_devices(tmp_path):
    rows = []
    for devices in (1, 8):
        work = frozen.work(tmp_path / str(devices), devices=devices, limit=10)
        data = task.Data(coloured(20, 3, labelled=False))
        rows.append(frozen.run('copies', frozen.untrained(), data, work))
    for a, b in zip(*rows, strict=True):
        assert a['scores'] == pytest.approx(b['scores'], abs=1e-3)


def test_an_unknown_edit_is_named(tmp_path):
    data = task.Data(coloured(4, 0))
    with pytest.raises(ValueError, match=r"no edit 'jpg': did you mean 'jpeg'"):
        frozen.run('copies', frozen.pixels(), data, frozen.work(tmp_path), edits="('jpg',)")
