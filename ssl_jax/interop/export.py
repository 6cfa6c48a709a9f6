# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as a folder that others read: `ssl_jax export`.

The weights for PyTorch are written on the host, in numpy; no pickle is written. The parameters are
held once; each tensor is transposed while it is written. The programs, for ONNX Runtime and plain
JAX, are run once for a comparison with the encoder.
"""

import dataclasses
import importlib.metadata
import json
import pathlib

from etils import epath

from ssl_jax.interop import card, files, heads, layouts, onnx, processors, program
from ssl_jax.run import checkpoint, errors, hashing, storage, trees

LAYOUTS = tuple(card.LIBRARIES)
TARGETS = (*LAYOUTS, *card.PROGRAMS)
WHATS = ('backbone', 'full')
DTYPES = ('float32', 'bfloat16')
FORMAT = 'ssl_jax export 1'
METADATA = 'ssl_jax'  # key in the safetensors header, of `layouts.to_dict`
PACKAGES = ('ssl_jax', 'jax', 'flax', 'numpy', 'orbax-checkpoint')


def export(opened, to, out, *, what='backbone', dtype='float32', evaluation=(), trained_heads=()):
    """Writes weights in the names and shapes of a PyTorch library, or a program with its weights.

    The folder of a library holds model.safetensors, config.json, preprocessor_config.json,
    README.md (a model card), provenance.json and, where the layout has no place for some of our
    tensors, the sidecar `files.EXTRA`, with which `ssl_jax import` gives back every bit. The folder
    of a program, see `onnx` and `program`, has the card and provenance.json too.

    Args:
      opened: `run.weights.Opened` of a run or of imported weights.
      to: 'official', 'hf', 'timm', 'onnx' or 'jax'.
      out: a folder, local or in a bucket: new, empty or an earlier export.
      what: 'backbone', or 'full' with the decoder of a MAE or Pixio, with the predictor of I-JEPA
        (official names), with the projection heads of DINOv2 (official names; the teacher, of a
        distillation the student's average), or with BEiT's layer to visual words (the tokenizer
        that names them stays behind), or with the classifier of a fine-tuned run (official names).
      dtype: 'float32' or 'bfloat16'.
      evaluation: lines of a table for the model card.
      trained_heads: folders of heads for dense prediction, written beside the encoder of a library
        under their official names, see `heads.write`.

    Returns:
      The path of the folder.

    Raises:
      UserError: one sentence; then `out` is as it was.
    """
    for name, value, known in (
        ('to', to, TARGETS),
        ('what', what, WHATS),
        ('dtype', dtype, DTYPES),
    ):
        if value not in known:
            near = errors.close(value, known, cutoff=0.0)[0]
            raise errors.UserError(
                f'{name}={value} is unknown; did you mean {near}? There are {", ".join(known)}.'
            )
    out = (epath if storage.is_remote(out) else pathlib).Path(out)
    _check_replaceable(out)
    if to == 'onnx':
        if dtype != 'float32':
            raise errors.UserError(
                f'to=onnx dtype={dtype} is not possible: its graph is float32; use dtype=float32.'
            )
        native = {**opened.transform, 'size': opened.vit.img_size}
        opened = dataclasses.replace(opened, stated=native)
    processor = None
    if to != 'jax' and (to != 'timm' or opened.transform['mode'] != 'border'):
        processor = processors.processor_of(opened.transform)
    networks = opened.networks()
    method, pool = opened.method, getattr(opened.method, 'pool', None)
    if what == 'full' and pool:
        if to != 'official':
            raise errors.UserError(
                f'to={to} what=full is not possible for a classifier: its names are known '
                f'to=official; use that, or what=backbone.'
            )
        w, left = _weights(opened, to, 'backbone')
        w = dataclasses.replace(w, what='full', num_classes=method.outputs, pool=pool)
        params, left = opened.params, [name for name in left if name != 'head']
    else:
        w, left = _weights(opened, to, what)
        names = [name for name in networks if name not in left] if what == 'full' else ['encoder']
        params = {name: networks[name][1] for name in names}
    tensors, extra = ({}, {}) if to == 'jax' else layouts.to_layout(w, params)
    if w.pool == 'patch' and to != 'jax':  # what the file holds without the sidecar
        w = dataclasses.replace(w, vit=w.vit.clone(pooled_norm=True))
    metadata = {'format': 'pt', METADATA: json.dumps(layouts.to_dict(w))}
    if to in card.PROGRAMS:
        extra = {}  # nothing but an import needs it, and none reads a program
    if to == 'onnx':
        onnx.require()
    use, more = (), {}
    with storage.atomic_folder(out) as folder:
        if to == 'jax':
            encoder = w.vit, params['encoder']
            use, more = program.write(folder, *encoder, opened.transform, dtype)
        else:
            files.write(folder / files.WEIGHTS, tensors, metadata, dtype)
            if extra:
                files.write(folder / files.EXTRA, extra, {'format': 'pt'}, dtype)
            config = _config(opened, w, dtype)
            if w.num_classes:
                config.update(num_classes=w.num_classes, pool=pool, classes=list(method.classes))
            _json(folder / 'config.json', config)
            if processor is not None:
                _json(folder / processors.FILE, processor)
            if trained_heads:
                more = {'heads': [heads.write(x, folder, dtype) for x in trained_heads]}
        if to == 'onnx':
            use, more = onnx.write(folder, w, params, opened.transform, opened.method)
        w = dataclasses.replace(w, layout=to)
        provenance = _provenance(opened, w, dtype) | more
        provenance['tensors'] = len(trees.named(params)) if to == 'jax' else len(tensors)
        provenance['parameters'] = card.num_parameters(params)
        _json(folder / card.PROVENANCE, provenance)
        text = card.model_card(opened, w, params, provenance, list(extra), evaluation, left, use)
        (folder / 'README.md').write_text(text)
    return out


def _check_replaceable(out):
    """Only a new place, an empty folder or an earlier export may be replaced."""
    if not storage.exists(out):
        return
    if not out.is_dir():
        raise errors.UserError(f'{out} is a file; give a folder with --out.')
    if storage.names(out):
        try:
            export = json.loads(storage.read(out / card.PROVENANCE))['format'] == FORMAT
        except (OSError, ValueError, KeyError, TypeError):
            export = False
        if not export:
            raise errors.UserError(
                f'{out} holds files that are no export; give a new folder with --out.'
            )


def _weights(opened, to, what):
    """(`layouts.Weights` to write, names of the networks that no layout has a place for).

    ONNX is made of the weights in the names of transformers.
    """
    networks = {name: module for name, (module, _) in opened.networks().items()}
    layout = 'hf' if to == 'onnx' else to
    whole, left = layouts.of_networks(networks, layout, opened.weights and opened.weights.family)
    if what == 'full' and len(left) == len(networks) - 1:
        raise errors.UserError(
            "what=full needs a decoder, a predictor, projection heads or BEiT's layer to visual "
            'words in names that others know, and this checkpoint has none; use what=backbone.'
        )
    can = layouts.refusals(whole)
    words = whole.vocab and "no graph is made of BEiT's layer to visual words"
    can |= {
        ('onnx', 'backbone'): can['hf', 'backbone'],
        ('onnx', 'full'): can['hf', 'full'] or words or '',
        ('jax', 'backbone'): '',
        ('jax', 'full'): 'the program is the encoder alone',
    }
    if why := can.get((to, what), 'there is no such layout'):
        others = sorted({layout for (layout, w), no in can.items() if w == what and not no})
        raise errors.UserError(
            f'to={to} what={what} is not possible: {why.rstrip(".")}; possible with this model: '
            f'{", ".join(others) or "nothing"}.'
        )
    if what == 'full':
        return whole, left
    return layouts.Weights(whole.family, layout, what, whole.vit), left


def _config(opened, w, dtype):
    """config.json of the layout."""
    options = {}
    if w.decoder is not None:
        names = ('mask_ratio', 'norm_pix_loss')
        options = {name: getattr(opened.method, name) for name in names}
    config = layouts.config_json(w, **options)
    if w.layout == 'hf':
        config['dtype'] = dtype
    if 'pretrained_cfg' in config:
        config['pretrained_cfg'].update(processors.timm_of(opened.transform))
    return config


def _provenance(opened, w, dtype):
    """Where the numbers come from."""
    packages = PACKAGES + (onnx.MODULES if w.layout == 'onnx' else ())
    versions = {name: importlib.metadata.version(name) for name in packages}
    folder = checkpoint.step_dir(opened.path, opened.step) / 'model'
    return dict(
        format=FORMAT,
        layout=w.layout,
        what=w.what,
        dtype=dtype,
        weights=layouts.to_dict(w),
        run=opened.path,
        step=opened.step,
        seed=opened.config.seed,
        checkpoint_sha256=hashing.sha256_folder(folder),
        imported=opened.meta.get('imported'),
        config=opened.meta['config'],
        versions=versions,
        trained_with=opened.meta.get('versions'),
    )


def _json(path, value):
    path.write_text(json.dumps(value, indent=2) + '\n')
