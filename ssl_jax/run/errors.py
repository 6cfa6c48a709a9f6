# SPDX-License-Identifier: Apache-2.0
"""Errors for users: one sentence with the name, its value and the next step."""

import contextlib
import difflib
import importlib
import os
import sys
import types
from collections.abc import Iterable, Iterator


class UserError(ValueError):
    """Invalid input of a user; the message is one sentence."""


@contextlib.contextmanager
def in_a_sentence(command: str) -> Iterator[None]:
    """Ends the process with code 1 and one line on stderr on errors of users and the system.

    All others are bugs, of ours or of a library, and keep their traceback. SSL_JAX_TRACEBACK=1
    shows it for every error.
    """
    try:
        yield
    except (UserError, OSError) as error:
        if os.environ.get('SSL_JAX_TRACEBACK'):
            raise
        print(f'{command}: {error}', file=sys.stderr, flush=True)
        sys.exit(1)


def close(word: str, words: Iterable, cutoff: float = 0.6) -> list[str]:
    """[the nearest of `words`], or [] if none is near."""
    return difflib.get_close_matches(str(word), [str(w) for w in words], 1, cutoff)


def nearest(word: str, words: Iterable, where: str = '', cutoff: float = 0.5) -> str:
    """End of a message on an unknown name: the nearest of `words`, or the first 12."""
    words = [str(w) for w in words]
    if match := close(word, words, cutoff):
        return f'{where}: did you mean {match[0]!r}?'
    shown = ', '.join(words[:12]) + (', ...' if len(words) > 12 else '')
    return f'{where}: there is {shown or "nothing"}.'


def extra(module: str, name: str) -> types.ModuleType:
    """Imports `module`, which the extra `name` of ssl_jax installs.

    Raises:
      UserError: it is missing.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{module.partition('.')[0]} is missing: pip install 'ssl_jax[{name}]'."
        ) from error
