# SPDX-License-Identifier: Apache-2.0
"""One run per workdir: the kernel's lock on disks, a lease in buckets."""

import concurrent.futures
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
def start_on():
    """(workdir) -> a process that holds its lock till it reads a line."""
    children = []

    def start(workdir):
        command = [sys.executable, '-c', textwrap.dedent(HOLD), str(workdir)]
        env = dict(os.environ, JAX_PLATFORMS='cpu', PYTHONPATH=str(REPO), XLA_FLAGS='')
        pipe = subprocess.PIPE
        child = subprocess.Popen(command, env=env, text=True, stdin=pipe, stdout=pipe, stderr=pipe)
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate()


@pytest.fixture
def other_process(start_on, tmp_path):
    return lambda: start_on(tmp_path)


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


@pytest.fixture
def in_bucket(bucket):
    return epath.Path(bucket.root) / 'run.lock'


@pytest.fixture(params=['disk', 'bucket'])
def either(request):
    """The path of a lease."""
    return request.getfixturevalue('path' if request.param == 'disk' else 'in_bucket')


@pytest.fixture
def short(monkeypatch):
    """A lease that others wait half a second for."""
    for name, value in dict(STALE=0.5, WATCH=0.2, BEAT=0.05, POLL=0.02).items():
        monkeypatch.setattr(workdir_lib, f'{name}_SECONDS', value)


@contextlib.contextmanager
def leased(path):
    """The lease at `path`; yields `held`."""
    lease = workdir_lib._Lease(path)
    for _ in lease.take():
        pass
    try:
        yield lease.held
    finally:
        lease.release()


def put(path, holder):
    storage.atomic_write(path, json.dumps(holder))


def holder(path):
    return json.loads(storage.read(path))


def until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_lease_is_there_as_long_as_its_run_also_after_an_error(either):
    with pytest.raises(KeyError), leased(either):
        assert holder(either)['pid'] == os.getpid()
        raise KeyError
    assert not storage.exists(either)


def test_a_second_run_in_a_bucket_is_refused_at_once_and_told_who_is_there(bucket):
    with (
        workdir_lib.lock(bucket.root),
        pytest.raises(workdir_lib.LockedError, match=f'process {os.getpid()} on {HOST}'),
        workdir_lib.lock(bucket.root),
    ):
        pass


def test_a_lease_is_renewed_as_long_as_its_run_lives(either, short):
    with leased(either):
        beat = holder(either)['beat']
        until(lambda: holder(either)['beat'] > beat + 2)


def test_only_one_of_many_gets_a_free_lease(in_bucket):
    _only_one(in_bucket)


def test_only_one_of_many_takes_an_old_lease_over(in_bucket, monkeypatch):
    put(in_bucket, OTHER)
    monkeypatch.setattr(workdir_lib, 'GONE_SECONDS', -10)
    _only_one(in_bucket)


def _only_one(path):
    leases = [workdir_lib._Lease(path) for _ in range(6)]

    def take(lease):
        try:
            return list(lease.take()) is not None
        except workdir_lib.LockedError:
            return False

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        taken = list(pool.map(take, leases))
    assert sum(taken) == 1
    assert holder(path)['id'] == leases[taken.index(True)]._holder['id']
    leases[taken.index(True)].release()


def test_a_run_on_another_machine_that_answers_is_not_waited_for_longer(either, short, monkeypatch):
    monkeypatch.setattr(workdir_lib, 'STALE_SECONDS', 60)
    monkeypatch.setattr(workdir_lib, '_has_ended', lambda holder: None)
    with leased(either), pytest.raises(workdir_lib.LockedError, match='in use'), leased(either):
        pass


def test_a_run_on_another_machine_that_does_not_answer_is_waited_for(either, short, capsys):
    put(either, OTHER)
    began = time.monotonic()
    with leased(either):
        assert time.monotonic() - began >= 0.2
        assert holder(either)['pid'] == os.getpid()
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f'{either} is held by process 7 on far-away, started 2026-01-02')
    assert 'this run starts in ' in said[0] and 'refused as soon as that one answers' in said[0]
    assert said[1].startswith(f'Taking over {either}: process 7 on far-away')


def test_a_run_that_is_long_gone_is_not_waited_for(path, capsys):
    put(path, OTHER)
    then = time.time() - workdir_lib.GONE_SECONDS - 60
    os.utime(path, (then, then))
    with leased(path):
        pass
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith('left it 16 minutes ago.')


@pytest.mark.parametrize('text', ['{"host', '[]', ''])
def test_a_lease_that_nobody_can_read_is_waited_for_too(either, short, capsys, text):
    storage.atomic_write(either, text)
    with leased(either):
        pass
    assert 'is held by a run that is just starting' in capsys.readouterr().out


def test_a_process_of_this_machine_that_has_ended_is_not_waited_for(in_bucket, capsys):
    child = subprocess.Popen([sys.executable, '-c', ''])
    put(in_bucket, {**workdir_lib._holder(), 'pid': child.pid, 'birth': 'x'})
    child.wait()
    with leased(in_bucket):
        pass
    assert capsys.readouterr().out.rstrip().endswith('has ended.')


@pytest.mark.parametrize(
    'change, ended',
    [({}, False), ({'birth': '1'}, True), ({'machine': 'other'}, None), ({'machine': ''}, None)],
)
def test_a_process_is_known_by_its_machine_and_its_start(change, ended):
    assert workdir_lib._has_ended({**workdir_lib._holder(), **change}) is ended


def test_a_zombie_has_ended():
    child = subprocess.Popen([sys.executable, '-c', ''])
    until(lambda: workdir_lib._birth(child.pid) == '')
    child.wait()


def test_a_killed_run_frees_a_bucket_at_once_on_the_same_machine(bucket, start_on):
    child = start_on(bucket.root)
    assert child.stdout.readline() == 'locked\n'
    with (
        pytest.raises(workdir_lib.LockedError, match=f'process {child.pid}'),
        workdir_lib.lock(bucket.root),
    ):
        pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    began = time.monotonic()
    with workdir_lib.lock(bucket.root):
        assert time.monotonic() - began < workdir_lib.POLL_SECONDS


def test_a_run_that_was_taken_over_ends_and_leaves_the_lease(either, short):
    with (
        pytest.raises(workdir_lib.LockedError, match='taken over by process 7 on far-away'),
        leased(either) as held,
    ):
        held()
        put(either, OTHER)
        until(lambda: _raises(held))
        held()
    assert holder(either) == OTHER


def test_a_run_that_was_cut_off_asks_before_it_saves(either, monkeypatch):
    with leased(either) as held:
        put(either, OTHER)
        held(sure=True)  # renewed a moment ago
        monkeypatch.setattr(workdir_lib, 'STALE_SECONDS', 0)
        held()
        with pytest.raises(workdir_lib.LockedError, match='far-away'):
            held(sure=True)


def _raises(held):
    try:
        held()
    except workdir_lib.LockedError:
        return True


def test_a_lease_that_was_deleted_comes_back(either, short):
    with leased(either) as held:
        storage.remove(either)
        until(lambda: storage.exists(either))
        held()


def test_a_lease_outlives_an_outage(in_bucket, short, bucket, monkeypatch, capfd):
    monkeypatch.setenv('SSL_JAX_BUCKET_PATIENCE', '0.05')
    with leased(in_bucket) as held:
        bucket.fault(status=503)
        until(lambda: 'could not be renewed' in capfd.readouterr().err)
        bucket.heal()
        beat = holder(in_bucket)['beat']
        until(lambda: holder(in_bucket)['beat'] > beat)
        held()


def test_any_error_of_a_beat_is_outlived(path, short, monkeypatch):
    real, calls = workdir_lib._swap, []

    def swap(*args):
        calls.append(args)
        if len(calls) in (2, 3):
            raise RuntimeError('a bug')
        return real(*args)

    monkeypatch.setattr(workdir_lib, '_swap', swap)
    with leased(path) as held:
        until(lambda: len(calls) > 5)
        held()


def test_a_beat_whose_answer_was_lost_is_no_takeover(in_bucket, short, bucket, monkeypatch):
    real, calls = workdir_lib._swap, []

    def swap(*args):
        calls.append(real(*args))
        if len(calls) == 2:
            raise OSError('the answer was lost')
        return calls[-1]

    monkeypatch.setattr(workdir_lib, '_swap', swap)
    with leased(in_bucket) as held:
        until(lambda: len(calls) > 4)
        held()


def test_the_end_of_a_run_waits_little_for_a_bucket_that_is_away(in_bucket, bucket, monkeypatch):
    monkeypatch.setattr(workdir_lib, 'RELEASE_SECONDS', 0.1)
    began = time.monotonic()
    with leased(in_bucket):
        bucket.fault(status=503)
    assert time.monotonic() - began < 4
    bucket.heal()


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
