# SPDX-License-Identifier: Apache-2.0
"""Processes and devices of a run: joining hosts, agreement between them, hardware."""

import contextlib
import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

import jax
import numpy as np
from jax.experimental import multihost_utils

from ssl_jax.run import errors, peers

VARIABLES = ('JAX_COORDINATOR_ADDRESS', 'JAX_NUM_PROCESSES', 'JAX_PROCESS_ID')

# Dense bfloat16 TFLOP/s of one jax device, by the prefix of its device_kind; the longest match
# counts. From the vendors' data sheets. A v2, v3 or 7x chip appears as two devices.
PEAK_TFLOPS = {
    'TPU v2': 22.5,
    'TPU v3': 61.5,
    'TPU v4': 275,
    'TPU v5 lite': 197,
    'TPU v5e': 197,
    'TPU v5': 459,
    'TPU v5p': 459,
    'TPU v6 lite': 918,
    'TPU v6e': 918,
    'TPU7x': 1153.5,
    'TPU v7x': 1153.5,
    'NVIDIA A100': 312,
    'NVIDIA H100': 989,
    'NVIDIA H100 PCIe': 756,
    'NVIDIA H200': 989,
    'NVIDIA GH200': 989,
    'NVIDIA L4': 121,
}


join_seconds = 0.0  # that `initialize_distributed` took


def initialize_distributed() -> None:
    """Joins the other hosts of a pod: nothing to do on one host, no arguments on Cloud TPU.

    Elsewhere it reads JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

    Raises:
      UserError: they contradict each other, or the processes do not find each other.
    """
    global join_seconds
    began = time.monotonic()
    try:
        _join()
    finally:
        join_seconds = time.monotonic() - began


def _join():
    timeout = _number('SSL_JAX_INIT_TIMEOUT', 300)
    unset = [name for name in VARIABLES if name not in os.environ]
    if not unset:
        address, count, index = (os.environ[VARIABLES[0]], *map(_number, VARIABLES[1:]))
        if not count:
            raise errors.UserError(f'{VARIABLES[1]} is 0: set it to 1 or more.')
        if not index < count:
            raise errors.UserError(
                f'JAX_PROCESS_ID is {index} and JAX_NUM_PROCESSES is {count}: number the processes '
                f'from 0 to {count - 1}.'
            )
    elif os.environ.get('JAX_PLATFORMS') != 'cpu' and _is_tpu_vm():
        # As jax.distributed.initialize() finds them by itself; the links need them first.
        try:
            detect = importlib.import_module('jax._src.clusters').ClusterEnv
            address, count, index, _ = detect.auto_detect_unset_distributed_params(
                os.environ.get(VARIABLES[0]), None, None, None, None, timeout
            )
        except (ImportError, AttributeError, TypeError):  # private to jax: another release
            address = count = index = None
        if None in (address, count, index):
            return jax.distributed.initialize()
    elif len(unset) == len(VARIABLES):
        return None
    else:
        raise errors.UserError(
            f'{unset[0]} is not set: a run of several processes needs {", ".join(VARIABLES)} in '
            f'each; unset them all for a run of one.'
        )
    peers.join(address, count, index, timeout)
    jax.distributed.initialize(address, count, index, initialization_timeout=timeout)


def leave() -> None:
    """Leaves a run of several processes, when all do; to call before os._exit, with code 0."""
    peers.leave()
    jax.distributed.shutdown()


def _number(name, default=None):
    """A variable of the environment that counts."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise errors.UserError(f"{name} is '{text}': set it to a number.")
    return int(text)


def _is_tpu_vm():
    """Whether libtpu is installed and chips are attached (libtpu alone also compiles without)."""
    chips = any(map(os.path.exists, ('/dev/accel0', '/dev/vfio')))
    return chips and importlib.util.find_spec('libtpu') is not None


def is_main() -> bool:
    """Whether this is process 0, which writes and prints."""
    return jax.process_index() == 0


def log(*lines: str) -> None:
    """Prints on process 0."""
    if is_main():
        for line in lines:
            show(line)


def show(text: str, end: str = '\n', stream: TextIO | None = None) -> None:
    """Prints; a closed pipe or a full disk behind the stream ends no run.

    What follows on that stream is dropped, after one line on stderr.
    """
    stream = stream or sys.stdout
    try:
        print(text, end=end, file=stream, flush=True)
    except OSError as error:
        say(f'ssl_jax: the output cannot be written ({error.strerror}); the run goes on without.')
        # Below Python, as its buffer still holds the line and is flushed once more at the end.
        with contextlib.suppress(OSError), open(os.devnull, 'wb') as devnull:
            os.dup2(devnull.fileno(), stream.fileno())


def say(line: str) -> None:
    """Writes a line to stderr if it can be written; also from signal handlers."""
    with contextlib.suppress(OSError):
        os.write(2, f'{line}\n'.encode())


def main_says(flag: bool) -> bool:
    """The flag of process 0, on all processes."""
    return bool(main_number(bool(flag)))


def main_number(number: int) -> int:
    """The number of process 0, on all processes."""
    if jax.process_count() == 1:
        return int(number)
    return int(multihost_utils.broadcast_one_to_all(np.asarray(number)))


def consult(value: Any, judge: Callable[[list], Any]) -> Any:
    """`peers.consult`; through the devices where the processes have no links.

    There `judge` is called on all processes, with the same values.
    """
    if jax.process_count() == 1 or peers.joined():
        return peers.consult(value, judge)
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    longest = multihost_utils.process_allgather(np.asarray(text.size)).max()
    padded = np.full(longest, ord(' '), np.uint8)
    padded[: text.size] = text
    return judge([json.loads(bytes(row)) for row in multihost_utils.process_allgather(padded)])


def any_says(flag: bool) -> bool:
    """Whether the flag is true on any process."""
    if jax.process_count() == 1:
        return bool(flag)
    return bool(multihost_utils.process_allgather(np.asarray(bool(flag))).any())


def cache_folder() -> str:
    """SSL_JAX_CACHE, else ~/.cache/ssl_jax."""
    default = os.path.join(os.path.expanduser('~'), '.cache', 'ssl_jax')
    return os.environ.get('SSL_JAX_CACHE', default)


def enable_compile_cache() -> None:
    """Keeps compiled programs on disk, so that a restart does not compile again.

    Off where a CPU simulates several devices: some programs read from disk never finish (jax
    0.10.2: devices wait in a collective for devices that never enter it), and XLA aborts.
    """
    if jax.default_backend() == 'cpu' and jax.local_device_count() > 1:
        return
    if jax.config.jax_compilation_cache_dir is None:
        folder = os.environ.get('SSL_JAX_CACHE', os.path.join(cache_folder(), 'xla'))
        jax.config.update('jax_compilation_cache_dir', folder)
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)


def process_seconds() -> float:
    """Seconds since this process started; 0 where the system does not say."""
    try:
        with open('/proc/self/stat') as stat, open('/proc/uptime') as uptime:
            ticks = int(stat.read().rpartition(')')[2].split()[19])
            return max(0.0, float(uptime.read().split()[0]) - ticks / os.sysconf('SC_CLK_TCK'))
    except (OSError, ValueError, IndexError):
        return 0.0


def share(items: Sequence) -> list:
    """`items` in an order that begins at another one on each process."""
    first = len(items) * jax.process_index() // jax.process_count()
    return [*items[first:], *items[:first]]


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def peak_flops(device_kind: str) -> float | None:
    """Dense bfloat16 FLOP/s of one device, None if unknown.

    Args:
      device_kind: as in ``jax.devices()[0].device_kind``.
    """
    matches = [kind for kind in PEAK_TFLOPS if device_kind.startswith(kind)]
    return PEAK_TFLOPS[max(matches, key=len)] * 1e12 if matches else None
