# SPDX-License-Identifier: Apache-2.0
"""Huge pages for runs on CPU.

XLA takes the memory of a step's intermediates from malloc and gives it back after the step. For
blocks of this size glibc asks the kernel each time, which hands out fresh pages of 4 KiB, each
zeroed at its first touch by the one thread that touches it: 180,000 of them in a step of 0.7 GB.
With 2 MiB pages the step of `experiments/bench` takes about a tenth less time.

glibc reads the setting once, when a process starts, so the command line starts itself again.
"""

import glob
import os
import sys

VARIABLE = 'GLIBC_TUNABLES'
SETTING = 'glibc.malloc.hugetlb=1'
KERNEL = '/sys/kernel/mm/transparent_hugepage/enabled'
ACCELERATORS = ('/dev/nvidia0', '/dev/accel*', '/dev/vfio/*', '/dev/kfd')


def wanted(environ, kernel=KERNEL, accelerators=ACCELERATORS):
    """Whether this process would gain from huge pages and does not have them.

    False where the user has set GLIBC_TUNABLES, where the kernel gives huge pages to all or to none
    (`kernel`: its file, 'always [madvise] never'), and on machines with an accelerator, unless
    JAX_PLATFORMS is cpu.
    """
    if VARIABLE in environ or not os.path.exists(kernel):
        return False
    with open(kernel) as file:
        if '[madvise]' not in file.read():
            return False
    return environ.get('JAX_PLATFORMS') == 'cpu' or not any(map(glob.glob, accelerators))


def restart():
    """Starts this process again, same arguments and process id, if `wanted`; else does nothing.

    To be called first by a program's entry, before anything is imported that takes time.
    """
    if wanted(os.environ):
        os.environ[VARIABLE] = SETTING
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
