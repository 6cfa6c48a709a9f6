# SPDX-License-Identifier: Apache-2.0
"""Nine photographs of CamVid in other shapes and formats, and timm's transform in plain Pillow."""

import io
import math
import os
import pathlib

import PIL.Image
import pytest

# Scene, (width, height) it is resized to or None, box, degrees, format.
SHAPES = {
    'whole.jpg': (0, None, None, 0, None),
    'portrait.jpg': (1, None, None, 90, dict(format='JPEG', quality=92)),
    'large.jpg': (2, (1440, 1080), None, 0, dict(format='JPEG', quality=95, subsampling=0)),
    'odd.jpg': (3, None, (7, 3, 340, 254), 0, dict(format='JPEG', quality=75)),
    'progressive.jpg': (4, (701, 1003), None, 0, dict(format='JPEG', progressive=True)),
    'wide.png': (5, None, (0, 100, 480, 217), 0, dict(format='PNG')),
    'tall.png': (6, (301, 467), None, 0, dict(format='PNG')),
    'square.png': (7, None, (60, 0, 420, 360), 0, dict(format='PNG')),
    'small.png': (8, (47, 39), None, 0, dict(format='PNG')),
}


def photos() -> dict[str, bytes]:
    """{name: file}; skips where CamVid is not."""
    here = pathlib.Path(__file__).resolve().parents[2] / 'shared' / 'data'
    root = pathlib.Path(os.environ.get('SSL_JAX_DATA') or here)
    scenes = sorted((root / 'camvid' / 'images' / 'test').glob('*.jpg'))[::25]
    if len(scenes) < len(SHAPES):
        pytest.skip(f'no camvid/ in {root}; set SSL_JAX_DATA')
    out = {}
    for name, (scene, size, box, degrees, options) in SHAPES.items():
        data = scenes[scene].read_bytes()
        if options:
            image = PIL.Image.open(io.BytesIO(data))
            image = image.crop(box) if box else image
            image = image.resize(size) if size else image
            file = io.BytesIO()
            image.rotate(degrees, expand=True).save(file, **options)
            data = file.getvalue()
        out[name] = data
    return out


def timm_eval(image: PIL.Image.Image, cfg: dict) -> PIL.Image.Image:
    """timm's `create_transform(**cfg)` up to the tensor, for square sizes.

    Source: timm 1.0.31, `data/transforms_factory.py: transforms_imagenet_eval`, and torchvision's
    Resize and CenterCrop.
    """
    (_, size, _), (w, h) = cfg['input_size'], image.size
    scale = math.floor(size / cfg['crop_pct'])
    if cfg['crop_mode'] == 'squash':
        new = scale, scale
    elif cfg['crop_mode'] == 'border':
        ratio = max(h / scale, w / scale)
        new = round(w / ratio), round(h / ratio)
    else:
        new = (scale, int(scale * h / w)) if w <= h else (int(scale * w / h), scale)
    image = image.resize(new, PIL.Image.Resampling[cfg['interpolation'].upper()])
    fill = (0, 0, 0)
    if cfg['crop_mode'] == 'border':
        fill = tuple(round(255 * m) for m in cfg['mean'])
    pad = [max(size - n, 0) for n in image.size]
    canvas = PIL.Image.new('RGB', [n + p for n, p in zip(image.size, pad, strict=True)], fill)
    canvas.paste(image, tuple(p // 2 for p in pad))
    left, top = (int(round((n - size) / 2.0)) for n in canvas.size)
    return canvas.crop((left, top, left + size, top + size))
