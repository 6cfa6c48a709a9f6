# SPDX-License-Identifier: Apache-2.0
"""gcsfs with patience: the file system behind ``gs://``, for our own calls and for Orbax's.

`bucket` registers it with fsspec, so everything that goes through etils or fsspec uses it. Against
gcsfs itself (2026.10):

- It tries again for minutes instead of half a minute, says so once, and says when the bucket is
  back.
- An outage is an `Unavailable`, which is no OSError: what takes an OSError for an absent or damaged
  file (``isdir`` does) must not take an outage for one.
- Listings are not cached: two processes that write into one folder would not see each other.
"""

import asyncio
import logging
import os
import random
import re
import time

# Read when gcsfs is imported: its gRPC client, for zonal buckets, first asks what a bucket is.
os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')

import aiohttp  # noqa: E402
import gcsfs.core  # noqa: E402
import gcsfs.retry  # noqa: E402
import google.auth.exceptions  # noqa: E402

from ssl_jax.run import errors, launch  # noqa: E402

PATIENCE = 600.0  # seconds of tries during an outage; SSL_JAX_BUCKET_PATIENCE in the environment
REFUSED = 60.0  # seconds of tries after 401 and 403, which new rights and credentials take to end
WAIT = 1.0, 30.0  # seconds between tries, doubled from the first to the last
SAID = 5.0  # seconds of an outage before a line
# Without an answer for this long a request is sent anew; uploads have at most 50 MB.
TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=120)
LOGIN = 'log in (gcloud auth application-default login) or give this machine a service account'


class Unavailable(errors.UserError):
    """A bucket did not answer, or refused, for longer than `PATIENCE`."""


if not os.environ.get('GCSFS_DEBUG'):  # it logs tracebacks of what is said here in a sentence
    logging.getLogger('gcsfs').setLevel(logging.CRITICAL)


def patience() -> float:
    """Seconds of tries during an outage."""
    return float(os.environ.get('SSL_JAX_BUCKET_PATIENCE', PATIENCE))


class GCSFileSystem(gcsfs.core.GCSFileSystem):
    """gcsfs; see the module."""

    def __init__(self, *args, **kwargs):
        kwargs = {'use_listings_cache': False, 'requests_timeout': TIMEOUT, **kwargs}
        super().__init__(*args, **kwargs)

    async def _request(self, method, path, *args, **kwargs):
        start, wait, said = time.monotonic(), min(WAIT[0], patience() / 20), False
        once = gcsfs.core.GCSFileSystem._request.__wrapped__  # without its own retries
        while True:
            try:
                found = await once(self, method, path, *args, **kwargs)
            except Exception as error:
                seconds, reason = _tries(error)
                if not seconds:
                    raise
                where = _where(path, args, kwargs)
                passed = time.monotonic() - start
                if passed >= seconds:
                    raise Unavailable(f'{where}: {reason}.') from error
                if passed >= min(SAID, seconds / 2) and not said:
                    said = True
                    launch.say(f'{where}: {reason}; trying again for {seconds:.0f} s.')
                await asyncio.sleep(
                    min(wait * (0.5 + random.random()), start + seconds - time.monotonic() + 0.01)
                )
                wait = min(2 * wait, WAIT[1])
            else:
                if said:
                    launch.say(f'The bucket answers again, after {time.monotonic() - start:.0f} s.')
                return found


def _where(path, args, kwargs):
    """What a request is for, as a path."""
    if args:
        return '/'.join(['gs:/', *map(str, args)])
    found = re.search(r'/b/([^/]+)/o', path)  # of an upload
    return '/'.join(filter(None, ['gs:/', found[1], kwargs.get('name')])) if found else path


def _tries(error):
    """(seconds to try again after `error`, 0 if that cannot help; the reason as a sentence)."""
    if isinstance(error, google.auth.exceptions.DefaultCredentialsError):
        return 1e-9, f'there are no credentials ({_short(error)}); {LOGIN}'
    code = getattr(error, 'code', None)
    code = int(code) if str(code).isdecimal() else None
    if isinstance(error, OSError) and str(error).startswith('Forbidden'):
        return min(REFUSED, patience()), f'access is forbidden (403: {_short(error)}); {LOGIN}'
    if code == 401:
        return min(
            REFUSED, patience()
        ), f'the credentials are not valid (401: {_short(error)}); {LOGIN}'
    if isinstance(error, google.auth.exceptions.RefreshError):
        return min(
            REFUSED, patience()
        ), f'the credentials cannot be renewed ({_short(error)}); {LOGIN}'
    transient = gcsfs.retry.is_retriable(error) or isinstance(
        error, (asyncio.TimeoutError, ConnectionError, google.auth.exceptions.TransportError)
    )
    if transient:
        return patience(), f'the bucket does not answer ({_short(error)})'
    return 0, ''


def _short(error):
    """The type and the last line of an error."""
    lines = [' '.join(line.split()) for line in str(error).splitlines() if line.strip()]
    return f'{type(error).__name__}: {lines[-1][:200]}' if lines else type(error).__name__
