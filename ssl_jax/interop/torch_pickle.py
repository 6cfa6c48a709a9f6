# SPDX-License-Identifier: Apache-2.0
"""Reader of the `.pth` and `.pt` files of torch.save, without torch and without running their code.

Such a file is a zip archive: a pickle, `data.pkl`, that says how the tensors nest, and one
uncompressed member per storage. A pickle can name any Python function and call it. Here it can name
only what is listed below, so there is nothing to run. Tensors stay in the file, mapped into memory,
until they are read.

One reader for all files, with torch installed or not: errors and numbers do not depend on what else
is installed, and torch itself refuses the official MAE files, whose training options are an
argparse.Namespace.
"""

import collections
import dataclasses
import io
import math
import os
import pathlib
import pickle
import zipfile
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from ssl_jax.run import errors

# First bytes of files of torch before 1.6, a row of bare pickles.
LEGACY = b'\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.'

# Storage in torch, dtype in torch, dtype in safetensors: dtype in numpy, little-endian.
DTYPES = {
    ('BFloat16', 'bfloat16', 'BF16'): np.dtype(ml_dtypes.bfloat16),
    ('Half', 'float16', 'F16'): np.dtype('<f2'),
    ('Float', 'float32', 'F32'): np.dtype('<f4'),
    ('Double', 'float64', 'F64'): np.dtype('<f8'),
    ('Char', 'int8', 'I8'): np.dtype('i1'),
    ('Short', 'int16', 'I16'): np.dtype('<i2'),
    ('Int', 'int32', 'I32'): np.dtype('<i4'),
    ('Long', 'int64', 'I64'): np.dtype('<i8'),
    ('Byte', 'uint8', 'U8'): np.dtype('u1'),
    ('Bool', 'bool', 'BOOL'): np.dtype('?'),
}
STORAGES = {f'torch.{name}Storage': dtype for (name, _, _), dtype in DTYPES.items()}
# What training scripts save beside the weights; read as an object that holds nothing.
IGNORED = (
    *('argparse.Namespace', 'types.SimpleNamespace', 'yacs.config.CfgNode'),
    *('collections.Counter', 'collections.defaultdict', '__builtin__.set', 'builtins.set'),
    *('pathlib.PosixPath', 'pathlib.PurePosixPath', 'pathlib.WindowsPath'),
    *('numpy.dtype', 'numpy.core.multiarray.scalar', 'numpy._core.multiarray.scalar'),
    *('torch.Size', 'torch.device', '_codecs.encode'),
)


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in its file: shape, dtype in the file, function that reads it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


class Refused(ValueError):
    """The file asks for more than tensors."""


def load(path: pathlib.Path) -> Any:
    """Content of a file of torch.save: nested dicts and lists, tensors as `Stored`.

    Raises:
      ValueError: the file is damaged, of the format before torch 1.6, or not weights alone.
    """
    members = _members(path)
    pickles = [name for name in members if name.rpartition('/')[2] == 'data.pkl']
    if len(pickles) != 1:
        raise errors.UserError(
            f'{path} is a zip archive that torch.save has not written (no data.pkl).'
        )
    root = pickles[0].removesuffix('data.pkl')
    order = members.get(f'{root}byteorder')
    if order is not None and _map(path, *order).tobytes() != b'little':
        raise errors.UserError(
            f'{path} was saved by a big-endian machine; load it in PyTorch and save it again.'
        )
    try:
        return _unpickle(path, root, members)
    except Refused:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise errors.UserError(
            f'{path} cannot be read ({type(error).__name__}: {error}); it may be truncated, so '
            f'download or copy it again.'
        ) from error


def _members(path):
    """{name: (offset, bytes)} of a zip archive of uncompressed members."""
    try:
        with zipfile.ZipFile(path) as archive, open(path, 'rb') as file:
            members = {}
            if any(name.endswith('/constants.pkl') for name in archive.namelist()):
                raise Refused(
                    f'{path} is a TorchScript program, not weights alone; load it in PyTorch and '
                    f'save its state_dict() as safetensors.'
                )
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED:
                    raise Refused(
                        f'{path} has a compressed member {info.filename!r}, which torch.save never '
                        f'writes; save the weights again in PyTorch.'
                    )
                # The local header is padded differently from the one in the directory.
                file.seek(info.header_offset + 26)
                lengths = np.frombuffer(file.read(4), '<u2')
                start = info.header_offset + 30 + int(lengths.sum())
                if start + info.file_size > os.path.getsize(path):
                    raise zipfile.BadZipFile(f'{info.filename} ends after the file')
                members[info.filename] = (start, info.file_size)
            return members
    except zipfile.BadZipFile as error:
        raise errors.UserError(
            f'{path} is damaged or truncated ({str(error).lower()}); download or copy it again.'
        ) from error


def _map(path, start, size):
    """Bytes of a file, read when they are used."""
    return np.memmap(path, np.uint8, 'r', start, (size,)) if size else np.empty(0, np.uint8)


def _unpickle(path, root, members):
    # New classes for each file: what a pickle does to their attributes ends with its reading.
    class Ignored:
        def __init__(self, *args, **kwargs):
            pass

        __setstate__ = __setitem__ = extend = __init__

    @dataclasses.dataclass(frozen=True)
    class Storage:
        dtype: np.dtype
        start: int
        count: int

    def rebuild_tensor(storage, offset, shape, stride, *ignored):
        if not isinstance(storage, Storage):
            raise TypeError('a tensor without a storage')
        dtype, shape, stride = storage.dtype, tuple(map(int, shape)), tuple(map(int, stride))
        last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        positive = all(x >= 0 for x in (offset, *shape, *stride))
        if not positive or (math.prod(shape) and last >= storage.count):
            raise ValueError(f'a tensor {shape} of a storage of {storage.count} numbers')

        def read():
            if not math.prod(shape):
                return np.empty(shape, dtype)
            flat = _map(path, storage.start, (last + 1) * dtype.itemsize).view(dtype)[offset:]
            steps = [s * dtype.itemsize for s in stride]
            return np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False)

        return Stored(shape, dtype, read)

    def rebuild_parameter(data, *ignored):
        return data

    known = {
        'collections.OrderedDict': collections.OrderedDict,
        'torch._utils._rebuild_tensor': rebuild_tensor,
        'torch._utils._rebuild_tensor_v2': rebuild_tensor,
        'torch._utils._rebuild_parameter': rebuild_parameter,
        'torch._utils._rebuild_parameter_with_state': rebuild_parameter,
        **dict.fromkeys(IGNORED, Ignored),
        **{name: name for name in (*STORAGES, *(f'torch.{dtype}' for _, dtype, _ in DTYPES))},
    }

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if f'{module}.{name}' not in known:
                raise Refused(
                    f'{path} holds {module}.{name}, which is Python code and not a tensor; none of '
                    f'it was run. Load the file where you trust it and save the state_dict() of '
                    f'the model as safetensors.'
                )
            return known[f'{module}.{name}']

        def persistent_load(self, pid):
            kind, storage, key, _, count = pid
            if kind != 'storage' or storage not in STORAGES:
                raise ValueError(f'unknown storage {storage}')
            dtype = STORAGES[storage]
            start, size = members[f'{root}data/{key}']
            if not 0 <= count * dtype.itemsize <= size:
                raise ValueError(f'storage {key} has {size} bytes, {count} {dtype} are announced')
            return Storage(dtype, start, count)

    return Unpickler(io.BytesIO(_map(path, *members[f'{root}data.pkl']).tobytes())).load()
