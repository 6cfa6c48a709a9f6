# SPDX-License-Identifier: Apache-2.0
"""Continue DINOv3 from the published ViT-S/16 on your images, 224 px.

The backbone is `init_from`, by default the official file in the working directory; the folder for
transformers, a run, an imported or exported folder do as well. The published weights are gated and
under the DINOv3 License, as is what you make from them. The heads were not published: as in
`continue_dinov2_vits14` fresh ones train alone for the first 1,000 steps, then the backbone follows
with a fifth of their rate for its norm, 0.9 times less for each block below. Rate, decay and
momentum are constant after the warm-up, so that you can stop when your evaluation does, or set
total_steps anew. The prototypes suit some 100,000 images; with millions raise them. For another
size set method.size: S, S+, B, L, H+ or 7B.

Command:
  ssl_jax pretrain --config continue_dinov3_vits16 --data DIR --workdir runs/mine \\
      init_from=dinov3_vits16_pretrain_lvd1689m-08c60483.pth

Expected: not run here; compare with `ssl_jax eval` on a labelled set before and after. Cost: 6.3e17
useful FLOPs: 4 minutes on 8 H100 at 40 % of peak.
"""

from ssl_jax import config


def get_config(arg=''):
    dinov2 = config.shared('dinov2')
    c = config.default('dinov3')
    c.name = 'continue_dinov3_vits16'
    c.init_from = arg or 'dinov3_vits16_pretrain_lvd1689m-08c60483.pth'

    c.total_steps = 20_000
    c.warmup_steps = 2000
    c.batch_size = 256
    c.dtype = 'bfloat16'
    c.remat = 'dots'

    m = c.method
    m.size = 'S'
    m.layer_scale = 1.0  # as the published file; only says that the parameter exists
    m.dino_out_dim = m.ibot_out_dim = 8192
    m.warmup_teacher_temp_steps = 4000

    dinov2.optim(c.optim)
    c.optim.lr = c.optim.min_lr = 2e-4  # of the heads, for batch 256
    c.optim.weight_decay_end = None
    c.optim.layer_decay = 0.9
    c.optim.lr_mult = (('^backbone/', 0.2), ('patch_embed', 0.2))
    c.optim.warm_freeze = ('^backbone/',)
    c.optim.warm_freeze_moments = False
    c.optim.warm_freeze_steps = 1000

    c.eval.every_steps = 2000

    return c
