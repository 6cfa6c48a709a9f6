# SPDX-License-Identifier: Apache-2.0
"""`ssl_jax data check`: each planted fault is found, with its reason, and nothing else."""

import io
import json

import cv2
import numpy as np
import PIL.Image
import pytest

from folders import encode, image, write
from ssl_jax import cli
from ssl_jax.data import host, sources
from ssl_jax.prepare import inspect
from ssl_jax.run import errors


def save(pixels, format, mode=None, **options):
    file = io.BytesIO()
    picture = PIL.Image.fromarray(pixels)
    (picture.convert(mode) if mode else picture).save(file, format, **options)
    return file.getvalue()


@pytest.fixture
def flawed(tmp_path, monkeypatch):
    """{relative path: findings} of a folder with one fault of each kind, and the folder."""
    monkeypatch.setattr(inspect, 'HUGE', 100 * 100)
    root = tmp_path / 'images'
    for i in range(12):
        write(root / f'good {i:02}.jpg', encode(image(i, 40, 60)))
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    photo = image(20, 50, 60)
    deep = image(21, 40, 40).astype(np.uint16) * 200
    frames = [PIL.Image.fromarray(image(k, 40, 40)) for k in (30, 31)]
    files = {
        'cut.jpg': (encode(image(40, 90, 90))[:900], {'broken'}),
        'empty.jpg': (b'', {'broken'}),
        'empty2.jpg': (b'', {'broken'}),
        'page.png': (b'<html>404</html>', {'broken'}),
        'tiny.png': (encode(image(22, 31, 64), '.png'), {'tiny'}),
        'huge.jpg': (encode(image(23, 101, 100)), {'huge'}),
        'cmyk.jpg': (save(photo, 'JPEG', 'CMYK'), {'mode'}),
        'grey.png': (save(photo, 'PNG', 'L'), {'mode'}),
        'alpha.png': (save(photo + 1, 'PNG', 'RGBA'), {'mode'}),
        'deep.png': (encode(deep, '.png'), {'mode'}),
        'turned.jpg': (save(image(24, 40, 50), 'JPEG', exif=exif), {'turned'}),
        'moving.gif': (save(image(25, 40, 40), 'GIF'), {'mode'}),
        'z twin.jpg': (encode(image(3, 40, 60)), {'copy'}),
        'z again.png': (encode(host.decode(encode(image(5, 40, 60))), '.png'), {'copy'}),
    }
    for name, (data, _) in files.items():
        write(root / name, data)
    file = io.BytesIO()
    frames[0].save(file, 'GIF', save_all=True, append_images=frames[1:])
    write(root / 'moving.gif', file.getvalue())
    return root, {name: kinds for name, (_, kinds) in files.items()} | {
        'moving.gif': {'mode', 'animated'}
    }


def findings(out):
    rows = [json.loads(line) for line in (out / 'findings.jsonl').read_text().splitlines()]
    found = {}
    for row in rows:
        found.setdefault(row['path'].rsplit('/', 1)[-1], {})[row['finding']] = row['reason']
    return found


def test_every_planted_fault_is_found_and_no_other(flawed, tmp_path, capsys):
    root, planted = flawed
    with pytest.raises(SystemExit) as ended:
        cli.main(['data', 'check', str(root), '--out', str(tmp_path / 'out')])
    assert ended.value.code == 1
    found = findings(tmp_path / 'out')
    assert {name: set(kinds) for name, kinds in found.items()} == planted
    assert 'HTML' in found['page.png']['broken'] and 'empty' in found['empty.jpg']['broken']
    assert 'truncated' in found['cut.jpg']['broken']
    assert found['cmyk.jpg']['mode'] == 'CMYK' and found['deep.png']['mode'] == '16 bits'
    assert found['z twin.jpg']['copy'].startswith('the same bytes as')
    assert found['z twin.jpg']['copy'].endswith('good 03.jpg')
    assert found['z again.png']['copy'].startswith('the same pixels as')
    assert found['z again.png']['copy'].endswith('good 05.jpg')
    out = capsys.readouterr().out
    assert 'broken' in out and '15.38 %' in out and '12 of 26 images have no finding' in out
    picture = cv2.imread(str(tmp_path / 'out' / 'findings.png'))
    assert min(picture.shape[:2]) > 500 and picture.std() > 10


def test_good_images_end_with_code_0_and_leave_no_picture(tmp_path, capsys):
    for i in range(5):
        write(tmp_path / 'images' / f'{i}.png', encode(image(i, 40, 50), '.png'))
    write(tmp_path / 'out' / 'findings.png', b'of an earlier check')
    with pytest.raises(SystemExit) as ended:
        cli.main(['data', 'check', str(tmp_path / 'images'), '--out', str(tmp_path / 'out')])
    assert ended.value.code == 0
    assert '5 images, and nothing to say of them' in capsys.readouterr().out
    assert (tmp_path / 'out' / 'findings.jsonl').read_text() == ''
    assert not (tmp_path / 'out' / 'findings.png').exists()


def test_the_picture_does_not_become_one_of_the_images(tmp_path):
    write(tmp_path / 'a.png', encode(image(0, 40, 50), '.png'))
    with pytest.raises(errors.UserError, match='lies among the images'):
        inspect.inspect(tmp_path, tmp_path / 'data_check')
    assert len(list(tmp_path.iterdir())) == 1


def test_all_splits_are_opened(tmp_path):
    for i, split in enumerate(('train', 'val')):
        write(tmp_path / 'images' / split / 'a.jpg', encode(image(i, 40, 50)))
    write(tmp_path / 'images' / 'val' / 'b.jpg', encode(image(0, 40, 50)))
    inspect.inspect(tmp_path / 'images', tmp_path / 'out', log=lambda line: None)
    assert 'train/a.jpg' in findings(tmp_path / 'out')['b.jpg']['copy']


def test_a_mode_that_most_images_have_is_not_odd(tmp_path):
    for i in range(5):
        grey = image(i, 40, 50)[..., 0] if i else image(i, 40, 50)
        write(tmp_path / 'images' / f'{i}.png', encode(grey, '.png'))
    said = []
    assert inspect.inspect(tmp_path / 'images', tmp_path / 'out', log=said.append)
    assert not findings(tmp_path / 'out')
    assert 'most images, 4, have grey' in said[-1]


def test_a_copy_with_another_label_is_said(tmp_path):
    data = encode(image(0, 40, 50))
    source = sources.Arrays([data, encode(image(1, 40, 50)), data, data], [0, 1, 1, 0], 'xy')
    assert inspect.inspect(source, tmp_path, log=lambda line: None)
    rows = [json.loads(line) for line in (tmp_path / 'findings.jsonl').read_text().splitlines()]
    assert [(row['id'], row['reason']) for row in rows] == [
        (2, 'the same bytes as array 0, and another label'),
        (3, 'the same bytes as array 0'),
    ]


def test_maps_that_are_missing_or_of_other_size_are_found(pairs, tmp_path):
    write(pairs / 'labels' / '2.png', encode(np.zeros((24, 39), np.uint8), '.png'))
    write(pairs / 'depth' / '4.png', b'no map')
    spec = {'path': pairs, 'ignore': 9, 'depth_scale': 0.001}
    assert not inspect.inspect(spec, tmp_path / 'out', log=lambda line: None)
    found = findings(tmp_path / 'out')
    assert {name for name, kinds in found.items() if 'map' in kinds} == {'2.jpg', '4.jpg'}
    assert '39x24' in found['2.jpg']['map'] and 'cannot be read as a map' in found['4.jpg']['map']


def test_arrays_are_checked_too(tmp_path):
    source = sources.open_source({'source': 'scenes', 'n': 4, 'size': 32})
    assert inspect.inspect(source, tmp_path, log=lambda line: None)
