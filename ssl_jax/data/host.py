# SPDX-License-Identifier: Apache-2.0
"""Decode, crop and resize of one image on the host: numpy in, uint8 HWC RGB out.

libjpeg-turbo, OpenCV and Pillow's resampling release the GIL, so threads keep all cores busy. No
JAX: the functions also run in worker processes.
"""

import dataclasses
import io
import math

import cv2
import numpy as np
import PIL.Image
import PIL.ImageOps
import simplejpeg

from ssl_jax.run import errors

cv2.setNumThreads(0)  # the stream is parallel over samples; nested threads only add contention

# Pillow's own limit for an error: 2 x MAX_IMAGE_PIXELS. More is a decompression bomb or a mosaic
# that should have been cut into tiles.
MAX_PIXELS = 178_956_970
_TOO_LARGE = (
    f'more than {MAX_PIXELS // 10**6} million pixels: '
    'a decompression bomb, or an image to cut into tiles'
)
ASPECTS = 3 / 4, 4 / 3  # width / height of a random crop


@dataclasses.dataclass(frozen=True)
class View:
    """Crops that the host cuts from each image: `batch[name]`, uint8 (B, count, size, size, 3)."""

    name: str  # key in the batch
    size: int  # side of the square crop in pixels
    count: int = 1  # crops per image, drawn independently
    scale: tuple[float, float] = (0.2, 1.0)  # range of the crop's share of the image area


class DecodeError(errors.UserError):
    """The data are not a usable image; the message is the reason."""


def decode(x: bytes | np.ndarray, min_size: int | None = None) -> np.ndarray:
    """Encoded bytes, or pixels, to uint8 (H, W, 3) RGB, upright.

    libjpeg-turbo decodes JPEG in strict mode: a truncated or corrupt file is an error, not an image
    with grey areas. Pillow decodes all other formats (the first frame of animations), and
    CMYK or YCCK JPEG. 16-bit pixels are scaled to 8 bits, not clipped. Transparency is composited
    on white, because images with an alpha channel (logos, products, diagrams) are mostly drawn for
    white pages.

    Args:
      x: bytes of an image file, or an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8,
        uint16 or bool.
      min_size: if given, a JPEG may be decoded at 1/8 ... 7/8 of its size, with both sides >=
        `min_size` pixels; several times faster for large photographs.

    Raises:
      DecodeError: the message is the reason.
    """
    if isinstance(x, np.ndarray):
        return _from_array(x)
    data = bytes(x)
    if not data:
        raise DecodeError('the file is empty (0 bytes)')
    image = _decode_jpeg(data, min_size) if data[:2] == b'\xff\xd8' else None
    return _decode_pillow(data) if image is None else image


def random_resized_crop(
    image: np.ndarray, rng: np.random.Generator, size: int, scale: tuple[float, float]
) -> np.ndarray:
    """Cuts the `crop_box` from uint8 (H, W, 3) and resizes it to (size, size, 3)."""
    y, x, h, w = crop_box(*image.shape[:2], rng, scale)
    return resize(image[y : y + h, x : x + w], size)


def crop_box(
    height: int, width: int, rng: np.random.Generator, scale: tuple[float, float]
) -> tuple[int, int, int, int]:
    """(y, x, h, w) of torchvision's RandomResizedCrop.

    Up to ten times: area = H W U(scale), aspect = exp(U(log ASPECTS)); the first box that fits is
    placed uniformly. If none fits: the largest centred box with an aspect inside ASPECTS.
    """
    low, high = ASPECTS
    for _ in range(10):
        u = rng.random(4)
        area = height * width * (scale[0] + (scale[1] - scale[0]) * u[0])
        aspect = math.exp(math.log(low) + (math.log(high) - math.log(low)) * u[1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1)), h, w
    h, w = min(height, round(width / low)), min(width, round(height * high))
    return (height - h) // 2, (width - w) // 2, h, w


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes a training crop to (size, size): OpenCV, area-averaged along a side that shrinks.

    OpenCV's cubic does not antialias, Pillow's does. Measured on 480x360 photographs, boxes of
    0.2-1.0 of the area to 224, per crop and against Pillow's bicubic (mean / 99th percentile of the
    error, in 1/255): Pillow 1.56 ms; INTER_CUBIC 0.15 ms, 1.0 / 10; INTER_AREA where it shrinks
    0.70 ms, 0.5 / 4. At 96 the errors of plain cubic grow to 3.2 / 28 while area stays 0.7 / 5.
    Decoding takes 1.05 ms, so area makes a view 1.5 times as fast as Pillow for no visible change.
    """
    h, w = image.shape[:2]
    if h > size or w > size:
        image = cv2.resize(image, (min(w, size), min(h, size)), interpolation=cv2.INTER_AREA)
    if image.shape[:2] == (size, size):
        return np.ascontiguousarray(image)
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC)


def _from_array(x):
    if x.dtype == np.bool_:
        x = x.astype(np.uint8) * 255
    elif x.dtype == np.uint16:
        x = ((x.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if x.dtype != np.uint8:
        raise DecodeError(f'pixels of type {x.dtype}; give uint8 (0..255) or uint16 (0..65535)')
    if x.ndim == 2:
        x = x[:, :, None]
    if x.ndim != 3 or x.shape[2] not in (1, 3, 4) or 0 in x.shape:
        raise DecodeError(f'an array of shape {x.shape}; give (H, W), or (H, W, 1, 3 or 4)')
    if x.shape[2] == 1:
        x = np.repeat(x, 3, axis=2)
    elif x.shape[2] == 4:
        alpha = x[:, :, 3:].astype(np.uint32)
        x = ((x[:, :, :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
    return x


def _decode_jpeg(data, min_size):
    """uint8 (H, W, 3), or None where libjpeg-turbo has no RGB (CMYK, YCCK, lossless)."""
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError:
        return None
    if space in ('CMYK', 'YCCK'):
        return None
    if width * height > MAX_PIXELS:
        raise DecodeError(f'{width}x{height} is {_TOO_LARGE}')
    side = min(min_size or 0, width, height)
    try:
        image = simplejpeg.decode_jpeg(data, 'RGB', min_height=side, min_width=side)
    except ValueError as e:
        raise DecodeError(f'a truncated or corrupt JPEG ({str(e).strip().rstrip(".")})') from None
    # Pillow takes longer to open a file than a thumbnail takes to decode: search the tag first.
    return _upright(image, data) if data.find(b'Exif\0\0', 0, 1 << 17) >= 0 else image


def _upright(image, data):
    """Undoes the EXIF orientation of a JPEG: (H, W, 3) -> (H, W, 3) or (W, H, 3)."""
    try:
        with PIL.Image.open(io.BytesIO(data)) as header:
            orientation = header.getexif().get(0x0112, 1)
    except Exception:  # the pixels may be sound even if the EXIF block is damaged
        return image
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)


def _decode_pillow(data):
    try:
        with PIL.Image.open(io.BytesIO(data)) as file:
            image = PIL.ImageOps.exif_transpose(file)
        if image.mode.startswith('I;16'):
            return _from_array(np.asarray(image).astype(np.uint16))
        if image.mode in ('I', 'F'):
            raise DecodeError(
                '32-bit pixels have no agreed white: convert the image to 8 or 16 bits'
            )
        if image.has_transparency_data:
            return _from_array(np.asarray(image.convert('RGBA')))
        return np.array(image.convert('RGB'))
    except DecodeError:
        raise
    except PIL.UnidentifiedImageError:
        raise DecodeError(_what_is(data)) from None
    except PIL.Image.DecompressionBombError:
        raise DecodeError(_TOO_LARGE) from None
    except Exception as e:  # Pillow's plugins raise OSError, SyntaxError, struct.error, ...
        raise DecodeError(f'a truncated or corrupt image ({str(e).strip().rstrip(".")})') from None


def _what_is(data):
    """Likely content of a file that is no image, as a part of a message."""
    head = data[:512].lstrip().lower()
    if head.startswith((b'<!doctype html', b'<html')):
        return 'an HTML page, not an image: the download probably failed'
    if head.startswith((b'<?xml', b'<svg')):
        return 'XML or SVG, not a raster image'
    if data[4:8] == b'ftyp':
        return f'a {data[8:12].decode("ascii", "replace")} container that Pillow cannot read'
    if not any(data[:4096]):
        return 'all zeros: the file was allocated but never written'
    try:
        data[:512].decode('ascii')
    except UnicodeDecodeError:
        return 'not an image in a known format'
    return 'text, not an image'
