# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in a bucket: outages are waited out, nothing good goes, nothing half counts."""

import threading

import numpy as np
import pytest

import states
from ssl_jax.run import bucket as bucket_lib
from ssl_jax.run import checkpoint, errors, patience

pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
COMMIT = 'commit_success.txt'
OUTAGES = {
    '503': dict(status=503),
    '429': dict(status=429),
    '403': dict(status=403),
    '401': dict(status=401),
    'stalled': dict(hang=1),
    'lost connection': dict(drop=1),
    'half an answer': dict(drop=1, body=1),
}


@pytest.fixture
def root(bucket):
    return f'{bucket.root}/checkpoints'


@pytest.fixture(scope='module')
def pair():
    """Where the steps 1 and 2 lie that tests only read: saved once."""
    return []


@pytest.fixture
def saved(bucket, root, pair):
    """A folder with the steps 1 and 2, to be read only."""
    if not pair:
        states.save(root, 1, 2)
        pair.append(root)
    bucket.requests()
    return pair[0]


def heals(bucket, seconds, **rules):
    """Sets a fault that ends after `seconds`."""
    bucket.fault(**rules)
    threading.Timer(seconds, bucket.heal).start()


def objects(root):
    return [(o.name, o.stamp) for o in bucket_lib.walk(root)]


def saver(root, **kwargs):
    return checkpoint.Checkpointer(root, **kwargs)


def state(step):
    return states.on(states.make_mesh(1, 8), states.make_state(step))


def save(root, *steps, **kwargs):
    return states.save(root, *steps, **kwargs)


def restored(root):
    return saver(root).restore(states.abstract(states.make_state(), states.make_mesh(1, 8)))


def assert_holds(root, step):
    got, meta = restored(root)
    assert meta['step'] == step
    states.assert_same(got, states.make_state(step))


# Reading


@pytest.mark.parametrize('kind', OUTAGES)
def test_an_outage_while_restoring_is_waited_out(bucket, saved, kind, capsys):
    heals(bucket, 0.5, **OUTAGES[kind])
    assert_holds(saved, 2)
    assert 'damaged' not in capsys.readouterr().out


@pytest.mark.parametrize(
    'kind, part',
    [
        ('403', 'prefix=.*/2/'),  # the listing that says what is committed
        ('503', '/2/meta/metadata'),
        ('503', '/2/model/_METADATA'),
        ('403', '/2/(model|opt)/manifest'),
        ('401', '/2/(model|opt)/ocdbt.process_0/d/'),
    ],
)
def test_what_cannot_be_read_is_not_damaged_and_ends_the_run(
    bucket, saved, monkeypatch, kind, part, capsys
):
    monkeypatch.setenv('SSL_JAX_BUCKET_PATIENCE', '0.2')
    before = objects(saved)
    bucket.fault(match=part, **OUTAGES[kind])
    with pytest.raises(patience.Unavailable, match=r'gs://') as caught:
        restored(saved)
    assert '\n' not in str(caught.value) and 'damaged:' not in capsys.readouterr().out
    if kind != '503':
        assert kind in str(caught.value)
    if part in ('prefix=.*/2/', '/2/meta/metadata'):
        with pytest.raises(patience.Unavailable):  # not the config of step 1
            checkpoint.newest_meta(saved)
    bucket.heal()
    assert objects(saved) == before
    assert_holds(saved, 2)


def test_reading_takes_few_requests(bucket, saved):
    run = saved.rpartition('/')[0]
    reads = {
        'steps': lambda: checkpoint.steps(saved),
        'latest': lambda: saver(saved).latest(),
        'meta': lambda: checkpoint.read_meta(run),
        'model': lambda: checkpoint.restore_model(run),
        'restore': lambda: restored(saved),
    }
    most = {'steps': 3, 'latest': 3, 'meta': 5, 'model': 45, 'restore': 70}
    counts = {}
    for name, read in reads.items():
        read()
        counts[name] = bucket.requests().total()
    assert {name: n for name, n in counts.items() if n > most[name]} == {}, counts


@pytest.mark.parametrize('path', ['', '/checkpoints', '/checkpoints/2'])
def test_the_model_and_its_meta_are_read_from_any_of_its_folders(saved, path):
    path = saved.removesuffix('/checkpoints') + path
    model, meta = checkpoint.restore_model(path)
    assert meta['step'] == 2 == checkpoint.read_meta(path)['step']
    np.testing.assert_array_equal(model['params']['norm'], states.make_state(2).params['norm'])


# Damage


def largest(root, step, item='opt'):
    found = [o for o in bucket_lib.walk(f'{root}/{step}') if o.name.startswith(item)]
    return f'{root}/{step}/{max(found, key=lambda o: o.size).name}'


def truncate(root, step):
    path = largest(root, step)
    data = bucket_lib.read(path)
    bucket_lib.write(path, data[: len(data) // 2])


DAMAGE = {
    'truncated chunk': truncate,
    'missing chunk': lambda root, step: bucket_lib.remove(largest(root, step)),
    'cut meta': lambda root, step: bucket_lib.write(f'{root}/{step}/meta/metadata', b'{"step"'),
}


@pytest.mark.parametrize('kind', DAMAGE)
def test_a_damaged_checkpoint_is_set_aside_with_all_its_objects(root, kind, capsys):
    save(root, 1, 2)
    DAMAGE[kind](root, 2)
    inside = [o.name for o in bucket_lib.walk(f'{root}/2')]
    again = saver(root, keep=1)
    _, meta = again.restore(states.abstract(states.make_state(), states.make_mesh(1, 8)))
    assert meta['step'] == 1 and f'{root}/2 is damaged' in capsys.readouterr().out
    assert again.save(2, state(5))  # the same number
    again.close()
    assert bucket_lib.names(root) == ['2', '2.damaged']
    assert [o.name for o in bucket_lib.walk(f'{root}/2.damaged')] == inside
    got, _ = restored(root)
    states.assert_same(got, states.make_state(5))


# Saving


@pytest.mark.parametrize(
    'rules',
    [
        dict(status=503),
        dict(status=403, methods='GET,DELETE', match='checkpoints/2$|prefix='),
        dict(hang=1),
        dict(drop=1, match='upload'),
        dict(status=503, match=COMMIT),
    ],
    ids=['503', '403 of folders', 'stalled', 'lost uploads', '503 at the commit'],
)
def test_an_outage_while_saving_is_waited_out(bucket, root, rules):
    one = saver(root)
    one.save(1, state(1))
    one.wait()
    heals(bucket, 0.7, **rules)
    one.save(2, state(2))
    one.close()
    assert_holds(root, 2)
    assert checkpoint.steps(root) == [1, 2]


@pytest.mark.parametrize(
    'rules, reason',
    [
        (dict(status=503, match='/2/meta'), 'does not answer .*once the bucket answers'),
        (dict(status=403, match='/2/opt/.*/d/'), '403 .*once the bucket answers'),
        (dict(status=503, match=f'checkpoints/2/{COMMIT}'), 'does not answer'),
        (dict(status=404, match='upload'), 'No such file .*gs:.*another place'),
    ],
    ids=['503 of the meta', '403 of a chunk', '503 at the commit', 'no such bucket'],
)
def test_a_longer_outage_ends_the_run_and_the_checkpoint_before_is_intact(
    bucket, root, monkeypatch, capfd, rules, reason
):
    save(root, 1)
    monkeypatch.setenv('SSL_JAX_BUCKET_PATIENCE', '0.3')
    one = saver(root, keep=1)
    bucket.fault(**rules)
    with pytest.raises(checkpoint.CheckpointError, match=reason) as caught:
        one.save(2, state(2))
        one.wait()
    one.close()
    bucket.heal()
    assert 'step 1 is intact' in str(caught.value) and '\n' not in str(caught.value)
    assert len(capfd.readouterr().err.splitlines()) < 5
    assert_holds(root, 1)
    save(root, 2, keep=1)  # the same command again
    assert bucket_lib.names(root) == ['2']
    assert_holds(root, 2)


def test_a_save_takes_few_requests_and_none_lists_all_objects(bucket, root):
    one = saver(root)
    one.save(1, state(1))
    one.save(2, state(2))
    one.wait()
    bucket.requests()
    one.save(3, state(3))
    one.wait()
    found = bucket.requests()
    assert found.total() < 170, found
    assert found['GET list'] < 35, found
    one.close()


# What is left over


def test_what_killed_saves_left_goes_at_the_first_save_and_nothing_committed(bucket, root):
    save(root, 1, 2)
    for name in ('3/model/d/a', '7/_CHECKPOINT_METADATA', '9.orbax-checkpoint-tmp/opt/d/b'):
        bucket_lib.write(f'{root}/{name}', b'x')
    bucket_lib.remove(f'{root}/1/{COMMIT}')  # of a killed deletion
    bucket_lib.write(f'{root}/8.damaged/model/d/a', b'x')
    before = objects(root)
    again = saver(root)
    assert again.latest() == 2
    restored(root)
    assert objects(root) == before  # a reader deletes nothing
    again.save(4, state(4))
    again.close()
    assert bucket_lib.names(root) == ['2', '4', '8.damaged']


def test_a_deletion_that_is_cut_off_leaves_no_half_checkpoint(bucket, root, capfd, monkeypatch):
    monkeypatch.setenv('SSL_JAX_BUCKET_PATIENCE', '0.2')
    save(root, 1)
    bucket.fault(status=403, methods='DELETE', match='checkpoints/1/(model|opt)')
    save(root, 2, keep=1)
    bucket.heal()
    assert checkpoint.steps(root) == [2] and '1' in bucket_lib.names(root)
    assert f'{root}/1 is not deleted' in capfd.readouterr().err
    save(root, 3, keep=1)
    assert bucket_lib.names(root) == ['3']


def test_checkpoints_that_cannot_be_deleted_stop_nothing_and_go_later(bucket, root, monkeypatch):
    monkeypatch.setenv('SSL_JAX_BUCKET_PATIENCE', '0.2')
    one = saver(root, keep=1)
    one.save(1, state(1))
    one.wait()
    whole = objects(f'{root}/1')
    bucket.fault(status=403, methods='DELETE', match=f'checkpoints/1/{COMMIT}')
    one.save(2, state(2))
    one.wait()
    assert checkpoint.steps(root) == [1, 2]
    assert objects(f'{root}/1') == whole  # as the commit goes first
    bucket.heal()
    one.save(3, state(3))
    one.close()
    assert bucket_lib.names(root) == ['3']


def test_the_newest_and_every_nth_are_kept(root):
    save(root, 2, 3, 4, keep=1, keep_every=2)
    assert bucket_lib.names(root) == ['2', '4']


def test_a_bucket_that_orbax_cannot_write_to_is_refused():
    with pytest.raises(errors.UserError, match='on disks and on gs:// only'):
        saver('s3://bucket/run/checkpoints')
