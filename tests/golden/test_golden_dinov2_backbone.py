# SPDX-License-Identifier: Apache-2.0
"""The shared ViT against the official DINOv2 backbones: registers, SwiGLU, masks, every size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden import pos_resize
from ssl_jax.interop import tables
from ssl_jax.models import pos_embed, vit

PROBE = 2.0**-9
WRITES = ('patch_embed.proj', 'pos_embed', 'cls_token', 'mask_token', 'register_tokens')
WRITES += ('attn.proj', 'mlp.fc2', 'mlp.w3')


def build(f, weights):
    """(ViT, params) of a golden file; the position rule follows the registers, as released."""
    h = f.hyper
    model = vit.ViT(
        embed_dim=h['embed_dim'],
        depth=h['depth'],
        num_heads=h['num_heads'],
        patch_size=h['patch_size'],
        img_size=h['img_size'],
        mlp_ratio=h['mlp_ratio'],
        num_register_tokens=h['num_register_tokens'],
        ffn='mlp' if h['ffn_layer'] == 'mlp' else 'swiglu',
        layer_scale=1.0,
        mask_token=True,
        pos_resize=pos_resize(h),
        init_scheme='dinov2',
    )
    abstract = jax.eval_shape(functools.partial(vit.init_params, model), jax.random.key(0))
    weights = {tables.plain(k): v for k, v in weights.items()}
    return model, tables.from_torch(tables.encoder(model, ours=''), weights, abstract)


def run(model, params, images, capture=(), **kw):
    apply = functools.partial(model.apply, capture=capture)
    return jax.jit(apply)({'params': params}, images, **kw)


def check_tokens(f, where, out):
    r = f.hyper['num_register_tokens']
    f.check(f'{where}/x_norm_clstoken', out['cls_tokens'][:, 0])
    f.check(f'{where}/x_norm_patchtokens', out['patch_tokens'])
    if r and f'{where}/x_norm_regtokens' in f.keys:
        f.check(f'{where}/x_norm_regtokens', out['reg_tokens'])
    if f'{where}/x_prenorm' in f.keys:
        f.check(f'{where}/x_prenorm', out['pre_norm'])


def check_sizes(f):
    model, params = build(f, f.under('w'))
    for h, w in f.hyper['sizes']:
        out = run(model, params, jnp.asarray(f.images(f'in/images_{h}x{w}')))
        check_tokens(f, f'out/{h}x{w}', out)
        grid = (h // model.patch_size, w // model.patch_size)
        table = pos_embed.resize(params['pos_embed'], grid, 1, model.pos_resize)
        f.check(f'out/{h}x{w}/pos_embed', table)
        if (h, w) == tuple(f.hyper['sizes'][0]):
            f.check('out/plain_call', out['cls_tokens'][:, 0])


def check_masked(f):
    model, params = build(f, f.under('w'))
    h, w = f.hyper['sizes'][0]
    images = jnp.asarray(f.images(f'in/images_{h}x{w}'))
    mask = jnp.asarray(f['in/masks'])
    check_tokens(f, 'out/masked', run(model, params, images, mask=mask))


def check_gradients(f):
    """Into the position table (through the resize) and the patch embedding."""
    model, params = build(f, f.under('w'))
    for h, w in f.hyper['sizes']:
        images = jnp.asarray(f.images(f'in/images_{h}x{w}'))
        cotangent = jnp.asarray(f[f'in/cotangent_{h}x{w}'])

        def value(params, images=images, cotangent=cotangent):
            out = model.apply({'params': params}, images)
            return (out['patch_tokens'] * cotangent).sum()

        grads = tables.to_torch(tables.encoder(model, ours=''), jax.jit(jax.grad(value))(params))
        for name in f.under(f'grad/{h}x{w}'):
            f.check(f'grad/{h}x{w}/{name}', grads[name])


def check_intermediate(f):
    model, params = build(f, f.under('w'))
    h, w = f.hyper['sizes'][0]
    images = jnp.asarray(f.images(f'in/images_{h}x{w}'))
    ids = tuple(f.hyper['layer_list'])
    skip = 1 + f.hyper['num_register_tokens']
    out = run(model, params, images, capture=ids)
    for i, block in enumerate(out['blocks']):
        f.check(f'out/intermediate_list_nonorm/{i}', block[:, skip:])
    last = tuple(range(model.depth - 2, model.depth))
    out = run(model, params, images, capture=last)
    for i, block in enumerate(out['blocks']):
        normed = vit.final_norm(params, block)
        f.check(f'out/intermediate_last2/{i}/cls', normed[:, 0])
        where = f'out/intermediate_last2/{i}/patches_reshaped'
        f.check(where, as_map(normed[:, skip:], h // model.patch_size))
    h, w = f.hyper['sizes'][2]
    out = run(model, params, jnp.asarray(f.images(f'in/images_{h}x{w}')))
    where = 'out/intermediate_nonsquare/0'
    f.check(where, as_map(out['patch_tokens'], h // model.patch_size))


def as_map(tokens, rows):
    """Patch tokens (B, N, D) as the official maps (B, D, rows, N / rows)."""
    return np.moveaxis(tokens.reshape(len(tokens), rows, -1, tokens.shape[-1]), -1, 1)


def check_eps_probe(f):
    weights = f.under('w')
    weights = {k: v * PROBE if any(w in k for w in WRITES) else v for k, v in weights.items()}
    model, params = build(f, weights)
    h, w = f.hyper['sizes'][0]
    out = run(model, params, jnp.asarray(f.images(f'in/images_{h}x{w}')))
    check_tokens(f, 'out/eps_probe', out)


CHECKS = pytest.mark.parametrize(
    'check',
    [check_sizes, check_masked, check_gradients, check_intermediate, check_eps_probe],
    ids=lambda c: c.__name__.removeprefix('check_'),
)


@CHECKS
def test_golden_dinov2_backbone_mlp_matches(golden, check):
    check(golden('dinov2_backbone_mlp'))


@CHECKS
def test_golden_dinov2_backbone_mlp_reg4_matches(golden, check):
    check(golden('dinov2_backbone_mlp_reg4'))


@CHECKS
def test_golden_dinov2_backbone_swiglu_chunked_matches(golden, check):
    check(golden('dinov2_backbone_swiglu_chunked'))
