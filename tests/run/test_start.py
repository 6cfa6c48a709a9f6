# SPDX-License-Identifier: Apache-2.0
"""The config of a run is stored, and a restart says what changed."""

import json

from ssl_jax import config as config_lib
from ssl_jax.run import start


def test_the_config_is_stored_and_its_changes_are_listed(tmp_path, capsys):
    first = config_lib.load('scenes_mae')
    start.store_config(tmp_path, first)
    start.store_config(tmp_path, first)
    assert capsys.readouterr().out == ''
    second = config_lib.load('scenes_mae', ['seed=1', 'data.train.n=7'])
    start.store_config(tmp_path, second)
    began = 'config changed since this run began:'
    assert capsys.readouterr().out.splitlines() == [
        f'{began} data.train.n was 4096, is 7',
        f'{began} seed was 0, is 1',
    ]
    stored = config_lib.from_dict(json.loads((tmp_path / 'config.json').read_text()))[0]
    assert config_lib.diff(stored, second) == {}


def test_a_stored_config_that_is_torn_is_replaced(tmp_path):
    (tmp_path / 'config.json').write_text('{"seed')
    config = config_lib.load('scenes_mae')
    start.store_config(tmp_path, config)
    assert (tmp_path / 'config.json').read_text() == config_lib.to_json(config)


def test_a_stored_field_that_is_gone_is_named_where_the_run_goes_on_without_it(tmp_path, capsys):
    config = config_lib.load('scenes_mae')
    values = json.loads(config_lib.to_json(config))
    values['method']['crop_ratio'] = [1.0, 1.0]
    (tmp_path / 'config.json').write_text(json.dumps(values))
    start.store_config(tmp_path, config)
    assert 'method.crop_ratio' in capsys.readouterr().out
