# SPDX-License-Identifier: Apache-2.0
"""Rates of the devices: products, memory, transfers, sums over all of them, kernels."""

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ssl_jax.check.rows import Row, caught, spell
from ssl_jax.kernels import choice
from ssl_jax.run import launch

SIDE = 8192  # of the product; on a CPU as large as fits into its time
ARRAY = 2**29  # bytes, more than any cache; on a CPU an eighth
SUMMED = 2**26  # bytes per device
GOOD, POOR = 0.5, 0.2  # shares of the peak below which a product is suspicious, and broken
BUSY = 'end other programs on the device, and look for throttling (nvidia-smi -q -d PERFORMANCE)'


def rows(found: list[Row], seconds: float = 2.0) -> None:
    """Appends the rows of this process' devices.

    Args:
      seconds: for each measurement, without compiling.
    """
    devices = jax.local_devices()
    on_cpu = devices[0].platform == 'cpu'
    devices = devices[:1] if on_cpu else devices  # simulated ones share the cores
    for what, measure in (('matmul', matmul), ('memory bandwidth', memory)):
        with caught(found, what, BUSY):
            rates = {d.id: measure(d, seconds / len(devices)) for d in devices}
            found.append(_rate(what, rates, devices[0]))
    if not on_cpu:
        with caught(found, 'host to device'):
            rates = transfers(devices[0], seconds)
            for what, rate in zip(('host to device', 'device to host'), rates, strict=True):
                found.append(Row(what, rate / 1e9, 'GB/s'))


def _rate(what, rates, device):
    """The row of the slowest device."""
    slowest, fastest = min(rates, key=rates.get), max(rates.values())
    rate, unit, scale = rates[slowest], 'GB/s', 1e9
    expected, verdict, next = '', 'ok', ''
    if what == 'matmul':
        unit, scale, peak = 'TFLOP/s', 1e12, launch.peak_flops(device.device_kind)
        if peak:
            expected = f'at most {spell(peak / 1e12)}'
            verdict = 'ok' if rate > GOOD * peak else 'warn' if rate > POOR * peak else 'bad'
            next = BUSY if verdict != 'ok' else ''
    if rate < 0.8 * fastest:
        expected = f'{spell(fastest / scale)} as the fastest; slowest is device {slowest}'
        verdict, next = max(verdict, 'warn', key=('ok', 'warn', 'bad').index), BUSY
    return Row(what, rate / scale, unit, expected, verdict, next)


def seconds_per_call(fn: Callable, x: jax.Array, seconds: float, calls: int = 1) -> float:
    """Median time of y = fn(y), of rounds of `calls`, after a first one that compiles."""
    x = jax.block_until_ready(fn(x))
    times, end = [], time.monotonic() + seconds
    while not times or (time.monotonic() < end and len(times) < 20):
        start = time.perf_counter()
        for _ in range(calls):
            x = fn(x)
        jax.block_until_ready(x)
        times.append((time.perf_counter() - start) / calls)
    return statistics.median(times)


def matmul(device: jax.Device, seconds: float) -> float:
    """FLOP/s of a bfloat16 product."""
    on_cpu = device.platform == 'cpu'
    side, calls = (512, 1) if on_cpu else (SIDE, 10)
    while True:
        rng = np.random.default_rng(0)  # zeros would draw less power
        x = rng.standard_normal((side, side), np.float32)
        x, w = (jax.device_put(a.astype(jnp.bfloat16), device) for a in (x, x.T * side**-0.5))
        taken = seconds_per_call(functools.partial(jax.jit(jnp.matmul), w), x, seconds, calls)
        if side >= SIDE or 10 * taken > seconds:
            return 2 * side**3 / taken
        side *= 2


def memory(device: jax.Device, seconds: float) -> float:
    """Bytes/s of an addition, read and written."""
    on_cpu = device.platform == 'cpu'
    size = ARRAY // 8 if on_cpu else ARRAY
    x = jax.device_put(np.zeros(size // 4, np.float32), device)
    return 2 * size / seconds_per_call(jax.jit(lambda x: x + 1), x, seconds, 1 if on_cpu else 10)


def transfers(device: jax.Device, seconds: float) -> tuple[float, float]:
    """(bytes/s from the host to the device, and back)."""
    here = np.ones(ARRAY // 2, np.uint8)
    add = jax.jit(lambda x: x + 1)  # a new array: jax keeps the copy of one that was fetched
    there = jax.block_until_ready(add(jax.device_put(here, device)))
    to, back, end = [], [], time.monotonic() + seconds
    while not to or (time.monotonic() < end and len(to) < 10):
        start = time.perf_counter()
        jax.block_until_ready(jax.device_put(here, device))
        to.append(time.perf_counter() - start)
        there = jax.block_until_ready(add(there))
        start = time.perf_counter()
        np.asarray(there)
        back.append(time.perf_counter() - start)
    return here.nbytes / statistics.median(to), here.nbytes / statistics.median(back)


def links(found: list[Row]) -> None:
    """Appends the rates of sums over several devices; all processes call it at the same time."""
    several, count = jax.process_count() > 1, len(jax.local_devices())
    if count > 1:
        rate = all_reduce(jax.local_devices())
        found.append(Row('sum in one process', rate / 1e9, f'GB/s, {count} devices'))
    if several:
        rate = all_reduce(jax.devices())
        what = f'GB/s, {jax.device_count()} devices of {jax.process_count()} processes'
        found.append(Row('sum over all', rate / 1e9, what))


def all_reduce(devices: Sequence[jax.Device]) -> float:
    """Bytes/s that each device sends in a sum over all, as a ring would: 2 (n - 1) / n of the data.

    The number of sums is fixed: processes that counted by their own clocks would wait for good.
    """
    n = len(devices)
    size = SUMMED // 16 if devices[0].platform == 'cpu' else SUMMED
    split = NamedSharding(Mesh(np.asarray(devices), 'd'), P('d'))
    mean = jax.shard_map(
        lambda x: jax.lax.psum(x, 'd') / n, mesh=split.mesh, in_specs=P('d'), out_specs=P('d')
    )
    x = jax.jit(lambda: jnp.ones((n, size // 4)), out_shardings=split)()
    taken = seconds_per_call(jax.jit(mean), x, seconds=0.0, calls=5)
    return 2 * (n - 1) / n * size / taken


def kernels(found: list[Row], seconds: float = 40.0) -> None:
    """Appends the verdict on each hand-written form of an operation.

    Args:
      seconds: no further operation is measured after this time.
    """
    calls, end, device = choice.typical(), time.monotonic() + seconds, jax.local_devices()[0]
    while calls and time.monotonic() < end:
        call = calls.pop(0)
        for verdict in choice.measure([call], device=device, log=lambda line: None):
            found.append(of_verdict(f'{choice.words(call)}: {verdict.form}', verdict))
    if calls:
        found.append(Row('kernels', f'{len(calls)} operations not measured, for want of time'))
    elif not found:
        found.append(Row('kernels', f'none for {device.platform}', same=True))


def of_verdict(what: str, verdict: Any) -> Row:
    """The row of a `choice.Verdict`; a form that is wrong or fails is left out of runs."""
    reason = 'used' if verdict.used else verdict.reason
    if verdict.seconds is None:
        fails = not reason.startswith('does not fit')
        fix = "runs take XLA's form; report it with this line" if fails else ''
        return Row(what, reason, verdict='warn' if fails else 'ok', next=fix)
    times = f"ms, XLA's {spell(1e3 * verdict.reference_seconds)}; {reason}"
    return Row(what, 1e3 * verdict.seconds, times, less_is_better=True)
