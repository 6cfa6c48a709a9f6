# SPDX-License-Identifier: Apache-2.0
"""A run small enough to be made dozens of times in a test suite."""

from unittest import mock

import jax
import ml_collections

from ssl_jax import config as config_lib
from ssl_jax import methods, optim
from ssl_jax import step as step_lib
from ssl_jax.run import checkpoint, checksums


def config(**fields):
    """A locked config of a two-block MAE on 64 rendered scenes; fields as a__b=value."""
    c = base('mae')
    c.method.update(decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2, drop_path=0.2)
    return changed(c, fields)


def base(method):
    """An unlocked config of a two-block encoder on 64 rendered scenes, the defaults otherwise."""
    c = config_lib.default(method)
    c.name = 'tiny'
    c.batch_size = 16
    c.total_steps = 8
    c.warmup_steps = 2
    c.method.update(size=None, embed_dim=32, depth=2, num_heads=4, patch_size=8, img_size=32)
    c.optim.lr = 2e-3
    c.data.train = ml_collections.ConfigDict(dict(source='scenes', n=64, size=32, split='train'))
    c.data.num_threads = 2
    c.eval.tasks.pictures = None
    c.eval.tasks.knn = None
    c.eval.tasks.seg = None
    c.log.every_steps = 1
    c.log.tensorboard = False
    c.compile_cache = False
    return c


def changed(c, fields):
    """`c` locked, with fields given as a__b=value."""
    for name, value in fields.items():
        *groups, key = name.split('__')
        node = c
        for group in groups:
            node = node[group]
        with node.ignore_type():
            node[key] = value
    return config_lib.lock(c)


def dinov2(method='dinov2', **fields):
    """The same for DINOv2, with masks and dropped images; no photometry, it compiles for long."""
    c = base(method)
    shared = config_lib.shared('dinov2')
    shared.small(c.method)
    shared.optim(c.optim)
    c.method.update(
        local_size=16,
        n_local_crops=2,
        group_size=8,
        drop_path=0.3,
        num_register_tokens=1,
        **({'pos_resize': 'antialias'} if 'pos_resize' in c.method else {}),
        dino_out_dim=64,
        ibot_out_dim=32,
        dino_bottleneck_dim=16,
        ibot_bottleneck_dim=16,
        head_hidden_dim=32,
        centering='centering',
        jitter_prob=0.0,
        grey_prob=0.0,
        blur='none',
        solarize=(0.0, 0.0, 0.0),
    )
    c.optim.warm_freeze_steps = 3
    c.optim.lr = 1e-3
    return changed(c, fields)


def save(config, workdir, seed=0, step=0, change=lambda params: params, unseen=False):
    """Saves the (changed) fresh state of a run as that of `step`; returns its parameters.

    Args:
      unseen: also numbers that are not finite, as an earlier version did.
    """
    method = methods.make(config)
    params, extra = jax.jit(method.init)(jax.random.key(seed))
    params = change(params)
    tx, _ = optim.make(config.optim, params)
    saved = checkpoint.Checkpointer(workdir / 'checkpoints')
    state, scan = step_lib.TrainState.create(params, extra, tx), checksums.scan
    with mock.patch.object(checksums, 'scan', lambda x: (scan(x)[0], {}) if unseen else scan(x)):
        saved.save(step, state, {'config': config.to_dict()})
    saved.close()
    return jax.device_get(params)
