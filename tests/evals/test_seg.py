# SPDX-License-Identifier: Apache-2.0
"""Segmentation by frozen patches equals brute force, with one device or eight."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest

import processes
import tiny
from ssl_jax import encoder, sharding, train
from ssl_jax.data import scenes
from ssl_jax.data import transform as transform_lib
from ssl_jax.evals import features, linear, seg, task
from ssl_jax.models import patches as patches_lib
from ssl_jax.run import errors, metrics

CLASSES = ('dark', 'red', 'green', 'blue')
SIZE, PATCH = 24, 4
MOMENTS = dict(mean=[0.5, 0.5, 0.5], std=[0.25, 0.25, 0.25])
METHOD = type('Method', (), dict(classes=()))


class Blocks:
    """Images of coloured rectangles whose class is the colour; some borders are ignored."""

    classes = None
    map_classes = CLASSES

    def __init__(self, n, seed=0, noise=60):
        rng = np.random.default_rng(seed)
        self.maps = np.zeros((n, SIZE, SIZE), np.uint8)
        for m in self.maps:
            for _ in range(5):
                y, x = rng.integers(0, SIZE - 6, 2)
                m[y : y + rng.integers(4, 14), x : x + rng.integers(4, 14)] = rng.integers(1, 4)
        colours = np.array([[20, 20, 20], [160, 40, 40], [40, 160, 40], [40, 40, 160]])
        self.images = colours[self.maps] + rng.integers(-20, noise, (n, SIZE, SIZE, 3))
        self.images = self.images.clip(0, 255).astype(np.uint8)
        self.maps[:, :5] = self.maps[:, :, -1] = 255
        self.fingerprint = f'blocks-{n}-{seed}-{noise}'

    def __len__(self):
        return len(self.maps)

    def __getitem__(self, i):
        return dict(image=self.images[i], segmentation=self.maps[i])

    def describe(self, i):
        return f'block {i}'


def work(folder, devices=1, **more):
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    log = more.pop('log', lambda *lines: None)
    transform = dict(transform_lib.of(SIZE), **MOMENTS)
    return task.Work(mesh, transform, pathlib.Path(folder), batch_size=16, log=log, **more)


def evaluated(folder, data, devices=1, model=None, **fields):
    model = model or encoder.Pixels(PATCH, dict(transform_lib.of(SIZE), **MOMENTS))
    settings = seg.Settings(**fields)
    return list(seg.evaluate(model, data, settings, work(folder, devices)))


def tokens(source):
    """(n N, D) standardised by nothing, (n N, m) labels with 255."""
    x = (source.images / 255 - 0.5) / 0.25
    cut = lambda a: np.asarray(patches_lib.patchify(a, PATCH))  # noqa: E731
    labels = cut(np.repeat(source.maps[..., None], 3, axis=-1))[..., ::3]
    flat = cut(x.astype(np.float32))
    return flat.reshape(-1, flat.shape[-1]), labels.reshape(-1, labels.shape[-1])


def modes(labels):
    """(..., m) -> (...): the most frequent label, the lowest of equals."""
    return np.apply_along_axis(lambda a: np.bincount(a, minlength=256).argmax(), -1, labels)


def miou(labels, predicted):
    """The definition in the docstring of `seg`, class by class."""
    keep, ious = labels != 255, []
    for c in range(len(CLASSES)):
        a, b = (labels == c) & keep, (predicted == c) & keep
        if (a | b).any():
            ious.append((a & b).sum() / (a | b).sum())
    return 100 * np.mean(ious)


def brute_force(train_source, test_source, k, metric):
    """mIoU of kNN with numpy in float64, all pairs of patches."""
    x, labels = tokens(train_source)
    q, truth = tokens(test_source)
    held = np.isin(
        np.repeat(np.arange(len(train_source)), len(x) // len(train_source)),
        linear.split(len(train_source), 0)[1],
    )
    mean, std = x[~held].mean(0, dtype=np.float64), x[~held].std(0, dtype=np.float64)
    x, q = (x - mean) / std, (q - mean) / std
    keep = modes(labels) != 255
    x, labels = x[keep], labels[keep]
    if metric == 'cosine':
        unit = lambda a: a / np.linalg.norm(a, axis=1, keepdims=True)  # noqa: E731
        near = -unit(q) @ unit(x).T
    else:
        near = ((q[:, None] - x[None]) ** 2).sum(-1)
    near = np.argsort(near, axis=1, kind='stable')[:, :k]
    return miou(truth, modes(labels[near].swapaxes(1, 2)))


@pytest.fixture(scope='module')
def data():
    return task.Data(Blocks(20), Blocks(6, seed=1))


@pytest.fixture(scope='module')
def rows(data, tmp_path_factory):
    return evaluated(tmp_path_factory.mktemp('seg'), data)


@pytest.mark.parametrize(('k', 'metric'), [(1, 'cosine'), (4, 'L2')])
def test_knn_equals_brute_force_over_all_pairs_of_patches(data, tmp_path, monkeypatch, k, metric):
    monkeypatch.setattr(seg, 'METRICS', (metric,))
    (row,) = evaluated(tmp_path, data, ks=(k,), cs=())
    expected = brute_force(data.train, data.test, k, metric)
    assert row['scores']['mIoU'] == pytest.approx(expected, abs=0.05)
    assert 30 < row['scores']['mIoU'] < 95  # neither trivial nor by chance


def test_settings_are_those_that_were_best_on_held_out_images(rows):
    knn, logreg = rows
    best = max(knn['sweep'], key=lambda row: row['miou'])
    assert len(knn['sweep']) == 8 and len(logreg['sweep']) == 8
    assert knn['chosen'] == {key: best[key] for key in ('k', 'metric')}
    best = max(logreg['sweep'], key=lambda row: row['miou'])
    assert logreg['chosen']['c'] == best['c']
    assert 'mIoU on 2 training images' in knn['protocol']['selection']


@pytest.mark.slow
def test_eight_devices_give_the_numbers_of_one(rows, data, tmp_path):
    for one, eight in zip(rows, evaluated(tmp_path, data, devices=8), strict=True):
        assert one['protocol_id'] == eight['protocol_id']
        for key in {'k', 'metric', 'c'} & set(one['chosen']):
            assert one['chosen'][key] == eight['chosen'][key]
        for name, score in one['scores'].items():
            assert eight['scores'][name] == pytest.approx(score, abs=0.02)


def test_logistic_regression_of_colours_segments_what_one_patch_can_tell(rows):
    logreg = rows[1]
    assert logreg['feature'] == 'logistic regression'
    assert logreg['scores']['mIoU'] > 60
    assert set(logreg['iou']) == set(CLASSES)
    assert logreg['scores']['mIoU'] == pytest.approx(np.mean(list(logreg['iou'].values())))


def test_what_test_images_show_where_they_are_ignored_changes_no_number(rows, data, tmp_path):
    test = Blocks(6, seed=1)
    hidden = (test.maps == 255).reshape(6, 6, PATCH, 6, PATCH).all(axis=(2, 4))
    hidden = np.kron(hidden, np.ones((1, PATCH, PATCH), bool))  # patches without a label
    noise = np.random.default_rng(5).integers(0, 256, test.images.shape)
    test.images = np.where(hidden[..., None], noise, test.images).astype(np.uint8)
    assert hidden.any()
    (again,) = evaluated(tmp_path, task.Data(data.train, test), cs=())
    assert again['scores'] == rows[0]['scores']


def test_the_database_is_bounded_and_the_protocol_says_so(data, tmp_path):
    (row,) = evaluated(tmp_path, data, max_patches=200, cs=())
    assert row['protocol']['patches'].startswith('200 of 720 training patches')
    (again,) = evaluated(tmp_path, data, max_patches=200, cs=(), devices=8)
    assert again['scores'] == row['scores']


def test_ties_fall_to_the_lowest_label_and_ignored_pixels_vote():
    labels = np.array([[0, 2, 3], [1, 2, 3], [1, 0, 2], [2, 1, 1]])
    near = np.array([[0, 1], [3, 2], [1, 2]])
    np.testing.assert_array_equal(seg.vote(labels, near, 3), [[0, 2, 3], [1, 0, 1], [1, 0, 2]])


def test_votes_counted_in_parts_are_those_of_the_whole(monkeypatch):
    rng = np.random.default_rng(0)
    labels, near = rng.integers(0, 5, (40, 7)), rng.integers(0, 40, (31, 6))
    whole = seg.vote(labels, near, 4)
    np.testing.assert_array_equal(whole, modes(labels[near].swapaxes(1, 2)))
    monkeypatch.setattr(seg, 'VOTES', 100)
    np.testing.assert_array_equal(seg.vote(labels, near, 4), whole)


def test_the_mean_is_over_classes_that_occur_and_a_miss_is_counted_once():
    labels = np.array([[0, 0, 1, 1, 3, 3]])  # 3 is ignored, 2 does not occur
    predicted = np.array([[0, 1, 1, 3, 0, 2]])  # one pixel of class 1 gets no class
    found, iou = seg.scores(seg.tally(labels, predicted, 3))
    assert iou == pytest.approx([50.0, 100 / 3, None])
    assert found == pytest.approx({'mIoU': (50 + 100 / 3) / 2, 'pixel accuracy': 50.0})


def test_a_label_beyond_the_classes_names_the_image(tmp_path):
    train = Blocks(8)
    train.maps[5, 10, 10] = 9
    with pytest.raises(errors.UserError, match='class map of block 5 has the label 9.*4 classes'):
        evaluated(tmp_path, task.Data(train, Blocks(2)))


def test_sets_with_other_classes_are_an_error(tmp_path):
    test = Blocks(2)
    test.map_classes = ('sky', *CLASSES)
    with pytest.raises(errors.UserError, match='give both the same map_classes'):
        evaluated(tmp_path, task.Data(Blocks(8), test))


PROCESSES = """
    import json, pathlib, sys
    sys.path.insert(0, {here!r})
    import test_attentive
    import test_seg
    from ssl_jax.evals import task
    from ssl_jax.run import launch
    launch.initialize_distributed()
    import jax
    folder = pathlib.Path({folder!r})
    data = task.Data(test_seg.Blocks(20), test_seg.Blocks(6, seed=1))
    rows = test_seg.evaluated(folder, data, devices=4)
    rows.append(test_attentive.evaluated(folder, 4, epochs=2, limit=70, batch_size=32))
    (folder / f'{{jax.process_index()}}.json').write_text(json.dumps(rows))
    jax.distributed.shutdown()
"""


@pytest.mark.slow
def test_two_processes_yield_the_rows_of_one(rows, tmp_path):
    here = str(pathlib.Path(__file__).parent)
    for code, out in map(
        processes.finish, processes.twice(PROCESSES.format(here=here, folder=str(tmp_path)), 2)
    ):
        assert code == 0, out
    first, second = (json.loads((tmp_path / f'{i}.json').read_text()) for i in (0, 1))
    assert first == second
    for one, two in zip(rows, first[:2], strict=True):
        assert one['protocol_id'] == two['protocol_id']
        assert two['scores'] == pytest.approx(one['scores'], abs=0.02)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    config = tiny.config(
        total_steps=2,
        warmup_steps=0,
        eval__every_steps=1,
        eval__tasks__seg=dict(limit=16, k=3),
        data__eval_train=dict(source='scenes', n=32, size=32),
        data__eval_test=dict(source='scenes', n=20, size=32, split='test'),
    )
    train.train(config, folder)
    return folder


def test_a_run_on_images_with_class_maps_reports_their_segmentation(run):
    found = [row['seg/miou'] for row in metrics.read(run) if 'seg/miou' in row]
    assert len(found) == 2 and all(0 < x < 100 for x in found)


def test_the_number_of_the_loop_is_that_of_the_frozen_encoder(run):
    model = encoder.load_model(run)
    read = functools.partial(features.batches, transform=model.transform, limit=16)
    sets = [
        features.limited(scenes.Scenes(n, 32, split=s), 16)
        for n, s in ((32, 'train'), (20, 'test'))
    ]
    (x, labels), (q, truth) = (
        [
            np.concatenate(
                [part[i].reshape(-1, part[i].shape[-1]) for part in seg.patches(model, read, s, 11)]
            )
            for i in (0, 1)
        ]
        for s in sets
    )
    mean, std = x.mean(0), x.std(0)
    unit = lambda a: a / np.linalg.norm(a, axis=1, keepdims=True)  # noqa: E731
    near = np.argsort(-unit((q - mean) / std) @ unit((x - mean) / std).T, axis=1)[:, :3]
    counts = seg.tally(truth, seg.vote(labels, near, 11), 11)
    last = [row['seg/miou'] for row in metrics.read(run) if 'seg/miou' in row][-1]
    assert seg.scores(counts)[0]['mIoU'] == pytest.approx(last, abs=0.2)


def test_a_run_whose_sets_name_other_classes_ends_before_its_first_step():
    look = type('Look', (), dict(train=Blocks(2), test=Blocks(2), method=METHOD))
    seg.check(seg.Options(), look)
    look.test.map_classes = ('sky', *CLASSES)
    with pytest.raises(errors.UserError, match='give both the same map_classes'):
        seg.check(seg.Options(), look)


def test_images_without_class_maps_are_left_alone():
    look = type('Look', (), dict(train=None, test=None, method=METHOD))
    assert seg.run(seg.Options(), look, None, 0) == {}
