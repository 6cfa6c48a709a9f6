# SPDX-License-Identifier: Apache-2.0
"""What weights are, as JSON and in words; and how images become their input.

A transform is a dict:
  size: side in pixels of the square that the encoder sees.
  crop: which fraction of the image's short side that square shows (the short side is resized to
    size / crop, the centre is cut out); None: the whole image, squeezed to size x size.
  mean, std: of the three channels, for values in [0, 1].
  interpolation: 'bicubic', 'bilinear', 'lanczos' or 'nearest'.
"""

import dataclasses
import math

import jax
import numpy as np

from ssl_jax.augment import photometry
from ssl_jax.interop import layouts
from ssl_jax.models import decoder as decoder_lib
from ssl_jax.models import heads as heads_lib
from ssl_jax.models import vit as vit_lib

RESAMPLE = {0: 'nearest', 1: 'lanczos', 2: 'bilinear', 3: 'bicubic'}  # Pillow's numbers
# How a module computes, not what it is.
NOT_SAVED = ('dtype', 'remat', 'parent', 'name')
# The networks beside an encoder, by their fields of `layouts.Weights`.
PARTS = {
    'decoder': decoder_lib.Decoder,
    'dino_head': heads_lib.DINOHead,
    'ibot_head': heads_lib.DINOHead,
}


def to_dict(weights):
    """`Weights` as JSON can hold it; inverse of `from_dict`."""
    parts = {k: getattr(weights, k) for k in PARTS}
    return dict(
        family=weights.family,
        layout=weights.layout,
        what=weights.what,
        vit=_fields(weights.vit),
        **{k: None if part is None else _fields(part) for k, part in parts.items()},
        vocab=weights.vocab,
        prefix=weights.prefix,
    )


def from_dict(d):
    """Inverse of `to_dict`.

    Raises:
      ValueError: if it has fields that this version does not know.
    """
    try:
        parts = {k: cls(**d[k]) for k, cls in PARTS.items() if d.get(k) is not None}
        return layouts.Weights(**{**d, 'vit': vit_lib.ViT(**d['vit']), **parts})
    except (KeyError, TypeError) as error:
        raise ValueError(
            f'these weights were described by another version of ssl_jax ({error}); use that one.'
        ) from error


def _fields(module):
    names = [f.name for f in dataclasses.fields(module) if f.name not in NOT_SAVED]
    return {name: getattr(module, name) for name in names}


def text(weights, params, num_tensors):
    """Lines for people: what the weights are, and how many."""
    v = weights.vit
    widths = (v.embed_dim, v.depth, v.num_heads)
    size = next((name for name, x in vit_lib.SIZES.items() if x == widths), '')
    heads = {k: getattr(weights, k) for k in ('dino_head', 'ibot_head')}
    beside = ' and decoder' if weights.decoder is not None else ''
    beside = ' and projection heads' if weights.dino_head is not None else beside
    beside = ' and layer to visual words' if weights.vocab else beside
    positions = {'sincos': 'sin-cos, fixed', 'learned': 'learned', 'none': 'none'}[v.pos_embed]
    if v.rel_pos:
        where = {'shared': 'for all blocks', 'layer': 'in each block'}[v.rel_pos]
        positions = '' if v.pos_embed == 'none' else f'{positions}, and '
        positions += f'relative, a table of biases {where}'
    parts = {
        'family': f'{weights.family}, {weights.layout} names, encoder{beside}',
        'encoder': f'{f"ViT-{size}, " if size else ""}{v.depth} blocks of {v.embed_dim} channels, '
        f'{v.num_heads} heads',
        'input': f'{v.img_size} px, patches of {v.patch_size} px',
        'tokens': f'{v.num_cls_tokens} class, {v.num_register_tokens} register, '
        f'{"a" if v.mask_token else "no"} mask token',
        'positions': positions,
        'FFN': f'{v.ffn}, ratio {v.mlp_ratio:g}'
        + (', layer scale' if v.layer_scale is not None else ''),
    }
    if weights.decoder is not None:
        d = weights.decoder
        parts['decoder'] = f'{d.depth} blocks of {d.embed_dim} channels, {d.num_heads} heads'
    for name, head in heads.items():
        if head is not None:
            parts[name] = f'{head.out_dim:,} prototypes of {head.bottleneck_dim} channels, '
            parts[name] += f'{head.num_layers} layers' + (
                f' of {head.hidden_dim}' if head.num_layers > 1 else ''
            )
    if weights.vocab:
        parts['words'] = f'{weights.vocab:,}, which need the tokenizer of their training'
    parts['tensors'] = f'{num_tensors}, {num_parameters(params):,} parameters'
    return [f'{name + ":":11}{value}' for name, value in parts.items()]


def num_parameters(params):
    """Numbers in a tree of arrays."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def transform_of(size, processor=None, hints=None, mean=photometry.MEAN, std=photometry.STD):
    """The transform that a folder states, or that of our evaluations.

    Args:
      size: pixels, where the folder names none.
      processor: preprocessor_config.json of HF, or {}.
      hints: config.json; that of timm has `pretrained_cfg`.
      mean, std: where the folder states none.
    """
    out = dict(
        size=size,
        crop=1.0,
        mean=list(mean),
        std=list(std),
        interpolation='bicubic',
    )
    cfg = (hints or {}).get('pretrained_cfg') or {}
    if cfg:
        out['size'] = int(cfg.get('input_size', [3, out['size']])[-1])
        out['crop'] = None if cfg.get('crop_mode') == 'squash' else float(cfg.get('crop_pct', 1.0))
        out.update({k: cfg[k] for k in ('mean', 'std', 'interpolation') if k in cfg})
    if processor:
        side = _side(processor.get('size'), out['size'])
        if processor.get('do_center_crop'):
            out['size'] = _side(processor.get('crop_size'), side)
            out['crop'] = out['size'] / side
        else:
            squeezed = not isinstance(processor.get('size'), dict) or 'height' in processor['size']
            out['size'], out['crop'] = side, None if squeezed else 1.0
        out['interpolation'] = RESAMPLE.get(processor.get('resample', 3), 'bicubic')
        out['mean'] = list(processor.get('image_mean', out['mean']))
        out['std'] = list(processor.get('image_std', out['std']))
    return out


def _side(size, default):
    """Pixels, from {'shortest_edge': 256}, {'height': 224, 'width': 224} or 224."""
    if isinstance(size, dict):
        size = size.get('shortest_edge', size.get('height'))
    return int(size or default)


def processor_of(transform):
    """preprocessor_config.json of a transform, for transformers' AutoImageProcessor.

    The BitImageProcessor is the one that resizes the short side and cuts out the centre in every
    release (it is also what DINOv2's folders name).
    """
    size, crop = transform['size'], transform['crop']
    square = {'height': size, 'width': size}
    return dict(
        image_processor_type='BitImageProcessor',
        do_convert_rgb=True,
        do_resize=True,
        size=square if crop is None else {'shortest_edge': round(size / crop)},
        resample={v: k for k, v in RESAMPLE.items()}[transform['interpolation']],
        do_center_crop=crop is not None,
        crop_size=square,
        do_rescale=True,
        rescale_factor=float(1 / np.float64(255)),
        do_normalize=True,
        image_mean=list(transform['mean']),
        image_std=list(transform['std']),
    )
