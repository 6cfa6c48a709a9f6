# SPDX-License-Identifier: Apache-2.0
"""Metrics: one row per log in ``metrics.jsonl``, one line on the terminal, TensorBoard if wanted.

A row is ``{"step": 40, "loss": 0.71, ..., "time": {...}}``. Everything that depends on the clock is
under ``time``, so two runs are equal when their rows are equal without it. JSON knows no NaN:
non-finite numbers are the strings ``"nan"``, ``"inf"``, ``"-inf"``, which `read` turns back.
"""

import collections
import contextlib
import math
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from typing import TextIO

import jax
import numpy as np
from etils import epath

from ssl_jax.run import errors, launch, uploads
from ssl_jax.run import rows as rows_lib
from ssl_jax.run.rows import read as read


class NonFiniteError(errors.UserError):
    """More updates were skipped as non-finite than the budget allows."""


class NonFinite:
    """Ends a run that skips too many updates.

    The step counts on the device (`TrainState.skipped`); this compares on the host.

    The budget is that of one process: a restart, where the cause may be gone, begins with all of
    it.

    Args:
      in_a_row: updates in a row that may be skipped.
      total: updates that may be skipped.
      before: updates skipped before the process started.
    """

    def __init__(self, in_a_row: int, total: int, before: int = 0):
        self._budgets = {'in a row': in_a_row, 'in total since this start': total}
        self._pending = collections.deque()
        self._before = before

    def push(self, metrics: dict) -> None:
        """Takes the metrics of a step and checks those of two steps before, surely computed."""
        self._pending.append((metrics['skipped_in_a_row'], metrics['skipped_total']))
        self._check(leave=2)

    def flush(self) -> None:
        """Checks what is left; waits for the device."""
        self._check(leave=0)

    def _check(self, leave):
        while len(self._pending) > leave:
            in_a_row, total = map(int, self._pending.popleft())
            total -= self._before
            counts = min(in_a_row, total), total  # those in a row may begin before the start
            for count, (what, budget) in zip(counts, self._budgets.items(), strict=True):
                if count > budget:
                    raise NonFiniteError(
                        f'The loss or a gradient was not finite in {count} steps {what} (allowed: '
                        f'{budget}); no such update was applied, so lower optim.lr or optim.clip, '
                        f'or use dtype=float32, and start the same command again.'
                    )


class Timers:
    """Seconds spent per phase: ``with timers('data'): ...``; the same name adds up.

    Attributes:
      totals: Counter name -> seconds since the timers were made.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self.clock = clock
        self.totals = collections.Counter()
        self._sums = collections.Counter()

    def add(self, name: str, seconds: float) -> None:
        """Counts seconds that were measured elsewhere."""
        self.totals[name] += seconds
        self._sums[name] += seconds

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self.clock()
        try:
            yield
        finally:
            self.add(name, self.clock() - start)

    def take(self) -> dict[str, float]:
        """dict name -> seconds since the last call."""
        sums, self._sums = dict(self._sums), collections.Counter()
        return sums


class Writer:
    """Writes what a run measures; only process 0 writes, every process may call.

    Args:
      workdir: gets ``metrics.jsonl`` and ``tensorboard/``. Rows after `start_step` and a torn last
        line are removed first, so the file of an interrupted run equals that of an unbroken one.
      total_steps, batch_size: for the progress line; `batch_size` is global.
      flops_per_step: useful FLOPs of one step on all devices, for MFU; None leaves MFU out.
      tensorboard, wandb: also write there. A failure there is printed once and never ends a run.
      start_step: the step that training starts from.
      is_main: whether this process writes.
      timers: of the process; None makes new ones.
      also: returns more fields for `time` of every row.
      clock: seconds, replaced in tests.
      stream: where the progress line goes.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        *,
        total_steps: int,
        batch_size: int,
        flops_per_step: float | None = None,
        tensorboard: bool = True,
        wandb: bool = False,
        start_step: int = 0,
        is_main: bool = True,
        timers: Timers | None = None,
        also: Callable[[], dict[str, float]] = dict,
        clock: Callable[[], float] = time.monotonic,
        stream: TextIO | None = None,
    ):
        self.timers = timers or Timers(clock)
        self._clock, self._stream, self._also = clock, stream or sys.stdout, also
        self._total_steps, self._batch_size = total_steps, batch_size
        self._flops_per_step = flops_per_step
        self._peak = launch.peak_flops(jax.devices()[0].device_kind)
        self._is_main = is_main
        self._held = None  # (step, device arrays, time fields) of the last log
        self._last = {}  # the newest value of every metric
        self._window_step = start_step
        self._seconds_per_step = None
        self._sinks = {}  # name: (add, close)
        if is_main:
            self._rows = rows_lib.Rows(workdir, start_step)
            if tensorboard:
                with self._may_fail('TensorBoard'):
                    self._sinks['TensorBoard'] = rows_lib.events(workdir, start_step)
            if wandb:
                with self._may_fail('Weights & Biases'):
                    self._sinks['Weights & Biases'] = _wandb(workdir)
        self._start = self._window_start = clock()

    def log(self, step: int, metrics: dict) -> None:
        """Takes the metrics of `step` and writes those of the call before.

        Reading a device scalar waits until it is computed. Those of the call before are long done,
        so the devices never wait for the host.

        Args:
          step: number of steps done.
          metrics: dict name -> scalar, on device or host.
        """
        timing = self._measure(step)
        self._write_held()
        self._held = (step, metrics, timing)

    def flush(self) -> None:
        """Writes what is held; waits for the device, and a little for a bucket.

        Call it before a checkpoint is saved, or a kill before the next log would lose the row.
        """
        self._write_held()
        if self._is_main:
            uploads.flush()

    @property
    def path(self) -> epath.PathLike | None:
        """The local file with all rows, of process 0."""
        return self._rows.path if self._is_main else None

    def _write_held(self):
        if self._held is not None:
            (step, metrics, timing), self._held = self._held, None
            self._show(self._line(step, self._write(step, metrics, timing), timing))

    @property
    def last(self) -> dict[str, float]:
        """The newest value written of every metric."""
        return dict(self._last)

    def eval(self, step: int, metrics: dict) -> None:
        """Writes the results of an evaluation at once, as a row of their own."""
        self._write_held()
        timing = {'elapsed': self._clock() - self._start} | self._also()
        timing = {k: round(v, 3) for k, v in timing.items()}
        values = self._write(step, metrics, timing)
        if values:
            shown = '  '.join(f'{k} {_number(v)}' for k, v in values.items())
            self._show(f'step {step:,}  {shown}', keep=True)
        self.flush()

    def close(self) -> dict[str, float]:
        """Writes what is held and closes the files; returns `last`."""
        self._write_held()
        if self._is_main:
            if self._stream.isatty():
                launch.show('', stream=self._stream)
            self._rows.close()
            for name, (_, close) in list(self._sinks.items()):
                with self._may_fail(name):
                    close()
        uploads.close()
        return self.last

    def _measure(self, step):
        now = self._clock()
        spent = self.timers.take()
        steps = max(step - self._window_step, 1)
        wall = max(now - self._window_start, 1e-9)
        # Left out of the rates and the forecast, as they are not training.
        others = sum(spent.get(k, 0) for k in ('compile', 'eval', 'profile'))
        training = max(wall - others, 1e-9)
        self._window_start, self._window_step = now, step
        each = training / steps
        old = self._seconds_per_step
        self._seconds_per_step = each if old is None else 0.7 * old + 0.3 * each
        rate = self._batch_size / each
        timing = {
            'elapsed': now - self._start,
            'eta': (self._total_steps - step) * self._seconds_per_step,
            'seconds_per_step': each,
            'images_per_second': rate,
            'images_per_second_per_chip': rate / jax.device_count(),
            'data_wait': spent.get('data', 0) / training,
            **{f'{k}_seconds': v for k, v in sorted(spent.items())},
            **self._also(),
        }
        if self._flops_per_step and self._peak:
            timing['mfu'] = self._flops_per_step / each / (self._peak * jax.device_count())
        return {k: float(f'{v:.5g}') for k, v in timing.items()}

    def _write(self, step, metrics, timing):
        """Writes a row; returns its values as Python numbers."""
        values = {k: _scalar(v) for k, v in metrics.items()}
        self._last.update(values)
        if self._is_main:
            row = {k: v if math.isfinite(v) else str(v) for k, v in values.items()}
            self._rows.add({'step': step, **row, 'time': timing})
            for name, (add, _) in list(self._sinks.items()):
                with self._may_fail(name):
                    add(step, values | {f'time/{k}': v for k, v in timing.items()})
        return values

    @contextlib.contextmanager
    def _may_fail(self, name):
        """The first failure of a destination is printed, then it is left alone."""
        try:
            yield
        except Exception as e:  # whatever it is, training matters more
            self._sinks.pop(name, None)
            launch.show(
                f'{name} is off for the rest of this run ({type(e).__name__}: {e}); '
                'metrics.jsonl goes on.',
                stream=sys.stderr,
            )

    def _line(self, step, values, timing):
        """The progress line."""
        parts = [
            f'step {step:,}/{self._total_steps:,} {step / self._total_steps:.1%}',
            f'eta {duration(timing["eta"])}',
            *(f'{k} {_number(values[k])}' for k in ('loss', 'lr') if k in values),
            f'{_rate(timing["images_per_second"])} img/s '
            f'({_rate(timing["images_per_second_per_chip"])}/chip)',
        ]
        if 'mfu' in timing:
            parts.append(f'MFU {timing["mfu"]:.1%}')
        parts.append(f'data_wait {timing["data_wait"]:.0%}')
        if values.get('skipped_total'):
            parts.append(f'skipped {int(values["skipped_total"])}')
        return '  '.join(parts)

    def _show(self, line, keep=False):
        """Redraws the line on a terminal, prints it elsewhere."""
        if self._is_main and self._stream.isatty():
            line, end = f'\r{line}\x1b[K', '\n' if keep else ''
            launch.show(line, end=end, stream=self._stream)
        elif self._is_main:
            launch.show(line, stream=self._stream)


def has_evaluation(workdir: epath.PathLike, step: int) -> bool:
    """Whether ``metrics.jsonl`` in `workdir` has the row that `Writer.eval` wrote for `step`."""
    return any(row['step'] == step and 'loss' not in row for row in read(workdir))


def duration(seconds: float) -> str:
    """Seconds as ``4:05`` (minutes), ``1:04:05`` or ``2d 3h``."""
    seconds = int(seconds)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    if hours >= 24:
        return f'{hours // 24}d {hours % 24}h'
    return f'{hours}:{minutes:02}:{seconds % 60:02}' if hours else f'{minutes}:{seconds % 60:02}'


def _wandb(workdir):
    """(add, close) of a W&B run; the same workdir continues the same run."""
    import wandb

    name = str(workdir).rstrip('/')
    run = wandb.init(
        project='ssl_jax',
        name=name.rsplit('/', 1)[-1],
        id=f'{zlib.crc32(name.encode()):08x}',
        resume='allow',
    )
    return lambda step, values: run.log(values, step=step), run.finish


def _scalar(x):
    """An int or a float that prints with no more digits than its type has."""
    x = np.asarray(x)
    if x.dtype.kind in 'iub':
        return int(x)
    return float(x) if x.dtype == np.float64 else float(str(np.float32(x)))


def _number(x):
    """Four digits, as people write them."""
    if isinstance(x, int):
        return f'{x:,}'
    return f'{x:.4f}' if 0.01 <= abs(x) < 1000 or x == 0 else f'{x:.3g}'


def _rate(x):
    return f'{x:,.0f}' if x >= 100 else f'{x:.3g}'
