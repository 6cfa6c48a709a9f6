# SPDX-License-Identifier: Apache-2.0
"""Data of the recipes: images to train on and to be scored on."""

import os

import ml_collections


def imagenet(root=''):
    """(train, eval_train, eval_test) sources of ImageNet-1k, for recipes.

    Args:
        root: folder (local or gs://) with train/ and val/, a subfolder per class in each; without
          it TFDS' imagenet2012, prepared in TFDS_DATA_DIR.
    """
    if root:
        train = dict(source='folder', path=root, split='train')
        test = dict(source='folder', path=root, split='val')
    else:
        train = dict(source='tfds', name='imagenet2012', split='train')
        test = dict(source='tfds', name='imagenet2012', split='validation')
    return tuple(ml_collections.ConfigDict(source) for source in (train, train, test))


def cifar10(c):
    """CIFAR-10 in Parquet files, and an evaluation large enough to see a trend.

    `ssl_jax eval` takes all images.
    """
    folder = os.path.join(os.environ.get('SSL_JAX_DATA', '../shared/data'), 'cifar10')
    train = dict(source='parquet', path=f'{folder}/train.parquet')
    _set(c, train, dict(source='parquet', path=f'{folder}/test.parquet'))
    c.eval.tasks.knn.ks = (10, 20)
    c.eval.max_train = 10000
    c.eval.max_test = 2000


def scenes(c, size=64):
    """Rendered scenes of `size` pixels, for two CPU cores."""
    train = dict(source='scenes', n=4096, size=size, split='train')
    _set(c, train, dict(source='scenes', n=1000, size=size, split='test'))
    c.data.num_threads = 2
    c.eval.tasks.knn.ks = (20,)
    c.eval.max_train = 2000
    c.eval.max_test = 500


def _set(c, train, test):
    c.data.train = ml_collections.ConfigDict(train)
    c.data.eval_train = ml_collections.ConfigDict(train)
    c.data.eval_test = ml_collections.ConfigDict(test)
