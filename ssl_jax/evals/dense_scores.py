# SPDX-License-Identifier: Apache-2.0
"""Scores of class maps and depth maps, regions that are scored, and sliding windows, in numpy."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from ssl_jax.data import maps
from ssl_jax.run import errors

# More than d1: the others are errors, smaller is better.
DEPTH_SCORES = ('AbsRel', 'SqRel', 'RMSE', 'RMSElog', 'log10', 'SiLog', 'd1', 'd2', 'd3')
MIN_PIXELS = 10  # of an image that is scored


def intersection_union(
    pred: np.ndarray, gt: np.ndarray, num_classes: int, ignore: int = maps.IGNORED
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of each class in both maps, and in either; int64 (K,), (K,).

    Add them up over all images, then see `iou`.

    Args:
      pred: int (...), 0..K-1.
      gt: int (...), 0..K-1 or `ignore`, where neither map counts.
      num_classes: K.
    """
    pred, gt = pred[gt != ignore], gt[gt != ignore]
    counts = [np.bincount(x, minlength=num_classes) for x in (pred[pred == gt], pred, gt)]
    both, a, b = (x[:num_classes].astype(np.int64) for x in counts)
    return both, a + b - both


def iou(intersection: np.ndarray, union: np.ndarray) -> np.ndarray:
    """IoU of each class in percent, float64 (K,); NaN for a class that neither map has."""
    with np.errstate(invalid='ignore'):
        return 100 * intersection / np.where(union > 0, union, np.nan)


def mean_iou(per_class: np.ndarray, absent: str) -> float:
    """Mean over the classes.

    Args:
      per_class: of `iou`.
      absent: classes that neither map has are 'left out' (mmseg, used by DINOv2) or count as
        'zero' (Pixio).
    """
    return float(np.nan_to_num(per_class).mean() if absent == 'zero' else np.nanmean(per_class))


def depth_scores(pred: np.ndarray, gt: np.ndarray) -> dict[str, float]:
    """DEPTH_SCORES of the measured pixels of one image; the mean over images is reported.

    AbsRel = mean(|p - g| / g), SqRel = mean((p - g)^2 / g), RMSE and RMSElog roots of the mean
    square of p - g and log p - log g, log10 the mean of |log10 p - log10 g|, SiLog =
    sqrt(mean(e^2) - mean(e)^2 / 2) with e = log g - log p, dk the share of pixels with
    max(p/g, g/p) < 1.25^k.

    Args:
      pred, gt: positive depths (n,).

    References:
      Eigen et al., arXiv 1406.2283; Pixio `monodepth/util/misc.py: eval_depth`
    """
    pred, gt = np.asarray(pred, np.float64), np.asarray(gt, np.float64)
    error, logs = pred - gt, np.log(gt) - np.log(pred)
    ratio = np.maximum(pred / gt, gt / pred)
    values = (
        np.mean(np.abs(error) / gt),
        np.mean(np.square(error) / gt),
        np.sqrt(np.mean(np.square(error))),
        np.sqrt(np.mean(np.square(logs))),
        np.mean(np.abs(logs)) / np.log(10),
        np.sqrt(max(np.mean(np.square(logs)) - 0.5 * np.mean(logs) ** 2, 0.0)),
        *(np.mean(ratio < 1.25**k) for k in (1, 2, 3)),
    )
    return {name: float(value) for name, value in zip(DEPTH_SCORES, values, strict=True)}


@dataclasses.dataclass(frozen=True)
class Region:
    """Which depths of a data set are scored."""

    min_depth: float  # metres, or the unit of the source
    max_depth: float
    crop: str = ''  # 'eigen' (NYU), 'garg' (KITTI after the KB crop) or '' for all


REGIONS = {
    'nyu': Region(1e-3, 10.0, 'eigen'),
    'kitti': Region(1e-3, 80.0, 'garg'),
    'scenes': Region(0.5, 10.0),  # rendered scenes have 0.7 to 9
}


def scored(gt: np.ndarray, region: Region) -> np.ndarray:
    """The pixels of a depth map (H, W) that are scored, bool (H, W).

    Eigen's crop of NYU is rows 45..470 and columns 41..600 of 480 x 640; Garg's crop of KITTI are
    the shares 0.40810811..0.99189189 of the rows and 0.03594771..0.96405229 of the columns.

    References:
      DINOv2 §7.4 after Eigen et al., arXiv 1406.2283, and Garg et al., arXiv 1603.04992
    """
    mask = (gt >= region.min_depth) & (gt <= region.max_depth)
    h, w = gt.shape
    if region.crop == 'eigen':
        if (h, w) != (480, 640):
            raise errors.UserError(
                f'A depth map of {w}x{h} is not of NYU, which has 640x480: give another dataset.'
            )
        rows, columns = (45, 471), (41, 601)
    elif region.crop == 'garg':
        rows = int(0.40810811 * h), int(0.99189189 * h)
        columns = int(0.03594771 * w), int(0.96405229 * w)
    else:
        return mask
    inside = np.zeros_like(mask)
    inside[slice(*rows), slice(*columns)] = True
    return mask & inside


def corners(size: int, crop: int, stride: int, shifted: bool) -> list[int]:
    """First pixels of the windows along an axis of `size` pixels.

    Args:
      shifted: whether the last window is moved back inside, as in mmseg; otherwise windows start
        at every multiple of the stride and stick out, as in Pixio.
    """
    if not shifted:
        return list(range(0, size, stride))
    count = max(size - crop + stride - 1, 0) // stride + 1
    return [max(min(i * stride + crop, size) - crop, 0) for i in range(count)]


def sliding(
    images: Iterable[np.ndarray],
    predict: Callable,
    *,
    crop: int | None,
    stride: int,
    shifted: bool,
    batch_size: int,
) -> Iterator[np.ndarray]:
    """Predictions of whole images, averaged over the windows that see a pixel, in order.

    Windows of several images are predicted together.

    Args:
      images: (H, W, C) each, of any sizes.
      predict: (batch_size, h, w, C) -> (batch_size, h, w) or (batch_size, h, w, K), numpy.
      crop: side of the windows; None for one window that is the image. With `shifted`, windows
        are smaller where the image is; otherwise they are filled with zeros.
      stride: between windows.
      shifted: see `corners`.
      batch_size: windows at a time; missing ones are zeros.

    Yields:
      (H, W) or (H, W, K) float32.

    References:
      mmseg `EncoderDecoder.slide_inference`; Pixio `eval_semseg.py`, `eval_monodepth.py`
    """
    waiting, queue = [], []  # images in order; windows that are not predicted yet

    def flush():
        if not queue:
            return
        batch = np.stack([window for *_, window in queue])
        fill = [(0, batch_size - len(batch))] + [(0, 0)] * 3
        found = np.asarray(predict(np.pad(batch, fill)))[: len(batch)]
        for (entry, y, x, _), piece in zip(queue, found, strict=True):
            if entry['sum'] is None:
                shape = entry['size'] + piece.shape[2:]
                entry['sum'] = np.zeros(shape, np.float32)
                entry['count'] = np.zeros(entry['size'] + (1,) * (piece.ndim - 2), np.float32)
            part = np.s_[y : y + piece.shape[0], x : x + piece.shape[1]]
            h, w = entry['count'][part].shape[:2]
            entry['sum'][part] += piece[:h, :w]
            entry['count'][part] += 1
            entry['left'] -= 1
        queue.clear()

    def finished():
        while waiting and not waiting[0]['left']:
            entry = waiting.pop(0)
            yield entry['sum'] / entry['count']

    for image in images:
        h, w = image.shape[:2]
        side_y, side_x = (crop, crop) if crop else (h, w)
        at = [
            (y, x)
            for y in corners(h, side_y, stride if crop else h, shifted)
            for x in corners(w, side_x, stride if crop else w, shifted)
        ]
        entry = dict(size=(h, w), left=len(at), sum=None, count=None)
        waiting.append(entry)
        for y, x in at:
            window = image[y : y + side_y, x : x + side_x]
            if not shifted:
                fill = (side_y - window.shape[0], side_x - window.shape[1])
                window = np.pad(window, [(0, fill[0]), (0, fill[1]), (0, 0)])
            if queue and queue[-1][-1].shape != window.shape:
                flush()
            queue.append((entry, y, x, window))
            if len(queue) == batch_size:
                flush()
        yield from finished()
    flush()
    yield from finished()
