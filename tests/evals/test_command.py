# SPDX-License-Identifier: Apache-2.0
"""`ssl_jax eval`: which evaluations run, what words set, and which rows a file keeps."""

import json
import types

import numpy as np
import pytest
from etils import epath

from ssl_jax.data import scenes, sources
from ssl_jax.evals import command, knn, seg, task
from ssl_jax.run import errors


def test_words_set_evaluations_and_say_what_the_data_mean():
    settings, of_data = command._settings(('seg', 'knn'), ['seg.ks=(1,3)', 'data.ignore=11'])
    assert settings == {'seg': seg.Settings(ks=(1, 3)), 'knn': knn.Options()}
    assert of_data == {'ignore': '11'}


@pytest.mark.parametrize(
    'word, sentence',
    [
        ('depth.steps=3', "sets 'depth', which is no evaluation to run: add it to --tasks"),
        ('sge.ks=(1,)', 'did you mean seg'),
        ('seg.ks', 'is not NAME.FIELD=VALUE'),
        ('ks=(1,)', 'is not NAME.FIELD=VALUE'),
    ],
)
def test_a_word_that_sets_nothing_is_refused(word, sentence):
    with pytest.raises(errors.UserError) as e:
        command._settings(('seg',), [word])
    assert sentence in str(e.value) and word in str(e.value)


def test_an_unknown_evaluation_is_refused_by_the_nearest_name_and_one_named_twice_runs_once():
    with pytest.raises(errors.UserError, match="'segg': did you mean 'seg'"):
        command._known(('segg',))
    assert command._known(('seg', 'knn', 'seg')) == ('seg', 'knn')


def test_without_names_images_get_what_they_allow():
    images = np.zeros((2, 8, 8, 3), np.uint8)
    assert command._tasks_for(sources.Arrays(images, [0, 1])) == ('knn', 'linear')
    assert command._tasks_for(sources.Arrays(images)) == ('pck',)
    maps = scenes.Scenes(2, 16)
    maps.classes = None
    assert command._tasks_for(maps) == ('seg',)


def test_a_file_keeps_the_rows_of_other_evaluations(tmp_path):
    run = types.SimpleNamespace(step=3)
    for name, value in (('seg', 1.0), ('depth', 2.0), ('seg', 4.0)):
        rows = [dict(task.row(name, 'patch', {'x': value}, {}), model='trained')]
        command._report(rows, run, tmp_path, None)
    kept = json.loads((tmp_path / 'eval_3.json').read_text())
    assert [(row['eval'], row['scores']['x']) for row in kept] == [('depth', 2.0), ('seg', 4.0)]


def test_kept_evaluations_of_other_weights_are_refused(tmp_path):
    folder = tmp_path / 'evals' / '3'
    command._check_weights(epath.Path(folder), {'tensors': {'a': 1}})
    command._check_weights(epath.Path(folder), {'tensors': {'a': 1}})
    with pytest.raises(errors.UserError, match='of other weights than this checkpoint: delete it'):
        command._check_weights(epath.Path(folder), {'tensors': {'a': 2}})
