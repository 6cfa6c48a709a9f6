# SPDX-License-Identifier: Apache-2.0
"""DINOv2, DINO and iBOT: backbones with layer scale or projection heads.

DINOv2 calls its heads `dino_head` and, where patches have their own, `ibot_head`. DINO and iBOT
have one `head`; in iBOT it may have prototypes of its own for the patches, `head.last_layer2`,
behind the MLP of both. A head is taken whole or not at all.

References:
  facebookresearch/dinov2 `models/vision_transformer.py`, `layers/dino_head.py`; facebookresearch/
  dino `vision_transformer.py`; bytedance/ibot `models/head.py`; transformers `models/dinov2`.
"""

import re

import numpy as np

from ssl_jax.interop import families, shapes, tables
from ssl_jax.interop.families import vit as plain
from ssl_jax.models.heads import DINOHead

ORDER = 20
NETWORKS = {'dino_head': DINOHead, 'ibot_head': DINOHead}
PART = re.compile(r'(dino_head|ibot_head|head)\.((?:mlp|last_layer2?)\..+)')
_BLOCK = {
    **tables.NORMS,
    **tables.MLP,
    'ls1': 'layer_scale1.lambda1',
    'ls2': 'layer_scale2.lambda1',
}
HF = {
    'hub': {**tables.HUB, **_BLOCK, 'w12': 'mlp.weights_in', 'w3': 'mlp.weights_out'},
    'memory': {
        **tables.MEMORY,
        **_BLOCK,
        'stack': 'encoder.layer',
        'w12': ('mlp.gate_proj', 'mlp.up_proj'),
        'w3': 'mlp.down_proj',
    },
}


def owns(vit, decoder=None):
    del decoder
    return vit.layer_scale is not None


def claims(w):
    return w.dino_head is not None


def read(found):
    heads, names = ({}, 'hub') if found.hf else _find_heads(found)
    scaled = found.ends('.ls1.gamma', '.layer_scale1.lambda1')
    if not scaled and not heads:
        return None
    vit, layout = shapes.encoder(found, dino=bool(heads))
    absent = ()
    if heads and len(found.have.get('mask_token', ())) != 2:
        absent = ('encoder/mask_token',)
    if found.hf:
        names = 'memory' if found.is_memory else 'hub'
    what = 'full' if heads else 'backbone'
    return dict(layout=layout, what=what, vit=vit, names=names, absent=absent, **heads)


def rows(w):
    if w.layout == 'hf':
        return tables.hf_encoder(w.vit, tables.of_names(HF, w.names))
    if w.layout == 'timm' or w.dino_head is None:
        return plain.rows(w)
    return [row for row in network_rows(w, 'encoder', w.names) if row[0] not in w.absent]


def network_rows(m, ours='backbone', names='hub'):
    """Rows of one network of DINOv2's training, student or teacher: backbone and heads.

    Args:
      m: anything with a `vit`, a `dino_head` and an `ibot_head`, which may be None.
      ours: our name of the backbone.
      names: 'dino' for those of DINO and iBOT, where an `ibot_head` is two things: the MLP of the
        one head, which both of ours are read from, and `last_layer2`.
    """
    dino = names == 'dino'
    rows = [(o, f'backbone.{k}', how) for o, k, how in tables.encoder(m.vit, ours=ours)]
    rows += head_rows('dino_head', 'head' if dino else 'dino_head', m.dino_head.num_layers)
    if m.ibot_head is not None:
        found = head_rows('ibot_head', 'head' if dino else 'ibot_head', m.ibot_head.num_layers)
        rows += [
            (o, k.replace('head.last_layer.', 'head.last_layer2.') if dino else k, how)
            for o, k, how in found
        ]
    return rows


def rename(w, key):
    """The name in the tables of a key of the file.

    With heads the backbone keeps its 'backbone.', which `files` may have taken off.
    """
    if w.dino_head is None:
        return tables.plain(key, w.prefix) if key.startswith(w.prefix) else None
    prefix = w.prefix.removesuffix('backbone.')
    if not key.startswith(prefix):
        return None
    name = tables.plain(key[len(prefix) :].removeprefix('backbone.'))
    return name if PART.fullmatch(name) else f'backbone.{name}'


def head_rows(ours, torch, num_layers=3):
    """Rows of one projection head of DINO, iBOT and DINOv2, say 'student/dino_head'."""
    rows = []
    for i in range(num_layers):
        name = f'mlp_{2 * i}' if num_layers > 1 else 'mlp'
        rows += tables.linear(f'{ours}/{name}', f'{torch}.{name.replace("_", ".")}')
    leaves = [(name, name, 'linear') for name in ('weight_g', 'weight_v')]
    return rows + tables.named_rows(f'{ours}/last_layer', f'{torch}.last_layer', leaves)


def refusals(w):
    out = _backbone_refusals(w)
    if w.dino_head is not None:
        out['official', 'full'] = out['official', 'backbone']
        out['hf', 'full'] = 'transformers has no class for projection heads; use official'
        out['timm', 'full'] = 'timm has no projection heads; use official'
    return out


def _backbone_refusals(w):
    if w.family != 'dinov2':  # of DINO and iBOT: heads behind a plain ViT
        return families.get(w.family).refusals(w)
    v, out = w.vit, plain.refusals(w)
    if v.num_cls_tokens != 1 or not v.mask_token:
        out['official', 'backbone'] = 'the official DINOv2 has one class token and a mask token'
    name, why = hf_class(w), ''
    if v.num_cls_tokens != 1:
        why = f'transformers has no class for {plain.described(w)}'
    elif v.num_register_tokens and not v.mask_token:
        why = "transformers' Dinov2WithRegistersModel always has a mask token"
    elif v.mlp_ratio != int(v.mlp_ratio):
        why = f"transformers' {name} takes whole numbers as mlp_ratio, and this is {v.mlp_ratio}"
    out['hf', 'backbone'] = why
    return out


def hf_class(w):
    return 'Dinov2WithRegistersModel' if w.vit.num_register_tokens else 'Dinov2Model'


def hf_config(w):
    v = w.vit
    config = dict(
        model_type='dinov2',
        mlp_ratio=int(v.mlp_ratio),
        drop_path_rate=0.0,
        layerscale_value=float(v.layer_scale),
        use_swiglu_ffn=v.ffn == 'swiglu',
    )
    if v.num_register_tokens:  # and always a mask token
        return dict(
            config, model_type='dinov2_with_registers', num_register_tokens=v.num_register_tokens
        )
    return dict(config, use_mask_token=v.mask_token)


def timm_model(w):
    v, named = w.vit, plain.timm_sizes(w.vit)
    size = 'giant' if v.ffn == 'swiglu' else named[0] if named else 'base'
    registers = '_reg4' if v.num_register_tokens else ''
    return f'vit_{size}_patch14{registers}_dinov2', plain.timm_args(v)


def method(w, hints):
    """The method 'dinov2', which centres by Sinkhorn-Knopp: the file's centres are not read."""
    del hints
    if w.dino_head is None:
        return None
    vit, dino, ibot = w.vit, w.dino_head, w.ibot_head
    fields = dict(
        ffn=vit.ffn,
        layer_scale=vit.layer_scale,
        num_register_tokens=vit.num_register_tokens,
        pos_resize=vit.pos_resize,
        local_size=max(round(vit.img_size * 3 / 7 / vit.patch_size), 1) * vit.patch_size,
        separate_heads=ibot is not None,
        dino_out_dim=dino.out_dim,
        dino_bottleneck_dim=dino.bottleneck_dim,
        head_hidden_dim=dino.hidden_dim,
        head_num_layers=dino.num_layers,
        centering='sinkhorn_knopp',
    )
    if ibot is not None:
        fields.update(ibot_out_dim=ibot.out_dim, ibot_bottleneck_dim=ibot.bottleneck_dim)
    return 'dinov2', fields


def usage(w):
    """Lines of Python that load a teacher with its heads; None for a backbone."""
    if w.dino_head is None:
        return None
    return [
        '# teacher_checkpoint.pth of DINOv2, for configs with student.block_chunks: 0',
        'import torch',
        'from safetensors.torch import load_file',
        "torch.save({'teacher': load_file('DIR/model.safetensors')}, 'teacher_checkpoint.pth')",
    ]


def _find_heads(found):
    """({'dino_head': DINOHead[, 'ibot_head']}, names); {} without a complete head."""
    parts = {}  # name of a head -> name within the head -> key
    for key in found.shapes:
        match = (
            PART.fullmatch(tables.plain(key, found.base)) if key.startswith(found.base) else None
        )
        if match:
            parts.setdefault(match[1], {})[match[2]] = key
    if not parts:
        return {}, 'hub'
    names, remarks = 'hub', ()
    if 'dino_head' not in parts and 'ibot_head' not in parts:
        names = 'dino'
        parts, remarks = _split(parts['head'], found.array)
    parts.pop('head', None)
    try:
        heads = {}
        for k in sorted({'dino_head', *parts}):
            heads[k] = _read_head('head' if names == 'dino' else k, parts.get(k, {}), found.shapes)
    except _UnknownError as error:
        found.remarks.append(f'{error}, so projection heads are left out.')
        return {}, 'hub'
    found.remarks += remarks
    found.take(key for head in parts.values() for key in head.values())
    return heads, names


class _UnknownError(Exception):
    """The error for a head of unknown form."""


def _split(head, array):
    """The one head of DINO and iBOT as the two of DINOv2, and sentences on that."""
    patch = {
        k.replace('layer2', 'layer'): v for k, v in head.items() if k.startswith('last_layer2.')
    }
    dino = {k: v for k, v in head.items() if not k.startswith('last_layer2.')}
    if not patch:
        return {'dino_head': dino}, ()
    pairs = [(array(dino[k]), array(v)) for k, v in patch.items() if k in dino]
    if pairs and all(a is not None and np.array_equal(a, b) for a, b in pairs):
        return {'dino_head': dino}, (
            'head.last_layer2 equals head.last_layer: class and patch tokens share one head.',
        )
    return {'dino_head': dino, 'ibot_head': {**dino, **patch}}, (
        'The heads for class and patch tokens share an MLP there; here each has its own copy.',
    )


def _read_head(name, keys, shape_of):
    """The DINOHead that `keys` (name within the head -> key) are the tensors of."""
    numbers = [int(m[1]) for k in keys if (m := re.match(r'mlp\.(\d+)\.', k))]
    count = max(numbers, default=0) // 2 + 1
    mlp = [f'mlp.{2 * i}' for i in range(count)] if count > 1 else ['mlp']
    matrices = [f'{layer}.weight' for layer in mlp] + [f'last_layer.weight_{k}' for k in 'gv']
    want = {*matrices, *(f'{layer}.bias' for layer in mlp)}
    if lacks := sorted(want - set(keys)):
        strange = sorted(set(keys) - want)
        raise _UnknownError(f'{name} has no {lacks[0]}' + (f' but {strange[0]}' if strange else ''))
    if strange := sorted(set(keys) - want):
        raise _UnknownError(f'{name} has {strange[0]}, which no head known here has')
    shape = {k: shape_of[keys[k]] for k in matrices}
    for k in matrices:
        if len(shape[k]) != 2:
            raise _UnknownError(f'{name}.{k} has shape {tuple(shape[k])} and is no matrix')
    out_dim, bottleneck = shape['last_layer.weight_v']
    hidden = {'hidden_dim': shape['mlp.0.weight'][0]} if count > 1 else {}
    return DINOHead(out_dim, bottleneck_dim=bottleneck, num_layers=count, **hidden)
