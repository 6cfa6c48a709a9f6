# SPDX-License-Identifier: Apache-2.0
"""A manifest is a source: some images of a pool, by reference."""

import io
import os
import pickle

import numpy as np
import PIL.Image
import pytest

from ssl_jax.data import host, manifest, maps, sources, subset
from ssl_jax.data import stream as stream_lib
from ssl_jax.run import errors, storage

VIEW = [host.View('view', count=1, size=8, scale=(0.5, 1.0))]
INDICES = np.array([1, 3, 4, 8, 9, 15, 16, 21, 22, 23])


def png(value, mode='RGB'):
    out = io.BytesIO()
    size = (10, 12, 3) if mode == 'RGB' else (10, 12)
    PIL.Image.fromarray(np.full(size, value, np.uint8), mode).save(out, 'PNG')
    return out.getvalue()


@pytest.fixture
def pool(tmp_path):
    """24 images of three classes; image i has the colour i."""
    for i in range(24):
        path = tmp_path / 'pool' / 'abc'[i // 8] / f'{i:02d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(i))
    return tmp_path / 'pool'


def select(pool, path, indices=INDICES, **spec):
    spec = {'path': str(pool), **spec}
    opened = sources.open_source(spec)
    halves = np.array_split(np.asarray(indices), 2)
    manifest.write(path, (manifest.table(x) for x in halves), opened, spec, made='for a test')
    return opened


def colour(source, i):
    return int(host.decode(source[i]['image'])[0, 0, 0])


def test_a_manifest_is_its_images_with_their_labels_classes_and_names(pool, tmp_path):
    whole = select(pool, tmp_path / 'm.parquet')
    source = sources.open_source(tmp_path / 'm.parquet')
    assert [colour(source, i) for i in range(len(source))] == INDICES.tolist()
    assert source.classes == whole.classes == ('a', 'b', 'c')
    assert source.labels.tolist() == (INDICES // 8).tolist()
    assert [source[i]['label'] for i in range(10)] == source.labels.tolist()
    assert source.describe(5) == whole.describe(15)
    assert any('10 of 24 images' in note for note in source.notes)
    assert source.remote == getattr(whole, 'remote', False)
    assert manifest.about(tmp_path / 'm.parquet')['made'] == 'for a test'


def test_it_is_sent_to_worker_processes(pool, tmp_path):
    select(pool, tmp_path / 'm.parquet')
    source = pickle.loads(pickle.dumps(sources.open_source(tmp_path / 'm.parquet')))
    assert [colour(source, i) for i in range(len(source))] == INDICES.tolist()


def test_maps_pass_through_and_can_be_left_out(tmp_path):
    for i in range(6):
        for folder, mode in (('images', 'RGB'), ('masks', 'L')):
            path = tmp_path / 'pool' / folder / f'{i}.png'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(i, mode))
    whole = select(tmp_path / 'pool', tmp_path / 'm.parquet', [1, 4])
    source = sources.open_source(tmp_path / 'm.parquet')
    assert source.map_classes == whole.map_classes
    assert [int(source[i]['segmentation'].max()) for i in range(2)] == [1, 4]
    plain = maps.images_only(source)
    assert set(plain[1]) == {'image'} and plain.fingerprint == source.fingerprint
    assert plain.describe(1) == whole.describe(4) and len(plain) == 2


def test_labels_count_in_the_classes_of_other_images():
    images = np.zeros((4, 2, 2, 3), np.uint8)
    some = subset.Subset(sources.Arrays(images, [0, 1, 1, 0], ['3', '7']), [1, 2, 3])
    moved = sources.in_classes(some, ('1', '3', '5', '7'))
    assert moved.labels.tolist() == [3, 3, 1] and [moved[i]['label'] for i in range(3)] == [3, 3, 1]


@pytest.mark.parametrize('hosts', [1, 2, 4])
def test_each_image_comes_once_per_epoch_for_any_hosts_and_restart(hosts, pool, tmp_path):
    select(pool, tmp_path / 'm.parquet')
    source = sources.open_source(tmp_path / 'm.parquet')
    batch, steps, cut = 4, 10, 3  # four epochs of ten images
    seen = np.full((steps, batch), -1)
    for process in range(hosts):
        rows = np.arange(process, batch, hosts)
        for start, stop in ((0, cut), (cut, steps)):
            options = dict(batch_size=batch, seed=5, rows=rows, start_step=start, num_threads=1)
            with stream_lib.train_stream(source, VIEW, **options) as stream:
                for step in range(start, stop):
                    found = next(stream)
                    seen[step, rows] = found['view'][:, 0, 0, 0, 0]
                    assert (found['label'] == seen[step, rows] // 8).all()
    for epoch in seen.reshape(4, 10):
        assert sorted(epoch) == INDICES.tolist()


def test_the_fingerprint_is_of_the_selection_and_of_the_pool(pool, tmp_path):
    select(pool, tmp_path / 'a.parquet')
    select(pool, tmp_path / 'b.parquet')
    select(pool, tmp_path / 'c.parquet', INDICES[:-1])
    a, b, c = (sources.open_source(tmp_path / f'{k}.parquet').fingerprint for k in 'abc')
    assert a == b != c


def test_a_manifest_of_a_manifest_selects_from_it(pool, tmp_path):
    select(pool, tmp_path / 'm.parquet')
    select(tmp_path / 'm.parquet', tmp_path / 'n.parquet', [0, 9])
    source = sources.open_source(tmp_path / 'n.parquet')
    assert [colour(source, i) for i in range(2)] == [1, 23] and source.labels.tolist() == [0, 2]


def test_a_pool_named_by_a_relative_path_is_found_from_elsewhere(pool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    select('pool', 'm.parquet')
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    assert len(sources.open_source('../m.parquet')) == 10


def test_a_pool_that_moved_is_named(pool, tmp_path):
    select(pool, tmp_path / 'm.parquet')
    os.rename(pool, tmp_path / 'moved')
    with pytest.raises(errors.UserError, match=r'(?s)m.parquet selects .*pool does not.*pool=PATH'):
        sources.open_source(tmp_path / 'm.parquet')
    spec = {'path': str(tmp_path / 'm.parquet'), 'pool': str(tmp_path / 'moved')}
    assert colour(sources.open_source(spec), 2) == 4


def test_the_manifest_and_its_pool_may_lie_in_a_bucket(bucket, pool, tmp_path):
    for path in pool.rglob('*.png'):
        name = path.relative_to(tmp_path)
        storage.atomic_write(f'{bucket.root}/{name}', path.read_bytes())
    select(f'{bucket.root}/pool', f'{bucket.root}/m.parquet')
    source = sources.open_source(f'{bucket.root}/m.parquet')
    assert [colour(source, i) for i in range(10)] == INDICES.tolist() and source.remote
    # The local copy is the same pool.
    spec = {'path': f'{bucket.root}/m.parquet', 'pool': str(pool)}
    assert colour(sources.open_source(spec), 3) == 8


def test_a_pool_that_changed_is_a_sentence(pool, tmp_path):
    select(pool, tmp_path / 'm.parquet')
    (pool / 'a' / '00.png').unlink()
    with pytest.raises(errors.UserError, match='24 images of .* are 23 other images'):
        sources.open_source(tmp_path / 'm.parquet')


def test_what_is_no_manifest_is_a_sentence(pool, tmp_path):
    select(pool, tmp_path / 'm.parquet', [])
    with pytest.raises(errors.UserError, match='selects no image'):
        sources.open_source(tmp_path / 'm.parquet')
    manifest.write_tables(tmp_path / 'x.parquet', [manifest.table(INDICES)])
    with pytest.raises(errors.UserError, match='x.parquet is no manifest'):
        sources.open_source({'source': 'manifest', 'path': str(tmp_path / 'x.parquet')})
    with pytest.raises(FileNotFoundError, match='did you mean'):
        sources.open_source({'source': 'manifest', 'path': str(tmp_path / 'y.parquet')})
