# SPDX-License-Identifier: Apache-2.0
"""I-JEPA ViT-H/14 on ImageNet-1k, 224 px.

Paper: Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture, arXiv
2301.08243; settings of the released `configs/in1k_vith14_ep300.yaml`: batch 2048, rate 1e-3 after
40 of 300 epochs of warm-up, cosine to 1e-6, decay 0.04 to 0.4 along a cosine, AdamW (0.9, 0.999),
momentum of the target encoder 0.996 to 1 linearly, random crop (0.3, 1) without flip, a predictor
of 12 blocks of 384 channels. Differences: the warm-up is from 0, there from 2e-4; the encoder sees
68 patches of the context at random, there the first of them, about 70 (see `methods/ijepa.py`);
target blocks have 42 patches, there 35 to 54.

Command:
  python -m ssl_jax.train --config=configs/ijepa_vith14.py:/data/imagenet --workdir=gs://bucket/run
  (the folder has train/ and val/; without it, TFDS' imagenet2012 from TFDS_DATA_DIR)

Expected, of the published model: linear probe 79.3 %; with 1 % of the labels 73.3 %. Not run here.
Cost: 2.5e20 useful FLOPs for 300 epochs: 55 h on TPU v5e-16 or 22 h on 8 H100 at 40 % of
peak.
"""

from ssl_jax import config


def get_config(arg=''):
    c = config.default('ijepa')
    c.name = 'ijepa_vith14'

    c.total_epochs = 300.0
    c.warmup_epochs = 40.0

    c.method.size = 'H'
    c.method.patch_size = 14

    config.shared('ijepa').imagenet(c, arg)

    return c
