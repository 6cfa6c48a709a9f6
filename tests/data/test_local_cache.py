# SPDX-License-Identifier: Apache-2.0
"""The cache on the disk gives back what was put, to all threads and processes, within its limit."""

import multiprocessing
import os
import pickle
import shutil
import threading

import numpy as np
import PIL.Image
import pytest

from ssl_jax.data import local_cache, sources
from ssl_jax.run import errors


def item(i):
    return bytes([i % 251]) * (100 + i)


def put_all(path, n, seed):
    cache = local_cache.Cache(path, n, 10**6)
    for i in range(n):
        cache.put((i + seed) % n, item((i + seed) % n))


def test_items_come_back_also_in_the_next_start(tmp_path):
    cache = local_cache.Cache(str(tmp_path / 'c'), 50, 10**6)
    assert cache.get(3) is None
    for i in (3, 7, 49):
        cache.put(i, item(i))
    for again in (
        cache,
        local_cache.Cache(cache.path, 50, 10**6),
        pickle.loads(pickle.dumps(cache)),
    ):
        assert [bytes(again.get(i)) for i in (3, 7, 49)] == [item(i) for i in (3, 7, 49)]
        assert again.get(4) is None


def test_nothing_is_kept_beyond_the_limit(tmp_path):
    cache = local_cache.Cache(str(tmp_path / 'c'), 50, 300)
    for i in range(50):
        cache.put(i, item(0))
    assert [cache.get(i) is not None for i in range(4)] == [True, True, True, False]
    assert os.path.getsize(f'{cache.path}.bytes') == 300


def test_threads_and_processes_write_side_by_side(tmp_path):
    path, n = str(tmp_path / 'c'), 60
    cache, context = local_cache.Cache(path, n, 10**6), multiprocessing.get_context('spawn')
    process = context.Process(target=put_all, args=(path, n, 30))
    process.start()
    threads = [threading.Thread(target=put_all, args=(path, n, 7 * k)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in (*threads, process):
        thread.join()
    assert [bytes(cache.get(i)) for i in range(n)] == [item(i) for i in range(n)]


@pytest.mark.parametrize('damage', ['flip', 'cut'])
def test_damaged_bytes_are_not_given_out(damage, tmp_path):
    path = str(tmp_path / 'c')
    put_all(path, 4, 0)
    with open(f'{path}.bytes', 'r+b') as file:
        if damage == 'flip':
            file.seek(10)
            file.write(b'x')
        else:
            file.truncate(50)
    cache = local_cache.Cache(path, 4, 10**6)
    assert cache.get(0) is None
    cache.put(0, item(0))
    assert bytes(cache.get(0)) == item(0)


def test_maps_and_moved_labels_are_those_of_the_source_whatever_is_kept(tmp_path):
    folder = tmp_path / 'images'
    for i in range(3):
        for name, value in ((f'images/{i}.png', i), (f'labels/{i}.png', 2 - i)):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(np.full((4, 4), value, np.uint8)).save(path)
    source = sources.open_source(str(folder))
    kept = local_cache.Kept(source, local_cache.Cache(str(tmp_path / 'c'), 3, 10**6))
    plain = kept.without_maps()
    assert 'segmentation' not in plain[1] and 'segmentation' not in plain[1]  # kept by now
    assert [int(kept[i]['segmentation'][0, 0]) for i in range(3)] == [2, 1, 0]
    assert kept[1]['image'] == plain[1]['image'] == source[1]['image']

    one_class = tmp_path / 'labelled'
    for name in ('5/a.png', '7/b.png'):
        (one_class / name).parent.mkdir(parents=True)
        shutil.copy(folder / 'images/0.png', one_class / name)
    source = sources.open_source(str(one_class))
    kept = local_cache.Kept(source, local_cache.Cache(str(tmp_path / 'd'), 2, 10**6))
    assert [kept[i]['label'] for i in range(2)] == [0, 1]
    moved = sources.in_classes(kept, tuple('0123456789'))
    assert [moved[i]['label'] for i in range(2)] == [5, 7] and len(moved.classes) == 10


def test_a_negative_limit_is_refused():
    with pytest.raises(errors.UserError, match='cache_gb=-1'):
        local_cache.limit_of(-1)
