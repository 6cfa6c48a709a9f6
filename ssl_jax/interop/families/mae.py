# SPDX-License-Identifier: Apache-2.0
"""MAE: an encoder with fixed positions, or with its decoder.

References:
  MAE `models_mae.py`; transformers `models/vit_mae`.
"""

from ssl_jax.interop import shapes, stated, tables
from ssl_jax.interop.families import vit as plain
from ssl_jax.models.decoder import Decoder

ORDER = 40
NETWORKS = {'decoder': Decoder}
INNER = ('vit.', 'decoder.decoder_pred.weight')  # prefix of the encoder in ViTMAEForPreTraining
DECODER_STACK = {'hub': 'decoder_layers', 'saved': 'decoder_encoder.layer'}


def owns(vit, decoder=None):
    return vit.num_cls_tokens == 1 and (decoder is not None or vit.pos_embed == 'sincos')


def claims(w):
    return w.decoder is not None and w.family == 'vit'


def read(found):
    vit, layout = shapes.encoder(found)
    decoder = shapes.decoder(found, vit)
    if decoder is None and not owns(vit):
        return None
    names = 'memory' if found.is_memory else 'hub'
    if any('decoder_encoder.layer.' in k for k in found.have):
        names = 'saved'
    what = 'full' if decoder else 'backbone'
    return dict(layout=layout, what=what, vit=vit, decoder=decoder, names=names)


def rows(w):
    if w.decoder is None:
        return plain.rows(w)
    return hf_rows(w, w.names) if w.layout == 'hf' else pretraining_rows(w)


def pretraining_rows(m):
    """Rows of the official pretraining checkpoints of MAE and Pixio.

    Args:
      m: anything with a `vit` and a `decoder`.
    """
    rows = tables.encoder(m.vit) + _decoder_ends(m.decoder)
    return rows + tables.blocks('decoder/decoder_blocks', 'decoder_blocks')


def hf_rows(m, names='hub'):
    """Rows of ViTMAEForPreTraining of transformers."""
    block = tables.of_names(tables.HF_VIT, names)
    stack = f'decoder.{tables.of_names(DECODER_STACK, names)}'
    rows = tables.hf_encoder(m.vit, block, 'vit.')
    rows += [(a, f'decoder.{b}', how) for a, b, how in _decoder_ends(m.decoder)]
    return rows + tables.hf_blocks('decoder/decoder_blocks', stack, block)


def _decoder_ends(decoder):
    """Rows of a decoder without its blocks; transformers uses the same names."""
    fixed = 'fixed' if decoder.pos_embed == 'sincos' else 'same'
    return [
        *tables.linear('decoder/decoder_embed', 'decoder_embed'),
        ('decoder/mask_token', 'mask_token', 'same'),
        ('decoder/decoder_pos_embed', 'decoder_pos_embed', fixed),
        *tables.norm('decoder/decoder_norm', 'decoder_norm'),
        *tables.linear('decoder/decoder_pred', 'decoder_pred'),
    ]


def refusals(w):
    out = plain.refusals(w)
    if w.decoder is not None:
        out['official', 'full'] = out['official', 'backbone']
        odd = w.vit.num_cls_tokens != 1 or w.vit.num_register_tokens
        out['hf', 'full'] = (
            'transformers has a decoder only in ViTMAEForPreTraining, with one class token and no '
            'register, and PixioModel is the encoder alone; use official'
            if odd
            else ''
        )
    return out


def hf_class(w):
    return 'ViTModel' if w.decoder is None else 'ViTMAEForPreTraining'


def hf_config(w):
    config = plain.hf_config(w)
    if w.decoder is not None:
        d = w.decoder
        config.update(
            model_type='vit_mae',
            decoder_hidden_size=d.embed_dim,
            decoder_num_hidden_layers=d.depth,
            decoder_num_attention_heads=d.num_heads,
            decoder_intermediate_size=int(d.embed_dim * d.mlp_ratio),
        )
    return config


timm_model = plain.timm_model


def method(w, hints):
    """The method 'mae'; HF's config says what its decoder predicts, else it is MAE's default."""
    if w.decoder is None:
        return None
    d = w.decoder
    return 'mae', dict(
        num_cls_tokens=w.vit.num_cls_tokens,
        pos_embed=w.vit.pos_embed,
        decoder_embed_dim=d.embed_dim,
        decoder_depth=d.depth,
        decoder_num_heads=d.num_heads,
        **stated.pixel_loss(hints),
    )
