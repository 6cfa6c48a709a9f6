# SPDX-License-Identifier: Apache-2.0
"""Host operations on one image: decode, crop, resize.  numpy in, uint8 HWC RGB out.

Everything heavy here (libjpeg-turbo, OpenCV, Pillow's resampling) releases the GIL, so threads are
enough to keep all cores busy.  No JAX: the functions also run in worker processes.
"""

import io
import math

import cv2
import numpy as np
import PIL.Image
import PIL.ImageOps
import simplejpeg

cv2.setNumThreads(0)  # The stream is parallel over samples; nested threads only add contention.

# Pillow's own limit for an error: 2 x MAX_IMAGE_PIXELS.  More is a decompression bomb or a mosaic
# that should have been cut into tiles.
MAX_PIXELS = 178_956_970

_CV2 = {
    'nearest': cv2.INTER_NEAREST_EXACT,
    'bilinear': cv2.INTER_LINEAR,
    'bicubic': cv2.INTER_CUBIC,
}
_PIL = {
    'nearest': PIL.Image.Resampling.NEAREST,
    'bilinear': PIL.Image.Resampling.BILINEAR,
    'bicubic': PIL.Image.Resampling.BICUBIC,
}


class DecodeError(ValueError):
    """The bytes are not an image that can be trained on; the message says why."""


def decode(x, min_size=None):
    """Encoded bytes, or pixels, to uint8 (H, W, 3) RGB, upright.

    JPEG goes through libjpeg-turbo in strict mode: a truncated or corrupt file is an error, never
    an image with grey areas.  All other formats, and CMYK or YCCK JPEG, go through Pillow (first
    frame of animations).  The EXIF orientation is applied.  16-bit pixels are scaled to 8 bits, not
    clipped.  Transparency is composited on white, because images with an alpha channel (logos,
    products, diagrams) are mostly drawn for white pages.

    Args:
      x: bytes of an image file, or an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4) of uint8,
        uint16 or bool.
      min_size: if given, a JPEG may be decoded at 1/8 ... 7/8 of its size as long as both sides
        stay >= `min_size` pixels; several times faster for large photographs.

    Raises:
      DecodeError: with a reason for humans.
    """
    if isinstance(x, np.ndarray):
        return _from_array(x)
    data = bytes(x)
    if not data:
        raise DecodeError('the file is empty (0 bytes)')
    if data[:2] == b'\xff\xd8':
        image = _decode_jpeg(data, min_size)
        if image is not None:
            return image
    return _decode_pillow(data)


def random_resized_crop(
    image, rng, size, scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), interpolation='bicubic'
):
    """Cuts a random box and resizes it to uint8 (size, size, 3), by torchvision's rule.

    Ten times: area = H W U(scale), aspect = exp(U(log ratio)); the first box that fits is placed
    uniformly; if none fits, the largest centred box with an aspect inside `ratio`.

    Args:
      image: uint8 (H, W, 3).
      rng: np.random.Generator.
    """
    y, x, h, w = crop_box(*image.shape[:2], rng, scale, ratio)
    return resize(image[y : y + h, x : x + w], size, size, interpolation)


def crop_box(height, width, rng, scale, ratio):
    """(y, x, h, w) of torchvision's RandomResizedCrop; draws from `rng`."""
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        u = rng.random(4)
        area = height * width * (scale[0] + (scale[1] - scale[0]) * u[0])
        aspect = math.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * u[1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1)), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def resize(image, height, width, interpolation='bicubic'):
    """Fast resize for training crops: OpenCV, area-averaged along each side that shrinks.

    OpenCV's cubic does not antialias, Pillow's does.  Measured on 480x360 photographs, boxes of
    0.2-1.0 of the area to 224, per crop and against Pillow's bicubic (mean / 99th percentile of the
    error, in 1/255): Pillow 1.56 ms; INTER_CUBIC 0.15 ms, 1.0 / 10; INTER_AREA where it shrinks
    0.70 ms, 0.5 / 4.  At 96 the errors of plain cubic grow to 3.2 / 28 while area stays 0.7 / 5.
    Decoding takes 1.05 ms, so area makes a view 1.5 times as fast as Pillow for no visible change.
    """
    h, w = image.shape[:2]
    mode = _CV2[interpolation]
    if interpolation == 'nearest':
        return cv2.resize(image, (width, height), interpolation=mode)
    if h > height or w > width:
        down = min(w, width), min(h, height)
        image = cv2.resize(image, down, interpolation=cv2.INTER_AREA)
    if image.shape[:2] == (height, width):
        return np.ascontiguousarray(image)
    return cv2.resize(image, (width, height), interpolation=mode)


def resize_center_crop(image, size, resize=None, interpolation='bicubic'):
    """The evaluation view: short side to `resize` (default `size`), central size x size.

    Resamples with Pillow, antialiased, because published numbers were measured with it.

    Args:
      image: uint8 (H, W, 3); with interpolation='nearest' also a map (H, W) of uint8, int32 or
        float32, cut with the same geometry.
      size: side of the result in pixels.
      resize: length of the short side before the crop, >= size.
    """
    resize = resize or size
    if resize < size:
        raise ValueError(f'resize={resize} is smaller than the crop of {size}: use {size} or more.')
    height, width = image.shape[:2]
    if height < width:
        h, w = resize, max(resize, int(resize * width / height))
    else:
        h, w = max(resize, int(resize * height / width)), resize
    y, x = round((h - size) / 2), round((w - size) / 2)
    if (h, w) == (height, width):
        return np.ascontiguousarray(image[y : y + size, x : x + size])
    # Resample only the part that is kept: box is in pixels of the input.
    sy, sx = height / h, width / w
    box = (x * sx, y * sy, (x + size) * sx, (y + size) * sy)
    pixels = PIL.Image.fromarray(np.ascontiguousarray(image))
    return np.array(pixels.resize((size, size), _PIL[interpolation], box=box))


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
    _check_pixels(width, height)
    least = min(min_size or 0, width, height)
    try:
        image = simplejpeg.decode_jpeg(data, 'RGB', min_height=least, min_width=least)
    except ValueError as e:
        raise DecodeError(f'a truncated or corrupt JPEG ({str(e).strip().rstrip(".")})') from None
    # Opening with Pillow costs more than decoding a thumbnail, so look for the tag's name first.
    if data.find(b'Exif\0\0', 0, 1 << 17) >= 0:
        image = _upright(image, _exif_orientation(data))
    return image


def _exif_orientation(data):
    try:
        with PIL.Image.open(io.BytesIO(data)) as image:
            return image.getexif().get(0x0112, 1)
    except Exception:  # A damaged EXIF block says nothing about the pixels: upright.
        return 1


def _upright(image, orientation):
    """Undoes EXIF orientations 2..8; uint8 (H, W, 3) -> (H, W, 3) or (W, H, 3)."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)


def _decode_pillow(data):
    try:
        with PIL.Image.open(io.BytesIO(data)) as image:
            _check_pixels(*image.size)
            image.load()
            image = PIL.ImageOps.exif_transpose(image)
            return _from_pillow(image)
    except DecodeError:
        raise
    except PIL.UnidentifiedImageError:
        raise DecodeError(_what_is(data)) from None
    except PIL.Image.DecompressionBombError:
        raise DecodeError(
            f'more than {MAX_PIXELS // 10**6} million pixels: a decompression bomb, or cut it'
        ) from None
    except Exception as e:  # Pillow's plugins raise OSError, SyntaxError, struct.error, ...
        raise DecodeError(f'a truncated or corrupt image ({str(e).strip().rstrip(".")})') from None


def _from_pillow(image):
    if image.mode.startswith('I;16'):
        return _from_array(np.asarray(image).astype(np.uint16))
    if image.mode == 'I' and image.format == 'PNG':  # 16-bit PNG in Pillow < 11.3.
        return _from_array(np.asarray(image).astype(np.uint16))
    if image.mode in ('I', 'F'):
        raise DecodeError('32-bit pixels have no agreed white: convert the image to 8 or 16 bits')
    if image.has_transparency_data:
        return _from_array(np.asarray(image.convert('RGBA')))
    return np.array(image.convert('RGB'))


def _check_pixels(width, height):
    if width * height > MAX_PIXELS:
        raise DecodeError(
            f'{width}x{height} is more than {MAX_PIXELS // 10**6} million pixels: '
            'a decompression bomb, or an image to cut into tiles'
        )


def _what_is(data):
    """Says in words what a file that is no image seems to be."""
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
