# SPDX-License-Identifier: Apache-2.0
"""Runs with their workdir in a bucket."""

import json
import os
import pathlib
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import tiny
from ssl_jax import train
from ssl_jax.data import sources, stream
from ssl_jax.evals import pictures
from ssl_jax.run import checkpoint, errors, metrics, storage, uploads
from ssl_jax.run import workdir as workdir_lib

SLOW = pytest.mark.slow
REPO = pathlib.Path(__file__).resolve().parents[2]
OTHER = {'host': 'far-away', 'pid': 7, 'started': '2026-01-02 03:04:05 UTC'}


@pytest.fixture(autouse=True)
def queue(monkeypatch):
    monkeypatch.setattr(uploads, '_queue', uploads._Queue())
    monkeypatch.setattr(uploads, 'FLUSH_SECONDS', 1.0)


def config(**fields):
    return tiny.config(total_steps=4, checkpoint__every_steps=2, **fields)


def losses(workdir):
    return [row['loss'] for row in metrics.read(workdir) if 'loss' in row]


def test_a_run_leaves_in_a_bucket_what_it_leaves_on_a_disk(bucket, tmp_path, monkeypatch):
    real, seen = checkpoint.Checkpointer.save, []

    def save(self, step, *args):
        seen.append((step, len(losses(self.directory.parent))))
        return real(self, step, *args)

    monkeypatch.setattr(checkpoint.Checkpointer, 'save', save)
    fields = dict(log__tensorboard=True, eval__tasks__pictures={'num_images': 2})
    for workdir in (tmp_path, bucket.root):
        train.train(config(**fields), workdir)
    assert seen == [(2, 2), (4, 4)] * 2  # rows are there before the checkpoint is
    here, there = sorted(p.name for p in tmp_path.iterdir()), storage.names(bucket.root)
    assert here == there and 'report.html' in there
    for folder in ('pictures', 'checkpoints'):
        assert storage.names(tmp_path / folder) == storage.names(f'{bucket.root}/{folder}')
    assert losses(tmp_path) == losses(bucket.root) and len(losses(tmp_path)) == 4
    for name in ('pictures/reconstruction_0000004.png', 'config.json'):
        a, b = storage.read(tmp_path / name), storage.read(f'{bucket.root}/{name}')
        assert a.replace(str(tmp_path).encode(), b'') == b.replace(bucket.root.encode(), b'')
    assert len(storage.names(f'{bucket.root}/tensorboard')) == 1


def test_a_killed_run_continues_with_its_rows_and_its_curves(bucket, monkeypatch):
    """What a kill leaves: no row of the steps after the checkpoint, no end of the file."""
    drawn = []
    monkeypatch.setattr(pictures, 'curves', lambda path, _: drawn.append(losses(path)))

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(metrics.Writer, 'close', lambda self: {})
        patch.setattr(metrics.NonFinite, 'flush', killed)  # at the last step, before its save
        with pytest.raises(KeyboardInterrupt):
            train.train(config(), f'{bucket.root}/killed')
    before = losses(f'{bucket.root}/killed')
    assert len(before) == 2
    monkeypatch.setattr(uploads, '_queue', uploads._Queue())
    fields = dict(eval__tasks__pictures={'num_images': 2})
    train.train(config(**fields), f'{bucket.root}/killed')
    after = losses(f'{bucket.root}/killed')
    assert len(after) == 4 and after[:2] == before and drawn == [after]


@pytest.mark.parametrize(
    'rules',
    [{'status': 503}, *(pytest.param(x, marks=SLOW) for x in ({'hang': 1}, {'status': 403}))],
)
def test_a_run_goes_on_without_its_small_files(bucket, monkeypatch, capfd, rules):
    monkeypatch.setattr(uploads, 'CLOSE_SECONDS', 0.2)
    monkeypatch.setattr(uploads, 'FLUSH_SECONDS', 0.2)
    bucket.fault(match='/metrics|/tensorboard|/pictures', methods='POST,PUT', **rules)
    fields = dict(log__tensorboard=True, eval__tasks__pictures={'num_images': 2})
    assert train.train(config(**fields), bucket.root)['step'] == 4
    assert checkpoint.steps(f'{bucket.root}/checkpoints') == [2, 4]
    assert 'could not be written in 0 s' in capfd.readouterr().err


def test_a_run_whose_workdir_was_taken_over_ends_with_a_sentence_and_writes_no_more(
    bucket, monkeypatch
):
    monkeypatch.setattr(workdir_lib, 'STALE_SECONDS', 0)  # asks before every save
    real, saves = train.save, []

    def save(run, state):
        if saves:
            storage.atomic_write(f'{bucket.root}/run.lock', json.dumps(OTHER))
        saves.append(int(state.step))
        real(run, state)

    monkeypatch.setattr(train, 'save', save)
    with pytest.raises(errors.UserError, match='taken over by process 7 on far-away'):
        train.train(config(), bucket.root)
    assert saves == [2, 4]
    assert checkpoint.steps(f'{bucket.root}/checkpoints') == [2]
    assert losses(bucket.root) == losses(bucket.root)[:2]
    assert json.loads(storage.read(f'{bucket.root}/run.lock')) == OTHER


def test_a_second_run_is_refused_and_changes_nothing(bucket):
    with workdir_lib.lock(bucket.root):
        before = storage.names(bucket.root)
        with pytest.raises(workdir_lib.LockedError, match='in use by process'):
            train.train(config(), bucket.root)
        assert storage.names(bucket.root) == before


def test_bad_images_are_listed_in_the_bucket_without_waiting(bucket):
    source = sources.open_source(dict(source='scenes', n=300, size=32))
    path = f'{bucket.root}/bad_images.jsonl'
    bad = stream.BadImages(source, path, 0.05)
    bucket.requests()
    for i in range(5):
        bad.update({'bad': np.asarray([[i, -1], [-1, -1]])})
    assert not bucket.requests()
    assert uploads.flush()
    assert bucket.requests() == {'POST upload': 1}
    again = stream.BadImages(source, path, 0.05)
    assert again.count == 5
    with pytest.raises(stream.TooManyBadImages):
        again.update({'bad': np.arange(20)[:, None]})
    assert len(storage.read_lines(path)) == 20


@pytest.mark.slow
def test_a_killed_process_continues_at_once_with_all_rows_of_its_checkpoint(bucket):
    """kill -9, three times in a row, on one machine; the file of metrics is that of a whole run."""
    code = """
        import os, sys, tiny
        from ssl_jax import train
        from ssl_jax.run import checkpoint, metrics
        after, workdir = int(sys.argv[1]), sys.argv[2]
        real = metrics.NonFinite.push
        def push(self, row):
            push.steps += 1
            if push.steps == after:  # of this process, the last checkpoint is surely there
                os.kill(os.getpid(), 9)
            real(self, row)
        push.steps = 0
        metrics.NonFinite.push = push
        wait = checkpoint.Checkpointer.save
        def save(self, *args):
            done = wait(self, *args)
            self.wait()
            return done
        checkpoint.Checkpointer.save = save
        print(train.train(tiny.config(total_steps=12, checkpoint__every_steps=2), workdir)['step'])
    """
    env = {**os.environ, **bucket.env, 'XLA_FLAGS': '', 'PYTHONPATH': f'{REPO}:{REPO}/tests'}
    for after in (4, 4, 4, 100):
        command = [sys.executable, '-c', textwrap.dedent(code), str(after), bucket.root]
        done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=300)
        assert done.returncode == (-9 if after < 100 else 0), done.stderr[-2000:]
        assert 'is held by' not in done.stdout
    train.train(tiny.config(total_steps=12), f'{bucket.root}/whole')
    np.testing.assert_allclose(losses(bucket.root), losses(f'{bucket.root}/whole'), rtol=1e-4)
    assert [r['step'] for r in metrics.read(bucket.root) if 'loss' in r] == list(range(1, 13))
