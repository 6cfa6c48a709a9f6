# SPDX-License-Identifier: Apache-2.0
"""A signal ends a run at the next step, a second Ctrl-C at once, also while XLA compiles."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from ssl_jax.run import preempt

REPO = pathlib.Path(__file__).resolve().parents[2]


def run_python(code, *args):
    env = dict(os.environ, JAX_PLATFORMS='cpu', PYTHONPATH=str(REPO), XLA_FLAGS='')
    command = [sys.executable, '-c', textwrap.dedent(code), *map(str, args)]
    return subprocess.Popen(
        command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_sets_the_flag_and_one_process_agrees_with_itself(number, capfd):
    before = signal.getsignal(number)
    with preempt.Preemption() as p:
        assert not p.requested and not p.agreed(0)
        signal.raise_signal(number)
        assert p.requested and p.agreed(1)
    assert signal.getsignal(number) is before
    assert 'saving at the next step' in capfd.readouterr().err


@pytest.mark.parametrize('second', [signal.SIGTERM, signal.SIGHUP])
def test_a_repeated_signal_still_saves(second, capfd):
    with preempt.Preemption() as p:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(second)
        signal.raise_signal(signal.SIGINT)  # of the same burst
        assert p.requested
    assert capfd.readouterr().err.count('saving') == 1


def test_a_later_ctrl_c_exits_at_once_with_128_plus_its_number():
    child = run_python("""
        import signal, time
        from ssl_jax.run import preempt
        with preempt.Preemption() as p:
            signal.raise_signal(signal.SIGTERM)
            assert p.requested
            now = time.monotonic()
            time.monotonic = lambda: now + 2 * preempt.PATIENCE
            signal.raise_signal(signal.SIGINT)
            print('still here')
    """)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGINT and out == '' and 'Second SIGINT' in err


def test_a_run_under_nohup_survives_the_end_of_its_session():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with preempt.Preemption() as p:
            signal.raise_signal(signal.SIGHUP)
            assert not p.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_run_interruptible_returns_and_raises_what_the_call_does():
    with preempt.Preemption() as p:
        assert preempt.run_interruptible(lambda: 3, p) == 3
        with pytest.raises(ZeroDivisionError):
            preempt.run_interruptible(lambda: 1 / 0, p)


def test_a_signal_ends_a_long_call_within_a_second():
    release = threading.Event()
    with preempt.Preemption() as p:

        def call():
            os.kill(os.getpid(), signal.SIGTERM)
            release.wait(60)

        start = time.monotonic()
        with pytest.raises(preempt.Stopped):
            preempt.run_interruptible(call, p)
    assert time.monotonic() - start < 1
    release.set()


def test_sigterm_while_xla_compiles_exits_0_within_a_second():
    child = run_python("""
        import os, signal, threading, time
        import jax, jax.numpy as jnp
        from ssl_jax.run import preempt

        def slow(x):
            for i in range(1500):
                x = jnp.sin(x) @ jnp.cos(x + i)
            return x

        lowered = jax.jit(slow).lower(jax.ShapeDtypeStruct((8, 8), jnp.float32))
        with preempt.Preemption() as p:
            def compile():
                print('compiling', flush=True)
                lowered.compile()
                print('compiled', flush=True)
            try:
                preempt.run_interruptible(compile, p)
            except preempt.Stopped:
                print('stopped')
                preempt.exit_now(0)
    """)
    assert child.stdout.readline() == 'compiling\n'
    start = time.monotonic()
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=60)
    assert (out, child.returncode) == ('stopped\n', 0), err
    assert time.monotonic() - start < 2


TWO_PROCESSES = """
    import sys, time, jax
    from ssl_jax.run import preempt
    port, rank = sys.argv[1:]
    jax.distributed.initialize(f'localhost:{port}', 2, int(rank), initialization_timeout=60)
    with preempt.Preemption() as p:
        for step in range(10**6):
            if p.agreed(step):
                break
            if step == 0:
                print('started', flush=True)
            time.sleep(0.01)
    print(step, p.requested, flush=True)
"""


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_one_of_two_processes_ends_both_at_the_same_step(number):
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    children = [run_python(TWO_PROCESSES, port, rank) for rank in range(2)]
    try:
        for child in children:
            while child.stdout.readline() != 'started\n':
                assert child.poll() is None, child.stderr.read()
        children[1].send_signal(number)
        results = [child.communicate(timeout=60) for child in children]
    finally:
        for child in children:
            child.kill()
    assert results[0][0] == results[1][0] and results[0][0].endswith('True\n'), results
    assert [child.returncode for child in children] == [0, 0]


def test_several_processes_without_jaxs_preemption_service_are_refused(monkeypatch):
    monkeypatch.setattr(preempt.jax, 'process_count', lambda: 2)
    preempt.jax.config.update('jax_enable_preemption_service', False)
    try:
        with pytest.raises(RuntimeError, match='JAX_ENABLE_PREEMPTION_SERVICE=1'):
            preempt.Preemption().__enter__()
    finally:
        preempt.jax.config.update('jax_enable_preemption_service', True)
