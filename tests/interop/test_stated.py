# SPDX-License-Identifier: Apache-2.0
"""Every field of a config.json is used, harmless, or refused by its name."""

import dataclasses
import functools
import json

import numpy as np
import pytest

import tiny_weights
from ssl_jax.interop import layouts, stated
from ssl_jax.models import vit as vit_lib

BEIT = vit_lib.ViT(
    32, 2, 4, patch_size=8, img_size=32, pos_embed='none', rel_pos='layer', key_bias=False,
    layer_scale=0.1, init_scheme='beit',
)  # fmt: skip


@functools.cache
def exported(name, what='backbone'):
    """(config.json, state dict) in the names of transformers."""
    if name == 'beit':
        w = layouts.Weights('beit', 'hf', 'backbone', BEIT)
    else:
        w = tiny_weights.weights(name, 'hf', what)
    tensors, _ = layouts.to_layout(w, tiny_weights.params(w))
    return json.loads(json.dumps(layouts.config_json(w))), tensors


def read(name, what='backbone', **changes):
    config, tensors = exported(name, what)
    return layouts.recognise(tensors, {**config, **changes})


@pytest.mark.parametrize(
    'name,field,value',
    [
        ('mae', 'hidden_act', 'gelu_new'),
        ('vit', 'hidden_act', 'quick_gelu'),
        ('dinov2', 'hidden_act', 'relu'),
        ('pixio', 'hidden_act', 'gelu_pytorch_tanh'),
        ('beit', 'hidden_act', 'silu'),
        ('vit', 'qkv_bias', False),
        ('vit', 'num_channels', 1),
        ('vit', 'num_hidden_layers', 1),
        ('vit', 'hidden_size', 64),
        ('vit', 'intermediate_size', 64),
        ('dinov2', 'mlp_ratio', 2),
        ('dinov2', 'use_swiglu_ffn', True),
        ('dinov2_reg', 'num_register_tokens', 0),
        ('pixio', 'n_cls_tokens', 1),
        ('beit', 'use_absolute_position_embeddings', True),
        ('beit', 'use_relative_position_bias', False),
        ('beit', 'use_shared_relative_position_bias', True),
        ('beit', 'use_mean_pooling', True),
        ('vit', 'quantization_config', {'bits': 4}),
    ],
)
def test_a_field_that_the_tensors_contradict_is_refused_by_name(name, field, value):
    with pytest.raises(ValueError) as error:
        read(name, **{field: value})
    text = str(error.value)
    assert f'config.json says {field}={value!r}' in text and '\n' not in text
    assert text.endswith('such weights are not read.')


@pytest.mark.parametrize('field', ['hidden_size', 'num_hidden_layers', 'intermediate_size'])
def test_so_is_one_of_the_decoder(field):
    with pytest.raises(ValueError, match=f'config.json says decoder_{field}=99'):
        read('mae', 'full', **{f'decoder_{field}': 99})


@pytest.mark.parametrize('key', ['image_size', 'img_size'])
def test_a_grid_that_is_no_square_is_refused(key):
    with pytest.raises(ValueError, match=r'img_size \[16, 64\] is no square'):
        read('vit', **{key: [16, 64]})  # 2 x 8 patches are as many as 4 x 4
    with pytest.raises(ValueError, match='no square'):
        layouts.recognise(exported_timm('vit'), {'model_args': {'img_size': [16, 64]}})
    assert read('vit', **{key: [32, 32]}).vit.img_size == 32
    with pytest.raises(ValueError, match='patch_size'):
        read('vit', patch_size=[8, 16])


def exported_timm(name):
    w = tiny_weights.weights(name, 'timm')
    return layouts.to_layout(w, tiny_weights.params(w))[0]


def test_a_field_that_is_used_is_used():
    assert read('vit', layer_norm_eps=1e-4).vit.eps == 1e-4
    assert read('vit', num_attention_heads=8).vit.num_heads == 8
    assert read('dinov2', layerscale_value=0.5).vit.layer_scale == 0.5
    found = read('mae', 'full', mask_ratio=0.5, norm_pix_loss=False)
    method = layouts.method(found, {'mask_ratio': 0.5, 'norm_pix_loss': False})[1]
    assert (method['mask_ratio'], method['norm_pix_loss']) == (0.5, False)


@pytest.mark.parametrize('name,eps', [('vit', 1e-12), ('beit', 1e-12), ('dinov2', 1e-6)])
def test_an_epsilon_that_is_absent_is_that_of_the_library(name, eps):
    config, tensors = exported(name)
    config = {k: x for k, x in config.items() if k != 'layer_norm_eps'}
    assert layouts.recognise(tensors, config).vit.eps == eps


def test_what_is_harmless_changes_nothing_and_what_is_unknown_is_named():
    plain = read('dinov2')
    for field in ('drop_path_rate', 'initializer_range', 'apply_layernorm', 'id2label'):
        assert read('dinov2', **{field: 0.7}) == plain
    # SwiGLU has an activation of its own, whatever that field says.
    assert read('dinov2_odd', hidden_act='relu') == read('dinov2_odd')
    found = read('dinov2', window_size=7)
    assert dataclasses.replace(found, remarks=()) == plain
    assert found.remarks == (
        'config.json has fields that are unknown here and not read: window_size.',
    )
    assert 'yolos is not known' in read('vit', model_type='yolos').remarks[-1]


@pytest.mark.parametrize(
    'config,says',
    [
        ({'model_args': {'act_layer': 'quick_gelu'}}, "act_layer='quick_gelu'"),
        ({'architecture': 'vit_base_patch16_clip_224'}, 'clip models in another way'),
        ({'architecture': 'vit_base_patch16_siglip_gap_224'}, 'siglip'),
    ],
)
def test_timm_models_that_tensors_do_not_tell_apart_are_refused(config, says):
    config = {'architecture': 'vit_base_patch16_224', **config}
    with pytest.raises(ValueError, match=says):
        layouts.recognise(exported_timm('vit'), {**config, 'num_heads': 4})


@pytest.mark.parametrize(
    'kind,name',
    [
        ('ViT', 'vit'),
        ('ViTMAE', 'mae'),
        ('Dinov2', 'dinov2'),
        ('Dinov2WithRegisters', 'dinov2_reg'),
        ('Beit', 'beit'),
        ('Pixio', 'pixio'),
        ('IJepa', 'vit'),
    ],
)
def test_every_field_of_transformers_is_used_harmless_or_checked(kind, name):
    transformers = pytest.importorskip('transformers')
    if not hasattr(transformers, f'{kind}Config'):
        pytest.skip(f'transformers has no {kind}')
    theirs = getattr(transformers, f'{kind}Config')().to_dict()
    config, tensors = exported(name, 'full' if kind == 'ViTMAE' else 'backbone')
    found = layouts.recognise(tensors, {**theirs, **config})
    assert not [line for line in found.remarks if 'unknown' in line or 'not known' in line]
    assert not stated.HARMLESS & stated.USED


def test_the_tensors_are_those_of_the_field_and_not_of_the_file():
    config, tensors = exported('vit')
    more = {k.replace('layer.1', 'layer.2'): np.array(x) for k, x in tensors.items()}
    with pytest.raises(ValueError, match='num_hidden_layers=2'):
        layouts.recognise({**tensors, **more}, config)
