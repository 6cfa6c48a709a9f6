# SPDX-License-Identifier: Apache-2.0
"""I-JEPA on rendered scenes, 64 px: a demonstration for a CPU that needs no files.

Command:
  ssl_jax pretrain --config scenes_ijepa --workdir runs/scenes_ijepa

Expected: not run to the end here; TODO
Cost: TODO
"""

from ssl_jax import config


def get_config(arg=''):
    del arg
    data = config.shared('data')
    c = config.default('ijepa')
    c.name = 'scenes_ijepa'

    c.total_steps = 1000
    c.warmup_steps = 100
    c.batch_size = 64

    c.method.size = None
    c.method.embed_dim = 128
    c.method.depth = 4
    c.method.num_heads = 4
    c.method.patch_size = 8
    c.method.img_size = 64
    c.method.predictor_dim = 64
    c.method.predictor_depth = 2
    c.method.crop_scale = (0.4, 1.0)

    c.optim.lr = 2e-4  # 1e-3 at batch 2048, with the root of the batch
    c.optim.b2 = 0.999
    c.optim.weight_decay = 0.04
    c.optim.weight_decay_end = 0.4

    data.scenes(c)
    c.eval.every_steps = 500

    return c
