# SPDX-License-Identifier: Apache-2.0
"""Random-access sources of images, and `open_source`, which makes one from a spec or a path.

A source is anything with

  __len__()        number of images
  __getitem__(i)   dict(image=bytes | uint8 array, label=int, segmentation=uint8 (H, W),
                   depth=float32 (H, W)); all but `image` only if the source has them
  classes          tuple of names in label order, or None if there are no labels
  map_classes      (optional) names of the classes of `segmentation` in order of their index, or
                   None; 255 counts nowhere
  without_maps()   (optional) the source without `segmentation` and `depth`
  labels           (optional) int32 array of all labels, -1 where one is missing, or None
  notes            (optional) sentences for the log: what was chosen, what is left out
  describe(i)      where image i comes from, for messages
  fingerprint      str; changes when the images change, see `data/fingerprint.py`
  remote           (optional) whether each image is a request to a bucket
  order            (optional) which image each training sample shows, see `data/order.py`

that can be pickled and read from several threads.
"""

import contextlib
import glob
import inspect
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ssl_jax import fields
from ssl_jax.data import (
    files,
    fingerprint,
    folder,
    host,
    local_cache,
    manifest,
    maps,
    mixture,
    parquet,
    records,
    scenes,
    scores,
    tar,
)
from ssl_jax.run import errors, hashing, threads


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
        self.labels, self.classes, self.notes = files.classes_of(labels, classes)
        sample = [images[i] for i in fingerprint.spread(len(images), fingerprint.SAMPLE)]
        sample = [x if isinstance(x, bytes) else np.asarray(x).tobytes() for x in sample]
        self.fingerprint = hashing.digest('arrays', len(images), *sample)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, i: int) -> dict:
        item = {'image': self._images[i]}
        if self.labels is not None:
            item['label'] = int(self.labels[i])
        return item

    def describe(self, i: int) -> str:
        return f'array {i}'


def _manifest(path: str, pool: str | Mapping | None = None) -> manifest.Manifest:
    """The images that a manifest selects from its pool, see `data.manifest`.

    Args:
      path: the manifest.
      pool: where its images are now, a spec; default where they were.
    """
    stored = manifest.about(path)['pool']
    if pool is not None:
        stored = dict(pool) if isinstance(pool, Mapping) else {**stored, 'path': pool}
    try:
        opened = open_source(stored)
    except (errors.UserError, OSError) as error:
        reason = str(error).rstrip('.').removesuffix(': give an existing path')
        raise errors.UserError(
            f'{path} selects from images that cannot be opened ({reason}): bring them back, or '
            f'name where they are now with data.train.pool=PATH.'
        ) from None
    return manifest.Manifest(opened, path)


SOURCES = {
    'folder': folder.Folder,
    'parquet': parquet.Parquet,
    'tfds': records.Tfds,
    'array_record': records.ArrayRecord,
    'tar': tar.Tar,
    'arrays': Arrays,
    'scenes': scenes.Scenes,
    'manifest': _manifest,
}
SCORES = ('scores', 'min_entropy', 'min_side')  # of any source, see `scores.sample_by`


@files.one_listing()
def open_source(
    spec: str | os.PathLike | Mapping[str, Any] | Sequence, purpose: str = 'train'
) -> Any:
    """Opens the images that `spec` names.

    Args:
      spec: a path (a folder of images, of images and maps, a Parquet file or a folder of them,
        ArrayRecord files, tar files, a manifest), or a mapping with `source`, a name in SOURCES,
        and the arguments of that class. Values that are None or '' count as not given. Arguments of
        other sources are allowed, so that a config can switch `source` and leave the rest.
        `cache_gb`: 10^9 bytes of images in a bucket that a local disk keeps, in `cache_dir`.
        `scores`, `min_entropy` and `min_side` of any source are arguments of `scores.sample_by`.
        A list of these, or its text, is a mixture, to which each may have a `weight`, see
        `mixture.Mixture`.
      purpose: what the images are for, 'train', 'test' or 'all': which split is used of a folder
        that has several, if `spec` names none, see `splits.PURPOSES`.

    Raises:
      ValueError, FileNotFoundError: one sentence that says what is wrong and what to do.
    """
    if isinstance(spec, str):
        spec = mixture.parse(spec)
    if isinstance(spec, (list, tuple)):
        return _mixed(mixture.entries(spec), purpose)
    if isinstance(spec, (str, os.PathLike)):
        spec = {'path': os.fspath(spec)}
    spec = dict(spec)
    spec = {k: v for k, v in spec.items() if not (v is None or isinstance(v, str) and v == '')}
    arguments = {k: inspect.signature(v).parameters for k, v in SOURCES.items()}
    common = {'source', 'cache_dir', 'cache_gb', *SCORES}
    known = sorted(common.union(*arguments.values()) - {'purpose'})
    for key in spec:
        if key not in known:
            raise errors.UserError(
                f'Unknown key {key!r} in the data spec{errors.nearest(key, known)}'
            )
    if 'source' not in spec and 'path' not in spec:
        raise errors.UserError(f'The data spec needs `source`, one of {", ".join(SOURCES)}.')
    spec |= {k: str(spec[k]) for k in ('path', 'split') if k in spec}  # 2017 is read as a number
    name = spec.get('source') or _kind(spec['path'])
    if name not in SOURCES:
        raise errors.UserError(f'Unknown source {name!r}{errors.nearest(name, SOURCES)}')
    for key, argument in arguments[name].items():
        if argument.default is argument.empty and key not in spec:
            raise errors.UserError(f'source={name!r} needs {key!r}: set it in the data spec.')
    spec['purpose'] = purpose
    source = SOURCES[name](**{k: spec[k] for k in arguments[name] if k in spec})
    limits = {key: spec[key] for key in SCORES[1:] if key in spec}
    if 'scores' in spec:
        scores.sample_by(source, spec['scores'], **limits)
    elif limits:
        raise errors.UserError(f'{next(iter(limits))} is of scores: set `scores` too.')
    if 'cache_gb' in arguments[name]:
        return source
    return local_cache.keep(source, spec.get('cache_dir'), spec.get('cache_gb') or 0)


def _mixed(entries, purpose):
    """The mixture of the entries of a list."""
    weights = mixture.weights_of(entries)  # before anything is listed
    opened = [open_source({**entry, 'weight': None}, purpose) for entry in entries]
    longest = max((source.classes or () for source in opened), key=len)
    opened = [in_classes(source, longest) if source.classes else source for source in opened]
    return mixture.Mixture(opened, [mixture.name_of(entry) for entry in entries], weights)


def with_words(spec: Any, words: Mapping[str, str]) -> dict | tuple[dict, ...]:
    """A spec with fields as a command line gives them, {'ignore': '11', 'layout': 'voc'}.

    Those of a list go to each of its sources.
    """
    spec = mixture.parse(spec) if isinstance(spec, str) else spec
    if isinstance(spec, (list, tuple)):
        return tuple(with_words(entry, words) for entry in mixture.entries(spec))
    spec = {'path': os.fspath(spec)} if isinstance(spec, (str, os.PathLike)) else dict(spec)
    return spec | {k: fields.tuples(fields.literal(text)) for k, text in words.items()}


def _kind(path):
    """The kind of source that lies at `path`, a key of SOURCES."""
    path = os.fspath(path)
    if '.parquet' in os.path.basename(path):
        return 'manifest' if manifest.is_manifest(path) else 'parquet'
    if '.array_record' in os.path.basename(path):
        return 'array_record'
    if re.search(r'\.(tar|tgz|tar\.\w+)$', path):
        return 'tar'
    if glob.has_magic(path) and not files.exists(path):
        return 'folder'
    files.require(path)
    if not files.is_folder(path):
        raise errors.UserError(
            f'{path} is neither a folder, nor *.parquet, nor *.array_record*, nor *.tar: '
            'give the folder that holds the images.'
        )
    return _kind_of_folder(path)


def _kind_of_folder(path):
    """The kind of the topmost files of a data set in a folder: no class folders are looked into."""
    path = path.rstrip('/') or path
    level, last = [path], 'folder'  # which counts if there are no images beside it
    for _ in range(5):  # archive/data/default/train/0000.parquet
        below = []
        for parent in level[:100]:
            with contextlib.suppress(PermissionError):  # the listing counts it
                names, folders = files.children(parent, path)
                shards = [os.path.join(parent, n) for n in names if n.endswith('.parquet')]
                if shards and parquet.holds_images(shards[0]):
                    return 'parquet'
                if shards:
                    last = 'parquet'
                if any('.array_record' in n for n in names):
                    return 'array_record'
                if any(map(files.is_image, names)):
                    return 'folder'
                if any(n.endswith('.tar') for n in names):
                    last = 'tar'
                below += [os.path.join(parent, n) for n in folders]
        level = below
    return last


# What commands say of a source, and what they ask of its labels.


def lines(source: Any) -> list[str]:
    """Log lines: the number of images, the fingerprint, and what was chosen and left out."""
    notes = getattr(source, 'notes', ())
    return [
        f'data      {len(source):,} images, {source.fingerprint}',
        *(f'          {note}' for note in notes),
    ]


def check_labels(source: Any) -> None:
    """Raises if images of a labelled source have no label; to call where labels are used."""
    labels = getattr(source, 'labels', None)
    if labels is not None and (labels < 0).any():
        missing, first = int((labels < 0).sum()), int(labels.argmin())
        raise errors.UserError(
            f'{missing:,} of {len(source):,} images ({source.describe(first)} is the first) have '
            f'no label (null or below 0): label them, or leave them out.'
        )
    if labels is None and source.classes and source[0].get('label', 0) < 0:
        raise errors.UserError(
            f'Images such as {source.describe(0)} have no label (below 0): give labelled ones.'
        )


def in_classes(source: Any, classes: Sequence[str] | None) -> Any:
    """A source whose labels count in `classes`, where it has numbers for names.

    A set of few images lacks some numbers, and would count those it has. The source is returned as
    it is if its names are no numbers, or if it has others; `accuracy.check_classes` says so.

    Args:
      source: labelled.
      classes: names in label order, e.g. those of the training images.
    """
    labels, names = getattr(source, 'labels', None), source.classes
    if labels is None or not classes or not all(map(str.isdigit, (*names, *classes))):
        return source
    index = {name: k for k, name in enumerate(classes)}
    found = np.array([index.get(name, -1) for name in names])
    if (found[np.unique(labels[labels >= 0])] < 0).any():
        return source
    new = object.__new__(type(source))
    moved = np.where(labels < 0, -1, found[labels]).astype(np.int32)
    new.__dict__.update(source.__dict__, labels=moved, classes=tuple(classes))
    return new


def typical_size(source: Any) -> tuple[int, int]:
    """(height, width) in pixels of a typical image: the median short side of 64, evenly spread.

    Raises:
      UserError: no image can be decoded.
    """

    source = maps.images_only(source)

    def size(i):
        try:
            return host.decode(source[i]['image']).shape[:2]
        except (host.DecodeError, OSError) as e:  # the stream counts and lists it
            return str(e).rstrip('.')

    sample = fingerprint.spread(len(source), fingerprint.SAMPLE)
    found = list(threads.at_once(size, sample, 16 if getattr(source, 'remote', False) else 1))
    sides = [x for x in found if not isinstance(x, str)]
    if not sides:
        raise errors.UserError(
            f'none of {len(sample)} images can be decoded, {source.describe(0)} for one '
            f'({found[-1]}): is --data a folder of images?'
        )
    return sorted(sides, key=min)[len(sides) // 2]
