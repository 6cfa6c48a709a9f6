# SPDX-License-Identifier: Apache-2.0
"""SplitMask ViT-S/16 on Stanford Cars alone, 224 px: 8,144 images, 5,000 epochs.

Paper: SplitMask, arXiv 2112.10740, sections 5.3 and 5.5: as `splitmask_vitb16`, but with as many
updates as 300 epochs of ImageNet or 5,000 epochs (beyond them Cars gets worse, figure 6), 75 %
uniform masking and stronger augmentation (greyscale, solarisation, blur, colour jitter; DINO's
strengths). Warm-up is the same share of the run as on ImageNet.

Command:
  python -m ssl_jax.train --config=configs/splitmask_vits16_cars.py:/data/cars --workdir=runs/cars
  (the folder has train/; fine-tune on the same images)

Expected, of the paper (table 6): fine-tuned 92.8 %; from scratch 35.3 %, pretrained on ImageNet
with labels 92.2 % or by BEiT 92.4 %. Not trained here.
Cost: 1.2e18 useful FLOPs: 50 min on one H100 at 40 % of peak, if photometry and decoding keep up.
"""

import ml_collections

from ssl_jax import config


def get_config(arg=''):
    words = config.shared('words')
    c = config.recipe('splitmask_vitb16')
    c.name = 'splitmask_vits16_cars'

    c.total_epochs = words.epochs(8144)  # 5000
    c.warmup_epochs = c.total_epochs / 30
    c.method.size = 'S'
    words.smallest(c.method)

    train = dict(source='folder', path=arg or 'cars', split='train')
    c.data.train = ml_collections.ConfigDict(train)
    c.data.eval_train = c.data.eval_test = None
    c.eval.every_epochs = c.total_epochs / 10

    return c
