# SPDX-License-Identifier: Apache-2.0
"""LeJEPA ViT-L/16 on ImageNet-1k, 224 px, 100 epochs.

Paper: LeJEPA, arXiv 2511.08544: 2 global and 6 local crops, weight 0.05 of SIGReg, 1,024 random
projections, AdamW with a rate of 5e-4 that the batch does not scale, weight decay 0.05, warm-up,
cosine to a thousandth of the rate, stochastic depth 0.1, bfloat16. The projector's output of 128
channels is LightlySSL's; the batch of 512 and the 10 epochs of warm-up are our choice.

Command:
  python -m ssl_jax.train --config=configs/lejepa_vitl16.py:/data/imagenet --workdir=gs://bucket/run

Expected: the paper reports a linear probe of 79 % with ViT-H/14 (abstract), of the class tokens of
the last two blocks. Not run here.
Cost: 1.5e20 useful FLOPs: 13 h on 8 H100 at 40 % of peak.
"""

from ssl_jax import config


def get_config(arg=''):
    lejepa = config.shared('lejepa')
    data = config.shared('data')
    c = config.default('lejepa')
    c.name = 'lejepa_vitl16'

    c.total_epochs = 100.0
    c.warmup_epochs = 10.0
    c.batch_size = 512
    c.dtype = 'bfloat16'

    c.method.size = 'L'

    lejepa.optim(c.optim)

    c.data.train, c.data.eval_train, c.data.eval_test = data.imagenet(arg)
    c.eval.every_epochs = 10.0
    c.eval.max_train = 130_000
    c.eval.max_test = 10_000

    return c
