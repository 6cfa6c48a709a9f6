# SPDX-License-Identifier: Apache-2.0
"""QB-Heat (experimental) on your images: what is None is chosen from them and the devices.

The choices are `ssl_jax.config.infer`, printed at the start; a field that you set is kept. What
`methods/qb_heat.py` adds to the paper is listed there. The pictures (and, with labelled images in
data.eval_train and data.eval_test, the k-NN scores) show whether it learns.

Command:
  ssl_jax pretrain --data DIR --method qb_heat --workdir runs/mine [method.img_size=128 ...]

Cost: about four minutes on a CPU; on accelerators 400 to 1600 passes over the images.
"""

import ml_collections

from ssl_jax import config


def get_config(arg=''):
    del arg
    c = config.default('qb_heat')
    c.name = 'images_qb_heat'

    c.infer = True
    c.batch_size = None
    c.dtype = None

    c.method.size = None
    c.method.patch_size = None
    c.method.img_size = None
    c.method.decoder_embed_dim = None
    c.method.decoder_depth = None
    c.method.decoder_num_heads = None

    c.data.train = ml_collections.ConfigDict(dict(source='', path=''))

    return c
