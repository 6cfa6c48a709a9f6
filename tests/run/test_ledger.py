# SPDX-License-Identifier: Apache-2.0
"""Every second of a run is counted once, over its restarts."""

import json

import pytest

from ssl_jax.run import ledger, metrics


class Time:
    """Seconds since 1970 and of the process, which pass when told to."""

    def __init__(self):
        self.now = 5000.0

    def process(self, began=0.0):
        """A fresh process: its timers; its clock starts at `began`."""
        offset = self.now - began
        return metrics.Timers(lambda: self.now - offset)


@pytest.fixture
def time():
    return Time()


def opened(workdir, time, step, before=0.0):
    """The ledger of a process that has needed `before` seconds so far."""
    timers = time.process()
    time.now += before
    return ledger.Ledger(workdir, timers, 0.0, step, now=lambda: time.now), timers


def work(book, timers, time, steps, data=1.0, step=9.0):
    """Does some steps; their batches take a tenth of the time."""
    for _ in range(steps):
        with timers('data'):
            time.now += data
        time.now += step


def spend(timers, time, **seconds):
    for name, x in seconds.items():
        with timers(name):
            time.now += x


def stored(workdir):
    return json.loads((workdir / 'ledger.json').read_text())


def first_process(workdir, time, saved=True):
    """30 steps of 10 s, 20 before the save."""
    book, timers = opened(workdir, time, 0, before=40)
    spend(timers, time, compile=60)
    book.first_step()
    work(book, timers, time, 20)
    if saved:
        spend(timers, time, save=5)
    book.write(20)
    work(book, timers, time, 10)
    book.write(30)
    return book


def test_what_is_measured_is_no_step_and_the_sum_is_the_time_since_the_start(tmp_path, time):
    book = first_process(tmp_path, time)
    totals = book.totals()
    assert {k: v for k, v in totals.items() if v} == {
        'step': 270, 'data': 30, 'start': 40, 'compile': 60, 'save': 5
    }  # fmt: skip
    assert sum(totals.values()) == time.now - 5000
    assert book.row() == {
        'goodput': pytest.approx(270 / 405),
        'step_total': 270, 'data_total': 30, 'start_total': 40, 'compile_total': 60,
        'save_total': 5,
    }  # fmt: skip
    assert book.line() == (
        'goodput 67%: 4:30 of steps in 6:45 (start 0:40, compile 1:00, data 0:30, saves 0:05)'
    )


def test_steps_that_were_not_saved_are_counted_as_recomputed_and_the_gap_as_restart(tmp_path, time):
    first_process(tmp_path, time)
    time.now += 7  # of which nothing is known: the process is killed within them
    time.now += 593
    book, timers = opened(tmp_path, time, 20, before=25)
    assert book.sentence == 'restart: 10:00 without a process, 10 steps to do again (1:40 of work)'
    book.first_step()
    work(book, timers, time, 20)
    totals = book.totals()
    assert {k: v for k, v in totals.items() if v} == {
        'step': 270 - 90 + 180, 'data': 30 - 10 + 20, 'recomputed': 100, 'restart': 600,
        'start': 65, 'compile': 60, 'save': 5,
    }  # fmt: skip
    assert sum(totals.values()) == time.now - 5000
    book.write(40, finished=True)
    assert stored(tmp_path)['steps'] == 40


def test_steps_are_lost_once_however_often_the_next_process_dies_at_its_start(tmp_path, time):
    first_process(tmp_path, time)
    for _ in range(3):
        time.now += 100
        book, timers = opened(tmp_path, time, 20, before=25)
        book.write(20)  # before it compiles
        spend(timers, time, compile=50)  # killed here
    totals = book.totals()
    assert totals['recomputed'] == 100 and totals['step'] == 180
    assert totals['restart'] == 100 + 2 * 150 and totals['start'] == 40 + 3 * 25
    assert sum(totals.values()) == time.now - 5000


def test_more_steps_lost_than_the_ledger_knows_are_those_it_knows(tmp_path, time):
    (tmp_path / 'ledger.json').write_text(
        json.dumps(
            {'step': 500, 'steps': 100, 'time': 5000, 'finished': False, 'seconds': {'step': 50.0}}
        )
    )
    book, _ = opened(tmp_path, time, 0)  # the checkpoints were deleted
    assert book.totals()['recomputed'] == 50 and book.totals()['step'] == 0


def test_after_the_end_of_a_finished_run_no_time_is_lost(tmp_path, time):
    first_process(tmp_path, time).write(30, finished=True)
    time.now += 10**7
    book, _ = opened(tmp_path, time, 30)
    assert book.totals()['restart'] == 0 and book.sentence is None


def test_a_clock_that_was_set_back_counts_nothing(tmp_path, time):
    first_process(tmp_path, time)
    time.now -= 4000
    assert opened(tmp_path, time, 30)[0].totals()['restart'] == 0


@pytest.mark.parametrize(
    'text', ['', '{"step": 3', '[]', '{"step": "x"}', '{"time": 1, "step": 1, "steps": null}']
)
def test_a_file_that_cannot_be_read_is_said_and_replaced(tmp_path, time, capsys, text):
    (tmp_path / 'ledger.json').write_text(text)
    book = first_process(tmp_path, time)
    assert 'ledger.json cannot be read' in capsys.readouterr().out
    assert book.totals()['step'] == stored(tmp_path)['seconds']['step'] == 270


def test_a_file_that_cannot_be_written_is_said_once_and_ends_nothing(
    tmp_path, time, capfd, monkeypatch
):
    def full(*_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(ledger.uploads, 'put', full)
    first_process(tmp_path, time)
    assert capfd.readouterr().err.count('ledger.json cannot be written') == 1


def test_it_is_written_behind_the_run(tmp_path, time, monkeypatch):
    put = []
    monkeypatch.setattr(ledger.uploads, 'put', lambda *args: put.append(args))
    book, timers = opened(tmp_path, time, 0)
    work(book, timers, time, 1)
    put.clear()
    book.write(1)
    assert [path for path, _ in put] == [tmp_path / 'ledger.json'] and not any(tmp_path.iterdir())


def test_only_process_0_keeps_the_file(tmp_path, time, monkeypatch):
    monkeypatch.setattr(ledger.launch, 'is_main', lambda: False)
    first_process(tmp_path, time)
    assert list(tmp_path.iterdir()) == []


def test_rows_have_the_totals_under_time(tmp_path, time):
    timers = time.process()
    book = ledger.Ledger(tmp_path, timers, 0.0, 0, now=lambda: time.now)
    writer = metrics.Writer(
        tmp_path,
        total_steps=10,
        batch_size=4,
        tensorboard=False,
        timers=timers,
        also=book.row,
        clock=timers.clock,
    )
    book.first_step()
    work(book, timers, time, 5)
    writer.log(5, {'loss': 1.0})
    spend(timers, time, eval=50)
    writer.eval(5, {'knn': 3.0})
    writer.close()
    train, evaluation = (row['time'] for row in metrics.read(tmp_path))
    assert train['step_total'] == 45 and train['goodput'] == 0.9 and 'eval_total' not in train
    assert evaluation['eval_total'] == 50 and evaluation['goodput'] == 0.45
