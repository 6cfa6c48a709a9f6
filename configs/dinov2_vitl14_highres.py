# SPDX-License-Identifier: Apache-2.0
"""The high-resolution stage of DINOv2 ViT-L/14: a finished run goes on at 518 px for 10,000 steps.

Paper: DINOv2, arXiv 2304.07193, section 4 and appendix B.2: the same losses and schedules
compressed to 10,000 steps, from the final weights at 224 px, with a lower rate. The rate was not
published and the code has no such config: 5e-5 here is a quarter of the base rate of
`dinov2_vitl14` and a guess. Position tables of student and teacher are resized from 16 x 16 to
37 x 37 patches. Groups of 4 samples keep the masked patches of a group at 1,914.

Command:
  python -m ssl_jax.train --config=configs/dinov2_vitl14_highres.py:/data/imagenet22k \\
    --config.init_from=gs://bucket/run --workdir=gs://bucket/highres

Expected: dense tasks gain; the paper's figure 6 finds such a stage almost as good as training at
the high resolution throughout. Not trained here.
Cost: 1.9e20 useful FLOPs: 4.5 h on 64 TPU v5p chips or 17 h on 8 H100 at 40 % of peak.
"""

from ssl_jax import config


def get_config(arg=''):
    c = config.recipe('dinov2_vitl14', arg)
    c.name = 'dinov2_vitl14_highres'
    c.init_from = 'runs/dinov2_vitl14'

    c.total_steps = 10_000
    c.warmup_steps = 1600
    c.method.warmup_teacher_temp_steps = 600
    c.optim.warm_freeze_steps = 20

    c.method.img_size = 518
    c.method.group_size = 4

    c.optim.base_lr = 5e-5
    c.eval.every_steps = 1000
    return c
