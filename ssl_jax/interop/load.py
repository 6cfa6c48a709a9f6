# SPDX-License-Identifier: Apache-2.0
"""Weights of other programs made ours: as a checkpoint that opens like a run, or as arrays."""

import dataclasses
import json
import os
from typing import Any

import numpy as np
from etils import epath

from ssl_jax import config as config_lib
from ssl_jax import config_dinov2
from ssl_jax.interop import beit, describe, files, layouts
from ssl_jax.models.vit import ViT
from ssl_jax.run import checkpoint, runs, step_dirs
from ssl_jax.run import workdir as workdir_lib

# The key in a safetensors header under which `export` says what it wrote.
METADATA = 'ssl_jax'
HINTS = ('num_heads', 'decoder_num_heads', 'img_size', 'patch_size')


@dataclasses.dataclass(frozen=True)
class Loaded:
    """An encoder, ready to be applied.

    Attributes:
      vit: `models.vit.ViT`.
      params: its parameters, float32 numpy arrays.
      transform: dict(size, crop, mean, std, interpolation), see `describe`.
      source: the path that was given.
      weights: `layouts.Weights`, None for a run of ours.
      decoder: (`models.decoder.Decoder`, its parameters) of a MAE or Pixio, else None.
    """

    vit: ViT
    params: Any
    transform: dict
    source: str
    weights: layouts.Weights | None = None
    decoder: tuple | None = None


@dataclasses.dataclass(frozen=True)
class _State:
    """The train state of imported weights: nothing has been trained."""

    params: Any
    extra: Any
    opt_state: Any
    step: Any
    skipped: Any


def load_backbone(path, **hints):
    """Loads an encoder from wherever weights are.

    Args:
      path: the workdir of a run, a checkpoint folder, an export, an HF or timm folder, or a file,
        see `torch_io.read`.
      hints: see HINTS, where the tensors leave them open.

    Returns:
      Loaded.

    Raises:
      ValueError: one sentence; nothing is loaded in part.
    """
    if is_checkpoint(path):
        run = runs.open_run(path)
        vit, params = run.backbone()
        module = getattr(run.method, 'decoder', None)
        decoder = None if module is None else (module, run.params['decoder'])
        return Loaded(vit, params, run.transform, str(path), run.weights, decoder)
    file, weights, params = _read(path, hints)
    transform = _transform(file, weights)
    decoder = None if weights.decoder is None else (weights.decoder, params['decoder'])
    return Loaded(weights.vit, params['encoder'], transform, str(path), weights, decoder)


def import_weights(path, workdir, *, log=print, **hints):
    """Writes weights of another program as a checkpoint of step 0.

    With the decoder of a MAE or Pixio, or the projection heads of DINOv2 (DINO, iBOT), it holds
    the whole method, else the encoder (and BEiT's layer to words) alone.  Heads belong to a teacher
    checkpoint: student and teacher both become it.  Centres are not read; the method of the import
    centres by Sinkhorn-Knopp, which needs none.
    `runs.open_run`, `ssl_jax eval`, `ssl_jax export` and `config.init_from` take it.

    Args:
      path, hints: see `load_backbone`.
      workdir: a new one, local or gs://.
      log: called with each line on what was found; None for silence.

    Returns:
      `layouts.Weights`.

    Raises:
      ValueError: one sentence; then nothing was written.
    """
    target = epath.Path(workdir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        found = 'a run' if is_checkpoint(workdir) or (target / 'config.json').exists() else 'files'
        raise ValueError(f'{workdir} holds {found} already; give a new --workdir.')
    if is_checkpoint(path):
        raise ValueError(
            f'{path} is a run of ssl_jax already; use it as it is, as --workdir or init_from.'
        )
    file, weights, params = _read(path, hints)
    config = _config(weights, file)
    imported = dict(
        weights=describe.to_dict(weights),
        transform=_transform(file, weights),
        source=file.source,
        part=file.taken,
        sha256=file.sha256,
    )
    meta = {'config': json.loads(config_lib.to_json(config)), 'imported': imported}
    zero = np.zeros((), np.int32)
    extra = {}
    if weights.dino_head is not None:
        params = {'backbone' if k == 'encoder' else k: tree for k, tree in params.items()}
        extra = {'teacher': params}
    state = _State(params, extra, {}, zero, np.zeros((2,), np.int32))
    if step_dirs.is_remote(workdir):
        _save(target, state, meta, config)
    else:
        with files.staged(workdir) as folder:
            _save(folder, state, meta, config)
    if log is not None:
        part = f', its part {file.taken!r}' if file.taken else ''
        log(f'read {file.source}{part}')
        for line in describe.text(weights, params, len(file.tensors)):
            log(line)
        for line in layouts.notes(weights, file.extra):
            log(line)
        log(f'written to {workdir}')
    return weights


def is_checkpoint(path):
    """Whether `path` is what `runs.open_run` reads: a workdir, its checkpoints, or one step."""
    path = epath.Path(path)
    if not path.is_dir():
        return False
    if (path / 'model').is_dir() or (path / 'checkpoints').is_dir():
        return True
    return bool(step_dirs.steps(path) or step_dirs.uncommitted(path))


def _read(path, hints):
    """(File, Weights, our parameters) of weights that are no run."""
    unknown = [k for k in hints if k not in HINTS]
    if unknown:
        raise ValueError(f'{unknown[0]} is no hint; use one of {", ".join(HINTS)}.')
    file = files.read(path)
    try:
        if METADATA in file.metadata and not hints:
            weights = describe.from_dict(json.loads(file.metadata[METADATA]))
        else:
            weights = layouts.recognise(file.tensors, {**file.hints, **hints})
        params = layouts.to_ours(weights, file.tensors, file.extra)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    return file, weights, params


def _transform(file, weights):
    """How images become input: what the folder says, else what the authors did."""
    scaling = {}
    if weights.family == 'beit' and METADATA not in file.metadata:
        scaling = dict(mean=beit.MEAN, std=beit.STD)
    return describe.transform_of(weights.vit.img_size, file.processor, file.hints, **scaling)


def _config(weights, file):
    """A config that says what the weights are; without `method` for an encoder alone, or for BEiT,
    whose method has a tokenizer that its weights do not name.
    """
    c = config_lib.default()
    c.name = f'imported {weights.family} ({os.path.basename(file.source)})'
    if weights.what == 'backbone' or weights.vocab:
        del c['method']
        return c
    vit = weights.vit
    names = ('embed_dim', 'depth', 'num_heads', 'patch_size', 'img_size', 'mlp_ratio')
    sizes = dict(size=None, **{name: getattr(vit, name) for name in names})
    if weights.dino_head is not None:
        c.method = _dinov2(weights)
        c.method.update(sizes)
        return c
    decoder = weights.decoder
    c.method.update(
        sizes,
        num_cls_tokens=vit.num_cls_tokens,
        pos_embed=vit.pos_embed,
        decoder_embed_dim=decoder.embed_dim,
        decoder_depth=decoder.depth,
        decoder_num_heads=decoder.num_heads,
    )
    # HF's config says what the decoder predicts; elsewhere it is as MAE was published.
    c.method.norm_pix_loss = bool(file.hints.get('norm_pix_loss', c.method.norm_pix_loss))
    if weights.family == 'pixio':
        grid = vit.img_size // vit.patch_size
        c.method.mask_grid = next(g for g in (4, 2, 1) if grid % g == 0)
        c.method.flip = 0.0
    return c


def _dinov2(weights):
    """`config.method` of weights with projection heads, but for the sizes."""
    vit, dino, ibot = weights.vit, weights.dino_head, weights.ibot_head
    m = config_dinov2.method()
    m.update(
        ffn=vit.ffn,
        layer_scale=vit.layer_scale,
        num_register_tokens=vit.num_register_tokens,
        pos_resize=vit.pos_resize,
        local_size=max(round(vit.img_size * 3 / 7 / vit.patch_size), 1) * vit.patch_size,
        separate_heads=ibot is not None,
        dino_out_dim=dino.out_dim,
        dino_bottleneck_dim=dino.bottleneck_dim,
        head_hidden_dim=dino.hidden_dim,
        head_num_layers=dino.num_layers,
        centering='sinkhorn_knopp',
    )
    if ibot is not None:
        m.update(ibot_out_dim=ibot.out_dim, ibot_bottleneck_dim=ibot.bottleneck_dim)
    return m


def _save(workdir, state, meta, config):
    saver = checkpoint.Checkpointer(epath.Path(workdir) / 'checkpoints')
    try:
        saver.save(0, state, meta)
    finally:
        saver.close()
    workdir_lib.save_config(workdir, config)
