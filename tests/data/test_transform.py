# SPDX-License-Identifier: Apache-2.0
"""What an encoder sees of an image: the square, its margins, maps, strips, earlier transforms."""

import numpy as np
import PIL.Image
import pytest

from ssl_jax.data import host
from ssl_jax.data import transform as transform_lib


def picture(height=90, width=131, seed=0):
    image = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return np.asarray(PIL.Image.fromarray(image).resize((2 * width, 2 * height)))


@pytest.mark.parametrize('size,side', [(32, 40), (96, 96), (33, 36), (32, 41)])
def test_a_square_is_pillows_resize_then_the_centre(size, side):
    image, width = picture(), int(side * 131 / 90)
    whole = PIL.Image.fromarray(image).resize((width, side), PIL.Image.Resampling.BICUBIC)
    y, x = (side - size) // 2, (width - size) // 2
    want = np.asarray(whole)[y : y + size, x : x + size]
    got = transform_lib.cut(image, {**transform_lib.of(size), 'crop': size / side})
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    'library,margins', [('transformers', (1, 0, -1, -2)), ('timm', (2, 0, 0, -1))]
)
def test_odd_margins_are_rounded_as_the_library_does(library, margins):
    """3, 1, -1 and -3 pixels too many, with every row of another value."""
    view = {**transform_lib.of(20), 'mode': 'none', 'library': library}
    for height, margin in zip((23, 21, 19, 17), margins, strict=True):
        rows = np.arange(1, height + 1, dtype=np.uint8)
        image = np.broadcast_to(rows[:, None, None], (height, 20, 3))
        got = transform_lib.cut(image, view)[:, 0, 0].tolist()
        want = [i + 1 if 0 <= i < height else 0 for i in range(margin, margin + 20)]
        assert got == want, height


def test_a_map_gets_no_new_values_and_the_same_square():
    labels = np.random.default_rng(0).choice(np.array([0, 7, 11], np.uint8), (60, 80))
    for mode in transform_lib.MODES:
        view = {**transform_lib.of(24), 'mode': mode, 'mean': [0.5] * 3}
        cut = transform_lib.cut(labels, view, 'nearest')
        border = [255] if mode == 'border' else []  # where no class counts
        assert np.unique(cut).tolist() == [0, 7, 11, *border] and cut.shape == (24, 24)
    depth = transform_lib.cut(np.full((60, 80), 2.5, np.float32), transform_lib.of(24), 'nearest')
    assert depth.dtype == np.float32 and (depth == 2.5).all()


def test_a_strip_is_not_resized_whole(monkeypatch):
    image = picture(30, 400)
    want = transform_lib.cut(image, transform_lib.of(48))
    monkeypatch.setattr(host, 'MAX_PIXELS', 1000)
    got = transform_lib.cut(image, transform_lib.of(48))
    assert np.abs(got.astype(int) - want).max() <= 1
    monkeypatch.undo()
    assert transform_lib.cut(picture(1, 4000), transform_lib.of(240)).shape == (240, 240, 3)
    assert transform_lib.cut(picture(4000, 1), transform_lib.of(240)).shape == (240, 240, 3)


def test_a_transform_of_an_earlier_version_is_understood():
    old = dict(size=32, crop=0.875, mean=[0.5] * 3, std=[0.5] * 3, interpolation='bilinear')
    new = {**old, 'mode': 'center', 'library': 'torchvision'}
    assert transform_lib.of(old) == new == transform_lib.of(new)
    squeezed = transform_lib.of({**old, 'crop': None})
    assert (squeezed['mode'], transform_lib.side(squeezed)) == ('squash', 32)


def test_a_transform_is_told_in_a_phrase_and_our_protocol_is_that_of_earlier_versions():
    view = transform_lib.of(224)
    assert transform_lib.describe(view) == '224 px'
    assert transform_lib.protocol(view) == dict(
        resolution=224,
        resize=224,
        crop='centre',
        interpolation='bicubic, antialiased (Pillow)',
    )
    assert transform_lib.describe({**view, 'crop': 0.875}) == 'short side 256, central 224 px'
    squeezed = {**view, 'mode': 'squash', 'interpolation': 'bilinear'}
    assert transform_lib.describe(squeezed) == 'both sides 224, central 224 px'
    said = transform_lib.protocol(squeezed)
    assert 'squash' in said['crop'] and said['interpolation'] == 'bilinear, antialiased (Pillow)'
