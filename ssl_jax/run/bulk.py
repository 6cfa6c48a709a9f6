# SPDX-License-Identifier: Apache-2.0
"""Whole objects of a bucket for many threads: TensorStore's client, which works outside the GIL.

All requests of gcsfs share one Python thread, which waits for its turn among the threads that
decode. TensorStore takes half of the CPU time per object (`experiments/bench/bucket_read.py`).
"""

import functools

import tensorstore as ts

from ssl_jax.run import bucket, patience

STALLED = 120.0  # seconds without an answer until a request is sent anew


def read(path: str) -> bytes:
    """The content of an object, in one request; an outage is waited for.

    Raises:
      FileNotFoundError: it is absent.
      UserError: the bucket did not answer, or refused, for longer than the patience.
    """
    if bucket.scheme(path) != 'gs':
        return bucket.read(path)
    name, _, key = path.partition('://')[2].partition('/')
    return patience.patiently(path, lambda: _read(path, name, key), 'start again when it answers')


def _read(path, name, key):
    future = _store(name).read(key)
    try:
        found = future.result(timeout=min(STALLED, patience.seconds()))
    except TimeoutError:
        future.cancel()
        raise TimeoutError('the bucket does not answer') from None
    except ValueError as error:
        if patience.passes(error):
            raise
        raise FileNotFoundError(f'{path}: {error}') from error  # no name that an object can have
    if found.state == 'missing':
        raise FileNotFoundError(f'{path} does not exist')
    return found.value


@functools.cache
def _store(name):
    # As many requests as threads ask for; and `patience` tries again.
    context = {'gcs_request_concurrency': {'limit': 1024}}
    context['gcs_request_retries'] = {'max_retries': 1, 'initial_delay': '10ms'}
    return ts.KvStore.open({'driver': 'gcs', 'bucket': name}, context=ts.Context(context)).result()
