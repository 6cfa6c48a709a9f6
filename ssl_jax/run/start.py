# SPDX-License-Identifier: Apache-2.0
"""Start of a run: config fields from weights, images and devices; banner; first state."""

import copy
import dataclasses
import importlib.metadata
import json
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from ssl_jax import config as config_lib
from ssl_jax import methods, optim, sharding
from ssl_jax import step as step_lib
from ssl_jax.data import fingerprint, order, sources
from ssl_jax.data import stream as stream_lib
from ssl_jax.interop import files
from ssl_jax.methods import base
from ssl_jax.run import checkpoint, errors, launch, peers, storage, weights
from ssl_jax.run.launch import log


def stored(workdir: epath.PathLike) -> ConfigDict | None:
    """The config of the newest checkpoint that a run has saved in `workdir`, None without one."""
    meta = checkpoint.newest_meta(epath.Path(workdir) / 'checkpoints')
    if meta is None or 'imported' in meta:
        return None
    return config_lib.from_dict(meta['config'])[0]


def continued(config: ConfigDict, workdir: epath.PathLike) -> ConfigDict:
    """The config of the run in `workdir` with the overrides of `config`; `config` of a new run.

    What was decided stays with the run, whatever devices, images and defaults it meets now. Fields
    of the recipe that differ are logged.

    Raises:
      UserError: the run is of another method.
    """
    old = stored(workdir)
    if old is None:
        return config
    if old.method.name != config.method.name:
        raise errors.UserError(
            f'{workdir} holds a run of method {old.method.name}, not {config.method.name}: give a '
            f'new --workdir.'
        )
    merged = config_lib.lay_over(old, config.overrides)
    with merged.unlocked():
        merged.infer = config.infer  # for fields that an override set to None
        merged.data.changed = config.data.changed  # for this start alone
    typed = tuple(o.partition('=')[0].removeprefix('config.') for o in merged.overrides)
    for key, (now, recipe) in config_lib.diff(merged, config).items():
        if recipe is not None and not key.startswith(('overrides', 'infer', 'name', *typed)):
            log(f'{key} = {now}, as this run began (recipe: {recipe}); {key}=... changes it')
    return config_lib.lock(merged)


def follow(config: ConfigDict) -> ConfigDict:
    """A copy with the sizes of the weights of `init_from`, if the method takes them over.

    Raises:
      UserError: an override contradicts the weights.
    """
    config = copy.deepcopy(config)
    if methods.make(config).follows and config.init_from:
        names = [o.partition('=')[0].strip().removeprefix('config.') for o in config.overrides]
        fixed = {name.removeprefix('method.') for name in names if name.startswith('method.')}
        opened = weights.header(config.init_from)
        with config.unlocked():
            config.method.update(methods.make(config).follow(opened, fixed))
    return config


def complete(config: ConfigDict, source: Any, is_new: bool = True) -> ConfigDict:
    """A valid copy with all fields set, in this order: `follow`, inferred fields, classes.

    Args:
      config: as loaded or `continued`.
      source: training images.
      is_new: whether the run begins; a continued one needs its `init_from` no more.
    """
    config = follow(config) if is_new else copy.deepcopy(config)
    if config.infer:
        device, hw = jax.devices()[0], sources.typical_size(source)
        config, decisions = config_lib.infer(
            config, order.epoch_size(source), hw, device.platform, jax.device_count()
        )
        log(*decisions)
    values, lines = methods.make(config).complete(source)
    log(*lines)
    with config.unlocked():
        config.method.update(values)
    config_lib.validate(config)
    return config


def compare(config: ConfigDict, source: Any, workdir: epath.Path, **more: str) -> None:
    """Checks that all processes run the same, before a collective waits for one that does not.

    Args:
      config: complete.
      source: training images.
      workdir: of the run.
      **more: other arguments that have to be equal.
    """
    versions = {name: importlib.metadata.version(name) for name in ('ssl_jax', 'jax')}
    flat = config_lib.flatten(config)
    flat.pop('overrides')  # the same values may be written in two ways
    images = fingerprint.content(source.fingerprint)  # copies on two hosts have other times
    peers.compare({**flat, 'workdir': str(workdir), 'images': images, **versions, **more})


def banner(config, source, method, program, workdir) -> None:
    """Logs versions, devices, data, model and schedule."""
    count = sum(x.size for x in jax.tree.leaves(program.abstract.params))
    device, mesh, clock = jax.devices()[0], program.mesh.shape, method.clock
    axes = {k: v for k, v in mesh.items() if v > 1} or 'one device'
    epochs = clock.total * config.batch_size / order.epoch_size(source)
    version = importlib.metadata.version('ssl_jax')
    log(
        f'{config.name or config.method.name}: ssl_jax {version}, jax {jax.__version__}',
        f'devices   {jax.device_count()} x {device.device_kind}, mesh {axes}, '
        f'process {jax.process_index() + 1} of {jax.process_count()}',
        *sources.lines(source),
        f'model     {count / 1e6:.1f} M parameters, {config.dtype}, remat {config.remat}',
        *(f'xla       {flag}={value}' for flag, value in config.xla.items()),
        f'schedule  {clock.total:,} steps of {config.batch_size} ({epochs:.1f} epochs), '
        f'warm-up {clock.warmup:,}; {optim.scaled_lr(config.optim, config.batch_size)[1]}',
        program.groups,
        f'workdir   {workdir}',
        *method.warnings(
            config.batch_size // config.accum_steps,
            mesh['data'] * mesh['fsdp'],
            config.accum_steps,
        ),
    )


def store_config(workdir: epath.Path, config: ConfigDict) -> None:
    """Writes ``config.json`` on process 0, and logs the differences from the one it replaces."""
    path = workdir / 'config.json'
    if launch.is_main() and path.exists():
        for line in _changes(path.read_text(), config):
            log(f'config changed since this run began: {line}')
    if launch.is_main():
        storage.atomic_write(path, config_lib.to_json(config))


def _changes(text, config):
    """Log lines on the differences from a stored config; none if it cannot be read."""
    try:
        old, lines = config_lib.from_dict(json.loads(text))
    except ValueError:  # not JSON, or of a newer version
        return []
    changed = config_lib.diff(old, config).items()
    return lines + [f'{k} was {x}, is {y}' for k, (x, y) in changed if k != 'overrides']


def first_state(
    config: ConfigDict,
    method: base.Method,
    program: step_lib.Program,
    saved: checkpoint.Checkpointer,
    source: Any,
) -> tuple[step_lib.TrainState, str]:
    """(state to start from, its origin for the log).

    In order of precedence: 1. the newest checkpoint of the workdir, 2. the full state of
    `resume_from`, 3. the weights of `init_from`, 4. fresh weights. `config.validate` refuses 2
    with 3. In cases 3 and 4 the method may first read images and files, see `Method.prepare`.
    """
    if saved.latest() is not None:
        state, meta = saved.restore(program.abstract)
        check_images(config, meta, source)
        return state, f'continuing this run at step {int(state.step)}'
    if config.resume_from:
        state = weights.resume(config.resume_from, program.abstract)
        return state, f'continuing {config.resume_from} at step {int(state.step)}'
    state, origin = program.init(), 'fresh weights'
    if config.init_from:
        params, extra, lines = weights.load_into(config.init_from, method, state, program.abstract)
        log(f'weights of {config.init_from}:', *lines)
        state = dataclasses.replace(state, params=params, extra=extra)
        origin = 'these weights at step 0'
    prepared, lines = method.prepare(state.extra, _inputs(config, method, program, source))
    log(*lines)
    teacher = config.method.get('teacher')
    origin_of = f'method.teacher={teacher}' if teacher else ''
    placed = {k: weights.place(k, x, state.extra[k], origin_of) for k, x in prepared.items()}
    return dataclasses.replace(state, extra={**state.extra, **placed}), origin


def check_images(config: ConfigDict, meta: dict, source: Any) -> None:
    """Compares the images with those of a checkpoint's meta.

    Raises:
      UserError: they differ, and `data.changed` is 'refuse'.
    """
    before, now = meta.get('data'), source.fingerprint
    if before == now or 'images' not in meta:  # of an earlier version
        return
    if fingerprint.content(before) == fingerprint.content(now):
        log('images    with other times of change; names, sizes and a sample are as before')
        return
    same = len(source) == meta['images']
    sentence = (
        f'the images are not those that this run has seen: there were {meta["images"]:,}, and '
        f'{source.describe(0)} ... are {len(source):,}'
        f'{" of other names, sizes or content, or with other scores" if same else ""}'
    )
    if config.data.changed == 'refuse':
        raise errors.UserError(
            f'{sentence}: give those, set data.changed=accept to go on with these, or give a new '
            f'--workdir.'
        )
    log(f'{sentence}; data.changed=accept')


def _inputs(config, method, program, source):
    """Inputs of `Method.prepare`; all processes see the same global batches."""
    replicate = jax.jit(lambda x: x, out_shardings=sharding.replicated(program.mesh))

    def batches():
        return stream_lib.train_stream(
            source,
            method.views(),
            batch_size=config.batch_size,
            seed=config.seed,
            num_threads=config.data.num_threads,
        )

    return base.Start(
        seed=config.seed,
        fetch=lambda tree: jax.device_get(replicate(tree)),
        batches=batches,
        open=weights.open_weights,
        tensors=lambda path: files.read(path).tensors,
        init_from=config.init_from,
    )
