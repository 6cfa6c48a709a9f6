# SPDX-License-Identifier: Apache-2.0
"""Probes of the colours of an image alone: the baseline for a collapsed encoder.

    SSL_JAX_DATA=/data python experiments/splitmask/colours.py

Linear probe and kNN of the mean of the three channels, and of mean and standard deviation, on the
images that `run.py` probes with: 5,000 of CIFAR-10 each, 4,096 and 1,000 rendered scenes.
"""

import os
import pathlib

import jax.numpy as jnp

from ssl_jax.data import scenes, sources
from ssl_jax.evals import report

CIFAR = pathlib.Path(os.environ.get('SSL_JAX_DATA', '../shared/data')) / 'cifar10'


def mean(images):
    return {'colours': jnp.mean(images / 255.0, axis=(1, 2))}


def mean_and_std(images):
    std = jnp.std(images / 255.0, axis=(1, 2))
    return {'colours': jnp.concatenate([mean(images)['colours'], std], axis=1)}


if __name__ == '__main__':
    sets = {
        'CIFAR-10': (32, [sources.open_source(CIFAR / f'{n}.parquet') for n in ('train', 'test')]),
        'rendered scenes': (64, [scenes.Scenes(4096, 64), scenes.Scenes(1000, 64, split='test')]),
    }
    forwards = {'mean': mean, 'mean and std': mean_and_std}
    for name, (size, data) in sets.items():
        print(name)
        print(report.table(report.evaluate(forwards, *data, transform=size, limit=5000, log=None)))
