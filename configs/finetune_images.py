# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on any labelled images: batch and length follow from the data and the devices.

The recipe of `ssl_jax finetune --data`. Settings are those of MAE's ViT-B (`finetune_mae_vitb16`)
with the paper's layer decay of 0.75, and a rate that goes with the root of the batch: 2e-3 at 1024.

Command:
  ssl_jax finetune --model runs/mae --data LABELLED --test LABELLED_TOO --workdir runs/classifier

Cost: on a CPU about four minutes, elsewhere 100 epochs.
"""

import ml_collections

from ssl_jax import config


def get_config(arg=''):
    del arg
    finetune = config.shared('finetune')
    c = config.default('classifier')
    c.name = 'finetune_images'

    c.infer = True
    c.batch_size = None
    c.dtype = None

    m = c.method
    m.size = m.patch_size = m.img_size = m.crop_pct = None

    finetune.optim(c.optim)
    c.optim.base_lr, c.optim.scale_batch, c.optim.lr_scaling = 2e-3, 1024, 'sqrt'
    c.optim.layer_decay = 0.75

    c.data.train = ml_collections.ConfigDict(dict(source='', path=''))
    c.eval.tasks.pictures = None

    return c
