# SPDX-License-Identifier: Apache-2.0
"""LeJEPA on your images: everything None is chosen from them and from the devices, and printed.

The small-data preset, see `small` of `_lejepa.py`. The choices are `ssl_jax.config.infer`; a field
that you set is kept. Watch `invariance`, which falls, and `embedding_std`, which goes towards 1; a
collapse is named in the log. SIGReg tests the distribution of a batch: give it 128 images or more
where memory allows. For a few thousand images try method.regularizer=visreg
method.sigreg_weight=0.6.

Command:
  ssl_jax pretrain --data DIR --method lejepa --workdir runs/mine [method.img_size=128 ...]

Cost: about four minutes on a CPU; on accelerators 400 to 1600 passes over the images.
"""

import ml_collections

from ssl_jax import config


def get_config(arg=''):
    del arg
    lejepa = config.shared('lejepa')
    c = config.default('lejepa')
    c.name = 'images_lejepa'

    c.infer = True
    c.batch_size = None
    c.dtype = None

    m = c.method
    lejepa.small(m)
    m.size = None
    m.patch_size = None
    m.img_size = None
    m.local_size = None

    lejepa.optim(c.optim)
    c.optim.lr = None

    c.data.train = ml_collections.ConfigDict(dict(source='', path=''))

    return c
