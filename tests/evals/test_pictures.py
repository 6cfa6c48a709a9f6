# SPDX-License-Identifier: Apache-2.0
"""Pictures in the loop show images from all over a source, the same ones every time."""

import numpy as np
import pytest

from ssl_jax.data import sources
from ssl_jax.evals import pictures


def test_the_images_shown_come_from_all_over_a_source():
    images = np.arange(40, dtype=np.uint8)[:, None, None, None] * np.ones((8, 8, 3), np.uint8)
    got = pictures.spread_images(sources.Arrays(images), 8, 4)
    assert (got[:, 0, 0, 0] // 10).tolist() == [0, 1, 2, 3]
    assert len(pictures.spread_images(sources.Arrays(images[:3]), 8, 4)) == 3


def test_of_classes_that_take_turns_the_images_shown_have_many():
    images = np.arange(1000)[:, None, None, None] % 10 * np.ones((8, 8, 3), np.uint8)
    got = pictures.spread_images(sources.Arrays(images.astype(np.uint8)), 8, 8)
    assert len(set(got[:, 0, 0, 0].tolist())) >= 5


def test_an_image_to_show_that_does_not_decode_gives_way_to_another():
    images = [np.full((8, 8, 3), i, np.uint8) for i in range(40)]
    shown = pictures.spread_images(sources.Arrays(images), 8, 4)[:, 0, 0, 0].tolist()
    images[shown[1]] = b'broken'
    got = pictures.spread_images(sources.Arrays(images), 8, 4)[:, 0, 0, 0].tolist()
    assert got == [shown[0], *shown[2:], shown[0] + 1]


def test_images_of_which_none_decodes_are_one_sentence():
    with pytest.raises(ValueError, match='None of 3 images of .* decodes'):
        pictures.spread_images(sources.Arrays([b'broken'] * 3), 8, 2)
