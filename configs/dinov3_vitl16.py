# SPDX-License-Identifier: Apache-2.0
"""DINOv3 ViT-L/16 on ImageNet-1k: 224 px, 125,000 steps of 2,048 images.

The small run of its repository, `configs/train/vitl_im1k_lin834.yaml`: the schedules, crops and
batch of `dinov2_vitl16_short`, with rotary positions, Sinkhorn-Knopp, two heads of 65,536
prototypes each and no weight norm. It has none of what the large runs added: no registers, keys
with bias, positions never rescaled, eps 1e-6. Its `lr: 0.001` times 4 sqrt(2048 / 1024) is the rate
here. There angles are bfloat16, here float32.

Command:
  python -m ssl_jax.train --config=configs/dinov3_vitl16.py:/data/imagenet --workdir=gs://…
  (the folder has train/ and val/; without it, TFDS' imagenet2012 from TFDS_DATA_DIR)

Expected, of the official run: k-NN 82.2 %, linear probe 83.3 % (its README: 82.0 and 83.5).
Not run here.
Cost: 3.0e20 useful FLOPs: 26 h on 8 H100 at 40 % of peak. The official README states 14 h on 32
H100.
"""

from ssl_jax import config


def get_config(arg=''):
    dinov2 = config.shared('dinov2')
    data = config.shared('data')
    c = config.default('dinov3')
    c.name = 'dinov3_vitl16'

    c.total_steps = 125_000
    c.warmup_steps = 12_500
    c.batch_size = 2048
    c.dtype = 'bfloat16'
    c.remat = 'dots'
    c.mesh.data, c.mesh.fsdp = -1, -1

    m = c.method
    m.size = 'L'
    m.num_register_tokens = 0
    m.key_bias = True
    m.rope_rescale = 1.0
    m.eps = 1e-6
    m.drop_path = 0.3
    m.warmup_teacher_temp_steps = 37_500
    m.momentum_teacher = 0.992
    m.final_momentum_teacher = 1.0

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
