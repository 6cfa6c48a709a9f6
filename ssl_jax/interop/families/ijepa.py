# SPDX-License-Identifier: Apache-2.0
"""I-JEPA: encoders without class token, with fixed positions, and their predictor.

A training checkpoint has `encoder`, `predictor` and `target_encoder`. `files` reads the last two:
the target encoder is what the paper evaluates. (The converter of transformers takes `encoder`;
part=encoder reads that.)

References:
  I-JEPA `src/models/vision_transformer.py`, `src/helper.py`; transformers `models/ijepa`.
"""

from ssl_jax.interop import shapes, tables
from ssl_jax.interop.families import vit as plain
from ssl_jax.models.predictor import Predictor
from ssl_jax.run import errors

ORDER = 50
NETWORKS = {'predictor': Predictor}


def owns(vit, decoder=None):
    return decoder is None and _is_bare(vit) and vit.pos_embed == 'sincos'


def _is_bare(vit):
    """Whether an encoder has patch tokens alone, in blocks without layer scale."""
    tokens = vit.num_cls_tokens + vit.num_register_tokens + vit.mask_token
    return not tokens and vit.layer_scale is None and vit.ffn == 'mlp' and not vit.pooled_norm


def claims(w):
    return w.predictor is not None


def read(found):
    vit, layout = shapes.encoder(found)
    # transformers has no other class without a class token, and stores positions as parameters.
    if layout == 'timm' or not (owns(vit) or (found.hf and _is_bare(vit))):
        return None
    predictor = _predictor(found, vit)
    what = 'full' if predictor else 'backbone'
    names = 'memory' if found.is_memory else 'hub'
    return dict(family='ijepa', layout=layout, what=what, vit=vit, predictor=predictor, names=names)


def _predictor(found, vit):
    """The predictor beside an official encoder, None if there is none."""
    have = found.have
    if found.hf or not any(k.startswith('predictor_') for k in have):
        return None
    for name in ('predictor_embed.weight', 'predictor_blocks.0.mlp.fc1.weight'):
        if len(have.get(name, ())) != 2:
            raise errors.UserError(shapes.absent(name, have))
    dim, hidden = have['predictor_embed.weight'][0], have['predictor_blocks.0.mlp.fc1.weight'][0]
    if dim % vit.num_heads:
        raise errors.UserError(
            f'the predictor has as many heads as the encoder, and {vit.num_heads} does not divide '
            f'its width {dim}; {shapes.how_to_give("num_heads", 12)}.'
        )
    return Predictor(
        out_dim=vit.embed_dim,
        embed_dim=dim,
        depth=shapes.depth(have, 'predictor_blocks'),
        num_heads=vit.num_heads,
        grid=vit.img_size // vit.patch_size,
        mlp_ratio=shapes.mlp_ratio(hidden, dim, 'mlp'),
        eps=vit.eps,
    )


def rows(w):
    found = plain.rows(w)
    if w.predictor is None:
        return found
    return found + predictor_rows()


def predictor_rows():
    """Rows of the official predictor."""
    return [
        *tables.linear('predictor/embed', 'predictor_embed'),
        ('predictor/mask_token', 'mask_token', 'same'),
        ('predictor/pos_embed', 'predictor_pos_embed', 'fixed'),
        *tables.blocks('predictor/blocks', 'predictor_blocks'),
        *tables.norm('predictor/norm', 'predictor_norm'),
        *tables.linear('predictor/proj', 'predictor_proj'),
    ]


def refusals(w):
    out = plain.refusals(w)
    odd = w.vit.num_register_tokens or w.vit.num_cls_tokens
    out['hf', 'backbone'] = plain.vit_model_refusal(w) if odd else ''
    out['timm', 'backbone'] = 'timm has no I-JEPA; use official or hf'
    if w.predictor is not None:
        out['official', 'full'] = out['official', 'backbone']
        out['hf', 'full'] = "transformers' IJepaModel is the encoder alone; use official"
        out['timm', 'full'] = 'timm has no predictors; use official'
    return out


def hf_class(w):
    del w
    return 'IJepaModel'


def hf_config(w):
    return dict(plain.hf_config(w), model_type='ijepa')


timm_model = plain.timm_model


def method(w, hints):
    del hints
    if w.predictor is None:
        return None
    return 'ijepa', dict(predictor_dim=w.predictor.embed_dim, predictor_depth=w.predictor.depth)


def usage(w):
    """Lines of Python that load an export with its predictor; None for an encoder."""
    if w.predictor is None:
        return None
    return [
        '# a checkpoint as `load_checkpoint` of src/helper.py reads it, but for its optimizer',
        'import torch',
        'from safetensors.torch import load_file',
        "tensors = load_file('DIR/model.safetensors')",
        "predictor = {k for k in tensors if k.startswith('predictor_') or k == 'mask_token'}",
        "encoder = {f'module.{k}': x for k, x in tensors.items() if k not in predictor}",
        "predictor = {f'module.{k}': tensors[k] for k in predictor}",
        'parts = dict(encoder=encoder, target_encoder=encoder, predictor=predictor)',
        "torch.save({**parts, 'epoch': 0}, 'jepa.pth.tar')",
    ]
