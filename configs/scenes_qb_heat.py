# SPDX-License-Identifier: Apache-2.0
"""QB-Heat (experimental) on rendered scenes, 64 px: a demonstration for a CPU without files.

Ten shapes among textures, light and clutter (`ssl_jax/data/scenes.py`). What `methods/qb_heat.py`
adds to the paper is listed there.

Command:
  ssl_jax pretrain --config scenes_qb_heat --workdir runs/scenes_qb_heat

Expected: not run to its end. With total_steps=250 warmup_steps=50 (one seed) the loss falls to
0.753, or 0.761 with operators held at the identity, optim.freeze=('^operators',); `operators` rises
to 0.07; kNN of the mean patch token is 13.2 % of 10 classes, little above chance.
Cost: 9.7e12 useful FLOPs, an eighth more than `scenes_mae`: 3 to 4 minutes on 2 idle CPU cores.
"""

from ssl_jax import config


def get_config(arg=''):
    del arg
    data = config.shared('data')
    c = config.default('qb_heat')
    c.name = 'scenes_qb_heat'

    c.total_steps = 1000
    c.warmup_steps = 100
    c.batch_size = 64

    c.method.size = None
    c.method.embed_dim = 128
    c.method.depth = 4
    c.method.num_heads = 4
    c.method.patch_size = 8
    c.method.img_size = 64
    c.method.decoder_embed_dim = 64
    c.method.decoder_depth = 2
    c.method.decoder_num_heads = 2
    c.method.crop_scale = (0.4, 1.0)

    c.optim.lr = 1e-3
    c.optim.weight_decay = 0.05

    data.scenes(c)
    c.eval.every_steps = 500

    return c
