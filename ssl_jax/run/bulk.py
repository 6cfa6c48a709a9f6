# SPDX-License-Identifier: Apache-2.0
"""Objects of a bucket for many threads: TensorStore's client, which works outside the GIL.

All requests of gcsfs share one Python thread, which waits for its turn among the threads that
decode. TensorStore takes half of the CPU time per object (`experiments/bench/bucket_read.py`).
"""

import functools

import tensorstore as ts

from ssl_jax.run import bucket, errors, patience

STALLED = 120.0  # seconds without an answer until a request is sent anew


def read(path: str, start: int = 0, size: int | None = None, stamp: str = '') -> bytes:
    """The content of an object, or `size` bytes of it, in one request; an outage is waited for.

    Args:
      path: of the object.
      start, size: in bytes.
      stamp: of an object of gs:// as `bucket.stat` has it, which must not have changed.

    Raises:
      FileNotFoundError: it is absent.
      UserError: the bucket did not answer, or refused, for longer than the patience; or the object
        has another stamp by now.
    """
    if size == 0:
        return b''
    if bucket.scheme(path) != 'gs':
        return bucket.read(path, size, start)
    part = None if size is None else slice(start, start + size)
    found = patience.patiently(path, lambda: _read(path, part), 'start again when it answers')
    # TensorStore has the generation in these bytes, behind one of its own.
    if stamp and int(stamp).to_bytes(8, 'little') not in found.stamp.generation:
        raise errors.UserError(f'{path} was written anew while it is read: start again.')
    return found.value


def _read(path, part):
    name, _, key = path.partition('://')[2].partition('/')
    future = _store(name).read(key, byte_range=part)
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
    return found


@functools.cache
def _store(name):
    # As many requests as threads ask for; and `patience` tries again.
    context = {'gcs_request_concurrency': {'limit': 1024}}
    context['gcs_request_retries'] = {'max_retries': 1, 'initial_delay': '10ms'}
    return ts.KvStore.open({'driver': 'gcs', 'bucket': name}, context=ts.Context(context)).result()
