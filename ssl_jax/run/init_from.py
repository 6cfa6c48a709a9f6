# SPDX-License-Identifier: Apache-2.0
"""`config.init_from`: a run starts from weights that exist, of ours or of other programs."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.augment import photometry
from ssl_jax.interop import load
from ssl_jax.models import pos_embed
from ssl_jax.run import checkpoint, checksums, runs

# Fields that make a network another function; those of a ViT are fields of `config.method` too.
ENCODER = (
    *('embed_dim', 'depth', 'num_heads', 'patch_size', 'num_cls_tokens', 'num_register_tokens'),
    *('ffn', 'mlp_ratio', 'rel_pos', 'key_bias'),
)
RELATIVE = 'rel_pos_bias'  # tables of relative positions, see `layers.relative_index`
SPLINE = 'cubic spline'
DECODER = ('embed_dim', 'depth', 'num_heads', 'num_cls_tokens', 'mlp_ratio', 'pos_embed')


def load_into(path, method, state, abstract):
    """The weights at `path` in place of the fresh ones of `state`.

    A checkpoint that holds all parameters of this method in these sizes is taken whole, with its
    `extra`; so is one that differs in the size of its images only, with its position tables resized
    (the high-resolution stage). Of all else the encoder is taken (and given to
    `method.with_backbone`), and the decoder of a MAE or Pixio where it fits. A position table of
    another grid is resized by the rule of the encoder that it comes with, one of relative positions
    as BEiT does it.

    Args:
      path: a run, a checkpoint folder, imported weights, an export, an HF or timm folder, a file.
      method: of the new run, see `ssl_jax.methods`.
      state: its fresh TrainState, on the devices.
      abstract: the same as ShapeDtypeStructs with shardings.

    Returns:
      (params, extra, lines): a line for each network on what was taken, resized or left fresh.

    Raises:
      ValueError: one sentence with the values of both sides if the encoder does not fit.
    """
    if load.is_checkpoint(path):
        target = {'params': abstract.params, 'extra': abstract.extra}
        try:
            model, meta = checkpoint.restore_model(path, target)
        except checkpoint.MismatchError:
            # Another method, another size, or the encoder alone.
            whole = _other_grid(path, method, state)
            if whole is not None:
                return whole
        else:
            _, other, weights = runs.parse(meta)
            _check(path, weights.vit if weights else other.vit, method.vit)
            if _same_decoder(getattr(other, 'decoder', None), getattr(method, 'decoder', None)):
                parts = {**model['params'], **({'extra': model['extra']} if model['extra'] else {})}
                lines = [_line('taken', name, _count(tree)) for name, tree in parts.items()]
                return model['params'], model['extra'], lines
    loaded = load.load_backbone(path)
    _check(path, loaded.vit, method.vit)
    seen = getattr(method, 'mean', photometry.MEAN), getattr(method, 'std', photometry.STD)
    encoder, lines = _fit(path, loaded, *method.backbone(state.params, state.extra), seen)
    params, extra = method.with_backbone(state.params, state.extra, encoder)
    new = jax.tree.leaves(encoder)
    for name in [k for k in params if params[k] is state.params[k]]:
        why = 'the file has none'
        if name == 'decoder' and loaded.decoder is not None:
            module, theirs = loaded.decoder
            if _same_decoder(module, method.decoder) and _shapes(theirs) == _shapes(params[name]):
                params = {**params, name: jax.tree.map(_place, theirs, params[name])}
                new += jax.tree.leaves(params[name])
                lines.append(_line('taken', name, _count(params[name])))
                continue
            why = 'that of the file has other sizes'
        if name == 'head' and 'codebook' in extra:
            why = 'it is for the words of this run'
        lines.append(_line('fresh', name, f'{_count(params[name])}; {why}'))
    # In buffers of their own: one that is donated may be neither numpy's nor there twice, as an
    # encoder is that becomes student and teacher.
    new = {id(x) for x in new}
    params, extra = jax.tree.map(lambda x: jnp.copy(x) if id(x) in new else x, (params, extra))
    return params, extra, lines


def _check(path, theirs, ours):
    """Raises where the encoder of a file cannot be that of the method."""
    pairs = [(name, getattr(theirs, name), getattr(ours, name)) for name in ENCODER]
    if (theirs.rel_pos, ours.rel_pos) == ('shared', 'layer'):  # one table becomes that of all
        pairs = [pair for pair in pairs if pair[0] != 'rel_pos']
    scales = ['none' if v.layer_scale is None else 'some' for v in (theirs, ours)]
    pairs.append(('layer_scale', *scales))
    if theirs.pos_embed == 'learned':  # fixed positions can become the start of learned ones
        pairs.append(('pos_embed', theirs.pos_embed, ours.pos_embed))
    differ = [f'{name} is {a} there and {b} here' for name, a, b in pairs if a != b]
    if differ:
        raise ValueError(
            f'The encoder of init_from={path} does not fit, nothing was loaded: '
            f'{", ".join(differ)}; set these fields of `method` as they are there.'
        )


def _same_decoder(theirs, ours):
    if theirs is None or ours is None:
        return theirs is ours
    return all(getattr(theirs, name) == getattr(ours, name) for name in DECODER)


def encoder(path, vit, fresh):
    """The encoder at `path` (as `load_into` takes it) for `vit`, in the place of `fresh`."""
    loaded = load.load_backbone(path)
    _check(path, loaded.vit, vit)
    return jax.tree.map(jnp.copy, _fit(path, loaded, vit, fresh)[0])


def placed(path, found, fresh):
    """The numpy tree `found` with the types and shardings of `fresh`; its shapes must be equal."""
    theirs, ours = _shapes(found), _shapes(fresh)
    differ = [k for k in sorted({*theirs, *ours}) if theirs.get(k) != ours.get(k)]
    if differ:
        name = differ[0]
        raise ValueError(
            f'{path} does not fit, nothing was loaded: {name} is {theirs.get(name, "absent")} '
            f'there and {ours.get(name, "absent")} here ({len(differ)} such arrays); set the '
            f'sizes of `method` as they are there.'
        )
    return jax.tree.map(lambda x, like: jnp.copy(_place(x, like)), found, fresh)


def _other_grid(path, method, state):
    """The whole of a run of the same method for another image size; None if it is not that.

    Centres (of DINO, iBOT) that it lacks, as imported weights do, stay fresh: they soon find
    themselves.
    """
    run = runs.open_run(path)
    if run.method is None or type(run.method) is not type(method):
        return None
    theirs = {'params': run.params, 'extra': run.extra}
    fresh = {'params': state.params, 'extra': state.extra}
    there, here = _shapes(theirs), _shapes(fresh)
    centres = [k for k in here if k.endswith('_center') and k not in there]
    names = sorted({*there, *here} - {*centres})
    differ = [k for k in names if there.get(k) != here.get(k)]
    tables = ('pos_embed', RELATIVE)
    if not all(k.endswith(tables) and k in there and k in here for k in differ):
        return None
    if not differ and not centres:
        return None
    vit, lines = run.method.vit, []
    _check(path, vit, method.vit)
    old, new = (v.img_size // v.patch_size for v in (vit, method.vit))

    def fit(name, value, like):
        if name not in differ:
            how = ''
        elif name.endswith(RELATIVE):
            how, value = SPLINE, _relative(path, value, old, new)
        else:
            how, prefix = vit.pos_resize, value.shape[1] - old**2  # SplitMask's decoder has none
            value = pos_embed.resize(value, (new, new), prefix, how)
        if how:
            lines.append(_line('resized', name, f'to {new}x{new} patches, {how}'))
        return jnp.copy(_place(value, like))

    found, named = checksums.named(theirs), checksums.named(fresh)
    flat = [like if k in centres else fit(k, found[k], like) for k, like in named.items()]
    model = jax.tree.unflatten(jax.tree.structure(fresh), flat)
    lines += [_line('fresh', k, 'the file has none') for k in centres]
    taken = [_line('taken', k, _count(tree)) for k, tree in model['params'].items()]
    extra = {k: tree for k, tree in model['extra'].items() if f'extra/{k}' not in centres}
    if extra:
        taken.append(_line('taken', 'extra', _count(extra)))
    return model['params'], model['extra'], taken + lines


def _fit(path, loaded, vit, fresh, seen=(photometry.MEAN, photometry.STD)):
    """The encoder of a file in the shapes and on the devices of the run's, and what was done."""
    theirs, ours = checksums.named(loaded.params), checksums.named(fresh)
    there, here = (v.img_size // v.patch_size for v in (loaded.vit, vit))
    grids, lines = f'{there}x{there} to {here}x{here} patches', []
    if vit.pos_embed == 'learned':
        if loaded.vit.pos_embed == 'sincos':
            theirs['pos_embed'] = pos_embed.sincos(vit.embed_dim, there, vit.num_cls_tokens)
            lines.append(_line('filled', 'encoder/pos_embed', 'with the fixed table of the file'))
        if there != here:
            how = loaded.vit.pos_resize
            theirs['pos_embed'] = np.asarray(
                pos_embed.resize(theirs['pos_embed'], (here, here), vit.num_cls_tokens, how)
            )
            lines.append(_line('resized', 'encoder/pos_embed', f'{grids}, {how}'))
    elif there != here and vit.pos_embed == 'sincos':
        text = f'{grids}: fixed, computed and not resized'
        lines.append(_line('differs', 'encoder/pos_embed', text))
    if (loaded.vit.rel_pos, vit.rel_pos) == ('shared', 'layer'):
        table = np.asarray(theirs.pop('rel_pos_bias'))
        theirs['blocks/attn/rel_pos_bias'] = np.stack([table] * vit.depth)
        lines.append(_line('copied', 'rel_pos_bias', f'to each of {vit.depth} blocks'))
    for name in [k for k in theirs if k.endswith(RELATIVE) and there != here]:
        theirs[name] = _relative(path, theirs[name], there, here)
        lines.append(_line('resized', f'encoder/{name}', f'{grids}, {SPLINE}'))
    if loaded.vit.eps != vit.eps:
        text = f'{loaded.vit.eps:g} there, {vit.eps:g} here'
        lines.append(_line('differs', 'eps of the norms', text))
    view = loaded.transform
    if not np.allclose([view['mean'], view['std']], seen):
        text = f'normalised with mean {view["mean"]} there, {list(seen[0])} here'
        lines.append(_line('differs', 'images', text))
    for name in sorted(set(theirs) - set(ours)):
        lines.append(_line('left out', f'encoder/{name}', 'this method has none'))
    out = []
    for name, x in ours.items():
        if name not in theirs:
            lines.append(_line('fresh', f'encoder/{name}', 'the file has none'))
        elif tuple(theirs[name].shape) != tuple(x.shape):
            raise ValueError(
                f'The encoder of init_from={path} does not fit, nothing was loaded: {name} has '
                f'shape {tuple(theirs[name].shape)} there and {tuple(x.shape)} here.'
            )
        out.append(_place(theirs[name], x) if name in theirs else x)
    taken = [x for name, x in zip(ours, out) if name in theirs]
    encoder = jax.tree.unflatten(jax.tree.structure(fresh), out)
    return encoder, [_line('taken', 'encoder', _count(taken)), *lines]


def _relative(path, table, there, here):
    try:
        return pos_embed.resize_relative(table, there, here)
    except ValueError as error:
        raise ValueError(f'init_from={path} does not fit, nothing was loaded: {error}') from error


def _place(value, like):
    """A numpy array with the type and the sharding of `like`; every process has all of it."""
    value = np.asarray(value, like.dtype)
    return jax.make_array_from_callback(value.shape, like.sharding, lambda index: value[index])


def _shapes(tree):
    return {name: tuple(x.shape) for name, x in checksums.named(tree).items()}


def _count(tree):
    leaves = jax.tree.leaves(tree)
    return f'{len(leaves)} arrays, {sum(math.prod(x.shape) for x in leaves):,} parameters'


def _line(what, name, text):
    return f'  {what:<8}  {name:<17}  {text}'
