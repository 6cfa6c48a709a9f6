# SPDX-License-Identifier: Apache-2.0
"""`ssl_jax data pack`: any source as shards, bit by bit or with smaller images.

Image i goes to shard i * shards // n, so order and ids stay those of the source. A shard appears
under its name when it is complete; the same command again writes those that are missing.
"""

import dataclasses
import errno
import json
import os
import re
import threading
from collections.abc import Callable
from typing import Any

from ssl_jax.data import files, sources, tar_index
from ssl_jax.data import stream as stream_lib
from ssl_jax.prepare import encoded, writers
from ssl_jax.run import errors, launch, patience, progress, storage, threads
from ssl_jax.run import workdir as workdir_lib

PER_SHARD = 10_000  # images, unless a number of shards is given
SHARED = ('classes.txt', 'maps.json', workdir_lib.LOCK)  # of all splits in a folder
REQUEST, LEFT_OUT = 'pack.json', 'left_out.jsonl'  # of a split; its name stands in front


def pack(
    data: Any,
    out: str | os.PathLike,
    to: str,
    *,
    shards: int | None = None,
    split: str | None = None,
    max_side: int | None = None,
    quality: int = 90,
    log: Callable[[str], None] = launch.log,
) -> int:
    """Writes a data set as shards; returns the number of images that could not be read.

    Those are left out and listed in `SPLIT.left_out.jsonl`. `SPLIT.pack.json` has what was asked.

    Args:
      data: a source, or a path or spec of `sources.open_source`.
      out: folder, local or in a bucket.
      to: of `writers.FORMATS`.
      shards: number of files; default one for every PER_SHARD images.
      split: of `data`, and in the names of the files; default 'train'.
      max_side: images with a longer side are stored as JPEGs of this size; None: no image is.
      quality: of these JPEGs.
      log: called with each line.

    Raises:
      UserError: an argument is wrong, or `out` holds something else.
    """
    _check_words(to, quality)
    source = data
    if not hasattr(data, 'describe'):
        data = {'path': os.fspath(data)} if isinstance(data, (str, os.PathLike)) else dict(data)
        source = sources.open_source({**data, **({'split': split} if split else {})}, 'train')
    out, n = os.fspath(out).rstrip('/'), len(source)
    encoded.require_outside(source, out)
    for line in sources.lines(source):
        log(line)
    read = encoded.Encoded(source)
    if to == 'arrayrecord' and read.kinds:
        log('ArrayRecord files carry no maps: images and labels alone are packed.')
        read.kinds = ()
    plan = _plan(source, read, out, to, shards, split, max_side, quality)
    _check_folder(plan)
    left = _LeftOut(f'{out}/{plan.stem}.{LEFT_OUT}', source)
    with workdir_lib.lock(out) as held:
        have = _tidy(out)
        for name, value in plan.texts.items():
            if name not in have:
                text = value if isinstance(value, str) else json.dumps(value, indent=1) + '\n'
                storage.atomic_write(f'{out}/{name}', text)
        missing = [k for k, name in enumerate(plan.names) if name not in have]
        if 0 < len(missing) < len(plan.names):
            log(f'{len(plan.names) - len(missing)} of {len(plan.names)} shards are complete')
        left.load()
        _write(plan, missing, left, held, log)
    if left.count == n:
        raise errors.UserError(f'None of the {n:,} images can be read, see {left.path}.')
    what = f'{n - left.count:,} images in {len(plan.names)} {to} shards'
    was = '' if missing else ' (it was complete)'
    log(f'{out}: {what}{was}; read it with --data {out}')
    if left.count:
        log(f'{left.count:,} images cannot be read and are left out, see {left.path}')
    return left.count


def _check_words(to, quality):
    if to not in writers.FORMATS:
        raise errors.UserError(f'--to {to} is unknown{errors.nearest(to, writers.FORMATS)}')
    if not 1 <= quality <= 100:
        raise errors.UserError(f'--quality {quality} must be from 1 to 100.')
    if to == 'arrayrecord':
        errors.extra('array_record', 'arrayrecord')


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What is written.

    Attributes:
      out: folder.
      stem: of the names of the files.
      names: of the shards.
      bounds: shard k has the images bounds[k] ... bounds[k + 1] - 1.
      to: of `writers.FORMATS`.
      about: what the shards share.
      texts: {name: content} of the files beside the shards.
      read: the source.
      max_side, quality: see `pack`.
    """

    out: str
    stem: str
    names: list[str]
    bounds: list[int]
    to: str
    about: writers.About
    texts: dict[str, Any]
    read: encoded.Encoded
    max_side: int | None
    quality: int


def _plan(source, read, out, to, shards, split, max_side, quality):
    n = len(source)
    shards = shards or -(-n // PER_SHARD)
    if shards > n:
        raise errors.UserError(f'--shards {shards} are more than the {n:,} images: give fewer.')
    if max_side and read.kinds:
        raise errors.UserError(
            '--max-side shrinks no maps, and they must have the size of their images: leave it '
            'out, or give the folder of the images alone.'
        )
    stem = re.sub(r'[^A-Za-z0-9_]+', '_', split or 'train')
    _, ending = writers.FORMATS[to]
    about = writers.About(source.classes, read.kinds, read.meaning(), _map_extensions(read))
    request = {
        'images': n,
        'source': source.fingerprint,
        'to': to,
        'shards': shards,
        'max_side': max_side,
        'quality': quality if max_side else None,
        'classes': None if source.classes is None else list(source.classes),
        'maps': {**{kind: True for kind in read.kinds}, **about.meaning},
    }
    return _Plan(
        out=out,
        stem=stem,
        names=[f'{stem}-{k:05d}-of-{shards:05d}{ending}' for k in range(shards)],
        bounds=[-(-k * n // shards) for k in range(shards + 1)],
        to=to,
        about=about,
        texts={f'{stem}.{REQUEST}': request, **_shared(about, to)},
        read=read,
        max_side=max_side,
        quality=quality,
    )


def _write(plan, missing, left, held, log):
    """Writes shards, some at once in threads.

    Threads are enough: reading, decoding and encoding release the GIL. A copied image holds it for
    0.06 to 0.2 ms, and one that is shrunk takes 24 ms of a core.
    """
    bounds, (writer, _) = plan.bounds, writers.FORMATS[plan.to]
    done = progress.Progress(sum(bounds[k + 1] - bounds[k] for k in missing), log)
    workers = stream_lib.num_reading(plan.read, 64)
    at_once = max(1, min(len(missing), workers))

    def sample(i):
        try:
            return _sample(plan, i)
        except patience.Unavailable:
            raise
        except (errors.UserError, OSError) as e:
            return i, str(e)

    def shard(k):
        held()
        bad, images = [], range(bounds[k], bounds[k + 1])
        with storage.atomic_file(f'{plan.out}/{plan.names[k]}') as temporary:
            with writer(temporary, plan.about) as add:
                for found in threads.at_once(sample, images, max(1, workers // at_once)):
                    if isinstance(found, writers.Sample):
                        add(found)
                    else:
                        bad.append(found)
                    done.add()
            left.add(bad)

    try:
        for _ in threads.at_once(shard, missing, at_once):
            held()
    except (OSError, RuntimeError) as e:  # ArrayRecord has no other errors
        if getattr(e, 'errno', None) != errno.ENOSPC and 'No space left' not in str(e):
            raise
        raise errors.UserError(
            f'The disk of {plan.out} is full: free some space and start again, which goes on where '
            f'this ended.'
        ) from None


def _sample(plan, i):
    """Image i as it is written."""
    item = stream_lib.read(plan.read, i)
    data = item['image']
    found = encoded.header(data)
    if plan.max_side and max(found.width, found.height) > plan.max_side:
        data, extension = encoded.shrink(data, plan.max_side, plan.quality), '.jpg'
    else:
        extension = encoded.extension(found, item['name'])
    return writers.Sample(i, item['name'], extension, data, item.get('label'), item['maps'])


def _map_extensions(read):
    """{kind: extension} of the first maps that can be read."""
    for i in range(min(len(read), 100) if read.kinds else 0):
        try:
            found = stream_lib.read(read, i)['maps']
        except patience.Unavailable:
            raise
        except (errors.UserError, OSError):
            continue
        return {kind: encoded.map_extension(data) for kind, data in found.items()}
    return {}


def _shared(about, to):
    """{name: content} of files beside the shards: names of classes, and what maps mean."""
    found, names = {}, about.classes
    if names is None and about.kinds:
        names = about.meaning.get('map_classes')
    if names is not None and to != 'parquet':
        for name in names:
            if name.split('\n') != [name.strip()] or not name or '\r' in name:
                raise errors.UserError(
                    f'The class name {name!r} is no line of classes.txt: rename it, or --to '
                    f'parquet.'
                )
        found['classes.txt'] = ''.join(f'{name}\n' for name in names)
    if to == 'tar' and about.kinds:
        found['maps.json'] = about.meaning
    return found


def _check_folder(plan):
    """Raises unless the folder is empty, or holds what was asked before, or other splits."""
    out, stem = plan.out, plan.stem
    if os.path.exists(out) and not os.path.isdir(out):
        raise errors.UserError(f'--out {out} is a file: give a folder.')
    have = storage.names(out)
    stems = {stem, *(x.removesuffix(f'.{REQUEST}') for x in have if x.endswith(f'.{REQUEST}'))}
    own = '|'.join(map(re.escape, stems))
    ending = '|'.join(re.escape(end) for _, end in writers.FORMATS.values())
    ours = re.compile(
        rf'(({own})(-\d+-of-\d+({ending})({tar_index.ENDING})?|\.{REQUEST}|\.{LEFT_OUT})|{"|".join(SHARED)})'
        r'(\.[0-9a-f]{8}\.tmp)?'
    )
    others = [name for name in have if not (ours.fullmatch(name) or files.is_system(name))]
    request = f'{stem}.{REQUEST}'
    if request not in have:
        others += [name for name in have if name.startswith(f'{stem}-')]
    if others:
        raise errors.UserError(f'--out {out} holds {others[0]}: give an empty or a new folder.')
    for name, value in plan.texts.items():
        if name not in have:
            continue
        old = storage.read(f'{out}/{name}').decode()
        if name == request:
            _compare(_parsed(old), json.loads(json.dumps(value)), out)
        elif (old if isinstance(value, str) else _parsed(old)) != value:
            raise errors.UserError(
                f'{out}/{name} is of other images: give another --out, or delete the folder.'
            )


def _parsed(text):
    try:
        return json.loads(text)
    except ValueError:
        return {}


def _compare(old, new, out):
    """Raises if the request of an earlier start was another."""
    for key, value in new.items():
        was = old.get(key)
        if was == value:
            continue
        if key in ('source', 'images', 'classes'):
            changed = f'other images than these {new["images"]:,}, or some were written anew'
        elif key == 'maps':
            changed = 'maps of another meaning'
        else:
            changed = f'--{key.replace("_", "-")} {was}, not {value}'
        raise errors.UserError(
            f'{out} was packed with {changed}: give another --out, or delete the folder.'
        )


def _tidy(out):
    """Names in a folder, without what a killed start left, which is deleted."""
    names = storage.names(out)
    for name in names:
        if name.endswith('.tmp'):
            storage.remove(f'{out}/{name}')
    return {name for name in names if not name.endswith('.tmp')}


class _LeftOut:
    """The list of images that could not be read: one JSON object for each."""

    def __init__(self, path, source):
        self.path, self._source, self._lock = path, source, threading.Lock()
        self._entries = {}

    def load(self):
        """Takes over the list of an earlier start."""
        entries = [json.loads(line) for line in storage.read_lines(self.path)]
        self._entries = {entry['id']: entry for entry in entries}

    @property
    def count(self):
        return len(self._entries)

    def add(self, bad):
        """Adds [(index, reason)] of a shard that is complete."""
        if not bad:
            return
        with self._lock:
            for i, reason in bad:
                path = files.printable(self._source.describe(i))
                self._entries[i] = {'id': i, 'path': path, 'reason': reason}
            entries = [self._entries[i] for i in sorted(self._entries)]
            lines = ''.join(json.dumps(x, ensure_ascii=False) + '\n' for x in entries)
            storage.atomic_write(self.path, lines)
