# SPDX-License-Identifier: Apache-2.0
"""A packed copy is its source: the same bytes, labels, maps and order; and it can be continued."""

import errno
import json
import os
import tarfile

import numpy as np
import pytest

from folders import encode, image, write
from ssl_jax import cli
from ssl_jax.data import host, sources
from ssl_jax.prepare import pack as pack_lib
from ssl_jax.prepare import writers
from ssl_jax.run import errors, hashing, storage

FORMATS = ('tar', 'parquet', 'arrayrecord')


@pytest.fixture(autouse=True)
def arrayrecord(request):
    if 'arrayrecord' in request.node.name:
        pytest.importorskip('array_record')


def pack(data, out, to, **options):
    return pack_lib.pack(data, out, to, log=lambda line: None, **options)


def tars(out):
    """[(image, label)] of tar shards, in order, with nothing but tarfile; and their maps."""
    items, found_maps = [], []
    for path in sorted(out.glob('*.tar')):
        with tarfile.open(path) as file:
            samples = {}
            for member in file:
                key, extension = member.name.split('.', 1)
                samples.setdefault(key, {})[extension] = file.extractfile(member).read()
            for sample in samples.values():
                label = int(sample.pop('cls')) if 'cls' in sample else None
                found_maps.append({k: sample.pop(k) for k in [*sample] if '.' in k})
                (data,) = sample.values()
                items.append((data, label))
    return items, found_maps


def packed(out, to):
    """([(image, label)], names of the classes) of packed files."""
    source = sources.open_source(out)
    return pairs_of(source), source.classes


def pairs_of(source):
    items = [source[i] for i in range(len(source))]
    return [(item['image'], item.get('label')) for item in items]


@pytest.mark.parametrize('to', FORMATS)
@pytest.mark.parametrize('shards', [1, 4, 23])
def test_a_copy_has_the_same_bytes_labels_and_order(to, shards, folder, tmp_path):
    source = sources.open_source(folder)
    assert pack(folder, tmp_path / 'out', to, shards=shards) == 0
    items, classes = packed(tmp_path / 'out', to)
    assert items == pairs_of(source)
    if to != 'tar':
        assert classes == source.classes == ('a yak', 'owl')
    else:
        assert (tmp_path / 'out' / 'classes.txt').read_text() == 'a yak\nowl\n'
    files = [p for p in (tmp_path / 'out').glob('train-*') if p.suffix != '.index']
    assert len(files) == shards


@pytest.mark.parametrize('to', FORMATS)
def test_image_i_lies_in_shard_i_times_shards_over_n(to, folder, tmp_path):
    pack(folder, tmp_path / 'out', to, shards=5)
    source, at = sources.open_source(folder), 0
    for k, path in enumerate(sorted(tmp_path.glob('out/train-*'))):
        alone = tmp_path / str(k)
        alone.mkdir()
        (alone / path.name).write_bytes(path.read_bytes())
        (alone / 'classes.txt').write_text('a yak\nowl\n')
        found, _ = packed(alone, to)
        wanted = [i for i in range(23) if i * 5 // 23 == k]
        assert found == [pairs_of(source)[i] for i in wanted]
        at += len(wanted)
    assert at == 23


@pytest.mark.parametrize('to', FORMATS)
def test_the_same_images_give_the_same_files(to, folder, tmp_path):
    digests = []
    for name in 'ab':
        pack(folder, tmp_path / name, to, shards=3)
        files = sorted((tmp_path / name).glob('train-*'))
        digests.append([hashing.digest(f.read_bytes()) for f in files])
        for path in folder.rglob('*.*'):
            os.utime(path, (1, 1))
    assert digests[0] == digests[1]


def test_tar_keys_are_unique_ascii_and_say_the_name(folder, tmp_path):
    write(folder / 'owl' / 'bild \u00fc.\u00df.jpg', encode(image(99)))
    write(folder / 'owl' / ('x' * 200 + '.jpg'), encode(image(98)))
    pack(folder, tmp_path / 'out', 'tar', shards=1)
    with tarfile.open(tmp_path / 'out' / 'train-00000-of-00001.tar') as file:
        members = file.getmembers()
    names = [m.name for m in members]
    assert len(set(names)) == len(names) and all(n.isascii() and len(n) <= 100 for n in names)
    assert names[0] == '000000000_photo_00.jpg' and names[1] == '000000000_photo_00.cls'
    assert {(m.mtime, m.uid, m.gid) for m in members} == {(0, 0, 0)}


def test_the_hugging_face_metadata_names_columns_and_classes(folder, tmp_path):
    import pyarrow.parquet as pq

    pack(folder, tmp_path / 'out', 'parquet', shards=1)
    file = pq.ParquetFile(tmp_path / 'out' / 'train-00000-of-00001.parquet')
    features = json.loads(file.schema_arrow.metadata[b'huggingface'])['info']['features']
    assert features == {
        'image': {'_type': 'Image'},
        'label': {'_type': 'ClassLabel', 'names': ['a yak', 'owl']},
    }
    row = file.read().slice(0, 1).to_pylist()[0]
    assert row['image']['path'] == 'a yak/photo 00.v1.jpg'


def test_row_groups_of_parquet_stay_small(tmp_path):
    import pyarrow.parquet as pq

    source = sources.Arrays(np.zeros((250, 2, 2, 3), np.uint8))
    pack(source, tmp_path / 'out', 'parquet', shards=1)
    metadata = pq.read_metadata(tmp_path / 'out' / 'train-00000-of-00001.parquet')
    assert [metadata.row_group(g).num_rows for g in range(3)] == [100, 100, 50]


@pytest.mark.parametrize('to', ['parquet', 'tar'])
def test_maps_go_along_with_what_their_values_mean(to, pairs, tmp_path):
    spec = {'path': pairs, 'ignore': 9, 'depth_scale': 0.001}
    source = sources.open_source(spec)
    pack(spec, tmp_path / to, to, shards=2)
    copy = sources.open_source(tmp_path / to)
    assert copy.map_classes == source.map_classes == ('sky', 'road', 'tree')
    for i in range(7):
        assert copy[i]['image'] == source[i]['image']
        assert (copy[i]['segmentation'] == source[i]['segmentation']).all()
        assert (copy[i]['depth'] == source[i]['depth']).all()
        assert copy[i]['segmentation'][0, i] == 255 and copy[i]['depth'][0, 0] < 2
    # What is said when it is read counts more.
    again = sources.open_source({'path': tmp_path / to, 'depth_scale': 1.0})
    assert again[0]['depth'][0, 0] == 1000


def test_maps_in_tar_shards_are_the_files(pairs, tmp_path):
    spec = {'path': pairs, 'ignore': 9, 'depth_scale': 0.001}
    pack(spec, tmp_path / 'tar', 'tar', shards=2)
    items, found = tars(tmp_path / 'tar')
    for i in range(7):
        assert found[i] == {
            'seg.png': (pairs / 'labels' / f'{i}.png').read_bytes(),
            'depth.png': (pairs / 'depth' / f'{i}.png').read_bytes(),
        }
    meaning = json.loads((tmp_path / 'tar' / 'maps.json').read_text())
    assert meaning['ignore'] == 9 and meaning['depth_scale'] == 0.001
    assert meaning['map_classes'] == ['sky', 'road', 'tree']


def test_array_records_say_that_they_carry_no_maps(pairs, tmp_path):
    pytest.importorskip('array_record')
    said = []
    pack_lib.pack(pairs, tmp_path / 'out', 'arrayrecord', shards=1, log=said.append)
    assert any('carry no maps' in line for line in said)
    assert len(sources.open_source(tmp_path / 'out')) == 7


@pytest.mark.parametrize('to', FORMATS)
def test_arrays_become_png_of_the_same_pixels(to, tmp_path):
    scenes = sources.open_source({'source': 'scenes', 'n': 6, 'size': 32})
    pack({'source': 'scenes', 'n': 6, 'size': 32}, tmp_path / 'out', to, shards=2)
    items, classes = packed(tmp_path / 'out', to)
    assert classes == scenes.classes
    for i, (data, label) in enumerate(items):
        assert data[:4] == b'\x89PNG' and label == scenes[i]['label']
        assert (host.decode(data) == scenes[i]['image']).all()
    if to != 'arrayrecord':
        copy = sources.open_source(tmp_path / 'out')
        assert copy.map_classes == scenes.map_classes
        for i in range(6):
            assert (copy[i]['segmentation'] == scenes[i]['segmentation']).all()
            assert (copy[i]['depth'] == scenes[i]['depth']).all()


def test_only_larger_images_are_encoded_anew_upright(folder, tmp_path):
    import io

    import PIL.Image

    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    large, file = image(50, 90, 150), io.BytesIO()
    PIL.Image.fromarray(large).save(file, 'JPEG', quality=95, exif=exif)
    write(folder / 'owl' / 'zz turned.jpg', file.getvalue())
    write(folder / 'owl' / 'zz.png', encode(image(51, 41, 20), '.png'))
    source = sources.open_source(folder)
    pack(folder, tmp_path / 'out', 'tar', shards=2, max_side=40)
    found = pairs_of(source)
    items, _ = packed(tmp_path / 'out', 'tar')
    same = [a == b for a, b in zip(items, found, strict=True)]
    assert same == [True] * 23 + [False] * 2
    turned, small = (host.decode(data) for data, _ in items[-2:])
    assert turned.shape == (40, 24, 3) and small.shape == (40, 20, 3)
    assert items[-1][0][:2] == b'\xff\xd8' and items[-1][1] == 1
    whole = host.decode(found[-2][0])
    assert whole.shape == (150, 90, 3)
    near = PIL.Image.fromarray(whole).resize((24, 40), PIL.Image.Resampling.BOX)
    assert np.abs(turned.astype(int) - np.asarray(near)).mean() < 4


def test_images_with_maps_are_not_shrunk(pairs, tmp_path):
    with pytest.raises(errors.UserError, match='shrinks no maps'):
        pack(pairs, tmp_path / 'out', 'tar', shards=1, max_side=20)


def test_missing_labels_stay_missing(tmp_path):
    data = [encode(image(i)) for i in range(4)]
    source = sources.Arrays(data, [0, -1, 1, 0], ['x', 'y'])
    pack(source, tmp_path / 'p', 'parquet', shards=1)
    assert sources.open_source(tmp_path / 'p').labels.tolist() == [0, -1, 1, 0]
    pack(source, tmp_path / 't', 'tar', shards=1)
    assert [label for _, label in tars(tmp_path / 't')[0]] == [0, None, 1, 0]


@pytest.mark.parametrize('to', FORMATS)
def test_what_is_no_image_is_left_out_and_listed(to, folder, tmp_path, capsys):
    write(folder / 'a yak' / 'a.jpg', b'<html>404</html>')
    write(folder / 'owl' / 'b.png', b'')
    wanted = [x for x in pairs_of(sources.open_source(folder)) if len(x[0]) > 20]
    command = ['data', 'pack', str(folder), '--to', to, '--out', str(tmp_path / 'out')]
    for _ in range(2):  # also when all is done already
        with pytest.raises(SystemExit) as ended:
            cli.main([*command, '--shards', '3'])
        assert ended.value.code == 1
        assert '2 images cannot be read' in capsys.readouterr().out
    assert packed(tmp_path / 'out', to)[0] == wanted and len(wanted) == 23
    lines = (tmp_path / 'out' / 'train.left_out.jsonl').read_text().splitlines()
    first, second = map(json.loads, lines)
    assert first['path'].endswith('a yak/a.jpg') and 'HTML' in first['reason']
    assert second['path'].endswith('owl/b.png') and 'empty' in second['reason']


def test_a_second_start_writes_only_what_is_missing(folder, tmp_path, monkeypatch):
    out, before = tmp_path / 'out', tmp_path / 'before'
    pack(folder, before, 'tar', shards=5)
    write_tar, ending = writers.FORMATS['tar']
    written = []

    def failing(path, about):
        written.append(path)
        if len(written) == 4:
            raise OSError(errno.EIO, 'the disk is gone')
        return write_tar(path, about)

    monkeypatch.setitem(writers.FORMATS, 'tar', (failing, ending))
    monkeypatch.setattr(pack_lib.stream_lib, 'num_reading', lambda source, most: 1)
    with pytest.raises(OSError, match='gone'):
        pack(folder, out, 'tar', shards=5)
    assert len(list(out.glob('train-*.tar'))) == 3
    times = {path: path.stat().st_mtime_ns for path in out.glob('train-*.tar')}
    write(out / 'train-00003-of-00005.tar.0123abcd.tmp', b'half')
    monkeypatch.setitem(writers.FORMATS, 'tar', (write_tar, ending))
    pack(folder, out, 'tar', shards=5)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert {p.name: p.read_bytes() for p in out.iterdir()} == {
        p.name: p.read_bytes() for p in before.iterdir()
    }


@pytest.mark.parametrize('to', FORMATS)
def test_a_full_disk_is_one_sentence(to, folder, tmp_path, monkeypatch):
    _, ending = writers.FORMATS[to]
    full = OSError(errno.ENOSPC, 'No space left on device')
    if to == 'arrayrecord':
        full = RuntimeError('RESOURCE_EXHAUSTED: No space left on device')

    def failing(path, about):
        raise full

    monkeypatch.setitem(writers.FORMATS, to, (failing, ending))
    with pytest.raises(errors.UserError, match='is full: free some space and start again'):
        pack(folder, tmp_path / 'out', to, shards=2)


def test_splits_share_a_folder(tmp_path):
    root = tmp_path / 'data'
    for i in range(8):
        write(root / ('train', 'val')[i % 2] / f'{i}.jpg', encode(image(i)))
    for split in ('train', 'val'):
        pack(root, tmp_path / 'out', 'parquet', shards=2, split=split)
    assert len(sources.open_source(tmp_path / 'out')) == 4
    assert len(sources.open_source({'path': tmp_path / 'out', 'split': 'val'})) == 4
    assert len(sources.open_source(tmp_path / 'out', 'all')) == 8


def change(folder):
    write(folder / 'owl' / 'photo 01.v1.png', encode(image(77), '.png'))
    return {}


def test_shards_that_were_read_since_are_packed_no_second_time(folder, tmp_path):
    pack(folder, tmp_path / 'out', 'tar', shards=2)
    sources.open_source(tmp_path / 'out')  # leaves an index beside each shard
    before = [p.stat().st_mtime_ns for p in sorted((tmp_path / 'out').iterdir())]
    assert pack(folder, tmp_path / 'out', 'tar', shards=2) == 0
    assert before == [p.stat().st_mtime_ns for p in sorted((tmp_path / 'out').iterdir())]


@pytest.mark.parametrize(
    ('changed', 'match'),
    [
        (lambda folder: {'shards': 4}, 'packed with --shards 3, not 4'),
        (lambda folder: {'to': 'parquet'}, 'packed with --to tar, not parquet'),
        (lambda folder: {'max_side': 20}, 'packed with --max-side None, not 20'),
        (change, 'packed with other images than these 23'),
    ],
)
def test_another_request_is_refused(changed, match, folder, tmp_path):
    pack(folder, tmp_path / 'out', 'tar', shards=3)
    before = {p: p.read_bytes() for p in (tmp_path / 'out').iterdir()}
    options = {'to': 'tar', 'shards': 3, **changed(folder)}
    with pytest.raises(errors.UserError, match=match):
        pack(folder, tmp_path / 'out', **options)
    assert {p: p.read_bytes() for p in (tmp_path / 'out').iterdir()} == before


def test_mistakes_are_one_sentence_each(folder, tmp_path, capsys):
    def said(*words):
        with pytest.raises(SystemExit) as ended:
            cli.main(['data', 'pack', *map(str, words)])
        assert ended.value.code == 1
        err = capsys.readouterr().err
        assert err.startswith('ssl_jax data pack: ') and err.count('\n') == 1
        return err

    out = tmp_path / 'out'
    assert 'does not exist' in said(tmp_path / 'imagse', '--to', 'tar', '--out', out)
    assert "did you mean 'parquet'" in said(folder, '--to', 'parkett', '--out', out)
    more = said(folder, '--to', 'tar', '--out', out, '--shards', 24)
    assert '--shards 24 are more than the 23 images' in more
    assert 'from 1 to 100' in said(folder, '--to', 'tar', '--out', out, '--quality', 101)
    assert "'more' has no '='" in said(folder, '--to', 'tar', '--out', out, 'more')
    assert 'lies among the images' in said(folder, '--to', 'tar', '--out', folder / 'x')
    assert not out.exists()
    write(out / 'thesis.tex', b'years of work')
    assert 'holds thesis.tex: give an empty' in said(folder, '--to', 'tar', '--out', out)
    os.rename(out / 'thesis.tex', out / 'train-00000-of-00003.tar')
    assert 'holds train-00000-of-00003.tar' in said(folder, '--to', 'tar', '--out', out)
    assert 'is a file' in said(folder, '--to', 'tar', '--out', out / 'train-00000-of-00003.tar')


def test_names_that_are_no_lines_are_refused_for_tar_and_kept_by_parquet(tmp_path):
    source = sources.Arrays([encode(image(0))] * 2, [0, 1], ['two\nlines', 'b'])
    with pytest.raises(errors.UserError, match='is no line of classes.txt'):
        pack(source, tmp_path / 'out', 'tar', shards=1)
    pack(source, tmp_path / 'out', 'parquet', shards=1)
    assert sources.open_source(tmp_path / 'out').classes == ('two\nlines', 'b')


def test_shards_are_written_into_a_bucket(bucket, folder, tmp_path):
    out = f'{bucket.root}/packed'
    pack(folder, tmp_path / 'local', 'tar', shards=3)
    assert pack(folder, out, 'tar', shards=3) == 0
    names = sorted(p.name for p in (tmp_path / 'local').iterdir())
    assert sorted(storage.names(out)) == names
    for name in names:
        assert storage.read(f'{out}/{name}') == (tmp_path / 'local' / name).read_bytes()
    said = []
    pack_lib.pack(folder, out, 'tar', shards=3, log=said.append)
    assert 'it was complete' in said[-1]
