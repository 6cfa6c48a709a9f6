# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as a folder that PyTorch reads: `ssl_jax export`.

Everything happens on the host, in numpy; no pickle is written. The parameters are held once and
each tensor is laid out as it is written.
"""

import difflib
import hashlib
import importlib.metadata
import json
import pathlib

import jax.numpy as jnp
from etils import epath

from ssl_jax import version
from ssl_jax.interop import beit, describe, files, layouts, load, tables
from ssl_jax.run import runs, step_dirs

LIBRARIES = {'official': 'pytorch', 'hf': 'transformers', 'timm': 'timm'}
LAYOUTS = tuple(LIBRARIES)
WHATS = ('backbone', 'full')
DTYPES = ('float32', 'bfloat16')
FORMAT = 'ssl_jax export 1'
PROVENANCE = 'provenance.json'
PACKAGES = ('jax', 'flax', 'numpy', 'orbax-checkpoint')


def export(workdir, to, out, *, step=None, what='backbone', dtype='float32'):
    """Writes weights in the names and shapes of a PyTorch library.

    The folder holds model.safetensors, config.json, preprocessor_config.json, README.md (a model
    card), provenance.json and, where the layout has no place for some of our tensors, the sidecar
    `torch_io.EXTRA`, with which `ssl_jax import` gives back every bit.

    Args:
      workdir: a run, imported weights, or a bare folder of checkpoints, local or gs://.
      to: 'official', 'hf' or 'timm'.
      out: a local folder, new, empty or an earlier export.
      step: which checkpoint; default the newest.
      what: 'backbone', or 'full' with the decoder of a MAE or Pixio, with the projection heads
        of DINOv2 (official names; the teacher, of a distillation the student's average), or with
        BEiT's layer to visual words (the tokenizer that names them stays behind), or with the
        classifier of a fine-tuned run (official names).
      dtype: 'float32' or 'bfloat16'.

    Returns:
      pathlib.Path of the folder.

    Raises:
      ValueError: one sentence; then `out` is as it was.
    """
    for name, value, known in (
        ('to', to, LAYOUTS),
        ('what', what, WHATS),
        ('dtype', dtype, DTYPES),
    ):
        if value not in known:
            near = difflib.get_close_matches(str(value), known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f'{name}={value} is unknown; did you mean {near}? There are {", ".join(known)}.'
            )
    if step_dirs.is_remote(out):
        raise ValueError(f'{out} is not local; export to a local folder and copy that.')
    out = pathlib.Path(out)
    _check_replaceable(out)
    run = runs.open_run(workdir, step)
    if what == 'full' and hasattr(run.method, 'logits'):
        weights, params = _classifier(run, to), run.params
        tensors, extra, metadata = _classifier_tensors(run, weights), {}, {'format': 'pt'}
    else:
        weights = _weights(run, to, what)
        params = run.whole()[1] if what == 'full' else {'encoder': run.backbone()[1]}
        tensors, extra = layouts.to_layout(weights, params)
        metadata = {'format': 'pt', load.METADATA: json.dumps(describe.to_dict(weights))}
    with files.staged(out) as folder:
        files.write(folder / files.WEIGHTS, tensors, metadata, dtype)
        if extra:
            files.write(folder / files.EXTRA, extra, {'format': 'pt'}, dtype)
        transform = run.transform
        provenance = _provenance(run, workdir, weights, dtype)
        provenance['tensors'] = len(tensors)
        provenance['parameters'] = describe.num_parameters(params)
        config = _config(run.method, weights, dtype, transform)
        if what == 'full' and hasattr(run.method, 'logits'):
            names = list(run.method.classes)
            config.update(num_classes=len(names), pool=run.method.pool, classes=names)
        _json(folder / 'config.json', config)
        _json(folder / 'preprocessor_config.json', describe.processor_of(transform))
        _json(folder / PROVENANCE, provenance)
        card = _card(run, workdir, weights, params, provenance, transform, list(extra))
        (folder / 'README.md').write_text(card)
    return out


def _check_replaceable(out):
    """Only a new place, an empty folder or an earlier export may be replaced."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f'{out} is a file; give a folder with --out.')
    if any(out.iterdir()):
        try:
            ours = json.loads((out / PROVENANCE).read_text())['format'] == FORMAT
        except (OSError, ValueError, KeyError, TypeError):
            ours = False
        if not ours:
            raise ValueError(f'{out} holds files that are no export; give a new folder with --out.')


def _weights(run, to, what):
    """`layouts.Weights` of what is to be written, or a sentence why that cannot be."""
    vit, modules = run.backbone()[0], run.whole()[0]
    decoder = modules.get('decoder')
    family = run.weights.family if run.weights else layouts.family_of(vit, decoder)
    if what == 'full' and not modules:
        raise ValueError(
            "what=full needs a decoder, projection heads or BEiT's layer to visual words in names "
            'that others know, and this checkpoint has none; use what=backbone.'
        )
    vocab = modules['head'].features if 'head' in modules else None
    can = layouts.available(vit, decoder, family, modules.get('dino_head'), vocab)
    if why := can.get((to, what), 'there is no such layout'):
        others = sorted({layout for (layout, w), no in can.items() if w == what and not no})
        raise ValueError(
            f'to={to} what={what} is not possible: {why.rstrip(".")}; possible with this model: '
            f'{", ".join(others) or "nothing"}.'
        )
    plain = {}
    if what == 'full':
        modules.pop('head', None)
        plain = {k: m.clone(dtype=jnp.float32) for k, m in modules.items()}
    if 'decoder' in plain:
        plain['decoder'] = plain['decoder'].clone(remat='none')
    return layouts.Weights(
        family=family,
        layout=to,
        what=what,
        vit=vit.clone(dtype=jnp.float32, remat='none'),
        prefix='backbone.' if 'dino_head' in plain else '',
        vocab=vocab if what == 'full' else None,
        **plain,
    )


def _classifier(run, to):
    """`layouts.Weights` of the encoder of a fine-tuned run that is written with its head."""
    if to != 'official':
        raise ValueError(
            f'to={to} what=full is not possible for a classifier: its names are known to=official; '
            f'use that, or what=backbone.'
        )
    return _weights(run, to, 'backbone')


def _classifier_tensors(run, weights):
    """State dict of MAE's `models_vit.py` and BEiT's `modeling_finetune.py`: encoder and head.

    With the mean of the patches these have `fc_norm` and no final norm of the encoder.
    """
    mean, params = run.method.pool == 'patch', dict(run.params)
    rows = layouts.rows(weights) + tables.linear('head', 'head')
    if mean:
        rows = [row for row in rows if not row[0].startswith('encoder/norm/')]
        rows += tables.norm('fc_norm', 'fc_norm')
        params['encoder'] = {k: v for k, v in params['encoder'].items() if k != 'norm'}
    return {**tables.to_torch(rows, params, layouts.fixed(weights)), **beit.buffers(weights)}


def _config(method, weights, dtype, transform):
    """config.json of the layout."""
    options = {}
    if weights.decoder is not None:
        options = dict(mask_ratio=method.mask_ratio, norm_pix_loss=method.norm_pix_loss)
    config = layouts.config_json(weights, **options)
    if weights.layout == 'hf':
        config['dtype'] = dtype
    if 'pretrained_cfg' in config:
        config['pretrained_cfg'].update(
            input_size=[3, transform['size'], transform['size']],
            crop_pct=transform['crop'] or 1.0,
            crop_mode='squash' if transform['crop'] is None else 'center',
            interpolation=transform['interpolation'],
            mean=transform['mean'],
            std=transform['std'],
        )
    return config


def _provenance(run, workdir, weights, dtype):
    """Where the numbers come from."""
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    return dict(
        format=FORMAT,
        layout=weights.layout,
        what=weights.what,
        dtype=dtype,
        weights=describe.to_dict(weights),
        run=str(workdir),
        step=run.step,
        seed=run.config.seed,
        checkpoint_sha256=_sha256(_step_dir(workdir, run.step) / 'model'),
        imported=run.meta.get('imported'),
        config=run.meta['config'],
        versions={'ssl_jax': version.__version__, **versions},
        trained_with=run.meta.get('versions'),
    )


def _step_dir(workdir, step):
    path = epath.Path(workdir)
    if (path / 'model').exists():
        return path
    return (path / 'checkpoints' if (path / 'checkpoints').exists() else path) / str(step)


def _sha256(folder):
    """Of the names and bytes of all files below a folder, in the order of their names."""
    digest = hashlib.sha256()
    for name, path in sorted(_walk(folder, '')):
        digest.update(f'{name}\n'.encode())
        with path.open('rb') as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def _walk(folder, prefix):
    for path in folder.iterdir():
        if path.is_dir():
            yield from _walk(path, f'{prefix}{path.name}/')
        else:
            yield f'{prefix}{path.name}', path


def _json(path, value):
    path.write_text(json.dumps(value, indent=2) + '\n')


def _card(run, workdir, weights, params, provenance, transform, extra):
    """The model card, in Markdown."""
    imported, config = run.meta.get('imported'), run.config
    lines = [
        '---',
        f'library_name: {LIBRARIES[weights.layout]}',
        'tags: [image-feature-extraction, self-supervised, ssl_jax]',
        '---',
        '',
        f'# {config.name or "ssl_jax"}, step {run.step}',
        '',
        f'Weights of a Vision Transformer in the layout `{weights.layout}`, written by ssl_jax '
        f'{version.__version__} in {provenance["dtype"]}.',
        '',
        *(f'- {line}' for line in describe.text(weights, params, provenance['tensors'])),
        '',
        '## Training',
        '',
    ]
    if imported:
        lines += [
            f'Imported from `{imported["source"]}` (sha256 `{imported["sha256"]}`); how these '
            f'weights were trained is told there.',
        ]
    else:
        batch = config.batch_size
        lines += [
            f'- Method: {config.method.name}, {run.step} steps of {batch} images '
            f'({run.step * batch:,} images seen), seed {config.seed}.',
            f'- Data: `{_source(config.data.train)}`.',
            f'- Every setting: `{PROVENANCE}`, field `config`.',
        ]
    crop = 'the whole image is squeezed to that'
    if transform['crop'] is not None:
        short = round(transform['size'] / transform['crop'])
        crop = f'the centre of images whose short side is {short} px'
    lines += [
        '',
        '## Images',
        '',
        f'{transform["size"]} px ({crop}, {transform["interpolation"]}), values in [0, 1] minus '
        f'mean {transform["mean"]}, over std {transform["std"]}.',
        '',
        '## Evaluation',
        '',
        *_evaluation(workdir, run.step),
        '',
        '## Use in PyTorch',
        '',
        '```python',
        *_usage(weights),
        '```',
    ]
    if words := _words(run):
        lines += ['', words]
    if extra:
        lines += [
            '',
            f'`{files.EXTRA}` holds what this layout has no place for ({", ".join(extra)}); '
            f'only `ssl_jax import` reads it.',
        ]
    lines += [
        '',
        '## Licence',
        '',
        'No licence is claimed here: state yours, and mind those of the training data'
        + (' and of the imported weights.' if imported else '.'),
    ]
    return '\n'.join(lines) + '\n'


def _words(run):
    """A sentence on the visual words of the training, which no layout has a place for."""
    tokenizer = getattr(run.method, 'tokenizer', None)
    if tokenizer is None:
        return ''
    return (
        f'The {tokenizer.vocab:,} visual words that were predicted in training ({tokenizer.kind}) '
        f'are not part of this export: their codebook is in the checkpoint.'
    )


def _source(source):
    return json.dumps(source.to_dict(), default=str) if hasattr(source, 'to_dict') else source


def _evaluation(workdir, step):
    """The rows of eval_<step>.json, as the table that `ssl_jax eval` printed."""
    path = epath.Path(workdir) / f'eval_{step}.json'
    if not path.exists():
        return [f'None was found beside this checkpoint (`ssl_jax eval` writes eval_{step}.json).']
    from ssl_jax.evals import report as evals_run

    return ['```', evals_run.table(json.loads(path.read_text())), '```']


def _usage(weights):
    """Lines of Python that load the folder."""
    if weights.layout == 'hf':
        name = 'AutoModelForPreTraining' if weights.what == 'full' else 'AutoModel'
        options, kind = '', layouts.hf_class(weights.family, weights.vit, weights.what)
        if kind == 'BeitForMaskedImageModeling':
            name = kind  # which no Auto class knows
        if kind == 'ViTModel':
            name, options = 'ViTModel', ', add_pooling_layer=False'  # else it makes a random pooler
        return [
            f'from transformers import AutoImageProcessor, {name}',
            "processor = AutoImageProcessor.from_pretrained('DIR')",
            f"model = {name}.from_pretrained('DIR'{options})",
        ]
    if weights.layout == 'timm':
        return [
            'import timm',
            "model = timm.create_model('local-dir:DIR', pretrained=True)",
        ]
    if weights.dino_head is not None:
        return [
            '# teacher_checkpoint.pth of DINOv2, for configs with student.block_chunks: 0',
            'import torch',
            'from safetensors.torch import load_file',
            "torch.save({'teacher': load_file('DIR/model.safetensors')}, 'teacher_checkpoint.pth')",
        ]
    return [
        'from safetensors.torch import load_file',
        '# model: the class of the official repository, with the sizes above',
        "model.load_state_dict(load_file('DIR/model.safetensors'), strict=True)",
    ]
