# SPDX-License-Identifier: Apache-2.0
"""DINOv2 on your images: everything None is chosen from them and from the devices, and printed.

The small-data preset, see `small` of `_dinov2.py`. The choices are `ssl_jax.config.infer`; a field
that you set is kept. Watch `teacher_entropy` and the k-NN scores (with labelled images in
data.eval_train and data.eval_test): unlike a reconstruction loss, this loss alone does not show
whether anything is learned. A collapse is named in the log.

If each image is one centred object that fills it (cells, products, galaxies), a local crop often
shows a part that any object could have, or background, and need not say which object it is: try
method.n_local_crops=0, which leaves the two global crops and the masked patches.

Command:
  ssl_jax pretrain --data DIR --method dinov2 --workdir runs/mine [method.img_size=128 ...]
  ssl_jax pretrain --data DIR --method dinov2 --workdir runs/mine method.n_local_crops=0

Cost: about four minutes on a CPU; on accelerators 400 to 1600 passes over the images.
"""

import ml_collections

from ssl_jax import config


def get_config(arg=''):
    del arg
    dinov2 = config.shared('dinov2')
    c = config.default('dinov2')
    c.name = 'images_dinov2'

    c.infer = True
    c.batch_size = None
    c.dtype = None

    m = c.method
    dinov2.small(m)
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
