# SPDX-License-Identifier: Apache-2.0
"""Global and local crops in one pass against a pass for each size: time and memory of a step.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 PYTHONPATH=. \\
      python experiments/bench/crops.py [--rounds 7]

DINOv2's student on 16 samples of 2 global crops of 96 px and 8 local crops of 48 px, patches of 8,
encoder 384 x 6 x 6: forward and backward of a mean over class and patch tokens. Both programs are
compiled ahead, run in turn in one process, and compared as a ratio. Memory is what XLA plans for
temporaries.
"""

import argparse
import functools
import os
import statistics
import time

import jax
import jax.numpy as jnp

from ssl_jax.models import vit as vit_lib


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--rounds', type=int, default=7)
    rounds = parser.parse_args().rounds
    vit = vit_lib.ViT(
        embed_dim=384, depth=6, num_heads=6, patch_size=8, img_size=96, layer_scale=1e-5,
        mask_token=True, pos_resize='offset', init_scheme='dinov2',
    )  # fmt: skip
    params = vit_lib.init_params(vit, jax.random.key(0))
    crops = tuple(
        jax.random.normal(jax.random.key(n), (16, n, s, s, 3)) for n, s in ((2, 96), (8, 48))
    )
    mask = jax.random.bernoulli(jax.random.key(1), 0.3, (16, 2, 144))

    def value(outs):
        return sum(o['cls_tokens'].mean() + jnp.square(o['patch_tokens']).mean() for o in outs)

    def together(params):
        return value(vit.apply({'params': params}, crops, mask=mask))

    def apart(params):
        run = functools.partial(vit.apply, {'params': params})
        flat = [x.reshape(-1, *x.shape[2:]) for x in crops]
        return value([run(flat[0], mask=mask.reshape(32, -1)), run(flat[1])])

    programs = {
        name: jax.jit(jax.value_and_grad(fn)).lower(params).compile()
        for name, fn in (('one pass', together), ('two passes', apart))
    }
    print(os.environ.get('GLIBC_TUNABLES') or 'default malloc')
    times = {name: [] for name in programs}
    values = {}
    for _ in range(rounds + 1):
        for name, run in programs.items():
            start = time.perf_counter()
            values[name] = float(jax.block_until_ready(run(params))[0])
            times[name].append(time.perf_counter() - start)
    for name, run in programs.items():
        seconds = times[name][1:]  # the first round warms up
        memory = run.memory_analysis().temp_size_in_bytes / 2**20
        print(
            f'{name:10}  median {statistics.median(seconds) * 1e3:7.1f} ms  '
            f'best {min(seconds) * 1e3:7.1f} ms  temporaries {memory:7.1f} MiB  '
            f'value {values[name]:.6f}'
        )
    ratios = [a / b for a, b in zip(times['one pass'][1:], times['two passes'][1:], strict=True)]
    print(f'one pass / two passes: median of the rounds {statistics.median(ratios):.3f}')


if __name__ == '__main__':
    main()
