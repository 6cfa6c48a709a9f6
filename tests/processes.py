# SPDX-License-Identifier: Apache-2.0
"""Real processes for tests: one, or two over loopback."""

import os
import pathlib
import re
import socket
import subprocess
import sys
import textwrap

import pytest

REPO = pathlib.Path(__file__).resolve().parents[1]
TESTS = os.pathsep.join(str(REPO / 'tests' / d) for d in ('', 'methods'))


started = []


@pytest.fixture(autouse=True)
def no_process_outlives_its_test():
    yield
    while started:
        started.pop().kill()


def start(code, devices=1, **env):
    """A Python process running `code` with the repository and tests/ on its path."""
    env = {
        **os.environ,
        'PYTHONPATH': f'{REPO}{os.pathsep}{TESTS}',
        'PYTHONUNBUFFERED': '1',
        'JAX_PLATFORMS': 'cpu',
        'XLA_FLAGS': re.sub(r'(device_count=)\d+', rf'\g<1>{devices}', os.environ['XLA_FLAGS']),
        **{k: str(v) for k, v in env.items()},
    }
    process = subprocess.Popen(
        [sys.executable, '-c', textwrap.dedent(code)],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    started.append(process)
    return process


def finish(process, timeout=600):
    out, _ = process.communicate(timeout=timeout)
    return process.returncode, out


def twice(code, each):
    """Starts 2 processes x `each` devices over loopback that run the same code."""
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    env = dict(JAX_COORDINATOR_ADDRESS=f'127.0.0.1:{port}', JAX_NUM_PROCESSES=2)
    return [start(code, each, JAX_PROCESS_ID=i, **env) for i in range(2)]


# Two processes as the command runs them; at batch AT, process WHO does ACT.
COMMAND = """
    import os, resource, signal, time
    import tiny
    from ssl_jax import config, train
    from ssl_jax.data import stream
    from ssl_jax.run import launch, peers, watchdog
    launch.initialize_distributed()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup around the tests takes it away
    me = int(os.environ['JAX_PROCESS_ID'])
    real, batches = stream.BadImages.update, []

    def update(self, batch):
        batches.append(0)
        if len(batches) == {at} and me == {who}:
            print('ACT', time.monotonic())
            {act}
        return real(self, batch)

    stream.BadImages.update = update
    config.recipe = lambda *_: tiny.config(total_steps={total}, {fields})
    {before}
    train.command('tiny', [], {workdir!r})
"""


def commanded(
    workdir,
    who=0,
    act='pass',
    fields='checkpoint__every_steps=2',
    *,
    at=4,
    total=400,
    before='pass',
):
    """Two processes of one device."""
    code = COMMAND.format(
        workdir=str(workdir), who=who, act=act, fields=fields, at=at, total=total, before=before
    )
    return twice(code, 1)


def commands(*args, **kwargs):
    """[(exit code, output)] of `commanded`."""
    return [finish(p) for p in commanded(*args, **kwargs)]
