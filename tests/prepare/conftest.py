# SPDX-License-Identifier: Apache-2.0
"""Small folders of images of several formats, labelled, and with maps."""

import numpy as np
import pytest

from folders import encode, image, write


@pytest.fixture
def folder(tmp_path):
    """23 images of two classes: JPEG, PNG and WebP of 40 x 24 pixels."""
    root = tmp_path / 'images'
    for i in range(23):
        extension = ('.jpg', '.png', '.webp')[i % 3]
        name = ('a yak', 'owl')[i % 2]
        write(root / name / f'photo {i:02}.v1{extension}', encode(image(i), extension))
    return root


@pytest.fixture
def pairs(tmp_path):
    """7 images with class maps of 3 classes, 9 ignored, and depth in millimetres."""
    root = tmp_path / 'pairs'
    for i in range(7):
        write(root / 'images' / f'{i}.jpg', encode(image(i)))
        classes = np.arange(24 * 40).reshape(24, 40).astype(np.uint8) // 4 % 3
        classes[0, i] = 9
        write(root / 'labels' / f'{i}.png', encode(classes, '.png'))
        depth = np.full((24, 40), 1000 + i, np.uint16)
        write(root / 'depth' / f'{i}.png', encode(depth, '.png'))
    write(root / 'classes.txt', b'sky\nroad\ntree\n')
    return root
