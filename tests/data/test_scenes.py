# SPDX-License-Identifier: Apache-2.0
"""Rendered scenes are a pure function of their number, and their maps fit the picture."""

import pickle

import numpy as np
import pytest

from ssl_jax.data import scenes


def same(a, b):
    return all(np.array_equal(a[k], b[k]) for k in a)


def test_a_scene_is_a_function_of_seed_split_and_number_alone():
    a, b = scenes.Scenes(20, 32), scenes.Scenes(400, 32)
    b[399], b[3]
    assert all(same(a[i], b[i]) for i in (7, 3, 19))
    assert same(pickle.loads(pickle.dumps(a))[5], b[5])


def test_other_seeds_and_splits_give_other_pictures():
    one = scenes.Scenes(4, 32)[1]['image']
    for other in (scenes.Scenes(4, 32, seed=1), scenes.Scenes(4, 32, split='test')):
        assert np.abs(one.astype(int) - other[1]['image']).mean() > 5


def test_shapes_and_types_are_those_of_a_source():
    item = scenes.Scenes(2, 48)[1]
    assert item['image'].shape == (48, 48, 3) and item['image'].dtype == np.uint8
    assert item['segmentation'].shape == (48, 48) and item['segmentation'].dtype == np.uint8
    assert item['depth'].shape == (48, 48) and item['depth'].dtype == np.float32
    assert isinstance(item['label'], int)


def test_labels_are_balanced_over_all_classes():
    labels = [scenes.Scenes(100, 16)[i]['label'] for i in range(100)]
    assert np.bincount(labels).tolist() == [10] * len(scenes.CLASSES)


def test_the_label_is_the_class_of_the_largest_object():
    source = scenes.Scenes(60, 48)
    for i in range(60):
        counts = np.bincount(source[i]['segmentation'].ravel(), minlength=11)[1:]
        assert counts[source[i]['label']] >= 0.025 * 48 * 48
    largest = [
        np.bincount(source[i]['segmentation'].ravel(), minlength=11)[1:].argmax() for i in range(60)
    ]
    assert np.mean([a == source[i]['label'] for i, a in enumerate(largest)]) > 0.9


def test_objects_are_nearer_than_the_background_and_depth_is_bounded():
    for i in range(20):
        item = scenes.render(i, 48)
        inside = item['segmentation'] > 0
        assert item['depth'][inside].max() < 4.01 < item['depth'][~inside].min()
        assert item['depth'].min() > 0.69 and item['depth'].max() <= 9


@pytest.mark.parametrize('flip', [False, True])
def test_where_objects_overlap_the_nearer_one_is_seen(monkeypatch, flip):
    near = dict(kind=0, radius=0.3, depth=1.5, x=0.5, y=0.5)
    far = dict(kind=2, radius=0.3, depth=3.0, x=0.5, y=0.5)
    objects = [near, far][:: -1 if flip else 1]
    monkeypatch.setattr(scenes, '_objects', lambda rng, label: objects)
    item = scenes.render(0, 48)
    assert item['segmentation'][24, 24] == 1 and item['depth'][24, 24] < 1.6


def test_the_class_cannot_be_read_from_colour_or_raw_pixels():
    train, test = scenes.Scenes(400, 24), scenes.Scenes(100, 24, split='test')

    def table(source):
        items = [source[i] for i in range(len(source))]
        pixels = np.stack([x['image'].reshape(-1) for x in items]).astype(np.float32)
        return pixels, np.array([x['label'] for x in items])

    def accuracy(a, b):
        distance = (a**2).sum(1)[None] - 2 * b @ a.T
        return np.mean(labels[distance.argmin(1)] == wanted)

    (a, labels), (b, wanted) = table(train), table(test)
    colour = [x.reshape(len(x), -1, 3).mean(1) for x in (a, b)]
    assert accuracy(a, b) < 0.3 and accuracy(*colour) < 0.3  # chance is 0.1


def test_what_cannot_be_rendered_is_refused():
    with pytest.raises(ValueError, match='size >= 16'):
        scenes.Scenes(4, size=8)
