# SPDX-License-Identifier: Apache-2.0
"""Small files come to a bucket behind the back of the run, which never waits for long."""

import time

import pytest

from ssl_jax.run import storage, uploads


@pytest.fixture(autouse=True)
def queue(monkeypatch):
    """A queue of this test alone, which writes when it is told to."""
    monkeypatch.setattr(uploads, '_queue', uploads._Queue())


def test_a_file_on_a_disk_is_there_at_once(tmp_path):
    uploads.put(tmp_path / 'a' / 'f', b'1')
    uploads.put(str(tmp_path / 'g'), lambda: b'2')
    assert (tmp_path / 'a' / 'f').read_bytes() == b'1' and (tmp_path / 'g').read_bytes() == b'2'
    uploads.put(tmp_path / 'g', None)
    uploads.put(tmp_path / 'g', None)
    assert not (tmp_path / 'g').exists()


def test_only_the_newest_content_is_written(bucket):
    for i in range(50):
        uploads.put(f'{bucket.root}/f', b'%d' % i)
    assert not bucket.requests()
    assert uploads.flush()
    assert bucket.requests() == {'POST upload': 1}
    assert storage.read(f'{bucket.root}/f') == b'49'


def test_what_changes_is_written_now_and_then(bucket, monkeypatch):
    monkeypatch.setattr(uploads, 'SECONDS', 0.05)
    uploads.put(f'{bucket.root}/f', b'1')
    end = time.monotonic() + 20
    while not storage.exists(f'{bucket.root}/f'):
        assert time.monotonic() < end


def test_files_are_written_in_order_and_deleted_too(bucket):
    uploads.put(f'{bucket.root}/old', b'1')
    assert uploads.flush()
    bucket.fault(status=503, match='/new')
    uploads.put(f'{bucket.root}/old', b'2')
    uploads.put(f'{bucket.root}/new', b'3')
    uploads.put(f'{bucket.root}/old', None)
    assert not uploads.flush(0.5)
    assert storage.read(f'{bucket.root}/old') == b'1'  # it goes when the new one is there
    bucket.heal()
    assert uploads.flush(20)
    assert storage.names(bucket.root) == ['new']


@pytest.mark.parametrize('rules', [{'status': 503}, {'status': 403}, {'hang': 1}, {'drop': 1}])
def test_an_outage_costs_the_run_one_short_wait(bucket, rules, monkeypatch):
    monkeypatch.setattr(uploads, 'FLUSH_SECONDS', 0.3)
    bucket.fault(**rules)
    began = time.monotonic()
    for i in range(100):
        uploads.put(f'{bucket.root}/f', b'%d' % i)
        uploads.flush(0.3)
    assert time.monotonic() - began < 3
    bucket.heal()
    assert uploads.flush(20)
    assert storage.read(f'{bucket.root}/f') == b'99'


def test_one_file_that_cannot_be_written_holds_up_no_other(bucket, monkeypatch):
    monkeypatch.setenv('SSL_JAX_BUCKET_PATIENCE', '0.1')
    bucket.fault(status=403, match='/kept')
    uploads.put(f'{bucket.root}/kept', b'1')
    uploads.put(f'{bucket.root}/f', b'2')
    assert not uploads.flush(20)
    assert storage.names(bucket.root) == ['f']


def test_a_file_whose_content_is_gone_holds_up_no_other(bucket, tmp_path, capfd):
    uploads.put(f'{bucket.root}/f', (tmp_path / 'absent').read_bytes)
    uploads.put(f'{bucket.root}/g', b'2')
    assert uploads.flush(20)
    assert storage.names(bucket.root) == ['g']
    assert f'{bucket.root}/f is not written' in capfd.readouterr().err


def test_an_outage_and_its_end_are_said_once(bucket, capfd, monkeypatch):
    monkeypatch.setenv('SSL_JAX_BUCKET_PATIENCE', '0.1')
    bucket.fault(status=503)
    for i in range(3):
        uploads.put(f'{bucket.root}/f', b'%d' % i)
        assert not uploads.flush(20)
    bucket.heal()
    assert uploads.flush(20)
    said = [line for line in capfd.readouterr().err.splitlines() if 'trying again' not in line]
    assert len(said) == 2, said
    assert said[0].startswith(f'{bucket.root}/f: the bucket does not answer (')
    assert 'the run goes on' in said[0]
    assert said[1] == 'What could not be written to the bucket is there now.'


def test_at_the_end_of_a_run_what_is_missing_is_named(bucket, capfd, monkeypatch):
    monkeypatch.setattr(uploads, 'CLOSE_SECONDS', 0.3)
    bucket.fault(hang=1)
    uploads.put(f'{bucket.root}/f', b'1')
    uploads.put(f'{bucket.root}/g', b'1')
    uploads.close()
    assert f'{bucket.root}/f and 1 more could not be written' in capfd.readouterr().err
    bucket.heal()
    uploads.put(f'{bucket.root}/h', b'1')  # of the next run
    assert uploads.flush(20)


def test_nothing_is_written_into_a_workdir_that_was_taken_over(bucket):
    uploads.put(f'{bucket.root}/a/f', b'1')
    uploads.forbid(f'{bucket.root}/a')
    for name in ('a/f', 'a/g', 'ab/f'):
        uploads.put(f'{bucket.root}/{name}', b'2')
    assert uploads.flush()
    assert storage.names(bucket.root) == ['ab']
    uploads.allow(f'{bucket.root}/a')
    uploads.put(f'{bucket.root}/a/f', b'3')
    assert uploads.flush()
    assert storage.read(f'{bucket.root}/a/f') == b'3'
