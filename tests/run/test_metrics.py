# SPDX-License-Identifier: Apache-2.0
"""Rows survive kills, nothing waits for the device, and the progress line says what matters."""

import io
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.run import launch, metrics


class Clock:
    """Time that passes when told to."""

    now = 100.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Unready:
    """A device scalar that notes when it is read."""

    def __init__(self, value):
        self.value, self.is_read = value, False

    def __array__(self, dtype=None, copy=None):
        self.is_read = True
        return np.asarray(self.value, np.float32)


def make_writer(workdir, **kwargs):
    options = dict(
        total_steps=100, batch_size=64, tensorboard=False, clock=Clock(), stream=io.StringIO()
    )
    return metrics.Writer(workdir, **{**options, **kwargs})


def run(workdir, start, stop, **kwargs):
    """Logs every 10 steps, evaluates every 20."""
    writer = make_writer(workdir, start_step=start, **kwargs)
    for step in range(start + 10, stop + 1, 10):
        writer.log(step, {'loss': jnp.float32(1 / step), 'lr': jnp.float32(1e-3)})
        if step % 20 == 0:
            writer.eval(step, {'knn': step / 100})
    return writer


def untimed(workdir):
    return [{k: v for k, v in row.items() if k != 'time'} for row in metrics.read(workdir)]


def test_a_log_is_read_one_log_late(tmp_path):
    writer = make_writer(tmp_path)
    first, second = Unready(0.5), Unready(0.25)
    writer.log(10, {'loss': first})
    assert not first.is_read and metrics.read(tmp_path) == []
    writer.log(20, {'loss': second})
    assert first.is_read and not second.is_read
    assert untimed(tmp_path) == [{'step': 10, 'loss': 0.5}]
    writer.flush()
    assert untimed(tmp_path)[1:] == [{'step': 20, 'loss': 0.25}]


def test_an_evaluation_is_written_at_once_after_the_rows_before_it(tmp_path):
    writer = make_writer(tmp_path)
    writer.log(10, {'loss': 0.5})
    writer.eval(10, {'knn': 0.75})
    assert untimed(tmp_path) == [{'step': 10, 'loss': 0.5}, {'step': 10, 'knn': 0.75}]


def test_an_interrupted_run_leaves_the_file_of_an_unbroken_one(tmp_path):
    run(tmp_path / 'unbroken', 0, 80).close()
    killed = run(tmp_path / 'killed', 0, 50)  # the checkpoint is at 40; the row of 50 is held
    killed.flush()
    with open(tmp_path / 'killed' / 'metrics.jsonl', 'a') as f:
        f.write('{"step": 60, "lo')  # torn by the kill
    run(tmp_path / 'killed', 40, 80).close()
    assert untimed(tmp_path / 'killed') == untimed(tmp_path / 'unbroken')


def test_a_torn_last_line_is_not_merged_with_the_next_row(tmp_path):
    (tmp_path / 'metrics.jsonl').write_text('{"step": 10, "loss": 1}\n{"step": 20, "lo')
    run(tmp_path, 20, 30).close()
    assert [row['step'] for row in metrics.read(tmp_path)] == [10, 30]


def test_a_byte_that_is_no_text_costs_its_row_alone(tmp_path):
    rows = b'{"step": 10, "loss": 1}\n{"step": 20, "loss": \xff}\n{"step": 30, "loss": 3}\n'
    (tmp_path / 'metrics.jsonl').write_bytes(rows)
    run(tmp_path, 30, 30).close()
    assert [row['step'] for row in metrics.read(tmp_path)] == [10, 30]


def test_every_line_is_strict_json_and_not_finite_numbers_come_back(tmp_path):
    writer = make_writer(tmp_path)
    writer.log(1, {'a': jnp.float32('nan'), 'b': jnp.float32('-inf'), 'c': jnp.bfloat16(0.1)})
    writer.close()

    def refuse(name):
        raise AssertionError(name)

    line = (tmp_path / 'metrics.jsonl').read_text()
    assert json.loads(line, parse_constant=refuse)['a'] == 'nan'
    row = metrics.read(tmp_path)[0]
    assert np.isnan(row['a']) and row['b'] == -np.inf
    assert jnp.bfloat16(row['c']) == jnp.bfloat16(0.1)


def test_float32_is_written_with_its_own_digits_and_comes_back_exactly(tmp_path):
    value = np.float32(1 / 3)
    writer = make_writer(tmp_path)
    writer.log(1, {'loss': jnp.asarray(value), 'count': jnp.int32(3)})
    writer.close()
    assert '"loss": 0.33333334,' in (tmp_path / 'metrics.jsonl').read_text()
    row = metrics.read(tmp_path)[0]
    assert np.float32(row['loss']) == value and row['count'] == 3


def test_the_progress_line_names_step_eta_loss_rate_and_data_wait(tmp_path):
    clock, out = Clock(), io.StringIO()
    writer = make_writer(tmp_path, clock=clock, stream=out, total_steps=5000, batch_size=1024)
    with writer.timers('data'):
        clock.now += 5
    clock.now += 45
    writer.log(100, {'loss': jnp.float32(0.51234), 'lr': 1.5e-4, 'skipped_total': jnp.int32(2)})
    writer.close()
    line = out.getvalue()
    # 50 s for 100 steps: 4900 more take 2450 s, and 1024 images per half second are 2048 a second.
    for part in (
        'step 100/5,000 2.0%',
        'eta 40:50',
        'loss 0.5123',
        'lr 0.00015',
        '2,048 img/s',
        '/chip)',
        'data_wait 10%',
        'skipped 2',
    ):
        assert part in line, line
    assert 'MFU' not in line  # a CPU has no peak
    assert line.count('\n') == 1


def test_mfu_is_useful_flops_over_the_peak_of_all_devices(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, 'peak_flops', lambda kind: 100e12)
    monkeypatch.setattr(metrics.jax, 'device_count', lambda: 4)
    clock, out = Clock(), io.StringIO()
    writer = make_writer(tmp_path, clock=clock, stream=out, flops_per_step=80e12)
    clock.now += 5
    writer.log(10, {'loss': 1.0})  # half a second per step
    writer.close()
    assert 'MFU 40.0%' in out.getvalue()
    assert metrics.read(tmp_path)[0]['time']['mfu'] == 0.4


def test_compiling_and_evaluating_do_not_count_as_training_time(tmp_path):
    clock = Clock()
    writer = make_writer(tmp_path, clock=clock)
    with writer.timers('compile'):
        clock.now += 60
    with writer.timers('eval'):
        clock.now += 30
    clock.now += 10
    writer.log(10, {})
    writer.close()
    assert metrics.read(tmp_path)[0]['time']['seconds_per_step'] == 1
    assert metrics.read(tmp_path)[0]['time']['compile_seconds'] == 60


def test_a_terminal_is_redrawn_in_place(tmp_path):
    out = Terminal()
    writer = make_writer(tmp_path, stream=out)
    writer.log(10, {'loss': 1.0})
    writer.log(20, {'loss': 1.0})
    writer.flush()
    assert out.getvalue().count('\r') == 2 and '\n' not in out.getvalue()
    writer.close()
    assert out.getvalue().endswith('\n')


def test_close_returns_the_newest_value_of_every_metric(tmp_path):
    last = run(tmp_path, 0, 30).close()
    assert last == {'loss': float(str(np.float32(1 / 30))), 'lr': 0.001, 'knn': 0.2}


def test_only_the_main_process_writes_and_all_know_the_values(tmp_path):
    writer = run(tmp_path / 'w', 0, 20, is_main=False)
    assert writer.close()['knn'] == 0.2
    assert not (tmp_path / 'w').exists()


def test_a_missing_tensorboard_is_printed_once_and_stops_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'tensorboardX', None)
    run(tmp_path, 0, 40, tensorboard=True).close()
    assert capsys.readouterr().err.count('TensorBoard is off') == 1
    assert len(metrics.read(tmp_path)) == 6


def test_a_missing_wandb_is_printed_and_stops_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'wandb', None)
    run(tmp_path, 0, 10, wandb=True).close()
    assert 'Weights & Biases is off' in capsys.readouterr().err
    assert len(metrics.read(tmp_path)) == 1


def test_tensorboard_gets_an_event_file(tmp_path, capfd):
    pytest.importorskip('tensorboardX')
    writer = run(tmp_path, 0, 20, tensorboard=True)
    writer.eval(20, {'worst': float('nan')})
    writer.close()
    assert capfd.readouterr().err == ''
    (events,) = (tmp_path / 'tensorboard').iterdir()
    assert b'images_per_second' in events.read_bytes() and b'knn' in events.read_bytes()


@pytest.mark.parametrize(
    'kind, tflops',
    [
        ('TPU v4', 275),
        ('TPU v5 lite', 197),
        ('TPU v5e', 197),
        ('TPU v5', 459),
        ('TPU v5p', 459),
        ('TPU v6 lite', 918),
        ('TPU v6e', 918),
        ('NVIDIA A100-SXM4-40GB', 312),
        ('NVIDIA H100 80GB HBM3', 989),
        ('NVIDIA H100 PCIe', 756),
        ('NVIDIA H200', 989),
    ],
)
def test_the_peak_is_known_by_device_kind(kind, tflops):
    assert launch.peak_flops(kind) == tflops * 1e12


def test_an_unknown_device_has_no_peak():
    assert launch.peak_flops('cpu') is None


@pytest.mark.parametrize(
    'seconds, text', [(5, '0:05'), (2450, '40:50'), (3845, '1:04:05'), (97_300, '1d 3h')]
)
def test_durations_read_like_a_clock(seconds, text):
    assert metrics.duration(seconds) == text


def skipped(in_a_row, total):
    return {'skipped_in_a_row': jnp.int32(in_a_row), 'skipped_total': jnp.int32(total)}


@pytest.mark.parametrize('counts, what', [((4, 4), '4 steps in a row'), ((1, 11), 'in total')])
def test_too_many_skipped_steps_end_the_run_with_a_sentence(counts, what):
    budget = metrics.NonFinite(3, 10)
    budget.push(skipped(3, 10))
    budget.flush()
    budget.push(skipped(*counts))
    with pytest.raises(metrics.NonFiniteError, match=what):
        budget.flush()


def test_skipped_steps_are_counted_two_steps_late():
    budget = metrics.NonFinite(0, 0)
    budget.push(skipped(1, 1))
    budget.push(skipped(0, 1))
    with pytest.raises(metrics.NonFiniteError, match='1 steps in a row'):
        budget.push(skipped(0, 1))


def test_the_same_timer_adds_up_and_starts_again_after_take():
    clock = Clock()
    timers = metrics.Timers(clock)
    for _ in range(3):
        with timers('data'):
            clock.now += 2
    assert timers.take() == {'data': 6}
    assert timers.take() == {}
