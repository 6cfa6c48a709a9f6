# SPDX-License-Identifier: Apache-2.0
"""A folder of transformers as a graph for ONNX Runtime, compared with our networks as written."""

import contextlib
import logging
import warnings

import jax
import numpy as np

from ssl_jax.interop import files, layouts, program
from ssl_jax.objectives import masking
from ssl_jax.run import errors

GRAPH = 'model.onnx'
OPSET = 18
MODULES = ('torch', 'transformers', 'onnx', 'onnxscript', 'onnxruntime')
ONE_FILE = 3 << 29  # bytes of weights; more go to a second file, as a protobuf ends at 2 GB


def require() -> None:
    """Raises UserError if a package is missing."""
    for module in MODULES:
        errors.extra(module, 'onnx')


def write(folder, w, params, transform, method=None):
    """Replaces model.safetensors of an export to transformers by GRAPH.

    Args:
      folder: pathlib.Path with config.json and model.safetensors.
      w: `layouts.Weights`, layout 'hf'; 'full' is a MAE with its decoder.
      params: {network: its parameters}.
      transform: see `files`.
      method: of 'full', for the share of masked patches.

    Returns:
      (lines of a model card on its use, {'largest_difference': see `program.difference`}).

    Raises:
      UserError: ONNX Runtime gives other numbers than our networks.
    """
    torch, runtime = errors.extra('torch', 'onnx'), errors.extra('onnxruntime', 'onnx')
    full, size = w.what == 'full', w.vit.img_size
    patches = (size // w.vit.patch_size) ** 2
    inputs = {'pixel_values': (3, size, size), **({'noise': (patches,)} if full else {})}
    outputs = ['logits', 'mask'] if full else ['last_hidden_state']
    with _quiet():
        graph = torch.onnx.export(
            _module(torch, _load(folder, w), full),
            tuple(torch.rand(2, *shape) for shape in inputs.values()),
            input_names=list(inputs),
            output_names=outputs,
            dynamic_shapes=tuple({0: torch.export.Dim('batch')} for _ in inputs),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    large = (folder / files.WEIGHTS).stat().st_size > ONE_FILE
    graph.save(str(folder / GRAPH), external_data=large)
    del graph
    (folder / files.WEIGHTS).unlink()
    _forget_where(folder / GRAPH)

    session = runtime.InferenceSession(str(folder / GRAPH), providers=['CPUExecutionProvider'])
    rng, worst = np.random.default_rng(0), 0.0
    for n in program.BATCHES:
        images = rng.standard_normal((n, size, size, 3), np.float32)
        feed = {'pixel_values': np.ascontiguousarray(np.moveaxis(images, -1, 1))}
        if full:
            feed['noise'] = rng.random((n, patches), np.float32)
        with jax.default_matmul_precision('highest'):
            want = _ours(w, params, method, images, feed.get('noise'))
        for got, ours in zip(session.run(outputs, feed), want, strict=True):
            worst = max(worst, program.difference(got, ours, GRAPH))
    return _card(w, method, transform, inputs, worst), {'largest_difference': worst}


@contextlib.contextmanager
def _quiet():
    """Without what torch says of its own old functions and of torchvision, which is not needed."""
    logger = logging.getLogger('torch.onnx')
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logger.setLevel(level)


def _load(folder, w):
    """The model of transformers."""
    transformers = errors.extra('transformers', 'onnx')
    name = layouts.family(w).hf_class(w)
    # Their faster attention does not trace where logits have a bias (BEiT).
    options = {'attn_implementation': 'eager'}
    if name == 'ViTModel':
        options['add_pooling_layer'] = False
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        return getattr(transformers, name).from_pretrained(folder, **options).eval()
    finally:
        if shown:
            bars.enable_progress_bar()


def _module(torch, model, full):
    """A module of positional inputs and outputs, for the tracer."""

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, pixel_values):
            return self.model(pixel_values).last_hidden_state

    class Whole(Encoder):
        def forward(self, pixel_values, noise):
            out = self.model(pixel_values, noise=noise)
            return out.logits, out.mask

    return (Whole if full else Encoder)().eval()


def _forget_where(path):
    """Drops what the exporter notes of every node: stack traces, with paths of this machine."""
    onnx = errors.extra('onnx', 'onnx')
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    for part in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output):
        del part.metadata_props[:]
    path.write_bytes(model.SerializeToString(deterministic=True))


def _ours(w, params, method, images, noise):
    """What the graph should give."""
    vit = w.vit.clone(dtype=np.float32, remat='none')
    if w.what == 'backbone':
        out = jax.jit(vit.apply)({'params': params['encoder']}, images)
        return [np.concatenate([out[f'{k}_tokens'] for k in ('cls', 'reg', 'patch')], axis=1)]
    method = method.with_modules(encoder=vit, decoder=w.decoder.clone(dtype=np.float32))
    mask = masking.from_noise(noise, method.grid, method.mask_ratio)
    return [jax.jit(method.forward)(params, images, mask)['pred'], mask.mask]


def _card(w, method, transform, inputs, worst):
    """Lines of a model card."""
    onnx, runtime = errors.extra('onnx', 'onnx'), errors.extra('onnxruntime', 'onnx')
    v, size = w.vit, w.vit.img_size
    n, c, r = (size // v.patch_size) ** 2, v.num_cls_tokens, v.num_register_tokens
    feed = "{'pixel_values': pixels"
    lines = []
    if w.what == 'full':
        lines = [f'noise = np.random.rand(len(pixels), {n}).astype(np.float32)  # chooses patches']
        feed += ", 'noise': noise"
        run = ["logits, mask = session.run(['logits', 'mask'], {})"]
        about = [
            f'- Input `noise`: float32 (batch, {n}); of an image the '
            f'{int(n * (1 - method.mask_ratio))} patches with the smallest numbers are seen.',
            f'- Output `logits`: float32 (batch, {n}, {3 * v.patch_size**2}), the predicted pixels '
            f'of every patch, row by row; the values of a patch lie by row, column, channel'
            + (' and are normalised by its mean and std.' if method.norm_pix_loss else '.'),
            f'- Output `mask`: float32 (batch, {n}), 1 where a patch was hidden.',
        ]
    else:
        run = ["tokens, = session.run(['last_hidden_state'], {})"]
        parts = [f'{c} class', *([f'{r} register'] if r else []), f'{n} patch']
        run += [f'cls = tokens[:, :{c}].mean(axis=1)'] if c else []
        run += [f'patch = tokens[:, {c + r}:].mean(axis=1)']
        about = [
            f'- Output `last_hidden_state`: float32 (batch, {c + r + n}, {v.embed_dim}), after the '
            f'final norm: {", ".join(parts)} tokens, patches row by row.'
        ]
    run[0] = run[0].format(feed + '}')
    shape = ', '.join(map(str, inputs['pixel_values']))
    return [
        '## Use in ONNX Runtime',
        '',
        '```python',
        'import numpy as np, onnxruntime',
        f"session = onnxruntime.InferenceSession('DIR/{GRAPH}')",
        f'images = np.zeros((2, {size}, {size}, 3), np.uint8)  # yours, resized and cropped',
        f'mean, std = {list(transform["mean"])}, {list(transform["std"])}',
        'pixels = ((images / 255 - mean) / std).transpose(0, 3, 1, 2).astype(np.float32)',
        *lines,
        *run,
        '```',
        '',
        f'- Input `pixel_values`: float32 (batch, {shape}), RGB, normalised as above. The batch '
        f'may have any size, the sides are fixed: the native size of the encoder.',
        *about,
        f'- Opset {OPSET}, ONNX {onnx.__version__}. Compared as written with the encoder in JAX, '
        f'by ONNX Runtime {runtime.__version__} on batches of '
        f'{" and ".join(map(str, program.BATCHES))}: the largest difference was {worst:.2g} of the '
        f'largest value.',
        '- `config.json` and `preprocessor_config.json` are those of transformers.',
    ]
