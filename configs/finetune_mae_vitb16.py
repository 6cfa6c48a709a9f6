# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning of MAE's ViT-B/16 on ImageNet-1k, 224 px, with the values of its `FINETUNE.md`.

100 epochs, layer decay 0.65, base rate 5e-4 per 256 images, stochastic depth 0.1; the paper (table
9) has 0.75 and 1e-3, for weights without normalised pixels. Shared with `finetune_mae_vitl16` and
`finetune_mae_vith14`: batch 1024, warm-up 5, AdamW (0.9, 0.999), weight decay 0.05, label smoothing
0.1, mixup 0.8, CutMix 1.0, RandAugment 9/0.5, erasing 0.25, the mean of the patch tokens.

The model may be MAE's own file, mae_pretrain_vit_base.pth.

Command:
  ssl_jax finetune --config finetune_mae_vitb16:/imagenet --model runs/mae_vitb16 --workdir runs/ft

Expected, of the official code and weights: top-1 83.6 %. Not run here.
Cost: 1.4e19 useful FLOPs.
"""

from ssl_jax import config


def get_config(arg=''):
    finetune = config.shared('finetune')
    data = config.shared('data')
    c = config.default('classifier')
    c.name = 'finetune_mae_vitb16'

    c.total_epochs = 100.0
    c.warmup_epochs = 5.0
    c.batch_size = 1024
    c.dtype = 'bfloat16'

    c.method.num_classes = 1000
    finetune.optim(c.optim)

    c.data.train, _, c.data.eval_test = data.imagenet(arg)
    c.eval.every_epochs = 5.0
    c.eval.tasks.pictures = None
    c.log.every_steps = 100

    return c
