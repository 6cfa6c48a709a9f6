# SPDX-License-Identifier: Apache-2.0
"""timm's layout against the keys of its VisionTransformer, and, where timm is, against timm."""

import copy
import functools
import json

import jax
import numpy as np
import pytest

import tiny_weights
from ssl_jax.interop import files, layouts
from ssl_jax.models import vit as vit_lib

# timm that is there but not able to start, say without torchvision, is as good as none.
import_timm = functools.partial(pytest.importorskip, 'timm', exc_type=ImportError)
NAMES = [name for name in tiny_weights.ENCODERS if not name.startswith('pixio')]


def timm_shapes(v):
    """Keys and shapes of a timm model, num_classes=0.

    Source: timm 1.0.31, `timm/models/vision_transformer.py`, VisionTransformer with Block,
    Attention and LayerScale, `timm/layers/mlp.py` Mlp and GluMlp; read off a state_dict().  With
    reg_tokens the DINOv2 models have no_embed_class: no position for the class token.
    """
    d, registers = v.embed_dim, v.num_register_tokens
    n = (v.img_size // v.patch_size) ** 2 + (0 if registers else 1)
    shapes = {
        'cls_token': (1, 1, d),
        'pos_embed': (1, n, d),
        'patch_embed.proj.weight': (d, 3, v.patch_size, v.patch_size),
        'patch_embed.proj.bias': (d,),
        'norm.weight': (d,),
        'norm.bias': (d,),
    }
    if registers:
        shapes['reg_token'] = (1, registers, d)
    hidden = inner = int(d * v.mlp_ratio)
    if v.ffn == 'swiglu':  # two thirds, to a multiple of eight; gate and value side by side
        inner = (int(hidden * 2 / 3) + 7) // 8 * 8
        hidden = 2 * inner
    for i in range(v.depth):
        block = {
            'norm1.weight': (d,),
            'norm1.bias': (d,),
            'attn.qkv.weight': (3 * d, d),
            'attn.qkv.bias': (3 * d,),
            'attn.proj.weight': (d, d),
            'attn.proj.bias': (d,),
            'norm2.weight': (d,),
            'norm2.bias': (d,),
            'mlp.fc1.weight': (hidden, d),
            'mlp.fc1.bias': (hidden,),
            'mlp.fc2.weight': (d, inner),
            'mlp.fc2.bias': (d,),
        }
        if v.layer_scale is not None:
            block |= {'ls1.gamma': (d,), 'ls2.gamma': (d,)}
        shapes |= {f'blocks.{i}.{k}': s for k, s in block.items()}
    return shapes


@functools.cache
def exported(name):
    """(Weights, params, state dict)."""
    w = tiny_weights.weights(name, 'timm')
    params = tiny_weights.params(w)
    return w, params, layouts.to_layout(w, params)[0]


@pytest.mark.parametrize('name', NAMES)
def test_keys_and_shapes_are_those_of_timm(name):
    w, _, state_dict = exported(name)
    assert {k: x.shape for k, x in state_dict.items()} == timm_shapes(w.vit)


@pytest.mark.parametrize('name', [n for n in NAMES if 'reg' in n])
def test_the_class_token_carries_its_position_where_timm_has_none(name):
    _, params, state_dict = exported(name)
    enc = params['encoder']
    np.testing.assert_array_equal(
        state_dict['cls_token'], enc['cls_token'] + enc['pos_embed'][:, :1]
    )
    np.testing.assert_array_equal(state_dict['pos_embed'], enc['pos_embed'][:, 1:])


@pytest.mark.parametrize(
    'size,ffn,registers,architecture',
    [
        ('S', 'mlp', 0, 'vit_small_patch14_dinov2'),
        ('B', 'mlp', 4, 'vit_base_patch14_reg4_dinov2'),
        ('L', 'mlp', 0, 'vit_large_patch14_dinov2'),
        ('g', 'swiglu', 4, 'vit_giant_patch14_reg4_dinov2'),
    ],
)
def test_dinov2_has_the_architecture_of_its_size(size, ffn, registers, architecture):
    v = tiny_weights.weights('dinov2', 'timm').vit
    dim, depth, heads = vit_lib.SIZES[size]
    v = v.clone(embed_dim=dim, depth=depth, num_heads=heads, ffn=ffn, num_register_tokens=registers)
    w = layouts.Weights('dinov2', 'timm', 'backbone', v)
    assert layouts.config_json(w)['architecture'] == architecture


@pytest.mark.parametrize(
    'size,architecture',
    [
        ('B', 'vit_base_patch16_224'),
        ('L', 'vit_large_patch16_224'),
        ('H', 'vit_huge_patch14_224'),
    ],
)
def test_mae_has_the_architecture_of_its_size(size, architecture):
    dim, depth, heads = vit_lib.SIZES[size]
    v = tiny_weights.weights('mae', 'timm').vit.clone(embed_dim=dim, depth=depth, num_heads=heads)
    w = layouts.Weights('mae', 'timm', 'backbone', v)
    assert layouts.config_json(w)['architecture'] == architecture


def write(folder, name):
    """(Weights, params, folder as an export makes it for timm)."""
    w, params, state_dict = exported(name)
    files.write(folder / 'model.safetensors', state_dict, {'format': 'pt'})
    (folder / 'config.json').write_text(json.dumps(layouts.config_json(w)))
    return w, params, folder


def expect_same(w, params, model):
    """timm's tokens are ours, at three sizes.

    timm resizes positions with antialias, whatever the model: at other sizes than the native one
    that is the official rule only of DINOv2 with registers.
    """
    torch = pytest.importorskip('torch')
    for size in tiny_weights.sizes(w.vit):
        images = tiny_weights.images(size)
        resized = copy.deepcopy(model).eval()  # set_input_size resamples what it resampled before
        resized.set_input_size(img_size=size)
        with torch.no_grad():
            want = resized.forward_features(torch.from_numpy(np.moveaxis(images, -1, 1).copy()))
        vit = w.vit.clone(pos_resize='antialias')
        out = jax.jit(vit.apply)({'params': params['encoder']}, images)
        got = [out[k] for k in ('cls_tokens', 'reg_tokens', 'patch_tokens')]
        tiny_weights.assert_same_tokens(np.concatenate(got, axis=1), want.numpy())


def arguments(w):
    """(architecture, arguments) of config.json, for create_model."""
    config = layouts.config_json(w)
    return config['architecture'], {**config['model_args'], 'num_classes': 0}


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_timm_creates_the_model_from_the_file(name, tmp_path):
    timm = import_timm()
    w, params, folder = write(tmp_path, name)
    architecture, args = arguments(w)
    path = str(folder / 'model.safetensors')
    expect_same(w, params, timm.create_model(architecture, checkpoint_path=path, **args))


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_timm_creates_the_model_from_the_folder(name, tmp_path):
    timm = import_timm()
    w, params, folder = write(tmp_path, name)
    expect_same(w, params, timm.create_model(f'local-dir:{folder}', pretrained=True))


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_the_key_list_of_this_file_is_what_timm_has(name):
    timm = import_timm()
    w, _, _ = exported(name)
    architecture, args = arguments(w)
    model = timm.create_model(architecture, **args)
    assert {k: tuple(x.shape) for k, x in model.state_dict().items()} == timm_shapes(w.vit)
