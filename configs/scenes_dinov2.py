# SPDX-License-Identifier: Apache-2.0
"""DINOv2 on rendered scenes, 64 px: the small-data preset without any files.

What makes DINOv2 train on little data, and why: see `small` of `_dinov2.py`.

Command:
  ssl_jax pretrain --config scenes_dinov2 --workdir runs/scenes_dinov2

Expected: no collapse (feature std 0.97, all prototypes used) and a linear probe of 16.3 % of 10
classes (untrained 11.8, raw pixels 14.5), where `scenes_mae` has 29.6. The class-token loss falls
from 7.1 to 6.5, of ln 1024 = 6.9 for a uniform student.
Cost: 7 minutes on 2 CPU cores (84 images/s).
"""

from ssl_jax import config


def get_config(arg=''):
    del arg
    dinov2 = config.shared('dinov2')
    data = config.shared('data')
    c = config.default('dinov2')
    c.name = 'scenes_dinov2'

    c.total_steps = 1000
    c.warmup_steps = 100
    c.batch_size = 32

    m = c.method
    dinov2.small(m)
    m.size = None
    m.embed_dim, m.depth, m.num_heads = 128, 4, 4
    m.patch_size = 8
    m.img_size = 64
    m.local_size = 32

    dinov2.optim(c.optim)
    c.optim.lr = 5e-4
    c.optim.warm_freeze_steps = 50

    data.scenes(c, size=96)
    c.eval.every_steps = 250

    return c
