# SPDX-License-Identifier: Apache-2.0
"""What happens to an image outside training: one dict, from an imported folder to every consumer.

A transform is a dict, as JSON in checkpoints and in files of features:
  size: pixels, side of the square that the encoder sees.
  mode: what is resized, to `side` pixels; then the central square of `size` is cut out.
    'center': the short side.
    'squash': both sides, so that the proportions change.
    'border': the long side; the rest of the square has the mean colour (timm).
    'none': nothing; small images get a black border.
  crop: size / side; above 1 the image has a black border.
  interpolation: of Pillow, see INTERPOLATIONS.
  library: whose rounding: 'transformers', also that of our runs; 'timm'; or 'torchvision', in which
    the authors of official files without a transform wrote theirs.
  mean, std: of the three channels, for values in [0, 1].

Pixels are those of the libraries bit for bit, with their Pillow code.
"""

import math

import numpy as np
import PIL.Image

from ssl_jax.data import host

MODES = ('center', 'squash', 'border', 'none')
INTERPOLATIONS = ('nearest', 'lanczos', 'bilinear', 'bicubic', 'box', 'hamming')  # Pillow's numbers
OURS = dict(mode='center', crop=1.0, interpolation='bicubic', library='transformers')


def of(given: dict | int) -> dict:
    """The transform `given`, that of an earlier version, or ours for a size in pixels."""
    if not isinstance(given, dict):
        return {'size': int(given), **OURS}
    if 'mode' in given:
        return given
    mode = 'squash' if given['crop'] is None else 'center'
    return {**given, 'mode': mode, 'crop': given['crop'] or 1.0, 'library': 'torchvision'}


def side(transform: dict) -> int:
    """Pixels that the short side, both sides or the long side are resized to."""
    exact = transform['size'] / transform['crop']
    return math.floor(exact) if transform['library'] == 'timm' else round(exact)


def resized(height: int, width: int, transform: dict) -> tuple[int, int]:
    """(height, width) of an image after the resize, before the crop."""
    to, mode = side(transform), transform['mode']
    if mode == 'none':
        return height, width
    if mode == 'squash':
        return to, to
    if mode == 'border':
        ratio = max(height / to, width / to)
        return max(round(height / ratio), 1), max(round(width / ratio), 1)
    if height < width:
        return to, int(to * width / height)
    return int(to * height / width), to


def cut(image: np.ndarray, transform: dict, interpolation: str | None = None) -> np.ndarray:
    """Resizes and cuts out the square that the encoder sees.

    Args:
      image: uint8 (H, W, 3); with 'nearest' also a map (H, W), of classes in uint8, whose border
        is 255, or of int32 or float32, whose border is 0.
      transform: see the top of this file.
      interpolation: instead of that of the transform.
    """
    size, (height, width) = transform['size'], image.shape[:2]
    h, w = resized(height, width, transform)
    y, x = (_margin(n - size, transform['library']) for n in (h, w))
    top, left, rows, columns = max(y, 0), max(x, 0), min(size, h), min(size, w)
    method = PIL.Image.Resampling[(interpolation or transform['interpolation']).upper()]
    pixels = PIL.Image.fromarray(np.ascontiguousarray(image))
    # The whole image is resized, as the libraries do: resampling the central part alone (`box`)
    # differs by a grey level here and there. Only a strip, hundreds of times as long as wide, has
    # no memory for that.
    if h * w > host.MAX_PIXELS:
        sy, sx = height / h, width / w
        box = (left * sx, top * sy, (left + columns) * sx, (top + rows) * sy)
        part = np.asarray(pixels.resize((columns, rows), method, box=box))
    else:
        whole = np.asarray(pixels.resize((w, h), method))
        part = whole[top : top + rows, left : left + columns]
    out = np.zeros((size, size, *image.shape[2:]), image.dtype)
    if image.ndim == 2 and image.dtype == np.uint8:  # a class map: no class counts in the border
        out[:] = 255
    if transform['mode'] == 'border' and image.ndim == 3:
        out[:] = [round(255 * m) for m in transform['mean']]
    out[top - y : top - y + rows, left - x : left - x + columns] = part
    return out


def _margin(excess, library):
    """Pixels cut off before the square (negative: added), of `excess` in both margins."""
    if library == 'transformers':
        return excess // 2
    return round(excess / 2) if excess > 0 else -(-excess // 2)


def describe(transform: dict) -> str:
    """The geometry in a phrase."""
    size, to = transform['size'], side(transform)
    if transform['mode'] == 'none':
        return f'not resized, central {size} px'
    if transform['mode'] == 'center' and to == size:
        return f'{size} px'
    what = dict(center='short side', squash='both sides', border='long side')[transform['mode']]
    rest = ', the rest in the mean colour' if transform['mode'] == 'border' else ''
    return f'{what} {to}, central {size} px{rest}'


def protocol(transform: dict) -> dict:
    """What a row of an evaluation says of its images."""
    centre, kind = 'centre', transform['interpolation']
    if transform['mode'] != 'center':
        centre = f'{describe(transform)} ({transform["mode"]})'
    return dict(
        resolution=transform['size'],
        resize=side(transform),
        crop=centre,
        interpolation=f'{kind} (Pillow)' if kind == 'nearest' else f'{kind}, antialiased (Pillow)',
    )
