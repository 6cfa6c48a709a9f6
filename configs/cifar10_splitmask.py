# SPDX-License-Identifier: Apache-2.0
"""SplitMask on CIFAR-10, 32 px: the encoder and the length of `cifar10_mae`.

The images are Parquet files in Hugging Face layout, $SSL_JAX_DATA/cifar10/{train,test}.parquet with
columns `image` (struct with `bytes`) and `label`. 2,048 words of 4x4 pixels are random patches of
them; blocks of masked patches are in proportion to the grid of 8x8. The controls are method.w_nce=0
(split and inpaint) and method.w_mim=0 (match only, which the paper saw nearly collapse).

Command:
  SSL_JAX_DATA=/data ssl_jax pretrain --config cifar10_splitmask --workdir runs/cifar10_splitmask

Expected: not measured at this length; after 4,000 updates of a smaller encoder (64 channels, 4
blocks) linear probe 45 %, kNN 44 (raw pixels 36 and 37): experiments/splitmask.
Cost: 7.5e14 useful FLOPs, five times `cifar10_mae`: 2 h at the 100 images/s of two busy CPU cores.
"""

from ssl_jax import config


def get_config(arg=''):
    del arg
    words = config.shared('words')
    data = config.shared('data')
    c = config.default('splitmask')
    c.name = 'cifar10_splitmask'

    c.total_epochs = 16.0
    c.warmup_epochs = 0.5
    c.batch_size = 64

    m = c.method
    m.size = None
    m.embed_dim, m.depth, m.num_heads = 128, 6, 4
    m.patch_size = m.token_patch_size = 4
    m.img_size = 32
    m.vocab = 2048
    m.drop_path = 0.0  # small models underfit
    m.crop_scale = (0.4, 1.0)

    words.optim(c.optim)
    c.optim.lr = 7e-4

    data.cifar10(c)
    c.eval.every_epochs = 4.0

    return c
