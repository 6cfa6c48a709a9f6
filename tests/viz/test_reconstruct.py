# SPDX-License-Identifier: Apache-2.0
"""The pictures of a model say what it saw, what it was given and what it predicted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from ssl_jax import config, methods, train
from ssl_jax.models import patches as patches_lib
from ssl_jax.objectives import masking
from ssl_jax.objectives import words as words_lib


@pytest.fixture(scope='module')
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)


def reconstruct(images, bias, **fields):
    """Pictures as float patches (B, N, p*p*3), with a decoder that predicts `bias` everywhere."""
    method = methods.make(tiny.config(**fields))
    params, extra = method.init(jax.random.key(0))
    last = params['decoder']['decoder_pred']
    last.update(kernel=jnp.zeros_like(last['kernel']), bias=jnp.full_like(last['bias'], bias))
    keys = jax.random.split(jax.random.key(1), len(images))
    made = jax.jit(method.reconstruct)(params, extra, images, keys)
    mask = masking.random_masking(keys, method.grid, method.mask_ratio, method.mask_grid).mask
    return {k: np.asarray(patches_lib.patchify(v, 8)) for k, v in made.items()}, np.asarray(
        mask
    ) == 1


def test_visible_patches_are_the_original_and_hidden_ones_are_grey_or_predicted(images):
    made, hidden = reconstruct(images, bias=0.3)
    for name in ('masked', 'means', 'stitched'):
        np.testing.assert_allclose(made[name][~hidden], made['image'][~hidden], atol=1e-6)
    np.testing.assert_allclose(made['masked'][hidden], 0.5, atol=1e-6)
    np.testing.assert_allclose(made['stitched'][hidden], made['prediction'][hidden], atol=1e-6)


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


def in_words(images, method, *fields, shown=None):
    """Pictures as patches, method and extra; word 3 is predicted everywhere.

    With `shown`, pictures of those in the words of `images`, as the untrained head predicts them.
    """
    small = ('method.embed_dim=32', 'method.depth=1', 'method.num_heads=2', 'method.vocab=16')
    small += ('method.img_size=32', 'method.patch_size=8', 'method.token_patch_size=4')
    method = methods.make(config.load(f'scenes_{method}', [*small, *fields]))
    params, extra = method.init(jax.random.key(0))
    if 'method.tokenizer=pixel' not in fields:
        book = words_lib.fit(method.tok, extra['codebook'], iter([images]), seed=0)
        extra = {**extra, 'codebook': book}
        head = params['head']
        if shown is None:
            head.update(kernel=jnp.zeros_like(head['kernel']), bias=jnp.zeros(16).at[3].set(1.0))
    keys = jax.random.split(jax.random.key(1), len(images))
    shown = images if shown is None else shown
    made = jax.jit(method.reconstruct)(params, extra, shown, keys)
    return {k: np.asarray(patches_lib.patchify(v, 8)) for k, v in made.items()}, method, extra


@pytest.mark.parametrize(('method', 'share'), [('splitmask', 8), ('beit', 6)])
def test_missing_patches_are_drawn_as_the_words_predicted(images, method, share):
    made, method, extra = in_words(images, method)
    hidden = (made['masked'] == 0.5).all(axis=-1)
    assert (hidden.sum(axis=1) == share).all()  # of 16 patches
    three = jnp.full((3, 16), 3)
    want = words_lib.draw(method.tok, extra['codebook'], three, images / 255.0)
    want = np.asarray(patches_lib.patchify(want, 8))
    np.testing.assert_allclose(made['stitched'][hidden], want[hidden], atol=1e-6)
    np.testing.assert_allclose(made['stitched'][~hidden], made['image'][~hidden], atol=1e-6)
    words = words_lib.tokens(method.tok, extra['codebook'], images / 255.0)
    same = np.asarray(words) == 3
    assert same.any() and not same.all()
    np.testing.assert_allclose(made['words'][same], want[same], atol=1e-6)


@pytest.mark.parametrize('method', ['splitmask', 'beit'])
def test_what_is_grey_was_not_seen(images, method):
    def predicted(patches):
        shown = patches_lib.unpatchify(patches, (4, 4), 8)
        return in_words(images, method, shown=shown)[0]['prediction']

    grey = (in_words(images, method)[0]['masked'] == 0.5).all(axis=-1, keepdims=True)
    patches = np.asarray(patches_lib.patchify(images, 8))
    turned = patches.reshape(3, 16, 64, 3)[:, :, ::-1].reshape(patches.shape)  # of equal length
    before = predicted(patches)
    np.testing.assert_allclose(predicted(np.where(grey, turned, patches)), before, atol=1e-6)
    assert np.abs(predicted(np.where(grey, patches, turned)) - before).max() > 0.1


def test_pixels_as_the_target_of_splitmask_are_drawn_as_of_a_masked_autoencoder(images):
    made, *_ = in_words(images, 'splitmask', 'method.tokenizer=pixel')
    assert set(made) == {'image', 'masked', 'means', 'prediction', 'stitched'}


def test_where_nothing_is_predicted_or_words_have_no_look_there_is_no_picture(images):
    assert in_words(images, 'splitmask', 'method.w_mim=0')[0] == {}
    assert in_words(images, 'beit', 'method.tokenizer=random_projection')[0] == {}


def test_images_are_reconstructed_at_the_size_of_training_also_where_others_evaluate(tmp_path):
    train.train(tiny.config(eval__tasks__pictures={}, eval__size=48, total_steps=3), tmp_path)
    assert (tmp_path / 'pictures' / 'reconstruction_0000003.png').exists()


def chosen(method, params, extra, images, hidden):
    """Pictures as patches with `hidden` patches (N,) in every image."""
    order = np.argsort(hidden, kind='stable')[None].repeat(len(images), axis=0)
    draw = jax.jit(method.reconstruct_hidden, static_argnums=4)
    made = draw(params, extra, images, order, int((~hidden).sum()))
    return {k: np.asarray(patches_lib.patchify(v, 8)) for k, v in made.items()}


@pytest.mark.parametrize('name', ['mae', 'splitmask', 'beit'])
def test_patches_that_are_chosen_are_hidden_and_no_others(images, name):
    if name == 'mae':
        method = methods.make(tiny.config(method__norm_pix_loss=False))
        params, extra = method.init(jax.random.key(0))
    else:
        fields = ['method.embed_dim=32', 'method.depth=1', 'method.num_heads=2']
        fields += ['method.vocab=16', 'method.img_size=32', 'method.patch_size=8']
        method = methods.make(config.load(f'scenes_{name}', [*fields, 'method.token_patch_size=4']))
        params, extra = method.init(jax.random.key(0))
        book = words_lib.fit(method.tok, extra['codebook'], iter([images]), seed=0)
        extra = {**extra, 'codebook': book}
    hidden = np.zeros(16, bool)
    hidden[[1, 2, 7, 12, 13]] = True
    made = chosen(method, params, extra, images, hidden)
    np.testing.assert_allclose(made['masked'][:, hidden], 0.5, atol=1e-6)
    np.testing.assert_allclose(made['stitched'][:, ~hidden], made['image'][:, ~hidden], atol=1e-6)
    patches = np.asarray(patches_lib.patchify(images, 8))
    turned = patches.reshape(3, 16, 64, 3)[:, :, ::-1].reshape(patches.shape)  # of equal length

    def predicted(where):
        shown = patches_lib.unpatchify(np.where(where[None, :, None], turned, patches), (4, 4), 8)
        made = chosen(method, params, extra, np.asarray(shown), hidden)
        return made['prediction']

    nothing = predicted(np.zeros(16, bool))
    np.testing.assert_allclose(predicted(hidden), nothing, atol=1e-6)
    assert np.abs(predicted(~hidden) - nothing).max() > 0.01


def test_a_chosen_mask_gives_the_picture_of_the_same_random_mask(images):
    method = methods.make(tiny.config())
    params, extra = method.init(jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), 3)
    mask = masking.random_masking(keys, method.grid, method.mask_ratio, method.mask_grid)
    order, visible = np.argsort(mask.ids_restore, axis=1), mask.ids_keep.shape[1]
    given = method.reconstruct_hidden(params, extra, images, order, visible)
    drawn = method.reconstruct(params, extra, images, keys)
    for name, picture in drawn.items():
        np.testing.assert_allclose(given[name], picture, atol=1e-5)
