# SPDX-License-Identifier: Apache-2.0
"""`ssl_jax data info`: what a set of images is, on one screen."""

import collections
from collections.abc import Callable
from typing import Any

import numpy as np

from ssl_jax.data import fingerprint, host, maps, sources
from ssl_jax.data import stream as stream_lib
from ssl_jax.evals import task
from ssl_jax.prepare import encoded
from ssl_jax.run import errors, launch, patience, threads

SAMPLE = 512  # images that are read
SHOWN = 12  # classes that are shown; of more those with most and with fewest images
MODES = {'L': 'grey', 'P': 'palette', '1': 'black and white', 'RGBA': 'RGB with alpha'}


def info(data: Any, log: Callable[[str], None] = launch.log) -> None:
    """Prints kind, number, splits, classes, sizes, encodings, bytes and maps of a data set.

    Args:
      data: a source, or a path or spec of `sources.open_source`.
      log: called with each line.
    """
    source = data if hasattr(data, 'describe') else sources.open_source(data, 'train')
    for line in sources.lines(source):
        log(line)
    n, seen = len(source), []
    images = maps.images_only(source)
    sample = fingerprint.spread(n, SAMPLE)

    def look(i):
        try:
            item = stream_lib.read(images, i)
            return _facts(item), item.get('label')
        except patience.Unavailable:
            raise
        except (errors.UserError, OSError):
            return None

    seen = list(threads.at_once(look, sample, stream_lib.num_reading(source, 16)))
    facts = [x[0] for x in seen if x]
    kinds = {kind: name for name, kind in sources.SOURCES.items()}
    log(f'kind      {kinds.get(type(source), type(source).__name__)}')
    if facts:
        _say_facts(facts, n, log)
    if len(facts) < len(seen):
        log(f'broken    {len(seen) - len(facts)} of these: see ssl_jax data check')
    files = encoded.Encoded(source)
    named = files.meaning().get('map_classes')  # numbers would take reading all maps
    for kind in files.kinds:
        of = f' of {len(named)} classes: {_some(named)}' if named and kind == 'segmentation' else ''
        log(f'maps      {kind}{of}')
    if source.classes is None:
        log('classes   none, the images have no labels')
        return
    labels, of = getattr(source, 'labels', None), 'all images'
    if labels is None:
        labels, of = [x[1] for x in seen if x and x[1] is not None], f'{len(seen):,} images'
    _say_classes(source.classes, np.asarray(labels, np.int64), of, log)


def _facts(item):
    """(bytes, height, width upright, encoding) of an image."""
    data = item['image']
    if not isinstance(data, bytes):
        pixels = host.decode(data)
        return data.nbytes, *pixels.shape[:2], f'{data.dtype} arrays'
    found = encoded.header(data)
    size = found.height, found.width
    mode = MODES.get(found.mode, found.mode) + (f', {found.bits} bits' if found.bits > 8 else '')
    turned = found.orientation in (5, 6, 7, 8)
    return len(data), *(size[::-1] if turned else size), f'{found.format} ({mode})'


def _say_facts(facts, n, log):
    count = len(facts)
    of = 'all images' if count == n else f'{count:,} images, evenly spread'
    size, height, width = (np.array([x[k] for x in facts], float) for k in range(3))
    rows = [('of ' + of, 'smallest', '10 %', 'median', '90 %', 'largest')]
    for name, values in (
        ('width', width),
        ('height', height),
        ('short side', np.minimum(width, height)),
        ('kB of a file', size / 1000),
    ):
        spread = np.percentile(values, [0, 10, 50, 90, 100])
        rows.append((name, *(_number(x) for x in spread)))
    for line in task.aligned(rows, range(1, 6)):
        log(f'          {line}')
    about = '' if count == n else 'about '
    log(f'bytes     {about}{_spell(size.mean() * n)} in all')
    names = collections.Counter(x[3] for x in facts).most_common(8)
    log('encoding  ' + ', '.join(f'{100 * c / count:.3g} % {name}' for name, c in names))


def _say_classes(classes, labels, of, log):
    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
    missing = int((labels < 0).sum())
    log(
        f'classes   {len(classes):,}, of {of}'
        + (f'; {missing:,} without a label' if missing else '')
    )
    order = np.argsort(-counts, kind='stable')
    shown = list(order)
    if len(order) > SHOWN:
        shown = [*order[: SHOWN // 2], None, *order[-SHOWN // 2 :]]
    total = max(1, counts.sum())
    rows = [('class', 'images', 'share')]
    for k in shown:
        if k is None:
            rows.append((f'... {len(order) - SHOWN:,} more', '', ''))
        else:
            rows.append(
                (str(classes[k])[:60], f'{counts[k]:,}', f'{100 * counts[k] / total:.3g} %')
            )
    for line in task.aligned(rows, (1, 2)):
        log(f'          {line}')


def _spell(count):
    """Bytes as kB, MB, GB or TB."""
    for unit in ('bytes', 'kB', 'MB', 'GB'):
        if count < 1000:
            return f'{count:.3g} {unit}'
        count /= 1000
    return f'{count:,.3g} TB'


def _number(x):
    return f'{x:,.0f}' if x >= 10 else f'{x:.2g}'


def _some(names):
    shown = ', '.join(map(str, names[:6]))
    return shown + (', ...' if len(names) > 6 else '')
