# SPDX-License-Identifier: Apache-2.0
"""Estimated cycles of transformer blocks by the vector memory that a product may use, per chip.

    python experiments/tpu/vmem.py encoder decoder dinov2 --chips v5e v5p

The shapes are those of `blocks.py`: a scan compiles one block, however many there are. Needs
libtpu, no TPU.
"""

import argparse

import jax
from blocks import DEPTH, SHAPES, lower

from ssl_jax.plan import chips, hlo

FLAG = 'xla_tpu_scoped_vmem_limit_kib'


def cycles(shape, chip, mib):
    """Cycles of one block, forward and backward; None and the reason if it does not compile."""
    topology = next(n for n in chips.names() if n.startswith(f'{chip.name}:2x2'))
    device = chips.devices(topology)[0]
    try:
        compiled, bundles = chips.compile_program(lower(shape, device=device, **{FLAG: mib * 1024}))
    except jax.errors.JaxRuntimeError as error:
        return None, str(error).splitlines()[0][:200]
    module = hlo.parse(compiled.as_text())
    kernels = hlo.kernel_cycles(module, bundles, chip.cores)
    found = hlo.operations(module, None, kernels, chip.hbm / chip.clock)
    return sum(o.cycles * o.times for o in found) / DEPTH, ''


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('shapes', nargs='*', default=['encoder', 'decoder', 'dinov2'])
    parser.add_argument('--chips', nargs='*', default=list(chips.CHIPS))
    parser.add_argument('--mib', nargs='*', type=int, default=[16, 24, 32, 64, 96])
    args = parser.parse_args()
    for shape in args.shapes:
        print(f'{shape} {SHAPES[shape]}: k cycles of a block by MiB', flush=True)
        for name in args.chips:
            for mib in args.mib:
                count, why = cycles(shape, chips.CHIPS[name], mib)
                shown = f'{count / 1e3:,.0f}' if count else f'none: {why}'
                print(f'  {name:<6}{mib:4} {shown}', flush=True)
