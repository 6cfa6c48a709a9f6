# SPDX-License-Identifier: Apache-2.0
"""Results of stages, kept: a stage whose inputs and settings did not change is not repeated.

Several processes compute the same; process 0 writes, into a folder that all can read.
"""

import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath

from ssl_jax.run import hashing, launch, peers, storage


def run(
    folder: epath.Path,
    name: str,
    key: dict[str, Any],
    compute: Callable[[], dict],
    fits: Callable[[dict], bool] = lambda arrays: True,
) -> dict[str, np.ndarray]:
    """Arrays of a stage, computed or of an earlier call.

    Args:
      folder: where they are kept, NAME.npz.
      name: of the stage.
      key: all that they depend on, for JSON.
      compute: returns them.
      fits: of the arrays of an earlier call, whether they serve, too.
    """
    path, key = folder / f'{name}.npz', json.dumps(key, sort_keys=True)
    earlier = read(path) if launch.is_main() and storage.exists(path) else {}
    if launch.main_says(str(earlier.get('key')) == key and fits(earlier)):
        launch.log(f'{name:<12} as before')
        return {k: x for k, x in read(path).items() if k != 'key'}
    peers.at(f'curating: {name}')
    launch.log(f'{name:<12} ...')
    arrays = compute()
    write(path, key=np.array(key), **arrays)
    return arrays


def read(path: epath.Path) -> dict[str, np.ndarray]:
    """The arrays that `write` wrote."""
    with np.load(path, allow_pickle=False) as file:
        return {k: file[k] for k in file.files}


def write(path: epath.Path, **arrays: np.ndarray) -> None:
    """Writes arrays as .npz, atomically, in process 0."""
    if not launch.is_main():
        return
    data = io.BytesIO()
    np.savez(data, **arrays)
    storage.atomic_write(path, data.getbuffer())


def digest(*arrays: np.ndarray) -> str:
    """Of the content of arrays, for keys."""
    return hashing.digest(*(np.ascontiguousarray(x).tobytes() for x in arrays))
