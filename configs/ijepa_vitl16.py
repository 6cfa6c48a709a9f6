# SPDX-License-Identifier: Apache-2.0
"""I-JEPA ViT-L/16 on ImageNet-1k, 224 px.

Paper: Self-Supervised Learning from Images with a Joint-Embedding Predictive Architecture, arXiv
2301.08243, appendix: batch 2048, rate 1e-3 after 15 of 600 epochs of warm-up, cosine to 1e-6, decay
0.04 to 0.4, AdamW, momentum of the target encoder 0.996 to 1 linearly, random crop (0.3, 1) without
flip, a predictor of 12 blocks of 384 channels. Differences: the warm-up is from 0, there from 1e-4;
the decay follows a cosine as in the code, in the text a line; the encoder sees 52 patches of the
context at random, there the first of them (see `methods/ijepa.py`); target blocks have 30 patches,
there 30 to 40.

Command:
  python -m ssl_jax.train --config=configs/ijepa_vitl16.py:/data/imagenet --workdir=gs://bucket/run
  (the folder has train/ and val/; without it, TFDS' imagenet2012 from TFDS_DATA_DIR)

Expected, of the published model: linear probe 77.5 %; with 1 % of the labels 69.4 %. Not run here.
Cost: 2.0e20 useful FLOPs for 600 epochs: 44 h on TPU v5e-16 or 18 h on 8 H100 at 40 % of
peak.
"""

from ssl_jax import config


def get_config(arg=''):
    c = config.default('ijepa')
    c.name = 'ijepa_vitl16'

    c.total_epochs = 600.0
    c.warmup_epochs = 15.0

    c.method.size = 'L'
    c.method.patch_size = 16

    config.shared('ijepa').imagenet(c, arg)

    return c
