# SPDX-License-Identifier: Apache-2.0
"""Whose the tokens of a row of the batch are: images of one size, then those of the next."""

import typing

import jax.numpy as jnp


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


def per_row(x, segments):
    """(B * T, D) -> (B, T, D)."""
    return x.reshape(-1, tokens_per_row(segments), x.shape[-1])


def split(x, segments):
    """(B, T, D) -> for each segment of n images of N tokens (B, n, N, D), without padding."""
    parts, start = [], 0
    for n, tokens, padding in segments:
        rows = n * (tokens + padding)
        part = x[:, start : start + rows].reshape(x.shape[0], n, tokens + padding, x.shape[-1])
        parts.append(part[:, :, :tokens])
        start += rows
    return parts


def join(parts, segments):
    """Inverse of `split`; the padding is zeros."""
    padded = [
        jnp.pad(p, ((0, 0), (0, 0), (0, s.padding), (0, 0))) if s.padding else p
        for p, s in zip(parts, segments)
    ]
    return jnp.concatenate([p.reshape(p.shape[0], -1, p.shape[-1]) for p in padded], axis=1)
