# SPDX-License-Identifier: Apache-2.0
"""What a process does before it trains: joins the other hosts, keeps compiled programs."""

import importlib.util
import os

import jax


def enable_compile_cache():
    """Keeps compiled programs on disk, so that a restart does not compile again.

    Not where a CPU plays several devices: some programs read back from disk never finish there
    (jax 0.10.2: devices wait in a collective for others that do not come), and XLA aborts.
    """
    if jax.default_backend() == 'cpu' and jax.local_device_count() > 1:
        return
    if jax.config.jax_compilation_cache_dir is None:
        default = os.path.join(os.path.expanduser('~'), '.cache', 'ssl_jax', 'xla')
        jax.config.update('jax_compilation_cache_dir', os.environ.get('SSL_JAX_CACHE', default))
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.3)


def initialize_distributed():
    """Joins the other hosts of a pod: nothing to do on one host, no arguments on Cloud TPU.

    Elsewhere JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID say who takes part.
    """
    env = os.environ
    if 'JAX_COORDINATOR_ADDRESS' in env and 'JAX_NUM_PROCESSES' in env:
        jax.distributed.initialize(
            env['JAX_COORDINATOR_ADDRESS'],
            int(env['JAX_NUM_PROCESSES']),
            int(env['JAX_PROCESS_ID']),
            initialization_timeout=int(env.get('SSL_JAX_INIT_TIMEOUT', 300)),
        )
    elif env.get('JAX_PLATFORMS') != 'cpu' and _is_tpu_vm():
        jax.distributed.initialize()  # jax finds the other hosts by itself


def _is_tpu_vm():
    """Whether libtpu is installed and chips are attached (libtpu alone also compiles without)."""
    chips = any(map(os.path.exists, ('/dev/accel0', '/dev/vfio')))
    return chips and importlib.util.find_spec('libtpu') is not None
