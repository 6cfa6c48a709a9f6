# SPDX-License-Identifier: Apache-2.0
"""The classifier against MAE's official `models_vit.py`: features, logits, loss, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import config as config_lib
from ssl_jax import methods
from ssl_jax.interop import tables
from ssl_jax.models import pos_embed
from ssl_jax.objectives import losses

PROBE = 2.0**-9
# What writes to the residual stream; the epsilon probe of the golden set scales these.
WRITES = ('patch_embed.proj', 'pos_embed', 'cls_token', 'attn.proj', 'mlp.fc2')
POOLS = {'cls': 'cls', 'global_pool': 'patch'}
each_pool = pytest.mark.parametrize('name', sorted(POOLS))


@pytest.fixture
def f(golden):
    return golden('mae_vit_classifier')


def make(f, name, scale=None):
    """(method, rows, parameters) with the weights of the file."""
    h, c = f.hyper, config_lib.default('classifier')
    sizes = ('img_size', 'patch_size', 'embed_dim', 'depth', 'num_heads', 'mlp_ratio')
    c.method.update({k: h[k] for k in sizes}, size=None, drop_path=0.0, pool=POOLS[name])
    c.method.update(num_classes=h['num_classes'], eps=h['ln_eps'])
    method = methods.make(c)
    rows = tables.encoder(method.vit)
    heads = [('head', 'kernel', 'linear')]
    heads += [('fc_norm', 'scale', 'same')] if name == 'global_pool' else []
    for head, weight, how in heads:
        leaves = ((weight, 'weight', how), ('bias', 'bias', 'same'))
        rows += [(f'{head}/{ours}', f'{head}.{key}', how) for ours, key, how in leaves]
    known = {key for _, key, _ in rows if '{i}' not in key} | {'blocks'}
    weights = {k: v for k, v in f.under('w').items() if k in known or k.split('.')[0] in known}
    if scale:
        weights = {k: v * scale if any(w in k for w in WRITES) else v for k, v in weights.items()}
    abstract, _ = jax.eval_shape(method.init, jax.random.key(0))
    return method, rows, tables.from_torch(rows, weights, abstract)


def objective(method, params, images, labels):
    logits = method.forward(params, images)
    return losses.cross_entropy(jax.nn.one_hot(labels, method.num_classes), logits, 1.0).mean()


@each_pool
def test_golden_mae_vit_classifier_features_logits_and_loss_match(f, name):
    method, _, params = make(f, name)
    images, labels = jnp.asarray(f.images()), f['in/labels']

    @jax.jit
    def run(params):
        logits = method.forward(params, images)
        return method.features(params, images), logits, objective(method, params, images, labels)

    for key, value in zip(('features', 'logits', 'ce'), run(params), strict=True):
        f.check(f'out/{key}_{name}', value)


@each_pool
def test_golden_mae_vit_classifier_gradients_match(f, name):
    method, rows, params = make(f, name)
    grad = jax.jit(jax.grad(functools.partial(objective, method)))
    found = tables.to_torch(rows, grad(params, jnp.asarray(f.images()), f['in/labels']))
    want = f.under(f'grad_{name}')
    assert want
    for key in want:
        f.check(f'grad_{name}/{key}', found[key])
    assert np.any(found['norm.weight']) == (name == 'cls')  # which has no use in the other


@each_pool
def test_golden_mae_vit_classifier_every_epsilon_matches(f, name):
    method, _, params = make(f, name, PROBE)
    f.check(f'out/eps_probe/features_{name}', jax.jit(method.features)(params, f.images()))


def test_golden_mae_vit_classifier_position_table_is_resized_as_for_fine_tuning(f):
    for side in f.hyper['resize_to']:
        got = pos_embed.resize(jnp.asarray(f['w/pos_embed']), (side, side), 1, 'bicubic')
        f.check(f'out/pos_embed_resized_{side}', got)
