# SPDX-License-Identifier: Apache-2.0
"""DINOv2 on CIFAR-10, at 36 px: the small-data preset on the smallest real data set.

The images are Parquet files in Hugging Face layout, $SSL_JAX_DATA/cifar10/{train,test}.parquet with
columns `image` (struct with `bytes`) and `label`. Why the preset differs from the large recipes:
see `small` of `_dinov2.py`. 6 x 6 patches of 6 px, local crops of half the side; blur is off, for a
kernel of 9 pixels wipes out images of 36.

Command:
  SSL_JAX_DATA=/data ssl_jax pretrain --config cifar10_dinov2 --workdir runs/cifar10_dinov2

Expected: kNN 55 % (raw pixels 46, the encoder untrained 29), linear probe 57 % (41, 39); loss 7.5.
Cost: 70 minutes at the 145 images/s of two idle CPU cores, two hours at the 82 of one.
"""

from ssl_jax import config


def get_config(arg=''):
    del arg
    dinov2 = config.shared('dinov2')
    data = config.shared('data')
    c = config.default('dinov2')
    c.name = 'cifar10_dinov2'

    c.total_epochs = 12.0
    c.warmup_epochs = 0.3
    c.batch_size = 64

    m = c.method
    dinov2.small(m)
    m.size = None
    m.embed_dim, m.depth, m.num_heads = 128, 4, 4
    m.patch_size = 6
    m.img_size = 36
    m.local_size = 18
    m.blur = 'none'
    m.layer_scale = None

    dinov2.optim(c.optim)
    c.optim.lr = 1e-3
    c.optim.weight_decay_end = 0.1
    c.optim.lr_mult = ()  # the patch embedding has no time for a fifth of the rate
    c.optim.warm_freeze_epochs = 0.05

    data.cifar10(c)
    c.eval.every_epochs = 1.0

    return c
