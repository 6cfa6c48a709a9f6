# SPDX-License-Identifier: Apache-2.0
"""A stall writes the stacks of all threads and ends the run; what moves is left alone."""

import contextlib
import re
import threading
import time

import numpy as np
import pytest

import tiny
from processes import finish, no_process_outlives_its_test, start  # noqa: F401
from ssl_jax import config, train
from ssl_jax.data import loader
from ssl_jax.evals import knn
from ssl_jax.run import errors, peers, storage, watchdog


class Ended(threading.Event):
    """Stands for the end of the process."""

    sentence = None

    def __call__(self, sentence):
        self.sentence = sentence
        self.set()


@pytest.fixture
def ended(monkeypatch, tmp_path_factory):
    ended, folder = Ended(), tmp_path_factory.mktemp('host')
    monkeypatch.setattr(watchdog.peers, 'fail', ended)
    monkeypatch.setattr(watchdog, '_local', lambda name: str(folder / name))
    return ended


def waits(event):
    return event.wait(30)


def test_a_stall_names_its_phase_and_writes_the_stacks_then_ends_the_run(tmp_path, ended, capfd):
    threads = [threading.Thread(target=waits, args=(ended,), name=f'reader-{i}') for i in range(3)]
    for thread in threads:
        thread.start()
    peers.at('waiting for the batch of step 7')
    with watchdog.watch(tmp_path, 0.1, 0.3):
        assert waits(ended)
    for thread in threads:
        thread.join()
    said = capfd.readouterr().err
    assert 'ssl_jax: this run has not moved for 0.1' in said
    assert f'(waiting for the batch of step 7); the stacks of all threads are in {tmp_path}' in said
    text = (tmp_path / 'stacks.0.txt').read_text()
    main, rest = text.split('Thread ', 2)[1:]
    assert main.startswith('MainThread') and 'test_watchdog.py' in main
    assert re.search(r'reader-\d and 2 more:\n', rest) and 'in waits' in rest
    assert '(waiting for the batch of step 7), longer than watchdog.exit_minutes' in ended.sentence
    assert 'start again with the same command' in ended.sentence


@pytest.mark.parametrize('move', [lambda: peers.at('step 7'), peers.progress], ids=['at', 'part'])
def test_what_moves_is_left_alone(tmp_path, ended, capfd, move):
    with watchdog.watch(tmp_path, 0.4, 0.6):
        for _ in range(12):
            move()
            assert not ended.wait(0.1)
    assert capfd.readouterr().err == '' and not list(tmp_path.iterdir())


def test_a_batch_of_any_stream_is_progress():
    stream = loader.Stream(iter([{'x': np.zeros(1)}]), lambda: None)
    before = peers.now()
    next(stream)
    assert peers.now() is not before and peers.now().phase == before.phase


def test_every_chunk_of_a_long_knn_is_progress(monkeypatch):
    moved = []
    monkeypatch.setattr(knn, 'CHUNK_ELEMENTS', 1)  # 16 queries, the fewest
    monkeypatch.setattr(knn.peers, 'progress', lambda: moved.append(0))
    x = np.eye(40, dtype=np.float32)
    knn.knn(x, np.arange(40) % 2, x, np.arange(40) % 2, num_classes=2, ks=(1,))
    assert len(moved) == 3


def test_a_run_that_moves_again_says_so_and_may_stall_again(tmp_path, ended, capfd):
    with watchdog.watch(tmp_path, 0.1, None):
        for step in (7, 8):
            peers.at(f'step {step}')
            while capfd.readouterr().err.count('the stacks of all threads') == 0:
                assert not ended.wait(0.05)
        peers.at('saving step 9')
        while 'goes on: saving step 9' not in capfd.readouterr().err:
            assert not ended.wait(0.05)
    text = (tmp_path / 'stacks.0.txt').read_text()
    assert text.count('(step 7)') == text.count('(step 8)') == 1


def test_the_start_of_a_run_may_take_longer(tmp_path, ended):
    peers.at('compiling')
    with watchdog.watch(tmp_path, None, 0.2):
        assert not ended.wait(0.5)
        assert waits(ended)


@pytest.mark.parametrize('limits', [(None, None), (0, None), (0, 0)])
def test_none_and_zero_switch_it_off(tmp_path, limits):
    count = threading.active_count()
    with watchdog.watch(tmp_path, *limits):
        assert threading.active_count() == count


def test_a_pause_of_the_whole_process_is_no_stall(tmp_path, ended, monkeypatch):
    jump, real = [0.0], time.monotonic
    monkeypatch.setattr(watchdog.time, 'monotonic', lambda: real() + jump[0])
    peers.at('step 7')
    with watchdog.watch(tmp_path, 5.0, 5.0):
        assert not ended.wait(0.7)
        jump[0] = 3600.0  # as after Ctrl-Z and fg
        assert not ended.wait(1.2)


@pytest.mark.parametrize('hangs', ['the bucket', 'the temporary folder'])
def test_what_stalls_does_not_stop_the_watchdog(tmp_path, ended, monkeypatch, capfd, hangs):
    never = threading.Event()
    monkeypatch.setattr(watchdog, 'TICK_SECONDS', 0.05)
    if hangs == 'the bucket':
        monkeypatch.setattr(storage, 'atomic_write', lambda *_: never.wait(30))
    else:
        monkeypatch.setattr(watchdog, '_local', lambda name: f'/nowhere/{name}')
    peers.at('saving step 7')
    with watchdog.watch(tmp_path, 0.1, 0.2):
        assert waits(ended)
    never.set()
    said = capfd.readouterr().err
    assert 'on this host' in said if hangs == 'the bucket' else 'Thread MainThread' in said


def test_of_several_processes_the_one_that_waits_for_no_other_has_the_first_word(
    tmp_path, ended, monkeypatch
):
    monkeypatch.setattr(watchdog.peers, 'others', lambda: {1: 'waiting for the batch of step 9'})
    times = []
    for phase in ('waiting for the batch of step 7', f'{watchdog.WAITING}, step 6'):
        ended.clear()
        peers.at(phase)
        begin = time.monotonic()
        with watchdog.watch(tmp_path, None, 1.0):
            assert waits(ended)
        times.append(time.monotonic() - begin)
    assert times[0] < times[1]
    assert '(process 1: waiting for the batch of step 9)' in ended.sentence


HELD = """
    import ctypes
    from ssl_jax.run import peers, watchdog
    watchdog.END_SECONDS = watchdog.TICK_SECONDS = 0.2
    peers.at('step 7')
    {others}
    with watchdog.watch('.', 0.1, {exit}):
        ctypes.PyDLL(None).sleep(60)  # PyDLL: keeps Python's lock
"""


@pytest.mark.parametrize(
    'exit, others',
    [(0.3, ''), (3600, "peers.SILENT_SECONDS, peers.others = 0.3, lambda: {1: 'step 7'}")],
    ids=['alone', 'of several'],
)
def test_a_call_that_keeps_pythons_lock_is_ended_with_its_stack(exit, others):
    code, out = finish(start(HELD.format(exit=exit, others=others)), timeout=40)
    assert code == 1 and 'Timeout' in out and 'line 8 in <module>' in out, out


@pytest.mark.parametrize(
    'fields, words',
    [
        (['watchdog.dump_minutes=40'], 'watchdog.dump_minutes=40.0 is after watchdog.exit_minutes'),
        (['watchdog.exit_minutes=5'], 'dump_minutes=10.0 is after watchdog.exit_minutes=5.0'),
        (['watchdog.exit_minutes=-1'], 'watchdog.exit_minutes=-1.0 is out of range'),
        (['watchdog.exit_minutes=soon'], "takes float or None, not 'soon'"),
    ],
)
def test_limits_that_make_no_sense_are_one_sentence(fields, words):
    with pytest.raises(errors.UserError, match=words):
        config.load('scenes_mae', fields)


@pytest.mark.slow
def test_a_stalled_loader_ends_a_run_and_names_the_step(tmp_path, ended, monkeypatch, capfd):
    """And the stack of the main thread shows where it waits."""
    real, count = loader.Stream.__next__, iter(range(100))

    def stalls(self):
        if next(count) == 3:
            assert waits(ended)
            raise errors.UserError('as if it had ended')
        return real(self)

    monkeypatch.setattr(loader.Stream, '__next__', stalls)
    quick = tiny.config(watchdog__dump_minutes=0.5 / 60, watchdog__exit_minutes=1 / 60)
    monkeypatch.setattr(watchdog, 'SLOW_FACTOR', 1000)
    with contextlib.suppress(errors.UserError):
        train.train(quick, tmp_path)
    assert '(waiting for the batch of step 3), longer' in ended.sentence
    assert 'in loop\n' in (tmp_path / 'stacks.0.txt').read_text().split('Thread ')[1]
