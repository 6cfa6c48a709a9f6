# SPDX-License-Identifier: Apache-2.0
"""I-JEPA against the official PyTorch code: forward, loss, every gradient, training."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import config as config_lib
from ssl_jax import methods, optim
from ssl_jax import step as step_lib
from ssl_jax.interop import layouts, tables
from ssl_jax.interop.families import ijepa as family
from ssl_jax.methods import ijepa
from ssl_jax.models import pos_embed
from ssl_jax.run import clock as clock_lib

PROBE = 2.0**-9
# What writes to the residual stream; the epsilon probe of the golden set scales these.
WRITES = ('patch_embed.proj', 'pos_embed', 'mask_token', 'attn.proj', 'mlp.fc2', 'predictor_embed')


def make_method(h, clock=None):
    c = config_lib.default('ijepa')
    c.method.update(
        size=None,
        **{k: h[k] for k in ('embed_dim', 'depth', 'num_heads', 'patch_size', 'img_size')},
        mlp_ratio=h['mlp_ratio'],
        predictor_dim=h['pred_dim'],
        predictor_depth=h['pred_depth'],
        num_targets=h['npred'],
        momentum=h['ema'][0],
        final_momentum=h['ema'][1],
    )
    return methods.make(c, clock)


def rows(method):
    """Renames of one state dict with the encoder, the predictor and the target encoder."""
    encoder = tables.encoder(method.vit)
    found = [(ours, f'encoder.{key}', how) for ours, key, how in encoder]
    found += [(f'target_{ours}', f'target_encoder.{key}', how) for ours, key, how in encoder]
    return found + [(o, f'predictor.{key}', how) for o, key, how in family.predictor_rows()]


def fixed(method, factor=1.0):
    found = layouts.fixed(method)
    found['target_encoder/pos_embed'] = found['encoder/pos_embed']
    return {k: factor * v for k, v in found.items()}


def load(method, weights, factor=1.0):
    """(params, extra) of official weights; the target encoder is the encoder where none is."""
    weights = dict(weights)
    for name in [k for k in weights if k.startswith('encoder.')]:
        weights.setdefault(f'target_{name}', weights[name])
    params, extra = jax.eval_shape(method.init, jax.random.key(0))
    abstract = {**params, 'target_encoder': extra['target']}
    tree = tables.from_torch(rows(method), weights, abstract, fixed(method, factor))
    return tree, {'target': tree.pop('target_encoder')}


def images(f):
    return jnp.asarray(np.moveaxis(f['in/images'], -3, -1))  # (steps, B, H, W, 3)


def masks(f, i):
    """The official masks of a step; blocks come first there (quirk J1)."""
    return ijepa.Masks(f[f'in/masks_enc/{i}'][0], np.moveaxis(f[f'in/masks_pred/{i}'], 0, 1))


def block_major(x):
    return np.moveaxis(np.asarray(x), 1, 0).reshape(-1, *x.shape[2:])


def context(method, params, x, m):
    return method.vit.apply({'params': params['encoder']}, x, ids_keep=m.context)['patch_tokens']


@functools.cache
def forward(f):
    """(outputs, gradients) on the first batch of a file: one program for several tests."""
    method, x, m = make_method(f.hyper), images(f)[0], masks(f, 0)

    def run(params, extra):
        targets = method.targets(extra, x)
        out = dict(
            target_encoder=method.vit.apply({'params': extra['target']}, x)['patch_tokens'],
            target_normed=targets,
            encoder_unmasked=method.vit.apply({'params': params['encoder']}, x)['patch_tokens'],
            context=context(method, params, x, m),
            targets=ijepa.blocks_of(targets, m.targets),
            predictions=method.predict(params, x, m),
        )
        loss, _ = method.objective(params, extra, x, m)
        return loss, {**out, 'loss': loss}

    run = jax.jit(jax.grad(run, has_aux=True))
    grads, out = run(*load(method, f.under('w')))
    return out, grads


def test_golden_ijepa_forward_matches_official(golden):
    f = golden('ijepa_forward')
    out, _ = forward(f)
    for name in ('target_encoder', 'target_normed', 'encoder_unmasked', 'context', 'loss'):
        f.check(f'out/{name}', out[name])
    for name in ('targets', 'predictions'):
        f.check(f'out/{name}', block_major(out[name]))
    f.check('out/loss_l2', np.square(out['targets'] - out['predictions']).mean())


def test_golden_ijepa_forward_every_gradient_matches(golden):
    f = golden('ijepa_forward')
    method, (_, grads) = make_method(f.hyper), forward(f)
    trained = [row for row in rows(method) if not row[0].startswith('target_')]
    grads = tables.to_torch(trained, grads, fixed(method))
    want = f.under('grad')
    constant = {key for _, key, how in trained if how == 'fixed'}
    assert set(grads) - set(want) == constant, 'a trainable parameter has no gradient'
    for name in want:
        f.check(f'grad/{name}', grads[name])


def test_golden_ijepa_forward_every_epsilon_matches(golden):
    f = golden('ijepa_forward')
    method, x, m = make_method(f.hyper), images(f)[0], masks(f, 0)
    weights = f.under('w')
    probe = {k: v * PROBE if any(w in k for w in WRITES) else v for k, v in weights.items()}
    params, _ = load(method, probe, PROBE)
    real = pos_embed.sincos
    with pytest.MonkeyPatch.context() as patch:  # the probe scales the fixed tables as well
        patch.setattr(pos_embed, 'sincos', lambda *a: real(*a) * PROBE)
        run = jax.jit(lambda p: (context(method, p, x, m), method.predict(p, x, m)))
        tokens, pred = run(params)
    f.check('out/eps_probe/context', tokens)
    f.check('out/eps_probe/predictions', block_major(pred))
    last = ('target_encoder.norm.weight', 'target_encoder.norm.bias')
    _, extra = load(method, {k: v * PROBE if k in last else v for k, v in weights.items()})
    f.check('out/eps_probe/target_normed', jax.jit(method.targets)(extra, x))


def training(f):
    """(config, method, schedule) of a file.

    The official schedules are one step ahead (quirk J2); and the warm-up starts above zero there,
    which `config.optim` cannot say.
    """
    h = f.hyper
    total, warmup = int(h['ipe_scale'] * h['num_epochs'] * h['ipe']), h['warmup'] * h['ipe']
    c = config_lib.default('ijepa')
    c.optim.update(lr=h['lr'], min_lr=h['final_lr'], b2=0.999, clip=None)
    c.optim.update(weight_decay=h['wd'], weight_decay_end=h['final_wd'])
    c.update(total_steps=total, warmup_steps=warmup, batch_size=h['batch'])
    clock = clock_lib.Clock.of(c)
    ours = optim.schedule(c, clock)

    def schedule(step):
        now = ours(step + 1)
        start = h['start_lr'] * jnp.clip(1 - (step + 1) / warmup, 0, 1)
        return {**now, 'lr': now['lr'] + start}

    return c, make_method(h, clock), schedule


def test_golden_ijepa_train_schedules_match(golden):
    f = golden('ijepa_train')
    _, method, schedule = training(f)
    for i, momentum in enumerate(f['out/momentum']):
        now = schedule(i)
        np.testing.assert_allclose(now['lr'], f['out/lr'][i], rtol=1e-6)
        np.testing.assert_allclose(now['weight_decay'], f['out/wd'][i], rtol=1e-12)
        extra = method.after_update({'encoder': 0.0}, {'target': 1.0}, i)
        np.testing.assert_allclose(extra['target'], momentum, rtol=1e-12)


@pytest.mark.slow  # contexts of the file have seven lengths, and each compiles anew
def test_golden_ijepa_train_trajectory_matches(golden):
    """All steps with the project's step, optimizer, decay groups, schedules and average."""
    f = golden('ijepa_train')
    c, method, schedule = training(f)

    def loss(params, extra, batch, rng, step):  # images and masks come from the file
        found = ijepa.Masks(batch['context'], batch['targets'])
        loss, metrics = method.objective(params, extra, batch['image'], found)
        return loss, ({}, metrics)

    params, extra = load(method, f.under('w'))
    given = types.SimpleNamespace(loss=loss, after_update=method.after_update)
    tx, _ = optim.make(c.optim, params)
    step = jax.jit(step_lib.make_step(given, tx, schedule, seed=0))
    state = step_lib.TrainState.create(params, extra, tx)
    losses = []
    for i, x in enumerate(images(f)):
        m = masks(f, i)
        batch = {'image': x, 'context': jnp.asarray(m.context), 'targets': jnp.asarray(m.targets)}
        state, metrics = step(state, batch)
        losses.append(metrics['loss'])
    f.check('out/losses', np.array(losses))
    tree = {**state.params, 'target_encoder': state.extra['target']}
    final = tables.to_torch(rows(method), tree, fixed(method))
    for name, want in f.under('final').items():
        got = final[name]
        if name.endswith('qkv.bias'):  # key biases have no gradient but noise (quirk A1)
            d = len(want) // 3
            got = np.concatenate([got[:d], want[d : 2 * d], got[2 * d :]])
        f.check(f'final/{name}', got)
