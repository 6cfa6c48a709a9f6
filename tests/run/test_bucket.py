# SPDX-License-Identifier: Apache-2.0
"""Tests for ssl_jax.run.bucket and ssl_jax.run.gcs, on a server on loopback."""

import concurrent.futures

import pytest
from etils import epath

from ssl_jax.run import bucket as bucket_lib
from ssl_jax.run import errors, gcs


@pytest.fixture
def folder(bucket):
    bucket_lib.write(f'{bucket.root}/a/b.txt', b'hello')
    bucket_lib.write(f'{bucket.root}/c.txt', b'')
    bucket.requests()
    return bucket.root


def test_a_read_is_one_request(bucket, folder):
    assert bucket_lib.read(f'{folder}/a/b.txt') == b'hello'
    assert bucket_lib.read(f'{folder}/a/b.txt', 2) == b'he'
    assert bucket.requests() == {'GET media': 2}


def test_an_absent_object_is_not_found_at_once(folder):
    with pytest.raises(FileNotFoundError):
        bucket_lib.read(f'{folder}/d.txt')
    assert not bucket_lib.exists(f'{folder}/d.txt')
    bucket_lib.remove(f'{folder}/d.txt')


def test_a_listing_has_names_and_sizes_in_one_request(bucket, folder):
    found = list(bucket_lib.walk(folder))
    assert [(o.name, o.size) for o in found] == [('a/b.txt', 5), ('c.txt', 0)]
    assert all(o.stamp for o in found)
    assert bucket.requests() == {'GET list': 1}
    assert bucket_lib.names(folder) == ['a', 'c.txt']


def test_only_one_of_many_creates_an_object(bucket):
    path = f'{bucket.root}/lock'
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        stamps = list(pool.map(lambda i: bucket_lib.swap(path, b'%d' % i, ''), range(8)))
    winners = [i for i, stamp in enumerate(stamps) if stamp]
    assert len(winners) == 1 and bucket_lib.read(path) == b'%d' % winners[0]


@pytest.mark.parametrize('rules', [{'status': 503}, {'status': 429}, {'drop': 1}, {'status': 403}])
def test_a_short_fault_is_waited_for(bucket, folder, rules):
    bucket.fault(count=1, **rules)
    assert bucket_lib.read(f'{folder}/a/b.txt') == b'hello'


def test_an_answer_that_breaks_off_is_read_again(bucket, folder):
    bucket.fault(count=1, drop=1, body=1)
    assert bucket_lib.read(f'{folder}/a/b.txt') == b'hello'


@pytest.mark.parametrize(
    'rules, reason',
    [
        ({'status': 503}, 'does not answer'),
        ({'status': 403}, 'forbidden'),
        ({'status': 401}, 'valid'),
    ],
)
def test_a_long_fault_is_no_absence(bucket, folder, monkeypatch, rules, reason):
    monkeypatch.setenv('SSL_JAX_BUCKET_PATIENCE', '0.1')
    bucket.fault(**rules)
    for call in (bucket_lib.read, bucket_lib.exists, lambda p: epath.Path(p).is_dir()):
        with pytest.raises(gcs.Unavailable, match=reason) as caught:
            call(f'{folder}/a/b.txt')
        assert '\n' not in str(caught.value)


def test_the_paths_of_etils_wait_too(bucket, folder):
    bucket.fault(count=2, status=503)
    assert epath.Path(f'{folder}/a/b.txt').read_text() == 'hello'


def test_what_another_process_wrote_is_seen(bucket, folder):
    assert {p.name for p in epath.Path(folder).iterdir()} == {'a', 'c.txt'}
    other = gcs.GCSFileSystem(skip_instance_cache=True, token='anon')
    other.pipe_file(f'{folder}/new.txt', b'x')
    assert {p.name for p in epath.Path(folder).iterdir()} == {'a', 'c.txt', 'new.txt'}


def test_a_missing_bucket_is_named(bucket):
    with pytest.raises(errors.UserError, match="there is no bucket 'nowhere'"):
        bucket_lib.require('gs://nowhere/run')
    bucket_lib.require(bucket.root)


@pytest.mark.parametrize(
    'path, hint',
    [
        ('gs:/bucket/run', 'gs://bucket/run'),
        ('gs:bucket/run', 'gs://bucket/run'),
        ('GS://bucket/run', 'gs://bucket/run'),
        ('gs:///bucket/run', 'gs://bucket/run'),
        ('s3:/bucket', 's3://bucket'),
        ('gs://', 'gs://BUCKET/FOLDER'),
        ('az://bucket', 'not supported'),
    ],
)
def test_a_wrong_scheme_is_said(path, hint):
    with pytest.raises(errors.UserError, match=hint):
        bucket_lib.scheme(path)


@pytest.mark.parametrize(
    'path, scheme',
    [('gs://b/a', 'gs'), ('s3://b', 's3'), ('runs/a', ''), ('a:b', ''), ('C:/a', '')],
)
def test_the_scheme_of_a_path(path, scheme):
    assert bucket_lib.scheme(path) == scheme
