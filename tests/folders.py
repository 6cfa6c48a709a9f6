# SPDX-License-Identifier: Apache-2.0
"""Small images as files."""

import cv2
import numpy as np


def image(seed, height=24, width=40):
    """uint8 (height, width, 3), smooth, so that a JPEG of it is close."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 255, (4, 4, 3), np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def encode(pixels, extension='.jpg'):
    return cv2.imencode(extension, pixels[..., ::-1] if pixels.ndim == 3 else pixels)[1].tobytes()


def write(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path
