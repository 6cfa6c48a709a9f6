# SPDX-License-Identifier: Apache-2.0
"""Tar shards are a source like any other: indexed once, read by place, named when they are cut."""

import io
import os
import pickle
import tarfile

import numpy as np
import PIL.Image
import pytest

from ssl_jax.data import fingerprint, host, sources, tar, tar_index
from ssl_jax.data import stream as stream_lib
from ssl_jax.run import errors, launch

VIEWS = (host.View('image', 8),)


def png(value, side=6):
    out = io.BytesIO()
    PIL.Image.fromarray(np.full((side, side, 3), value, np.uint8)).save(out, 'PNG')
    return out.getvalue()


def pack(path, members, form=tarfile.PAX_FORMAT):
    """Writes {name: content} as a tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, 'w', format=form) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def shards(folder, count=3, each=4):
    """`count` shards of `each` images with labels; image k has the grey k and the label k % 3."""
    for s in range(count):
        members = {}
        for k in range(s * each, (s + 1) * each):
            members[f'{k:05d}.png'] = png(k)
            members[f'{k:05d}.cls'] = str(k % 3).encode()
        pack(folder / f'train-{s:05d}.tar', members)
    return folder


def greys(source):
    return [int(host.decode(source[i]['image'])[0, 0, 0]) for i in range(len(source))]


def sentence(spec):
    with pytest.raises((errors.UserError, FileNotFoundError)) as e:
        sources.open_source(spec)
    assert '\n' not in str(e.value) and str(e.value)[-1] in '.?'
    return str(e.value)


# What is an image, and what is its label.


def test_shards_of_a_folder_are_images_in_order_with_their_labels(tmp_path):
    source = sources.open_source(str(shards(tmp_path)))
    assert isinstance(source, tar.Tar) and greys(source) == list(range(12))
    assert [source[i]['label'] for i in range(4)] == [0, 1, 2, 0] and source.classes == (
        '0',
        '1',
        '2',
    )
    assert source[11]['image'] == png(11)
    assert source.describe(5) == f'{tmp_path}/train-00001.tar member 00005.png'


@pytest.mark.parametrize(
    'pattern', ['train-{00000..00002}.tar', 'train-0000{0,1,2}.tar', '*.tar', 'train-0000[0-2].tar']
)
def test_patterns_name_several_shards(pattern, tmp_path):
    source = sources.open_source(str(shards(tmp_path) / pattern))
    assert greys(source) == list(range(12))


def test_a_pattern_in_braces_names_the_shard_that_is_missing(tmp_path):
    said = sentence(str(shards(tmp_path) / 'train-{00000..00003}.tar'))
    assert 'train-00003.tar does not exist' in said


def test_class_names_stand_beside_the_first_shard(tmp_path):
    (shards(tmp_path) / 'classes.txt').write_text('owl\nyak\nemu\n')
    assert sources.open_source(str(tmp_path)).classes == ('owl', 'yak', 'emu')


def test_labels_may_be_words_or_lie_in_json(tmp_path):
    members = {'a.jpg': png(1), 'a.cls': b' yak\n', 'b.webp': png(2), 'b.json': b'{"label": "owl"}'}
    members |= {'c.png': png(3), 'c.json': b'{"width": 6, "label": null}', 'd.png': png(4)}
    source = sources.open_source(str(pack(tmp_path / 'x.tar', members)))
    assert source.classes == ('owl', 'yak')
    assert source.labels.tolist() == [1, 0, -1, -1] and greys(source) == [1, 2, 3, 4]


def test_dots_in_names_do_not_mix_samples(tmp_path):
    members = {'IMG.2020.01.png': png(1), 'IMG.2020.01.cls': b'1', 'IMG.2020.02.png': png(2)}
    members |= {'IMG.2020.02.cls': b'0', 'k.left.png': png(3), 'k.right.png': png(4), 'k.cls': b'1'}
    source = sources.open_source(str(pack(tmp_path / 'x.tar', members)))
    assert greys(source) == [1, 2, 3, 4] and source.labels.tolist() == [1, 0, 1, 1]


def test_folders_in_a_tar_are_classes_and_splits_as_those_of_a_folder(tmp_path):
    names = ['top/train/cat/1.png', 'top/train/dog/2.png', 'top/val/cat/3.png', 'top/val/dog/4.png']
    path = str(pack(tmp_path / 'pets.tar', {n: png(k) for k, n in enumerate(names)}))
    train = sources.open_source(path)
    assert greys(train) == [0, 1] and train.classes == ('cat', 'dog')
    assert train.labels.tolist() == [0, 1] and 'val' in train.notes[0]
    assert greys(sources.open_source(path, 'test')) == [2, 3]
    assert greys(sources.open_source(dict(path=path, split='val'))) == [2, 3]
    assert len(sources.open_source(dict(path=path, split='all'))) == 4
    assert train.fingerprint != sources.open_source(path, 'test').fingerprint


def test_tars_of_one_class_each_are_classes(tmp_path):
    for k, name in enumerate(('n01440764', 'n01443537')):
        pack(tmp_path / f'{name}.tar', {f'{name}_{i}.JPEG': png(10 * k + i) for i in range(2)})
    source = sources.open_source(str(tmp_path))
    assert source.classes == ('n01440764', 'n01443537') and source.labels.tolist() == [0, 0, 1, 1]


def test_shards_have_splits(tmp_path):
    pack(tmp_path / 'set-train-0.tar', {'a.png': png(1)})
    pack(tmp_path / 'set-val-0.tar', {'a.png': png(2)})
    assert greys(sources.open_source(str(tmp_path))) == [1]
    assert greys(sources.open_source(str(tmp_path), 'test')) == [2]


def test_what_is_no_image_is_counted(tmp_path):
    members = {'a.png': png(1), 'a.txt': b'a caption', '._a.png': b'x', '__MACOSX/b.png': b'x'}
    members |= {'deep/.git/c.png': b'x', 'README': b'x'}
    source = sources.open_source(str(pack(tmp_path / 'x.tar', members)))
    assert len(source) == 1
    for said in ('1 of extension .txt', '1 hidden', '1 in __MACOSX', '1 in .git'):
        assert said in source.notes[0]


def test_the_last_of_two_members_of_one_name_counts(tmp_path):
    path = pack(tmp_path / 'x.tar', {'a.png': png(1), 'b.png': png(2)})
    with tarfile.open(path, 'a') as archive:
        member = tarfile.TarInfo('./a.png')
        member.size = len(png(9))
        archive.addfile(member, io.BytesIO(png(9)))
    source = sources.open_source(str(path))
    assert sorted(greys(source)) == [2, 9] and 'replaced' in source.notes[0]


@pytest.mark.parametrize('form', [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_form_of_tar_with_long_names_is_read(form, tmp_path):
    names = ['ä' * 40 + '/' + 'x' * 60 + f'{k}.png' for k in range(3)]
    names += [] if form == tarfile.USTAR_FORMAT else ['y' * 180 + '.png']
    path = pack(tmp_path / 'x.tar', {n: png(k) for k, n in enumerate(names)}, form)
    source = sources.open_source(str(path))
    assert greys(source) == list(range(len(names))) and source.describe(0).endswith(names[0])


# Maps.


def mask(value):
    out = io.BytesIO()
    PIL.Image.fromarray(np.full((6, 6), value, np.uint8)).save(out, 'PNG')
    return out.getvalue()


def test_maps_lie_beside_their_image(tmp_path):
    members = {'a.jpg': png(1), 'a.seg.png': mask(2), 'b.jpg': png(2), 'b.seg.png': mask(1)}
    members |= {'c.jpg': png(3), 'a.cls': b'0', 'b.cls': b'1', 'c.cls': b'0'}
    path = str(pack(tmp_path / 'x.tar', members))
    source = sources.open_source(path)
    assert greys(source) == [1, 2] and (source[0]['segmentation'] == 2).all()
    assert source.labels.tolist() == [0, 1] and 'leaves out 1' in source.notes[0]
    assert source.map_classes == ('0', '1', '2') and 'segmentation' not in source.without_maps()[0]


def test_depth_maps_have_a_scale(tmp_path):
    out = io.BytesIO()
    PIL.Image.fromarray(np.full((6, 6), 1500, np.uint16)).save(out, 'PNG')
    path = str(pack(tmp_path / 'x.tar', {'a.jpg': png(1), 'a.depth.png': out.getvalue()}))
    source = sources.open_source(dict(path=path, depth_scale=0.001))
    np.testing.assert_allclose(source[0]['depth'], 1.5)


def test_two_images_of_one_name_are_not_guessed(tmp_path):
    members = {'a.jpg': png(1), 'a.png': mask(1), 'b.jpg': png(2), 'b.png': mask(2)}
    path = str(pack(tmp_path / 'x.tar', members))
    assert 'several images of one name, a.jpg and a.png' in sentence(path)
    source = sources.open_source(dict(path=path, image_member='jpg', segmentation_member='png'))
    assert greys(source) == [1, 2] and (source[1]['segmentation'] == 2).all()
    assert greys(sources.open_source(dict(path=path, image_member='jpg'))) == [1, 2]


def test_folders_of_images_and_maps_in_a_tar_are_pairs(tmp_path):
    members = {}
    for split in ('train', 'val'):
        for k in range(2):
            members[f'set/images/{split}/{k}.jpg'] = png(10 * (split == 'val') + k)
            members[f'set/labels/{split}/{k}.png'] = mask(k)
    path = str(pack(tmp_path / 'x.tar', members))
    source = sources.open_source(path)
    assert greys(source) == [0, 1] and (source[1]['segmentation'] == 1).all()
    assert greys(sources.open_source(path, 'test')) == [10, 11] and source.labels is None


# The index.


def test_the_index_is_made_once_and_again_when_the_shard_changes(tmp_path, monkeypatch):
    shards(tmp_path)
    first = sources.open_source(str(tmp_path)).fingerprint
    made = []
    monkeypatch.setattr(tar_index, 'read', lambda f, read=tar_index.read: made.append(f) or read(f))
    assert sources.open_source(str(tmp_path)).fingerprint == first and made == []
    pack(tmp_path / 'train-00001.tar', {'z.png': png(99), 'z.cls': b'1'})
    source = sources.open_source(str(tmp_path))
    assert made == [str(tmp_path / 'train-00001.tar')] and len(source) == 9
    assert source.fingerprint != first


@pytest.mark.parametrize('damage', ['cut', 'empty', 'of another kind'])
def test_a_damaged_index_is_made_again(damage, tmp_path):
    shards(tmp_path)
    sources.open_source(str(tmp_path))
    path = tmp_path / 'train-00000.tar.index'
    data = path.read_bytes()
    path.write_bytes({'cut': data[: len(data) // 2], 'empty': b''}.get(damage, b'an index'))
    assert greys(sources.open_source(str(tmp_path))) == list(range(12))
    assert path.read_bytes() == data


def test_an_index_that_cannot_lie_beside_its_shard_lies_in_the_cache(tmp_path, monkeypatch):
    shards(tmp_path / 'data')
    write = tar_index.storage.atomic_write

    def refused(path, data):
        if str(path).startswith(str(tmp_path / 'data')):
            raise PermissionError(13, 'Permission denied')
        write(path, data)

    monkeypatch.setattr(tar_index.storage, 'atomic_write', refused)
    spec = dict(path=str(tmp_path / 'data'), cache_dir=str(tmp_path / 'cache'))
    assert greys(sources.open_source(spec)) == list(range(12))
    assert len(os.listdir(tmp_path / 'cache')) == 3 and len(os.listdir(tmp_path / 'data')) == 3
    monkeypatch.setattr(tar_index, 'read', None)
    assert greys(sources.open_source(spec)) == list(range(12))


def test_processes_index_many_bytes_and_give_the_same(tmp_path, monkeypatch):
    shards(tmp_path)
    here = sources.open_source(str(tmp_path))
    want = [(tmp_path / f'train-0000{s}.tar.index').read_bytes() for s in range(3)]
    for s in range(3):
        os.remove(tmp_path / f'train-0000{s}.tar.index')
    monkeypatch.setattr(tar_index, 'PROCESS_BYTES', 0)
    monkeypatch.setattr(tar_index, 'read', None)  # not in this process
    there = sources.open_source(str(tmp_path))
    assert here.fingerprint == there.fingerprint
    assert want == [(tmp_path / f'train-0000{s}.tar.index').read_bytes() for s in range(3)]


def test_hosts_begin_with_different_shards_and_take_what_another_has_indexed(tmp_path, monkeypatch):
    shards(tmp_path, 4)
    names = [str(tmp_path / f'train-{s:05d}.tar') for s in range(4)]
    monkeypatch.setattr(launch.jax, 'process_count', lambda: 2)
    monkeypatch.setattr(launch.jax, 'process_index', lambda: 1)
    made = []

    def read(shard, read=tar_index.read):
        made.append(shard)
        if len(made) == 1:  # meanwhile the other host has finished its first
            monkeypatch.setattr(tar_index, 'read', read)
            tar_index.make(names[0], str(tmp_path / 'cache'))
            monkeypatch.setattr(tar_index, 'read', recorded)
        return read(shard)

    recorded = read
    monkeypatch.setattr(tar_index, 'read', recorded)
    found = tar_index.indexes(names, str(tmp_path / 'cache'))
    assert made == [names[2], names[3], names[1]]
    assert [index.table['name'][0].as_py() for index in found] == [
        f'{4 * s:05d}.png' for s in range(4)
    ]


# What is wrong with a shard.


def test_a_shard_that_is_cut_is_named(tmp_path):
    shards(tmp_path)
    path = tmp_path / 'train-00001.tar'
    whole = path.read_bytes()
    end = whole.rindex(b'00007.cls')  # the last header
    for size in range(100, end + 512, 97):
        path.write_bytes(whole[:size])
        try:
            source = sources.open_source(str(tmp_path))
        except errors.UserError as e:
            assert 'train-00001.tar' in str(e) and '\n' not in str(e)
        else:  # cut where a member ends
            assert size % 512 == 0 and 'no end mark' in ' '.join(source.notes)


def test_damage_in_the_middle_is_no_early_end(tmp_path):
    path = shards(tmp_path) / 'train-00001.tar'
    data = bytearray(path.read_bytes())
    at = data.index(b'00006.png')
    data[at : at + 512] = os.urandom(512)
    path.write_bytes(data)
    assert f'train-00001.tar is damaged at byte {at:,}' in sentence(str(tmp_path))


@pytest.mark.parametrize('kind', ['gz', 'bz2', 'xz'])
def test_a_compressed_tar_is_refused_with_what_to_do(kind, tmp_path):
    path = tmp_path / f'x.tar.{kind}'
    with tarfile.open(path, f'w:{kind}') as archive:
        archive.addfile(tarfile.TarInfo('a.png'))
    assert 'decompress it' in sentence(str(path))


def test_what_is_no_tar_or_has_no_image_is_said(tmp_path):
    (tmp_path / 'text.tar').write_text('hello ' * 1000)
    (tmp_path / 'empty.tar').write_bytes(b'')
    assert 'is no tar file' in sentence(str(tmp_path / 'text.tar'))
    assert 'empty.tar' in sentence(str(tmp_path / 'empty.tar'))
    pack(tmp_path / 'outer.tar', {'a.tar': b'x', 'b.tar': b'x'})
    said = sentence(str(tmp_path / 'outer.tar'))
    assert 'There is no image' in said and '2 of extension .tar' in said


def test_a_shard_that_changes_while_it_is_read_ends_with_a_sentence(tmp_path):
    source = sources.open_source(str(shards(tmp_path)))
    pack(tmp_path / 'train-00000.tar', {'q.png': png(3)})
    with pytest.raises(errors.UserError, match='train-00000.tar was changed'):
        source[0]
    assert source[11]['image'] == png(11)


def test_a_wrong_label_is_named(tmp_path):
    (shards(tmp_path) / 'classes.txt').write_text('owl\nyak\n')
    assert 'Label 2 has no name' in sentence(str(tmp_path))
    path = pack(tmp_path / 'y/x.tar', {'a.png': png(1), 'a.cls': b'ow'})
    assert "'ow': did you mean 'owl'?" in sentence(dict(path=str(path), classes=('owl', 'yak')))


# The stream.


def ledger(source, hosts, steps, start=0, **options):
    """ids of `steps` batches of 4, as `hosts` processes load them."""
    rows = [list(range(h, 4, hosts)) for h in range(hosts)]
    out = np.full((steps, 4), -1)
    for own in rows:
        with stream_lib.train_stream(
            source, VIEWS, batch_size=4, seed=3, rows=own, start_step=start, **options
        ) as stream:
            for t in range(steps):
                out[t, own] = next(stream)['id']
    return out


@pytest.mark.parametrize('hosts', [1, 2, 4])
def test_each_image_comes_once_per_epoch_on_any_number_of_hosts_and_after_a_restart(
    hosts, tmp_path
):
    source = sources.open_source(str(shards(tmp_path)))
    whole = ledger(source, hosts, 6)
    assert sorted(whole[:3].ravel()) == sorted(whole[3:].ravel()) == list(range(12))
    np.testing.assert_array_equal(whole, ledger(source, 1, 6))
    np.testing.assert_array_equal(whole[2:], ledger(source, hosts, 4, start=2))


def test_a_pickled_source_and_worker_processes_read_the_same(tmp_path):
    source = sources.open_source(str(shards(tmp_path)))
    np.testing.assert_array_equal(ledger(source, 1, 3), ledger(source, 1, 3, num_workers=1))
    again = pickle.loads(pickle.dumps(source))
    assert [again[i] for i in range(12)] == [source[i] for i in range(12)]


def test_a_copy_has_the_same_content(tmp_path):
    a, b = (sources.open_source(str(shards(tmp_path / name))) for name in 'ab')
    assert fingerprint.content(a.fingerprint) == fingerprint.content(b.fingerprint)
