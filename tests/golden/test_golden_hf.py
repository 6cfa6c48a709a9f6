# SPDX-License-Identifier: Apache-2.0
"""transformers' own numbers from transformers' own files, and the files back bit-identical."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.interop import layouts
from ssl_jax.methods import mae
from ssl_jax.objectives import losses, masking


@functools.cache
def compiled(vit):
    return jax.jit(functools.partial(vit.apply, capture=tuple(range(vit.depth))))


def build(f):
    """(Weights, params) of a golden file, by its keys and its config."""
    found = layouts.recognise(f.under('w'), f.hyper['resolved_config'])
    return found, layouts.to_ours(found, f.under('w'))


def tokens(out):
    return np.concatenate([out[k] for k in ('cls_tokens', 'reg_tokens', 'patch_tokens')], axis=1)


def run(vit, params, f, key, **kw):
    return compiled(vit)({'params': params['encoder']}, jnp.asarray(f.images(key)), **kw)


def check_back(f):
    found, params = build(f)
    weights = f.under('w')
    back, extra = layouts.to_layout(found, params)
    assert set(back) == set(weights) and not extra
    for name, want in weights.items():
        np.testing.assert_array_equal(back[name], want, err_msg=name)


def check_recognised(f):
    found, _ = build(f)
    config = f.hyper['resolved_config']
    vit = found.vit
    got = (vit.embed_dim, vit.depth, vit.num_heads, vit.patch_size, vit.img_size, vit.eps)
    names = ('hidden_size', 'num_hidden_layers', 'num_attention_heads', 'patch_size', 'image_size')
    assert got == tuple(config[k] for k in (*names, 'layer_norm_eps'))
    assert layouts.family(found).hf_class(found) == f.hyper['class']
    written = layouts.config_json(
        found, **{k: config[k] for k in ('mask_ratio', 'norm_pix_loss') if k in config}
    )
    written.pop('architectures')
    assert written == {k: config.get(k) for k in written}


def check_tokens(f):
    found, params = build(f)
    vit = found.vit
    out = run(vit, params, f, 'in/pixel_values')
    f.check('out/last_hidden_state', tokens(out))
    for i, block in enumerate(out['blocks']):
        f.check(f'out/hidden_states/{i + 1}', block)
    cls = out['cls_tokens']
    f.check('out/pooler_output', cls.mean(axis=1))  # of one token in DINOv2


def check_masked(f):
    found, params = build(f)
    mask = jnp.asarray(f['in/bool_masked_pos'])
    out = run(found.vit, params, f, 'in/pixel_values', mask=mask)
    f.check('out/last_hidden_state_masked', tokens(out))
    f.check('out/pooler_output_masked', out['cls_tokens'][:, 0])
    for i, block in enumerate(out['blocks']):
        f.check(f'out/hidden_states_masked/{i + 1}', block)


def check_other_size(f):
    found, params = build(f)
    # Dinov2Model resizes to the size itself where the official code adds 0.1 to it (quirk H2).
    out = run(found.vit, params, f, 'in/pixel_values_other_size')
    f.check('out/last_hidden_state_other_size', tokens(out))


def checks(*functions):
    return pytest.mark.parametrize(
        'check', functions, ids=lambda c: c.__name__.removeprefix('check_')
    )


@checks(check_back, check_recognised, check_tokens, check_other_size)
def test_golden_hf_PixioModel(golden, check):
    check(golden('hf_PixioModel'))


@checks(check_back, check_recognised, check_tokens, check_masked, check_other_size)
def test_golden_hf_Dinov2Model(golden, check):
    check(golden('hf_Dinov2Model'))


@checks(check_back, check_recognised, check_tokens, check_masked, check_other_size)
def test_golden_hf_Dinov2WithRegistersModel(golden, check):
    check(golden('hf_Dinov2WithRegistersModel'))


@checks(check_back, check_recognised)
def test_golden_hf_ViTMAEForPreTraining(golden, check):
    check(golden('hf_ViTMAEForPreTraining'))


def test_golden_hf_ViTMAEForPreTraining_predicts_and_loses_the_same(golden):
    f = golden('hf_ViTMAEForPreTraining')
    found, params = build(f)
    config = f.hyper['resolved_config']
    method = mae.MAE(
        patch_size=found.vit.patch_size,
        img_size=found.vit.img_size,
        mask_ratio=config['mask_ratio'],
        norm_pix_loss=config['norm_pix_loss'],
    ).with_modules(encoder=found.vit, decoder=found.decoder)
    images = jnp.asarray(f.images('in/pixel_values'))
    mask = masking.from_noise(f['in/noise'], method.grid, method.mask_ratio)
    out = jax.jit(method.forward)(params, images, mask)
    f.check('out/ids_restore', mask.ids_restore)
    np.testing.assert_array_equal(mask.mask, f['out/mask'])
    f.check('out/encoder_last_hidden_state', out['latent'])
    f.check('out/logits', out['pred'])
    f.check('out/loss', losses.masked_mse(out['pred'], method.target(images), mask.mask))


@checks(check_back, check_recognised)
def test_golden_hf_IJepaModel(golden, check):
    check(golden('hf_IJepaModel'))


def test_golden_hf_IJepaModel_gives_the_same_tokens(golden):
    f = golden('hf_IJepaModel')
    found, params = build(f)
    assert found.family == 'ijepa'
    out = run(found.vit, params, f, 'in/pixel_values')
    f.check('out/last_hidden_state', out['patch_tokens'])
    for i, block in enumerate(out['blocks']):
        f.check(f'out/hidden_states/{i + 1}', block)
