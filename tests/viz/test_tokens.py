# SPDX-License-Identifier: Apache-2.0
"""Colours and maps of patch tokens show what is alike, not where it lies."""

import itertools

import numpy as np

from ssl_jax.viz import tokens as tokens_lib

GRID = (8, 8)


def objects(n=12, d=16, place=4.0, seed=0):
    """Tokens (n, 64, d) of a 2x2 object in a background, with large position embeddings.

    Returns:
      tokens, bool (n, 8, 8) of the objects, kinds (n,) of the objects.
    """
    world, rng = np.random.default_rng(0), np.random.default_rng(seed)
    back, front, difference = 2 * world.normal(size=(3, d))
    fronts = front + difference / 2, front - difference / 2
    places = place * world.normal(size=(*GRID, d))
    kinds = rng.integers(0, 2, n)
    where = np.zeros((n, *GRID), bool)
    x = np.tile(back, (n, *GRID, 1))
    for i in range(n):
        r, c = rng.integers(1, 6, 2)
        where[i, r : r + 2, c : c + 2] = True
        x[i][where[i]] = fronts[kinds[i]]
    x += 0.02 * rng.normal(size=x.shape) + places
    return x.reshape(n, 64, d), where, kinds


def test_equal_tokens_have_equal_colours_and_different_tokens_different_ones():
    rng = np.random.default_rng(0)
    kinds = rng.normal(size=(4, 16))
    which = rng.integers(0, 4, (2, 6))
    tokens = kinds[which] + 1e-3 * rng.normal(size=(2, 6, 16))
    colours = tokens_lib.colours(tokens, (2, 3)).reshape(-1, 3)
    for a, b in itertools.combinations(range(12), 2):
        distance = np.abs(colours[a].astype(int) - colours[b]).max()
        same = which.ravel()[a] == which.ravel()[b]
        assert distance < 10 if same else distance > 30


def test_objects_are_found_behind_position_embeddings_only_without_their_mean():
    many, *_ = objects(400, seed=1)
    tokens, where, _ = objects()
    found = tokens_lib.foreground(tokens_lib.centred(tokens, many.mean(axis=0)), GRID)
    np.testing.assert_array_equal(found, where)
    assert (tokens_lib.foreground(tokens, GRID) != where).mean() > 0.1


def test_objects_of_one_kind_have_one_colour_in_the_foreground_and_the_rest_is_black():
    many, *_ = objects(400, seed=1)
    tokens, where, kinds = objects()
    tokens = tokens_lib.centred(tokens, many.mean(axis=0))
    colours = tokens_lib.colours(tokens, GRID, where).astype(int)
    assert not colours[~where].any()
    red = [colours[i][where[i]][:, 0].mean() for i in range(len(kinds))]
    a, b = (np.array(red)[kinds == k] for k in (0, 1))
    assert abs(a.mean() - b.mean()) > 150 and max(a.std(), b.std()) < 40


def test_pictures_do_not_depend_on_the_sign_or_order_in_which_components_are_found():
    tokens, *_ = objects(place=0.0)
    turned = tokens[::-1]
    np.testing.assert_allclose(
        tokens_lib.colours(turned, GRID)[::-1].astype(int), tokens_lib.colours(tokens, GRID), atol=1
    )
    np.testing.assert_array_equal(
        tokens_lib.foreground(-tokens, GRID), tokens_lib.foreground(tokens, GRID)
    )


def test_a_threshold_lies_between_two_groups():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0, 1, 900), rng.normal(20, 1, 100)])
    assert 4 < tokens_lib.threshold(values) < 16


def test_tokens_without_variance_or_with_few_channels_are_drawn_too():
    for shape in ((2, 4, 8), (1, 4, 2)):
        same = np.ones(shape)
        assert tokens_lib.colours(same, (2, 2)).shape == (shape[0], 2, 2, 3)
        assert tokens_lib.foreground(same, (2, 2)).shape == (shape[0], 2, 2)
    nothing = np.zeros((2, 2, 2), bool)
    assert not tokens_lib.colours(
        np.random.default_rng(0).normal(size=(2, 4, 8)), (2, 2), nothing
    ).any()


def test_a_patch_is_most_similar_to_itself_and_least_to_its_opposite():
    tokens = np.random.default_rng(0).normal(size=(2, 9, 8))
    tokens[1, 4] = -tokens[0, 2]
    found = tokens_lib.similarity(tokens[0, 2], tokens)
    assert found.shape == (2, 9) and found.argmax() == 2 and found.argmin() == 9 + 4
    np.testing.assert_allclose([found[0, 2], found[1, 4]], [1, -1], atol=1e-6)
    assert not tokens_lib.similarity(np.zeros(8), tokens).any()
