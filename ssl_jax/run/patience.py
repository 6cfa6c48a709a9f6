# SPDX-License-Identifier: Apache-2.0
"""Errors of reading: proof of damage, or a storage that does not answer just now.

Only what says that data is absent or wrong proves damage. Everything else that a disk, a file
server or a bucket can answer (no connection, no permission, an input/output error) may pass, and
says nothing about the data: it is waited for, and then ends the run.
"""

import errno
import http.client
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from ssl_jax.run import errors, launch

SECONDS = 600.0  # of tries during an outage; SSL_JAX_BUCKET_PATIENCE in the environment
REFUSED = 60.0  # of tries without permission, which new rights and credentials take to end
WAIT = 1.0, 30.0  # seconds between tries, doubled from the first to the last
SAID = 5.0  # seconds of an outage before a line
QUIET = 60.0  # seconds until another line
# Answers that prove something: there is no such file or object, or less of it than there was.
ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
ABSENT_HTTP = {404, 416}
NO_PERMISSION = {errno.EACCES, errno.EPERM}
# Of TensorStore, where it names no code: https://abseil.io/docs/cpp/guides/status-codes.
PASSING = r'^(ABORTED|UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|CANCELLED)\b|curl_code='
DENIED = r'^(PERMISSION_DENIED|UNAUTHENTICATED)\b'


_lock, _last = threading.Lock(), -math.inf


class Unavailable(errors.UserError):
    """A disk or a bucket did not answer, or refused, for longer than the patience."""


def seconds() -> float:
    """Seconds of tries during an outage."""
    return float(os.environ.get('SSL_JAX_BUCKET_PATIENCE', SECONDS))


def patiently(what: str, call: Callable[[], Any], then: str) -> Any:
    """The result of `call`, tried again while the storage does not answer.

    Args:
      what: is read, for messages.
      call: may be called again; its other errors are raised as they come.
      then: the end of the message.

    Raises:
      Unavailable: the storage did not answer for as long as `seconds` says.
    """
    start, wait, said = time.monotonic(), min(WAIT[0], seconds() / 20), False
    outer = handled()
    while True:
        try:
            return call()
        except Exception as error:
            for link in _chain(error, outer):
                if isinstance(link, errors.UserError) and not isinstance(link, Unavailable):
                    raise link from None
            limit, waited = _seconds_for(error, outer), _has_waited(error, outer)
            if not limit and not waited:
                raise
            passed = time.monotonic() - start
            if waited or passed >= limit:
                raise Unavailable(
                    f'{what} cannot be read: {reason(error, outer)}; {then}.'
                ) from error
            if passed >= min(SAID, limit / 2) and not said:
                said = say(f'{what}: {reason(error, outer)}; trying again for {limit:.0f} s.')
            time.sleep(min(wait, start + limit - time.monotonic() + 0.01))
            wait = min(2 * wait, WAIT[1])


def say(line: str) -> bool:
    """Says it unless something was said less than `QUIET` ago; whether it did.

    One outage meets all threads that read.
    """
    global _last
    with _lock:
        if time.monotonic() - _last < QUIET:
            return False
        _last = time.monotonic()
    launch.say(line)
    return True


def handled() -> BaseException | None:
    """The exception that is being handled: Python takes it for the context of all that follow."""
    return sys.exc_info()[1]


def passes(error: BaseException, outer: BaseException | None = None) -> bool:
    """Whether the storage did not answer or refused, rather than show that something is wrong.

    Args:
      error: of the storage.
      outer: what was `handled` before the call that raised `error`; it tells nothing.
    """
    return _has_waited(error, outer) or _seconds_for(error, outer) > 0


def _has_waited(error, outer=None):
    """Whether the file system behind ``gs://`` has tried for long enough already."""
    return any(isinstance(link, Unavailable) for link in _chain(error, outer))


def reason(error: BaseException, outer: BaseException | None = None) -> str:
    """One line for an exception of Orbax or TensorStore, with the errno if there is one.

    For the arguments see `passes`.
    """
    links = list(_chain(error, outer))
    for link in links:
        if isinstance(link, errors.UserError):
            return str(link).removesuffix('.')
        if code := _errno(link):
            where = f' at {link.filename}' if getattr(link, 'filename', None) else ''
            return f'{os.strerror(code)} (errno {code}, {errno.errorcode.get(code, "?")}){where}'
        if found := re.search(r"http_response_code='(\d+)'", str(link)):
            phrase = http.client.responses.get(int(found[1]), 'unknown')
            return f'the bucket answers {found[1]} ({phrase})'
        if found := re.search(r'CURL error ([^\[]*?) *\[', str(link)):
            return f'the bucket does not answer ({found[1]})'
    deepest = error
    while deepest.__cause__ is not None:
        deepest = deepest.__cause__
    return f'{type(deepest).__name__}: {" ".join(str(deepest).split())[:300]}'


def _seconds_for(error, outer=None):
    """How long to try again after `error`; 0 if it proves something."""
    for link in _chain(error, outer):
        if isinstance(link, RuntimeError):  # of XLA, whose codes have the same names
            continue
        text, code, status = str(link), _errno(link), None
        if found := re.search(r"http_response_code='(\d+)'", text):
            status = int(found[1])
        if status in (401, 403) or code in NO_PERMISSION or (not code and re.search(DENIED, text)):
            return min(REFUSED, seconds())
        if status or code:
            passing = status not in ABSENT_HTTP if status else code not in ABSENT
        else:
            absent = isinstance(link, FileNotFoundError | NotADirectoryError | IsADirectoryError)
            passing = (isinstance(link, OSError) and not absent) or re.search(PASSING, text)
        if passing:
            return seconds()
    return 0.0


def _chain(error, outer=None) -> Iterator[BaseException]:
    """An exception and those behind it, up to `outer`."""
    seen = {id(outer)}
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or error.__context__


def _errno(error):
    """The number of an error of the system; TensorStore has it in its text."""
    found = re.search(r"os_error_code='(\d+)'", str(error))
    number = int(found[1]) if found else getattr(error, 'errno', None)
    return number if isinstance(number, int) and number > 0 else None
