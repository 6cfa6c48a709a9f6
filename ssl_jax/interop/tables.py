# SPDX-License-Identifier: Apache-2.0
"""Renames between our parameter tree and torch state dicts, as data, both ways.

A row is (our path, torch key, how). Keys under a scanned stack carry `{i}`: ours is one array with
a leading block axis, torch has one tensor per block. `how` is the change of layout:

  'same'    equal arrays
  'linear'  (in, out) <-> (out, in)
  'conv'    (p*p*3, D), rows ordered (row, column, channel) <-> (D, 3, p, p)
  'conv2d'  (k, k, in, out) <-> (out, in, k, k)
  'transposed'  (k, k, in, out) <-> (in, out, k, k), of a transposed convolution
  'pixel'   (1, 1, in, out) <-> (out, in)
  'token'   (1, D) <-> (1, 1, D)
  'fixed'   not a parameter of ours: a sin-cos table that is checked on the way in and written
            on the way out

A tuple of torch keys are tensors that torch keeps apart and we hold in one array, side by side on
its last axis: query, key and value.
"""

import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from ssl_jax.run import errors, trees

Row = tuple[str, str | tuple[str, ...], str]
NORM_ROWS = (('scale', 'weight', 'same'), ('bias', 'bias', 'same'))
DENSE_ROWS = (('kernel', 'weight', 'linear'), ('bias', 'bias', 'same'))
AXES = {'conv2d': (3, 2, 0, 1), 'transposed': (2, 3, 0, 1)}  # ours -> torch
CONV_ROWS = (('kernel', 'weight', 'conv'), ('bias', 'bias', 'same'))


def linear(ours: str, torch: str) -> list[Row]:
    """Rows of a linear layer."""
    return named_rows(ours, torch, DENSE_ROWS)


def norm(ours: str, torch: str) -> list[Row]:
    """Rows of a LayerNorm."""
    return named_rows(ours, torch, NORM_ROWS)


def named_rows(ours: str, torch: str, leaves: tuple) -> list[Row]:
    """Rows of a layer with these leaves."""
    return [(f'{ours}/{a}', f'{torch}.{b}', how) for a, b, how in leaves]


def blocks(ours, torch, *, ffn='mlp', layer_scale=False):
    """Rows of a stack of transformer blocks."""
    rows = []
    for name in ('norm1', 'norm2'):
        rows += named_rows(f'{ours}/{name}', f'{torch}.{{i}}.{name}', NORM_ROWS)
    dense = ['attn/qkv', 'attn/proj']
    dense += ['mlp/w12', 'mlp/w3'] if ffn == 'swiglu' else ['mlp/fc1', 'mlp/fc2']
    for name in dense:
        rows += named_rows(f'{ours}/{name}', f'{torch}.{{i}}.{name.replace("/", ".")}', DENSE_ROWS)
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
    ]
    if vit.has_table:
        how = 'fixed' if vit.pos_embed == 'sincos' else 'same'
        rows.append((f'{prefix}pos_embed', 'pos_embed', how))
    if vit.num_cls_tokens:
        rows.append((f'{prefix}cls_token', 'cls_token', 'same'))
    if vit.num_register_tokens:
        rows.append((f'{prefix}register_tokens', 'register_tokens', 'same'))
    if vit.mask_token:
        rows.append((f'{prefix}mask_token', 'mask_token', 'same'))
    scale = vit.layer_scale is not None
    rows += blocks(f'{prefix}blocks', 'blocks', ffn=vit.ffn, layer_scale=scale)
    return rows + norm(f'{prefix}norm', 'fc_norm' if vit.pooled_norm else 'norm')


def renamed(rows, renames):
    """The rows with parts of their torch keys replaced."""

    def rename(key):
        if not isinstance(key, str):
            return tuple(rename(k) for k in key)
        for old, new in renames.items():
            key = key.replace(old, new)
        return key

    return [(ours, rename(key), how) for ours, key, how in rows]


def hf_blocks(ours, torch, name, *, ffn='mlp', layer_scale=False):
    rows = []

    def add(ours, parts, leaves):
        for a, b, how in leaves:
            keys = tuple(f'{torch}.{{i}}.{part}.{b}' for part in parts)
            rows.append((f'{ours}/{a}', keys if len(keys) > 1 else keys[0], how))

    for norm in ('norm1', 'norm2'):
        add(f'{ours}/{norm}', (name[norm],), NORM_ROWS)
    add(f'{ours}/attn/qkv', (name['q'], name['k'], name['v']), DENSE_ROWS)
    add(f'{ours}/attn/proj', (name['proj'],), DENSE_ROWS)
    for part in ('w12', 'w3') if ffn == 'swiglu' else ('fc1', 'fc2'):
        parts = (name[part],) if isinstance(name[part], str) else name[part]
        add(f'{ours}/mlp/{part}', parts, DENSE_ROWS)
    if layer_scale:
        for scale in ('ls1', 'ls2'):
            rows.append((f'{ours}/{scale}/gamma', f'{torch}.{{i}}.{name[scale]}', 'same'))
    return rows


# Names inside a block in transformers: 'hub' for weights on the hub, which every release reads;
# 'saved' for what save_pretrained of transformers 5 writes where that differs; 'memory' for the
# state_dict() of its modules. Families put their tables together from these.
HUB = dict(
    stack='encoder.layer',
    q='attention.attention.query',
    k='attention.attention.key',
    v='attention.attention.value',
    proj='attention.output.dense',
)
MEMORY = dict(
    q='attention.q_proj', k='attention.k_proj', v='attention.v_proj', proj='attention.o_proj'
)
VIT_NORMS = dict(norm1='layernorm_before', norm2='layernorm_after')
VIT_MLP = dict(fc1='intermediate.dense', fc2='output.dense')
NORMS = dict(norm1='norm1', norm2='norm2')
MLP = dict(fc1='mlp.fc1', fc2='mlp.fc2')
HF_VIT = {
    'hub': {**HUB, **VIT_NORMS, **VIT_MLP},
    'memory': {**MEMORY, **VIT_NORMS, **MLP, 'stack': 'layers'},
}


def of_names(table: dict[str, dict], names: str) -> dict:
    """The entry of a table like HF_VIT; 'hub' where it has no other."""
    return table.get(names, table['hub'])


def hf_encoder(vit, name, prefix=''):
    """Rows of an encoder of transformers.

    Args:
      name: our name of a part of a block -> that in transformers, see HF_VIT.
      prefix: of all keys.
    """
    e = f'{prefix}embeddings'
    rows = named_rows('encoder/patch_embed/proj', f'{e}.patch_embeddings.projection', CONV_ROWS)
    if vit.has_table:
        fixed = 'fixed' if vit.pos_embed == 'sincos' else 'same'
        rows.append(('encoder/pos_embed', f'{e}.position_embeddings', fixed))
    if vit.num_cls_tokens:
        rows.append(('encoder/cls_token', f'{e}.cls_token', 'same'))
    if vit.num_register_tokens:
        rows.append(('encoder/register_tokens', f'{e}.register_tokens', 'same'))
    if vit.mask_token:
        rows.append(('encoder/mask_token', f'{e}.mask_token', 'same'))
    scale = vit.layer_scale is not None
    stack = f'{prefix}{name["stack"]}'
    rows += hf_blocks('encoder/blocks', stack, name, ffn=vit.ffn, layer_scale=scale)
    return rows + named_rows('encoder/norm', f'{prefix}layernorm', NORM_ROWS)


def timm_encoder(vit):
    """Rows of timm's VisionTransformer, which has no mask token; see `layouts.to_layout`."""
    renames = {'register_tokens': 'reg_token'}
    if vit.ffn == 'swiglu':
        renames |= {'mlp.w12': 'mlp.fc1', 'mlp.w3': 'mlp.fc2'}
    return [row for row in renamed(encoder(vit), renames) if row[1] != 'mask_token']


def from_torch(
    rows: list[Row],
    state_dict: Mapping[str, np.ndarray],
    abstract: Any,
    fixed: dict[str, np.ndarray] | None = None,
) -> dict:
    """A torch state dict -> our parameter tree; every key is consumed exactly once.

    Args:
      rows: the renames.
      state_dict: name -> array.
      abstract: our tree (arrays or ShapeDtypeStructs), for depths and shapes.
      fixed: our path -> the table that a 'fixed' key must equal.

    Raises:
      ValueError: listing every missing, leftover and misshapen key at once; nothing is loaded.
    """
    # These arrays are filled in place, so that no more than one tensor is held twice.
    out = {path: np.empty(x.shape, np.float32) for path, x in trees.named(abstract).items()}
    arrays, pieces = {**(fixed or {}), **out}, []
    for path, key, how in rows:
        pieces += [(name, part, how) for name, part in _pieces(arrays[path], key)]
    left, problems = set(state_dict), []
    # A missing key is most likely one that nothing else asks for, misspelled.
    strange = left - {name for name, _, _ in pieces}
    for name, part, how in pieces:
        if name not in state_dict:
            near = errors.close(name, strange or left)
            problems.append(f'missing {name}' + (f' (nearest: {near[0]})' if near else ''))
            continue
        left.discard(name)
        value, shape = np.asarray(state_dict[name], np.float32), _to_torch(part, how).shape
        if value.shape != shape:
            problems.append(f'{name} has shape {value.shape}, expected {shape}')
        elif not np.isfinite(value).all():
            problems.append(f'{name} holds NaN or infinite numbers')
        elif how != 'fixed':
            part[...] = _to_ours(value, how)
        elif not is_table(value, part):
            problems.append(f'{name} is not the sin-cos table this model uses')
    problems += [f'left over {name}' for name in sorted(left)]
    if unnamed := sorted(set(out) - {path for path, _, _ in rows}):
        problems.append(f'no rename for {unnamed}')
    if problems:
        raise errors.UserError(
            'the weights do not fit, nothing was loaded: ' + '; '.join(problems) + '.'
        )
    return trees.nested(out)


def to_torch(
    rows: list[Row], params: Any, fixed: dict[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Our parameter tree -> a torch state dict of numpy views, in any memory order."""
    flat, out = trees.named(params), {}
    for path, key, how in rows:
        array = np.asarray(fixed[path] if how == 'fixed' else flat.pop(path))
        out.update((name, _to_torch(part, how)) for name, part in _pieces(array, key))
    if flat:
        raise errors.UserError(f'no rename for {sorted(flat)}; nothing was exported.')
    return out


def _pieces(array, key):
    """Yields (torch key, view of our array) for each torch tensor of a row."""
    keys = (key,) if isinstance(key, str) else key
    for i in range(len(array)) if '{i}' in keys[0] else [...]:
        parts = np.split(array[i], len(keys), axis=-1)
        yield from ((k.format(i=i), part) for k, part in zip(keys, parts, strict=True))


def _to_ours(x, how):
    if how == 'conv':
        return x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])
    if how in AXES:
        return x.transpose(np.argsort(AXES[how]))
    if how == 'pixel':
        return x.T[None, None]
    return x.T if how == 'linear' else x[0] if how == 'token' else x


def _to_torch(x, how):
    if how == 'conv':
        side = round((x.shape[0] // 3) ** 0.5)
        return x.reshape(side, side, 3, x.shape[1]).transpose(3, 2, 0, 1)
    if how in AXES:
        return x.transpose(AXES[how])
    if how == 'pixel':
        return x[0, 0].T
    return x.T if how == 'linear' else x[None] if how == 'token' else x


def is_table(value: np.ndarray, table: np.ndarray) -> bool:
    """Whether `value` is the sin-cos `table`, maybe computed or stored in less precision."""
    if value.shape != table.shape:
        return False
    if np.allclose(value, table, atol=1e-5):
        return True
    halves = (ml_dtypes.bfloat16, np.float16)
    return any(np.array_equal(value, table.astype(h).astype(np.float32)) for h in halves)


def plain(key: str, prefix: str = '') -> str:
    """A key without its prefix, FSDP's wrappers and the chunks of DINOv2's training.

    Those are named blocks.<chunk>.<i>..., where i counts over all chunks. iBOT's name of the mask
    token becomes that of all others.
    """
    key = key[len(prefix) :].replace('_fsdp_wrapped_module.', '')
    if key == 'masked_embed':
        return 'mask_token'
    return re.sub(r'^blocks\.\d+\.(\d+)\.', r'blocks.\1.', key)
