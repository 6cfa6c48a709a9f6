# SPDX-License-Identifier: Apache-2.0
"""A folder of images, with class folders or without."""

import os
from collections.abc import Sequence

import cv2
import numpy as np
from etils import epath

from ssl_jax.data import files
from ssl_jax.run import storage


class Folder:
    """A folder of images, flat or nested, local or gs://, with or without class folders.

    If all images lie in two or more subfolders, the first folder level gives the labels, in sorted
    order; otherwise there are none. Files with other extensions are ignored and counted in
    `ignored`. The order is that of the relative names as bytes, so the same on every machine.

    Args:
      path: the folder.
      split: a subfolder of it, e.g. 'train'.
      segmentation: a folder with index maps (PNG) under the same relative names.
      classes: names of the classes (of the index maps, if `segmentation` is given).
    """

    def __init__(
        self,
        path: str | os.PathLike,
        split: str | None = None,
        segmentation: str | None = None,
        classes: Sequence | None = None,
    ):
        self.path = os.path.join(path, split) if split else os.fspath(path)
        list_files = _list_remote if storage.is_remote(self.path) else _list_local
        self._files, self.ignored = list_files(self.path)
        if not self._files and self.ignored:
            raise FileNotFoundError(
                f'None of the {self.ignored} files in {files.printable(self.path)} is an image: '
                f'give a folder with {", ".join(files.EXTENSIONS[:6])}, ... files.'
            )
        if not self._files:
            raise FileNotFoundError(
                f'The folder {files.printable(self.path)} is empty: give a folder with images.'
            )
        self._labels, self.classes = None, None
        folders = [f.split('/', 1)[0] if '/' in f else None for f in self._files]
        names = sorted(set(folders) - {None}, key=os.fsencode)
        if len(names) > 1 and None not in folders:
            index = {name: i for i, name in enumerate(names)}
            self._labels = np.array([index[f] for f in folders], np.int32)
            self.classes = tuple(files.printable(n) for n in names)
        self._segmentation = None
        if segmentation:
            self._segmentation = os.path.join(segmentation, split) if split else segmentation
            files.require(self._segmentation)
        if classes is not None:
            names = files.class_names(self._labels, classes)
            self.classes = names or tuple(str(c) for c in classes)
        paths = [os.path.join(self.path, f) for f in self._files]
        self.fingerprint = files.fingerprint('folder', paths, *self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, i: int) -> dict:
        item = {'image': files.read_bytes(os.path.join(self.path, self._files[i]))}
        if self._labels is not None:
            item['label'] = int(self._labels[i])
        if self._segmentation:
            path = os.path.join(self._segmentation, os.path.splitext(self._files[i])[0] + '.png')
            item['segmentation'] = cv2.imread(path, cv2.IMREAD_UNCHANGED)
            if item['segmentation'] is None:
                raise FileNotFoundError(
                    f'{files.printable(path)} is missing or no PNG: add the map.'
                )
        return item

    def describe(self, i: int) -> str:
        return files.printable(os.path.join(self.path, self._files[i]))


def _is_image(name):
    return os.path.splitext(name)[1].lower() in files.EXTENSIONS and not name.startswith('._')


def _list_local(root):
    """Relative names with '/', sorted as bytes, and the number of files ignored.

    Follows symbolic links, each folder once: loops end, and nothing is listed twice through them.
    """
    files.require(root)
    names, ignored, seen, stack = [], 0, set(), ['']
    while stack:
        prefix = stack.pop()
        stat = os.stat(os.path.join(root, prefix))
        if (stat.st_dev, stat.st_ino) in seen:
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders = []
        with os.scandir(os.path.join(root, prefix)) as entries:
            for entry in entries:
                name = f'{prefix}{entry.name}'
                if entry.is_dir():
                    folders.append(name + '/')
                elif _is_image(entry.name) and entry.is_file():
                    names.append(name)
                else:
                    ignored += 1
        # Reverse, because the stack hands out the last first: which of two links to one folder
        # counts must not depend on the order in which the file system lists them.
        stack.extend(sorted(folders, key=os.fsencode, reverse=True))
    return sorted(names, key=os.fsencode), ignored


def _list_remote(root):
    base = epath.Path(root)
    if not base.exists():
        raise FileNotFoundError(f'{root} does not exist: check the bucket, the path and the login.')
    files, ignored = [], 0
    for folder, _, names in base.walk():
        prefix = os.fspath(folder)[len(os.fspath(base)) :].strip('/')
        images = [os.path.join(prefix, name) for name in names if _is_image(name)]
        files += images
        ignored += len(names) - len(images)
    return sorted(files, key=os.fsencode), ignored
