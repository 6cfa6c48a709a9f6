# SPDX-License-Identifier: Apache-2.0
"""BEiT in its own names, timm's and transformers': the rows, and what a set of tensors is.

Attention has tables of relative positions (one for all blocks, or one in each), queries and values
have biases and keys have none, the mask token has one axis more than here.  What a fine-tuned
model has instead of a final norm is the norm of its mean of patches: `fc_norm`, in transformers
that of the pooler.  Here it becomes the final norm, of every token, and `remarks` say so.

Reference: microsoft/unilm `beit/modeling_pretrain.py`, `beit/modeling_finetune.py`; transformers
`models/beit/modeling_beit.py`; timm `models/beit.py`.
"""

import math
import re

import numpy as np

from ssl_jax.interop import sizes, tables
from ssl_jax.models import blocks
from ssl_jax.models import vit as vit_lib

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
# Mean and standard deviation of each channel in the published runs.
MEAN = STD = (0.5, 0.5, 0.5)


def rows(w):
    """The rename rows of `layouts.Weights`; with its words ('full') those of their layer too."""
    if w.layout == 'hf':
        full = w.what == 'full'
        prefix = 'beit.' if full else ''
        found = tables.hf_encoder(w.vit, 'beit', w.names, prefix)
        norm = 'pooler.layernorm.' if w.fc_norm else 'layernorm.'
        found = tables.renamed(found, {f'{prefix}layernorm.': norm})
        modules = {k: f'{prefix}{module}' for k, module in HF[w.names].items()}
    else:
        found = tables.encoder(w.vit)
        found = tables.renamed(found, {'.ls1.gamma': '.gamma_1', '.ls2.gamma': '.gamma_2'})
        if w.fc_norm:
            found = [(o, re.sub('^norm', 'fc_norm', k), how) for o, k, how in found]
        modules = OFFICIAL
    found = [row for old in found for row in _changed(w, *old)]
    if w.vit.rel_pos:
        path = 'rel_pos_bias' if w.vit.rel_pos == 'shared' else 'blocks/attn/rel_pos_bias'
        found.append((f'encoder/{path}', f'{modules[w.vit.rel_pos]}.{TABLE}', 'same'))
    return found + (tables.linear('head', 'lm_head') if w.what == 'full' else [])


def _changed(w, path, key, how):
    """What becomes of the row of a plain ViT."""
    if path.endswith('mask_token'):
        return [] if w.layout == 'timm' else [(path, key, 'token')]
    if not path.endswith('attn/qkv/bias'):
        return [(path, key, how)]
    if isinstance(key, str):
        key = [key.replace('qkv.bias', f'{x}_bias') for x in 'qkv']
    return [(path.replace('bias', name), k, how) for name, k in zip(blocks.QKV_BIASES, key[::2])]


def index(vit):
    """The buffer of the official code, int64 (1 + N, 1 + N)."""
    side = vit.img_size // vit.patch_size
    return blocks.relative_index((side, side)).astype(np.int64)


def buffers(w):
    """The official state dict's tensors that are no parameters."""
    if w.layout != 'official' or not w.vit.rel_pos:
        return {}
    key, depth = f'{OFFICIAL[w.vit.rel_pos]}.{INDEX}', w.vit.depth
    return {key.format(i=i): index(w.vit) for i in range(depth if '{i}' in key else 1)}


def check_index(w, state_dict):
    """Raises if a file orders the rows of its tables in another way."""
    for key in (k for k in state_dict if k.endswith(INDEX)):
        value, want = np.asarray(state_dict[key]), index(w.vit)
        if value.shape != want.shape or (value != want).any():
            raise ValueError(f'{key} is not the order of relative positions that BEiT has.')


def hf_config(w):
    """What only BEiT has in config.json of transformers."""
    v = w.vit
    config = dict(
        model_type='beit',
        use_mask_token=v.mask_token,
        use_absolute_position_embeddings=v.pos_embed == 'learned',
        use_shared_relative_position_bias=v.rel_pos == 'shared',
        use_relative_position_bias=v.rel_pos == 'layer',
        layer_scale_init_value=float(v.layer_scale or 0),
        # Then BeitModel has no final norm: its pooler has it, or the masked model outside of it.
        use_mean_pooling=w.fc_norm or w.what == 'full',
    )
    return config if w.vocab is None else dict(config, vocab_size=w.vocab)


def timm_args(vit):
    """Arguments of timm's Beit beside those of a plain ViT."""
    return dict(
        use_abs_pos_emb=vit.pos_embed == 'learned',
        use_rel_pos_bias=vit.rel_pos == 'layer',
        use_shared_rel_pos_bias=vit.rel_pos == 'shared',
        init_values=None,  # without layer scale
        global_pool='avg',
        use_fc_norm=False,  # the final norm is before pooling, on every token
    )


def is_beit(have):
    """Whether names (without prefix) are those of BEiT: queries and values alone have a bias."""

    def has(*ends):
        return any(k.endswith(ends) for k in have)

    biases = ('.attention.key.bias', '.attention.k_proj.bias')
    return has('.attn.q_bias') or (has('.query.bias', '.q_proj.bias') and not has(*biases))


def read_official(have, hints):
    """Fields of `layouts.Weights` from shapes in the names of BEiT or timm."""
    timm = 'architecture' in hints
    fields = _read(
        have,
        hints,
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
    )
    if timm:
        fields['vit'] = fields['vit'].clone(mask_token=True)  # of the sidecar, else zero
    return dict(fields, layout='timm' if timm else 'official')


def read_hf(have, hints, inner):
    """The same in the names of transformers; `inner` is in front of those of the encoder."""
    memory = any('.attention.q_proj.' in k for k in have)
    names, e = 'memory' if memory else 'hub', f'{inner}embeddings'
    fields = _read(
        have,
        hints,
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
    )
    return dict(fields, layout='hf', names=names)


def _read(have, hints, modules, stack, name):
    """Fields of `layouts.Weights` but for the layout."""
    dim, patch = sizes.patch(have, name['patch'])
    depth = sizes.depth(have, stack)
    hidden = sizes.rows(have, name['fc1'])
    if hidden is None:
        raise ValueError(sizes.absent(f'{stack}.0.{name["fc1"]}', have))
    rel_pos = next((k for k, m in modules.items() if f'{m}.{TABLE}'.format(i=0) in have), None)
    learned, heads = name['pos'] in have, None
    if rel_pos is not None:
        key = f'{modules[rel_pos]}.{TABLE}'.format(i=0)
        heads, side = have[key][-1], _side(key, have[key])
        img_size = sizes.stated(hints, side, patch)
    elif learned:
        img_size = sizes.grid(have, hints, name['pos'], name['cls'], patch, False)[1]
    else:
        raise ValueError(sizes.absent(f'{modules["shared"]}.{TABLE}', have))
    scaled = any(k.endswith(name['scale']) for k in have)
    start = hints.get('layer_scale_init_value', hints.get('layerscale_value', 1.0))
    vit = vit_lib.ViT(
        embed_dim=dim,
        depth=depth,
        num_heads=heads or sizes.num_heads(hints, dim, depth),
        patch_size=patch,
        img_size=img_size,
        mlp_ratio=sizes.mlp_ratio(hidden, dim, 'mlp'),
        pos_embed='learned' if learned else 'none',
        rel_pos=rel_pos,
        key_bias=False,
        layer_scale=float(start) if scaled else None,
        mask_token=name['mask'] in have,
        init_scheme='beit',
        eps=float(hints.get('layer_norm_eps', 1e-6)),
    )
    norm, fc_norm = name['norm']
    pooled = fc_norm in have and norm not in have
    remarks = ()
    if pooled:
        said = f'{fc_norm.removesuffix(".weight")}, of the mean of patches'
        remarks = (f'There is no final norm but {said}: it is applied to every token here.',)
    vocab = have['lm_head.weight'][0] if len(have.get('lm_head.weight', ())) == 2 else None
    full = vocab is not None and norm in have
    return dict(
        family='beit',
        what='full' if full else 'backbone',
        vit=vit,
        vocab=vocab if full else None,
        fc_norm=pooled,
        remarks=remarks,
    )


def _side(key, shape):
    """Patches along a side, from the shape ((2 side - 1)^2 + 3, heads) of a table."""
    side = (math.isqrt(max(shape[0] - 3, 0)) + 1) // 2
    if len(shape) != 2 or side < 1 or (2 * side - 1) ** 2 + 3 != shape[0]:
        raise ValueError(
            f'{key} has shape {shape}, expected ((2 n - 1)^2 + 3, heads) for n x n patches; only '
            f'square grids are read.'
        )
    return side
