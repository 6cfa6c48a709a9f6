# SPDX-License-Identifier: Apache-2.0
"""BEiT: an encoder with relative positions, or with its layer to visual words.

Attention has tables of relative positions (one for all blocks, or one in each), queries and values
have biases and keys have none, the mask token has one axis more than here. A fine-tuned model has,
instead of a final norm, the norm of its mean of patches: `fc_norm`, in transformers that of the
pooler (`ViT.pooled_norm`).

References:
  microsoft/unilm `beit/modeling_pretrain.py`, `beit/modeling_finetune.py`; transformers
`models/beit/modeling_beit.py`; timm `models/beit.py`.
"""

import math

import numpy as np

from ssl_jax.interop import shapes, tables
from ssl_jax.interop.families import vit as plain
from ssl_jax.models import blocks as blocks_lib
from ssl_jax.models import vit as vit_lib
from ssl_jax.run import errors

ORDER = 10
NETWORKS = {'head': blocks_lib.Dense}  # `Weights.vocab` is its width
INNER = ('beit.', 'lm_head.weight')  # prefix of the encoder in BeitForMaskedImageModeling

TABLE, INDEX = 'relative_position_bias_table', 'relative_position_index'
# Where a table is, by `ViT.rel_pos`; the index, a buffer of integers, is beside it.
OFFICIAL = {'shared': 'rel_pos_bias', 'layer': 'blocks.{i}.attn'}
HF = {
    'hub': {
        'shared': 'encoder.relative_position_bias',
        'layer': 'encoder.layer.{i}.attention.attention.relative_position_bias',
    },
    'memory': {'shared': 'shared_position_bias', 'layer': 'layers.{i}.relative_position_bias'},
}
_BLOCK = dict(ls1='lambda_1', ls2='lambda_2')
BLOCK = {kind: {**names, **_BLOCK} for kind, names in tables.HF_VIT.items()}
# Mean and standard deviation of each channel in the published runs.
processor = dict(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def owns(vit, decoder=None):
    del decoder
    return bool(vit.rel_pos) or not vit.key_bias


def read(found):
    """Queries and values alone have a bias."""
    keys = found.ends('.attention.key.bias', '.attention.k_proj.bias')
    if not found.ends('.attn.q_bias') and (keys or not found.ends('.query.bias', '.q_proj.bias')):
        return None
    fields = _read_hf(found) if found.hf else _read_official(found)
    if found.hf and fields['vit'].pooled_norm:
        found.take(found.keys.get(f'pooler.layernorm.{k}') for k in ('weight', 'bias'))
    return fields


def rows(w):
    """The renames; with its words ('full') those of their layer too."""
    if w.layout == 'hf':
        prefix = 'beit.' if w.vocab else ''
        found = tables.hf_encoder(w.vit, tables.of_names(BLOCK, w.names), prefix)
        norm = 'pooler.layernorm.' if w.vit.pooled_norm else 'layernorm.'
        found = tables.renamed(found, {f'{prefix}layernorm.': norm})
        modules = {k: f'{prefix}{module}' for k, module in HF[w.names].items()}
    else:
        found = tables.encoder(w.vit)
        found = tables.renamed(found, {'.ls1.gamma': '.gamma_1', '.ls2.gamma': '.gamma_2'})
        modules = OFFICIAL
    found = [row for old in found for row in _changed(w, *old)]
    if w.vit.rel_pos:
        path = 'rel_pos_bias' if w.vit.rel_pos == 'shared' else 'blocks/attn/rel_pos_bias'
        found.append((f'encoder/{path}', f'{modules[w.vit.rel_pos]}.{TABLE}', 'same'))
    return found + (tables.linear('head', 'lm_head') if w.vocab else [])


def _changed(w, path, key, how):
    """What becomes of the row of a plain ViT."""
    if path.endswith('mask_token'):
        return [] if w.layout == 'timm' else [(path, key, 'token')]
    if not path.endswith('attn/qkv/bias'):
        return [(path, key, how)]
    if isinstance(key, str):
        key = [key.replace('qkv.bias', f'{x}_bias') for x in 'qkv']
    return [
        (path.replace('bias', name), k, how)
        for name, k in zip(blocks_lib.QKV_BIASES, key[::2], strict=True)
    ]


def index(vit):
    """The buffer of the official code, int64 (1 + N, 1 + N)."""
    side = vit.img_size // vit.patch_size
    return blocks_lib.relative_index((side, side)).astype(np.int64)


def buffers(w):
    """The official state dict's tensors that are no parameters."""
    if w.layout != 'official' or not w.vit.rel_pos:
        return {}
    key, depth = f'{OFFICIAL[w.vit.rel_pos]}.{INDEX}', w.vit.depth
    return {key.format(i=i): index(w.vit) for i in range(depth if '{i}' in key else 1)}


def rename(w, key):
    """The name in the tables of a key of the file; None for a buffer."""
    inside = key.startswith(w.prefix) and not key.endswith(INDEX)
    return tables.plain(key, w.prefix) if inside else None


def check(w, state_dict):
    """Raises if a file orders the rows of its tables in another way."""
    for key in (k for k in state_dict if k.endswith(INDEX)):
        value, want = np.asarray(state_dict[key]), index(w.vit)
        if value.shape != want.shape or (value != want).any():
            raise errors.UserError(f'{key} is not the order of relative positions that BEiT has.')


def refusals(w):
    v, why = w.vit, plain.eps_refusal(w.vit, 'the official code')
    if v.num_cls_tokens != 1 or v.num_register_tokens or v.ffn != 'mlp' or v.key_bias:
        why = (
            'BEiT has one class token and no registers, an MLP, and keys without bias, and this '
            'encoder differs from that'
        )
    words = why if w.vocab else 'these weights have no layer to visual words; use what=backbone'
    return {
        ('official', 'backbone'): why,
        ('hf', 'backbone'): '' if 'normalises' in why else why,
        ('timm', 'backbone'): why.replace('the official code', 'timm'),
        ('official', 'full'): words,
        ('hf', 'full'): '' if w.vocab and 'normalises' in words else words,
        ('timm', 'full'): 'timm has no layer to visual words; use official or hf',
    }


def hf_class(w):
    return 'BeitForMaskedImageModeling' if w.vocab else 'BeitModel'


def hf_config(w):
    v = w.vit
    config = dict(
        model_type='beit',
        intermediate_size=int(v.embed_dim * v.mlp_ratio),
        qkv_bias=None,  # queries and values alone have one
        use_mask_token=v.mask_token,
        use_absolute_position_embeddings=v.pos_embed == 'learned',
        use_shared_relative_position_bias=v.rel_pos == 'shared',
        use_relative_position_bias=v.rel_pos == 'layer',
        layer_scale_init_value=float(v.layer_scale or 0),
        # Then BeitModel has no final norm: its pooler has it, or the masked model outside of it.
        use_mean_pooling=v.pooled_norm or w.what == 'full',
    )
    return config if w.vocab is None else dict(config, vocab_size=w.vocab)


def timm_model(w):
    v = w.vit
    size = 'large' if plain.timm_sizes(v) == ['large'] else 'base'
    args = dict(
        use_abs_pos_emb=v.pos_embed == 'learned',
        use_rel_pos_bias=v.rel_pos == 'layer',
        use_shared_rel_pos_bias=v.rel_pos == 'shared',
        init_values=v.layer_scale,
        global_pool='avg',
        use_fc_norm=v.pooled_norm,
    )
    return f'beit_{size}_patch16_224', {**plain.timm_args(v), **args}


def method(w, hints):
    """None: the method has a tokenizer that its weights do not name."""
    del w, hints
    return None


def _read_official(found):
    """Fields of weights in the names of BEiT or timm."""
    timm = 'architecture' in found.hints
    fields = _read(
        found,
        OFFICIAL,
        'blocks',
        dict(
            patch='patch_embed.proj.weight',
            pos='pos_embed',
            cls='cls_token',
            mask='mask_token',
            fc1='mlp.fc1.weight',
            scale='.gamma_1',
            norm=('norm.weight', 'fc_norm.weight'),
        ),
        'linear' if timm else 'spline',
    )
    if timm:
        # The mask token is that of the sidecar, else zero.
        fields['vit'] = fields['vit'].clone(mask_token=True, pos_resize='antialias')
    return dict(fields, layout='timm' if timm else 'official')


def _read_hf(found):
    """The same in the names of transformers."""
    memory, inner = found.is_memory, found.inner
    names, e = 'memory' if memory else 'hub', f'{inner}embeddings'
    fields = _read(
        found,
        {k: f'{inner}{module}' for k, module in HF[names].items()},
        f'{inner}layers' if memory else f'{inner}encoder.layer',
        dict(
            patch=f'{e}.patch_embeddings.projection.weight',
            pos=f'{e}.position_embeddings',
            cls=f'{e}.cls_token',
            mask=f'{e}.mask_token',
            fc1='mlp.fc1.weight' if memory else 'intermediate.dense.weight',
            scale='.lambda_1',
            norm=('layernorm.weight', 'pooler.layernorm.weight'),
        ),
        'bilinear',
    )
    return dict(fields, layout='hf', names=names)


def _read(found, modules, stack, name, resize):
    """Fields of `layouts.Weights` but for the layout."""
    have, hints = found.have, found.hints
    dim, patch = shapes.patch_embed(have, name['patch'])
    depth = shapes.depth(have, stack)
    hidden = shapes.rows(have, name['fc1'])
    if hidden is None:
        raise errors.UserError(shapes.absent(f'{stack}.0.{name["fc1"]}', have))
    rel_pos = next((k for k, m in modules.items() if f'{m}.{TABLE}'.format(i=0) in have), None)
    learned, heads = name['pos'] in have, None
    if rel_pos is not None:
        key = f'{modules[rel_pos]}.{TABLE}'.format(i=0)
        heads, side = have[key][-1], _side(key, have[key])
        img_size = shapes.stated(hints, side, patch)
    elif learned:
        img_size = shapes.grid(have, hints, name['pos'], name['cls'], patch, False)[1]
    else:
        raise errors.UserError(shapes.absent(f'{modules["shared"]}.{TABLE}', have))
    scaled = any(k.endswith(name['scale']) for k in have)
    start = hints.get('layer_scale_init_value', hints.get('layerscale_value', 1.0))
    norm, fc_norm = name['norm']
    pooled = fc_norm in have and norm not in have
    vit = vit_lib.ViT(
        embed_dim=dim,
        depth=depth,
        num_heads=heads or shapes.num_heads(hints, dim, depth),
        patch_size=patch,
        img_size=img_size,
        mlp_ratio=shapes.mlp_ratio(hidden, dim, 'mlp'),
        pos_embed='learned' if learned else 'none',
        rel_pos=rel_pos,
        key_bias=False,
        layer_scale=float(start) if scaled else None,
        mask_token=name['mask'] in have,
        init_scheme='beit',
        eps=shapes.eps(hints),
        rel_resize=resize,
        pooled_norm=pooled,
    )
    if pooled:
        kind = f'{fc_norm.removesuffix(".weight")}, of the mean of patches'
        found.remarks.append(
            f'There is no final norm but {kind}: so are pooled features, and tokens have none.'
        )
    vocab = have['lm_head.weight'][0] if len(have.get('lm_head.weight', ())) == 2 else None
    full = vocab is not None and norm in have
    return dict(what='full' if full else 'backbone', vit=vit, vocab=vocab if full else None)


def _side(key, shape):
    """Patches along a side, from the shape ((2 side - 1)^2 + 3, heads) of a table."""
    side = (math.isqrt(max(shape[0] - 3, 0)) + 1) // 2
    if len(shape) != 2 or side < 1 or (2 * side - 1) ** 2 + 3 != shape[0]:
        raise errors.UserError(
            f'{key} has shape {shape}, expected ((2 n - 1)^2 + 3, heads) for n x n patches; only '
            f'square grids are read.'
        )
    return side
