# SPDX-License-Identifier: Apache-2.0
"""Files of weights: safetensors, `.pth`, HF and timm folders, numpy archives in; safetensors out.

A tensor is read when it is asked for; 16-bit floats become float32, which holds each of their
values exactly. Writing goes tensor by tensor, so neither holds the weights twice: `save_file` of
safetensors needs all tensors contiguous at once, and most of ours are transposed views. What a file
wraps around its weights (`model`, `teacher`, `module.`, ...) is taken off here; what the names then
mean is up to `layouts`.
"""

import collections.abc
import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import tempfile
import weakref

import numpy as np
import safetensors

from ssl_jax.interop import npz, torch_pickle
from ssl_jax.interop import stored as stored_lib
from ssl_jax.run import errors, hashing, storage

WEIGHTS = 'model.safetensors'
EXTRA = 'ssl_jax_extra.safetensors'
# Limits, so that no file costs much more than a second, or memory, before it is refused.
JSON_BYTES = 4 << 20
HEADER_BYTES = 2 << 20  # of safetensors: room for 20,000 tensors
SHARDS = 1000
INDEXES = ('model.safetensors.index.json', 'pytorch_model.bin.index.json')
SUFFIXES = ('.safetensors', '.pth', '.pt', '.bin', '.npz')
DTYPES = {name: dtype for (_, _, name), dtype in torch_pickle.DTYPES.items()}
# Where the weights are in a training checkpoint; the first that is there is taken.
WRAPPERS = (
    *('target_encoder', 'teacher', 'model', 'state_dict', 'student', 'module'),
    *('model_ema', 'state_dict_ema', 'ema'),
)
# Parts that belong to the weights in another, with names that differ from theirs.
BESIDE = {'target_encoder': ('predictor',)}
PREFIXES = ('module.', '_orig_mod.', 'backbone.')
OPTIMIZER = ('optimizer', 'optimizer_states', 'param_groups', 'state')


class Tensors(collections.abc.Mapping):
    """name -> numpy array; a new copy in float32 (floats) each time a name is asked for."""

    def __init__(self, stored: dict[str, stored_lib.Stored]):
        self.stored = stored

    def __getitem__(self, name):
        x = self.stored[name].read()
        is_float = x.dtype == DTYPES['BF16'] or x.dtype.kind == 'f'
        return np.array(x, np.float32 if is_float else x.dtype)

    def __iter__(self):
        return iter(self.stored)

    def __len__(self):
        return len(self.stored)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """name -> shape, without reading the tensors."""
        return {name: tuple(x.shape) for name, x in self.stored.items()}


@dataclasses.dataclass(frozen=True)
class File:
    """Content of a file or folder of weights."""

    tensors: Tensors  # the weights; names without the wrappers of the file
    hints: dict  # its config.json, {} if there is none
    processor: dict  # its preprocessor_config.json, {} if there is none
    metadata: dict[str, str]  # text in the header of a safetensors file; {} elsewhere
    # Tensors of the sidecar that `export` writes, {} if there is none.
    extra: collections.abc.Mapping
    source: str  # the path that was given
    taken: str  # part of the file that the weights are, such as 'teacher'; '' for all of it
    paths: tuple[pathlib.Path, ...]  # the files that were read
    others: tuple[str, ...] = ()  # parts of the file that hold tensors too

    @property
    def sha256(self) -> str:
        """SHA-256 of the files, one after the other in the order of `paths`."""
        return hashing.sha256(self.paths)


def read(path, part: str = '') -> File:
    """Opens a file or folder of weights.

    Args:
      path: .safetensors, .pth, .pt, .bin or .npz; or a folder with one of them, or with shards and
        their index. A file `model.safetensors` is read with the config.json beside it. What is in a
        bucket is copied to a temporary folder, for as long as its tensors are in use.
      part: of a training checkpoint, by the name that it has there, such as 'state_dict_ema';
        default the first of WRAPPERS that is there.

    Raises:
      ValueError: one sentence; no code of the file is ever run.
    """
    if storage.is_remote(path):
        return _read_remote(str(path).rstrip('/'), part)
    path = pathlib.Path(path)
    if not path.exists():
        names = (p.name for p in path.parent.iterdir()) if path.parent.is_dir() else ()
        beside = list(itertools.islice(names, 1000))
        near = errors.close(path.name, beside)
        raise errors.UserError(
            f'there is nothing at {path}{f"; did you mean {near[0]}?" if near else "."}'
        )
    folder = path if path.is_dir() else path.parent if path.name == WEIGHTS else None
    paths = _files(path) if path.is_dir() else (path,)
    stored, metadata, taken, others = {}, {}, '', ()
    for p in paths:
        tensors, metadata, taken, others = _read_one(p, part)
        stored |= tensors
    if not stored:
        raise errors.UserError(f'{path} holds no tensors; give a file of weights.')
    stored, taken, others = _strip(stored, path, taken, others, part)
    sidecar = folder / EXTRA if folder else None
    return File(
        tensors=Tensors(stored),
        hints=_json(folder, 'config.json'),
        processor=_json(folder, 'preprocessor_config.json'),
        metadata=metadata,
        extra=Tensors(_safetensors(sidecar)[0]) if sidecar and sidecar.exists() else {},
        source=str(path),
        taken=taken,
        paths=paths,
        others=others,
    )


def _read_remote(path, part):
    """`read` of what is in a bucket; copies JSON and those files of weights that are chosen."""
    copy, folder = tempfile.TemporaryDirectory(prefix='ssl_jax_'), path
    here = local = pathlib.Path(copy.name)
    storage.mirror(folder, here)
    if not any(here.iterdir()):
        folder, _, name = path.rpartition('/')
        local = here / name
        storage.mirror(folder, here, lambda x: x == name or (name == WEIGHTS and _is_beside(x)))
    try:
        for p in here.iterdir():
            if _is_beside(p.name) and (p.suffix != '.json' or p.stat().st_size <= JSON_BYTES):
                storage.fetch(folder, p)
        if local.exists():
            for p in _files(local) if local.is_dir() else (local,):
                storage.fetch(folder, p)
        found = read(local, part)
    except ValueError as error:
        raise errors.UserError(str(error).replace(str(here), folder)) from error
    weakref.finalize(found.tensors, copy.cleanup)
    return dataclasses.replace(found, source=path)


def _is_beside(name):
    """Whether a file is read besides the weights."""
    return name.endswith('.json') or name == EXTRA


def write(
    path,
    tensors: collections.abc.Mapping,
    metadata: dict[str, str] | None = None,
    dtype: str = 'float32',
) -> None:
    """Writes a safetensors file; no more than one tensor is copied at a time.

    Args:
      path: of the file.
      tensors: name -> numpy array, contiguous or not; float32 arrays are written as `dtype`.
      metadata: for the header.
      dtype: 'float32' or 'bfloat16' (rounded to nearest even).
    """
    names = {v: k for k, v in DTYPES.items()}
    target = {'float32': DTYPES['F32'], 'bfloat16': DTYPES['BF16']}[dtype]
    header, end = {'__metadata__': metadata or {}}, 0
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


def _files(folder):
    """Files of weights in a folder."""
    if (folder / WEIGHTS).exists():
        return (folder / WEIGHTS,)
    for index in (folder / name for name in INDEXES):
        if not index.exists():
            continue
        shards = _json(folder, index.name).get('weight_map')
        if not isinstance(shards, dict) or not shards:
            raise errors.UserError(f'{index} has no weight_map; download it again.')
        paths = tuple(folder / name for name in sorted({_shard(index, x) for x in shards.values()}))
        if len(paths) > SHARDS:
            raise errors.UserError(
                f'{index} names {len(paths):,} shards, more than the {SHARDS:,} that are read; '
                f'download it again.'
            )
        if absent := [p.name for p in paths if not p.exists()]:
            raise errors.UserError(f'{folder} lacks the shard {absent[0]} that {index.name} names.')
        return paths
    paths = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.name != EXTRA)
    if not paths:
        raise errors.UserError(
            f'{folder} holds neither a run nor weights ({WEIGHTS}, or one file of '
            f'{", ".join(SUFFIXES)}).'
        )
    if len(paths) > 1:
        names = ', '.join(p.name for p in paths[:5])
        raise errors.UserError(
            f'{folder} holds several files of weights ({names}); give one of them.'
        )
    return tuple(paths)


def _shard(index, name):
    """The name of a file beside the index: a path could lead out of the folder."""
    text = name if isinstance(name, str) else ''
    plain = text == os.path.basename(text) and text.isprintable()
    if not plain or not text.endswith(SUFFIXES):
        raise errors.UserError(
            f'{index} names the shard {stored_lib.show(name)!r}, which is no file of weights in '
            f'the same folder; download it again.'
        )
    return text


def _read_one(path, part):
    """(name -> Stored, metadata, taken, others) of one file, known by its first bytes."""
    if not stored_lib.check_file(path):
        raise errors.UserError(f'{path} is damaged: it is empty; download or copy it again.')
    with open(path, 'rb') as file:
        start = file.read(16)
    if start.startswith(torch_pickle.LEGACY):
        raise errors.UserError(
            f'{path} has the format of torch before 1.6; in PyTorch, where you trust the file, '
            f'write it anew: torch.save(torch.load({path.name!r}, weights_only=False), '
            f"'new.pth')."
        )
    if path.suffix == '.npz':
        return npz.load(path), {}, '', ()
    if start.startswith(b'PK'):
        tree = torch_pickle.load(path)
        parts = _parts(tree)
        named = [name for name in parts if part and part in (name, name.rpartition('/')[2])]
        if named:
            stored, taken = _unwrap(parts[named[0]], path, tuple(named[0].split('/')))
        else:
            stored, taken = _unwrap(tree, path)
        used = (taken, *(() if named else BESIDE.get(taken, ())))
        others = [k for k in parts if not any(f'{x}/'.startswith(f'{k}/') for x in used)]
        return stored, {}, taken, tuple(others)
    if path.suffix == '.safetensors' or start[8:9] == b'{':
        return *_safetensors(path), '', ()
    raise errors.UserError(
        f'{path} is neither safetensors nor a file of torch.save (nor a .npz), or it is damaged; '
        f'download it again.'
    )


def _safetensors(path):
    """(name -> Stored, metadata)."""
    size = stored_lib.check_file(path)
    with open(path, 'rb') as file:
        header = int.from_bytes(file.read(8), 'little')
    if HEADER_BYTES < header < size:
        raise errors.UserError(
            f'{path} describes its tensors in {header:,} bytes, more than the {HEADER_BYTES:,} '
            f'that are read; save the weights alone.'
        )
    stored = {}
    try:
        file = safetensors.safe_open(path, 'numpy')
        for name in file.keys():  # noqa: SIM118, it is no mapping
            part = file.get_slice(name)
            kind, shape = part.get_dtype(), tuple(part.get_shape())
            if kind not in DTYPES:
                raise errors.UserError(
                    f'{path} holds {stored_lib.show(name)} as {kind}, which is not read; known: '
                    f'{", ".join(DTYPES)}.'
                )
            stored_lib.check_shape(shape, DTYPES[kind], size)
            read = functools.partial(file.get_tensor, name)
            stored[name] = stored_lib.Stored(shape, DTYPES[kind], read)
        return stored, file.metadata() or {}
    except errors.UserError:
        raise
    except (safetensors.SafetensorError, ValueError) as error:
        raise errors.UserError(
            f'{path} is damaged or truncated ({stored_lib.show(error)}); download or copy it again.'
        ) from error


def _parts(tree, prefix='', depth=3, seen=None):
    """{name: dict} of the dicts in what torch.load would return that hold several tensors."""
    found, seen = {}, {} if seen is None else seen
    for key, value in tree.items() if isinstance(tree, dict) else ():
        if isinstance(value, dict) and depth and key not in OPTIMIZER:
            name, inner = f'{prefix}{stored_lib.show(key)}', {}
            if id(value) not in seen:  # dicts that name each other make more paths than time
                seen[id(value)] = False
                inner = _parts(value, f'{name}/', depth - 1, seen)
                tensors = sum(isinstance(x, stored_lib.Stored) for x in value.values())
                seen[id(value)] = bool(inner) or tensors > 1
            if seen[id(value)]:
                found |= {name: value, **inner}
    return found


def _unwrap(tree, path, taken=()):
    """(name -> Stored, which part) of what torch.load would return."""
    if not isinstance(tree, dict):
        raise errors.UserError(
            f'{path} holds a {type(tree).__name__} and no weights by name; save the state_dict() '
            f'of the model.'
        )
    stored = {k: v for k, v in tree.items() if isinstance(v, stored_lib.Stored)}
    inner = next((k for k in WRAPPERS if isinstance(tree.get(k), dict)), None)
    if inner and len(taken) < 3:
        found, name = _unwrap(tree[inner], path, (*taken, inner))
        for part in (tree.get(k) for k in BESIDE.get(inner, ())):
            found = {**_unwrap(part, path)[0], **found} if isinstance(part, dict) else found
        return found, name
    if stored:
        return {str(k): v for k, v in stored.items()}, '/'.join(taken)
    keys = [stored_lib.show(k) for k in tree if not isinstance(k, torch_pickle.Opaque)]
    if any(k in OPTIMIZER for k in keys):
        raise errors.UserError(
            f'{path} holds the state of an optimizer ({", ".join(keys[:5])}) and no weights; give '
            f'the checkpoint of the model, which has a part {" or ".join(map(repr, WRAPPERS))}.'
        )
    listed = f'its keys are {", ".join(keys[:5])}' if keys else 'it is empty'
    raise errors.UserError(
        f'{path} holds no tensors: {listed}; the weights are looked for at the top and in '
        f'{", ".join(WRAPPERS)}.'
    )


def _strip(stored, path, taken, others, part):
    """(name -> Stored, which part, others) without what training wraps around the model."""
    out = {name.replace('_fsdp_wrapped_module.', ''): x for name, x in stored.items()}
    flat = next((name for name in out if '_flat_param' in name), None)
    if flat:
        raise errors.UserError(
            f'{path} is the part of one process of an FSDP run ({stored_lib.show(flat)}); gather '
            f'the full state dict there and save that.'
        )
    asked = part and part not in (taken, *taken.split('/'))
    # Where one dict has both, the teacher.
    for name in (part,) if asked else ('teacher', 'student'):
        inner = {k.removeprefix(f'{name}.'): x for k, x in out.items() if k.startswith(f'{name}.')}
        if inner:
            heads = {k.partition('.')[0] for k in out} & {'teacher', 'student'} - {name}
            out, taken, asked = inner, f'{taken}/{name}'.lstrip('/'), False
            others += tuple(sorted(heads))
            break
    if asked:
        known = [name for name in (*taken.split(), *others) if name]
        what = f'part={part} is not in {path}'
        if not known:
            raise errors.UserError(f'{what}, which holds one set of tensors; leave part out.')
        raise errors.UserError(f'{what}{errors.nearest(part, known)}')
    for prefix in PREFIXES:
        if any(name.startswith(prefix) for name in out):
            new = {name.removeprefix(prefix): x for name, x in out.items()}
            if len(new) < len(out):
                raise errors.UserError(
                    f'{path} has names with and without {prefix!r} that become the same; keep one '
                    f'of the two sets.'
                )
            out = new
    return out, taken, others


def _json(folder, name):
    """A JSON object of a folder, {} if there is no such file."""
    if folder is None or not (folder / name).exists():
        return {}
    size = stored_lib.check_file(folder / name)
    if size > JSON_BYTES:
        raise errors.UserError(
            f'{folder / name} has {size:,} bytes, more than the {JSON_BYTES:,} that are read; '
            f'download it again.'
        )
    try:
        found = json.loads((folder / name).read_bytes())
        if not isinstance(found, dict):
            raise TypeError(f'a {type(found).__name__}')
        return found
    except (ValueError, TypeError, RecursionError) as error:
        raise errors.UserError(
            f'{folder / name} is not a JSON object; download it again.'
        ) from error
