# SPDX-License-Identifier: Apache-2.0
"""TIFF: its tags, and what they make of the bytes.

Pillow and OpenCV know a part of the layouts each and show others wrong without a word. The bytes
of a strip or tile are the same in all: Pillow (libtiff) decompresses them as rows of grey bytes,
and here they become samples, bands and colours as the tags say.
"""

import io
import struct

import numpy as np
import PIL.Image
import PIL.TiffImagePlugin

from ssl_jax.data import pixels

_TYPES = {1: 'u1', 3: 'u2', 4: 'u4', 13: 'u4', 16: 'u8'}
_NAMES = {
    **{256: 'width', 257: 'height', 258: 'bits', 259: 'compression', 262: 'photometric'},
    **{266: 'fill_order', 273: 'offsets', 274: 'orientation', 277: 'bands', 278: 'rows'},
    **{279: 'counts', 281: 'white', 284: 'planar', 317: 'predictor', 320: 'palette'},
    **{322: 'tile_width', 323: 'tile_height', 324: 'offsets', 325: 'counts', 332: 'inks'},
    **{338: 'extra', 339: 'format', 341: 'white', 50706: 'dng'},
}
_NONE, _JPEG = 1, {6, 7}
_BYTES = {_NONE, 5, 8, 32773, 32946, 34925, 50000}  # none, LZW, deflate, PackBits, LZMA, zstd
_FAX = {2, 3, 4, 32771}
_COLOURS = {0: 'white is zero', 1: 'grey', 2: 'RGB', 3: 'palette', 5: 'CMYK', 6: 'YCbCr'}
_BANDS = {0: 1, 1: 1, 2: 3, 3: 1, 5: 4, 6: 3}
_GROUP = 1 << 26  # bytes decompressed at a time
_REVERSED = np.packbits(np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], 1)[:, ::-1], 1)[:, 0]


def is_tiff(data: bytes) -> bool:
    return data[:4] in (b'II*\0', b'MM\0*', b'II+\0', b'MM\0+')


def decode(data: bytes) -> np.ndarray | None:
    """uint8 (H, W, 3) of the first image, upright, or None where Pillow shows the layout right.

    Raises:
      DecodeError: the message is the reason.
    """
    try:
        t = _tags(data)
    except (ValueError, struct.error, OverflowError) as e:
        raise pixels.corrupt('TIFF', f'its tags cannot be read: {e}') from None
    if 'dng' in t:
        raise pixels.DecodeError('a raw file of a camera (DNG): develop it to TIFF or JPEG')
    width, height, bands = _one(t, 'width', 0), _one(t, 'height', 0), _one(t, 'bands', 1)
    if width < 1 or height < 1:
        raise pixels.corrupt('TIFF', f'{width}x{height} pixels')
    pixels.check_size(width, height)
    bits, planar, compression = t.get('bits', [1]), _one(t, 'planar', 1), _one(t, 'compression', 1)
    photometric = _one(t, 'photometric', 2 if bands > 2 else 1)
    alpha = _alpha(t, bands, photometric)
    if len(set(bits)) > 1:
        raise pixels.DecodeError(f'a TIFF with bands of {", ".join(map(str, bits))} bits')
    bits = bits[0]
    if not 1 <= bits <= 64:
        raise pixels.corrupt('TIFF', f'{bits} bits')
    if compression in _FAX and bands == bits == 1:
        return None
    if compression in _JPEG and bits == 8 and planar == 1 and photometric != 3:
        return None
    if photometric == 6:
        if compression in _BYTES - {_NONE} and bits == 8 and planar == 1 and bands == 3:
            return None
        raise pixels.DecodeError('a TIFF in YCbCr of a rare layout: save it in RGB')
    if compression not in _BYTES:
        raise pixels.DecodeError(
            f'a TIFF of {bands} x {bits} bits with compression {compression}: save it with deflate'
        )
    kind = _kind(t, bits)
    x = _samples(data, t, width, height, bands if planar == 1 else 1, bands, bits, kind)
    image = _colours(x, t, photometric, alpha, bits)
    return pixels.upright(image, _one(t, 'orientation', 1))


def _tags(data):
    """{name: values} of the first directory."""
    order = '<' if data[:2] == b'II' else '>'
    if data[2] in (0, 42) and data[3] in (0, 42):
        at = struct.unpack_from(order + 'I', data, 4)[0]
        n, at, word = struct.unpack_from(order + 'H', data, at)[0], at + 2, 'u4'
    else:  # BigTIFF
        at = struct.unpack_from(order + 'Q', data, 8)[0]
        n, at, word = struct.unpack_from(order + 'Q', data, at)[0], at + 8, 'u8'
    size = int(word[1])
    entry = np.dtype([('tag', order + 'u2'), ('type', order + 'u2'), ('n', order + word)])
    step, found = entry.itemsize + size, {}
    for i in range(min(n, 1000)):
        tag, type_, count = np.frombuffer(data, entry, 1, at + i * step)[0].tolist()
        if tag in _NAMES and type_ in _TYPES and count:
            dtype = np.dtype(order + _TYPES[type_])
            value = at + i * step + entry.itemsize
            if count * dtype.itemsize > size:
                value = int(np.frombuffer(data, order + word, 1, value)[0])
            found[_NAMES[tag]] = np.frombuffer(data, dtype, count, value).tolist()
    return found


def _one(tags, name, default):
    return tags.get(name, [default])[0]


def _alpha(t, bands, photometric):
    """(position of alpha or None, whether the colours are multiplied by it); checks the bands."""
    if photometric not in _BANDS or (photometric == 5 and _one(t, 'inks', 1) != 1):
        raise pixels.DecodeError(f'a TIFF with colours of kind {photometric}: save it in RGB')
    name, extras = _COLOURS[photometric], bands - _BANDS[photometric]
    if bands > 4 or extras > 1:
        raise pixels.DecodeError(f'{bands} bands (multispectral): choose one or three of them')
    if extras < 0:
        raise pixels.corrupt('TIFF', f'{bands} bands, and the colours are {name}')
    if not extras:
        return None, False
    # Without the tag: of the writers that leave it out (OpenCV), a fourth band is alpha.
    meaning = _one(t, 'extra', 2)
    if meaning and name == 'palette':
        raise pixels.DecodeError('a TIFF with a palette and transparency: save it in RGB')
    return (bands - 1 if meaning in (1, 2) else None), meaning == 1


def _kind(t, bits):
    """'u' or 'f': unsigned integers or floats."""
    formats = {{4: 1}.get(f, f) for f in t.get('format', [1])}
    if formats == {3} and bits in (16, 32, 64):
        return 'f'
    if formats == {2}:
        raise pixels.DecodeError(f'signed {bits}-bit pixels have no agreed black and white')
    if formats != {1}:
        raise pixels.DecodeError(f'a TIFF with samples of format {sorted(formats)}, {bits} bits')
    if bits > 16 and not (bits == 32 and 'white' in t):
        raise pixels.DecodeError(pixels.NO_WHITE.replace('32', str(bits)))
    return 'u'


def _samples(data, t, width, height, per, bands, bits, kind):
    """(H, W, bands) of unsigned integers or floats.

    A plane is a stack of strips; tiles are strips too, cut apart and put side by side at the end.
    """
    tiled = 'tile_width' in t
    w = _one(t, 'tile_width', 0) if tiled else width
    h = _one(t, 'tile_height', 0) if tiled else min(_one(t, 'rows', height), height)
    if w < 1 or h < 1:
        raise pixels.corrupt('TIFF', f'tiles of {w}x{h} pixels')
    across, down, planes = -(-width // w), -(-height // h), bands // per
    if tiled:
        pixels.check_size(across * w, down * h)
    n, row = across * down, (w * per * bits + 7) // 8
    whole = down * h if tiled else height
    offsets, counts = t.get('offsets', []), t.get('counts', [])
    if len(offsets) < planes * n:
        raise pixels.corrupt('TIFF', f'{len(offsets)} of {planes * n} strips or tiles')
    raw = np.empty((planes, across * whole, row), np.uint8)
    for p in range(planes):
        strips = [
            (offsets[i], counts[i] if i < len(counts) else None) for i in range(p * n, (p + 1) * n)
        ]
        step = max(1, _GROUP // (h * row))
        for i in range(0, n, step):
            rows = raw[p, i * h : (i + step) * h]
            rows[:] = _unpacked(data, strips[i : i + step], t, h, row, len(rows))
    x = _numbers(raw.reshape(-1, row), w * per, bits, kind, '<' if data[:2] == b'II' else '>')
    x = (
        x.reshape(planes, down, across, -1, w, per)
        if tiled
        else x.reshape(planes, 1, 1, -1, w, per)
    )
    predictor = _one(t, 'predictor', 1)
    if predictor == 2 and kind == 'u' and bits in (8, 16, 32):
        x = np.cumsum(x, axis=4, dtype=x.dtype)
    elif predictor != 1:
        raise pixels.DecodeError(
            f'a TIFF of {bits} bits with predictor {predictor}: save it without'
        )
    x = x.transpose(1, 3, 2, 4, 0, 5)
    return x.reshape(whole, across * w, bands)[:height, :width]


def _unpacked(data, strips, t, h, row, rows):
    """Bytes (rows, row) of consecutive strips of h rows, the last may have fewer."""
    compression, order = _one(t, 'compression', _NONE), _one(t, 'fill_order', 1)
    if compression == _NONE:
        sizes = [min(h, rows - i * h) * row for i in range(len(strips))]
        strips = [(at, size) for (at, _), size in zip(strips, sizes, strict=True)]
    if any(size is None or at + size > len(data) for at, size in strips):
        raise pixels.corrupt('TIFF', 'pixels lie beyond the end of the file')
    parts = [data[at : at + size] for at, size in strips]
    if compression == _NONE:
        x = np.frombuffer(b''.join(parts), np.uint8).reshape(rows, row)
        return _REVERSED[x] if order == 2 else x
    starts = np.cumsum([8, *map(len, parts)])[:-1].tolist()
    body = b''.join(parts)
    body += bytes(len(body) % 2)
    lists = struct.pack(f'<{2 * len(parts)}I', *starts, *map(len, parts))
    tags, at = {256: row, 257: rows, 258: 8, 259: compression, 262: 1}, 8 + len(body)
    tags |= {266: order, 273: at, 277: 1, 278: h, 279: at + 4 * len(parts)}
    if len(parts) == 1:
        tags |= {273: starts[0], 279: len(parts[0])}
    counts = {273: len(parts), 279: len(parts)}
    entries = (struct.pack('<HHII', tag, 4, counts.get(tag, 1), v) for tag, v in tags.items())
    head = struct.pack('<2sHI', b'II', 42, at + len(lists))
    file = b''.join([head, body, lists, struct.pack('<H', len(tags)), *entries, bytes(4)])
    try:
        return np.asarray(PIL.TiffImagePlugin.TiffImageFile(io.BytesIO(file)))
    except PIL.Image.DecompressionBombError:
        raise pixels.DecodeError('a TIFF strip of more than 178 MB: save it in strips') from None
    except Exception as e:
        raise pixels.corrupt('TIFF', e) from None


def _numbers(raw, n, bits, kind, order):
    """Bytes (rows, row) -> n numbers a row, in the byte order of the machine."""
    if bits in (8, 16, 32, 64):
        dtype = np.dtype(f'{order}{kind}{bits // 8}')
        return raw.view(dtype).astype(dtype.newbyteorder('='), copy=False)
    x = np.zeros((len(raw), n), np.uint8 if bits < 8 else np.uint16)
    step = max(1, (1 << 22) // (n * bits))
    for y in range(0, len(raw), step):
        ones = np.unpackbits(raw[y : y + step], axis=1, count=n * bits)
        for b in range(bits):
            x[y : y + step] |= ones[:, b::bits].astype(x.dtype) << (bits - 1 - b)
    return x


def _colours(x, t, photometric, alpha, bits):
    """Samples (H, W, bands) -> uint8 (H, W, 3)."""
    at, premultiplied = alpha
    x = x[:, :, : _BANDS[photometric] + (at is not None)]  # other bands have no meaning for the eye
    if photometric == 3:
        return _palette(x[:, :, 0], t, bits)
    n = _BANDS[photometric]
    if at is None or premultiplied:
        x = _to_8_bits(x, t, bits)
        colours, opaque = x[:, :, :n], None if at is None else x[:, :, n:]
    else:  # alpha has its own range
        colours, opaque = _to_8_bits(x[:, :, :n], t, bits), _to_8_bits(x[:, :, n:], t, bits)
    if photometric == 0:
        white = opaque if premultiplied else np.uint8(255)
        colours = white - np.minimum(colours, white)
    if photometric == 5:
        image = PIL.Image.fromarray(np.ascontiguousarray(colours), 'CMYK')
        colours = np.asarray(image.convert('RGB'))
    if opaque is not None:
        colours = pixels.on_white(colours, opaque, premultiplied)
    return pixels.to_rgb(colours)


def _palette(index, t, bits):
    table = np.array(t.get('palette', []), np.uint16)
    if bits > 16 or table.size != 3 << bits:
        raise pixels.corrupt('TIFF', f'a palette of {table.size} numbers for {bits} bits')
    # Some writers store 0 ... 255 where the format wants 0 ... 65535.
    table = pixels.to_8_bits(table, 255 if table.max() < 256 else 65535)
    return table.reshape(3, -1).T[index]


def _to_8_bits(x, t, bits):
    if x.dtype.kind == 'f':
        return pixels.unit_to_8_bits(x)
    if bits not in (16, 32):
        return pixels.to_8_bits(x, 2**bits - 1)
    brightest, white = int(x.max()), max(t.get('white', [0]))
    if bits == 32:
        if not brightest <= white < 2**16:
            raise pixels.DecodeError(pixels.NO_WHITE)
        x = x.astype(np.uint16)
    return pixels.to_8_bits(x, white if 0 < brightest <= white else None)
