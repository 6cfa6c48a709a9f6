# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning of MAE's ViT-H/14 on ImageNet-1k: what differs from `finetune_mae_vitb16`.

Command:
  ssl_jax finetune --config finetune_mae_vith14:/imagenet --model runs/mae_vith14 --workdir runs/ft

Expected, of the official code and weights: top-1 86.9 %. Not run here.
Cost: 6.4e19 useful FLOPs.
"""

from ssl_jax import config


def get_config(arg=''):
    c = config.recipe('finetune_mae_vitb16', arg)
    c.name = 'finetune_mae_vith14'
    c.total_epochs = 50.0
    c.remat = 'dots'
    c.method.update(size='H', patch_size=14, drop_path=0.3)
    c.optim.base_lr, c.optim.layer_decay = 1e-3, 0.75

    return c
