# SPDX-License-Identifier: Apache-2.0
"""The `method` fields of DINOv2, iBOT and DINO, for recipes and for `config.load`."""

import ml_collections


def method():
    """An unlocked `ConfigDict` with the values of DINOv2's large runs; sizes are the recipe's."""
    m = ml_collections.ConfigDict()
    m.name = 'dinov2'
    m.size = 'S'  # key of models.vit.SIZES, fills the next three where they are None
    m.embed_dim = None  # encoder width, channels
    m.depth = None  # encoder blocks
    m.num_heads = None
    m.patch_size = 16  # pixels
    m.img_size = 224  # pixels, side of a global crop
    m.mlp_ratio = 4.0  # hidden width of the MLP / embed_dim
    m.ffn = 'mlp'  # 'mlp' or 'swiglu'
    m.layer_scale = 1e-5  # start of the factor on each residual branch; None: no such factor
    m.num_register_tokens = 0
    m.pos_resize = 'offset'  # how positions reach other sizes: 'offset' or 'antialias' (registers)
    m.drop_path = 0.0  # stochastic depth of the student
    m.drop_path_mode = 'subset'  # 'subset': a fixed share of each group; 'image': a coin per image
    m.drop_path_uniform = True  # the same rate for all blocks; False: linear from 0 at the first

    m.n_local_crops = 8
    m.local_size = 96  # pixels, side of a local crop
    m.global_crops_scale = (0.32, 1.0)  # RandomResizedCrop: fraction of the image's area
    m.local_crops_scale = (0.05, 0.32)
    m.crop_ratio = (3 / 4, 4 / 3)  # RandomResizedCrop: width / height
    m.flip = 0.5  # probability of a horizontal flip
    m.brightness = 0.4  # colour jitter, largest changes as torchvision's ColorJitter takes them ...
    m.contrast = 0.4
    m.saturation = 0.2
    m.hue = 0.1
    m.jitter_prob = 0.8  # ... and the probability that there is any
    m.grey_prob = 0.2
    m.blur = 'released'  # probabilities of the blur, key of augment.BLUR
    m.solarize = (0.0, 0.2, 0.0)  # probability for global crop 1, global crop 2, local crops

    m.group_size = 64  # samples that share mask ratios, the patch buffer and the dropped images
    m.mask_sampler = 'dinov2'  # ratios from a grid ('dinov2'), or drawn per image ('ibot')
    m.mask_probability = 0.5  # share of global crops with masked patches
    m.mask_ratio_min_max = (0.1, 0.5)  # share of masked patches in such a crop

    m.dino_weight = 1.0
    m.ibot_weight = 1.0  # 0: no masks, no patch loss (DINO)
    m.koleo_weight = 0.1
    m.koleo_per_group = False  # neighbours within a group, as the official code within a device
    m.separate_heads = True  # False: patches go through the class tokens' head
    m.dino_out_dim = 65536  # prototypes
    m.dino_bottleneck_dim = 256  # channels in front of the prototypes
    m.ibot_out_dim = 65536  # of the patch head; without separate heads the other's numbers hold
    m.ibot_bottleneck_dim = 256
    m.head_hidden_dim = 2048
    m.head_num_layers = 3

    m.centering = 'sinkhorn_knopp'  # or 'centering'; 'none' collapses, for showing just that
    m.center_momentum = 0.9
    m.student_temp = 0.1
    m.warmup_teacher_temp = 0.04  # at the start, linear to the next two ...
    m.teacher_temp = 0.07
    m.patch_teacher_temp = 0.07
    m.warmup_teacher_temp_steps = None  # ... within one of ..._{steps,epochs,examples}
    m.warmup_teacher_temp_epochs = None
    m.warmup_teacher_temp_examples = None
    m.momentum_teacher = 0.992  # of the moving average at the start, half a cosine to ...
    m.final_momentum_teacher = 1.0
    return m


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
    thousand steps cannot wait for an average over hundreds; LayerScale starts at 1, for a small
    start keeps the residual branches of a short run asleep; no stochastic depth: small models
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
