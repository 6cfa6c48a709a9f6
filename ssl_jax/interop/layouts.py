# SPDX-License-Identifier: Apache-2.0
"""Layouts of weights in other code: keys and config, both ways.

Our tree is {'encoder': …} for a backbone; whole weights have 'decoder' beside it (MAE, Pixio),
'predictor' (I-JEPA), 'dino_head' and maybe 'ibot_head' (DINOv2, DINO, iBOT) or 'head' (BEiT). A
layout is a table of renames (`tables`) that the family of the weights (`families`) gives; this file
knows no family.

For other image sizes weights keep the rule of the library that they come from (`ViT.pos_resize`,
`ViT.rel_resize`). Libraries differ in that; `other_sizes` says where an export will.
"""

import collections
import collections.abc
import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.augment import photometry
from ssl_jax.interop import families, shapes, stated, tables
from ssl_jax.models import pos_embed
from ssl_jax.models import vit as vit_lib
from ssl_jax.models.decoder import Decoder
from ssl_jax.models.heads import DINOHead
from ssl_jax.models.predictor import Predictor
from ssl_jax.models.vit import ViT
from ssl_jax.run import errors, trees

# The key that says where the encoder is and in whose names.
ENCODER = {
    'patch_embed.proj.weight': 'official',
    'embeddings.patch_embeddings.projection.weight': 'hf',
    'embeddings.patch_embeddings.weight': 'hf',
}
# What stands beside an encoder in a file: heads of training and of tasks.
HEADS = re.compile(r'(pooler|classifier|head|head_dist|dino_head|ibot_head|last_proj)\.')
OPTIMIZER = re.compile(
    r'(^|[./])(exp_avg|exp_avg_sq|momentum_buffer|optimizer\w*|opt_state|param_groups|mu|nu)([./]|$)'
    r'|^state[./]\d'
)
# Parts of names by which other networks are known.
FOREIGN = {
    'visual.': 'CLIP',
    'vision_model.': 'CLIP or SigLIP',
    'downsample': 'a ResNet or a Swin Transformer',
}
# Rules of resizing, see `pos_embed`, in words.
RULES = {
    'bicubic': 'bicubic',
    'offset': 'bicubic with an offset of 0.1',
    'antialias': 'antialiased bicubic',
    'spline': 'cubic spline',
    'linear': 'linear on geometric distances',
    'bilinear': 'bilinear',
}
KNOWN = (
    'MAE, Pixio, DINOv2, DINOv3, BEiT, I-JEPA, plain ViTs, '
    'in the names of their authors, transformers or timm'
)
# Fields of `Weights`:
PARTS = {
    'decoder': Decoder,
    'predictor': Predictor,
    'dino_head': DINOHead,
    'ibot_head': DINOHead,
}
NORM = ['encoder/norm/scale', 'encoder/norm/bias']
NOT_SAVED = ('dtype', 'remat', 'parent', 'name')  # how a module computes, not what it is


@dataclasses.dataclass(frozen=True)
class Weights:
    """Description of a set of tensors."""

    family: str  # a file of `families`: 'mae', 'dinov2', ..., or 'vit' for a plain ViT
    layout: str  # 'official', 'hf' or 'timm'
    # 'backbone', or 'full' with the decoder (MAE and Pixio), the predictor (I-JEPA), the heads
    # (DINOv2), the linear layer to visual words (BEiT) or the classifier (fine-tuned models).
    what: str
    vit: ViT  # the encoder, every field set
    decoder: Decoder | None = None  # the decoder of 'full', else None
    predictor: Predictor | None = None  # that of I-JEPA's 'full', else None
    # dino_head, ibot_head: the heads of 'full', else None; without the second, patches share the
    # first.
    dino_head: DINOHead | None = None
    ibot_head: DINOHead | None = None
    vocab: int | None = None  # visual words of BEiT's 'full', else None
    num_classes: int | None = None  # outputs of the classifier of 'full', else None
    # Input of the classifier: 'patch', the mean of patches through the norm `fc_norm`, or 'cls'.
    pool: str | None = None
    # In front of the keys of the encoder in the file, say 'vit.' or 'teacher.backbone.'.
    prefix: str = ''
    # Keys of the file that are no part of these weights (incomplete heads, poolers).
    left_out: tuple = ()
    # Which names of transformers, see `tables`; 'dino' where the official ones are those of DINO
    # and iBOT.
    names: str = 'hub'
    absent: tuple = ()  # arrays of ours, as paths, that this one file has not: they are zero
    remarks: tuple = ()  # sentences on how the file was understood


def to_dict(w: Weights) -> dict:
    """`Weights` as values of JSON."""
    parts = {k: getattr(w, k) for k in PARTS}
    return dict(
        family=w.family,
        layout=w.layout,
        what=w.what,
        vit=_module_fields(w.vit),
        **{k: None if part is None else _module_fields(part) for k, part in parts.items()},
        vocab=w.vocab,
        num_classes=w.num_classes,
        pool=w.pool,
        prefix=w.prefix,
    )


def from_dict(d: dict) -> Weights:
    """Inverse of `to_dict`.

    Raises:
      UserError: it has fields that this version does not know.
    """
    try:
        parts = {k: cls(**d[k]) for k, cls in PARTS.items() if d.get(k) is not None}
        return Weights(**{**d, 'vit': vit_lib.ViT(**d['vit']), **parts})
    except (KeyError, TypeError) as error:
        raise errors.UserError(
            f'these weights were described by another version of ssl_jax ({error}); use that one.'
        ) from error


def _module_fields(module):
    names = [f.name for f in dataclasses.fields(module) if f.name not in NOT_SAVED]
    return {name: getattr(module, name) for name in names}


def recognise(tensors, hints=None) -> Weights:
    """Identifies a set of tensors.

    Args:
      tensors: torch key -> array, with an attribute `shapes` if reading an array is costly; or
        torch key -> shape, and then a MAE is taken to have sin-cos positions.
      hints: a parsed config.json (HF or timm), or {}; what the user says is believed before it:
        'num_heads', 'decoder_num_heads', 'img_size', 'patch_size', 'pos_resize'.

    Raises:
      ValueError: one sentence, for tensors of no known family.
    """
    hints, shape_of = hints or {}, getattr(tensors, 'shapes', None)
    if shape_of is None:
        shape_of = {k: tuple(getattr(v, 'shape', v)) for k, v in tensors.items()}

    def array(key):
        value = tensors[key]
        return value if hasattr(value, 'dtype') else None

    known = families.all_families()
    for why in (f.foreign(hints, shape_of) for f in known if hasattr(f, 'foreign')):
        if why:
            raise errors.UserError(f'these {len(shape_of)} tensors are {why}; known are {KNOWN}.')
    marker = _marker(shape_of)
    prefix = base = marker.removesuffix(next(k for k in ENCODER if marker.endswith(k)))
    inner = ''
    for start, key in (f.INNER for f in known if hasattr(f, 'INNER')):
        outer = prefix.removesuffix(start)
        if outer != prefix and f'{outer}{key}' in shape_of:
            prefix, inner = outer, start
    keys = {tables.plain(k, prefix): k for k in shape_of if k.startswith(prefix)}
    found = shapes.Found(
        have={name: tuple(shape_of[k]) for name, k in keys.items()},
        keys=keys,
        hints=hints,
        table=lambda name: array(keys[name]),
        hf=ENCODER[marker.removeprefix(base)] == 'hf',
        inner=inner,
        shapes=shape_of,
        base=prefix.removesuffix('backbone.'),
        array=array,
    )
    left_out = [k for k in shape_of if not k.startswith(prefix)]
    left_out += [k for name, k in keys.items() if HEADS.match(name)]
    fields = next(x for f in known if (x := f.read(found)) is not None)
    vit, decoder = fields['vit'], fields.get('decoder')
    family_name = fields.pop('family', None) or families.of(vit, decoder)
    found.remarks += stated.check(hints, vit, decoder, found.have, found.hf)
    if fields.get('what', 'backbone') == 'backbone' and fields['layout'] == 'official':
        fields.update(shapes.classifier(found, vit))
    fields['vit'] = vit.clone(pos_resize=hints.get('pos_resize', vit.pos_resize))
    return Weights(
        family=family_name,
        what=fields.pop('what', 'backbone'),
        **fields,
        prefix=prefix,
        left_out=tuple(sorted({*left_out, *found.left_out} - found.used)),
        remarks=tuple(found.remarks),
    )


def _marker(shape_of):
    """The key of the patch embedding, a teacher's before a student's; or a sentence."""
    found = [k for k in shape_of if any(k == e or k.endswith(f'.{e}') for e in ENCODER)]
    if found:
        return min(found, key=lambda k: ('teacher' not in k, 'student' in k, len(k), k))
    some = ', '.join(sorted(shape_of)[:4])
    if not shape_of:
        raise errors.UserError('there are no tensors; give a file of weights.')
    if sum(bool(OPTIMIZER.search(k)) for k in shape_of) > len(shape_of) / 2:
        raise errors.UserError(
            f'these tensors are the state of an optimizer ({some}, …) and no weights; give the '
            f'checkpoint of the model.'
        )
    foreign = [name for part, name in FOREIGN.items() if any(part in k for k in shape_of)]
    like = f'look like {foreign[0]}, which' if foreign else f'({some}, …)'
    near = [n for e in ENCODER for n in errors.close(e, shape_of, cutoff=0.8)]
    raise errors.UserError(
        f'these {len(shape_of)} tensors {like} are of no family known here: none is '
        f'{" or ".join(ENCODER)}{f" (nearest: {near[0]})" if near else ""}; known are {KNOWN}.'
    )


def of_networks(
    networks: dict[str, Any], layout: str, family_name: str | None = None
) -> tuple[Weights, list[str]]:
    """(whole `Weights`, names of the networks that their family has no names for).

    Args:
      networks: {name: module} of a run; 'encoder' is required.
      family_name: of imported weights.
    """
    known = {
        name: networks[name]
        for f in families.all_families()
        for name, cls in getattr(f, 'NETWORKS', {}).items()
        if isinstance(networks.get(name), cls)
    }
    parts = {name: module for name, module in known.items() if name in PARTS}
    w = Weights(
        family=family_name or families.of(networks['encoder'], parts.get('decoder')),
        layout=layout,
        what='full',
        vit=networks['encoder'],
        vocab=known['head'].features if 'head' in known else None,
        prefix='backbone.' if 'dino_head' in parts else '',
        **parts,
    )
    named = {'encoder', *known} & {'encoder', *getattr(family(w), 'NETWORKS', ())}
    left = [name for name in networks if name not in named]
    absent = {'vocab' if name == 'head' else name: None for name in known if name in left}
    return dataclasses.replace(w, **absent), left


def family(w: Weights):
    """The module of the family that names these weights, by what is behind the encoder first."""
    claims = (f for f in families.all_families() if hasattr(f, 'claims') and f.claims(w))
    return next(claims, None) or families.get(w.family)


def refusals(w: Weights) -> dict[tuple[str, str], str]:
    """{(layout, what): '' or why these weights cannot leave so}, whatever `w.layout` is."""
    return family(w).refusals(w)


def rows(w: Weights) -> list:
    """The renames of `w`, with keys as `tables.plain` leaves them."""
    found = family(w).rows(w)
    if w.num_classes:
        found = found + tables.linear('head', 'head')
    if w.pool == 'patch':
        found = [row for row in found if not row[0].startswith('encoder/norm/')]
        found += tables.norm('fc_norm', 'fc_norm')
    return found


def other_sizes(w: Weights) -> str:
    """A sentence if the library of the layout will resize positions by another rule; else ''."""
    v = w.vit
    if w.layout == 'official':
        registers = 'antialias' if v.num_register_tokens else 'offset'
        # Plain ViTs are those of MAE or those of DINO.
        positions = ('bicubic', 'offset') if v.layer_scale is None or v.rel_pos else (registers,)
        relative = 'spline'
    elif w.layout == 'timm':
        positions, relative = ('antialias',), 'linear'
    else:
        plain = family(w).hf_class(w) != 'Dinov2WithRegistersModel'
        positions, relative = ('bicubic' if plain else 'antialias',), 'bilinear'
    pairs = [(v.pos_resize, positions)] if v.has_table else []
    pairs += [(v.rel_resize, (relative,))] if v.rel_pos else []
    differ = [(RULES[a], RULES[b[0]]) for a, b in pairs if a not in b]
    if not differ:
        return ''
    ours, theirs = (' and '.join(x) for x in zip(*differ, strict=True))
    return (
        f'At other sizes than {v.img_size} px features differ from those of the model that was '
        f'exported: its positions are resized by one rule ({ours}), and by code of the layout '
        f'{w.layout} by another ({theirs}).'
    )


def method(w: Weights, hints: dict):
    """(name, fields) of the method that the whole weights belong to; None for an encoder alone."""
    if w.num_classes is None:
        return family(w).method(w, hints)
    names = ('num_cls_tokens', 'num_register_tokens', 'pos_embed', 'pos_resize', 'rel_pos')
    names += ('key_bias', 'ffn', 'layer_scale', 'init_scheme')
    fields = {name: getattr(w.vit, name) for name in names}
    classes = tuple(map(str, hints.get('classes') or ()))
    if len(classes) == w.num_classes:
        fields['classes'] = classes
    return 'classifier', dict(fields, num_classes=w.num_classes, pool=w.pool)


def fixed(m) -> dict[str, np.ndarray]:
    """The sin-cos tables that are no parameters of ours: {our path: (1, C + N, D) float32}.

    Args:
      m: anything with a `vit`, maybe with a `decoder` or a `predictor`.
    """
    vit, dec, predictor = m.vit, getattr(m, 'decoder', None), getattr(m, 'predictor', None)
    grid, c, found = vit.img_size // vit.patch_size, vit.num_cls_tokens, {}
    if vit.pos_embed == 'sincos':
        found['encoder/pos_embed'] = pos_embed.sincos(vit.embed_dim, grid, c)
    if dec is not None and dec.pos_embed == 'sincos':
        found['decoder/decoder_pos_embed'] = pos_embed.sincos(dec.embed_dim, grid, c)
    if predictor is not None:
        found['predictor/pos_embed'] = pos_embed.sincos(predictor.embed_dim, grid, 0)
    return found


def abstract(weights: Weights) -> dict:
    """Our tree as ShapeDtypeStructs: {'encoder': …}, and the networks beside it if full."""
    w, key = weights, jax.random.key(0)
    tree = {'encoder': jax.eval_shape(functools.partial(vit_lib.init_params, w.vit), key)}
    if w.decoder is not None:
        latent = jnp.zeros((1, w.vit.num_cls_tokens + 1, w.vit.embed_dim))
        ids = jnp.zeros((1, w.decoder.num_patches), jnp.int32)
        tree['decoder'] = jax.eval_shape(w.decoder.init, key, latent, ids)['params']
    if w.predictor is not None:
        tokens, ids = jnp.zeros((1, 1, w.vit.embed_dim)), jnp.zeros((1, 1), jnp.int32)
        tree['predictor'] = jax.eval_shape(w.predictor.init, key, tokens, ids, ids[None])['params']
    for name in ('dino_head', 'ibot_head'):
        if (head := getattr(w, name)) is not None:
            tokens = jnp.zeros((1, w.vit.embed_dim))
            tree[name] = jax.eval_shape(head.init, key, tokens)['params']
    if outputs := w.vocab or w.num_classes:
        shapes = {'kernel': (w.vit.embed_dim, outputs), 'bias': (outputs,)}
        tree['head'] = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    if w.pool == 'patch':
        tree['fc_norm'] = tree['encoder']['norm']
    return tree


def _homeless(weights):
    """Which of our arrays the layout has no place for, or this file has not, as paths."""
    w = weights
    if w.absent:
        return list(w.absent)
    named = {ours for ours, _, _ in rows(w)}
    paths = ['encoder/mask_token'] if w.vit.mask_token and 'encoder/mask_token' not in named else []
    paths += NORM if w.pool == 'patch' else []
    if w.layout == 'timm' and w.vit.num_register_tokens:
        paths += ['encoder/cls_token', 'encoder/pos_embed']
    return paths


def to_layout(weights, params):
    """Our tree -> (state dict, extra).

    The arrays are views of `params`, in whatever memory order.  extra holds what the layout has
    no place for, by our path: the mask token; and for timm's models with registers, whose class
    token has no position, the class token and its position (the file holds their sum).
    """
    homeless = _homeless(weights)
    enc = dict(params['encoder'])
    extra = {}
    if 'encoder/mask_token' in homeless:
        extra['encoder/mask_token'] = np.asarray(enc.pop('mask_token'))
    if 'encoder/cls_token' in homeless:
        cls_token, pos = np.asarray(enc['cls_token']), np.asarray(enc['pos_embed'])
        extra.update({'encoder/cls_token': cls_token, 'encoder/pos_embed': pos[:, :1]})
        enc.update(cls_token=cls_token + pos[:, :1], pos_embed=pos[:, 1:])
    if weights.pool == 'patch':
        norm = enc.pop('norm')
        if not weights.vit.pooled_norm:  # else it is `fc_norm`
            extra |= {path: np.asarray(norm[path.rpartition('/')[2]]) for path in NORM}
    folded = {**params, 'encoder': enc}
    out = tables.to_torch(rows(weights), folded, fixed(weights))
    if hasattr(family(weights), 'joined'):
        out = family(weights).joined(weights, out)
    return {**out, **buffers(weights)}, extra


def to_ours(weights, state_dict, extra=None):
    """State dict, and the tensors of the sidecar, -> our tree of float32 numpy arrays.

    Without a sidecar a mask token is zero, and the class token of timm's models with registers
    keeps its sum with a position that is zero; `notes` says so.

    Raises:
      ValueError: one sentence that lists everything missing, left over and misshapen; or a sidecar
        that belongs to other weights.
    """
    w, extra = weights, extra or {}
    want, homeless = abstract(w), _homeless(w)
    enc = want['encoder'] = dict(want['encoder'])
    everything = trees.named(want)
    shape_of = {path: everything[path].shape for path in homeless}
    if w.pool == 'patch':
        del enc['norm']
    if 'encoder/mask_token' in homeless:
        del enc['mask_token']
    if 'encoder/cls_token' in homeless:
        _, n, dim = enc['pos_embed'].shape
        enc['pos_embed'] = jax.ShapeDtypeStruct((1, n - 1, dim), jnp.float32)
        shape_of['encoder/pos_embed'] = (1, 1, dim)
    if hasattr(family(w), 'check'):
        family(w).check(w, state_dict)
    tensors = _Renamed(state_dict, w)
    if hasattr(family(w), 'parts'):
        tensors = collections.ChainMap(family(w).parts(w, state_dict), tensors)
    params = tables.from_torch(rows(w), tensors, want, fixed(w))
    given = {path: np.asarray(extra[path], np.float32) for path in homeless if path in extra}
    for path, value in given.items():
        if not np.isfinite(value).all():
            raise errors.UserError(f'the sidecar holds NaN or infinite numbers in {path}.')
        if value.shape != tuple(shape_of[path]):
            raise errors.UserError(
                f'the sidecar holds {path} with shape {value.shape}, expected {shape_of[path]}; it '
                f'belongs to other weights, so delete it.'
            )
    enc = params['encoder']
    if 'encoder/mask_token' in homeless:
        zero = np.zeros(shape_of['encoder/mask_token'], np.float32)
        enc['mask_token'] = given.get('encoder/mask_token', zero)
    if 'encoder/cls_token' in homeless:
        row = np.zeros((1, 1, w.vit.embed_dim), np.float32)
        if 'encoder/cls_token' in given and 'encoder/pos_embed' in given:
            row, total = given['encoder/pos_embed'], enc['cls_token']
            enc['cls_token'] = given['encoder/cls_token']
            # All three may have been rounded to bfloat16, each on its own.
            slack = 0.01 * (np.abs(row) + np.abs(enc['cls_token'])) + 1e-6
            if (np.abs(row + enc['cls_token'] - total) > slack).any():
                raise errors.UserError(
                    'cls_token is not the sum of the class token and its position in the sidecar; '
                    'that belongs to other weights, so delete it.'
                )
        enc['pos_embed'] = np.concatenate([row, enc['pos_embed']], axis=1)
    if w.pool == 'patch':
        norm = {k: given.get(f'encoder/norm/{k}', x) for k, x in params['fc_norm'].items()}
        enc['norm'] = {k: np.array(x) for k, x in norm.items()}
    return params


def notes(weights, extra=None):
    """Sentences on the arrays that were filled in or left out when these weights were read."""
    found = []
    absent = [path for path in _homeless(weights) if path not in (extra or {})]
    if 'encoder/mask_token' in absent:
        who = 'file' if weights.absent else f'{weights.layout} layout'
        found.append(f'The {who} has no mask token: it is zero.')
    if 'encoder/pos_embed' in absent:
        found.append(
            'The timm layout adds the position of the class token to it: the position is zero.'
        )
    found += weights.remarks
    if weights.left_out:
        some = ', '.join(weights.left_out[:5])
        more = f' and {len(weights.left_out) - 5} more' if len(weights.left_out) > 5 else ''
        found.append(f'Left out, as no part of these weights: {some}{more}.')
    return found


class _Renamed(collections.abc.Mapping):
    """A state dict under the names of the tables; a tensor is read when it is asked for."""

    def __init__(self, state_dict, w):
        self._tensors, self._keys = state_dict, {}
        rename = getattr(family(w), 'rename', _plain)
        for key in (k for k in state_dict if k not in w.left_out):
            if (name := rename(w, key)) is not None:
                self._keys[name] = key

    def __getitem__(self, name):
        return self._tensors[self._keys[name]]

    def __iter__(self):
        return iter(self._keys)

    def __len__(self):
        return len(self._keys)


def _plain(w, key):
    """The name in the tables of a key of the file; None if it is no part of the weights."""
    return tables.plain(key, w.prefix) if key.startswith(w.prefix) else None


def buffers(w: Weights) -> dict[str, np.ndarray]:
    """Tensors of the layout that are no parameters."""
    return family(w).buffers(w) if hasattr(family(w), 'buffers') else {}


def config_json(w: Weights, mask_ratio: float = 0.75, norm_pix_loss: bool = True) -> dict:
    """config.json of the layout; {} for 'official'.

    Args:
      mask_ratio, norm_pix_loss: of the training, for a MAE with its decoder.
    """
    v = w.vit
    if w.layout == 'official':
        return {}
    if w.layout == 'timm':
        return _timm_config(w)
    config = dict(
        architectures=[family(w).hf_class(w)],
        hidden_size=v.embed_dim,
        num_hidden_layers=v.depth,
        num_attention_heads=v.num_heads,
        hidden_act='gelu',
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.02,
        layer_norm_eps=v.eps,
        image_size=v.img_size,
        patch_size=v.patch_size,
        num_channels=3,
        qkv_bias=True,
        **({} if w.decoder is None else dict(mask_ratio=mask_ratio, norm_pix_loss=norm_pix_loss)),
    )
    config |= family(w).hf_config(w)
    return {k: x for k, x in config.items() if x is not None}


def _timm_config(w):
    """config.json that timm reads from a folder or the hub."""
    architecture, args = family(w).timm_model(w)
    size = [3, w.vit.img_size, w.vit.img_size]
    return dict(
        architecture=architecture,
        num_classes=0,
        num_features=w.vit.embed_dim,
        global_pool=args.get('global_pool', 'token'),
        model_args=args,
        pretrained_cfg=dict(
            tag='ssl_jax',
            custom_load=False,
            input_size=size,
            fixed_input_size=True,
            interpolation='bicubic',
            crop_pct=1.0,
            crop_mode='center',
            mean=list(photometry.MEAN),
            std=list(photometry.STD),
            num_classes=0,
            pool_size=None,
            first_conv='patch_embed.proj',
            classifier='head',
        ),
    )
