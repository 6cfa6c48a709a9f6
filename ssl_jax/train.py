# SPDX-License-Identifier: Apache-2.0
"""The training loop: `train(config, workdir)`.

    python -m ssl_jax.train --config=configs/mae_vitb16.py --workdir=gs://bucket/run \\
        --config.batch_size=4096

It knows no method by name. The same config gives the same bits, also after a restart: batches, keys
and learning rate are functions of the step. SIGTERM saves and exits with code 0.
"""

import argparse
import contextlib
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from ssl_jax import config as config_lib
from ssl_jax import methods, report, sharding
from ssl_jax import step as step_lib
from ssl_jax.data import order, sources
from ssl_jax.data import stream as stream_lib
from ssl_jax.evals import base as evals
from ssl_jax.evals import features, pictures
from ssl_jax.kernels import forms, verdicts
from ssl_jax.run import (
    checkpoint,
    compiled,
    errors,
    launch,
    ledger,
    metrics,
    peers,
    preempt,
    profile,
    start,
    storage,
    uploads,
    watchdog,
)
from ssl_jax.run import clock as clock_lib
from ssl_jax.run import workdir as workdir_lib
from ssl_jax.run.launch import log


@dataclasses.dataclass(frozen=True)
class Run:
    """A run without its state."""

    config: Any
    workdir: epath.Path
    source: Any  # training images
    method: Any
    program: step_lib.Program
    held: Callable  # see `workdir.lock`
    saved: checkpoint.Checkpointer
    stop: preempt.Preemption
    tasks: dict  # evaluations, see `evals.base`
    look: evals.Look
    kept: compiled.Kept  # compiled programs
    timers: metrics.Timers = dataclasses.field(default_factory=metrics.Timers)  # of the loop
    writer: metrics.Writer | None = None


def train(config, workdir, programs=None, before: dict | None = None) -> dict:
    """Trains `config` in `workdir`, or continues the run there.

    Args:
      config: see `ssl_jax.config`.
      workdir: local folder or gs:// path; for checkpoints/, metrics.jsonl, report.html and more.
      programs: folder of compiled programs, see `run.compiled`; None keeps none.
      before: seconds that the start of this process took so far, by name.

    Returns:
      dict of the last metrics and evaluations, 'step', and 'preempted': whether a signal ended the
      run early (after saving).
    """
    workdir, starting = epath.Path(workdir), metrics.Timers()
    began = time.monotonic()
    storage.require_workdir(workdir)
    for name, seconds in (before or {}).items():
        starting.add(name, seconds)
        began -= seconds
    peers.at('starting')
    minutes = config.watchdog.dump_minutes, config.watchdog.exit_minutes
    limits = [60 * x if x else None for x in minutes]
    with contextlib.ExitStack() as stack:
        stack.enter_context(peers.announced())
        stack.enter_context(watchdog.watch(workdir, *limits))
        if config.compile_cache:
            launch.enable_compile_cache()
        held = stack.enter_context(workdir_lib.lock(workdir))
        stop = stack.enter_context(preempt.Preemption())
        is_new = start.stored(workdir) is None
        if config.infer or methods.make(config).follows:  # fields are left to decide
            config = start.continued(config, workdir)
        peers.at('listing images')
        with starting('listing'):
            source = sources.open_source(config.data.train)
        config = start.complete(config, source, is_new)
        with starting('comparing'):
            start.compare(config, source, workdir, compiled=str(programs))
        tasks = evals.load(config.eval.tasks)
        per_epoch = order.epoch_size(source)
        clock = clock_lib.Clock.of(config, per_epoch)
        method = methods.make(config, clock)
        kept = compiled.Kept.of(programs, config, step_lib.make_program(config, method), per_epoch)
        program = kept.start()
        start.banner(config, source, method, program, workdir)
        saved = checkpoint.Checkpointer(
            workdir / 'checkpoints',
            keep=config.checkpoint.keep,
            keep_every=config.checkpoint.keep_every,
        )
        with jax.set_mesh(program.mesh), contextlib.closing(saved), peers.announced():
            look = evals.Look.of(
                config, method, program.mesh, workdir, source, lambda: stop.requested
            )
            evals.check(tasks, look)
            peers.at('restoring')
            try:
                with starting('restoring'), stop.interrupts():
                    state, origin = start.first_state(config, method, program, saved, source)
                    # No earlier: a refused command changes nothing.
                    start.store_config(workdir, config)
                with starting('kernels'), stop.interrupts():
                    chosen = verdicts.for_run(
                        config.kernels,
                        program.step,
                        (program.abstract, program.batch),
                        workdir,
                        keep=config.compile_cache,
                    )
            except preempt.Stopped:
                log('stopped on request before the first step; nothing is lost.')
                return {'preempted': True, 'step': saved.latest() or 0}
            log(f'start: {origin}, {clock.total} steps in all')
            kept = kept.beside(kernels=forms.words(*chosen))
            run = Run(
                config, workdir, source, method, program, held, saved, stop, tasks, look, kept
            )
            with forms.using(*chosen):
                return loop(run, state, starting, began)


def loop(run: Run, state, starting: metrics.Timers, began: float) -> dict:
    """Step, log, save, evaluate, in this order, until the end of the run or a signal.

    A save before the evaluation, so that a failing evaluation costs no steps. After a kill between
    the two, the restart begins with the evaluation.

    Args:
      starting: what the start of this process took so far.
      began: when it began (`time.monotonic`).
    """
    config, method, mesh = run.config, run.method, run.program.mesh
    first, total, size = int(state.step), method.clock.total, config.batch_size
    eval_every = method.clock.steps('every', config.eval, default=0)
    if first >= total:
        log(f'this run is finished: step {first} of {total}; raise total_steps to go on.')
    planned = profile.parse(config.log.profile)
    trace = profile.Profile(run.workdir, planned, (first, total), run.timers)
    book = ledger.Ledger(run.workdir, run.timers, began, first)
    if book.sentence and first < total:
        log(book.sentence)
    writer = metrics.Writer(
        run.workdir,
        total_steps=total,
        batch_size=size,
        flops_per_step=method.flops(size),
        tensorboard=config.log.tensorboard,
        wandb=config.log.wandb,
        start_step=first,
        is_main=launch.is_main(),
        timers=run.timers,
        also=book.row,
    )
    run = dataclasses.replace(run, writer=writer)
    # Each process lists the bad images of its rows in its own file.
    suffix = f'.{jax.process_index()}' if jax.process_index() else ''
    bad = stream_lib.BadImages(
        run.source, run.workdir / f'bad_images{suffix}.jsonl', config.data.bad_budget
    )
    skipped = int(state.skipped[1])
    budget = metrics.NonFinite(config.nonfinite.in_a_row, config.nonfinite.total, skipped)
    if skipped:
        log(f'{skipped} updates were skipped as not finite before; the budget counts anew.')
    saves = checkpoint.Due(config.checkpoint.every_steps, config.checkpoint.every_minutes)
    rows = sharding.process_rows(mesh, size)
    stream = stream_lib.train_stream(
        run.source,
        method.views(),
        batch_size=size,
        seed=config.seed,
        start_step=first,
        rows=rows,
        repeats=method.repeats,
        num_threads=config.data.num_threads,
        num_workers=config.data.num_workers,
    )
    result, suspected, done = {'preempted': False}, None, first
    try:
        if first < total:
            book.write(first)
            peers.at('compiling')
            with run.timers('compile'):
                step_fn = run.kept.get(
                    'step', lambda lowered: preempt.run_interruptible(lowered.compile, run.stop)
                )
        due = first == total or (eval_every and first and first % eval_every == 0)
        with starting('other processes'):
            due = launch.main_says(due and not metrics.has_evaluation(run.workdir, first))
        if due:
            evaluate(run, state, first)
        for step in range(first, total):
            if run.stop.agreed(step):
                raise preempt.Stopped
            trace.before(step, state)
            with jax.profiler.StepTraceAnnotation('train', step_num=step):
                peers.at(f'waiting for the batch of step {step}')
                with run.timers('data'), run.stop.interrupts():
                    batch = next(stream)
                peers.at(f'step {step}')
                if step == first:
                    log(_start_line(starting.totals, run.timers.totals, book.first_step()))
                bad.update(batch)
                inputs = {name: batch[name] for name in run.program.batch}
                inputs = sharding.to_global(inputs, mesh, rows, size)
                state, step_metrics = step_fn(state, inputs)
            run.saved.check()
            run.held()
            peers.at(f'{watchdog.WAITING}, step {step}')
            budget.push(step_metrics)
            done = step + 1
            trace.after(done, state)

            at_log = done % config.log.every_steps == 0 or done == total
            if at_log:
                peers.at(f'logging step {done}')
                seen = order.seen(run.source, done * size // method.repeats)
                writer.log(done, {**step_metrics, **seen})
                book.write(done)
                trace.look(done)
                sentence = method.suspect(writer.last, done)
                if sentence and not suspected:  # once per collapse
                    log(f'step {done:,}: {sentence}')
                suspected = sentence
            if done == total:
                budget.flush()
            if done == total or saves.due(done, at_log):
                save(run, state)
                saves.reset()
            if done == total or (eval_every and done % eval_every == 0):
                evaluate(run, state, done)
        peers.at(f'ending at step {done}')
    except preempt.Stopped:
        if int(state.step) > first:  # else nothing is new
            save(run, state)
            peers.at(f'saving step {done}')
            with run.timers('save'):
                run.saved.wait()
        result['preempted'] = True
        log(f'stopped on request at step {int(state.step)}; the same command continues from there.')
    except metrics.NonFiniteError:
        save(run, state)  # it is finite
        raise
    except stream_lib.TooManyBadImages:
        if jax.process_count() == 1:  # else the others are at another step
            save(run, state)
        raise
    finally:
        stream.close()
        trace.close()
        if first < total:
            book.write(done)
        result.update(writer.close())
    result['step'] = int(state.step)
    with run.timers('save'):
        run.saved.wait()
    if not result['preempted']:
        _farewell(run, result, bad)
    if first < total:
        book.write(done, finished=done == total)
        uploads.close()
        if not result['preempted']:  # else time is short; `ssl_jax report` makes it at any time
            report.refresh(run.workdir, is_new=True)
        log(book.line())
    return result


def _start_line(starting, timers, seconds):
    """Seconds of the start of a process by phase, for the log."""
    parts = {**starting, 'compiling': timers['compile'], 'first batch': timers['data']}
    parts['evaluation'] = timers['eval']  # that a kill took away
    parts['rest'] = seconds - sum(parts.values())
    shown = (f'{name} {x:.{int(x < 10)}f}' for name, x in parts.items() if x >= 0.05)
    return f'first step after {seconds:.0f} s: {", ".join(shown)}'


def save(run: Run, state) -> None:
    """Starts to save the state, after its metrics are on disk."""
    peers.at(f'saving step {int(state.step)}')
    with run.timers('save'):
        run.held(sure=True)
        run.writer.flush()
        meta = dict(
            config=run.config.to_dict(), data=run.source.fingerprint, images=len(run.source)
        )
        run.saved.save(int(state.step), state, meta)


def evaluate(run: Run, state, step: int) -> None:
    """Runs the evaluations; stopped in between, they leave no row and the restart repeats them."""
    peers.at(f'evaluating step {step}')
    try:
        with run.timers('eval'), run.stop.interrupts():
            rows = evals.run(run.tasks, run.look, state, step)
    except features.Stopped:
        return
    run.writer.eval(step, rows)
    if 'pictures' in run.tasks:
        with run.timers('eval'):
            pictures.curves(run.writer.path, run.workdir)


def _farewell(run, result, bad):
    values = {k: v for k, v in result.items() if k not in ('step', 'preempted')}
    log(f'done: step {result["step"]:,}')
    log(*(f'  {k:<28} {v:.4g}' for k, v in sorted(values.items()) if isinstance(v, float)))
    if bad.count:
        log(f'  {bad.count} images could not be decoded, see {run.workdir}/bad_images.jsonl')
    if 'pictures' in run.tasks:
        log(f'pictures and curves: {run.workdir / "pictures"}')


def main(argv=None):
    """Flags: --config=FILE[:arg], --workdir=DIR, --compiled=DIR, --config.FIELD=VALUE."""
    parser = argparse.ArgumentParser(prog='ssl_jax.train', description=main.__doc__)
    parser.add_argument('--config', required=True, help='recipe: path.py, path.py:arg or its name')
    parser.add_argument('--workdir', required=True, help='local folder or gs:// path')
    parser.add_argument('--compiled', help='folder of compiled programs, see docs/machines.md')
    args, rest = parser.parse_known_args(argv)
    overrides = [flag.removeprefix('--config.') for flag in rest if flag.startswith('--config.')]
    unknown = [flag for flag in rest if not flag.startswith('--config.')]
    if unknown:
        parser.error(f'unknown flag {unknown[0]}; fields are set as --config.batch_size=256.')
    with errors.in_a_sentence('ssl_jax'):
        launch.initialize_distributed()
    command(args.config, overrides, args.workdir, args.compiled)


def command(recipe, overrides, workdir, programs=None):
    """Trains for a command line: errors as one sentence, exit code 0 after a signal."""
    before = {'joining': launch.join_seconds}
    before['imports'] = max(0.0, launch.process_seconds() - launch.join_seconds)
    with errors.in_a_sentence('ssl_jax'), peers.announced():
        storage.require_workdir(workdir)
        config = start.continued(config_lib.load(recipe, overrides), workdir)
        result = train(config, workdir, programs, before)
    if result['preempted']:
        launch.leave()
        preempt.exit_now(0)


if __name__ == '__main__':
    main()
