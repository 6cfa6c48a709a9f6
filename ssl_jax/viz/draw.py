# SPDX-License-Identifier: Apache-2.0
"""Pictures: reconstructions, attention, PCA of patch tokens, class and depth maps, curves.

Every function writes one PNG to `path`, also an open file, makes its folder and imports matplotlib
when called. Sheets are laid out in whole pixels. Tiny images are repeated, not interpolated: they
show the pixels that the model saw.
"""

import io
import math
import textwrap
from collections.abc import Sequence

import numpy as np

from ssl_jax.run import metrics, storage
from ssl_jax.viz import tokens as tokens_lib

MIN_TILE = 128  # pixels; smaller images are enlarged by a whole factor
GAP, MARGIN, HEADER, LINE = 6, 16, 26, 18  # pixels; the last of text below a sheet
LETTER = 6.5  # pixels of width, on average
INK, FAINT = '#222222', '#d9d9d9'
FRAME = 150  # grey around the squares of a legend
COLOURS = ('#0b6fb8', '#d1495b', '#2e933c', '#8d5fb0', '#e09f1f', '#5d6770')
# Of classes. Any two, and each and white, are told apart by people with and without red, green or
# blue blindness: at least 0.08 in OKLab, as far as those of Okabe and Ito, of which there are 8.
CLASSES = (
    *('#4d4d4d', '#a596ff', '#f0780f', '#6969c3', '#5ae1a5', '#0000f0', '#876900', '#c3ff2d'),
    *('#690f78', '#f0d2ff', '#780fb4', '#a53c87', '#7878ff', '#c3b4e1', '#960f00', '#69b487'),
    *('#87ffa5', '#d278c3', '#e1c35a', '#e13c5a'),
)
IGNORED = 255  # in class maps; drawn white
COLUMNS = (  # key of a reconstruction, header
    ('image', 'input'),
    ('masked', 'masked'),
    ('means', 'given means'),
    ('prediction', 'prediction'),
    ('stitched', 'reconstruction'),
    ('words', 'in words'),
    ('image', 'original'),
)


def reconstruction_grid(pictures: dict[str, np.ndarray], path) -> None:
    """Draws one row per image, with the columns of COLUMNS that are in `pictures`.

    Args:
      pictures: of `Method.reconstruct`, (B, H, W, 3) in [0, 1] or uint8.
      path: of the PNG.
    """
    columns = [(key, name) for key, name in COLUMNS if key in pictures]
    rows = list(zip(*(uint8(pictures[key]) for key, _ in columns), strict=True))
    _sheet(rows, [name for _, name in columns], path)


def attention_maps(weights: np.ndarray, images: np.ndarray, path) -> None:
    """Draws each image beside the attention of the first six heads, as brightness.

    Args:
      weights: (B, heads, h, w), non-negative; each map is scaled by its largest value.
      images: (B, H, W, 3) uint8 or in [0, 1].
      path: of the PNG.
    """
    weights, images = np.asarray(weights, np.float32)[:, :6], uint8(images)
    bright = weights / np.maximum(weights.max(axis=(2, 3), keepdims=True), 1e-12)
    maps = uint8(np.stack([_enlarge(x, images.shape[1:3]) for x in bright]))
    rows = [
        [image, *np.repeat(x[..., None], 3, axis=-1)] for image, x in zip(images, maps, strict=True)
    ]
    _sheet(rows, ['image', *(f'head {i + 1}' for i in range(maps.shape[1]))], path)


def contact_sheet(images: np.ndarray, path) -> None:
    """Draws images (B, H, W, 3), uint8 or in [0, 1], in raster order on an about square sheet."""
    images = uint8(images)
    columns = math.ceil(math.sqrt(len(images)))
    rows = [list(images[i : i + columns]) for i in range(0, len(images), columns)]
    _sheet(rows, None, path)


def captioned_sheet(
    rows: Sequence[Sequence[np.ndarray]], captions: Sequence[Sequence[str]], path, note: str = ''
) -> None:
    """Draws rows of images with text below each.

    Args:
      rows: lists of images (H, W, 3) of one size, uint8 or in [0, 1]; short ones are filled up.
      captions: as many texts; '' for none.
      path: of the PNG.
      note: a line below.
    """
    columns = max(map(len, rows))
    blank = np.full(uint8(rows[0][0]).shape, 255, np.uint8)
    rows = [[*map(uint8, row), *[blank] * (columns - len(row))] for row in rows]
    _sheet(rows, None, path, note=note, captions=captions)


def histogram(values: dict[str, np.ndarray], marks: dict[str, float], name: str, path) -> None:
    """Draws how often numbers occur, on a logarithmic scale, with vertical lines.

    Args:
      values: {name: (n,)}.
      marks: {name: where}, the lines.
      name: of the numbers.
      path: of the PNG.
    """
    figure = _figure(760, 380)
    axes = figure.add_subplot(1, 1, 1)
    low = min(float(x.min()) for x in values.values() if len(x))
    bins = np.linspace(low, max(1.0, low + 1e-3), 101)
    for colour, (label, x) in zip(COLOURS, values.items(), strict=False):
        axes.hist(x, bins, histtype='stepfilled', color=colour, alpha=0.45, label=label)
    for colour, (label, x) in zip(COLOURS[::-1], marks.items(), strict=False):
        axes.axvline(x, color=colour, linewidth=1.8, linestyle='--', label=f'{label} {x:g}')
    axes.set_yscale('log')
    axes.spines[['top', 'right']].set_visible(False)
    axes.tick_params(labelsize=9, colors='#555555', length=3)
    axes.set_xlabel(name, fontsize=9, color='#555555')
    axes.set_ylabel('images', fontsize=9, color='#555555')
    axes.legend(frameon=False, fontsize=8, loc='upper left', labelcolor=INK)
    figure.tight_layout(pad=1.6)
    _save(figure, path)


def pca_patches(
    tokens: np.ndarray,
    grid: tuple[int, int],
    images: np.ndarray,
    path,
    mean: np.ndarray | None = None,
    averaged: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws three principal components of patch tokens as red, green, blue: all, and foreground.

    Args:
      tokens: (B, N, D), N = h * w in raster order.
      grid: (h, w).
      images: (B, H, W, 3) uint8 or in [0, 1], shown beside the colours.
      path: of the PNG.
      mean: (N, D), mean token of each position, which is subtracted; None to subtract nothing.
      averaged: number of images in `mean`, for the line under the picture.

    Returns:
      The colours of all patches and those of the foreground, (B, h, w, 3) uint8, see `viz.tokens`.
    """
    tokens = tokens_lib.centred(tokens, mean)
    whole = tokens_lib.colours(tokens, grid)
    front = tokens_lib.colours(tokens, grid, tokens_lib.foreground(tokens, grid))
    images = uint8(images)
    large = [_enlarge(colours, images.shape[1:3]) for colours in (whole, front)]
    tiles = [tile for row in zip(images, *large, strict=True) for tile in row]
    per_row = 3 if len(images) == 1 else 6
    rows = [tiles[i : i + per_row] for i in range(0, len(tiles), per_row)]
    note = 'Colours: principal components of the patch tokens of all these images together; '
    note += 'foreground: one side of a threshold on the first.'
    if mean is not None:
        note += f' Subtracted before: the mean token of each position over {averaged} images.'
    _sheet(rows, ['image', 'all patches', 'foreground'] * (per_row // 3), path, note=note)
    return whole, front


def segmentation_rows(
    images: np.ndarray, maps: dict[str, np.ndarray], classes: Sequence[str], path, note: str = ''
) -> None:
    """Draws images and maps of their classes; the classes that occur are named below.

    Args:
      images: (B, H, W, 3) uint8 or in [0, 1].
      maps: {header: (B, H, W)}, such as truth and predictions: index of the class, 255 for ignored,
        which is white.
      classes: names in index order.
      path: of the PNG.
      note: a line below.
    """
    colours = class_colours(len(classes))
    maps = {name: np.asarray(x) for name, x in maps.items()}
    columns = [uint8(images), *(colours[x] for x in maps.values())]
    found = np.unique(np.concatenate([x.reshape(-1) for x in maps.values()]))
    legend = [(colours[i], str(classes[i])) for i in found if i < len(classes)]
    legend += [(colours[IGNORED], 'ignored')] * bool((found == IGNORED).any())
    _sheet(list(zip(*columns, strict=True)), ['image', *maps], path, note=note, legend=legend)


def depth_rows(
    images: np.ndarray, maps: dict[str, np.ndarray], path, unit: str = 'm', note: str = ''
) -> None:
    """Draws images and maps of their depth in the same colours, with their scale below.

    Args:
      images: (B, H, W, 3) uint8 or in [0, 1].
      maps: {header: (B, H, W)}, such as truth and predictions; 0 where nothing was measured, which
        is white. The colours span the first.
      path: of the PNG.
      unit: of the depth, '' if it is not known.
      note: a line below.
    """
    maps = {name: np.asarray(x, np.float32) for name, x in maps.items()}
    first = next(iter(maps.values()))
    measured = first[first > 0]
    low, high = (measured.min(), measured.max()) if len(measured) else (0.0, 1.0)
    columns = [uint8(images)]
    for depth in maps.values():
        columns.append(np.where((depth > 0)[..., None], heat(depth, low, high), np.uint8(255)))
    names, bar = ['image', *maps], [f'{x:.3g} {unit}'.strip() for x in (low, high)]
    _sheet(list(zip(*columns, strict=True)), names, path, note=note, bar=bar)


def importance_rows(images: np.ndarray, maps: dict[str, np.ndarray], path, note: str = '') -> None:
    """Draws images beside maps of any unit, from dark (low) to bright (high).

    Args:
      images: (B, H, W, 3) uint8 or in [0, 1].
      maps: {header: (B, h, w)}, H and W multiples of h and w; each map spans the colours from its
        1st to its 99th percentile. What is not finite is white.
      path: of the PNG.
      note: a line below.
    """
    images, columns = uint8(images), []
    for values in maps.values():
        values = np.asarray(values, np.float32)
        column = np.full((*values.shape, 3), 255, np.uint8)
        for x, tile in zip(values, column, strict=True):
            known = np.isfinite(x)
            if known.any():
                tile[known] = heat(x[known], *np.percentile(x[known], (1, 99)))
        columns.append(_enlarge(column, images.shape[1:3]))
    bar = ('low: 1st percentile of a map', 'high: 99th')
    rows = list(zip(images, *columns, strict=True))
    _sheet(rows, ['image', *maps], path, note=note, bar=bar)


def class_colours(count: int) -> np.ndarray:
    """uint8 (256, 3) by class index: CLASSES, then lighter, then darker ones; the rest white.

    Args:
      count: number of classes.
    """
    base = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in CLASSES])
    shades = np.concatenate([base, (base + 255) // 2, base // 2])
    out = np.full((256, 3), 255, np.uint8)
    out[:count] = shades[np.arange(min(count, IGNORED)) % len(shades)]
    return out


def heat(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Numbers as colours from dark (low) to bright (high), uint8 (..., 3)."""
    import matplotlib

    x = np.nan_to_num((np.asarray(values, np.float32) - low) / max(high - low, 1e-12))
    return matplotlib.colormaps['viridis'](np.clip(x, 0, 1), bytes=True)[..., :3]


def curves(metrics_path, path) -> None:
    """Draws loss, learning rate, kNN accuracy, segmentation and images per second over steps.

    Panels without data, incomplete lines and values that are not finite are left out, so this works
    at any moment of a run.

    Args:
      metrics_path: `metrics.jsonl`; it need not exist yet.
      path: of the PNG.
    """
    found = series(metrics_path)
    knn = {k: v for k, v in found.items() if 'knn' in k.split('/')}

    def only(key):
        return {k: v for k, v in found.items() if k == key}

    panels = [
        ('loss', 'training loss', only('loss')),
        ('lr', 'learning rate', only('lr')),
        ('knn', 'kNN top-1, %  (thin: other k)' if len(knn) > 1 else 'kNN top-1, %', knn),
        ('seg', 'segmentation by kNN, mIoU, %', only('seg/miou')),
        ('speed', 'images per second', only('time/images_per_second')),
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
        if kind == 'knn':
            _plot_knn(axes, data)
        else:
            _plot(axes, kind, *next(iter(data.values())))
        _decorate(axes, kind, data)
    figure.tight_layout(pad=1.6, w_pad=2.2, h_pad=2.2)
    _save(figure, path)


def ranking(panels: dict[str, dict[str, tuple]], path) -> None:
    """Draws numbers of checkpoints over their steps, one panel each.

    Args:
      panels: {title: {name: (steps, values)}}.
      path: of the PNG.
    """
    columns = min(3, len(panels))
    height = math.ceil(len(panels) / columns)
    figure = _figure(400 * columns, 300 * height)
    for i, (title, lines) in enumerate(panels.items()):
        axes = figure.add_subplot(height, columns, i + 1)
        axes.set_title(title, loc='left', fontsize=11, color=INK, pad=8)
        for colour, (name, (x, y)) in zip(COLOURS * len(lines), lines.items(), strict=False):
            axes.plot(x, y, color=colour, linewidth=1.8, marker='o', ms=4, label=name)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=8, loc='best', labelcolor=INK)
        _decorate(axes, 'rank', lines)
    figure.tight_layout(pad=1.6, w_pad=2.2, h_pad=2.2)
    _save(figure, path)


def _plot(axes, kind, x, y):
    if kind != 'lr' and len(x) > 200:  # noise stays visible behind a mean over 2 %
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
    for colour, (feature, by_k) in zip(COLOURS * len(features), features.items(), strict=False):
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


def series(path) -> dict[str, np.ndarray]:
    """{key: (steps, values)} of all finite numbers, nested keys joined by '/', steps ascending."""
    return series_of(metrics.read(path))


def series_of(rows: list[dict]) -> dict[str, np.ndarray]:
    """`series` of rows that were read already."""
    values = {}
    for row in rows:
        for key, value in _flatten(row):
            if key != 'step':
                values.setdefault(key, {})[int(row['step'])] = value
    return {key: np.array(sorted(x.items()), float).T for key, x in values.items()}


def _flatten(row, prefix=''):
    for key, value in row.items():
        if isinstance(value, dict):
            yield from _flatten(value, f'{prefix}{key}/')
        elif isinstance(value, (int, float)) and math.isfinite(value):
            yield prefix + key, value


def uint8(x: np.ndarray) -> np.ndarray:
    """Colours in [0, 1] as uint8; uint8 stays as it is."""
    x = np.asarray(x)
    if x.dtype == np.uint8:
        return x
    x = np.nan_to_num(x.astype(np.float32))
    return (np.clip(x, 0, 1) * 255 + 0.5).astype(np.uint8)


def _enlarge(x, size):
    """Repeats the cells of (B, h, w, ...) to (B, *size, ...)."""
    rows, columns = (np.arange(n) * m // n for n, m in zip(size, x.shape[1:3], strict=True))
    return x[:, rows][:, :, columns]


def _sheet(rows, headers, path, note='', legend=(), bar=None, captions=None):
    """Draws tiles (H, W, 3) of one size in rows.

    Args:
      rows: lists of tiles.
      headers: one per column, None for none.
      path: of the PNG.
      note: text below the tiles.
      legend: (colour, name) below the tiles.
      bar: texts at the dark and the bright end of a bar of `heat`, below the tiles.
      captions: rows of texts, one below each tile.
    """
    h, w = rows[0][0].shape[:2]
    scale = max(1, math.ceil(MIN_TILE / w))
    h, w = h * scale, w * scale
    columns = len(rows[0])
    top = MARGIN + (HEADER if headers else 0)
    width = 2 * MARGIN + columns * w + (columns - 1) * GAP
    inside = width - 2 * MARGIN
    lines = textwrap.wrap(note, max(20, int(inside / LETTER)))
    cell = int(LETTER * max((len(name) for _, name in legend), default=0)) + 2 * LINE
    fits = max(1, inside // cell)
    below = MARGIN + LINE * (len(lines) + math.ceil(len(legend) / fits) + (2 if bar else 0))
    pitch = h + (LINE if captions else 0) + GAP
    bottom = top + len(rows) * pitch - GAP
    height = bottom + below
    canvas = np.full((height, width, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        for j, tile in enumerate(row):
            y, x = top + i * pitch, MARGIN + j * (w + GAP)
            canvas[y : y + h, x : x + w] = tile.repeat(scale, axis=0).repeat(scale, axis=1)
    texts, y = [], bottom + LINE // 2  # (x, y of the middle, text, alignment)
    for i, row in enumerate(captions or ()):
        below = top + i * pitch + h + LINE / 2
        texts += [(MARGIN + j * (w + GAP), below, text, 'left') for j, text in enumerate(row)]
    if bar:
        canvas[y + 2 : y + LINE - 4, MARGIN : MARGIN + inside] = heat(np.arange(inside), 0, inside)
        texts.append((MARGIN, y + 1.5 * LINE, bar[0], 'left'))
        texts.append((MARGIN + inside, y + 1.5 * LINE, bar[1], 'right'))
        y += 2 * LINE
    for i, (colour, name) in enumerate(legend):
        x = MARGIN + i % fits * cell
        if i and i % fits == 0:
            y += LINE
        canvas[y + 3 : y + LINE - 3, x : x + LINE - 6] = FRAME
        canvas[y + 4 : y + LINE - 4, x + 1 : x + LINE - 7] = colour
        texts.append((x + LINE, y + LINE / 2, name, 'left'))
    y += LINE * bool(legend)
    for i, line in enumerate(lines):
        texts.append((MARGIN, y + (i + 0.5) * LINE, line, 'left'))
    figure = _figure(width, height)
    figure.figimage(canvas)
    for j, name in enumerate(headers or ()):
        x = (MARGIN + j * (w + GAP) + w / 2) / width
        y = 1 - (top - 9) / height
        figure.text(x, y, name, ha='center', va='bottom', fontsize=10, color=INK)
    for x, y, text, side in texts:
        at = x / width, 1 - y / height
        figure.text(*at, text, ha=side, va='center_baseline', fontsize=9, color=INK)
    _save(figure, path)


def _figure(width, height):
    """A white figure, sides in pixels; not registered with pyplot, so nothing has to be closed."""
    from matplotlib.backends import backend_agg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / 100, height / 100), dpi=100, facecolor='white')
    backend_agg.FigureCanvasAgg(figure)
    return figure


def _save(figure, path):
    data = path if hasattr(path, 'write') else io.BytesIO()
    figure.savefig(data, format='png', dpi=100)
    if data is not path:
        storage.atomic_write(path, data.getvalue())  # a viewer never finds half a picture
