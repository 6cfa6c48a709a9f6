# SPDX-License-Identifier: Apache-2.0
"""RandAugment and random erasing on the device: batched, jitted, one key per sample.

The operations are timm's 'increasing' set (`rand-m9-mstd0.5-inc1`), those of Pillow on uint8
images: values are whole numbers in [0, 255] after each.  With l the level in [0, 1] and s a random
sign:

  auto_contrast  each channel stretched to 0..255
  equalize       each channel's histogram made flat
  invert         255 - x
  rotate         by 30 l s degrees about the centre
  posterize      4 - int(4 l) highest bits kept
  solarize       255 - x from 256 - int(256 l) on
  solarize_add   int(110 l) added to values below 128
  color          blend of the grey image and x with factor 1 + 0.9 l s
  contrast       of its mean grey and x
  brightness     of black and x
  sharpness      of x smoothed and x
  shear_x, _y    by 0.3 l s, from the upper left corner
  translate_x, _y  by 0.45 l s of the side

What shows from outside the image is the mean colour.  Geometry is bilinear, where MAE's and BEiT's
recipes ask Pillow for bicubic.

Reference: Cubuk et al., arXiv 1909.13719; timm `data/auto_augment.py`, `data/random_erasing.py`;
Zhong et al., arXiv 1708.04896.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.augment import photometry

OPS = (
    *('auto_contrast', 'equalize', 'invert', 'posterize', 'solarize', 'solarize_add'),
    *('brightness', 'contrast', 'color', 'sharpness'),
    *('rotate', 'shear_x', 'shear_y', 'translate_x', 'translate_y'),
)
TABLES, BLENDS = OPS[:8], OPS[8:10]  # what is a table of 256 values; what needs other pixels
# Pillow's weights of red, green and blue in grey, of 65536.
_GREY = (19595, 38470, 7471)


class Draws(NamedTuple):
    """What each sample gets; L operations in a row."""

    op: jax.Array  # (B, L) int32, index in OPS
    level: jax.Array  # (B, L) in [0, 1]
    sign: jax.Array  # (B, L) -1 or 1
    on: jax.Array  # (B, L) bool, whether it is done at all


def rand_augment(keys, images, *, layers=2, magnitude=9.0, std=0.5, prob=0.5, mean=photometry.MEAN):
    """`layers` random operations one after the other, each with probability `prob`.

    Operations are drawn uniformly and with repetition; the level is N(magnitude, std) / 10, cut to
    [0, 1].

    Args:
      keys: (B,); what a sample gets depends on its key alone.
      images: (B, H, W, 3), uint8 or whole numbers as float.
      mean: colour in [0, 1] of what is outside the image.

    Returns:
      float32 (B, H, W, 3), whole numbers in [0, 255].
    """
    shape = (layers,)

    def draw(key):
        op, level, sign, on = jax.random.split(key, 4)
        level = magnitude + std * jax.random.normal(level, shape)
        return Draws(
            jax.random.randint(op, shape, 0, len(OPS)),
            jnp.clip(level, 0.0, 10.0) / 10,
            jax.random.rademacher(sign, shape, jnp.float32),
            jax.random.bernoulli(on, prob, shape),
        )

    return apply(images, jax.vmap(draw)(keys), mean)


def apply(images, draws, mean=photometry.MEAN):
    """`rand_augment` with given draws."""
    fill = np.minimum(np.round(255 * np.asarray(mean)), 255).astype(np.float32)

    def one(image, draw):
        def layer(x, step):
            op, level, sign, on = step
            done = jax.lax.cond(on, lambda x: _apply(x, op, level, sign, fill), lambda x: x, x)
            return done, None

        return jax.lax.scan(layer, image.astype(jnp.float32), draw)[0]

    return photometry.per_sample(one, images, draws)


def _apply(x, op, level, sign, fill):
    """Operation number `op` on one image (H, W, 3)."""
    kind = jnp.where(op < len(TABLES), 0, jnp.where(op < len(TABLES) + len(BLENDS), 1, 2))
    branches = (
        lambda: look_up(x, table(x, op, level, sign)),
        lambda: blend(jnp.where(op == len(TABLES), grey(x), smooth(x)), x, 1 + 0.9 * level * sign),
        lambda: affine(x, matrix(op, level * sign, x.shape[:2]), fill),
    )
    return jax.lax.switch(kind, branches)


def table(x, op, level, sign):
    """(256, 3): what the first operations of OPS make of every value of every channel."""
    values = jnp.arange(256.0)[:, None]
    factor = 1 + 0.9 * level * sign
    bits = 4 - jnp.floor(4 * level)
    step = 2 ** (8 - bits)
    start, added = 256 - jnp.floor(256 * level), jnp.floor(110 * level)

    def same(y):
        return jnp.broadcast_to(y, (256, 3))

    branches = (
        lambda: auto_contrast(x),
        lambda: equalize(x),
        lambda: same(255 - values),
        lambda: same(jnp.floor(values / step) * step),
        lambda: same(jnp.where(values < start, values, 255 - values)),
        lambda: same(jnp.where(values < 128, jnp.minimum(values + added, 255), values)),
        lambda: same(blend(0.0, values, factor)),
        lambda: same(blend(jnp.floor(grey(x).mean() + 0.5), values, factor)),
    )
    return jax.lax.switch(jnp.minimum(op, len(TABLES) - 1), branches)


def look_up(x, values):
    """values[x, channel] for an image (H, W, 3) of whole numbers and a table (256, 3)."""
    index = x.astype(jnp.int32)
    return jnp.stack([values[:, c][index[..., c]] for c in range(3)], axis=-1)


def auto_contrast(x):
    """The table that moves each channel's darkest value to 0 and its brightest to 255."""
    values = jnp.arange(256)[:, None]
    low, high = (f(x.astype(jnp.int32), axis=(0, 1)) for f in (jnp.min, jnp.max))
    stretched = jnp.clip((values - low) * 255 // jnp.maximum(high - low, 1), 0, 255)
    return jnp.where(high > low, stretched, values).astype(jnp.float32)


def equalize(x):
    """The table that makes each channel's histogram flat, as Pillow's `ImageOps.equalize`.

    y(v) = (s // 2 + number of pixels below v) // s, s = (pixels - those of the brightest value) //
    255; the identity where s is 0.
    """
    # Comparisons, sixteen levels at a time: scattering is slow on TPUs and memory is short.
    pixels, levels = x.reshape(-1, 3), jnp.arange(256.0).reshape(16, 16)
    below = jax.lax.map(lambda v: (pixels[:, None] < v[:, None]).sum(axis=0), levels)
    below = below.reshape(256, 3)
    brightest = (x == x.max(axis=(0, 1))).sum(axis=(0, 1))
    step = (len(pixels) - brightest) // 255
    flat = jnp.clip((step // 2 + below) // jnp.maximum(step, 1), 0, 255)
    return jnp.where(step > 0, flat, jnp.arange(256)[:, None]).astype(jnp.float32)


def grey(x):
    """Pillow's conversion to 'L', rounded: (H, W, 1)."""
    total = sum(w * x[..., c].astype(jnp.int32) for c, w in enumerate(_GREY))
    return ((total + 32768) // 65536).astype(jnp.float32)[..., None]


def smooth(x):
    """Pillow's SMOOTH, a mean of 3x3 pixels with weight 5 of 13 for the middle; not at the edge."""
    h, w = x.shape[:2]
    around = sum(x[i : h - 2 + i, j : w - 2 + j] for i in range(3) for j in range(3))
    inner = jnp.floor((around + 4 * x[1:-1, 1:-1]) / 13 + 0.5)
    return x.at[1:-1, 1:-1].set(inner)


def blend(other, x, factor):
    """other + factor (x - other), cut to [0, 255] and rounded down."""
    return jnp.floor(jnp.clip(other + factor * (x - other), 0.0, 255.0))


def matrix(op, amount, size):
    """(2, 3) of the map from output to input coordinates (x, y, 1), for the last five of OPS.

    amount: level times sign, in [-1, 1].
    """
    height, width = size
    angle = jnp.deg2rad(30 * amount)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    cx, cy = width / 2, height / 2
    rows = (
        ((cos, -sin, cx - cos * cx + sin * cy), (sin, cos, cy - sin * cx - cos * cy)),
        ((1, 0.3 * amount, 0), (0, 1, 0)),
        ((1, 0, 0), (0.3 * amount, 1, 0)),
        ((1, 0, 0.45 * amount * width), (0, 1, 0)),
        ((1, 0, 0), (0, 1, 0.45 * amount * height)),
    )
    every = jnp.stack([jnp.asarray(pair, jnp.float32) for pair in rows])
    return every[jnp.maximum(op - (len(OPS) - len(rows)), 0)]


def affine(x, m, fill):
    """Bilinear sample of an image (H, W, 3) at m (x, y, 1) of each output pixel's centre."""
    h, w = x.shape[:2]
    column, row = jnp.arange(w) + 0.5, jnp.arange(h)[:, None] + 0.5
    # No matrix product: accelerators would round the coordinates to bfloat16.
    u, v = (a * column + b * row + c for a, b, c in m)  # (H, W) each
    inside = (u >= 0) & (u < w) & (v >= 0) & (v < h)
    u, v = u - 0.5, v - 0.5
    left, top = jnp.floor(u), jnp.floor(v)
    du, dv = (u - left)[..., None], (v - top)[..., None]
    pixels = x.reshape(-1, 3)

    def at(row, column):
        row = jnp.clip(row.astype(jnp.int32), 0, h - 1)
        return pixels[row * w + jnp.clip(column.astype(jnp.int32), 0, w - 1)]

    upper = at(top, left) * (1 - du) + at(top, left + 1) * du
    lower = at(top + 1, left) * (1 - du) + at(top + 1, left + 1) * du
    found = jnp.floor(upper * (1 - dv) + lower * dv + 1e-3)
    return jnp.where(inside[..., None], found, fill)


def erase(keys, images, prob=0.25, area=(0.02, 1 / 3), aspect=(0.3, 1 / 0.3), tries=10):
    """Fills a random rectangle with N(0, 1) per value with probability `prob` (mode 'pixel').

    Its area is a uniform share of the image's, height / width is log-uniform, its place uniform.
    The first of `tries` rectangles that is smaller than the image on both sides is taken.

    Args:
      keys: (B,).
      images: (B, H, W, 3), normalised.
    """
    h, w = images.shape[1:3]

    def one(key, x):
        coin, sizes, ratios, places, noise = jax.random.split(key, 5)
        share = jax.random.uniform(sizes, (tries,), minval=area[0], maxval=area[1]) * h * w
        low, high = np.log(aspect)
        ratio = jnp.exp(jax.random.uniform(ratios, (tries,), minval=low, maxval=high))
        heights, widths = jnp.round(jnp.sqrt(share * ratio)), jnp.round(jnp.sqrt(share / ratio))
        fits = (heights < h) & (widths < w)
        first = jnp.argmax(fits)
        size = jnp.stack([heights[first], widths[first]]).astype(jnp.int32)
        start = jax.random.randint(places, (2,), 0, jnp.asarray([h, w]) - size + 1)
        row, column = jnp.arange(h)[:, None], jnp.arange(w)
        inside = (row >= start[0]) & (row < start[0] + size[0])
        inside &= (column >= start[1]) & (column < start[1] + size[1])
        inside &= jax.random.bernoulli(coin, prob) & fits[first]
        return jnp.where(inside[..., None], jax.random.normal(noise, x.shape), x)

    return jax.vmap(one)(keys, images)
