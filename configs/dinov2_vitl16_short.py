# SPDX-License-Identifier: Apache-2.0
"""DINOv2 ViT-L/16 on ImageNet-1k, the short recipe: 224 px, 125,000 steps of 2,048 images.

Paper: DINOv2, arXiv 2304.07193; `configs/train/vitl16_short.yaml` and the defaults of its code: one
head of 65,536 prototypes for class and patch tokens, softmax centring, lr 4e-3 x sqrt(2048/1024),
layer decay 0.9, patch embedding x 0.2, weight decay 0.04 to 0.4, teacher momentum 0.992 to 1,
stochastic depth 0.3, gradient norm 3 per network, last layer still for 1,250 steps. Groups of 64
are what one of its 32 GPUs held. bfloat16 instead of float16.

Command:
  python -m ssl_jax.train --config=configs/dinov2_vitl16_short.py:/data/imagenet --workdir=gs://…
  (the folder has train/ and val/; without it, TFDS' imagenet2012 from TFDS_DATA_DIR)

Expected, of the official run: k-NN 81.6 %, linear probe 82.9 %. Not trained here.
Cost: 3.0e20 useful FLOPs: 14 h on 32 TPU v5p chips or 26 h on 8 H100 at 40 % of peak. The official
README states about a day on 32 A100.
"""

from ssl_jax import config


def get_config(arg=''):
    dinov2 = config.shared('dinov2')
    data = config.shared('data')
    c = config.default('dinov2')
    c.name = 'dinov2_vitl16_short'

    c.total_steps = 125_000
    c.warmup_steps = 12_500
    c.batch_size = 2048
    c.dtype = 'bfloat16'
    c.remat = 'dots'
    c.mesh.data, c.mesh.fsdp = -1, -1

    m = c.method
    m.size = 'L'
    m.drop_path = 0.3
    m.centering = 'centering'
    m.separate_heads = False
    m.warmup_teacher_temp_steps = 37_500

    dinov2.optim(c.optim)
    c.optim.base_lr = 4e-3
    c.optim.weight_decay_end = 0.4
    c.optim.layer_decay = 0.9
    c.optim.warm_freeze_steps = 1250

    c.data.train, c.data.eval_train, c.data.eval_test = data.imagenet(arg)
    c.eval.every_steps = 12_500
    c.eval.max_train = 130_000
    c.eval.max_test = 10_000

    return c
