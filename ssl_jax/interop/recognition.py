# SPDX-License-Identifier: Apache-2.0
"""What a set of torch tensors is, found from their names and shapes."""

import difflib
import re

from ssl_jax.interop import beit, heads, sizes, tables
from ssl_jax.models import vit as vit_lib
from ssl_jax.models.decoder import Decoder

# The key that says where the encoder is and in whose names.
ENCODER = {
    'patch_embed.proj.weight': 'official',
    'embeddings.patch_embeddings.projection.weight': 'hf',
}
# What stands beside an encoder in a file: heads of training and of tasks.
HEADS = re.compile(r'(pooler|classifier|head|head_dist|dino_head|ibot_head|last_proj)\.')
OPTIMIZER = re.compile(
    r'(^|[./])(exp_avg|exp_avg_sq|momentum_buffer|optimizer\w*|opt_state|param_groups|mu|nu)([./]|$)'
    r'|^state[./]\d'
)
# Parts of names by which other networks are known.
FOREIGN = {
    'rope_embed': 'DINOv3',
    'storage_tokens': 'DINOv3',
    'visual.': 'CLIP',
    'vision_model.': 'CLIP or SigLIP',
    'downsample': 'a ResNet or a Swin Transformer',
}
KNOWN = 'MAE, Pixio, DINOv2, BEiT, plain ViTs, in the names of their authors, transformers or timm'
# Width of a decoder -> its number of heads, in MAE and in Pixio.
DECODER_HEADS = {512: 16}


def family_of(vit, decoder=None):
    """The family that a ViT is an instance of: 'mae', 'pixio', 'dinov2', 'beit' or 'vit'."""
    if vit.rel_pos or not vit.key_bias:
        return 'beit'
    if vit.layer_scale is not None:
        return 'dinov2'
    if vit.num_cls_tokens > 1:
        return 'pixio'
    one = vit.num_cls_tokens == 1
    return 'mae' if one and (decoder is not None or vit.pos_embed == 'sincos') else 'vit'


def find(tensors, hints):
    """See `layouts.recognise`; returns the fields of `layouts.Weights` as a dict."""
    shapes = getattr(tensors, 'shapes', None)
    if shapes is None:
        shapes = {k: tuple(getattr(v, 'shape', v)) for k, v in tensors.items()}
    marker = _marker(shapes)
    hf = marker.endswith('projection.weight')
    prefix = marker.removesuffix(next(k for k in ENCODER if marker.endswith(k)))
    inner = ''  # what of the prefix belongs to the names of the layout
    if prefix.endswith('vit.') and f'{prefix[:-4]}decoder.decoder_pred.weight' in shapes:
        prefix, inner = prefix[:-4], 'vit.'
    if prefix.endswith('beit.') and f'{prefix[:-5]}lm_head.weight' in shapes:
        prefix, inner = prefix[:-5], 'beit.'
    keys = {tables.plain(k, prefix): k for k in shapes if k.startswith(prefix)}
    have = {name: tuple(shapes[k]) for name, k in keys.items()}
    left_out = [k for k in shapes if not k.startswith(prefix)]
    left_out += [k for name, k in keys.items() if HEADS.match(name)]
    beside, used = {}, set()
    if not hf:
        base = prefix.removesuffix('backbone.')
        beside, used = heads.find(shapes, base, lambda k: _array(tensors[k]))
        keys = {name: k for name, k in keys.items() if k not in used}
        have = {name: tuple(shapes[k]) for name, k in keys.items()}

    def table(name):
        return _array(tensors[keys[name]])

    if beit.is_beit(have):
        fields = beit.read_hf(have, hints, inner) if hf else beit.read_official(have, hints)
        if fields['fc_norm']:
            used |= {keys.get(f'pooler.layernorm.{k}') for k in ('weight', 'bias')}
    elif hf:
        if len(have.get('embeddings.mask_token', ())) == 3:  # of SimMIM
            left_out.append(keys['embeddings.mask_token'])
        fields = _read_hf(have, hints, table, inner)
    else:
        fields = _read_official(have, hints, table, 'dino_head' in beside)
    left_out = tuple(sorted(set(left_out) - used))
    return dict({**fields, **beside}, prefix=prefix, left_out=left_out)


def _array(value):
    """A tensor; None where only its shape is known."""
    return value if hasattr(value, 'dtype') else None


def _marker(shapes):
    """The key of the patch embedding, a teacher's before a student's; or a sentence."""
    found = [k for k in shapes if any(k == e or k.endswith(f'.{e}') for e in ENCODER)]
    if found:
        return min(found, key=lambda k: ('teacher' not in k, 'student' in k, len(k), k))
    some = ', '.join(sorted(shapes)[:4])
    if not shapes:
        raise ValueError('there are no tensors; give a file of weights.')
    if sum(bool(OPTIMIZER.search(k)) for k in shapes) > len(shapes) / 2:
        raise ValueError(
            f'these tensors are the state of an optimizer ({some}, …) and no weights; give the '
            f'checkpoint of the model.'
        )
    foreign = [name for part, name in FOREIGN.items() if any(part in k for k in shapes)]
    like = f'look like {foreign[0]}, which' if foreign else f'({some}, …)'
    near = [n for e in ENCODER for n in difflib.get_close_matches(e, shapes, n=1, cutoff=0.8)]
    raise ValueError(
        f'these {len(shapes)} tensors {like} are of no family known here: none is '
        f'{" or ".join(ENCODER)}{f" (nearest: {near[0]})" if near else ""}; known are {KNOWN}.'
    )


def _read_official(have, hints, table, dino):
    """Fields of MAE, Pixio, DINOv2 (hub) and timm, whose names are nearly the same.

    dino: whether projection heads were found beside it.  Then it comes from the training of DINO,
    iBOT or DINOv2; a mask token that is not there, as DINO has none, is made.
    """
    dim, patch = sizes.patch(have, 'patch_embed.proj.weight')
    registers = have.get('register_tokens', have.get('reg_token', (1, 0)))[1]
    folded = 'reg_token' in have  # timm: the position table has no class row
    depth = sizes.depth(have, 'blocks')
    ffn, hidden = 'mlp', sizes.rows(have, 'mlp.fc1.weight')
    if hidden is None:
        ffn, hidden = 'swiglu', (sizes.rows(have, 'mlp.w12.weight') or 0) // 2
    elif hidden == 2 * (sizes.rows(have, 'mlp.fc2.weight', axis=1) or 0):  # timm
        ffn, hidden = 'swiglu', hidden // 2
    scaled = any(k.endswith('.ls1.gamma') for k in have)
    mask_token = len(have.get('mask_token', ())) == 2
    timm = not dino and (folded or 'architecture' in hints or (scaled and not mask_token))
    classes, img_size = sizes.grid(have, hints, 'pos_embed', 'cls_token', patch, folded)
    trained = scaled or dino
    pos = sizes.positions(table, 'pos_embed', have, dim, img_size // patch, classes, not trained)
    vit = _vit(
        hints,
        hidden,
        scaled,
        dino,
        embed_dim=dim,
        depth=depth,
        patch_size=patch,
        img_size=img_size,
        num_cls_tokens=classes,
        num_register_tokens=registers,
        pos_embed=pos,
        ffn=ffn,
        mask_token=mask_token or (timm and scaled) or dino,
    )
    decoder = None
    if any(k.startswith('decoder_') for k in have):
        decoder = _decoder(have, hints, table, vit, '', 'decoder_blocks', '.mlp.fc1.weight')
    family = family_of(vit, decoder)
    if family == 'vit' and timm:
        vit = vit.clone(pos_resize='antialias')  # no official code but timm's
    return dict(
        family=family,
        layout='timm' if timm else 'official',
        what='full' if decoder or dino else 'backbone',
        vit=vit,
        decoder=decoder,
        absent=('encoder/mask_token',) if dino and not mask_token else (),
    )


def _read_hf(have, hints, table, inner):
    """Fields of the models of transformers."""
    e = f'{inner}embeddings'
    dim, patch = sizes.patch(have, f'{e}.patch_embeddings.projection.weight')
    registers = have.get(f'{e}.register_tokens', (1, 0))[1]
    memory = any('.attention.q_proj.' in k for k in have)
    scaled = any(k.endswith('.layer_scale1.lambda1') for k in have)
    stack = f'{inner}layers' if memory and not scaled else f'{inner}encoder.layer'
    depth = sizes.depth(have, stack)
    encoder = {k: s for k, s in have.items() if k.startswith(f'{stack}.')}
    ffn = 'swiglu'
    hidden = (sizes.rows(encoder, 'mlp.weights_in.weight') or 0) // 2
    hidden = hidden or sizes.rows(encoder, 'mlp.gate_proj.weight')
    if not hidden:
        ffn = 'mlp'
        hidden = sizes.rows(encoder, 'mlp.fc1.weight')
        hidden = hidden or sizes.rows(encoder, 'intermediate.dense.weight')
    classes, img_size = sizes.grid(
        have, hints, f'{e}.position_embeddings', f'{e}.cls_token', patch, False
    )
    mask_token = len(have.get(f'{e}.mask_token', ())) == 2
    pos = sizes.positions(
        table, f'{e}.position_embeddings', have, dim, img_size // patch, classes, not scaled
    )
    vit = _vit(
        hints,
        hidden,
        scaled,
        False,
        embed_dim=dim,
        depth=depth,
        patch_size=patch,
        img_size=img_size,
        num_cls_tokens=classes,
        num_register_tokens=registers,
        pos_embed=pos,
        ffn=ffn,
        mask_token=mask_token or bool(registers),
    )
    decoder, saved = None, any('decoder_encoder.layer.' in k for k in have)
    if inner:
        stack = 'decoder.decoder_encoder.layer' if saved else 'decoder.decoder_layers'
        fc1 = '.mlp.fc1.weight' if memory else '.intermediate.dense.weight'
        decoder = _decoder(have, hints, table, vit, 'decoder.', stack, fc1)
    family = family_of(vit, decoder)
    pixio = hints.get('model_type') == 'pixio' or any(k.endswith('.norm1.weight') for k in encoder)
    if pixio and not scaled:
        family = 'pixio'
    names = 'memory' if memory else 'hub'
    saved_pixio = any(k.endswith('.intermediate.dense.weight') for k in encoder)
    if saved or (family == 'pixio' and saved_pixio):
        names = 'saved'
    return dict(
        family=family,
        layout='hf',
        what='full' if decoder else 'backbone',
        vit=vit,
        decoder=decoder,
        names=names,
    )


def _vit(hints, hidden, scaled, dino, **fields):
    """The ViT with an FFN of `hidden` channels; with layer scale it is DINOv2's.

    dino: of the training of DINO, iBOT or DINOv2, with layer scale or without.
    """
    dim, depth, ffn = fields['embed_dim'], fields['depth'], fields['ffn']
    if not hidden:
        raise ValueError('no block has an FFN of a known kind, fc1 and fc2 or a SwiGLU.')
    resize = 'bicubic'
    if scaled or dino:
        resize = 'antialias' if fields['num_register_tokens'] else 'offset'
    return vit_lib.ViT(
        **fields,
        num_heads=sizes.num_heads(hints, dim, depth),
        mlp_ratio=sizes.mlp_ratio(hidden, dim, ffn),
        pos_resize=resize,
        layer_scale=float(hints.get('layerscale_value', 1.0)) if scaled else None,
        init_scheme='dinov2' if scaled or dino else 'mae',
        eps=float(hints.get('layer_norm_eps', 1e-6)),
    )


def _decoder(have, hints, table, vit, prefix, stack, fc1):
    dim = have.get(f'{prefix}decoder_embed.weight', have.get(f'{prefix}mask_token', (0,)))[0]
    depth, grid = sizes.depth(have, stack), vit.img_size // vit.patch_size
    if dim <= 1:
        raise ValueError(sizes.absent(f'{prefix}decoder_embed.weight', have))
    hidden = next((s[0] for k, s in have.items() if k.startswith(stack) and k.endswith(fc1)), None)
    if hidden is None:
        raise ValueError(sizes.absent(f'{stack}.0{fc1}', have))
    name = f'{prefix}decoder_pos_embed'
    heads = hints.get('decoder_num_heads', hints.get('decoder_num_attention_heads'))
    heads = heads or DECODER_HEADS.get(dim)
    if not heads or dim % int(heads):
        raise ValueError(
            f'the number of heads of a decoder of width {dim} is not in its tensors'
            f'{f", and {heads} does not divide that" if heads else ""}; give decoder_num_heads.'
        )
    return Decoder(
        embed_dim=dim,
        depth=depth,
        num_heads=int(heads),
        num_patches=grid**2,
        num_cls_tokens=vit.num_cls_tokens,
        out_dim=3 * vit.patch_size**2,
        pos_embed=sizes.positions(table, name, have, dim, grid, vit.num_cls_tokens, True),
        mlp_ratio=sizes.mlp_ratio(hidden, dim, 'mlp'),
        eps=vit.eps,
    )
