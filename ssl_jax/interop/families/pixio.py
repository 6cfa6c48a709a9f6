# SPDX-License-Identifier: Apache-2.0
"""Pixio: MAE's names with several class tokens and learned positions.

References:
  Pixio `pretraining/models_pixio.py`, `pixio.py`; transformers `models/pixio`.
"""

from ssl_jax.interop import shapes, tables
from ssl_jax.interop.families import mae
from ssl_jax.interop.families import vit as plain

ORDER = 30
NETWORKS = mae.NETWORKS
HF = {
    'hub': {**tables.HUB, **tables.NORMS, **tables.MLP},
    'saved': {**tables.HUB, **tables.NORMS, **tables.VIT_MLP},
    'memory': tables.HF_VIT['memory'],
}


def owns(vit, decoder=None):
    del decoder
    return vit.num_cls_tokens > 1 and vit.layer_scale is None


def read(found):
    vit, layout = shapes.encoder(found)
    named = found.hf and (
        found.hints.get('model_type') == 'pixio'
        or any(k.startswith('encoder.layer.') and k.endswith('.norm1.weight') for k in found.have)
    )
    if not owns(vit) and not (named and vit.layer_scale is None):
        return None
    decoder = shapes.decoder(found, vit)
    names = 'memory' if found.is_memory else 'hub'
    if found.hf and found.ends('.intermediate.dense.weight'):
        names = 'saved'
    what = 'full' if decoder else 'backbone'
    return dict(family='pixio', layout=layout, what=what, vit=vit, decoder=decoder, names=names)


def rows(w):
    if w.layout == 'hf':
        return tables.hf_encoder(w.vit, tables.of_names(HF, w.names))
    return mae.rows(w)


def refusals(w):
    v, out = w.vit, mae.refusals(w)
    if v.num_register_tokens or v.ffn != 'mlp' or v.layer_scale is not None:
        why = (
            f'transformers has PixioModel for a {w.family} encoder, without registers, SwiGLU and '
            f'layer scale'
        )
    elif v.mlp_ratio != int(v.mlp_ratio):
        why = (
            f"transformers' PixioModel takes whole numbers as mlp_ratio, and this is {v.mlp_ratio}"
        )
    else:
        why = "transformers' PixioModel has no mask token" if v.mask_token else ''
    out['hf', 'backbone'] = why
    out['timm', 'backbone'] = (
        'timm has no Pixio, which has several class tokens; use official or hf'
    )
    return out


def hf_class(w):
    return 'PixioModel' if w.decoder is None else 'ViTMAEForPreTraining'


def hf_config(w):
    return dict(
        model_type='pixio',
        n_cls_tokens=w.vit.num_cls_tokens,
        mlp_ratio=int(w.vit.mlp_ratio),
        drop_path_rate=0.0,
    )


timm_model = plain.timm_model


def method(w, hints):
    found = mae.method(w, hints)
    if found is None:
        return None
    side = w.vit.img_size // w.vit.patch_size
    grid = next(g for g in (4, 2, 1) if side % g == 0)
    return found[0], dict(found[1], mask_grid=grid, flip=0.0)
