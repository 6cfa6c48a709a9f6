# SPDX-License-Identifier: Apache-2.0
"""Which form of an operation is traced: XLA's, or one written by hand.

XLA's is the rule; `using` allows others in what is traced within. An operation asks with `pick`.
`kernels.choice` compares the forms on a device.
"""

import contextlib
import contextvars
import dataclasses
import json
import typing
from collections.abc import Callable, Iterator, Mapping

import jax

from ssl_jax import sharding

# Hand-written forms of each operation, by platform of the lowering.
FORMS = {
    'attention': {'tpu': ('pallas',), 'cuda': ('cudnn',)},
    'layer_norm': {'tpu': ('pallas',)},
    'move_images': {'tpu': ('pallas',)},
    'sum_rows': {'tpu': ('pallas',)},
}
PLATFORMS = {'tpu': 'tpu', 'gpu': 'cuda'}  # of a device -> of the lowering; others have no forms


class Call(typing.NamedTuple):
    """An operation at a shape: what a verdict is about."""

    op: str  # a key of FORMS
    shape: tuple[int, ...]  # of its first array, the part of one device
    dtype: str
    static: tuple = ()  # what else the program depends on: numbers, nested tuples

    @property
    def key(self) -> str:
        """Text that identifies the call, in files and among processes."""
        return json.dumps(self)


@dataclasses.dataclass(frozen=True)
class _Use:
    platform: str  # of the lowering
    chosen: Mapping[str, str] | str  # {key of a call: form}, or 'on'
    seen: dict[Call, tuple] | None = None  # of `recording`


_use = contextvars.ContextVar('forms', default=None)


def words(chosen: Mapping[str, str] | str, platform: str = 'tpu') -> str:
    """The arguments of `using` as a string, equal for equal programs."""
    if not chosen or chosen == 'off':
        return 'off'
    return f'{platform} {chosen if chosen == "on" else json.dumps(chosen, sort_keys=True)}'


@contextlib.contextmanager
def using(chosen: Mapping[str, str] | str, platform: str = 'tpu') -> Iterator[None]:
    """``with using('on'):`` what is traced within may have hand-written forms.

    A function that was traced before, as `jax.jit` caches it, keeps its forms.

    Args:
        chosen: 'off': XLA's forms; 'on': others wherever they fit; or {Call.key: name of the form},
            where calls that are not listed are XLA's.
        platform: that programs are lowered for, 'tpu' or 'cuda'.
    """
    with _set(None if chosen == 'off' else _Use(platform, chosen)):
        yield


@contextlib.contextmanager
def recording(platform: str) -> Iterator[dict[Call, tuple[str, ...]]]:
    """Collects the calls traced within and the forms that fit; what is traced is XLA's."""
    seen = {}
    with _set(_Use(platform, {}, seen)):
        yield seen


@contextlib.contextmanager
def _set(use):
    token = _use.set(use)
    try:
        yield
    finally:
        _use.reset(token)


def pick(op: str, x: jax.Array, static: tuple, fits: Mapping[str, Callable]) -> str | None:
    """The hand-written form in use for a call, None for XLA's.

    Args:
        op: name of the operation.
        x: its first array, split over the current mesh by rows.
        static: see `Call`.
        fits: {name of a form: () -> whether it supports the call}, asked only where it matters:
            shapes may be symbolic elsewhere.
    """
    use = _use.get()
    if use is None:
        return None
    names = tuple(n for n in FORMS[op].get(use.platform, ()) if fits[n]())
    if not names:
        return None
    rows = x.shape[0] // sharding.num_devices()
    call = Call(op, (rows, *x.shape[1:]), x.dtype.name, static)
    if use.seen is not None:
        use.seen[call] = names
    name = names[0] if use.chosen == 'on' else use.chosen.get(call.key)
    return name if name in names else None
