# SPDX-License-Identifier: Apache-2.0
"""Forms chosen by measurement: forged forms, forged clocks and forged verdicts."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.kernels import choice, forms
from ssl_jax.kernels.forms import Call

CALL = Call('square', (16, 8), 'float32', ())
XLA = 1.0  # seconds


@jax.custom_vjp
def wrong_backward(x):
    return x * x


wrong_backward.defvjp(lambda x: (x * x, x), lambda x, grad: (3 * x * grad,))


def crash(x):
    raise TypeError('no such block\nand more')


def crash_at_run(x):
    def fail(x):
        raise RuntimeError('halted')

    return jax.pure_callback(fail, jax.ShapeDtypeStruct(x.shape, x.dtype), jax.lax.stop_gradient(x))


calls_of_noise = []


def noise(x):
    """x * x with one bit that differs from call to call."""

    def bit(_):
        calls_of_noise.append(0)
        return np.float32(1 + (len(calls_of_noise) % 2) * 2**-22)

    return x * x * jax.pure_callback(bit, jax.ShapeDtypeStruct((), jnp.float32), 0)


SQUARES = {
    'good': lambda x: x * x,
    'other_rounding': lambda x: x * x * (1 + 2**-20),
    'half_a_percent_off': lambda x: x * x * 1.005,
    'one_row_off': lambda x: (x * x).at[3].add(0.01),
    'wrong_backward': wrong_backward,
    'nan': lambda x: x * x + jnp.where(x > 1e9, 0, jnp.nan),
    'crash': crash,
    'crash_at_run': crash_at_run,
    'noise': noise,
    'does_not_fit': lambda x: x,
}


@pytest.fixture
def forged(monkeypatch):
    """forged('good', ...) gives `square` these forms and returns its operations for `measure`."""

    def run(x):
        fits = {name: (lambda name=name: name != 'does_not_fit') for name in SQUARES}
        form = forms.pick('square', x, (), fits)
        return SQUARES[form](x) if form else x * x

    def example(call, draw):
        return choice.Example(run, (draw(call.shape),), draw(call.shape))

    def forge(*names):
        monkeypatch.setitem(forms.FORMS, 'square', {'tpu': names})
        return {'square': example}

    return forge


def measured(ops, times=None, calls=(CALL,), said=None):
    """Verdicts where every form takes half of XLA's second, or the times given."""
    seconds = {choice.XLA: XLA, **(times or {})}
    return choice.measure(
        calls,
        platform='tpu',
        ops=ops,
        timer=lambda form, run: seconds.get(form, XLA / 2),
        log=(said if said is not None else []).append,
    )


@pytest.mark.parametrize(
    'form, seconds, used, reason',
    [
        ('good', 0.5, True, 'faster'),
        ('other_rounding', 0.5, True, 'faster'),
        ('good', 0.99, False, 'not faster'),  # noise
        ('good', 2.0, False, 'not faster'),
        ('half_a_percent_off', 0.5, False, 'wrong'),
        ('one_row_off', 0.5, False, 'wrong'),
        ('wrong_backward', 0.5, False, 'wrong'),
        ('nan', 0.5, False, 'wrong: NaN or infinity'),
        ('noise', 0.5, False, 'other bits each time'),
        ('does_not_fit', 0.5, False, 'does not fit'),
        ('crash', 0.5, False, 'TypeError: no such block'),
        ('crash_at_run', 0.5, False, 'JaxRuntimeError: .*'),
    ],
)
def test_a_form_is_used_if_it_agrees_and_is_faster(forged, form, seconds, used, reason):
    said = []
    (verdict,) = measured(forged(form), {form: seconds}, said=said)
    assert (verdict.used, verdict.form, verdict.call) == (used, form, CALL)
    assert re.fullmatch(reason, verdict.reason, re.DOTALL), verdict.reason
    assert len(said) == ('crash' in form)
    assert all('square 16x8 float32' in line and '\n' not in line for line in said)
    last = choice.table([verdict]).splitlines()[-1]
    assert last.endswith('used' if used else f'  {verdict.reason}')


def test_of_several_right_forms_the_fastest_is_used_and_a_crash_takes_none_with_it(forged):
    ops = forged('crash', 'other_rounding', 'half_a_percent_off', 'good')
    found = measured(ops, {'good': 0.4, 'half_a_percent_off': 0.1})
    assert [v.form for v in found if v.used] == ['good']
    assert found[1].reason == 'slower than good' and found[1].seconds == 0.5
    assert len(found) == 4


def test_a_noisy_form_is_used_where_xlas_is_noisy_too(forged):
    ops, square = forged('noise'), SQUARES['noise']

    def example(call, draw):
        found = ops['square'](call, draw)

        def run(x):
            form = forms.pick('square', x, (), dict.fromkeys(SQUARES, lambda: True))
            return square(x) if form else square(x)

        return found._replace(run=run)

    (verdict,) = measured({'square': example})
    assert verdict.used


def test_where_xlas_form_fails_nothing_is_used(forged):
    ops = forged('good', 'nan')
    too_large = lambda call, draw: ops['square'](call, draw)._replace(run=crash)  # noqa: E731
    said, found = [], []
    found = measured({'square': too_large}, said=said)
    assert [v.used for v in found] == [False, False] and len(said) == 2
    assert found[0].reason == "XLA's form fails, TypeError: no such block"


def test_in_bfloat16_rounding_is_no_error(forged):
    call = CALL._replace(dtype='bfloat16')
    (verdict,) = measured(forged('other_rounding'), calls=[call])
    assert verdict.used and 1e-4 < verdict.error <= verdict.reference_error + 2**-7
    (verdict,) = measured(forged('half_a_percent_off'), calls=[call])  # within an ulp
    assert verdict.used


def test_on_a_cpu_nothing_is_measured(forged):
    assert choice.measure([CALL], ops=forged('crash')) == []


def test_the_clock_divides_by_the_repetitions_and_waits(monkeypatch):
    now, counts = [0.0], []

    def run(count):
        counts.append(count)
        now[0] += 0.001 + 0.002 * count  # what it costs to start, and each call

    monkeypatch.setattr(choice.time, 'perf_counter', lambda: now[0])
    assert choice.seconds('form', run) == pytest.approx(0.002 + 0.001 / 7)
    assert counts == [1, 1, 7, 7, 7, 7, 7]  # 20 ms or more


@pytest.mark.parametrize('call', choice.typical(), ids=choice.words)
def test_an_example_asks_for_a_form_of_the_call_it_was_made_from(call):
    def example():
        made = choice.OPS[call.op](call, lambda shape, dtype=call.dtype: jnp.zeros(shape, dtype))
        if made.grads is None:
            return made.run(*made.args)
        out, backward = jax.vjp(made.run, *made.args)
        return backward(made.grads)

    with forms.recording('tpu') as seen:
        jax.eval_shape(example)
    assert seen == {call: ('pallas',)}
