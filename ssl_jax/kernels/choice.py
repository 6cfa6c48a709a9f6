# SPDX-License-Identifier: Apache-2.0
"""Forms of operations chosen by measurement on the device at hand: values first, then time.

    verdicts = measure(typical())      # of a run: the calls of its step, `verdicts.for_run`
    print(table(verdicts))
    with using({v.call.key: v.form for v in verdicts if v.used}, platform):
        step.lower(...)

A form is used if, forward and backward, on random inputs of the call's shape and dtype,

1. it compiles and runs;
2. every result is finite, and its largest error, over the largest value of that result, is at most
   twice that of XLA's form plus `TOLERANCE` (or the resolution of the result's dtype, if coarser).
   Errors are those to XLA's form in float32 with products of the highest precision;
3. it gives the same bits each time, or XLA's form does not either;
4. it takes less than `FASTER` of the time of XLA's form.

Everything else costs a line in the log. A form that ends the process or halts the chip ends that
start; the next one finds its verdict and leaves it out. One that hangs has to be ended by hand.
"""

import dataclasses
import functools
import statistics
import time
import typing
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax import sharding
from ssl_jax.kernels import attention, forms, ops, subsets
from ssl_jax.kernels.forms import Call, using
from ssl_jax.kernels.segments import Segment, join, per_row, split, tokens_per_row
from ssl_jax.run import launch

__all__ = ['Call', 'Verdict', 'measure', 'seconds', 'table', 'typical', 'using']

TOLERANCE = 1e-5  # of float32 sums in another order
FASTER = 0.97  # of the time of XLA's form: below, no noise decides
REPEATS = 3  # runs whose bits are compared
XLA = 'xla'  # name of XLA's form
_LONG = 0.02  # seconds that a timing lasts at least, of up to `_MOST` runs
_MOST = 200


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a device said of one form of a call."""

    call: Call
    form: str
    used: bool
    reason: str  # 'faster', or why it is not used
    error: float | None = None  # largest of all results; None where there is no number
    reference_error: float | None = None  # the same of XLA's form in the dtype of the call
    seconds: float | None = None
    reference_seconds: float | None = None  # of XLA's form

    @property
    def op(self) -> str:
        return self.call.op

    @property
    def shape(self) -> tuple[int, ...]:
        return self.call.shape


class Example(typing.NamedTuple):
    """A call that can run."""

    run: Callable  # the operation, in the form in use when it is traced
    args: tuple
    grads: typing.Any = None  # gradients of its results; None: forward alone


def typical() -> list[Call]:
    """Calls of ViT-L/16 in bfloat16: MAE with 64 images per device, DINOv2 with 8."""
    mae = Segment(1, 50), Segment(1, 197)  # of the encoder and of the decoder
    crops, kept = (Segment(2, 197, 3), Segment(8, 37, 3)), (Segment(1, 197, 3), Segment(6, 37, 3))
    rows, few = (8 * tokens_per_row(s) for s in (crops, kept))
    return [
        Call(op, shape, 'bfloat16', static)
        for op, shape, static in (
            ('attention', (64 * 50, 3 * 1024), (16, mae[:1])),
            ('attention', (64 * 197, 3 * 512), (16, mae[1:])),
            ('attention', (rows, 3 * 1024), (16, crops)),
            ('layer_norm', (64 * 50, 1024), (1e-6, True)),
            ('layer_norm', (64 * 197, 512), (1e-6, False)),
            ('sum_rows', (64 * 50, 4096), ()),
            ('move_images', (rows, 1024), (crops, kept, False, False)),
            ('move_images', (few, 1024), (kept, crops, True, True)),
        )
    ]


def measure(
    calls: Iterable[Call],
    *,
    device: jax.Device | None = None,
    platform: str | None = None,
    ops: Mapping[str, Callable] | None = None,
    timer: Callable[[str, Callable], float] | None = None,
    log: Callable[[str], None] = launch.log,
) -> list[Verdict]:
    """Compares each hand-written form of each call with XLA's, on one device.

    Args:
        calls: what to measure.
        device: None: the first of this process.
        platform: of the lowering, None: that of `device`. A CPU has no forms, and no verdicts.
        ops: {name: (call, draw) -> Example}, None: `OPS`.
        timer: (form, run) -> seconds, where run(n) repeats the call n times; None: `seconds`.
        log: takes a line for each form that fails.

    Returns:
        One verdict per call and form of the platform, in this order; of the forms of a call at most
        one is used.
    """
    device = device or jax.local_devices()[0]
    platform = platform or forms.PLATFORMS.get(device.platform)
    examples = OPS if ops is None else ops
    mesh = np.array([device]).reshape(1, 1, 1)
    mesh = jax.sharding.Mesh(mesh, sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    with jax.set_mesh(mesh):
        return [
            verdict
            for call in calls
            for verdict in _of_call(call, examples, platform, timer or seconds, device, log)
        ]


def _of_call(call, examples, platform, timer, device, log):
    names = forms.FORMS.get(call.op, {}).get(platform, ())
    if not names:
        return []

    def failed(name, error, whose=''):
        text = (str(error).strip() or 'no message').splitlines()[0][:160]
        log(f'kernels   {words(call)}: {name} is not used, {whose}{type(error).__name__}: {text}')
        return Verdict(call, name, False, f'{whose}{type(error).__name__}: {text}')

    try:
        example = examples[call.op](call, _draw(call))
        args, grads = jax.device_put((example.args, example.grads), device)
        example = example._replace(args=args, grads=grads)
        with forms.recording(platform) as seen:
            jax.eval_shape(lambda *args: example.run(*args), *example.args)
        fitting = seen.get(call, ())
        if not fitting:
            return [Verdict(call, name, False, 'does not fit') for name in names]
        exact = _exact(example, platform)
        run = _compiled(example, {}, platform)
        results = run(1)
        xla = _Reference(exact, _errors(results, exact), _repeats(run, results), timer(XLA, run))
        del results
    except Exception as error:
        return [failed(name, error, "XLA's form fails, ") for name in names]
    found = []
    for name in names:
        if name not in fitting:
            found.append(Verdict(call, name, False, 'does not fit'))
            continue
        try:
            run = _compiled(example, {call.key: name}, platform)
            found.append(_judge(call, name, run, xla, timer))
        except Exception as error:
            found.append(failed(name, error))
    best = min((v for v in found if v.used), key=lambda v: v.seconds, default=None)
    slower = dict(used=False, reason=f'slower than {best.form}') if best else {}
    return [dataclasses.replace(v, **slower) if v.used and v is not best else v for v in found]


class _Reference(typing.NamedTuple):
    exact: list  # results in float32
    errors: list[float]  # of XLA's form in the dtype of the call, per result
    repeats: bool
    seconds: float


def _judge(call, name, run, xla, timer):
    results = run(1)
    found = _errors(results, xla.exact)
    numbers = dict(error=_largest(found), reference_error=_largest(xla.errors))
    wrong = not all(
        error <= 2 * least + max(TOLERANCE, float(jnp.finfo(x.dtype).eps))
        for error, least, x in zip(found, xla.errors, jax.tree.leaves(results), strict=True)
    )
    if wrong:
        reason = 'wrong' if np.isfinite(found).all() else 'wrong: NaN or infinity'
        return Verdict(call, name, False, reason, **numbers)
    if xla.repeats and not _repeats(run, results):
        return Verdict(call, name, False, 'other bits each time', **numbers)
    numbers.update(reference_seconds=xla.seconds, seconds=timer(name, run))
    faster = numbers['seconds'] < FASTER * xla.seconds
    return Verdict(call, name, faster, 'faster' if faster else 'not faster', **numbers)


def _largest(found):
    """The largest error; None where one is NaN or infinite, which JSON does not have."""
    return float(max(found)) if np.isfinite(found).all() else None


def _compiled(example, chosen, platform):
    """run(n): the results of the last of n forward and backward passes in the chosen forms."""
    program = _lowered(example, chosen, platform).compile()
    arrays = example.args, example.grads
    return lambda count: jax.block_until_ready(program(np.int32(count), *arrays))


def _lowered(example, chosen, platform):

    def passes(args, grads):
        if grads is None:
            return example.run(*args)
        out, backward = jax.vjp(example.run, *args)
        return out, backward(grads)

    def repeated(count, args, grads):
        shapes = jax.eval_shape(passes, args, grads)

        def again(_, carry):
            # Inputs that wait for the results before: XLA would move equal passes out of the loop.
            (args, grads), _ = jax.lax.optimization_barrier(carry)
            return (args, grads), passes(args, grads)

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.fori_loop(0, count, again, ((args, grads), zeros))[1]

    options = sharding.compiler_options(jax.sharding.get_mesh())
    with using(chosen, platform):
        step = jax.jit(repeated, compiler_options=options)
        return step.lower(np.int32(1), example.args, example.grads)


def _exact(example, platform):
    """Results of XLA's form in float32."""

    def wide(x):
        return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x

    args, grads = jax.tree.map(wide, (example.args, example.grads))
    with jax.default_matmul_precision('highest'):
        run = _compiled(example._replace(args=args, grads=grads), {}, platform)
    return jax.tree.leaves(run(1))


def _errors(results, exact):
    """Per result the largest error over the largest value, infinity where one is not finite."""
    found = []
    for x, want in zip(jax.tree.leaves(results), exact, strict=True):
        top = jnp.abs(want).max()
        error = jnp.abs(x.astype(jnp.float32) - want).max() / jnp.where(top > 0, top, 1)
        found.append(float(jnp.where(jnp.isfinite(error), error, jnp.inf)))
    return found


def _repeats(run, results):
    """Whether further runs give the same bits."""
    for _ in range(REPEATS - 1):
        pairs = zip(jax.tree.leaves(run(1)), jax.tree.leaves(results), strict=True)
        if not all(bool((a == b).all()) for a, b in pairs):
            return False
    return True


def seconds(form: str, run: Callable) -> float:
    """Median time of a call; run(n) repeats it n times on the device and waits for the end."""
    del form

    def of(count):
        started = time.perf_counter()
        run(count)
        return (time.perf_counter() - started) / count

    run(1)  # warm-up
    count = max(1, min(_MOST, round(_LONG / max(of(1), 1e-9))))
    return statistics.median(of(count) for _ in range(5))


# The operations: (call, draw) -> Example, where draw(shape, dtype) is a seeded normal array.


def _draw(call):
    seeds = iter(range(100))

    def draw(shape, dtype=call.dtype):
        return jax.random.normal(jax.random.key(next(seeds)), shape, jnp.float32).astype(dtype)

    return draw


def _attention(call, draw):
    heads, segments = call.static[0], _segments(call.static[1])
    rows, width = call.shape
    parts = split(per_row(draw((rows, width // 3)), segments), segments)
    grads = join(parts, segments).reshape(rows, -1)  # padding has no gradient
    run = functools.partial(attention.attention, num_heads=heads, segments=segments)
    return Example(run, (draw(call.shape),), grads)


def _layer_norm(call, draw):
    eps, and_input = call.static
    norm = ops.layer_norm_and_input if and_input else ops.layer_norm
    vectors = (1 + draw(call.shape[-1:], jnp.float32), draw(call.shape[-1:], jnp.float32))
    grads = draw(call.shape)
    grads = (grads, draw(call.shape)) if and_input else grads
    return Example(lambda *args: norm(*args, eps), (3 + 2 * draw(call.shape), *vectors), grads)


def _sum_rows(call, draw):
    return Example(lambda x: ops.sum_stored_rows(x), (draw(call.shape),))


def _move_images(call, draw):
    src, dst = map(_segments, call.static[:2])
    weighted, added = call.static[2:]
    rows, rng = call.shape[0] // tokens_per_row(src), np.random.default_rng(0)

    def ids(few, many):
        order = np.array([rng.permutation(many)[:few] for _ in range(rows)], np.int32)
        return jnp.asarray(order)

    places = tuple(
        ids(b.images, a.images) if a.images >= b.images else
        subsets.where(ids(a.images, b.images), b.images)
        for a, b in zip(src, dst, strict=True)
    )  # fmt: skip
    other = (draw((rows * tokens_per_row(dst), call.shape[1])),) if added else ()

    def run(places, x, *other):
        return subsets.move(src, dst, places, weighted, x, *other)

    return Example(run, (places, draw(call.shape), *other))


def _segments(static):
    return tuple(Segment(*s) for s in static)


OPS = {
    'attention': _attention,
    'layer_norm': _layer_norm,
    'move_images': _move_images,
    'sum_rows': _sum_rows,
}


# Text.


def table(verdicts: Iterable[Verdict]) -> str:
    """A small table of verdicts: call, form, errors, times in ms, and what follows."""
    rows = [('call', 'form', 'error', "XLA's", 'ms', "XLA's", 'verdict')]
    for v in verdicts:
        errors = (_number(x, 1, '.1e') for x in (v.error, v.reference_error))
        times = (_number(x, 1e3, '.3f') for x in (v.seconds, v.reference_seconds))
        rows.append((words(v.call), v.form, *errors, *times, 'used' if v.used else v.reason))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    lines = []
    for *cells, last in rows:
        texts = [
            c.ljust(w) if i < 2 else c.rjust(w)
            for i, (c, w) in enumerate(zip(cells, widths, strict=True))
        ]
        lines.append('  '.join(['', *texts, last]))
    return '\n'.join(lines)


def _number(x, factor, form):
    return '-' if x is None else format(factor * x, form)


def words(call: Call) -> str:
    """'attention 3200x3072 bfloat16, 16 heads, 1x50'."""
    text = f'{call.op} {"x".join(map(str, call.shape))} {call.dtype}'
    if call.op == 'attention':
        return f'{text}, {call.static[0]} heads, {_sizes(call.static[1])}'
    if call.op == 'move_images':
        return f'{text}, {_sizes(call.static[0])} to {_sizes(call.static[1])}'
    return text


def _sizes(segments):
    return ' + '.join(f'{images}x{tokens}' for images, tokens, _ in segments)
