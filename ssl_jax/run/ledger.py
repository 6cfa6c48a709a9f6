# SPDX-License-Identifier: Apache-2.0
"""Where the time of a run went, over all its starts: ``ledger.json`` in the workdir.

Every second since the first start is counted once, under one of

  step        steps that are part of the weights: the useful time
  data        waiting for their batches
  recomputed  steps and batches of a process that ended before it saved them; a step counts as the
              mean of all so far
  start       from the start of a process to its first step, but for what follows
  compile, save, eval, profile
  restart     without a process, and what one did after it last wrote here: at every log, in a
              bucket once a minute; not after the end of a finished run

and goodput is the share of ``step``. A run without the file, of an earlier version, counts from its
next start.
"""

import collections
import json
import time
from collections.abc import Callable

from etils import epath

from ssl_jax.run import errors, launch, metrics, storage, uploads

WORDS = {
    'start': 'start',
    'compile': 'compile',
    'data': 'data',
    'save': 'saves',
    'eval': 'evaluations',
    'profile': 'profile',
    'restart': 'restarts',
    'recomputed': 'recomputed steps',
}


class Ledger:
    """The ledger of this process and of those before it; process 0 keeps the file.

    Args:
      workdir: of the run.
      timers: of this process; what they do not measure are steps.
      began: start of this process on the clock of `timers`.
      step: that this process starts from.
      now: seconds since 1970, replaced in tests.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        timers: metrics.Timers,
        began: float,
        step: int,
        now: Callable[[], float] = time.time,
    ):
        self._path, self._timers, self._now = epath.Path(workdir) / 'ledger.json', timers, now
        self._began, self._first = began, step
        self._failed = self._has_steps = False
        self._before, self._steps, self.sentence = collections.Counter(), 0, None
        if launch.is_main() and (old := self._read()):
            self._continue(old)

    def _read(self):
        """What the processes before this one wrote, or None."""
        try:
            old = json.loads(storage.read(self._path))
            float(old['time']), int(old['step']), int(old['steps']), bool(old['finished'])
            {k: float(v) for k, v in old['seconds'].items()}
            return old
        except FileNotFoundError:
            return None
        except errors.UserError:  # a bucket that does not answer: what it holds must not be lost
            raise
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            launch.log(f'{self._path} cannot be read ({error}); it counts from now on.')
            return None

    def _continue(self, old):
        """Counts the time between the processes, and the steps that are done once more."""
        self._before.update(old['seconds'])
        away = self._now() - (self._timers.clock() - self._began) - old['time']
        away = 0.0 if old['finished'] else max(0.0, away)
        self._before['restart'] += away
        lost, count = old['step'] - self._first, old['steps']
        lost = min(max(lost, 0), count)
        moved = 0.0
        for name in ('step', 'data'):
            part = self._before[name] * lost / max(count, 1)
            self._before[name] -= part
            moved += part
        self._before['recomputed'] += moved
        self._steps = count - lost
        parts = [f'{metrics.duration(away)} without a process'] if away >= 1 else []
        if lost:
            parts.append(f'{lost:,} steps to do again ({metrics.duration(moved)} of work)')
        self.sentence = f'restart: {", ".join(parts)}' if parts else None

    def first_step(self) -> float:
        """Says that the steps begin now; returns seconds since the start of this process."""
        own = self._timers
        if not self._has_steps:
            own.add('start', own.clock() - self._began - sum(own.totals.values()))
        self._has_steps = True
        return own.clock() - self._began

    def totals(self) -> dict[str, float]:
        """Seconds by name since the first start; their sum is the time since then."""
        own = collections.Counter(self._timers.totals)
        rest = self._timers.clock() - self._began - sum(own.values())
        own['step' if self._has_steps else 'start'] += max(0.0, rest)
        return {k: own[k] + self._before[k] for k in ('step', *WORDS)}

    def row(self) -> dict[str, float]:
        """Fields for `time` of a row: `goodput`, and `<name>_total` in seconds."""
        totals = self.totals()
        return {'goodput': _goodput(totals)} | {f'{k}_total': v for k, v in totals.items() if v}

    def write(self, step: int, finished: bool = False) -> None:
        """Writes the file on process 0, in a bucket behind the run; a failure is a line, once."""
        if not launch.is_main():
            return
        entry = {
            'step': step,
            'steps': self._steps + step - self._first,
            'time': round(self._now(), 3),
            'finished': finished,
            'seconds': {k: round(v, 3) for k, v in self.totals().items()},
        }
        try:
            uploads.put(self._path, f'{json.dumps(entry, indent=1)}\n'.encode())
        except OSError as error:  # training matters more
            if not self._failed:
                launch.say(f'ssl_jax: {self._path} cannot be written ({error}).')
            self._failed = True

    def line(self) -> str:
        """One line for the end of the log."""
        totals = self.totals()
        spent = {word: totals[k] for k, word in WORDS.items() if totals[k] >= 1}
        rest = ', '.join(f'{word} {metrics.duration(x)}' for word, x in spent.items())
        return (
            f'goodput {_goodput(totals):.0%}: {metrics.duration(totals["step"])} of steps in '
            f'{metrics.duration(sum(totals.values()))}{f" ({rest})" if rest else ""}'
        )


def _goodput(totals):
    return totals['step'] / max(sum(totals.values()), 1e-9)
