# SPDX-License-Identifier: Apache-2.0
"""Whatever happens to one of two processes at night: both end, in time, with a sentence, and the
same command continues to the bits of an unbroken run."""

import re
import time

import jax
import numpy as np
import pytest

from processes import commanded, commands, finish, no_process_outlives_its_test  # noqa: F401
from ssl_jax.run import checkpoint, metrics

FIELDS = (
    'checkpoint__every_steps=10, checkpoint__every_minutes=None, eval__tasks__monitors=None, '
    'compile_cache=True, watchdog__dump_minutes=0.05, watchdog__exit_minutes=0.2'
)
LENGTH = dict(total=120, at=14)
BROKEN = '__import__("resource").setrlimit(__import__("resource").RLIMIT_FSIZE, (4000, 4000))'
FULL = '(_ for _ in ()).throw(OSError(28, os.strerror(28)))'
EVENTS = {
    'killed': ('os.kill(os.getpid(), signal.SIGKILL)', r'process {who} is gone'),
    'stopped': (
        'os.kill(os.getpid(), signal.SIGSTOP)',
        r'process {who} has been silent for \d+ s \(the last that it said: .*\d+\)',
    ),
    'signalled': ('os.kill(os.getpid(), signal.SIGTERM)', r'stopped on request at step \d+'),
    'loader': (
        'stream._read = lambda *_: time.sleep(3600)',
        r'process {who} has not moved for [\d.]+ s \(waiting for the batch of step \d+\)',
    ),
    'call': (
        'time.sleep(3600)',
        r'process {who} has not moved for [\d.]+ s \(step 13\)',
    ),
    'images': (
        "raise stream.TooManyBadImages('9 images cannot be decoded.')",
        r'9 images cannot be decoded',
    ),
    'list': (
        f'stream.BadImages._write = lambda *_: {FULL}; batch["bad"][0, 0] = 3',
        'No space left on device',
    ),
    'save': (BROKEN, r'The checkpoint of step \d+ could not be written .* File too large'),
}


def state(workdir):
    """The last checkpoint, as numpy."""
    return checkpoint.restore_model(workdir)[0]


def rows(workdir):
    return [{k: v for k, v in r.items() if k != 'time'} for r in metrics.read(workdir)]


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('unbroken')
    found = commands(workdir, fields=FIELDS, **LENGTH)
    assert [code for code, _ in found] == [0, 0], found
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize('who', [0, 1])
@pytest.mark.parametrize('event', EVENTS)
def test_both_end_in_time_with_a_sentence_and_the_same_command_continues(
    tmp_path, unbroken, event, who
):
    act, words = EVENTS[event]
    beat = 'peers.BEAT_SECONDS, peers.SILENT_SECONDS = 0.2, 3.0'
    processes = commanded(tmp_path, who, act, FIELDS, before=beat, **LENGTH)
    code, out = finish(processes[1 - who], timeout=120)
    ended = time.monotonic()
    if event == 'stopped':
        processes[who].kill()
    their_code, their_out = finish(processes[who], timeout=60)
    began = float(re.search(r'ACT (\S+)', their_out).group(1))
    print(
        f'{event} {who}: {ended - began:.1f} s, {(code, their_code)}\n{out[-600:]}\n---\n{their_out[-600:]}'
    )
    assert code == (0 if event == 'signalled' else 1), out
    assert re.search(words.format(who=who), out + their_out), (out, their_out)
    assert ended - began < 30
    if event not in ('killed', 'stopped'):
        assert their_code == code, their_out
    found = commands(tmp_path, fields=FIELDS, **LENGTH)
    assert [code for code, _ in found] == [0, 0], found
    assert re.search(r'continuing this run at step [1-9]', found[0][1])
    assert rows(tmp_path) == rows(unbroken)
    jax.tree.map(np.testing.assert_array_equal, state(tmp_path), state(unbroken))
