# SPDX-License-Identifier: Apache-2.0
"""DINOv3 on rendered scenes, 64 px: the small-data preset without any files.

What makes DINOv2's losses train on little data, and why: see `small` of `_dinov2.py`. Compare with
`scenes_dinov2`, which differs in the encoder and in the prototypes.

Command:
  ssl_jax pretrain --config scenes_dinov3 --workdir runs/scenes_dinov3

Expected: not run here in full.
Cost: 4.6e13 useful FLOPs; not measured (`scenes_dinov2`: 7 minutes on 2 CPU cores).
"""

from ssl_jax import config


def get_config(arg=''):
    del arg
    dinov2 = config.shared('dinov2')
    data = config.shared('data')
    c = config.default('dinov3')
    c.name = 'scenes_dinov3'

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
    m.final_momentum_teacher = 1.0

    dinov2.optim(c.optim)
    c.optim.lr = 5e-4
    c.optim.warm_freeze_steps = 50

    data.scenes(c, size=96)
    c.eval.every_steps = 250

    return c
