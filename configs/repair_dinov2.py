# SPDX-License-Identifier: Apache-2.0
"""The Gram stage: a finished DINOv2 run goes on with its patch features anchored.

A long DINOv2 run goes on to gain in k-NN and linear probes of its class tokens while its patches
lose in segmentation and depth. Here a frozen teacher sees the global crops at twice the size and
without colour changes, and the similarities of the student's patches are pulled to the teacher's.

Network, losses, crops and augmentation are those of the run `init_from`; batch size and type
follow from images and devices. Teacher by default: the moving average as the run has left it, whose
larger input makes its patches finer. Where dense scores have fallen already, take the checkpoint
before they fell (`checkpoint.keep_every` keeps some) by method.gram_from=RUN/checkpoints/STEP. Of
weights without projection heads only the encoder is taken: see `continue_dinov2_vits14`, whose
frozen start keeps fresh heads from spoiling it, and add method.gram_weight=2.

Paper: DINOv3, arXiv 2508.10104, section 4, stage of the 7B model: weight 2, rate 3e-5 and teacher
momentum 0.999, both constant, weight decay 0.04, b2 0.99, layer decay 0.98; the teacher is replaced
three times, every 10,000 steps. Ours to fit shorter runs, not measured: 10,000 steps in all, a
warm-up of 500, the teacher replaced every 2,500. Differs: gradients are clipped as in DINOv2 (3 per
network instead of 30), the local DINO term keeps its weight (halved there), flips stay.

Command:
  ssl_jax pretrain --config repair_dinov2 --data DIR --workdir runs/repaired init_from=runs/mine

Expected: not measured at a size where patch features fall; 100 steps on rendered scenes are in
`experiments/gram`. Judge by `ssl_jax eval --tasks seg` of labelled maps before and after.
Cost: 1.8 (ViT-S/14) to 2.1 (ViT-L/14) times the useful FLOPs per image of the run at 224 px.
"""

import ml_collections

from ssl_jax import config


def get_config(arg=''):
    dinov2 = config.shared('dinov2')
    c = config.default('dinov2')
    c.name = 'repair_dinov2'
    c.init_from = arg or 'runs/dinov2'

    c.infer = True
    c.batch_size = None
    c.dtype = None
    c.total_steps = 10_000
    c.warmup_steps = 500

    m = c.method
    m.size = m.patch_size = m.img_size = m.local_size = m.group_size = None  # of `init_from`
    m.dino_out_dim = m.ibot_out_dim = None
    m.momentum_teacher = m.final_momentum_teacher = 0.999
    m.gram_weight = 2.0
    m.gram_every = 2500

    dinov2.optim(c.optim)
    c.optim.lr = c.optim.min_lr = 3e-5  # constant after the warm-up
    c.optim.b2 = 0.99
    c.optim.weight_decay_end = None
    c.optim.layer_decay = 0.98
    c.optim.warm_freeze = ()

    c.data.train = ml_collections.ConfigDict(dict(source='', path=''))

    return c
