# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning of BEiT's base model on ImageNet-1k, 224 px, with the values of its repository.

100 epochs, batch 1024 at rate 4e-3, warm-up 20, layer decay 0.65, stochastic depth 0.1; each block
has a table of relative positions of its own, which starts as the shared one of pretraining.

Command:
  ssl_jax finetune --config finetune_beit_vitb16:/imagenet --model runs/beit --workdir runs/ft

Expected, of the official code: top-1 82.8 % after 300 epochs of pretraining on ImageNet-1k (83.7 %
with ImageNet-22k). Not run here.
Cost: 1.4e19 useful FLOPs.
"""

from ssl_jax import config


def get_config(arg=''):
    finetune = config.shared('finetune')
    data = config.shared('data')
    c = config.default('classifier')
    c.name = 'finetune_beit_vitb16'

    c.total_epochs = 100.0
    c.warmup_epochs = 20.0
    c.batch_size = 1024
    c.dtype = 'bfloat16'

    m = c.method
    m.num_classes = 1000
    finetune.beit(m)

    finetune.optim(c.optim)
    c.optim.base_lr, c.optim.scale_batch = 4e-3, 1024
    c.optim.schedule = 'dinov2'  # warm-up that includes both ends

    c.data.train, _, c.data.eval_test = data.imagenet(arg)
    c.eval.every_epochs = 5.0
    c.eval.tasks.pictures = None
    c.log.every_steps = 100

    return c
