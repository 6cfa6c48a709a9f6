# SPDX-License-Identifier: Apache-2.0
"""Exports load strictly in transformers and give the same numbers there, masked and at any size."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny_weights
from ssl_jax.interop import files, layouts
from ssl_jax.methods import mae
from ssl_jax.objectives import masking

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

BACKBONES = ['mae', 'mae_odd', 'vit', 'vit_odd', 'pixio', 'pixio_odd']
BACKBONES += ['dinov2', 'dinov2_odd', 'dinov2_reg', 'dinov2_reg_odd']
# Programs that run once: how long XLA thinks about them is what these tests cost.
QUICK = {'xla_backend_optimization_level': 0}


def write(folder, w, params):
    """The folder that an export makes, as far as transformers reads it."""
    folder.mkdir()
    tensors, _ = layouts.to_layout(w, params)
    files.write(folder / 'model.safetensors', tensors, {'format': 'pt'})
    (folder / 'config.json').write_text(json.dumps(layouts.config_json(w)))
    return folder


def load(folder, w):
    """Their model, with every key of the file used and none of the model left out."""
    name = layouts.family(w).hf_class(w)
    kw = {'add_pooling_layer': False} if name == 'ViTModel' else {}
    model, info = getattr(transformers, name).from_pretrained(
        folder, output_loading_info=True, **kw
    )
    for problem in ('missing_keys', 'unexpected_keys', 'mismatched_keys'):
        assert not info[problem], f'{name}: {problem} {info[problem]}'
    return model.eval()


@functools.cache
def exported(name, what, root):
    """(Weights, params, folder, their model), made once."""
    w = tiny_weights.weights(name, 'hf', what)
    params = tiny_weights.params(w)
    folder = write(root / f'{name}_{what}', w, params)
    return w, params, folder, load(folder, w)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    return tmp_path_factory.mktemp('hf')


def torch_images(images):
    return torch.from_numpy(np.moveaxis(images, -1, 1).copy())


@torch.no_grad()
def theirs(model, images, **kw):
    if isinstance(model, transformers.ViTModel):
        kw['interpolate_pos_encoding'] = True
    return model(torch_images(images), **kw).last_hidden_state.numpy()


def ours(vit, params, images, **kw):
    """All tokens after the final norm, in their order: class, registers, patches."""
    out = jax.jit(vit.apply, compiler_options=QUICK)({'params': params['encoder']}, images, **kw)
    return np.concatenate([out['cls_tokens'], out['reg_tokens'], out['patch_tokens']], axis=1)


def their_rule(w):
    """The ViT with the resize rule of their class.

    Dinov2Model (without registers) resizes to the size itself, where the official code adds 0.1 to
    it (golden set, quirk H2), so away from the native size it is not the official model.
    """
    plain = w.family == 'dinov2' and not w.vit.num_register_tokens
    return w.vit.clone(pos_resize='bicubic') if plain else w.vit


@pytest.mark.parametrize('name', BACKBONES)
def test_a_backbone_loads_strictly_and_gives_the_same_tokens_at_every_size(name, root):
    w, params, _, model = exported(name, 'backbone', root)
    for size in tiny_weights.sizes(w.vit):
        images = tiny_weights.images(size)
        tiny_weights.assert_same_tokens(ours(their_rule(w), params, images), theirs(model, images))


def test_dinov2_without_registers_differs_from_transformers_only_off_the_native_size(root):
    w, params, _, model = exported('dinov2', 'backbone', root)
    assert w.vit.pos_resize == 'offset'
    native, other = tiny_weights.sizes(w.vit)[:2]
    images = tiny_weights.images(native)
    tiny_weights.assert_same_tokens(ours(w.vit, params, images), theirs(model, images))
    images = tiny_weights.images(other)
    difference = np.abs(ours(w.vit, params, images) - theirs(model, images)).max()
    assert difference > 1e-3


@pytest.mark.parametrize('name', ['dinov2', 'dinov2_reg_odd'])
def test_masked_patches_give_the_same_tokens(name, root):
    w, params, _, model = exported(name, 'backbone', root)
    for size in tiny_weights.sizes(w.vit):
        images = tiny_weights.images(size)
        n = size[0] * size[1] // w.vit.patch_size**2
        mask = np.random.default_rng(1).random((len(images), n)) < 0.4
        tiny_weights.assert_same_tokens(
            ours(their_rule(w), params, images, mask=jnp.asarray(mask)),
            theirs(model, images, bool_masked_pos=torch.from_numpy(mask)),
        )


@pytest.mark.parametrize('name', ['mae', 'mae_odd'])
def test_a_mae_with_its_decoder_predicts_the_same_pixels_from_the_same_noise(name, root):
    w, params, _, model = exported(name, 'full', root)
    method = mae.MAE(patch_size=w.vit.patch_size, img_size=w.vit.img_size)
    method = method.with_modules(encoder=w.vit, decoder=w.decoder)
    images = tiny_weights.images(tiny_weights.sizes(w.vit)[0])
    noise = np.random.default_rng(2).random((len(images), w.decoder.num_patches), np.float32)
    mask = masking.from_noise(noise, method.grid, model.config.mask_ratio, 1)
    out = jax.jit(method.forward, compiler_options=QUICK)(params, images, mask)
    with torch.no_grad():
        want = model(torch_images(images), noise=torch.from_numpy(noise))
    np.testing.assert_array_equal(mask.mask, want.mask.numpy())
    tiny_weights.assert_same_tokens(out['pred'], want.logits.numpy())


@pytest.mark.parametrize('name', ['mae', 'mae_odd'])
def test_the_encoder_of_a_mae_gives_the_same_visible_tokens_at_every_size(name, root):
    # Their decoder resizes its positions as one long row of patches, which the official code does
    # not have: off the native size only the encoder can be compared.
    w, params, _, model = exported(name, 'full', root)
    for size in tiny_weights.sizes(w.vit):
        images = tiny_weights.images(size)
        grid = (size[0] // w.vit.patch_size, size[1] // w.vit.patch_size)
        noise = np.random.default_rng(3).random((len(images), grid[0] * grid[1]), np.float32)
        mask = masking.from_noise(noise, grid, model.config.mask_ratio, 1)
        noise = torch.from_numpy(noise)
        want = theirs(model.vit, images, noise=noise, interpolate_pos_encoding=True)
        got = ours(w.vit, params, images, ids_keep=mask.ids_keep)
        tiny_weights.assert_same_tokens(got, want)


CASES = [(name, 'backbone') for name in BACKBONES] + [('mae', 'full'), ('mae_odd', 'full')]


@pytest.mark.parametrize('name,what', CASES)
def test_what_transformers_saves_again_comes_back_bit_identical(name, what, root, tmp_path):
    w, params, _, model = exported(name, what, root)
    model.save_pretrained(tmp_path / 'again')
    file = files.read(tmp_path / 'again')
    found = layouts.recognise(file.tensors, file.hints)
    expect_same(w, found)
    back = layouts.to_ours(found, file.tensors)
    jax.tree.map(np.testing.assert_array_equal, back, params)


@pytest.mark.parametrize('name,what', CASES)
def test_a_state_dict_of_their_module_is_read_too(name, what, root):
    w, params, _, model = exported(name, what, root)
    state_dict = {k: v.numpy() for k, v in model.state_dict().items()}
    found = layouts.recognise(state_dict, layouts.config_json(w))
    expect_same(w, found)
    back = layouts.to_ours(found, state_dict)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    again, _ = layouts.to_layout(found, back)
    assert set(again) == set(state_dict)


def expect_same(w, found):
    assert (found.family, found.layout, found.what) == (w.family, 'hf', w.what)
    assert found.vit == their_rule(w) and found.decoder == w.decoder


@pytest.mark.parametrize('name', ['mae', 'dinov2', 'dinov2_reg_odd', 'pixio_odd'])
def test_models_of_tasks_are_read_and_their_heads_named(name, root):
    w, params, _, _ = exported(name, 'backbone', root)
    tensors, _ = layouts.to_layout(w, params)
    prefix = {'mae': 'vit.', 'pixio_odd': 'pixio.'}.get(name, 'dinov2.')
    wrapped = {f'{prefix}{k}': v for k, v in tensors.items()}
    wrapped['classifier.weight'] = np.zeros((10, w.vit.embed_dim), np.float32)
    found = layouts.recognise(wrapped, layouts.config_json(w))
    assert found.prefix == prefix and found.left_out == ('classifier.weight',)
    back = layouts.to_ours(found, wrapped)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_the_config_states_the_epsilon_of_the_norms():
    for name in BACKBONES:
        assert layouts.config_json(tiny_weights.weights(name, 'hf'))['layer_norm_eps'] == 1e-6


def test_a_pooler_is_left_out_and_named(root):
    w, params, folder, _ = exported('vit', 'backbone', root)
    model = transformers.ViTModel.from_pretrained(folder)  # with a pooler of random numbers
    state_dict = {k: v.numpy() for k, v in model.state_dict().items()}
    found = layouts.recognise(state_dict, layouts.config_json(w))
    assert found.left_out == ('pooler.dense.bias', 'pooler.dense.weight')
    assert 'pooler.dense.bias' in layouts.notes(found)[0]
    back = layouts.to_ours(found, state_dict)
    jax.tree.map(np.testing.assert_array_equal, back, params)
