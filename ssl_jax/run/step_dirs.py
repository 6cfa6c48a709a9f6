# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints a directory holds: one folder per step, complete once its marker exists."""

import errno
import os
import re

import jax
from etils import epath

COMMIT = 'commit_success.txt'


def steps(directory):
    """The committed steps below `directory`, ascending."""
    return [s for s in _all_steps(directory) if (epath.Path(directory) / str(s) / COMMIT).exists()]


def uncommitted(directory):
    """The steps below `directory` that were begun and not finished, or copied in part."""
    return sorted({*_all_steps(directory)} - {*steps(directory)})


def _all_steps(directory):
    directory = epath.Path(directory)
    names = (p.name for p in directory.iterdir()) if directory.exists() else ()
    return sorted(int(n) for n in names if n.isdigit())


def set_aside(directory, steps):
    """Renames damaged or uncommitted checkpoints to ``<step>.damaged``; deletes remote ones."""
    for path in (directory / str(s) for s in steps):
        if jax.process_index() != 0 or not path.exists():
            continue
        if is_remote(path):
            path.rmtree()
        else:
            count = sum(p.name.startswith(f'{path.name}.dam') for p in directory.iterdir())
            path.rename(f'{path}.damaged{count or ""}')
            print(f'Moved the damaged {path} to {path}.damaged{count or ""}.', flush=True)


def remove_leftovers(directory):
    """Deletes what a killed save left; only a run that saves here may, a reader may not."""
    if jax.process_index() == 0 and directory.exists():
        for path in directory.iterdir():
            if path.name.startswith('deleting-') or '.orbax-checkpoint-tmp' in path.name:
                path.rmtree()


def delete(paths):
    """Removes checkpoints such that none looks complete while it is being removed."""
    for path in paths:
        try:
            if is_remote(path):
                (path / COMMIT).unlink()
            else:
                path = path.rename(path.parent / f'deleting-{path.name}')
            path.rmtree()
        except OSError as e:
            print(f'The old checkpoint {path} could not be deleted: {e}.', flush=True)


def absolute(path):
    """The path as Orbax wants it: local ones absolute, those in buckets as they are."""
    return epath.Path(path if is_remote(path) else os.path.abspath(path))


def is_remote(path):
    """Whether the path is in a bucket, where nothing is renamed and files appear whole."""
    return '://' in str(path)


def reason(error):
    """One line for an exception of Orbax or TensorStore, with the errno if there is one."""
    e = deepest = error
    while deepest.__cause__ is not None:
        deepest = deepest.__cause__
    while e is not None:
        found = re.search(r"os_error_code='(\d+)'", str(e))
        code = getattr(e, 'errno', None) or (int(found[1]) if found else None)
        if code:
            where = f' at {e.filename}' if getattr(e, 'filename', None) else ''
            return f'{os.strerror(code)} (errno {code}, {errno.errorcode.get(code, "?")}){where}'
        e = e.__cause__ or e.__context__
    return f'{type(deepest).__name__}: {" ".join(str(deepest).split())[:300]}'
