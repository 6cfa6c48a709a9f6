# SPDX-License-Identifier: Apache-2.0
"""The stream is a function of the step, and bad images are replaced, listed and counted."""

import gc
import io
import json
import mmap
import os
import select
import signal
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ssl_jax.data import host, loader, order, scenes, sources
from ssl_jax.data import stream as stream_lib
from ssl_jax.data import transform as transform_lib
from ssl_jax.run import errors, launch

VIEWS = (host.View('global', 16, count=2), host.View('local', 8, scale=(0.05, 0.3)))
TINY = (host.View('image', 1),)


def take(source, count, views=VIEWS, **options):
    with stream_lib.train_stream(source, views, seed=options.pop('seed', 0), **options) as stream:
        return [next(stream) for _ in range(count)]


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        assert sorted(x) == sorted(y)
        for key in x:
            np.testing.assert_array_equal(x[key], y[key])


def numbered(n):
    """A source of 1x1 images; image i has the colour i."""
    return sources.Arrays(np.arange(n, dtype=np.uint8)[:, None, None] * np.ones((1, 1), np.uint8))


class Broken:
    """A source in which some images cannot be decoded, or not be read at first."""

    classes = None
    fingerprint = 'broken'

    def __init__(self, n, bad, error=None):
        self._n, self._bad, self._error = n, dict.fromkeys(bad, 10**9), error

    def __len__(self):
        return self._n

    def fail(self, i, times):
        self._bad[i] = times
        return self

    def __getitem__(self, i):
        if self._bad.get(i, 0) > 0:
            self._bad[i] -= 1
            if self._error:
                raise self._error(5, 'the disk is away')
            return {'image': b'no image'}
        return {'image': np.full((2, 2, 3), i, np.uint8)}

    def describe(self, i):
        return f'file {i}'


# What is in a batch.


def test_a_batch_holds_every_view_with_shapes_and_types():
    batch = take(scenes.Scenes(8, 32), 1, batch_size=4)[0]
    assert {k: (v.shape, v.dtype.name) for k, v in batch.items()} == {
        'global': ((4, 2, 16, 16, 3), 'uint8'),
        'local': ((4, 1, 8, 8, 3), 'uint8'),
        'id': ((4,), 'int64'),
        'label': ((4,), 'int32'),
        'bad': ((4, stream_lib.MAX_TRIES), 'int64'),
    }


def test_ids_and_labels_belong_to_the_pixels():
    images = np.arange(50, dtype=np.uint8)[:, None, None] * np.ones((3, 3), np.uint8)
    source = sources.Arrays(images, np.arange(50) % 7)
    for batch in take(source, 5, batch_size=16):
        assert (batch['global'] == batch['id'][:, None, None, None, None]).all()
        assert (batch['label'] == batch['id'] % 7).all()


def test_without_labels_there_is_no_label():
    assert 'label' not in take(numbered(4), 1, TINY, batch_size=2)[0]


def test_crops_differ_between_views_copies_and_epochs():
    source = scenes.Scenes(4, 32)
    first, second = take(source, 2, batch_size=4)
    assert sorted(first['id']) == sorted(second['id']) == [0, 1, 2, 3]
    assert not np.array_equal(first['global'][:, 0], first['global'][:, 1])
    rows = [int(np.flatnonzero(b['id'] == 2)[0]) for b in (first, second)]
    assert not np.array_equal(first['global'][rows[0]], second['global'][rows[1]])


# Order.


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_every_image_appears_once_per_epoch_for_any_batch_hosts_and_restart(data):
    n = data.draw(st.integers(1, 40), 'images')
    batch = data.draw(st.integers(1, n), 'batch')
    hosts = data.draw(st.sampled_from([h for h in (1, 2, 3, 4) if h <= batch]), 'hosts')
    seed = data.draw(st.integers(0, 2**40), 'seed')
    epochs = 3
    steps = -(-epochs * n // batch)
    cut = data.draw(st.integers(0, steps), 'restart')
    source = numbered(n)
    owner = np.sort(np.arange(batch) % hosts)
    ledger = np.full((steps, batch), -1)
    for process in range(hosts):
        rows = np.flatnonzero(owner == process)
        options = dict(batch_size=batch, seed=seed, rows=rows, num_threads=1)
        for start, count in ((0, cut), (cut, steps - cut)):
            for k, b in enumerate(take(source, count, TINY, start_step=start, **options)):
                ledger[start + k, rows] = b['id']
    for epoch in ledger.reshape(-1)[: epochs * n].reshape(epochs, n):
        assert sorted(epoch) == list(range(n))


def test_each_epoch_and_each_seed_has_its_own_order():
    index = order.Permuted(100)
    found = [[index(e * 100 + p, s) for p in range(100)]
             for s, e in ((0, 0), (0, 1), (1, 0), (1, 1))]  # fmt: skip
    for i in range(4):
        for j in range(i):
            assert np.mean(np.array(found[i]) == found[j]) < 0.1


def test_the_order_is_the_one_that_old_checkpoints_expect():
    # A change here changes every resumed run: bump a version and say so, or do not change it.
    found = [order.Permuted(10)(g, 0) for g in range(20)]
    assert found[:10] == [9, 0, 7, 3, 8, 1, 4, 5, 6, 2]
    assert found[10:] == [3, 2, 8, 9, 5, 6, 1, 7, 0, 4]


# Invariance, pixels included.


@pytest.mark.parametrize('threads', [2, 4])
def test_threads_do_not_change_a_bit(threads):
    source = scenes.Scenes(10, 32)
    options = dict(batch_size=6)
    assert_same(
        take(source, 5, num_threads=1, **options), take(source, 5, num_threads=threads, **options)
    )


@pytest.mark.parametrize('start', [1, 3, 4])
def test_a_stream_that_starts_later_continues_bitwise(start):
    source = scenes.Scenes(10, 32)
    whole = take(source, 6, batch_size=6)
    assert_same(take(source, 6 - start, batch_size=6, start_step=start), whole[start:])


@pytest.mark.parametrize('hosts', [2, 4])
def test_hosts_load_the_same_global_batch_together(hosts):
    source = scenes.Scenes(10, 32)
    whole = take(source, 3, batch_size=8)
    rows = np.arange(8).reshape(hosts, -1)
    parts = [take(source, 3, batch_size=8, rows=r) for r in rows]
    joined = [{k: np.concatenate([p[s][k] for p in parts]) for k in whole[s]} for s in range(3)]
    assert_same(joined, whole)


def test_rows_need_not_be_contiguous():
    source = scenes.Scenes(10, 32)
    whole = take(source, 2, batch_size=8)
    part = take(source, 2, batch_size=8, rows=[1, 4, 6])
    assert_same(part, [{k: v[[1, 4, 6]] for k, v in b.items()} for b in whole])


TRAINER = """
import os, sys, numpy as np
from ssl_jax.data import host, scenes, stream as stream_lib
if __name__ == '__main__':
    views = (host.View('global', 16, count=2), host.View('local', 8, scale=(0.05, 0.3)))
    stream = stream_lib.train_stream(
        scenes.Scenes(10, 32), views, batch_size=6, seed=0, start_step=1, num_workers=2,
        num_threads=1)
    for k in range(3):
        np.savez(f'{sys.argv[1]}/{k}.npz', **next(stream))
    print(*[p for t in os.listdir('/proc/self/task')
            for p in open(f'/proc/self/task/{t}/children').read().split()], flush=True)
    sys.stdin.read()  # Until killed.
"""


def environment():
    package = os.path.dirname(os.path.dirname(os.path.abspath(stream_lib.__file__)))
    return {**os.environ, 'PYTHONPATH': os.path.dirname(package), 'JAX_PLATFORMS': 'cpu'}


@pytest.fixture(scope='module')
def trainer(tmp_path_factory):
    """A process that has loaded batches 1 to 3 in two workers: (folder, process, their pids)."""
    if sys.platform != 'linux':
        pytest.skip('counts processes in /proc')
    folder = tmp_path_factory.mktemp('trainer')
    (folder / 'trainer.py').write_text(TRAINER)
    process = subprocess.Popen(
        [sys.executable, folder / 'trainer.py', folder],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment(),
    )  # fmt: skip
    pids = [int(p) for p in process.stdout.readline().split()]
    yield folder, process, pids
    process.kill()
    process.communicate()


def test_worker_processes_do_not_change_a_bit(trainer):
    folder = trainer[0]
    loaded = [dict(np.load(folder / f'{k}.npz')) for k in range(3)]
    assert_same(loaded, take(scenes.Scenes(10, 32), 3, batch_size=6, start_step=1))


def test_worker_processes_die_with_a_killed_trainer(trainer):
    _, process, pids = trainer
    assert len(pids) >= 2
    handles = [os.pidfd_open(p) for p in pids]
    process.send_signal(signal.SIGKILL)
    for handle in handles:
        ended, _, _ = select.select([handle], [], [], 20)
        os.close(handle)
        assert ended, 'a worker outlived its trainer'


# Bad images.


def test_a_bad_image_is_replaced_the_same_way_whoever_loads_it():
    source = Broken(20, bad=(3, 11))
    whole = take(source, 5, TINY, batch_size=8)
    ids = np.concatenate([b['id'] for b in whole])
    bad = np.concatenate([b['bad'] for b in whole])
    assert not {3, 11} & set(ids.tolist())
    assert set(bad[bad >= 0].tolist()) == {3, 11} and (bad[:, 0] >= 0).sum() == 4
    assert (np.concatenate([b['image'] for b in whole])[:, 0, 0, 0, 0] == ids).all()
    parts = [take(source, 3, TINY, batch_size=8, rows=r, start_step=2) for r in ([0, 1, 2], [5, 7])]
    for step in range(3):
        np.testing.assert_array_equal(parts[0][step]['id'], whole[2 + step]['id'][:3])
        np.testing.assert_array_equal(parts[1][step]['bad'], whole[2 + step]['bad'][[5, 7]])


def test_when_no_image_can_be_decoded_the_stream_says_so():
    with pytest.raises(
        errors.UserError, match=r'8 images in a row .*file \d+ \(text, not an image\)'
    ):
        take(Broken(4, bad=range(4)), 1, TINY, batch_size=2)


def test_a_read_that_fails_for_a_while_is_repeated_and_not_counted(monkeypatch):
    pauses = []
    monkeypatch.setattr(stream_lib.time, 'sleep', pauses.append)
    source = Broken(4, (), OSError).fail(2, times=3)
    batch = take(source, 1, TINY, batch_size=4, num_threads=1)[0]
    assert sorted(batch['id']) == [0, 1, 2, 3] and batch['bad'].max() == -1
    assert len(pauses) == 3 and pauses == sorted(pauses)


def test_a_missing_file_is_bad_at_once(monkeypatch):
    pauses = []
    monkeypatch.setattr(stream_lib.time, 'sleep', pauses.append)
    batch = take(Broken(4, (2,), FileNotFoundError), 1, TINY, batch_size=4)[0]
    assert batch['bad'].max() == 2 and not pauses


def bad_batch(*ids):
    bad = np.full((2, stream_lib.MAX_TRIES), -1)
    bad[0, : len(ids)] = ids
    return {'bad': bad}


def test_bad_images_are_listed_once_with_path_and_reason(tmp_path):
    path = tmp_path / 'w' / 'bad_images.jsonl'
    bad = stream_lib.BadImages(Broken(1000, (7, 9)), path, 0.01)
    assert bad.update(bad_batch()) == 0 and not path.exists()
    assert bad.update(bad_batch(7)) == 1
    assert bad.update(bad_batch(7, 9)) == 2 == bad.count
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    assert entries == [dict(id=i, path=f'file {i}', reason='text, not an image') for i in (7, 9)]


def test_a_byte_that_is_no_text_costs_its_entry_alone(tmp_path):
    path = tmp_path / 'bad_images.jsonl'
    source = Broken(1000, (7, 9))
    stream_lib.BadImages(source, path, 0.01).update(bad_batch(7, 9))
    path.write_bytes(path.read_bytes().replace(b'file 9', b'file \xff'))
    assert stream_lib.BadImages(source, path, 0.01).count == 1


def test_the_list_survives_a_restart_and_a_line_cut_off_by_a_kill(tmp_path):
    path = tmp_path / 'bad_images.jsonl'
    source = Broken(1000, (7, 9, 20))
    stream_lib.BadImages(source, path, 0.01).update(bad_batch(7, 9))
    path.write_bytes(path.read_bytes()[:-10])  # The line of 9 is torn.
    bad = stream_lib.BadImages(source, path, 0.01)
    assert bad.count == 1
    assert bad.update(bad_batch(7, 20)) == 2
    assert json.loads(path.read_text().splitlines()[-1])['id'] == 20
    assert stream_lib.BadImages(source, path, 0.01).count == 2


def test_entries_of_another_data_set_are_not_counted(tmp_path):
    path = tmp_path / 'bad_images.jsonl'
    lines = [dict(id=3, path='elsewhere 3', reason=''), dict(id=4, path='file 4', reason='')]
    path.write_text(''.join(json.dumps(x) + '\n' for x in lines))
    assert stream_lib.BadImages(Broken(10, ()), path, 0.01).count == 1


def test_more_bad_images_than_the_budget_stop_the_run(tmp_path):
    bad = stream_lib.BadImages(Broken(300, range(9)), tmp_path / 'bad.jsonl', 0.01)
    bad.update(bad_batch(0, 1, 2))
    with pytest.raises(errors.UserError, match='4 of 300 images .*3 allowed.*bad.jsonl'):
        bad.update(bad_batch(3))


def test_one_bad_image_is_always_allowed(tmp_path):
    bad = stream_lib.BadImages(Broken(10, range(9)), tmp_path / 'bad.jsonl', 0.0)
    bad.update(bad_batch(0))
    with pytest.raises(errors.UserError, match='2 of 10 images .*1 allowed'):
        bad.update(bad_batch(5))


def test_a_folder_with_every_kind_of_damage_trains_on_the_rest(tmp_path):
    def encoded(value, format='JPEG'):
        out = io.BytesIO()
        PIL.Image.fromarray(np.full((40, 40, 3), value, np.uint8)).save(out, format)
        return out.getvalue()

    for i in range(20):
        (tmp_path / f'{i:02}.jpg').write_bytes(encoded(10 * i))
    damage = {
        '03.jpg': encoded(0)[:-40],
        '05.jpg': b'',
        '07.jpg': b'<html>429 Too Many Requests</html>',
        '11.jpg': encoded(0, 'PNG')[:60],
    }
    for name, data in damage.items():
        (tmp_path / name).write_bytes(data)
    source = sources.open_source(str(tmp_path))
    batches = take(source, 4, TINY, batch_size=10)
    assert not {3, 5, 7, 11} & set(np.concatenate([b['id'] for b in batches]).tolist())
    bad = stream_lib.BadImages(source, tmp_path / 'list.jsonl', 0.2)
    for batch in batches:
        bad.update(batch)
    reasons = {}
    for line in (tmp_path / 'list.jsonl').read_text().splitlines():
        entry = json.loads(line)
        reasons[os.path.basename(entry['path'])] = entry['reason']
    assert sorted(reasons) == sorted(damage)
    assert 'HTML' in reasons['07.jpg'] and 'empty' in reasons['05.jpg']


# Evaluation, and the rest.


def test_evaluation_is_in_order_padded_and_masked():
    source = scenes.Scenes(10, 32)
    batches = list(stream_lib.eval_stream(source, 24, 4))
    assert [b['image'].shape for b in batches] == [(4, 24, 24, 3)] * 3
    mask = np.concatenate([b['mask'] for b in batches])
    assert mask.tolist() == [True] * 10 + [False] * 2
    assert np.concatenate([b['id'] for b in batches])[mask].tolist() == list(range(10))
    item = source[9]
    for key in ('image', 'segmentation', 'depth'):
        mode = 'bicubic' if key == 'image' else 'nearest'
        expected = transform_lib.cut(item[key], transform_lib.of(24), mode)
        np.testing.assert_array_equal(batches[2][key][1], expected)
    assert batches[2]['label'][1] == item['label']


def test_evaluation_rows_are_a_part_of_the_global_batch():
    source = scenes.Scenes(10, 32)
    whole = list(stream_lib.eval_stream(source, 16, 4))
    part = list(stream_lib.eval_stream(source, 16, 4, rows=[2, 3]))
    assert_same(part, [{k: v[2:] for k, v in b.items()} for b in whole])


def test_evaluation_masks_what_cannot_be_decoded():
    batch = next(stream_lib.eval_stream(Broken(4, (2,)), 2, 4))
    assert batch['mask'].tolist() == [True, True, False, True]
    assert batch['image'][2].max() == 0 and batch['image'][3].max() == 3


class Unreadable:
    """Labelled scenes; those of `errors` cannot be read."""

    classes = scenes.CLASSES
    fingerprint = 'unreadable'

    def __init__(self, n, errors):
        self.scenes, self.errors = scenes.Scenes(n, 32), errors

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, i):
        if i in self.errors:
            raise self.errors[i]
        return self.scenes[i]

    def describe(self, i):
        return f'scene {i}'


@pytest.mark.parametrize('error', [PermissionError(13, 'x'), FileNotFoundError(2, 'x')])
def test_evaluation_masks_what_cannot_be_read(error):
    source = Unreadable(6, {0: error, 3: error})  # the first gives padding its keys elsewhere
    batches = list(stream_lib.eval_stream(source, 16, 4))
    masks = [b['mask'].tolist() for b in batches]
    assert masks == [[False, True, True, False], [True, True, False, False]]
    assert batches[1]['id'].tolist() == [4, 5, -1, -1]
    for key in ('image', 'label', 'segmentation', 'depth'):
        assert batches[0][key].shape == batches[1][key].shape
        assert not batches[0][key][0].any() and not batches[1][key][2].any()
    whole = next(stream_lib.eval_stream(scenes.Scenes(6, 32), 16, 4))
    for key in whole:
        np.testing.assert_array_equal(batches[0][key][1:3], whole[key][1:3])


def test_evaluation_of_what_nobody_can_read_is_all_masked():
    source = Unreadable(3, {i: IsADirectoryError(21, 'x') for i in range(3)})
    (batch,) = stream_lib.eval_stream(source, 16, 4)
    assert not batch['mask'].any() and batch['image'].shape == (4, 16, 16, 3)


def test_what_is_left_out_is_said_once_with_the_reason(capsys):
    source = Unreadable(9, {i: PermissionError(13, 'Permission denied') for i in range(5)})
    for _ in range(2):
        stream_lib.say_left_out(source, [0, 1, 2, 3, 4])
    stream_lib.say_left_out(source, [])
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith('5 of 9 images cannot be read and do not count (scene 0: [Errno 13] Per')
    assert line.endswith('; and 2 more)')


@pytest.mark.parametrize('subsampling,size', [(2, (1200, 900)), (0, (901, 1203)), (1, (640, 480))])
def test_evaluation_decodes_jpeg_at_full_size_as_pillow_does(subsampling, size):
    small = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(small).resize(size).save(file, 'JPEG', subsampling=subsampling)
    (batch,) = stream_lib.eval_stream(sources.Arrays([file.getvalue()]), 64, 1)
    pixels = np.asarray(PIL.Image.open(file).convert('RGB'))
    np.testing.assert_array_equal(
        batch['image'][0], transform_lib.cut(pixels, transform_lib.of(64))
    )


def test_fewer_images_than_a_batch_is_refused():
    with pytest.raises(ValueError, match='3 images are fewer than one batch of 4.*3 or less'):
        take(numbered(3), 1, TINY, batch_size=4)


# Threads, memory, the end.


class Reads(sources.Arrays):
    """Eight images of one pixel; `read(i)` is called in the loader's threads."""

    def __init__(self, read):
        super().__init__(np.arange(8, dtype=np.uint8)[:, None, None])
        self._read = read

    def __getitem__(self, i):
        self._read(i)
        return super().__getitem__(i)


def stream_of(read, batch_size=4, **options):
    return stream_lib.train_stream(Reads(read), TINY, batch_size=batch_size, seed=0, **options)


def test_all_threads_work_on_the_first_batch():
    barrier, order = threading.Barrier(4, timeout=20), []

    def read(i):
        order.append(i)
        barrier.wait()

    with stream_of(read, num_threads=4) as stream:
        assert sorted(next(stream)['id']) == sorted(order[:4])


@pytest.mark.parametrize(('threads', 'rows', 'batches'), [(1, 8, 3), (3, 4, 3), (16, 4, 6)])
def test_no_more_batches_than_promised_are_finished_or_in_work(threads, rows, batches):
    reads, enough = [], threading.Event()

    def read(i):
        reads.append(i)
        if len(reads) >= batches * rows:
            enough.set()

    with stream_of(read, rows, num_threads=threads) as stream:
        next(stream)
        assert enough.wait(20)
    assert len(reads) == batches * rows


def test_the_default_is_a_thread_per_core_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(launch, 'cores', lambda: 3)
    with stream_of(lambda i: None) as stream:
        next(stream)
        assert len(loaders()) == 3


def loaders():
    return [t for t in threading.enumerate() if t.name.startswith('ssl_jax-loader')]


def test_a_batch_that_was_dropped_is_freed_though_threads_wait():
    with stream_lib.eval_stream(numbered(8), 1, 4) as stream:
        *_, batch = stream
        arrays = [weakref.ref(value) for value in batch.values()]
        del batch
        until = time.monotonic() + 20
        while any(array() is not None for array in arrays):  # a thread may be at the end of its row
            assert time.monotonic() < until


def test_an_array_of_a_batch_goes_back_to_the_system_when_it_is_deleted():
    rows = loader._rows_like(np.zeros((300, 300, 3), np.uint8), 100)
    assert rows.shape == (100, 300, 300, 3) and rows.dtype == np.uint8 and rows.flags.c_contiguous
    assert isinstance(rows.base, mmap.mmap)
    assert loader._rows_like(np.zeros((0, 3), np.int64), 5).shape == (5, 0, 3)
    assert loader._rows_like(np.float32(1), 5).shape == (5,)


@pytest.mark.parametrize('error', [KeyError('lost'), MemoryError('full'), SystemExit('gone')])
def test_any_error_in_a_thread_reaches_the_consumer(error):
    def read(i):
        if i == 5:
            raise error

    message = str(error).strip("'")
    with stream_of(read, num_threads=2) as stream, pytest.raises(type(error), match=message):
        for _ in range(2):
            next(stream)


def test_rows_with_different_keys_are_refused():
    class Mixed(Reads):
        def __getitem__(self, i):
            item = super().__getitem__(i)
            return {**item, 'label': 1} if i % 2 else item

    with pytest.raises(ValueError, match='A batch has .* but one of its rows'):
        take(Mixed(lambda i: None), 2, TINY, batch_size=4)


def test_ctrl_c_interrupts_the_wait_for_a_batch():
    blocked = threading.Event()

    def read(i):
        if not blocked.is_set():
            os.kill(os.getpid(), signal.SIGINT)
            assert blocked.wait(20)

    with stream_of(read, num_threads=1) as stream:
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        blocked.set()


def test_a_closed_stream_gives_no_more_batches_and_leaves_no_threads():
    stream = stream_of(lambda i: None, num_threads=3)
    next(stream)
    assert len(loaders()) == 3
    stream.close()
    stream.close()
    assert not loaders()
    with pytest.raises(RuntimeError, match='closed'):
        next(stream)


def test_a_stream_that_is_forgotten_is_closed():
    stream = stream_of(lambda i: None, num_threads=3)
    next(stream)
    del stream
    gc.collect()
    assert not loaders()


def test_closing_wakes_a_consumer_that_waits_in_another_thread():
    reading, go_on, errors_seen = threading.Event(), threading.Event(), []

    def read(i):
        reading.set()
        assert go_on.wait(20)

    stream = stream_of(read, num_threads=1)

    def consume():
        try:
            while True:
                next(stream)
        except RuntimeError as e:
            errors_seen.append(str(e))

    consumer = threading.Thread(target=consume)
    consumer.start()
    assert reading.wait(20)
    closer = threading.Thread(target=stream.close)
    closer.start()
    go_on.set()
    for thread in (consumer, closer):
        thread.join(20)
        assert not thread.is_alive()
    assert errors_seen == ['The stream is closed.']


UNCLOSED = """
import sys, threading
import numpy as np
from ssl_jax.data import host, sources, stream as stream_lib

class Hangs(sources.Arrays):
    def __getitem__(self, i):
        if self.first <= 0:
            threading.Event().wait()
        self.first -= 1
        return super().__getitem__(i)

if __name__ == '__main__':
    how, workers = sys.argv[1], int(sys.argv[2])
    source = Hangs(np.zeros((64, 32, 32, 3), np.uint8))
    source.first = 4 if how == 'hangs' else 10**9
    stream = stream_lib.train_stream(
        source, (host.View('image', 16),), batch_size=4, seed=0, num_threads=1, num_workers=workers)
    batch = next(stream)
    if how == 'cycle':
        batch['stream'] = stream, batch
    if how == 'raises':
        raise SystemExit(3)
    print('the last line')
"""


@pytest.mark.parametrize(
    ('how', 'workers'),
    [('plain', 0), ('hangs', 0), ('raises', 0), ('cycle', 2)],
)
def test_a_program_that_ends_without_closing_ends_at_once_and_quietly(tmp_path, how, workers):
    (tmp_path / 'main.py').write_text(UNCLOSED)
    done = subprocess.run(
        [sys.executable, tmp_path / 'main.py', how, str(workers)],
        env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    if workers:  # Grain may be late to free shared memory, which its tracker mentions and mends
        assert 'Exception ignored' not in done.stderr and 'Traceback' not in done.stderr
    else:
        assert done.stderr == ''
    assert done.returncode == (3 if how == 'raises' else 0)


def test_the_real_sets_stream(data_dir):
    source = sources.open_source(str(data_dir / 'cifar10/train.parquet'))
    batch = take(source, 1, (host.View('image', 32),), batch_size=64)[0]
    assert batch['image'].std() > 30 and len(set(batch['label'].tolist())) > 5
    source = sources.open_source(str(data_dir / 'camvid/images/train'))
    batch = take(source, 1, (host.View('image', 224),), batch_size=4)[0]
    assert batch['image'].shape == (4, 1, 224, 224, 3) and batch['bad'].max() == -1
