# SPDX-License-Identifier: Apache-2.0
"""What the colours of an image alone tell: what a collapsed encoder is to be held against.

    SSL_JAX_DATA=/data python experiments/splitmask/colours.py

Linear probe and kNN of the mean of the three channels, and of mean and standard deviation, on the
5,000 training and test images of `run.py`.
"""

import os
import pathlib

import jax.numpy as jnp

from ssl_jax.data import sources
from ssl_jax.evals import run

CIFAR = pathlib.Path(os.environ.get('SSL_JAX_DATA', '../shared/data')) / 'cifar10'


def mean(images):
    return {'colours': jnp.mean(images / 255.0, axis=(1, 2))}


def mean_and_std(images):
    std = jnp.std(images / 255.0, axis=(1, 2))
    return {'colours': jnp.concatenate([mean(images)['colours'], std], axis=1)}


if __name__ == '__main__':
    train, test = (sources.open_source(CIFAR / f'{n}.parquet') for n in ('train', 'test'))
    forwards = {'mean': mean, 'mean and std': mean_and_std}
    print(run.table(run.evaluate(forwards, train, test, size=32, limit=5000, log=None)))
