# SPDX-License-Identifier: Apache-2.0
"""Folders of steps below a directory of checkpoints: listed, set aside, deleted.

A step counts once its `COMMIT` exists. On a disk Orbax fills ``<step>.orbax-checkpoint-tmp`` and
renames it; in a bucket, where nothing can be renamed, it fills ``<step>`` and writes `COMMIT` last,
and here `COMMIT` is deleted first. So a kill at any instant leaves no half a checkpoint that looks
complete.
"""

import concurrent.futures
import contextlib
import os
import re
import shutil

from etils import epath

from ssl_jax.run import bucket, launch, patience, storage

COMMIT = 'commit_success.txt'
PARTIAL = re.compile(r'\d+\.orbax-checkpoint-tmp')
BIN = 'deleting'  # what is deleted on a disk gets this name first
AT_ONCE = 16  # folders listed at a time


def names(folder: epath.PathLike) -> list[str]:
    """Names in a folder, sorted; [] if there is none.

    Raises:
      Unavailable: it cannot be listed, which says nothing about what it holds.
    """
    if storage.is_remote(folder):  # `gcs` is patient itself
        return storage.names(folder)
    return patience.patiently(
        f'the folder {folder}', lambda: storage.names(folder), 'nothing was changed'
    )


def scan(directory: epath.PathLike) -> dict[int, bool]:
    """{step: whether it is committed}, ascending; one listing per step."""
    found = sorted(int(name) for name in names(directory) if name.isdecimal())
    if not found:
        return {}
    with concurrent.futures.ThreadPoolExecutor(min(AT_ONCE, len(found))) as pool:
        inside = pool.map(lambda step: names(f'{os.fspath(directory)}/{step}'), found)
        return {step: COMMIT in inner for step, inner in zip(found, inside, strict=True)}


def probe(path: epath.PathLike) -> None:
    """Opens each file of a step on a disk, and raises what prevents it.

    For libraries that ask whether a file exists and take any error for a no. Nothing to do in a
    bucket, where an outage is no such answer.
    """
    if storage.is_remote(path):
        return

    def opened(file):
        with contextlib.suppress(FileNotFoundError), open(file, 'rb') as found:
            found.read(1)

    for folder, _, files in os.walk(path, onerror=_raise):
        for name in files:
            opened(os.path.join(folder, name))


def _raise(error):
    raise error


def set_aside(path: epath.Path) -> None:
    """Renames a step to ``<step>.damaged``; in a bucket the service copies it, which is quick."""
    name = f'{path.name}.damaged'
    count = sum(other.startswith(name) for other in names(path.parent))
    target = path.parent / f'{name}{count or ""}'
    if storage.is_remote(path):
        bucket.copy(path, target)
        bucket.remove_folder(path, first=COMMIT)
    else:
        path.rename(target)
    launch.log(f'Moved the damaged {path} to {target.name}.')


def delete(path: epath.Path) -> None:
    """Deletes a step."""
    if storage.is_remote(path):
        return bucket.remove_folder(path, first=COMMIT)
    gone = path.parent / f'{BIN}-{path.name}'
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone)


def sweep(directory: epath.Path) -> None:
    """Deletes what killed saves and deletions left; only for the run that holds the workdir.

    On a disk a step without `COMMIT` is none of these, but perhaps half of a copy: it stays.
    """
    found = names(directory)
    left = [name for name in found if name.startswith(BIN) or PARTIAL.match(name)]
    if storage.is_remote(directory):
        left += [str(step) for step, committed in scan(directory).items() if not committed]
    for name in left:
        path = directory / name
        if storage.is_remote(path):
            bucket.remove_folder(path)
        else:
            shutil.rmtree(path)
