# SPDX-License-Identifier: Apache-2.0
import cv2
import jax
import numpy as np
import pytest

import frozen
from ssl_jax import sharding
from ssl_jax.evals import task, video

SETTINGS = dict(short_side=64)


def moving_bar(count=6, side=64, step=8, width=24, noise=0):
    """A red bar on green, `step` pixels further to the right in each frame.

    A bar, as bilinear upsampling rounds corners.
    """
    rng = np.random.default_rng(0)
    images, maps = [], []
    for k in range(count):
        bar = slice(k * step, k * step + width)
        image, labels = np.zeros((side, side, 3), np.uint8), np.zeros((side, side), np.uint8)
        image[..., 1] = 200
        image[:, bar], labels[:, bar] = (250, 20, 20), 1
        images.append(np.clip(image + rng.integers(0, noise + 1, image.shape), 0, 255))
        maps.append(labels)
    return np.stack(images).astype(np.uint8), maps


def test_a_bar_that_moves_by_whole_patches_is_followed_perfectly(tmp_path):
    data = task.Data(frozen.Maps(*moving_bar()))
    (row,) = frozen.run('video', frozen.pixels(), data, frozen.work(tmp_path), **SETTINGS)
    assert row['scores']['J (%)'] == row['scores']['F (%)'] == 100
    assert row['scores']['first labels repeated: J&F (%)'] < 60
    assert [o['label'] for o in row['objects']] == [0, 1]


def test_beyond_the_window_nothing_is_found(tmp_path):
    data = task.Data(frozen.Maps(*moving_bar(5, step=16, width=8)))
    j = {}
    for radius in (1, 2):
        work = frozen.work(tmp_path)
        (row,) = frozen.run('video', frozen.pixels(), data, work, radius=radius, **SETTINGS)
        j[radius] = row['objects'][1]['J']
    assert j == {1: 0, 2: 100}


def test_background_is_carried_but_not_scored(tmp_path):
    source = frozen.Maps(*moving_bar(noise=60))
    work = frozen.work(tmp_path)
    (row,) = frozen.run('video', frozen.pixels(), task.Data(source), work, background=0, **SETTINGS)
    assert [o['label'] for o in row['objects']] == [1]
    source.map_classes = ('background', 'bar')
    (same,) = frozen.run('video', frozen.pixels(), task.Data(source), work, **SETTINGS)
    assert same['scores'] == row['scores']


def test_ignored_pixels_have_no_label_and_are_not_scored(tmp_path):
    images, maps = moving_bar()
    for labels in maps:
        labels[48:] = 255
    maps[0][:, :8] = 255  # a third of the bar has no label at first
    (row,) = frozen.run(
        'video', frozen.pixels(), task.Data(frozen.Maps(images, maps)), frozen.work(tmp_path),
        **SETTINGS,
    )  # fmt: skip
    assert row['scores']['J (%)'] == 100


def test_each_folder_is_a_sequence_and_finished_ones_are_kept(tmp_path, monkeypatch):
    images, maps = moving_bar(4)
    names = [f'/d/{s}/{k:02}.jpg' for s in ('a', 'b') for k in range(4)]
    source = frozen.Maps(np.concatenate([images, images]), maps + maps, names)
    assert video.sequences(source) == {'/d/a': [0, 1, 2, 3], '/d/b': [4, 5, 6, 7]}
    assert video.sequences(source, 5) == {'/d/a': [0, 1, 2, 3]}
    assert video.sequences(source, 7) == {'/d/a': [0, 1, 2, 3], '/d/b': [4, 5, 6]}
    model, done = frozen.pixels(), []
    sequence = video._sequence

    def once(model, source, indices, *more):
        if done and len(done) < 2:
            done.append('killed')
            raise KeyboardInterrupt
        done.append(indices[0])
        return sequence(model, source, indices, *more)

    monkeypatch.setattr(video, '_sequence', once)
    with pytest.raises(KeyboardInterrupt):
        frozen.run('video', model, task.Data(source), frozen.work(tmp_path), **SETTINGS)
    (row,) = frozen.run('video', model, task.Data(source), frozen.work(tmp_path), **SETTINGS)
    assert done == [0, 'killed', 4]
    assert row['protocol']['sequences'] == 2 and row['scores']['J (%)'] == 100


def test_one_and_eight_devices_give_the_same_numbers(tmp_path):
    scores = []
    for devices in (1, 8):
        work = frozen.work(tmp_path / str(devices), devices=devices)
        data = task.Data(frozen.Maps(*moving_bar(5, step=5, noise=30)))
        (row,) = frozen.run('video', frozen.untrained(), data, work, short_side=32)
        scores.append(row['scores'])
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)


def test_frames_that_are_not_square_keep_their_shape(tmp_path):
    images, maps = moving_bar(4)
    source = frozen.Maps(images[:, 8:56], [labels[8:56] for labels in maps])
    work = frozen.work(tmp_path)
    (row,) = frozen.run('video', frozen.pixels(), task.Data(source), work, short_side=48)
    assert row['scores']['J (%)'] == 100
    # CamVid: 480 x 360 in patches of 16.
    assert video._sides(360, 480, 480, 16) == (480, 640)
    assert video._sides(360, 480, 360, 16) == (352, 464)


def test_too_few_frames_and_broken_ones_are_named(tmp_path):
    images, maps = moving_bar(4)
    work = frozen.work(tmp_path)
    with pytest.raises(ValueError, match='2 frames: video needs three'):
        data = task.Data(frozen.Maps(images[:2], maps[:2]))
        frozen.run('video', frozen.pixels(), data, work, **SETTINGS)
    data = task.Data(frozen.Maps([*images[:3], b'broken'], maps))
    with pytest.raises(ValueError, match=r'array 3 does not decode .* needs all of its frames'):
        frozen.run('video', frozen.pixels(), data, work, **SETTINGS)


def slow_propagation(context, labels, tokens, grid, radius, k, temperature):
    """As in the paper: all affinities, those outside the window 0, the k largest normalised."""
    n, out = len(tokens), []
    for i in range(n):
        pairs = []
        for x, y in zip(context, labels, strict=True):
            for j in range(n):
                dy, dx = i // grid[1] - j // grid[1], i % grid[1] - j % grid[1]
                if max(abs(dy), abs(dx)) <= radius:
                    pairs.append((np.exp(x[j] @ tokens[i] / temperature), y[j]))
        pairs = sorted(pairs, key=lambda p: -p[0])[:k]
        total = sum(p[0] for p in pairs)
        out.append(sum(p[0] / total * p[1] for p in pairs))
    return np.stack(out)


@pytest.mark.parametrize('devices', [1, 8])
def test_propagation_agrees_with_loops_over_first_and_last_frames(devices):
    mesh = sharding.make_mesh(fsdp=min(2, devices), devices=jax.devices()[:devices])
    rng = np.random.default_rng(0)
    grid, frames = (3, 4), 2
    x = rng.normal(size=(5, 12, 6)).astype(np.float32)
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    first = rng.random((12, 4)).astype(np.float32)
    memory, seen = video.Memory(x[0], first, frames, mesh), [(x[0], first)]
    for tokens in x[1:]:
        context = seen[:1] + seen[1:][-frames:]
        want = slow_propagation(*zip(*context, strict=True), tokens, grid, 1, 5, 0.1)
        got = np.asarray(memory.propagate(tokens, grid, 1, 5, 0.1))
        assert got == pytest.approx(want, abs=1e-5)
        seen.append((tokens, got))


def test_soft_labels_are_scaled_per_class_before_the_argmax():
    soft = np.zeros((4, 4), np.float32)
    soft[:, 0] = (0.9, 0.8, 0.7, 0.6)
    soft[:, 1] = (0.1, 0.2, 0.3, 0.4)  # never the largest, but full where it is strongest
    index = np.asarray(video.decode(soft, (2, 2), (8, 8)))
    assert index[0, 0] == 0 and index[7, 7] == 1


def test_region_and_outline_of_hand_made_masks():
    truth = np.zeros((100, 100), np.uint8)
    truth[20:60, 20:60] = 1
    assert video.region_and_outline(truth, truth, 1) == (1, 1)
    shifted = np.roll(truth, 20, axis=1)
    j, f = video.region_and_outline(shifted, truth, 1)
    assert j == pytest.approx(1 / 3)
    # Diagonal 141: outlines may be ceil(1.13) = 2 pixels apart; half of the long sides coincide.
    assert 0.2 < f < 0.4
    assert video.region_and_outline(np.roll(truth, 2, axis=1), truth, 1)[1] == 1
    assert video.region_and_outline(np.roll(truth, 3, axis=1), truth, 1)[1] < 0.75
    assert video.region_and_outline(np.zeros_like(truth), truth, 1) == (0, 0)
    assert video.region_and_outline(truth, truth, 2) == (1, 1)  # neither has the class
    ignored = np.where(shifted != truth, 255, truth).astype(np.uint8)
    assert video.region_and_outline(shifted, ignored, 1)[0] == 1


def test_the_outline_is_that_of_davis():
    mask = np.zeros((5, 6), bool)
    mask[1:3, 2:4] = True
    want = np.zeros((5, 6), bool)
    want[0, 1:4] = want[1, [1, 3]] = want[2, 1:4] = True
    assert (video.outline(mask) == want).all()


def test_a_video_of_files_is_read_from_disk(tmp_path):
    """JPEG frames: the source decides what is read, the frames come in the order of names."""
    images, maps = moving_bar(4)
    coded = [cv2.imencode('.png', image[..., ::-1])[1].tobytes() for image in images]
    source = frozen.Maps(coded, maps)
    (row,) = frozen.run(
        'video', frozen.pixels(), task.Data(source), frozen.work(tmp_path), **SETTINGS
    )
    assert row['scores']['J (%)'] == 100
