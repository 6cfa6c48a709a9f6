# SPDX-License-Identifier: Apache-2.0
"""Pictures: reconstructions, contact sheets, PCA of patch tokens, training curves.

Every function writes one PNG and imports matplotlib when called.  Sheets are laid out in whole
pixels and tiny images are repeated, not interpolated, so that what is seen is what the model saw.
"""

import io
import json
import math

import numpy as np
from etils import epath

MIN_TILE = 128  # pixels; smaller images are enlarged by a whole factor
GAP, MARGIN, HEADER = 6, 16, 26  # pixels
INK, FAINT = '#222222', '#d9d9d9'
COLOURS = ('#0b6fb8', '#d1495b', '#2e933c', '#8d5fb0', '#e09f1f', '#5d6770')
COLUMNS = (  # key of a reconstruction, header
    ('image', 'input'),
    ('masked', 'masked'),
    ('means', 'given means'),
    ('prediction', 'prediction'),
    ('stitched', 'reconstruction'),
    ('words', 'in words'),
    ('image', 'original'),
)


def reconstruction_grid(pictures, path):
    """One row per image, columns as in COLUMNS.

    Args:
      pictures: what `reconstruction.pictures` makes, (B, H, W, 3) in [0, 1] or uint8: image,
        masked, stitched and those of the other columns that there are.
      path: of the PNG; its folder is made.
    """
    missing = [k for k in ('image', 'masked', 'stitched') if k not in pictures]
    if missing:
        raise ValueError(
            f"The reconstruction lacks {', '.join(missing)}; pass what the method's reconstruct "
            f'returns (a checkpoint without a decoder cannot be reconstructed from).'
        )
    columns = [(key, name) for key, name in COLUMNS if key in pictures]
    rows = list(zip(*(_uint8(pictures[key]) for key, _ in columns)))
    _sheet(rows, [name for _, name in columns], path)


def attention_maps(weights, images, path, num_heads=6):
    """Each image beside the attention of the first heads, as brightness.

    Args:
      weights: (B, heads, h, w), non-negative; each map is scaled by its own largest value.
      images: (B, H, W, 3) uint8 or in [0, 1].
      path: of the PNG.
    """
    weights, images = np.asarray(weights, np.float32)[:, :num_heads], _uint8(images)
    (b, heads, h, w), (height, width) = weights.shape, images.shape[1:3]
    bright = weights / np.maximum(weights.max(axis=(2, 3), keepdims=True), 1e-12)
    rows, columns = np.arange(height) * h // height, np.arange(width) * w // width
    large = _uint8(np.repeat(bright[:, :, rows][..., columns][..., None], 3, axis=-1))
    headers = ['image', *(f'head {i + 1}' for i in range(heads))]
    _sheet([[images[i], *large[i]] for i in range(b)], headers, path)


def contact_sheet(images, path, columns=None):
    """All images (B, H, W, 3), uint8 or in [0, 1], in raster order on one sheet.

    Args:
      columns: how many side by side; by default about as many as rows.
    """
    images = _uint8(images)
    columns = columns or math.ceil(math.sqrt(len(images)))
    rows = [list(images[i : i + columns]) for i in range(0, len(images), columns)]
    _sheet(rows, None, path)


def pca_patches(tokens, grid, images, path):
    """The first three principal components of patch tokens as red, green, blue.

    The components are those of all tokens of all images together, so that equal colours mean
    similar features across images; each channel spans its 1st to 99th percentile.

    Args:
      tokens: (B, N, D), N = h * w in raster order, D at least 3.
      grid: (h, w).
      images: (B, H, W, 3) uint8 or in [0, 1], shown beside.
      path: of the PNG.

    Returns:
      (B, h, w, 3) uint8, the colours.
    """
    tokens = np.asarray(tokens, np.float32)
    b, n, d = tokens.shape
    h, w = grid
    if n != h * w or d < 3:
        raise ValueError(
            f'Tokens {tokens.shape} do not fill a {h}x{w} grid with 3 components; pass patch '
            f'tokens only, without class and register tokens.'
        )
    flat = np.nan_to_num(tokens.reshape(-1, d).astype(np.float64))
    flat = flat - flat.mean(axis=0)
    _, vectors = np.linalg.eigh(flat.T @ flat)  # ascending
    vectors = vectors[:, :-4:-1]
    # The sign of a component is arbitrary: fixed, so that pictures of one run can be compared.
    peak = np.abs(vectors).argmax(axis=0)
    vectors = vectors * np.sign(vectors[peak, range(3)])
    x = flat @ vectors
    low, high = np.percentile(x, (1, 99), axis=0)
    x = np.clip((x - low) / np.maximum(high - low, 1e-12), 0, 1)
    colours = _uint8(x.reshape(b, h, w, 3))

    images = _uint8(images)
    size = images.shape[1:3]
    rows_of = np.arange(size[0]) * h // size[0]
    columns_of = np.arange(size[1]) * w // size[1]
    large = colours[:, rows_of][:, :, columns_of]
    pairs = [tile for pair in zip(images, large) for tile in pair]
    per_row = 2 if b == 1 else 4
    rows = [pairs[i : i + per_row] for i in range(0, len(pairs), per_row)]
    _sheet(rows, ['image', 'PCA of patches'] * (per_row // 2), path)
    return colours


def curves(metrics_path, path):
    """Loss, learning rate, kNN accuracy and images per second over steps, from `metrics.jsonl`.

    Panels without data are left out; lines that are not complete rows and values that are not
    finite are passed over, so this works at any moment of a run.

    Args:
      metrics_path: the file; it need not exist yet.
      path: of the PNG.
    """
    series = _series(metrics_path)
    knn = {k: v for k, v in series.items() if 'knn' in k.split('/')}
    panels = [
        ('loss', 'training loss', _first(series, 'loss')),
        ('lr', 'learning rate', _first(series, 'lr', 'learning_rate')),
        ('knn', 'kNN top-1, %  (thin: other k)' if len(knn) > 1 else 'kNN top-1, %', knn),
        (
            'speed',
            'images per second',
            _first(series, 'time/images_per_second', 'images_per_second'),
        ),
    ]
    panels = [p for p in panels if p[2]]
    columns = 2 if len(panels) > 1 else 1
    height = max(1, math.ceil(len(panels) / columns))
    figure = _figure(520 * columns, 330 * height)
    if not panels:
        figure.text(0.5, 0.5, 'no metrics yet', color=INK, ha='center', va='center')
    for i, (kind, title, data) in enumerate(panels):
        axes = figure.add_subplot(height, columns, i + 1)
        axes.set_title(title, loc='left', fontsize=11, color=INK, pad=8)
        _plot_knn(axes, data) if kind == 'knn' else _plot(axes, kind, *next(iter(data.values())))
        _decorate(axes, kind, data)
    figure.tight_layout(pad=1.6, w_pad=2.2, h_pad=2.2)
    _save(figure, path)


def _plot(axes, kind, x, y):
    if kind != 'lr' and len(x) > 200:  # the noise stays visible behind a mean over 2 % of the run
        axes.plot(x, y, color=COLOURS[0], linewidth=0.8, alpha=0.25)
        width = len(x) // 50
        kernel = np.ones(width) / width
        x, y = np.convolve(x, kernel, 'valid'), np.convolve(y, kernel, 'valid')
    axes.plot(x, y, color=COLOURS[0], linewidth=1.8, marker='o' if len(x) < 15 else None, ms=4)


def _plot_knn(axes, data):
    """One colour per feature: bold for the k nearest to 20, thin for the others."""
    features = {}
    for key, xy in data.items():
        feature, _, k = key.rpartition('/')
        if not k.isdigit():
            feature, k = key, '0'
        features.setdefault(feature.removeprefix('knn/') or 'kNN', {})[int(k)] = xy
    for colour, (feature, by_k) in zip(COLOURS * len(features), features.items()):
        bold = min(by_k, key=lambda k: abs(math.log(max(k, 1) / 20)))
        for k, (x, y) in sorted(by_k.items()):
            if k != bold:
                axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.4)
        x, y = by_k[bold]
        label = f'{feature}, k={bold}' if bold else feature
        marker = 'o' if len(x) < 30 else None
        axes.plot(x, y, color=colour, linewidth=1.8, marker=marker, ms=4, label=label)
    axes.legend(frameon=False, fontsize=8, loc='best', labelcolor=INK)


def _decorate(axes, kind, data):
    from matplotlib import ticker

    axes.spines[['top', 'right']].set_visible(False)
    axes.spines[['left', 'bottom']].set_color('#888888')
    axes.grid(color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9, colors='#555555', length=3)
    axes.set_xlabel('step', fontsize=9, color='#555555')
    axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(_thousands))
    values = np.concatenate([y for _, y in data.values()])
    if kind == 'loss' and values.min() > 0 and values.max() > 20 * values.min():
        axes.set_yscale('log')
    elif kind in ('lr', 'speed'):
        axes.set_ylim(0, 1.08 * max(values.max(), 1e-12))
    if kind == 'lr':
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(_scientific))
    if kind == 'speed':
        axes.yaxis.set_major_formatter(ticker.FuncFormatter(_thousands))


def _thousands(x, _):
    for size, letter in ((1e6, 'M'), (1e3, 'k')):
        if abs(x) >= size:
            return f'{x / size:g}{letter}'
    return f'{x:g}'


def _scientific(x, _):
    if x == 0 or abs(x) >= 0.01:
        return f'{x:g}'
    digits, exponent = f'{x:.1e}'.split('e')
    return f'{digits}e{int(exponent)}'


def _series(path):
    """{key: (steps, values)} of all finite numbers, nested keys joined by '/', steps ascending."""
    path = epath.Path(path)
    text = path.read_text() if path.exists() else ''
    found = {}
    for line in text.splitlines():
        try:
            row = json.loads(line)
            step = int(row['step'])
        except (ValueError, TypeError, KeyError):
            continue  # torn by a kill, or not a row
        for key, value in _flatten(row):
            if key != 'step':
                found.setdefault(key, {})[step] = value
    out = {}
    for key, by_step in found.items():
        steps = sorted(by_step)
        out[key] = np.array(steps, float), np.array([by_step[s] for s in steps], float)
    return out


def _flatten(row, prefix=''):
    for key, value in row.items():
        if isinstance(value, dict):
            yield from _flatten(value, f'{prefix}{key}/')
        elif isinstance(value, (int, float)) and math.isfinite(value):
            yield prefix + key, value


def _first(series, *keys):
    return next(({k: series[k]} for k in keys if k in series), {})


def _uint8(x):
    x = np.asarray(x)
    if x.dtype == np.uint8:
        return x
    x = np.nan_to_num(x.astype(np.float32))
    return (np.clip(x, 0, 1) * 255 + 0.5).astype(np.uint8)


def _sheet(rows, headers, path):
    """Tiles (H, W, 3) of one size in rows, one header per column (None: no headers)."""
    if not rows or not len(rows[0]):
        raise ValueError(f'There is no image to draw in {path}; pass at least one.')
    h, w = rows[0][0].shape[:2]
    scale = max(1, math.ceil(MIN_TILE / w))
    h, w = h * scale, w * scale
    columns = len(rows[0])
    top = MARGIN + (HEADER if headers else 0)
    width = 2 * MARGIN + columns * w + (columns - 1) * GAP
    height = top + MARGIN + len(rows) * h + (len(rows) - 1) * GAP
    canvas = np.full((height, width, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            y, x = top + i * (h + GAP), MARGIN + j * (w + GAP)
            canvas[y : y + h, x : x + w] = tile.repeat(scale, axis=0).repeat(scale, axis=1)
    figure = _figure(width, height)
    figure.figimage(canvas)
    for j, name in enumerate(headers or ()):
        x = (MARGIN + j * (w + GAP) + w / 2) / width
        y = 1 - (top - 9) / height
        figure.text(x, y, name, ha='center', va='bottom', fontsize=10, color=INK)
    _save(figure, path)


def _figure(width, height):
    """A white figure of so many pixels, not registered with pyplot: nothing to close."""
    from matplotlib.backends import backend_agg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor='white')
    backend_agg.FigureCanvasAgg(figure)
    return figure


def _save(figure, path):
    data = io.BytesIO()
    figure.savefig(data, format='png', dpi=100)
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.parent / f'{path.name}.partial'  # a viewer never finds half a picture
    partial.write_bytes(data.getvalue())
    partial.replace(path)
