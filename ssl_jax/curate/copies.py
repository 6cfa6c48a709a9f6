# SPDX-License-Identifier: Apache-2.0
"""Deduplication: images joined by similarities above a threshold are one image.

DINOv2 joins each image with those of its 64 nearest neighbours that have a cosine above 0.6 and
keeps one image of each connected component; of components that hold an image of an evaluation set
at 0.45 it keeps none. These thresholds are for embeddings of copy detection (SSCD); of another
model look at similarities.png.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from ssl_jax.fields import Range


@dataclasses.dataclass(frozen=True)
class Settings:
    threshold: Annotated[float, Range(-1, 1)] | None = 0.6  # cosine above which two are copies
    keep: Literal['largest', 'first'] = 'largest'  # of copies, in pixels; of equals the first
    mirrored: bool = False  # search mirrored images too; needs a model


@dataclasses.dataclass(frozen=True)
class Against:
    threshold: Annotated[float, Range(-1, 1)] = 0.45  # to images of an evaluation set
    # Drop all that is joined with such an image through others, at the same threshold.
    components: bool = True


Edges = tuple[np.ndarray, np.ndarray, np.ndarray]  # rows a < b, similarity: (m,) each


def edges(own: np.ndarray, similarity: np.ndarray, rows: np.ndarray, floor: float) -> Edges:
    """Pairs above a similarity, see `unique`.

    Args:
      own: (q,) row of each query.
      similarity, rows: (q, k) of its neighbours, see `search.nearest`.
      floor: cosine.
    """
    query, column = np.nonzero(similarity > floor)
    other, similarity = rows[query, column], similarity[query, column]
    query = own[query]
    return unique([(np.minimum(query, other), np.maximum(query, other), similarity)])


def unique(parts: Sequence[Edges]) -> Edges:
    """Each pair once, with its largest similarity, sorted; none of a row with itself."""
    a, b, similarity = (np.concatenate(x) for x in zip(*parts, strict=True))
    order = np.lexsort((-similarity, b, a))
    a, b, similarity = a[order], b[order], similarity[order]
    new = a != b  # a symmetric image is like its mirror image
    new[1:] &= (a[1:] != a[:-1]) | (b[1:] != b[:-1])
    return a[new], b[new], similarity[new]


def components(n: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Connected component (n,) of n rows joined by the edges a-b: the lowest row number in it."""
    graph = sparse.coo_matrix((np.ones(len(a), bool), (a, b)), (n, n))
    _, label = csgraph.connected_components(graph, directed=False)
    _, first, inverse = np.unique(label, return_index=True, return_inverse=True)
    return first[inverse]


def keepers(component: np.ndarray, size: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Row (n,) that is kept in the place of each row: the largest of its component.

    Args:
      component: (n,), see `components`.
      size: of rows (m,), larger is better; asked only for those that are not alone. Of equal ones
        the lowest row is kept.
    """
    kept = component.copy()
    _, inverse, count = np.unique(component, return_inverse=True, return_counts=True)
    rows = np.flatnonzero(count[inverse] > 1)
    if len(rows):
        order = rows[np.lexsort((rows, -np.asarray(size(rows)), component[rows]))]
        best = np.r_[True, component[order[1:]] != component[order[:-1]]]
        kept[order] = order[best][np.cumsum(best) - 1]
    return kept


def touched(component: np.ndarray, hit: np.ndarray) -> np.ndarray:
    """Whether a row (n,) is in a component with a row that is hit, bool (n,)."""
    return np.isin(component, component[hit])
