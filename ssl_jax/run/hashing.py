# SPDX-License-Identifier: Apache-2.0
"""Digests of data, and hashes that are equal on all machines and in all versions."""

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
from etils import epath

GOLDEN = 0x9E3779B97F4A7C15  # of splitmix64
MASK = 2**64 - 1


def digest(*parts: Any) -> str:
    """SHA-256 of strings, numbers and bytes in order, 16 hex digits."""
    sha = hashlib.sha256()
    for part in parts:
        part = part if isinstance(part, bytes) else str(part).encode('utf-8', 'surrogateescape')
        sha.update(len(part).to_bytes(8, 'little') + part)
    return sha.hexdigest()[:16]


def text_id(text: str) -> str:
    """SHA-256 of a text, 8 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def sha256(paths: Iterable[epath.Path]) -> str:
    """SHA-256 of the concatenated files."""
    sha = hashlib.sha256()
    for path in paths:
        _update(sha, path)
    return sha.hexdigest()


def sha256_folder(folder: epath.Path) -> str:
    """SHA-256 of names and bytes of all files below a folder, sorted by name."""
    sha = hashlib.sha256()
    for name, path in sorted(_walk(folder, '')):
        sha.update(f'{name}\n'.encode())
        _update(sha, path)
    return sha.hexdigest()


def _update(sha, path):
    with path.open('rb') as file:
        while block := file.read(2**20):
            sha.update(block)


def _walk(folder, prefix):
    for path in folder.iterdir():
        if path.is_dir():
            yield from _walk(path, f'{prefix}{path.name}/')
        else:
            yield f'{prefix}{path.name}', path


def mix(*numbers: int) -> int:
    """32 bits from integers."""
    h = 0
    for x in numbers:
        h = _splitmix64(h + x)
    return h >> 32


def mix_range(n: int, seed: int, start: int = 0) -> np.ndarray:
    """uint64 (n,): splitmix64 of start .. start + n - 1 in stream `seed`."""
    first = np.uint64((start + seed * GOLDEN) & MASK)
    return _splitmix64(np.arange(n, dtype=np.uint64) + first)


def _splitmix64(h):
    """One step of splitmix64 for an int or uint64 (n,)."""
    h = (h + GOLDEN) & MASK
    h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & MASK
    return h ^ (h >> 31)
