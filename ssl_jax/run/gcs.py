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
import errno
import logging
import os
import random
import re
import time
import urllib.parse

# Read when gcsfs is imported: its gRPC client, for zonal buckets, first asks what a bucket is.
os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')

import aiohttp  # noqa: E402
import gcsfs.core  # noqa: E402
import gcsfs.retry  # noqa: E402
import google.auth.exceptions  # noqa: E402

from ssl_jax.run import launch, patience  # noqa: E402
from ssl_jax.run.patience import Unavailable  # noqa: E402

# Without an answer for this long a request is sent anew; uploads have at most 50 MB.
TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=120)
LOGIN = 'log in (gcloud auth application-default login) or give this machine a service account'


if not os.environ.get('GCSFS_DEBUG'):  # it logs tracebacks of what is said here in a sentence
    logging.getLogger('gcsfs').setLevel(logging.CRITICAL)


class GCSFileSystem(gcsfs.core.GCSFileSystem):
    """gcsfs; see the module."""

    def __init__(self, *args, **kwargs):
        kwargs = {'use_listings_cache': False, 'requests_timeout': TIMEOUT, **kwargs}
        super().__init__(*args, **kwargs)

    async def _request(self, method, path, *args, **kwargs):
        start, wait, said = time.monotonic(), min(patience.WAIT[0], patience.seconds() / 20), False
        once = gcsfs.core.GCSFileSystem._request.__wrapped__  # without its own retries
        while True:
            try:
                found = await once(self, method, path, *args, **kwargs)
            except FileNotFoundError as error:  # has a URL
                text = 'There is no such object or bucket'
                raise FileNotFoundError(
                    errno.ENOENT, text, _place(path, args, kwargs.get('name'))
                ) from error
            except Exception as error:
                seconds, reason = _tries(error)
                if not seconds:
                    raise
                where = _place(path, args, kwargs.get('name'))
                passed = time.monotonic() - start
                if passed >= seconds:
                    raise Unavailable(f'{where}: {reason}.') from error
                if passed >= min(patience.SAID, seconds / 2) and not said:
                    said = patience.say(f'{where}: {reason}; trying again for {seconds:.0f} s.')
                await asyncio.sleep(
                    min(wait * (0.5 + random.random()), start + seconds - time.monotonic() + 0.01)
                )
                wait = min(2 * wait, patience.WAIT[1])
            else:
                if said:
                    launch.say(f'The bucket answers again, after {time.monotonic() - start:.0f} s.')
                return found


def _place(path, args, name=''):
    """The gs:// path of a request."""
    if found := re.search(r'/b/([^/?]+)/o(?:/([^?]+)|.*[?&]name=([^&]+))?', path):  # a URL
        args = [found[1], name or urllib.parse.unquote(found[2] or found[3] or '')]
    return '/'.join(['gs:/', *map(str, args)]).rstrip('/') if args else path.partition('?')[0]


def _tries(error):
    """(seconds to try again after `error`, 0 if that cannot help; the reason as a sentence)."""
    if isinstance(error, google.auth.exceptions.DefaultCredentialsError):
        return 1e-9, f'there are no credentials ({_short(error)}); {LOGIN}'
    code, refused = str(getattr(error, 'code', '')), ''
    if isinstance(error, OSError) and str(error).startswith('Forbidden'):
        refused = 'access is forbidden (403: {})'
    elif code == '401':
        refused = 'the credentials are not valid (401: {})'
    elif isinstance(error, google.auth.exceptions.RefreshError):
        refused = 'the credentials cannot be renewed ({})'
    if refused:
        seconds = min(patience.REFUSED, patience.seconds())
        return seconds, f'{refused.format(_short(error))}; {LOGIN}'
    transient = gcsfs.retry.is_retriable(error) or isinstance(
        error, (asyncio.TimeoutError, ConnectionError, google.auth.exceptions.TransportError)
    )
    if transient:
        return patience.seconds(), f'the bucket does not answer ({_short(error)})'
    return 0, ''


def _short(error):
    """The type and the last line of an error."""
    lines = [' '.join(line.split()) for line in str(error).splitlines() if line.strip()]
    return f'{type(error).__name__}: {lines[-1][:200]}' if lines else type(error).__name__
