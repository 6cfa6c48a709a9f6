# SPDX-License-Identifier: Apache-2.0
"""I-JEPA on your images: everything None is chosen from them and from the devices, and printed.

The choices are `ssl_jax.config.infer`; a field that you set is kept. The loss compares with a
moving target and does not show whether anything is learned: watch `target_std_images`, which falls
to 0 in a collapse (named in the log), and, with labelled images in data.eval_train and
data.eval_test, the k-NN scores.

Command:
  ssl_jax pretrain --data DIR --method ijepa --workdir runs/mine [method.img_size=128 ...]

Cost: about four minutes on a CPU; on accelerators 400 to 1600 passes over the images.
"""

import ml_collections

from ssl_jax import config


def get_config(arg=''):
    del arg
    c = config.default('ijepa')
    c.name = 'images_ijepa'

    c.infer = True
    c.batch_size = None
    c.dtype = None

    c.method.size = None
    c.method.patch_size = None
    c.method.img_size = None
    c.method.predictor_dim = None
    c.method.predictor_depth = None

    config.shared('ijepa').optim(c.optim)

    c.data.train = ml_collections.ConfigDict(dict(source='', path=''))

    return c
