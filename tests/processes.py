# SPDX-License-Identifier: Apache-2.0
"""Python processes of tests: one, or two over loopback."""

import os
import pathlib
import re
import socket
import subprocess
import sys
import textwrap

REPO = pathlib.Path(__file__).resolve().parents[1]
TESTS = os.pathsep.join(str(REPO / 'tests' / d) for d in ('', 'methods'))
started = []


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
