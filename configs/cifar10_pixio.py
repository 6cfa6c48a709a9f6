# SPDX-License-Identifier: Apache-2.0
"""Pixio on CIFAR-10, 32 px: the smallest real data set.

The images are Parquet files in Hugging Face layout, $SSL_JAX_DATA/cifar10/{train,test}.parquet with
columns `image` (struct with `bytes`) and `label`.

Command:
  SSL_JAX_DATA=/data ssl_jax pretrain --config cifar10_pixio --workdir runs/cifar10_pixio

Expected: linear probe 56 % (raw pixels 41, the encoder untrained 42), kNN on a 4 x 4 grid of
means 52 % (45, 42); loss 0.63.
Cost: an hour of one shared CPU core; 38 minutes at the 220 images/s of a free one.
"""

from ssl_jax import config


def get_config(arg=''):
    del arg
    data = config.shared('data')
    c = config.default()
    c.name = 'cifar10_pixio'

    c.total_epochs = 10.0
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

    data.cifar10(c)
    c.eval.every_epochs = 2.0

    return c
