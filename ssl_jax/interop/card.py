# SPDX-License-Identifier: Apache-2.0
"""Descriptions of weights: the lines that an import prints, and the model card of an export."""

import json
import math

import jax
import ml_collections

from ssl_jax.data import transform as transform_lib
from ssl_jax.interop import files, layouts, processors
from ssl_jax.models import vit as vit_lib

LIBRARIES = {'official': 'pytorch', 'hf': 'transformers', 'timm': 'timm'}
PROGRAMS = {'onnx': 'ONNX Runtime', 'jax': 'JAX'}  # the network goes with the weights
PROVENANCE = 'provenance.json'
ORIGIN = 'imported.origin.config'


def describe(w: layouts.Weights, params, num_tensors: int) -> list[str]:
    """Lines on family, sizes and number of the weights."""
    v = w.vit
    widths = (v.embed_dim, v.depth, v.num_heads)
    size = next((name for name, x in vit_lib.SIZES.items() if x == widths), '')
    heads = {k: getattr(w, k) for k in ('dino_head', 'ibot_head')}
    beside = ' and decoder' if w.decoder is not None else ''
    beside = ' and predictor' if w.predictor is not None else beside
    beside = ' and projection heads' if w.dino_head is not None else beside
    beside = ' and layer to visual words' if w.vocab else beside
    beside = ' and classifier' if w.num_classes else beside
    positions = {'sincos': 'sin-cos, fixed', 'rope': 'rotary'}.get(v.pos_embed, v.pos_embed)
    if v.rel_pos:
        where = {'shared': 'for all blocks', 'layer': 'in each block'}[v.rel_pos]
        positions = '' if v.pos_embed == 'none' else f'{positions}, and '
        positions += f'relative, a table of biases {where}'
    names = '' if w.layout in PROGRAMS else f', {w.layout} names'
    rules = [v.pos_resize] * v.has_table + [v.rel_resize] * bool(v.rel_pos)
    if rules:
        positions += f'; other sizes: {" and ".join(layouts.RULES[rule] for rule in rules)}'
    parts = {
        'family': f'{w.family}{names}, encoder{beside}',
        'encoder': f'{f"ViT-{size}, " if size else ""}{v.depth} blocks of {v.embed_dim} channels, '
        f'{v.num_heads} heads',
        'input': f'{v.img_size} px, patches of {v.patch_size} px',
        'tokens': f'{v.num_cls_tokens} class, {v.num_register_tokens} register, '
        f'{"a" if v.mask_token else "no"} mask token',
        'positions': positions,
        'FFN': f'{v.ffn}, ratio {v.mlp_ratio:g}'
        + (', layer scale' if v.layer_scale is not None else ''),
    }
    if w.decoder is not None:
        d = w.decoder
        parts['decoder'] = f'{d.depth} blocks of {d.embed_dim} channels, {d.num_heads} heads'
    if w.predictor is not None:
        p = w.predictor
        parts['predictor'] = f'{p.depth} blocks of {p.embed_dim} channels, {p.num_heads} heads'
    for name, head in heads.items():
        if head is not None:
            parts[name] = f'{head.out_dim:,} prototypes of {head.bottleneck_dim} channels, '
            parts[name] += f'{head.num_layers} layers'
            parts[name] += f' of {head.hidden_dim}' if head.num_layers > 1 else ''
    if w.vocab:
        parts['words'] = f'{w.vocab:,}, which need the tokenizer of their training'
    if w.num_classes:
        of = 'the mean of patches' if w.pool == 'patch' else 'the class token'
        parts['classes'] = f'{w.num_classes:,}, of {of}'
    parts['tensors'] = f'{num_tensors}, {num_parameters(params):,} parameters'
    return [f'{name + ":":11}{value}' for name, value in parts.items()]


def num_parameters(params) -> int:
    """Numbers in a tree of arrays."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


def model_card(
    opened, w: layouts.Weights, params, provenance, extra, evaluation, left=(), use=()
) -> str:
    """The model card, in Markdown.

    Args:
      opened: `run.weights.Opened`, where the weights come from.
      w, params: what is exported.
      provenance: the content of PROVENANCE.
      extra: names of the tensors in the sidecar.
      evaluation: lines of a table, [] if there is none.
      left: names of networks that no layout has a place for.
      use: lines on the use of one of PROGRAMS.
    """
    imported, config, transform = opened.meta.get('imported'), opened.config, opened.transform
    origin = (imported or {}).get('origin') or {}
    name, step = (config.name or 'ssl_jax'), opened.step
    if 'config' in origin:
        name, step = origin['config'].get('name') or 'ssl_jax', origin['step']
    what = f'Weights of a Vision Transformer in the layout `{w.layout}`'
    if w.layout in PROGRAMS:
        what = f'A Vision Transformer for {PROGRAMS[w.layout]}, the network with its weights'
    lines = [
        '---',
        f'library_name: {LIBRARIES.get(w.layout, w.layout)}',
        'tags: [image-feature-extraction, self-supervised, ssl_jax]',
        '---',
        '',
        f'# {name}, step {step}',
        '',
        f'{what}, written by ssl_jax {provenance["versions"]["ssl_jax"]} in {provenance["dtype"]}.',
        '',
        *(f'- {line}' for line in describe(w, params, provenance['tensors'])),
        '',
        '## Training',
        '',
    ]
    if not imported:
        lines += _training(config, step, 'config')
    elif 'config' in origin:
        lines += _training(ml_collections.ConfigDict(origin['config']), step, ORIGIN)
        lines += ['', f'Exported by ssl_jax and imported again from `{imported["source"]}`.']
    else:
        first = origin.get('imported', imported)
        lines += [
            f'Imported from `{first["source"]}` (sha256 `{first["sha256"]}`); how these weights '
            f'were trained is told there.'
        ]
        if first is not imported:
            lines += ['', f'Exported by ssl_jax and imported again from `{imported["source"]}`.']
    table = ['```', *evaluation, '```']
    none = f'None was found beside this checkpoint (`ssl_jax eval` writes eval_{opened.step}.json).'
    lines += [
        '',
        '## Images',
        '',
        f'{transform_lib.describe(transform)} ({transform["interpolation"]}), values in [0, 1] '
        f'minus mean {list(transform["mean"])}, over std {list(transform["std"])}.',
        '',
        *(f'- {line}' for line in processors.differences(transform, w.layout)),
        *(['', line] if (line := layouts.other_sizes(w)) else []),
        '',
        '## Evaluation',
        '',
        *(table if evaluation else [none]),
        '',
        *(use or ['## Use in PyTorch', '', '```python', *_usage(w), '```']),
    ]
    if opened.method is not None and (line := opened.method.left_behind()):
        lines += ['', line]
    if left:
        lines += [
            '',
            f'Only in the checkpoint, as no layout has a place for it: {", ".join(left)}.',
        ]
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
        *_licence(opened, w, imported and 'config' not in origin),
    ]
    return '\n'.join(lines) + '\n'


def _licence(opened, w, imported):
    """Lines on the licence of published weights of the family, where these were made from others.

    Args:
      imported: whether they are an import of weights that no run of ssl_jax trained.
    """
    text = getattr(layouts.family(w), 'LICENCE', None)
    start = None if opened.config is None else opened.config.init_from
    if text is None or not (imported or start):
        return []
    return ['', text if imported else f'This run began from `{start}`. {text}']


def _training(config, step, field):
    """Lines on a run; `field` of PROVENANCE has its settings."""
    batch = config.batch_size
    return [
        f'- Method: {config.method.name}, {step} steps of {batch} images '
        f'({step * batch:,} images seen), seed {config.seed}.',
        f'- Data: `{_source(config.data.train)}`.',
        f'- Every setting: `{PROVENANCE}`, field `{field}`.',
    ]


def _source(source):
    source = source.to_dict() if hasattr(source, 'to_dict') else source
    return source if isinstance(source, str) else json.dumps(source, default=str)


def _usage(w):
    """Lines of Python that load the folder."""
    family = layouts.family(w)
    if w.layout == 'hf':
        name = 'AutoModelForPreTraining' if w.what == 'full' else 'AutoModel'
        options, kind = '', family.hf_class(w)
        if kind == 'BeitForMaskedImageModeling':
            name = kind  # which no Auto class knows
        if kind == 'ViTModel':
            name, options = 'ViTModel', ', add_pooling_layer=False'  # else it makes a random pooler
        return [
            f'from transformers import AutoImageProcessor, {name}',
            "processor = AutoImageProcessor.from_pretrained('DIR')",
            f"model = {name}.from_pretrained('DIR'{options})",
        ]
    if w.layout == 'timm':
        return ['import timm', "model = timm.create_model('local-dir:DIR', pretrained=True)"]
    if hasattr(family, 'usage') and (lines := family.usage(w)):
        return lines
    return [
        'from safetensors.torch import load_file',
        '# model: the class of the official repository, with the sizes above',
        "model.load_state_dict(load_file('DIR/model.safetensors'), strict=True)",
    ]
