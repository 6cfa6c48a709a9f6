# SPDX-License-Identifier: Apache-2.0
"""I-JEPA on CIFAR-10, 32 px: the smallest real data set.

The images are Parquet files in Hugging Face layout, $SSL_JAX_DATA/cifar10/{train,test}.parquet with
columns `image` (struct with `bytes`) and `label`. 8 x 8 patches of 4 px: target blocks of 3 x 4 or
4 x 3 patches, a context of 16.

Command:
  SSL_JAX_DATA=/data ssl_jax pretrain --config cifar10_ijepa --workdir runs/cifar10_ijepa

Expected: not run to its end. After 1,432 steps (five minutes) linear probe 42 % (raw pixels 39, the
encoder untrained 41), kNN of patches below the untrained encoder's: `experiments/methods`.
Cost: about half an hour at the 305 images/s of two idle CPU cores.
"""

from ssl_jax import config


def get_config(arg=''):
    del arg
    data = config.shared('data')
    c = config.default('ijepa')
    c.name = 'cifar10_ijepa'

    c.total_epochs = 10.0
    c.warmup_epochs = 0.5
    c.batch_size = 64

    c.method.size = None
    c.method.embed_dim = 128
    c.method.depth = 4
    c.method.num_heads = 4
    c.method.patch_size = 4
    c.method.img_size = 32
    c.method.predictor_dim = 64
    c.method.predictor_depth = 3
    c.method.crop_scale = (0.4, 1.0)

    c.optim.lr = 5e-4
    config.shared('ijepa').optim(c.optim)

    data.cifar10(c)
    c.eval.every_epochs = 2.0

    return c
