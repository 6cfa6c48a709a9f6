# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning of MAE's ViT-L/16 on ImageNet-1k: what differs from `finetune_mae_vitb16`.

Command:
  ssl_jax finetune --config finetune_mae_vitl16:/imagenet --model runs/mae_vitl16 --workdir runs/ft

Expected, of the official code and weights: top-1 85.9 %. Not run here.
Cost: 2.4e19 useful FLOPs.
"""

from ssl_jax import config


def get_config(arg=''):
    c = config.recipe('finetune_mae_vitb16', arg)
    c.name = 'finetune_mae_vitl16'
    c.total_epochs = 50.0
    c.method.update(size='L', drop_path=0.2)
    c.optim.base_lr, c.optim.layer_decay = 1e-3, 0.75

    return c
