# SPDX-License-Identifier: Apache-2.0
"""LeJEPA on CIFAR-10, at 36 px: the small-data preset on the smallest real data set.

The images are Parquet files in Hugging Face layout, $SSL_JAX_DATA/cifar10/{train,test}.parquet with
columns `image` (struct with `bytes`) and `label`. The encoder, its crops and their distortions are
those of `cifar10_dinov2`.

Command:
  SSL_JAX_DATA=/data ssl_jax pretrain --config cifar10_lejepa --workdir runs/cifar10_lejepa

Expected: not run to its end. After 373 steps (five minutes) linear probe 44 % (raw pixels 39, the
encoder untrained 35), kNN of the class token 35 (untrained 27): `experiments/methods`.
Cost: about an hour at the 160 images/s of two idle CPU cores.
"""

from ssl_jax import config


def get_config(arg=''):
    del arg
    lejepa = config.shared('lejepa')
    data = config.shared('data')
    c = config.default('lejepa')
    c.name = 'cifar10_lejepa'

    c.total_epochs = 12.0
    c.warmup_epochs = 0.3
    c.batch_size = 128

    m = c.method
    lejepa.small(m)
    m.size = None
    m.embed_dim, m.depth, m.num_heads = 128, 4, 4
    m.patch_size = 6
    m.img_size = 36
    m.local_size = 18
    m.blur_prob = 0.0

    lejepa.optim(c.optim, lr=2e-3)

    data.cifar10(c)
    c.eval.every_epochs = 1.0

    return c
