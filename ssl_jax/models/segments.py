# SPDX-License-Identifier: Apache-2.0
"""Whose the tokens of a row of the batch are: images of one size, then those of the next."""

import typing


class Segment(typing.NamedTuple):
    """Images of one size, one after the other."""

    images: int
    tokens: int  # of each
    padding: int = 0  # rows behind each that belong to no image

    @property
    def length(self):
        return self.tokens + self.padding


def tokens_per_row(segments):
    """T of segments, padding included."""
    return sum(s.images * s.length for s in segments)
