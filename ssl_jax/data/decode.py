# SPDX-License-Identifier: Apache-2.0
"""Bytes of an image file, or pixels, to uint8 (H, W, 3) RGB.

libjpeg-turbo, OpenCV, libtiff and Pillow's decoders release the GIL, so threads keep all cores
busy. No state is shared between them.
"""

import io
import re
import zlib

import cv2
import numpy as np
import PIL.features
import PIL.Image
import PIL.ImageOps

from ssl_jax.data import jpeg, pixels, tiff
from ssl_jax.data.pixels import MAX_PIXELS, DecodeError
from ssl_jax.run import errors

__all__ = ['MAX_PIXELS', 'DecodeError', 'decode']

_HEIF = {b'heic', b'heix', b'heim', b'heis', b'hevc', b'hevx', b'hevm', b'hevs', b'mif1', b'msf1'}
_PNG = b'\x89PNG\r\n\x1a\n'
_KNOWN = b'RIFF', b'GIF8', b'BM', b'\0\0\0\x0cjP  ', b'\xff\x4f\xff\x51', _PNG, b'P5', b'P6'
_PNM = re.compile(rb'P([56])' + 3 * rb'(?:\s|#[^\r\n]*[\r\n])+(\d{1,9})' + rb'\s')


def decode(x: bytes | np.ndarray, min_size: int | None = None) -> np.ndarray:
    """Encoded bytes, or pixels, to uint8 (H, W, 3) RGB, upright.

    A truncated or corrupt file is an error, not an image with grey areas. Of animations, the first
    frame. Transparency is composited on white, because images with an alpha channel (logos,
    products, diagrams) are mostly drawn for white pages; a fourth band that is not alpha is left
    out. 16-bit pixels are scaled to 8 bits, not clipped: by the white that the file states, else by
    the fewest of 10, 12, 14 and 16 bits that hold the brightest pixel. Floating-point pixels are
    read if all are in [0, 1].

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
    if data[:2] == b'\xff\xd8':
        image = jpeg.decode(data, min_size)
    elif tiff.is_tiff(data):
        image = tiff.decode(data)
    elif data[:2] in (b'P5', b'P6'):
        image = _pnm(data)
    elif data[:8] == _PNG:
        image = _png(data)
    else:
        _check_written(data)
        image = None
    return _pillow(data) if image is None else image


def _from_array(x):
    if x.dtype == np.bool_:
        x = x.astype(np.uint8) * 255
    elif x.dtype == np.uint16:
        x = pixels.to_8_bits(x)
    if x.dtype != np.uint8:
        raise DecodeError(f'pixels of type {x.dtype}; give uint8 (0..255) or uint16 (0..65535)')
    if x.ndim == 2:
        x = x[:, :, None]
    if x.ndim != 3 or x.shape[2] not in (1, 3, 4) or 0 in x.shape:
        raise DecodeError(f'an array of shape {x.shape}; give (H, W), or (H, W, 1, 3 or 4)')
    return pixels.to_rgb(x)


def _pillow(data):
    try:
        with _open(data) as file:
            pixels.check_size(*file.size)
            if file.format == 'EPS':  # Pillow would run Ghostscript on it
                raise DecodeError('PostScript, not a raster image')
            if data[:8] == _PNG and file.mode == 'L' and 'transparency' in file.info:
                # Pillow scales grey of 2 and 4 bits to 8, and leaves the transparent value.
                file.info['transparency'] *= 255 // (2 ** data[24] - 1)
            image = PIL.ImageOps.exif_transpose(file)
        if image.mode.startswith('I;16'):
            white = 65535 if file.format == 'JPEG2000' else None  # Pillow scales to it
            return _from_array(pixels.to_8_bits(np.asarray(image).astype(np.uint16), white))
        if image.mode == 'I' and file.format == 'PPM':  # scaled by Pillow to 16 bits
            return _from_array(pixels.to_8_bits(np.asarray(image).astype(np.uint16), 65535))
        if image.mode == 'I':
            raise DecodeError(pixels.NO_WHITE)
        if image.mode == 'F':
            return _from_array(pixels.unit_to_8_bits(np.asarray(image)))
        if image.mode == 'LAB':
            raise DecodeError('colours in CIE L*a*b*: save it in RGB')
        if image.has_transparency_data:
            return _from_array(np.asarray(image.convert('RGBA')))
        return np.array(image.convert('RGB'))
    except errors.UserError:
        raise
    except PIL.UnidentifiedImageError:
        raise DecodeError(_what_is(data)) from None
    except PIL.Image.DecompressionBombError:
        raise DecodeError(pixels.TOO_LARGE) from None
    except Exception as e:  # Pillow's plugins raise OSError, SyntaxError, struct.error, ...
        raise pixels.corrupt('image', e) from None


def _open(data):
    if data[:4] == b'RIFF' and data[8:16] == b'WEBPVP8X' and len(data) > 20 and data[20] & 2:
        # An animation. What its first frame leaves free of the canvas is transparent, also if no
        # frame has alpha; without this flag Pillow paints it black.
        data = data[:20] + bytes([data[20] | 0x10]) + data[21:]
    try:
        return PIL.Image.open(io.BytesIO(data))
    except PIL.UnidentifiedImageError:
        if data[4:8] != b'ftyp' or data[8:12] not in _HEIF:
            raise
    try:
        heif = errors.extra('pillow_heif', 'heif')
    except errors.UserError as e:
        raise DecodeError(f'an HEIC photo, and {e}') from None
    return heif.HeifImageFile(io.BytesIO(data))  # no plugin for all of Pillow


def check_png(data: bytes) -> bool:
    """Checks the checksums of the pixels of a PNG; returns whether it has EXIF data.

    Pillow stops at the last row: in a file that was allocated and not fully written, zeros may
    decode to that point.

    Raises:
      DecodeError: a checksum is wrong.
    """
    at, name, has_exif = 8, b'', False
    while at < len(data) and name != b'IEND':
        name, end = data[at + 4 : at + 8], at + 8 + int.from_bytes(data[at : at + 4], 'big')
        has_exif |= name == b'eXIf'
        if name == b'IDAT':
            stored = int.from_bytes(data[end : end + 4], 'big')
            if len(data) < end + 4 or zlib.crc32(memoryview(data)[at + 4 : end]) != stored:
                raise pixels.corrupt('PNG', 'a wrong checksum')
        at = end + 4
    return has_exif


def _png(data):
    """16-bit PNG, of which Pillow keeps the high bytes; None for others. Checks the checksums."""
    has_exif = check_png(data)
    bits, colour = data[24:26].ljust(2, b'\0')
    if bits != 16:
        return None
    try:
        with PIL.Image.open(io.BytesIO(data)) as file:
            pixels.check_size(*file.size)
            hidden = file.info.get('transparency')
            # Pillow would decode all pixels to look for a block that is not there.
            orientation = file.getexif().get(0x0112, 1) if has_exif else 1
            grey = np.asarray(file) if colour == 0 else None
    except PIL.Image.DecompressionBombError:
        raise DecodeError(pixels.TOO_LARGE) from None
    except DecodeError:
        raise
    except Exception as e:
        raise pixels.corrupt('PNG', e) from None
    if grey is None:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if image is None or image.dtype != np.uint16:
            raise pixels.corrupt('PNG', 'OpenCV cannot read it')
        parts = [image] if image.shape[2] == 3 else [image[:, :, :3], image[:, :, 3:]]
        image = np.dstack([pixels.to_8_bits(part) for part in parts])  # alpha has its own range
        order = cv2.COLOR_BGR2RGB if len(parts) == 1 else cv2.COLOR_BGRA2RGBA
        image = cv2.cvtColor(image, order)
    else:
        image = pixels.to_8_bits(grey.astype(np.uint16))[:, :, None]
        if hidden is not None:
            image = np.dstack([image, np.where(grey == hidden, 0, 255).astype(np.uint8)])
    return pixels.upright(pixels.to_rgb(image), orientation)


def _pnm(data):
    """Binary PGM and PPM whose white is not 255: Pillow takes 2 s for a megapixel of them."""
    found = _PNM.match(data[:4096])
    if not found or found[4] == b'255':
        return None
    kind, width, height, white = map(int, found.groups())
    pixels.check_size(width, height)
    dtype, bands = np.dtype('>u2' if white > 255 else 'u1'), 3 if kind == 6 else 1
    if width * height * white == 0 or white > 65535:
        raise pixels.corrupt('PNM', f'{width}x{height} pixels, white is {white}')
    if len(data) - found.end() < width * height * bands * dtype.itemsize:
        raise pixels.corrupt('PNM', 'pixels are missing')
    x = np.frombuffer(data, dtype, width * height * bands, found.end())
    x = x.astype(dtype.newbyteorder('=')).reshape(height, width, bands)
    return pixels.to_rgb(pixels.to_8_bits(x, white))


def _check_written(data):
    """Raises DecodeError for a WebP, AVIF or HEIC that ends in zeros: allocated, not fully written.

    These formats have no checksum and their decoders show what is missing in grey. Image data of
    even a blank image end in at most three zeros.
    """
    if data[:4] == b'RIFF':
        end = 8 + int.from_bytes(data[4:8], 'little')
    elif data[4:8] == b'ftyp':
        end = 0
        while end + 8 <= len(data) and (size := int.from_bytes(data[end : end + 4], 'big')) >= 8:
            end += size
        end = len(data) if size in (0, 1) and any(data[end + 4 : end + 8]) else end
    else:
        return
    end = min(end, len(data))
    if end >= 64 and not any(data[end - 64 : end]):
        raise pixels.corrupt('image', 'it ends in zeros that were never written')


def _what_is(data):
    """Likely content of a file that is no image, as a part of a message."""
    head = data[:512].lstrip().lower()
    if head.startswith((b'<!doctype html', b'<html')):
        return 'an HTML page, not an image: the download probably failed'
    if head.startswith((b'<?xml', b'<svg')):
        return 'XML or SVG, not a raster image'
    avif = data[4:12] in (b'ftypavif', b'ftypavis')
    if avif and not PIL.features.check('avif'):
        return 'an AVIF image, which Pillow reads since 11.3: update it'
    if avif or data.startswith(_KNOWN):
        return 'a truncated or corrupt image (its header cannot be read)'
    if data[4:8] == b'ftyp':
        return f'a {data[8:12].decode("ascii", "replace")} container that Pillow cannot read'
    if not any(data[:4096]):
        return 'all zeros: the file was allocated but never written'
    try:
        data[:512].decode('ascii')
    except UnicodeDecodeError:
        return 'not an image in a known format'
    return 'text, not an image'
