# SPDX-License-Identifier: Apache-2.0
"""Renames between our parameter tree and the official torch state dicts, as data, both ways.

A row is (our path, torch key, how).  Paths under a scanned stack carry `{i}`: ours is one array
with a leading block axis, torch has one tensor per block.  `how` names the layout change:

  'same'    equal arrays
  'linear'  (in, out) <-> (out, in)
  'conv'    (p*p*3, D), rows ordered (row, column, channel) <-> (D, 3, p, p)
  'fixed'   not a parameter of ours: a sin-cos table that is checked on the way in and written
            on the way out
"""

import difflib
import re

import numpy as np

_NORM = (('scale', 'weight', 'same'), ('bias', 'bias', 'same'))
_DENSE = (('kernel', 'weight', 'linear'), ('bias', 'bias', 'same'))


def _rows(ours, torch, leaves):
    return [(f'{ours}/{a}', f'{torch}.{b}', how) for a, b, how in leaves]


def blocks(ours, torch, *, ffn='mlp', layer_scale=False):
    """Rows of one stack of transformer blocks."""
    rows = []
    for name in ('norm1', 'norm2'):
        rows += _rows(f'{ours}/{name}', f'{torch}.{{i}}.{name}', _NORM)
    dense = ['attn/qkv', 'attn/proj']
    dense += ['mlp/w12', 'mlp/w3'] if ffn == 'swiglu' else ['mlp/fc1', 'mlp/fc2']
    for name in dense:
        rows += _rows(f'{ours}/{name}', f'{torch}.{{i}}.{name.replace("/", ".")}', _DENSE)
    if layer_scale:
        for name in ('ls1', 'ls2'):
            rows.append((f'{ours}/{name}/gamma', f'{torch}.{{i}}.{name}.gamma', 'same'))
    return rows


def encoder(vit, ours='encoder'):
    """Rows of a ViT in the names of MAE, Pixio, DINOv2 (hub) and timm, which agree."""
    prefix = f'{ours}/' if ours else ''
    rows = [
        (f'{prefix}patch_embed/proj/kernel', 'patch_embed.proj.weight', 'conv'),
        (f'{prefix}patch_embed/proj/bias', 'patch_embed.proj.bias', 'same'),
        (f'{prefix}pos_embed', 'pos_embed', 'fixed' if vit.pos_embed == 'sincos' else 'same'),
    ]
    if vit.num_cls_tokens:
        rows.append((f'{prefix}cls_token', 'cls_token', 'same'))
    if vit.num_register_tokens:
        rows.append((f'{prefix}register_tokens', 'register_tokens', 'same'))
    if vit.mask_token:
        rows.append((f'{prefix}mask_token', 'mask_token', 'same'))
    scale = vit.layer_scale is not None
    rows += blocks(f'{prefix}blocks', 'blocks', ffn=vit.ffn, layer_scale=scale)
    return rows + _rows(f'{prefix}norm', 'norm', _NORM)


def mae(method):
    """Rows of the official MAE and Pixio pretraining checkpoints (encoder and decoder)."""
    fixed = 'fixed' if method.decoder.pos_embed == 'sincos' else 'same'
    rows = encoder(method.vit)
    rows += _rows('decoder/decoder_embed', 'decoder_embed', _DENSE)
    rows.append(('decoder/mask_token', 'mask_token', 'same'))
    rows.append(('decoder/decoder_pos_embed', 'decoder_pos_embed', fixed))
    rows += blocks('decoder/decoder_blocks', 'decoder_blocks')
    rows += _rows('decoder/decoder_norm', 'decoder_norm', _NORM)
    return rows + _rows('decoder/decoder_pred', 'decoder_pred', _DENSE)


def _to_ours(x, how):
    if how == 'linear':
        return x.T
    if how == 'conv':
        return x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])
    return x


def _to_torch(x, how):
    if how == 'linear':
        return np.ascontiguousarray(x.T)
    if how == 'conv':
        side = round((x.shape[0] // 3) ** 0.5)
        x = x.reshape(side, side, 3, x.shape[1]).transpose(3, 2, 0, 1)
        return np.ascontiguousarray(x)
    return x


def _flatten(tree, prefix=''):
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _flatten(value, f'{prefix}{key}/')
        else:
            yield f'{prefix}{key}', value


def _unflatten(flat):
    tree = {}
    for path, value in flat.items():
        *parents, leaf = path.split('/')
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def from_torch(rows, state_dict, abstract, fixed=None):
    """A torch state dict -> our parameter tree; every key is consumed exactly once.

    Args:
      rows: a table of this file.
      state_dict: name -> numpy array.
      abstract: our tree (arrays or ShapeDtypeStructs), for depths and shapes.
      fixed: our path -> the table that a 'fixed' key must equal.

    Raises:
      ValueError: listing every missing, leftover and misshapen key at once; nothing is loaded.
    """
    want = dict(_flatten(abstract))
    left = set(state_dict)
    # A missing key is most likely one that nothing else asks for, misspelled.
    strange = left - set(_torch_keys(rows, want))
    out, problems = {}, []

    def take(key, shape, how):
        if key not in state_dict:
            near = difflib.get_close_matches(key, strange or left, n=1)
            problems.append(f'missing {key}' + (f' (nearest: {near[0]})' if near else ''))
            return None
        left.discard(key)
        value = np.asarray(state_dict[key])
        if value.ndim == {'linear': 2, 'conv': 4}.get(how):
            value = _to_ours(value, how)
        if tuple(value.shape) != tuple(shape):
            problems.append(f'{key} has shape {value.shape} in our layout, expected {tuple(shape)}')
            return None
        return value

    for ours, key, how in rows:
        if how == 'fixed':
            table = (fixed or {})[ours]
            value = take(key, table.shape, how)
            if value is not None and not np.allclose(value, table, atol=1e-5):
                problems.append(f'{key} is not the sin-cos table this model uses')
        elif '{i}' in key:
            depth, *shape = want[ours].shape
            stack = [take(key.format(i=i), shape, how) for i in range(depth)]
            if all(x is not None for x in stack):
                out[ours] = np.stack(stack)
        else:
            out[ours] = take(key, want[ours].shape, how)
    problems += [f'left over {key}' for key in sorted(left)]
    if set(want) - {ours for ours, _, _ in rows}:
        problems.append(f'no rename for {sorted(set(want) - {o for o, _, _ in rows})}')
    if problems:
        raise ValueError('the weights do not fit, nothing was loaded: ' + '; '.join(problems) + '.')
    return _unflatten(out)


def to_torch(rows, params, fixed=None):
    """Our parameter tree -> a torch state dict of contiguous numpy arrays."""
    flat = dict(_flatten(params))
    out = {}
    for ours, key, how in rows:
        if how == 'fixed':
            out[key] = np.asarray((fixed or {})[ours])
        elif '{i}' in key:
            for i, x in enumerate(np.asarray(flat.pop(ours))):
                out[key.format(i=i)] = _to_torch(x, how)
        else:
            out[key] = _to_torch(np.asarray(flat.pop(ours)), how)
    if flat:
        raise ValueError(f'no rename for {sorted(flat)}; nothing was exported.')
    return out


def _torch_keys(rows, want):
    for ours, key, _ in rows:
        if '{i}' in key:
            yield from (key.format(i=i) for i in range(want[ours].shape[0]))
        else:
            yield key


def fixed_tables(method):
    """The sin-cos tables of a MAE as {our path: (1, C + N, D) float32}; {} where learned."""
    from ssl_jax.models import pos_embed

    vit, dec = method.vit, method.decoder
    grid, c = vit.img_size // vit.patch_size, vit.num_cls_tokens
    tables = {}
    if vit.pos_embed == 'sincos':
        tables['encoder/pos_embed'] = pos_embed.sincos(vit.embed_dim, grid, c)
    if dec.pos_embed == 'sincos':
        tables['decoder/decoder_pos_embed'] = pos_embed.sincos(dec.embed_dim, grid, c)
    return tables


def chunked(state_dict):
    """DINOv2's training names blocks.<chunk>.<i>.… -> blocks.<i>.…; others are left alone."""
    return {re.sub(r'^blocks\.\d+\.(\d+)\.', r'blocks.\1.', k): v for k, v in state_dict.items()}
