# SPDX-License-Identifier: Apache-2.0
"""When a run on CPU starts itself again for huge pages."""

import os
import subprocess
import sys

import pytest

from ssl_jax.run import hugepages


@pytest.fixture
def kernel(tmp_path):
    """kernel('madvise') -> a file like the kernel's, with this choice made."""

    def write(choice):
        path = tmp_path / 'enabled'
        path.write_text('always madvise never'.replace(choice, f'[{choice}]'))
        return str(path)

    return write


def test_wanted_where_the_kernel_leaves_the_choice_to_the_program(kernel):
    assert hugepages.wanted({}, kernel('madvise'), accelerators=())
    assert not hugepages.wanted({}, kernel('always'), accelerators=())
    assert not hugepages.wanted({}, kernel('never'), accelerators=())
    assert not hugepages.wanted({}, '/nonexistent', accelerators=())


def test_a_setting_of_the_user_stays(kernel):
    assert not hugepages.wanted({'GLIBC_TUNABLES': ''}, kernel('madvise'), accelerators=())


def test_not_beside_an_accelerator_unless_the_run_is_on_cpu(kernel):
    device = kernel('madvise')  # any file that exists
    assert not hugepages.wanted({}, device, accelerators=(device,))
    assert hugepages.wanted({'JAX_PLATFORMS': 'cpu'}, device, accelerators=(device,))


def test_a_restarted_program_has_the_setting_and_its_arguments_and_restarts_once():
    code = (
        'import os, sys; from ssl_jax.run import hugepages; hugepages.wanted = lambda environ: '
        '"GLIBC_TUNABLES" not in environ; print("start"); hugepages.restart(); '
        'print(os.environ["GLIBC_TUNABLES"], sys.argv[1:])'
    )
    env = {k: v for k, v in os.environ.items() if k != 'GLIBC_TUNABLES'}
    command = [sys.executable, '-c', code, 'a b', '--c=d']
    out = subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == [
        'start',
        'start',
        "glibc.malloc.hugetlb=1 ['a b', '--c=d']",
    ]
