# SPDX-License-Identifier: Apache-2.0
"""Patch tokens as colours and as maps of similarity, in numpy.

Position embeddings are a large part of a token, in a short run nearly all of it. Pictures are
therefore of tokens from which the mean token of their position, over many images, is subtracted.
"""

import numpy as np

AVERAGED = 64  # images that the mean token of a position is over, unless there are fewer
LEVELS = 256  # of the histogram that a threshold is found in
FEWEST = 3  # tokens of a foreground that three components can be taken of


def centred(tokens: np.ndarray, mean: np.ndarray | None) -> np.ndarray:
    """Tokens without the mean token of their position.

    Args:
      tokens: (B, N, D).
      mean: (N, D), over many images; None to subtract nothing.

    Returns:
      float32 (B, N, D).
    """
    tokens = np.nan_to_num(np.asarray(tokens, np.float32))
    return tokens if mean is None else tokens - np.asarray(mean, np.float32)


def components(flat: np.ndarray, count: int) -> np.ndarray:
    """The first principal components, (n, count), of rows (n, D).

    The sign of a component is arbitrary: here its largest coefficient is positive, so that pictures
    of one run can be compared. Beyond the rank they are zero.
    """
    flat = np.asarray(flat, np.float64)
    flat = flat - flat.mean(axis=0)
    _, vectors = np.linalg.eigh(flat.T @ flat)  # ascending
    vectors = vectors[:, ::-1][:, :count]
    peak = np.abs(vectors).argmax(axis=0)
    vectors = vectors * np.sign(vectors[peak, range(vectors.shape[1])])
    out = np.zeros((len(flat), count))
    out[:, : vectors.shape[1]] = flat @ vectors
    return out


def threshold(values: np.ndarray) -> float:
    """The value that splits the histogram of `values` in two with the least variance inside.

    References:
      Otsu, A threshold selection method from gray-level histograms, 1979
    """
    counts, edges = np.histogram(values, LEVELS)
    middle = (edges[1:] + edges[:-1]) / 2
    below = counts.cumsum()
    above = below[-1] - below
    total = (counts * middle).cumsum()
    with np.errstate(divide='ignore', invalid='ignore'):
        gap = total / below - (total[-1] - total) / above
    between = np.nan_to_num(below * above * gap**2, posinf=0.0)
    # Of equally good levels, between two separate groups, the middle one.
    best = np.flatnonzero(between >= between.max() * (1 - 1e-9))
    return float(edges[1 + best[(len(best) - 1) // 2]])


def foreground(tokens: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Which patches show objects: one side of a threshold on the first principal component.

    It is the side with the smaller share of the patches at the border of the images, where
    backgrounds are more often than objects.

    Args:
      tokens: (B, N, D) of all images together, see `centred`.
      grid: (h, w), N = h * w in raster order.

    Returns:
      bool (B, h, w).

    References:
      DINOv2, arXiv 2304.07193, section 7.5: the sign is chosen by eye there
    """
    b, n, d = tokens.shape
    first = components(tokens.reshape(-1, d), 1)[:, 0]
    high = (first > threshold(first)).reshape(b, *grid)
    border = np.ones(grid, bool)
    border[1:-1, 1:-1] = False
    if border.all():  # too small to have a middle
        return high if high.mean() <= 0.5 else ~high
    return high if high[:, border].mean() <= high[:, ~border].mean() else ~high


def colours(
    tokens: np.ndarray, grid: tuple[int, int], where: np.ndarray | None = None
) -> np.ndarray:
    """The first three principal components of tokens as red, green and blue.

    The components are those of the tokens of all images together, so that equal colours mean
    similar features across images. Each channel spans its 1st to 99th percentile.

    Args:
      tokens: (B, N, D), see `centred`.
      grid: (h, w), N = h * w in raster order.
      where: bool (B, h, w), the patches that count; others are black. Default all.

    Returns:
      uint8 (B, h, w, 3).
    """
    b, _, d = tokens.shape
    chosen = np.ones(b * grid[0] * grid[1], bool) if where is None else where.reshape(-1)
    out = np.zeros((len(chosen), 3), np.uint8)
    if chosen.sum() >= FEWEST:
        x = components(tokens.reshape(-1, d)[chosen], 3)
        low, high = np.percentile(x, (1, 99), axis=0)
        x = np.clip((x - low) / np.maximum(high - low, 1e-12), 0, 1)
        out[chosen] = (x * 255 + 0.5).astype(np.uint8)
    return out.reshape(b, *grid, 3)


def similarity(query: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Cosine similarity of one token (D,) to tokens (..., D), in [-1, 1]."""
    query, tokens = np.asarray(query, np.float32), np.asarray(tokens, np.float32)
    lengths = np.linalg.norm(tokens, axis=-1) * np.linalg.norm(query)
    return np.clip(tokens @ query / np.maximum(lengths, 1e-12), -1, 1)
