# SPDX-License-Identifier: Apache-2.0
"""What only real processes show: signals, two hosts over loopback, the compilation cache."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from ssl_jax import metrics

REPO = pathlib.Path(__file__).resolve().parent.parent
TESTS = REPO / 'tests'


def start(code, devices=1, **env):
    """A Python process running `code` with the repository and tests/ on its path."""
    env = {
        **os.environ,
        'PYTHONPATH': f'{REPO}{os.pathsep}{TESTS}',
        'PYTHONUNBUFFERED': '1',
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices} '
        '--xla_backend_optimization_level=0',
        **{k: str(v) for k, v in env.items()},
    }
    return subprocess.Popen(
        [sys.executable, '-c', textwrap.dedent(code)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, timeout=240):
    out, _ = process.communicate(timeout=timeout)
    return process.returncode, out


RUN = """
    import tiny
    from ssl_jax import train
    config = tiny.config(compile_cache=True, {fields})
    train.run(lambda: config, {workdir!r})
"""


def run_code(workdir, fields=''):
    return RUN.format(workdir=str(workdir), fields=fields)


def rows(workdir):
    return [{k: v for k, v in r.items() if k != 'time'} for r in metrics.read(workdir)]


def test_sigterm_saves_exits_0_and_the_restart_ends_as_an_unbroken_run(tmp_path):
    fields = 'total_steps=60, checkpoint__every_minutes=None'
    process = start(run_code(tmp_path / 'a', fields))
    for line in process.stdout:
        if line.startswith('step 5/60'):
            process.send_signal(signal.SIGTERM)
            break
    code, out = finish(process)
    assert code == 0, out
    stopped = int(re.search(r'stopped on request at step (\d+)', out).group(1))
    assert 5 <= stopped < 60
    code, out = finish(start(run_code(tmp_path / 'a', fields)))
    assert code == 0 and f'continuing this run at step {stopped}' in out, out
    code, out = finish(start(run_code(tmp_path / 'b', fields)))
    assert code == 0, out
    assert rows(tmp_path / 'a') == rows(tmp_path / 'b')


def test_sigterm_while_compiling_exits_0_at_once(tmp_path):
    code = """
        import os, signal, threading, time
        import tiny
        from ssl_jax import preempt, train
        real = preempt.run_interruptible

        def slow(fn, p, on_stop=None):
            # Stands for a compilation of minutes; the signal comes while it runs.
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
            return real(lambda: time.sleep(600), p, on_stop)

        preempt.run_interruptible = slow
        train.run(lambda: tiny.config(), {workdir!r})
    """
    code, out = finish(start(code.format(workdir=str(tmp_path))), timeout=120)
    assert code == 0 and 'stopped on request at step 0' in out, out


def test_sigterm_while_evaluating_saves_and_exits_0(tmp_path):
    code = """
        import os, signal
        import tiny
        from ssl_jax import train
        from ssl_jax.evals import features, online
        real = features.extract

        def signalled(*args, **kw):
            os.kill(os.getpid(), signal.SIGTERM)
            return real(*args, **kw)

        features.extract = signalled
        train.run(lambda: tiny.config(eval__every_steps=3), {workdir!r})
    """
    code, out = finish(start(code.format(workdir=str(tmp_path))), timeout=120)
    assert code == 0 and 'stopped on request at step 3' in out, out


def test_a_user_error_is_one_sentence_and_exit_code_1(tmp_path):
    code, out = finish(start(run_code(tmp_path, 'batch_size=128')))
    assert code == 1
    assert out.strip().splitlines()[-1].startswith('ssl_jax: 64 images are fewer than one batch')
    assert 'Traceback' not in out


COUNT_COMPILATIONS = """
    import jax, tiny
    from ssl_jax import train
    seen = []
    jax.monitoring.register_event_listener(lambda event, **kw: seen.append(event))
    train.train(tiny.config(compile_cache=True, total_steps=4), {workdir!r})
    print('HITS', sum('compilation_cache/cache_hits' in event for event in seen))
"""


def test_a_restart_does_not_compile_again(tmp_path):
    hits = []
    for workdir in ('first', 'second'):
        code = COUNT_COMPILATIONS.format(workdir=str(tmp_path / workdir))
        code, out = finish(start(code, SSL_JAX_CACHE=tmp_path / 'cache'))
        assert code == 0, out
        hits.append(int(out.split('HITS')[1]))
    assert hits[0] == 0 and hits[1] >= 2, hits  # the weights' program and the step's


TWO = """
    import json, os
    import jax
    from ssl_jax import launch, train
    launch.initialize_distributed()
    import tiny
    config = tiny.config(compile_cache=True, checkpoint__every_steps=3, {fields})
    result = train.train(config, {workdir!r})
    print('RESULT', json.dumps([jax.process_count(), result['step'], result['preempted']]))
    if jax.process_count() > 1:
        jax.distributed.shutdown()
"""


def two_processes(workdir, fields='total_steps=6', each=4):
    """Starts 2 processes x `each` devices over loopback."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    code = TWO.format(workdir=str(workdir), fields=fields)
    env = dict(JAX_COORDINATOR_ADDRESS=f'127.0.0.1:{port}', JAX_NUM_PROCESSES=2)
    return [start(code, each, JAX_PROCESS_ID=i, **env) for i in range(2)]


def test_two_processes_train_as_one_does_and_exchange_checkpoints(tmp_path):
    found = [finish(p) for p in two_processes(tmp_path / 'two')]
    assert all(code == 0 for code, _ in found), found
    assert 'RESULT [2, 6, false]' in found[0][1]
    code, out = finish(start(TWO.format(workdir=str(tmp_path / 'one'), fields='total_steps=6'), 8))
    assert code == 0, out
    a, b = rows(tmp_path / 'one'), rows(tmp_path / 'two')
    assert [r['step'] for r in a] == [r['step'] for r in b]
    losses = np.array([[r['loss'] for r in x if 'loss' in r] for x in (a, b)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    # The run of two processes goes on in one, on another number of devices.
    more = TWO.format(workdir=str(tmp_path / 'two'), fields='total_steps=8')
    code, out = finish(start(more, 4))
    assert code == 0 and 'continuing this run at step 6' in out, out


@pytest.mark.slow
def test_sigterm_to_one_of_two_processes_ends_both_with_a_checkpoint(tmp_path):
    processes = two_processes(tmp_path, 'total_steps=400', each=1)
    for line in processes[0].stdout:
        if line.startswith('step 1/400'):
            processes[1].send_signal(signal.SIGTERM)
            break
    found = [finish(p) for p in processes]
    assert all(code == 0 for code, _ in found), found
    assert 'stopped on request' in found[0][1]
    assert any((tmp_path / 'checkpoints').iterdir())
