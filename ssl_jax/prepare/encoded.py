# SPDX-License-Identifier: Apache-2.0
"""Images and maps as the bytes of files: what their headers say, smaller ones, those of arrays."""

import dataclasses
import io
import os
from typing import Any

import cv2
import numpy as np
import PIL.Image
import simplejpeg

from ssl_jax.data import files, host, maps, tiff
from ssl_jax.data import stream as stream_lib
from ssl_jax.run import errors, patience, storage

# Of Pillow's names of formats; MPO is what several cameras make of a JPEG.
_EXTENSIONS = {
    **{'JPEG': '.jpg', 'MPO': '.jpg', 'PNG': '.png', 'WEBP': '.webp', 'GIF': '.gif'},
    **{'TIFF': '.tif', 'BMP': '.bmp', 'AVIF': '.avif', 'JPEG2000': '.jp2', 'PPM': '.ppm'},
    **{'HEIF': '.heic'},
}
_MAP_MAGIC = {
    **{b'\x89PNG': '.png', b'\x93NUMPY': '.npy', b'II*\0': '.tif', b'MM\0*': '.tif'},
    **{b'BM': '.bmp', b'GIF8': '.gif'},
}


@dataclasses.dataclass(frozen=True)
class Header:
    """What the header of an image file says."""

    format: str  # Pillow's name, such as 'JPEG'
    width: int  # pixels as stored, not turned
    height: int
    mode: str = 'RGB'  # Pillow's
    orientation: int = 1  # of EXIF
    is_animated: bool = False
    bits: int = 8  # of a channel


def header(data: bytes) -> Header:
    """The header of an image file.

    Raises:
      DecodeError: it is no image; the message is the reason.
    """
    try:
        with PIL.Image.open(io.BytesIO(data)) as file:
            # Pillow would decode all pixels of a PNG to look for a block that is not there.
            has_exif = file.format != 'PNG' or b'eXIf' in data
            return Header(
                'JPEG' if file.format == 'MPO' else file.format,
                *file.size,
                file.mode,
                file.getexif().get(0x0112, 1) if has_exif else 1,
                file.format != 'MPO' and getattr(file, 'is_animated', False),
                _bits(file, data),
            )
    except Exception:  # Pillow's plugins raise all kinds; the decoder reads more than they do
        height, width = host.decode(data).shape[:2]
        if tiff.is_tiff(data):
            return Header('TIFF', width, height, 'a rare layout')
        return Header('HEIF', width, height)


def _bits(file, data):
    """Bits of a channel; Pillow has no mode for colours of 16."""
    if file.mode.startswith('I;16'):
        return 16
    if file.format == 'PNG':
        return max(8, data[24])
    if file.format == 'TIFF':
        return max((8, *file.tag_v2.get(258, ())))
    return {'I': 32, 'F': 32}.get(file.mode, 8)


def extension(found: Header, name: str) -> str:
    """The extension for a file of this format; of a rare one that of `name`."""
    own = os.path.splitext(name)[1].lower()
    return _EXTENSIONS.get(found.format) or (own if files.is_image(own) else '.png')


def map_extension(data: bytes) -> str:
    """The extension for the file of a map."""
    return next((e for magic, e in _MAP_MAGIC.items() if data.startswith(magic)), '.png')


def png(pixels: np.ndarray) -> bytes:
    """uint8 (H, W) or (H, W, 3) as PNG."""
    pixels = pixels[..., ::-1] if pixels.ndim == 3 else pixels
    return cv2.imencode('.png', np.ascontiguousarray(pixels))[1].tobytes()


def shrink(data: bytes | np.ndarray, max_side: int, quality: int) -> bytes:
    """A JPEG of an image, upright, RGB, averaged over areas to a longer side of `max_side` pixels.

    It is decoded whole: a JPEG decoded at a smaller scale takes half of the time, once, and differs
    from this by 0.7 grey levels on average at twice the size that is needed.
    """
    image = host.decode(data)
    height, width = image.shape[:2]
    scale = max_side / max(height, width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality, 'RGB', '420')


class Encoded:
    """A source of files: `image` and its maps as they are stored, those of arrays as PNG or NPY.

    Items are {'image': bytes, 'label': int, 'maps': {kind: bytes}, 'name': str}; the name is
    relative to the folder of the source and '' where images have none.
    """

    def __init__(self, source: Any):
        self._source, self._images = source, maps.images_only(source)
        self.remote = getattr(source, 'remote', False)
        self.kinds = kinds_of(source)
        self._has_files = hasattr(source, '_map_file')
        self._folder = getattr(source, 'path', None)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, i: int) -> dict:
        item = self._images[i]
        out = {'image': item['image'], 'maps': {}, 'name': self._name(i)}
        if not isinstance(out['image'], bytes):
            out['image'] = png(host.decode(out['image']))
        if self._source.classes is not None:
            out['label'] = int(item.get('label', -1))
        if self.kinds and not self._has_files:
            item = item if self._images is self._source else self._source[i]
        for kind in self.kinds:
            if self._has_files:
                out['maps'][kind] = self._source._map_file(kind, i)[0]
            else:
                out['maps'][kind] = _of_array(item[kind])
        return out

    def meaning(self) -> dict:
        """What the values of the maps mean: arguments of `maps.Meaning`, and `map_classes`."""
        if not self.kinds:
            return {}
        found = {}
        if self._has_files:
            found = dataclasses.asdict(self._source._meaning)
            names = self._source._names
        else:
            names = getattr(self._source, 'map_classes', None)
        found = {k: np.asarray(v).tolist() for k, v in found.items() if v not in (None, False)}
        return found | ({'map_classes': list(names)} if names else {})

    def _name(self, i):
        if not self._folder:
            return ''
        folder = files.printable(os.fspath(self._folder)).rstrip('/') + '/'
        name = self._source.describe(i)
        return name[len(folder) :] if name.startswith(folder) else ''


def _of_array(x):
    """A map in memory as a file: PNG of classes, NPY of depth."""
    if x.dtype == np.uint8:
        return png(x)
    out = io.BytesIO()
    np.save(out, x)
    return out.getvalue()


def require_outside(source: Any, out: str) -> None:
    """Raises if `out` lies in the folder of the images, which would then hold other things too."""
    folder = getattr(source, 'path', None)
    if folder is None or storage.is_remote(folder) != storage.is_remote(out):
        return
    inner, outer = (p if storage.is_remote(p) else os.path.abspath(p) for p in (out, folder))
    if f'{inner}/'.startswith(f'{outer.rstrip("/")}/'):
        raise errors.UserError(f'--out {out} lies among the images: give a folder outside.')


def kinds_of(source: Any) -> tuple[str, ...]:
    """The kinds of maps that a source has; of one without files those of the first good item."""
    if hasattr(source, '_kinds'):
        return tuple(source._kinds)
    for i in range(min(len(source), 100)):
        try:
            return tuple(kind for kind in stream_lib.MAPS if kind in stream_lib.read(source, i))
        except patience.Unavailable:
            raise
        except (errors.UserError, OSError):
            continue
    return ()
