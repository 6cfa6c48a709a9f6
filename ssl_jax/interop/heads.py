# SPDX-License-Identifier: Apache-2.0
"""Heads for dense prediction in the names of their official files, both ways.

Modules of `models.dense` have these names already, up to `x_0` for `x.0`, `scale` of a norm and the
layout of kernels.
"""

import json
import pathlib
import re
from typing import Any

import numpy as np
from etils import epath

from ssl_jax.interop import files, tables
from ssl_jax.run import checkpoint, trees

STATS = {'mean': 'running_mean', 'var': 'running_var'}
COUNT = 'num_batches_tracked'  # of a BatchNorm in torch: steps it has seen
METADATA = 'ssl_jax_head'  # key in the safetensors header, of the settings of the head
EXPAND = re.compile(r'(^|/)resize_layers_[01]/kernel$')


def rows(variables: Any) -> list[tables.Row]:
    """Renames of a head.

    Args:
      variables: {'params': ..., 'batch_stats': ...} of the module, arrays or their shapes.
    """
    found = []
    for path in trees.named(variables):
        kind, _, name = path.partition('/')
        parent, _, leaf = name.rpartition('/')
        how = 'same'
        if leaf == 'kernel':
            dense = 'readout_projects' in name  # a linear layer in torch, 1 x 1 here
            how = 'transposed' if EXPAND.search(name) else 'pixel' if dense else 'conv2d'
        leaf = STATS[leaf] if kind == 'batch_stats' else 'bias' if leaf == 'bias' else 'weight'
        parent = re.sub(r'_(\d+)(?=[_/]|$)', r'.\1', parent).replace('/', '.')
        found.append((path, f'{parent}.{leaf}', how))
    return found


def to_torch(variables: Any, prefix: str = '', steps: int = 0) -> dict[str, np.ndarray]:
    """A head as a torch state dict.

    Args:
      variables: see `rows`.
      prefix: of all keys, such as 'decode_head.'.
      steps: training steps, which a BatchNorm counts in torch.
    """
    found = tables.to_torch(rows(variables), variables)
    for key in list(found):
        if key.endswith('running_mean'):
            found[key.replace('running_mean', COUNT)] = np.array(steps, np.int64)
    return {prefix + key: np.ascontiguousarray(value) for key, value in found.items()}


def from_torch(state_dict: dict[str, np.ndarray], abstract: Any, prefix: str = '') -> dict:
    """A torch state dict as variables of the module; raises as `tables.from_torch`.

    Args:
      state_dict: name -> array; names without `prefix` are left out.
      abstract: the variables, arrays or their shapes.
      prefix: of the head's keys.
    """
    own = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
    own = {k: v for k, v in own.items() if not k.endswith(COUNT)}
    return tables.from_torch(rows(abstract), own, abstract)


def write(source: epath.Path, folder: pathlib.Path, dtype: str = 'float32') -> str:
    """Writes a trained head as safetensors, beside the encoder that it was trained on.

    The keys are those of the official file: 'decode_head.' before those of DINOv2's heads, 'head.'
    before those of Pixio's.

    Args:
      source: folder of the head, of `evals.heads.fit`.
      folder: to write into.
      dtype: 'float32' or 'bfloat16'.

    Returns:
      The name of the file.
    """
    found, meta = checkpoint.restore_model(source)
    variables = {'params': found['params'], 'batch_stats': found['extra'] or {}}
    prefix = 'head.' if meta['head']['head'].startswith('pixio') else 'decode_head.'
    tensors = to_torch(variables, prefix, meta['step'])
    name = f'{epath.Path(source).name}.safetensors'
    metadata = {'format': 'pt', METADATA: json.dumps(meta['head'])}
    files.write(folder / name, tensors, metadata, dtype)
    return name
