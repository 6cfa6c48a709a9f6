# SPDX-License-Identifier: Apache-2.0
"""SplitMask ViT-B/16 on COCO alone, 224 px: 118,287 images, 3,000 epochs.

Paper: SplitMask, arXiv 2112.10740, sections 5.2 and 5.5: as `splitmask_vitb16`, with nearly as
many updates as 300 epochs of ImageNet (173,000; the paper rounds 3,249 epochs). Warm-up is the same
share of the run as on ImageNet.

Command:
  python -m ssl_jax.train --config=configs/splitmask_vitb16_coco.py:/data/coco --workdir=runs/coco
  (the folder has train2017/)

Expected, of the paper (table 4, Mask R-CNN, schedule 3x): box AP 46.8, mask AP 42.1; from scratch
40.7 and 37.1, pretrained on ImageNet with labels 45.5 and 41.0. Not trained here.
Cost: 5.2e19 useful FLOPs: 11 h on TPU v5e-16 or 5 h on 8 H100 at 40 % of peak.
"""

import ml_collections

from ssl_jax import config


def get_config(arg=''):
    c = config.recipe('splitmask_vitb16')
    c.name = 'splitmask_vitb16_coco'

    c.total_epochs = 3000.0  # the rule gives 3249
    c.warmup_epochs = 100.0

    train = dict(source='folder', path=arg or 'coco', split='train2017')
    c.data.train = ml_collections.ConfigDict(train)
    c.data.eval_train = c.data.eval_test = None
    c.eval.every_epochs = 300.0

    return c
