# SPDX-License-Identifier: Apache-2.0
"""Whatever happens to one of two processes at night: both end, in time, with a sentence, and the
same command continues to the bits of an unbroken run."""

import os
import re
import time

import jax
import numpy as np
import pytest

from processes import commanded, commands, finish, no_process_outlives_its_test  # noqa: F401
from ssl_jax.run import checkpoint, metrics
from ssl_jax.run import workdir as workdir_lib

FIELDS = (
    'checkpoint__every_steps=10, checkpoint__every_minutes=None, eval__tasks__monitors=None, '
    'compile_cache=True, log__every_steps=10, watchdog__dump_minutes=0.05, '
    'watchdog__exit_minutes=0.2'
)
LENGTH = dict(total=120, at=14)
BEAT = 'peers.BEAT_SECONDS, peers.SILENT_SECONDS = 0.2, 4.0'
# Nothing happens before there is a checkpoint to continue from.
SAVED = (
    '[time.sleep(0.05) for _ in iter(lambda: os.path.exists('
    '{workdir!r} + "/checkpoints/10/commit_success.txt"), True)]; '
)
WITHIN = 30.0  # seconds: the 12 of `exit_minutes`, the 4 of SILENT_SECONDS, and a busy machine


def limit(size):
    """Files end there, as on a full disk."""
    return f'resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))'


EVENTS = {
    'killed': ('os.kill(os.getpid(), signal.SIGKILL)', 'process {who} is gone'),
    'stopped': (
        'os.kill(os.getpid(), signal.SIGSTOP)',
        r'process {who} has been silent for \d+ s \(the last that it said: .*\d+\)',
    ),
    'signalled': ('os.kill(os.getpid(), signal.SIGTERM)', r'stopped on request at step \d+'),
    'a stalled loader': (
        'stream.read = lambda *_: time.sleep(3600)',
        r'process {who} has not moved for [\d.]+ s \(waiting for the batch of step \d+\)',
    ),
    'a call that hangs': (
        'time.sleep(3600)',
        r'process {who} has not moved for [\d.]+ s \(step 13\)',
    ),
    'bad images': (
        "raise stream.TooManyBadImages('9 images cannot be decoded.')",
        r'process {who} ended \(step 13\): 9 images cannot be decoded',
    ),
    'a full disk under their list': (
        f'{limit(0)}; batch["bad"][0, 0] = 3',
        r'process {who} ended \(step 13\): .*File too large',
    ),
    'a full disk under the metrics': (
        limit(500),
        r'process {who} ended \(.* step \d+\): .*File too large',
    ),
    'a full disk under a save': (
        limit(4000),
        # Orbax's manager may keep the error until a barrier that the other process never reaches.
        r'process 0 ended .*: The checkpoint of step \d+ could not be written .*too large|'
        r'process [01] has not moved for [\d.]+ s \(saving step \d+\)',
    ),
}
WRITES = ('a full disk under the metrics', 'a full disk under a save')  # process 0
EITHER = ('killed', 'stopped', 'signalled', 'a stalled loader')
CASES = [(e, who) for e in EVENTS for who in (0, 1) if e in EITHER or who == (e not in WRITES)]


def rows(workdir):
    return [{k: v for k, v in r.items() if k != 'time'} for r in metrics.read(workdir)]


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('unbroken')
    found = commands(workdir, fields=f"{FIELDS}, log__profile='30:32'", **LENGTH)
    assert [code for code, _ in found] == [0, 0], found
    return workdir


@pytest.mark.slow
@pytest.mark.parametrize('event, who', CASES)
def test_both_end_in_time_with_a_sentence_and_the_same_command_continues(
    tmp_path, unbroken, event, who
):
    act, words = EVENTS[event]
    act = SAVED.format(workdir=str(tmp_path)) + act
    processes = commanded(tmp_path, who, act, FIELDS, before=BEAT, **LENGTH)
    code, out = finish(processes[1 - who], timeout=120)
    seconds = time.monotonic()
    if event == 'stopped':
        processes[who].kill()
    their_code, their_out = finish(processes[who], timeout=60)
    seconds -= float(re.search(r'ACT (\S+)', their_out).group(1))
    print(f'{event} in process {who}: {seconds:.1f} s\n{out[-400:]}\n---\n{their_out[-400:]}')
    said = out + their_out if event == 'signalled' else out  # process 0 logs
    assert re.search(words.format(who=who), said), (out, their_out)
    assert seconds < WITHIN
    assert code == (0 if event == 'signalled' else 1), out
    if event not in ('killed', 'stopped'):
        assert their_code == code, their_out
    found = commands(tmp_path, fields=FIELDS, **LENGTH)
    assert [code for code, _ in found] == [0, 0], found
    assert re.search(r'continuing this run at step [1-9]', found[0][1])
    assert 'goodput' in found[0][1].splitlines()[-1]
    assert rows(tmp_path) == rows(unbroken)
    got, want = (checkpoint.restore_model(x)[0] for x in (tmp_path, unbroken))
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.slow
def test_both_processes_trace_the_planned_steps(unbroken):
    folder = unbroken / 'profile' / 'plugins' / 'profile' / '30-32'
    assert {p.name.split('.')[0] for p in folder.iterdir()} == {'0', '1'}


def test_a_workdir_in_use_ends_both_at_their_start(tmp_path):
    with workdir_lib.lock(tmp_path):
        found = commands(tmp_path)
    assert [code for code, _ in found] == [1, 1], found
    assert all(f'{tmp_path} is in use by process {os.getpid()}' in out for _, out in found), found
