# SPDX-License-Identifier: Apache-2.0
"""BEiT on rendered scenes, 64 px: a demonstration for a CPU that needs no files.

Ten shapes among textures, light and clutter (`ssl_jax/data/scenes.py`), 512 words of 8x8 pixels
taken from them.

Command:
  ssl_jax pretrain --config scenes_beit --workdir runs/scenes_beit

Expected: `mim_gain`, how far the cross-entropy is below that of the word frequencies alone, rises
to 1.4 nats.
Cost: 4 minutes on one busy CPU core, 9.3e12 useful FLOPs.
"""

from ssl_jax import config


def get_config(arg=''):
    del arg
    words = config.shared('words')
    data = config.shared('data')
    c = config.default('beit')
    c.name = 'scenes_beit'

    c.total_steps = 800
    c.warmup_steps = 80
    c.batch_size = 32

    m = c.method
    m.size = None
    m.embed_dim, m.depth, m.num_heads = 128, 4, 4
    m.patch_size = m.token_patch_size = 8
    m.img_size = 64
    m.vocab = 512
    m.drop_path = 0.0
    m.crop_scale = (0.4, 1.0)
    m.jitter_prob = 0.0  # a jittered patch is another word

    words.optim(c.optim)
    c.optim.lr = 1e-3

    data.scenes(c)
    c.eval.every_steps = 200

    return c
