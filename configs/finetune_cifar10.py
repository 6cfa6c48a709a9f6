# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on CIFAR-10, 32 px: for the encoders of `cifar10_mae` and its siblings.

From scratch the encoder is the same as there: 6 blocks of 128 channels, patches of 4 px. The images
are Parquet files in Hugging Face layout, $SSL_JAX_DATA/cifar10/{train,test}.parquet.

Command:
  SSL_JAX_DATA=/data ssl_jax finetune --config finetune_cifar10 --model runs/cifar10_mae \\
      --workdir runs/cifar10_mae_finetuned
The control, from scratch:
  SSL_JAX_DATA=/data ssl_jax finetune --config finetune_cifar10 --model none --workdir runs/scratch

Expected: not measured at this length; 5 epochs of 5,000 images make 45 % of a small encoder that
MAE pretrained for one epoch, 37 % of an untrained one: experiments/splitmask.
Cost: 2.5e14 useful FLOPs: by these about an hour of two idle CPU cores.
"""

import os

import ml_collections

from ssl_jax import config


def get_config(arg=''):
    del arg
    finetune = config.shared('finetune')
    c = config.default('classifier')
    c.name = 'finetune_cifar10'

    c.total_epochs = 10.0
    c.warmup_epochs = 1.0
    c.batch_size = 128

    m = c.method
    m.num_classes = 10
    m.size = None
    m.embed_dim, m.depth, m.num_heads = 128, 6, 4
    m.patch_size, m.img_size = 4, 32
    m.crop_pct = 1.0
    m.crop_scale = (0.4, 1.0)
    m.drop_path = 0.0
    # Short runs of small models underfit: no mixing, erasing or RandAugment.
    finetune.plain(m)
    m.label_smoothing = 0.1

    finetune.optim(c.optim)
    c.optim.lr = 1e-3
    c.optim.layer_decay = 0.75

    cifar = os.path.join(os.environ.get('SSL_JAX_DATA', '../shared/data'), 'cifar10')
    c.data.train = ml_collections.ConfigDict(dict(source='parquet', path=f'{cifar}/train.parquet'))
    c.data.eval_test = ml_collections.ConfigDict(
        dict(source='parquet', path=f'{cifar}/test.parquet')
    )
    c.eval.every_epochs = 2.0
    c.eval.tasks.pictures = None

    return c
