# SPDX-License-Identifier: Apache-2.0
"""The config of a run is stored, and a restart says what changed."""

import json
import types

import tiny
from ssl_jax import config as config_lib
from ssl_jax import methods
from ssl_jax.data import sources
from ssl_jax.run import clock as clock_lib
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


def test_the_start_says_which_terms_see_micro_batches_where_there_are_any(capsys):
    mesh = types.SimpleNamespace(shape=dict(data=1, fsdp=1, tensor=1))
    nothing = types.SimpleNamespace(params={})
    program = types.SimpleNamespace(abstract=nothing, mesh=mesh, groups='')
    for accum_steps in (1, 2):
        c = tiny.dinov2(accum_steps=accum_steps)
        method = methods.make(c, clock_lib.Clock.of(c))
        start.banner(c, sources.open_source(c.data.train), method, program, 'runs/here')
        said = 'accum_steps=2: the 8 images of a micro-batch, not the 16 of a step, are compared by'
        assert (said in capsys.readouterr().out) == (accum_steps == 2)
