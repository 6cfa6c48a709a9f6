# SPDX-License-Identifier: Apache-2.0
"""Some images of another source, by reference."""

from typing import Any

import numpy as np

from ssl_jax.data import maps


class Subset:
    """The images `indices` of another source, with their labels and maps.

    Args:
      source: see `data.sources`.
      indices: int (n,), in the order of the new source; an image may be named several times.
    """

    notes: tuple = ()

    def __init__(self, source: Any, indices: np.ndarray):
        self._source = source
        self._indices = np.asarray(indices, np.int64)
        self.classes = source.classes
        labels = getattr(source, 'labels', None)
        self.labels = None if labels is None else np.asarray(labels)[self._indices]
        self.remote = getattr(source, 'remote', False)
        content, plus, times = source.fingerprint.partition('+')
        self.fingerprint = f'{content}[{len(self._indices)}]{plus}{times}'

    def __len__(self) -> int:
        return len(self._indices)

    @property
    def map_classes(self):
        return getattr(self._source, 'map_classes', None)

    @property
    def path(self) -> str | None:
        """Folder of the images, if it is one."""
        return getattr(self._source, 'path', None)

    def without_maps(self) -> Any:
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__, _source=maps.images_only(self._source))
        return new

    def __getitem__(self, i: int) -> dict:
        item = self._source[int(self._indices[i])]
        # `sources.in_classes` may have moved the labels.
        return item if self.labels is None else {**item, 'label': int(self.labels[i])}

    def describe(self, i: int) -> str:
        return self._source.describe(int(self._indices[i]))
