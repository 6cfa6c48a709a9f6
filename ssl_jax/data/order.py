# SPDX-License-Identifier: Apache-2.0
"""Which image each training sample shows: a pure function of the seed and the sample's number.

A source may have an `order`, which is callable and has `size`:

  order(sample, seed)         index of the image of sample 0, 1, 2, ...
  order(sample, seed, draw)   index of the image instead, if that one cannot be decoded; `draw` is a
                              random number of 32 bits
  size                        images of an epoch, on average where epochs differ
  seen(samples)               (optional) {name: how many of the first samples are of that part}

Without one, every image appears once per epoch (`Permuted`).
"""

from typing import Any

import grain

from ssl_jax.run import hashing


def permuted(position: int, n: int, seed: int, epoch: int) -> int:
    """Element `position` of the permutation of 0 ... n - 1 of (seed, epoch)."""
    if n == 1:
        return 0
    return grain.experimental.index_shuffle(
        position, max_index=n - 1, seed=hashing.mix(seed, epoch), rounds=4
    )


class Permuted:
    """Every image once per epoch; sample g is position g % n of the permutation of epoch g // n."""

    def __init__(self, n: int):
        self.size = n

    def __call__(self, sample: int, seed: int, draw: int | None = None) -> int:
        if draw is not None:
            return draw % self.size
        epoch, position = divmod(sample, self.size)
        return permuted(position, self.size, seed, epoch)


def of(source: Any) -> Any:
    """The order of a source."""
    return getattr(source, 'order', None) or Permuted(len(source))


def epoch_size(source: Any) -> int:
    """Images of an epoch, to which durations in epochs refer; see `size` above."""
    return max(1, round(of(source).size))


def seen(source: Any, samples: int) -> dict[str, int]:
    """{'images/<part>': images seen after `samples` samples} of a source of several parts."""
    count = getattr(of(source), 'seen', None)
    return {f'images/{name}': n for name, n in count(samples).items()} if count else {}
