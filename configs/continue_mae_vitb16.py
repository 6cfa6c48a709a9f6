# SPDX-License-Identifier: Apache-2.0
"""Continue MAE from a released ViT-B/16 encoder on your images, 224 px.

The encoder is `init_from`, by default the official file in the working directory; a run, an
imported or exported folder, an HF or timm folder do as well. Most of them lack the decoder, and a
fresh one would send noise into good weights. So it is warmed alone: for the first 5 of 100 epochs
the encoder keeps every bit and its moments wait (`optim.warm_freeze`). It joins while the rate
still rises, at half the peak, with a quarter of the decoder's rate for its norm, and 0.75 times
less for each block below. Where the file has the decoder too, it is taken, and nothing needs
warming: optim.warm_freeze=() optim.warm_freeze_epochs=None.

Command:
  ssl_jax pretrain --config continue_mae_vitb16 --data DIR --workdir runs/mine \\
      init_from=mae_pretrain_vit_base.pth

Expected: not measured; compare with `ssl_jax eval` on a labelled set before and after.
Cost: 5.8e15 useful FLOPs per 1,000 images for the 100 epochs: 15 s on one H100 at 40 % of peak.
"""

from ssl_jax import config


def get_config(arg=''):
    c = config.default()
    c.name = 'continue_mae_vitb16'
    c.init_from = arg or 'mae_pretrain_vit_base.pth'

    c.total_epochs = 100.0
    c.warmup_epochs = 10.0
    c.batch_size = 1024
    c.dtype = 'bfloat16'
    c.remat = 'dots'

    c.method.size = 'B'
    c.method.patch_size = 16
    c.method.img_size = 224

    c.optim.base_lr = 1.5e-4  # 6e-4 at batch 1024, for the decoder
    c.optim.warm_freeze = ('^encoder/',)
    c.optim.warm_freeze_epochs = 5.0
    c.optim.warm_freeze_moments = False
    c.optim.lr_mult = (('^encoder/', 0.25),)
    c.optim.layer_decay = 0.75

    c.eval.every_epochs = 10.0

    return c
