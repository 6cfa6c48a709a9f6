# SPDX-License-Identifier: Apache-2.0
"""Unreadable is not damaged, on disks as in buckets."""

import errno
import os

import pytest

import states
from ssl_jax.run import checkpoint, errors, patience, storage

pytestmark = pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
PROOF = [
    FileNotFoundError(errno.ENOENT, 'gone', 'a'),
    NotADirectoryError(errno.ENOTDIR, 'a file', 'a'),
    ValueError('OUT_OF_RANGE: Requested byte range [136736, 182272) is not valid'),
    ValueError('NOT_FOUND: Error reading "a": [os_error_code=\'2\']'),
    ValueError("NOT_FOUND: no such object [http_response_code='404']"),
    ValueError('DATA_LOSS: corrupt'),
    KeyError('model'),
    RuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.'),
]
PASSING = [
    OSError(errno.EIO, 'Input/output error'),
    OSError(errno.ESTALE, 'Stale file handle'),
    OSError(errno.EMFILE, 'Too many open files'),
    TimeoutError('timed out'),
    ConnectionResetError(errno.ECONNRESET, 'reset'),
    ValueError('INTERNAL: Error reading "a": [os_error_code=\'5\']'),
    ValueError("ABORTED: All 32 retry attempts failed: no [http_response_code='503']"),
    ValueError("ABORTED: All 32 retry attempts failed: CURL error Timeout [curl_code='28']"),
    ValueError("needs a project to bill [http_response_code='400']"),
    ValueError('UNAVAILABLE: no connection'),
]
REFUSED = [
    PermissionError(errno.EACCES, 'Permission denied'),
    ValueError('PERMISSION_DENIED: Error opening "a" [os_error_code=\'13\']'),
    ValueError("PERMISSION_DENIED: no [http_response_code='403']"),
    ValueError("PERMISSION_DENIED: no [http_response_code='401']"),
    ValueError('UNAUTHENTICATED: no'),
]


@pytest.mark.parametrize('wrapped', [False, True])
def test_only_what_says_that_data_is_absent_or_wrong_proves_damage(wrapped):
    def found(error):
        if wrapped:
            outer = KeyError('in a library')
            outer.__cause__ = error
            return patience._seconds_for(outer)
        return patience._seconds_for(error)

    assert [found(e) for e in PROOF] == [0] * len(PROOF)
    assert [found(e) for e in PASSING] == [patience.SECONDS] * len(PASSING)
    assert [found(e) for e in REFUSED] == [patience.REFUSED] * len(REFUSED)


def test_what_passes_is_tried_again_and_other_errors_are_raised_at_once(monkeypatch):
    monkeypatch.setenv('SSL_JAX_BUCKET_PATIENCE', '1')
    left = [OSError(errno.EIO, 'no')] * 3

    def call():
        if left:
            raise left.pop()
        return 5

    assert patience.patiently('a', call, 'wait') == 5
    left.append(KeyError('b'))
    with pytest.raises(KeyError):
        patience.patiently('a', call, 'wait')
    left.append(errors.UserError('another model'))
    with pytest.raises(errors.UserError, match='another model'):
        patience.patiently('a', call, 'wait')


@pytest.mark.parametrize('outer', [errors.UserError('bad'), OSError(errno.EIO, 'bad')])
def test_an_error_that_is_being_handled_tells_nothing_of_those_that_follow(tmp_path, outer):
    """A run that ends with an error saves first."""
    try:
        raise outer
    except (errors.UserError, OSError):
        assert checkpoint.steps(tmp_path / 'absent') == []
        states.save(tmp_path, 1, 2)
        (tmp_path / '2' / 'meta' / 'metadata').write_text('{')
        assert states.restore(tmp_path)[1]['step'] == 1
        (tmp_path / 'file').write_text('')
        with pytest.raises(checkpoint.CheckpointError, match='ENOTDIR.*make room'):
            states.save(tmp_path / 'file' / 'checkpoints', 1)


@pytest.fixture
def pair(tmp_path, monkeypatch):
    monkeypatch.setenv('SSL_JAX_BUCKET_PATIENCE', '0.2')
    states.save(tmp_path, 1, 2)
    return tmp_path


def a_loop(folder, monkeypatch):
    """A chunk that is a symbolic link to itself: ELOOP, also for root."""
    chunk = max((folder / '2' / 'opt').rglob('d/*'), key=lambda p: p.stat().st_size)
    chunk.rename(chunk.with_name('x'))
    chunk.symlink_to(chunk)


def a_loop_of_orbax(folder, monkeypatch):
    """The same for a file of which Orbax asks whether it exists, and is told no."""
    (folder / '2' / 'model' / '_METADATA').rename(folder / '2' / 'model' / 'x')
    (folder / '2' / 'model' / '_METADATA').symlink_to('_METADATA')


def no_listing(folder, monkeypatch):
    real = os.listdir

    def listdir(path='.'):
        if os.fspath(path).endswith('/2'):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)
        return real(path)

    monkeypatch.setattr(os, 'listdir', listdir)


def no_meta(folder, monkeypatch):
    (folder / '2' / 'meta' / 'metadata').rename(folder / '2' / 'meta' / 'x')
    (folder / '2' / 'meta' / 'metadata').symlink_to('metadata')


@pytest.mark.parametrize('fault', [a_loop, a_loop_of_orbax, no_listing, no_meta])
def test_a_disk_that_does_not_answer_ends_the_run_and_nothing_is_lost(
    pair, monkeypatch, capsys, fault
):
    with monkeypatch.context() as patch:
        fault(pair, patch)
        with pytest.raises(patience.Unavailable, match=r'/2.* cannot be read: .*\(errno') as e:
            checkpoint.restore_model(pair) if fault is a_loop_of_orbax else states.restore(pair)
    assert '\n' not in str(e.value) and 'damaged' not in capsys.readouterr().out
    assert {p.name for p in pair.iterdir()} == {'1', '2'}


def test_a_disk_that_answers_again_is_read(pair, monkeypatch):
    real, left = storage.read, [0] * 3

    def read(path):
        if left:
            left.pop()
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path)

    monkeypatch.setenv('SSL_JAX_BUCKET_PATIENCE', '5')
    monkeypatch.setattr(storage, 'read', read)
    state, meta = states.restore(pair)
    assert meta['step'] == 2 and not left
    states.assert_same(state, states.make_state(2))
