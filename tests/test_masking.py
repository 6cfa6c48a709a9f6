# SPDX-License-Identifier: Apache-2.0
"""Masks are exact in number, block-shaped where asked, and a function of the key."""

import jax
import numpy as np
import pytest

from ssl_jax import augment, masking


def spec_noise(rows, n, offset):
    """frac(sin(12.9898 j + offset) * 43758.5453), the noise of the published examples."""
    j = np.arange(1, n + 1)
    x = np.sin(12.9898 * j[None] + np.asarray(offset)[:, None]) * 43758.5453
    return (x - np.floor(x)).astype(np.float32)[:rows]


def visible(mask):
    return [sorted(np.flatnonzero(row == 0)) for row in np.asarray(mask.mask)]


def test_single_patches_match_the_published_example():
    noise = spec_noise(1, 64, [78.233])
    mask = masking.from_noise(noise, (8, 8), 0.75)
    assert visible(mask)[0] == [3, 9, 16, 21, 24, 26, 28, 34, 37, 38, 42, 46, 53, 55, 60, 63]
    assert list(mask.ids_restore[0, :8]) == [45, 34, 25, 13, 50, 46, 29, 32]


def test_blocks_of_two_match_the_published_example():
    mask = masking.from_noise(spec_noise(1, 16, [78.233]), (8, 8), 0.75, mask_grid=2)
    want = [6, 7, 14, 15, 34, 35, 42, 43, 48, 49, 52, 53, 56, 57, 60, 61]
    assert visible(mask)[0] == want
    assert list(mask.ids_restore[0, :8]) == [48, 49, 36, 37, 20, 21, 4, 5]


def test_blocks_of_four_are_expanded_in_place_in_the_order_of_the_noise():
    mask = masking.from_noise(spec_noise(1, 16, [78.233]), (16, 16), 0.75, mask_grid=4)
    ids = list(mask.ids_keep[0])
    assert ids[::16] == [132, 12, 200, 192]
    assert ids[:8] == [132, 133, 134, 135, 148, 149, 150, 151]


@pytest.mark.parametrize('grid,ratio', [((14, 14), 0.75), ((16, 16), 0.6), ((7, 5), 0.5)])
def test_every_image_keeps_the_same_number_of_patches(grid, ratio):
    keys = jax.random.split(jax.random.key(0), 5)
    mask = masking.random_masking(keys, grid, ratio)
    n = grid[0] * grid[1]
    assert mask.ids_keep.shape == (5, int(n * (1 - ratio)))
    assert (np.asarray(mask.mask).sum(axis=1) == n - int(n * (1 - ratio))).all()


def test_ids_restore_puts_kept_patches_back():
    mask = masking.random_masking(jax.random.split(jax.random.key(1), 3), (8, 8), 0.75, 2)
    kept = mask.ids_keep.shape[1]
    for ids, restore in zip(np.asarray(mask.ids_keep), np.asarray(mask.ids_restore)):
        assert list(restore[ids]) == list(range(kept))


def test_a_grid_that_blocks_do_not_divide_is_one_sentence():
    with pytest.raises(ValueError, match='mask_grid=4 does not divide the token grid 14x14'):
        masking.num_blocks((14, 14), 4)


def test_what_a_sample_draws_depends_on_its_row_alone():
    rng = jax.random.key(3)
    whole = augment.sample_keys(rng, np.arange(8))
    part = augment.sample_keys(rng, np.array([2, 6]))
    assert (jax.random.key_data(whole)[np.array([2, 6])] == jax.random.key_data(part)).all()
