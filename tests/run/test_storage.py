# SPDX-License-Identifier: Apache-2.0
"""Files and folders appear whole or not at all."""

import os
import pathlib

import pytest

from ssl_jax.run import storage


def content(folder):
    """{name: text} of all files below a folder."""
    files = (p for p in folder.rglob('*') if p.is_file())
    return {p.relative_to(folder).as_posix(): p.read_text() for p in files}


def no_space(*_):
    raise OSError('no space')


@pytest.mark.parametrize('data', ['new', b'new'])
def test_an_atomic_write_makes_the_folder_and_replaces_the_file(tmp_path, data):
    storage.atomic_write(tmp_path / 'a' / 'f', 'old')
    storage.atomic_write(tmp_path / 'a' / 'f', data)
    assert content(tmp_path) == {'a/f': 'new'}


@pytest.mark.parametrize('call', ['fsync', 'replace'])
def test_an_atomic_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path, monkeypatch, call
):
    storage.atomic_write(tmp_path / 'f', 'old')
    monkeypatch.setattr(os, call, no_space)
    with pytest.raises(OSError, match='no space'):
        storage.atomic_write(tmp_path / 'f', 'new')
    assert content(tmp_path) == {'f': 'old'}


def test_an_atomic_file_is_not_there_before_its_block_ends(tmp_path):
    with storage.atomic_file(tmp_path / 'f') as temporary:
        pathlib.Path(temporary).write_text('new')
        assert not (tmp_path / 'f').exists()
    assert content(tmp_path) == {'f': 'new'}


def test_an_atomic_file_whose_block_fails_leaves_the_old_one_and_nothing_else(tmp_path):
    (tmp_path / 'f').write_text('old')
    with pytest.raises(KeyError), storage.atomic_file(tmp_path / 'f') as temporary:
        pathlib.Path(temporary).write_text('half')
        raise KeyError
    assert content(tmp_path) == {'f': 'old'}


def test_an_atomic_folder_replaces_what_was_there(tmp_path):
    for text in ('old', 'new'):
        with storage.atomic_folder(tmp_path / 'a' / 'b') as folder:
            (folder / text).write_text(text)
    assert content(tmp_path) == {'a/b/new': 'new'}


def test_an_atomic_folder_whose_block_fails_leaves_the_old_one_and_nothing_else(tmp_path):
    (tmp_path / 'd').mkdir()
    (tmp_path / 'd' / 'f').write_text('old')
    with pytest.raises(KeyError), storage.atomic_folder(tmp_path / 'd') as folder:
        (folder / 'f').write_text('half')
        raise KeyError
    assert content(tmp_path) == {'d/f': 'old'}
    assert [p.name for p in tmp_path.iterdir()] == ['d']


def test_an_atomic_folder_that_cannot_be_moved_leaves_the_old_one_and_nothing_else(
    tmp_path, monkeypatch
):
    (tmp_path / 'd').mkdir()
    (tmp_path / 'd' / 'f').write_text('old')
    real = pathlib.Path.rename

    def rename(self, target):
        return no_space() if self.name.endswith('.partial') else real(self, target)

    monkeypatch.setattr(pathlib.Path, 'rename', rename)
    with pytest.raises(OSError, match='no space'), storage.atomic_folder(tmp_path / 'd') as folder:
        (folder / 'f').write_text('new')
    assert content(tmp_path) == {'d/f': 'old'}
    assert [p.name for p in tmp_path.iterdir()] == ['d']


@pytest.mark.parametrize('path, remote', [('gs://bucket/run', True), ('runs/a', False)])
def test_a_path_with_a_scheme_is_remote_and_stays_as_it_is(path, remote):
    assert storage.is_remote(path) == remote
    absolute = str(storage.absolute(path))
    assert absolute == path if remote else absolute == os.path.abspath(path)
