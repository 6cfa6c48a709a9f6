# SPDX-License-Identifier: Apache-2.0
"""Splits of a data set: which folders or files are for training, which for tests.

A name is that of a split if exactly one of its words is in ROLES: train, Validation, seg_test,
train2017, training_set. Names at one level are splits if *all* of them are such names, alike but
for that word and for digits, and of two roles or more. So `train` beside `plane` is a class, as are
`freight_train` and `night_train`.
"""

import re
from collections.abc import Collection, Iterable

from ssl_jax.run import errors

ROLES = {
    **dict.fromkeys(('train', 'training'), 'train'),
    **dict.fromkeys(('val', 'valid', 'validation', 'dev'), 'val'),
    **dict.fromkeys(('test', 'testing', 'eval', 'evaluation'), 'test'),
    **dict.fromkeys(('unlabeled', 'unlabelled', 'extra', 'pred', 'holdout'), 'other'),
}
# What a set of images is for -> the roles that serve, best first. None: every image.
PURPOSES = {'train': ('train',), 'test': ('test', 'val'), 'all': None}


def role(name: str) -> str | None:
    """The role that a split of this name has, None if it is no name of a split."""
    return _role_and_rest(name)[0]


def _role_and_rest(name):
    """('train', ['seg']) of 'seg_train2017'; (None, words) of a name that is no split's."""
    words = re.findall(r'[^\W\d_]+', name.lower())
    found = [w for w in words if w in ROLES]
    if len(found) != 1:
        return None, words
    return ROLES[found[0]], [w for w in words if w != found[0]]


def roles(names: Iterable[str]) -> dict[str, str] | None:
    """{name: role} if the names are those of splits, see above, else None."""
    found = {name: _role_and_rest(name) for name in names}
    rests = {' '.join(rest) for _, rest in found.values()}
    kinds = {kind for kind, _ in found.values()}
    if None in kinds or len(kinds) < 2 or len(rests) != 1:
        return None
    return {name: found[name][0] for name in sorted(found)}


def level(folders: Collection[str]) -> tuple[int, dict[str, str]] | None:
    """The depth at which folders are splits, and their roles; None if there is no such depth.

    Below the single folders that wrap a data set that is the level where images divide, as in
    archive/data/{train,test}, whatever lies beside them; or a deeper one, where every image is in a
    split, as in {cats,dogs}/{train,test}.

    Args:
      folders: those that hold images, relative, with '/'; '' is the top.
    """
    paths = [tuple(f.split('/')) if f else () for f in folders]
    base = ()
    while len(below := {p[len(base)] for p in paths if p[: len(base)] == base != p}) == 1:
        base += tuple(below)
    inside = [p for p in paths if p[: len(base)] == base]
    for depth in range(len(base), max(map(len, paths), default=0)):
        found = roles({p[depth] for p in inside if len(p) > depth})
        if found and (depth == len(base) or all(len(p) > depth for p in paths)):
            return depth, found
    return None


def choose(
    found: dict[str, str], split: str | None, purpose: str, where: str
) -> list[tuple[str, ...]] | None:
    """Names of the splits to use, best choice first; None: all.

    Args:
      found: {name: role} of the splits that there are.
      split: a name or role that the user asks for, or 'all'.
      purpose: of PURPOSES; counts if `split` is None.
      where: the data set, for messages.

    Raises:
      UserError: there is no such split.
    """
    kinds = PURPOSES[purpose]
    if split == 'all' or (split is None and kinds is None):
        return None
    if split is not None:
        wanted = split.lower()
        exact = [n for n in found if n.lower() == wanted]
        alike = [n for n, kind in found.items() if kind in (wanted, role(wanted))]
        if not exact and (not alike or role(wanted) == 'other'):
            raise errors.UserError(f'{where} has no split {split!r}{errors.nearest(split, found)}')
        return [tuple(exact or alike)]
    chosen = [tuple(n for n in found if found[n] == kind) for kind in kinds]
    if not any(chosen):
        raise errors.UserError(
            f'{where} has the splits {listed(found)} and none is called {kinds[0]}: name the one '
            f'to use with --split, or --split all for every image.'
        )
    return [names for names in chosen if names]


def note(used: dict[str, int], left: dict[str, int], purpose: str) -> str:
    """A sentence for the log on the splits that are used and those that are not.

    Args:
      used, left: {name: number of images}.
      purpose: of PURPOSES.
    """
    used, left = (', '.join(f'{n:,} of {name}' for name, n in d.items()) for d in (used, left))
    how = '--split NAME takes another split, --split all every image'
    if purpose == 'test':
        how = '--test takes the path of another folder or file too'
    return f'uses {used}; leaves {left} ({how})'


def listed(names: Iterable[str]) -> str:
    """'a, b and c'."""
    *first, last = names
    return f'{", ".join(first)} and {last}' if first else last
