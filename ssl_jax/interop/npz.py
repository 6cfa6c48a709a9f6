# SPDX-License-Identifier: Apache-2.0
"""Reader of numpy archives (`.npz`): a zip archive with one array per member."""

import contextlib
import functools
import pathlib

import numpy as np

from ssl_jax.interop import stored
from ssl_jax.run import errors

# Limits, so that no file costs much more than a second, or memory, before it is refused.
MEMBERS = 4000
# Compressed weights take 0.9 of their bytes, fresh ones less; zeros alone take 1/1000.
INFLATION = 20


def load(path: pathlib.Path) -> dict[str, stored.Stored]:
    """name -> Stored; no array is read yet.

    Raises:
      UserError: the file is damaged, or holds more than arrays of numbers and text.
    """
    out, size = {}, stored.check_file(path)
    with _sound(path), stored.open_zip(path) as archive:
        members = archive.infolist()
        total = sum(member.file_size for member in members)
        if len(members) > MEMBERS:
            raise ValueError(f'{len(members):,} members')
        if total > INFLATION * size + (1 << 20):
            raise ValueError(f'{total:,} bytes in a file of {size:,}')
        for member in members:
            name = member.filename.removesuffix('.npy')
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                header = np.lib.format.read_array_header_1_0
                if version != (1, 0):
                    header = np.lib.format.read_array_header_2_0
                shape, _, dtype = header(file)
            if dtype.hasobject or dtype.names:
                raise ValueError(f'{stored.show(name)} is {stored.show(dtype)}')
            stored.check_shape(shape, dtype, member.file_size)
            read = functools.partial(_read, path, member.filename)
            out[name] = stored.Stored(shape, dtype, read)
    return out


def _read(path, name):
    with _sound(path), stored.open_zip(path) as archive, archive.open(name) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


@contextlib.contextmanager
def _sound(path):
    """Errors of a numpy archive as a sentence: zipfile and zlib raise what they like."""
    try:
        yield
    except Exception as error:
        raise errors.UserError(
            f'{path} is damaged, or holds Python objects, which are not read '
            f'({stored.show(error)}); save plain arrays, or download it again.'
        ) from error
