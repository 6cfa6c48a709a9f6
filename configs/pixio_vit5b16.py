# SPDX-License-Identifier: Apache-2.0
"""Pixio ViT-5B/16 (enc 3072x48, dec 512x32), 256 px: the flagship.

Paper: Pixio, arXiv 2512.15715, and `pretraining/` of its code (table 10 and scripts): 21 billion
web images in batches of 16,384, 10 % of it warm-up. The 2 billion curated web images are not
public. Learning rate 8e-4 with MAE's cosine, AdamW (0.9, 0.95), decay 0.05 on position tables too,
drop path 0.4, crop (0.2, 1) without flip, 75 % masked in squares of 4 x 4 patches, 8 class tokens,
decoder of 32 blocks.

Command:
  python -m ssl_jax.train --config=configs/pixio_vit5b16.py:/data/imagenet --workdir=gs://bucket/run
  (the folder has train/ and val/; for other images --config.data.train=/data/web)

Expected: with the paper's web images k-NN 68.4, NYUv2 depth RMSE 0.238 with DPT, ADE20K linear
50.2, VOC linear 82.0 (table 8).
Cost: 5.3e22 useful FLOPs: 630 h on 128 TPU v5p chips at 40 % of peak.
"""

from ssl_jax import config


def get_config(arg=''):
    data = config.shared('data')
    c = config.default()
    c.name = 'pixio_vit5b16'

    c.total_steps = 1_284_000
    c.warmup_steps = 128_400
    c.batch_size = 16384
    c.dtype = 'bfloat16'
    c.remat = 'dots'
    c.mesh.data, c.mesh.fsdp = -1, -1

    c.method.size = '5B'
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

    c.optim.base_lr = 1.25e-5  # 8e-4 at this batch
    c.optim.b2 = 0.95
    c.optim.weight_decay = 0.05

    c.data.train, c.data.eval_train, c.data.eval_test = data.imagenet(arg)
    c.eval.every_steps = 32_100
    c.eval.max_train = 130_000
    c.eval.max_test = 10_000

    return c
