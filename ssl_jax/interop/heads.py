# SPDX-License-Identifier: Apache-2.0
"""Projection heads beside an encoder, found from the names and shapes of a training checkpoint.

DINOv2 calls them `dino_head` and, where patches have their own, `ibot_head`.  DINO and iBOT have
one `head`; in iBOT it may have prototypes of its own for the patches, `head.last_layer2`, behind
the MLP of both.  A head is taken whole or not at all.
"""

import re

import numpy as np

from ssl_jax.interop import tables
from ssl_jax.models.heads import DINOHead

PART = re.compile(r'(dino_head|ibot_head|head)\.((?:mlp|last_layer2?)\..+)')


def find(shapes, base, table):
    """What heads there are.

    Args:
      shapes: torch key -> shape.
      base: in front of their names, say 'teacher.'.
      table: torch key -> array, or None if only shapes are known.

    Returns:
      (fields of `layouts.Weights`, the keys that the heads consist of); without `dino_head` among
      the fields where there is none, or none that is complete.
    """
    parts = {}  # name of a head -> name within the head -> key
    for key in shapes:
        match = PART.fullmatch(tables.plain(key, base)) if key.startswith(base) else None
        if match:
            parts.setdefault(match[1], {})[match[2]] = key
    if not parts:
        return {}, set()
    names, remarks = 'hub', ()
    if 'dino_head' not in parts and 'ibot_head' not in parts:
        names = 'dino'
        parts, remarks = _split(parts['head'], table)
    parts.pop('head', None)
    try:
        heads = {}
        for k in sorted({'dino_head', *parts}):
            heads[k] = _read('head' if names == 'dino' else k, parts.get(k, {}), shapes)
    except _Unknown as error:
        return {'remarks': (f'{error}, so projection heads are left out.',)}, set()
    used = {key for head in parts.values() for key in head.values()}
    return {**heads, 'names': names, 'remarks': remarks}, used


class _Unknown(Exception):
    """Why a head is none that is known here."""


def _split(head, table):
    """The one head of DINO and iBOT as the two of DINOv2, and what is to be said of that."""
    own = {k.replace('layer2', 'layer'): v for k, v in head.items() if k.startswith('last_layer2.')}
    dino = {k: v for k, v in head.items() if not k.startswith('last_layer2.')}
    if not own:
        return {'dino_head': dino}, ()
    pairs = [(table(dino[k]), table(v)) for k, v in own.items() if k in dino]
    if pairs and all(a is not None and np.array_equal(a, b) for a, b in pairs):
        return {'dino_head': dino}, (
            'head.last_layer2 equals head.last_layer: class and patch tokens share one head.',
        )
    return {'dino_head': dino, 'ibot_head': {**dino, **own}}, (
        'The heads for class and patch tokens share an MLP there; here each has its own copy.',
    )


def _read(name, keys, shapes):
    """The DINOHead that `keys` (name within the head -> key) are the tensors of."""
    numbers = [int(m[1]) for k in keys if (m := re.match(r'mlp\.(\d+)\.', k))]
    count = max(numbers, default=0) // 2 + 1
    mlp = [f'mlp.{2 * i}' for i in range(count)] if count > 1 else ['mlp']
    matrices = [f'{layer}.weight' for layer in mlp] + [f'last_layer.weight_{k}' for k in 'gv']
    want = {*matrices, *(f'{layer}.bias' for layer in mlp)}
    if lacks := sorted(want - set(keys)):
        strange = sorted(set(keys) - want)
        raise _Unknown(f'{name} has no {lacks[0]}' + (f' but {strange[0]}' if strange else ''))
    if strange := sorted(set(keys) - want):
        raise _Unknown(f'{name} has {strange[0]}, which no head known here has')
    shape = {k: shapes[keys[k]] for k in matrices}
    for k in matrices:
        if len(shape[k]) != 2:
            raise _Unknown(f'{name}.{k} has shape {tuple(shape[k])} and is no matrix')
    out_dim, bottleneck = shape['last_layer.weight_v']
    hidden = {'hidden_dim': shape['mlp.0.weight'][0]} if count > 1 else {}
    return DINOHead(out_dim, bottleneck_dim=bottleneck, num_layers=count, **hidden)
