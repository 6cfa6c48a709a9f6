# SPDX-License-Identifier: Apache-2.0
"""Pixio on your images: everything None is chosen from them and from the devices, and printed.

The choices are `ssl_jax.config.infer`; a field that you set is kept. The pictures (and, with
labelled images in data.eval_train and data.eval_test, the k-NN scores) show whether it learns.

Command:
  ssl_jax pretrain --data DIR --method pixio --workdir runs/mine [method.img_size=128 ...]

Cost: about four minutes on a CPU; on accelerators 400 to 1600 passes over the images.
"""

import ml_collections

from ssl_jax import config


def get_config(arg=''):
    del arg
    c = config.default()
    c.name = 'images_pixio'

    c.infer = True
    c.batch_size = None
    c.dtype = None

    c.method.size = None
    c.method.patch_size = None
    c.method.img_size = None
    c.method.mask_grid = None
    c.method.num_cls_tokens = 8
    c.method.pos_embed = 'learned'
    c.method.flip = 0.0
    c.method.decoder_embed_dim = None
    c.method.decoder_depth = None
    c.method.decoder_num_heads = None

    c.data.train = ml_collections.ConfigDict(dict(source='', path=''))

    return c
