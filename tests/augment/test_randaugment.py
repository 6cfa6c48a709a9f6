# SPDX-License-Identifier: Apache-2.0
"""RandAugment's operations are Pillow's, its draws those of the keys; erasing as described."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from ssl_jax.augment import photometry, randaugment

FILL = (124, 116, 104)
LEVEL = 0.6


@functools.lru_cache
def picture():
    """uint8 (24, 20, 3) with smooth and with random parts, without black and white."""
    rng = np.random.default_rng(0)
    x = np.linspace(20, 200, 20)[None, :, None] + 30 * np.sin(np.arange(24) / 3)[:, None, None]
    x = x + rng.integers(-15, 16, (24, 20, 3)) + np.array([0, 10, 20])
    return np.clip(x, 8, 240).astype(np.uint8)


@functools.partial(jax.jit, static_argnums=0)
def _run(name, image, level, sign):
    op = randaugment.OPS.index(name)
    draws = (jnp.full((1, 1), op), level.reshape(1, 1), sign.reshape(1, 1), jnp.ones((1, 1), bool))
    return randaugment.apply(image[None], randaugment.Draws(*draws))[0]


def run(name, image=None, level=LEVEL, sign=1.0):
    image = picture() if image is None else image
    return np.asarray(_run(name, image, jnp.float32(level), jnp.float32(sign)))


def pillow(name, sign=1.0):
    """The operation as timm calls Pillow, at LEVEL."""
    image, level = Image.fromarray(picture()), LEVEL
    factor, how = 1 + 0.9 * level * sign, dict(resample=Image.BILINEAR, fillcolor=FILL)
    w, h = image.size

    def shift(*m):
        return image.transform(image.size, Image.AFFINE, m, **how)

    return np.asarray(
        {
            'auto_contrast': lambda: ImageOps.autocontrast(image),
            'equalize': lambda: ImageOps.equalize(image),
            'invert': lambda: ImageOps.invert(image),
            'posterize': lambda: ImageOps.posterize(image, 4 - int(4 * level)),
            'solarize': lambda: ImageOps.solarize(image, 256 - int(256 * level)),
            'solarize_add': lambda: image.point(
                [min(255, i + int(110 * level)) if i < 128 else i for i in range(256)] * 3
            ),
            'brightness': lambda: ImageEnhance.Brightness(image).enhance(factor),
            'contrast': lambda: ImageEnhance.Contrast(image).enhance(factor),
            'color': lambda: ImageEnhance.Color(image).enhance(factor),
            'sharpness': lambda: ImageEnhance.Sharpness(image).enhance(factor),
            'rotate': lambda: image.rotate(30 * level * sign, **how),
            'shear_x': lambda: shift(1, 0.3 * level * sign, 0, 0, 1, 0),
            'shear_y': lambda: shift(1, 0, 0, 0.3 * level * sign, 1, 0),
            'translate_x': lambda: shift(1, 0, 0.45 * level * sign * w, 0, 1, 0),
            'translate_y': lambda: shift(1, 0, 0, 0, 1, 0.45 * level * sign * h),
        }[name](),
        np.float32,
    )


@pytest.mark.parametrize('sign', [1.0, -1.0])
@pytest.mark.parametrize('name', randaugment.OPS)
def test_operation_equals_pillow(name, sign):
    found, want = run(name, sign=sign), pillow(name, sign)
    assert np.abs(found - want).max() <= 1  # a value on the border of two may be rounded either way
    assert (found != want).mean() < 0.02
    assert (want != picture()).mean() > 0.3, 'the test shows nothing'


@pytest.mark.parametrize('name', randaugment.OPS)
def test_values_stay_whole_and_in_range(name):
    found = run(name, level=1.0)
    assert found.min() >= 0 and found.max() <= 255
    np.testing.assert_array_equal(found, np.round(found))


@pytest.mark.parametrize('name', sorted({*randaugment.OPS} - {
    'auto_contrast', 'equalize', 'invert', 'posterize', 'solarize',
}))  # fmt: skip
def test_level_zero_changes_nothing(name):
    np.testing.assert_array_equal(run(name, level=0.0), picture())


def test_inverting_twice_is_nothing():
    once = run('invert').astype(np.uint8)
    np.testing.assert_array_equal(run('invert', once), picture())


def test_a_flat_image_survives_equalising():
    flat = np.full((24, 20, 3), 77, np.uint8)
    for name in ('equalize', 'auto_contrast'):
        np.testing.assert_array_equal(run(name, flat), flat)


def batch(count=6):
    return jnp.asarray(np.stack([np.roll(picture(), i, axis=0) for i in range(count)]))


def keys(rows, step=0):
    rng = jax.random.fold_in(jax.random.key(0), step)
    return photometry.sample_keys(rng, jnp.asarray(rows))


def test_a_sample_depends_on_seed_step_and_row_alone():
    every = jax.jit(functools.partial(randaugment.rand_augment, prob=1.0))
    whole = every(keys(range(6)), batch())
    part = every(keys([4, 1, 2, 0, 3, 5]), batch()[jnp.array([4, 1, 2, 0, 3, 5])])
    np.testing.assert_array_equal(part[0], whole[4])
    assert np.any(np.asarray(every(keys(range(6), step=1), batch())) != whole)


def test_each_operation_is_drawn_as_often_and_half_of_the_time():
    seen = {}

    def record(images, draws, mean):
        del images, mean
        seen['draws'] = draws

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(randaugment, 'apply', record)
        randaugment.rand_augment(keys(range(6000)), None)
    draws = jax.tree.map(np.asarray, seen['draws'])
    counts = np.bincount(draws.op.ravel(), minlength=15)
    assert len(counts) == 15 and np.abs(counts / 800 - 1).max() < 0.15
    assert abs(draws.on.mean() - 0.5) < 0.02 and abs(draws.sign.mean()) < 0.03
    assert abs(draws.level.mean() - 0.9) < 0.01 and draws.level.max() <= 1


# Erasing


@functools.lru_cache
def erased(prob):
    images = jnp.full((3000, 32, 32, 1), 9.0)
    return np.asarray(jax.jit(randaugment.erase, static_argnums=2)(keys(range(3000)), images, prob))


def test_erased_regions_have_the_share_shape_and_noise_that_are_said():
    region = erased(1.0)[..., 0] != 9.0
    share = region.mean(axis=(1, 2))
    assert share.min() > 0.01 and share.max() < 0.36
    # Wide and flat rectangles that do not fit are drawn again, which favours the small.
    assert 0.13 < share.mean() < 0.18
    rows, columns = region.any(axis=2).sum(axis=1), region.any(axis=1).sum(axis=1)
    np.testing.assert_array_equal(rows * columns, region.sum(axis=(1, 2)))  # rectangles
    assert 0.2 < (rows / columns).min() < 0.4 and 2.5 < (rows / columns).max() < 4.5
    noise = erased(1.0)[..., 0][region]
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01


def test_a_quarter_of_the_images_is_erased():
    touched = (erased(0.25) != 9.0).any(axis=(1, 2, 3))
    assert abs(touched.mean() - 0.25) < 0.025
