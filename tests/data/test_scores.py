# SPDX-License-Identifier: Apache-2.0
"""Soft sampling takes an image with probability min(loss, 1), whoever asks and whenever."""

import itertools
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssl_jax import config as config_lib
from ssl_jax.data import host, mixture, order, scores, sources
from ssl_jax.data import stream as stream_lib
from ssl_jax.run import start

TINY = (host.View('image', 1),)


def write(path, source, loss, **columns):
    """A file of scores as `ssl_jax data score` writes it."""
    n = len(loss)
    columns = {
        'id': np.arange(n),
        'loss': np.asarray(loss, np.float32),
        'entropy': np.full(n, 7.0, np.float32),
        'height': np.full(n, 400, np.int32),
        'width': np.full(n, 300, np.int32),
    } | columns
    about = dict(kind='scores', data=source.fingerprint, images=len(source))
    table = pa.table(columns).replace_schema_metadata({'ssl_jax': json.dumps(about)})
    pq.write_table(table, path)
    return str(path)


def numbered(n):
    """Image i has the colour i."""
    return sources.Arrays(np.arange(n, dtype=np.uint8)[:, None, None])


@pytest.fixture
def scored(tmp_path):
    """(source, losses) of 200 images."""
    loss = np.random.default_rng(0).uniform(0, 1.5, 200).astype(np.float32)
    loss[:3] = 0, 1, 2
    source = numbered(200)
    scores.sample_by(source, write(tmp_path / 's.parquet', numbered(200), loss))
    return source, loss


# Frequencies.


def test_frequencies_agree_with_min_of_loss_and_1_within_the_binomial_bound(scored):
    source, loss = scored
    epochs, chance = 20_000, np.minimum(loss, 1).astype(np.float64)
    counts = np.zeros(200)
    for epoch in range(epochs):
        counts[source.order.taken(7, epoch)] += 1
    assert counts[0] == 0 and (counts[loss >= 1] == epochs).all()
    free = (chance > 0) & (chance < 1)
    z = (counts - epochs * chance)[free] / np.sqrt(epochs * chance * (1 - chance))[free]
    assert np.abs(z).max() < 4.5  # of 130 normal numbers: beyond it with probability 0.001
    assert 0.8 < z.std() < 1.2  # neither stratified nor correlated over epochs
    pairs = np.corrcoef(z[:-1], z[1:])[0, 1]
    assert abs(pairs) < 0.35


def test_the_stream_shows_what_an_epoch_takes_once_and_then_the_next_epoch(scored):
    source, loss = scored
    taken = [source.order.taken(3, epoch) for epoch in range(4)]
    with stream_lib.train_stream(source, TINY, batch_size=16, seed=3, num_threads=3) as stream:
        ids = np.concatenate([next(stream)['id'] for _ in range(-(-sum(map(len, taken)) // 16))])
    for part in taken:
        assert sorted(ids[: len(part)]) == part.tolist()
        assert ids[: len(part)].tolist() != part.tolist()
        ids = ids[len(part) :]
    assert np.abs([len(part) for part in taken] - np.minimum(loss, 1).sum()).max() < 25
    assert order.epoch_size(source) == round(np.minimum(loss, 1).sum())


def test_large_sets_are_hashed_in_chunks_that_change_nothing(scored, monkeypatch):
    source, _ = scored
    whole = source.order.taken(1, 5)
    monkeypatch.setattr(scores, 'CHUNK', 64)
    np.testing.assert_array_equal(source.order.taken(1, 5), whole)


# The same for all.


@pytest.mark.parametrize('hosts', [2, 4])
def test_hosts_and_restarts_in_later_epochs_change_nothing(scored, hosts):
    source, _ = scored
    options = dict(batch_size=8, seed=0, num_threads=2)
    with stream_lib.train_stream(source, TINY, **options) as stream:
        whole = np.stack([next(stream)['id'] for _ in range(60)])  # some four epochs
    for cut in (7, 40):
        for process in range(hosts):
            rows = np.arange(8)[process::hosts]
            again = pickle.loads(pickle.dumps(source))  # another process
            with stream_lib.train_stream(
                again, TINY, start_step=cut, rows=rows, **options
            ) as stream:
                found = np.stack([b['id'] for b in itertools.islice(stream, 20)])
            np.testing.assert_array_equal(found, whole[cut : cut + 20, rows])


def test_asking_out_of_order_changes_nothing(scored):
    source, _ = scored
    want = [source.order(g, 0) for g in range(2000)]
    again = pickle.loads(pickle.dumps(source))
    for g in np.random.default_rng(1).permutation(2000)[:300].tolist():
        assert again.order(g, 0) == want[g]
        again.order(g % 7, 1)  # another seed in between


def test_a_part_of_a_mixture_is_sampled_too(tmp_path):
    source, other = (sources.Arrays(np.zeros((n, 1, 1), np.uint8)) for n in (900, 450))
    scores.sample_by(source, write(tmp_path / 's.parquet', source, [0.5] * 900))
    both = mixture.Mixture([source, other], ['/a', '/b'])
    assert order.epoch_size(both) == 900  # 450 of the 900 on average, and 450
    found = [both.order(g, 0) for g in range(9000)]
    assert sum(i < 900 for i in found) == 4500
    count = np.bincount(found, minlength=1350)
    assert (count[900:] == 10).all() and count[:900].mean() == 5
    assert count[:900].std() > 1.5  # sampled, not in turn


class Broken(sources.Arrays):
    def __getitem__(self, i):
        return {'image': b'no image'} if i % 10 == 0 else super().__getitem__(i)


def test_a_bad_image_is_replaced_by_one_that_the_epoch_takes(tmp_path):
    loss = np.where(np.arange(100) < 50, 1.0, 0.0)
    source = Broken(np.arange(100, dtype=np.uint8)[:, None, None])
    scores.sample_by(source, write(tmp_path / 's.parquet', source, loss))
    with stream_lib.train_stream(source, TINY, batch_size=25, seed=0) as stream:
        batches = [next(stream) for _ in range(8)]
    assert sum(int((b['bad'][:, 0] >= 0).sum()) for b in batches) == 20
    ids = np.concatenate([b['id'] for b in batches])
    assert ids.max() < 50 and (ids % 10 > 0).all()


# Files and specs.


def test_thresholds_leave_out_what_is_plain_or_small_and_say_how_many(tmp_path):
    source, n = numbered(10), 10
    path = write(
        tmp_path / 's.parquet', source, [1.0] * 8 + [np.nan],
        id=np.arange(9), entropy=np.array([4.5, 4.6, *[7.0] * 7], np.float32),
        height=np.array([400, 400, 319, 320, *[400] * 5]),
        width=np.array([*[400] * 4, 300, *[400] * 4]),
    )  # fmt: skip
    scores.sample_by(source, path, min_entropy=4.5, min_side=320)
    assert source.order.taken(0, 0).tolist() == [1, 3, 5, 6, 7]
    assert source.notes[-1] == (
        f'sampled by {path}: an epoch takes 5 of {n} images on average; never 2 without a score, 1 '
        'of entropy 4.5 or less, 2 with a side below 320 pixels'
    )
    with pytest.raises(ValueError, match='leaves no image of 10: lower min_entropy or min_side'):
        scores.sample_by(numbered(10), path, min_side=1000)


@pytest.fixture
def images(tmp_path):
    """A Parquet file of eight images as a path."""
    png = [
        host.cv2.imencode('.png', np.full((40, 40, 3), i, np.uint8))[1].tobytes() for i in range(8)
    ]
    pq.write_table(pa.table({'image': png}), tmp_path / 'images.parquet')
    return str(tmp_path / 'images.parquet')


def test_scores_are_fields_of_the_training_images(images, tmp_path, capsys):
    path = write(tmp_path / 's.parquet', sources.open_source(images), [0.25] * 4 + [1.0] * 4)
    config = config_lib.load(
        'images_mae', [f'data.train={images}', f'data.train.scores={path}', 'data.train.min_side=9']
    )
    source = sources.open_source(config.data.train)
    assert order.epoch_size(source) == 5 and len(source) == 8
    completed = start.complete(config, source)
    assert '5 images' in capsys.readouterr().out  # an epoch has five, of which runs infer lengths
    assert completed.total_epochs
    assert source.fingerprint != sources.open_source(images).fingerprint
    other = write(tmp_path / 'o.parquet', sources.open_source(images), [0.5] * 4 + [1.0] * 4)
    prints = {sources.open_source({'path': images, 'scores': p}).fingerprint for p in (path, other)}
    assert len(prints) == 2  # a run does not go on with other scores unawares


def test_what_is_wrong_with_scores_is_one_sentence(images, tmp_path):
    other = write(tmp_path / 'other.parquet', numbered(8), [1.0] * 8)
    for path, sentence in (
        (other, 'has the scores of 8 other images than the 8 of .*images.parquet row 0'),
        (images, 'images.parquet holds no scores: make it with `ssl_jax data score`'),
        (str(tmp_path / 'none.parquet'), 'none.parquet does not exist'),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=sentence):
            sources.open_source({'path': images, 'scores': path})
    with pytest.raises(ValueError, match='min_side is of scores: set `scores` too'):
        sources.open_source({'path': images, 'min_side': 9})


def test_an_epoch_smaller_than_a_batch_is_refused(tmp_path):
    source = numbered(100)
    scores.sample_by(source, write(tmp_path / 's.parquet', source, [0.1] * 100))
    with pytest.raises(ValueError, match='10 images are fewer than one batch of 16'):
        stream_lib.train_stream(source, TINY, batch_size=16, seed=0)
