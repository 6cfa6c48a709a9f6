# SPDX-License-Identifier: Apache-2.0
"""Shards: the files of a data set that hold many images each, and their splits."""

import fnmatch
import glob
import os
import re

from ssl_jax.data import files, splits
from ssl_jax.run import errors, storage


def expand(
    path: str | os.PathLike, split: str | None, suffix: str, purpose: str = 'train'
) -> list[tuple[list[str], list[str]]]:
    """Files of a sharded data set, in sorted order.

    Args:
      path: a file, a glob, a pattern with braces ({000..127} or {a,b}), or a folder.
      split: the name of a split, or 'all'; None: that of `purpose`, if the folder has several.
      suffix: of the files in a folder; -00000-of-00002 may follow.
      purpose: see `splits.PURPOSES`.

    Returns:
      [(files, sentences for the log)], the best choice first; more than one if two splits serve.
    """
    path = os.fspath(path)
    wanted = None if split == 'all' else split
    several = _braces(path) if '{' in path and not files.exists(path) else [path]
    if len(several) > 1:
        names = [name for one in several for name in _matching(one)]
    elif glob.has_magic(path) and not files.exists(path):
        names = _matching(path)
        if not names:
            raise FileNotFoundError(f'No file matches {path}: check the pattern.')
    elif not files.is_folder(path):
        files.require(path)
        if not files.is_file(path):
            raise errors.UserError(f'{path} is no regular file: give a file or a folder.')
        names = [path]
    else:
        return _expand_folder(path, split, suffix, purpose)
    # A pattern or a file is the user's own choice, unless its name says another split.
    chosen = names
    if wanted:
        role = splits.role(wanted)
        chosen = [f for f in names if splits.role(_split_of(os.path.basename(f)) or wanted) == role]
    if not chosen:
        raise FileNotFoundError(f'No file of split {split!r} in {path}: leave the split out.')
    return [(chosen, [])]


def _braces(pattern):
    """The patterns that one with braces stands for, as a shell has it: {000..127}, {a,b}."""
    found = re.search(r'\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}', pattern)
    if not found:
        return [pattern]
    first, last, words = found.groups()
    if words is None:
        width = len(first) if first.startswith('0') or len(first) == len(last) else 0
        words = [str(k).zfill(width) for k in range(int(first), int(last) + 1)]
    else:
        words = words.split(',')
    before, after = pattern[: found.start()], pattern[found.end() :]
    return [text for word in words for text in _braces(f'{before}{word}{after}')]


def _matching(pattern):
    """Files that match a glob, sorted; in a bucket too. A path without * must exist."""
    if not glob.has_magic(pattern):
        files.require(pattern)
        return [pattern]
    if not storage.is_remote(pattern):
        return sorted(f for f in glob.glob(pattern, recursive=True) if os.path.isfile(f))
    parts = pattern.split('/')
    first = next(i for i, part in enumerate(parts) if glob.has_magic(part))
    root, wanted = '/'.join(parts[:first]), parts[first:]
    return [f'{root}/{n}' for n in sorted(files.listed(root)) if _matches(n.split('/'), wanted)]


def _matches(parts, wanted):
    """Whether the parts of a path match those of a pattern; a * stands for no hidden name."""
    if not wanted or not parts:
        return not parts and all(part == '**' for part in wanted)
    hidden = parts[0].startswith('.') and not wanted[0].startswith('.')
    if wanted[0] == '**':
        return _matches(parts, wanted[1:]) or (not hidden and _matches(parts[1:], wanted))
    return (
        not hidden and fnmatch.fnmatchcase(parts[0], wanted[0]) and _matches(parts[1:], wanted[1:])
    )


def _expand_folder(path, split, suffix, purpose):
    ending = re.compile(re.escape(suffix) + r'(-\d+-of-\d+)?$')
    names, left = files.walk(path, ending.search)
    if not names:
        raise FileNotFoundError(f'There is no *{suffix} file in {path}: check the path.')
    notes = files.left_out({k: v for k, v in left.items() if not k.startswith(('of ', 'without '))})
    own = {name: _split_of(name) for name in names}
    found = {s: splits.role(s) for s in sorted(set(own.values()) - {None})}
    several = len(set(found.values())) > 1
    if split not in (None, 'all'):
        chosen = [name for name in names if _is_of_split(name, split)]
        if not chosen and not found:
            hint = errors.nearest(split, names)
            raise FileNotFoundError(f'No file of split {split!r} in {path}{hint}')
        if chosen:
            return [([os.path.join(path, name) for name in chosen], notes)]
    elif not several:
        return [([os.path.join(path, name) for name in names], notes)]
    choices = splits.choose(found, split, purpose, path)
    if choices is None:
        return [([os.path.join(path, name) for name in names], notes)]
    out = []
    for choice in choices:
        chosen = [name for name in names if own[name] in choice]
        counts = [{}, {}]
        for name in names:
            key = own[name] or 'no split'
            of = counts[own[name] not in choice]
            of[key] = of.get(key, 0) + 1
        said = [f'files: {splits.note(*counts, purpose)}'] if counts[1] else []
        out.append(([os.path.join(path, name) for name in chosen], said + notes))
    return out


def _pieces(name):
    """Parts of a path that may name its split, of the file and the folders near it first."""
    *folders, file = name.split('/')
    return [*file.split('.')[0].split('-'), *reversed(folders)]


def _is_of_split(name, split):
    """train.parquet, train-00000-of-00005.parquet, data-train.array_record, train/0000.parquet"""
    return split in _pieces(name)


def _split_of(name):
    """The piece of a path that names its split, without numbers; None without."""
    pieces = [p for p in _pieces(name) if splits.role(p)]
    return re.sub(r'[\d_]+$', '', pieces[0]) if pieces else None
