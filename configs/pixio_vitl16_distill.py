# SPDX-License-Identifier: Apache-2.0
"""Pixio ViT-L/16 distilled from ViT-5B/16, 256 px.

Paper: Pixio, arXiv 2512.15715, section 7.2, and `distillation/` of its code: class and patch tokens
of the student, through a projection, align by cosine with the last block of the frozen teacher
before its norm. L and B see whole images, stochastic depth 0.1, lr 1e-3 as it is at batch 8,192, 10
% of the steps warm-up. The scripts run 642,000 steps; the paper says 500,000.

Command:
  python -m ssl_jax.train --config=configs/pixio_vitl16_distill.py:/data/web \\
    --config.method.teacher=pixio_vit5b16.pth --workdir=gs://bucket/run
  (a folder of images; the teacher is an official file, an HF folder, or a run)

Expected, of the published model: k-NN on ImageNet-1k and dense results in the paper's table 1. Not
trained here. Cost: 1.8e22 useful FLOPs, most of them the teacher's: 107 h on 256 TPU v5p chips at
40 % of peak.
"""

from ssl_jax import config


def get_config(arg=''):
    c = config.default('distill')
    c.name = 'pixio_vitl16_distill'

    c.total_steps = 642_000
    c.warmup_steps = 64_200
    c.batch_size = 8192
    c.dtype = 'bfloat16'
    c.remat = 'dots'
    c.mesh.data, c.mesh.fsdp = -1, -1

    m = c.method
    m.size = 'L'
    m.teacher = 'pixio_vit5b16.pth'
    m.teacher_size = '5B'
    m.drop_path = 0.1

    c.optim.lr = 1e-3
    c.optim.weight_decay = 0.05

    c.data.train.update(source='folder', path=arg or '/data/web')
    c.eval.every_steps = 20_000
    c.eval.tasks.pictures = None

    return c
