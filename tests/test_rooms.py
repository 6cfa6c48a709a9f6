# SPDX-License-Identifier: Apache-2.0
"""Imports point one way: the order of the rooms, read from the syntax tree."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parents[1] / 'ssl_jax'
# A room (folder or file) may import from itself and from the lines above its own. Four files of
# run/ and viz/ are doors: they join what their neighbours know nothing of.
ORDER = (
    ('run',),
    ('fields', 'sharding', 'viz'),
    ('optim', 'augment', 'kernels', 'data'),
    ('models',),
    ('objectives',),
    ('methods',),
    ('config', 'step', 'interop'),
    ('run/weights', 'run/compiled'),
    ('run/start', 'encoder', 'listing'),
    ('evals', 'plan', 'check'),
    ('report',),
    ('train', 'viz/show', 'app', 'prepare', 'curate'),
    ('cli', '__init__'),
)
# Modules that are slow to import, or of one command: imported where they are used.
LATE = {'cli', '__init__'}
FILES = sorted(
    p.relative_to(PACKAGE).with_suffix('').as_posix()
    for p in PACKAGE.rglob('*.py')
    if 'configs' not in p.parts
)


def room(name):
    """The entry of ORDER that a file belongs to."""
    entries = [entry for line in ORDER for entry in line]
    found = [e for e in entries if name == e or name.startswith(f'{e}/')]
    assert found, f'{name} is in no room of ORDER'
    return max(found, key=len)


def rank(name):
    return next(i for i, line in enumerate(ORDER) if room(name) in line)


def file_of(dotted):
    """'ssl_jax.run.errors' -> 'run/errors'; None for what is no file of the package."""
    package, _, path = dotted.replace('.', '/').partition('/')
    path = path or '__init__'
    files = [f for f in (path, f'{path}/__init__') if package == 'ssl_jax' and f in FILES]
    return files[0] if files else None


def is_room(dotted):
    return (PACKAGE.parent / dotted.replace('.', '/')).is_dir()


def imports(name):
    """[(file imported, whether at the top of the module)] of ssl_jax."""
    found, top = [], set()
    tree = ast.parse((PACKAGE / f'{name}.py').read_text())
    for node in tree.body:
        top.add(id(node))
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [a.name for a in node.names]
        if isinstance(node, ast.ImportFrom):
            inner = [f'{node.module}.{a.name}' for a in node.names]
            names = [n if file_of(n) or is_room(n) else node.module for n in inner]
        found += [(file, id(node) in top) for file in map(file_of, names) if file]
    return found


@pytest.mark.parametrize('name', FILES)
def test_a_file_imports_only_from_its_room_and_those_below(name):
    for other, _ in imports(name):
        if room(other) == room(name):
            continue
        assert rank(other) < rank(name), f'{name} imports {other}, which is not below it'


@pytest.mark.parametrize('name', FILES)
def test_modules_are_imported_at_the_top(name):
    late = [other for other, at_top in imports(name) if not at_top]
    assert not late or name in LATE, f'{name} imports {late} inside a function'


def test_no_two_files_import_each_other():
    """No circle of any length, late imports included."""
    edges, done = {name: {other for other, _ in imports(name)} for name in FILES}, set()

    def visit(name, path):
        assert name not in path, f'circle: {" -> ".join([*path, name])}'
        if name not in done:
            for other in sorted(edges[name]):
                visit(other, [*path, name])
            done.add(name)

    for name in FILES:
        visit(name, [])


def test_flax_is_imported_by_networks_and_methods_alone():
    """The door stays open to another module system."""
    found = []
    for name in FILES:
        tree = ast.parse((PACKAGE / f'{name}.py').read_text())
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ''] if isinstance(node, ast.ImportFrom) else []
            if any(n.split('.')[0] == 'flax' for n in names):
                found.append(name)
    assert {room(name) for name in found} <= {'models', 'methods'}, found


def test_at_most_ten_files_lie_at_the_top():
    assert len(list(PACKAGE.glob('*.py'))) <= 10
