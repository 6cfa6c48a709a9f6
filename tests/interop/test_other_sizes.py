# SPDX-License-Identifier: Apache-2.0
"""At other sizes than their own, weights give what the library gives that they come from."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import interpolate

import tiny
import tiny_weights
from ssl_jax import encoder
from ssl_jax.interop import export, files, layouts
from ssl_jax.models import blocks, pos_embed
from ssl_jax.models import vit as vit_lib
from ssl_jax.run import weights

QUICK = {'xla_backend_optimization_level': 0}
BEIT = vit_lib.ViT(
    36, 3, 3, patch_size=8, img_size=32, pos_embed='none', rel_pos='layer', key_bias=False,
    layer_scale=0.1, init_scheme='beit',
)  # fmt: skip


# The rules


@pytest.mark.parametrize('size', [(3, 3), (6, 6), (2, 5), (7, 4)])
@pytest.mark.parametrize('how', ['bicubic', 'offset', 'antialias'])
def test_positions_are_resized_as_pytorch_does_it_for_each_library(how, size):
    torch = pytest.importorskip('torch')
    table = np.random.default_rng(0).standard_normal((1, 1 + 16, 8)).astype(np.float32)
    grid = torch.from_numpy(table[:, 1:].reshape(1, 4, 4, 8)).permute(0, 3, 1, 2)
    kw = dict(size=size, antialias=how == 'antialias')
    if how == 'offset':  # DINO, iBOT and DINOv2 without registers
        kw = dict(scale_factor=tuple((n + 0.1) / 4 for n in size))
    want = torch.nn.functional.interpolate(grid, mode='bicubic', **kw)
    assert tuple(want.shape[-2:]) == size
    want = want.permute(0, 2, 3, 1).reshape(1, -1, 8).numpy()
    got = np.asarray(pos_embed.resize(jnp.asarray(table), size, 1, how))
    np.testing.assert_allclose(got[:, 1:], want, atol=2e-6)
    np.testing.assert_array_equal(got[:, :1], table[:, :1])


def relative_table(side=4, heads=3):
    shape = ((2 * side - 1) ** 2 + 3, heads)
    return np.random.default_rng(1).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize('size', [(3, 3), (6, 6), (2, 5)])
def test_tables_of_transformers_are_resized_as_pytorch_does_it(size):
    torch = pytest.importorskip('torch')
    table = relative_table()
    grid = torch.from_numpy(table[:-3].reshape(1, 7, 7, 3)).permute(0, 3, 1, 2)
    want = torch.nn.functional.interpolate(grid, size=[2 * n - 1 for n in size], mode='bilinear')
    want = want.permute(0, 2, 3, 1).reshape(-1, 3).numpy()
    got = pos_embed.resize_relative(table, 4, size, 'bilinear')
    np.testing.assert_allclose(got[:-3], want, atol=1e-6)
    np.testing.assert_array_equal(got[-3:], table[-3:])


@pytest.mark.parametrize('size', [(3, 3), (6, 6), (5, 7)])
def test_tables_of_timm_lie_on_straight_lines_between_the_distances_of_beit(size):
    table = relative_table()
    axes = [pos_embed.relative_distances(4, n) for n in size]
    values = table[:-3].reshape(7, 7, 3)
    points = [np.clip(np.arange(1 - n, n), x[0], x[-1]) for n, x in zip(size, axes, strict=True)]
    where = np.stack(np.meshgrid(*points, indexing='ij'), axis=-1)
    want = interpolate.RegularGridInterpolator(axes, values)(where).reshape(-1, 3)
    got = pos_embed.resize_relative(table, 4, size, 'linear')
    np.testing.assert_allclose(got[:-3], want, atol=1e-6)


@pytest.mark.parametrize('how', ['spline', 'linear', 'bilinear'])
def test_on_a_device_the_tables_are_the_same_and_their_own_grid_is_left_alone(how):
    table = relative_table()
    for size in (6, (3, 5)):
        want = pos_embed.resize_relative(table, 4, size, how)
        got = jax.jit(lambda t, size=size: pos_embed.resize_relative(t, 4, size, how))(table)
        np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_array_equal(
        blocks.relative_bias(table, (4, 4), 4, how), blocks.relative_bias(table, (4, 4))
    )


@pytest.mark.parametrize('rel_pos', [pytest.param('shared', marks=pytest.mark.slow), 'layer'])
def test_an_encoder_with_a_resized_table_is_the_encoder_at_another_size(rel_pos):
    vit = BEIT.clone(rel_pos=rel_pos, rel_resize='linear')
    params = tiny_weights.params(layouts.Weights('beit', 'official', 'backbone', vit))['encoder']
    images = tiny_weights.images((48, 48))
    got = vit.apply({'params': params}, images)
    holder = params if rel_pos == 'shared' else params['blocks']['attn']
    table = pos_embed.resize_relative(holder['rel_pos_bias'], 4, 6, 'linear')
    changed = jax.tree.map(lambda x: x, params)
    (changed if rel_pos == 'shared' else changed['blocks']['attn'])['rel_pos_bias'] = table
    want = vit.clone(img_size=48).apply({'params': changed}, images)
    tiny_weights.assert_same_tokens(got['pre_norm'], want['pre_norm'])
    params, changed = jax.device_put((params, changed))
    last = vit_lib.last_attention(vit, params, images)
    np.testing.assert_allclose(
        last, vit_lib.last_attention(vit.clone(img_size=48), changed, images), atol=1e-5
    )


# Files


@functools.cache
def official(name):
    """(Weights, state dict)."""
    w = tiny_weights.weights(name, 'official')
    return w, layouts.to_layout(w, tiny_weights.params(w))[0]


def test_a_flat_file_of_dino_has_its_offset_and_says_how_to_choose(tmp_path):
    torch = pytest.importorskip('torch')
    w, tensors = official('vit')
    files.write(tmp_path / 'dino.safetensors', tensors)
    path = tmp_path / 'dino.safetensors'
    model = encoder.load_model(path, num_heads=4)
    assert model.vit.pos_resize == 'offset'
    images = tiny_weights.images((48, 40))
    scale = tuple((n + 0.1) / 4 for n in (6, 5))
    grid = torch.from_numpy(np.array(tensors['pos_embed'][:, 1:])).reshape(1, 4, 4, 32)
    grid = torch.nn.functional.interpolate(
        grid.permute(0, 3, 1, 2), scale_factor=scale, mode='bicubic'
    )
    # The same network whose own size this is: positions play no other part.
    params = dict(model.params)
    table = grid.permute(0, 2, 3, 1).reshape(1, -1, 32).numpy()
    tables = pos_embed.resize(params['pos_embed'], (6, 5), 1, 'offset')
    np.testing.assert_allclose(tables[:, 1:], table, atol=2e-6)
    text = ' '.join(layouts.notes(weights.header(path, num_heads=4).weights))
    assert 'pos_resize=offset' in text and 'pos_resize=bicubic' in text
    chosen = weights.header(path, num_heads=4, pos_resize='antialias')
    assert chosen.vit.pos_resize == 'antialias' and not layouts.notes(chosen.weights)
    assert w.vit.clone(pos_resize='offset') == model.vit
    assert model(images)['patch_tokens'].shape == (2, 30, 32)


def test_ibot_has_it_too_and_a_classifier_of_deit_has_not():
    _, tensors = official('vit')
    ibot = {**tensors, 'masked_embed': np.ones((1, 32), np.float32)}
    found = layouts.recognise(ibot, {'num_heads': 4})
    assert found.vit.pos_resize == 'offset' and found.vit.mask_token and not found.remarks
    head = {'head.weight': np.ones((5, 32), np.float32), 'head.bias': np.ones(5, np.float32)}
    found = layouts.recognise({**tensors, **head}, {'num_heads': 4})
    assert found.vit.pos_resize == 'bicubic' and not found.remarks
    assert (found.what, found.num_classes, found.pool) == ('full', 5, 'cls')


def hf_folder(folder, w, params, **config):
    """A folder of transformers that says nothing of us."""
    folder.mkdir()
    files.write(folder / 'model.safetensors', layouts.to_layout(w, params)[0], {'format': 'pt'})
    config = {**layouts.config_json(w), **config}
    (folder / 'config.json').write_text(json.dumps(config))
    return folder


def their_tokens(folder, name, images):
    torch, transformers = pytest.importorskip('torch'), pytest.importorskip('transformers')
    model = getattr(transformers, name).from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.from_numpy(np.moveaxis(images, -1, 1).copy()))


def our_tokens(folder, images):
    opened = weights.open_weights(folder)
    run = jax.jit(opened.vit.apply, compiler_options=QUICK)
    out = run({'params': opened.params['encoder']}, images)
    names = ('cls_tokens', 'reg_tokens', 'patch_tokens')
    return out, np.concatenate([out[k] for k in names], axis=1)


@pytest.mark.parametrize(
    'name,kind', [('dinov2', 'Dinov2Model'), ('dinov2_reg_odd', 'Dinov2WithRegistersModel')]
)
def test_a_folder_of_transformers_gives_their_tokens_at_every_size(name, kind, tmp_path):
    w = tiny_weights.weights(name, 'hf')
    folder = hf_folder(tmp_path / 'hf', w, tiny_weights.params(w))
    for size in tiny_weights.sizes(w.vit)[1:]:
        images = tiny_weights.images(size)
        want = their_tokens(folder, kind, images).last_hidden_state.numpy()
        tiny_weights.assert_same_tokens(our_tokens(folder, images)[1], want)


@pytest.mark.parametrize('rel_pos,pooled', [('layer', True), ('shared', False)])
def test_beit_of_transformers_gives_their_tokens_and_pooled_features(rel_pos, pooled, tmp_path):
    w = layouts.Weights('beit', 'hf', 'backbone', BEIT.clone(rel_pos=rel_pos, pooled_norm=pooled))
    folder = hf_folder(tmp_path / 'hf', w, tiny_weights.params(w))
    for size in [(48, 48), (24, 40)]:
        images = tiny_weights.images(size)
        want = their_tokens(folder, 'BeitModel', images)
        out, tokens = our_tokens(folder, images)
        tiny_weights.assert_same_tokens(tokens, want.last_hidden_state.numpy())
        vit = weights.header(folder).vit
        got = encoder.pooled(vit, out)['patch' if pooled else 'cls']
        tiny_weights.assert_same_tokens(got, want.pooler_output.numpy())


@pytest.mark.slow
@pytest.mark.parametrize(
    'arch,args,patch',
    [
        ('vit_small_patch14_dinov2', {}, 14),
        ('vit_small_patch14_reg4_dinov2', {}, 14),
        ('vit_base_patch16_224', dict(global_pool='avg'), 14),
        ('beit_base_patch16_224', {}, 16),
        ('beit_base_patch16_224', dict(use_fc_norm=False), 16),
        ('beit_base_patch16_224', dict(use_abs_pos_emb=True), 16),
    ],
)
def test_timm_gives_the_same_tokens_and_pooled_features_at_every_size(arch, args, patch, tmp_path):
    timm = pytest.importorskip('timm', exc_type=ImportError)
    torch = pytest.importorskip('torch')
    args = dict(img_size=4 * patch, patch_size=patch, embed_dim=32, depth=2, num_heads=4, **args)
    model = timm.create_model(arch, num_classes=0, **args)
    torch.manual_seed(0)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3 if p.ndim == 1 else 0.15)
    tensors = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    files.write(tmp_path / 'model.safetensors', tensors)
    config = dict(architecture=arch, num_classes=0, model_args=args)
    (tmp_path / 'config.json').write_text(json.dumps(config))
    for grid in [(4, 4), (2, 2), (6, 6), (3, 5)]:
        size = tuple(n * patch for n in grid)
        images = tiny_weights.images(size)
        fresh = timm.create_model(arch, num_classes=0, **args).eval()
        fresh.load_state_dict(model.state_dict())
        fresh.set_input_size(img_size=size)
        with torch.no_grad():
            want = fresh.forward_features(torch.from_numpy(np.moveaxis(images, -1, 1).copy()))
            head = fresh.forward_head(want, pre_logits=True)
        out, tokens = our_tokens(tmp_path, images)
        tiny_weights.assert_same_tokens(tokens, want.numpy())
        pooled = encoder.pooled(weights.header(tmp_path).vit, out)
        mean = fresh.global_pool == 'avg'
        tiny_weights.assert_same_tokens(pooled['patch' if mean else 'cls'], head.numpy())


# What is said


def lines_on_other_sizes(opened, to, folder):
    text = (export.export(opened, to, folder) / 'README.md').read_text()
    return [line for line in text.splitlines() if line.startswith('At other sizes than')]


def test_the_card_says_where_another_library_will_differ(tmp_path):
    tiny.save(
        tiny.dinov2(method__num_register_tokens=0, method__pos_resize='offset'), tmp_path / 'r'
    )
    opened = weights.open_run(tmp_path / 'r')
    assert lines_on_other_sizes(opened, 'official', tmp_path / 'official') == []
    (line,) = lines_on_other_sizes(opened, 'hf', tmp_path / 'hf')
    assert '32 px' in line and '(bicubic with an offset of 0.1)' in line and '(bicubic)' in line
    (line,) = lines_on_other_sizes(opened, 'timm', tmp_path / 'timm')
    assert 'layout timm by another (antialiased bicubic)' in line
    # The rule stays with the weights through the file.
    assert weights.header(tmp_path / 'timm').vit.pos_resize == 'offset'


def test_so_do_exports_of_what_came_from_another_library():
    def said(vit, family, layout):
        return layouts.other_sizes(layouts.Weights(family, layout, 'backbone', vit))

    beit = BEIT.clone(rel_resize='bilinear')
    assert said(beit, 'beit', 'hf') == '' and 'bilinear' in said(beit, 'beit', 'timm')
    assert 'cubic spline' in said(beit, 'beit', 'official')
    timm = tiny_weights.weights('dinov2', 'timm').vit.clone(pos_resize='antialias')
    assert said(timm, 'dinov2', 'timm') == '' and 'offset' in said(timm, 'dinov2', 'official')
    plain = dataclasses.replace(tiny_weights.weights('vit', 'official')).vit
    assert said(plain, 'vit', 'official') == said(
        plain.clone(pos_resize='offset'), 'vit', 'official'
    )
