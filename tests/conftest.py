# SPDX-License-Identifier: Apache-2.0
"""Eight simulated devices, full-precision matmuls, and where the reference data lies."""

import atexit
import importlib.util
import itertools
import mmap
import os
import pathlib
import re
import shutil
import tempfile

os.environ.setdefault('JAX_PLATFORMS', 'cpu')

XLA = [
    '--xla_force_host_platform_device_count=8',
    # Most of the suite's time is compiling programs that then run for milliseconds. Without LLVM's
    # optimizations, XLA's newer emitters and the splitting for many cores, the step of a small
    # DINOv2 on eight devices compiles in 4 s instead of 26 s; tolerances are the same.
    '--xla_backend_optimization_level=0',
    '--xla_cpu_use_fusion_emitters=false',
    '--xla_cpu_parallel_codegen_split_count=1',
    # Eight devices share two busy cores: XLA's 40 s for all to reach a collective can be too few.
    '--xla_cpu_collective_call_terminate_timeout_seconds=300',
]


def known(flags):
    """Those that this jaxlib has: XLA ends a process with a flag that it does not know."""
    folder = pathlib.Path(importlib.util.find_spec('jaxlib').origin).parent
    with (
        open(max(folder.glob('*.so'), key=lambda p: p.stat().st_size), 'rb') as f,
        mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as library,
    ):
        return [x for x in flags if library.find(x.strip('-').split('=')[0].encode()) >= 0]


if 'xla_force_host_platform_device_count' not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = ' '.join([os.environ.get('XLA_FLAGS', ''), *known(XLA)]).strip()

# Of a program for CPU the kernels for TPU are traced and thrown away; see `tpu_kernels_on`.
os.environ.setdefault('SSL_JAX_TPU_KERNELS', '0')

import jax  # noqa: E402
import pytest  # noqa: E402

import bucket as bucket_lib  # noqa: E402
import golden as golden_lib  # noqa: E402

jax.config.update('jax_default_matmul_precision', 'float32')
# Most of the suite's time is XLA compiling the same few programs: once per session is enough.
# The folder is shared with the subprocesses and the pytest-xdist workers of this session.
if 'SSL_JAX_CACHE' not in os.environ:
    os.environ['SSL_JAX_CACHE'] = tempfile.mkdtemp(prefix='ssl_jax_test_xla_')
    atexit.register(shutil.rmtree, os.environ['SSL_JAX_CACHE'], ignore_errors=True)
jax.config.update('jax_compilation_cache_dir', os.environ['SSL_JAX_CACHE'])
jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)
REPO = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope='module', autouse=True)
def programs_of_a_module_go_with_it():
    """Without this a worker of the whole suite had grown to 7.6 GB at its end."""
    yield
    jax.clear_caches()


@pytest.fixture
def tpu_kernels_on(monkeypatch):
    """Programs for TPU have the kernels of `kernels/tpu/`, as outside the tests."""
    monkeypatch.delenv('SSL_JAX_TPU_KERNELS')


@pytest.fixture
def golden():
    """golden('mae_forward') -> golden.File, or a skip with the reason."""
    return golden_lib.load


@pytest.fixture
def data_dir():
    """The folder that holds cifar10/ and camvid/, or a skip with the reason."""
    folder = pathlib.Path(os.environ.get('SSL_JAX_DATA', REPO.parent / 'shared' / 'data'))
    if not (folder / 'cifar10').exists():
        pytest.skip(f'no cifar10/ in {folder}; set SSL_JAX_DATA')
    return folder


@pytest.fixture(scope='session')
def _bucket_server(tmp_path_factory):
    if reason := bucket_lib.reason_to_skip():
        pytest.skip(reason)
    with bucket_lib.serve(tmp_path_factory.mktemp('bucket')) as served:
        os.environ.update(served.env)
        import fsspec

        fsspec.config.conf.setdefault('gcs', {})['token'] = 'anon'
        yield served


_numbers = itertools.count()


@pytest.fixture
def bucket(_bucket_server, monkeypatch, request):
    """A `bucket.Bucket` without faults; `bucket.root` is a folder of this test alone."""
    monkeypatch.setenv('SSL_JAX_BUCKET_PATIENCE', '5')
    _bucket_server.heal()
    name = re.sub(r'[^A-Za-z0-9]+', '_', request.node.name)[:60]
    number = next(_numbers)  # names of parametrized tests differ at their ends
    _bucket_server.root = f'{_bucket_server.path}/{name}_{os.getpid()}_{number}'
    _bucket_server.requests()
    yield _bucket_server
    _bucket_server.heal()
