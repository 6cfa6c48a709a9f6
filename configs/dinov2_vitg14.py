# SPDX-License-Identifier: Apache-2.0
"""DINOv2 ViT-g/14 (1536 x 40, 1.1 billion parameters): 224 px, 625,000 steps of 3,072 images.

Paper: DINOv2, arXiv 2304.07193, table 16; `configs/train/vitg14.yaml`. All of `dinov2_vitl14` but
the size, and groups of 12, what one of its GPUs held.

Command:
  python -m ssl_jax.train --config=configs/dinov2_vitg14.py:/data/web --workdir=gs://bucket/run
  (a folder of images; labels are not used)

Expected, of the published model (142 million curated images, then 10,000 steps at 518 px): k-NN
83.5 %, linear probe 86.5 % on ImageNet-1k. Not trained here.
Cost: 9.7e21 useful FLOPs: 57 h on 256 TPU v5p chips at 40 % of peak. The paper states 22,016 A100
hours.
"""

from ssl_jax import config


def get_config(arg=''):
    c = config.recipe('dinov2_vitl14', arg)
    c.name = 'dinov2_vitg14'
    c.method.size = 'g'
    c.method.group_size = 12
    return c
