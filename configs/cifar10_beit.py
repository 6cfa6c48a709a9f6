# SPDX-License-Identifier: Apache-2.0
"""BEiT on CIFAR-10, 32 px: the encoder, words and length of `cifar10_splitmask`.

Command:
  SSL_JAX_DATA=/data ssl_jax pretrain --config cifar10_beit --workdir runs/cifar10_beit

Expected: not measured at this length; after 800 updates of a smaller encoder (64 channels, 4
blocks) linear probe 33 %, kNN 32.5, fine-tuned 32 (raw pixels 36 and 37): experiments/splitmask.
Cost: 4.4e14 useful FLOPs: by these an hour and a half of two idle CPU cores.
"""

from ssl_jax import config


def get_config(arg=''):
    del arg
    words = config.shared('words')
    data = config.shared('data')
    c = config.default('beit')
    c.name = 'cifar10_beit'

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
    m.jitter_prob = 0.0  # a jittered patch is another word

    words.optim(c.optim)
    c.optim.lr = 7e-4

    data.cifar10(c)
    c.eval.every_epochs = 4.0

    return c
