# SPDX-License-Identifier: Apache-2.0
"""Images with their maps for dense heads: random crops to train on, whole images to score."""

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import PIL.Image

from ssl_jax.data import host, loader, maps, stream
from ssl_jax.run import errors, peers, threads

FIXED = ('', 'eigen', 'kb')
PADDING = {'image': 0, 'segmentation': maps.IGNORED, 'depth': 0}


@dataclasses.dataclass(frozen=True)
class Crop:
    """Random geometry of a training pair, in this order: `fixed`, resize, crop, flip.

    Attributes:
      size: (height, width) in pixels.
      ratio: range of the factor of a resize that keeps proportions. Without `base` the long side
        becomes a whole number, uniform in the range times its length (Pixio).
      base: the short side becomes `base` times a factor that is uniform in the range, and the long
        side at most four times that (mmsegmentation, DINOv2).
      flip: probability of a horizontal flip.
      fixed: a crop before, see `cut_fixed`.
    """

    size: tuple[int, int]
    ratio: tuple[float, float] = (1.0, 1.0)
    base: int | None = None
    flip: float = 0.5
    fixed: str = ''


def cut_fixed(x: np.ndarray, name: str) -> np.ndarray:
    """A crop that a protocol names.

    Args:
      x: an image (H, W, 3) or a map (H, W).
      name: 'eigen': rows 45 to 471 and columns 41 to 601 of the 480x640 pixels of NYUv2, without
        the white frame; 'kb': the lowest 352 rows and central 1216 columns of KITTI; '': none.

    Raises:
      UserError: the image is of another size.
    """
    height, width = x.shape[:2]
    if name == 'eigen':
        if (height, width) != (480, 640):
            raise errors.UserError(
                f"The crop 'eigen' is of images of 640x480 pixels, and one has {width}x{height}: "
                f'leave the crop out.'
            )
        return x[45:471, 41:601]
    if name == 'kb':
        if height < 352 or width < 1216:
            raise errors.UserError(
                f"The crop 'kb' has 1216x352 pixels, and an image {width}x{height}: leave the crop "
                f'out.'
            )
        left = (width - 1216) // 2
        return x[height - 352 :, left : left + 1216]
    if name:
        raise errors.UserError(f'There is no crop {name!r}{errors.nearest(name, FIXED[1:])}')
    return x


def train_pairs(
    source: Any,
    crop: Crop,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    rows: Sequence[int] | None = None,
) -> loader.Stream:
    """Endless iterator over batches of crops with their maps; close it, or use it in a `with`.

    A batch is {'image': uint8 (B, h, w, 3), 'segmentation': uint8 (B, h, w), 255 in the padding,
    'depth': float32 (B, h, w), 0 in the padding, 'id': int64 (B,)}, the maps as the source has
    them, with B = len(rows) and (h, w) = crop.size. Small images are padded right and below. Images
    are resized bicubically with antialiasing (Pillow), maps by their nearest pixel; the numbers of
    a depth map stay as they are. A batch is a pure function of (seed, step), the same on any number
    of threads and hosts; the order of images and the replacement of those that cannot be decoded
    are those of `stream.train_stream`.

    The small rotations and the colours that DINOv2's training of depth heads draws are left out.

    Args:
      source: see `data.sources`, with maps.
      crop: see `Crop`.
      batch_size: the global one.
      seed: of the order and the crops.
      start_step: the step of the first batch.
      rows: sorted rows of the global batch to load; default all.

    Raises:
      UserError: the source has no maps; from next(), if a map cannot be read or has another size
        than its image, or `stream.MAX_TRIES` images in a row could not be decoded.
    """
    keys = [key for key in stream.MAPS if key in stream.read(source, 0)]
    if not keys:
        raise errors.UserError(
            f'{source.describe(0)} has neither a class map nor a depth map: see docs/evaluate.md '
            f'for how to give them.'
        )
    samples = _Pairs(source, batch_size, rows, crop, seed, start_step, keys)
    return loader.stream(samples, stream.num_reading(source, 64))


class _Pairs(stream.Samples):
    def __init__(self, source, batch_size, rows, crop, seed, start_step, keys):
        super().__init__(source, batch_size, rows)
        self._crop, self._seed, self._start, self._keys = crop, seed, start_step, keys

    def __len__(self):
        return (sys.maxsize // self._batch_size - self._start) // 2 * len(self.rows)

    def _sample(self, step, row):
        g = (self._start + step) * self._batch_size + row
        i, item, image, _ = stream.first_good(self._source, self._seed, g)
        arrays = {'image': image, **_checked_maps(self._source, i, item, image, self._keys)}
        return cropped(arrays, self._crop, stream.generator(self._seed, g)) | {'id': np.int64(i)}


def cropped(
    arrays: dict[str, np.ndarray], crop: Crop, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """A random crop of an image and its maps, which are alike in size; see `Crop`."""
    arrays = {key: cut_fixed(x, crop.fixed) for key, x in arrays.items()}
    u = rng.random(4)
    height, width = arrays['image'].shape[:2]
    new_h, new_w = _resized(height, width, crop, u[0])
    h, w = min(crop.size[0], new_h), min(crop.size[1], new_w)
    y, x = int(u[1] * (new_h - h + 1)), int(u[2] * (new_w - w + 1))
    # Only the part that is cut out is resampled, which is most of the time of a large image.
    sy, sx = height / new_h, width / new_w
    box = (x * sx, y * sy, (x + w) * sx, (y + h) * sy)
    out = {}
    for key, array in arrays.items():
        if (new_h, new_w) == (height, width):
            part = array[y : y + h, x : x + w]
        else:
            method = 'BICUBIC' if key == 'image' else 'NEAREST'
            pixels = PIL.Image.fromarray(np.ascontiguousarray(array))
            part = np.asarray(pixels.resize((w, h), PIL.Image.Resampling[method], box=box))
        out[key] = np.full((*crop.size, *array.shape[2:]), PADDING[key], array.dtype)
        out[key][:h, :w] = part
        if u[3] < crop.flip:
            out[key] = out[key][:, ::-1]
    return out


def _resized(height, width, crop, u):
    """(height, width) after the resize, for a uniform number in [0, 1)."""
    low, high = crop.ratio
    long, short = max(height, width), min(height, width)
    if crop.base is None:
        first, last = int(long * low), int(long * high)
        side = max(1, first + int(u * (last - first + 1)))
        scale = side / long
    else:
        factor = crop.base * (low + (high - low) * u)
        scale = min(factor / short, 4 * factor / long)
    return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))


def native(source: Any, indices: Iterable[int] | None = None) -> Iterator[dict]:
    """Images and maps of their own size, in order, read some ahead in threads.

    Images that cannot be decoded are left out, which is said in the log at the end.

    Args:
      source: see `data.sources`.
      indices: of images; default all.

    Yields:
      {'image': uint8 (H, W, 3), 'segmentation': uint8 (H, W), 'depth': float32 (H, W), 'id': int},
      the maps as the source has them.

    Raises:
      UserError: a map cannot be read, or has another size than its image.
    """
    left = []

    def load(i):
        try:
            item = stream.read(source, i)
            image = host.decode(item['image'])
        except (host.DecodeError, OSError):
            return i, None
        keys = [key for key in stream.MAPS if key in item]
        return i, {'image': image, **_checked_maps(source, i, item, image, keys)}

    indices = range(len(source)) if indices is None else [int(i) for i in indices]
    for i, found in threads.at_once(load, indices, stream.num_reading(source, 16)):
        peers.progress()
        if found is None:
            left.append(i)
        else:
            yield {**found, 'id': i}
    stream.say_left_out(source, left)


def _checked_maps(source, i, item, image, keys):
    """{key: map} of an item, of the size of its image."""
    for key in keys:
        if key not in item:
            raise errors.UserError(f'{source.describe(i)} has no map {key!r}, as others do.')
    maps.check_size(image, item, keys, source.describe(i))
    return {key: np.asarray(item[key], stream.MAPS[key]) for key in keys}
