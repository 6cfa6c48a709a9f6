# SPDX-License-Identifier: Apache-2.0
"""Test images of a fine-tuning run are checked before its first step."""

import cv2
import numpy as np
import pytest

import tiny
from ssl_jax import train
from ssl_jax.evals import accuracy
from ssl_jax.run import checkpoint

NO_TEST = 'test      no images: accuracy is not measured; give --test LABELLED'


def config(eval_test):
    """A locked config of a two-block classifier of 64 rendered scenes, one step long."""
    c = tiny.base('classifier')
    c.total_steps, c.warmup_steps = 1, 0
    c.method.update(num_classes=10, crop_pct=1.0, randaugment_layers=0, erase_prob=0.0)
    return tiny.changed(c, dict(data__eval_test=eval_test))


@pytest.mark.parametrize(
    'folders, message',
    [
        (['disc', 'cube'], r"name their classes differently .*\[.*'cube'.*\]"),
        (['.'], 'have no labels: put them in one folder per class'),
    ],
    ids=['other classes', 'no labels'],
)
def test_test_images_of_other_classes_or_none_end_the_run_before_step_0(folders, message, tmp_path):
    for i, folder in enumerate(folders):
        (tmp_path / 'test' / folder).mkdir(parents=True, exist_ok=True)
        image = np.zeros((32, 32, 3), np.uint8)
        cv2.imwrite(str(tmp_path / 'test' / folder / f'{i}.png'), image)
    run = tmp_path / 'run'
    with pytest.raises(ValueError, match=f'The test images .*{message}'):
        train.train(config(str(tmp_path / 'test')), run)
    assert not (run / 'metrics.jsonl').exists() and not checkpoint.steps(run / 'checkpoints')


def test_a_run_without_test_images_says_that_accuracy_is_not_measured(tmp_path, capsys):
    result = train.train(config(None), tmp_path)
    assert result['step'] == 1 and not any('top1' in key for key in result)
    assert capsys.readouterr().out.splitlines().count(NO_TEST) == 1


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_ties_go_to_the_smaller_class_and_nan_is_above(dtype):
    scores = np.array([[1, 1, 0], [1, 1, 0], [np.nan, 2, 0], [np.nan] * 3], dtype)
    assert accuracy.ranks(scores, np.array([0, 1, 1, 2])).tolist() == [0, 1, 1, 3]
