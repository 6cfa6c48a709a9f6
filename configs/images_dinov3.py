# SPDX-License-Identifier: Apache-2.0
"""DINOv3 on your images: everything None is chosen from them and from the devices, and printed.

The small-data preset of DINOv2, see `small` of `_dinov2.py`, with the encoder of DINOv3. To go on
from published weights take `continue_dinov3_vits16`. Watch `teacher_entropy` and the k-NN scores
(with labelled images in data.eval_train and data.eval_test); a collapse is named in the log.

Command:
  ssl_jax pretrain --data DIR --method dinov3 --workdir runs/mine [method.img_size=128 ...]

Cost: about four minutes on a CPU; on accelerators 400 to 1600 passes over the images.
"""

import ml_collections

from ssl_jax import config


def get_config(arg=''):
    del arg
    dinov2 = config.shared('dinov2')
    c = config.default('dinov3')
    c.name = 'images_dinov3'

    c.infer = True
    c.batch_size = None
    c.dtype = None

    m = c.method
    dinov2.small(m)
    m.final_momentum_teacher = 1.0
    m.size = None
    m.patch_size = None
    m.img_size = None
    m.local_size = None
    m.group_size = None
    m.dino_out_dim = None
    m.ibot_out_dim = None

    dinov2.optim(c.optim)
    c.optim.lr = None
    c.optim.base_lr = 1.5e-4
    c.optim.warm_freeze = ()  # few prototypes need no care

    c.data.train = ml_collections.ConfigDict(dict(source='', path=''))

    return c
