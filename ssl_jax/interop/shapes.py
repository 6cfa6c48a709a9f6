# SPDX-License-Identifier: Apache-2.0
"""Sizes of a network from the names and shapes of its torch tensors.

`have` is name -> shape, in the names of a layout and without a prefix.
"""

import dataclasses
import math
import re
from collections.abc import Callable

import numpy as np

from ssl_jax.interop import tables
from ssl_jax.models import blocks as blocks_lib
from ssl_jax.models import pos_embed
from ssl_jax.models import vit as vit_lib
from ssl_jax.models.decoder import Decoder
from ssl_jax.run import errors

# `model_type` of transformers -> its layer_norm_eps where config.json has none; else 1e-6.
EPS = dict.fromkeys(('vit', 'vit_mae', 'beit', 'data2vec-vision', 'ijepa', 'deit'), 1e-12)
# Width of a decoder -> its number of heads, in MAE and in Pixio.
DECODER_HEADS = {512: 16}


@dataclasses.dataclass
class Found:
    """A set of tensors that a family may recognise."""

    have: dict  # name -> shape
    keys: dict  # name -> key in the file
    hints: dict  # config.json of the folder, and what the user says
    table: Callable  # name -> array; None where only shapes are known
    hf: bool  # whether the names are those of transformers
    inner: str  # the part of the prefix that belongs to the names: 'vit.', 'beit.'
    shapes: dict  # key -> shape of all tensors of the file
    base: str  # in front of the names of heads, such as 'teacher.'
    array: Callable  # key -> array; None where only shapes are known
    # Sentences on how the file was understood; families append to it.
    remarks: list = dataclasses.field(default_factory=list)
    # Keys of the file beside `have` that belong to the network; families append to it.
    used: set = dataclasses.field(default_factory=set)
    # Keys that are no part of it; families append to it.
    left_out: list = dataclasses.field(default_factory=list)

    def take(self, keys) -> None:
        """Marks keys of the file as part of the network beside `have`."""
        self.used |= set(keys)
        for name in [n for n, k in self.keys.items() if k in self.used]:
            self.have.pop(name, None)

    def ends(self, *endings) -> bool:
        """Whether a name ends so."""
        return any(k.endswith(endings) for k in self.have)

    @property
    def is_memory(self) -> bool:
        """Whether names are those of the modules of transformers in memory."""
        return self.ends('q_proj.weight')


def encoder(found, dino=False):
    """(ViT, layout) of an encoder in the names of MAE, DINOv2 and timm, or of transformers.

    Args:
      dino: from the training of DINO, iBOT or DINOv2; a mask token that is not there, as DINO has
        none, is made.
    """
    if found.hf:
        return _hf_encoder(found), 'hf'
    have, hints = found.have, found.hints
    dim, patch = patch_embed(have, 'patch_embed.proj.weight')
    folded = 'reg_token' in have  # timm: the position table has no class row
    ffn, hidden = 'mlp', rows(have, 'mlp.fc1.weight')
    if hidden is None:
        ffn, hidden = 'swiglu', (rows(have, 'mlp.w12.weight') or 0) // 2
    elif hidden == 2 * (rows(have, 'mlp.fc2.weight', axis=1) or 0):  # timm
        ffn, hidden = 'swiglu', hidden // 2
    scaled = found.ends('.ls1.gamma')
    mask_token = len(have.get('mask_token', ())) == 2
    timm = not dino and (folded or 'architecture' in hints or (scaled and not mask_token))
    classes, img_size = grid(have, hints, 'pos_embed', 'cls_token', patch, folded)
    registers = have.get('register_tokens', have.get('reg_token', (1, 0)))[1]
    fixed = not (scaled or dino)
    pos = positions(found.table, 'pos_embed', have, dim, img_size // patch, classes, fixed)
    vit = _vit(
        hints,
        hidden,
        scaled,
        dino,
        resize=_resize(timm, scaled or dino, registers),
        pooled_norm='fc_norm.weight' in have and 'norm.weight' not in have,
        embed_dim=dim,
        depth=depth(have, 'blocks'),
        patch_size=patch,
        img_size=img_size,
        num_cls_tokens=classes,
        num_register_tokens=registers,
        pos_embed=pos,
        ffn=ffn,
        mask_token=mask_token or (timm and scaled) or dino,
    )
    return vit, 'timm' if timm else 'official'


def _hf_encoder(found):
    have, hints, inner = found.have, found.hints, found.inner
    e = f'{inner}embeddings'
    dim, patch = patch_embed(have, f'{e}.patch_embeddings.projection.weight')
    if len(have.get(f'{e}.mask_token', ())) == 3:  # of SimMIM
        found.left_out.append(found.keys[f'{e}.mask_token'])
    registers = have.get(f'{e}.register_tokens', (1, 0))[1]
    scaled = found.ends('.layer_scale1.lambda1')
    stack = f'{inner}layers' if found.is_memory and not scaled else f'{inner}encoder.layer'
    inside = {k: s for k, s in have.items() if k.startswith(f'{stack}.')}
    ffn = 'swiglu'
    hidden = (rows(inside, 'mlp.weights_in.weight') or 0) // 2
    hidden = hidden or rows(inside, 'mlp.gate_proj.weight')
    if not hidden:
        ffn = 'mlp'
        hidden = rows(inside, 'mlp.fc1.weight') or rows(inside, 'intermediate.dense.weight')
    pos = f'{e}.position_embeddings'
    classes, img_size = grid(have, hints, pos, f'{e}.cls_token', patch, False)
    return _vit(
        hints,
        hidden,
        scaled,
        False,
        resize='antialias' if scaled and registers else 'bicubic',
        embed_dim=dim,
        depth=depth(have, stack),
        patch_size=patch,
        img_size=img_size,
        num_cls_tokens=classes,
        num_register_tokens=registers,
        pos_embed=positions(found.table, pos, have, dim, img_size // patch, classes, not scaled),
        ffn=ffn,
        mask_token=len(have.get(f'{e}.mask_token', ())) == 2 or bool(registers),
    )


def classifier(found, vit) -> dict:
    """Fields of `layouts.Weights` of MAE's and BEiT's fine-tuned form; {} if it has no head."""
    have, dim = found.have, vit.embed_dim
    weight = have.get('head.weight', ())
    if len(weight) != 2 or weight[1] != dim or have.get('head.bias') != weight[:1]:
        return {}
    names = ['head.weight', 'head.bias']
    names += ['fc_norm.weight', 'fc_norm.bias'] if vit.pooled_norm else []
    found.take(found.keys[name] for name in names if name in found.keys)
    pool = 'patch' if vit.pooled_norm else 'cls'
    return dict(what='full', num_classes=int(weight[0]), pool=pool)


def eps(hints) -> float:
    """The epsilon of the norms."""
    return float(hints.get('layer_norm_eps', EPS.get(hints.get('model_type'), 1e-6)))


def _resize(timm, dinov2, registers):
    """How a library resizes its positions, see `pos_embed.resize_weights`."""
    if timm or (dinov2 and registers):
        return 'antialias'
    return 'offset' if dinov2 else 'bicubic'


def _vit(hints, hidden, scaled, dino, resize, **fields):
    """The ViT with an FFN of `hidden` channels; with layer scale it is DINOv2's.

    dino: of the training of DINO, iBOT or DINOv2, with layer scale or without.
    """
    dim, ffn = fields['embed_dim'], fields['ffn']
    if not hidden:
        raise errors.UserError('no block has an FFN of a known kind, fc1 and fc2 or a SwiGLU.')
    return vit_lib.ViT(
        **fields,
        num_heads=num_heads(hints, dim, fields['depth']),
        mlp_ratio=mlp_ratio(hidden, dim, ffn),
        pos_resize=resize,
        layer_scale=float(hints.get('layerscale_value', 1.0)) if scaled else None,
        init_scheme='dinov2' if scaled or dino else 'mae',
        eps=eps(hints),
    )


def decoder(found, vit):
    """The decoder beside an encoder, of MAE and Pixio; None if there is none."""
    have, hints, prefix, stack, fc1 = found.have, found.hints, '', 'decoder_blocks', '.mlp.fc1'
    if found.hf:
        if not found.inner:
            return None
        saved = any('decoder_encoder.layer.' in k for k in have)
        prefix = 'decoder.'
        stack = 'decoder.decoder_encoder.layer' if saved else 'decoder.decoder_layers'
        fc1 = '.mlp.fc1' if found.is_memory else '.intermediate.dense'
    elif not any(k.startswith('decoder_') for k in have):
        return None
    fc1 = f'{fc1}.weight'
    dim = have.get(f'{prefix}decoder_embed.weight', have.get(f'{prefix}mask_token', (0,)))[0]
    layers, side = depth(have, stack), vit.img_size // vit.patch_size
    if dim <= 1:
        raise errors.UserError(absent(f'{prefix}decoder_embed.weight', have))
    hidden = next((s[0] for k, s in have.items() if k.startswith(stack) and k.endswith(fc1)), None)
    if hidden is None:
        raise errors.UserError(absent(f'{stack}.0{fc1}', have))
    name = f'{prefix}decoder_pos_embed'
    heads = hints.get('decoder_num_heads', hints.get('decoder_num_attention_heads'))
    heads = heads or DECODER_HEADS.get(dim)
    if not heads or dim % int(heads):
        raise errors.UserError(
            f'the number of heads of a decoder of width {dim} is not in its tensors'
            f'{f", and {heads} does not divide that" if heads else ""}; '
            f'{how_to_give("decoder_num_heads", 16)}.'
        )
    return Decoder(
        embed_dim=dim,
        depth=layers,
        num_heads=int(heads),
        num_patches=side**2,
        num_cls_tokens=vit.num_cls_tokens,
        out_dim=3 * vit.patch_size**2,
        pos_embed=positions(found.table, name, have, dim, side, vit.num_cls_tokens, True),
        mlp_ratio=mlp_ratio(hidden, dim, 'mlp'),
        eps=vit.eps,
    )


def patch_embed(have, key):
    """(embed_dim, patch_size) of the kernel of the patch embedding."""
    shape = have[key]
    if len(shape) != 4 or shape[1] != 3 or shape[2] != shape[3]:
        raise errors.UserError(
            f'{key} has shape {shape}, expected (width, 3, patch, patch): square patches of RGB.'
        )
    return shape[0], shape[2]


def depth(have, stack):
    found = [re.match(re.escape(stack) + r'\.(\d+)\.', k) for k in have]
    depth = 1 + max((int(m[1]) for m in found if m), default=-1)
    if not depth:
        raise errors.UserError(absent(f'{stack}.0', have))
    return depth


def rows(have, end, axis=0):
    """Length of an axis of the first matrix whose name ends so; None if there is none."""
    found = sorted(k for k, s in have.items() if k.endswith(f'.{end}') and len(s) == 2)
    found = [k for k in found if not k.startswith('decoder')]
    return have[found[0]][axis] if found else None


def grid(have, hints, pos, cls, patch, folded):
    """(class tokens, img_size) from the tables of positions and class tokens."""
    if pos not in have:
        raise errors.UserError(absent(pos, have))
    if len(have[pos]) != 3:
        raise errors.UserError(f'{pos} has shape {have[pos]}, expected (1, positions, width).')
    n = have[pos][1]
    classes = have[cls][1] if len(have.get(cls, ())) == 3 else 0
    if cls not in have and math.isqrt(n) ** 2 != n:
        raise errors.UserError(absent(cls, have))
    side = math.isqrt(n - (0 if folded else classes))
    if side**2 != n - (0 if folded else classes):
        raise errors.UserError(
            f'{pos} has {n} positions, and without those of {classes} class tokens that is no '
            f'square grid; only square tables are read.'
        )
    return classes, stated(hints, side, patch)


def stated(hints, side, patch):
    """img_size in pixels of a grid of side x side patches, from the hints if they have it."""
    model_args = hints.get('model_args') or {}
    given = hints.get('img_size', hints.get('image_size', model_args.get('img_size')))
    if isinstance(given, list | tuple):
        if len(set(given)) != 1:
            raise errors.UserError(
                f'img_size {list(given)} is no square; only square tables of positions are read.'
            )
        given = given[0]
    given = side * patch if given is None else given
    hinted = hints.get('patch_size', patch)
    if given // patch != side or hinted not in (patch, [patch, patch], (patch, patch)):
        raise errors.UserError(
            f'img_size {given} and patch_size {hinted} do not fit the tensors, which have '
            f'{side} x {side} positions and patches of {patch} pixels.'
        )
    return given


def positions(table, name, have, dim, grid, classes, maybe):
    """'sincos' or 'learned'; from shapes alone, one class token or none means sin-cos."""
    shape = (1, classes + grid**2, dim)
    if not maybe or dim % 4 or have.get(name) != shape:
        return 'learned'
    value = table(name)
    if value is None:
        return 'sincos' if classes == 1 else 'learned'
    same = tables.is_table(np.asarray(value, np.float32), pos_embed.sincos(dim, grid, classes))
    return 'sincos' if same else 'learned'


def num_heads(hints, dim, depth):
    """Heads leave no trace in the tensors: from the hints, or from the named sizes."""
    heads = hints.get('num_heads', hints.get('num_attention_heads'))
    heads = heads or (hints.get('model_args') or {}).get('num_heads')
    named = reversed(vit_lib.SIZES.values())  # of two equal sizes the first
    heads = heads or {(d, n): h for d, n, h in named}.get((dim, depth))
    if not heads:
        raise errors.UserError(
            f'{depth} blocks of width {dim} are no size with a name, and the number of heads is '
            f'not in the tensors; {how_to_give("num_heads", 12)}.'
        )
    if dim % int(heads):
        raise errors.UserError(f'num_heads={heads} does not divide the width {dim}; give another.')
    return int(heads)


def how_to_give(hint, value):
    """End of a sentence that asks for a hint."""
    return f'give {hint} behind the other words of the command, as in {hint}={value}'


def mlp_ratio(hidden, dim, ffn):
    """The shortest ratio from which our FFN, and torch's, gets exactly `hidden` channels."""
    if ffn == 'swiglu':
        if blocks_lib.swiglu_hidden(dim, 4.0) == hidden:
            return 4.0
        if hidden % 8:
            raise errors.UserError(f'a SwiGLU of {hidden} channels is no multiple of 8.')
        return mlp_ratio(hidden * 3 // 2, dim, 'mlp')
    for digits in range(17):
        ratio = round(hidden / dim, digits)
        if int(dim * ratio) == hidden:
            return ratio
    return math.nextafter(hidden / dim, math.inf)


def absent(key, have):
    near = errors.close(key, have)
    return f'missing {key}' + (f' (nearest: {near[0]}).' if near else '.')
