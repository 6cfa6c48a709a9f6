# SPDX-License-Identifier: Apache-2.0
"""Cost of the random parts of a DINOv2 step on one CPU core: photometry and block masks.

Times are CPU time, so that other work on the machine counts less: the least of `--repeats`.

Command:
  PYTHONPATH=. python experiments/bench/photometry_masks.py [--repeats 10]
"""

import argparse
import functools
import os
import sys
import time


def measure(name, fn, args, repeats, unit, per=1):
    """Prints compile time and the least CPU time of fn(*args) / per; returns what fn returns."""
    import jax

    start = time.process_time()
    program = jax.jit(fn).lower(*args).compile()
    compiling = time.process_time() - start
    out = jax.block_until_ready(program(*args))
    times = []
    for _ in range(repeats):
        start = time.process_time()
        jax.block_until_ready(program(*args))
        times.append(time.process_time() - start)
    print(f'{name:<36} {1e3 * min(times) / per:8.3f} ms per {unit}, compiles in {compiling:.1f} s')
    return out


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--repeats', type=int, default=10)
    repeats = parser.parse_args(argv).repeats
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')
    if hasattr(os, 'sched_setaffinity'):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-1:])
    import jax
    import numpy as np

    from ssl_jax.augment import photometry
    from ssl_jax.objectives import masking

    jitter = dict(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, jitter_prob=0.8)
    parts = {
        'jitter': jitter,
        'grey': dict(grey_prob=0.2),
        'blur': dict(blur_prob=0.5),
        'solarisation': dict(solarize_prob=0.2),
    }
    parts['photometry'] = {k: v for part in parts.values() for k, v in part.items()}
    for side, batch in ((224, 32), (96, 128), (32, 512)):
        images = np.random.default_rng(0).integers(0, 256, (batch, side, side, 3), dtype=np.uint8)
        args = photometry.sample_keys(jax.random.key(0), np.arange(batch)), images
        for name, options in parts.items():
            fn = functools.partial(photometry.photometric, **options)
            measure(f'{name}, {side} px', fn, args, repeats, 'image', batch)
    keys = photometry.sample_keys(jax.random.key(0), np.arange(1))
    for crops, side in ((128, 14), (64, 16), (8, 37)):
        for sampler in ('dinov2', 'ibot'):
            options = dict(grid=(side, side), sampler=sampler)
            fn = functools.partial(masking.crop_masks, num_crops=crops, **options)
            name = f'{sampler} masks, {crops} x {side}x{side}'
            masks = measure(name, fn, (keys,), repeats, 'group')
            bound = masking.upper_bound(crops, **options)
            fn = functools.partial(masking.masked_indices, bound=bound)
            measure(f'  their places, at most {bound}', fn, (masks,), repeats, 'group')


if __name__ == '__main__':
    sys.exit(main())
