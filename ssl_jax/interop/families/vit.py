# SPDX-License-Identifier: Apache-2.0
"""Plain ViTs, in the names of MAE's repository, timm and transformers' ViTModel.

References:
  MAE `models_vit.py`; timm `models/vision_transformer.py`; transformers `models/vit`.
"""

from ssl_jax.interop import shapes, tables
from ssl_jax.models import blocks as blocks_lib
from ssl_jax.models import vit as vit_lib

ORDER = 100  # the last: whatever has no other family
# timm's names of our sizes; any other model is one of these, built with other arguments.
TIMM_SIZES = {'Ti': 'tiny', 'S': 'small', 'B': 'base', 'L': 'large', 'H': 'huge', 'g': 'giant'}


def owns(vit, decoder=None):
    del vit, decoder
    return True


def read(found):
    vit, layout = shapes.encoder(found)
    dino = vit.num_cls_tokens == 1 and vit.pos_embed == 'learned' and not vit.pooled_norm
    if layout == 'official' and dino and 'head.weight' not in found.have:
        vit = vit.clone(pos_resize='offset')
        if not vit.mask_token and 'pos_resize' not in found.hints:
            found.remarks.append(
                f'The file does not say what code it is of: at other sizes than {vit.img_size} px '
                f'positions are resized as DINO and iBOT do (pos_resize=offset); for weights of '
                f'MAE or DeiT give pos_resize=bicubic, of timm pos_resize=antialias.'
            )
    return dict(layout=layout, vit=vit, names='memory' if found.is_memory else 'hub')


def rows(w):
    if w.layout == 'hf':
        found = tables.hf_encoder(w.vit, tables.of_names(tables.HF_VIT, w.names))
        return [row for row in found if row[0] != 'encoder/mask_token']
    if w.layout == 'timm':
        return tables.timm_encoder(w.vit)
    # The classes of MAE and DINO, and iBOT's outside its training, have no mask token.
    plain = w.vit.layer_scale is None
    found = tables.encoder(w.vit)
    return [row for row in found if not plain or row[0] != 'encoder/mask_token']


def refusals(w):
    only = 'only MAE and Pixio have a decoder, and DINOv2 heads'
    return {
        ('official', 'backbone'): eps_refusal(w.vit, 'the official code'),
        ('hf', 'backbone'): vit_model_refusal(w),
        ('timm', 'backbone'): timm_refusal(w),
        ('official', 'full'): only,
        ('hf', 'full'): only,
        ('timm', 'full'): 'timm has no decoders; use official or hf',
    }


def eps_refusal(vit, who):
    """Why a library with fixed eps cannot hold an encoder.

    1e-12, in some configs of transformers, moves features by less than 1e-5 and is let through.
    """
    differs = vit.eps > 1e-6
    return f'{who} normalises with eps 1e-6, and this model with {vit.eps:g}' if differs else ''


def vit_model_refusal(w):
    """Why transformers' ViTModel cannot hold an encoder."""
    v = w.vit
    if v.num_cls_tokens != 1:
        return f'transformers has no class for {described(w)}'
    if v.pooled_norm:
        return (
            "transformers' ViTModel normalises every token, and this fine-tuned encoder the mean "
            'of its patches'
        )
    if v.num_register_tokens or v.ffn != 'mlp' or v.layer_scale is not None:
        return (
            f'transformers has ViTModel for a {w.family} encoder, without registers, SwiGLU and '
            f'layer scale'
        )
    return ''


def timm_refusal(w):
    """Why timm's VisionTransformer cannot hold an encoder."""
    v = w.vit
    if v.num_cls_tokens > 1:
        return 'timm has no Pixio, which has several class tokens; use official or hf'
    if v.num_cls_tokens != 1:
        return f'the timm models known here have one class token, and this is {described(w)}'
    if v.num_register_tokens and v.pos_embed == 'sincos':
        return 'the timm models with registers have learned positions'
    if v.ffn == 'swiglu' and v.layer_scale is None and not eps_refusal(v, 'timm'):
        return 'the timm models with SwiGLU have layer scale'
    return eps_refusal(v, 'timm')


def described(w):
    """An encoder in words."""
    v = w.vit
    tokens = f'{v.num_cls_tokens} class tokens and {v.num_register_tokens} registers'
    return f'a {w.family} encoder with {tokens}'


def hf_class(w):
    del w
    return 'ViTModel'


def hf_config(w):
    return dict(model_type='vit', intermediate_size=int(w.vit.embed_dim * w.vit.mlp_ratio))


def timm_model(w):
    v, architecture = w.vit, 'vit_base_patch16_224'
    for size in timm_sizes(v):
        patch = 14 if size in ('huge', 'giant') else 16
        architecture = f'vit_{size}_patch{patch}_224'
    return architecture, timm_args(v)


def timm_sizes(vit):
    """timm's names of an encoder of this size."""
    widths = (vit.embed_dim, vit.depth, vit.num_heads)
    return [TIMM_SIZES[s] for s in TIMM_SIZES if vit_lib.SIZES[s] == widths]


def timm_args(vit):
    """Arguments of timm's VisionTransformer."""
    args = dict(
        img_size=vit.img_size,
        patch_size=vit.patch_size,
        embed_dim=vit.embed_dim,
        depth=vit.depth,
        num_heads=vit.num_heads,
        mlp_ratio=vit.mlp_ratio,
    )
    if vit.pooled_norm:
        args.update(global_pool='avg', fc_norm=True)
    if vit.layer_scale is not None:
        args['init_values'] = vit.layer_scale
    if vit.num_register_tokens:
        args.update(reg_tokens=vit.num_register_tokens, no_embed_class=True)
    if vit.ffn == 'swiglu':
        both = 2 * blocks_lib.swiglu_hidden(vit.embed_dim, vit.mlp_ratio)
        args['mlp_ratio'] = shapes.mlp_ratio(both, vit.embed_dim, 'mlp')
    return args


def method(w, hints):
    del w, hints
    return None
