# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning of SplitMask's ViT-S/16, 224 px, on Stanford Cars (its table 9): the smallest sets.

Also for Clipart, Painting and Sketch of DomainNet: rate 4e-3 at batch 1024, layer decay 0.65,
warm-up 60 of 300 epochs, RandAugment 9/0.5, each image once; the rest is that of
`finetune_splitmask_vitb16`.

Command:
  ssl_jax finetune --config finetune_splitmask_vits16_cars:/cars --model runs/cars \\
      --workdir runs/ft

Expected, of the paper, pretrained on the same images: top-1 92.8 %; from scratch 35.3 %. Not run
here.
Cost: 7e16 useful FLOPs.
"""

from ssl_jax import config


def get_config(arg=''):
    """arg: a folder with train/ and val/, a subfolder per class in each."""
    c = config.recipe('finetune_splitmask_vitb16', arg or 'stanford_cars')
    c.name = 'finetune_splitmask_vits16_cars'

    c.warmup_epochs = 60.0
    c.method.size = 'S'
    c.method.repeats = 1
    c.method.randaugment_magnitude = 9.0
    c.optim.base_lr = 4e-3
    c.optim.layer_decay = 0.65

    return c
