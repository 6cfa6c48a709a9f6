# SPDX-License-Identifier: Apache-2.0
"""Pixio ViT-B/16 distilled from ViT-5B/16, 256 px: `pixio_vitl16_distill` with a smaller student.

The official code trains L and B at once on the same batches, to share the teacher's work; here each
is a run of its own.

Command:
  python -m ssl_jax.train --config=configs/pixio_vitb16_distill.py:/data/web \\
    --config.method.teacher=pixio_vit5b16.pth --workdir=gs://bucket/run

Not trained here.
Cost: 1.6e22 useful FLOPs, most of them the teacher's: 96 h on 256 TPU v5p chips at 40 % of peak.
"""

from ssl_jax import config


def get_config(arg=''):
    c = config.recipe('pixio_vitl16_distill', arg)
    c.name = 'pixio_vitb16_distill'
    c.method.size = 'B'
    return c
