# SPDX-License-Identifier: Apache-2.0
"""From the pixels that files hold to uint8 RGB: range, transparency, orientation, size."""

import cv2
import numpy as np

from ssl_jax.run import errors

# Pillow's own limit for an error: 2 x MAX_IMAGE_PIXELS. More is a decompression bomb or a mosaic
# that should have been cut into tiles.
MAX_PIXELS = 178_956_970
TOO_LARGE = (
    f'more than {MAX_PIXELS // 10**6} million pixels: '
    'a decompression bomb, or an image to cut into tiles'
)
NO_WHITE = '32-bit pixels have no agreed white: convert the image to 8 or 16 bits'
DEPTHS = 10, 12, 14, 16  # bits of cameras and scanners whose pixels are stored in 16


class DecodeError(errors.UserError):
    """The data are not a usable image; the message is the reason."""


def corrupt(what: str, why: object) -> DecodeError:
    """The error for a file whose pixels cannot all be read; `why` are the words of a decoder."""
    return DecodeError(f'a truncated or corrupt {what} ({str(why).strip().rstrip(".")})')


def check_size(width: int, height: int) -> None:
    """Raises DecodeError for more than MAX_PIXELS, before anything of that size is allocated."""
    if width * height > MAX_PIXELS:
        raise DecodeError(f'{width}x{height} is {TOO_LARGE}')


def to_8_bits(x: np.ndarray, white: int | None = None) -> np.ndarray:
    """uint8 or uint16 with `white` as 255, rounded.

    Many cameras, scanners and microscopes store 10, 12 or 14 bits in 16 and do not say so; scaled
    by 65535 such images are black. If `white` is unknown, it is the largest value of the fewest
    DEPTHS that hold the brightest pixel: 1023, 4095, 16383 or 65535.
    """
    if white is None:
        brightest = int(x.max(initial=0))
        white = next(2**b - 1 for b in DEPTHS if brightest < 2**b)
    if x.dtype == np.uint8 and white == 255:
        return x
    return cv2.convertScaleAbs(x, alpha=255 / white).reshape(x.shape)  # rounds and saturates


def unit_to_8_bits(x: np.ndarray) -> np.ndarray:
    """Floats to uint8, 1 is white.

    Raises:
      DecodeError: a value is outside [0, 1], so white is unknown.
    """
    low, high = float(x.min(initial=0)), float(x.max(initial=0))  # NaN if there is one
    if not (low >= 0 and high <= 1):
        found = 'hold NaN' if np.isnan(low) else f'reach from {low:g} to {high:g}'
        raise DecodeError(f'floating-point pixels that {found}: scale them to 0 ... 1')
    return (x * 255 + 0.5).astype(np.uint8)


def on_white(rgb: np.ndarray, alpha: np.ndarray, premultiplied: bool = False) -> np.ndarray:
    """uint8 (H, W, C) over white, by `alpha` (H, W, 1)."""
    c, a = rgb.astype(np.uint32), alpha.astype(np.uint32)
    if premultiplied:
        return np.minimum(c + 255 - a, 255).astype(np.uint8)
    return ((c * a + 255 * (255 - a) + 127) // 255).astype(np.uint8)


def to_rgb(x: np.ndarray) -> np.ndarray:
    """uint8 (H, W, 1, 2, 3 or 4), grey or RGB with or without alpha, to (H, W, 3) over white."""
    if x.shape[2] in (2, 4):
        x = on_white(x[:, :, :-1], x[:, :, -1:])
    return np.repeat(x, 3, axis=2) if x.shape[2] == 1 else x


def upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Undoes an orientation of EXIF: (H, W, 3) -> (H, W, 3) or (W, H, 3)."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)
