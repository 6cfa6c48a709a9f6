# SPDX-License-Identifier: Apache-2.0
"""RandAugment and random erasing on the device: batched, jitted, one key per sample.

The operations are timm's 'increasing' set (`rand-m9-mstd0.5-inc1`), as Pillow computes them on
uint8 images: each returns integers in [0, 255]. With l the level in [0, 1] and s a random sign:

  auto_contrast    stretches each channel to 0..255
  equalize         flattens the histogram of each channel
  invert           255 - x
  rotate           by 30 l s degrees about the centre
  posterize        keeps the 4 - int(4 l) highest bits
  solarize         255 - x for values of at least 256 - int(256 l)
  solarize_add     adds int(110 l) to values below 128
  color            blends the grey image and x with factor 1 + 0.9 l s
  contrast         blends the mean grey and x with this factor
  brightness       blends black and x with this factor
  sharpness        blends a smoothed x and x with this factor
  shear_x, _y      by 0.3 l s, from the upper left corner
  translate_x, _y  by 0.45 l s of the side

Pixels from outside the image have the mean colour. Geometry is bilinear; the recipes of MAE and
BEiT use Pillow's bicubic.

References:
  Cubuk et al., arXiv 1909.13719; timm `data/auto_augment.py`, `data/random_erasing.py`;
  Zhong et al., arXiv 1708.04896
"""

from collections.abc import Sequence
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
TABLES, BLENDS = OPS[:8], OPS[8:10]  # tables of 256 values; blends with other pixels
# Pillow's weights of red, green and blue in grey, in units of 1 / 65536.
_GREY = (19595, 38470, 7471)


class Draws(NamedTuple):
    """Draws of `rand_augment`, L operations per sample."""

    op: jax.Array  # (B, L) int32, index in OPS
    level: jax.Array  # (B, L) in [0, 1]
    sign: jax.Array  # (B, L), -1 or 1
    on: jax.Array  # (B, L) bool, whether the operation is applied


def rand_augment(
    keys: jax.Array,
    images: jax.Array,
    *,
    layers: int = 2,
    magnitude: float = 9.0,
    std: float = 0.5,
    prob: float = 0.5,
    mean: Sequence[float] = photometry.MEAN,
) -> jax.Array:
    """Applies `layers` random operations one after the other, each with probability `prob`.

    Operations are drawn uniformly, with repetition. The level is N(magnitude, std) / 10, clipped to
    [0, 1].

    Args:
      keys: (B,); the draws of a sample depend only on its key.
      images: (B, H, W, 3), uint8 or integers as float.
      layers: L, number of operations.
      magnitude: mean of the level, times 10.
      std: standard deviation of the level, times 10.
      prob: probability of each operation.
      mean: colour in [0, 1] of pixels from outside the image.

    Returns:
      float32 (B, H, W, 3), integers in [0, 255].
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


def apply(images: jax.Array, draws: Draws, mean: Sequence[float] = photometry.MEAN) -> jax.Array:
    """`rand_augment` with given draws."""
    fill = np.minimum(np.round(255 * np.asarray(mean)), 255).astype(np.float32)

    def one(image, draw):
        def layer(x, step):
            op, level, sign, on = step
            x = jax.lax.cond(on, lambda x: _apply(x, op, level, sign, fill), lambda x: x, x)
            return x, None

        return jax.lax.scan(layer, image.astype(jnp.float32), draw)[0]

    return photometry.per_sample(one, images, draws)


def _apply(x, op, level, sign, fill):
    """Applies operation OPS[op] to one image (H, W, 3)."""
    kind = jnp.where(op < len(TABLES), 0, jnp.where(op < len(TABLES) + len(BLENDS), 1, 2))
    branches = (
        lambda: look_up(x, table(x, op, level, sign)),
        lambda: blend(jnp.where(op == len(TABLES), grey(x), smooth(x)), x, 1 + 0.9 * level * sign),
        lambda: affine(x, matrix(op, level * sign, x.shape[:2]), fill),
    )
    return jax.lax.switch(kind, branches)


def table(x: jax.Array, op: jax.Array, level: jax.Array, sign: jax.Array) -> jax.Array:
    """Table (256, 3) of an operation in TABLES: the result for each value of each channel."""
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


def look_up(x: jax.Array, values: jax.Array) -> jax.Array:
    """values[x, channel] for an image (H, W, 3) of integers and a table (256, 3)."""
    index = x.astype(jnp.int32)
    return jnp.stack([values[:, c][index[..., c]] for c in range(3)], axis=-1)


def auto_contrast(x: jax.Array) -> jax.Array:
    """Table (256, 3) that maps the darkest value of a channel to 0 and the brightest to 255."""
    values = jnp.arange(256)[:, None]
    low, high = (f(x.astype(jnp.int32), axis=(0, 1)) for f in (jnp.min, jnp.max))
    stretched = jnp.clip((values - low) * 255 // jnp.maximum(high - low, 1), 0, 255)
    return jnp.where(high > low, stretched, values).astype(jnp.float32)


def equalize(x: jax.Array) -> jax.Array:
    """Table (256, 3) that flattens the histogram of a channel, as Pillow's `ImageOps.equalize`.

    y(v) = (s // 2 + number of pixels below v) // s with s = (pixels - pixels of the brightest
    value) // 255; the identity if s is 0.
    """
    # Comparisons, because a scatter is slow on TPUs; sixteen levels at a time, to save memory.
    pixels, levels = x.reshape(-1, 3), jnp.arange(256.0).reshape(16, 16)
    below = jax.lax.map(lambda v: (pixels[:, None] < v[:, None]).sum(axis=0), levels)
    below = below.reshape(256, 3)
    brightest = (x == x.max(axis=(0, 1))).sum(axis=(0, 1))
    step = (len(pixels) - brightest) // 255
    flat = jnp.clip((step // 2 + below) // jnp.maximum(step, 1), 0, 255)
    return jnp.where(step > 0, flat, jnp.arange(256)[:, None]).astype(jnp.float32)


def grey(x: jax.Array) -> jax.Array:
    """Pillow's conversion to 'L', rounded: (H, W, 3) -> (H, W, 1)."""
    total = sum(w * x[..., c].astype(jnp.int32) for c, w in enumerate(_GREY))
    return ((total + 32768) // 65536).astype(jnp.float32)[..., None]


def smooth(x: jax.Array) -> jax.Array:
    """Pillow's SMOOTH, a mean of 3x3 pixels with weight 5/13 in the middle; edges are unchanged."""
    h, w = x.shape[:2]
    around = sum(x[i : h - 2 + i, j : w - 2 + j] for i in range(3) for j in range(3))
    inner = jnp.floor((around + 4 * x[1:-1, 1:-1]) / 13 + 0.5)
    return x.at[1:-1, 1:-1].set(inner)


def blend(other: jax.Array | float, x: jax.Array, factor: jax.Array) -> jax.Array:
    """other + factor (x - other), clipped to [0, 255] and rounded down."""
    return jnp.floor(jnp.clip(other + factor * (x - other), 0.0, 255.0))


def matrix(op: jax.Array, amount: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Matrix (2, 3) from output coordinates (x, y, 1) to input (x, y), for the last five OPS.

    Args:
      op: index in OPS.
      amount: level times sign, in [-1, 1].
      size: (height, width).
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
    matrices = jnp.stack([jnp.asarray(pair, jnp.float32) for pair in rows])
    return matrices[jnp.maximum(op - (len(OPS) - len(rows)), 0)]


def affine(x: jax.Array, m: jax.Array, fill: np.ndarray) -> jax.Array:
    """Samples an image (H, W, 3) bilinearly at m (x, y, 1) for each output pixel centre.

    Args:
      x: (H, W, 3).
      m: (2, 3), see `matrix`.
      fill: (3,), colour outside the image.
    """
    h, w = x.shape[:2]
    column, row = jnp.arange(w) + 0.5, jnp.arange(h)[:, None] + 0.5
    # Not a matrix product: accelerators would round the coordinates to bfloat16.
    u, v = (a * column + b * row + c for a, b, c in m)  # (H, W) each
    inside = (u >= 0) & (u < w) & (v >= 0) & (v < h)
    u, v = u - 0.5, v - 0.5
    left, top = jnp.floor(u), jnp.floor(v)
    du, dv = (u - left)[..., None], (v - top)[..., None]
    pixels = x.reshape(-1, 3)

    def pixel(row, column):
        row = jnp.clip(row.astype(jnp.int32), 0, h - 1)
        return pixels[row * w + jnp.clip(column.astype(jnp.int32), 0, w - 1)]

    upper = pixel(top, left) * (1 - du) + pixel(top, left + 1) * du
    lower = pixel(top + 1, left) * (1 - du) + pixel(top + 1, left + 1) * du
    sampled = jnp.floor(upper * (1 - dv) + lower * dv + 1e-3)
    return jnp.where(inside[..., None], sampled, fill)


def erase(
    keys: jax.Array,
    images: jax.Array,
    prob: float = 0.25,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    tries: int = 10,
) -> jax.Array:
    """Fills a random rectangle with N(0, 1) per value with probability `prob` (mode 'pixel').

    The first of `tries` rectangles is taken that is smaller than the image on both sides. Its
    position is uniform.

    Args:
      keys: (B,).
      images: (B, H, W, 3), normalised.
      prob: probability per image.
      area: range of the area as a share of the image's, drawn uniformly.
      aspect: range of height / width, drawn log-uniformly.
      tries: number of rectangles drawn.
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
