# SPDX-License-Identifier: Apache-2.0
"""Some steps are traced, as planned or on request; a trace that fails costs a line."""

import threading

import jax
import jax.numpy as jnp
import pytest

import tiny
from ssl_jax import config, train
from ssl_jax.run import errors, launch, metrics, profile, storage


def loop(workdir, first, total, planned=None, every=1, at_log=None):
    """A loop of additions."""
    trace = profile.Profile(workdir, planned, (first, total), metrics.Timers())
    add, state = jax.jit(lambda x: x + 1), jnp.zeros(())
    for step in range(first, total):
        trace.before(step, state)
        with jax.profiler.StepTraceAnnotation('train', step_num=step):
            state = add(state)
        trace.after(step + 1, state)
        if (step + 1) % every == 0:
            if at_log:
                at_log(step + 1)
            trace.look(step + 1)
    trace.close(state)
    return trace


def traced(workdir):
    """{folder: steps in its trace}."""
    found = {}
    for path in sorted((workdir / 'profile' / 'plugins' / 'profile').glob('*/*.xplane.pb')):
        data = jax.profiler.ProfileData.from_file(str(path))
        events = (e for plane in data.planes for line in plane.lines for e in line.events)
        steps = [dict(e.stats)['step_num'] for e in events if e.name == 'train']
        found[path.parent.name] = sorted(steps)
    return found


def asks(workdir, step, text):
    def at_log(done):
        if done == step:
            (workdir / profile.REQUEST).write_text(text)

    return at_log


def test_planned_steps_and_those_of_a_request_are_traced(tmp_path, capsys):
    loop(tmp_path, 0, 20, planned=(3, 5), every=4, at_log=asks(tmp_path, 8, '3\n'))
    assert traced(tmp_path) == {'3-5': [3, 4], '8-11': [8, 9, 10]}
    assert not (tmp_path / profile.REQUEST).exists()
    out = capsys.readouterr().out
    assert 'of 3 steps from 8, as profile.request asks' in out and out.count('how to read it') == 2


@pytest.mark.parametrize('text, steps', [('', [2, 3, 4, 5, 6]), ('900', list(range(2, 10)))])
def test_a_request_has_five_steps_or_what_is_left_of_the_run(tmp_path, text, steps):
    loop(tmp_path, 0, 10, every=2, at_log=asks(tmp_path, 2, text))
    assert list(traced(tmp_path).values()) == [steps]


@pytest.mark.parametrize('text', ['five', '0', '-1', '2.5', '100000'])
def test_a_request_of_no_number_is_answered_and_removed(tmp_path, capsys, text):
    loop(tmp_path, 0, 5, at_log=asks(tmp_path, 2, text))
    assert traced(tmp_path) == {} and not (tmp_path / profile.REQUEST).exists()
    assert f"says '{text}': write a number of steps from 1 to" in capsys.readouterr().out


def test_a_request_that_cannot_be_removed_is_said_once_and_not_served(tmp_path, capsys):
    (tmp_path / profile.REQUEST).mkdir()
    loop(tmp_path, 0, 5)
    assert capsys.readouterr().out.count('requests are not served') == 1


def test_an_outage_holds_up_no_step(tmp_path, monkeypatch):
    end, reads = threading.Event(), []

    def read(_):
        reads.append('begun')
        end.wait(60)
        reads.append('ended')

    monkeypatch.setattr(storage, 'is_remote', lambda _: True)
    monkeypatch.setattr(storage, 'read', read)
    monkeypatch.setattr(profile, 'JOIN_SECONDS', 0.01)
    found = profile.Profile(tmp_path, None, (0, 9), metrics.Timers())
    for done in range(1, 9):
        found.look(done)
    assert reads == ['begun']
    end.set()


@pytest.mark.parametrize('planned', [(1, 3), (8, 12), (12, 14)])
def test_planned_steps_that_this_process_does_not_do_are_said(tmp_path, capsys, planned):
    loop(tmp_path, 2, 10, planned)
    first, stop = planned
    assert f'log.profile={first}:{stop} traces nothing' in capsys.readouterr().out
    assert traced(tmp_path) == {}


@pytest.mark.parametrize('broken', ['start_trace', 'stop_trace'])
def test_a_trace_that_fails_is_a_line(tmp_path, capfd, monkeypatch, broken):
    real = getattr(jax.profiler, broken)

    def fails(*args, **kwargs):
        if broken == 'stop_trace':
            real()
        raise RuntimeError('another profiler runs')

    monkeypatch.setattr(jax.profiler, broken, fails)
    loop(tmp_path, 0, 6, planned=(1, 3))
    err = capfd.readouterr().err
    assert err.count('no profile (RuntimeError: another profiler runs); training goes on') == 1


def test_the_traces_of_several_processes_are_written_here_and_copied_side_by_side(
    tmp_path, monkeypatch
):
    """Also those of two on one host, which the profiler gives the same name."""
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    monkeypatch.setattr(launch, 'main_number', int)
    copied = {}
    monkeypatch.setattr(storage, 'atomic_write', copied.__setitem__)
    loop(tmp_path, 0, 4, planned=(1, 3))
    assert not (tmp_path / 'profile').exists()
    folder = tmp_path / 'profile' / 'plugins' / 'profile' / '1-3'
    assert {p.parent for p in copied} == {folder}
    assert any(p.name.endswith('.xplane.pb') and len(data) for p, data in copied.items())
    assert all(p.name.startswith('0.') for p in copied)


def test_a_run_cut_short_ends_its_trace(tmp_path):
    trace = profile.Profile(tmp_path, (0, 5), (0, 9), metrics.Timers())
    trace.before(0, jnp.zeros(()))
    trace.close()
    assert len(traced(tmp_path)) == 1
    loop(tmp_path, 0, 3, planned=(1, 2))  # the profiler is free again
    assert traced(tmp_path)['1-2'] == [1]


@pytest.mark.parametrize('text', ['100', '5:5', '9:3', 'a:b', '-1:4', '1:2:3', ':4', '1.5:3', ''])
def test_what_names_no_steps_is_one_sentence(text):
    with pytest.raises(errors.UserError, match=r"log.profile='.*' names no steps: .*=100:105"):
        profile.parse(text)


def test_a_trace_of_very_many_steps_is_refused_before_the_run():
    with pytest.raises(errors.UserError, match='1,001 steps.* log.profile=7:12'):
        config.load('scenes_mae', ['log.profile=7:1008'])
    assert config.load('scenes_mae', ['log.profile=7:12']).log.profile == '7:12'


def test_all_processes_trace_what_process_0_found(tmp_path, monkeypatch):
    monkeypatch.setattr(launch, 'is_main', lambda: False)
    monkeypatch.setattr(launch, 'main_number', lambda number: 2 if number == 0 else 1 / 0)
    monkeypatch.setattr(launch, 'log', lambda *_: None)
    loop(tmp_path, 0, 5, every=3)
    assert traced(tmp_path) == {'3-5': [3, 4]}


@pytest.mark.slow
def test_a_run_traces_the_steps_of_its_config(tmp_path):
    train.train(tiny.config(log__profile='3:5'), tmp_path)
    assert traced(tmp_path) == {'3-5': [3, 4]}
    assert any('profile_total' in row['time'] for row in metrics.read(tmp_path))
