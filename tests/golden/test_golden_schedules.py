# SPDX-License-Identifier: Apache-2.0
"""Learning rates, LARS and parameter groups equal those of the official MAE code."""

import collections

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssl_jax import optim


@pytest.fixture
def mae(golden):
    return golden('mae_schedule_lars_groups')


def schedule(mae):
    h = mae.meta['hyper_parameters']['fine']
    per_epoch = h['iters_per_epoch']
    total, warmup = h['epochs'] * per_epoch, h['warmup_epochs'] * per_epoch
    return optim.lr_schedule(h['lr'], total, warmup, h['min_lr'])


def test_golden_mae_schedule_lars_groups_lr(mae):
    expected = mae['out/lr']
    np.testing.assert_allclose(schedule(mae)(np.arange(len(expected))), expected, rtol=1e-12)


def test_golden_mae_schedule_lars_groups_lr_in_float32(mae):
    expected = mae['out/lr']
    rates = schedule(mae)(jnp.arange(len(expected)))
    assert rates.dtype == jnp.float32
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


def test_golden_mae_schedule_lars_groups_lr_of_a_group_with_half_the_rate(mae):
    expected = mae['out/lr_group_scale_half']
    factor = optim.lr_multipliers({'w': jnp.ones((2, 2))}, lr_mult=(('w', 0.5),))['w']
    rates = float(factor) * schedule(mae)(np.arange(len(expected)))
    np.testing.assert_allclose(rates, expected, rtol=1e-12)


@pytest.mark.parametrize('name', ['w', 'b', 'zero'])
def test_golden_mae_schedule_lars_groups_lars(mae, name):
    h = mae.meta['hyper_parameters']['lars']
    tx = optim.lars(**h)
    p = jnp.asarray(mae[f'in/lars_{name}0'])
    state = tx.init(p)
    trajectory = []
    for grad in mae[f'in/lars_g{name}']:
        updates, state = tx.update(jnp.asarray(grad), state, p)
        p = optax.apply_updates(p, updates)
        trajectory.append(p)
    mae.check(f'out/lars_{name}', jnp.stack(trajectory))


def our_tree(names):
    """Parameters of this library for torch names, and {torch name: (our path, block or None)}."""
    where, depths = {}, collections.Counter()
    for name in names:
        *parents, last = name.split('.')
        block = None
        if parents and parents[0] in optim.STACKS:
            block = int(parents.pop(1))
            depths[parents[0]] = max(depths[parents[0]], block + 1)
        weight = 'scale' if parents and 'norm' in parents[-1] else 'kernel'
        last = weight if last == 'weight' else last
        if parents[:1] not in (['head'], ['fc_norm']):
            decoder = name.startswith(('decoder', 'mask_token'))
            parents = ['decoder' if decoder else 'encoder', *parents]
        where[name] = ((*parents, last), block)
    params = {}
    for path, block in where.values():
        ndim = {'bias': 1, 'scale': 1, 'kernel': 2}.get(path[-1], 3)  # tokens are (1, n, width)
        shape = (4,) * ndim if block is None else (depths[path[1]], *(4,) * ndim)
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = np.zeros(shape, np.float32)
    return params, where


def leaf(tree, path):
    for key in path:
        tree = tree[key]
    return tree


def test_golden_mae_schedule_lars_groups_fine_tuning(mae):
    expected = mae.meta['param_groups_finetune']
    params, where = our_tree(expected)
    decays = optim.decays(params, no_decay=('cls_token$', 'pos_embed$'))
    factors = optim.lr_multipliers(params, layer_decay=mae.meta['layer_decay'])
    weight_decay = max(decay for _, decay in expected.values())
    assert len(expected) > 20
    for name, (lr_scale, decay) in expected.items():
        path, block = where[name]
        factor = leaf(factors, path)
        factor = factor.ravel()[block] if factor.ndim else factor
        assert float(factor) == np.float32(lr_scale), name
        assert weight_decay * leaf(decays, path) == decay, name


def test_golden_mae_schedule_lars_groups_pretraining_decay(mae):
    expected = mae.meta['weight_decay_pretrain']
    params, where = our_tree(expected)
    decays = optim.decays(params)
    weight_decay = max(expected.values())
    assert len(expected) > 20
    for name, decay in expected.items():
        assert weight_decay * leaf(decays, where[name][0]) == decay, name
