# SPDX-License-Identifier: Apache-2.0
"""A folder of images, with class folders or without."""

import os
from collections.abc import Sequence

import cv2
import numpy as np

from ssl_jax.data import files, fingerprint, splits
from ssl_jax.run import errors, storage


class Folder:
    """A folder of images, flat or nested, on a disk or in a bucket, with class folders or without.

    The folders at the level where images divide give the labels, in sorted order, if all images
    lie in them; otherwise there are none. Single folders around them do not count, nor do those of
    splits. If the folder has several splits (see `splits.level`), one is used. Hidden files,
    folders of the system and other extensions are left out; `ignored` counts them and `notes`
    tells them apart. The order is that of the relative names as bytes, so the same on every
    machine.

    Args:
      path: the folder.
      split: a subfolder of it or the name of a split, e.g. 'train', or 'all'.
      segmentation: a folder with index maps (PNG) under the same relative names.
      classes: names of the classes (of the index maps, if `segmentation` is given).
      purpose: what the images are for, see `splits.PURPOSES`; it chooses the split if `split` does
        not.
    """

    @files.one_listing()
    def __init__(
        self,
        path: str | os.PathLike,
        split: str | None = None,
        segmentation: str | None = None,
        classes: Sequence | None = None,
        purpose: str = 'train',
    ):
        path = os.fspath(path)
        self.remote = storage.is_remote(path)
        within = split if split and files.exists(os.path.join(path, split)) else ''
        self.path = os.path.join(path, within) if within else path
        names, left = files.walk(self.path, files.is_image)
        notes, drop = files.left_out(left), None
        if not names and left:
            raise FileNotFoundError(
                f'There is no image in {files.printable(self.path)} ({notes[0]}): '
                f'give a folder with {", ".join(files.EXTENSIONS[:6])}, ... files.'
            )
        if not names:
            raise FileNotFoundError(
                f'The folder {files.printable(self.path)} is empty: give a folder with images.'
            )
        if not within:
            names, inside, drop, said = _one_split(path, names, split, purpose)
            if inside:
                within, self.path = inside, os.path.join(path, inside)
            notes = said + notes
        self._files = names
        self.ignored = sum(count for count, _ in left.values())
        self.labels, self.classes, said = _labels(names, drop)
        if self.labels is None and drop is not None and not said:  # all splits are flat
            self.labels, self.classes, said = _labels(names)
        self.notes = (*notes, *said)
        self._segmentation = None
        if segmentation:
            self._segmentation = os.path.join(segmentation, within) if within else segmentation
            files.require(self._segmentation)
        if classes is not None:
            _, names, _ = files.classes_of(self.labels, classes)
            self.classes = names or tuple(str(c) for c in classes)
        paths = [os.path.join(self.path, f) for f in self._files]
        self.fingerprint = fingerprint.of_files('folder', paths, *self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, i: int) -> dict:
        item = {'image': files.read_bytes(os.path.join(self.path, self._files[i]))}
        if self.labels is not None:
            item['label'] = int(self.labels[i])
        if self._segmentation:
            path = os.path.join(self._segmentation, os.path.splitext(self._files[i])[0] + '.png')
            item['segmentation'] = _read_map(path)
        return item

    def describe(self, i: int) -> str:
        return files.printable(os.path.join(self.path, self._files[i]))


def _one_split(path, names, split, purpose):
    """The images of the split to use, of all if the folder has no splits.

    Returns:
      (names, folder that all lie in and which they are now relative to, or '', depth of the folder
      that is a split and no class, or None, sentences for the log).
    """
    parents = [os.path.dirname(name) for name in names]
    where = files.printable(path)
    found = splits.level(set(parents))
    if found is None:
        if split not in (None, 'all'):
            tops = sorted({name.split('/')[0] for name in names if '/' in name})
            hint = errors.nearest(split, tops)
            raise FileNotFoundError(f'{where} has no folder {split!r}{hint}')
        return names, '', None, []
    depth, kinds = found

    def own(parent):
        """The split that a folder lies in."""
        parts = parent.split('/')
        return parts[depth] if len(parts) > depth and parts[depth] in kinds else None

    own = {parent: own(parent) for parent in set(parents)}
    choices = splits.choose(kinds, split, purpose, where)
    if choices is None:
        return names, '', depth, []
    for choice in (*choices, choices[0]):  # the first if none has labels
        chosen = [n for n, p in zip(names, parents, strict=True) if own[p] in choice]
        if len(choices) == 1 or _labels(chosen, depth)[0] is not None:
            break
    used, left = {}, {}
    for parent in parents:
        of = used if own[parent] in choice else left
        key = own[parent] or 'no split'
        of[key] = of.get(key, 0) + 1
    said = [f'images: {splits.note(used, left, purpose)}']
    tops = {'/'.join(p.split('/')[: depth + 1]) for p in parents if own[p] in choice}
    if len(tops) > 1:
        return chosen, '', depth, said
    inside = tops.pop()
    return [name[len(inside) + 1 :] for name in chosen], inside, None, said


def _labels(names, drop=None):
    """Labels from the folders at the level where images divide.

    Args:
      names: of images, relative.
      drop: depth of a folder that is no class.

    Returns:
      (int32 labels, class names, sentences for the log), or None for the first two.
    """
    parents = [os.path.dirname(name) for name in names]
    paths = {p: tuple(p.split('/')) if p else () for p in set(parents)}
    if drop is not None:
        paths = {p: parts[:drop] + parts[drop + 1 :] for p, parts in paths.items()}
    base = os.path.commonprefix(list(paths.values()))
    own = {p: parts[len(base)] for p, parts in paths.items() if len(parts) > len(base)}
    classes = sorted(set(own.values()), key=os.fsencode)
    beside = [name for name, p in zip(names, parents, strict=True) if p not in own]
    if beside:
        said = f'no classes: {len(beside):,} images lie beside the folders'
        said += f' ({files.printable(beside[0])} is the first)'
        return None, None, [said] if len(classes) > 1 else []
    index = {name: k for k, name in enumerate(classes)}
    labels = np.array([index[own[parent]] for parent in parents], np.int32)
    return labels, tuple(files.printable(name) for name in classes), []


def _read_map(path):
    """A PNG as it is, without a palette."""
    try:
        data = np.frombuffer(files.read_bytes(path), np.uint8)
        found = cv2.imdecode(data, cv2.IMREAD_UNCHANGED) if len(data) else None
    except FileNotFoundError:
        found = None
    if found is None:
        raise FileNotFoundError(f'{files.printable(path)} is missing or no PNG: add the map.')
    return found
