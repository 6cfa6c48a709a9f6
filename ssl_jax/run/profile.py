# SPDX-License-Identifier: Apache-2.0
"""Traces of some steps by XLA's profiler, planned or asked for while the run goes on.

`log.profile=100:105` traces the steps 100 to 104. A file ``profile.request`` in the workdir asks
for the next steps: 5, or the number that it holds. It is looked for at log steps, and removed. All
processes write ``profile/plugins/profile/<first>-<stop>/<host>.xplane.pb``, as xprof and
TensorBoard read it. A failure costs the trace and a line.
"""

import contextlib
import pathlib
import shutil
import tempfile
import threading
import time
from typing import Any

import jax
from etils import epath

from ssl_jax.run import errors, launch, metrics, peers, storage

REQUEST = 'profile.request'
STEPS = 5  # of a request that names no number
MOST = 1000  # a trace of more steps opens in no browser
LOOK_SECONDS = 10.0  # between looks into a bucket
JOIN_SECONDS = 0.2  # that a run waits for the answer; a later one counts at the next log


def parse(text: str | None) -> tuple[int, int] | None:
    """(first, stop) of '100:105', None of None.

    Raises:
      UserError: it is something else.
    """
    if text is None:
        return None
    first, _, stop = text.partition(':')
    if not (first.isdecimal() and stop.isdecimal() and int(first) < int(stop)):
        raise errors.UserError(
            f"log.profile='{text}' names no steps: write the first and the one after the last, "
            f'such as log.profile=100:105.'
        )
    if int(stop) - int(first) > MOST:
        raise errors.UserError(
            f"log.profile='{text}' has {int(stop) - int(first):,} steps, and a trace of more than "
            f'{MOST:,} can hardly be opened: name fewer, such as log.profile={first}:'
            f'{int(first) + STEPS}.'
        )
    return int(first), int(stop)


class Profile:
    """The traces of one process; all processes call each method at the same steps.

    Args:
      workdir: of the run.
      planned: of `parse`.
      steps: (first, stop) of this process's part of the run.
      timers: count what a trace takes as 'profile'.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        planned: tuple[int, int] | None,
        steps: tuple[int, int],
        timers: metrics.Timers,
    ):
        self._workdir, self._timers, self._total = epath.Path(workdir), timers, steps[1]
        self._next = planned  # (first, stop) to trace
        self._folder = None  # where a trace is being collected
        self._look_at, self._is_deaf = 0.0, False
        self._asking = None  # the thread that looks for a request in a bucket
        self._text = None  # of a request
        if planned and not (steps[0] <= planned[0] and planned[1] <= steps[1]):
            launch.log(
                f'log.profile={planned[0]}:{planned[1]} traces nothing: this process does the '
                f'steps {steps[0]} to {steps[1] - 1}.'
            )
            self._next = None

    def before(self, step: int, state: Any) -> None:
        """Starts a trace if one is due; to call before the batch of `step`."""
        if self._next and step == self._next[0] and not self._folder:
            first, stop = self._next
            with self._may_fail(), self._timers('profile'):
                jax.block_until_ready(state)  # else the trace begins with steps before
                folder = tempfile.mkdtemp(prefix='ssl_jax.profile.')
                options = jax.profiler.ProfileOptions()
                options.session_id = f'{first}-{stop}'
                jax.profiler.start_trace(folder, profiler_options=options)
                self._folder = pathlib.Path(folder)

    def after(self, done: int, state: Any) -> None:
        """Ends the trace if the steps are done."""
        if self._next and done >= self._next[1]:
            self._stop(state)
            self._next = None

    def look(self, done: int) -> None:
        """Takes a request, at log steps."""
        if self._next:
            return
        steps = launch.main_number(self._request(done))
        if steps:
            self._next = done, done + steps

    def close(self, state: Any = None) -> None:
        """Ends a trace that is cut short."""
        self._stop(state)

    def _request(self, done):
        """Steps to trace on request, 0 for none: what process 0 finds."""
        if not launch.is_main() or self._is_deaf or done >= self._total:
            return 0
        path, now = self._workdir / REQUEST, time.monotonic()
        if not storage.is_remote(path):
            self._ask(path)
        elif now >= self._look_at and not (self._asking and self._asking.is_alive()):
            self._look_at = now + LOOK_SECONDS
            # An outage is waited out there.
            self._asking = threading.Thread(target=self._ask, args=(path,), daemon=True)
            self._asking.start()
            self._asking.join(JOIN_SECONDS)
        text, self._text = self._text, None
        if text is None:
            return 0
        if text and not (text.isdecimal() and 0 < int(text) <= MOST):
            launch.show(f"{path} says '{text[:50]}': write a number of steps from 1 to {MOST}.")
            return 0
        steps = min(int(text or STEPS), self._total - done)
        launch.show(f'profile   of {steps} steps from {done}, as {REQUEST} asks')
        return steps

    def _ask(self, path):
        """Takes the request at `path`, if there is one."""
        try:
            text = storage.read(path).decode(errors='replace').strip()
            storage.remove(path)
        except FileNotFoundError:
            return
        except Exception as error:  # of any library for any bucket
            self._is_deaf = True  # else it is traced at every log
            launch.show(f'{path} cannot be read and removed ({error}); requests are not served.')
            return
        self._text = text

    def _stop(self, state):
        if self._folder is None:
            return
        folder, self._folder = self._folder, None
        peers.at('writing the profile')
        with self._may_fail(), self._timers('profile'):
            try:
                jax.block_until_ready(state)
            finally:
                jax.profiler.stop_trace()
            target = self._workdir / 'profile'
            # Processes of one host have the same name.
            prefix = f'{jax.process_index()}.' if jax.process_count() > 1 else ''
            for path in (p for p in folder.rglob('*') if p.is_file()):
                parent = target / path.parent.relative_to(folder)
                storage.atomic_write(parent / f'{prefix}{path.name}', path.read_bytes())
            shutil.rmtree(folder, ignore_errors=True)
            launch.log(f'profile   {target}; docs/machines.md says how to read it')

    @contextlib.contextmanager
    def _may_fail(self):
        try:
            yield
        except Exception as error:  # whatever it is, training matters more
            self._next = self._folder = None
            launch.say(f'ssl_jax: no profile ({type(error).__name__}: {error}); training goes on.')
