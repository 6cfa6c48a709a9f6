# SPDX-License-Identifier: Apache-2.0
"""Flags of XLA: a user's go over those of the table, XLA alone knows which there are."""

import json

import jax
import jax.numpy as jnp
import pytest

import tiny
from ssl_jax import config as config_lib
from ssl_jax import methods, plan, sharding, train
from ssl_jax import step as step_lib
from ssl_jax.run import clock, launch, start

VMEM = 'xla_tpu_scoped_vmem_limit_kib'
WINDOWS = 'xla_jf_spmd_threshold_for_windowed_einsum_mib'


class Device:
    """A TPU by its kind alone."""

    platform, process_index = 'tpu', 0

    def __init__(self, kind):
        self.device_kind = kind


class Mesh:
    def __init__(self, kind, **shape):
        self.shape = {'data': 1, 'fsdp': 1, 'tensor': 1, **shape}
        self.devices = type('Devices', (), {'flat': [Device(kind)]})


# The override


@pytest.mark.parametrize(
    'text, value',
    [('65536', 65536), ('true', True), ('False', False), ('0.5', 0.5), ('auto', 'auto'),
     ('None', None), ("'7'", '7'), ('-1', -1)],
)  # fmt: skip
@pytest.mark.parametrize('prefix', ['', 'config.'])
def test_a_flag_has_the_type_that_its_value_is_written_in(prefix, text, value):
    found = config_lib.load('scenes_mae', [f'{prefix}xla.xla_some_flag={text}']).xla
    assert found.to_dict() == {'xla_some_flag': value}
    assert type(found.xla_some_flag) is type(value)


@pytest.mark.parametrize(
    'override, message',
    [
        ('xla=3', "'xla' is no flag of XLA: write xla.FLAG=value"),
        ('xla.=3', "'xla.' is no flag of XLA: write xla.FLAG=value"),
        ('xla.a.b=3', "'xla.a.b' is no flag of XLA: write xla.FLAG=value"),
        ('xla.xla_flag=(1, 2)', 'xla.xla_flag=(1, 2) must be a number, True, False, a word'),
        ('xla.xla_flag=[]', 'xla.xla_flag=() must be a number, True, False, a word'),
    ],
)
def test_what_is_no_flag_is_one_sentence(override, message):
    with pytest.raises(ValueError) as error:
        config_lib.load('scenes_mae', [override])
    assert message in str(error.value) and '\n' not in str(error.value)


def test_a_stored_config_keeps_flags_and_a_restart_lays_others_over_them():
    stored = config_lib.load('scenes_mae', ['xla.xla_a=1', 'xla.xla_b=true'])
    again, lines = config_lib.from_dict(json.loads(config_lib.to_json(stored)))
    assert lines == [] and config_lib.diff(stored, again) == {}
    found = config_lib.lay_over(again, ['xla.xla_b=None', 'xla.xla_c=word'])
    assert found.xla.to_dict() == {'xla_a': 1, 'xla_b': None, 'xla_c': 'word'}


def test_a_config_stored_before_there_were_flags_has_none():
    values = config_lib.load('scenes_mae').to_dict()
    del values['xla']
    again, lines = config_lib.from_dict(values)
    assert again.xla.to_dict() == {} and lines == []


def test_a_recipe_may_set_flags():
    c = config_lib.default()
    c.xla.xla_a = 1
    assert config_lib.lock(c).xla.to_dict() == {'xla_a': 1}


# The table


def test_only_tpus_have_flags_of_their_own():
    assert sharding.compiler_options(sharding.make_mesh(1, 4, devices=jax.devices()[:4])) is None
    assert set(sharding.compiler_options(Mesh('TPU v4', fsdp=2))) == {VMEM, WINDOWS}


def test_every_flag_of_the_table_has_a_value_and_a_reason():
    for flags in sharding.FLAGS.values():
        for flag, (value, reason) in flags.items():
            assert flag.startswith('xla_') and isinstance(value, int) and len(reason) > 20
    assert set(sharding.FLAGS) <= {'TPU', 'fsdp', *launch.PEAK_TFLOPS}


def test_windowed_products_are_turned_off_for_fsdp_alone():
    assert WINDOWS in sharding.compiler_options(Mesh('TPU v4', fsdp=2))
    assert WINDOWS not in sharding.compiler_options(Mesh('TPU v4', data=2))


def test_the_row_of_a_kind_goes_over_that_of_all(monkeypatch):
    monkeypatch.setitem(sharding.FLAGS, 'TPU9', {VMEM: (1, 'a test')})
    found = {k: sharding.compiler_options(Mesh(k))[VMEM] for k in ('TPU9', 'TPU8', 'TPU7x')}
    assert found == {'TPU9': 1, 'TPU8': 24 * 1024, 'TPU7x': 32 * 1024}


def test_a_flag_of_the_user_goes_over_the_table_and_none_leaves_it_to_xla(monkeypatch):
    monkeypatch.setattr(sharding, '_try', lambda *_: None)
    mesh = Mesh('TPU v5 lite', fsdp=4)
    found = sharding.compiler_options(mesh, {VMEM: 65536, WINDOWS: None, 'xla_mine': True})
    assert found == {VMEM: 65536, 'xla_mine': True}


# XLA


def make(**flags):
    config = tiny.config(**{f'xla__{k}': v for k, v in flags.items()})
    return step_lib.make_program(config, methods.make(config, clock.Clock(8, 2, 16, 64)))


@pytest.mark.parametrize(
    'flags, message',
    [
        (dict(xla_nonsense=1), "refuses xla.xla_nonsense=1: No such compile option: 'xla_nonse"),
        ({VMEM: 65536}, f"refuses xla.{VMEM}=65536: No such compile option: '{VMEM}'"),  # no TPU
        (dict(xla_cpu_enable_fast_math=7), "xla_cpu_enable_fast_math=7: .* not a valid bool value"),
        (
            dict(xla_cpu_enable_fast_math=True, xla_backend_optimization_level='high'),
            "refuses xla.xla_backend_optimization_level=high: ",
        ),
    ],
)  # fmt: skip
def test_a_flag_that_xla_refuses_is_one_sentence_before_anything_is_compiled(flags, message):
    with pytest.raises(ValueError, match=f'XLA for cpu .*{message}') as error:
        make(**flags)
    assert '\n' not in str(error.value)


def test_the_step_is_compiled_with_the_flags(monkeypatch):
    seen, jit = [], jax.jit

    def spy(fn, **options):
        seen.append(options.get('compiler_options'))
        return jit(fn, **options)

    monkeypatch.setattr(jax, 'jit', spy)
    make(xla_cpu_enable_fast_math=True, xla_embed_ir_in_executable=None)
    assert seen[-1] == {'xla_cpu_enable_fast_math': True}


def test_a_run_with_a_flag_trains_and_keeps_it(tmp_path, capsys):
    config = tiny.config(total_steps=3, xla__xla_cpu_enable_fast_math=True)
    train.train(config, tmp_path)
    assert json.loads((tmp_path / 'config.json').read_text())['xla'] == {
        'xla_cpu_enable_fast_math': True
    }
    assert start.continued(tiny.config(), tmp_path).xla.to_dict() == {
        'xla_cpu_enable_fast_math': True
    }
    said = capsys.readouterr()
    assert 'xla       xla_cpu_enable_fast_math=True' in said.out + said.err


def test_a_plan_asks_the_xla_of_the_chip():
    pytest.importorskip('libtpu', reason="libtpu is missing: pip install 'ssl_jax[plan]'")
    with pytest.raises(ValueError, match='XLA for TPU v6 lite refuses xla.xla_nonsense=1: '):
        plan.run('mae_vitb16', 'v6e:2x2', ['xla.xla_nonsense=1'])
    with pytest.raises(ValueError, match=f'XLA for TPU7x refuses xla.{VMEM}=much'):
        plan.run('mae_vitb16', 'tpu7x:2x2x1', [f'xla.{VMEM}=much'])


def test_the_table_is_what_libtpu_takes():
    pytest.importorskip('libtpu', reason="libtpu is missing: pip install 'ssl_jax[plan]'")
    from ssl_jax.plan import chips

    for name in ('v4:2x2x1', 'v5e:2x2', 'v5p:2x2x1', 'v6e:2x2', 'tpu7x:2x2x1'):
        mesh = sharding.make_mesh(fsdp=2, devices=chips.devices(name))
        put = jax.NamedSharding(mesh, jax.P())
        x = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=put)
        options = sharding.compiler_options(mesh)
        assert jax.jit(jnp.sum, compiler_options=options).lower(x).compile()
