# SPDX-License-Identifier: Apache-2.0
"""Renames between our parameter tree and the official torch state dicts, as data, both ways.

A row is (our path, torch key, how).  Paths under a scanned stack carry `{i}`: ours is one array
with a leading block axis, torch has one tensor per block.  `how` names the layout change:

  'same'    equal arrays
  'linear'  (in, out) <-> (out, in)
  'conv'    (p*p*3, D), rows ordered (row, column, channel) <-> (D, 3, p, p)
  'token'   (1, D) <-> (1, 1, D)
  'fixed'   not a parameter of ours: a sin-cos table that is checked on the way in and written
            on the way out

A tuple of torch keys are tensors that torch keeps apart and we hold in one array, side by side on
its last axis: query, key and value.
"""

import difflib
import re

import ml_dtypes
import numpy as np

_NORM = (('scale', 'weight', 'same'), ('bias', 'bias', 'same'))
_DENSE = (('kernel', 'weight', 'linear'), ('bias', 'bias', 'same'))
_CONV = (('kernel', 'weight', 'conv'), ('bias', 'bias', 'same'))


def linear(ours, torch):
    """Rows of one linear layer."""
    return _rows(ours, torch, _DENSE)


def norm(ours, torch):
    """Rows of one LayerNorm."""
    return _rows(ours, torch, _NORM)


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
    ]
    if vit.pos_embed != 'none':
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
    return rows + _rows(f'{prefix}norm', 'norm', _NORM)


def renamed(rows, renames):
    """The rows with parts of their torch keys replaced."""

    def rename(key):
        if not isinstance(key, str):
            return tuple(rename(k) for k in key)
        for old, new in renames.items():
            key = key.replace(old, new)
        return key

    return [(ours, rename(key), how) for ours, key, how in rows]


def mae(method):
    """Rows of the official MAE and Pixio pretraining checkpoints (encoder and decoder)."""
    rows = encoder(method.vit) + _decoder_ends(method)
    return rows + blocks('decoder/decoder_blocks', 'decoder_blocks')


def _decoder_ends(method):
    """Rows of a decoder without its blocks; transformers uses the same names."""
    fixed = 'fixed' if method.decoder.pos_embed == 'sincos' else 'same'
    rows = _rows('decoder/decoder_embed', 'decoder_embed', _DENSE)
    rows.append(('decoder/mask_token', 'mask_token', 'same'))
    rows.append(('decoder/decoder_pos_embed', 'decoder_pos_embed', fixed))
    rows += _rows('decoder/decoder_norm', 'decoder_norm', _NORM)
    return rows + _rows('decoder/decoder_pred', 'decoder_pred', _DENSE)


def dino_head(ours, torch, num_layers=3):
    """Rows of one projection head of DINO, iBOT and DINOv2, say 'student/dino_head'."""
    rows = []
    for i in range(num_layers):
        name = f'mlp_{2 * i}' if num_layers > 1 else 'mlp'
        rows += _rows(f'{ours}/{name}', f'{torch}.{name.replace("_", ".")}', _DENSE)
    leaves = [(name, name, 'linear') for name in ('weight_g', 'weight_v')]
    return rows + _rows(f'{ours}/last_layer', f'{torch}.last_layer', leaves)


# Names inside a block in transformers.  'hub' is how weights lie on the hub, which every release
# reads; 'saved' is what save_pretrained of transformers 5 writes where that differs; 'memory' is
# the state_dict() of its modules.
_HUB = dict(
    stack='encoder.layer',
    q='attention.attention.query',
    k='attention.attention.key',
    v='attention.attention.value',
    proj='attention.output.dense',
)
_VIT = dict(norm1='layernorm_before', norm2='layernorm_after')
_VIT_MLP = dict(fc1='intermediate.dense', fc2='output.dense')
_MLP = dict(fc1='mlp.fc1', fc2='mlp.fc2')
_NORMS = dict(norm1='norm1', norm2='norm2')
_MEMORY = dict(
    q='attention.q_proj', k='attention.k_proj', v='attention.v_proj', proj='attention.o_proj'
)
_DINOV2 = {**_NORMS, **_MLP, 'ls1': 'layer_scale1.lambda1', 'ls2': 'layer_scale2.lambda1'}
_LAMBDAS = dict(ls1='lambda_1', ls2='lambda_2')
_HF_BLOCK = {
    'vit': {
        'hub': {**_HUB, **_VIT, **_VIT_MLP},
        'memory': {**_MEMORY, **_VIT, **_MLP, 'stack': 'layers'},
    },
    'pixio': {
        'hub': {**_HUB, **_NORMS, **_MLP},
        'saved': {**_HUB, **_NORMS, **_VIT_MLP},
        'memory': {**_MEMORY, **_VIT, **_MLP, 'stack': 'layers'},
    },
    'dinov2': {
        'hub': {**_HUB, **_DINOV2, 'w12': 'mlp.weights_in', 'w3': 'mlp.weights_out'},
        'memory': {
            **_MEMORY,
            **_DINOV2,
            'stack': 'encoder.layer',
            'w12': ('mlp.gate_proj', 'mlp.up_proj'),
            'w3': 'mlp.down_proj',
        },
    },
    'beit': {
        'hub': {**_HUB, **_VIT, **_VIT_MLP, **_LAMBDAS},
        'memory': {**_MEMORY, **_VIT, **_MLP, **_LAMBDAS, 'stack': 'layers'},
    },
}
_HF_DECODER = {'hub': 'decoder_layers', 'saved': 'decoder_encoder.layer'}


def hf_block(kind, names):
    """Our name -> name in transformers, of 'vit', 'pixio', 'dinov2' or 'beit' (see _HUB above)."""
    return _HF_BLOCK[kind].get(names, _HF_BLOCK[kind]['hub'])


def _hf_blocks(ours, torch, name, *, ffn='mlp', layer_scale=False):
    rows = []

    def add(ours, parts, leaves):
        for a, b, how in leaves:
            keys = tuple(f'{torch}.{{i}}.{part}.{b}' for part in parts)
            rows.append((f'{ours}/{a}', keys if len(keys) > 1 else keys[0], how))

    for norm in ('norm1', 'norm2'):
        add(f'{ours}/{norm}', (name[norm],), _NORM)
    add(f'{ours}/attn/qkv', (name['q'], name['k'], name['v']), _DENSE)
    add(f'{ours}/attn/proj', (name['proj'],), _DENSE)
    for part in ('w12', 'w3') if ffn == 'swiglu' else ('fc1', 'fc2'):
        parts = (name[part],) if isinstance(name[part], str) else name[part]
        add(f'{ours}/mlp/{part}', parts, _DENSE)
    if layer_scale:
        for scale in ('ls1', 'ls2'):
            rows.append((f'{ours}/{scale}/gamma', f'{torch}.{{i}}.{name[scale]}', 'same'))
    return rows


def hf_encoder(vit, kind, names='hub', prefix=''):
    """Rows of ViTModel, PixioModel, Dinov2Model and Dinov2WithRegistersModel of transformers."""
    name, e = hf_block(kind, names), f'{prefix}embeddings'
    rows = _rows('encoder/patch_embed/proj', f'{e}.patch_embeddings.projection', _CONV)
    if vit.pos_embed != 'none':
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
    rows += _hf_blocks('encoder/blocks', stack, name, ffn=vit.ffn, layer_scale=scale)
    return rows + _rows('encoder/norm', f'{prefix}layernorm', _NORM)


def hf_mae(method, names='hub'):
    """Rows of ViTMAEForPreTraining of transformers."""
    rows = hf_encoder(method.vit, 'vit', names, 'vit.')
    stack = f'decoder.{_HF_DECODER.get(names, _HF_DECODER["hub"])}'
    ends = [(a, f'decoder.{b}', how) for a, b, how in _decoder_ends(method)]
    return rows + ends + _hf_blocks('decoder/decoder_blocks', stack, hf_block('vit', names))


def timm(vit):
    """Rows of timm's VisionTransformer, which has no mask token; see `layouts.to_layout`."""
    renames = {'register_tokens': 'reg_token'}
    if vit.ffn == 'swiglu':
        renames |= {'mlp.w12': 'mlp.fc1', 'mlp.w3': 'mlp.fc2'}
    return [row for row in renamed(encoder(vit), renames) if row[1] != 'mask_token']


def dinov2(method, ours='backbone', names='hub'):
    """Rows of one network of DINOv2's training, student or teacher: backbone and heads.

    Args:
      method: whatever has a `vit`, a `dino_head` and an `ibot_head`, which may be None.
      ours: our name of the backbone.
      names: 'dino' for those of DINO and iBOT, where an `ibot_head` is two things: the MLP of the
        one head, which both of ours are read from, and `last_layer2`.
    """
    dino = names == 'dino'
    rows = [(o, f'backbone.{k}', how) for o, k, how in encoder(method.vit, ours=ours)]
    torch = 'head' if dino else 'dino_head'
    rows += dino_head('dino_head', torch, method.dino_head.num_layers)
    if method.ibot_head is not None:
        torch = 'head' if dino else 'ibot_head'
        found = dino_head('ibot_head', torch, method.ibot_head.num_layers)
        rows += [
            (o, k.replace('head.last_layer.', 'head.last_layer2.') if dino else k, how)
            for o, k, how in found
        ]
    return rows


def _to_ours(x, how):
    if how == 'linear':
        return x.T
    if how == 'conv':
        return x.transpose(2, 3, 1, 0).reshape(-1, x.shape[0])
    if how == 'token':
        return x[0]
    return x


def _to_torch(x, how):
    if how == 'linear':
        return x.T
    if how == 'conv':
        side = round((x.shape[0] // 3) ** 0.5)
        return x.reshape(side, side, 3, x.shape[1]).transpose(3, 2, 0, 1)
    if how == 'token':
        return x[None]
    return x


def _torch_shape(shape, how):
    """Shape in torch of an array of ours."""
    return _to_torch(np.broadcast_to(np.float32(0), shape), how).shape


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
        value, expected = np.asarray(state_dict[key], np.float32), _torch_shape(shape, how)
        if value.shape != expected:
            problems.append(f'{key} has shape {value.shape}, expected {expected}')
            return None
        return _to_ours(value, how)

    for ours, key, how in rows:
        if how == 'fixed':
            table = (fixed or {})[ours]
            value = take(key, table.shape, how)
            if value is not None and not is_table(value, table):
                problems.append(f'{key} is not the sin-cos table this model uses')
            continue
        keys = (key,) if isinstance(key, str) else key
        # One array is filled in place, so that nothing but a single tensor is ever held twice.
        array = out[ours] = np.empty(want[ours].shape, np.float32)
        stacked = '{i}' in keys[0]
        for i in range(len(array)) if stacked else [None]:
            parts = np.split(array[i] if stacked else array, len(keys), axis=-1)
            for name, part in zip(keys, parts):
                value = take(name.format(i=i), part.shape, how)
                if value is not None:
                    part[...] = value
    problems += [f'left over {key}' for key in sorted(left)]
    if set(want) - {ours for ours, _, _ in rows}:
        problems.append(f'no rename for {sorted(set(want) - {o for o, _, _ in rows})}')
    if problems:
        raise ValueError('the weights do not fit, nothing was loaded: ' + '; '.join(problems) + '.')
    return _unflatten(out)


def is_table(value, table):
    """Whether `value` is the sin-cos `table`, maybe computed or stored in less precision."""
    if value.shape != table.shape:
        return False
    if np.allclose(value, table, atol=1e-5):
        return True
    halves = (ml_dtypes.bfloat16, np.float16)
    return any(np.array_equal(value, table.astype(h).astype(np.float32)) for h in halves)


def to_torch(rows, params, fixed=None):
    """Our parameter tree -> a torch state dict of numpy views, in whatever memory order."""
    flat = dict(_flatten(params))
    out = {}
    for ours, key, how in rows:
        if how == 'fixed':
            out[key] = np.asarray((fixed or {})[ours])
            continue
        keys, array = (key,) if isinstance(key, str) else key, np.asarray(flat.pop(ours))
        stacked = '{i}' in keys[0]
        for i in range(len(array)) if stacked else [None]:
            parts = np.split(array[i] if stacked else array, len(keys), axis=-1)
            out.update((k.format(i=i), _to_torch(part, how)) for k, part in zip(keys, parts))
    if flat:
        raise ValueError(f'no rename for {sorted(flat)}; nothing was exported.')
    return out


def _torch_keys(rows, want):
    for ours, key, _ in rows:
        for name in (key,) if isinstance(key, str) else key:
            if '{i}' in name:
                yield from (name.format(i=i) for i in range(want[ours].shape[0]))
            else:
                yield name


def fixed_tables(method):
    """The sin-cos tables of a MAE as {our path: (1, C + N, D) float32}; {} where learned.

    method: whatever has a `vit` and a `decoder`, which may be None.
    """
    from ssl_jax.models import pos_embed

    vit, dec = method.vit, method.decoder
    grid, c = vit.img_size // vit.patch_size, vit.num_cls_tokens
    tables = {}
    if vit.pos_embed == 'sincos':
        tables['encoder/pos_embed'] = pos_embed.sincos(vit.embed_dim, grid, c)
    if dec is not None and dec.pos_embed == 'sincos':
        tables['decoder/decoder_pos_embed'] = pos_embed.sincos(dec.embed_dim, grid, c)
    return tables


def plain(key, prefix=''):
    """A key without its prefix, FSDP's wrappers and the chunks of DINOv2's training.

    Those are named blocks.<chunk>.<i>.…, where i counts over all chunks.  iBOT's name of the mask
    token becomes that of all others.
    """
    key = key[len(prefix) :].replace('_fsdp_wrapped_module.', '')
    if key == 'masked_embed':
        return 'mask_token'
    return re.sub(r'^blocks\.\d+\.(\d+)\.', r'blocks.\1.', key)
