# SPDX-License-Identifier: Apache-2.0
"""Pixio on CIFAR-10, 32 px: the smallest real data set.

The images are Parquet files in Hugging Face layout, $SSL_JAX_DATA/cifar10/{train,test}.parquet with
columns `image` (struct with `bytes`) and `label`.

Command:
  SSL_JAX_DATA=/data ssl_jax pretrain --config cifar10_pixio --workdir runs/cifar10_pixio

Expected: not measured with these settings yet.
Cost: about 20 minutes on one free CPU core.
"""

import os

import ml_collections

from ssl_jax import config


def get_config(arg=''):
    del arg
    c = config.default()
    c.name = 'cifar10_pixio'

    c.total_epochs = 6.0
    c.warmup_epochs = 0.5
    c.batch_size = 64

    c.method.size = None
    c.method.embed_dim = 128
    c.method.depth = 6
    c.method.num_heads = 4
    c.method.patch_size = 4
    c.method.img_size = 32
    c.method.decoder_embed_dim = 64
    c.method.decoder_depth = 4
    c.method.decoder_num_heads = 2
    c.method.crop_scale = (0.4, 1.0)
    c.method.num_cls_tokens = 4
    c.method.pos_embed = 'learned'
    c.method.mask_grid = 2
    c.method.flip = 0.0

    c.optim.lr = 1e-3
    c.optim.weight_decay = 0.05

    cifar = os.path.join(os.environ.get('SSL_JAX_DATA', '../shared/data'), 'cifar10')
    train = dict(source='parquet', path=f'{cifar}/train.parquet')
    test = dict(source='parquet', path=f'{cifar}/test.parquet')
    c.data.train = ml_collections.ConfigDict(train)
    c.data.eval_train = ml_collections.ConfigDict(train)
    c.data.eval_test = ml_collections.ConfigDict(test)
    c.eval.every_epochs = 2.0
    c.eval.knn_k = (10, 20)
    c.eval.max_train = 10000  # enough to see a trend; `ssl_jax eval` takes all
    c.eval.max_test = 2000

    return c
