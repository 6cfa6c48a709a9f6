# SPDX-License-Identifier: Apache-2.0
"""A folder of images, with class folders or without, with maps or without."""

import os
from collections.abc import Sequence

import numpy as np

from ssl_jax.data import files, fingerprint, host, layouts, maps, splits
from ssl_jax.run import errors, storage


class Folder(maps.WithMaps):
    """A folder of images, flat or nested, on a disk or in a bucket, with class folders or without.

    The folders at the level where images divide give the labels, in sorted order, if all images
    lie in them; otherwise there are none. Single folders around them do not count, nor do those of
    splits. If the folder has several splits (see `splits.level`), one is used. Hidden files,
    folders of the system and other extensions are left out; `ignored` counts them and `notes`
    tells them apart. The order is that of the relative names as bytes, so the same on every
    machine.

    Folders such as `images/` and `labels/` (see `layouts`) are images and their maps, as are the
    layouts of some known data sets. Images without a map are left out then, and counted.

    Args:
      path: the folder.
      split: a subfolder of it or the name of a split, e.g. 'train', or 'all'.
      segmentation, depth: folders with maps under the same relative names but for the extension.
      layout: a name of `layouts.LAYOUTS`; default: what the folders say.
      pairs: a text file with 'IMAGE MAP' in each line, which is the split: of depth maps if the
        layout is one of depth or `depth_scale` is given, else of class maps.
      classes: names of the classes in label order; of the maps if there are no class folders.
      map_classes: names of the classes of the maps in order of their index. Default: those of the
        layout, else the lines of `classes.txt` in the folder, else numbers.
      ignore, reduce_zero_label, label_values, depth_scale: see `maps.Meaning`.
      purpose: what the images are for, see `splits.PURPOSES`; it chooses the split if `split` does
        not.
    """

    @files.one_listing()
    def __init__(
        self,
        path: str | os.PathLike,
        split: str | None = None,
        segmentation: str | None = None,
        depth: str | None = None,
        layout: str | None = None,
        pairs: str | None = None,
        classes: Sequence | None = None,
        map_classes: Sequence | None = None,
        ignore: int | Sequence[int] | None = None,
        reduce_zero_label: bool | None = None,
        label_values: Sequence[int] | None = None,
        depth_scale: float | None = None,
        purpose: str = 'train',
    ):
        path = os.fspath(path)
        self.remote = storage.is_remote(path)
        within = split if split and files.exists(os.path.join(path, split)) else ''
        self.path = os.path.join(path, within) if within else path
        every, left = files.walk(self.path, _is_image_or_map)
        names = [name for name in every if files.is_image(name)]
        meaning = dict(
            ignore=ignore,
            reduce_zero_label=reduce_zero_label,
            label_values=label_values,
            depth_scale=depth_scale,
        )
        found = None
        if segmentation or depth:
            where = {'segmentation': segmentation, 'depth': depth}
            where = {kind: folder for kind, folder in where.items() if folder}
            known = {kind: _stems(folder, within) for kind, folder in where.items()}
            found = layouts.given(names, known, files.printable(self.path))
        elif pairs:
            kind = 'depth' if layout in layouts.OF_DEPTH or depth_scale else 'segmentation'
            text = files.read_bytes(pairs).decode('utf-8', 'replace')
            found = layouts.listed(every, text, pairs, kind, layout)
        elif names:
            found = layouts.find(every, layout, files.printable(self.path), self._read_text)
        if found is None:
            for name in every:
                if not files.is_image(name):
                    files.leave(left, 'of extension .npy', name)
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
        root, inside = self.path, ''
        if found:
            notes = [_paired(found, names), *notes]
            names = sorted(found.maps, key=os.fsencode)
        if found and found.splits:
            names, said = _listed_split(found.splits, names, split, purpose, path)
            notes = said + notes
        elif not within and not pairs:
            chosen, inside, drop, said = one_split(path, names, split, purpose)
            names = [names[i].removeprefix(f'{inside}/') for i in chosen]
            if inside:
                self.path = os.path.join(path, inside)
            notes = said + notes
        self._files = names
        self.ignored = sum(count for count, _ in left.values())
        self.labels, self.classes, said = None, None, []
        if not (found and found.layout):  # whose folders are cities or scenes
            self.labels, self.classes, said = labels_of(names, drop)
            if not (found or said) and self.labels is None and drop is not None:  # flat splits
                self.labels, self.classes, said = labels_of(names)
        self.notes = (*notes, *said)
        if classes is not None and found and self.labels is None:
            map_classes = map_classes or classes
        elif classes is not None:
            _, given, _ = files.classes_of(self.labels, classes)
            self.classes = given or tuple(str(c) for c in classes)
        paths = [os.path.join(self.path, f) for f in self._files]
        if not found:
            self.fingerprint = fingerprint.of_files('folder', paths, *self._files)
            return
        whole = [f'{inside}/{name}' if inside else name for name in names]
        self._kinds = tuple(next(iter(found.maps.values())))
        self._map_files = {
            kind: [_joined(root, found.maps[name][kind]) for name in whole] for kind in self._kinds
        }
        self._meaning = maps.Meaning.of(found.meaning, **meaning)
        map_classes = map_classes or found.classes
        map_classes = map_classes or files.read_class_names(os.path.join(root, 'classes.txt'))
        self._names = self._meaning.names(map_classes)
        paths += [file for kind in self._kinds for file in self._map_files[kind]]
        self.fingerprint = fingerprint.of_files(
            'pairs', paths, *self._files, *self._kinds, self._meaning.key, self._names
        )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, i: int) -> dict:
        item = {'image': files.read_bytes(os.path.join(self.path, self._files[i]))}
        if self.labels is not None:
            item['label'] = int(self.labels[i])
        return item | self._maps(i)

    def describe(self, i: int) -> str:
        return files.printable(os.path.join(self.path, self._files[i]))

    def _map_file(self, kind, i):
        path = self._map_files[kind][i]
        where = files.printable(path)
        try:
            return files.read_bytes(path), where
        except (FileNotFoundError, host.DecodeError):
            raise errors.UserError(f'The map {where} is missing: add it.') from None

    def _read_text(self, name):
        """The content of a text file of the folder, None if there is none."""
        try:
            return files.read_bytes(os.path.join(self.path, name)).decode('utf-8', 'replace')
        except (OSError, host.DecodeError):
            return None


def _is_image_or_map(name):
    return files.is_image(name) or name.lower().endswith('.npy')


def _joined(root, path):
    """`path` is relative, or one that the user gave."""
    return path if path.startswith('/') or storage.is_remote(path) else os.path.join(root, path)


def _stems(folder, within):
    """{relative name of a map without extension: its path}."""
    folder = os.path.abspath(folder) if not storage.is_remote(folder) else folder
    folder = os.path.join(folder, within) if within else folder
    names, _ = files.walk(folder, _is_image_or_map)
    names.sort(key=layouts.rank, reverse=True)  # the best of two last
    return {os.path.splitext(name)[0]: os.path.join(folder, name) for name in names}


def _paired(found, names):
    """A sentence on what is whose map."""
    image, own = next(iter(found.maps.items()))
    what = {'segmentation': 'class maps', 'depth': 'depth maps'}
    said = f'layout {found.layout}' if found.layout else 'maps'
    said += f': {len(found.maps):,} images with {" and ".join(what[kind] for kind in own)}'
    said += f', {files.printable(image)} with {files.printable(next(iter(own.values())))} for one'
    of_maps = {file for maps_of in found.maps.values() for file in maps_of.values()}
    alone = len(set(found.alone))
    others = len(set(names) - of_maps - set(found.maps) - set(found.alone))
    if alone:
        said += f'; leaves out {alone:,} images without a map (give their folder to use them all)'
    if others:
        said += f'; leaves out {others:,} files that are neither'
    return said


def _listed_split(found, names, split, purpose, path):
    """(names of the split to use, sentences for the log) where a data set says its splits."""
    own = {name: splits.role(name) if name in splits.ROLES else 'other' for name in found}
    choices = splits.choose(own, split, purpose, files.printable(path))
    if choices is None:
        return names, []
    chosen = {name for part in choices[0] for name in found[part]}
    counts = {name: len(found[name]) for name in found}
    used = {name: n for name, n in counts.items() if name in choices[0]}
    left = {name: n for name, n in counts.items() if name not in choices[0]}
    said = [f'images: {splits.note(used, left, purpose)}'] if left else []
    return [name for name in names if name in chosen], said


def one_split(
    path: str, names: Sequence[str], split: str | None, purpose: str
) -> tuple[Sequence[int], str, int | None, list[str]]:
    """The images of the split to use, of all if there are no splits.

    Args:
      path: for messages.
      names: of images, relative.
      split, purpose: see `Folder`.

    Returns:
      (indices of the images, folder that all lie in, to be cut from their names, or '', depth of
      the folder that is a split and no class, or None, sentences for the log).
    """
    parents, every = [os.path.dirname(name) for name in names], range(len(names))
    where = files.printable(path)
    found = splits.level(set(parents))
    if found is None:
        if split not in (None, 'all'):
            tops = sorted({name.split('/')[0] for name in names if '/' in name})
            hint = errors.nearest(split, tops)
            raise FileNotFoundError(f'{where} has no folder {split!r}{hint}')
        return every, '', None, []
    depth, kinds = found

    def own(parent):
        """The split that a folder lies in."""
        parts = parent.split('/')
        return parts[depth] if len(parts) > depth and parts[depth] in kinds else None

    own = {parent: own(parent) for parent in set(parents)}
    choices = splits.choose(kinds, split, purpose, where)
    if choices is None:
        return every, '', depth, []
    for choice in (*choices, choices[0]):  # the first if none has labels
        chosen = [i for i, p in enumerate(parents) if own[p] in choice]
        labels = labels_of([names[i] for i in chosen], depth)[0] if len(choices) > 1 else None
        if len(choices) == 1 or labels is not None:
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
    return chosen, tops.pop(), None, said


def labels_of(
    names: Sequence[str], drop: int | None = None
) -> tuple[np.ndarray | None, tuple[str, ...] | None, list[str]]:
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
