# SPDX-License-Identifier: Apache-2.0
"""Images per second that the loader makes, against those that the step takes."""

import contextlib
import io
import time

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ssl_jax import config as config_lib
from ssl_jax import methods, sharding
from ssl_jax import step as step_lib
from ssl_jax.check.rows import Row, spell
from ssl_jax.data import fingerprint, order, sources
from ssl_jax.data import stream as stream_lib
from ssl_jax.run import clock as clock_lib
from ssl_jax.run import launch, start

BATCH = 32  # images at a time: the rate of decoding does not depend on it
STEPS = 3
ENOUGH = 1.0  # images that the loader makes for each that the step takes; half of it is too little
CPU_SECONDS = 30  # a step is measured on a CPU if all of them take less


class Trial:
    """What `ssl_jax pretrain` would run with a config, as far as it is needed here."""

    def __init__(self, config: ConfigDict):
        self.source = sources.open_source(config.data.train)
        with contextlib.redirect_stdout(io.StringIO()):  # its decisions: pretrain prints them
            self.config = start.complete(config, self.source)
        clock = clock_lib.Clock.of(self.config, order.epoch_size(self.source))
        self.method = methods.make(self.config, clock)
        self.program = step_lib.make_program(self.config, self.method)

    def bytes_saved(self) -> int:
        """Bytes of a checkpoint."""
        leaves = jax.tree.leaves(self.program.abstract)
        arrays = [x for x in leaves if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)]
        return sum(x.size * x.dtype.itemsize for x in arrays)


def rows(found: list[Row], trial: Trial, seconds: float = 8.0) -> float:
    """Appends the rows of the images; returns the images per second of this process."""
    source, config = trial.source, trial.config
    content = fingerprint.content(source.fingerprint)
    found.append(Row('images', f'{len(source):,}, {content}', same=True))
    rate, bad, seen = loading(trial, seconds)
    found.append(Row('loader', rate, 'images/s'))
    if bad:
        text = f'{bad} of {seen} cannot be decoded'
        budget = config.data.bad_budget
        verdict = 'bad' if bad > max(1, budget * len(source)) else 'warn'
        fix = f'a run lists them in bad_images.jsonl, and ends above data.bad_budget={budget:g}'
        found.append(Row('bad images', text, verdict=verdict, next=fix))
    return rate


def loading(trial: Trial, seconds: float) -> tuple[float, int, int]:
    """(images/s, distinct images that cannot be decoded, images read) of the training stream."""
    config, n = trial.config, min(BATCH, order.epoch_size(trial.source))
    stream = stream_lib.train_stream(
        trial.source,
        trial.method.views(),
        batch_size=n,
        seed=config.seed,
        # Processes read other images, as they do in a run.
        start_step=1000 * jax.process_index(),
        num_threads=config.data.num_threads,
        num_workers=config.data.num_workers,
        repeats=trial.method.repeats,
    )
    bad, count = set(), 0
    with stream:
        bad.update(next(stream)['bad'].ravel().tolist())  # threads start, finished batches wait
        begin = time.perf_counter()
        while (taken := time.perf_counter() - begin) < seconds:
            bad.update(next(stream)['bad'].ravel().tolist())
            count += n
    return count / taken, len(bad - {-1}), count + n


def step(found: list[Row], trial: Trial, loaded: float, is_wanted: bool) -> None:
    """Appends images/s of the compiled step on noise, and what the loader gives of it.

    Args:
      loaded: images/s of the loader of this process.
      is_wanted: whether to measure it on a CPU too, if it takes less than CPU_SECONDS.
    """
    program, size = trial.program, trial.config.batch_size
    flops = trial.method.flops(size)
    if jax.default_backend() == 'cpu':
        expected = (STEPS + 1) * flops / (launch.cores() * config_lib.CPU_FLOPS)
        if not launch.main_says(is_wanted):
            return
        if launch.main_says(expected > CPU_SECONDS):
            text = f'not measured: about {spell(expected / (STEPS + 1))} s on this CPU'
            found.append(Row('step', text))
            return
    if trial.config.compile_cache:
        launch.enable_compile_cache()
    seconds = step_seconds(program)
    rate, unit = size / seconds, f'images/s, {spell(seconds)} s for {size}'
    if peak := launch.peak_flops(jax.devices()[0].device_kind):
        unit += f', MFU {flops / seconds / jax.device_count() / peak:.0%}'
    found.append(Row('step', rate, unit))
    needed = rate * len(sharding.process_rows(program.mesh, size)) / size
    found.append(against(loaded, needed, trial.config.data.num_threads))


def against(loaded: float, needed: float, num_threads: int | None) -> Row:
    """The row of the loader beside the step, in images/s of this process."""
    ratio = loaded / needed
    verdict = 'ok' if ratio >= ENOUGH else 'warn' if ratio >= ENOUGH / 2 else 'bad'
    cores = launch.cores()
    fix = 'smaller files (JPEG, the short side little above the crop), or more CPU cores'
    if num_threads and num_threads < cores:
        fix = f'data.num_threads is {num_threads} on {cores} cores: leave it away; else {fix}'
    elif cores < 64:
        fix += f'; if files are far away, data.num_threads={4 * cores}'
    return Row(
        'loader against step',
        ratio,
        f'times the {spell(needed)} images/s that the step takes of this process',
        verdict=verdict,
        next=fix if ratio < ENOUGH else '',
    )


def step_seconds(program: step_lib.Program, steps: int = STEPS) -> float:
    """Seconds of a step on noise, the mean of `steps` after one that warms up."""

    def noise():
        keys = jax.random.split(jax.random.key(0), len(program.batch))
        return {
            name: jax.random.bits(key, x.shape, x.dtype)
            if x.dtype == jnp.uint8
            else jnp.zeros(x.shape, x.dtype)
            for key, (name, x) in zip(keys, program.batch.items(), strict=True)
        }

    with jax.set_mesh(program.mesh):
        shardings = {name: x.sharding for name, x in program.batch.items()}
        batch = jax.jit(noise, out_shardings=shardings)()
        state, metrics = program.step(program.init(), batch)
        jax.block_until_ready(metrics)
        begin = time.perf_counter()
        for _ in range(steps):
            state, metrics = program.step(state, batch)
        jax.block_until_ready((state, metrics))
        return (time.perf_counter() - begin) / steps
