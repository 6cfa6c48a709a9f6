# SPDX-License-Identifier: Apache-2.0
"""The crops of an image that a method asks the host for."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class View:
    """Crops that the host cuts from each image: `batch[name]`, uint8 (B, count, size, size, 3).

    Attributes:
      name: key in the batch.
      size: side of the square crop in pixels.
      count: how many crops per image, drawn independently.
      scale: range of the crop's share of the image area.
      ratio: range of its aspect ratio, width / height.
      interpolation: 'nearest', 'bilinear' or 'bicubic'.
    """

    name: str
    size: int
    count: int = 1
    scale: tuple = (0.2, 1.0)
    ratio: tuple = (3 / 4, 4 / 3)
    interpolation: str = 'bicubic'
