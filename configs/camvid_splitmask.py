# SPDX-License-Identifier: Apache-2.0
"""SplitMask on CamVid alone, 64 px: 367 street scenes, target-only pretraining on a tiny set.

The images are $SSL_JAX_DATA/camvid/images/train/*.jpg of 480x360 pixels. Crops show 4 to 25 % of an
image, the paper's advice for scenes (ADE20k, section 5.2.2). Its rule for the length
(`epochs` of `_words.py`) gives 5,000 epochs, its limit; this recipe has a tenth of them.

Command:
  SSL_JAX_DATA=/data ssl_jax pretrain --config camvid_splitmask --workdir runs/camvid_splitmask

Expected (one seed, 2,867 updates): inpainting 1.5 nats above guessing by frequency (`mim_gain`, 1.2
to 1.8 over the last 500 updates), the other branch found in 9 of 10 images (`nce_acc`), token
perplexity 1,150 of 2,048. The scenes have no classes, so there is no probe.
Cost: 1.8e14 useful FLOPs: by the 74 to 85 images/s of two idle CPU cores about 40 minutes.
"""

import os

import ml_collections

from ssl_jax import config


def get_config(arg=''):
    del arg
    words = config.shared('words')
    c = config.default('splitmask')
    c.name = 'camvid_splitmask'

    c.total_epochs = words.epochs(367) / 10  # 500
    c.warmup_epochs = c.total_epochs / 30
    c.batch_size = 64

    m = c.method
    m.size = None
    m.embed_dim, m.depth, m.num_heads = 128, 6, 4
    m.patch_size = m.token_patch_size = 8
    m.img_size = 64
    m.vocab = 2048
    m.drop_path = 0.0
    m.crop_scale = (0.04, 0.25)

    words.optim(c.optim)
    c.optim.lr = 7e-4

    images = os.path.join(os.environ.get('SSL_JAX_DATA', '../shared/data'), 'camvid', 'images')
    train = dict(source='folder', path=images, split='train')
    c.data.train = ml_collections.ConfigDict(train)
    c.eval.every_epochs = 100.0

    return c
