# SPDX-License-Identifier: Apache-2.0
"""The layouts that weights leave in and come from: which keys, which config, both ways.

Our tree is {'encoder': …} for a backbone; MAE and Pixio as a whole have 'decoder' beside it, and
DINOv2 (with DINO and iBOT) 'dino_head' and maybe 'ibot_head', BEiT 'head'.  A layout is a table of
renames (`tables.py`) chosen by `Weights`.

For other image sizes an encoder keeps the official rule of its family (`ViT.pos_resize`) whatever
the layout.  transformers' Dinov2Model and timm resize positions by rules of their own, so they
differ from the official code, and from us, away from the native size.
"""

import collections.abc
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.augment import photometry
from ssl_jax.interop import beit, heads, recognition, sizes, tables
from ssl_jax.models import blocks
from ssl_jax.models import vit as vit_lib
from ssl_jax.models.decoder import Decoder
from ssl_jax.models.heads import DINOHead
from ssl_jax.models.vit import ViT

# timm's names of our sizes; any other model is one of these, built with other arguments.
TIMM_SIZES = {'Ti': 'tiny', 'S': 'small', 'B': 'base', 'L': 'large', 'H': 'huge', 'g': 'giant'}


@dataclasses.dataclass(frozen=True)
class Weights:
    """What a set of tensors is, without the tensors.

    Attributes:
      family: 'mae', 'pixio', 'dinov2', 'beit', or 'vit' for a plain ViT that is none of these.
      layout: 'official', 'hf' or 'timm'.
      what: 'backbone', or 'full' with the decoder (MAE and Pixio), the heads (DINOv2) or the linear
        layer to visual words (BEiT).
      vit: the encoder, every field set.
      decoder: the decoder of 'full', else None.
      dino_head, ibot_head: the heads of 'full', else None; without the second, patches share the
        first.
      vocab: visual words of BEiT's 'full', else None.
      prefix: in front of the keys of the encoder in the file, say 'vit.' or 'teacher.backbone.'.
      left_out: keys of the file that are no part of these weights (incomplete heads, poolers).
      names: which names, see `tables`: of transformers 'hub', 'saved' or 'memory'; 'dino' where
        the official ones are those of DINO and iBOT.
      absent: arrays of ours, as paths, that this one file has not: they are zero.
      remarks: sentences on how the file was understood.
      fc_norm: BEiT, whether the final norm is that of the mean of patches in the file.
    """

    family: str
    layout: str
    what: str
    vit: ViT
    decoder: Decoder | None = None
    dino_head: DINOHead | None = None
    ibot_head: DINOHead | None = None
    vocab: int | None = None
    prefix: str = ''
    left_out: tuple = ()
    names: str = 'hub'
    absent: tuple = ()
    remarks: tuple = ()
    fc_norm: bool = False


family_of = recognition.family_of


def recognise(tensors, hints=None):
    """Finds out what a set of tensors is.

    Args:
      tensors: torch key -> array, with an attribute `shapes` if reading an array is costly; or
        torch key -> shape, and then a MAE is taken to have sin-cos positions.
      hints: a parsed config.json (HF or timm), or {}; what the user says is believed before it:
        'num_heads', 'decoder_num_heads', 'img_size', 'patch_size'.

    Returns:
      Weights.

    Raises:
      ValueError: one sentence, for tensors of no known family.
    """
    return Weights(**recognition.find(tensors, hints or {}))


def available(vit, decoder, family, dino_head=None, vocab=None):
    """Which layouts this model can leave in.

    Args: as the fields of `Weights`.

    Returns:
      {(layout, what): '' or one sentence why not}.
    """
    out = {}
    c, r, scaled = vit.num_cls_tokens, vit.num_register_tokens, vit.layer_scale is not None
    named = f'a {family} encoder with {c} class tokens and {r} registers'
    decoders = '' if decoder else 'only MAE and Pixio have a decoder, and DINOv2 heads'

    # 1e-12, in some configs of transformers, moves features by less than 1e-5 and is let through.
    eps = f'normalises with eps 1e-6, and this model with {vit.eps:g}' if vit.eps > 1e-6 else ''
    out['official', 'backbone'] = f'the official code {eps}' if eps else ''
    if family == 'dinov2' and (c != 1 or not vit.mask_token):
        out['official', 'backbone'] = 'the official DINOv2 has one class token and a mask token'
    if family == 'beit':
        return _available_beit(vit, vocab, out['official', 'backbone'])

    whole = vit.mlp_ratio == int(vit.mlp_ratio)
    kind = hf_class(family, vit)
    why = ''
    if kind in ('ViTModel', 'Dinov2Model', 'Dinov2WithRegistersModel') and c != 1:
        why = f'transformers has no class for {named}'
    elif kind in ('ViTModel', 'PixioModel') and (r or vit.ffn != 'mlp' or scaled):
        why = (
            f'transformers has {kind} for a {family} encoder, without registers, SwiGLU and '
            f'layer scale'
        )
    elif kind == 'Dinov2WithRegistersModel' and not vit.mask_token:
        why = "transformers' Dinov2WithRegistersModel always has a mask token"
    elif kind != 'ViTModel' and not whole:
        why = f"transformers' {kind} takes whole numbers as mlp_ratio, and this is {vit.mlp_ratio}"
    elif kind == 'PixioModel' and vit.mask_token:
        why = "transformers' PixioModel has no mask token"
    out['hf', 'backbone'] = why

    why = ''
    if family == 'pixio' or c > 1:
        why = 'timm has no Pixio, which has several class tokens; use official or hf'
    elif c != 1:
        why = f'the timm models known here have one class token, and this is {named}'
    elif r and vit.pos_embed == 'sincos':
        why = 'the timm models with registers have learned positions'
    elif eps:
        why = f'timm {eps}'
    elif vit.ffn == 'swiglu' and not scaled:
        why = 'the timm models with SwiGLU have layer scale'
    out['timm', 'backbone'] = why

    if dino_head is not None:
        out['official', 'full'] = out['official', 'backbone']
        out['hf', 'full'] = 'transformers has no class for projection heads; use official'
        out['timm', 'full'] = 'timm has no projection heads; use official'
        return out
    out['official', 'full'] = decoders or out['official', 'backbone']
    out['hf', 'full'] = decoders or (
        'transformers has a decoder only in ViTMAEForPreTraining, with one class token and no '
        'register, and PixioModel is the encoder alone; use official'
        if c != 1 or r
        else ''
    )
    out['timm', 'full'] = 'timm has no decoders; use official or hf'
    return out


def _available_beit(vit, vocab, why):
    """`available` for BEiT; `why` is what speaks against its official names."""
    if vit.num_cls_tokens != 1 or vit.num_register_tokens or vit.ffn != 'mlp' or vit.key_bias:
        why = (
            'BEiT has one class token and no registers, an MLP, and keys without bias, and this '
            'encoder differs from that'
        )
    words = why if vocab else 'these weights have no layer to visual words; use what=backbone'
    return {
        ('official', 'backbone'): why,
        ('hf', 'backbone'): '' if 'normalises' in why else why,
        ('timm', 'backbone'): why.replace('the official code', 'timm'),
        ('official', 'full'): words,
        ('hf', 'full'): '' if vocab and 'normalises' in words else words,
        ('timm', 'full'): 'timm has no layer to visual words; use official or hf',
    }


def hf_class(family, vit, what='backbone'):
    """The class of transformers that holds these weights."""
    if family == 'beit':
        return 'BeitForMaskedImageModeling' if what == 'full' else 'BeitModel'
    if what == 'full':
        return 'ViTMAEForPreTraining'
    if family == 'dinov2':
        return 'Dinov2WithRegistersModel' if vit.num_register_tokens else 'Dinov2Model'
    return 'PixioModel' if family == 'pixio' else 'ViTModel'


_HF_KINDS = {
    'ViTModel': 'vit',
    'ViTMAEForPreTraining': 'vit',
    'PixioModel': 'pixio',
    'Dinov2Model': 'dinov2',
    'Dinov2WithRegistersModel': 'dinov2',
    'BeitModel': 'beit',
    'BeitForMaskedImageModeling': 'beit',
}


def rows(weights):
    """The rename rows of `weights`, with keys as `tables.plain` leaves them."""
    w = weights
    if w.family == 'beit':
        return beit.rows(w)
    if w.layout == 'hf':
        if w.what == 'full':
            return tables.hf_mae(w, w.names)
        kind = _HF_KINDS[hf_class(w.family, w.vit)]
        found = tables.hf_encoder(w.vit, kind, w.names)
        return [row for row in found if kind != 'vit' or row[0] != 'encoder/mask_token']
    if w.layout == 'timm':
        return tables.timm(w.vit)
    if w.dino_head is not None:
        found = tables.dinov2(w, 'encoder', w.names)
        return [row for row in found if row[0] not in w.absent]
    return tables.mae(w) if w.what == 'full' else tables.encoder(w.vit)


def fixed(weights):
    """{our path: sin-cos table} of the tables that are no parameters of ours."""
    return tables.fixed_tables(weights)


def abstract(weights):
    """Our tree as ShapeDtypeStructs: {'encoder': …}, and what is beside it if full."""
    w, key = weights, jax.random.key(0)
    tree = {'encoder': jax.eval_shape(functools.partial(vit_lib.init_params, w.vit), key)}
    if w.decoder is not None:
        latent = jnp.zeros((1, w.vit.num_cls_tokens + 1, w.vit.embed_dim))
        ids = jnp.zeros((1, w.decoder.num_patches), jnp.int32)
        tree['decoder'] = jax.eval_shape(w.decoder.init, key, latent, ids)['params']
    for name in ('dino_head', 'ibot_head'):
        if (head := getattr(w, name)) is not None:
            tokens = jnp.zeros((1, w.vit.embed_dim))
            tree[name] = jax.eval_shape(head.init, key, tokens)['params']
    if w.vocab:
        shapes = {'kernel': (w.vit.embed_dim, w.vocab), 'bias': (w.vocab,)}
        tree['head'] = {k: jax.ShapeDtypeStruct(s, jnp.float32) for k, s in shapes.items()}
    return tree


def _homeless(weights):
    """Which of our arrays the layout has no place for, or this file has not, as paths."""
    w = weights
    if w.absent:
        return list(w.absent)
    hf_vit = w.layout == 'hf' and hf_class(w.family, w.vit, w.what) == 'ViTModel'
    paths = ['encoder/mask_token'] if w.vit.mask_token and (hf_vit or w.layout == 'timm') else []
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
    folded = {**params, 'encoder': enc}
    out = tables.to_torch(rows(weights), folded, fixed(weights))
    return {**out, **beit.buffers(weights)}, extra


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
    shapes = {path: enc[path.split('/')[1]].shape for path in homeless}
    if 'encoder/mask_token' in homeless:
        del enc['mask_token']
    if 'encoder/cls_token' in homeless:
        _, n, dim = enc['pos_embed'].shape
        enc['pos_embed'] = jax.ShapeDtypeStruct((1, n - 1, dim), jnp.float32)
        shapes['encoder/pos_embed'] = (1, 1, dim)
    beit.check_index(w, state_dict)
    params = tables.from_torch(rows(w), _Renamed(state_dict, w), want, fixed(w))
    given = {path: np.asarray(extra[path], np.float32) for path in homeless if path in extra}
    for path, value in given.items():
        if value.shape != tuple(shapes[path]):
            raise ValueError(
                f'the sidecar holds {path} with shape {value.shape}, expected {shapes[path]}; it '
                f'belongs to other weights, so delete it.'
            )
    enc = params['encoder']
    if 'encoder/mask_token' in homeless:
        zero = np.zeros(shapes['encoder/mask_token'], np.float32)
        enc['mask_token'] = given.get('encoder/mask_token', zero)
    if 'encoder/cls_token' in homeless:
        row = np.zeros((1, 1, w.vit.embed_dim), np.float32)
        if 'encoder/cls_token' in given and 'encoder/pos_embed' in given:
            row, total = given['encoder/pos_embed'], enc['cls_token']
            enc['cls_token'] = given['encoder/cls_token']
            # All three may have been rounded to bfloat16, each on its own.
            slack = 0.01 * (np.abs(row) + np.abs(enc['cls_token'])) + 1e-6
            if (np.abs(row + enc['cls_token'] - total) > slack).any():
                raise ValueError(
                    'cls_token is not the sum of the class token and its position in the sidecar; '
                    'that belongs to other weights, so delete it.'
                )
        enc['pos_embed'] = np.concatenate([row, enc['pos_embed']], axis=1)
    return params


def notes(weights, extra=None):
    """Sentences on what was made up or left out when these weights were read."""
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

    def __init__(self, state_dict, weights):
        self._tensors = state_dict
        drop, prefix = set(weights.left_out), weights.prefix
        drop |= {k for k in state_dict if k.endswith(beit.INDEX)}  # a buffer
        if weights.dino_head is None:
            inside = (k for k in state_dict if k.startswith(prefix) and k not in drop)
            self._keys = {tables.plain(k, prefix): k for k in inside}
            return
        # `torch_io` takes 'backbone.' off, and what is beside it stays as it is.
        prefix, self._keys = prefix.removesuffix('backbone.'), {}
        for key in (k for k in state_dict if k.startswith(prefix) and k not in drop):
            name = tables.plain(key[len(prefix) :].removeprefix('backbone.'))
            self._keys[name if heads.PART.fullmatch(name) else f'backbone.{name}'] = key

    def __getitem__(self, name):
        return self._tensors[self._keys[name]]

    def __iter__(self):
        return iter(self._keys)

    def __len__(self):
        return len(self._keys)


def config_json(weights, mask_ratio=0.75, norm_pix_loss=True):
    """config.json of the layout as a dict; {} for 'official'.

    Args:
      mask_ratio, norm_pix_loss: of the training, for a MAE with its decoder.
    """
    w, v = weights, weights.vit
    if w.layout == 'official':
        return {}
    if w.layout == 'timm':
        return _timm_config(w)
    name = hf_class(w.family, v, w.what)
    config = dict(
        architectures=[name],
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
    )
    if _HF_KINDS[name] in ('vit', 'beit'):
        config.update(model_type='vit', intermediate_size=int(v.embed_dim * v.mlp_ratio))
    else:
        config.update(mlp_ratio=int(v.mlp_ratio), drop_path_rate=0.0)
    if name == 'ViTMAEForPreTraining':
        d = w.decoder
        config.update(
            model_type='vit_mae',
            decoder_hidden_size=d.embed_dim,
            decoder_num_hidden_layers=d.depth,
            decoder_num_attention_heads=d.num_heads,
            decoder_intermediate_size=int(d.embed_dim * d.mlp_ratio),
            mask_ratio=mask_ratio,
            norm_pix_loss=norm_pix_loss,
        )
    elif name == 'PixioModel':
        config.update(model_type='pixio', n_cls_tokens=v.num_cls_tokens)
    elif _HF_KINDS[name] == 'dinov2':
        config.update(
            model_type='dinov2',
            layerscale_value=float(v.layer_scale),
            use_swiglu_ffn=v.ffn == 'swiglu',
            use_mask_token=v.mask_token,
        )
    elif _HF_KINDS[name] == 'beit':
        config.update(beit.hf_config(w))
        del config['qkv_bias']
    if name == 'Dinov2WithRegistersModel':
        config.update(model_type='dinov2_with_registers', num_register_tokens=v.num_register_tokens)
        del config['use_mask_token']  # it always has one
    return config


def _timm_config(w):
    """config.json that timm reads from a folder or the hub."""
    v = w.vit
    widths = (v.embed_dim, v.depth, v.num_heads)
    named = [TIMM_SIZES[s] for s in TIMM_SIZES if vit_lib.SIZES[s] == widths]
    args = dict(
        img_size=v.img_size,
        patch_size=v.patch_size,
        embed_dim=v.embed_dim,
        depth=v.depth,
        num_heads=v.num_heads,
        mlp_ratio=v.mlp_ratio,
    )
    if w.family == 'dinov2':
        size = 'giant' if v.ffn == 'swiglu' else named[0] if named else 'base'
        registers = '_reg4' if v.num_register_tokens else ''
        architecture = f'vit_{size}_patch14{registers}_dinov2'
    else:
        architecture = 'vit_base_patch16_224'
        for size in named:
            patch = 14 if size in ('huge', 'giant') else 16
            architecture = f'vit_{size}_patch{patch}_224'
    if w.family == 'beit':
        architecture = f'beit_{"large" if named == ["large"] else "base"}_patch16_224'
        args.update(beit.timm_args(v))
    if v.layer_scale is not None:
        args['init_values'] = v.layer_scale
    if v.num_register_tokens:
        args.update(reg_tokens=v.num_register_tokens, no_embed_class=True)
    if v.ffn == 'swiglu':
        both = 2 * blocks.swiglu_hidden(v.embed_dim, v.mlp_ratio)
        args['mlp_ratio'] = sizes.mlp_ratio(both, v.embed_dim, 'mlp')
    return dict(
        architecture=architecture,
        num_classes=0,
        num_features=v.embed_dim,
        global_pool=args.get('global_pool', 'token'),
        model_args=args,
        pretrained_cfg=dict(
            tag='ssl_jax',
            custom_load=False,
            input_size=[3, v.img_size, v.img_size],
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
