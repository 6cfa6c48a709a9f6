# SPDX-License-Identifier: Apache-2.0
"""Optimizer and length of I-JEPA."""

from ssl_jax import config


def optim(o):
    """I-JEPA's AdamW, in place in `config.optim`; the rate is the recipe's."""
    o.b2 = 0.999
    o.weight_decay, o.weight_decay_end = 0.04, 0.4


def imagenet(c, arg):
    """What the released runs on ImageNet-1k share, in place in `config`."""
    data = config.shared('data')
    c.batch_size = 2048
    c.dtype = 'bfloat16'
    c.remat = 'dots'
    c.mesh.data, c.mesh.fsdp = -1, -1

    c.method.img_size = 224
    c.method.predictor_dim = 384
    c.method.predictor_depth = 12

    optim(c.optim)
    c.optim.lr = 1e-3
    c.optim.min_lr = 1e-6

    c.data.train, c.data.eval_train, c.data.eval_test = data.imagenet(arg)
    c.eval.every_epochs = 20.0
    c.eval.max_train = 130_000
    c.eval.max_test = 10_000
