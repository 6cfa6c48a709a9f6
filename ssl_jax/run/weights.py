# SPDX-License-Identifier: Apache-2.0
"""Weights of runs, imports, exports, HF and timm folders and files, behind one interface.

`open_weights` reads them, `header` reads their description without tensors, `load_into` puts them
into a method, `import_weights` writes foreign weights as a checkpoint.
"""

import dataclasses
import json
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ssl_jax import config as config_lib
from ssl_jax import methods
from ssl_jax import step as step_lib
from ssl_jax.data import transform as transform_lib
from ssl_jax.interop import card, export, files, layouts, processors
from ssl_jax.methods import classifier
from ssl_jax.models import blocks as blocks_lib
from ssl_jax.models import pos_embed
from ssl_jax.models import vit as vit_lib
from ssl_jax.run import bucket, checkpoint, errors, launch, storage, trees
from ssl_jax.run import hints as hints_lib

# Fields of a ViT that change the function it computes.
ENCODER = (
    *('embed_dim', 'depth', 'num_heads', 'patch_size', 'num_cls_tokens', 'num_register_tokens'),
    *('ffn', 'mlp_ratio', 'rel_pos', 'key_bias'),
)
NOT_COMPARED = ('dtype', 'remat', 'parent', 'name', 'eps', 'num_patches')  # of other networks
TAKEN = ('decoder', 'predictor')  # networks that a run takes besides the encoder
RELATIVE = 'rel_pos_bias'  # tables of relative positions, see `blocks.relative_index`


@dataclasses.dataclass(frozen=True)
class Opened:
    """Weights with their description."""

    path: str  # as given
    # params, extra: numpy, of a run or an import; of a folder or file, params by network. None in a
    # header.
    params: Any
    extra: Any
    # Locked ConfigDict; of an encoder alone the defaults, without `method`; None of a folder or
    # file.
    config: Any
    method: Any  # None of an encoder alone, a folder or a file
    step: int  # 0 of foreign weights
    weights: layouts.Weights | None  # `layouts.Weights` of foreign weights, else None
    meta: dict  # of the checkpoint, see `run.checkpoint`; of a folder or file its `hints`
    stated: dict | None  # the transform that an import or a folder states, else None

    def networks(self) -> dict[str, tuple[Any, Any]]:
        """{name: (module, params)}, see `methods.base.Method.networks`; needs the tensors."""
        if self.method is None:
            modules = _modules(self.weights)
            return {name: (module, self.params[name]) for name, module in modules.items()}
        return self.method.networks(self.params, self.extra)

    @property
    def vit(self) -> vit_lib.ViT:
        """The encoder."""
        return self.weights.vit if self.method is None else self.method.vit

    def untrained(self, seed: int) -> tuple[vit_lib.ViT, Any]:
        """(ViT, fresh parameters of the same encoder): the baseline of an evaluation."""
        if self.method is None:
            params = vit_lib.init_params(self.vit, jax.random.key(seed))
            return self.vit, jax.device_get(params)
        state = jax.device_get(jax.jit(self.method.init)(jax.random.key(seed)))
        return self.method.networks(*state)['encoder']

    @property
    def transform(self) -> dict:
        """Preprocessing of images, see `data.transform`."""
        if self.stated is not None:
            return self.stated
        return self.method.transform(self.config.eval.size)

    def encoder_for(self, vit: vit_lib.ViT, fresh: Any, field: str = 'method.teacher') -> Any:
        """The encoder in the shapes of `vit`, with the types and shardings of `fresh`.

        Args:
          vit: an encoder of the run.
          fresh: its arrays.
          field: of the config, with the path of these weights; for errors.
        """
        origin = f'{field}={self.path}'
        _check(origin, self.vit, vit)
        if self.vit.pooled_norm:
            raise errors.UserError(
                f'{origin} is a fine-tuned encoder, whose final norm is that of the mean of '
                f'patches; give one from pretraining.'
            )
        return jax.tree.map(jnp.copy, _fit(self, vit, fresh, origin)[0])


def _modules(w):
    """{name: module} of foreign weights."""
    parts = {k: getattr(w, k) for k in layouts.PARTS}
    if w.vocab:
        parts['head'] = blocks_lib.Dense(w.vocab, jnp.float32, blocks_lib.truncated_normal)
    if w.num_classes:
        parts['head'] = blocks_lib.Dense(w.num_classes, jnp.float32, classifier.head_init)
    return {'encoder': w.vit, **{k: m for k, m in parts.items() if m is not None}}


def is_checkpoint(path) -> bool:
    """Whether `path` is a workdir, its checkpoints, or one step."""
    if bucket.scheme(path) == 's3':  # see `storage.require_workdir`
        return False
    path = epath.Path(path)
    if not path.is_dir():
        return False
    if (path / 'model').is_dir() or (path / 'checkpoints').is_dir():
        return True
    return bool(checkpoint.steps(path) or checkpoint.uncommitted(path))


def open_weights(path, step: int | None = None, **hints) -> Opened:
    """Opens weights.

    Args:
      path: the workdir of a run, a folder of checkpoints, an export, an HF or timm folder, or a
        file, see `interop.files.read`.
      step: of a run; default the newest intact checkpoint.
      hints: what the tensors of a file do not determine, see `run.hints`.

    Raises:
      UserError: one sentence; nothing is loaded in part.
    """
    path, hints = _with_hints(path, hints)
    if is_checkpoint(path):
        model, meta = checkpoint.restore_model(path, step=step)
        return _of_checkpoint(path, meta, model['params'], model.get('extra') or {})
    file, w = _recognise(path, hints)
    launch.log(*([_part(file)] if file.others else []), *(f'{path}: {x}' for x in w.remarks))
    return _of_file(path, file, w, _to_ours(path, file, w))


def open_run(workdir, step: int | None = None) -> Opened:
    """`open_weights` of a run, an import or a bare folder of checkpoints; never of a file."""
    workdir = epath.Path(workdir)
    if not workdir.exists():
        raise errors.UserError(
            f'there is no run at {workdir}; give the --workdir of a training run.'
        )
    if not workdir.is_dir():
        raise errors.UserError(
            f'{workdir} is a file and no run; make one of it with `ssl_jax import {workdir} '
            f'--workdir DIR`.'
        )
    model, meta = checkpoint.restore_model(workdir, step=step)
    return _of_checkpoint(workdir, meta, model['params'], model.get('extra') or {})


def whole(opened: Opened) -> tuple[Any, Any, Any] | None:
    """(method, params, extra) of weights that hold all of a method; None of an encoder alone."""
    if opened.method is not None:
        return opened.method, opened.params, opened.extra
    w, hints = opened.weights, opened.meta.get('hints', {})
    config = _config_of(w, hints, 'opened', config_lib.default(), opened.stated)
    if 'method' not in config:
        return None
    method = methods.make(config).with_modules(**_modules(w))
    like = jax.eval_shape(method.init, jax.random.key(0))
    return method, *method.with_networks(*like, opened.params)


def header(path, **hints) -> Opened:
    """`open_weights` without tensors: `params` and `extra` are None."""
    path, hints = _with_hints(path, hints)
    if is_checkpoint(path):
        return _of_checkpoint(path, checkpoint.read_meta(path), None, None)
    file, w = _recognise(path, hints)
    return _of_file(path, file, w, None)


def _of_checkpoint(path, meta, params, extra):
    imported, w, method = meta.get('imported'), None, None
    config, lines = config_lib.from_dict(meta['config'])
    launch.log(*(f'{path}: {line}' for line in lines))
    if imported:
        w = layouts.from_dict(imported['weights'])
        config = _config_of(w, {}, config.name, config, None)
    if 'method' in config:
        method = methods.make(config)
        if w is not None:
            method = method.with_modules(**_modules(w))
    stated = transform_lib.of(imported['transform']) if imported else None
    return Opened(str(path), params, extra, config, method, int(meta['step']), w, meta, stated)


def _of_file(path, file, w, params):
    processor = getattr(layouts.family(w), 'processor', {})
    if export.METADATA in file.metadata:
        processor = {}
    try:
        view = processors.transform_of(w.vit.img_size, file.processor, file.hints, **processor)
    except errors.UserError as error:
        raise errors.UserError(f'{path}: {error}') from error
    hints = {'hints': file.hints}
    return Opened(str(path), params, {}, None, None, 0, w, hints, view)


def _with_hints(path, hints):
    """(path, hints) with those behind the path; a run has none."""
    path, more = hints_lib.split(path)
    hints = hints_lib.checked({**more, **hints})
    if hints and is_checkpoint(path):
        raise errors.UserError(
            f'{path} is a run, which says all of itself; leave {", ".join(hints)} out.'
        )
    return path, hints


def _recognise(path, hints):
    """(File, Weights) of weights that are no run."""
    hints = dict(hints)
    file = files.read(path, hints.pop('part', ''))
    try:
        if export.METADATA in file.metadata:
            w = layouts.from_dict(json.loads(file.metadata[export.METADATA]))
            _check_hints(w, hints)
        else:
            w = layouts.recognise(file.tensors, {**file.hints, **hints})
    except ValueError as error:
        raise errors.UserError(f'{path}: {error}') from error
    vit = w.vit.clone(pos_resize=hints.get('pos_resize', w.vit.pos_resize))
    if layouts.NORM[0] in file.extra:  # of a fine-tuned run, beside that of the mean
        vit = vit.clone(pooled_norm=False)
    return file, dataclasses.replace(w, vit=vit)


def _check_hints(w, hints):
    """Raises if hints contradict the description in an export of ours."""
    heads = w.decoder.num_heads if w.decoder is not None else None
    said = {'decoder_num_heads': heads}
    for name in hints_lib.NUMBERS:
        value = said.get(name, getattr(w.vit, name, None))
        if name in hints and hints[name] != value:
            raise errors.UserError(
                f'{name}={hints[name]} contradicts the file, where it is {value}; leave it out.'
            )


def _part(file):
    """A line on what was read of a file."""
    line = f'read {file.source}' + (f', its part {file.taken!r}' if file.taken else '')
    if file.others:
        line += f'; also there: {", ".join(file.others)} (part=NAME takes another)'
    return line


def _to_ours(path, file, w):
    try:
        return layouts.to_ours(w, file.tensors, file.extra)
    except ValueError as error:
        raise errors.UserError(f'{path}: {error}') from error


# Imports.


def import_weights(path, workdir, *, log=print, **hints) -> layouts.Weights:
    """Writes foreign weights as a checkpoint of step 0.

    With the decoder of a MAE or Pixio, the predictor of I-JEPA, or the projection heads of DINOv2
    (DINO, iBOT), it holds the whole method, else only the encoder (and BEiT's layer to words).
    Heads and predictors come from a teacher checkpoint: student and teacher both start from it.
    `open_weights`, `ssl_jax eval`, `ssl_jax export` and `config.init_from` take it.

    Args:
      path, hints: see `open_weights`.
      workdir: new, local or gs://.
      log: called with each line of the report; None for no report.

    Raises:
      UserError: one sentence; then nothing was written.
    """
    path, hints = _with_hints(path, hints)
    target = epath.Path(workdir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        found = 'a run' if is_checkpoint(workdir) or (target / 'config.json').exists() else 'files'
        raise errors.UserError(f'{workdir} holds {found} already; give a new --workdir.')
    if is_checkpoint(path):
        raise errors.UserError(
            f'{path} is a run of ssl_jax already; use it as it is, as --workdir or init_from.'
        )
    file, w = _recognise(path, hints)
    params = _to_ours(path, file, w)
    name = f'imported {w.family} ({os.path.basename(file.source)})'
    view = _of_file(path, file, w, None).stated
    config = _config_of(w, file.hints, name, config_lib.default(), view)
    imported = dict(
        weights=layouts.to_dict(w),
        transform=view,
        origin=_origin(file),
        source=file.source,
        part=file.taken,
        sha256=file.sha256,
    )
    meta = {'config': json.loads(config_lib.to_json(config)), 'imported': imported}
    tree, extra = params, {}
    if 'method' in config:
        method = methods.make(config)
        like = jax.eval_shape(method.init, jax.random.key(0))
        tree, extra = method.with_networks(*like, params)
    zero = np.zeros((), np.int32)
    state = step_lib.TrainState(zero, tree, {}, extra, np.zeros((2,), np.int32))
    if storage.is_remote(workdir):
        _save(target, state, meta, config)
    else:
        with storage.atomic_folder(workdir) as folder:
            _save(folder, state, meta, config)
    if log is not None:
        log(_part(file))
        for line in card.describe(w, params, len(file.tensors)):
            log(line)
        for line in layouts.notes(w, file.extra):
            log(line)
        log(f'written to {workdir}')
    return w


def _origin(file):
    """What an export of ours says on where its weights come from; None of other files."""
    path = file.paths[0].parent / card.PROVENANCE
    if export.METADATA not in file.metadata or not path.exists():
        return None
    try:
        said = json.loads(path.read_text())
        names = ('run', 'step', 'seed', 'config', 'checkpoint_sha256')
        before = said.get('imported') or {}
        if before.get('origin'):  # the first of a chain
            return before['origin']
        if before:
            return {'imported': {k: before[k] for k in ('source', 'sha256')}}
        return {name: said[name] for name in names}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise errors.UserError(f'{path} is damaged ({error!r}); delete it.') from error


def _config_of(w, hints, name, base, view):
    """A config that describes foreign weights; without `method` for an encoder alone.

    Args:
      base: a config; if its method is that of the weights, they override its fields.
      view: the transform of a new import; None of one that is opened again.
    """
    found = layouts.method(w, hints) if w.what == 'full' else None
    if found is None:
        config = config_lib.default()
        del config['method']
    else:
        vit, (kind, values) = w.vit, found
        config = config_lib.default(kind)
        if 'method' in base and base.method.name == kind:
            config.method.update(base.method.to_dict())
        widths = ('embed_dim', 'depth', 'num_heads', 'patch_size', 'img_size', 'mlp_ratio', 'eps')
        values = {'size': None, **{k: getattr(vit, k) for k in widths}, **values}
        if view is not None and 'mean' in config.method:
            values |= {k: tuple(map(float, view[k])) for k in ('mean', 'std')}
        config.method.update(values)
    config.name = name
    return config_lib.lock(config)


def _save(workdir, state, meta, config):
    saver = checkpoint.Checkpointer(epath.Path(workdir) / 'checkpoints')
    try:
        saver.save(0, state, meta)
    finally:
        saver.close()
    storage.atomic_write(epath.Path(workdir) / 'config.json', config_lib.to_json(config))


# The start of a run.


def resume(path: str, abstract: Any) -> Any:
    """The full state of another run: parameters, moments and step."""
    path = epath.Path(path)
    folder = path / 'checkpoints' if (path / 'checkpoints').exists() else path
    other = checkpoint.Checkpointer(folder)
    if other.latest() is None:
        raise errors.UserError(
            f'resume_from={path} holds no checkpoint; give the workdir of a run that has saved one.'
        )
    try:
        return other.restore(abstract)[0]
    finally:
        other.close()


def load_into(path: str, method: Any, state: Any, abstract: Any) -> tuple[Any, Any, list[str]]:
    """The parameters of `state`, replaced by the weights at `path` as far as they fit.

    A checkpoint with all parameters of this method in these sizes is taken whole, with its `extra`.
    So is one that differs only in the image size, with its position tables resized (the
    high-resolution stage). From other weights the encoder is taken (by `method.with_networks`), and
    the decoder of a MAE or Pixio or the predictor of I-JEPA if it fits. A position table of another
    grid is resized by the rule of the source encoder, relative positions by that of BEiT.

    Args:
      path: see `open_weights`.
      method: of the new run.
      state: its fresh TrainState, on the devices.
      abstract: the same as ShapeDtypeStructs with shardings.

    Returns:
      (params, extra, log lines): per network, whether it was taken, resized or left fresh.

    Raises:
      UserError: one sentence with the values of both sides if the encoder does not fit.
    """
    opened, origin = None, f'init_from={path}'
    if is_checkpoint(path):
        target = {'params': abstract.params, 'extra': abstract.extra}
        try:
            model, meta = checkpoint.restore_model(path, target)
        except checkpoint.MismatchError:  # another method, another size, or the encoder alone
            opened = open_weights(path)
            whole = _other_grid(opened, method, state, origin)
            if whole is not None:
                return whole
        else:
            other = _of_checkpoint(path, meta, model['params'], model['extra'])
            _check(origin, other.vit, method.vit)
            src, dst = (m.networks(model['params'], model['extra']) for m in (other.method, method))
            if all(_same(src.get(k), dst.get(k)) for k in TAKEN):
                parts = dict(model['params'])
                parts |= {'extra': model['extra']} if model['extra'] else {}
                lines = [_line('taken', name, _count(tree)) for name, tree in parts.items()]
                return model['params'], model['extra'], lines
    opened = opened or open_weights(path)
    _check(origin, opened.vit, method.vit)
    networks = method.networks(state.params, state.extra)
    norm = (method.mean, method.std)
    encoder, lines = _fit(opened, *networks['encoder'], origin, norm)
    found, src = {'encoder': encoder}, opened.networks()
    for name in TAKEN:
        same = _same(src.get(name), networks.get(name))
        if same and name in src and _shapes(src[name][1]) == _shapes(networks[name][1]):
            found[name] = jax.tree.map(_place, src[name][1], networks[name][1])
    for name, tree in _of_classifier(opened).items():
        if method.labels and _shapes(tree) == _shapes(state.params.get(name, {})):
            found[name] = jax.tree.map(_place, tree, state.params[name])
    params, extra = method.with_networks(state.params, state.extra, found)
    for name in [k for k in params if k not in ('encoder', 'backbone')]:
        if name in found:
            lines.append(_line('taken', name, _count(params[name])))
            continue
        other = name in TAKEN and name in (opened.params or {})
        why = 'that of the file has other sizes' if other else 'the file has none'
        if name == 'head' and 'codebook' in extra:
            why = 'it is for the words of this run'
        if name == 'head' and method.labels:
            why = 'it is for the classes of this run'
        lines.append(_line('fresh', name, f'{_count(params[name])}; {why}'))
    # Copies, as a donated buffer must not belong to numpy nor occur twice, and the encoder of
    # DINOv2 becomes student and teacher.
    new = {id(x) for x in jax.tree.leaves(found)}
    params, extra = jax.tree.map(lambda x: jnp.copy(x) if id(x) in new else x, (params, extra))
    return params, extra, lines


def _of_classifier(opened):
    """{name: params} of what a fine-tuned model has behind its encoder."""
    of_file = opened.weights is not None and opened.weights.num_classes
    if of_file or (opened.method is not None and opened.method.labels):
        return {k: opened.params[k] for k in ('fc_norm', 'head') if k in opened.params}
    return {'fc_norm': opened.params['encoder']['norm']} if opened.vit.pooled_norm else {}


def _check(origin, src, dst):
    """Raises UserError if the fields of the encoder `src` of a file differ from `dst` of a run."""
    pairs = [(name, getattr(src, name), getattr(dst, name)) for name in ENCODER]
    if (src.rel_pos, dst.rel_pos) == ('shared', 'layer'):  # one table becomes that of all
        pairs = [pair for pair in pairs if pair[0] != 'rel_pos']
    scales = ['none' if v.layer_scale is None else 'some' for v in (src, dst)]
    pairs.append(('layer_scale', *scales))
    # Fixed positions can become the start of learned ones.
    if src.pos_embed == 'learned' or 'rope' in (src.pos_embed, dst.pos_embed):
        pairs.append(('pos_embed', src.pos_embed, dst.pos_embed))
    differ = [f'{name} is {a} there and {b} here' for name, a, b in pairs if a != b]
    if differ:
        raise errors.UserError(
            f'The encoder of {origin} does not fit, nothing was loaded: '
            f'{", ".join(differ)}; set these fields of `method` as they are there.'
        )


def _same(src, dst):
    """Whether two (module, params) or None are the same network up to the image size."""
    if src is None or dst is None:
        return src is dst
    a, b = (
        {f.name: getattr(m, f.name) for f in dataclasses.fields(m) if f.name not in NOT_COMPARED}
        for m in (src[0], dst[0])
    )
    return type(src[0]) is type(dst[0]) and a == b


def place(name: str, tree: Any, fresh: Any, origin: str = '') -> Any:
    """The numpy tree with the types and shardings of `fresh`.

    Args:
      name: of the tree, for errors.
      fresh: arrays of the same shapes.
      origin: field and value of the config, 'method.teacher=PATH', for errors.

    Raises:
      UserError: the shapes differ.
    """
    src, dst = _shapes(tree), _shapes(fresh)
    differ = [k for k in sorted({*src, *dst}) if src.get(k) != dst.get(k)]
    if differ:
        leaf = f'{name}/{differ[0]}'.rstrip('/')
        raise errors.UserError(
            f'{origin or name} does not fit, nothing was loaded: {leaf} is '
            f'{src.get(differ[0], "absent")} there and {dst.get(differ[0], "absent")} here '
            f'({len(differ)} such arrays); set the sizes of `method` as they are there.'
        )
    return jax.tree.map(lambda x, like: jnp.copy(_place(x, like)), tree, fresh)


def _other_grid(opened, method, state, origin):
    """`load_into` of a run of the same method at another image size; None if it is not one.

    Centres (of DINO, iBOT) that it lacks, as imported weights do, stay fresh: they adapt within a
    few steps. So does what `prepare` makes of `extra`, which either may lack.
    """
    if opened.method is None or type(opened.method) is not type(method):
        return None
    remade = tuple(f'extra/{name}/' for name in method.remade)
    found = trees.named({'params': opened.params, 'extra': opened.extra})
    src = {k: x for k, x in found.items() if not k.startswith(remade)}
    fresh = {'params': state.params, 'extra': state.extra}
    dst = trees.named(fresh)
    centres = [k for k in dst if k.endswith('_center') and k not in src]
    stay = {*centres, *(k for k in dst if k.startswith(remade))}
    names = sorted({*src, *dst} - stay)
    differ = [k for k in names if _shape(src.get(k)) != _shape(dst.get(k))]
    tables = ('pos_embed', RELATIVE)
    if not all(k.endswith(tables) and k in src and k in dst for k in differ):
        return None
    if not differ and found.keys() == dst.keys():
        return None
    vit, lines = opened.vit, []
    _check(origin, vit, method.vit)
    old, new = (v.img_size // v.patch_size for v in (vit, method.vit))

    def fit(name, like):
        value = src[name]
        if name not in differ:
            return jnp.copy(_place(value, like))
        if name.endswith(RELATIVE):
            rule, value = layouts.RULES[vit.rel_resize], _relative(origin, vit, value, new)
        else:
            rule, prefix = vit.pos_resize, value.shape[1] - old**2  # SplitMask's decoder has none
            value = pos_embed.resize(value, (new, new), prefix, rule)
        lines.append(_line('resized', name, f'to {new}x{new} patches, {rule}'))
        return jnp.copy(_place(value, like))

    flat = [like if k in stay else fit(k, like) for k, like in dst.items()]
    model = jax.tree.unflatten(jax.tree.structure(fresh), flat)
    lines += [_line('fresh', k, 'the file has none') for k in centres]
    taken = [_line('taken', k, _count(tree)) for k, tree in model['params'].items()]
    left = {*centres, *(f'extra/{name}' for name in method.remade)}
    extra = {k: tree for k, tree in model['extra'].items() if f'extra/{k}' not in left}
    if extra:
        taken.append(_line('taken', 'extra', _count(extra)))
    return model['params'], model['extra'], taken + lines


def _fit(opened, vit, fresh, origin, norm=None):
    """(encoder of a file in the shapes and on the devices of a run, log lines).

    Args:
      vit, fresh: encoder of the run and its arrays.
      origin: field and path, for errors.
      norm: (mean, std) of the run's images.
    """
    src_vit = opened.vit
    src, dst = trees.named(opened.networks()['encoder'][1]), trees.named(fresh)
    old, new = (v.img_size // v.patch_size for v in (src_vit, vit))
    grids, lines = f'{old}x{old} to {new}x{new} patches', []
    if vit.pos_embed == 'learned':
        if src_vit.pos_embed == 'sincos':
            src['pos_embed'] = pos_embed.sincos(vit.embed_dim, old, vit.num_cls_tokens)
            lines.append(_line('filled', 'encoder/pos_embed', 'with the fixed table of the file'))
        if old != new:
            rule = src_vit.pos_resize
            table = pos_embed.resize(src['pos_embed'], (new, new), vit.num_cls_tokens, rule)
            src['pos_embed'] = np.asarray(table)
            lines.append(_line('resized', 'encoder/pos_embed', f'{grids}, {rule}'))
    elif old != new and vit.pos_embed == 'sincos':
        text = f'{grids}: fixed, computed and not resized'
        lines.append(_line('differs', 'encoder/pos_embed', text))
    if (src_vit.rel_pos, vit.rel_pos) == ('shared', 'layer'):
        table = np.asarray(src.pop('rel_pos_bias'))
        src['blocks/attn/rel_pos_bias'] = np.stack([table] * vit.depth)
        lines.append(_line('copied', 'rel_pos_bias', f'to each of {vit.depth} blocks'))
    for name in [k for k in src if k.endswith(RELATIVE) and old != new]:
        src[name] = _relative(origin, src_vit, src[name], new)
        text = f'{grids}, {layouts.RULES[src_vit.rel_resize]}'
        lines.append(_line('resized', f'encoder/{name}', text))
    if vit.pos_embed == 'learned' and src_vit.pos_resize != vit.pos_resize:
        text = f'at other sizes {src_vit.pos_resize} there, {vit.pos_resize} here'
        lines.append(_line('differs', 'positions', text))
    pooled = src_vit.pooled_norm and not vit.pooled_norm
    if pooled:
        src = {name: x for name, x in src.items() if not name.startswith('norm/')}
    if src_vit.eps != vit.eps:
        text = f'{src_vit.eps:g} there, {vit.eps:g} here'
        lines.append(_line('differs', 'eps of the norms', text))
    view = opened.transform
    if norm is not None and not np.allclose([view['mean'], view['std']], norm):
        text = f'normalised with mean {list(view["mean"])} there, {list(norm[0])} here'
        lines.append(_line('differs', 'images', text))
    for name in sorted(set(src) - set(dst)):
        lines.append(_line('left out', f'encoder/{name}', 'this method has none'))
    out = []
    for name, x in dst.items():
        if name not in src:
            text = 'the file has that of the mean of patches' if pooled else 'the file has none'
            lines.append(_line('fresh', f'encoder/{name}', text))
        elif _shape(src[name]) != _shape(x):
            raise errors.UserError(
                f'The encoder of {origin} does not fit, nothing was loaded: {name} has '
                f'shape {_shape(src[name])} there and {_shape(x)} here.'
            )
        out.append(_place(src[name], x) if name in src else x)
    taken = [x for name, x in zip(dst, out, strict=True) if name in src]
    encoder = jax.tree.unflatten(jax.tree.structure(fresh), out)
    return encoder, [_line('taken', 'encoder', _count(taken)), *lines]


def _relative(origin, vit, table, new):
    old = vit.img_size // vit.patch_size
    try:
        return pos_embed.resize_relative(np.asarray(table), old, new, vit.rel_resize)
    except ValueError as error:
        raise errors.UserError(f'{origin} does not fit, nothing was loaded: {error}') from error


def _place(value, like):
    """A numpy array, the same on every process, with the type and sharding of `like`."""
    value = np.asarray(value, like.dtype)
    return jax.make_array_from_callback(value.shape, like.sharding, lambda index: value[index])


def _shape(x):
    return None if x is None else tuple(x.shape)


def _shapes(tree):
    return {name: _shape(x) for name, x in trees.named(tree).items()}


def _count(tree):
    leaves = jax.tree.leaves(tree)
    return f'{len(leaves)} arrays, {sum(math.prod(x.shape) for x in leaves):,} parameters'


def _line(what, name, text):
    return f'  {what:<8}  {name:<17}  {text}'
