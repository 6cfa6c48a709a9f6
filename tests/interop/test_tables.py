# SPDX-License-Identifier: Apache-2.0
"""The rename tables: lossless both ways, every key once, nothing half loaded."""

import jax
import numpy as np
import pytest

import tiny
from ssl_jax import methods
from ssl_jax.interop import layouts, tables
from ssl_jax.interop.families import mae as mae_family


@pytest.fixture(scope='module', params=['sincos', 'learned'])
def exported(request):
    """(method, params, state dict) of a tiny MAE."""
    config = tiny.config(method__pos_embed=request.param, method__num_cls_tokens=2)
    method = methods.make(config)
    params, _ = jax.jit(method.init)(jax.random.key(0))
    params = jax.tree.map(np.asarray, params)
    fixed = layouts.fixed(method)
    return method, params, tables.to_torch(mae_family.pretraining_rows(method), params, fixed)


def load(method, state_dict):
    abstract, _ = jax.eval_shape(method.init, jax.random.key(0))
    return tables.from_torch(
        mae_family.pretraining_rows(method), state_dict, abstract, layouts.fixed(method)
    )


def test_there_and_back_is_bit_identical(exported):
    method, params, state_dict = exported
    back = load(method, state_dict)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)


def test_official_names_and_layouts(exported):
    _, _, state_dict = exported
    assert state_dict['patch_embed.proj.weight'].shape == (32, 3, 8, 8)
    assert state_dict['blocks.1.attn.qkv.weight'].shape == (96, 32)
    assert state_dict['pos_embed'].shape == (1, 18, 32)
    assert state_dict['decoder_pred.weight'].shape == (192, 16)


def test_all_problems_are_listed_at_once(exported):
    method, _, state_dict = exported
    broken = dict(state_dict)
    broken['blocks.0.attn.qkv.weigth'] = broken.pop('blocks.0.attn.qkv.weight')
    broken['norm.bias'] = np.zeros(7, np.float32)
    with pytest.raises(ValueError) as error:
        load(method, broken)
    text = str(error.value)
    assert 'missing blocks.0.attn.qkv.weight (nearest: blocks.0.attn.qkv.weigth)' in text
    assert 'norm.bias has shape (7,)' in text and 'expected (32,)' in text
    assert 'left over blocks.0.attn.qkv.weigth' in text


def test_another_sin_cos_table_is_refused(exported):
    method, _, state_dict = exported
    if method.vit.pos_embed != 'sincos':
        pytest.skip('learned positions can be anything')
    with pytest.raises(ValueError, match='pos_embed is not the sin-cos table'):
        load(method, {**state_dict, 'pos_embed': state_dict['pos_embed'] + 0.1})
