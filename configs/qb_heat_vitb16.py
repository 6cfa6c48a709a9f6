# SPDX-License-Identifier: Apache-2.0
"""QB-Heat (experimental) with ViT-B/16 on ImageNet-1k, 224 px: MAE's recipe, not the paper's.

Paper: Self-Supervised Learning based on Heat Equation, arXiv 2211.13228; no public code, and its
networks are small Mobile-Formers. What `methods/qb_heat.py` chose where the paper leaves it open is
listed there. Optimizer, crops and schedule are those of `mae_vitb16`: batch 4096, base_lr 1.5e-4,
40 of 800 epochs of warm-up, AdamW (0.9, 0.95), decay 0.05, random crop (0.2, 1) and flip.

Command:
  python -m ssl_jax.train --config=configs/qb_heat_vitb16.py:/data/imagenet \
      --workdir=gs://bucket/run
  (the folder has train/ and val/; without it, TFDS' imagenet2012 from TFDS_DATA_DIR)

Expected: unknown, not run here. The paper has no ViT; of its network of 5.8 M parameters a linear
probe is level with MoCo-v2, and with one transformer block before the classifier it has 65.6 % to
MoCo-v2's 52.9. So compare by the attentive probe too, `ssl_jax eval --tasks linear,attentive`.
Cost: 4.5e19 useful FLOPs: 10 h on TPU v5e-16 or 4 h on 8 H100 at 40 % of peak.
"""

from ssl_jax import config


def get_config(arg=''):
    data = config.shared('data')
    c = config.default('qb_heat')
    c.name = 'qb_heat_vitb16'

    c.total_epochs = 800.0
    c.warmup_epochs = 40.0
    c.batch_size = 4096
    c.dtype = 'bfloat16'
    c.remat = 'dots'

    c.method.size = 'B'
    c.method.patch_size = 16
    c.method.img_size = 224

    c.optim.base_lr = 1.5e-4  # 2.4e-3 at batch 4096
    c.optim.b2 = 0.95
    c.optim.weight_decay = 0.05

    c.data.train, c.data.eval_train, c.data.eval_test = data.imagenet(arg)
    c.eval.every_epochs = 20.0
    c.eval.max_train = 130_000
    c.eval.max_test = 10_000

    return c
