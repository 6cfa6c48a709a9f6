# SPDX-License-Identifier: Apache-2.0
"""Heads for dense prediction in the names of their official files, both ways.

Modules of `models.dense` have these names already, up to `x_0` for `x.0`, `scale` of a norm and the
layout of kernels.
"""

import re
from typing import Any

import numpy as np

from ssl_jax.interop import tables
from ssl_jax.run import trees

STATS = {'mean': 'running_mean', 'var': 'running_var'}
COUNT = 'num_batches_tracked'  # of a BatchNorm in torch: steps it has seen
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
