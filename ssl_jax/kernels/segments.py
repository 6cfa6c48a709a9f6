# SPDX-License-Identifier: Apache-2.0
"""Layout of a row's tokens: the images of one size, then those of the next."""

import typing
from collections.abc import Sequence

import jax
import jax.numpy as jnp


class Segment(typing.NamedTuple):
    """Consecutive images of one size."""

    images: int
    tokens: int  # per image
    padding: int = 0  # tokens after each image

    @property
    def length(self) -> int:
        """Tokens per image, padding included."""
        return self.tokens + self.padding


def tokens_per_row(segments: Sequence[Segment]) -> int:
    """T, the number of tokens in a row of the batch, padding included."""
    return sum(s.images * s.length for s in segments)


def per_row(x: jax.Array, segments: Sequence[Segment]) -> jax.Array:
    """(B * T, D) -> (B, T, D)."""
    return x.reshape(-1, tokens_per_row(segments), x.shape[-1])


def split(x: jax.Array, segments: Sequence[Segment]) -> list[jax.Array]:
    """(B, T, D) -> one (B, n, N, D) per segment of n images of N tokens, without padding."""
    parts, start = [], 0
    for n, tokens, padding in segments:
        rows = n * (tokens + padding)
        part = x[:, start : start + rows].reshape(x.shape[0], n, tokens + padding, x.shape[-1])
        parts.append(part[:, :, :tokens])
        start += rows
    return parts


def join(parts: Sequence[jax.Array], segments: Sequence[Segment]) -> jax.Array:
    """Inverse of `split`; padding is filled with zeros."""
    padded = [
        jnp.pad(p, ((0, 0), (0, 0), (0, s.padding), (0, 0))) if s.padding else p
        for p, s in zip(parts, segments, strict=True)
    ]
    return jnp.concatenate([p.reshape(p.shape[0], -1, p.shape[-1]) for p in padded], axis=1)
