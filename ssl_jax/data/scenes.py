# SPDX-License-Identifier: Apache-2.0
"""Rendered scenes: textured solids before a textured wall and floor, without files.

Scene i is a pure function of (seed, split, i). The classes are ten shapes, each with its own
surface pattern. Colour, light, pose, position, the other shapes and the background are independent
of the class, so outline and pattern show the class and colours do not. Every image has a class map
and a depth map.
"""

import functools
import math
import zlib

import numpy as np

from ssl_jax.run import errors

_CACHE_BYTES = 512 << 20
_KINDS = ('stripes', 'checks', 'dots', 'noise', 'plain', 'lattice')  # of `_texture`
_COARSE, _FINE = (0.7, 1.1), (2.2, 3.2)  # ranges of a texture's frequency per radius
_FAINT = (0.05, 0.35)  # contrast of backgrounds; shapes stand out


def _star(u, v, r):
    """Five points, inner radius 0.42."""
    sector = math.pi / 5
    angle = np.abs(np.mod(np.arctan2(u, -v) + sector, 2 * sector) - sector)
    ex, ey = 0.42 * math.cos(sector) - 1, 0.42 * math.sin(sector)
    return ((r * np.cos(angle) - 1) * ey - r * np.sin(angle) * ex) / math.hypot(ex, ey)


def _cross(u, v, r):
    a, b = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(a - 0.95, b - 0.3), np.maximum(b - 0.95, a - 0.3))


def _heart(u, v, r):
    p, q = (u + v) * 0.7071 - 0.12, (v - u) * 0.7071 - 0.12
    box = np.maximum(np.abs(p), np.abs(q)) - 0.56
    left = np.sqrt((p + 0.56) ** 2 + q * q) - 0.56
    right = np.sqrt(p * p + (q + 0.56) ** 2) - 0.56
    return np.minimum(box, np.minimum(left, right))


# Approximate signed distance to the outline of each class, negative inside. u right, v down, r =
# |(u, v)|, in radii.
_OUTLINES = {
    'disc': lambda u, v, r: r - 0.92,
    'ring': lambda u, v, r: np.abs(r - 0.68) - 0.25,
    'square': lambda u, v, r: np.maximum(np.abs(u), np.abs(v)) - 0.78,
    'triangle': lambda u, v, r: np.maximum(0.866 * np.abs(u) - 0.5 * v, v) - 0.55,
    'star': _star,
    'cross': _cross,
    'crescent': lambda u, v, r: np.maximum(r - 0.95, 0.72 - np.sqrt((u - 0.45) ** 2 + v * v)),
    'heart': _heart,
    'bar': lambda u, v, r: np.sqrt(np.maximum(np.abs(u) - 0.72, 0) ** 2 + v * v) - 0.3,
    'flower': lambda u, v, r: (r - 0.66 - 0.26 * np.cos(6 * np.arctan2(v, u))) * 0.6,
}
CLASSES = tuple(_OUTLINES)
_PATTERNS = (  # texture of each class
    *[(kind, _COARSE) for kind in ('stripes', 'checks', 'dots', 'noise', 'plain')],
    *[(kind, _FINE) for kind in ('stripes', 'checks', 'dots', 'noise')],
    ('lattice', _COARSE),
)


class Scenes:
    """A source of `n` rendered scenes.

    Items have `image` uint8 (size, size, 3); `label`, the shape of the main object, the largest,
    whose middle is never covered; `segmentation` uint8 (size, size), 0 for the background and 1 +
    label for a shape; `depth` float32 (size, size), distance from the camera, 0.9 to 9. Rendered
    scenes are kept if all fit in 512 MB, so later epochs cost nothing.

    Args:
      n: number of scenes; the labels are balanced.
      size: side in pixels.
      seed, split: each pair has its own scenes.
    """

    classes = CLASSES
    map_classes = ('background', *CLASSES)

    def __init__(self, n: int = 4096, size: int = 96, seed: int = 0, split: str = 'train'):
        if n < 1 or size < 16:
            raise errors.UserError(f'Scenes need n >= 1 and size >= 16, not n={n} and size={size}.')
        self._n, self._size, self._seed, self._split = n, size, seed, split
        self._cache = {}
        self.fingerprint = f'scenes-2-{n}-{size}-{seed}-{split}'

    def __len__(self) -> int:
        return self._n

    def __getitem__(self, i: int) -> dict:
        i = range(self._n)[i]
        item = self._cache.get(i) or render(i, self._size, self._seed, self._split)
        if self._n * self._size**2 * 8 <= _CACHE_BYTES:
            self._cache[i] = item
        return dict(item)

    def describe(self, i: int) -> str:
        return f'scene {i} of split {self._split!r}, seed {self._seed}'

    def __getstate__(self):
        return {**self.__dict__, '_cache': {}}


def render(i: int, size: int, seed: int = 0, split: str = 'train') -> dict:
    """Scene `i` as dict(image, label, segmentation, depth); see `Scenes`."""
    key = [zlib.crc32(f'{seed}/{split}'.encode()) << 32 | size, i]
    rng = np.random.Generator(np.random.Philox(key=np.array(key, np.uint64)))
    label = i % len(CLASSES)
    light = np.array([rng.uniform(-1, 1), rng.uniform(-1, 0.2), rng.uniform(0.5, 1.2)])
    light = (light / np.linalg.norm(light)).tolist()
    image, depth = _background(rng, size)
    segmentation = np.zeros((size, size), np.uint8)
    for shape in sorted(_objects(rng, label), key=lambda o: -o['depth']):  # far ones first
        _paint(rng, shape, light, image, segmentation, depth)
    tint = rng.uniform(0.9, 1.1, 3)
    gain = rng.uniform(0.9, 1.35)
    image *= (gain * tint).astype(np.float32)
    image += rng.standard_normal((size, size, 1), np.float32) * np.float32(rng.uniform(0, 0.03))
    pixels = (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
    return {'image': pixels, 'label': label, 'segmentation': segmentation, 'depth': depth}


def _objects(rng, label):
    """The main object and up to three smaller ones, as dicts; lengths in units of the side."""
    radius = rng.uniform(0.28, 0.4)
    main = dict(kind=label, radius=radius, depth=rng.uniform(1.6, 2.4))
    main['x'], main['y'] = rng.uniform(0.34, 0.66), rng.uniform(0.34, 0.66)
    objects = [main]
    for _ in range(rng.integers(0, 4)):
        kind = int(rng.integers(len(CLASSES)))
        other = dict(kind=kind, radius=rng.uniform(0.09, 0.17), depth=rng.uniform(1.0, 4.0))
        # Around the main object, not on its middle: its outline stays visible.
        angle = rng.uniform(0, 2 * math.pi)
        distance = radius * rng.uniform(0.95, 1.1) + other['radius'] * rng.uniform(0.3, 1.2)
        other['x'] = main['x'] + distance * math.cos(angle)
        other['y'] = main['y'] + distance * math.sin(angle)
        objects.append(other)
    return objects


def _background(rng, size):
    """A wall above, a floor in perspective below. float32 (size, size, 3), (size, size)."""
    v, u = _grid(size)
    horizon, far = rng.uniform(0.05, 0.6), rng.uniform(6, 9)
    # A floor at height -h is seen in row v at depth h / (v - horizon), up to where the wall stands.
    # It is nearest in the last row, at 4.2: behind every object.
    height = 4.2 * (1 - horizon)
    rows = int((horizon + height / far) * size)  # of the wall
    depth = np.full((size, size), far, np.float32)
    depth[rows:] = height / (v[rows:] - horizon)
    image = np.empty((size, size, 3), np.float32)
    image[:rows] = _texture(rng, u[:rows] * far, v[:rows] * far, size, contrast=_FAINT)
    z = depth[rows:]
    image[rows:] = _texture(rng, (u[rows:] - 0.5) * z * 1.5, z * 1.5, size, contrast=_FAINT)
    angle, slope = rng.uniform(0, 2 * math.pi), rng.uniform(0.0, 0.8)
    fall = 0.9 + slope * ((u - 0.5) * math.cos(angle) + (v - 0.5) * math.sin(angle))
    fall += rng.uniform(0, 0.5) * (_noise(rng, size, 4) - 0.5)
    image *= fall[:, :, None]
    return image, depth


def _paint(rng, shape, light, image, segmentation, depth):
    """Draws an object over the image: shadow, then surface with texture and shading."""
    size = image.shape[0]
    turn = rng.uniform(-0.5, 0.5)
    stretch = math.exp(rng.uniform(-0.16, 0.16))
    reach = shape['radius'] * 1.45
    shift = shape['radius'] * rng.uniform(0.15, 0.4)
    shadow = rng.uniform(0.15, 0.5)
    y0, y1 = _span(shape['y'], reach, size)
    x0, x1 = _span(shape['x'], reach, size)
    if y1 - y0 < 2 or x1 - x0 < 2:
        return
    v, u = _grid(size)
    v, u = v[y0:y1, x0:x1] - shape['y'], u[y0:y1, x0:x1] - shape['x']
    c, s = math.cos(turn), math.sin(turn)

    def distance(u, v):
        p = (c * u + s * v) * (stretch / shape['radius'])
        q = (c * v - s * u) * (1 / (stretch * shape['radius']))
        return _OUTLINES[CLASSES[shape['kind']]](p, q, np.sqrt(p * p + q * q))

    d = distance(u, v)
    pixel = 1 / (size * shape['radius'])
    alpha = np.clip(0.5 - d / pixel, 0, 1)[:, :, None]
    away = distance(u + light[0] * shift, v + light[1] * shift)
    dark = 1 - shadow * np.clip(0.5 - away / 0.25, 0, 1)[:, :, None]
    # A rounded edge: the height rises as a quarter circle over the outer 0.4 radii.
    rise = np.clip(-d / 0.4, 0, 1)
    height = np.sqrt(np.maximum(rise * (2 - rise), 0)) * 0.3
    gy, gx = np.gradient(height, np.float32(pixel))
    norm = 1 / np.sqrt(gx * gx + gy * gy + 1)
    facing = np.clip((light[2] - light[0] * gx - light[1] * gy) * norm, 0, 1)
    gloss = rng.uniform(0, 0.5)
    kind, band = _PATTERNS[shape['kind']]
    surface = _texture(rng, u / shape['radius'], v / shape['radius'], size, kind, band)
    surface = surface * (0.4 + 0.8 * facing)[:, :, None] + (gloss * facing**24)[:, :, None]
    view = image[y0:y1, x0:x1]
    view *= dark
    view += alpha * (surface - view)
    inside = d < 0
    segmentation[y0:y1, x0:x1][inside] = 1 + shape['kind']
    depth[y0:y1, x0:x1][inside] = shape['depth'] - 0.3 * height[inside]


def _texture(rng, u, v, size, kind=None, band=(0.8, 1.8), contrast=(0.5, 1.0)):
    """Two colours mixed by one of _KINDS, a random one by default. float32 (..., 3)."""
    a, b = _colour(rng), _colour(rng)
    kind = kind or _KINDS[rng.integers(len(_KINDS))]
    turn = rng.uniform(0, math.pi)
    frequency = rng.uniform(*band)
    c, s = frequency * math.cos(turn), frequency * math.sin(turn)
    p, q = c * u + s * v, c * v - s * u
    if kind == 'stripes':
        mix = _edge(np.sin(2 * math.pi * p), rng)
    elif kind == 'checks':
        mix = _edge(np.sin(math.pi * 1.5 * p) * np.sin(math.pi * 1.5 * q), rng)
    elif kind == 'dots':
        mix = _edge(np.cos(2 * math.pi * p) + np.cos(2 * math.pi * q) - 0.9, rng)
    elif kind == 'noise':
        mix = _noise(rng, size, 6 if frequency < 1.2 else 24)
        mix = np.clip((mix[: u.shape[0], : u.shape[1]] - 0.5) * rng.uniform(1.5, 5) + 0.5, 0, 1)
    elif kind == 'lattice':
        lines = np.minimum(np.abs(np.sin(math.pi * p)), np.abs(np.sin(math.pi * q)))
        mix = _edge(1 - 3 * lines, rng)
    else:
        mix = 0.15 * np.sin(p)
    grain = 1 + 0.12 * (_noise(rng, size, 32)[: u.shape[0], : u.shape[1]] - 0.5)
    mix = (mix * rng.uniform(*contrast))[:, :, None]
    return (a + (b - a) * mix) * grain[:, :, None]


def _edge(wave, rng):
    """A wave in -1..1 as a pattern in 0..1 with soft or hard edges."""
    return np.clip(0.5 + wave * rng.uniform(0.6, 4), 0, 1)


def _colour(rng):
    """A random colour of any hue, greyish to saturated, dark to light. float32 (3,)."""
    hue, saturation, value = rng.uniform(0, 6), rng.uniform(0.05, 0.85), rng.uniform(0.25, 1.0)
    ramp = np.clip(np.abs((hue + np.array([0, 4, 2])) % 6 - 3) - 1, 0, 1)
    return (value * (1 - saturation + saturation * ramp)).astype(np.float32)


def _noise(rng, size, cells):
    """Smooth noise in 0..1 with features of size / cells pixels. float32 (size, size)."""
    weights = _interpolation(size, cells)
    return weights @ rng.random((cells, cells), np.float32) @ weights.T


@functools.lru_cache(maxsize=64)
def _interpolation(size, cells):
    """float32 (size, cells): smoothstep between neighbouring cells."""
    at = np.linspace(0, cells - 1, size)
    low = np.minimum(at.astype(int), cells - 2)
    t = at - low
    t = t * t * (3 - 2 * t)
    weights = np.zeros((size, cells), np.float32)
    weights[np.arange(size), low] = 1 - t
    weights[np.arange(size), low + 1] = t
    return weights


@functools.lru_cache(maxsize=16)
def _grid(size):
    """Row and column coordinates of the pixel centres, 0..1. Two float32 (size, size)."""
    at = ((np.arange(size) + 0.5) / size).astype(np.float32)
    v, u = np.meshgrid(at, at, indexing='ij')
    v.flags.writeable = u.flags.writeable = False  # shared by all scenes and threads
    return v, u


def _span(centre, reach, size):
    """First and last + 1 of the rows or columns in [centre - reach, centre + reach]."""
    return max(0, int((centre - reach) * size)), min(size, int((centre + reach) * size) + 1)
