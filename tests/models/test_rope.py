# SPDX-License-Identifier: Apache-2.0
"""Rotary positions: what they turn, and that crops and dropped images keep theirs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.kernels.segments import Segment
from ssl_jax.models import rope
from ssl_jax.models import vit as vit_lib

QUICK = {'xla_backend_optimization_level': 0}
rotate = jax.jit(rope.rotate, static_argnums=1)
VIT = vit_lib.ViT(
    embed_dim=32,
    depth=2,
    num_heads=2,
    patch_size=8,
    img_size=32,
    num_register_tokens=2,
    pos_embed='rope',
    key_bias=False,
    layer_scale=1.0,
    init_scheme='dinov3',
)


def drawn(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.fixture(scope='module')
def params():
    """Random ones, so that every token matters."""
    shapes = jax.eval_shape(lambda: vit_lib.init_params(VIT, jax.random.key(0)))
    leaves, tree = jax.tree.flatten(shapes)
    return tree.unflatten([0.3 * drawn(x.shape, i) for i, x in enumerate(leaves)])


def apply(params, *args, **kw):
    run = jax.jit(lambda p, a, kw: VIT.apply({'params': p}, *a, **kw), compiler_options=QUICK)
    return run(params, args, kw)


def test_periods_reach_from_one_to_almost_a_hundred():
    np.testing.assert_allclose(rope.periods(16), [1, 100**0.25, 10, 100**0.75], rtol=1e-6)
    with pytest.raises(ValueError, match='multiple of 4 channels, not 6: change num_heads'):
        rope.periods(6)


def test_the_product_of_a_query_and_a_key_depends_on_their_distance_alone():
    h, w, d = 3, 5, 16
    cos, sin = rope.tables([(h, w)], 0, [Segment(1, h * w)], d)
    same = jnp.tile(drawn((1, 3 * d)), (h * w, 1))
    q, k, v = np.split(np.asarray(rotate(same, 1, cos, sin)), 3, axis=1)
    logits = (q @ k.T).reshape(h, w, h, w)
    np.testing.assert_allclose(logits[0, 0, 1, 2], logits[1, 2, 2, 4], rtol=1e-4)
    np.testing.assert_allclose(logits[2, 1, 0, 3], logits[2, 0, 0, 2], rtol=1e-4)
    assert abs(logits[0, 0, 1, 2] - logits[0, 0, 2, 1]) > 0.1
    np.testing.assert_array_equal(v, same[:, 2 * d :])


def test_class_tokens_registers_and_padding_are_not_turned():
    cos, sin = rope.tables([(2, 2), (1, 1)], 3, [Segment(2, 7, 1), Segment(1, 4)], 8)
    still = [0, 1, 2, 7, 8, 9, 10, 15, 16, 17, 18]
    x = np.asarray(drawn((2 * len(cos), 24)))
    y = np.asarray(rotate(x, 1, cos, sin))
    for row in (0, len(cos)):
        np.testing.assert_array_equal(y[row:][still], x[row:][still])
        assert (y[row + 3 : row + 7, :16] != x[row + 3 : row + 7, :16]).all()
    np.testing.assert_array_equal(cos[3:7], cos[11:15])  # the second image as the first


def test_a_scale_multiplies_the_coordinates():
    a, b = (rope.angles((2, 3), 8, s) for s in (None, jnp.float32(1.5)))
    np.testing.assert_allclose(b, 1.5 * a, rtol=1e-6)
    np.testing.assert_allclose(a[:, 0], np.repeat([-0.5, 0.5], 3) * 2 * np.pi, rtol=1e-6)
    np.testing.assert_allclose(a[:3, 2], np.array([-2, 0, 2]) / 3 * 2 * np.pi, atol=1e-6)


def test_crops_of_several_sizes_in_one_pass_are_as_each_alone(params):
    crops = (drawn((2, 2, 32, 32, 3)), drawn((2, 3, 16, 24, 3), 1))
    scale = jnp.float32(0.7)
    both = apply(params, crops, pos_scale=scale)
    for x, out in zip(crops, both, strict=True):
        alone = apply(params, x.reshape(-1, *x.shape[2:]), pos_scale=scale)
        for name in ('cls_tokens', 'patch_tokens'):
            got = out[name].reshape(alone[name].shape)
            np.testing.assert_allclose(got, alone[name], atol=2e-5)


def test_images_that_skip_branches_leave_the_others_their_positions(params):
    crops = (drawn((1, 2, 32, 32, 3)), drawn((1, 3, 16, 24, 3), 1))
    # Of each size one image goes through both branches of both blocks, in DINOv2's form ...
    kept = (1, 2)
    ids = tuple(jnp.full((2, 1, 2, 1), k, jnp.int32) for k in kept)
    subset = apply(params, crops, drop=ids)
    # ... and in that of factors per image, where it is weighted by n / k too.
    factors = np.zeros((2, 1, 5, 2), np.float32)
    factors[:, :, 1], factors[:, :, 2 + 2] = 2, 3
    image = apply(params, crops, drop=jnp.asarray(factors))
    for a, b in zip(subset, image, strict=True):
        np.testing.assert_allclose(a['patch_tokens'], b['patch_tokens'], atol=2e-5)


def test_a_scale_of_the_positions_changes_the_tokens_and_is_no_parameter(params):
    x = drawn((1, 32, 32, 3))
    a, b, c = (
        apply(params, x, pos_scale=s)['patch_tokens'] for s in (None, jnp.ones(()), jnp.float32(2))
    )
    np.testing.assert_allclose(a, b, atol=1e-6)
    assert np.abs(a - c).max() > 0.01
    assert 'pos_embed' not in params


def test_some_of_the_patches_are_refused(params):
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    with pytest.raises(ValueError, match="pos_embed='rope' is for whole images"):
        keep = jnp.zeros((1, 2), jnp.int32)
        jax.eval_shape(lambda x: VIT.apply({'params': params}, x, ids_keep=keep), images)
