# SPDX-License-Identifier: Apache-2.0
"""A checkpoint is whole or not there, fits any number of devices, and never loads garbage."""

import json
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ssl_jax.run import checkpoint, checksums, trees
from states import (
    abstract,
    assert_same,
    make_mesh,
    make_state,
    on,
    restore,
    save,
    shardings,
)

REPO = pathlib.Path(__file__).resolve().parents[2]
# What Orbax leaves of its own coroutines after an error of ours.
pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')


@pytest.fixture(scope='module')
def saved_once(tmp_path_factory):
    directory = tmp_path_factory.mktemp('run') / 'checkpoints'
    save(directory, 7)
    return directory


@pytest.mark.parametrize('shape', [(1, 8), (8, 1), (2, 2), (1, 1)])
def test_a_state_saved_on_8_devices_is_bitwise_the_same_on_any_mesh(saved_once, shape):
    mesh = make_mesh(*shape)
    state, _ = restore(saved_once, mesh)
    assert_same(state, make_state(7))
    for got, want in zip(
        jax.tree.leaves(state), jax.tree.leaves(shardings(state, mesh)), strict=True
    ):
        assert got.sharding.is_equivalent_to(want, got.ndim)


def test_what_is_donated_right_after_save_is_saved_as_it_was(tmp_path):
    wipe = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    saved = checkpoint.Checkpointer(tmp_path)
    state = on(make_mesh(1, 8), make_state(3, width=512))
    saved.save(1, state)
    for _ in range(3):  # reuses the buffers several times while the save runs
        state = wipe(state)
    saved.close()
    assert_same(restore(tmp_path, state=make_state(3, width=512))[0], make_state(3, width=512))


@pytest.mark.parametrize('shared_bytes, shared', [(checkpoint.SHARED_BYTES, False), (64, True)])
def test_devices_share_the_writing_of_large_copies_only(
    tmp_path, monkeypatch, shared_bytes, shared
):
    monkeypatch.setattr(checkpoint, 'SHARED_BYTES', shared_bytes)
    cut, real = [], jax.lax.slice_in_dim
    monkeypatch.setattr(
        jax.lax, 'slice_in_dim', lambda x, *args, **kw: cut.append(x.shape) or real(x, *args, **kw)
    )
    saved = checkpoint.Checkpointer(tmp_path)
    saved.save(1, on(make_mesh(8, 1), make_state(3)))
    saved.close()
    assert bool(cut) == shared
    assert_same(restore(tmp_path)[0], make_state(3))


@pytest.mark.parametrize('shape', [(1, 8), (8, 1), (1, 1)])
def test_a_restored_state_is_donated_without_a_copy(saved_once, shape):
    state, _ = restore(saved_once, make_mesh(*shape))
    buffers = [x.addressable_shards[0].data.unsafe_buffer_pointer() for x in jax.tree.leaves(state)]
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    after = [
        x.addressable_shards[0].data.unsafe_buffer_pointer() for x in jax.tree.leaves(step(state))
    ]
    assert sorted(buffers) == sorted(after)


def test_meta_says_what_made_the_checkpoint(saved_once):
    _, meta = restore(saved_once)
    assert meta['step'] == 7 and meta['config'] == {'name': 'test'}
    assert meta['versions']['jax'] == jax.__version__
    assert meta['mesh'] == {'data': 1, 'fsdp': 8, 'tensor': 1} and meta['processes'] == 1


def test_the_model_is_read_on_the_host_though_the_moments_are_gone(tmp_path):
    save(tmp_path / 'checkpoints', 1)
    for file in (tmp_path / 'checkpoints' / '1' / 'opt').rglob('*'):
        if file.is_file():
            file.unlink()
    want = {'params': make_state(1).params, 'extra': make_state(1).extra}
    for path in (tmp_path, tmp_path / 'checkpoints', tmp_path / 'checkpoints' / '1'):
        model, meta = checkpoint.restore_model(path)
        assert_same(model, want)
        assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(model)) and meta['step'] == 1


def test_the_model_is_read_onto_devices(saved_once):
    target = abstract(make_state(), make_mesh(2, 4))
    target = {'params': target.params, 'extra': target.extra}
    model, _ = checkpoint.restore_model(saved_once, target)
    assert_same(model, {'params': make_state(7).params, 'extra': make_state(7).extra})
    assert model['params']['blocks']['qkv'].sharding == target['params']['blocks']['qkv'].sharding


def largest(step, item='opt'):
    return max((step / item).rglob('d/*'), key=lambda p: p.stat().st_size)


def truncate(step):
    os.truncate(largest(step), largest(step).stat().st_size // 2)


def flip_a_bit(step):
    file = largest(step)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 8
    file.write_bytes(data)


def rename_in_meta(step):
    file = step / 'meta' / 'metadata'
    file.write_text(file.read_text().replace('params/norm', 'params/nora'))


def cut_meta(step):
    os.truncate(step / 'meta' / 'metadata', 20)


DAMAGE = {
    'truncated shard': (truncate, 'OUT_OF_RANGE|Truncated|corrupt'),
    'missing shard': (lambda step: largest(step).unlink(), 'Error reading'),
    'flipped bit': (flip_a_bit, 'differ from their checksums|corrupt'),
    'missing manifest': (lambda step: (step / 'opt' / 'manifest.ocdbt').unlink(), 'opt'),
    'altered meta': (rename_in_meta, 'meta differs from its checksum'),
    'truncated meta': (cut_meta, 'JSONDecodeError'),
    'missing marker': (lambda step: (step / 'commit_success.txt').unlink(), 'commit_success.txt'),
}


@pytest.mark.parametrize('kind', DAMAGE)
def test_damage_is_named_and_the_checkpoint_before_is_used(tmp_path, capsys, kind):
    damage, reason = DAMAGE[kind]
    save(tmp_path, 1, 2)
    damage(tmp_path / '2')
    state, meta = restore(tmp_path)
    assert_same(state, make_state(1))
    assert meta['step'] == 1
    capsys_out = capsys.readouterr().out
    assert f'{tmp_path}/2' in capsys_out
    assert any(r in capsys_out for r in reason.split('|')), capsys_out


def test_what_a_killed_save_or_deletion_left_is_ignored_and_removed_by_the_next_save(tmp_path):
    save(tmp_path, 1)
    leftovers = [
        tmp_path / '2.orbax-checkpoint-tmp',
        tmp_path / '9.orbax-checkpoint-tmp',
        tmp_path / 'deleting-0',
    ]
    for path in leftovers:
        (path / 'model').mkdir(parents=True)
    saved = checkpoint.Checkpointer(tmp_path)
    assert saved.latest() == 1
    assert all(path.exists() for path in leftovers)  # a reader deletes nothing
    saved.save(2, on(make_mesh(1, 8), make_state(2)))
    saved.close()
    assert_same(restore(tmp_path)[0], make_state(2))
    assert {p.name for p in tmp_path.iterdir()} == {'1', '2'}


def test_damaged_checkpoints_alone_are_an_error_that_lists_them(tmp_path):
    save(tmp_path, 1, 2)
    truncate(tmp_path / '1')
    flip_a_bit(tmp_path / '2')
    with pytest.raises(checkpoint.CheckpointError, match=r'step 2: .*step 1: .*move it away'):
        restore(tmp_path)


def test_uncommitted_checkpoints_alone_are_an_error_and_not_a_fresh_start(tmp_path):
    save(tmp_path, 4)
    (tmp_path / '4' / 'commit_success.txt').unlink()
    with pytest.raises(checkpoint.CheckpointError, match='holds step 4 but no complete'):
        checkpoint.Checkpointer(tmp_path).latest()


def test_a_directory_without_checkpoints_is_fresh_and_cannot_be_restored(tmp_path):
    assert checkpoint.Checkpointer(tmp_path / 'none').latest() is None
    with pytest.raises(checkpoint.CheckpointError, match='holds no checkpoint; give the workdir'):
        checkpoint.restore_model(tmp_path)


def test_a_damaged_checkpoint_is_set_aside_when_its_step_is_saved_again(tmp_path):
    save(tmp_path, 1, 2)
    truncate(tmp_path / '2')
    saved = checkpoint.Checkpointer(tmp_path)
    saved.restore(abstract(make_state(), make_mesh(1, 8)))
    assert saved.steps() == [1]
    assert saved.save(2, on(make_mesh(1, 8), make_state(5)))
    saved.close()
    assert_same(restore(tmp_path)[0], make_state(5))
    assert {p.name for p in tmp_path.iterdir()} == {'1', '2', '2.damaged'}


def test_a_damaged_newest_checkpoint_does_not_push_out_the_good_one(tmp_path):
    save(tmp_path, 1, 2)
    truncate(tmp_path / '2')
    saved = checkpoint.Checkpointer(tmp_path, keep=2)
    saved.restore(abstract(make_state(), make_mesh(1, 8)))
    saved.save(3, on(make_mesh(1, 8), make_state(3)))
    saved.close()
    assert saved.steps() == [1, 3]


def test_the_newest_and_every_nth_checkpoint_are_kept(tmp_path):
    saved = save(tmp_path, 2, 3, 4, 5, 6, 7, keep=2, keep_every=4)
    assert saved.steps() == [4, 6, 7]


def test_a_saved_step_is_not_saved_again(saved_once):
    saved = checkpoint.Checkpointer(saved_once)
    assert not saved.save(7, on(make_mesh(1, 8), make_state(1)))
    assert_same(restore(saved_once)[0], make_state(7))


def test_another_model_is_an_error_that_lists_the_tensors(saved_once):
    with pytest.raises(checkpoint.MismatchError) as e:
        restore(saved_once, state=make_state(width=128))
    assert 'params/blocks/qkv (expected float32[2, 128, 384], found float32[2, 64, 192])' in str(
        e.value
    )
    assert '\n' not in str(e.value)


def test_a_renamed_tensor_is_an_error_that_lists_both_names(saved_once):
    with pytest.raises(checkpoint.MismatchError) as e:
        restore(saved_once, state=make_state(name='classifier'))
    assert 'params/classifier (expected bfloat16[64, 10], found nothing)' in str(e.value)
    assert 'params/head (expected nothing, found bfloat16[64, 10])' in str(e.value)


def test_other_prng_settings_are_an_error(saved_once):
    jax.config.update('jax_threefry_partitionable', False)
    try:
        with pytest.raises(checkpoint.CheckpointError, match='PRNG settings'):
            restore(saved_once)
    finally:
        jax.config.update('jax_threefry_partitionable', True)


@pytest.mark.parametrize('keep', [1, 2])
def test_a_failed_background_save_raises_at_a_later_step_and_keeps_the_one_before(tmp_path, keep):
    saved = save(tmp_path, 1, keep=keep)
    state = on(make_mesh(1, 8), make_state(2, width=512))
    checksums.of(state)  # compiles
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # like a full disk: EFBIG
    try:
        with pytest.raises(checkpoint.CheckpointError) as e:
            saved.save(2, state)
            deadline = time.monotonic() + 30
            while time.monotonic() < deadline:
                saved.check()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert 'step 2' in str(e.value) and str(tmp_path) in str(e.value)
    assert 'EFBIG' in str(e.value) and 'step 1 is intact' in str(e.value)
    assert '\n' not in str(e.value)
    saved.close()
    assert_same(restore(tmp_path)[0], make_state(1))


def test_a_place_that_cannot_be_written_is_named_with_its_errno(tmp_path):
    (tmp_path / 'file').write_text('')
    saved = checkpoint.Checkpointer(tmp_path / 'file' / 'checkpoints')
    with pytest.raises(checkpoint.CheckpointError, match=r'ENOTDIR'):
        saved.save(1, on(make_mesh(1, 8), make_state(1)))
        saved.wait()


def test_a_checkpointer_must_keep_one():
    with pytest.raises(ValueError, match='checkpoint.keep is 0'):
        checkpoint.Checkpointer('anywhere', keep=0)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int32', 'uint8', 'bool'])
def test_the_checksum_is_the_same_on_host_and_devices_and_under_any_sharding(dtype):
    x = (np.random.default_rng(0).normal(size=(16, 24, 8)) * 100).astype(dtype)
    spread = NamedSharding(make_mesh(2, 4), PartitionSpec('fsdp', None, 'data'))
    sums = checksums.of({'host': x, 'one': jnp.asarray(x), 'eight': jax.device_put(x, spread)})
    assert sums['host'] == sums['one'] == sums['eight']


def test_the_checksum_notices_any_flipped_bit_and_swapped_elements():
    x = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    seen = {checksums.of(x)['']}
    for bit in range(32 * x.size):
        bits = x.copy().view(np.uint32).reshape(-1)
        bits[bit // 32] ^= np.uint32(1 << bit % 32)
        seen.add(checksums.of(bits.view(np.float32).reshape(x.shape))[''])
    seen.add(checksums.of(x[::-1])[''])
    assert len(seen) == 32 * x.size + 2


def test_few_checksums_are_in_flight_at_a_time_or_collectives_of_two_processes_deadlock(
    monkeypatch,
):
    running, most, real = 0, 0, checksums._on_device

    def started(x):
        nonlocal running, most
        running += 1
        most = max(most, running)
        return real(x)

    def waited(tree):
        nonlocal running
        running -= len(tree)

    monkeypatch.setattr(checksums, '_on_device', started)
    monkeypatch.setattr(jax, 'block_until_ready', waited)
    tree = {str(i): jnp.full((), i) for i in range(100)}
    assert list(checksums.of(tree)) == list(trees.named(tree))
    assert running == 0 and 1 < most <= 16  # XLA on CPU blocks at 32 per device


def run_python(code, *args, devices=1, **popen):
    env = dict(
        os.environ,
        JAX_PLATFORMS='cpu',
        PYTHONPATH=f'{REPO}:{REPO / "tests"}:{REPO / "tests/run"}',
        XLA_FLAGS=f'--xla_force_host_platform_device_count={devices}',
    )
    command = [sys.executable, '-c', textwrap.dedent(code), *map(str, args)]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, **popen)


SAVE_FOR_EVER = """
    import sys, jax.numpy as jnp
    from ssl_jax import step as step_lib
    from ssl_jax.run import checkpoint
    saved = checkpoint.Checkpointer(sys.argv[1])
    zero = jnp.zeros((), jnp.int32)
    for step in range(1, 10**6):
        params = {'w': jnp.full((512, 512, 8), step, jnp.float32) + jnp.arange(8) / 8}
        saved.save(step, step_lib.TrainState(zero + step, params, params, {}, zero))
        print(step, flush=True)
"""


@pytest.mark.parametrize('instant', ['as files appear', 'as it is committed'])
def test_after_a_kill_in_the_middle_of_a_save_the_newest_checkpoint_is_whole(tmp_path, instant):
    child = run_python(SAVE_FOR_EVER, tmp_path)
    while int(child.stdout.readline()) < 3:
        pass
    before = set(checkpoint.steps(tmp_path))
    if instant == 'as files appear':
        while not any(tmp_path.glob('*.orbax-checkpoint-tmp/model/**/d/*')):
            assert child.poll() is None
    if instant == 'as it is committed':
        while set(checkpoint.steps(tmp_path)) <= before:
            assert child.poll() is None
    child.send_signal(signal.SIGKILL)
    child.communicate()
    model, meta = checkpoint.restore_model(tmp_path)
    assert meta['step'] >= 2
    want = np.full((512, 512, 8), meta['step'], np.float32) + np.arange(8, dtype=np.float32) / 8
    np.testing.assert_array_equal(model['params']['w'], want)


TWO_PROCESSES = """
    import sys, jax, numpy as np
    from jax.experimental import multihost_utils
    port, rank, directory = sys.argv[1:]
    jax.distributed.initialize(f'localhost:{port}', 2, int(rank), initialization_timeout=60)
    import test_checkpoint as t
    from ssl_jax.run import checkpoint
    mesh, want = t.make_mesh(2, 2), t.make_state(1)
    put = lambda x, s: jax.make_array_from_callback(x.shape, s, lambda index: x[index])
    saved = checkpoint.Checkpointer(directory)
    for step in (1, 2):
        saved.save(step, jax.tree.map(put, t.make_state(step), t.shardings(want, mesh)))
    saved.wait()
    if rank == '0':
        t.truncate(t.pathlib.Path(directory) / '2')
    multihost_utils.sync_global_devices('damaged')
    state, meta = saved.restore(t.abstract(want, mesh))
    assert meta['step'] == 1 and meta['processes'] == 2, meta
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(want)):
        for shard in x.addressable_shards:
            assert np.array_equal(shard.data, y[shard.index])
    saved.save(2, state)
    saved.close()
    print('done', saved.steps(), flush=True)
"""


def test_two_processes_save_fall_back_together_and_one_process_reads_it(tmp_path):
    with socket.socket() as s:
        s.bind(('localhost', 0))
        port = s.getsockname()[1]
    children = [
        run_python(TWO_PROCESSES, port, rank, tmp_path, devices=2, stderr=subprocess.PIPE)
        for rank in range(2)
    ]
    try:
        for child in children:
            out, err = child.communicate(timeout=90)
            assert 'done [1, 2]' in out, err[-3000:]
    finally:
        for child in children:
            child.kill()
    assert_same(restore(tmp_path)[0], make_state(1))
    assert json.loads((tmp_path / '2' / 'meta' / 'metadata').read_text())['devices'] == 4


def test_a_relative_directory_is_saved_and_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = make_state()
    saved = checkpoint.Checkpointer('run/checkpoints')
    saved.save(3, state)
    saved.close()
    model, meta = checkpoint.restore_model('run')
    assert meta['step'] == 3
    np.testing.assert_array_equal(model['params']['norm'], state.params['norm'])
    assert (tmp_path / 'run' / 'checkpoints' / '3').is_dir()
