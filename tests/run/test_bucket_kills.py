# SPDX-License-Identifier: Apache-2.0
"""Runs in a bucket that are killed, or lose it for a while, end as those that are not."""

import json
import pathlib
import random
import signal
import threading

import pytest

import tiny
from processes import finish, no_process_outlives_its_test, start, twice  # noqa: F401
from ssl_jax import train
from ssl_jax.evals import base as evals
from ssl_jax.run import bucket as bucket_lib
from ssl_jax.run import checkpoint, errors, metrics, preempt, workdir

pytestmark = pytest.mark.slow
REPO = pathlib.Path(__file__).resolve().parents[2]
KILLS = 20
STEPS = 30
RUN = """
    import os, signal, threading
    import tiny
    from ssl_jax import config, train
    from ssl_jax.run import gcs, launch, preempt

    launch.initialize_distributed()
    me = int(os.environ.get('JAX_PROCESS_ID', 0))
    seconds, requests = ({seconds}, {requests}) if me == {who} else (0, 0)
    kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
    count, compiled, real = [0], preempt.run_interruptible, gcs.GCSFileSystem._request

    def run_interruptible(fn, stop):  # the last before the first step
        result = compiled(fn, stop)
        if seconds:
            threading.Timer(seconds, kill).start()
        count.append(1)
        return result

    async def request(*args, **kwargs):
        count[0] += len(count) > 1
        if requests and count[0] == requests:
            kill()
        return await real(*args, **kwargs)

    preempt.run_interruptible = run_interruptible
    gcs.GCSFileSystem._request = request
    config.recipe = lambda *_: tiny.config(compile_cache=True, {fields})
    train.command('tiny', [], {path!r})
    launch.leave()
"""
FIELDS = 'checkpoint__every_steps=2, checkpoint__keep=2, eval__tasks__monitors=None'


def code(path, seconds=0, requests=0, who=0, fields=f'{FIELDS}, total_steps={STEPS}'):
    """A process that trains; process `who` kills itself at a time or a request of its loop."""
    return RUN.format(path=str(path), seconds=seconds, requests=requests, who=who, fields=fields)


@pytest.fixture(autouse=True)
def patient(bucket, monkeypatch):
    monkeypatch.setenv('SSL_JAX_BUCKET_PATIENCE', '60')


def end(path, step):
    """The checksums of all tensors of the last step, which are read and compared."""
    model, meta = checkpoint.restore_model(path)
    assert model and meta['step'] == step
    return meta['tensors']


def test_after_twenty_kills_the_bits_are_those_of_a_run_without(bucket, tmp_path):
    path, rng, ends = f'{bucket.root}/run', random.Random(0), []
    for kill in range(KILLS):
        when = (round(rng.uniform(0.05, 1.5), 3), 0) if kill % 2 else (0, rng.randrange(1, 200))
        before = checkpoint.steps(f'{path}/checkpoints')
        status, out = finish(start(code(path, *when)))
        ends.append((when, status, before))
        print(ends[-1], flush=True)
        assert status in (-signal.SIGKILL, 0), out
        assert 'damaged' not in out, out
        if before:
            assert f'continuing this run at step {before[-1]}' in out, out
        after = checkpoint.steps(f'{path}/checkpoints')
        assert not before or (after and after[-1] >= before[-1]), ends
        if status == 0:
            break
    status, out = finish(start(code(path)))
    assert status == 0, out
    names = bucket_lib.names(f'{path}/checkpoints')
    assert names == [str(STEPS - 2), str(STEPS)], names
    assert sum(status != 0 for _, status, _ in ends) >= KILLS // 2, ends
    status, out = finish(start(code(tmp_path / 'whole')))
    assert status == 0, out
    assert end(path, STEPS) == end(tmp_path / 'whole', STEPS)


def test_two_processes_of_which_either_is_killed_in_a_save_end_with_the_same_bits(bucket, tmp_path):
    fields = f'{FIELDS}, total_steps=12'

    def both(path, who=None, requests=0):
        return [finish(p) for p in twice(code(path, 0, requests, who, fields), 1)]

    path = f'{bucket.root}/run'
    for who, requests in ((0, 60), (1, 6), (0, 110)):
        found = both(path, who, requests)
        assert found[who][0] == -signal.SIGKILL, found
        assert found[1 - who][0] == 1, found
        assert f'process {who} is gone' in found[1 - who][1], found
    found = both(path)
    assert [status for status, _ in found] == [0, 0], found
    assert 'damaged' not in found[0][1]
    found = both(str(tmp_path / 'whole'))
    assert [status for status, _ in found] == [0, 0], found
    assert end(path, 12) == end(tmp_path / 'whole', 12)


# Outages in each phase of a run


def before(monkeypatch, owner, name, act, nth=1):
    """Calls `act` before the nth call of a function."""
    real, calls = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        calls.append(0)
        if len(calls) == nth:
            act()
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


PHASES = {
    'the lock': (train.workdir_lib, 'lock', 1),
    'the restore': (checkpoint.Checkpointer, 'restore', 1),
    'a step': (checkpoint.Checkpointer, 'check', 1),
    'a log': (metrics.Writer, 'log', 2),
    'a save': (checkpoint.Checkpointer, 'save', 1),
    'the second save': (checkpoint.Checkpointer, 'save', 2),
    'an evaluation': (evals, 'run', 1),
    'the end': (metrics.Writer, 'close', 1),
}


CONFIG = tiny.config(total_steps=8, checkpoint__every_steps=2, eval__every_steps=2)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    """A run of 8 steps without faults."""
    path = tmp_path_factory.mktemp('whole')
    train.train(CONFIG, path)
    return path


@pytest.fixture(scope='module')
def halves():
    """Where the half run lies: trained once."""
    return []


@pytest.fixture
def half(bucket, halves, monkeypatch):
    """A folder of the bucket with a run that was stopped after 4 of 8 steps."""
    path = f'{bucket.root}/run'
    if not halves:
        with monkeypatch.context() as patch:
            patch.setattr(preempt.Preemption, 'agreed', lambda self, step: step >= 4)
            assert train.train(CONFIG, path)['preempted']
        halves.append(f'{bucket.root}/half')
        bucket_lib.copy(path, halves[0])
    else:
        bucket_lib.copy(halves[0], path)
    return path


def losses(path):
    rows = [r for r in metrics.read(path) if 'loss' in r]
    return {r['step']: r['loss'] for r in rows}


@pytest.mark.parametrize('kind, seconds', [('503', 6), ('stalled', 4), ('503', 30)])
@pytest.mark.parametrize('phase', PHASES)
def test_an_outage_in_any_phase_changes_nothing(
    bucket, half, whole, monkeypatch, phase, kind, seconds
):
    if seconds == 30 and phase not in ('the restore', 'a save'):
        pytest.skip('one real outage of half a minute while reading, and one while writing')
    monkeypatch.setenv('SSL_JAX_BUCKET_PATIENCE', '120')
    faults = []

    def fault():
        faults.append(1)
        bucket.fault(**{'503': dict(status=503), 'stalled': dict(hang=1)}[kind])
        threading.Timer(seconds, bucket.heal).start()

    before(monkeypatch, *PHASES[phase][:2], fault, PHASES[phase][2])
    result = train.train(CONFIG, half)
    assert faults and result['step'] == 8
    assert checkpoint.steps(f'{half}/checkpoints') == [6, 8]
    assert end(half, 8) == end(whole, 8)
    assert losses(half) == losses(whole)


@pytest.mark.parametrize('phase', ['the restore', 'a step', 'a save'])
@pytest.mark.parametrize('kind', ['404', '403', '503'])
def test_a_bucket_that_is_gone_ends_the_run_with_a_sentence(
    bucket, half, monkeypatch, phase, kind, capfd
):
    monkeypatch.setenv('SSL_JAX_BUCKET_PATIENCE', '1')
    before(monkeypatch, *PHASES[phase][:2], lambda: bucket.fault(status=int(kind)))
    with pytest.raises(SystemExit) as caught, errors.in_a_sentence('ssl_jax'):
        train.train(CONFIG, half)
    assert caught.value.code == 1
    lines = capfd.readouterr().err.splitlines()
    print(json.dumps(lines, indent=1))
    assert len(lines) < 15 and lines[-1].startswith('ssl_jax: '), lines
    bucket.heal()
    bucket_lib.remove(f'{half}/{workdir.LOCK}')
    assert checkpoint.steps(f'{half}/checkpoints')[-1] >= 4
    assert train.train(CONFIG, half)['step'] == 8
