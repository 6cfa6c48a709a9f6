# SPDX-License-Identifier: Apache-2.0
"""Continue DINOv2 from the released ViT-S/14 on your images, 224 px.

The backbone is `init_from`, by default the official file in the working directory; a run, an
imported or exported folder, an HF or timm folder do as well. Its position table of 518 px is
resized to 224 px and its LayerScale taken as it is. The projection heads were never released, and
fresh ones would send noise into good weights: for the first 1,000 steps they train alone, student
and teacher backbones keep every bit. Then the backbone follows with a fifth of their rate for its
norm, 0.9 times less for each block below. The prototypes suit some 100,000 images; with millions
raise them. No stochastic depth: the released small models were distilled without it (and without
masks, so that their mask token is untrained, which the iBOT term mends).

Command:
  ssl_jax pretrain --config continue_dinov2_vits14 --data DIR --workdir runs/mine \\
      init_from=dinov2_vits14_pretrain.pth

Expected: not measured; compare with `ssl_jax eval` on a labelled set before and after. Cost: 8.0e17
useful FLOPs: 4 minutes on 8 H100 at 40 % of peak.
"""

from ssl_jax import config


def get_config(arg=''):
    dinov2 = config.shared('dinov2')
    c = config.default('dinov2')
    c.name = 'continue_dinov2_vits14'
    c.init_from = arg or 'dinov2_vits14_pretrain.pth'

    c.total_steps = 20_000
    c.warmup_steps = 2000
    c.batch_size = 256
    c.dtype = 'bfloat16'
    c.remat = 'dots'

    m = c.method
    m.size = 'S'
    m.patch_size = 14
    m.local_size = 98
    m.layer_scale = 1.0  # as the released file; only says that the parameter exists
    m.dino_out_dim = m.ibot_out_dim = 8192
    m.warmup_teacher_temp_steps = 4000
    m.momentum_teacher = 0.994

    dinov2.optim(c.optim)
    c.optim.base_lr = 4e-4  # 2e-4 at batch 256, for the heads
    c.optim.weight_decay_end = 0.2
    c.optim.layer_decay = 0.9
    c.optim.lr_mult = (('^backbone/', 0.2), ('patch_embed', 0.2))
    c.optim.warm_freeze = ('^backbone/',)
    c.optim.warm_freeze_moments = False
    c.optim.warm_freeze_steps = 1000

    c.eval.every_steps = 2000

    return c
