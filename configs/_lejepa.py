# SPDX-License-Identifier: Apache-2.0
"""Optimizer and presets of LeJEPA."""


def optim(o, lr=5e-4):
    """LeJEPA's optimizer, in place in `config.optim`: a rate that the batch does not scale."""
    o.lr = lr
    o.min_lr = lr / 1000
    o.b2 = 0.999
    o.weight_decay = 0.05


def small(m):
    """For thousands of images instead of millions, in place in `config.method`.

    Fewer and larger local crops, since small images have no room for 5 % of their area; a smaller
    projector and fewer directions, which on a CPU would take longer than a small encoder; no
    stochastic depth: small models underfit.
    """
    m.drop_path = 0.0
    m.n_local_crops = 4
    m.global_crops_scale = (0.4, 1.0)
    m.local_crops_scale = (0.1, 0.4)
    m.num_slices = 256
    m.proj_dim = 64
    m.proj_hidden_dim = 512
