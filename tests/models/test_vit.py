# SPDX-License-Identifier: Apache-2.0
"""The shared ViT: official parameter counts, tokens by name, stochastic depth, types."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.models import blocks, vit


def small(**kw):
    args = dict(embed_dim=32, depth=3, num_heads=4, patch_size=8, img_size=32)
    return vit.ViT(**{**args, **kw})


@functools.lru_cache
def initialised(model):
    return jax.jit(functools.partial(vit.init_params, model))(jax.random.key(0))


def apply(model, images, **kw):
    run = functools.partial(model.apply, capture=kw.pop('capture', ()))
    return jax.jit(run)({'params': initialised(model)}, images, **kw)


def images(n=2, size=32):
    return jax.random.normal(jax.random.key(9), (n, size, size, 3))


@pytest.mark.parametrize(
    'size,kw,count',
    [
        # MAE encoders without their fixed position table.
        ('B', dict(pos_embed='sincos'), 85_798_656 - 197 * 768),
        ('L', dict(pos_embed='sincos'), 303_301_632 - 197 * 1024),
        ('H', dict(pos_embed='sincos', patch_size=14), 630_764_800 - 257 * 1280),
        # Pixio encoders.
        ('B', dict(img_size=256, num_cls_tokens=8), 85_855_488),
        ('L', dict(img_size=256, num_cls_tokens=8), 303_377_408),
        ('H', dict(img_size=256, num_cls_tokens=8), 631_013_120),
        ('1B', dict(img_size=256, num_cls_tokens=8), 1_361_515_008),
        ('5B', dict(img_size=256, num_cls_tokens=8), 5_440_939_008),
        # DINOv2 backbones.
        ('S', dict(num_register_tokens=0), 22_056_576),
        ('B', dict(num_register_tokens=4), 86_583_552),
        ('g', dict(num_register_tokens=0, ffn='swiglu'), 1_136_480_768),
    ],
    ids=str,
)
def test_sizes_have_the_official_parameter_counts(size, kw, count):
    if 'num_register_tokens' in kw:
        kw = dict(patch_size=14, img_size=518, layer_scale=1.0, mask_token=True, **kw)
    dim, depth, heads = vit.SIZES[size]
    model = vit.ViT(embed_dim=dim, depth=depth, num_heads=heads, **kw)
    params = jax.eval_shape(functools.partial(vit.init_params, model), jax.random.key(0))
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == count


@pytest.mark.parametrize('c,r', [(0, 0), (1, 0), (3, 2)])
def test_tokens_come_by_name_in_the_order_class_register_patch(c, r):
    model = small(num_cls_tokens=c, num_register_tokens=r)
    out = apply(model, images(), capture=(0, 2))
    assert out['cls_tokens'].shape == (2, c, 32)
    assert out['reg_tokens'].shape == (2, r, 32)
    assert out['patch_tokens'].shape == (2, 16, 32)
    assert out['pre_norm'].shape == (2, c + r + 16, 32)
    assert out['blocks'].shape == (2, 2, c + r + 16, 32)
    np.testing.assert_array_equal(out['blocks'][1], out['pre_norm'])


def test_kept_tokens_see_their_own_positions():
    """All patches in another order give the same tokens in that order."""
    model = small()
    order = jnp.stack([jnp.arange(16)[::-1], jnp.roll(jnp.arange(16), 3)])
    whole = apply(model, images())
    some = apply(model, images(), ids_keep=order)
    want = jnp.take_along_axis(whole['patch_tokens'], order[..., None], axis=1)
    np.testing.assert_allclose(some['patch_tokens'], want, atol=2e-5)
    np.testing.assert_allclose(some['cls_tokens'], whole['cls_tokens'], atol=2e-5)


def test_dropped_patches_have_no_influence():
    model = small()
    ids = jnp.tile(jnp.arange(8), (2, 1))
    x = images()
    changed = x.at[:, 16:].set(7.0)  # rows of patches 8..15
    a, b = apply(model, x, ids_keep=ids), apply(model, changed, ids_keep=ids)
    np.testing.assert_array_equal(a['patch_tokens'], b['patch_tokens'])


def test_stochastic_depth_keeps_the_expectation_and_is_per_sample():
    keys = jax.random.split(jax.random.key(0), 4000)
    keep = np.asarray(blocks.drop_path_keep(keys, depth=5, rate=0.4))[:, :, 0]
    assert keep.shape == (5, 4000, 2)
    assert (keep[0] == 1).all()
    np.testing.assert_allclose(keep.mean(axis=(1, 2)), 1.0, atol=0.05)
    np.testing.assert_allclose((keep == 0).mean(axis=(1, 2)), np.linspace(0, 0.4, 5), atol=0.02)
    assert (keep[4, :, 0] != keep[4, :, 1]).any()
    again = blocks.drop_path_keep(keys[7:9], depth=5, rate=0.4)
    np.testing.assert_array_equal(again[:, :, 0], keep[:, 7:9])


def test_stochastic_depth_acts_only_with_keys():
    model, keys = small(drop_path=0.9), jax.random.split(jax.random.key(1), 2)
    quiet, dropped = apply(model, images()), apply(model, images(), drop_keys=keys)
    assert not np.allclose(quiet['pre_norm'], dropped['pre_norm'])
    plain = apply(small(), images())
    np.testing.assert_array_equal(quiet['pre_norm'], plain['pre_norm'])


@pytest.mark.parametrize('remat', ['dots', 'full'])
def test_remat_changes_no_number(remat):
    def grads(model):
        def loss(p):
            return model.apply({'params': p}, images())['patch_tokens'].std()

        return jax.jit(jax.grad(loss))(initialised(small()))

    for a, b in zip(
        jax.tree.leaves(grads(small())), jax.tree.leaves(grads(small(remat=remat))), strict=True
    ):
        np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize('remat, times', [('none', 2), ('dots', 2), ('full', 3)])
def test_only_full_remat_computes_the_softmax_of_a_block_once_more(remat, times):
    def loss(p):
        return small(remat=remat).apply({'params': p}, images())['patch_tokens'].std()

    text = str(jax.make_jaxpr(jax.grad(loss))(initialised(small())))
    # Once for the output; the backward pass has the weights from the kept normalizers.
    assert len(re.findall(r'f32\[\d+,\d+,17,17\] = exp ', text)) == times


def test_bfloat16_computes_in_it_and_keeps_float32_parameters():
    model = small(dtype=jnp.bfloat16)
    params = initialised(model)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype('float32')}
    out, exact = apply(model, images()), apply(small(), images())
    assert out['patch_tokens'].dtype == jnp.bfloat16
    a, b = (np.asarray(o['patch_tokens'], np.float32).ravel() for o in (out, exact))
    assert np.corrcoef(a, b)[0, 1] > 0.999


def test_fused_qkv_and_patch_bias_start_as_in_the_official_code():
    model = small(embed_dim=64, pos_embed='sincos')
    params = initialised(model)
    qkv = np.abs(params['blocks']['attn']['qkv']['kernel']).max()
    assert 0.95 * (6 / (4 * 64)) ** 0.5 < qkv <= (6 / (4 * 64)) ** 0.5
    bias = np.abs(params['patch_embed']['proj']['bias']).max()
    assert 0.5 * (3 * 64) ** -0.5 < bias <= (3 * 64) ** -0.5
    assert not params['blocks']['mlp']['fc1']['bias'].any()


def test_a_block_beyond_the_depth_is_an_error():
    with pytest.raises(ValueError, match='beyond depth 3'):
        apply(small(), images(), capture=(3,))


def test_an_unknown_ffn_is_an_error():
    with pytest.raises(ValueError, match="ffn='relu' is unknown"):
        vit.init_params(small(ffn='relu'), jax.random.key(0))
