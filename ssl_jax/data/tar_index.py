# SPDX-License-Identifier: Apache-2.0
"""Indexes of tar shards: where in each file which image lies, and its label.

A tar has no table of contents, so its headers are read once, and what they say is kept in a Parquet
file beside the shard, SHARD.index, or in a cache where that cannot be written. It counts as long as
size and date (in a bucket: the generation) of the shard are those that it names.

`python -m ssl_jax.data.tar_index CACHE` indexes the shards that a JSON list on its standard input
names: parsing headers holds the GIL, so several shards on a disk take several processes.
"""

import contextlib
import io
import json
import os
import posixpath
import subprocess
import sys
import tarfile
import time
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from ssl_jax.data import files
from ssl_jax.run import bucket, errors, hashing, launch, progress, storage, threads

VERSION = 1  # of the index files
ENDING = '.index'
WINDOW = 1 << 20  # bytes per request to a bucket while headers are read
AT_ONCE = 64  # shards in a bucket whose headers are read at once
PROCESS_BYTES = 2 << 30  # of shards on a disk, above which processes index them
CANDIDATES = (*files.EXTENSIONS, *files.HEIF, '.npy')  # of images and maps
LABELS = '.cls', '.json'  # members that may hold a label; the first one counts
_LABEL_KEYS = ('label', 'cls', 'class', 'target', 'labels')  # in a .json
_SCHEMA = pa.schema(
    [
        ('name', pa.string()),
        ('offset', pa.int64()),  # of the content, in bytes from the start of the shard
        ('size', pa.int64()),  # of the content in bytes
        ('label', pa.string()),  # as the .cls or .json says it
    ]
)
_refused = set()  # folders that this process may not write to; a bucket takes seconds to say so
_COMPRESSED = {b'\x1f\x8b': 'gzip', b'BZh': 'bzip2', b'\xfd7zXZ': 'xz', b'\x28\xb5\x2f\xfd': 'zstd'}


class Index(NamedTuple):
    """What a shard holds.

    Attributes:
      table: a row for each image or map, in the order of the shard: name, offset, size, label.
      left: what is neither, as `files.walk` counts it.
      stamp: of the shard when it was read, see `files.size_and_stamp`.
      closed: whether the shard has an end mark; without, its end may be missing.
    """

    table: pa.Table
    left: files.Left
    stamp: tuple
    closed: bool


def indexes(shards: list[str], cache_dir: str) -> list[Index]:
    """The index of each shard; those that are missing or of another file are made and kept.

    Raises:
      UserError: a shard is cut, damaged, compressed, or no tar.
    """
    at_once = AT_ONCE if storage.is_remote(shards[0]) else 1
    found = dict(
        zip(shards, threads.at_once(lambda f: kept(f, cache_dir), shards, 16), strict=True)
    )
    missing = [shard for shard in shards if found[shard] is None]
    if missing:
        size = sum(max(0, files.size_and_stamp(shard)[0]) for shard in missing)
        more = ' ...' if len(missing) > 1 else ''
        launch.log(f'Indexing tar shards once: {len(missing):,}, {missing[0]}{more}')
        if at_once == 1 and len(missing) > 1 and size > PROCESS_BYTES:
            _in_processes(missing, cache_dir)
        done = progress.Progress(len(missing), launch.log, 'shards')
        # Each host begins at another one: those that share the index files share the work.
        missing = launch.share(missing)
        made = threads.at_once(lambda f: kept(f, cache_dir) or make(f, cache_dir), missing, at_once)
        for shard, index in zip(missing, made, strict=True):
            found[shard] = index
            done.add()
    return [found[shard] for shard in shards]


def _in_processes(shards, cache_dir):
    """Indexes shards in one process per core; what fails is made again, and says why, by us."""
    count = min(launch.cores(), len(shards))
    command = [sys.executable, '-m', 'ssl_jax.data.tar_index', cache_dir]
    env = os.environ | {'PYTHONPATH': os.pathsep.join(sys.path), 'JAX_PLATFORMS': 'cpu'}
    quiet = dict(stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with contextlib.ExitStack() as stack:
        running = []
        for k in range(count):
            process = subprocess.Popen(command, env=env, text=True, **quiet)
            stack.callback(process.wait)
            stack.callback(process.kill)
            process.stdin.write(json.dumps(shards[k::count]))
            process.stdin.close()
            running.append(process)
        done, seen = progress.Progress(len(shards), launch.log, 'shards'), 0
        while any(process.poll() is None for process in running):
            time.sleep(1 if seen else 0.1)
            now = sum(any(map(os.path.exists, _places(f, cache_dir))) for f in shards)
            done.add(now - seen)
            seen = now


def kept(shard: str, cache_dir: str) -> Index | None:
    """The index of a shard that was kept; None if there is none, or it is of another file."""
    stamp = list(files.size_and_stamp(shard))
    for place in _places(shard, cache_dir):
        try:
            table = pq.read_table(io.BytesIO(files.read_bytes(place)))
            said = json.loads(table.schema.metadata[b'ssl_jax'])
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError):
            continue  # none, or cut while it was written by other means than ours
        if (said['version'], said['stamp']) == (VERSION, stamp):
            left = {reason: tuple(found) for reason, found in said['left'].items()}
            return Index(table, left, tuple(stamp), said['closed'])
    return None


def make(shard: str, cache_dir: str) -> Index:
    """Reads the headers of a shard, and keeps what they say where that is allowed."""
    index = read(shard)
    said = dict(version=VERSION, stamp=index.stamp, left=index.left, closed=index.closed)
    table = index.table.replace_schema_metadata({b'ssl_jax': json.dumps(said)})
    out = io.BytesIO()
    pq.write_table(table, out, compression='zstd')
    for place in _places(shard, cache_dir):
        if os.path.dirname(place) in _refused:
            continue
        try:
            storage.atomic_write(place, out.getvalue())
            break
        except (OSError, errors.UserError):  # a folder or bucket of somebody else
            _refused.add(os.path.dirname(place))
    return index


def _places(shard, cache_dir):
    """Where the index of a shard may lie, best first."""
    return f'{shard}{ENDING}', os.path.join(cache_dir, f'tar-{hashing.digest(shard)}{ENDING}')


def read(shard: str) -> Index:
    """What the headers of a shard say.

    Raises:
      UserError: it is cut, damaged, compressed, or no tar; the sentence names shard and byte.
    """
    size, _ = stamp = files.size_and_stamp(shard)
    remote = storage.is_remote(shard)
    with (
        io.BufferedReader(bucket.Ranges(shard, size), WINDOW) if remote else open(shard, 'rb')
    ) as file:
        head = file.read(8)
        for magic, name in _COMPRESSED.items():
            if head.startswith(magic):
                raise errors.UserError(
                    f'{shard} is compressed with {name}, and no single image can be read from it: '
                    f'decompress it (images do not get smaller), or extract it into a folder.'
                )
        file.seek(0)
        try:
            rows, left, end = _members(file)
        except tarfile.ReadError as e:
            if 'unexpected end' in str(e):
                raise errors.UserError(
                    f'{shard} is cut: its last member is longer than the file of {size:,} bytes; '
                    f'copy it again.'
                ) from None
            raise errors.UserError(f'{shard} is no tar file ({e}): check the path.') from None
        file.seek(end)
        rest = file.read(tarfile.BLOCKSIZE)
    if rest.strip(b'\0'):
        what = 'is cut' if len(rest) < tarfile.BLOCKSIZE else 'is damaged'
        raise errors.UserError(
            f'{shard} {what} at byte {end:,} of {size:,}, where a header should be: copy it again.'
        )
    columns = zip(*rows, strict=True) if rows else [()] * len(_SCHEMA)
    arrays = [pa.array(c, f.type) for c, f in zip(columns, _SCHEMA, strict=True)]
    return Index(pa.Table.from_arrays(arrays, schema=_SCHEMA), left, stamp, bool(rest))


def _members(file):
    """(rows of the table, what is left out, byte behind the last member) of an open tar."""
    rows, left, labels = {}, {}, {}
    with tarfile.open(fileobj=file, mode='r:') as archive:
        while (member := archive.next()) is not None:
            archive.members = []  # it would keep all of them
            name = posixpath.normpath(member.name).lstrip('/')
            folder, base = posixpath.split(name)
            stem, extension = posixpath.splitext(name)
            hidden = [part for part in folder.split('/') if files.is_system(part)]
            if member.isdir():
                continue
            if hidden:
                files.leave(left, f'in {hidden[0]}', name)
            elif files.is_system(base):
                files.leave(left, 'hidden', name)
            elif not member.isreg() or member.issparse():
                files.leave(left, 'link(s), device(s) or sparse file(s)', name)
            elif extension.lower() in CANDIDATES:
                if rows.pop(name, None):  # tar's own rule: the last of one name counts
                    files.leave(left, 'replaced by a later member of that name', name)
                rows[name] = member.offset_data, member.size
            elif extension.lower() in LABELS:
                file.seek(member.offset_data)
                said = _label(file.read(member.size), extension.lower())
                rank = LABELS.index(extension.lower())
                if said is not None and rank <= labels.get(stem, (len(LABELS),))[0]:
                    labels[stem] = rank, said
            else:
                files.leave(left, f'of extension {extension.lower()}' if extension else 'without '
                            'extension', name)  # fmt: skip
        end = archive.offset
    return [(name, *where, _label_of(name, labels)) for name, where in rows.items()], left, end


def _label(data, extension):
    """The text of a label, None if there is none."""
    text = data.decode('utf-8', 'replace').strip()
    if extension == '.cls':
        return text or None
    try:
        said = json.loads(text)
    except ValueError:
        return None
    said = said if isinstance(said, dict) else {}
    value = next((said[key] for key in _LABEL_KEYS if isinstance(said.get(key), int | str)), None)
    return None if value is None or isinstance(value, bool) else str(value).strip() or None


def _label_of(name, labels):
    """That of the member of the same name; else of the name up to its first dot, as WebDataset."""
    if not labels:
        return None
    folder, base = posixpath.split(name)
    key = posixpath.join(folder, base.split('.')[0])
    _, said = labels.get(posixpath.splitext(name)[0]) or labels.get(key) or (None, None)
    return said


if __name__ == '__main__':
    for _shard in json.load(sys.stdin):
        if kept(_shard, sys.argv[1]) is None:
            make(_shard, sys.argv[1])
