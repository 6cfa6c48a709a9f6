# SPDX-License-Identifier: Apache-2.0
"""Random-access sources of images, and `open_source`, which makes one from a spec or a path.

A source is anything with

  __len__()        number of images
  __getitem__(i)   dict(image=bytes | uint8 array, label=int, segmentation=uint8 (H, W),
                   depth=float32 (H, W)); all but `image` only if the source has them
  classes          tuple of names in label order, or None if there are no labels
  describe(i)      where image i comes from, for messages
  fingerprint      str; changes when the images change, see `files.fingerprint`

that can be pickled and read from several threads.
"""

import contextlib
import glob
import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ssl_jax.data import files, folder, host, parquet, records, scenes
from ssl_jax.run import errors, hashing, storage


class Arrays:
    """Images that are already in memory.

    Args:
      images: uint8 (N, H, W, 3) or (N, H, W), or a sequence of arrays or of encoded bytes.
      labels: int (N,) or None.
      classes: names in label order; default '0', '1', ...
    """

    def __init__(
        self, images: Sequence, labels: Sequence | None = None, classes: Sequence | None = None
    ):
        if len(images) == 0:
            raise errors.UserError('source=arrays got no images: `images` has length 0.')
        if labels is not None and len(labels) != len(images):
            raise errors.UserError(
                f'{len(images)} images but {len(labels)} labels: give one for each.'
            )
        self._images = images
        self._labels = None if labels is None else np.asarray(labels, np.int32)
        self.classes = files.class_names(self._labels, classes)
        sample = [images[i] for i in files.spread(len(images), files.SAMPLE)]
        sample = [x if isinstance(x, bytes) else np.asarray(x).tobytes() for x in sample]
        self.fingerprint = hashing.digest('arrays', len(images), *sample)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, i: int) -> dict:
        item = {'image': self._images[i]}
        if self._labels is not None:
            item['label'] = int(self._labels[i])
        return item

    def describe(self, i: int) -> str:
        return f'array {i}'


SOURCES = {
    'folder': folder.Folder,
    'parquet': parquet.Parquet,
    'tfds': records.Tfds,
    'array_record': records.ArrayRecord,
    'arrays': Arrays,
    'scenes': scenes.Scenes,
}


def open_source(spec: str | os.PathLike | Mapping[str, Any]) -> Any:
    """Opens the images that `spec` names.

    Args:
      spec: a path (a folder of images, a Parquet file or a folder of them, an ArrayRecord file), or
        a mapping with `source`, a name in SOURCES, and the arguments of that class. Values that are
        None or '' count as not given. Arguments of other sources are allowed, so that a config can
        switch `source` and leave the rest.

    Raises:
      ValueError, FileNotFoundError: one sentence that says what is wrong and what to do.
    """
    if isinstance(spec, (str, os.PathLike)):
        spec = {'path': os.fspath(spec)}
    spec = dict(spec)
    spec = {k: v for k, v in spec.items() if not (v is None or isinstance(v, str) and v == '')}
    arguments = {k: inspect.signature(v).parameters for k, v in SOURCES.items()}
    known = sorted({'source'}.union(*arguments.values()))
    for key in spec:
        if key not in known:
            raise errors.UserError(
                f'Unknown key {key!r} in the data spec{errors.nearest(key, known)}'
            )
    if 'source' not in spec and 'path' not in spec:
        raise errors.UserError(f'The data spec needs `source`, one of {", ".join(SOURCES)}.')
    name = spec.get('source') or _kind(spec['path'])
    if name not in SOURCES:
        raise errors.UserError(f'Unknown source {name!r}{errors.nearest(name, SOURCES)}')
    for key, argument in arguments[name].items():
        if argument.default is argument.empty and key not in spec:
            raise errors.UserError(f'source={name!r} needs {key!r}: set it in the data spec.')
    return SOURCES[name](**{k: spec[k] for k in arguments[name] if k in spec})


def _kind(path):
    """The kind of source that lies at `path`: 'folder', 'parquet' or 'array_record'."""
    path = os.fspath(path)
    if '.parquet' in os.path.basename(path):
        return 'parquet'
    if '.array_record' in os.path.basename(path):
        return 'array_record'
    if storage.is_remote(path) or glob.has_magic(path):
        return 'folder'
    files.require(path)
    if not os.path.isdir(path):
        raise errors.UserError(
            f'{path} is neither a folder, nor *.parquet, nor *.array_record*: '
            'give the folder that holds the images.'
        )
    for parent in (path, os.path.join(path, 'data')):  # Hugging Face repositories use data/
        names = os.listdir(parent) if os.path.isdir(parent) else []
        if any(n.endswith('.parquet') for n in names):
            return 'parquet'
        if any('.array_record' in n for n in names):
            return 'array_record'
    return 'folder'


def typical_size(source: Any) -> tuple[int, int]:
    """(height, width) in pixels of a typical image: the median short side of the first 64.

    Raises:
      UserError: no image can be decoded.
    """
    sides, count = [], min(len(source), 64)
    for i in range(count):
        with contextlib.suppress(host.DecodeError, OSError):  # the stream counts and lists it
            sides.append(host.decode(source[i]['image']).shape[:2])
    if not sides:
        raise errors.UserError(
            f'none of the first {count} images can be decoded, {source.describe(0)} for one; '
            f'is --data a folder of images?'
        )
    return sorted(sides, key=min)[len(sides) // 2]
