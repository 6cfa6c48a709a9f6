# SPDX-License-Identifier: Apache-2.0
"""Files of a data set: listing, shards, names of images and classes."""

import errno
import functools
import glob
import importlib.util
import os
import pathlib
import re
import stat
from collections.abc import Callable, Sequence

import numpy as np
from etils import epath

from ssl_jax.data import host, splits
from ssl_jax.run import errors, storage

EXTENSIONS = (
    *('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff', '.gif'),
    *('.jpe', '.jfif', '.ppm', '.pgm', '.pbm', '.pnm', '.avif', '.jp2', '.j2k'),
)
HEIF = ('.heic', '.heif', '.hif')  # images where the extra `heif` is installed
# First bytes of JPEG, PNG, GIF, TIFF, WebP.
_MAGIC = (b'\xff\xd8\xff', b'\x89PNG', b'GIF8', b'II*\0', b'MM\0*', b'RIFF')
_SYSTEM = {  # folders and files of systems and tools; so is every name with a dot in front
    *('__macosx', '$recycle.bin', 'recycler', 'system volume information', 'lost+found'),
    *('@eadir', '@tmp', '@recycle', '@recently-snapshot', '#recycle', '#snapshot'),
    *('__pycache__', 'thumbs.db', 'desktop.ini'),
}
_NAMED = 'without extension though an image by its first bytes: add the extension'

# {reason: (number of files, the first of them)} of what a listing leaves out.
Left = dict[str, tuple[int, str]]


def require(path: str) -> None:
    """Raises FileNotFoundError, with the nearest name that exists, if `path` does not exist."""
    if os.path.exists(path):
        return
    parent = os.path.dirname(os.path.abspath(path))
    while not os.path.isdir(parent):
        path, parent = parent, os.path.dirname(parent)
    hint = errors.nearest(os.path.basename(path), sorted(os.listdir(parent)), f' in {parent}')
    raise FileNotFoundError(f'{path} does not exist{hint}')


def printable(path: str) -> str:
    """A file name as valid Unicode, whatever bytes it has on disk."""
    return os.fsencode(path).decode('utf-8', 'replace')


# Listing.


@functools.cache
def extensions() -> frozenset[str]:
    """Extensions of images, lower case."""
    return frozenset(EXTENSIONS + (HEIF if importlib.util.find_spec('pillow_heif') else ()))


def is_image(name: str) -> bool:
    """Whether a file name is that of an image that can be decoded here."""
    return os.path.splitext(name)[1].lower() in extensions()


def is_system(name: str) -> bool:
    """Whether a file or folder is hidden, or one of a system's or a tool's own."""
    return name.startswith('.') or name.lower() in _SYSTEM


def walk(root: str, wanted: Callable[[str], bool]) -> tuple[list[str], Left]:
    """Files below a folder whose names are wanted, and what is left out.

    Hidden and system folders are left out, and what is no regular file. Follows symbolic links,
    each folder once: loops end, and nothing is listed twice through them. Folders that may not be
    read, and links in a circle, are left out; any other error ends the listing, because a disk
    that fails must not shrink a data set.

    Args:
      root: the folder.
      wanted: of a file name.

    Returns:
      Names relative to `root` with '/', sorted as bytes, and what is left out.
    """
    require(root)
    names, left, seen, stack = [], {}, set(), ['']
    while stack:
        prefix = stack.pop()
        try:
            found = os.stat(os.path.join(root, prefix))
            if (found.st_dev, found.st_ino) in seen:
                continue
            seen.add((found.st_dev, found.st_ino))
            folders = []
            with os.scandir(os.path.join(root, prefix)) as entries:
                for entry in entries:
                    name = f'{prefix}{entry.name}'
                    kind, count = _kind(entry, wanted, left)
                    if kind == 'folder':
                        folders.append(name + '/')
                    elif kind == 'wanted':
                        names.append(name)
                    elif count:
                        leave(left, kind, name, count)
        except OSError as e:
            if not prefix or not _passed_over(e):
                where = printable(os.path.join(root, prefix))
                raise type(e)(
                    f'{where} cannot be listed ({e.strerror or e}): check the disk, the network '
                    'and the permissions and start again, since images would be missing.'
                ) from e
            leave(left, _passed_over(e), prefix)
            continue
        # Reverse, because the stack hands out the last first: which of two links to one folder
        # counts must not depend on the order in which the file system lists them.
        stack.extend(sorted(folders, key=os.fsencode, reverse=True))
    return sorted(names, key=os.fsencode), left


def _kind(entry, wanted, left):
    """('folder', 1), ('wanted', 1) or (reason to leave it out, number of files) of an entry."""
    try:
        folder, regular = entry.is_dir(), entry.is_file()
    except OSError as e:
        if not _passed_over(e):
            raise
        return _passed_over(e), 1
    if is_system(entry.name):
        if not folder:
            return 'hidden', 1
        return f'in {entry.name}', sum(len(files) for _, _, files in os.walk(entry.path))
    if folder:
        return 'folder', 1
    if not regular:
        broken = entry.is_symlink() and not os.path.exists(entry.path)
        return 'link(s) to nothing' if broken else 'pipe(s), socket(s) or device(s)', 1
    if wanted(entry.name):
        return 'wanted', 1
    # At most 1,000 are opened: a folder may be full of such files.
    looks = left.get(_NAMED, (0,))[0] + left.get('without extension', (0,))[0] < 1000
    return _unwanted(entry.name, entry.path if looks else None), 1


def _passed_over(error):
    """The reason to go on without a folder; None where that would lose images by mistake."""
    if error.errno == errno.ELOOP:
        return 'link(s) in a circle'
    return 'folder(s) that may not be read' if isinstance(error, PermissionError) else None


def _unwanted(name, path=None):
    """The reason to leave out a regular file; `path` is looked into if it has no extension."""
    extension = os.path.splitext(name)[1].lower()
    if extension:
        return f'of extension {extension}'
    try:
        head = read_bytes(path, 12) if path else b''
    except (OSError, host.DecodeError):
        head = b''
    image = head.startswith(_MAGIC) and (head[:4] != b'RIFF' or head[8:] == b'WEBP')
    return _NAMED if image else 'without extension'


def walk_remote(root: str, wanted: Callable[[str], bool]) -> tuple[list[str], Left]:
    """As `walk`, in a bucket."""
    base = epath.Path(root)
    if not base.exists():
        raise FileNotFoundError(f'{root} does not exist: check the bucket, the path and the login.')
    listed, left = [], {}
    for folder, _, names in base.walk():
        prefix = os.fspath(folder)[len(os.fspath(base)) :].strip('/')
        hidden = [part for part in prefix.split('/') if is_system(part)]
        for name in names:
            path = os.path.join(prefix, name)
            if hidden:
                leave(left, f'in {hidden[0]}', path)
            elif is_system(name):
                leave(left, 'hidden', path)
            elif wanted(name):
                listed.append(path)
            else:
                leave(left, _unwanted(name), path)
    return sorted(listed, key=os.fsencode), left


def leave(left: Left, reason: str, name: str, count: int = 1) -> None:
    """Counts files that are left out; `name` is one of them."""
    before, first = left.get(reason, (0, name))
    left[reason] = before + count, min(first, name)


def left_out(left: Left) -> list[str]:
    """A sentence on what a listing left out, [] if that is nothing."""
    parts, most = [], sorted(left.items(), key=lambda item: (-item[1][0], item[0]))
    for reason, (count, first) in most[:12]:
        example = '' if reason.startswith(('in ', 'of ')) else f' ({printable(first)})'
        if reason.removeprefix('of extension ') in HEIF:
            example = " (they need pip install 'ssl_jax[heif]')"
        parts.append(f'{count:,} {printable(reason)}{example}')
    if more := sum(count for _, (count, _) in most[12:]):
        parts.append(f'{more:,} more')
    return [f'left out: {", ".join(parts)}'] if parts else []


# Shards.


def expand(
    path: str | os.PathLike, split: str | None, suffix: str, purpose: str = 'train'
) -> list[tuple[list[str], list[str]]]:
    """Files of a sharded data set, in sorted order.

    Args:
      path: a file, a glob, or a folder.
      split: the name of a split, or 'all'; None: that of `purpose`, if the folder has several.
      suffix: of the files in a folder; -00000-of-00002 may follow.
      purpose: see `splits.PURPOSES`.

    Returns:
      [(files, sentences for the log)], the best choice first; more than one if two splits serve.
    """
    path = os.fspath(path)
    if storage.is_remote(path):
        raise errors.UserError(
            f'{path} is remote: copy *{suffix} files to a disk, or mount the bucket.'
        )
    wanted = None if split == 'all' else split
    if glob.has_magic(path) and not os.path.exists(path):
        names = sorted(f for f in glob.glob(path, recursive=True) if os.path.isfile(f))
        if not names:
            raise FileNotFoundError(f'No file matches {path}: check the pattern.')
    elif not os.path.isdir(path):
        require(path)
        if not os.path.isfile(path):
            raise errors.UserError(f'{path} is no regular file: give a file or a folder.')
        names = [path]
    else:
        return _expand_folder(path, split, suffix, purpose)
    # A pattern or a file is the user's own choice, unless its name says another split.
    chosen = names
    if wanted:
        role = splits.role(wanted)
        chosen = [f for f in names if splits.role(_split_of(os.path.basename(f)) or wanted) == role]
    if not chosen:
        raise FileNotFoundError(f'No file of split {split!r} in {path}: leave the split out.')
    return [(chosen, [])]


def _expand_folder(path, split, suffix, purpose):
    ending = re.compile(re.escape(suffix) + r'(-\d+-of-\d+)?$')
    names, left = walk(path, ending.search)
    if not names:
        raise FileNotFoundError(f'There is no *{suffix} file in {path}: check the path.')
    notes = left_out({k: v for k, v in left.items() if not k.startswith(('of ', 'without '))})
    own = {name: _split_of(name) for name in names}
    found = {s: splits.role(s) for s in sorted(set(own.values()) - {None})}
    several = len(set(found.values())) > 1
    if split not in (None, 'all'):
        chosen = [name for name in names if _is_of_split(name, split)]
        if not chosen and not found:
            hint = errors.nearest(split, names)
            raise FileNotFoundError(f'No file of split {split!r} in {path}{hint}')
        if chosen:
            return [([os.path.join(path, name) for name in chosen], notes)]
    elif not several:
        return [([os.path.join(path, name) for name in names], notes)]
    choices = splits.choose(found, split, purpose, path)
    if choices is None:
        return [([os.path.join(path, name) for name in names], notes)]
    out = []
    for choice in choices:
        chosen = [name for name in names if own[name] in choice]
        counts = [{}, {}]
        for name in names:
            key = own[name] or 'no split'
            of = counts[own[name] not in choice]
            of[key] = of.get(key, 0) + 1
        said = [f'files: {splits.note(*counts, purpose)}'] if counts[1] else []
        out.append(([os.path.join(path, name) for name in chosen], said + notes))
    return out


def _pieces(name):
    """Parts of a path that may name its split, of the file and the folders near it first."""
    *folders, file = name.split('/')
    return [*file.split('.')[0].split('-'), *reversed(folders)]


def _is_of_split(name, split):
    """train.parquet, train-00000-of-00005.parquet, data-train.array_record, train/0000.parquet"""
    return split in _pieces(name)


def _split_of(name):
    """The piece of a path that names its split, without numbers; None without."""
    pieces = [p for p in _pieces(name) if splits.role(p)]
    return re.sub(r'[\d_]+$', '', pieces[0]) if pieces else None


# Content.


def read_bytes(path: str, size: int = -1) -> bytes:
    """The content of a local or remote file, or its first bytes.

    Raises:
      DecodeError: it is no regular file. A FIFO would make the reader wait for ever.
    """
    if storage.is_remote(path):
        with epath.Path(path).open('rb') as f:
            return f.read(size)

    def opener(name, flags):
        return os.open(name, flags | getattr(os, 'O_NONBLOCK', 0))

    with open(path, 'rb', opener=opener) as f:
        if not stat.S_ISREG(os.fstat(f.fileno()).st_mode):
            raise host.DecodeError('no regular file, but a pipe, socket or device')
        return f.read(size)


def classes_of(
    labels: Sequence | None, names: Sequence | None = None
) -> tuple[np.ndarray | None, tuple | None, list[str]]:
    """Labels that count classes, and the names of these.

    Without names the numbers are the names: '0' ... 'max', or where more than half of these never
    occur (10, 500, 90000) only those that do.

    Args:
      labels: integers; below 0 they are missing.
      names: in label order.

    Returns:
      (labels as int32 with -1 where they are missing, names, sentences for the log); None twice if
      there are no labels.
    """
    if labels is None:
        return None, None, []
    labels = np.asarray(labels).astype(np.int64)
    labels = np.where(labels < 0, -1, labels)
    present = np.unique(labels[labels >= 0])
    if not len(present):
        return None, None, []
    highest = int(present[-1])
    if names is not None:
        if highest >= len(names):
            raise errors.UserError(
                f'Label {highest} has no name: there are {len(names)} class names, '
                f'{highest + 1} or more are needed.'
            )
        return labels.astype(np.int32), tuple(str(name) for name in names), []
    if highest + 1 <= 2 * len(present):
        return labels.astype(np.int32), tuple(str(c) for c in range(highest + 1)), []
    found = np.where(labels < 0, -1, np.searchsorted(present, labels)).astype(np.int32)
    said = f'labels are {len(present)} numbers of 0 to {highest}: each is a class'
    return found, tuple(str(c) for c in present), [said]


def read_class_names(file: str) -> list[str] | None:
    """The lines of `classes.txt` beside `file`, or None if there is none."""
    path = pathlib.Path(file).with_name('classes.txt')
    if not path.exists():
        return None
    return [line.strip() for line in path.read_text('utf-8').split('\n') if line.strip()]
