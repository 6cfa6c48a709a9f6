# SPDX-License-Identifier: Apache-2.0
"""MAE and Pixio against the official PyTorch code: forward, losses, every gradient, training."""

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
from ssl_jax.interop.families import mae as mae_family
from ssl_jax.models import patches as patches_lib
from ssl_jax.models import pos_embed, vit
from ssl_jax.objectives import losses, masking
from ssl_jax.run import clock as clock_lib

PROBE = 2.0**-9
# What writes to the residual stream; the epsilon probe of the golden set scales these.
WRITES = ('patch_embed.proj', 'pos_embed', 'cls_token', 'mask_token', 'register_tokens')
WRITES += ('attn.proj', 'mlp.fc2', 'mlp.w3', 'decoder_embed')


def make_method(h, norm_pix_loss=True):
    """The method of a golden file's hyper-parameters."""
    c = config_lib.default()
    pixio = 'n_cls_tokens' in h
    c.method.update(
        size=None,
        embed_dim=h['embed_dim'],
        depth=h['depth'],
        num_heads=h['num_heads'],
        patch_size=h['patch_size'],
        img_size=h['img_size'],
        mlp_ratio=h['mlp_ratio'],
        decoder_embed_dim=h['decoder_embed_dim'],
        decoder_depth=h['decoder_depth'],
        decoder_num_heads=h['decoder_num_heads'],
        num_cls_tokens=h.get('n_cls_tokens', 1),
        pos_embed='learned' if pixio else 'sincos',
        mask_ratio=h['mask_ratio'],
        mask_grid=h.get('mask_grid', 1),
        norm_pix_loss=norm_pix_loss,
        drop_path=h.get('drop_path', 0.0),
        eps=h['ln_eps'],
    )
    return methods.make(c)


def load(method, weights):
    """Official weights through the rename table that export uses."""
    abstract, _ = jax.eval_shape(method.init, jax.random.key(0))
    fixed = layouts.fixed(method)
    return tables.from_torch(mae_family.pretraining_rows(method), weights, abstract, fixed)


def probe(weights):
    return {k: v * PROBE if any(w in k for w in WRITES) else v for k, v in weights.items()}


def forward(f, norm_pix_loss):
    method = make_method(f.hyper, norm_pix_loss)
    grid, h = method.grid, f.hyper
    mask = masking.from_noise(f['in/noise'], grid, h['mask_ratio'], h.get('mask_grid', 1))

    @jax.jit
    def run(params, images):
        out = method.forward(params, images, mask)
        target = method.target(images)
        return losses.masked_mse(out['pred'], target, mask.mask), {**out, 'target': target}

    return method, mask, run


def check_forward(f):
    method, mask, run = forward(f, norm_pix_loss=False)
    params = load(method, f.under('w'))
    loss, out = run(params, f.images())
    f.check('out/loss', loss)
    f.check('out/mask', mask.mask)
    f.check('out/ids_restore', mask.ids_restore)
    for name in ('latent', 'pred', 'target'):
        f.check(f'out/{name}', out[name])


def check_norm_pix_loss(f):
    method, _, run = forward(f, norm_pix_loss=True)
    loss, out = run(load(method, f.under('w')), f.images())
    f.check('out/loss_norm_pix', loss)
    if 'out/target_norm_pix' in f.keys:
        f.check('out/target_norm_pix', out['target'])


def check_gradients(f, prefix, norm_pix_loss):
    method, _, run = forward(f, norm_pix_loss)
    params = load(method, f.under('w'))
    grads = jax.jit(jax.grad(lambda p, x: run(p, x)[0]))(params, f.images())
    grads = tables.to_torch(mae_family.pretraining_rows(method), grads, zero_tables(method))
    want = f.under(prefix)
    assert want, f'no gradients under {prefix}/'
    assert set(grads) - set(want) == set(fixed_keys(method)), 'a trainable parameter has no grad'
    for name in want:
        f.check(f'{prefix}/{name}', grads[name])


def check_eps_probe(f):
    method, _, run = forward(f, norm_pix_loss=True)
    if method.vit.pos_embed == 'sincos':  # the probe scales the fixed tables as well
        fixed = {k: v * PROBE for k, v in layouts.fixed(method).items()}
    else:
        fixed = {}
    rows, weights = mae_family.pretraining_rows(method), probe(f.under('w'))
    abstract, _ = jax.eval_shape(method.init, jax.random.key(0))
    params = tables.from_torch(rows, weights, abstract, fixed)
    real = pos_embed.sincos
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pos_embed, 'sincos', lambda *a: real(*a) * PROBE)
        loss, out = run(params, f.images() * PROBE)
    f.check('out/eps_probe/latent', out['latent'])
    f.check('out/eps_probe/pred', out['pred'])
    f.check('out/eps_probe/loss_norm_pix', loss)


def fixed_keys(method):
    return [key for _, key, how in mae_family.pretraining_rows(method) if how == 'fixed']


def zero_tables(method):
    return {k: np.zeros_like(v) for k, v in layouts.fixed(method).items()}


def check_training(f):
    """All steps with the project's own step, optimizer, decay groups and schedule."""
    h = f.hyper
    method = make_method(h, h['norm_pix_loss'])
    steps, per_epoch = len(f['out/losses']), h['iters_per_epoch']
    c = config_lib.default()
    c.optim.update(
        lr=h['lr'],
        min_lr=h['min_lr'],
        weight_decay=h['weight_decay'],
        b1=h['beta1'],
        b2=h['beta2'],
        eps=h['eps'],
        clip=None,
    )
    params = load(method, f.under('w'))
    c.update(total_steps=h['epochs'] * per_epoch, warmup_steps=h['warmup_epochs'] * per_epoch)
    schedule = optim.schedule(c, clock_lib.Clock.of(c))
    tx, _ = optim.make(c.optim, params)

    # The step's own method, except that images and noise come from the file.
    def loss(params, extra, batch, rng, step):
        mask = masking.from_noise(
            batch['noise'], method.grid, h['mask_ratio'], h.get('mask_grid', 1)
        )
        pred = method.forward(params, batch['image'], mask)['pred']
        return losses.masked_mse(pred, method.target(batch['image']), mask.mask), (extra, {})

    given = types.SimpleNamespace(loss=loss, after_update=method.after_update)
    step = jax.jit(step_lib.make_step(given, tx, schedule, seed=0))
    s = step_lib.TrainState.create(params, {}, tx)
    rows = {'losses': [], 'grad_norms': [], 'lrs': []}
    for i in range(steps):
        batch = {'image': f.images()[i], 'noise': f['in/noise'][i]}
        s, metrics = step(s, batch)
        rows['losses'].append(metrics['loss'])
        rows['grad_norms'].append(metrics['grad_norm'])
        rows['lrs'].append(metrics['lr'])
    f.check('out/losses', np.array(rows['losses']))
    f.check('out/grad_norms', np.array(rows['grad_norms']))
    np.testing.assert_allclose(np.array(rows['lrs']), f['out/lrs'], rtol=1e-6, atol=1e-12)
    final = tables.to_torch(mae_family.pretraining_rows(method), s.params, layouts.fixed(method))
    for name, want in f.under('final').items():
        got = final[name]
        if name.endswith('qkv.bias'):  # key biases have no gradient but noise (quirk A1)
            d = len(want) // 3
            got = np.concatenate([got[:d], want[d : 2 * d], got[2 * d :]])
        f.check(f'final/{name}', got)


def test_golden_mae_forward_matches_official(golden):
    check_forward(golden('mae_forward'))


def test_golden_mae_forward_patch_embedding_matches(golden):
    f = golden('mae_forward')
    method = make_method(f.hyper)
    params = load(method, f.under('w'))['encoder']['patch_embed']
    patches = patches_lib.patchify(jnp.asarray(f.images()), f.hyper['patch_size'])
    embed = vit.PatchEmbed(f.hyper['embed_dim'], jnp.float32, None)
    f.check('out/patch_embed', embed.apply({'params': params}, patches))


def test_golden_mae_forward_unpatchify_inverts_patchify(golden):
    f = golden('mae_forward')
    grid = make_method(f.hyper).grid
    pixels = patches_lib.unpatchify(jnp.asarray(f['out/pred']), grid, f.hyper['patch_size'])
    f.check('out/unpatchify_pred', np.moveaxis(np.asarray(pixels), -1, 1))


def test_golden_mae_forward_norm_pix_loss_matches(golden):
    check_norm_pix_loss(golden('mae_forward'))


@pytest.mark.parametrize('prefix,norm', [('grad', False), ('grad_norm_pix', True)])
def test_golden_mae_forward_every_gradient_matches(golden, prefix, norm):
    check_gradients(golden('mae_forward'), prefix, norm)


def test_golden_mae_forward_every_epsilon_matches(golden):
    check_eps_probe(golden('mae_forward'))


def test_golden_mae_train_trajectory_matches(golden):
    check_training(golden('mae_train'))


def test_golden_mae_schedule_lars_groups_sincos_table_matches(golden):
    f = golden('mae_schedule_lars_groups')
    table = pos_embed.sincos(f.hyper['sincos_dim'], f.hyper['sincos_grid'], num_prefix=1)
    f.check('out/sincos_cls', table[0])


def test_golden_pixio_forward_c3g2_matches_official(golden):
    check_forward(golden('pixio_forward_c3g2'))


def test_golden_pixio_forward_c8g4_matches_official(golden):
    check_forward(golden('pixio_forward_c8g4'))


def test_golden_pixio_forward_c3g2_norm_pix_loss_matches(golden):
    check_norm_pix_loss(golden('pixio_forward_c3g2'))


def test_golden_pixio_forward_c8g4_norm_pix_loss_matches(golden):
    check_norm_pix_loss(golden('pixio_forward_c8g4'))


@pytest.mark.parametrize('prefix,norm', [('grad', False), ('grad_norm_pix', True)])
def test_golden_pixio_forward_c3g2_every_gradient_matches(golden, prefix, norm):
    check_gradients(golden('pixio_forward_c3g2'), prefix, norm)


@pytest.mark.parametrize('prefix,norm', [('grad', False), ('grad_norm_pix', True)])
def test_golden_pixio_forward_c8g4_every_gradient_matches(golden, prefix, norm):
    check_gradients(golden('pixio_forward_c8g4'), prefix, norm)


def test_golden_pixio_forward_c3g2_every_epsilon_matches(golden):
    check_eps_probe(golden('pixio_forward_c3g2'))


def test_golden_pixio_forward_c8g4_every_epsilon_matches(golden):
    check_eps_probe(golden('pixio_forward_c8g4'))


def test_golden_pixio_train_c3g2_trajectory_matches(golden):
    check_training(golden('pixio_train_c3g2'))


def test_golden_pixio_train_c8g4_trajectory_matches(golden):
    check_training(golden('pixio_train_c8g4'))


def pixio_encoder(f, weights):
    """(ViT, params) of the encoder-only file."""
    h = f.hyper
    model = vit.ViT(
        embed_dim=h['embed_dim'],
        depth=h['depth'],
        num_heads=h['num_heads'],
        patch_size=h['patch_size'],
        img_size=h['img_size'],
        mlp_ratio=h['mlp_ratio'],
        num_cls_tokens=h['n_cls_tokens'],
        eps=h['ln_eps'],
    )
    abstract = jax.eval_shape(functools.partial(vit.init_params, model), jax.random.key(0))
    return model, tables.from_torch(tables.encoder(model, ours=''), weights, abstract)


def check_blocks(f, prefix, model, params, images, ids, flat=False):
    c = model.num_cls_tokens
    out = model.apply({'params': params}, images, capture=tuple(ids))
    for i, x in zip(ids, out['blocks'], strict=True):
        normed = vit.final_norm(params, x, model.eps)
        where = prefix if flat else f'{prefix}/block{i}'
        f.check(f'{where}/cls_tokens', x[:, :c])
        f.check(f'{where}/patch_tokens', x[:, c:])
        f.check(f'{where}/cls_tokens_norm', normed[:, :c])
        f.check(f'{where}/patch_tokens_norm', normed[:, c:])


def test_golden_pixio_encoder_features_match_at_every_size(golden):
    f = golden('pixio_encoder')
    model, params = pixio_encoder(f, f.under('w'))
    for h, w in f.hyper['sizes']:
        images = jnp.asarray(f.images(f'in/images_{h}x{w}'))
        stored = {k.split('/')[2] for k in f.keys if k.startswith(f'out/{h}x{w}/')}
        ids = sorted(int(name.removeprefix('block')) for name in stored)
        check_blocks(f, f'out/{h}x{w}', model, params, images, ids)


def test_golden_pixio_encoder_position_table_matches_at_every_size(golden):
    f = golden('pixio_encoder')
    table = jnp.asarray(f['w/pos_embed'])
    for h, w in f.hyper['sizes']:
        p = f.hyper['patch_size']
        got = pos_embed.resize(table, (h // p, w // p), f.hyper['n_cls_tokens'], 'bicubic')
        f.check(f'out/pos_embed_{h}x{w}', got)


def test_golden_pixio_encoder_every_epsilon_matches(golden):
    f = golden('pixio_encoder')
    model, params = pixio_encoder(f, probe(f.under('w')))
    h, w = f.hyper['sizes'][0]
    images = jnp.asarray(f.images(f'in/images_{h}x{w}'))
    check_blocks(f, 'out/eps_probe', model, params, images, [f.hyper['depth'] - 1], flat=True)
