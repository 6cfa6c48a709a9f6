# SPDX-License-Identifier: Apache-2.0
"""The same command again: what was decided stays, other images are said, nothing is lost."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
import pytest

import tiny
from ssl_jax import config as config_lib
from ssl_jax import step as step_lib
from ssl_jax import train
from ssl_jax.data import sources
from ssl_jax.run import checkpoint, errors, launch, metrics, preempt, start

# The config of a restart


@pytest.fixture
def images(tmp_path):
    """A folder of 40 images of 40 x 48 px."""
    return fill(tmp_path / 'images', range(40))


def fill(folder, numbers, seed=0):
    """Writes noise as BMP: all files have one size, whatever they hold."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in numbers:
        pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / f'{i:02}.bmp')
    return folder


SMALL = ('method.embed_dim=32', 'method.depth=1', 'method.num_heads=4')


def begin(workdir, images, *overrides):
    """The completed config of `ssl_jax pretrain --data images`, whose run saves a checkpoint."""
    config = loaded(images, *SMALL, *overrides)
    config = start.complete(config, sources.open_source(str(images)))
    tiny.save(config, workdir)
    return config


def loaded(images, *overrides):
    return config_lib.load('images_mae', [f'data.train={images}', *overrides])


def again(workdir, images, *overrides):
    """The config of the same command with other `overrides`."""
    config = start.continued(loaded(images, *overrides), workdir)
    return start.complete(config, sources.open_source(str(images)), is_new=False)


def other_machine(monkeypatch, devices=64, cores=96):
    monkeypatch.setattr(jax, 'device_count', lambda: devices)
    monkeypatch.setattr(launch, 'cores', lambda: cores)


def test_what_was_inferred_stays_on_another_machine(tmp_path, images, monkeypatch, capsys):
    first = begin(tmp_path, images)
    fresh = loaded(images, *SMALL)
    other_machine(monkeypatch)
    assert config_lib.diff(again(tmp_path, images), first) == {}
    elsewhere = start.complete(fresh, sources.open_source(str(images)))
    assert {'batch_size', 'optim.lr', 'warmup_steps'} <= set(config_lib.diff(elsewhere, first))


def test_what_was_inferred_stays_with_more_and_larger_images(tmp_path, images):
    first = begin(tmp_path, images)
    for i in range(40, 400):
        PIL.Image.new('RGB', (320, 300)).save(images / f'{i}.bmp')
    assert config_lib.diff(again(tmp_path, images), first) == {}


def test_fields_of_the_command_are_laid_over_the_stored_ones(tmp_path, images):
    first = begin(tmp_path, images, 'seed=3', 'log.every_steps=7')
    second = again(tmp_path, images, 'total_steps=9000', 'log.every_steps=5')
    assert config_lib.diff(first, second) == {
        'total_epochs': (first.total_epochs, None),
        'total_steps': (None, 9000),
        'log.every_steps': (7, 5),
        'overrides': (first.overrides, second.overrides),
    }
    assert second.overrides[-2:] == ('total_steps=9000', 'log.every_steps=5')
    assert 'log.every_steps=7' not in second.overrides and 'seed=3' in second.overrides


def test_a_field_set_to_none_is_inferred_again(tmp_path, images, monkeypatch):
    first = begin(tmp_path, images)
    other_machine(monkeypatch)
    second = again(tmp_path, images, 'batch_size=None')
    changed = config_lib.diff(first, second)
    assert changed.keys() == {'batch_size', 'overrides'} and second.batch_size == 64
    # A third start has decided it: the same words leave it as it is.
    tiny.save(second, tmp_path, step=1)
    other_machine(monkeypatch, devices=1)
    assert again(tmp_path, images, 'batch_size=None').batch_size == 64


def test_a_recipe_that_changed_is_said_and_the_run_stays_as_it_began(tmp_path, capsys):
    first = config_lib.load('scenes_mae', ['data.train.n=64'])
    tiny.save(first, tmp_path)
    edited = config_lib.load('scenes_mae')
    with edited.unlocked():
        edited.optim.weight_decay = 0.2
    assert start.continued(edited, tmp_path).optim.weight_decay == 0.05
    out = capsys.readouterr().out
    assert 'optim.weight_decay = 0.05, as this run began (recipe: 0.2)' in out
    assert out.count('\n') == 1  # not of data.train.n, which was typed


def test_another_method_is_refused(tmp_path, images):
    begin(tmp_path, images)
    with pytest.raises(errors.UserError, match='run of method mae, not dinov2: give a new'):
        start.continued(config_lib.load('images_dinov2'), tmp_path)


def test_a_folder_without_a_checkpoint_decides_anew(tmp_path):
    config = loaded(tmp_path)
    assert start.continued(config, tmp_path) is config


def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(tmp_path, images):
    first = begin(tmp_path, images)
    tiny.save(config_lib.load('scenes_mae'), tmp_path, step=1)
    path = tmp_path / 'checkpoints' / '1' / 'meta' / 'metadata'
    path.write_text(path.read_text().replace('scenes', 'scents'))
    assert config_lib.diff(again(tmp_path, images), first) == {}


def test_a_refused_command_leaves_the_stored_config(tmp_path):
    train.train(tiny.config(total_steps=1, warmup_steps=0), tmp_path)
    before = (tmp_path / 'config.json').read_text()
    wider = tiny.config(total_steps=1, warmup_steps=0, method__embed_dim=64)
    with pytest.raises(checkpoint.MismatchError):
        train.train(wider, tmp_path)
    other = tiny.config(total_steps=1, warmup_steps=0, data__train=dict(source='scenes', n=32))
    with pytest.raises(errors.UserError, match='there were 64, and .* are 32'):
        train.train(other, tmp_path)
    assert (tmp_path / 'config.json').read_text() == before


def test_a_fine_tuned_run_goes_on_without_the_model_it_began_with(tmp_path):
    tiny.save(tiny.config(), tmp_path / 'model')
    words = [
        f'init_from={tmp_path / "model"}', 'data.train.n=32', 'data.eval_test=None',
        'batch_size=16', 'warmup_steps=0', 'compile_cache=False', 'log.tensorboard=False',
    ]  # fmt: skip
    first = config_lib.load('finetune_scenes', [*words, 'total_steps=1'])
    train.train(first, tmp_path / 'run')
    shutil.rmtree(tmp_path / 'model')
    second = config_lib.load('finetune_scenes', [*words, 'total_steps=2'])
    assert train.train(second, tmp_path / 'run')['step'] == 2


# The images of a restart


def checked(config, before, now):
    """`check_images` with the meta that a run on `before` leaves."""
    meta = {'data': before.fingerprint, 'images': len(before)}
    start.check_images(config, meta, now)


def replaced(folder):
    fill(folder, [17], seed=1)


def swapped(folder):
    for old, new in (('03', 'x'), ('04', '03'), ('x', '04')):
        (folder / f'{old}.bmp').rename(folder / f'{new}.bmp')


@pytest.mark.parametrize(
    'change, counts',
    [
        (lambda folder: fill(folder, [40, 41]), 'there were 40, and .* are 42:'),
        (lambda folder: (folder / '05.bmp').unlink(), 'there were 40, and .* are 39:'),
        (lambda folder: (folder / '05.bmp').rename(folder / '5.bmp'), 'are 40 of other names'),
        (replaced, 'are 40 of other names, sizes or content'),
        (swapped, 'are 40 of other names, sizes or content'),
    ],
    ids=['added', 'removed', 'renamed', 'replaced', 'swapped'],
)
def test_other_images_are_refused_with_both_counts_unless_accepted(images, change, counts, capsys):
    before = sources.open_source(str(images))
    change(images)
    now = sources.open_source(str(images))
    with pytest.raises(errors.UserError, match=f'{counts}.*data.changed=accept'):
        checked(tiny.config(), before, now)
    checked(tiny.config(data__changed='accept'), before, now)
    assert 'data.changed=accept' in capsys.readouterr().out


def test_a_copy_of_the_images_continues_and_is_said(images, tmp_path, capsys):
    before = sources.open_source(str(images))
    shutil.copytree(images, tmp_path / 'copy', copy_function=shutil.copy)
    os.utime(tmp_path / 'copy' / '01.bmp', (1, 1))
    checked(tiny.config(), before, sources.open_source(str(tmp_path / 'copy')))
    assert 'names, sizes and a sample are as before' in capsys.readouterr().out
    checked(tiny.config(), before, sources.open_source(str(images)))
    assert capsys.readouterr().out == ''


def test_replaced_arrays_are_other_images():
    x = np.zeros((5, 8, 8, 3), np.uint8)
    before = sources.Arrays(x.copy())
    x[2] = 1
    with pytest.raises(errors.UserError, match='are 5 of other names, sizes or content'):
        checked(tiny.config(), before, sources.Arrays(x))


def test_a_checkpoint_that_knows_no_number_of_images_continues():
    start.check_images(tiny.config(), {'data': 'other'}, sources.open_source({'source': 'scenes'}))


def test_accepted_once_is_not_accepted_for_ever(tmp_path, images):
    begin(tmp_path, images, 'data.changed=accept')
    assert again(tmp_path, images).data.changed == 'refuse'


# Numbers that are not finite


def nan_in(tree, name):
    def one(path, x):
        here = name in jax.tree_util.keystr(path) and jnp.issubdtype(x.dtype, jnp.inexact)
        return x.at[(0,) * x.ndim].set(jnp.nan) if here else x

    return jax.tree_util.tree_map_with_path(one, tree)


def saved_state(step):
    params = {'a': jnp.ones((4, 3)), 'b': jnp.zeros(3)}
    tx = optax.adam(1e-3)
    state = step_lib.TrainState.create(params, {'centre': jnp.zeros(3)}, tx)
    return dataclasses.replace(state, step=jnp.int32(step))


@pytest.mark.parametrize(
    'part, name', [('params', 'a'), ('opt_state', 'nu'), ('opt_state', 'mu'), ('extra', 'centre')]
)
def test_a_state_that_is_not_finite_is_not_saved_and_the_last_finite_one_stays(
    tmp_path, part, name
):
    saved = checkpoint.Checkpointer(tmp_path, keep=1)
    saved.save(1, saved_state(1))
    state = saved_state(2)
    state = dataclasses.replace(state, **{part: nan_in(getattr(state, part), name)})
    with pytest.raises(checkpoint.CheckpointError, match=rf'{name}.* has NaN .* is step 1:'):
        saved.save(2, state)
    saved.close()
    assert checkpoint.steps(tmp_path) == [1]


def test_a_stored_state_that_is_not_finite_gives_way_to_the_one_before(tmp_path, capsys):
    saved = checkpoint.Checkpointer(tmp_path)
    saved.save(1, saved_state(1))
    with pytest.MonkeyPatch.context() as patch:  # as a version that did not look
        scan = checkpoint.checksums.scan
        patch.setattr(checkpoint.checksums, 'scan', lambda tree: (scan(tree)[0], {}))
        state = saved_state(2)
        saved.save(2, dataclasses.replace(state, params=nan_in(state.params, 'b')))
        saved.close()
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), state)
    assert int(checkpoint.Checkpointer(tmp_path).restore(like)[0].step) == 1
    assert 'damaged: model/params/b has NaN or inf in 1 numbers' in capsys.readouterr().out


def test_after_a_restart_the_budget_of_skipped_updates_counts_anew():
    def counts(in_a_row, total):
        return {'skipped_in_a_row': in_a_row, 'skipped_total': total}

    budget = metrics.NonFinite(3, 10, before=11)
    budget.push(counts(5, 12))  # 4 in a row came before
    budget.push(counts(0, 12))
    budget.flush()
    budget.push(counts(4, 15))
    with pytest.raises(metrics.NonFiniteError, match='4 steps in a row'):
        budget.flush()


# Signals and streams


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_ends_a_wait_for_data_at_once(number, capfd):
    main, never = threading.main_thread().ident, threading.Event()
    with preempt.Preemption() as stop, pytest.raises(preempt.Stopped), stop.interrupts():
        threading.Timer(0.1, signal.pthread_kill, (main, number)).start()
        never.wait(60)
    assert stop.requested


def test_a_signal_before_a_wait_for_data_counts(capfd):
    with preempt.Preemption() as stop:
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(preempt.Stopped), stop.interrupts():
            pytest.fail('the block has begun')


def test_an_evaluation_that_catches_every_error_does_not_catch_a_stop():
    assert not issubclass(preempt.Stopped, Exception)


LOGS = """
import sys
from ssl_jax.run import launch
for _ in range(3):
    launch.log('a line')
    launch.show('progress', end='', stream=sys.stdout)
"""
TRAINS = """
import tiny
from ssl_jax import train
train.train(tiny.config(log__every_steps=2), {workdir!r})
"""


@pytest.mark.parametrize('broken', ['pipe', 'disk'])
@pytest.mark.parametrize('code', [LOGS, pytest.param(TRAINS, marks=pytest.mark.slow)])
def test_a_closed_pipe_or_a_full_disk_behind_stdout_ends_no_run(tmp_path, broken, code):
    tests = os.path.dirname(tiny.__file__)
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([os.path.dirname(tests), tests]))
    read, write = os.pipe()
    os.close(read)
    out = os.fdopen(os.open('/dev/full', os.O_WRONLY) if broken == 'disk' else write, 'w')
    code = code.format(workdir=str(tmp_path))
    with out:
        done = subprocess.run(
            [sys.executable, '-c', code], env=env, stdout=out, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count('the output cannot be written') == 1
    if 'train' in code:
        assert metrics.read(tmp_path)[-1]['step'] == 8
