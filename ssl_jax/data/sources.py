# SPDX-License-Identifier: Apache-2.0
"""Random-access sources of images, and `open_source`, which makes one from a spec or a path.

A source is anything with

  __len__()        number of images
  __getitem__(i)   dict(image=bytes | uint8 array, label=int, segmentation=uint8 (H, W),
                   depth=float32 (H, W)); all but `image` only if the source has them
  classes          tuple of names in label order, or None if there are no labels
  describe(i)      where image i comes from, for messages
  fingerprint      str; changes when the list of images changes

that can be pickled and read from several threads.
"""

import difflib
import glob
import hashlib
import os

import numpy as np

KEYS = {
    'folder': ('path', 'split', 'segmentation', 'classes'),
    'parquet': ('path', 'split', 'image_column', 'label_column', 'cache_dir'),
    'tfds': ('name', 'path', 'split'),
    'array_record': ('path', 'split', 'classes'),
    'arrays': ('images', 'labels', 'classes'),
    'scenes': ('n', 'size', 'seed', 'split'),
}

EXTENSIONS = (
    *('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff', '.gif'),
    *('.jpe', '.jfif', '.ppm', '.pgm', '.avif'),
)


def open_source(spec):
    """Opens the images that `spec` names.

    Args:
      spec: a path (a folder of images, a Parquet file or a folder of them, an ArrayRecord file), or
        a mapping with `source` and its keys:
          folder        path, split (a subfolder), segmentation (folder of index maps with the same
                        names), classes
          parquet       path (file, glob or folder), split, image_column, label_column, cache_dir
          tfds          name, split, path (TFDS' data_dir)
          array_record  path (file, glob or folder), split, classes
          arrays        images, labels, classes
          scenes        n, size, seed, split: rendered, needs no files
        Keys that are None or '' count as not given.  Keys of other sources are allowed, so that a
        config can switch `source` and leave the rest.

    Raises:
      ValueError, FileNotFoundError: one sentence that says what is wrong and what to do.
    """
    if isinstance(spec, (str, os.PathLike)):
        spec = {'source': infer(os.fspath(spec)), 'path': os.fspath(spec)}
    spec = {k: v for k, v in dict(spec).items() if v is not None and not _is_empty(v)}
    known = sorted({'source'}.union(*KEYS.values()))
    for key in spec:
        if key not in known:
            raise ValueError(f'Unknown key {key!r} in the data spec{nearest(key, known)}')
    if 'source' not in spec:
        if 'path' not in spec:
            raise ValueError(f'The data spec needs `source`, one of {", ".join(KEYS)}.')
        spec['source'] = infer(spec['path'])
    name = spec['source']
    if name not in KEYS:
        raise ValueError(f'Unknown source {name!r}{nearest(name, KEYS)}')
    kwargs = {k: spec[k] for k in KEYS[name] if k in spec}
    required = {'tfds': 'name', 'arrays': 'images', 'scenes': None}.get(name, 'path')
    if required and required not in kwargs:
        raise ValueError(f'source={name!r} needs {required!r}: set it in the data spec.')
    # Imported here because pyarrow, tfds and array_record are slow to import.
    if name == 'folder':
        return Folder(**kwargs)
    if name == 'arrays':
        return Arrays(**kwargs)
    if name == 'scenes':
        from ssl_jax.data import scenes

        return scenes.Scenes(**kwargs)
    if name == 'parquet':
        from ssl_jax.data import parquet

        return parquet.Parquet(**kwargs)
    from ssl_jax.data import records

    return (records.Tfds if name == 'tfds' else records.ArrayRecord)(**kwargs)


def infer(path):
    """The kind of source that lies at `path`: 'folder', 'parquet' or 'array_record'."""
    path = os.fspath(path)
    if '.parquet' in os.path.basename(path):
        return 'parquet'
    if '.array_record' in os.path.basename(path):
        return 'array_record'
    if '://' in path or glob.has_magic(path):
        return 'folder'
    require(path)
    if not os.path.isdir(path):
        raise ValueError(
            f'{path} is neither a folder, nor *.parquet, nor *.array_record*: '
            'give the folder that holds the images.'
        )
    for folder in (path, os.path.join(path, 'data')):  # Hugging Face repositories use data/.
        names = os.listdir(folder) if os.path.isdir(folder) else []
        if any(n.endswith('.parquet') for n in names):
            return 'parquet'
        if any('.array_record' in n for n in names):
            return 'array_record'
    return 'folder'


def require(path):
    """Raises FileNotFoundError, with the nearest name that exists, if `path` does not exist."""
    if os.path.lexists(path) and os.path.exists(path):
        return
    parent = os.path.dirname(os.path.abspath(path))
    while not os.path.isdir(parent):
        path, parent = parent, os.path.dirname(parent)
    hint = nearest(os.path.basename(path), sorted(os.listdir(parent)), f' in {parent}')
    raise FileNotFoundError(f'{path} does not exist{hint}')


def nearest(word, words, where=''):
    """' ...: did you mean X?' or the list of what there is; for the end of an error message."""
    words = [str(w) for w in words]
    close = difflib.get_close_matches(str(word), words, 1, 0.5)
    if close:
        return f'{where}: did you mean {close[0]!r}?'
    shown = ', '.join(words[:12]) + (', ...' if len(words) > 12 else '')
    return f'{where}: there is {shown or "nothing"}.'


def printable(path):
    """A file name as valid Unicode, whatever bytes it has on disk."""
    return os.fsencode(path).decode('utf-8', 'replace')


def fingerprint(*parts):
    """Short digest of strings, numbers and byte strings, in order."""
    digest = hashlib.sha256()
    for part in parts:
        part = part if isinstance(part, bytes) else str(part).encode('utf-8', 'surrogateescape')
        digest.update(len(part).to_bytes(8, 'little') + part)
    return digest.hexdigest()[:16]


def expand(path, split, suffix):
    """Sorted files of a sharded data set: a file, a glob, or a folder (then `suffix`, `split`)."""
    path = os.fspath(path)
    if '://' in path:
        raise ValueError(f'{path} is remote: copy *{suffix} files to a disk, or mount the bucket.')
    if glob.has_magic(path):
        files = sorted(glob.glob(path, recursive=True))
        if not files:
            raise FileNotFoundError(f'No file matches {path}: check the pattern.')
        return files
    require(path)
    if os.path.isfile(path):
        return [path]
    files = sorted(glob.glob(os.path.join(glob.escape(path), '**', f'*{suffix}*'), recursive=True))
    files = [f for f in files if os.path.isfile(f)]
    if not files:
        raise FileNotFoundError(f'There is no *{suffix} file in {path}: check the path.')
    if split:
        # train.parquet, train-00000-of-00005.parquet, data-train.array_record, train/0000.parquet
        def belongs(f):
            parts = os.path.relpath(f, path).replace(os.sep, '/').split('/')
            stem = parts[-1].split('.')[0].split('-')
            return split in stem or split in parts[:-1]

        chosen = [f for f in files if belongs(f)]
        if not chosen:
            names = [os.path.relpath(f, path) for f in files]
            raise FileNotFoundError(f'No file of split {split!r} in {path}{nearest(split, names)}')
        files = chosen
    return files


class Arrays:
    """Images that are already in memory.

    Args:
      images: uint8 (N, H, W, 3) or (N, H, W), or a sequence of arrays or of encoded bytes.
      labels: int (N,) or None.
      classes: names in label order; default '0', '1', ...
    """

    def __init__(self, images, labels=None, classes=None):
        if len(images) == 0:
            raise ValueError('source=arrays got no images: `images` has length 0.')
        if labels is not None and len(labels) != len(images):
            raise ValueError(f'{len(images)} images but {len(labels)} labels: give one for each.')
        self._images = images
        self._labels = None if labels is None else np.asarray(labels, np.int32)
        self.classes = class_names(self._labels, classes)
        ends = [x if isinstance(x, bytes) else x.tobytes() for x in (images[0], images[-1])]
        self.fingerprint = fingerprint('arrays', len(images), *ends)

    def __len__(self):
        return len(self._images)

    def __getitem__(self, i):
        item = {'image': self._images[i]}
        if self._labels is not None:
            item['label'] = int(self._labels[i])
        return item

    def describe(self, i):
        return f'array {i}'


def class_names(labels, classes=None):
    """Names in label order: `classes` if given, else '0' ... 'max'; None without labels."""
    if labels is None:
        return None
    highest = int(labels.max(initial=-1))
    if classes is None:
        return tuple(str(c) for c in range(highest + 1))
    if highest >= len(classes):
        raise ValueError(
            f'Label {highest} has no name: there are {len(classes)} class names, '
            f'{highest + 1} or more are needed.'
        )
    return tuple(str(c) for c in classes)


def read_class_names(file):
    """The lines of `classes.txt` beside `file`, or None if there is none."""
    path = os.path.join(os.path.dirname(file), 'classes.txt')
    if not os.path.exists(path):
        return None
    with open(path, encoding='utf-8') as f:
        return [line.strip() for line in f if line.strip()]


class Folder:
    """A folder of images, flat or nested, local or gs://, with or without class folders.

    If all images lie in two or more subfolders, the first folder level gives the labels, in sorted
    order; otherwise there are none.  Files with other extensions are ignored and counted in
    `ignored`.  The order is that of the relative names as bytes and so the same on every machine.

    Args:
      path: the folder.
      split: a subfolder of it, e.g. 'train'.
      segmentation: a folder with index maps (PNG) under the same relative names.
      classes: names of the classes (of the index maps, if `segmentation` is given).
    """

    def __init__(self, path, split=None, segmentation=None, classes=None):
        path = os.fspath(path)
        self._remote = '://' in path
        join = _join_remote if self._remote else os.path.join
        self.path = join(path, split) if split else path
        if self._remote:
            self._files, self.ignored = _list_remote(self.path)
        else:
            require(self.path)
            self._files, self.ignored = _list_local(self.path)
        if not self._files and self.ignored:
            raise FileNotFoundError(
                f'None of the {self.ignored} files in {printable(self.path)} is an image: '
                f'give a folder with {", ".join(EXTENSIONS[:6])}, ... files.'
            )
        if not self._files:
            raise FileNotFoundError(
                f'The folder {printable(self.path)} is empty: give a folder with images.'
            )
        self._labels, self.classes = None, None
        folders = [f.split('/', 1)[0] if '/' in f else None for f in self._files]
        names = sorted(set(folders) - {None}, key=os.fsencode)
        if len(names) > 1 and None not in folders:
            index = {name: i for i, name in enumerate(names)}
            self._labels = np.array([index[f] for f in folders], np.int32)
            self.classes = tuple(printable(n) for n in names)
        self._segmentation = None
        if segmentation:
            self._segmentation = join(segmentation, split) if split else segmentation
            require(self._segmentation)
        if classes is not None:
            self.classes = tuple(str(c) for c in classes)
            if self._labels is not None:
                self.classes = class_names(self._labels, classes)
        self.fingerprint = fingerprint('folder', *self._files)

    def __len__(self):
        return len(self._files)

    def _locate(self, i):
        if self._remote:
            return _join_remote(self.path, self._files[i])
        return os.path.join(self.path, self._files[i])

    def __getitem__(self, i):
        item = {'image': read_bytes(self._locate(i))}
        if self._labels is not None:
            item['label'] = int(self._labels[i])
        if self._segmentation:
            import cv2

            path = os.path.join(self._segmentation, os.path.splitext(self._files[i])[0] + '.png')
            item['segmentation'] = cv2.imread(path, cv2.IMREAD_UNCHANGED)
            if item['segmentation'] is None:
                raise FileNotFoundError(f'{printable(path)} is missing or no PNG: add the map.')
        return item

    def describe(self, i):
        return printable(self._locate(i))


def read_bytes(path):
    """The content of a local or remote file."""
    if '://' in path:
        from etils import epath

        return epath.Path(path).read_bytes()
    with open(path, 'rb') as f:
        return f.read()


def _is_empty(value):
    return isinstance(value, str) and not value


def _join_remote(path, name):
    return f'{path.rstrip("/")}/{name}'


def _is_image(name):
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith('._')


def _list_local(root):
    """Relative names with '/', sorted as bytes, and the number of files ignored.

    Follows symbolic links, each folder once: loops end, and nothing is listed twice through them.
    """
    files, ignored, seen, stack = [], 0, set(), ['']
    while stack:
        prefix = stack.pop()
        here = os.path.join(root, prefix)
        stat = os.stat(here)
        if (stat.st_dev, stat.st_ino) in seen:
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders = []
        with os.scandir(here) as entries:
            for entry in entries:
                name = f'{prefix}{entry.name}'
                if entry.is_dir():
                    folders.append(name + '/')
                elif _is_image(entry.name) and entry.is_file():
                    files.append(name)
                else:
                    ignored += 1
        # Reverse, because the stack hands out the last first: which of two links to one folder
        # counts must not depend on the order in which the file system lists them.
        stack.extend(sorted(folders, key=os.fsencode, reverse=True))
    return sorted(files, key=os.fsencode), ignored


def _list_remote(root):
    from etils import epath

    base = epath.Path(root)
    if not base.exists():
        raise FileNotFoundError(f'{root} does not exist: check the bucket, the path and the login.')
    files, ignored = [], 0
    for folder, _, names in base.walk():
        prefix = os.fspath(folder)[len(os.fspath(base)) :].strip('/')
        for name in names:
            if _is_image(name):
                files.append(f'{prefix}/{name}' if prefix else name)
            else:
                ignored += 1
    return sorted(files, key=os.fsencode), ignored
