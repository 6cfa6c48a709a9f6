# SPDX-License-Identifier: Apache-2.0
"""Maps of images, of classes and of depth: what their files hold, and what the values mean.

A source with class maps has `map_classes`, the names in index order, and its items `segmentation`,
uint8 (H, W), 255 where no class counts. A source with depth maps has items with `depth`, float32
(H, W), 0 where nothing was measured. Both have the size of the upright image.
"""

import dataclasses
import functools
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

from ssl_jax.data import decode, pixels
from ssl_jax.run import errors, launch, threads

IGNORED = 255
EXTENSIONS = ('.png', '.npy', '.tif', '.tiff', '.bmp', '.gif')  # first those that are looked for
_BILEVEL_GREY = {2: 85, 4: 17}  # bits of a grey PNG -> what Pillow multiplies its values by


@dataclasses.dataclass(frozen=True)
class Meaning:
    """What the values in files of maps mean.

    Attributes:
      ignore: value or values of class maps that count nowhere, besides 255.
      reduce_zero_label: 0 counts nowhere and k is class k - 1 (ADE20K, LoveDA).
      label_values: values in order of the classes, (0, 255) for black and white masks; all others
        count nowhere.
      depth_scale: metres per unit of the file, 0.001 for millimetres; None: files of floating-point
        numbers are taken as they are, others are an error.
    """

    ignore: Any = None
    reduce_zero_label: bool = False
    label_values: Sequence[int] | None = None
    depth_scale: float | None = None

    @classmethod
    def of(cls, known: Mapping, **given: Any) -> 'Meaning':
        """Of what is known of the files, where the user gives nothing (None) instead.

        Raises:
          UserError: a value is impossible.
        """
        found = {k: known.get(k) if v is None else v for k, v in given.items()}
        return cls(**{k: v for k, v in found.items() if v is not None}).check()

    @functools.cached_property
    def table(self) -> np.ndarray:
        """uint8 (256,): value in a file -> class."""
        if self.label_values is not None:
            table = np.full(256, IGNORED, np.uint8)
            table[list(self.label_values)] = np.arange(len(self.label_values))
        else:
            table = np.arange(256).astype(np.uint8)
            if self.reduce_zero_label:
                table = np.concatenate([[IGNORED], table[:-2], [IGNORED]]).astype(np.uint8)
        if self.ignore is not None:
            table[np.asarray(self.ignore).reshape(-1)] = IGNORED
        return table

    @property
    def key(self) -> str:
        """Of fingerprints: different where the same files give other maps."""
        return f'{self.table.tobytes().hex()} {self.depth_scale}'

    def check(self) -> 'Meaning':
        """Itself.

        Raises:
          UserError: a value is impossible.
        """
        for name in ('ignore', 'label_values'):
            given = getattr(self, name)
            values = [] if given is None else np.asarray(given).reshape(-1).tolist()
            if not all(isinstance(v, int) and 0 <= v <= 255 for v in values):
                raise errors.UserError(f'{name}={given!r} must be whole numbers from 0 to 255.')
        if self.label_values is not None and self.reduce_zero_label:
            raise errors.UserError(
                'label_values and reduce_zero_label both say which value is which class: give one.'
            )
        if self.depth_scale is not None and not self.depth_scale > 0:
            raise errors.UserError(
                f'depth_scale={self.depth_scale} must be above 0: metres per unit of the files.'
            )
        return self

    def names(self, given: Sequence | None) -> tuple | None:
        """Names of the classes; of 12 lines of `classes.txt` 11 if the last one is ignored."""
        if given is None:
            if self.label_values is None:
                return None
            given = range(len(self.label_values))
        names, ignored = [str(name) for name in given], np.asarray(self.ignore).reshape(-1)
        while self.ignore is not None and len(names) - 1 in ignored:
            names.pop()
        return tuple(names)


def read(kind: str, data: bytes, where: str, meaning: Meaning, names: Sequence | None = None):
    """The map in a file.

    Args:
      kind: 'segmentation' or 'depth'.
      data: content of the file.
      where: the file, for messages.
      meaning: of its values.
      names: of the classes, None if they are not known yet.

    Raises:
      UserError: it is no map of that kind.
    """
    found = _values(data, where)
    if kind == 'depth':
        return _depth(found, where, meaning)
    return _classes(found, where, meaning, names)


def _values(data, where):
    """The numbers in a file, (H, W) as they are stored."""
    if data[:2] == b'\xff\xd8':
        raise errors.UserError(f'{where} is a JPEG, which changes values: give the map as PNG.')
    try:
        if data[:6] == b'\x93NUMPY':
            found = np.load(io.BytesIO(data), allow_pickle=False)
        else:
            if data[:4] == b'\x89PNG':
                decode.check_png(data)
            with PIL.Image.open(io.BytesIO(data)) as file:
                pixels.check_size(*file.size)
                found = np.asarray(file)
            grey = data[:4] == b'\x89PNG' and data[25] == 0
            if grey and data[24] in _BILEVEL_GREY:
                found = found // _BILEVEL_GREY[data[24]]
    except Exception as e:  # Pillow's plugins and numpy raise all kinds
        reason = 'no image' if isinstance(e, PIL.UnidentifiedImageError) else str(e).rstrip('.')
        raise errors.UserError(
            f'{where} cannot be read as a map ({reason}): replace the file.'
        ) from None
    if found.ndim == 3 and found.shape[2] in (1, 3) and (found == found[:, :, :1]).all():
        found = found[:, :, 0]  # grey that was saved as RGB
    if found.ndim != 2 or not found.size:
        raise errors.UserError(
            f'{where} holds an array {found.shape}, colours perhaps: give one number for each '
            f'pixel, the index of its class or its depth.'
        )
    return found


def _classes(found, where, meaning, names):
    if found.dtype == bool:
        found = found.astype(np.uint8)
    if found.dtype != np.uint8:
        if found.dtype.kind not in 'iu' or found.max() > 255:
            what = f'values up to {found.max():g}' if found.dtype.kind in 'iuf' else found.dtype
            raise errors.UserError(
                f'{where} holds {what}: a class map has whole numbers from 0 to 255.'
            )
        found = np.where(found < 0, IGNORED, found).astype(np.uint8)
    found = meaning.table[found]
    if names is not None:
        highest = _highest(found)
        if highest >= len(names):
            raise errors.UserError(
                f'{where} has label {highest}, and there are {len(names)} classes, 0 to '
                f'{len(names) - 1}: name more in map_classes, or leave the value out with ignore.'
            )
    return found


def _highest(labels):
    """The largest label, -1 if all are ignored."""
    counted = labels[labels != IGNORED]
    return int(counted.max()) if counted.size else -1


def _depth(found, where, meaning):
    scale = meaning.depth_scale
    if scale is None and found.dtype.kind != 'f':
        raise errors.UserError(
            f'{where} holds whole numbers: say how many metres one is with depth_scale, 0.001 for '
            f'millimetres, 0.00390625 for KITTI.'
        )
    if found.dtype.kind not in 'iuf':
        raise errors.UserError(f'{where} holds {found.dtype}: give depth as numbers.')
    found = found.astype(np.float32) * np.float32(1 if scale is None else scale)
    found = np.where(np.isfinite(found) & (found > 0), found, np.float32(0))
    if not found.any():
        raise errors.UserError(f'{where} is 0 everywhere, nothing was measured: leave it out.')
    return found


class WithMaps:
    """What sources with maps share.

    They set `_kinds`, `_meaning` and `_names` (of the classes, None if they are not known) and have
    `_map_file(kind, i)`, which returns the content of a file and its name for messages.
    """

    _kinds: tuple = ()
    _meaning = Meaning()
    _names: tuple | None = None

    @functools.cached_property
    def map_classes(self) -> tuple[str, ...] | None:
        """Names of the classes of the maps; '0', '1', ... up to the largest label of all maps."""
        if 'segmentation' not in self._kinds:
            return None
        if self._names is not None:
            return self._names
        what = f'{self.describe(0)} ...'
        launch.log(f'Reading {len(self):,} class maps of {what} once: no classes are named.')
        highest = max(
            threads.at_once(
                lambda i: _highest(self._map('segmentation', i)), range(len(self)), launch.cores()
            )
        )
        if highest < 0:
            raise errors.UserError(
                f'The class maps of {what} hold only ignored values: set ignore or label_values.'
            )
        if highest == 0:
            raise errors.UserError(
                f'The class maps of {what} hold one class, 0, and 255 is always ignored: for black '
                f'and white masks set label_values=(0,255).'
            )
        return tuple(str(k) for k in range(highest + 1))

    def without_maps(self) -> Any:
        """The source without its maps, which then are not read."""
        new = object.__new__(type(self))
        kept = {k: v for k, v in self.__dict__.items() if k != 'map_classes'}
        new.__dict__.update(kept, _kinds=())
        return new

    def _maps(self, i):
        """{kind: map} of image `i`."""
        return {kind: self._map(kind, i) for kind in self._kinds}

    def _map(self, kind, i):
        return read(kind, *self._map_file(kind, i), self._meaning, self._names)


def images_only(source: Any) -> Any:
    """The source without its maps, which then are not read."""
    strip = getattr(source, 'without_maps', None)
    return strip() if strip else source


def class_names(*sources: Any) -> tuple[str, ...]:
    """Names of the classes of the maps of all sources; of numbers those of the source with most.

    Raises:
      UserError: the sources name different classes.
    """
    found = [tuple(source.map_classes) for source in sources]
    longest = max(found, key=len)
    for source, names in zip(sources, found, strict=True):
        numbers = all(name.isdigit() for name in (*names, *longest))
        if names != longest and not (numbers and names == longest[: len(names)]):
            odd = sorted({*names} ^ {*longest}) or names
            raise errors.UserError(
                f'The class maps of {source.describe(0)} ... have {len(names)} classes and others '
                f'{len(longest)} ({", ".join(odd[:5])}): give both the same map_classes.'
            )
    return longest


def check_size(image: np.ndarray, item: dict, keys: Sequence[str], where: str) -> None:
    """Raises unless the maps `keys` of an item have the size of the decoded, upright image."""
    for key in keys:
        if key in item and item[key].shape != image.shape[:2]:
            (h, w), (y, x) = image.shape[:2], item[key].shape
            turned = ' (upright, by its EXIF orientation)' if (h, w) == (x, y) and h != w else ''
            raise errors.UserError(
                f'{where} has {w}x{h} pixels{turned} and its map {key!r} {x}x{y}: make them alike.'
            )
