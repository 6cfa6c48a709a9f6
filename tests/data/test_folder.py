# SPDX-License-Identifier: Apache-2.0
"""A folder is read as its owner means it, and what is left out is said."""

import errno
import importlib.util
import io
import json
import os
import re
import socket
import types

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssl_jax import cli, config
from ssl_jax.data import files, host, sources, splits, stream
from ssl_jax.evals import monitors


def png(value=0, side=8, kind='PNG'):
    out = io.BytesIO()
    PIL.Image.fromarray(np.full((side, side, 3), value, np.uint8)).save(out, kind)
    return out.getvalue()


def fill(root, *names, data=None):
    """Writes files below `root`; images have different pixels."""
    for k, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(k) if data is None else data)


def names(source, root):
    return [os.path.relpath(source.describe(i), root) for i in range(len(source))]


def notes(source):
    return ' | '.join(source.notes)


# Splits.

TRAIN = {
    'plain': ('train/a/1.png', 'train/b/2.png', 'val/a/3.png', 'test/4.png'),
    'capitals': ('Training/a/1.png', 'Training/b/2.png', 'VALID/a/3.png', 'Testing/b/4.png'),
    'affixes': ('seg_train/a/1.png', 'seg_train/b/2.png', 'seg_test/a/3.png', 'seg_pred/4.png'),
    'years': ('train2017/a/1.png', 'train2017/b/2.png', 'val2017/a/3.png'),
    'wrapped twice': (
        *('training_set/training_set/a/1.png', 'training_set/training_set/b/2.png'),
        *('test_set/test_set/a/3.png', 'test_set/test_set/b/4.png'),
    ),
    'ImageNet': tuple(
        f'ILSVRC/Data/CLS-LOC/{n}' for n in ('train/a/1.png', 'train/b/2.png', 'val/3.png')
    ),
    'Hugging Face': ('data/train/a/1.png', 'data/train/b/2.png', 'data/validation/a/3.png'),
    'below the classes': ('a/train/1.png', 'a/test/3.png', 'b/train/2.png', 'b/test/4.png'),
    'with a picture beside': ('train/a/1.png', 'train/b/2.png', 'dev/a/3.png', 'chart.png'),
}


@pytest.mark.parametrize('layout', TRAIN)
def test_the_training_split_is_used_and_the_rest_is_said(layout, tmp_path):
    fill(tmp_path, *TRAIN[layout])
    (tmp_path / 'ILSVRC').mkdir(exist_ok=True)
    (tmp_path / 'ILSVRC/note.xml').write_text('')
    source = sources.open_source(str(tmp_path))
    assert [n[-5:] for n in names(source, tmp_path)] == ['1.png', '2.png']
    assert source.classes == ('a', 'b') and source.labels.tolist() == [0, 1]
    assert 'uses 2 of ' in notes(source) and '--split' in notes(source)
    left = notes(source).split('leaves')[1].split('(')[0]
    assert sum(map(int, re.findall(r'(\d+) of', left))) == len(TRAIN[layout]) - 2


@pytest.mark.parametrize(
    'folders',
    [('test', 'foo'), ('train', 'plane', 'car'), ('freight_train', 'night_train'), ('dev', 'val')]
    + [('train', 'training'), ('1', '2'), ('crash_test', 'freight_train')],
    ids='-'.join,
)
def test_classes_that_are_called_like_splits_stay_classes(folders, tmp_path):
    fill(tmp_path, *(f'{folder}/1.png' for folder in folders))
    source = sources.open_source(str(tmp_path))
    assert source.classes == tuple(sorted(folders)) and not source.notes


def test_any_split_can_be_named_by_its_name_or_its_role(tmp_path):
    fill(tmp_path, 'x/train/a/1.png', 'x/train/b/2.png', 'x/valid/b/3.png', 'x/valid/a/4.png')

    def opened(split):
        return sources.open_source({'path': str(tmp_path), 'split': split})

    for split in ('valid', 'val', 'Validation', 'x/valid'):
        source = opened(split)
        assert names(source, tmp_path) == ['x/valid/a/4.png', 'x/valid/b/3.png'], split
        assert source.classes == ('a', 'b')
    assert len(opened('all')) == 4 and opened('all').classes == ('a', 'b')
    with pytest.raises(ValueError, match="no split 'test': there is train, valid"):
        opened('test')
    with pytest.raises(ValueError, match="no split 'vaild': did you mean 'valid'"):
        opened('vaild')
    assert opened('train').fingerprint == sources.open_source(str(tmp_path)).fingerprint


def test_images_to_be_scored_on_are_those_of_a_test_split_with_labels(tmp_path):
    fill(tmp_path, 'train/a/1.png', 'train/b/1.png', 'val/a/2.png', 'val/b/3.png', 'test/4.png')
    assert names(sources.open_source(str(tmp_path), 'test'), tmp_path)[0] == 'val/a/2.png'
    fill(tmp_path, 'test/a/4.png', 'test/b/4.png')
    (tmp_path / 'test/4.png').unlink()
    assert names(sources.open_source(str(tmp_path), 'test'), tmp_path)[0] == 'test/a/4.png'
    assert len(sources.open_source(str(tmp_path), 'all')) == 6


def test_all_splits_have_labels_only_if_each_has_classes(tmp_path):
    fill(tmp_path, 'train/a/1.png', 'train/b/2.png', 'test/3.png')
    source = sources.open_source({'path': str(tmp_path), 'split': 'all'})
    assert len(source) == 3 and source.classes is None and 'test/3.png' in notes(source)
    fill(tmp_path / 'flat', 'train/1.png', 'test/2.png')
    assert sources.open_source(str(tmp_path / 'flat'), 'all').classes == ('test', 'train')


def test_a_folder_of_splits_without_one_for_training_asks_for_a_name(tmp_path):
    fill(tmp_path, 'val/1.png', 'test/2.png', 'testing/3.png')
    with pytest.raises(ValueError, match='splits test, testing and val and none is called train'):
        sources.open_source(str(tmp_path))
    assert len(sources.open_source({'path': str(tmp_path), 'split': 'test'})) == 1


def test_index_maps_follow_the_split_that_is_used(tmp_path):
    for split in ('train', 'val'):
        fill(tmp_path, f'images/{split}/a.png', f'maps/{split}/a.png')
    spec = dict(source='folder', path=f'{tmp_path}/images', segmentation=f'{tmp_path}/maps')
    assert sources.open_source(spec)[0]['segmentation'].shape == (8, 8)


def test_shards_of_several_splits_are_not_mixed(tmp_path):
    layouts = (
        ('data/train-00000-of-00002.parquet', 'data/train-00001-of-00002.parquet')
        + ('data/validation-00000-of-00001.parquet',),
        ('default/train/0000.parquet', 'default/train/0001.parquet', 'default/test/0000.parquet'),
        ('train_a.parquet', 'train_b.parquet', 'Dev.parquet'),
    )
    for k, layout in enumerate(layouts):
        for i, name in enumerate(layout):
            path = tmp_path / str(k) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table({'image': [png(i)], 'label': [i]}), path)
        source = sources.open_source(str(tmp_path / str(k)))
        assert len(source) == 2 and 'leaves 1 of' in notes(source), layout
        other = sources.open_source(str(tmp_path / str(k)), 'test')
        assert [other[i]['image'] for i in range(len(other))] == [png(2)]
        assert len(sources.open_source(dict(path=str(tmp_path / str(k)), split='all'))) == 3
        assert sources.open_source(dict(path=str(tmp_path / str(k)), split='train'))[1] == source[1]


def test_a_hidden_test_set_is_no_choice_where_the_validation_set_has_labels(tmp_path):
    for name, label in (('train', [0, 1]), ('test', [-1, -1]), ('validation', [1, 0])):
        path = tmp_path / f'{name}.parquet'
        pq.write_table(pa.table({'image': [png(), png()], 'label': label}), path)
    assert sources.open_source(str(tmp_path), 'test').labels.tolist() == [1, 0]


@pytest.mark.parametrize('name', ['x-train.array_record', 'train.array_record-00000-of-00001'])
def test_array_records_have_splits_too(name, tmp_path):
    from array_record.python import array_record_module

    for file in (name, 'x-test.array_record'):
        writer = array_record_module.ArrayRecordWriter(str(tmp_path / file), 'group_size:1')
        writer.write(png())
        writer.close()
    source = sources.open_source(str(tmp_path))
    assert len(source) == 1 and source.files == [str(tmp_path / name)]


def test_a_split_goes_beside_a_path_in_the_fields():
    c = config.load('images_mae', ['data.train=/x', 'data.train.split=val'])
    assert c.data.train.to_dict() == {'path': '/x', 'split': 'val'}
    c = config.load('images_mae', ['data.train.split=val'])
    assert c.data.train.to_dict() == {'source': '', 'path': '', 'split': 'val'}


# Classes.


def test_folders_that_wrap_the_data_set_are_no_classes(tmp_path):
    fill(tmp_path, 'archive/dataset/cats/1.png', 'archive/dataset/dogs/x/2.png')
    fill(tmp_path, 'archive/README.md', '__MACOSX/archive/dataset/cats/._1.png', data=b'x')
    source = sources.open_source(str(tmp_path))
    assert source.classes == ('cats', 'dogs') and len(source) == 2
    assert notes(source) == 'left out: 1 in __MACOSX, 1 of extension .md'


def test_an_image_beside_class_folders_is_said_to_cost_the_labels(tmp_path):
    fill(tmp_path, 'cats/1.png', 'dogs/2.png', 'cover.png')
    source = sources.open_source(str(tmp_path))
    assert source.classes is None and len(source) == 3
    assert '1 images lie beside the folders (cover.png is the first)' in notes(source)


# What is left out.


def test_hidden_and_system_folders_are_no_classes_and_counted(tmp_path):
    fill(tmp_path, 'a/1.png', 'b/2.png')
    hidden = ('.ipynb_checkpoints', '@eaDir', '.Trash', '.Trash-1000', '.thumbnails', '__MACOSX')
    hidden += ('$RECYCLE.BIN', 'System Volume Information', 'lost+found', '.git', '#recycle')
    for folder in hidden:
        fill(tmp_path, f'{folder}/1.png', f'{folder}/x/y/2.png', f'a/{folder}/3.png')
    fill(tmp_path, '.DS_Store', 'b/.DS_Store', 'a/Thumbs.db', 'desktop.ini', '.1.png')
    source = sources.open_source(str(tmp_path))
    assert source.classes == ('a', 'b') and len(source) == 2
    for folder in hidden:
        assert f'3 in {folder}' in notes(source)
    assert '5 hidden (.1.png)' in notes(source) and source.ignored == 3 * len(hidden) + 5


def test_other_extensions_are_counted_and_named(tmp_path):
    fill(tmp_path, 'a.png', 'a.JP2', 'b.j2k')
    fill(tmp_path, 'a.txt', 'b.TXT', 'x/c.txt', 'scan.pdf', data=b'no image')
    fill(tmp_path, 'IMG_1', 'x/IMG_2')
    fill(tmp_path, 'LICENSE', 'empty', data=b'')
    source = sources.open_source(str(tmp_path))
    assert len(source) == 3
    assert '3 of extension .txt' in notes(source) and '1 of extension .pdf' in notes(source)
    assert '2 without extension though an image by its first bytes' in notes(source)
    assert '2 without extension (LICENSE)' in notes(source)


@pytest.mark.parametrize('installed', [False, True])
def test_heic_counts_as_an_image_where_its_extra_is_installed(installed, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        'find_spec',
        lambda name, *a: installed if name == 'pillow_heif' else find(name, *a),
    )
    files.extensions.cache_clear()
    try:
        fill(tmp_path, 'a.png', 'b.HEIC', 'c.heif')
        source = sources.open_source(str(tmp_path))
    finally:
        files.extensions.cache_clear()
    assert len(source) == (3 if installed else 1)
    assert installed or "1 of extension .heic (they need pip install 'ssl_jax[heif]')" in notes(
        source
    )


def test_a_folder_without_images_says_what_it_holds(tmp_path):
    fill(tmp_path, 'x.zip', 'y.zip', '.hidden/1.png')
    with pytest.raises(FileNotFoundError, match=r'2 of extension \.zip, 1 in \.hidden'):
        sources.open_source(str(tmp_path))


def test_what_is_no_regular_file_is_never_opened(tmp_path):
    fill(tmp_path, 'a.png', 'x/b.png')
    os.mkfifo(tmp_path / 'pipe.png')
    os.mkfifo(tmp_path / 'x/unnamed')
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / 's.jpg'))
    os.symlink('/dev/zero', tmp_path / 'endless.png')
    os.symlink('nowhere', tmp_path / 'gone.png')
    os.symlink('loop', tmp_path / 'loop')
    os.symlink('.', tmp_path / 'self')
    source = sources.open_source(str(tmp_path))
    assert names(source, tmp_path) == ['a.png', 'x/b.png']
    assert '4 pipe(s), socket(s) or device(s) (endless.png)' in notes(source)
    assert '1 link(s) to nothing (gone.png)' in notes(source)
    assert '1 link(s) in a circle (loop)' in notes(source)


@pytest.mark.parametrize('become', ['pipe', 'device', 'socket', 'folder', 'nothing'])
def test_an_image_that_becomes_something_else_is_a_bad_image(become, tmp_path):
    fill(tmp_path, 'a.png', 'b.png')
    source = sources.open_source(str(tmp_path))
    path = tmp_path / 'a.png'
    path.unlink()
    if become == 'pipe':
        os.mkfifo(path)
    if become == 'device':
        path.symlink_to('/dev/zero')
    if become == 'socket':
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
    if become == 'folder':
        path.mkdir()
    with pytest.raises((host.DecodeError, OSError)):
        source[0]
    assert host.decode(source[1]['image']).max() == 1


def refusing(monkeypatch, folder, error):
    """Makes os.scandir fail for one folder."""
    scan = os.scandir

    def scandir(path):
        if os.path.basename(os.path.normpath(path)) == folder:
            raise error
        return scan(path)

    monkeypatch.setattr(os, 'scandir', scandir)


def test_a_folder_that_may_not_be_read_is_named_and_the_rest_is_used(tmp_path, monkeypatch):
    fill(tmp_path, 'a/1.png', 'b/2.png', 'secret/3.png')
    refusing(monkeypatch, 'secret', PermissionError(errno.EACCES, 'Permission denied'))
    source = sources.open_source(str(tmp_path))
    assert source.classes == ('a', 'b')
    assert '1 folder(s) that may not be read (secret/)' in notes(source)


@pytest.mark.parametrize(
    'number', [errno.EIO, errno.ESTALE, errno.ENOTCONN], ids=errno.errorcode.get
)
def test_a_disk_or_network_that_fails_must_not_shrink_a_data_set(number, tmp_path, monkeypatch):
    fill(tmp_path, 'a/1.png', 'b/2.png')
    refusing(monkeypatch, 'b', OSError(number, os.strerror(number)))
    with pytest.raises(OSError, match='b/ cannot be listed .*: check the disk'):
        sources.open_source(str(tmp_path))


def test_the_data_folder_itself_must_be_readable(tmp_path, monkeypatch):
    fill(tmp_path, 'own/1.png')
    refusing(monkeypatch, 'own', PermissionError(errno.EACCES, 'Permission denied'))
    with pytest.raises(PermissionError, match='own.* cannot be listed'):
        sources.open_source(str(tmp_path / 'own'))


# Around a source.


def test_the_typical_size_is_that_of_images_from_all_over_the_source():
    small, large = (np.zeros((n, n, 3), np.uint8) for n in (16, 200))
    mixed = sources.Arrays([small] * 100 + [large] * 900)
    assert sources.typical_size(mixed) == (200, 200)
    assert sources.typical_size(sources.Arrays([small] * 900 + [large] * 100)) == (16, 16)
    assert sources.typical_size(sources.Arrays([large])) == (200, 200)


@pytest.mark.parametrize('layout', ['flat', 'classes', 'deep'])
def test_the_order_of_ordinary_folders_is_that_of_their_names_as_bytes(layout, tmp_path):
    made = {
        'flat': ['B.png', 'a.png', 'a10.png', 'a9.png', 'é.png'],
        'classes': ['b-c/1.png', 'b/2.png', 'b/a.png', 'z/1.png'],
        'deep': ['x/y/1.png', 'x/y/z/1.png', 'x/y1.png', 'x2/1.png'],
    }[layout]
    fill(tmp_path, *made)
    source = sources.open_source(str(tmp_path))
    assert names(source, tmp_path) == sorted(made, key=os.fsencode) and not source.notes


TINY = (
    *('total_steps=2', 'batch_size=8', 'method.embed_dim=32', 'method.depth=1'),
    *('method.num_heads=2', 'method.decoder_embed_dim=16', 'method.decoder_depth=1'),
    *('method.decoder_num_heads=2', 'data.num_threads=1', 'eval.tasks.pictures=None'),
)


def test_pretrain_on_a_folder_of_every_oddity_trains_and_says_what_it_leaves(
    tmp_path, capsys, monkeypatch
):
    root = tmp_path / 'zip'
    top = 'archive/Dataset'
    fill(root, *(f'{top}/Train/{c}/{k}.png' for c in ('cats', 'dogs') for k in range(4)))
    fill(root, f'{top}/Train/cats/photo.jp2', data=png(kind='JPEG2000'))
    fill(root, *(f'{top}/{split}/cats/{k}.png' for split in ('Valid', 'test') for k in range(3)))
    for folder in ('.ipynb_checkpoints', '@eaDir', '__MACOSX', 'lost+found', '$RECYCLE.BIN'):
        fill(root, f'{top}/{folder}/x.png', f'{folder}/y.png')
    fill(root, f'{top}/Train/dogs/notes.txt', 'README.md', '.DS_Store', data=b'text')
    fill(root, f'{top}/Train/dogs/IMG_7', f'{top}/secret/1.png')
    if not importlib.util.find_spec('pillow_heif'):
        fill(root, f'{top}/Train/dogs/phone.heic', data=b'')
    os.mkfifo(root / f'{top}/Train/dogs/pipe.png')
    os.symlink('loop', root / 'loop')
    os.symlink(root, root / f'{top}/Train/again')
    refusing(monkeypatch, 'secret', PermissionError(errno.EACCES, 'Permission denied'))
    cli.main(['pretrain', '--data', str(root), '--workdir', str(tmp_path / 'run'), *TINY])
    out = capsys.readouterr().out
    rows = [json.loads(r) for r in (tmp_path / 'run/metrics.jsonl').read_text().splitlines()]
    assert rows[-1]['step'] == 2 and np.isfinite([r['loss'] for r in rows if 'loss' in r]).all()
    assert 'data      9 images' in out
    for said in (
        'uses 9 of Train; leaves 3 of Valid, 3 of test (--split NAME takes another split',
        '2 in .ipynb_checkpoints',
        '2 in @eaDir',
        '2 in $RECYCLE.BIN',
        '1 of extension .txt',
        '1 of extension .md',
        '1 hidden (.DS_Store)',
        '1 link(s) in a circle (loop)',
        'folder(s) that may not be read',
        '1 pipe(s), socket(s) or device(s)',
    ):
        assert said in out, said


def test_one_image_alone_trains_without_monitors_or_is_refused_before_the_start(tmp_path, capsys):
    fill(tmp_path, 'one/a.png')
    one = sources.open_source(str(tmp_path / 'one'))
    assert sources.typical_size(one) == (8, 8)
    with stream.train_stream(one, [host.View('x', 4)], batch_size=1, seed=0) as batches:
        assert next(batches)['x'].shape == (1, 1, 4, 4, 3)
    look = types.SimpleNamespace(shown=one, method=types.SimpleNamespace(classes=()))
    monitors.check(monitors.Options(), look)
    assert 'monitors  none' in capsys.readouterr().out
    assert monitors.run(monitors.Options(), look, None, 1) == {}
    with pytest.raises(SystemExit):
        cli.main(['pretrain', '--data', one.path, '--workdir', str(tmp_path / 'run'), *TINY])
    assert '1 images are fewer than one batch of 8' in capsys.readouterr().err
    assert not (tmp_path / 'run/checkpoints/2').exists()


@pytest.mark.parametrize(
    'command',
    [
        ['pretrain', '--workdir', 'w'],
        ['finetune', '--model', 'none', '--workdir', 'w'],
        ['eval', '--workdir', 'w'],
        ['features', '--model', 'm', '--out', 'o'],
        ['show', '--workdir', 'w'],
    ],
    ids=lambda c: c[0],
)
def test_several_folders_are_not_joined_and_a_split_needs_data(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([*command, '--data', 'a', 'b'])
    said = capsys.readouterr().err
    assert end.value.code == 1 and said.count('\n') == 1
    assert "'b' has no '='" in said and 'give --data or --test the one that holds both' in said
    with pytest.raises(SystemExit):
        cli.main([*command, '--data', 'a', '--data', 'b'])
    assert '--data takes one folder' in capsys.readouterr().err
    if command[0] != 'features':
        with pytest.raises(SystemExit):
            cli.main([*command, '--split', 'val'])
        assert '--split val is of --data' in capsys.readouterr().err


def test_words_that_name_a_split():
    assert splits.role('CLS-LOC_train2012') == 'train' and splits.role('trainers') is None
    assert splits.role('train-test') is None and splits.role('Valid') == 'val'
