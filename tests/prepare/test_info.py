# SPDX-License-Identifier: Apache-2.0
"""`ssl_jax data info`: the numbers on the screen are those of the images."""

import io

import numpy as np
import PIL.Image
import pytest

from folders import encode, image, write
from ssl_jax import cli
from ssl_jax.data import sources
from ssl_jax.prepare import info as info_lib


def said(data):
    lines = []
    info_lib.info(data, log=lines.append)
    return '\n'.join(' '.join(line.split()) for line in lines)


def test_kind_sizes_encodings_bytes_and_classes(folder):
    write(folder / 'owl' / 'tall.jpg', encode(image(60, 100, 30)))
    text = said(folder)
    size = sum(path.stat().st_size for path in folder.rglob('*.*'))
    assert 'data 24 images' in text and 'kind folder' in text
    assert 'width 30 40 40 40 40' in text and 'height 24 24 24 24 100' in text
    assert 'short side 24 24 24 24 30' in text
    assert f'bytes {size / 1000:.3g} kB in all' in text
    assert '37.5 % JPEG (RGB)' in text and '33.3 % PNG (RGB)' in text and '29.2 % WEBP' in text
    assert 'classes 2, of all images' in text and 'a yak 12 50 %' in text
    assert sources.open_source(folder).fingerprint in text


def test_sizes_are_those_of_the_upright_image(tmp_path):
    exif, file = PIL.Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    PIL.Image.fromarray(image(0, 20, 70)).save(file, 'JPEG', exif=exif)
    write(tmp_path / 'a.jpg', file.getvalue())
    assert 'width 20 20 20 20 20 height 70 70 70 70 70' in said(tmp_path).replace('\n', ' ')


def test_what_is_left_out_and_broken_is_said(tmp_path):
    for i in range(6):
        write(tmp_path / ('train', 'val')[i % 2] / f'{i}.jpg', encode(image(i)))
    write(tmp_path / 'train' / 'notes.txt', b'x')
    write(tmp_path / 'train' / 'page.jpg', b'<html>')
    text = said(tmp_path)
    assert 'uses 4 of train; leaves 3 of val' in text and '1 of extension .txt' in text
    assert 'broken 1 of these' in text


def test_of_many_classes_those_with_most_and_fewest_images_are_shown():
    counts = [50 - k for k in range(40)]
    labels = np.repeat(np.arange(40), counts)
    source = sources.Arrays(np.zeros((len(labels), 4, 4, 3), np.uint8), labels)
    text = said(source)
    assert 'classes 40, of all images' in text and '... 28 more' in text
    order = [text.index(line) for line in ('\n0 50 ', '\n5 45 ', '\n34 16 ', '\n39 11 ')]
    assert order == sorted(order) and '\n6 44 ' not in text and '\n33 17 ' not in text
    assert '100 % uint8 arrays' in text


def test_maps_are_named(pairs):
    text = said({'path': pairs, 'ignore': 9, 'depth_scale': 0.001})
    assert 'maps segmentation of 3 classes: sky, road, tree' in text and 'maps depth' in text
    assert 'classes none' in text


def test_a_wrong_path_is_one_sentence(tmp_path, capsys):
    write(tmp_path / 'images' / 'a.png', encode(image(0), '.png'))
    with pytest.raises(SystemExit) as ended:
        cli.main(['data', 'info', str(tmp_path / 'image')])
    assert ended.value.code == 1
    err = capsys.readouterr().err
    assert err.startswith('ssl_jax data info: ') and "did you mean 'images'?" in err


def test_words_stand_for_a_path_of_sources_without_one(capsys):
    cli.main(['data', 'info', 'source=scenes', 'n=5', 'size=16'])
    out = capsys.readouterr().out
    assert '5 images' in out and 'kind      scenes' in out
