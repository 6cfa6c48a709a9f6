# SPDX-License-Identifier: Apache-2.0
"""Curves as inline SVG, and numbers as text; colours come from the style of the page."""

import dataclasses
import html
import math
from collections.abc import Sequence

import numpy as np

NUM_COLOURS = 6  # of the style of the page
DASHES = ('', '7 3', '2 3')  # of lines beyond the colours
WIDTH, HEIGHT = 440, 230
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 10, 30
BINS = 220  # of a long line; each keeps its lowest and its highest point
SMOOTHED = 200  # points from which on a mean over 2 % is drawn before the line
MARKED = 15  # points up to which each is a dot


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a chart."""

    label: str
    x: np.ndarray  # steps, ascending
    y: np.ndarray  # finite
    colour: int = 0  # a number beyond NUM_COLOURS is the same colour with dashes


def number(x: float | None) -> str:
    """A number as people write it; '' for None."""
    if x is None:
        return ''
    if isinstance(x, str):
        return x
    if not math.isfinite(x):
        return str(x)
    if float(x).is_integer() and abs(x) < 1e15:
        return f'{x:,.0f}'
    if abs(x) >= 1000:
        return f'{x:,.0f}'
    if abs(x) >= 10:
        return f'{x:.2f}'
    return f'{x:.4g}' if abs(x) >= 1e-3 else f'{x:.3g}'


def chart(lines: Sequence[Line], kind: str = '') -> str:
    """An SVG of lines over steps.

    Args:
      lines: one at least, each with one point at least.
      kind: 'zero' for an axis from 0 on; 'log' for logarithms where the values span a factor of 20.
    """
    y = np.concatenate([line.y for line in lines])
    low, high = float(y.min()), float(y.max())
    is_log = kind == 'log' and low > 0 and high > 20 * low
    if kind == 'zero' and low >= 0:
        low, high = 0.0, high * 1.05
    first = min(float(line.x[0]) for line in lines)
    last = max(float(line.x[-1]) for line in lines)
    steps = _ticks(first, last, 5) if last > first else [first]
    first, last = (first, last) if last > first else (first - 0.5, last + 0.5)
    if is_log:
        ticks = _log_ticks(low, high)
        low, high = math.log(low), math.log(high)
    else:
        margin = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
        low, high = (low if kind == 'zero' and low == 0 else low - margin), high + margin
        ticks = _ticks(low, high, 5)

    def across(x):
        return LEFT + (np.asarray(x) - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def up(y):
        y = np.log(y) if is_log else np.asarray(y)
        return HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in ticks:
        at = float(up(tick))
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        )
        parts.append(
            f'<text x="{LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{_short(tick)}</text>'
        )
    for tick in steps:
        at = float(across(tick))
        parts.append(
            f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">'
            f'{_short(tick)}</text>'
        )
    bottom = HEIGHT - BOTTOM
    parts.append(
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>'
    )
    for line in lines:
        parts += _line(line, across, up)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(", ".join(line.label for line in lines))} over steps">'
        f'{"".join(parts)}</svg>'
    )


def legend(labels: dict[int, str]) -> str:
    """Labels beside the colours of lines, {colour: label}."""
    marks = (
        f'<span><svg class="key" viewBox="0 0 22 8">{_path("M0 4H22", i)}</svg>'
        f'{html.escape(x)}</span>'
        for i, x in labels.items()
    )
    return f'<div class="legend">{"".join(marks)}</div>'


def _line(line, across, up):
    """Elements of one line."""
    x, y, i, parts = line.x, line.y, line.colour, []
    if len(x) > SMOOTHED:  # noise stays visible behind the mean
        parts.append(_path(_points(*_thinned(x, y), across, up), i, ' faint'))
        width = len(x) // 50
        kernel = np.ones(width) / width
        x, y = np.convolve(x, kernel, 'valid'), np.convolve(y, kernel, 'valid')
    parts.append(_path(_points(*_thinned(x, y), across, up), i))
    if len(line.x) <= MARKED:
        for step, value in zip(line.x, line.y, strict=True):
            text = html.escape(f'{line.label}, step {step:,.0f}: {number(value)}')
            parts.append(
                f'<circle class="c{i % NUM_COLOURS}" cx="{across(step):.1f}" cy="{up(value):.1f}" '
                f'r="3"><title>{text}</title></circle>'
            )
    return parts


def _path(d, i, more=''):
    dash = DASHES[i // NUM_COLOURS % len(DASHES)]
    dashes = f' stroke-dasharray="{dash}"' if dash else ''
    return f'<path class="line c{i % NUM_COLOURS}{more}"{dashes} d="{d}"/>'


def _points(x, y, across, up):
    pairs = zip(across(x), up(y), strict=True)
    return 'M' + 'L'.join(f'{a:.1f} {b:.1f}' for a, b in pairs)


def _thinned(x, y):
    """The lowest and the highest point of each of `BINS` parts."""
    if len(x) <= 2 * BINS:
        return x, y
    kept = {0, len(x) - 1}
    for part in np.array_split(np.arange(len(x)), BINS):
        kept |= {int(part[y[part].argmin()]), int(part[y[part].argmax()])}
    index = np.array(sorted(kept))
    return x[index], y[index]


def _ticks(low, high, count):
    """Round numbers between `low` and `high`, about `count`."""
    rough = (high - low) / count
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(m * size for m in (1, 2, 5, 10) if m * size >= 0.999 * rough)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low, high):
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if len(decades) > 4 else (1, 2, 5)
    ticks = [m * 10.0**d for d in decades for m in factors]
    return [tick for tick in ticks if low <= tick <= high]


def _short(x):
    for size, letter in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
        if abs(x) >= size:
            return f'{x / size:g}{letter}'
    if x == 0 or abs(x) >= 0.001:
        return f'{x:g}'
    digits, exponent = f'{x:.2g}'.split('e') if 'e' in f'{x:.2g}' else f'{x:.1e}'.split('e')
    return f'{float(digits):g}e{int(exponent)}'
