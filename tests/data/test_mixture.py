# SPDX-License-Identifier: Apache-2.0
"""A list of sources is one source: exact ratios, each in its own order, the same on any hosts."""

import collections
import itertools
import pickle

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_jax import config as config_lib
from ssl_jax.check import data as check_lib
from ssl_jax.data import host, maps, mixture, order, scenes, sources
from ssl_jax.data import stream as stream_lib
from ssl_jax.run import start

TINY = (host.View('image', 1),)


def colours(first, n, labels=None, classes=None):
    """A source of n images of one pixel, of the colours `first`, `first` + 1, ..."""
    images = np.arange(first, first + n, dtype=np.uint8)[:, None, None]
    return sources.Arrays(images, labels, classes)


def mixed(*sizes, weights=None):
    parts = [colours(sum(sizes[:k]), n) for k, n in enumerate(sizes)]
    names = [f'/{k}' for k in range(len(sizes))]
    return mixture.Mixture(parts, names, weights)


def places(weights, count):
    """The part of each of the first samples, and its number within the part."""
    k = len(weights)
    found = mixture.Interleaved([order.Permuted(9)] * k, weights, [0] * k, [''] * k)
    return [found.place(g) for g in range(count)], found


# Ratios.


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=9))
def test_every_window_of_the_pattern_has_the_exact_ratio(weights):
    weights = mixture.ratio(weights)
    whole = sum(weights)
    found, interleaved = places(weights, 3 * whole)
    parts = np.array([part for part, _ in found])
    seen = np.cumsum(parts[:, None] == np.arange(len(weights)), axis=0)
    np.testing.assert_array_equal(seen[whole:] - seen[:-whole], np.tile(weights, (2 * whole, 1)))
    share = np.arange(1, len(parts) + 1)[:, None] * np.array(weights) / whole
    bound = 0.5 if len(weights) < 3 else 1.0 if len(weights) == 3 else 1.7
    assert np.abs(seen - share).max() <= bound
    for g in (0, 1, whole - 1, 2 * whole + whole // 2):
        assert interleaved.counts(g + 1) == seen[g].tolist()
    for part in range(len(weights)):  # the samples of a part are numbered without a gap
        assert [j for k, j in found if k == part] == list(range(seen[-1][part]))


def test_weights_of_any_size_cost_no_memory_and_stay_exact():
    weights = [1_281_167, 14_197_122, 10**12 + 39]
    _, interleaved = places(weights, 0)
    assert interleaved.counts(7 * sum(weights)) == [7 * w for w in weights]
    g = 3 * sum(weights) // 7
    part, number = interleaved.place(g)
    before, after = interleaved.counts(g), interleaved.counts(g + 1)
    assert [b - a for a, b in zip(before, after, strict=True)] == [int(k == part) for k in range(3)]
    assert number == before[part]


def test_fractions_are_taken_to_all_their_digits():
    assert mixture.ratio([0.7, 0.3]) == [7, 3]
    assert mixture.ratio([0.1, 1, 2.5]) == [1, 10, 25]
    assert mixture.ratio([30, 10]) == [3, 1]


# Order.


@settings(max_examples=6, deadline=None)
@given(st.data())
def test_each_source_shows_every_image_once_per_epoch_for_any_hosts_and_restart(data):
    sizes = data.draw(st.lists(st.integers(2, 12), min_size=2, max_size=4), 'sizes')
    weights = data.draw(st.lists(st.integers(1, 5), min_size=len(sizes), max_size=len(sizes)))
    hosts = data.draw(st.sampled_from([1, 2, 4]), 'hosts')
    batch, steps = 4, 24
    cut = data.draw(st.integers(0, steps), 'restart')
    source, ledger = mixed(*sizes, weights=weights), np.full((steps, batch), -1)
    for process in range(hosts):
        rows = [r for r in range(batch) if r % hosts == process]
        options = dict(batch_size=batch, seed=5, rows=rows, num_threads=1)
        for first, count in ((0, cut), (cut, steps - cut)):
            with stream_lib.train_stream(source, TINY, start_step=first, **options) as stream:
                for k, b in enumerate(itertools.islice(stream, count)):
                    ledger[first + k, rows] = b['id']
                    assert (b['image'].ravel().reshape(len(rows), -1)[:, 0] == b['id']).all()
    flat, first = ledger.reshape(-1), 0
    for n, count in zip(sizes, source.order.counts(steps * batch), strict=True):
        own = flat[(flat >= first) & (flat < first + n)]
        assert len(own) == count
        for epoch in range(count // n):
            part = own[epoch * n : (epoch + 1) * n]
            assert sorted(part) == list(range(first, first + n))
        assert len(set(own[count // n * n :])) == count % n
        first += n


def test_without_weights_an_epoch_is_the_union():
    source = mixed(7, 20, 3)
    assert order.epoch_size(source) == len(source) == 30
    for epoch in range(3):
        assert sorted(source.order(30 * epoch + p, 0) for p in range(30)) == list(range(30))


def test_sources_of_one_size_have_their_own_permutations():
    source = mixed(50, 50)
    found = [source.order(g, 0) for g in range(100)]
    a, b = ([i % 50 for i in found if i // 50 == k] for k in (0, 1))
    assert sorted(a) == sorted(b) and np.mean(np.array(a) == b) < 0.2


def test_worker_processes_get_the_same_order():
    source = mixed(5, 9, weights=[3, 1])
    again = pickle.loads(pickle.dumps(source))
    assert [again.order(g, 1) for g in range(40)] == [source.order(g, 1) for g in range(40)]


class Broken(sources.Arrays):
    """Images of one pixel, some of which cannot be decoded."""

    def __init__(self, first, n, bad):
        super().__init__(np.arange(first, first + n, dtype=np.uint8)[:, None, None])
        self._bad = bad

    def __getitem__(self, i):
        return {'image': b'no image'} if i in self._bad else super().__getitem__(i)


def test_a_bad_image_is_replaced_from_its_own_source_so_that_ratios_hold():
    source = mixture.Mixture([colours(0, 40), Broken(40, 10, {2, 3})], ['/a', '/b'], [1, 1])
    with stream_lib.train_stream(source, TINY, batch_size=10, seed=0) as stream:
        batches = [next(stream) for _ in range(10)]
    ids = np.concatenate([b['id'] for b in batches])
    assert sum(int((b['bad'][:, 0] >= 0).sum()) for b in batches) == 10
    assert {42, 43}.isdisjoint(ids.tolist())
    assert [(i < 40).sum() for i in ids.reshape(10, 10)] == [5] * 10


# What a source says of itself.


def test_classes_that_are_equal_stay_and_others_are_dropped_with_a_sentence():
    a = colours(0, 4, [0, 1, 0, 1], ['cat', 'dog'])
    b = colours(4, 3, [1, 1, 0], ['cat', 'dog'])
    both = mixture.Mixture([a, b], ['/a', '/b'], [1, 1])
    assert both.classes == ('cat', 'dog') and both.labels.tolist() == [0, 1, 0, 1, 1, 1, 0]
    assert [both[i]['label'] for i in range(7)] == both.labels.tolist()
    for other in (colours(4, 3), colours(4, 3, [0, 1, 2], ['cat', 'dog', 'owl'])):
        both = mixture.Mixture([a, other], ['/a', '/b'], [1, 1])
        assert both.classes is None and both.labels is None
        assert not any('label' in both[i] for i in range(7))
        assert any('without labels, as classes differ: 2 in /a, ' in note for note in both.notes)


def test_numbers_as_names_count_in_those_of_the_largest(tmp_path):
    for folder, names in (('a', '012'), ('b', '02')):
        for name in names:
            (tmp_path / folder / name).mkdir(parents=True)
            PIL.Image.new('RGB', (4, 4)).save(tmp_path / folder / name / 'x.png')
    both = sources.open_source([str(tmp_path / 'a'), str(tmp_path / 'b')])
    assert both.classes == ('0', '1', '2') and both.labels.tolist() == [0, 1, 2, 0, 2]


def test_it_describes_images_and_shares_and_names_parts_for_the_metrics():
    parts = [colours(0, 4), colours(4, 6)]
    source = mixture.Mixture(parts, ['/data/a/train', '/data/b/train'], [3, 1])
    assert source.describe(5) == 'array 1' and len(source) == 10
    assert source.notes[0] == (
        '75.0% of /data/a/train, 4 images, each 1.88 times in an epoch (images/train.0 in the '
        'metrics)'
    )
    assert order.seen(source, 8) == {'images/train.0': 6, 'images/train.1': 2}
    assert order.seen(colours(0, 4), 8) == {}


def test_the_fingerprint_follows_the_images_and_not_the_weights():
    a, b = colours(0, 4), colours(4, 6)
    prints = [
        mixture.Mixture(x, ['/a', '/b'], w).fingerprint
        for x, w in (([a, b], [1, 1]), ([a, b], [3, 1]), ([b, a], [1, 1]), ([a, a], [1, 1]))
    ]
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_maps_that_all_have_stay_and_others_are_refused_where_they_are_read():
    a, b = scenes.Scenes(3, 32), scenes.Scenes(4, 32, seed=1)
    both = mixture.Mixture([a, b], ['/a', '/b'], [1, 1])
    assert both.map_classes == a.map_classes
    np.testing.assert_array_equal(both[5]['segmentation'], b[2]['segmentation'])
    odd = mixture.Mixture([a, colours(0, 4)], ['/a', '/b'], [1, 1])
    with pytest.raises(ValueError, match='scene 0 .* have segmentation and depth and array 0 ...'):
        odd[0]
    assert odd.map_classes is None
    assert maps.images_only(odd)[0]['image'].shape == (32, 32, 3)  # training reads no maps
    with stream_lib.train_stream(odd, TINY, batch_size=4, seed=0) as stream:
        assert len(next(stream)['id']) == 4


# Specs.


@pytest.fixture
def folders(tmp_path):
    for name, n in (('a', 3), ('b', 5)):
        (tmp_path / name).mkdir()
        for i in range(n):
            PIL.Image.new('RGB', (40, 40), (i, 0, 0)).save(tmp_path / name / f'{i}.png')
    return tmp_path


def test_a_list_is_opened_in_a_recipe_and_as_text(folders):
    a, b = str(folders / 'a'), str(folders / 'b')
    text = f"[{{'path': '{a}', 'weight': 3}}, {{'path': '{b}', 'weight': 1}}]"
    for spec in ([dict(path=a, weight=3), dict(path=b, weight=1)], text):
        source = sources.open_source(spec)
        assert len(source) == 8
        part = [int(source.order(g, 0) >= 3) for g in range(8)]
        assert collections.Counter(part) == {0: 6, 1: 2}


def test_a_list_is_a_field_that_is_stored_and_overridden(folders):
    a, b = str(folders / 'a'), str(folders / 'b')
    recipe = folders / 'recipe.py'
    recipe.write_text(
        'from ssl_jax import config\n'
        'def get_config(arg=""):\n'
        '    c = config.default("mae")\n'
        '    c.total_steps = 4\n'
        f'    c.data.train = [dict(path={a!r}), dict(source="folder", path={b!r})]\n'
        '    return c\n'
    )
    config = config_lib.load(str(recipe))
    typed = config_lib.load(
        'images_mae', [f"data.train=['{a}', {{'path': '{b}'}}]", 'total_steps=4']
    )
    assert typed.data.train == ({'path': a}, {'path': b})
    stored, lines = config_lib.from_dict(config.to_dict())
    assert config_lib.diff(stored, config) == {} and not lines
    assert len(sources.open_source(stored.data.train)) == 8
    changed = config_lib.lay_over(stored, [f'data.train={a}'])
    assert changed.data.train == a


@pytest.mark.parametrize(
    ('text', 'sentence'),
    [
        ('[]', 'The list of sources is empty'),
        ("[{'path': '/a', 'weight': 0}]", 'weight=0 of a source must be a number above 0'),
        ("[{'path': '/a', 'weight': -1.5}]", 'weight=-1.5 of a source'),
        ("['/a', {'path': '/b', 'weight': 2}]", '/a has no weight and other sources'),
        ("[{'path': '/a', 'weight': 'much'}]", "weight='much' of a source"),
        ("[{'path': '/a', 'wieght': 2}]", "Unknown key 'wieght'"),
        ('[3]', '3 in the list of sources is neither a path nor a spec'),
        ('[{path: /a}]', "is no list in Python's notation"),
        ("['/nowhere/a']", '/nowhere/a does not exist'),
    ],
)
def test_what_is_wrong_with_a_list_is_one_sentence(text, sentence):
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        sources.open_source(text)


def test_an_empty_source_is_one_sentence(tmp_path):
    (tmp_path / 'none').mkdir()
    with pytest.raises(FileNotFoundError, match='none is empty'):
        sources.open_source([{'source': 'scenes', 'n': 4, 'size': 32}, str(tmp_path / 'none')])

    class Empty(sources.Arrays):
        def __len__(self):
            return 0

    empty = Empty(np.zeros((1, 1, 1), np.uint8))
    with pytest.raises(ValueError, match='/b has no images: leave it out of the mixture'):
        mixture.Mixture([colours(0, 3), empty], ['/a', '/b'], [1, 1])


def test_a_field_of_a_list_is_refused():
    with pytest.raises(ValueError, match="'data.train' is a list of sources: write split into"):
        config_lib.load('images_mae', ["data.train=['/a']", 'data.train.split=val'])


def test_fields_of_an_evaluation_go_to_each_source():
    found = sources.with_words("['/a', {'path': '/b', 'ignore': 3}]", {'ignore': '11'})
    assert found == ({'path': '/a', 'ignore': 11}, {'path': '/b', 'ignore': 11})


def test_other_weights_may_be_given_in_the_middle_of_a_run(folders):
    parts = [dict(path=str(folders / name), weight=2) for name in 'ab']
    source = sources.open_source(parts)
    config = config_lib.load('images_mae', [f'data.train={parts}'])
    meta = {'data': source.fingerprint, 'images': len(source)}
    parts[1]['weight'] = 7
    config = config_lib.lay_over(config, [f'data.train={parts}'])
    start.check_images(config, meta, sources.open_source(config.data.train))
    assert config.data.train[1]['weight'] == 7
    with pytest.raises(ValueError, match='the images are not those that this run has seen'):
        start.check_images(config, meta, sources.open_source(parts[::-1]))


def test_check_measures_a_mixture(folders):
    text = f"['{folders / 'a'}', '{folders / 'b'}']"
    trial = check_lib.Trial(config_lib.load('images_mae', [f'data.train={text}']))
    assert check_lib.loading(trial, 0.05)[1] == 0
    assert trial.config.method.img_size == 40 and len(trial.source) == 8
