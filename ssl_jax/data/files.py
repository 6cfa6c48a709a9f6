# SPDX-License-Identifier: Apache-2.0
"""Files of a data set, on a disk or in a bucket: listing, reading, names of images and classes."""

import bisect
import contextlib
import errno
import functools
import importlib.util
import os
import stat
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ssl_jax.data import host
from ssl_jax.run import bucket, bulk, errors, storage

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
    if exists(path):
        return
    if remote := storage.is_remote(path):
        bucket.require(path)
    # The nearest folder that exists; there are no folders in a bucket, only names with a slash.
    parent, name = os.path.split(path.rstrip('/') if remote else os.path.abspath(path))
    while not (known := storage.names(parent)) and (
        parent.count('/') > 2 if remote else not os.path.isdir(parent)
    ):
        parent, name = os.path.split(parent)
    raise FileNotFoundError(f'{path} does not exist{errors.nearest(name, known, f" in {parent}")}')


def exists(path: str) -> bool:
    """Whether there is a file or a folder at `path`."""
    if not storage.is_remote(path):
        return os.path.exists(path)
    return bool(listed(path)) or bucket.exists(path)


def is_folder(path: str) -> bool:
    """Whether there is a folder at `path`; in a bucket with an object below it."""
    if not storage.is_remote(path):
        return os.path.isdir(path)
    return bool(listed(path)) or (bucket.stat(path) is None and bucket.exists(path))


def is_file(path: str) -> bool:
    """Whether there is a regular file at `path`."""
    return bucket.stat(path) is not None if storage.is_remote(path) else os.path.isfile(path)


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
    if storage.is_remote(root):
        return _walk_remote(root, wanted)
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


def _walk_remote(root, wanted):
    """`walk` of the objects in a bucket; those without extension are not looked into."""
    names, left = [], {}
    for name in listed(root):
        *folders, base = name.split('/')
        hidden = [part for part in folders if is_system(part)]
        if hidden:
            leave(left, f'in {hidden[0]}', name)
        elif is_system(base):
            leave(left, 'hidden', name)
        elif '' in folders:  # no path on a disk, and joined to the root it would be another
            leave(left, 'with // in the name', name)
        elif wanted(base):
            names.append(name)
        else:
            leave(left, _unwanted(base), name)
    return sorted(names, key=os.fsencode), left


def children(folder: str, root: str) -> tuple[list[str], list[str]]:
    """Names of the files and of the folders directly below `folder`, sorted; no hidden ones.

    Args:
      folder: is `root`, or lies below it.
      root: of the listing, in a bucket.
    """
    found, folders = [], []
    if not storage.is_remote(folder):
        with os.scandir(folder) as entries:
            for entry in entries:
                with contextlib.suppress(OSError):  # a link in a circle
                    if entry.is_dir():
                        folders.append(entry.name)
                    elif entry.is_file():
                        found.append(entry.name)
    else:
        names = sorted(listed(root))
        prefix = f'{folder}/'[len(root) + 1 :]
        i = bisect.bisect_left(names, prefix)
        while i < len(names) and names[i].startswith(prefix):
            name, slash, _ = names[i][len(prefix) :].partition('/')
            (folders if slash else found).append(name)
            after = f'{prefix}{name}0'  # of all names in a folder: '0' comes after '/'
            i = bisect.bisect_left(names, after, i) if slash else i + 1
    return tuple(sorted(n for n in x if n and not is_system(n)) for x in (found, folders))


_listings = None  # {folder: what `listed` has found}, in `one_listing`; seen by all threads


@contextlib.contextmanager
def one_listing() -> Iterator[None]:
    """A block, or a function as its decorator, that lists a folder in a bucket only once."""
    global _listings
    outermost = _listings is None
    _listings = {} if outermost else _listings
    try:
        yield
    finally:
        _listings = None if outermost else _listings


def listed(root: str) -> dict[str, bucket.Object]:
    """{name: object} of all objects below `root`, a folder in a bucket; {} if there is none."""
    root, kept = root.rstrip('/'), _listings
    for known, found in list((kept or {}).items()):
        if root == known:
            return found
        if root.startswith(f'{known}/') and found:
            prefix = root[len(known) + 1 :] + '/'
            return {n[len(prefix) :]: o for n, o in found.items() if n.startswith(prefix)}
    try:
        found = {x.name: x for x in bucket.walk(root)}
    except FileNotFoundError:
        bucket.require(root)
        found = {}
    if kept is not None:
        kept[root] = found
    return found


def size_and_stamp(path: str) -> tuple[int, int | str]:
    """Size of a file in bytes, and what changes with it: its time, or its stamp in a bucket.

    (-1, -1) of what is no readable file. In `one_listing` no request for what has been listed.
    """
    if not storage.is_remote(path):
        with contextlib.suppress(OSError):
            found = os.stat(path)
            if stat.S_ISREG(found.st_mode):
                return found.st_size, found.st_mtime_ns
        return -1, -1
    for root, objects in list((_listings or {}).items()):
        if found := path.startswith(f'{root}/') and objects.get(path[len(root) + 1 :]):
            return found.size, found.stamp
    found = bucket.stat(path)
    return (found.size, found.stamp) if found else (-1, -1)


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


# Content.


def read_bytes(path: str, size: int | None = None, start: int = 0) -> bytes:
    """The content of a local or remote file, or `size` bytes of it from byte `start`.

    Raises:
      DecodeError: it is no regular file. A FIFO would make the reader wait for ever.
    """
    if storage.is_remote(path):
        return bulk.read(path, start, size)

    def opener(name, flags):
        return os.open(name, flags | getattr(os, 'O_NONBLOCK', 0))

    with open(path, 'rb', opener=opener) as f:
        if not stat.S_ISREG(os.fstat(f.fileno()).st_mode):
            raise host.DecodeError('no regular file, but a pipe, socket or device')
        f.seek(start)
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
    try:
        text = read_bytes(os.path.join(os.path.dirname(file), 'classes.txt')).decode('utf-8')
    except FileNotFoundError:
        return None
    return [line.strip() for line in text.replace('\r', '\n').split('\n') if line.strip()]
