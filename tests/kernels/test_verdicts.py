# SPDX-License-Identifier: Apache-2.0
"""The forms of a run: recorded from its step, kept, and in the program that is lowered."""

import dataclasses
import json
import re
import types

import jax
import jax.numpy as jnp
import pytest

import tiny
from ssl_jax import config as config_lib
from ssl_jax import methods, sharding, train
from ssl_jax import step as step_lib
from ssl_jax.kernels import attention, choice, forms, ops, verdicts
from ssl_jax.kernels.choice import Verdict
from ssl_jax.kernels.segments import Segment
from ssl_jax.plan import chips, compile
from ssl_jax.run import clock, errors, preempt


@pytest.fixture(scope='module')
def program():
    """A small step that calls every operation but `move_images`, on eight devices."""
    mesh = sharding.make_mesh(devices=jax.devices()[:8])
    rows = sharding.batch_sharding(mesh)
    batch = [jax.ShapeDtypeStruct((64 * n, 128), jnp.float32, sharding=rows) for n in (5, 17)]

    def loss(weights, x, tokens):
        y = ops.layer_norm(x, jnp.ones(128), jnp.zeros(128))
        y = ops.dense(y, weights, weights[0])
        return attention.attention(y, 2, (Segment(1, tokens),)).sum()

    def step(weights, batch):
        return [
            jax.grad(loss, argnums=(0, 1))(weights, x, n)
            for n, x in zip((5, 17), batch, strict=True)
        ]

    weights = jax.ShapeDtypeStruct((128, 384), jnp.float32)
    return types.SimpleNamespace(mesh=mesh, step=jax.jit(step), abstract=weights, batch=batch)


def whole():
    """The step of a run in which every kernel but `move_images` fits."""
    fields = dict(embed_dim=128, num_heads=2, decoder_embed_dim=128, decoder_num_heads=2)
    config = tiny.config(batch_size=64, **{f'method__{k}': v for k, v in fields.items()})
    return step_lib.make_program(config, methods.make(config, clock.Clock.of(config, 64)))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('SSL_JAX_CACHE', str(tmp_path / 'cache'))
    return tmp_path / 'cache' / verdicts.FILE


class Chip:
    """Stands for `choice.measure`: uses the kernels of the operations `liked`."""

    def __init__(self, *liked):
        self.liked, self.asked = liked, []

    def __call__(self, calls, *, device, platform, log):
        self.asked += calls
        assert platform == 'tpu'
        return [
            Verdict(c, 'pallas', c.op in self.liked, 'forged', 0.0, 0.0, 1.0, 2.0) for c in calls
        ]


def start(program, workdir, chip, mode='auto', keep=True, platform='tpu', device=None):
    """(chosen forms, lines) of a start on a forged TPU."""
    lines = []
    with jax.set_mesh(program.mesh):
        found = verdicts.for_run(
            mode,
            program.step,
            (program.abstract, program.batch),
            workdir,
            keep=keep,
            platform=platform,
            device=device,
            measure=chip,
            log=lines.append,
        )
    assert all(isinstance(line, str) and line.count('\n') == 0 for line in lines)
    return found, lines


def kernels_in(program, found):
    """Names of the Pallas kernels in the lowered step."""
    step = jax.jit(lambda *args: program.step.__wrapped__(*args))
    with jax.set_mesh(program.mesh), forms.using(*found):
        traced = step.trace(program.abstract, program.batch)
        text = traced.lower(lowering_platforms=('tpu',)).as_text()
    return set(KERNEL.findall(text))


KERNEL = re.compile(r'kernel_name = "(\w+)"')
ALL = {'attention', 'attention_gradient', 'layer_norm', 'layer_norm_gradient', 'sum_rows'}


@pytest.mark.parametrize(
    'mode, liked, wanted',
    [
        ('off', ALL, set()),
        ('on', (), ALL),
        ('auto', (), set()),
        ('auto', ('attention',), {'attention', 'attention_gradient'}),
        ('auto', ('layer_norm', 'sum_rows'), ALL - {'attention', 'attention_gradient'}),
    ],
)
def test_the_step_has_the_kernels_that_the_chip_likes(
    program, tmp_path, cache, mode, liked, wanted
):
    chip = Chip(*liked)
    found, _ = start(program, tmp_path, chip, mode)
    assert kernels_in(program, found) == wanted
    assert bool(chip.asked) == (mode == 'auto') == (tmp_path / verdicts.FILE).exists()


def test_the_jitted_step_of_a_run_has_the_forms_although_its_calls_were_recorded(tmp_path, cache):
    program, chip = whole(), Chip('attention')
    found, _ = start(program, tmp_path, chip)
    with jax.set_mesh(program.mesh), forms.using(*found):
        traced = program.step.trace(program.abstract, program.batch)
    text = traced.lower(lowering_platforms=('tpu',)).as_text()
    assert set(KERNEL.findall(text)) == {'attention', 'attention_gradient'}
    # Calls have the shapes of one device, and each is measured once.
    assert len(set(chip.asked)) == len(chip.asked)
    # 8 of 64 images per device: 1 class token, with 4 of 16 patches or all.
    shapes = {c.shape for c in chip.asked if c.op == 'attention'}
    assert shapes == {(8 * 5, 384), (8 * 17, 384)}
    assert {c.op for c in chip.asked} == {'attention', 'layer_norm', 'sum_rows'}


def test_one_verdict_of_a_shape_leaves_the_other_shapes_to_xla(program, tmp_path, cache):
    class Small(Chip):
        def __call__(self, calls, **options):
            found = super().__call__(calls, **options)
            wanted = choice.Call('attention', (8 * 5, 384), 'float32', (2, ((1, 5, 0),)))
            return [dataclasses.replace(v, used=v.call == wanted) for v in found]

    (chosen, platform), _ = start(program, tmp_path, Small())
    assert platform == 'tpu' and list(chosen.values()) == ['pallas']
    assert kernels_in(program, (chosen, platform)) == {'attention', 'attention_gradient'}


def test_a_second_start_and_a_second_run_measure_nothing(program, tmp_path, cache):
    first, lines = start(program, tmp_path / 'a', Chip('attention'))
    assert any('ms' in line for line in lines)  # the table
    for workdir in ('a', 'b'):
        chip = Chip()
        again, lines = start(program, tmp_path / workdir, chip)
        assert (again, chip.asked) == (first, [])
        path = cache if workdir == 'b' else tmp_path / 'a' / verdicts.FILE
        assert any('verdicts of' in line and str(path) in line for line in lines)
        assert not any('ms' in line for line in lines)


def test_a_run_keeps_its_forms_without_the_cache_and_against_it(program, tmp_path, cache):
    first, _ = start(program, tmp_path / 'run', Chip('attention'))
    cache.unlink()
    chip = Chip()
    assert start(program, tmp_path / 'run', chip)[0] == first and not chip.asked
    cache.unlink()
    start(program, tmp_path / 'other', Chip('layer_norm'))
    assert start(program, tmp_path / 'run', chip)[0] == first and not chip.asked


def test_without_compile_cache_verdicts_are_in_the_workdir_alone(program, tmp_path, cache):
    first, _ = start(program, tmp_path / 'run', Chip('attention'), keep=False)
    assert not cache.exists()
    assert start(program, tmp_path / 'run', Chip(), keep=False)[0] == first


def other_device(monkeypatch, tmp_path):
    return types.SimpleNamespace(device_kind='other', client=jax.devices()[0].client)


def other_driver(monkeypatch, tmp_path):
    client = types.SimpleNamespace(platform_version='libtpu\n built today')
    return types.SimpleNamespace(device_kind=jax.devices()[0].device_kind, client=client)


def other_jax(monkeypatch, tmp_path):
    monkeypatch.setattr(verdicts.importlib.metadata, 'version', lambda name: '9.9')


def other_source(monkeypatch, tmp_path):
    (tmp_path / 'rows.py').write_text('another kernel')
    monkeypatch.setattr(verdicts, '__file__', str(tmp_path / 'verdicts.py'))


@pytest.mark.parametrize('change', [other_device, other_driver, other_jax, other_source])
def test_what_verdicts_depend_on_is_measured_anew(program, tmp_path, cache, monkeypatch, change):
    start(program, tmp_path, Chip('attention'))
    device, chip = change(monkeypatch, tmp_path), Chip('sum_rows')
    found, lines = start(program, tmp_path, chip, device=device)
    assert chip.asked and kernels_in(program, found) == {'sum_rows'}
    assert any('chosen anew' in line for line in lines)
    assert len(json.loads(cache.read_text())) == 2  # both are kept there
    assert len(json.loads((tmp_path / verdicts.FILE).read_text())) == 1


@pytest.mark.parametrize(
    'text',
    [
        b'',
        b'{"a": ',
        b'[]',
        b'{"a": 3}',
        b'{"a": {"b": []}, "c": {"[1]": [{}]}}',
        b'\xff\xfe',
        b'{"a": {"[\\"sum_rows\\", [8], \\"\\", []]": [{"form": 3, "used": 1, "reason": ""}]}}',
        b'[' * 100_000,
    ],
)
@pytest.mark.parametrize('place', ['run', 'cache'])
def test_a_damaged_file_costs_a_line(program, tmp_path, cache, text, place):
    path = cache if place == 'cache' else tmp_path / 'run' / verdicts.FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(text)
    first, lines = start(program, tmp_path / 'run', Chip('attention'))
    assert first[0] and sum('cannot be read' in line for line in lines) == 1
    again, lines = start(program, tmp_path / 'run', Chip())
    assert again == first and not any('cannot be read' in line for line in lines)


def test_a_file_that_cannot_be_written_costs_a_line(program, tmp_path, cache):
    cache.parent.write_text('a file where the folder would be')
    found, lines = start(program, tmp_path / 'run', Chip('attention'))
    assert found[0] and sum('cannot be written' in line for line in lines) == 1


def test_a_form_that_ends_the_process_is_left_out_by_the_next_start(program, tmp_path, cache):
    path, left = tmp_path / 'run' / verdicts.FILE, []

    class Crashing(Chip):
        def __call__(self, calls, **options):
            if calls[0].op == 'attention' and not left:
                left.append(path.read_bytes())  # what a crash here would leave
            return super().__call__(calls, **options)

    start(program, tmp_path / 'run', Crashing('attention'))
    cache.unlink()
    path.write_bytes(left[0])
    chip = Chip('attention', 'layer_norm')
    found, lines = start(program, tmp_path / 'run', chip)
    crashed = [c for c in map(json.loads, json.loads(left[0]).popitem()[1]) if c[0] == 'attention']
    assert len(crashed) == 1 and crashed[0] not in json.loads(json.dumps(chip.asked))
    assert sum(verdicts.ENDED in line for line in lines) == 1
    assert json.dumps(crashed[0]) not in found[0] and len(found[0]) > 1
    # Other runs need not crash to know.
    again, _ = start(program, tmp_path / 'other', Chip('attention'))
    assert again == found


def test_a_signal_while_measuring_leaves_no_verdict(program, tmp_path, cache):
    class Stopping(Chip):
        def __call__(self, calls, **options):
            if self.asked:
                raise preempt.Stopped
            return super().__call__(calls, **options)

    with pytest.raises(preempt.Stopped):
        start(program, tmp_path, Stopping())
    chip = Chip()
    _, lines = start(program, tmp_path, chip)
    assert len(chip.asked) == len(json.loads(cache.read_text()).popitem()[1]) - 1
    assert not any(verdicts.ENDED in line for line in lines)


def test_a_step_that_no_form_fits_is_said(tmp_path, cache):
    rows = jax.ShapeDtypeStruct((8, 12), jnp.float32)
    step = jax.jit(lambda x, _: ops.layer_norm(x, jnp.ones(12), jnp.zeros(12)))
    mesh = sharding.make_mesh(devices=jax.devices()[:8])
    program = types.SimpleNamespace(mesh=mesh, step=step, abstract=rows, batch=rows)
    (chosen, _), lines = start(program, tmp_path, Chip())
    assert not chosen and len(lines) == 1 and 'fits' in lines[0]


def test_on_a_cpu_nothing_is_measured_or_written(program, tmp_path, cache):
    for mode in ('auto', 'on', 'off'):
        chip = Chip()
        assert start(program, tmp_path, chip, mode, platform=None) == (('off', 'tpu'), [])
        assert not chip.asked and not list(tmp_path.iterdir())


def test_training_hands_over_its_step_and_runs_in_the_chosen_forms(tmp_path, monkeypatch):
    given, inside = [], []

    def chosen(*args, **options):
        given.append((args, options))
        return {'a': 'pallas'}, 'tpu'

    monkeypatch.setattr(verdicts, 'for_run', chosen)
    monkeypatch.setattr(train.start, 'first_state', lambda *args: (None, 'forged'))
    monkeypatch.setattr(train, 'loop', lambda *args: inside.append(forms._use.get()))
    train.train(tiny.config(kernels='on'), tmp_path)
    ((mode, step, (state, batch), workdir), options) = given[0]
    assert (mode, workdir, options) == ('on', tmp_path, {'keep': False})
    assert step.__wrapped__ and state.params and batch
    assert inside[0].chosen == {'a': 'pallas'} and forms._use.get() is None


@pytest.mark.parametrize('mode, wanted', [('auto', 'on'), ('on', 'on'), ('off', None)])
def test_a_plan_has_every_kernel_that_fits_unless_told_otherwise(monkeypatch, mode, wanted):
    class Seen(Exception):
        pass

    def lower(built):
        raise Seen(forms._use.get())

    monkeypatch.setattr(compile, 'lower', lower)
    config = tiny.config(kernels=mode, mesh__data=8)
    with pytest.raises(Seen) as seen:
        compile.plan(config, jax.devices()[:8], chips.CHIPS['v5e'])
    assert getattr(seen.value.args[0], 'chosen', None) == wanted


def test_the_field_takes_three_values():
    assert config_lib.load('scenes_mae').kernels == 'auto'
    assert config_lib.load('scenes_mae', ['kernels=off']).kernels == 'off'
    with pytest.raises(
        errors.UserError, match="kernels='xla' is unknown: use one of auto, on, off"
    ):
        config_lib.load('scenes_mae', ['kernels=xla'])
    with pytest.raises(errors.UserError, match="no field 'kernel'.*kernels"):
        config_lib.load('scenes_mae', ['kernel=off'])
