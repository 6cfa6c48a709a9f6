# SPDX-License-Identifier: Apache-2.0
"""One run per workdir: the kernel's lock on disks, a lease in buckets."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from etils import epath

from ssl_jax.run import storage
from ssl_jax.run import workdir as workdir_lib

REPO = pathlib.Path(__file__).resolve().parents[2]
HOST = os.uname().nodename
OTHER = {'host': 'far-away', 'pid': 7, 'started': '2026-01-02 03:04:05 UTC'}

HOLD = """
    import sys
    from ssl_jax.run import workdir
    with workdir.lock(sys.argv[1]):
        print('locked', flush=True)
        sys.stdin.readline()
"""


@pytest.fixture
def other_process(tmp_path):
    """() -> a process that holds the lock of `tmp_path` till it reads a line."""
    children = []

    def start():
        command = [sys.executable, '-c', textwrap.dedent(HOLD), str(tmp_path)]
        env = dict(os.environ, JAX_PLATFORMS='cpu', PYTHONPATH=str(REPO), XLA_FLAGS='')
        pipe = subprocess.PIPE
        child = subprocess.Popen(command, env=env, text=True, stdin=pipe, stdout=pipe, stderr=pipe)
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate()


def finished_process():
    child = subprocess.Popen([sys.executable, '-c', ''])
    child.wait()
    return child.pid


# The kernel's lock


def test_a_second_run_is_refused_and_told_who_is_there(tmp_path):
    with (
        workdir_lib.lock(tmp_path),
        pytest.raises(workdir_lib.LockedError) as e,
        workdir_lib.lock(tmp_path),
    ):
        pass
    for part in (str(tmp_path), f'process {os.getpid()} on {HOST}', 'started 20'):
        assert part in str(e.value)
    assert '\n' not in str(e.value)


def test_another_process_is_refused_and_told_who_is_there(tmp_path, other_process):
    with workdir_lib.lock(tmp_path):
        out, err = other_process().communicate()
    assert out == '' and f'in use by process {os.getpid()} on {HOST}' in err


def test_a_killed_run_frees_its_workdir_at_once(tmp_path, other_process):
    child = other_process()
    assert child.stdout.readline() == 'locked\n'
    with (
        pytest.raises(workdir_lib.LockedError, match=f'process {child.pid} on {HOST}'),
        workdir_lib.lock(tmp_path),
    ):
        pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    with workdir_lib.lock(tmp_path):
        assert json.loads((tmp_path / 'run.lock').read_text())['pid'] == os.getpid()


def test_a_refused_run_leaves_the_lock_to_its_holder(tmp_path):
    with workdir_lib.lock(tmp_path):
        before = (tmp_path / 'run.lock').read_text()
        for _ in range(2):
            with pytest.raises(workdir_lib.LockedError), workdir_lib.lock(tmp_path):
                pass
        assert (tmp_path / 'run.lock').read_text() == before


def test_the_lock_is_gone_after_the_run_also_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), workdir_lib.lock(tmp_path / 'new'):
            raise KeyError
        assert list((tmp_path / 'new').iterdir()) == []


@pytest.mark.parametrize('text', [json.dumps({**OTHER, 'host': HOST}), '{"host', ''])
def test_what_a_dead_process_left_is_no_obstacle(tmp_path, text):
    text = text.replace('"pid": 7', f'"pid": {finished_process()}')
    (tmp_path / 'run.lock').write_text(text)
    with workdir_lib.lock(tmp_path):
        assert json.loads((tmp_path / 'run.lock').read_text())['pid'] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_has_not_said_who_it_is_holds_too(tmp_path):
    with open(tmp_path / 'run.lock', 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with (
            pytest.raises(workdir_lib.LockedError, match='a run that is just starting'),
            workdir_lib.lock(tmp_path),
        ):
            pass


def test_a_file_that_the_run_before_removes_in_this_moment_is_made_anew(tmp_path, monkeypatch):
    path, real, calls = tmp_path / 'run.lock', fcntl.flock, []

    def flock(*args):
        if not calls:
            path.unlink()
        calls.append(args)
        real(*args)

    monkeypatch.setattr(fcntl, 'flock', flock)
    with workdir_lib.lock(tmp_path):
        assert json.loads(path.read_text())['pid'] == os.getpid()
        with pytest.raises(workdir_lib.LockedError), workdir_lib.lock(tmp_path):
            pass


def test_a_run_whose_lock_was_deleted_does_not_delete_that_of_the_next(tmp_path):
    first, second = workdir_lib.lock(tmp_path), workdir_lib.lock(tmp_path)
    with contextlib.ExitStack() as stack:
        with first:
            (tmp_path / 'run.lock').unlink()  # as the message says, if that run is surely gone
            stack.enter_context(second)
        assert (tmp_path / 'run.lock').exists()
        with pytest.raises(workdir_lib.LockedError), workdir_lib.lock(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


# The lease


@pytest.fixture
def path(tmp_path):
    return epath.Path(tmp_path) / 'run.lock'


def touched(path, seconds_ago):
    then = time.time() - seconds_ago
    os.utime(path, (then, then))


def test_a_fresh_lease_holds_and_is_named(path):
    path.write_text(json.dumps(OTHER))
    with (
        pytest.raises(workdir_lib.LockedError, match='process 7 on far-away, started 2026-01-02'),
        workdir_lib._lease(path),
    ):
        pass
    assert json.loads(path.read_text()) == OTHER


def test_a_lease_untouched_for_long_is_taken_over_with_a_line(path, capsys):
    path.write_text(json.dumps(OTHER))
    touched(path, workdir_lib.STALE_SECONDS + 60)
    with workdir_lib._lease(path):
        assert json.loads(path.read_text())['pid'] == os.getpid()
    assert not path.exists()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f'Taking over {path}: process 7 on far-away')
    assert line.endswith('left it 11 minutes ago.')


def test_a_lease_that_was_cut_off_while_written_is_taken_over_once_it_is_old(path):
    path.write_text('{"host')
    with (
        pytest.raises(workdir_lib.LockedError, match='just starting'),
        workdir_lib._lease(path),
    ):
        pass
    touched(path, workdir_lib.STALE_SECONDS + 60)
    with workdir_lib._lease(path):
        pass


def test_a_lease_is_touched_as_long_as_its_run_lives(path, monkeypatch):
    monkeypatch.setattr(workdir_lib, 'BEAT_SECONDS', 0.001)
    with workdir_lib._lease(path):
        touched(path, workdir_lib.STALE_SECONDS + 60)
        deadline = time.monotonic() + 10
        while time.time() - path.stat().mtime > workdir_lib.STALE_SECONDS:
            assert time.monotonic() < deadline


def test_a_lease_is_gone_after_the_run_also_after_an_error(path):
    with pytest.raises(KeyError), workdir_lib._lease(path):
        assert path.exists()
        raise KeyError
    assert not path.exists()


def test_a_run_whose_lease_was_taken_over_does_not_delete_that_of_the_next(path):
    with workdir_lib._lease(path):
        path.write_text(json.dumps(OTHER))
    assert json.loads(path.read_text()) == OTHER


def test_a_bucket_has_a_lease(tmp_path, path, monkeypatch):
    monkeypatch.setattr(storage, 'is_remote', lambda path: True)
    path.write_text(json.dumps(OTHER))
    with pytest.raises(workdir_lib.LockedError, match='far-away'), workdir_lib.lock(tmp_path):
        pass


@pytest.mark.parametrize('code', [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_has_a_lease(tmp_path, path, monkeypatch, code):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, 'flock', flock)
    with workdir_lib.lock(tmp_path):
        assert json.loads(path.read_text())['pid'] == os.getpid()
        with (
            pytest.raises(workdir_lib.LockedError, match=f'process {os.getpid()}'),
            workdir_lib.lock(tmp_path),
        ):
            pass
    assert list(tmp_path.iterdir()) == []
