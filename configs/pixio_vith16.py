# SPDX-License-Identifier: Apache-2.0
"""Pixio ViT-H/16 (enc 1280x32, dec 512x32), 256 px: the ImageNet recipe.

Paper: Pixio, arXiv 2512.15715, and `pretraining/` of its code (table 10 and scripts): 5.26 billion
images in batches of 8,192, 10 % of it warm-up. Learning rate 8e-4 with MAE's cosine, AdamW (0.9,
0.95), decay 0.05 on position tables too, drop path 0.4, crop (0.2, 1) without flip, 75 % masked in
squares of 4 x 4 patches, 8 class tokens, decoder of 32 blocks.

Command:
  python -m ssl_jax.train --config=configs/pixio_vith16.py:/data/imagenet --workdir=gs://bucket/run
  (the folder has train/ and val/; for other images --config.data.train=/data/web)

Expected: no result of exactly this run is published. Nearest, 5.26B images of ImageNet-21k with 4 x
4 masks and 1 class token: k-NN 63.5, NYUv2 depth RMSE 0.387, ADE20K 43.5 (table 14). The released
ViT-H (k-NN 63.2, RMSE 0.268 with DPT) is distilled from the 5B model.
Cost: 2.4e21 useful FLOPs: 28 h on 128 TPU v5p chips or 207 h on 8 H100 at 40 % of peak.
"""

from ssl_jax import config


def get_config(arg=''):
    data = config.shared('data')
    c = config.default()
    c.name = 'pixio_vith16'

    c.total_steps = 642_000
    c.warmup_steps = 64_200
    c.batch_size = 8192
    c.dtype = 'bfloat16'
    c.remat = 'dots'
    c.mesh.data, c.mesh.fsdp = -1, -1

    c.method.size = 'H'
    c.method.patch_size = 16
    c.method.img_size = 256
    c.method.num_cls_tokens = 8
    c.method.pos_embed = 'learned'
    c.method.decoder_embed_dim = 512
    c.method.decoder_depth = 32
    c.method.decoder_num_heads = 16
    c.method.mask_grid = 4
    c.method.norm_pix_loss = True
    c.method.drop_path = 0.4
    c.method.flip = 0.0

    c.optim.base_lr = 2.5e-5  # 8e-4 at this batch
    c.optim.b2 = 0.95
    c.optim.weight_decay = 0.05

    c.data.train, c.data.eval_train, c.data.eval_test = data.imagenet(arg)
    c.eval.every_steps = 32_100
    c.eval.max_train = 130_000
    c.eval.max_test = 10_000

    return c
