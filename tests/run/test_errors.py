# SPDX-License-Identifier: Apache-2.0
"""What a user gets wrong is one sentence with the next step."""

import pathlib
import re
import sys
import tomllib

import jax
import pytest

from ssl_jax.run import errors

REPO = pathlib.Path(__file__).resolve().parents[2]
WORDS = ('batch_size', 'base_lr', 'mask_ratio')


@pytest.mark.parametrize(
    'word, near',
    [('batchsize', 'batch_size'), ('baselr', 'base_lr'), ('mask_ration', 'mask_ratio')],
)
def test_the_nearest_name_ends_the_sentence(word, near):
    assert errors.nearest(word, WORDS) == f": did you mean '{near}'?"


def test_far_from_all_names_the_sentence_ends_with_what_there_is():
    assert errors.nearest('x', WORDS) == ': there is batch_size, base_lr, mask_ratio.'
    assert errors.nearest('x', WORDS, ' in this file').startswith(' in this file: there is ')
    assert errors.nearest('x', ()) == ': there is nothing.'
    many = errors.nearest('x', range(100, 200))
    assert many == f': there is {", ".join(map(str, range(100, 112)))}, ....'


def test_a_low_enough_cutoff_always_names_one():
    assert 'did you mean' in errors.nearest('x', WORDS, cutoff=0.0)


def test_a_missing_package_names_the_extra_that_has_it(monkeypatch):
    module = 'array_record.python.array_record_module'
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError) as error:
        errors.extra(module, 'arrayrecord')
    assert str(error.value) == "array_record is missing: pip install 'ssl_jax[arrayrecord]'."


def test_a_package_that_is_there_is_imported():
    assert errors.extra('json', 'any') is sys.modules['json']


def test_every_extra_that_a_sentence_names_can_be_installed():
    project = tomllib.loads((REPO / 'pyproject.toml').read_text())['project']
    source = ''.join(p.read_text() for p in (REPO / 'ssl_jax').rglob('*.py'))
    named = re.findall(r"errors\.extra\('[\w.]+', '(\w+)'\)", source)
    named += re.findall(r"pip install 'ssl_jax\[(\w+)\]'", source)
    assert named and set(named) <= set(project['optional-dependencies'])


@pytest.mark.parametrize(
    'error', [errors.UserError('say X.'), FileNotFoundError('say X.'), PermissionError('say X.')]
)
def test_an_error_of_the_user_or_the_system_is_one_line_and_code_1(error, capsys):
    with pytest.raises(SystemExit) as end, errors.in_a_sentence('ssl_jax eval'):
        raise error
    assert end.value.code == 1
    assert capsys.readouterr().err == 'ssl_jax eval: say X.\n'


@pytest.mark.parametrize(
    'bug', [ValueError('x'), RuntimeError('x'), KeyError('x'), jax.errors.JaxRuntimeError('x')]
)
def test_a_bug_of_ours_or_of_xla_keeps_its_traceback(bug):
    with pytest.raises(type(bug)), errors.in_a_sentence('ssl_jax eval'):
        raise bug
