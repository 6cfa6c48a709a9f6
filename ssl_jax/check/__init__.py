# SPDX-License-Identifier: Apache-2.0
"""`ssl_jax check`: what machine, workdir and data can do, on all hosts of a pod, in two minutes.

Each process measures its part, process 0 prints one table. What fails is a row of it. Sums over all
devices and the step need all processes, so they are left out once something that they share is bad.
"""

import contextlib
import dataclasses
import socket
import time
from collections.abc import Callable, Sequence

import jax
from etils import epath

from ssl_jax import config as config_lib
from ssl_jax.check import data, disk, machine, speed
from ssl_jax.check.rows import Row, caught, lines, merge
from ssl_jax.run import errors, launch, peers


def run(
    workdir: epath.PathLike | None = None,
    recipe: str | None = None,
    fields: Sequence[str] = (),
    *,
    step: bool = False,
) -> bool:
    """Prints the table; returns whether nothing is bad.

    Args:
      workdir: None checks none.
      recipe: as `config.load` takes it; None loads no images and measures no step.
      fields: overrides 'a.b=value'.
      step: whether to measure the step on a CPU too.

    Raises:
      UserError: the recipe or a field is unknown, or jax does not start.
    """
    began = time.monotonic()
    config = config_lib.load(recipe, fields) if recipe else None
    with peers.announced():
        found = []
        machine.rows(found)
        try:
            several = jax.process_count() > 1
        except RuntimeError as error:
            launch.show('\n'.join(lines(found)))
            raise errors.UserError('jax does not start: see the last row.') from error
        launch.log('machine')
        bad = _tell(found)
        sound = not (several and bad)
        bad += _part('devices', speed.rows)
        bad += _part('kernels', speed.kernels)
        if jax.device_count() > 1 and sound:
            bad += _part('sums over devices', speed.links, together=True)
        trial, loaded = None, 0.0

        def images(found):
            nonlocal trial, loaded
            with caught(found, 'data'):
                trial = data.Trial(config)
                loaded = data.rows(found, trial)

        if config:
            broken = _part('data', images)
            bad += broken
            if sound and not broken:
                bad += _part(
                    'step', lambda found: data.step(found, trial, loaded, step), together=True
                )
        if workdir:
            saved = trial and trial.bytes_saved()
            keep = trial.config.checkpoint.keep if trial else 1
            bad += _part('workdir', lambda found: disk.rows(found, workdir, saved, keep, sound))
        left_out = [] if sound else ['sums over devices and step: the machines differ or are bad']
        left_out += [] if workdir else ['workdir: give --workdir']
        left_out += [] if config else ['data: give --data']
        launch.log(*(f'not checked: {what}' for what in left_out))
        words = f'{len(bad)} bad: {", ".join(bad)}' if bad else 'nothing is bad'
        launch.log(f'{words}; {time.monotonic() - began:.0f} s')
    return not bad


def _part(title: str, measure: Callable[[list], None], together: bool = False) -> list[str]:
    """Measures and prints a part of the table; returns the names of bad rows, in all processes.

    Args:
      measure: appends rows to a list.
      together: whether the processes wait for each other in it: then an error ends them all.
    """
    peers.at(f'checking {title}')
    launch.log(title)
    found = []
    fatal = together and jax.process_count() > 1
    with contextlib.nullcontext() if fatal else caught(found, title):
        measure(found)
    return _tell(found)


def _tell(found: list[Row]) -> list[str]:
    """Prints the rows of all processes as one; returns the names of the bad ones, everywhere."""
    name = f'process {jax.process_index()} ({socket.gethostname()})'

    def judge(every):
        merged = merge([(name, [Row(**row) for row in rows]) for name, rows in every])
        launch.log(*lines(merged))
        return [row.what for row in merged if row.verdict == 'bad']

    values = [name, [dataclasses.asdict(row) for row in found]]
    return launch.consult(values, judge)
