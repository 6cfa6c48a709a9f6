# SPDX-License-Identifier: Apache-2.0
"""JPEG: all of it or a reason, never grey areas or shifted blocks.

libjpeg-turbo decodes in strict mode, where a warning is an error. It also warns of much that costs
no pixel: odd headers of scanners, padding of cameras, a lost end marker. Then `_bare` removes what
is no image data, and the rest is decoded, strictly again: nothing is accepted on the strength of a
warning's words. That would be unsound: of photographs with one damaged byte or sector, a tenth to a
half give nothing but "extraneous bytes before marker 0xd9", with their blocks shifted.
"""

import io
import re

import numpy as np
import PIL.Image
import simplejpeg

from ssl_jax.data import pixels

# Progressive files of encoders have 10 scans, optimized ones up to 20. Each costs a pass over all
# blocks, and a hostile file of 10 MB could hold a million.
MAX_SCANS = 100
_JFIF = b'\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0'
_END_OF_SCAN = re.compile(rb'\xff[^\x00\xd0-\xd7\xff]')
_RESTART = re.compile(rb'\xff+([\xd0-\xd7])')
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # SOF0 ... SOF15
_PLAIN = 0xC0, 0xC1  # sequential: one pass is enough if it has all components


def decode(data: bytes, min_size: int | None = None) -> np.ndarray | None:
    """uint8 (H, W, 3), or None where libjpeg-turbo's simple interface has no name for the layout.

    Args:
      data: bytes that begin with ff d8.
      min_size: see `decode.decode`.

    Raises:
      DecodeError: the message is the reason.
    """
    head = _check_scans(data)
    try:
        return _strict(data, min_size, data[:head])
    except pixels.DecodeError:
        raise
    except ValueError as e:
        why = e
    for padding in (None, 0, 1):
        bare = _bare(data, padding)
        if bare is None:
            break
        try:
            return _strict(bare, min_size, data[:head])
        except pixels.DecodeError:
            raise
        except ValueError:
            pass
    if 'Could not determine subsampling' in str(why):
        return None
    raise pixels.corrupt('JPEG', why)


def _strict(data, min_size, head):
    """Raises ValueError at any warning of libjpeg-turbo.

    Args:
      data: of the image.
      min_size: see `decode`.
      head: what stands before the first scan, with the EXIF block.
    """
    height, width, space, _ = simplejpeg.decode_jpeg_header(data)
    pixels.check_size(width, height)
    cmyk = space in ('CMYK', 'YCCK')
    side = min(min_size or 0, width, height)
    image = simplejpeg.decode_jpeg(data, 'CMYK' if cmyk else 'RGB', min_height=side, min_width=side)
    if cmyk:  # stored inverted, as Adobe does; so read by Pillow, OpenCV and browsers
        image = np.array(PIL.Image.fromarray(255 - image, 'CMYK').convert('RGB'))
    # Pillow takes longer to open a file than a thumbnail takes to decode: search the tag first.
    return _upright(image, head) if b'Exif\0\0' in head else image


def _upright(image, data):
    try:
        with PIL.Image.open(io.BytesIO(data)) as header:
            orientation = header.getexif().get(0x0112, 1)
    except Exception:  # the pixels may be sound even if the EXIF block is damaged
        return image
    return pixels.upright(image, orientation)


def _segments(data):
    """(marker, start, end) up to the end marker; of a scan, its header.

    Skips bytes between them. Raises ValueError at a segment that is not whole.
    """
    at = 2
    while (at := data.find(b'\xff', at)) >= 0 and at + 1 < len(data):
        marker = data[at + 1]
        if marker in (0x00, 0x01, 0xFF) or 0xD0 <= marker <= 0xD7:  # no segment
            at += 1 if marker == 0xFF else 2
            continue
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], 'big')
        if marker != 0xD9 and (marker == 0xD8 or not at + 4 <= end <= len(data)):
            raise ValueError('a segment is not whole')
        yield marker, at, end
        if marker == 0xD9:
            return
        at = end
        if marker == 0xDA:
            stop = _END_OF_SCAN.search(data, end)
            at = stop.start() if stop else len(data)


def _check_scans(data):
    """The byte where the first scan ends its header; reads the headers alone if it can.

    Raises:
      DecodeError: the file is made to take very long.
    """
    frame, scans, head = None, 0, min(len(data), 1 << 17)
    try:
        for marker, at, end in _segments(data):
            if marker in _FRAMES:
                frame = marker, data[at + 9]
            elif marker == 0xDA:
                scans += 1
                head = end if scans == 1 else head
                if frame and frame[0] in _PLAIN and data[at + 4] == frame[1]:
                    return head  # libjpeg ends with the first scan of all components
                if scans > MAX_SCANS:
                    raise pixels.DecodeError(f'a JPEG of more than {MAX_SCANS} scans')
    except (ValueError, IndexError) as e:
        if isinstance(e, pixels.DecodeError):
            raise
    return head


def _bare(data, padding):
    """The same image without what is no image data, or None if its structure is damaged.

    All coefficients must be there: bytes between segments may be a scan whose marker is damaged.
    Removes such bytes and those behind the image, comments and application data; adds the end
    marker. Restart markers that count from another start, or not at all, are numbered. Unless
    `padding` is None, padding at the end of the data of a scan or a restart interval is cut to that
    many bytes: damaged data do not end so.
    """
    parts, frame, left = [b'\xff\xd8'], None, set()
    try:
        for marker, at, end in _segments(data):
            segment = data[at:end]
            if marker == 0xE0 and segment[4:9] == b'JFIF\0':
                parts.append(_JFIF)  # its presence means YCbCr; the version means nothing
            elif marker == 0xEE and segment[4:9] == b'Adobe' and segment[15] <= 2:
                parts.append(segment)
            elif marker == 0xDA:
                n = segment[4]
                if frame in _PLAIN:  # other limits have no meaning there, and libjpeg warns of them
                    segment = segment[: 5 + 2 * n] + b'\0\x3f\0'
                first, last, bits = segment[5 + 2 * n : 8 + 2 * n]
                if bits % 16 == 0:
                    left -= {
                        (c, k) for c in segment[5 : 5 + 2 * n : 2] for k in range(first, last + 1)
                    }
                stop = _END_OF_SCAN.search(data, end)
                body = data[end : stop.start() if stop else len(data)]
                parts += [segment, _scan(body, padding)]
            elif not (0xE0 <= marker <= 0xEF or marker in (0xFE, 0xD9)):
                if marker in _FRAMES:
                    frame = marker
                    left = {
                        (c, k) for c in segment[10 : 10 + 3 * segment[9] : 3] for k in range(64)
                    }
                parts.append(segment)
    except (ValueError, IndexError):
        return None
    return b''.join([*parts, b'\xff\xd9']) if frame and not left else None


def _scan(body, padding):
    """The data of a scan with its restart markers numbered and, if asked, without padding."""
    pieces = _RESTART.split(body.rstrip(b'\xff'))
    data, found = pieces[::2], [m[0] - 0xD0 for m in pieces[1::2]]
    if found and len(set(found)) > 1 and found != [(found[0] + i) % 8 for i in range(len(found))]:
        return body  # an interval is missing, or in another place
    if padding is not None:
        data = [_unpadded(d, padding) for d in data]
    marked = (d + bytes([0xFF, 0xD0 + i % 8]) for i, d in enumerate(data[:-1]))
    return b''.join([*marked, data[-1]])


def _unpadded(data, keep):
    last = data[-1:]
    bare = data.rstrip(last)
    # Two zeros are no end of image data, which end with ones. Of any other byte it takes eight.
    if len(data) - len(bare) < (2 if last == b'\0' else 8):
        return data
    if last == b'\0' and bare.endswith(b'\xff'):
        bare += b'\0'  # belongs to the ff
    return bare + last * keep
