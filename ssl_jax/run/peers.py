# SPDX-License-Identifier: Apache-2.0
"""Links between the processes of a run, so that each can say which one is missing, failed or gone.

jax.distributed alone (0.10.2) ends such runs in C++: a process that never joins or dies aborts the
others, a port in use is a segmentation fault; and when one process raises, the others wait in a
collective for good. So all connect to process 0 before jax does, at the address that jax uses
afterwards, and stay connected: the kernel closes a connection when its process ends, whatever ended
it. A process that is stopped closes nothing; so each tells what it does every BEAT_SECONDS,
and one that says nothing for SILENT_SECONDS ends all. Messages are lines of JSON; process 0 passes
failures on. Nothing here needs a device.
"""

import atexit
import contextlib
import errno
import json
import os
import queue
import select
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from ssl_jax.run import errors

HELLO_SECONDS = 10.0  # for the first line of a connection; it is there at once
GRACE_SECONDS = 10.0  # for a failed process to clean up; process 0 stays a little longer
# For the news that another process is gone, when a collective fails: the kernel sends it at once.
NEWS_SECONDS = 2.0
LINE_BYTES = 1 << 20  # a config has 10 kB
BEAT_SECONDS = 5.0
# Of a process that is stopped, swapped out or held by a call that never returns to Python; before
# the 100 s of jax, which aborts without a sentence.
SILENT_SECONDS = 60.0
# A host without power closes nothing: gone after 60 s without an answer (jax aborts after 100).
KEEPALIVE = dict(TCP_KEEPIDLE=20, TCP_KEEPINTVL=10, TCP_KEEPCNT=4)
AGAIN = (
    'start all processes again with the same command; the run continues from its newest checkpoint.'
)


class _Link:
    """A connection to another process."""

    def __init__(self, sock):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):  # not on macOS
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.sock, self.file = sock, sock.makefile('rb')
        self.sending = threading.Lock()
        self.heard, self.phase = time.monotonic(), 'joining'  # of the last message
        self.said_bye = self.is_silent = False

    def send(self, **message):
        line = json.dumps(message, default=str).encode() + b'\n'
        with self.sending, contextlib.suppress(OSError):  # who listens to this link sees its end
            self.sock.sendall(line)

    def read(self, seconds=None):
        """The next message; {} at the end, after `seconds`, or if it is none of ours."""
        self.sock.settimeout(seconds)
        try:
            message = json.loads(self.file.readline(LINE_BYTES))
        except (OSError, ValueError, RecursionError):
            return {}
        return message if isinstance(message, dict) else {}

    def is_open(self):
        """Whether the other process is still there; it has sent nothing."""
        return not select.select([self.sock], [], [], 0)[0]


class _Peers:
    """This process among the others."""

    def __init__(self, index, links):
        self.index = index
        self.links = links  # process: _Link; process 0 has all, another has process 0
        self.inbox = queue.Queue()  # (process, values) of `compare`
        self.ended = threading.Lock()  # taken, for good, by the first failure
        self.failed = False  # whether that is one of this process
        self.threads = [
            threading.Thread(target=self.listen, args=item, name='peers', daemon=True)
            for item in links.items()
        ]
        for thread in self.threads:
            thread.start()
        threading.Thread(target=self.beat, name='peers', daemon=True).start()

    def listen(self, process, link):
        """Waits for messages; ends this process when another has failed or is gone."""
        while message := link.read():
            link.heard, link.phase = time.monotonic(), message.get('at', link.phase)
            link.said_bye |= 'bye' in message
            if 'failed' in message:
                self.end(message['failed'])
            if 'values' in message:
                self.inbox.put((process, message['values']))
        if not link.said_bye:
            self.end(
                f'process {process} is gone (process {self.index}: {_now.phase}); its own output '
                f'says why. When that is mended, {AGAIN}'
            )

    def beat(self):
        """Tells the others what this process does; ends it when one of them is silent."""
        last = time.monotonic()
        while not self.ended.locked():
            time.sleep(BEAT_SECONDS)
            now = time.monotonic()
            for process, link in self.links.items():
                if now - last > 2 * BEAT_SECONDS:  # this process was stopped: it could not hear
                    link.heard = now
                link.send(at=_now.phase)
                if now - link.heard > SILENT_SECONDS and not link.said_bye:
                    link.is_silent = True
                    self.end(
                        f'process {process} has been silent for {now - link.heard:.0f} s (the last '
                        f'that it said: {link.phase}): it is stopped, its host is, or a call never '
                        f'returns to Python; end it. When that is mended, {AGAIN}'
                    )
            last = now

    def end(self, sentence):
        """Ends this process with a sentence on another; does nothing after a failure."""
        if self.ended.acquire(blocking=False):
            self.tell(sentence)
            self.exit(sentence)

    def tell(self, sentence):
        for link in self.links.values():
            link.send(failed=sentence)

    def exit(self, sentence=None):
        """Code 1, without jax's farewell, which waits for all; process 0 lets the others go first.

        jax aborts a process that loses process 0. The sentence comes last: until then the main
        thread may still write.
        """
        deadline = time.monotonic() + 1.5 * GRACE_SECONDS
        for thread, link in zip(self.threads, self.links.values(), strict=True):
            left = 0.1 if link.is_silent else max(0.1, deadline - time.monotonic())
            if self.index == 0 and thread is not threading.current_thread():
                thread.join(left)
            elif self.index == 0:
                while link.read(left) and left > 0.1:  # a beat may come before the end
                    left = max(0.1, deadline - time.monotonic())
        if sentence:
            _print(sentence)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


class Now(NamedTuple):
    """What this process does, and when it last moved on (`time.monotonic`)."""

    phase: str
    since: float


_peers: _Peers | None = None
_now = Now('starting', time.monotonic())


def join(address: str, count: int, index: int, timeout: float) -> None:
    """Connects the processes of a run; to call before jax.distributed.initialize.

    Args:
      address: host:port of process 0, free on its host.
      count: number of processes.
      index: of this one.
      timeout: seconds to wait for the others.

    Raises:
      UserError: the port is in use, or a process is missing, another's or there twice.
    """
    global _peers
    if index == 0:
        links = _gather(address, count, timeout)
    else:
        links = {0: _knock(address, count, index, timeout)}
    if links:
        at('starting')
        _peers = _Peers(index, links)
        atexit.register(_at_exit)  # runs before jax's, which was registered earlier


def at(phase: str) -> None:
    """Says what this process does now, for messages: 'step 7', 'saving step 10'."""
    global _now
    _now = Now(phase, time.monotonic())


def progress() -> None:
    """Says that what this process does has come a step further."""
    at(_now.phase)


def now() -> Now:
    """What this process does; another object after every `at` and `progress`."""
    return _now


def index() -> int:
    """Number of this process, as jax has it; no device is asked."""
    return _peers.index if _peers else 0


def others() -> dict[int, str]:
    """{process: what it did at its last beat} of those that this one is connected to."""
    return {i: link.phase for i, link in _peers.links.items()} if _peers else {}


def fail(sentence: str) -> None:
    """Ends this process and the others with a sentence and code 1, from any thread.

    It returns if the run is ending already.
    """
    if _peers is not None:
        _peers.end(sentence)
    else:
        _print(sentence)
        sys.stdout.flush()
        os._exit(1)


@contextlib.contextmanager
def announced() -> Iterator[None]:
    """``with announced():`` tells the other processes when this one raises; they end at once."""
    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if _peers is not None:
            if not isinstance(error, errors.UserError):
                time.sleep(NEWS_SECONDS)  # the thread ends this process if another is the cause
            if _peers.ended.acquire(blocking=False):
                is_bug = not isinstance(error, errors.UserError | OSError)
                text = f'{type(error).__name__}: {error}' if is_bug else str(error)
                _peers.tell(f'process {_peers.index} ended ({_now.phase}): {text}')
                # What cleans up may wait for the others, which have gone.
                timer = threading.Timer(GRACE_SECONDS, _give_up, (error,))
                timer.daemon = True
                timer.start()
                _peers.failed = True
            elif not _peers.failed:
                threading.Event().wait()  # the thread is ending this process with that failure
        raise


def consult(values: Any, judge: Callable[[list], Any]) -> Any:
    """What process 0 makes of the values of all, in all processes; all call it.

    Args:
      values: JSON value of this process.
      judge: ([values of process 0, of process 1, ...]) -> JSON value; process 0 calls it.
    """
    if _peers is None:
        return judge([values])
    if _peers.index:
        _peers.links[0].send(values=values)
        return _peers.inbox.get()[1]
    found = dict(_peers.inbox.get() for _ in _peers.links)
    answer = judge([values, *(found[process] for process in sorted(found))])
    for link in _peers.links.values():
        link.send(values=answer)
    return answer


def compare(values: dict) -> None:
    """Compares what must be equal in all processes; all call it, process 0 decides.

    Args:
      values: name -> JSON value.

    Raises:
      UserError: in process 0, naming a process and the first value that differs.
    """
    if _peers is None:
        return
    before = _now.phase
    at('comparing configs')

    def judge(found):
        own, *others = found
        for process, theirs in enumerate(others, 1):
            names = [k for k in {**own, **theirs} if own.get(k) != theirs.get(k)]
            if names:
                k, more = names[0], f' ({len(names)} values differ)' if len(names) > 1 else ''
                raise errors.UserError(
                    f'process {process} has {k}={theirs.get(k)!r} and process 0 has '
                    f'{own.get(k)!r}{more}: start all processes with the same command, versions '
                    f'and data.'
                )

    consult(json.loads(json.dumps(values, default=str)), judge)
    at(before)


def joined() -> bool:
    """Whether this process has links to others."""
    return _peers is not None


def leave() -> None:
    """Says that this process has nothing more to do; after that its end is no failure."""
    if _peers is not None:
        for link in _peers.links.values():
            link.send(bye=True)


def _gather(address, count, timeout):
    """{process: link} of all others, in process 0."""
    bind = os.environ.get('JAX_COORDINATOR_BIND_ADDRESS')  # of jax
    host, port = _split(bind or address)
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    options = dict(family=family)
    if not bind:
        host, options = '', {}
        if socket.has_dualstack_ipv6():
            options = dict(family=socket.AF_INET6, dualstack_ipv6=True)
    try:
        listener = socket.create_server((host, port), **options)
    except OSError as error:
        raise errors.UserError(
            f'process 0 cannot listen at {bind or address} ({_reason(error)}): end the '
            f'program that has port {port}, maybe an earlier run, or choose another port in '
            f'JAX_COORDINATOR_ADDRESS on all processes.'
        ) from error
    links, problem, deadline = {}, None, time.monotonic() + timeout
    with listener:
        while len(links) < count - 1 and not problem:
            listener.settimeout(max(0.1, deadline - time.monotonic()))
            try:
                link = _Link(listener.accept()[0])
            except TimeoutError:
                missing = [i for i in range(1, count) if i not in links]
                problem = (
                    f'process {", ".join(map(str, missing[:8]))}{", ..." * (len(missing) > 8)} of '
                    f'{count} did not join at {address} within {timeout:.0f} s: see its output, '
                    f'then start all processes again with the same command.'
                )
                break
            hello = link.read(HELLO_SECONDS)
            if 'process' not in hello:  # a scanner of ports, say
                link.sock.close()
                continue
            link.send(welcome=True)
            i, others = hello['process'], hello['processes']
            if others != count:
                problem = (
                    f'process {i} has JAX_NUM_PROCESSES={others} and process 0 has {count}: '
                    f'start all with the same number.'
                )
            elif not 0 <= i < count:
                problem = f'process {i} of {count}: number the processes from 0 to {count - 1}.'
            elif i == 0 or (i in links and links[i].is_open()):
                problem = (
                    f'two processes have JAX_PROCESS_ID={i}: number them from 0 to {count - 1}.'
                )
            if problem:
                link.send(failed=problem)
            else:
                links[i] = link
    for link in links.values():
        link.send(**({'failed': problem} if problem else {'go': True}))
    if problem:
        raise errors.UserError(problem)
    return links


def _knock(address, count, index, timeout):
    """Link to process 0, in another."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            sock = socket.create_connection(_split(address), HELLO_SECONDS)
            if sock.getsockname() != sock.getpeername():  # else TCP has met itself
                break
            sock.close()
            error = OSError(errno.ECONNREFUSED, '')
        except OSError as e:
            error = e
        if time.monotonic() > deadline:
            raise errors.UserError(
                f'process {index} cannot reach process 0 at {address} within {timeout:.0f} s '
                f'({_reason(error)}): start process 0, or correct '
                f'JAX_COORDINATOR_ADDRESS.'
            )
        time.sleep(0.2)
    link = _Link(sock)
    link.send(process=index, processes=count)
    if 'welcome' not in link.read(HELLO_SECONDS):
        raise errors.UserError(
            f'another program than process 0 of this run answers process {index} at {address}: '
            f'end it, or choose another port in JAX_COORDINATOR_ADDRESS on all processes.'
        )
    # Process 0 has less time left, and says which process is missing.
    answer = link.read(timeout + HELLO_SECONDS)
    if 'go' not in answer:
        gone = f'process 0 at {address} is gone while process {index} was joining; see its output.'
        raise errors.UserError(answer.get('failed', gone))
    return link


def _split(address):
    """(host, port) of 'host:port' or '[host]:port'."""
    host, _, port = address.rpartition(':')
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise errors.UserError(
            f"JAX_COORDINATOR_ADDRESS is '{address}': write host:port of process 0, such as "
            f'10.0.0.1:1234.'
        )
    return host.strip('[]'), int(port)


def _reason(error):
    """Words of an OSError; those of create_server repeat the address."""
    is_system = error.errno and not isinstance(error, socket.gaierror)
    return os.strerror(error.errno) if is_system else error


def _print(sentence):
    print(f'ssl_jax: {sentence}', file=sys.stderr, flush=True)


def _give_up(error):
    """Ends a failed process whose cleaning up takes too long."""
    if isinstance(error, errors.UserError | OSError):
        _print(error)
    else:
        traceback.print_exception(error)
    _peers.exit()


def _at_exit():
    if _peers.ended.locked():
        _peers.exit()
    leave()
