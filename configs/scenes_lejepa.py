# SPDX-License-Identifier: Apache-2.0
"""LeJEPA on rendered scenes, 64 px: the small-data preset without any files.

Command:
  ssl_jax pretrain --config scenes_lejepa --workdir runs/scenes_lejepa

Expected: `invariance` falls, `embedding_std` goes towards 1, no collapse. Not run here to the end.
Cost: 6.7e13 useful FLOPs, 1.6 times those of `scenes_dinov2`: about ten minutes on 2 CPU cores, by
that recipe's time.
"""

from ssl_jax import config


def get_config(arg=''):
    del arg
    lejepa = config.shared('lejepa')
    data = config.shared('data')
    c = config.default('lejepa')
    c.name = 'scenes_lejepa'

    c.total_steps = 1000
    c.warmup_steps = 100
    c.batch_size = 64

    m = c.method
    lejepa.small(m)
    m.size = None
    m.embed_dim, m.depth, m.num_heads = 128, 4, 4
    m.patch_size = 8
    m.img_size = 64
    m.local_size = 32

    lejepa.optim(c.optim, lr=1e-3)

    data.scenes(c, size=96)
    c.eval.every_steps = 250

    return c
