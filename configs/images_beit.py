# SPDX-License-Identifier: Apache-2.0
"""BEiT on your images: everything None is chosen from them and from the devices, and printed.

Visual words are random patches of your images, taken before step 0; the run says how evenly they
are used and stops where that is too uneven to be a task. The choices are `ssl_jax.config.infer`; a
field that you set is kept. Watch `mim_gain`, how far the cross-entropy is below that of the word
frequencies alone.

Command:
  ssl_jax pretrain --data DIR --method beit --workdir runs/mine [method.img_size=128 ...]

Cost: about four minutes on a CPU; on accelerators 400 to 1600 passes over the images.
"""

import ml_collections

from ssl_jax import config


def get_config(arg=''):
    del arg
    words = config.shared('words')
    c = config.default('beit')
    c.name = 'images_beit'

    c.infer = True
    c.batch_size = None
    c.dtype = None

    m = c.method
    words.small(m)
    m.size = None
    m.patch_size = None
    m.img_size = None
    m.token_patch_size = None
    m.vocab = None

    words.optim(c.optim)
    c.optim.lr = None

    c.data.train = ml_collections.ConfigDict(dict(source='', path=''))

    return c
