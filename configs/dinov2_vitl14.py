# SPDX-License-Identifier: Apache-2.0
"""DINOv2 ViT-L/14 on ImageNet-22k or more: 224 px, 625,000 steps of 3,072 images.

Paper: DINOv2, arXiv 2304.07193, table 16; `configs/train/vitl14.yaml`: SwiGLU, two heads of 131,072
prototypes (class tokens through 384 channels, patches through 256), Sinkhorn-Knopp, lr 2e-4 x
sqrt(3072/1024), weight decay 0.04 to 0.2, teacher momentum 0.994 to 1, stochastic depth 0.4, local
crops of 98 px. Groups of 24, for up to 128 devices (one of its 96 GPUs held 32). bfloat16 instead
of float16.

Command:
  python -m ssl_jax.train --config=configs/dinov2_vitl14.py:/data/imagenet22k --workdir=gs://bucket/run
  (a folder of images; labels are not used)

Expected, of the official run: k-NN 82.0 %, linear probe 84.5 % on ImageNet-1k. Not trained here.
Cost: 2.6e21 useful FLOPs: 63 h on 64 TPU v5p chips or 232 h on 8 H100 at 40 % of peak. The official
README states 3.3 days on 96 A100.
"""

from ssl_jax import config


def get_config(arg=''):
    dinov2 = config.shared('dinov2')
    c = config.default('dinov2')
    c.name = 'dinov2_vitl14'

    c.total_steps = 625_000
    c.warmup_steps = 100_000
    c.batch_size = 3072
    c.dtype = 'bfloat16'
    c.remat = 'dots'
    c.mesh.data, c.mesh.fsdp = -1, -1

    m = c.method
    m.size = 'L'
    m.patch_size = 14
    m.local_size = 98
    m.ffn = 'swiglu'
    m.drop_path = 0.4
    m.group_size = 24
    m.dino_out_dim, m.dino_bottleneck_dim = 131_072, 384
    m.ibot_out_dim, m.ibot_bottleneck_dim = 131_072, 256
    m.momentum_teacher = 0.994
    m.warmup_teacher_temp_steps = 37_500

    dinov2.optim(c.optim)
    c.optim.base_lr = 2e-4
    c.optim.weight_decay_end = 0.2
    c.optim.warm_freeze_steps = 1250

    c.data.train.update(source='folder', path=arg or '/data/imagenet22k')
    c.eval.every_steps = 12_500

    return c
