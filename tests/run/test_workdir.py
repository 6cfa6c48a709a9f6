# SPDX-License-Identifier: Apache-2.0
"""One run per workdir, whole files, and a config that says when it changed."""

import json
import os
import subprocess
import sys
import time

import ml_collections
import pytest

from ssl_jax.run import workdir as workdir_lib


def hold(workdir, **changes):
    """A lock of this very process, with fields changed."""
    with workdir_lib.lock(workdir):
        text = (workdir / 'run.lock').read_text()
    (workdir / 'run.lock').write_text(json.dumps({**json.loads(text), **changes}))


def finished_process():
    child = subprocess.Popen([sys.executable, '-c', ''])
    child.wait()
    return child.pid


def test_a_second_run_is_refused_and_told_who_is_there(tmp_path):
    with (
        workdir_lib.lock(tmp_path),
        pytest.raises(workdir_lib.LockedError) as e,
        workdir_lib.lock(tmp_path),
    ):
        pass
    for part in (str(tmp_path), f'process {os.getpid()} on {os.uname().nodename}', 'started 20'):
        assert part in str(e.value)


def test_a_refused_run_leaves_the_lock_to_its_holder(tmp_path):
    with workdir_lib.lock(tmp_path):
        with pytest.raises(workdir_lib.LockedError), workdir_lib.lock(tmp_path):
            pass
        assert (tmp_path / 'run.lock').exists()


def test_the_lock_is_gone_after_the_run_also_after_an_error(tmp_path):
    with pytest.raises(KeyError), workdir_lib.lock(tmp_path):
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_a_lock_of_a_dead_process_is_taken_over_with_a_line(tmp_path, capsys):
    hold(tmp_path, pid=finished_process())
    with workdir_lib.lock(tmp_path):
        assert json.loads((tmp_path / 'run.lock').read_text())['pid'] == os.getpid()
    assert 'Taking over' in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_lock_whose_pid_now_belongs_to_another_process_is_taken_over(tmp_path, capsys):
    hold(tmp_path, pid=os.getppid(), ticks=-1)
    with workdir_lib.lock(tmp_path):
        assert 'used by another process' in capsys.readouterr().out


def test_a_lock_from_before_a_restart_of_the_host_is_taken_over(tmp_path, capsys):
    hold(tmp_path, boot='another')
    with workdir_lib.lock(tmp_path):
        assert 'host restarted' in capsys.readouterr().out


def test_a_fresh_lock_of_another_host_holds_and_an_untouched_one_does_not(tmp_path, capsys):
    hold(tmp_path, host='far-away')
    with pytest.raises(workdir_lib.LockedError, match='far-away'), workdir_lib.lock(tmp_path):
        pass
    old = time.time() - workdir_lib.STALE_SECONDS - 60
    os.utime(tmp_path / 'run.lock', (old, old))
    with workdir_lib.lock(tmp_path):
        assert 'not touched it for 11 minutes' in capsys.readouterr().out


def test_a_lock_that_was_cut_off_while_written_is_taken_over_once_it_is_old(tmp_path):
    (tmp_path / 'run.lock').write_text('{"host')
    with pytest.raises(workdir_lib.LockedError, match='just starting'), workdir_lib.lock(tmp_path):
        pass
    os.utime(tmp_path / 'run.lock', (0, 0))
    with workdir_lib.lock(tmp_path):
        pass


def test_a_beat_touches_the_lock(tmp_path):
    with workdir_lib.lock(tmp_path) as beat:
        os.utime(tmp_path / 'run.lock', (0, 0))
        beat()
        assert time.time() - (tmp_path / 'run.lock').stat().st_mtime < 60


def test_the_thread_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(workdir_lib, 'BEAT_SECONDS', 0.001)
    with workdir_lib.lock(tmp_path):
        os.utime(tmp_path / 'run.lock', (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / 'run.lock').stat().st_mtime == 0:
            assert time.monotonic() < deadline


def test_a_run_that_lost_its_lock_does_not_delete_that_of_the_next(tmp_path):
    with workdir_lib.lock(tmp_path):
        (tmp_path / 'run.lock').write_text('{"host": "next"}')
    assert (tmp_path / 'run.lock').exists()


def test_the_config_is_stored_and_its_changes_are_listed(tmp_path):
    config = ml_collections.ConfigDict({'lr': 0.1, 'data': {'path': 'a', 'crop': (0.2, 1.0)}})
    assert workdir_lib.save_config(tmp_path, config) == {}
    assert workdir_lib.save_config(tmp_path, config) == {}
    config.data.path = 'b'
    del config['lr']
    config.seed = 1
    changes = workdir_lib.save_config(tmp_path, config)
    assert changes == {
        'data.path': ('a', 'b'),
        'seed': (workdir_lib.ABSENT, 1),
        'lr': (0.1, workdir_lib.ABSENT),
    }
    stored = json.loads((tmp_path / 'config.json').read_text())
    assert stored == {'data': {'path': 'b', 'crop': [0.2, 1.0]}, 'seed': 1}


def test_an_atomic_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    workdir_lib.atomic_write(tmp_path / 'f', 'old')

    def fail(*_):
        raise OSError('no space')

    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(OSError, match='no space'):
        workdir_lib.atomic_write(tmp_path / 'f', 'new')
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [('f', 'old')]
