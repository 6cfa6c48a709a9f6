# SPDX-License-Identifier: Apache-2.0
"""Processes of a run say who is missing, different, failed or gone; none waits, none aborts."""

import concurrent.futures
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from jax._src import clusters

from ssl_jax.run import errors, launch, peers

REPO = pathlib.Path(__file__).resolve().parents[2]


def free_address():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return f'127.0.0.1:{s.getsockname()[1]}'


def in_threads(*calls):
    """What each call raises, or None; all at the same time."""
    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        return [f.exception(timeout=30) for f in [pool.submit(*call) for call in calls]]


# Joining


def test_a_process_that_does_not_join_is_named_to_all():
    address = free_address()
    found = in_threads((peers._gather, address, 4, 1.0), (peers._knock, address, 4, 2, 5.0))
    for error in found:
        assert isinstance(error, errors.UserError)
        assert f'process 1, 3 of 4 did not join at {address} within 1 s' in str(error)


def test_a_process_alone_says_that_process_0_is_missing():
    with pytest.raises(errors.UserError, match=r'process 2 cannot reach process 0 at .* refused'):
        peers._knock(free_address(), 3, 2, 0.1)


@pytest.mark.parametrize('count', [1, 2])
def test_a_port_in_use_is_named(count):
    with socket.create_server(('127.0.0.1', 0)) as other:
        address = f'127.0.0.1:{other.getsockname()[1]}'
        with pytest.raises(errors.UserError, match=rf'{address} \(Address already in use\)'):
            peers._gather(address, count, 1.0)


@pytest.mark.parametrize(
    'answer', [b'HTTP/1.1 400 Bad Request\r\n\r\n', b'\0\0\x12\4\0\0\0', b'', b'[' * 10**6 + b'\n']
)
def test_another_program_at_the_port_is_told_from_process_0(answer):
    with socket.create_server(('127.0.0.1', 0)) as other:
        address = f'127.0.0.1:{other.getsockname()[1]}'

        def serve():
            with other.accept()[0] as sock:
                sock.recv(100)
                sock.sendall(answer)

        served, error = in_threads((serve,), (peers._knock, address, 2, 1, 1.0))
    assert served is None
    assert f'another program than process 0 of this run answers process 1 at {address}' in str(
        error
    )


def test_what_is_no_process_of_a_run_is_not_counted():
    address = free_address()

    def join_after_a_scan():
        peers._Link(connected(address)).send(scan='x')
        peers._knock(address, 2, 1, 10.0)

    found = in_threads((peers._gather, address, 2, 10.0), (join_after_a_scan,))
    assert found == [None, None]


def connected(address, seconds=10.0):
    deadline = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection(peers._split(address))
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise


@pytest.mark.parametrize(
    'others, words',
    [
        ([(3, 1), (3, 1)], 'two processes have JAX_PROCESS_ID=1: number them from 0 to 2'),
        ([(4, 1)], 'process 1 has JAX_NUM_PROCESSES=4 and process 0 has 3'),
        ([(3, 0)], 'two processes have JAX_PROCESS_ID=0'),
        ([(3, 7)], 'process 7 of 3'),
    ],
    ids=['twice', 'another number', 'two of 0', 'too high'],
)
def test_processes_that_are_numbered_wrongly_are_named_to_all(others, words):
    address = free_address()
    knocks = [(peers._knock, address, *x, 10.0) for x in others]
    for error in in_threads((peers._gather, address, 3, 10.0), *knocks):
        assert isinstance(error, errors.UserError) and words in str(error)


@pytest.mark.parametrize(
    'set_, words',
    [
        ({'NUM_PROCESSES': '2', 'COORDINATOR_ADDRESS': 'a:1'}, 'JAX_PROCESS_ID is not set'),
        ({'NUM_PROCESSES': '2'}, 'JAX_COORDINATOR_ADDRESS is not set'),
        ({'PROCESS_ID': '0'}, 'JAX_COORDINATOR_ADDRESS is not set'),
        (('a:1', 'two', '0'), "JAX_NUM_PROCESSES is 'two': set it to a number"),
        (('a:1', '2', '-1'), "JAX_PROCESS_ID is '-1': set it to a number"),
        (('a:1', '2', '2'), 'JAX_PROCESS_ID is 2 and JAX_NUM_PROCESSES is 2: .* from 0 to 1'),
        (('a:1', '0', '0'), 'JAX_NUM_PROCESSES is 0: set it to 1 or more'),
        (('host', '2', '0'), "JAX_COORDINATOR_ADDRESS is 'host': write host:port"),
        (('host:', '2', '1'), "JAX_COORDINATOR_ADDRESS is 'host:': write host:port"),
        (('host:99999', '2', '1'), "JAX_COORDINATOR_ADDRESS is 'host:99999': write host:port"),
        (('', '2', '1'), "JAX_COORDINATOR_ADDRESS is '': write host:port"),
    ],
)
def test_variables_that_make_no_run_are_one_sentence(monkeypatch, set_, words):
    if isinstance(set_, tuple):
        set_ = dict(zip(('COORDINATOR_ADDRESS', 'NUM_PROCESSES', 'PROCESS_ID'), set_, strict=True))
    for name in launch.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in set_.items():
        monkeypatch.setenv(f'JAX_{name}', value)
    with pytest.raises(errors.UserError, match=words):
        launch.initialize_distributed()


def test_on_a_tpu_the_links_are_made_where_jax_finds_the_coordinator(monkeypatch):
    joined = []
    env = clusters.ClusterEnv._cluster_types[0]
    for name in launch.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('JAX_PLATFORMS', '')
    monkeypatch.setattr(launch, '_is_tpu_vm', lambda: True)
    monkeypatch.setattr(env, 'is_env_present', lambda: True)
    monkeypatch.setattr(env, 'opt_in_only_method', False)
    monkeypatch.setattr(env, 'get_coordinator_address', lambda **_: '10.0.0.1:8476')
    monkeypatch.setattr(env, 'get_process_count', lambda: 4)
    monkeypatch.setattr(env, 'get_process_id', lambda: 3)
    monkeypatch.setattr(env, 'get_local_process_id', lambda: None)
    monkeypatch.setattr(launch.peers, 'join', lambda *args: joined.append(args))
    monkeypatch.setattr(
        launch.jax.distributed, 'initialize', lambda *args, **_: joined.append(args)
    )
    launch.initialize_distributed()
    assert joined == [('10.0.0.1:8476', 4, 3, 300), ('10.0.0.1:8476', 4, 3)]


QUICK = 'peers.BEAT_SECONDS, peers.SILENT_SECONDS = 0.1, 2.0'

# After that, with processes: no jax.distributed, whose ends tests/run/test_processes.py shows

PROCESS = """
    import os, signal, sys, time
    from ssl_jax.run import errors, peers
    me = int(sys.argv[2])
    {before}
    with errors.in_a_sentence('ssl_jax'):
        peers.join(sys.argv[1], 3, me, 60)
        with peers.announced():
            {code}
    time.sleep({after})
"""


def three(code, after=60, before='pass', stopped=()):
    """[(exit code, output)] of three processes of a run, but of those that are stopped."""
    address = free_address()
    code = textwrap.dedent(PROCESS).format(code=code, after=after, before=before)
    run = [
        subprocess.Popen(
            [sys.executable, '-c', code, address, str(i)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, 'PYTHONPATH': str(REPO), 'JAX_PLATFORMS': 'cpu'},
        )
        for i in range(3)
    ]
    try:
        outs = [p.communicate(timeout=50)[0] for i, p in enumerate(run) if i not in stopped]
    finally:
        for p in run:
            p.kill()
    run = [p for i, p in enumerate(run) if i not in stopped]
    return [(p.returncode, out) for p, out in zip(run, outs, strict=True)]


def test_process_0_stays_until_a_failed_process_has_cleaned_up():
    ends = 'lambda code, end=os._exit: (print(time.monotonic(), flush=True), end(code))'
    slow = 'me == 1 and atexit.register(time.sleep, 0.5)'
    found = three(f'import atexit; os._exit = {ends}; {slow}; me == 1 and [][1]', before=QUICK)
    assert [code for code, _ in found] == [1, 1, 1], found
    times = [float(out.split()[-1]) for _, out in found]
    assert max(times) == times[0], times


@pytest.mark.parametrize('victim', [0, 1])
def test_a_killed_process_ends_the_others_with_its_number_and_the_step(victim):
    kill = f'me == {victim} and os.kill(os.getpid(), signal.SIGKILL)'
    found = three(f"peers.at('step 12'); peers.compare({{}}); {kill}")
    assert found.pop(victim)[0] == -signal.SIGKILL
    for code, out in found:
        assert code == 1, out
        words = rf'process {victim} is gone \(process [012]: (step 12|comparing configs)\)'
        assert re.search(words, out), out
        assert 'start all processes again with the same command' in out


@pytest.mark.parametrize('victim', [0, 2])
def test_a_stopped_process_ends_the_others_with_its_last_phase(victim):
    """It closes no connection; jax would abort after 100 s."""
    stop = f'me == {victim} and os.kill(os.getpid(), signal.SIGSTOP)'
    code = f"peers.at('step 12'); peers.compare({{}}); time.sleep(1); {stop}; time.sleep(60)"
    found = three(code, before=QUICK, stopped=[victim])
    assert [code for code, _ in found] == [1, 1], found
    words = rf'process {victim} has been silent for [23] s \(the last that it said: step 12\)'
    assert all(re.search(words, out) for _, out in found), found


def test_who_is_stopped_for_a_while_accuses_nobody():
    """As after Ctrl-Z and fg, within the time."""
    stop = (
        'real, jump = time.monotonic, [0]; time.monotonic = lambda: real() + jump[0]; '
        'time.sleep(0.5); jump[0] = 50 * (me == 1)'
    )
    found = three(f"{stop}; time.sleep(1); print('fine')", after='me', before=QUICK)
    assert found == [(0, 'fine\n')] * 3


def test_a_call_that_keeps_pythons_lock_is_found_by_the_others():
    held = 'import ctypes; me == 1 and ctypes.PyDLL(None).sleep(40)'
    code = f"peers.at('step 4'); time.sleep(1); {held}; time.sleep(60)"
    found = three(code, before=QUICK, stopped=[1])
    assert [code for code, _ in found] == [1, 1], found
    assert all('process 1 has been silent' in out and 'step 4' in out for _, out in found), found


def test_what_one_process_raises_ends_all():
    sentence = "me == 1 and (_ for _ in ()).throw(errors.UserError('7 bad images, mend them.'))"
    found = three(f"peers.at('step 3'); {sentence}")
    assert [code for code, _ in found] == [1, 1, 1], found
    assert found[1][1] == 'ssl_jax: 7 bad images, mend them.\n'
    for i in (0, 2):
        assert found[i][1] == 'ssl_jax: process 1 ended (step 3): 7 bad images, mend them.\n'


def test_a_bug_of_process_0_keeps_its_traceback_and_ends_all():
    found = three('me == 0 and [][1]')
    assert [code for code, _ in found] == [1, 1, 1], found
    assert found[0][1].endswith('IndexError: list index out of range\n')
    for i in (1, 2):
        assert found[i][1].startswith('ssl_jax: process 0 ended (starting): IndexError: list'), (
            found
        )


def test_the_first_value_that_differs_is_named():
    found = three("peers.compare({'a': [1], 'batch_size': 16 + me // 2, 'c': (2,), 'd': me // 2})")
    assert [code for code, _ in found] == [1, 1, 1], found
    words = 'process 2 has batch_size=17 and process 0 has 16 (2 values differ): start all'
    assert all(words in out for _, out in found), found


def test_processes_that_end_at_different_times_are_not_missed():
    found = three("peers.compare({'a': None}); print('same')", after='me')
    assert found == [(0, 'same\n')] * 3


def test_what_process_0_says_is_the_same_in_all_however_late():
    say = "me == 0 and time.sleep(0.3); found = peers.consult(None, lambda _: '{}' * 9)"
    found = three(
        f"peers.compare({{'a': 1}}); {say}; peers.compare({{'b': 1}}); print(found)", after='me'
    )
    assert found == [(0, '{}' * 9 + '\n')] * 3


@pytest.mark.parametrize('value', ['', {'a': 'pallas'}, 'schön', None])
def test_without_links_values_go_through_the_devices(monkeypatch, value):
    monkeypatch.setattr(launch.jax, 'process_count', lambda: 2)
    gathered = lambda x: np.stack([x, x])  # noqa: E731
    monkeypatch.setattr(launch.multihost_utils, 'process_allgather', gathered)
    assert launch.consult(value, lambda found: found) == [value, value]
