# SPDX-License-Identifier: Apache-2.0
"""DINOv2 on CIFAR-10, 32 px: the small-data preset on the smallest real data set.

The images are Parquet files in Hugging Face layout, $SSL_JAX_DATA/cifar10/{train,test}.parquet with
columns `image` (struct with `bytes`) and `label`. Why the preset differs from the large recipes:
see `config_dinov2.small`. Local crops of 16 px are half the side of the images; blur is off, for a
kernel of 9 pixels wipes out images of 32.

Command:
  SSL_JAX_DATA=/data ssl_jax pretrain --config cifar10_dinov2 --workdir runs/cifar10_dinov2

Expected: not trained yet.
Cost: not measured.
"""

import os

import ml_collections

from ssl_jax import config, config_dinov2


def get_config(arg=''):
    del arg
    c = config.default()
    c.name = 'cifar10_dinov2'

    c.total_epochs = 20.0
    c.warmup_epochs = 1.0
    c.batch_size = 128

    c.method = m = config_dinov2.method()
    config_dinov2.small(m)
    m.size = None
    m.embed_dim, m.depth, m.num_heads = 128, 6, 4
    m.patch_size = 4
    m.img_size = 32
    m.local_size = 16
    m.blur = 'none'
    m.warmup_teacher_temp_epochs = 4.0

    config_dinov2.optim(c.optim)
    c.optim.lr = 1e-3
    c.optim.warm_freeze_epochs = 0.5

    cifar = os.path.join(os.environ.get('SSL_JAX_DATA', '../shared/data'), 'cifar10')
    train = dict(source='parquet', path=f'{cifar}/train.parquet')
    test = dict(source='parquet', path=f'{cifar}/test.parquet')
    c.data.train = ml_collections.ConfigDict(train)
    c.data.eval_train = ml_collections.ConfigDict(train)
    c.data.eval_test = ml_collections.ConfigDict(test)
    c.eval.every_epochs = 1.0
    c.eval.knn_k = (10, 20)
    c.eval.max_train = 10000  # enough to see a trend; `ssl_jax eval` takes all
    c.eval.max_test = 2000

    return c
