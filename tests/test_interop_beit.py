# SPDX-License-Identifier: Apache-2.0
"""BEiT and SplitMask for others: official names, transformers and timm, there and back."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
import tiny_weights
from golden import load
from ssl_jax import config as config_lib
from ssl_jax import config_splitmask, features, runs
from ssl_jax.interop import beit, describe, export, layouts, torch_io
from ssl_jax.interop import load as load_lib
from ssl_jax.models import vit as vit_lib

BEIT = dict(
    embed_dim=32,
    depth=2,
    num_heads=4,
    patch_size=8,
    img_size=32,
    pos_embed='none',
    rel_pos='shared',
    key_bias=False,
    layer_scale=0.1,
    mask_token=True,
    init_scheme='beit',
)
KINDS = {
    'beit': {},
    # Heads of width 12, three blocks, a grid of odd side; what fine-tuned models have.
    'layer': dict(
        embed_dim=36, depth=3, num_heads=3, img_size=24, rel_pos='layer', mask_token=False
    ),
    'absolute': dict(pos_embed='learned', mlp_ratio=1.7, layer_scale=None),
}
CASES = [(kind, layout) for kind in KINDS for layout in export.LAYOUTS]
CASES = [(kind, layout, 'backbone') for kind, layout in CASES]
CASES += [('beit', 'official', 'full'), ('beit', 'hf', 'full')]
QUICK = {'xla_backend_optimization_level': 0}


def weights(kind, layout, what='backbone'):
    vit = vit_lib.ViT(**{**BEIT, **KINDS[kind]})
    return layouts.Weights('beit', layout, what, vit, vocab=11 if what == 'full' else None)


@functools.cache
def exported(kind, layout, what='backbone'):
    """(Weights, params, state dict, extra)."""
    w = weights(kind, layout, what)
    params = tiny_weights.params(w)
    return w, params, *layouts.to_layout(w, params)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def tokens(vit, params, images, **kw):
    """All tokens after the final norm: class, then patches."""
    out = jax.jit(vit.apply, compiler_options=QUICK)({'params': params['encoder']}, images, **kw)
    return np.concatenate([out['cls_tokens'], out['patch_tokens']], axis=1)


# Layouts


@pytest.mark.parametrize('kind,layout,what', CASES)
def test_out_and_in_again_is_bit_identical(kind, layout, what):
    w, params, state_dict, extra = exported(kind, layout, what)
    same(layouts.to_ours(w, state_dict, extra), params)


@pytest.mark.parametrize('kind,layout,what', CASES)
def test_everything_is_found_from_the_tensors_and_the_config(kind, layout, what):
    w, _, state_dict, _ = exported(kind, layout, what)
    hints = json.loads(json.dumps(layouts.config_json(w)))
    if w.vit.rel_pos is None:
        hints = hints or {'num_heads': w.vit.num_heads}
    found = layouts.recognise(state_dict, hints)
    scale = w.vit.layer_scale
    scale = scale if layout == 'hf' or scale is None else 1.0  # where it began is in HF's config
    vit = w.vit.clone(layer_scale=scale, mask_token=w.vit.mask_token or layout == 'timm')
    assert found == dataclasses.replace(w, vit=vit)
    shapes = {k: x.shape for k, x in state_dict.items()}
    assert layouts.recognise(shapes, hints) == found


def test_the_heads_are_told_by_the_table_and_need_no_hint():
    _, _, state_dict, _ = exported('layer', 'official')
    assert layouts.recognise(state_dict).vit.num_heads == 3


def test_official_files_hold_the_index_of_the_tables_and_others_do_without():
    w, params, state_dict, _ = exported('layer', 'official')
    keys = [k for k in state_dict if k.endswith(beit.INDEX)]
    assert keys == [f'blocks.{i}.attn.{beit.INDEX}' for i in range(3)]
    assert all(state_dict[k].dtype == np.int64 for k in keys)
    less = {k: x for k, x in state_dict.items() if k not in keys}
    same(layouts.to_ours(layouts.recognise(less), less), params)
    turned = {**state_dict, keys[1]: state_dict[keys[1]].T}
    with pytest.raises(ValueError, match=r'blocks\.1.*is not the order'):
        layouts.to_ours(layouts.recognise(turned), turned)


def test_the_index_in_older_folders_of_transformers_is_checked_and_not_named():
    w, params, state_dict, _ = exported('beit', 'hf')
    key = f'encoder.relative_position_bias.{beit.INDEX}'
    old = {f'beit.{k}': x for k, x in {**state_dict, key: beit.index(w.vit)}.items()}
    found = layouts.recognise(old, layouts.config_json(w))
    assert found.prefix == 'beit.' and not found.left_out
    same(layouts.to_ours(found, old), params)


def test_a_renamed_key_and_a_wrong_table_are_listed_and_nothing_is_loaded():
    w, _, state_dict, _ = exported('beit', 'official', 'full')
    broken = dict(state_dict)
    broken['blocks.1.attn.vbias'] = broken.pop('blocks.1.attn.v_bias')
    broken['blocks.0.gamma_1'] = np.zeros(7, np.float32)
    with pytest.raises(ValueError) as error:
        layouts.to_ours(layouts.recognise(broken), broken)
    text = str(error.value)
    assert 'missing blocks.1.attn.v_bias (nearest: blocks.1.attn.vbias)' in text
    assert 'blocks.0.gamma_1 has shape (7,), expected (32,)' in text and '\n' not in text
    broken = {**state_dict, f'rel_pos_bias.{beit.TABLE}': np.zeros((50, 4), np.float32)}
    with pytest.raises(ValueError, match=r'has shape \(50, 4\), expected \(\(2 n - 1\)\^2 \+ 3'):
        layouts.recognise(broken)
    with pytest.raises(ValueError, match='img_size 64 .* 4 x 4 positions and patches of 8'):
        layouts.recognise(state_dict, {'img_size': 64})


def test_an_encoder_that_is_not_quite_beit_cannot_leave_and_says_why():
    can = layouts.available
    vit = weights('beit', 'hf').vit
    assert not any(can(vit, None, 'beit', vocab=11)[k] for k in (c[1:] for c in CASES))
    odd = can(vit.clone(num_cls_tokens=2), None, 'beit')
    assert all('BEiT has one class token' in odd[layout, 'backbone'] for layout in export.LAYOUTS)
    eps = can(vit.clone(eps=1e-5), None, 'beit', vocab=11)
    assert 'timm normalises with eps 1e-6' in eps['timm', 'backbone'] and not eps['hf', 'full']
    assert 'use what=backbone' in can(vit, None, 'beit')['hf', 'full']
    assert layouts.family_of(vit) == 'beit'


@pytest.mark.parametrize('kind', KINDS)
def test_the_description_names_the_positions(kind):
    w, params, _, _ = exported(kind, 'official')
    text = '\n'.join(describe.text(w, params, 1))
    want = {
        'beit': 'positions: relative, a table of biases for all blocks',
        'layer': 'positions: relative, a table of biases in each block',
        'absolute': 'positions: learned, and relative, a table of biases for all blocks',
    }
    assert want[kind] in text and 'beit, official names' in text
    assert describe.from_dict(json.loads(json.dumps(describe.to_dict(w)))) == w
