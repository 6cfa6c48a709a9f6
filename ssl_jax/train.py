# SPDX-License-Identifier: Apache-2.0
"""The one training loop: `train(config, workdir)`.

    python -m ssl_jax.train --config=configs/mae_vitb16.py --workdir=gs://bucket/run \\
        --config.batch_size=4096

It knows no method by name.  What it promises: the same config gives the same bits, also after any
interruption; batches, keys and learning rate are functions of the step; SIGTERM saves and exits 0.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import os
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from ssl_jax import config as config_lib
from ssl_jax import methods, optim, sharding, version
from ssl_jax import step as step_lib
from ssl_jax.data import host, sources
from ssl_jax.data import stream as stream_lib
from ssl_jax.evals import features, online
from ssl_jax.run import checkpoint, hugepages, init_from, launch, metrics, preempt
from ssl_jax.run import workdir as workdir_lib


def log(*lines):
    """Prints on process 0."""
    if jax.process_index() == 0:
        for line in lines:
            print(line, flush=True)


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled-to-be program of a run: one function makes it for training, tests and plans."""

    mesh: jax.sharding.Mesh
    abstract: step_lib.TrainState  # with shardings
    batch: dict  # abstract batch, with shardings
    init: object  # () -> TrainState, jitted
    step: object  # (state, batch) -> (state, metrics), jitted, state donated
    groups: str  # table of the optimizer's parameter groups


def make_program(config, method, clock, mesh=None):
    """Builds mesh, shardings, and the jitted init and step of `config`."""
    mesh = sharding.make_mesh(**config.mesh) if mesh is None else mesh
    sharding.check_batch(config.batch_size, config.accum_steps, mesh)
    params, _ = jax.eval_shape(method.init, jax.random.key(0))
    tx, groups = optim.make(config.optim, params)
    schedule = optim.schedule(config, clock)
    init = step_lib.init(method, tx, config.seed)
    abstract = jax.eval_shape(init)
    shardings = sharding.infer(abstract, mesh)
    sharding.check_replication(abstract, shardings, mesh)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )
    rows = sharding.batch_sharding(mesh)
    batch = {'label': jax.ShapeDtypeStruct((config.batch_size,), jnp.int32, sharding=rows)}
    batch = batch if wants_labels(method) else {}
    batch |= {
        v.name: jax.ShapeDtypeStruct(
            (config.batch_size, v.count, v.size, v.size, 3), jnp.uint8, sharding=rows
        )
        for v in method.views()
    }
    step = step_lib.make_step(
        method, tx, schedule, seed=config.seed, accum_steps=config.accum_steps
    )
    return Program(
        mesh=mesh,
        abstract=abstract,
        batch=batch,
        init=jax.jit(init, out_shardings=shardings),
        step=jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(shardings, rows),
            out_shardings=(shardings, sharding.replicated(mesh)),
            compiler_options=sharding.compiler_options(mesh),
        ),
        groups=groups,
    )


def wants_labels(method):
    """Whether the batches of a method carry labels."""
    return getattr(method, 'labels', False)


def restore(config, method, program, saved, source):
    """The state to start from: (state, sentence).

    In order of precedence: 1 the workdir's own checkpoint, 2 the full state of `resume_from`,
    3 the weights of `init_from`, 4 fresh weights.  Setting both 2 and 3 is an error of the config.
    In the last two cases a method may look at images of `source` first.
    """
    if saved.latest() is not None:
        state, _ = saved.restore(program.abstract)
        return state, f'continuing this run at step {int(state.step)}'
    if config.resume_from:
        other = checkpoint.Checkpointer(_checkpoint_dir(config.resume_from))
        if other.latest() is None:
            raise ValueError(
                f'resume_from={config.resume_from} holds no checkpoint; give the workdir of a run '
                f'that has saved one.'
            )
        state, _ = other.restore(program.abstract)
        other.close()
        return state, f'continuing {config.resume_from} at step {int(state.step)}'
    state = program.init()
    if config.init_from:
        params, extra, lines = init_from.load_into(
            config.init_from, method, state, program.abstract
        )
        log(f'weights of {config.init_from}:', *lines)
        state = dataclasses.replace(state, params=params, extra=extra)
    if getattr(method, 'teacher', None):
        state = dataclasses.replace(state, extra=method.load_teacher(state.extra))
        log(f'teacher: {method.teacher}')
    if hasattr(method, 'prepare'):
        state = dataclasses.replace(state, extra=_prepare(config, method, program, state, source))
    return state, 'these weights at step 0' if config.init_from else 'fresh weights'


def _prepare(config, method, program, state, source):
    """`state.extra` as `method.prepare` makes it; all processes see the same whole batches."""
    whole = jax.jit(lambda x: x, out_shardings=sharding.replicated(program.mesh))
    with stream_lib.train_stream(
        source,
        method.views(),
        batch_size=config.batch_size,
        seed=config.seed,
        num_threads=config.data.num_threads,
    ) as batches:
        extra, lines = method.prepare(jax.device_get(whole(state.extra)), batches, config.seed)
    log(*lines)
    return init_from.placed('method.prepare', extra, state.extra)


def _checkpoint_dir(path):
    path = epath.Path(path)
    return path / 'checkpoints' if (path / 'checkpoints').exists() else path


def first_process_says(flag):
    """The answer of process 0, so that all processes do the same."""
    if jax.process_count() == 1:
        return bool(flag)
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(bool(flag))))


class Clock:
    """Whether a save is due, agreed by all processes."""

    def __init__(self, every_steps, every_minutes):
        self.every_steps = every_steps
        self.seconds = every_minutes * 60 if every_minutes else None
        self.last = time.monotonic()

    def due(self, step, at_log):
        """By steps at any step; by minutes at logged steps, where hosts can agree cheaply."""
        if self.every_steps and step % self.every_steps == 0:
            return True
        if not self.seconds or not at_log:
            return False
        return first_process_says(time.monotonic() - self.last > self.seconds)

    def reset(self):
        self.last = time.monotonic()


def train(config, workdir):
    """Trains `config` in `workdir`, from where an earlier call left off.

    Args:
      config: see `ssl_jax.config.default`.
      workdir: local folder or gs:// path; checkpoints/, metrics.jsonl, pictures/, config.json.

    Returns:
      A dict of the last metrics and evaluations (floats), with 'step'; 'preempted' is True where
      SIGTERM ended the run early (everything is saved then).
    """
    workdir = epath.Path(workdir)
    started = time.monotonic()
    if config.compile_cache:
        launch.enable_compile_cache()
    with workdir_lib.lock(workdir), preempt.Preemption() as stop:
        source = sources.open_source(config.data.train)
        if config.infer:
            config, decisions = _infer(config, source)
            log(*decisions)
        config, decisions = methods.complete(config, source)
        log(*decisions)
        config_lib.validate(config)
        clock = config_lib.clock(config, len(source))
        method = methods.from_config(config, clock)
        total, eval_every = clock('total'), clock('every', config.eval, default=0)
        program = make_program(config, method, clock)
        _banner(config, source, method, program, clock, workdir)
        if jax.process_index() == 0:
            for field, (old, new) in workdir_lib.save_config(workdir, config).items():
                log(f'config changed since this run began: {field} was {old}, is {new}')

        with jax.set_mesh(program.mesh):
            saved = checkpoint.Checkpointer(
                workdir / 'checkpoints',
                keep=config.checkpoint.keep,
                keep_every=config.checkpoint.keep_every,
            )
            try:
                steps = (total, eval_every)
                return _run(config, workdir, method, source, program, saved, stop, steps, started)
            finally:
                saved.close()


def _run(config, workdir, method, source, program, saved, stop, steps, started):
    """The loop proper, with the mesh set and the checkpointer open."""
    total, eval_every = steps
    mesh, batch_size = program.mesh, config.batch_size
    meta = {'config': config.to_dict(), 'data': source.fingerprint}
    state, how = restore(config, method, program, saved, source)
    first = int(state.step)
    log(f'start: {how}, {total} steps in all')
    if first >= total:
        log(f'this run is finished: step {first} of {total}; raise total_steps to go on.')

    def save(state):
        with timers('save'):
            writer.flush()  # a kill right after the save must not lose the rows before it
            if saved.save(int(state.step), state, meta):
                clock.reset()

    def look(state, step):
        """Evaluates where it is due; a stop in between leaves no row, the restart repeats it."""
        if step == total or (eval_every and step % eval_every == 0):
            with timers('eval'), contextlib.suppress(features.Stopped):
                writer.eval(step, evaluate(state, step))
                evaluate.curves()

    rows = sharding.process_rows(mesh, batch_size)
    names = [v.name for v in method.views()] + ['label'] * wants_labels(method)
    evaluate = online.Evaluator(
        config, method, mesh, workdir, source, should_stop=lambda: stop.requested
    )
    writer = metrics.Writer(
        workdir,
        total_steps=total,
        batch_size=batch_size,
        flops_per_step=method.flops(batch_size),
        tensorboard=config.log.tensorboard,
        wandb=config.log.wandb,
        start_step=first,
        is_main=jax.process_index() == 0,
    )
    timers = writer.timers
    clock = Clock(config.checkpoint.every_steps, config.checkpoint.every_minutes)
    # Each process meets its own bad images and lists them in a file of its own.
    suffix = f'.{jax.process_index()}' if jax.process_index() else ''
    bad = stream_lib.BadImages(
        source, workdir / f'bad_images{suffix}.jsonl', config.data.bad_budget
    )
    budget = metrics.NonFinite(config.nonfinite.in_a_row, config.nonfinite.total)
    pending = collections.deque()  # counters of the last two steps, read when surely ready
    stream = stream_lib.train_stream(
        source,
        method.views(),
        batch_size=batch_size,
        seed=config.seed,
        start_step=first,
        rows=rows,
        repeats=getattr(method, 'repeats', 1),
        num_threads=config.data.num_threads,
        num_workers=config.data.num_workers,
    )
    result, named = {'step': first, 'preempted': False}, None
    try:
        if first < total:
            with timers('compile'):
                lowered = program.step.lower(program.abstract, program.batch)
                step_fn = preempt.run_interruptible(lowered.compile, stop)
            log(f'compiled; first step {time.monotonic() - started:.0f} s after the start')
        if first_process_says(first and not metrics.has_evaluation(workdir, first)):
            look(state, first)
        for step in range(first, total):
            if stop.agreed(step):
                raise preempt.Stopped
            with timers('data'):
                batch = next(stream)
            bad.update(batch)
            inputs = {name: batch[name] for name in names}
            inputs = sharding.to_global(inputs, mesh, rows, batch_size)
            state, step_metrics = step_fn(state, inputs)
            saved.check()

            pending.append((step_metrics['skipped_in_a_row'], step_metrics['skipped_total']))
            if len(pending) > 2:
                budget.update(*map(int, pending.popleft()))
            done = step + 1
            at_log = done % config.log.every_steps == 0 or done == total
            if at_log:
                writer.log(done, step_metrics)
                named = name_collapse(method, writer.last, done, named)
            # Before the save of the same step, or a kill in between would lose the row.
            look(state, done)
            if clock.due(done, at_log) and done < total:
                save(state)
        while pending:
            budget.update(*map(int, pending.popleft()))
        save(state)
    except preempt.Stopped:
        if int(state.step) > first:  # else there is nothing that is not saved or made from the seed
            save(state)
            saved.wait()
        result['preempted'] = True
        log(f'stopped on request at step {int(state.step)}; the same command continues from there.')
    except metrics.NonFiniteError:
        save(state)  # nothing non-finite is in it
        raise
    except stream_lib.TooManyBadImages:
        if jax.process_count() == 1:  # elsewhere the other processes do not know
            save(state)
        raise
    finally:
        stream.close()
        result.update(writer.close())
    result['step'] = int(state.step)
    saved.wait()
    if not result['preempted']:
        _farewell(workdir, result, bad, config.eval.pictures)
    return result


def name_collapse(method, values, step, named):
    """Prints what the method suspects of its last numbers, once until it is well again."""
    sentence = method.suspect(values, step) if hasattr(method, 'suspect') else None
    if sentence and not named:
        log(f'step {step:,}: {sentence}')
    return sentence


def _infer(config, source):
    """Fills what the config leaves open from the images and the devices."""
    sides = []
    for i in range(min(len(source), 64)):
        try:
            sides.append(host.decode(source[i]['image']).shape[:2])
        except (host.DecodeError, OSError):  # the stream will count and list it
            continue
    if not sides:
        raise ValueError(
            f'none of the first {min(len(source), 64)} images can be decoded, '
            f'{source.describe(0)} for one; is --data a folder of images?'
        )
    typical = sorted(sides, key=min)[len(sides) // 2]
    device = jax.devices()[0]
    return config_lib.infer(config, len(source), typical, device.platform, jax.device_count())


def _banner(config, source, method, program, clock, workdir):
    """What runs, on what, with which learning rate."""
    count = sum(x.size for x in jax.tree.leaves(program.abstract.params))
    device = jax.devices()[0]
    where = {k: v for k, v in program.mesh.shape.items() if v > 1} or 'one device'
    per_epoch = len(source) / config.batch_size
    total, warmup = clock('total'), clock('warmup', default=0)
    log(
        f'{config.name or config.method.name}: '
        f'ssl_jax {version.__version__}, jax {jax.__version__}',
        f'devices   {jax.device_count()} x {device.device_kind}, mesh {where}, '
        f'process {jax.process_index() + 1} of {jax.process_count()}',
        f'data      {len(source):,} images, {source.fingerprint}',
        f'model     {count / 1e6:.1f} M parameters, {config.dtype}, remat {config.remat}',
        f'schedule  {total:,} steps of {config.batch_size} ({total / per_epoch:.1f} epochs), '
        f'warm-up {warmup:,}; {optim.scaled_lr(config.optim, config.batch_size)[1]}',
        program.groups,
        f'workdir   {workdir}',
    )
    slow = sharding.uneven_groups(method, config.batch_size // config.accum_steps, program.mesh)
    if slow:
        log(slow)


def _farewell(workdir, result, bad, pictures):
    shown = {k: v for k, v in result.items() if k not in ('step', 'preempted')}
    log(f'done: step {result["step"]:,}')
    log(*(f'  {k:<28} {v:.4g}' for k, v in sorted(shown.items()) if isinstance(v, float)))
    if bad.count:
        log(f'  {bad.count} images could not be decoded, see {workdir}/bad_images.jsonl')
    if pictures:
        log(f'pictures and curves: {workdir / "pictures"}')


def main(argv=None):
    """Flags: --config=FILE[:arg], --workdir=DIR, --config.FIELD=VALUE."""
    if argv is None:
        hugepages.restart()
    parser = argparse.ArgumentParser(prog='ssl_jax.train', description=main.__doc__)
    parser.add_argument('--config', required=True, help='recipe: path.py, path.py:arg or its name')
    parser.add_argument('--workdir', required=True, help='local folder or gs:// path')
    args, rest = parser.parse_known_args(argv)
    overrides = [flag.removeprefix('--config.') for flag in rest if flag.startswith('--config.')]
    unknown = [flag for flag in rest if not flag.startswith('--config.')]
    if unknown:
        parser.error(f'unknown flag {unknown[0]}; fields are set as --config.batch_size=256.')
    launch.initialize_distributed()
    run(functools.partial(config_lib.load, args.config, overrides), args.workdir)


def run(make_config, workdir):
    """Trains as a command does: errors of the user in one sentence, exit code 0 after SIGTERM."""
    try:
        result = train(make_config(), workdir)
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get('SSL_JAX_TRACEBACK'):
            raise
        print(f'ssl_jax: {error}', file=sys.stderr, flush=True)
        sys.exit(1)
    if result['preempted']:
        preempt.exit_now(0)


if __name__ == '__main__':
    main()
