# SPDX-License-Identifier: Apache-2.0
"""What the shapes of torch tensors tell: patch, depth, grid, heads.  `have` is key -> shape."""

import difflib
import math
import re

import numpy as np

from ssl_jax.interop import tables
from ssl_jax.models import blocks, pos_embed
from ssl_jax.models import vit as vit_lib


def patch(have, key):
    """(embed_dim, patch_size) of the kernel of the patch embedding."""
    shape = have[key]
    if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
        raise ValueError(
            f'{key} has shape {shape}, expected (width, 3, patch, patch): square patches of RGB.'
        )
    return shape[0], shape[2]


def depth(have, stack):
    found = [re.match(re.escape(stack) + r'\.(\d+)\.', k) for k in have]
    depth = 1 + max((int(m[1]) for m in found if m), default=-1)
    if not depth:
        raise ValueError(absent(f'{stack}.0', have))
    return depth


def rows(have, end, axis=0):
    """Length of an axis of the first matrix whose name ends so; None if there is none."""
    found = sorted(k for k, s in have.items() if k.endswith(f'.{end}') and len(s) == 2)
    found = [k for k in found if not k.startswith('decoder')]
    return have[found[0]][axis] if found else None


def grid(have, hints, pos, cls, patch, folded):
    """(class tokens, img_size) from the tables of positions and class tokens."""
    if pos not in have:
        raise ValueError(absent(pos, have))
    if len(have[pos]) != 3:
        raise ValueError(f'{pos} has shape {have[pos]}, expected (1, positions, width).')
    n = have[pos][1]
    classes = have[cls][1] if len(have.get(cls, ())) == 3 else 0
    if cls not in have and math.isqrt(n) ** 2 != n:
        raise ValueError(absent(cls, have))
    side = math.isqrt(n - (0 if folded else classes))
    if side**2 != n - (0 if folded else classes):
        raise ValueError(
            f'{pos} has {n} positions, and without those of {classes} class tokens that is no '
            f'square grid; only square tables are read.'
        )
    return classes, stated(hints, side, patch)


def stated(hints, side, patch):
    """img_size, in pixels, of a grid of side x side patches, as the hints say it if they do."""
    given = hints.get('img_size', hints.get('image_size', side * patch))
    given = given if isinstance(given, int) else max(given)
    said = hints.get('patch_size', patch)
    if given // patch != side or said not in (patch, [patch, patch], (patch, patch)):
        raise ValueError(
            f'img_size {given} and patch_size {said} do not fit the tensors, which have '
            f'{side} x {side} positions and patches of {patch} pixels.'
        )
    return given


def positions(table, name, have, dim, grid, classes, maybe):
    """'sincos' or 'learned'; from shapes alone, one class token or none means sin-cos."""
    shape = (1, classes + grid**2, dim)
    if not maybe or dim % 4 or have.get(name) != shape:
        return 'learned'
    value = table(name)
    if value is None:
        return 'sincos' if classes == 1 else 'learned'
    same = tables.is_table(np.asarray(value, np.float32), pos_embed.sincos(dim, grid, classes))
    return 'sincos' if same else 'learned'


def num_heads(hints, dim, depth):
    """Heads leave no trace in the tensors: from the hints, or from the named sizes."""
    heads = hints.get('num_heads', hints.get('num_attention_heads'))
    heads = heads or (hints.get('model_args') or {}).get('num_heads')
    heads = heads or {(d, n): h for d, n, h in vit_lib.SIZES.values()}.get((dim, depth))
    if not heads:
        raise ValueError(
            f'{depth} blocks of width {dim} are no size with a name, and the number of heads is '
            f'not in the tensors; give num_heads.'
        )
    if dim % int(heads):
        raise ValueError(f'num_heads={heads} does not divide the width {dim}; give another.')
    return int(heads)


def mlp_ratio(hidden, dim, ffn):
    """The shortest ratio from which our FFN, and torch's, gets exactly `hidden` channels."""
    if ffn == 'swiglu':
        if blocks.swiglu_hidden(dim, 4.0) == hidden:
            return 4.0
        if hidden % 8:
            raise ValueError(f'a SwiGLU of {hidden} channels is no multiple of 8.')
        return mlp_ratio(hidden * 3 // 2, dim, 'mlp')
    for digits in range(17):
        ratio = round(hidden / dim, digits)
        if int(dim * ratio) == hidden:
            return ratio
    return math.nextafter(hidden / dim, math.inf)


def absent(key, have):
    near = difflib.get_close_matches(key, have, n=1)
    return f'missing {key}' + (f' (nearest: {near[0]}).' if near else '.')
