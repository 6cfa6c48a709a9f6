# SPDX-License-Identifier: Apache-2.0
"""The pictures of a masked autoencoder say what was seen, what was given and what was predicted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from ssl_jax import losses, masking, methods


@pytest.fixture(scope='module')
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)


def reconstruct(images, bias, **fields):
    """Pictures as float patches (B, N, p*p*3), with a decoder that predicts `bias` everywhere."""
    method = methods.from_config(tiny.config(**fields))
    params, _ = method.init(jax.random.key(0))
    last = params['decoder']['decoder_pred']
    last.update(kernel=jnp.zeros_like(last['kernel']), bias=jnp.full_like(last['bias'], bias))
    keys = jax.random.split(jax.random.key(1), len(images))
    made = jax.jit(method.reconstruct)(params, images, keys)
    mask = masking.random_masking(keys, method.grid, method.mask_ratio, method.mask_grid).mask
    return {k: np.asarray(losses.patchify(v, 8)) for k, v in made.items()}, np.asarray(mask) == 1


def test_visible_patches_are_the_original_and_hidden_ones_are_grey_or_predicted(images):
    made, hidden = reconstruct(images, bias=0.3)
    for name in ('masked', 'means', 'stitched'):
        np.testing.assert_allclose(made[name][~hidden], made['image'][~hidden], atol=1e-6)
    np.testing.assert_allclose(made['masked'][hidden], 0.5, atol=1e-6)
    np.testing.assert_array_equal(made['stitched'][hidden], made['prediction'][hidden])


def test_of_normalised_patches_the_given_means_are_all_that_a_blank_prediction_shows(images):
    made, hidden = reconstruct(images, bias=0.0)
    np.testing.assert_allclose(made['means'], made['stitched'], atol=1e-6)
    assert np.abs(made['means'][hidden] - made['image'][hidden]).max() > 0.1
    says_something, _ = reconstruct(images, bias=0.3)
    np.testing.assert_array_equal(says_something['means'], made['means'])
    assert np.abs(says_something['stitched'] - made['stitched'])[hidden].min() > 0.01


def test_of_plain_pixels_nothing_is_given(images):
    made, _ = reconstruct(images, bias=0.0, method__norm_pix_loss=False)
    assert set(made) == {'image', 'masked', 'prediction', 'stitched'}
