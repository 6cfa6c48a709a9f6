# SPDX-License-Identifier: Apache-2.0
"""Kept programs: loaded where all agrees, the same bits; else a line and a compilation."""

import dataclasses
import importlib.metadata
import json

import jax
import numpy as np
import pytest
from etils import epath

import tiny
from run import test_processes
from run.test_processes import finish, no_process_outlives_its_test, start  # noqa: F401
from ssl_jax import config as config_lib
from ssl_jax import methods, plan, sharding
from ssl_jax import step as step_lib
from ssl_jax.data import sources
from ssl_jax.run import clock, compiled, errors, launch, peers
from ssl_jax.run import start as run_start


def program(config, devices=1, num_examples=64):
    method = methods.make(config, clock.Clock.of(config, num_examples))
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    return step_lib.make_program(config, method, mesh)


@pytest.fixture(scope='module')
def built():
    return program(tiny.config())


@pytest.fixture(scope='module')
def full(built, tmp_path_factory):
    """A folder with both programs of `built`."""
    kept = compiled.Kept.of(tmp_path_factory.mktemp('kept'), tiny.config(), built)
    kept.get('init'), kept.get('step')
    return kept


@pytest.fixture
def lines(monkeypatch):
    found = []
    monkeypatch.setattr(launch, 'log', lambda *x: found.extend(x))
    return found


def batch(built):
    rng = np.random.default_rng(0)
    return {
        k: jax.device_put(rng.integers(0, 256, x.shape, x.dtype), x.sharding)
        for k, x in built.batch.items()
    }


def same_bits(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


# Loaded


def test_a_loaded_step_makes_the_bits_of_one_compiled_now_and_frees_the_old_state(full, built):
    init, step = full.load('init'), full.load('step')
    ours, theirs = init(), built.init()
    assert same_bits(ours, theirs)
    with jax.set_mesh(built.mesh):
        for _ in range(3):
            before = ours
            ours, found = step(ours, batch(built))
            theirs, wanted = built.step(theirs, batch(built))
            assert all(x.is_deleted() for x in jax.tree.leaves(before))
            assert found.keys() == wanted.keys() and same_bits(found, wanted)
    assert same_bits(ours, theirs) and int(ours.step) == 3
    assert isinstance(ours, step_lib.TrainState)


def test_what_is_loaded_is_not_traced(full, lines, monkeypatch):
    monkeypatch.setattr(compiled.Kept, 'lower', lambda *_: pytest.fail('traced'))
    full.get('step'), full.start().init()
    assert [line.rpartition(' in ')[0] for line in lines] == [
        'compiled  step loaded',
        'compiled  init loaded',
    ]


def test_what_came_out_of_jaxs_own_cache_is_compiled_anew_before_it_is_kept(
    built, tmp_path, request
):
    """XLA writes a program that was read from there without its machine code."""
    before = jax.config.jax_persistent_cache_min_compile_time_secs
    name = 'jax_persistent_cache_min_compile_time_secs'
    request.addfinalizer(lambda: jax.config.update(name, before))
    jax.config.update(name, 0.0)
    kept = compiled.Kept.of(tmp_path, tiny.config(), built)
    kept.lower('init').compile()  # from here on it is in the cache
    jax.clear_caches()
    made = kept.get('init')()
    assert same_bits(kept.load('init')(), made)
    assert jax.config.jax_enable_compilation_cache


# Not loaded


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)


def foreign(path):
    path.write_bytes(b'\x89PNG\r\n\x1a\n')


def empty(path):
    path.write_bytes(b'')


def of_another(path):
    head, _, payload = path.read_bytes().partition(b'\n')
    head = json.loads(head)
    head['key']['seed'] = '7'
    path.write_bytes(json.dumps(head).encode() + b'\n' + payload)


def no_pickle(path):
    head = json.loads(path.read_bytes().partition(b'\n')[0])
    head['sha256'] = compiled.hashlib.sha256(b'nothing').hexdigest()
    path.write_bytes(json.dumps(head).encode() + b'\nnothing')


def folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    'damage, sentence',
    [
        (cut, 'is damaged'),
        (flip, 'is damaged'),
        (foreign, 'has another key'),
        (empty, 'has another key'),
        (of_another, 'has another key'),
        (no_pickle, 'cannot be loaded: UnpicklingError'),
        (folder, 'cannot be loaded: IsADirectoryError'),
    ],
)
def test_a_bad_file_costs_a_line_and_a_compilation(
    full, tmp_path, lines, monkeypatch, damage, sentence
):
    kept = dataclasses.replace(full, folder=tmp_path)
    path = kept._path('init')
    path.write_bytes(full._path('init').read_bytes())
    damage(path)
    monkeypatch.setattr(compiled.Kept, 'save', lambda self, *_: 'its file')
    assert kept.get('init', lambda lowered: 'made') == 'made'
    assert sentence in lines[0] and path.name in lines[0]
    assert lines[1] == 'compiled  init kept as its file'


def test_a_bad_file_is_replaced(full, tmp_path, lines):
    kept = dataclasses.replace(full, folder=tmp_path)
    flip_of = kept._path('init')
    flip_of.write_bytes(full._path('init').read_bytes())
    flip(flip_of)
    state = kept.get('init')()
    assert same_bits(kept.load('init')(), state)


def test_a_folder_that_cannot_be_written_costs_a_line(built, tmp_path, lines):
    (tmp_path / 'file').write_text('')
    kept = compiled.Kept.of(tmp_path / 'file', tiny.config(), built)
    assert kept.get('init')().step == 0
    assert 'init cannot be kept in' in lines[-1] and 'file' in lines[-1]


def test_without_a_folder_nothing_is_written_or_said(built, lines):
    kept = compiled.Kept.of(None, tiny.config(), built)
    assert kept.start() is built and kept.get('init', lambda _: 'made') == 'made'
    assert not lines


def test_programs_for_several_cpu_devices_of_a_process_are_neither_kept_nor_loaded(tmp_path, lines):
    config = tiny.config()
    kept = compiled.Kept.of(tmp_path / 'kept', config, program(config, devices=2))
    assert kept.get('init', lambda _: 'made') == 'made'
    assert not (tmp_path / 'kept').exists() and 'neither loaded nor kept' in lines[0]


# What a program depends on


@pytest.mark.parametrize(
    'field, value',
    [
        ('optim.lr', 0.003),
        ('optim.freeze', ('^encoder',)),
        ('method.mask_ratio', 0.5),
        ('method.drop_path', 0.0),
        ('seed', 1),
        ('remat', 'full'),
        ('dtype', 'bfloat16'),
        ('accum_steps', 2),
    ],
)
def test_another_field_of_the_step_is_named(full, built, field, value):
    config = tiny.config(**{field.replace('.', '__'): value})
    other = compiled.Kept.of(full.folder, config, built)
    before = config_lib.flatten(tiny.config())[field]
    with pytest.raises(errors.UserError) as error:
        other.load('step')
    words = f'one with {field} {before}, here it is {value}'
    assert words in str(error.value)


@pytest.mark.parametrize(
    'fields',
    [
        dict(data__num_threads=1, data__train=None),
        dict(name='other', log__every_steps=7, nonfinite__total=3, compile_cache=True),
        dict(eval__every_epochs=3.0, eval__max_train=5, checkpoint__keep=5),
        dict(total_steps=None, total_examples=128, warmup_steps=None, warmup_examples=32),
        dict(mesh__data=1),
    ],
)
def test_what_is_outside_the_step_does_not_count(full, built, fields):
    assert compiled.make_key(tiny.config(**fields), built) == full.key


def test_versions_source_settings_and_devices_count(full, built, monkeypatch, request):
    def first(**more):
        new = compiled.make_key(tiny.config(), built, **more)
        return next((k for k in new if new[k] != full.key.get(k)), None)

    assert first() is None
    assert first(more={'kernels': 'attention'}) == 'kernels'
    real = importlib.metadata.version
    for package in ('jax', 'jaxlib', 'optax'):
        with monkeypatch.context() as patch:
            patch.setattr(
                importlib.metadata, 'version', lambda x, p=package: '9' if x == p else real(x)
            )
            assert first() == f'{package} version'
    with monkeypatch.context() as patch:
        patch.setattr(compiled, 'source', lambda: 'edited')
        assert first() == 'source of ssl_jax'
    with monkeypatch.context() as patch:
        patch.setenv('XLA_FLAGS', '--xla_cpu_enable_fast_math=true')
        assert first() == 'XLA_FLAGS'
    with monkeypatch.context() as patch:
        patch.setattr(launch, 'cores', lambda: 1000)
        assert first() == 'processor'
    for name, value in (
        ('jax_default_matmul_precision', 'bfloat16'),
        ('jax_debug_nans', True),
        ('jax_threefry_partitionable', False),
    ):
        before = getattr(jax.config, name)
        jax.config.update(name, value)
        try:
            assert first() == name
        finally:
            jax.config.update(name, before)


def test_another_device_or_another_order_of_devices_counts():
    def key(*numbers):
        devices = [jax.devices()[i] for i in numbers]
        mesh = jax.sharding.Mesh(np.reshape(devices, (-1, 1, 1)), sharding.AXES)
        config = tiny.config()
        method = methods.make(config, clock.Clock.of(config))
        return compiled.make_key(config, step_lib.make_program(config, method, mesh))

    keys = [key(0), key(1), key(0, 1), key(1, 0)]
    assert len({json.dumps(k) for k in keys}) == 4


def test_the_source_is_that_of_every_module_but_recipes(tmp_path, monkeypatch):
    for name in ('a.py', 'kernels/b.py', 'configs/c.py'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('x = 1')
    monkeypatch.setattr(compiled, 'PACKAGE', tmp_path)
    digest = compiled.source.__wrapped__
    before = digest()
    (tmp_path / 'configs/c.py').write_text('x = 2')
    assert digest() == before
    (tmp_path / 'kernels/b.py').write_text('x = 2')
    assert digest() != before


# Epochs: their number of steps is in the program


def test_images_count_where_the_step_has_epochs_in_it(built):
    steps, epochs = tiny.config(), tiny.config(total_steps=None, total_epochs=2.0)
    assert compiled.make_key(steps, built, 64) == compiled.make_key(steps, built, 640)
    a, b = (compiled.make_key(epochs, built, n) for n in (64, 640))
    assert [k for k in a if a[k] != b[k]] == ['total steps', 'images']
    assert compiled.in_epochs(tiny.config(eval__every_epochs=1.0)) == []
    frozen = tiny.config(optim__warm_freeze=('x',), optim__warm_freeze_epochs=0.5)
    assert compiled.in_epochs(frozen) == ['optim.warm_freeze_epochs=0.5']
    teacher = tiny.dinov2(method__warmup_teacher_temp_epochs=1.0)
    assert compiled.in_epochs(teacher) == ['method.warmup_teacher_temp_epochs=1.0']


def test_a_plan_of_epochs_is_saved_for_a_number_of_images_alone(tmp_path):
    with pytest.raises(errors.UserError, match=r'total_epochs=.*: give --images N'):
        plan.run('mae_vitb16', 'v5e:4x4', save=str(tmp_path))


@pytest.mark.parametrize('kernels, refused', [('auto', True), ('on', False), ('off', False)])
def test_a_step_whose_kernels_the_chips_choose_is_not_saved_before(
    tmp_path, monkeypatch, kernels, refused
):
    class Reached(Exception):
        pass

    def reached(*_):
        raise Reached

    monkeypatch.setattr(plan.chips, 'devices', reached)
    fields = ['total_steps=9', 'warmup_steps=1', f'kernels={kernels}']
    with pytest.raises(errors.UserError if refused else Reached) as error:
        plan.run('mae_vitb16', 'v5e:4x4', fields, save=str(tmp_path))
    assert not refused or 'add kernels=off or kernels=on' in str(error.value)


def test_programs_are_kept_in_a_bucket(bucket, built, full, lines):
    kept = dataclasses.replace(full, folder=epath.Path(f'{bucket.root}/kept'))
    made = kept.get('init')()
    assert same_bits(kept.load('init')(), made) and 'has none yet' in lines[0]
    other = compiled.Kept.of(kept.folder, tiny.config(seed=5), built)
    with pytest.raises(errors.UserError, match='one with seed 0, here it is 5'):
        other.load('init')


def test_processes_with_other_folders_are_told_apart(monkeypatch):
    compared = []
    monkeypatch.setattr(peers, 'compare', compared.append)
    source = sources.open_source(tiny.config().data.train)
    run_start.compare(tiny.config(), source, 'w', compiled='gs://bucket/kept')
    assert compared[0]['compiled'] == 'gs://bucket/kept'


def test_local_devices_have_no_search():
    with pytest.raises(errors.UserError, match='neither --search nor --slices'):
        plan.run('scenes_mae', 'local', search=True)


# As a user runs it

RUN = """
    import sys
    import tiny
    from ssl_jax import cli, config
    from ssl_jax.run import compiled
    config.recipe = lambda *_: tiny.config(
        compile_cache=True, total_steps=None, total_epochs=1.0, mesh__data=-1, eval__tasks__monitors=None
    )
    real, traced = compiled.Kept.lower, []
    compiled.Kept.lower = lambda self, name: (traced.append(name), real(self, name))[1]
    cli.main({argv!r})
    print('TRACED', traced)
"""  # noqa: E501


def run(*argv):
    return start(RUN.format(argv=[str(x) for x in argv]))


def ended(process):
    code, out = finish(process)
    assert code == 0, out
    return out


def test_a_planned_step_is_loaded_by_the_run(tmp_path):
    folder = tmp_path / 'kept'
    local = ('plan', '--config', 'x', '--topology', 'local', '--images', 64)
    out = ended(run(*local, '--save', folder))
    assert "TRACED ['step', 'init']" in out and 'at the peak' in out
    assert len(list(folder.iterdir())) == 2
    begin = ('pretrain', '--config', 'x', '--workdir')
    out = ended(run(*begin, tmp_path / 'a', '--compiled', folder))
    assert 'step loaded in' in out and 'init loaded in' in out and 'TRACED []' in out
    assert 'step 4/4' in out


TWO = """
    from ssl_jax.run import launch
    launch.initialize_distributed()
    import tiny
    from ssl_jax import train
    train.train(tiny.config(mesh__fsdp=2), {workdir!r}, {folder!r})
    import jax
    jax.distributed.shutdown()
"""


@pytest.mark.slow
def test_two_processes_load_what_the_first_of_them_kept(tmp_path):
    for name, words in (('a', 'step kept as'), ('b', 'step loaded in')):
        code = TWO.format(workdir=str(tmp_path / name), folder=str(tmp_path / 'kept'))
        found = [finish(p) for p in test_processes.twice(code, each=1)]
        assert all(code == 0 for code, _ in found), found
        assert words in found[0][1]
    assert test_processes.rows(tmp_path / 'a') == test_processes.rows(tmp_path / 'b')
