# SPDX-License-Identifier: Apache-2.0
"""Optimizer and presets of DINOv2 and DINO."""


def optim(o):
    """DINOv2's optimizer, in place in `config.optim`; rate and its freezing are the recipe's."""
    o.scale_batch, o.lr_scaling = 1024, 'sqrt'
    o.schedule = 'dinov2'
    o.min_lr = 1e-6
    o.b2 = 0.999
    o.weight_decay, o.weight_decay_end = 0.04, 0.4
    o.clip, o.clip_by = 3.0, 'network'
    o.lr_mult = (('patch_embed', 0.2),)
    o.warm_freeze = ('last_layer',)  # for as long as the recipe says


def dino(m):
    """DINO's differences, in place in `config.method`."""
    m.ibot_weight = 0.0
    m.koleo_weight = 0.0
    m.separate_heads = False
    m.centering = 'centering'
    m.layer_scale = None
    m.drop_path_mode, m.drop_path_uniform = 'image', False
    m.global_crops_scale = (0.4, 1.0)
    m.local_crops_scale = (0.05, 0.4)
    m.blur = 'intended'
    m.teacher_temp = m.patch_teacher_temp = 0.04
    m.momentum_teacher = 0.996


def small(m):
    """For thousands of images instead of millions, in place in `config.method`.

    Sharper targets: with 0.04 to 0.07 those of a short run on CIFAR-10 drift to uniform within some
    hundred steps (teacher entropy 6.8 of at most 6.93) and the class tokens learn nothing; with
    0.02 they do. KoLeo matters as much: without it kNN was 28 % after 300 steps, with it 34.
    Not measured: fewer prototypes, since 65,536 would outnumber the images, and Sinkhorn-Knopp over
    a batch of 128 could use at most 256 at a time; fewer local crops, larger ones, since small
    images have no room for 5 % of their area; a lower teacher momentum, since a run of some
    thousand steps cannot wait for an average over hundreds; LayerScale starts at 1, since a
    small start keeps the residual branches of a short run asleep; no stochastic depth: small models
    underfit.
    """
    m.n_local_crops = 4
    m.global_crops_scale = (0.4, 1.0)
    m.local_crops_scale = (0.1, 0.4)
    m.dino_out_dim = m.ibot_out_dim = 1024
    m.dino_bottleneck_dim = m.ibot_bottleneck_dim = 64
    m.head_hidden_dim = 256
    m.separate_heads = True
    m.layer_scale = 1.0
    m.warmup_teacher_temp = m.teacher_temp = m.patch_teacher_temp = 0.02
    m.momentum_teacher = 0.98
