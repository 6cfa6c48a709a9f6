# SPDX-License-Identifier: Apache-2.0
"""Tables of `ssl_jax recipes` and `ssl_jax methods`: names and the first lines of docstrings."""

import ast
import pathlib

from ssl_jax import config, methods


def recipes() -> list[str]:
    """A line for each recipe."""
    return _table(
        [(name, _first_line(config.folder() / f'{name}.py')) for name in config.recipes()]
    )


def method_names() -> list[str]:
    """A line for each method, and a line on the other names that `--method` takes."""
    folder = pathlib.Path(methods.__file__).parent
    names = methods.names()
    lines = _table([(name, _first_line(folder / f'{name}.py')) for name in names])
    anywhere = [r.removeprefix('images_') for r in config.recipes() if r.startswith('images_')]
    others = ', '.join(name for name in names if name not in anywhere)
    return [*lines, '', f'--method takes {", ".join(anywhere)}; a recipe: {others}.']


def _first_line(path):
    return (ast.get_docstring(ast.parse(path.read_text())) or '').partition('\n')[0]


def _table(rows):
    width = max(len(name) for name, _ in rows)
    return [f'{name:<{width}}  {text}' for name, text in rows]
