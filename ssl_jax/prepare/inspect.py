# SPDX-License-Identifier: Apache-2.0
"""`ssl_jax data check`: opens every file; what is broken, odd, tiny, huge or there twice."""

import collections
import hashlib
import json
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np
import simplejpeg

from ssl_jax.data import files, host, maps, sources
from ssl_jax.data import stream as stream_lib
from ssl_jax.evals import task
from ssl_jax.prepare import encoded
from ssl_jax.run import errors, launch, patience, progress, storage, threads
from ssl_jax.viz import draw

TINY = 32  # pixels of the short side
HUGE = 30_000_000  # pixels: a quarter of a second to decode
SHOWN = 64  # images on the contact sheet
TILE, CAPTION = 144, 18  # pixels
# Of Pillow's modes.
_MODES = {
    **{'CMYK': 'CMYK', 'YCCK': 'CMYK', 'F': 'floating point', 'LAB': 'CIE L*a*b*'},
    **{'1': 'black and white', 'P': 'a palette', 'PA': 'a palette', 'RGBA': 'transparency'},
    **{'LA': 'transparency', 'RGBa': 'transparency', 'L': 'grey', 'I': '32 bits'},
}
# Findings, worst first: (name, what it means or what to do).
FINDINGS = {
    'broken': 'a run replaces them, and ends above data.bad_budget: repair or delete them',
    'map': 'an evaluation of maps ends there: repair or delete image and map',
    'copy': 'the same file or the same pixels: delete all but one; worse between train and test',
    'tiny': f'short side below {TINY} pixels: crops of them are blurred',
    'huge': f'above {HUGE // 10**6} megapixels, slow to load: pack --max-side',
    'animated': 'the first frame is used',
    'turned': 'by EXIF; they are read upright, other tools may show them lying',
    'mode': 'converted to RGB of 8 bits; grey, palettes, transparency on white',
}
FATAL = ('broken', 'map')


class Finding(NamedTuple):
    """Something about an image."""

    id: int
    finding: str  # of FINDINGS
    reason: str


def inspect(data: Any, out: str | os.PathLike, log: Callable[[str], None] = launch.log) -> bool:
    """Prints a table of what was found; returns whether nothing is broken.

    Writes `findings.jsonl`, one JSON object {"id", "path", "finding", "reason"} for each finding,
    and `findings.png`, the worst images, to `out`.

    Args:
      data: a source, or a path or spec of `sources.open_source`.
      out: folder, local or in a bucket.
      log: called with each line.
    """
    source = data if hasattr(data, 'describe') else sources.open_source(data, 'all')
    out, n = os.fspath(out).rstrip('/'), len(source)
    if os.path.exists(out) and not os.path.isdir(out):
        raise errors.UserError(f'--out {out} is a file: give a folder.')
    encoded.require_outside(source, out)
    for line in sources.lines(source):
        log(line)
    images, kinds = maps.images_only(source), encoded.kinds_of(source)
    found, done = [], progress.Progress(n, log)
    digests = np.zeros((2, n, 2), np.uint64)  # of bytes and of pixels; 0: none

    def look(i):
        result = _look(source, images, kinds, i)
        done.add()
        return result

    for i, (own, of_bytes, of_pixels) in enumerate(
        threads.at_once(look, range(n), stream_lib.num_reading(source, 64))
    ):
        found += own
        digests[:, i] = of_bytes, of_pixels
    found, usual = _unusual(found, n)
    found += _copies(digests, source)
    found.sort(key=lambda f: (f.id, list(FINDINGS).index(f.finding)))
    lines = (json.dumps(_row(f, source), ensure_ascii=False) + '\n' for f in found)
    storage.atomic_write(f'{out}/findings.jsonl', ''.join(lines))
    shown = _worst(found)
    if shown:
        tiles = np.stack([_tile(images, f) for f in shown])
        draw.contact_sheet(tiles, f'{out}/findings.png')
    else:
        storage.remove(f'{out}/findings.png')
    for line in (*_report(found, source, out), *usual):
        log(line)
    return not any(f.finding in FATAL for f in found)


def _look(source, images, kinds, i):
    """([Finding] of image i, digest of its bytes, digest of its pixels)."""
    none = (0, 0)
    try:
        data = stream_lib.read(images, i)['image']
        pixels = host.decode(data)
    except patience.Unavailable:
        raise
    except (errors.UserError, OSError) as e:
        return [Finding(i, 'broken', str(e))], none, none
    found = []
    (height, width), is_file = pixels.shape[:2], isinstance(data, bytes)
    if min(height, width) < TINY:
        found.append(Finding(i, 'tiny', f'{width}x{height} pixels'))
    if height * width > HUGE:
        found.append(Finding(i, 'huge', f'{width}x{height} pixels'))
    if is_file:
        found += _odd(i, encoded.header(data))
    if kinds:
        try:
            item = stream_lib.read(source, i)
            maps.check_size(pixels, item, kinds, source.describe(i))
        except patience.Unavailable:
            raise
        except (errors.UserError, OSError) as e:
            found.append(Finding(i, 'map', str(e)))
    of_bytes = _digest(data if is_file else np.ascontiguousarray(data), str(np.shape(data)))
    return found, of_bytes, _digest(pixels, str(pixels.shape))


def _odd(i, header):
    if header.is_animated:
        yield Finding(i, 'animated', header.format)
    if header.orientation not in (0, 1):
        yield Finding(i, 'turned', f'orientation {header.orientation} of EXIF')
    if header.bits > 8:
        yield Finding(i, 'mode', f'{header.bits} bits')
    elif header.mode not in ('RGB', 'RGBX', 'YCbCr'):
        yield Finding(i, 'mode', _MODES.get(header.mode, header.mode))


def _unusual(found, n):
    """Findings without the mode that most images have, and a sentence on that."""
    modes = collections.Counter(f.reason for f in found if f.finding == 'mode')
    usual = [reason for reason, count in modes.items() if 2 * count > n]
    rest = [f for f in found if f.finding != 'mode' or f.reason not in usual]
    return rest, [f'not listed: most images, {modes[x]:,}, have {x}' for x in usual]


def _digest(data, more):
    """Two 64-bit numbers; of n images two differ with the same one with probability n^2 / 2^129."""
    found = hashlib.blake2b(more.encode(), digest_size=16)
    found.update(data)
    return tuple(np.frombuffer(found.digest(), np.uint64))


def _copies(digests, source):
    """A finding for each image that an earlier one is equal to, in bytes or else in pixels."""
    labels = getattr(source, 'labels', None)
    firsts = [_firsts(x) for x in digests]
    for i in np.flatnonzero((firsts[0] >= 0) | (firsts[1] >= 0)):
        what, first = 'bytes', firsts[0][i]
        if first < 0:
            what, first = 'pixels', firsts[1][i]
        reason = f'the same {what} as {files.printable(source.describe(int(first)))}'
        if labels is not None and labels[i] != labels[first]:
            reason += ', and another label'
        yield Finding(int(i), 'copy', reason)


def _firsts(digests):
    """int64 (n,): the first image with the same digest, -1 if that is itself or has none."""
    _, first, inverse = np.unique(
        np.ascontiguousarray(digests).view('V16').ravel(), return_index=True, return_inverse=True
    )
    found = first[inverse.ravel()]
    is_copy = (found != np.arange(len(found))) & digests.any(axis=1)
    return np.where(is_copy, found, -1)


def _row(f, source):
    path = files.printable(source.describe(f.id))
    return {'id': f.id, 'path': path, 'finding': f.finding, 'reason': f.reason}


def _report(found, source, out):
    """The table, and where the rest is."""
    n = len(source)
    if not found:
        return [f'{n:,} images, and nothing to say of them']
    rows, notes = [('finding', 'images', 'share', 'first')], []
    for name, note in FINDINGS.items():
        own = [f for f in found if f.finding == name]
        if not own:
            continue
        path = files.printable(source.describe(own[0].id))
        count = len({f.id for f in own})
        first = own[0].reason if path in own[0].reason else f'{path}: {own[0].reason}'
        rows.append((name, f'{count:,}', f'{100 * count / n:.2f} %', first))
        notes.append(f'{name}: {note}')
    clean = n - len({f.id for f in found})
    return [
        *task.aligned(rows, (1, 2)),
        *notes,
        f'{clean:,} of {n:,} images have no finding; the others: {out}/findings.jsonl, '
        f'{out}/findings.png',
    ]


def _worst(found):
    """At most SHOWN findings of different images, each kind in turn, in the order of FINDINGS."""
    queues = [[f for f in found if f.finding == name] for name in FINDINGS]
    taken, ids = [], set()
    for place in range(SHOWN):
        for own in queues:
            if place < len(own) and own[place].id not in ids and len(taken) < SHOWN:
                taken.append(own[place])
                ids.add(own[place].id)
    return sorted(taken, key=lambda f: (list(FINDINGS).index(f.finding), f.id))


def _tile(images, f):
    """uint8 (TILE + CAPTION, TILE, 3): an image, or what there is of it, and the finding below."""
    tile = np.full((TILE + CAPTION, TILE, 3), 255, np.uint8)
    pixels = _pixels(images, f)
    if pixels is None:
        tile[:TILE] = 200
        cv2.line(tile, (0, 0), (TILE, TILE), (255, 255, 255), 3, cv2.LINE_AA)
        cv2.line(tile, (TILE, 0), (0, TILE), (255, 255, 255), 3, cv2.LINE_AA)
        tile[TILE:] = 255
    else:
        height, width = pixels.shape[:2]
        scale = TILE / max(height, width)
        size = max(1, round(width * scale)), max(1, round(height * scale))
        how = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST
        small = cv2.resize(pixels, size, interpolation=how)
        y, x = (TILE - size[1]) // 2, (TILE - size[0]) // 2
        tile[y : y + size[1], x : x + size[0]] = small
    text, font = f'{f.finding} {f.id}', cv2.FONT_HERSHEY_SIMPLEX
    cv2.putText(tile, text, (2, TILE + 13), font, 0.42, (34, 34, 34), 1, cv2.LINE_AA)
    return tile


def _pixels(images, f):
    """The pixels of an image; of a broken JPEG those that are there; None if there are none."""
    try:
        data = images[f.id]['image']
        if f.finding != 'broken' or not isinstance(data, bytes):
            return host.decode(data)
        found = encoded.header(data)
        if found.format != 'JPEG' or found.width * found.height > HUGE:
            return None
        return simplejpeg.decode_jpeg(data, 'RGB', strict=False)
    except (ValueError, OSError):
        return None
