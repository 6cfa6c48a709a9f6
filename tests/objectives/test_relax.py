# SPDX-License-Identifier: Apache-2.0
"""RELAX finds what an embedding depends on, in one pass over random masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ssl_jax.objectives import relax
from ssl_jax.run import errors

KEY = jax.random.key(3)
draw = functools.partial(relax.soft_mask, size=(20, 24), cells=5)
estimate = jax.jit(relax.estimate, static_argnums=(0, 1, 3, 4))


def test_an_encoder_that_sees_nothing_finds_everything_important_and_certain():
    def distances(masks):
        same = jnp.ones((len(masks), 8)) * 0.3
        return relax.distance(same, same[0])

    mean, variance = estimate(distances, draw, KEY, 100, 32)
    np.testing.assert_array_equal(mean, 0)
    np.testing.assert_array_equal(variance, 0)


def test_an_encoder_of_one_block_finds_this_block():
    image = jax.random.normal(jax.random.key(0), (20, 24, 3))

    def distances(masks):
        def embed(x):
            return x[:, 4:9, 15:20].reshape(len(x), -1)

        return relax.distance(embed(image * masks[..., None]), embed(image[None]))

    mean, _ = estimate(distances, draw, KEY, 1000, 100)
    row, column = np.unravel_index(np.argmin(mean), mean.shape)
    assert 4 <= row < 9 and 15 <= column < 20
    inside = np.zeros(mean.shape, bool)
    inside[4:9, 15:20] = True
    assert mean[inside].mean() < mean[~inside].mean() - 0.05


def scores(masks):
    return jnp.sin(7 * masks[:, 3, 5]) + masks[:, 10, 8]  # any function of the masks


def test_streamed_sums_are_the_weighted_mean_and_variance_of_two_passes():
    mean, variance = estimate(scores, draw, KEY, 70, 32)  # the last batch is not full
    keys = jax.vmap(lambda n: jax.random.fold_in(KEY, n))(jnp.arange(70))
    masks = jax.jit(jax.vmap(draw))(keys)
    d = np.asarray(scores(masks), np.float64)[:, None, None]
    masks = np.asarray(masks, np.float64)
    want = (masks * d).sum(0) / masks.sum(0)
    np.testing.assert_allclose(mean, want, atol=1e-5)
    want = (masks * (d - want) ** 2).sum(0) / masks.sum(0)
    np.testing.assert_allclose(variance, want, atol=1e-5)


def test_the_same_key_gives_the_same_map_in_batches_of_any_size():
    first, _ = estimate(scores, draw, KEY, 70, 32)
    again, _ = estimate(scores, draw, KEY, 70, 32)
    np.testing.assert_array_equal(first, again)
    small, _ = estimate(scores, draw, KEY, 70, 7)
    np.testing.assert_allclose(first, small, atol=1e-5)
    other, _ = estimate(scores, draw, jax.random.key(4), 70, 32)
    assert np.abs(first - other).max() > 1e-2


@pytest.mark.parametrize('offset', range(7))
def test_masks_of_the_reference_are_torch_s_bilinear_ones_reflected_and_shifted(offset):
    cells = torch.eye(7)[None, None]
    large = torch.nn.functional.interpolate(cells, (32, 32), mode='bilinear')
    large = torch.nn.functional.pad(large, (3,) * 4, mode='reflect')
    want = large[0, 0, offset : offset + 32, offset : offset + 32]
    rows = np.asarray(relax.interpolation(32, 7, offset, 'pixels'))
    np.testing.assert_allclose(rows @ rows.T, want, atol=1e-5)


@pytest.mark.parametrize(
    'shift,offsets,low,high', [('cell', 32, 0.31, 0.44), ('pixels', 7, 0.25, 0.50)]
)
def test_the_shift_of_rise_treats_positions_more_alike_than_that_of_the_reference(
    shift, offsets, low, high
):
    """Standard deviation of a pixel of the masks at 224 px: p (1 - p) E[sum of squared weights]."""
    squares = jax.vmap(lambda n: jnp.square(relax.interpolation(224, 7, n, shift)).sum(axis=1))
    side = np.asarray(jax.jit(squares)(jnp.arange(offsets))).mean(axis=0)
    deviation = np.sqrt(0.25 * side[:, None] * side)
    np.testing.assert_allclose((deviation.min(), deviation.max()), (low, high), atol=5e-3)


def test_a_mask_of_patches_shows_just_as_many_as_it_should_and_the_chosen_one_always():
    one = functools.partial(relax.patch_mask, grid=(6, 8), kept=12, cells=4, always=17)
    masks = jax.jit(jax.vmap(one))(jax.random.split(KEY, 1000))
    np.testing.assert_array_equal(masks.sum(axis=(1, 2)), 12)
    flat = np.asarray(masks).reshape(len(masks), -1)
    np.testing.assert_array_equal(flat[:, 17], 1)
    np.testing.assert_array_equal(relax.kept_ids(masks, 12)[5], np.flatnonzero(flat[5]))
    others = np.delete(flat.mean(axis=0), 17)
    assert others.min() > 0.15 and others.max() < 0.32  # 11 of 47 are 0.23


def test_u_relax_is_the_importance_of_the_more_certain_half():
    uncertainty = np.arange(12.0).reshape(3, 4)
    kept = np.asarray(relax.certain(np.full((3, 4), 0.7), uncertainty))
    np.testing.assert_allclose(kept, np.where(uncertainty <= 5.5, 0.7, 0))


def test_agreement_counts_the_estimates_in_which_a_position_is_above_the_mean():
    maps = np.array([[[0.0, 1.0, 0.1]], [[0.0, 1.0, 0.9]]])
    found = relax.agreement(maps)
    np.testing.assert_allclose(found['important'], [[0, 1, 0.5]])
    np.testing.assert_allclose(found['spread'], [[0, 0, 0.4]], atol=1e-6)


@pytest.mark.parametrize(
    'field,value', [('num_masks', 0), ('keep', 1.0), ('shift', 'cells'), ('similarity', 'l3')]
)
def test_a_wrong_setting_is_a_sentence(field, value):
    with pytest.raises(errors.UserError, match=f'{field}=.*(use|did you mean)'):
        relax.Settings(**{field: value})
