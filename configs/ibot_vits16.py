# SPDX-License-Identifier: Apache-2.0
"""iBOT ViT-S/16 on ImageNet-1k, 224 px, 800 epochs of batches of 1,024.

Paper: iBOT, arXiv 2111.07832, and the published command: `dino_vits16` with masked patches (half of
the global crops, 10 to 50 % of the patches in blocks), one head of 8,192 prototypes for class and
patch tokens, 10 local crops, crops of 25 to 100 % and 5 to 25 % of the image, teacher temperatures
0.04 to 0.07 within 30 epochs.

Command:
  python -m ssl_jax.train --config=configs/ibot_vits16.py:/data/imagenet --workdir=gs://bucket/run

Expected, of the official run: k-NN 75.2 %, linear probe 77.9 %. Not trained here.
Cost: 1.3e20 useful FLOPs: 12 h on 16 TPU v5p chips or 11 h on 8 H100 at 40 % of peak.
"""

from ssl_jax import config


def get_config(arg=''):
    c = config.recipe('dino_vits16', arg)
    c.name = 'ibot_vits16'

    c.total_epochs = 800.0
    c.method.ibot_weight = 1.0
    c.method.mask_sampler = 'ibot'
    c.method.dino_out_dim = 8192
    c.method.n_local_crops = 10
    c.method.global_crops_scale = (0.25, 1.0)
    c.method.local_crops_scale = (0.05, 0.25)
    c.method.teacher_temp = c.method.patch_teacher_temp = 0.07
    c.method.warmup_teacher_temp_epochs = 30.0
    return c
