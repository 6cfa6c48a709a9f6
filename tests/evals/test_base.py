# SPDX-License-Identifier: Apache-2.0
"""Evaluations: found by their Options, checked before step 0, never the end of a run."""

import sys
import types

import pytest

import tiny
from ssl_jax import config as config_lib
from ssl_jax import evals, train
from ssl_jax.evals import base, features, monitors
from ssl_jax.run import checkpoint, metrics

BRIGHTNESS = '''
"""Mean of the images shown, times a factor."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Options:
    factor: float = 1.0


def run(options, look, state, step):
    return {'brightness': options.factor * look.shown[0]['image'].mean(), 'brightness/step': step}
'''
CHECK = """

def check(options, look):
    raise ValueError(f'{options.factor} is too bright for {len(look.images)} images')
"""


@pytest.fixture
def brightness(tmp_path, monkeypatch):
    """One more file among the evaluations; yields its name."""
    (tmp_path / 'more').mkdir()
    (tmp_path / 'more' / 'brightness.py').write_text(BRIGHTNESS)
    (tmp_path / 'more' / 'helper.py').write_text('')
    monkeypatch.setattr(evals, '__path__', [*evals.__path__, str(tmp_path / 'more')])
    yield 'brightness'
    for name in ('brightness', 'helper'):
        sys.modules.pop(f'ssl_jax.evals.{name}', None)
        vars(evals).pop(name, None)


def test_the_default_runs_every_evaluation_there_is():
    assert base.names() == sorted(config_lib.default().eval.tasks)
    assert list(base.load(config_lib.default().eval.tasks)) == base.names()


@pytest.mark.slow
def test_a_new_file_is_found_by_its_options(brightness, tmp_path):
    assert brightness in base.names() and 'helper' not in base.names()
    config = tiny.config(
        total_steps=2, warmup_steps=0, eval__every_steps=1, eval__tasks__brightness=dict(factor=2.0)
    )
    train.train(config, tmp_path / 'run')
    rows = [row for row in metrics.read(tmp_path / 'run') if 'brightness' in row]
    assert [row['brightness/step'] for row in rows] == [1, 2]
    assert rows[0]['brightness'] == rows[1]['brightness'] > 2
    assert all('features/std' in row for row in rows)  # the others are in the same row


def test_none_turns_an_evaluation_off(tmp_path):
    assert base.load(dict(knn=None, accuracy={}, pictures=None)).keys() == {'accuracy'}
    train.train(tiny.config(total_steps=1, warmup_steps=0, eval__tasks__monitors=None), tmp_path)
    assert [sorted(row) for row in metrics.read(tmp_path)][1:] == [['step', 'time']]


@pytest.mark.parametrize(
    'override, message',
    [
        ('kn.ks=(5,)', "There is no evaluation 'kn' for eval.tasks: did you mean 'knn'?"),
        ('report.ks=(5,)', "no evaluation 'report' for eval.tasks: there is accuracy, knn, "),
        ('knn.kss=(5,)', "There is no option 'eval.tasks.knn.kss': did you mean 'ks'?"),
        ('pictures.num_image=3', "'eval.tasks.pictures.num_image': did you mean 'num_images'?"),
        ('accuracy.top=3', "There is no option 'eval.tasks.accuracy.top': there is nothing."),
        ('knn.ks=10', 'eval.tasks.knn.ks=10 must be a tuple, with a comma: (10,).'),
        ('knn.temperature=0.0', 'eval.tasks.knn.temperature=0.0 is out of range: use a value from'),
        ('knn.temperature=None', 'eval.tasks.knn.temperature is None: set it, the default is 0.07'),
        ('knn.temperature=warm', 'eval.tasks.knn.temperature'),
        ('pictures.num_images=0', 'eval.tasks.pictures.num_images=0 is out of range'),
        ('pictures.num_images=2.5', 'eval.tasks.pictures.num_images'),
        ('pictures.num_images=many', 'eval.tasks.pictures.num_images'),
        ('monitors.num_images=1', 'eval.tasks.monitors.num_images=1 is out of range'),
        ('knn=True', 'eval.tasks.knn'),
    ],
)
def test_a_wrong_evaluation_is_one_sentence_before_step_0(override, message, tmp_path):
    config = tiny.config(total_steps=1, warmup_steps=0)
    config_lib.set_value(config, f'eval.tasks.{override}')
    with pytest.raises(ValueError) as error:
        train.train(config, tmp_path)
    assert message in str(error.value)
    assert '\n' not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_one_that_fails_is_a_line_and_a_number_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    def broken(options, look, state, step):
        raise FloatingPointError('odd numbers')

    monkeypatch.setattr(monitors, 'run', broken)
    scenes = dict(source='scenes', n=32, size=32)
    config = tiny.config(
        eval__every_steps=4,
        eval__tasks__knn=dict(ks=(5,)),
        data__eval_train=scenes,
        data__eval_test=scenes,
    )
    result = train.train(config, tmp_path)
    assert result['step'] == 8 and not result['preempted']
    assert checkpoint.steps(tmp_path / 'checkpoints') == [8]
    rows = [row for row in metrics.read(tmp_path) if 'loss' not in row]
    assert [row['step'] for row in rows] == [4, 8]
    assert all(row['failed/monitors'] == 1 and 'knn/cls/5' in row for row in rows)
    line = 'evaluation monitors failed at step 4: FloatingPointError: odd numbers'
    assert line in capsys.readouterr().out.splitlines()


def test_a_stop_ends_them_all():
    def stopped(options, look, state, step):
        raise features.Stopped

    def never(options, look, state, step):
        raise AssertionError

    tasks = {f.__name__: (types.SimpleNamespace(run=f), None) for f in (stopped, never)}
    with pytest.raises(features.Stopped):
        base.run(tasks, None, None, 3)


def test_a_check_ends_the_run_before_its_first_step(brightness, tmp_path):
    path = tmp_path / 'more' / 'brightness.py'
    path.write_text(f'{BRIGHTNESS}{CHECK}')
    config = tiny.config(total_steps=1, warmup_steps=0, eval__tasks__brightness=dict(factor=7.0))
    with pytest.raises(ValueError, match='7.0 is too bright for 64 images'):
        train.train(config, tmp_path / 'run')
    assert not (tmp_path / 'run' / 'metrics.jsonl').exists()
    assert checkpoint.steps(tmp_path / 'run' / 'checkpoints') == []
