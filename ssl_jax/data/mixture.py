# SPDX-License-Identifier: Apache-2.0
"""Several sources as one, interleaved in the ratio of their weights."""

import bisect
import contextlib
import fractions
import functools
import heapq
import itertools
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from ssl_jax import fields
from ssl_jax.data import host, maps, order
from ssl_jax.run import errors, hashing

_MAPS = {'segmentation', 'depth'}


def parse(text: str) -> str | tuple[dict, ...]:
    """The `entries` of a list that is written as text; any other text as it is.

    Raises:
      UserError: it looks like a list and is none.
    """
    listed = text.strip()
    if not (listed.startswith('[') and listed.endswith(']')):
        return text
    found = fields.literal(listed)
    if not isinstance(found, list):
        raise errors.UserError(
            f"{text} is no list in Python's notation: write \"['DIR', 'OTHER']\" with both kinds "
            "of quotes; instead of 'DIR' also {'path': 'DIR', 'weight': 3}."
        )
    return entries(found)


def entries(spec: Sequence) -> tuple[dict, ...]:
    """The entries of a list of sources as plain dicts: paths, or specs that may have `weight`.

    Raises:
      UserError: the list is empty, or an entry is neither.
    """
    if not len(spec):
        raise errors.UserError('The list of sources is empty: give one or more.')
    found = []
    for entry in spec:
        if isinstance(entry, (str, os.PathLike)):
            entry = {'path': os.fspath(entry)}
        if not isinstance(entry, Mapping) and not hasattr(entry, 'to_dict'):
            raise errors.UserError(
                f'{entry!r} in the list of sources is neither a path nor a spec: write '
                "{'path': DIR, 'weight': 1}."
            )
        found.append(fields.tuples(entry.to_dict() if hasattr(entry, 'to_dict') else dict(entry)))
    return tuple(found)


def weights_of(entries: Sequence[Mapping]) -> list | None:
    """The weights of the entries of a list, None if none has one.

    Raises:
      UserError: some have one, or one is no number above 0.
    """
    found = [entry.get('weight') for entry in entries]
    if all(weight is None for weight in found):
        return None
    if None in found:
        missing = entries[found.index(None)]
        raise errors.UserError(
            f'{name_of(missing)} has no weight and other sources of the list have one: give all '
            'one, or none to show every image once in an epoch.'
        )
    ratio(found)
    return found


def name_of(entry: Mapping) -> str:
    """What an entry of a list is called."""
    return str(entry.get('path') or entry.get('name') or entry.get('source'))


def ratio(weights: Sequence[int | float]) -> list[int]:
    """Weights as the smallest whole numbers in the same ratio; 0.7 is 7/10, to all its digits.

    Raises:
      UserError: a weight is no number above 0.
    """
    exact = []
    for weight in weights:
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not number or not math.isfinite(weight) or weight <= 0:
            raise errors.UserError(
                f'weight={weight!r} of a source must be a number above 0: leave the source out, or '
                'give it one.'
            )
        exact.append(fractions.Fraction(str(weight)))
    common = math.lcm(*(x.denominator for x in exact))
    whole = [int(x * common) for x in exact]
    divisor = math.gcd(*whole)
    return [x // divisor for x in whole]


class Interleaved:
    """Order of a mixture: evenly spread, in exact ratio, each part in its own order.

    The parts are joined two by two into a tree, the lightest first. Of the first n samples of a
    node its left branch has n w_left / w, rounded. So after every sum(weights) samples each part
    had exactly its weight; before, a part is ahead or behind by less than one image in a mixture of
    up to three, and by less than 1.7 in any. Where a sample belongs is computed from its number,
    for weights of any size.

    Args:
      orders: of the parts, see `data.order`.
      weights: whole numbers above 0.
      starts: index of the first image of each part.
      names: of the parts.
    """

    def __init__(
        self, orders: Sequence, weights: Sequence[int], starts: Sequence[int], names: Sequence[str]
    ):
        self.size = sum(x.size for x in orders)
        self._orders, self._starts, self._names = orders, starts, names
        unique = itertools.count(len(weights))  # nodes cannot be compared
        heap = [(weight, k, k) for k, weight in enumerate(weights)]
        heapq.heapify(heap)
        while len(heap) > 1:
            (a, _, left), (b, _, right) = heapq.heappop(heap), heapq.heappop(heap)
            heapq.heappush(heap, (a + b, next(unique), (a, a + b, left, right)))
        self._tree = heap[0][2]  # (weight of the left branch, of both, left, right), or a part

    def __call__(self, sample: int, seed: int, draw: int | None = None) -> int:
        part, number = self.place(sample)
        seed = hashing.mix(seed, part)  # two sources of one size have two permutations
        return self._starts[part] + self._orders[part](number, seed, draw)

    def place(self, sample: int) -> tuple[int, int]:
        """(part, number of the sample within the part) of a sample."""
        node = self._tree
        while isinstance(node, tuple):
            weight, whole, left, right = node
            before = _share(sample, weight, whole)
            is_left = _share(sample + 1, weight, whole) > before
            node, sample = (left, before) if is_left else (right, sample - before)
        return node, sample

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` each part has."""
        found, nodes = [0] * len(self._orders), [(self._tree, samples)]
        while nodes:
            node, n = nodes.pop()
            if isinstance(node, tuple):
                weight, whole, left, right = node
                some = _share(n, weight, whole)
                nodes += [(left, some), (right, n - some)]
            else:
                found[node] = n
        return found

    def seen(self, samples: int) -> dict[str, int]:
        """`counts` by name."""
        return dict(zip(self._names, self.counts(samples), strict=True))


def _share(n, weight, whole):
    """n * weight / whole, rounded."""
    return (2 * n * weight + whole) // (2 * whole)


class Mixture:
    """Several sources as one; its images are those of the first source, then of the second, ...

    It has labels if all sources name the same classes, and the maps that all of them have.

    Args:
      sources: see `data.sources`.
      names: of the sources, for the log and the metrics.
      weights: samples of each are in this ratio; None: as many as the images of the source, so that
        each epoch shows every image once. An epoch is as many samples as there are images.

    Raises:
      UserError: a source is empty, or a weight is no number above 0.
    """

    def __init__(self, sources: Sequence, names: Sequence[str], weights: Sequence | None = None):
        for source, name in zip(sources, names, strict=True):
            if not len(source):
                raise errors.UserError(f'{name} has no images: leave it out of the mixture.')
        self._sources = list(sources)
        self._ends = list(itertools.accumulate(map(len, sources)))
        sizes = [order.epoch_size(source) for source in sources]
        weights = ratio(sizes if weights is None else weights)
        short = _unlike(names)
        self.order = Interleaved(
            [order.of(source) for source in sources], weights, [0, *self._ends[:-1]], short
        )
        self.labels, self.classes, said = _labels(sources, names)
        self.remote = any(getattr(source, 'remote', False) for source in sources)
        self.notes = [*_shares(names, short, sizes, weights), *said]
        for name, source in zip(short, sources, strict=True):
            self.notes += [f'{name}: {note}' for note in getattr(source, 'notes', ())]
        content, times = zip(*(s.fingerprint.partition('+')[::2] for s in sources), strict=True)
        times = f'+{hashing.digest(*times)}' if any(times) else ''
        self.fingerprint = f'{hashing.digest("mixture", *content)}{times}'

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> dict:
        part, j = self._find(i)
        found = self._sources[part][j]
        item = {key: value for key, value in found.items() if key != 'label'}
        if self._differing:
            raise errors.UserError(self._differing)
        if self.labels is not None:
            item['label'] = int(self.labels[i])
        elif self.classes is not None:
            item['label'] = found['label']
        return item

    def describe(self, i: int) -> str:
        part, j = self._find(i)
        return self._sources[part].describe(j)

    @property
    def map_classes(self) -> tuple[str, ...] | None:
        """Names of the classes of the maps, if all sources have some."""
        names = [getattr(source, 'map_classes', None) for source in self._sources]
        return maps.class_names(*self._sources) if all(names) else None

    def without_maps(self) -> 'Mixture':
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__, _sources=[*map(maps.images_only, self._sources)])
        new.__dict__['_differing'] = ''
        return new

    def _find(self, i):
        """(source, index in it) of image `i`."""
        i = range(len(self))[i]
        part = bisect.bisect_right(self._ends, i)
        return part, i - (self._ends[part - 1] if part else 0)

    @functools.cached_property
    def _differing(self):
        """What is wrong if some sources have maps that others lack, for those who read maps."""
        found = {}
        for source in self._sources:
            with contextlib.suppress(OSError, host.DecodeError):
                found.setdefault(frozenset(_MAPS & source[0].keys()), source)
        if len(found) < 2:
            return ''
        (a, first), (b, second), *_ = found.items()
        a, b = (' and '.join(sorted(x, reverse=True)) or 'no maps' for x in (a, b))
        return (
            f'{first.describe(0)} ... have {a} and {second.describe(0)} ... {b}: mix sources with '
            'the same maps.'
        )


def _labels(sources, names):
    """(labels or None, class names or None, sentences for the log) of all."""
    first = sources[0].classes
    if any(source.classes != first for source in sources):
        kinds = (
            f'{len(s.classes or ())} in {name}' for s, name in zip(sources, names, strict=True)
        )
        return None, None, [f'without labels, as classes differ: {", ".join(kinds)}']
    labels = [getattr(source, 'labels', None) for source in sources]
    if first is None or any(x is None for x in labels):
        return None, first, []
    return np.concatenate(labels), first, []


def _shares(names, short, sizes, weights):
    """A line for the log on each source."""
    epoch, whole = sum(sizes), sum(weights)
    for name, as_logged, n, weight in zip(names, short, sizes, weights, strict=True):
        times = epoch * weight / whole / n
        yield (
            f'{weight / whole:.1%} of {name}, {n:,} images, each {times:.3g} times in an epoch '
            f'(images/{as_logged} in the metrics)'
        )


def _unlike(names):
    """The last parts of the names, with numbers where they are alike."""
    last = [os.path.basename(name.rstrip('/')) or name for name in names]
    count = Counter(last)
    return [x if count[x] == 1 else f'{x}.{k}' for k, x in enumerate(last)]
