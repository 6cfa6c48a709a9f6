# SPDX-License-Identifier: Apache-2.0
"""Images in tar files (WebDataset), with access to each: on a disk or in a bucket, no copy made."""

import contextlib
import json
import os
import posixpath
import re
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ssl_jax.data import files, fingerprint, folder, layouts, maps, shards, splits, tar_index
from ssl_jax.run import bulk, errors, hashing, storage


class Tar(maps.WithMaps):
    """Tar files whose members are images, in the order of the shards and their members.

    Members with one name but for the extension are one sample: an image (`a.jpg`), its label
    (`a.cls`, the text of a number or of a class; or 'label' in `a.json`), its maps (`a.seg.png`,
    `a.depth.png`: an extension after a name of `layouts.MAPS`). Class names are the lines of
    `classes.txt` beside the first shard. Without labels, folders in the tars give them, and they
    give splits and maps, as in `folder.Folder`; tars of one class each (`n01440764.tar`) count as
    folders.

    The first start reads the headers of each shard, see `tar_index`; each image is then one read.

    Args:
      path: a file, a glob, a pattern with braces as in shard-{000..127}.tar, or a folder (searched
        recursively), on a disk or in a bucket.
      split: of shards in a folder, or a folder in the tars; 'all' takes every image.
      image_member: extension of the images, such as 'jpg', where samples have several.
      segmentation_member, depth_member: extensions of the maps, such as 'png' or 'mask.png'.
      classes: names of the classes in label order.
      map_classes: names of the classes of the maps in order of their index; default: numbers, or
        without labels `classes.txt`.
      ignore, reduce_zero_label, label_values, depth_scale: see `maps.Meaning`; default, as of
        `map_classes`: what `ssl_jax data pack` has written into `maps.json` beside the shards.
      cache_dir: where an index goes that cannot lie beside its shard; default ~/.cache/ssl_jax.
      purpose: what the images are for, see `splits.PURPOSES`.
    """

    @files.one_listing()
    def __init__(
        self,
        path: str | os.PathLike,
        split: str | None = None,
        image_member: str | None = None,
        segmentation_member: str | None = None,
        depth_member: str | None = None,
        classes: Sequence | None = None,
        map_classes: Sequence | None = None,
        ignore: int | Sequence[int] | None = None,
        reduce_zero_label: bool | None = None,
        label_values: Sequence[int] | None = None,
        depth_scale: float | None = None,
        cache_dir: str | None = None,
        purpose: str = 'train',
    ):
        members = dict(image=image_member, segmentation=segmentation_member, depth=depth_member)
        members = {kind: name.lstrip('.') for kind, name in members.items() if name}
        cache_dir = cache_dir or os.path.expanduser('~/.cache/ssl_jax')
        choices = shards.expand(path, split, '.tar', purpose)
        for choice in (*choices, choices[0]):  # the first if none has labels
            self.files, notes = choice
            self._open(members, split, purpose, classes, cache_dir)
            if len(choices) == 1 or self.labels is not None:
                break
        self.notes = (*notes, *self.notes)
        self.remote = storage.is_remote(self.files[0])
        known = _packed(self.files[0]) if self._kinds else {}
        if self._layout:
            known = {**self._layout.meaning, 'map_classes': self._layout.classes}
        map_classes = map_classes or known.get('map_classes')
        self._meaning = maps.Meaning.of(
            known,
            ignore=ignore,
            reduce_zero_label=reduce_zero_label,
            label_values=label_values,
            depth_scale=depth_scale,
        )
        if map_classes is None and self._kinds and self.labels is None:
            map_classes = files.read_class_names(self.files[0])
        self._names = self._meaning.names(map_classes)
        chosen = hashing.digest(
            *(at.tobytes() for places in self._places.values() for at in places)
        )
        more = [*map(os.path.basename, self.files), len(self), chosen]
        more += [self._kinds, self._meaning.key, self._names] if self._kinds else []
        self.fingerprint = fingerprint.of_files('tar', self.files, *more)

    def _open(self, members, split, purpose, classes, cache_dir):
        """Sets what a choice of shards gives."""
        found, first = tar_index.indexes(self.files, cache_dir), self.files[0]
        self._stamps = [index.stamp for index in found]
        notes, table = _left_out(self.files, found), pa.concat_tables(x.table for x in found)
        shard = np.repeat(np.arange(len(found), dtype=np.int32), [len(x.table) for x in found])
        where = first if len(found) == 1 else os.path.dirname(first)
        rows, maps_of = np.arange(len(table)), {}
        if members or not all(_plain(index.table['name']) for index in found):
            rows, maps_of = _samples(table['name'].to_pylist(), shard, members, self.files)
        paths, drop, said = _paths(table['name'], self.files, shard), None, []
        self._layout = None
        if paths and not maps_of:
            self._layout = pairs = layouts.find(paths, None, where, lambda name: None)
            if pairs:
                at = {name: row for row, name in enumerate(paths)}
                rows = np.array([at[name] for name in pairs.maps])
                own = list(pairs.maps.values())
                maps_of = {k: np.array([at[x[k]] for x in own]) for k in own[0]}
        self._kinds = tuple(kind for kind in layouts.MAPS if kind in maps_of)
        if self._kinds:
            whole = np.all([maps_of[kind] >= 0 for kind in self._kinds], axis=0)
            said = [f'maps ({" and ".join(self._kinds)}) of {whole.sum():,} images']
            if not whole.all():
                said[0] += f'; leaves out {(~whole).sum():,} without'
            rows, maps_of = rows[whole], {kind: own[whole] for kind, own in maps_of.items()}
        if not len(rows):
            raise FileNotFoundError(
                f'There is no image in {first}{f" ({notes[0]})" if notes else ""}: give tar files '
                f'whose members are {", ".join(files.EXTENSIONS[:4])}, ... files.'
            )
        if paths:
            paths = [paths[row] for row in rows]
            inner = splits.level({posixpath.dirname(name) for name in paths})
            chosen, inside, drop, more = folder.one_split(
                where, paths, split if inner else None, purpose
            )
            chosen, said = list(chosen), more + said
            paths = [paths[i].removeprefix(f'{inside}/') for i in chosen]
            rows, maps_of = rows[chosen], {kind: own[chosen] for kind, own in maps_of.items()}
        offsets, sizes = (table[c].to_numpy() for c in ('offset', 'size'))
        self._places = {kind: (offsets[own], sizes[own]) for kind, own in maps_of.items()}
        self._places['image'] = offsets[rows], sizes[rows]
        self._shard = shard[rows]
        self._members = table['name'].take(rows).combine_chunks()
        self.labels, self.classes, more = _labels(table['label'].take(rows), classes, first)
        if self.labels is None and paths:
            self.labels, names, more = folder.labels_of(paths, drop)
            self.classes = tuple(map(str, classes)) if classes and names else names
            files.classes_of(self.labels, self.classes)  # says so if names are missing
        self.notes = [*said, *more, *notes]

    def __len__(self) -> int:
        return len(self._shard)

    def __getitem__(self, i: int) -> dict:
        i = range(len(self))[i]
        item = {'image': self._read('image', i)}
        if self.labels is not None:
            item['label'] = int(self.labels[i])
        return item | self._maps(i)

    def describe(self, i: int) -> str:
        shard, name = self.files[self._shard[i]], self._members[i].as_py()
        return f'{files.printable(shard)} member {files.printable(name)}'

    def _map_file(self, kind, i):
        return self._read(kind, i), f'the {kind} map of {self.describe(i)}'

    def _read(self, kind, i):
        """The content of an image, or of its map.

        Raises:
          UserError: the shard is another file than when it was indexed.
        """
        file, stamp = self.files[self._shard[i]], self._stamps[self._shard[i]]
        start, size = (int(of[i]) for of in self._places[kind])
        if self.remote:
            return bulk.read(file, start, size, stamp[1])
        if files.size_and_stamp(file) != stamp and os.path.exists(file):
            raise errors.UserError(f'{file} was changed while it is read: start again.')
        return files.read_bytes(file, size, start)


def _packed(file):
    """What `ssl_jax data pack` says of the maps, {} if it did not write the shards."""
    try:
        found = json.loads(files.read_bytes(os.path.join(os.path.dirname(file), 'maps.json')))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _left_out(shards, found):
    """Sentences on what is no image, and on shards without an end."""
    left = {}
    for index in found:
        for reason, (count, first) in index.left.items():
            files.leave(left, reason, first, count)
    said = files.left_out(left)
    for shard in [f for f, index in zip(shards, found, strict=True) if not index.closed][:1]:
        said.append(f'{shard} has no end mark: if it was cut there, images are missing')
    return said


def _samples(names, shard, members, shards):
    """(rows that are images, {kind: rows of their maps, -1 where there is none}).

    Args:
      names: of all members.
      shard: int (N,), the shard of each.
      members: {'image': 'jpg', 'segmentation': 'mask.png'}, what the user chose.
      shards: for messages.
    """
    found = {'image': {}}  # {kind: {(shard, name of the sample): row}}
    for row, name in enumerate(names):
        kind, key = _kind(name, members)
        if kind is None:
            continue
        before = found.setdefault(kind, {}).setdefault((shard[row], key), row)
        if kind == 'image' and before != row:
            raise errors.UserError(
                f'{shards[shard[row]]} has several images of one name, {names[before]} and {name}: '
                f'choose one (data.train.image_member={_extension(name)}), and say what the other '
                f'is if it is a map (segmentation_member, depth_member).'
            )
    images = found.pop('image')
    rows = np.array(list(images.values()), np.int64)
    return rows, {k: np.array([own.get(x, -1) for x in images]) for k, own in found.items()}


def _plain(names):
    """Whether each member is an image, and of another name: the usual case, and the fast one."""
    stems = pc.replace_substring_regex(names, r'\.[^./]*$', '')
    found = pc.utf8_lower(pc.replace_substring_regex(names, r'^.*(\.[^./]*)$', r'\1'))
    known = pc.all(pc.is_in(found, pa.array(sorted(files.extensions())))).as_py()
    maps_too = pc.match_substring_regex(stems, rf'\.({"|".join(layouts.KIND)})$')
    return (
        bool(known)
        and not pc.any(maps_too).as_py()
        and pc.count_distinct(stems).as_py() == len(names)
    )


def _kind(name, members):
    """('image', 'segmentation', 'depth' or None, name of the sample) of a member."""
    for kind, ending in members.items():
        if name.lower().endswith(f'.{ending.lower()}'):
            return kind, name[: -len(ending) - 1]
    stem, extension = posixpath.splitext(name)
    of, dot, last = stem.rpartition('.')
    kind = layouts.KIND.get(last.lower()) if dot and '/' not in last else None
    if kind and kind not in members and extension.lower() in maps.EXTENSIONS:
        return kind, of
    is_image = 'image' not in members and files.is_image(name)
    return ('image', stem) if is_image else (None, stem)


def _extension(name):
    return posixpath.splitext(name)[1].lstrip('.')


def _paths(names, shards, shard):
    """Names of the members with their folders; None where none lies in a folder.

    Tars of one class each, as those of ImageNet's training set, stand for a folder of their name.
    """
    stems = [posixpath.splitext(posixpath.basename(file))[0] for file in shards]
    if len(stems) > 1 and all(re.fullmatch(r'n\d{8}', stem) for stem in stems):
        return [f'{stems[s]}/{n}' for s, n in zip(shard, names.to_pylist(), strict=True)]
    return names.to_pylist() if pc.any(pc.match_substring(names, '/')).as_py() else None


def _labels(said, classes, file):
    """(int32 labels, names, sentences for the log) of what members say; None twice without."""
    if said.null_count == len(said):
        return None, None, []
    with contextlib.suppress(pa.ArrowInvalid):
        numbers = said.cast(pa.int64()).fill_null(-1).to_numpy()
        return files.classes_of(numbers, classes or files.read_class_names(file))
    names = classes or sorted(set(pc.unique(said).to_pylist()) - {None})
    found = pc.index_in(said, pa.array(map(str, names), pa.string()))
    unknown = pc.unique(said.filter(pc.and_(pc.is_null(found), pc.is_valid(said)))).to_pylist()
    if unknown:
        hint = errors.nearest(unknown[0], names)
        raise errors.UserError(f'{file} ... has the label {unknown[0]!r}{hint}')
    return files.classes_of(found.fill_null(-1).to_numpy(), names)
