# SPDX-License-Identifier: Apache-2.0
"""DINOv3: backbones with rotary positions.

The official files hold queries, keys and values in one matrix; its bias is multiplied by
`bias_mask`, 1 for queries and values and 0 for keys, whose bias is therefore none here. The 7B has
no bias there at all: it is read as zeros. `local_cls_norm`, which norms the class tokens of local
crops in training, is left out. The heads of training have names of no other code and stay behind.

References:
  DINOv3, arXiv 2508.10104; facebookresearch/dinov3 `models/vision_transformer.py` (names and
  shapes); transformers `models/dinov3_vit`.
"""

import math

import numpy as np

from ssl_jax.interop import shapes, tables
from ssl_jax.models import blocks as blocks_lib
from ssl_jax.models import rope
from ssl_jax.models import vit as vit_lib
from ssl_jax.run import errors

ORDER = 5  # the first: its names include those by which BEiT and DINOv2 are known
LICENCE = (
    'Weights published as DINOv3 are under the DINOv3 License '
    '(https://ai.meta.com/resources/models-and-libraries/dinov3-license), as is what is made from '
    'them: read it before you pass them on.'
)
EPS = 1e-5  # of the published models; training has 1e-6 too
SIZE = 224  # pixels, where nothing says; no tensor depends on it
PERIODS, MASK, BIAS = 'rope_embed.periods', 'attn.qkv.bias_mask', 'attn.qkv.bias'
BIASES = (f'.{BIAS}', '.q_proj.bias', '.v_proj.bias')
# Width and depth -> heads.
HEADS = {vit_lib.SIZES[k][:2]: vit_lib.SIZES[k][2] for k in ('S', 'B', 'L', 'H+', '7B')}
BLOCK = dict(
    q='attention.q_proj',
    k='attention.k_proj',
    v='attention.v_proj',
    proj='attention.o_proj',
    fc1='mlp.up_proj',
    fc2='mlp.down_proj',
    w12=('mlp.gate_proj', 'mlp.up_proj'),
    w3='mlp.down_proj',
    ls1='layer_scale1.lambda1',
    ls2='layer_scale2.lambda1',
    **tables.NORMS,
)
HF = {'hub': dict(BLOCK, stack='layer'), 'memory': dict(BLOCK, stack='model.layer')}
OFFICIAL = {'register_tokens': 'storage_tokens'}


def owns(vit, decoder=None):
    del decoder
    return vit.pos_embed == 'rope'


def claims(w):
    return owns(w.vit)


def foreign(hints, shape_of):
    if 'dinov3_convnext' in str(hints.get('model_type', '')):
        return 'a ConvNeXt of DINOv3, and only its ViTs are read'
    names = {k.rpartition('backbone.')[2] for k in shape_of}
    eva = 'patch_embed.proj.weight' in names and 'pos_embed' not in names and 'reg_token' in names
    if eva or 'dinov3' in str(hints.get('architecture', '')):
        return (
            "those of DINOv3 in timm's names, which are not read (take the file of its authors or "
            'the folder for transformers)'
        )
    return ''


def read(found):
    if found.hf:
        if 'embeddings.patch_embeddings.weight' not in found.have:
            return None
        memory = any(k.startswith('model.layer.') for k in found.have)
        fields = _read(
            found,
            'model.layer' if memory else 'layer',
            patch='embeddings.patch_embeddings.weight',
            cls='embeddings.cls_token',
            registers='embeddings.register_tokens',
            mask='embeddings.mask_token',
            ffn={'mlp.gate_proj': 'swiglu', 'mlp.up_proj': 'mlp'},
            scale='.layer_scale1.lambda1',
            key_bias=found.ends('.k_proj.bias'),
        )
        fields.update(layout='hf', names='memory' if memory else 'hub')
    else:
        if PERIODS not in found.have and 'storage_tokens' not in found.have:
            return None
        if 'cls_norm.weight' in found.have:
            raise errors.UserError(
                'these weights of DINOv3 have a final norm of class tokens alone (cls_norm), which '
                'is not computed here; such weights are not read.'
            )
        local = [k for name, k in found.keys.items() if name.startswith('local_cls_norm.')]
        found.left_out += local
        fields = _read(
            found,
            'blocks',
            patch='patch_embed.proj.weight',
            cls='cls_token',
            registers='storage_tokens',
            mask='mask_token',
            ffn={'mlp.w1': 'swiglu', 'mlp.fc1': 'mlp'},
            scale='.ls1.gamma',
            key_bias=found.ends(f'.{BIAS}') and not found.ends(f'.{MASK}'),
        )
        fields.update(layout='official')
    if not found.ends(*BIASES):
        found.remarks.append('Queries and values have no bias there: it is zero here.')
    found.remarks.append(LICENCE)
    return fields


def _read(found, stack, *, patch, cls, registers, mask, ffn, scale, key_bias):
    """The ViT, from its names in a layout."""
    have, hints = found.have, found.hints
    dim, side = shapes.patch_embed(have, patch)
    depth = shapes.depth(have, stack)
    name = next((k for k in ffn if shapes.rows(have, f'{k}.weight')), None)
    if name is None:
        raise errors.UserError(shapes.absent(f'{stack}.0.{list(ffn)[-1]}.weight', have))
    periods = have.get(PERIODS)
    heads = hints.get('num_heads', hints.get('num_attention_heads'))
    if heads is None and periods:
        heads = max(dim // (4 * periods[0]), 1)
    heads = heads or HEADS.get((dim, depth))
    sized = hints if {'img_size', 'image_size'} & set(hints) else {**hints, 'img_size': SIZE}
    pixels = sized.get('img_size', sized.get('image_size'))
    pixels = pixels[0] if isinstance(pixels, list | tuple) else pixels
    vit = vit_lib.ViT(
        embed_dim=dim,
        depth=depth,
        num_heads=shapes.num_heads({'num_heads': heads}, dim, depth),
        patch_size=side,
        img_size=shapes.stated(sized, pixels // side, side),
        mlp_ratio=shapes.mlp_ratio(shapes.rows(have, f'{name}.weight'), dim, ffn[name]),
        num_cls_tokens=have.get(cls, (1, 0))[1],
        num_register_tokens=have.get(registers, (1, 0))[1],
        pos_embed='rope',
        key_bias=bool(key_bias),
        ffn=ffn[name],
        layer_scale=float(hints.get('layerscale_value', 1.0)) if found.ends(scale) else None,
        mask_token=mask in have,
        init_scheme='dinov3',
        eps=float(hints.get('layer_norm_eps', EPS)),
        pooled_norm='fc_norm.weight' in have and 'norm.weight' not in have,
    )
    return dict(vit=vit)


def rows(w):
    if w.layout == 'hf':
        found = tables.hf_encoder(w.vit, HF[w.names])
        found = tables.renamed(found, {'.projection.': '.', 'layernorm.': 'norm.'})
        found = [(p, k, 'token' if p.endswith('mask_token') else how) for p, k, how in found]
    else:
        found = tables.renamed(tables.encoder(w.vit), OFFICIAL)
        found = [
            (p, (k.replace('.w12.', '.w1.'), k.replace('.w12.', '.w2.')) if '.w12.' in k else k, h)
            for p, k, h in found
        ]
    return found if w.vit.key_bias else [row for old in found for row in _biases(*old)]


def _biases(path, key, how):
    """The row, or those of the biases of queries and values alone."""
    if not path.endswith('attn/qkv/bias'):
        return [(path, key, how)]
    if isinstance(key, str):
        key = [key.replace('qkv.bias', f'{x}_bias') for x in 'qkv']
    names = blocks_lib.QKV_BIASES
    return [(path.replace('bias', n), k, how) for n, k in zip(names, key[::2], strict=True)]


def parts(w, state_dict):
    """Biases of queries and values: of the official files the ends of one tensor; zeros of 7B."""
    if w.vit.key_bias:
        return {}
    keys = {tables.plain(k, w.prefix): k for k in state_dict if k.startswith(w.prefix)}
    dim, biased, found = w.vit.embed_dim, any(k.endswith(BIASES) for k in keys), {}
    for path, key, _ in rows(w):
        first = path.endswith('/q_bias')
        if not first and not path.endswith('/v_bias'):
            continue
        for i in range(w.vit.depth):
            name, fused = key.format(i=i), f'blocks.{i}.{BIAS}'
            if not biased:
                found[name] = np.zeros(dim, np.float32)
            elif fused in keys:
                value = state_dict[keys[fused]]
                found[name] = value[:dim] if first else value[2 * dim :]
    return found


def joined(w, tensors):
    if w.layout != 'official' or w.vit.key_bias:
        return tensors
    out = dict(tensors)
    for i in range(w.vit.depth):
        q, v = (out.pop(f'blocks.{i}.attn.{n}') for n in blocks_lib.QKV_BIASES)
        out[f'blocks.{i}.{BIAS}'] = np.concatenate([q, np.zeros_like(q), v])
    return out


def buffers(w):
    """The periods and masks of the official layout, the registers that transformers always has."""
    vit = w.vit
    if w.layout == 'hf':
        empty = np.zeros((1, 0, vit.embed_dim), np.float32)
        return {} if vit.num_register_tokens else {'embeddings.register_tokens': empty}
    found = {PERIODS: rope.periods(vit.embed_dim // vit.num_heads)}
    if not vit.key_bias:
        found |= {f'blocks.{i}.{MASK}': _mask(vit.embed_dim) for i in range(vit.depth)}
    return found


def _mask(dim):
    return np.repeat(np.array([1, 0, 1], np.float32), dim)


def rename(w, key):
    """The name in the tables of a key of the file; None for buffers and the fused bias."""
    if not key.startswith(w.prefix):
        return None
    name = tables.plain(key, w.prefix)
    hidden = name == PERIODS or name.endswith(MASK)
    hidden |= name.endswith(BIAS) and not w.vit.key_bias
    hidden |= name == 'embeddings.register_tokens' and not w.vit.num_register_tokens
    return None if hidden else name


def check(w, state_dict):
    """Raises if a mask is not 1, 0, 1 (NaN in a model that was never initialised), or a period."""
    for key in state_dict:
        if key.endswith(MASK):
            value = np.asarray(state_dict[key], np.float32)
            if not np.isfinite(value).all():
                raise errors.UserError(
                    f'{key} holds NaN: the model that it was saved of was never initialised '
                    f'(init_weights, or the published weights); save it after that.'
                )
            if not np.array_equal(value, _mask(w.vit.embed_dim)):
                raise errors.UserError(
                    f'{key} is not 1 for queries and values and 0 for keys; such weights are not '
                    f'read.'
                )
        elif key.endswith(PERIODS):
            value = np.asarray(state_dict[key], np.float32)
            if not tables.is_table(value, rope.periods(w.vit.embed_dim // w.vit.num_heads)):
                raise errors.UserError(
                    f'{key} is not {rope.PERIOD:g}^(2 i / (d/2)) of heads of d = '
                    f'{w.vit.embed_dim // w.vit.num_heads} channels; give num_heads, or weights '
                    f'with the periods of DINOv3.'
                )


def refusals(w):
    v, why = w.vit, ''
    if v.num_cls_tokens != 1 or not v.mask_token or v.layer_scale is None:
        why = (
            'DINOv3 has one class token, a mask token and layer scale, and this encoder differs '
            'from that'
        )
    eps = '' if any(math.isclose(v.eps, x) for x in (EPS, 1e-6)) else 'another eps'
    eps = eps and f'the official code normalises with eps 1e-5 or 1e-6, and this model with {v.eps}'
    pooled = v.pooled_norm and (
        "transformers' DINOv3ViTModel normalises every token, and this fine-tuned encoder the mean "
        'of its patches'
    )
    heads = 'no other code has names for the heads of DINOv3; use what=backbone'
    return {
        ('official', 'backbone'): why or eps,
        ('hf', 'backbone'): why or pooled or '',
        ('timm', 'backbone'): "timm's names of DINOv3 are not written; use official or hf",
        ('official', 'full'): heads,
        ('hf', 'full'): heads,
        ('timm', 'full'): heads,
    }


def hf_class(w):
    del w
    return 'DINOv3ViTModel'


def hf_config(w):
    v = w.vit
    swiglu = v.ffn == 'swiglu'
    width = blocks_lib.swiglu_hidden if swiglu else lambda dim, ratio: int(dim * ratio)
    return dict(
        model_type='dinov3_vit',
        intermediate_size=width(v.embed_dim, v.mlp_ratio),
        hidden_act='silu' if swiglu else 'gelu',
        use_gated_mlp=swiglu,
        query_bias=True,
        key_bias=v.key_bias,
        value_bias=True,
        proj_bias=True,
        mlp_bias=True,
        rope_theta=rope.PERIOD,
        layerscale_value=float(v.layer_scale),
        num_register_tokens=v.num_register_tokens,
        attention_dropout=0.0,
        drop_path_rate=0.0,
        # Not among its fields.
        hidden_dropout_prob=None,
        attention_probs_dropout_prob=None,
        qkv_bias=None,
    )


def timm_model(w):
    raise errors.UserError(f'{refusals(w)["timm", "backbone"]}.')


def method(w, hints):
    """None: the heads of training are read by no one."""
    del w, hints
    return None
