# SPDX-License-Identifier: Apache-2.0
"""What a user says about a file of weights, as words NAME=VALUE.

On a command line they stand behind the other words, in Python they are keyword arguments, and in a
config they follow the path: `init_from='vit.pth num_heads=6'`.
"""

import os
import re

from ssl_jax.run import errors

NUMBERS = ('num_heads', 'decoder_num_heads', 'img_size', 'patch_size')
POS_RESIZE = ('bicubic', 'offset', 'antialias')  # see `models.pos_embed.resize_weights`
HINTS = (*NUMBERS, 'part', 'pos_resize')
_BEHIND = re.compile(rf'\s+((?:{"|".join(HINTS)})=\S+)$')


def checked(hints: dict) -> dict:
    """The hints with numbers as numbers.

    Raises:
      UserError: a name is unknown, or a value is none of that name.
    """
    found = {}
    for name, value in hints.items():
        if name not in HINTS:
            near = errors.nearest(name, HINTS)
            raise errors.UserError(f"'{name}' is nothing that can be said of weights{near}")
        if name in NUMBERS:
            if not str(value).isdecimal() or int(value) < 1:
                raise errors.UserError(
                    f'{name}={value} is no number of 1 or more; write it as in {name}=12.'
                )
            value = int(value)
        elif name == 'pos_resize' and value not in POS_RESIZE:
            raise errors.UserError(
                f'pos_resize={value} is unknown; use one of {", ".join(POS_RESIZE)}.'
            )
        elif not value:
            raise errors.UserError(f'{name}= has no value; write it as in part=model.')
        found[name] = value
    return found


def of_words(words) -> dict:
    """Hints from words NAME=VALUE; see `checked`."""
    found = {}
    for word in words:
        name, equals, value = word.partition('=')
        if not equals:
            raise errors.UserError(f"'{word}' has no '='; write NAME=VALUE, e.g. num_heads=12.")
        found[name] = value
    return checked(found)


def split(path) -> tuple:
    """(path, hints) of a path that may have words behind it; one that exists has none."""
    text, words = os.fspath(path), []
    while not os.path.exists(text) and (match := _BEHIND.search(text)):
        text, words = text[: match.start()], [match[1], *words]
    return (text, of_words(words)) if words else (path, {})


def behind(fields: list[str]) -> list[str]:
    """Fields of a config, with words on weights moved behind the path of `init_from`."""
    words = [word for word in fields if word.partition('=')[0] in HINTS]
    paths = [word for word in fields if word.startswith('init_from=')]
    if not words or not paths:
        return fields
    of_words(words)
    joined = ' '.join([paths[-1], *words])
    return [joined if word == paths[-1] else word for word in fields if word not in words]
