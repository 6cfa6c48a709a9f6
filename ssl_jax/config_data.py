# SPDX-License-Identifier: Apache-2.0
"""The data of the small recipes, in place in a config: images to train on and to be scored on."""

import os

import ml_collections


def cifar10(c):
    """CIFAR-10 in Parquet files, and an evaluation large enough to see a trend.

    `ssl_jax eval` takes all images.
    """
    folder = os.path.join(os.environ.get('SSL_JAX_DATA', '../shared/data'), 'cifar10')
    train = dict(source='parquet', path=f'{folder}/train.parquet')
    _set(c, train, dict(source='parquet', path=f'{folder}/test.parquet'))
    c.eval.knn_k = (10, 20)
    c.eval.max_train = 10000
    c.eval.max_test = 2000


def scenes(c, size=64):
    """Rendered scenes of `size` pixels, for two CPU cores."""
    train = dict(source='scenes', n=4096, size=size, split='train')
    _set(c, train, dict(source='scenes', n=1000, size=size, split='test'))
    c.data.num_threads = 2
    c.eval.knn_k = (20,)
    c.eval.max_train = 2000
    c.eval.max_test = 500


def _set(c, train, test):
    c.data.train = ml_collections.ConfigDict(train)
    c.data.eval_train = ml_collections.ConfigDict(train)
    c.data.eval_test = ml_collections.ConfigDict(test)
