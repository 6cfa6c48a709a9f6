# SPDX-License-Identifier: Apache-2.0
"""DINOv2 ViT-B/14 distilled from ViT-g/14, 224 px, 625,000 steps of 2,048 images.

Paper: DINOv2, arXiv 2304.07193, sections 5 and 6.5, tables 16 and 17: the frozen teacher with its
heads instead of the moving average, student heads of the same prototypes, no masks and no
stochastic depth, the patch loss on all patches of the global crops, lr 1e-3, a moving average of
the student as the result. Not in the official code; what it leaves open (schedules of momentum,
centring, crops) is as in `dinov2_vitg14`. The teacher must be a run of that recipe: the heads of
the released one are not public.

Command:
  python -m ssl_jax.train --config=configs/dinov2_vitb14_distill.py:/data/web \\
    --config.method.teacher=gs://bucket/dinov2_vitg14 --workdir=gs://bucket/run

Expected, of the published model: k-NN 82.1 %, linear probe 84.5 % on ImageNet-1k. Not trained here.
Cost: 2.2e21 useful FLOPs, most of them the teacher's: 52 h on 64 TPU v5p chips at 40 % of peak.
"""

from ssl_jax import config


def get_config(arg=''):
    dinov2 = config.shared('dinov2')
    c = config.default('dinov2_distill')
    c.name = 'dinov2_vitb14_distill'

    c.total_steps = 625_000
    c.warmup_steps = 100_000
    c.batch_size = 2048
    c.dtype = 'bfloat16'
    c.remat = 'dots'
    c.mesh.data, c.mesh.fsdp = -1, -1

    m = c.method
    m.size = 'B'
    m.teacher = 'runs/dinov2_vitg14'
    m.teacher_size = 'g'
    m.patch_size = 14
    m.local_size = 98
    m.group_size = 16
    m.dino_out_dim, m.dino_bottleneck_dim = 131_072, 384
    m.ibot_out_dim, m.ibot_bottleneck_dim = 131_072, 256
    m.momentum_teacher = 0.994
    m.warmup_teacher_temp_steps = 37_500

    dinov2.optim(c.optim)
    c.optim.lr = 1e-3
    c.optim.weight_decay_end = 0.2
    c.optim.warm_freeze_steps = 1250

    c.data.train.update(source='folder', path=arg or '/data/web')
    c.eval.every_steps = 12_500

    return c
