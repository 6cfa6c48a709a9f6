# SPDX-License-Identifier: Apache-2.0
"""The `method` fields of distillation, for recipes and for `config.load`."""

import ml_collections

from ssl_jax import config_dinov2


def features():
    """An unlocked `ConfigDict` for Pixio's form: tokens of the student align with the teacher's."""
    m = ml_collections.ConfigDict()
    m.name = 'distill'
    m.form = 'features'
    _teacher(m)
    m.size = 'L'  # key of models.vit.SIZES, fills the next three where they are None
    m.embed_dim = None
    m.depth = None
    m.num_heads = None
    m.patch_size = 16  # of both networks, as all of the following
    m.img_size = 256
    m.num_cls_tokens = 8
    m.pos_embed = 'learned'
    m.mlp_ratio = 4.0
    m.drop_path = 0.0  # of the student
    m.mask_ratio = 0.0  # share of the patches that the student does not see
    m.mask_grid = 4  # side in patches of the squares that are masked together
    m.cls_loss = 'cosine'  # 'cosine', 'l1' or 'mse'
    m.patch_loss = 'cosine'
    m.fuse = 'avg'  # the two losses 'avg'eraged, or 'sum'med in proportion to their tokens
    m.crop_scale = (0.2, 1.0)
    m.crop_ratio = (3 / 4, 4 / 3)
    m.flip = 0.0
    return m


def dino():
    """An unlocked `ConfigDict` for DINOv2's form: its losses under a frozen teacher with heads."""
    m = config_dinov2.method()
    m.name = 'distill'
    m.form = 'dino'
    _teacher(m)
    m.teacher_ffn = 'swiglu'  # 'mlp' or 'swiglu'
    return m


def _teacher(m):
    m.teacher = None  # a run of ours, imported weights or an export; None: random, for trying out
    m.teacher_size = None  # as size and the three fields below it
    m.teacher_embed_dim = None
    m.teacher_depth = None
    m.teacher_num_heads = None
