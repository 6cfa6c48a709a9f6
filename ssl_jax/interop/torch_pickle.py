# SPDX-License-Identifier: Apache-2.0
"""Reader of the `.pth` and `.pt` files of torch.save, without torch and without running their code.

Such a file is a zip archive: a pickle, `data.pkl`, that says how the tensors nest, and one
uncompressed member per storage. A pickle is a program: it can name any Python function and call it,
and without a call it can still take for ever, since the hash of a tuple of tuples takes a time
exponential in its bytes. So the few operations that files of tensors need are carried out here, one
by one and up to a limit; what they can name is listed below, and nothing of it runs. Tensors stay
in the file, mapped into memory, until they are read.

One reader for all files, with torch installed or not: errors and numbers do not depend on what else
is installed, and torch itself refuses the official MAE files, whose training options are an
argparse.Namespace.
"""

import dataclasses
import math
import os
import pathlib
import pickletools
import zipfile
from typing import Any

import ml_dtypes
import numpy as np

from ssl_jax.interop import stored
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
# Limits, so that no file costs much more than a second before it is refused.
PICKLE_BYTES = 8 << 20
PICKLE_STEPS = 400_000  # a tensor takes 32
# Operations that put their argument on the stack. Not LONG4: numbers of any size.
VALUES = {
    *('INT', 'BININT', 'BININT1', 'BININT2', 'LONG', 'LONG1', 'FLOAT', 'BINFLOAT'),
    *('STRING', 'BINSTRING', 'SHORT_BINSTRING', 'UNICODE', 'BINUNICODE', 'SHORT_BINUNICODE'),
    *('BINUNICODE8', 'BINBYTES', 'SHORT_BINBYTES', 'BINBYTES8'),
}
# Keys that need no care: hashed at once, and an attacker does not choose which are equal.
KEYS = (str, bytes, bool, type(None))
# What training scripts save beside the weights; read as an object that holds nothing.
IGNORED = (
    *('argparse.Namespace', 'types.SimpleNamespace', 'yacs.config.CfgNode'),
    *('collections.Counter', 'collections.defaultdict', '__builtin__.set', 'builtins.set'),
    *('pathlib.PosixPath', 'pathlib.PurePosixPath', 'pathlib.WindowsPath'),
    *('numpy.dtype', 'numpy.core.multiarray.scalar', 'numpy._core.multiarray.scalar'),
    *('torch.Size', 'torch.device', '_codecs.encode'),
)


class Refused(errors.UserError):
    """The file asks for more than tensors."""


class _Ignored:
    """What is read as an object that holds nothing."""


class Opaque:
    """A key of a dict that is neither text nor a small number."""


_NOTHING = _Ignored()


@dataclasses.dataclass(frozen=True)
class _Storage:
    dtype: np.dtype
    start: int
    count: int


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
    if order is not None and (order[1] != 6 or _map(path, *order).tobytes() != b'little'):
        raise errors.UserError(
            f'{path} was saved by a big-endian machine; load it in PyTorch and save it again.'
        )
    start, size = members[pickles[0]]
    if size > PICKLE_BYTES:
        raise Refused(
            f'{path} describes its tensors in {size:,} bytes, more than the {PICKLE_BYTES:,} that '
            f'are read; save the state_dict() of the model alone.'
        )
    try:
        return _run(path, root, members, _map(path, start, size).tobytes())
    except Refused:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise errors.UserError(
            f'{path} cannot be read ({type(error).__name__}: {stored.show(error)}); it may be '
            f'truncated, so download or copy it again.'
        ) from error


def _members(path):
    """{name: (offset, bytes)} of a zip archive of uncompressed members."""
    try:
        with stored.open_zip(path) as archive, open(path, 'rb') as file:
            members, end = {}, os.path.getsize(path)
            if any(name.endswith('/constants.pkl') for name in archive.namelist()):
                raise Refused(
                    f'{path} is a TorchScript program, not weights alone; load it in PyTorch and '
                    f'save its state_dict() as safetensors.'
                )
            for info in archive.infolist():
                if info.compress_type != zipfile.ZIP_STORED:
                    raise Refused(
                        f'{path} has a compressed member {stored.show(info.filename)}, which '
                        f'torch.save never writes; save the weights again in PyTorch.'
                    )
                # The local header is padded differently from the one in the directory.
                file.seek(max(0, info.header_offset) + 26)
                name, extra = (int.from_bytes(file.read(2), 'little') for _ in range(2))
                start = info.header_offset + 30 + name + extra
                if not 0 <= info.header_offset <= start + info.file_size <= end:
                    raise zipfile.BadZipFile(f'{stored.show(info.filename)} ends after the file')
                members[info.filename] = (start, info.file_size)
            return members
    except (zipfile.BadZipFile, OverflowError) as error:
        raise errors.UserError(
            f'{path} is damaged or truncated ({stored.show(error).lower()}); download or copy '
            f'it again.'
        ) from error


def _map(path, start, size):
    """Bytes of a file, read when they are used."""
    return np.memmap(path, np.uint8, 'r', start, (size,)) if size else np.empty(0, np.uint8)


def _run(path, root, members, data):
    """What a pickle makes of nested dicts, lists and tensors."""
    file_size = os.path.getsize(path)

    def rebuild_tensor(storage, offset, shape, stride, *ignored):
        if not isinstance(storage, _Storage):
            raise TypeError('a tensor without a storage')
        dtype, most = storage.dtype, stored.DIMENSIONS
        numbers = (offset, *shape[:most], *stride[:most])
        if not all(type(x) is int and 0 <= x < 2**62 for x in numbers):
            raise ValueError('a tensor of a negative or huge size')
        stored.check_shape(shape, dtype, file_size)
        last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
        if math.prod(shape) and last >= storage.count:
            raise ValueError(f'a tensor {shape} of a storage of {storage.count} numbers')

        def read():
            if not math.prod(shape):
                return np.empty(shape, dtype)
            flat = _map(path, storage.start, (last + 1) * dtype.itemsize).view(dtype)[offset:]
            steps = [s * dtype.itemsize for s in stride]
            return np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False)

        return stored.Stored(shape, dtype, read)

    def rebuild_parameter(data, *ignored):
        return data

    def ignore(*ignored):
        return _NOTHING

    known = {
        'collections.OrderedDict': lambda: {},
        'torch._utils._rebuild_tensor': rebuild_tensor,
        'torch._utils._rebuild_tensor_v2': rebuild_tensor,
        'torch._utils._rebuild_parameter': rebuild_parameter,
        'torch._utils._rebuild_parameter_with_state': rebuild_parameter,
        **dict.fromkeys(IGNORED, ignore),
        **{name: name for name in (*STORAGES, *(f'torch.{dtype}' for _, dtype, _ in DTYPES))},
    }

    def find(module, name):
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError('a function without a name')
        if f'{module}.{name}' not in known:
            raise Refused(
                f'{path} holds {stored.show(f"{module}.{name}")}, which is Python code and not '
                f'a tensor; none of it was run. Load the file where you trust it and save the '
                f'state_dict() of the model as safetensors.'
            )
        return known[f'{module}.{name}']

    def call(function, arguments):
        if not isinstance(arguments, tuple) or len(arguments) > stored.DIMENSIONS:
            raise TypeError('a call with too many arguments')
        return function(*arguments)  # one of `known`, or not callable

    def storage(pid):
        kind, dtype, name, _, count = pid
        plain = isinstance(dtype, str) and isinstance(name, str) and type(count) is int
        if not plain or kind != 'storage' or dtype not in STORAGES:
            raise ValueError('unknown storage')
        start, size = members[f'{root}data/{stored.show(name)}']
        if not 0 <= count * STORAGES[dtype].itemsize <= size:
            raise ValueError(f'storage {stored.show(name)} has {size} bytes, not {count} numbers')
        return _Storage(STORAGES[dtype], start, count)

    def key(x):
        return x if type(x) in KEYS or (type(x) is int and abs(x) < 2**60) else Opaque()

    def add(container, values, kind):
        if isinstance(container, kind) and kind is list:
            container.extend(values)
        elif isinstance(container, kind):
            container.update(zip(map(key, values[::2]), values[1::2], strict=True))
        elif container is not _NOTHING:
            raise TypeError(f'a {type(container).__name__} where a {kind.__name__} was expected')

    stack, marks, memo = [], [], {}

    def since_mark():
        values = stack[marks[-1] :]
        del stack[marks.pop() :]
        return values

    for step, (opcode, value, _) in enumerate(pickletools.genops(data)):
        if step > PICKLE_STEPS:
            raise Refused(
                f'{path} takes more than {PICKLE_STEPS:,} steps to read; save the state_dict() of '
                f'the model alone.'
            )
        if opcode.name in VALUES:
            stack.append(value)
            continue
        match opcode.name:
            case 'PROTO' | 'FRAME':
                pass
            case 'BINGET' | 'LONG_BINGET' | 'GET':
                stack.append(memo[value])
            case 'BINPUT' | 'LONG_BINPUT' | 'PUT':
                memo[value] = stack[-1]
            case 'MEMOIZE':
                memo[len(memo)] = stack[-1]
            case 'MARK':
                marks.append(len(stack))
            case 'NONE' | 'NEWTRUE' | 'NEWFALSE':
                stack.append({'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False}[opcode.name])
            case 'EMPTY_DICT' | 'EMPTY_LIST' | 'EMPTY_SET' | 'EMPTY_TUPLE':
                empty = {'EMPTY_DICT': {}, 'EMPTY_LIST': [], 'EMPTY_TUPLE': ()}
                stack.append(empty.get(opcode.name, _NOTHING))
            case 'TUPLE' | 'LIST':
                values = since_mark()
                stack.append(tuple(values) if opcode.name == 'TUPLE' else values)
            case 'TUPLE1' | 'TUPLE2' | 'TUPLE3':
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case 'DICT':
                values = since_mark()
                stack.append({})
                add(stack[-1], values, dict)
            case 'FROZENSET':
                since_mark()
                stack.append(_NOTHING)
            case 'SETITEM' | 'APPEND':
                count = 2 if opcode.name == 'SETITEM' else 1
                values = stack[-count:]
                del stack[-count:]
                add(stack[-1], values, dict if count == 2 else list)
            case 'SETITEMS' | 'APPENDS' | 'ADDITEMS':
                values = since_mark()
                add(stack[-1], values, dict if opcode.name == 'SETITEMS' else list)
            case 'GLOBAL':
                stack.append(find(*value.split(' ', 1)))
            case 'STACK_GLOBAL':
                name = stack.pop()
                stack.append(find(stack.pop(), name))
            case 'REDUCE' | 'NEWOBJ':
                arguments = stack.pop()
                stack.append(call(stack.pop(), arguments))
            case 'BUILD' | 'POP':  # BUILD sets attributes, of which none is read
                stack.pop()
            case 'POP_MARK':
                since_mark()
            case 'DUP':
                stack.append(stack[-1])
            case 'BINPERSID':
                stack.append(storage(stack.pop()))
            case 'STOP':
                return stack.pop()
            case name:
                raise ValueError(f'operation {name}')
    raise ValueError('no end')
