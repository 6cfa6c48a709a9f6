# SPDX-License-Identifier: Apache-2.0
"""Layouts: what tensors are is found from the tensors, and no bit is lost on the way out and in."""

import dataclasses
import functools
import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest

import tiny_weights
from ssl_jax.interop import families, layouts, tables
from ssl_jax.models import vit as vit_lib

BACKBONES = list(tiny_weights.ENCODERS)
TIMM = [name for name in BACKBONES if not name.startswith('pixio')]
MAES = ['mae', 'mae_odd']
CASES = [(name, 'official', 'backbone') for name in BACKBONES]
CASES += [(name, 'hf', 'backbone') for name in BACKBONES]
CASES += [(name, 'timm', 'backbone') for name in TIMM]
CASES += [(name, 'official', 'full') for name in tiny_weights.DECODERS]
CASES += [(name, 'hf', 'full') for name in MAES]
CASES += [(name, 'official', 'full') for name in tiny_weights.HEADS]


@functools.cache
def exported(name, layout, what='backbone'):
    """(Weights, params, state dict, extra)."""
    w = tiny_weights.weights(name, layout, what)
    params = tiny_weights.params(w)
    return w, params, *layouts.to_layout(w, params)


def stated(w):
    """What is known besides the tensors: the config where the layout has one, else the hints."""
    return json.loads(json.dumps(layouts.config_json(w))) or tiny_weights.hints(w)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize('name,layout,what', CASES)
def test_out_and_in_again_is_bit_identical(name, layout, what):
    w, params, state_dict, extra = exported(name, layout, what)
    same(layouts.to_ours(w, state_dict, extra), params)


@pytest.mark.parametrize('name,layout,what', CASES)
def test_everything_is_found_from_the_tensors_and_the_config(name, layout, what):
    w, _, state_dict, _ = exported(name, layout, what)
    found = layouts.recognise(state_dict, stated(w))
    # Where layer scale began is only in HF's config; each library resizes positions as it does.
    scale = w.vit.layer_scale if layout == 'hf' or w.vit.layer_scale is None else 1.0
    vit = w.vit.clone(layer_scale=scale, pos_resize=tiny_weights.rule(w))
    assert found == dataclasses.replace(w, vit=vit, names=found.names, remarks=found.remarks)
    assert bool(found.remarks) == (w.family == 'vit' and layout == 'official')


# Without the numbers a plain ViT with one class token counts as a MAE.
@pytest.mark.parametrize('name,layout,what', [c for c in CASES if not c[0].startswith('vit')])
def test_shapes_alone_tell_the_same_as_tensors(name, layout, what):
    w, _, state_dict, _ = exported(name, layout, what)
    shapes = {k: x.shape for k, x in state_dict.items()}
    assert layouts.recognise(shapes, stated(w)) == layouts.recognise(state_dict, stated(w))


def test_tensors_that_are_costly_to_read_are_not_read_but_for_positions():
    w, _, state_dict, _ = exported('mae', 'official', 'full')
    asked = []

    class Lazy(dict):
        shapes = {k: x.shape for k, x in state_dict.items()}

        def __getitem__(self, key):
            asked.append(key)
            return super().__getitem__(key)

    assert layouts.recognise(Lazy(state_dict), tiny_weights.hints(w)) == w
    assert set(asked) == {'pos_embed', 'decoder_pos_embed'}


@pytest.mark.parametrize('name', [n for n in vit_lib.SIZES if n != 'H+'])  # else it is H
def test_sizes_with_a_name_need_no_hint_of_their_heads(name):
    dim, depth, heads = vit_lib.SIZES[name]
    vit = vit_lib.ViT(embed_dim=dim, depth=depth, num_heads=heads, img_size=32, pos_embed='sincos')
    w = layouts.Weights('mae', 'official', 'backbone', vit)
    shapes = {}
    abstract = layouts.abstract(w)['encoder']
    for ours, key, how in layouts.rows(w):
        path = ours.split('/')[1:]
        shape = (1, 5, dim) if how == 'fixed' else functools.reduce(dict.get, path, abstract).shape
        if how == 'conv':
            shape = (dim, 3, 16, 16)
        elif '{i}' in key:
            shape = shape[1:][::-1]
        shapes.update({key.format(i=i): shape for i in range(depth if '{i}' in key else 1)})
    assert layouts.recognise(shapes) == w


def test_heads_of_a_size_without_a_name_are_asked_for():
    _, _, state_dict, _ = exported('vit', 'official')
    with pytest.raises(ValueError, match='2 blocks of width 32 .* give num_heads'):
        layouts.recognise(state_dict)
    with pytest.raises(ValueError, match='num_heads=5 does not divide the width 32'):
        layouts.recognise(state_dict, {'num_heads': 5})


def test_heads_of_a_decoder_without_a_name_are_asked_for():
    _, _, state_dict, _ = exported('mae', 'official', 'full')
    with pytest.raises(ValueError, match='decoder of width 16 .* give decoder_num_heads'):
        layouts.recognise(state_dict, {'num_heads': 4})


def test_sin_cos_positions_in_half_precision_are_still_sin_cos():
    w, params, state_dict, _ = exported('mae', 'official', 'full')
    for dtype in (ml_dtypes.bfloat16, np.float16):
        rounded = {k: x.astype(dtype).astype(np.float32) for k, x in state_dict.items()}
        found = layouts.recognise(rounded, tiny_weights.hints(w))
        assert found == w
        assert layouts.to_ours(found, rounded)['encoder'].keys() == params['encoder'].keys()


def test_positions_near_sin_cos_but_trained_are_kept():
    w, _, state_dict, _ = exported('mae', 'official')
    tuned = {**state_dict, 'pos_embed': state_dict['pos_embed'] + np.float32(1e-3)}
    found = layouts.recognise(tuned, tiny_weights.hints(w))
    assert found.vit.pos_embed == 'learned'
    back, _ = layouts.to_layout(found, layouts.to_ours(found, tuned))
    np.testing.assert_array_equal(back['pos_embed'], tuned['pos_embed'])


# Errors.


def broken(name='dinov2_reg', layout='official', **changes):
    w, _, state_dict, _ = exported(name, layout)
    return w, {**state_dict, **changes}


def refused(state_dict, hints):
    with pytest.raises(ValueError) as error:
        layouts.to_ours(layouts.recognise(state_dict, hints), state_dict)
    text = str(error.value)
    assert '\n' not in text and text.endswith('.')
    return text


@pytest.mark.parametrize(
    'layout,qkv,fc1,norm',
    [
        ('official', 'blocks.1.attn.qkv.weight', 'blocks.0.mlp.fc1.bias', 'norm.weight'),
        (
            'hf',
            'encoder.layer.1.attention.attention.key.weight',
            'encoder.layer.0.mlp.fc1.bias',
            'layernorm.weight',
        ),
        ('timm', 'blocks.1.attn.qkv.weight', 'blocks.0.mlp.fc1.bias', 'norm.weight'),
    ],
)
def test_a_renamed_key_a_missing_tensor_and_a_wrong_shape_are_listed_together(
    layout, qkv, fc1, norm
):
    w, state_dict = broken(layout=layout)
    state_dict[f'{qkv}_'] = state_dict.pop(qkv)
    del state_dict[fc1]
    state_dict[norm] = np.zeros(7, np.float32)
    text = refused(state_dict, stated(w))
    assert f'missing {qkv} (nearest: {qkv}_)' in text
    assert f'missing {fc1}' in text
    assert f'{norm} has shape (7,), expected (32,)' in text
    assert f'left over {qkv}_' in text


def test_a_wrong_shape_is_told_as_torch_has_it():
    w, state_dict = broken(**{'blocks.1.mlp.fc2.weight': np.zeros((32, 99), np.float32)})
    text = refused(state_dict, tiny_weights.hints(w))
    assert 'blocks.1.mlp.fc2.weight has shape (32, 99), expected (32, 128)' in text


@pytest.mark.parametrize(
    'key,message',
    [
        ('patch_embed.proj.weight', r'nearest: patch_embed\.proj\.weight_'),
        ('pos_embed', r'missing pos_embed \(nearest: pos_embed_\)'),
        ('cls_token', r'missing cls_token \(nearest: cls_token_\)'),
        ('register_tokens', r'left over register_tokens_'),
        ('mask_token', r'left over mask_token_'),
    ],
)
def test_a_renamed_table_or_token_is_named(key, message):
    w, state_dict = broken()
    state_dict[f'{key}_'] = state_dict.pop(key)
    with pytest.raises(ValueError, match=message):
        layouts.to_ours(layouts.recognise(state_dict, tiny_weights.hints(w)), state_dict)


def test_a_size_that_does_not_fit_the_tensors_is_refused():
    w, state_dict = broken()
    hints = tiny_weights.hints(w)
    with pytest.raises(ValueError, match='img_size 48 .* 4 x 4 positions and patches of 8'):
        layouts.recognise(state_dict, {**hints, 'img_size': 48})
    with pytest.raises(ValueError, match='patch_size 16 do not fit'):
        layouts.recognise(state_dict, {**hints, 'patch_size': 16})
    # 35 pixels hold four patches of eight as well.
    assert layouts.recognise(state_dict, {**hints, 'img_size': 35}).vit.img_size == 35


def test_an_optimizer_is_told_from_weights():
    state = {f'state.{i}.{m}': (4, 4) for i in range(3) for m in ('exp_avg', 'exp_avg_sq', 'step')}
    with pytest.raises(ValueError, match='state of an optimizer .* give the checkpoint'):
        layouts.recognise(state)


def test_nothing_is_no_weights():
    with pytest.raises(ValueError, match='no tensors'):
        layouts.recognise({})


@pytest.mark.parametrize(
    'keys,message',
    [
        (['conv1.weight', 'layer1.0.conv1.weight', 'layer1.0.downsample.0.weight'], 'ResNet'),
        (['tok_embeddings.weight', 'layers.0.attention.wq.weight'], 'MAE, Pixio, DINOv2'),
        (['vision_model.embeddings.patch_embedding.weight'], 'CLIP or SigLIP'),
    ],
)
def test_another_network_is_refused_by_name_with_what_is_known(keys, message):
    with pytest.raises(ValueError, match=message):
        layouts.recognise({k: (8, 8) for k in keys})


def test_a_plain_network_with_registers_of_another_name_is_not_taken_for_dinov3():
    _, _, state_dict, _ = exported('dinov2_reg', 'timm')
    assert layouts.recognise(state_dict, {'num_heads': 4}).family == 'dinov2'


def test_plain_encoders_leave_in_official_names_without_the_mask_token_that_dino_has_not():
    w = tiny_weights.weights('vit', 'official')
    w = dataclasses.replace(w, vit=w.vit.clone(mask_token=True))  # as a head of DINO makes it
    params = tiny_weights.params(w)
    state_dict, extra = layouts.to_layout(w, params)
    plain = exported('vit', 'official')[2]
    assert set(state_dict) == set(plain) and set(extra) == {'encoder/mask_token'}
    same(layouts.to_ours(w, state_dict, extra), params)
    # DINOv2 and BEiT have one in their classes.
    assert 'mask_token' in exported('dinov2', 'official')[2]


# What only some layouts have.


@pytest.mark.parametrize('name', ['dinov2', 'dinov2_odd', 'dinov2_reg', 'dinov2_reg_odd'])
def test_timm_without_the_sidecar_works_and_says_what_is_zero(name):
    w, params, state_dict, extra = exported(name, 'timm')
    assert extra and set(layouts.notes(w, extra)) == set()
    back = layouts.to_ours(w, state_dict)
    notes = ' '.join(layouts.notes(w))
    assert not back['encoder']['mask_token'].any() and 'mask token: it is zero' in notes
    images = tiny_weights.images(tiny_weights.sizes(w.vit)[0])
    run = jax.jit(w.vit.apply)
    a, b = (run({'params': p['encoder']}, images)['pre_norm'] for p in (params, back))
    np.testing.assert_array_equal(a, b)
    if w.vit.num_register_tokens:
        assert not back['encoder']['pos_embed'][:, 0].any() and 'position is zero' in notes


def test_a_sidecar_of_other_weights_is_refused():
    w, params, state_dict, extra = exported('dinov2_reg', 'timm')
    other = {**extra, 'encoder/cls_token': extra['encoder/cls_token'] + 1}
    with pytest.raises(ValueError, match='sidecar; that belongs to other weights'):
        layouts.to_ours(w, state_dict, other)
    with pytest.raises(ValueError, match=r'shape \(1, 3\), expected \(1, 32\)'):
        layouts.to_ours(w, state_dict, {**extra, 'encoder/mask_token': np.zeros((1, 3))})


def test_a_sidecar_rounded_to_bfloat16_is_taken():
    w, _, state_dict, extra = exported('dinov2_reg_odd', 'timm')

    def rounded(tensors):
        return {k: x.astype(ml_dtypes.bfloat16).astype(np.float32) for k, x in tensors.items()}

    back = layouts.to_ours(w, rounded(state_dict), rounded(extra))
    for path, x in rounded(extra).items():
        np.testing.assert_array_equal(back['encoder'][path.split('/')[1]][:, : x.shape[1]], x)


def teacher_checkpoint():
    """(Weights, params, a dict as DINOv2's training leaves it: prefixes, chunks, heads)."""
    w, params, state_dict, _ = exported('dinov2_odd', 'official')

    def chunk(key):  # two blocks in each
        return re.sub(r'^blocks\.(\d+)', lambda m: f'blocks.{int(m[1]) // 2}.{m[1]}', key)

    held = {f'teacher.module.backbone.{chunk(k)}': x for k, x in state_dict.items()}
    held['teacher.module.dino_head.mlp.0.weight'] = np.zeros((8, 36), np.float32)
    held['teacher.module.ibot_head.last_layer.weight_v'] = np.zeros((9, 8), np.float32)
    held.update({f'student.backbone.{k}': x * 0 for k, x in state_dict.items()})
    return w, params, held


def test_a_teacher_checkpoint_is_read_through_its_prefixes_and_chunks():
    w, params, held = teacher_checkpoint()
    assert 'teacher.module.backbone.blocks.0.1.attn.qkv.weight' in held
    found = layouts.recognise(held, tiny_weights.hints(w))
    assert found.prefix == 'teacher.module.backbone.'
    assert found.vit == w.vit.clone(layer_scale=1.0)
    same(layouts.to_ours(found, held), params)


def test_projection_heads_and_the_student_are_left_out_and_named():
    w, _, held = teacher_checkpoint()
    found = layouts.recognise(held, tiny_weights.hints(w))
    assert 'teacher.module.dino_head.mlp.0.weight' in found.left_out
    assert 'teacher.module.ibot_head.last_layer.weight_v' in found.left_out
    assert 'student.backbone.cls_token' in found.left_out
    assert not any(k.startswith(found.prefix) for k in found.left_out)
    first, second = layouts.notes(found)
    assert first.startswith('dino_head has no ')
    assert second.startswith('Left out') and 'student.backbone' in second


def test_heads_beside_a_bare_backbone_are_left_out_too():
    w, params, state_dict, _ = exported('mae', 'official')
    held = {**state_dict, 'head.weight': np.zeros((10, 99)), 'head.bias': np.zeros(10)}
    found = layouts.recognise(held, tiny_weights.hints(w))
    assert found.left_out == ('head.bias', 'head.weight')
    same(layouts.to_ours(found, held), params)


def test_what_cannot_leave_says_why():
    def why(name, **changes):
        w = tiny_weights.weights(name, 'official')
        vit = w.vit.clone(**changes)
        return layouts.refusals(dataclasses.replace(w, family=families.of(vit), vit=vit))

    assert 'timm has no Pixio' in why('pixio')['timm', 'backbone']
    assert 'only MAE and Pixio have a decoder' in why('dinov2')['official', 'full']
    assert 'registers' in why('mae', num_register_tokens=4)['hf', 'backbone']
    assert 'whole numbers' in why('dinov2', mlp_ratio=2.5)['hf', 'backbone']
    assert 'eps 1e-6' in why('vit', eps=1e-5)['timm', 'backbone']
    assert 'eps 1e-6' in why('pixio', eps=1e-5)['official', 'backbone']
    assert why('mae', eps=1e-12)['timm', 'backbone'] == ''
    assert 'one class token' in why('dinov2', num_cls_tokens=2)['official', 'backbone']
    assert 'mask token' in why('dinov2_reg', mask_token=False)['hf', 'backbone']
    assert 'learned' in why('mae', num_register_tokens=4)['timm', 'backbone']
    pixio = tiny_weights.weights('pixio', 'official', 'full')
    assert 'PixioModel is the encoder alone' in layouts.refusals(pixio)['hf', 'full']


@pytest.mark.parametrize('name,layout,what', CASES)
def test_what_is_tested_here_is_available(name, layout, what):
    w = tiny_weights.weights(name, layout, what)
    assert layouts.refusals(w)[layout, what] == ''


# Key lists of the official modules, from the golden files.


def golden_weights(f):
    """(what the file's weights are recognised as, the weights) by their names."""
    weights, hints = f.under('w'), {k: v for k, v in f.hyper.items() if k.endswith('num_heads')}
    return layouts.recognise(weights, hints), weights


def check_keys(f, family, what):
    found, weights = golden_weights(f)
    assert (found.family, found.layout, found.what) == (family, 'official', what)
    h = f.hyper
    assert (found.vit.patch_size, found.vit.img_size) == (h['patch_size'], h['img_size'])
    assert found.vit.mlp_ratio == h['mlp_ratio']
    state_dict, extra = layouts.to_layout(found, layouts.to_ours(found, weights))
    # Chunked or not, we write the names of the hub.
    want = {tables.plain(k): x for k, x in weights.items()}
    assert {k: x.shape for k, x in state_dict.items()} == {k: x.shape for k, x in want.items()}
    assert not extra
    for name, x in want.items():
        if 'pos_embed' in name and found.vit.pos_embed == 'sincos':
            np.testing.assert_allclose(state_dict[name], x, atol=1e-6)  # ours is computed anew
        else:
            np.testing.assert_array_equal(state_dict[name], x, err_msg=name)


def test_golden_mae_forward_keys_and_numbers_come_back(golden):
    check_keys(golden('mae_forward'), 'mae', 'full')


def test_golden_pixio_forward_c3g2_keys_and_numbers_come_back(golden):
    check_keys(golden('pixio_forward_c3g2'), 'pixio', 'full')


def test_golden_pixio_forward_c8g4_keys_and_numbers_come_back(golden):
    check_keys(golden('pixio_forward_c8g4'), 'pixio', 'full')


def test_golden_pixio_encoder_keys_and_numbers_come_back(golden):
    check_keys(golden('pixio_encoder'), 'pixio', 'backbone')


def test_golden_dinov2_backbone_mlp_keys_and_numbers_come_back(golden):
    check_keys(golden('dinov2_backbone_mlp'), 'dinov2', 'backbone')


def test_golden_dinov2_backbone_mlp_reg4_keys_and_numbers_come_back(golden):
    check_keys(golden('dinov2_backbone_mlp_reg4'), 'dinov2', 'backbone')


def test_golden_dinov2_backbone_swiglu_chunked_keys_and_numbers_come_back(golden):
    check_keys(golden('dinov2_backbone_swiglu_chunked'), 'dinov2', 'backbone')
