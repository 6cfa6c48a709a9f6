# SPDX-License-Identifier: Apache-2.0
"""Optimizer and presets of fine-tuning."""


def optim(o):
    """MAE's optimizer of fine-tuning, in place in `config.optim`; ViT-B of the repository."""
    o.base_lr, o.scale_batch = 5e-4, 256
    o.min_lr = 1e-6
    o.b2 = 0.999
    o.weight_decay = 0.05
    o.no_decay = ('pos_embed$', 'cls_token$')
    o.layer_decay = 0.65


def beit(m):
    """The encoder of BEiT's base model, for training from scratch, in place."""
    m.pos_embed, m.rel_pos, m.key_bias = 'none', 'layer', False
    m.init_scheme = 'beit'
    with m.ignore_type():
        m.layer_scale = 0.1


def plain(m):
    """No regularisation but crops and flips, in place."""
    m.update(randaugment_layers=0, erase_prob=0.0, mixup=0.0, cutmix=0.0, label_smoothing=0.0)
    m.drop_path = 0.0
