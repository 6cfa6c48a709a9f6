# SPDX-License-Identifier: Apache-2.0
"""Rows of findings: of one process, and of all processes as one, which names the odd one."""

import collections
import contextlib
import dataclasses
import os
import statistics
import traceback
from collections.abc import Iterator, Sequence

from ssl_jax.run import errors

VERDICTS = ('ok', 'warn', 'bad')
ODD = 0.2  # a process is odd if its number differs from the median by a larger share than this


@dataclasses.dataclass(frozen=True)
class Row:
    """One finding."""

    what: str
    value: str | float  # a number is compared between processes
    unit: str = ''  # of a number
    expected: str = ''
    verdict: str = 'ok'  # one of VERDICTS
    next: str = ''  # what to do
    less_is_better: bool = False
    odd: float = ODD
    same: bool = False  # whether a text must be equal in all processes

    def text(self) -> str:
        """The value with its unit."""
        return self.value if isinstance(self.value, str) else f'{spell(self.value)} {self.unit}'


def spell(number: float) -> str:
    """Three digits, or more before the point."""
    return f'{number:,.0f}' if abs(number) >= 100 else f'{number:.3g}'


@contextlib.contextmanager
def caught(found: list[Row], what: str, next: str = '') -> Iterator[None]:
    """``with caught(found, what):`` turns an error into a row: one finding hides no other."""
    try:
        yield
    except Exception as error:
        if os.environ.get('SSL_JAX_TRACEBACK'):
            traceback.print_exc()
        found.append(Row(what, sentence(error), verdict='bad', next=next))


def sentence(error: Exception) -> str:
    """An error as one line; of what is no error of users or the system, with its type."""
    line = ' '.join(str(error).split())
    line = line if len(line) <= 300 else f'{line[:300]}...'
    known = isinstance(error, errors.UserError | OSError)
    return line if known and line else f'{type(error).__name__}: {line}'


def merge(hosts: Sequence[tuple[str, Sequence[Row]]]) -> list[Row]:
    """Rows of all processes as one table, in order of appearance.

    A number becomes minimum, median and maximum; who is more than `odd` from the median is named.
    Of two processes the better one counts as the median. The verdict is the worst one.

    Args:
      hosts: (name of the process, its rows), by process.
    """
    if len(hosts) == 1:
        return list(hosts[0][1])
    by_what = collections.defaultdict(list)
    for name, rows in hosts:
        for row in rows:
            by_what[row.what].append((name, row))
    return [_one(rows, len(hosts)) for rows in by_what.values()]


def _one(named, count):
    """One row of those of several processes."""
    worst = max((row for _, row in named), key=lambda row: VERDICTS.index(row.verdict))
    differ = len({row.verdict for _, row in named}) > 1
    named_worst = [n for n, row in named if differ and row.verdict == worst.verdict]
    verdict, odd = worst.verdict, {}
    numbers = {name: row.value for name, row in named if not isinstance(row.value, str)}
    if len(numbers) == len(named) > 1:
        middle = statistics.median_low if worst.less_is_better else statistics.median_high
        median = middle(numbers.values())
        odd = {n: f'{spell(x)}' for n, x in numbers.items() if abs(x - median) > worst.odd * median}
        low, high = min(numbers.values()), max(numbers.values())
        value = f'{spell(low)} / {spell(median)} / {spell(high)} {worst.unit}'
        value += f' (min / median / max of {len(named)})'
        verdict = 'warn' if odd and verdict == 'ok' else verdict
    else:
        texts = collections.Counter(row.text() for _, row in named)
        value = named[0][1].text() if worst.verdict == 'ok' else worst.text()
        if worst.same:
            usual = texts.most_common(1)[0][0]
            odd = {n: row.text() for n, row in named if row.text() != usual}
            value = usual if odd else value
            verdict = 'bad' if odd else verdict
        elif len(texts) > 1 and not named_worst:
            value += f' ({named[0][0]}; others differ)'
    names = [f'{name}: {text}' for name, text in odd.items()] or named_worst
    value += f'; odd: {_some(names)}' if names else ''
    if len(named) < count and worst.verdict != 'ok' and not names:
        value += f' ({_some([name for name, _ in named])})'
    next = worst.next or (f'look at {_some([*odd])} first' if odd else '')
    return dataclasses.replace(worst, value=value, unit='', verdict=verdict, next=next)


def _some(names):
    return ', '.join(names[:4]) + (f' and {len(names) - 4} more' if len(names) > 4 else '')


def lines(rows: Sequence[Row]) -> list[str]:
    """The table: a line per row, and one for what to do."""
    out = []
    for row in rows:
        expected = f'   (expected {row.expected})' if row.expected else ''
        out.append(f'  {row.verdict:<5} {row.what:<22} {row.text()}{expected}'.rstrip())
        if row.next:
            out.append(f'        -> {row.next}')
    return out
