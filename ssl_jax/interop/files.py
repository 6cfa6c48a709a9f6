# SPDX-License-Identifier: Apache-2.0
"""Files of weights: safetensors, `.pth`, HF and timm folders, numpy archives in; safetensors out.

Reading maps the file and copies a tensor when it is asked for; 16-bit floats become float32, which
holds each of their values exactly. Writing goes tensor by tensor, so that neither holds the weights
twice. What a file wraps around its weights (`model`, `teacher`, `module.`, ...) is taken off here;
what the names then mean is the business of `layouts`.
"""

import collections.abc
import contextlib
import dataclasses
import difflib
import functools
import hashlib
import json
import math
import os
import pathlib
import shutil
import zipfile

import ml_dtypes
import numpy as np

from ssl_jax.interop import torch_pickle

WEIGHTS = 'model.safetensors'
EXTRA = 'ssl_jax_extra.safetensors'
INDEXES = ('model.safetensors.index.json', 'pytorch_model.bin.index.json')
SUFFIXES = ('.safetensors', '.pth', '.pt', '.bin', '.npz')
DTYPES = {
    'BF16': np.dtype(ml_dtypes.bfloat16),
    'F16': np.dtype('<f2'),
    'F32': np.dtype('<f4'),
    'F64': np.dtype('<f8'),
    'I8': np.dtype('i1'),
    'I16': np.dtype('<i2'),
    'I32': np.dtype('<i4'),
    'I64': np.dtype('<i8'),
    'U8': np.dtype('u1'),
    'BOOL': np.dtype('?'),
}
# Where the weights are in a training checkpoint; the first that is there is taken.
WRAPPERS = ('teacher', 'model', 'state_dict', 'student', 'module')
PREFIXES = ('module.', '_orig_mod.', 'backbone.')
OPTIMIZER = ('optimizer', 'optimizer_states', 'param_groups', 'state')


class Tensors(collections.abc.Mapping):
    """name -> numpy array; a new copy in float32 (floats) each time a name is asked for."""

    def __init__(self, stored):
        self.stored = dict(stored)  # name -> unpickle.Stored

    def __getitem__(self, name):
        x = self.stored[name].read()
        return np.array(x, np.float32 if _is_float(x.dtype) else x.dtype)

    def __iter__(self):
        return iter(self.stored)

    def __len__(self):
        return len(self.stored)

    @property
    def shapes(self):
        """name -> shape, without reading the tensors."""
        return {name: tuple(x.shape) for name, x in self.stored.items()}


@dataclasses.dataclass(frozen=True)
class File:
    """What was found at a path.

    Attributes:
      tensors: the weights, see `Tensors`; names without the wrappers of the file.
      hints: its config.json, {} if there is none.
      processor: its preprocessor_config.json, {} if there is none.
      metadata: the text in the header of a safetensors file; {} elsewhere.
      extra: tensors of the sidecar that `export` writes, {} if there is none.
      source: the path that was given.
      taken: which part of the file the weights are, such as 'teacher'; '' for all of it.
      paths: the files that were read.
    """

    tensors: Tensors
    hints: dict
    processor: dict
    metadata: dict
    extra: collections.abc.Mapping
    source: str
    taken: str
    paths: tuple

    @functools.cached_property
    def sha256(self):
        """Of the file; of several, of all of them one after the other in the order of `paths`."""
        digest = hashlib.sha256()
        for path in self.paths:
            with open(path, 'rb') as file:
                while block := file.read(2**20):
                    digest.update(block)
        return digest.hexdigest()


def read(path):
    """Opens a file or folder of weights, see the top of this file.

    Args:
      path: .safetensors, .pth, .pt, .bin or .npz; or a folder with one of them, or with shards and
        their index. A file `model.safetensors` is read with the config.json beside it.

    Returns:
      File.

    Raises:
      ValueError: one sentence; no code of the file is ever run.
    """
    if '://' in str(path):
        raise ValueError(f'{path} is not local; copy it to a disk first.')
    path = pathlib.Path(path)
    if not path.exists():
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise ValueError(f'there is nothing at {path}{_nearest(path.name, near)}')
    folder = path if path.is_dir() else path.parent if path.name == WEIGHTS else None
    paths = _files(path) if path.is_dir() else (path,)
    stored, metadata, taken = {}, {}, ''
    for p in paths:
        part, metadata, taken = _read_one(p)
        stored |= part
    if not stored:
        raise ValueError(f'{path} holds no tensors; give a file of weights.')
    stored, taken = _strip(stored, path, taken)
    sidecar = folder / EXTRA if folder else None
    extra = Tensors(_safetensors(sidecar)[0]) if sidecar and sidecar.exists() else {}
    return File(
        tensors=Tensors(stored),
        hints=_json(folder, 'config.json'),
        processor=_json(folder, 'preprocessor_config.json'),
        metadata=metadata,
        extra=extra,
        source=str(path),
        taken=taken,
        paths=tuple(paths),
    )


def write(path, tensors, metadata=None, dtype='float32'):
    """Writes a safetensors file tensor by tensor; besides one of them nothing is copied.

    Args:
      path: of the file.
      tensors: name -> numpy array, contiguous or not; float32 arrays are written as `dtype`.
      metadata: str -> str for the header.
      dtype: 'float32' or 'bfloat16' (rounded to nearest even).

    Returns:
      The number of bytes of the tensors.
    """
    names = {v: k for k, v in DTYPES.items()}
    target = {'float32': DTYPES['F32'], 'bfloat16': DTYPES['BF16']}[dtype]
    header, end = {'__metadata__': dict(metadata or {})}, 0
    for name, x in tensors.items():
        kind = target if x.dtype == np.float32 else x.dtype
        start, end = end, end + math.prod(x.shape) * kind.itemsize
        header[name] = dict(dtype=names[kind], shape=list(x.shape), data_offsets=[start, end])
    text = json.dumps(header, separators=(',', ':')).encode()
    text += b' ' * (-len(text) % 8)  # readers map the data, which should begin aligned
    with open(path, 'wb') as file:
        file.write(len(text).to_bytes(8, 'little') + text)
        for name, x in tensors.items():
            x = np.ascontiguousarray(x, DTYPES[header[name]['dtype']])
            file.write(x.reshape(-1).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())
    return end


@contextlib.contextmanager
def staged(target):
    """``with staged(DIR) as folder:`` fill `folder`; it becomes DIR as a whole, or not at all.

    What was at DIR is replaced; if the block or the move fails it is as it was before.
    """
    target = pathlib.Path(os.path.abspath(target))
    partial = target.parent / f'.{target.name}.{os.getpid()}.partial'
    old = target.parent / f'.{target.name}.{os.getpid()}.old'
    partial.mkdir(parents=True)
    try:
        yield partial
        if target.exists():
            target.rename(old)
        try:
            partial.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _files(folder):
    """The files of weights in a folder."""
    if (folder / WEIGHTS).exists():
        return (folder / WEIGHTS,)
    for index in INDEXES:
        if (folder / index).exists():
            try:
                names = sorted(set(_json(folder, index)['weight_map'].values()))
            except (KeyError, AttributeError, TypeError) as error:
                raise ValueError(f'{folder / index} has no weight_map; download it again.') from (
                    error
                )
            absent = [n for n in names if not (folder / n).exists()]
            if absent:
                raise ValueError(f'{folder} lacks the shard {absent[0]} that {index} names.')
            return tuple(folder / n for n in names)
    found = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.name != EXTRA)
    if len(found) == 1:
        return tuple(found)
    if found:
        names = ', '.join(p.name for p in found[:5])
        raise ValueError(f'{folder} holds several files of weights ({names}); give one of them.')
    raise ValueError(
        f'{folder} holds neither a run nor weights ({WEIGHTS}, or one file of '
        f'{", ".join(SUFFIXES)}).'
    )


def _read_one(path):
    """(name -> Stored, metadata, taken) of one file, known by its first bytes."""
    with open(path, 'rb') as file:
        start = file.read(16)
    if start.startswith(torch_pickle.LEGACY):
        raise ValueError(
            f'{path} has the format of torch before 1.6; in PyTorch, where you trust the file, '
            f'write it anew: torch.save(torch.load({path.name!r}, weights_only=False), '
            f"'new.pth')."
        )
    if path.suffix == '.npz':
        return _npz(path), {}, ''
    if start.startswith(b'PK'):
        stored, taken = _unwrap(torch_pickle.load(path), path)
        return stored, {}, taken
    if path.suffix == '.safetensors' or start[8:9] == b'{':
        return *_safetensors(path), ''
    raise ValueError(
        f'{path} is neither safetensors nor a file of torch.save (nor a .npz), or it is damaged; '
        f'download it again.'
    )


def _safetensors(path):
    """(name -> Stored, metadata).

    The format: 8 bytes, the length n of the header; n bytes of JSON, name -> dtype, shape and the
    first and last byte in what follows; the tensors.
    """
    size = os.path.getsize(path)

    def damaged(why):
        return ValueError(f'{path} is damaged or truncated ({why}); download or copy it again.')

    with open(path, 'rb') as file:
        length = int.from_bytes(file.read(8), 'little')
        if size < 8 + length:
            raise damaged(f'its header has {length} bytes, the file {size}')
        try:
            header = dict(json.loads(file.read(length)))
        except (ValueError, TypeError) as error:
            raise damaged('its header is not JSON') from error
    metadata = header.pop('__metadata__', {})
    stored, start = {}, 8 + length
    for name, entry in header.items():
        try:
            kind, shape = entry['dtype'], tuple(map(int, entry['shape']))
            first, last = map(int, entry['data_offsets'])
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(f'{name} is described as {entry}') from error
        if kind not in DTYPES:
            raise ValueError(
                f'{path} holds {name} as {kind}, which is not read; known: {", ".join(DTYPES)}.'
            )
        if start + last > size:
            raise damaged(f'{name} ends at byte {start + last} of {size}')
        num_bytes = math.prod(shape) * DTYPES[kind].itemsize
        if min(*shape, first, 0) < 0 or last - first != num_bytes:
            raise damaged(f'{name} has {last - first} bytes for the shape {shape}')
        stored[name] = torch_pickle.mapped(path, start + first, shape, DTYPES[kind])
    return stored, metadata


def _npz(path):
    """name -> Stored of a numpy archive; it is read whole."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f'{path} is damaged, or holds Python objects, which are not read ({error}); save '
            f'plain arrays.'
        ) from error
    return {k: torch_pickle.Stored(x.shape, x.dtype, lambda x=x: x) for k, x in arrays.items()}


def _unwrap(tree, path, taken=()):
    """(name -> Stored, which part) of what torch.load would return."""
    if not isinstance(tree, dict):
        raise ValueError(
            f'{path} holds a {type(tree).__name__} and no weights by name; save the state_dict() '
            f'of the model.'
        )
    stored = {k: v for k, v in tree.items() if isinstance(v, torch_pickle.Stored)}
    inner = next((k for k in WRAPPERS if isinstance(tree.get(k), dict)), None)
    if inner and len(taken) < 3:
        return _unwrap(tree[inner], path, (*taken, inner))
    if stored:
        return {str(k): v for k, v in stored.items()}, '/'.join(taken)
    keys = [str(k) for k in tree]
    if any(k in OPTIMIZER for k in keys):
        raise ValueError(
            f'{path} holds the state of an optimizer ({", ".join(keys[:5])}) and no weights; give '
            f'the checkpoint of the model, which has a part {" or ".join(map(repr, WRAPPERS))}.'
        )
    listed = f'its keys are {", ".join(keys[:5])}' if keys else 'it is empty'
    raise ValueError(
        f'{path} holds no tensors: {listed}; the weights are looked for at the top and in '
        f'{", ".join(WRAPPERS)}.'
    )


def _strip(stored, path, taken):
    """(name -> Stored, which part) without what training wraps around the model."""
    out = {name.replace('_fsdp_wrapped_module.', ''): x for name, x in stored.items()}
    flat = next((name for name in out if '_flat_param' in name), None)
    if flat:
        raise ValueError(
            f'{path} is the part of one process of an FSDP run ({flat}); gather the full state '
            f'dict there and save that.'
        )
    for part in ('teacher', 'student'):  # side by side in one dict: the first of them
        mine = {k.removeprefix(f'{part}.'): x for k, x in out.items() if k.startswith(f'{part}.')}
        if mine:
            out, taken = mine, f'{taken}/{part}'.lstrip('/')
            break
    for prefix in PREFIXES:
        if any(name.startswith(prefix) for name in out):
            new = {name.removeprefix(prefix): x for name, x in out.items()}
            if len(new) < len(out):
                raise ValueError(
                    f'{path} has names with and without {prefix!r} that become the same; keep one '
                    f'of the two sets.'
                )
            out = new
    return out, taken


def _json(folder, name):
    """A JSON object of a folder, {} if there is no such file."""
    if folder is None or not (folder / name).exists():
        return {}
    try:
        return dict(json.loads((folder / name).read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f'{folder / name} is not a JSON object; download it again.') from error


def _is_float(dtype):
    return dtype == DTYPES['BF16'] or dtype.kind == 'f'


def _nearest(name, names):
    near = difflib.get_close_matches(name, names, n=1)
    return f'; did you mean {near[0]}?' if near else '.'
