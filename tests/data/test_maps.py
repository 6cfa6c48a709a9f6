# SPDX-License-Identifier: Apache-2.0
"""Folders of pairs, known layouts and Parquet give images with class and depth maps."""

import io
import json
import os
import pickle

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssl_jax.data import host, layouts, maps, scenes, sources, stream, subset
from ssl_jax.evals import features, pictures
from ssl_jax.run import errors


def png(x, **options):
    out = io.BytesIO()
    image = x if isinstance(x, PIL.Image.Image) else PIL.Image.fromarray(np.asarray(x))
    image.save(out, 'PNG', **options)
    return out.getvalue()


def photo(value=0, h=6, w=8):
    return png(np.full((h, w, 3), value, np.uint8))


def label(value=0, h=6, w=8, dtype=np.uint8):
    return png(np.full((h, w), value, dtype))


def npy(x):
    out = io.BytesIO()
    np.save(out, x)
    return out.getvalue()


def write(root, files):
    """Writes {name: bytes}; names that end in .txt may have text."""
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(root)


def names(source, root):
    return [os.path.relpath(source.describe(i), root) for i in range(len(source))]


def values(source, key='segmentation'):
    return [source[i][key].reshape(-1)[0].item() for i in range(len(source))]


def image_values(source):
    return [int(host.decode(source[i]['image'])[0, 0, 0]) for i in range(len(source))]


def splits_of(order):
    """Three pairs for training and two for validation, images/train/a.jpg or train/images/a.jpg."""
    found = {}
    for k, (split, stem) in enumerate([('train', c) for c in 'abc'] + [('val', c) for c in 'de']):
        for kind, data in (('images', photo(100 + k)), ('labels', label(k))):
            parts = (kind, split) if order == 'kind first' else (split, kind)
            found['/'.join((*parts, f'{stem}.png'))] = data
    return found


# Folders of pairs.


@pytest.mark.parametrize('order', ['kind first', 'split first'])
@pytest.mark.parametrize('wrapped', ['', 'archive/data/'])
def test_a_folder_of_pairs_gives_images_with_class_maps_by_split(tmp_path, order, wrapped):
    root = write(tmp_path, {wrapped + k: v for k, v in splits_of(order).items()})
    for purpose, images in (('train', [100, 101, 102]), ('test', [103, 104])):
        source = sources.open_source(root, purpose)
        assert image_values(source) == images and source.labels is None
        assert values(source) == [v - 100 for v in images]
        assert source[0]['segmentation'].dtype == np.uint8
    assert len(sources.open_source(root, 'all')) == 5
    assert len(sources.open_source(dict(path=root, split='val'))) == 2


@pytest.mark.parametrize('pair', [('img', 'masks'), ('JPEGImages', 'gt'), ('rgb', 'Annotations')])
def test_folders_are_known_by_the_names_that_people_use(tmp_path, pair):
    files = {f'{pair[0]}/{k}.png': photo(k) for k in range(3)}
    root = write(tmp_path, files | {f'{pair[1]}/{k}.png': label(k) for k in range(3)})
    assert values(sources.open_source(root)) == [0, 1, 2]


def test_a_split_may_be_a_part_of_the_names_of_folders(tmp_path):
    files = {f'train_images/{k}.png': photo(k) for k in range(3)}
    files |= {f'train_masks/{k}.png': label(k) for k in range(3)}
    files |= {f'val_images/{k}.png': photo(k + 5) for k in range(2)}
    root = write(tmp_path, files | {f'val_masks/{k}.png': label(k + 5) for k in range(2)})
    assert values(sources.open_source(root)) == [0, 1, 2]
    test = sources.open_source(root, 'test')
    assert values(test) == [5, 6] and test.labels is None


def test_class_folders_stay_class_folders(tmp_path):
    root = write(tmp_path, {f'{c}/{k}.png': photo(k) for c in ('cat', 'images') for k in range(2)})
    source = sources.open_source(root)
    assert source.classes == ('cat', 'images') and source.map_classes is None
    assert 'segmentation' not in source[0] and source.fingerprint.count('+') == 1


def test_pretraining_on_pairs_sees_the_images_only_and_never_opens_a_map(tmp_path, monkeypatch):
    root = write(tmp_path, splits_of('kind first'))
    source = sources.open_source(root, 'all')
    monkeypatch.setattr(maps, 'read', lambda *_: pytest.fail('a map was read'))
    view = host.View('view', 4, scale=(1.0, 1.0))
    with stream.train_stream(source, [view], batch_size=5, seed=0) as batches:
        batch = next(batches)
    assert sorted(batch['view'][:, 0, 0, 0, 0].tolist()) == [100, 101, 102, 103, 104]
    assert 'segmentation' not in batch and 'label' not in batch
    assert sources.typical_size(source) == (6, 8)
    plain = list(features.batches(lambda x: x[:, 0, 0], source, transform=4, batch_size=5))
    assert plain[0]['mask'].all() and 'segmentation' not in plain[0]
    assert pictures.spread_images(source, 4, 3).shape == (3, 4, 4, 3)


def test_images_without_a_map_are_left_out_and_counted(tmp_path):
    files = {f'images/{k}.png': photo(k) for k in range(5)} | {'preview/x.png': photo()}
    root = write(tmp_path, files | {f'labels/{k}.png': label(k) for k in (1, 3)})
    source = sources.open_source(root)
    assert names(source, root) == ['images/1.png', 'images/3.png']
    said = ' '.join(source.notes)
    assert '2 images with class maps, images/1.png with labels/1.png for one' in said
    assert 'leaves out 3 images without a map' in said and '1 files that are neither' in said


def test_a_folder_where_no_map_has_the_name_of_an_image_is_an_error(tmp_path):
    root = write(tmp_path, {'images/a.png': photo(), 'labels/a_mask.png': label()})
    with pytest.raises(errors.UserError, match='images, labels, but no file of maps is named'):
        sources.open_source(root)
    other = write(tmp_path / 'other', {'x.png': label()})
    spec = dict(path=f'{root}/images', segmentation=other)
    with pytest.raises(errors.UserError, match='None of the 1 images of .* has a map'):
        sources.open_source(spec)


def test_maps_may_lie_a_folder_deeper_if_their_names_are_unique(tmp_path):
    pets = {'images/a.png': photo(1), 'images/b.png': photo(2)}
    root = write(tmp_path, pets | {'annotations/trimaps/b.png': label(2)})
    assert names(sources.open_source(root), root) == ['images/b.png']
    write(tmp_path, {'annotations/other/b.png': label(3)})
    with pytest.raises(errors.UserError, match='no file of maps is named as an image'):
        sources.open_source(root)


def test_images_need_all_kinds_of_maps_that_there_are(tmp_path):
    files = {f'images/{k}.png': photo(k) for k in range(3)}
    files |= {f'labels/{k}.png': label(k) for k in range(3)}
    root = write(tmp_path, files | {f'depth/{k}.npy': npy(np.full((6, 8), 1.5)) for k in (1, 2)})
    source = sources.open_source(root)
    assert values(source) == [1, 2] and values(source, 'depth') == [1.5, 1.5]
    assert source[0]['depth'].dtype == np.float32


def test_class_folders_of_images_keep_their_labels_with_maps(tmp_path):
    files = {f'images/{c}/{c}.png': photo() for c in 'xy'}
    root = write(tmp_path, files | {f'labels/{c}/{c}.png': label(1) for c in 'xy'})
    source = sources.open_source(root)
    assert source.classes == ('x', 'y') and source[1]['label'] == 1 and values(source) == [1, 1]


# What values mean.


def a_map(data, kind='segmentation', count=None, **meaning):
    names = None if count is None else [str(k) for k in range(count)]
    return maps.read(kind, data, 'map.png', maps.Meaning(**meaning).check(), names)


def test_class_maps_of_all_usual_files_are_read_as_indices():
    index = (np.arange(48, dtype=np.uint8) % 3).reshape(6, 8)
    palette = PIL.Image.fromarray(index)
    palette.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
    rgb = PIL.Image.fromarray(np.stack([index] * 3, -1))
    for data in (png(index), png(palette), png(palette, bits=2), png(rgb), npy(index)):
        np.testing.assert_array_equal(a_map(data), index)
    np.testing.assert_array_equal(a_map(npy(index.astype(np.int64))), index)
    assert a_map(npy(np.full((2, 2), -1))).tolist() == [[255, 255]] * 2
    assert a_map(png(index > 0)).tolist() == (index > 0).astype(int).tolist()


def test_grey_pngs_of_few_bits_keep_their_indices():
    """cv2 writes 8 bits only, Pillow too: the bytes are of a file of 2 bits, values 0 1 2 3."""
    import struct
    import zlib

    def chunk(kind, data):
        crc = zlib.crc32(kind + data)
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', crc)

    head = struct.pack('>IIBBBBB', 4, 1, 2, 0, 0, 0, 0)
    parts = chunk(b'IHDR', head), chunk(b'IDAT', zlib.compress(b'\0\x1b')), chunk(b'IEND', b'')
    assert a_map(b'\x89PNG\r\n\x1a\n' + b''.join(parts)).tolist() == [[0, 1, 2, 3]]


def test_values_become_classes():
    data = png(np.array([[0, 1, 11, 255]], np.uint8))
    assert a_map(data, ignore=11).tolist() == [[0, 1, 255, 255]]
    assert a_map(data, ignore=(0, 11)).tolist() == [[255, 1, 255, 255]]
    assert a_map(data, reduce_zero_label=True).tolist() == [[255, 0, 10, 255]]
    assert a_map(data, label_values=(11, 0)).tolist() == [[1, 255, 0, 255]]
    assert a_map(data, label_values=(0, 255), ignore=None).tolist() == [[0, 255, 255, 1]]
    for wrong in (dict(ignore=300), dict(ignore='x'), dict(depth_scale=0)):
        with pytest.raises(errors.UserError, match='must be'):
            maps.Meaning(**wrong).check()


def test_depth_is_in_metres_and_0_where_nothing_was_measured():
    data = png(np.array([[0, 1500, 3000]], np.uint16))
    found = a_map(data, 'depth', depth_scale=0.001)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [[0, 1.5, 3.0]], rtol=1e-6)
    odd = npy(np.array([[np.nan, np.inf, -1.0, 2.0]]))
    assert a_map(odd, 'depth').tolist() == [[0, 0, 0, 2]]
    tiff = io.BytesIO()
    PIL.Image.fromarray(np.full((2, 3), 2.5, np.float32)).save(tiff, 'TIFF')
    assert a_map(tiff.getvalue(), 'depth').tolist() == [[2.5] * 3] * 2
    with pytest.raises(errors.UserError, match='depth_scale, 0.001 for'):
        a_map(data, 'depth')


JPEG = io.BytesIO()
PIL.Image.new('L', (8, 8)).save(JPEG, 'JPEG')


@pytest.mark.parametrize(
    'data, kind, said',
    [
        (photo()[:50], 'segmentation', 'cannot be read as a map'),
        (b'text', 'depth', r'cannot be read as a map \(no image\)'),
        (png(np.full((2, 2, 3), (1, 2, 3), np.uint8)), 'segmentation', 'colours perhaps'),
        (JPEG.getvalue(), 'segmentation', 'a JPEG, which changes values'),
        (npy(np.full((2, 2), 700)), 'segmentation', 'values up to 700'),
        (npy(np.full((2, 2), 0.5)), 'segmentation', 'values up to 0.5'),
        (png(np.full((2, 2), 11, np.uint8)), 'segmentation', 'label 11, and there are 11 classes'),
        (npy(np.zeros((2, 2), np.float32)), 'depth', '0 everywhere'),
    ],
    ids=['cut', 'text', 'colours', 'jpeg', 'large', 'fractions', 'unknown class', 'no depth'],
)
def test_a_file_that_is_no_such_map_is_named_in_a_sentence(data, kind, said):
    with pytest.raises(errors.UserError, match=rf'^map\.png .*{said}') as error:
        a_map(data, kind, 11)
    assert not isinstance(error.value, host.DecodeError)


def test_a_wrong_map_ends_an_evaluation_and_a_broken_image_does_not(tmp_path):
    files = {f'images/{k}.png': photo(k) for k in range(3)}
    files |= {f'labels/{k}.png': label(k) for k in range(3)}
    root = write(tmp_path, files | {'images/0.png': b'broken'})
    source = sources.open_source(root)
    (batch,) = stream.eval_stream(source, 4, 3)
    assert batch['mask'].tolist() == [False, True, True]
    assert batch['segmentation'][1:, 0, 0].tolist() == [1, 2]
    write(tmp_path, {'labels/2.png': label(2, 8, 6)})
    with pytest.raises(
        errors.UserError, match=r"2\.png has 8x6 pixels .*its map 'segm.* 6x8: make"
    ):
        list(stream.eval_stream(sources.open_source(root), 4, 3))
    os.remove(f'{root}/labels/2.png')
    with pytest.raises(errors.UserError, match=r'labels/2\.png is missing'):
        list(stream.eval_stream(source, 4, 3))


def test_a_map_is_compared_with_the_upright_image(tmp_path):
    turned = PIL.Image.new('RGB', (8, 6))
    exif = turned.getexif()
    exif[0x0112] = 6
    out = io.BytesIO()
    turned.save(out, 'JPEG', exif=exif)
    root = write(tmp_path, {'images/a.jpg': out.getvalue(), 'labels/a.png': label(1, 8, 6)})
    (batch,) = stream.eval_stream(sources.open_source(root), 4, 1)
    assert batch['segmentation'].tolist() == np.ones((1, 4, 4)).tolist()
    write(tmp_path, {'labels/a.png': label(1, 6, 8)})
    with pytest.raises(errors.UserError, match='upright, by its EXIF orientation'):
        list(stream.eval_stream(sources.open_source(root), 4, 1))


# Names of classes.


def test_without_names_the_maps_are_read_once_for_the_largest_label(tmp_path, capsys):
    files = {f'images/{k}.png': photo() for k in range(6)}
    root = write(tmp_path, files | {f'labels/{k}.png': label(k % 4) for k in range(6)})
    source = sources.open_source(dict(path=root, ignore=3))
    assert 'Reading' not in capsys.readouterr().out
    for _ in range(2):
        assert source.map_classes == ('0', '1', '2')
    assert capsys.readouterr().out.count('Reading 6 class maps') == 1
    assert features.limited(source, 2).map_classes == ('0', '1', '2')
    assert pickle.loads(pickle.dumps(source)).map_classes == ('0', '1', '2')


def test_names_come_from_the_spec_or_classes_txt(tmp_path, capsys):
    root = write(tmp_path, splits_of('kind first') | {'classes.txt': 'a\nb\n\nc\nd\nvoid\n'})
    assert sources.open_source(root).map_classes == ('a', 'b', 'c', 'd', 'void')
    source = sources.open_source(dict(path=root, ignore=4))
    assert source.map_classes == ('a', 'b', 'c', 'd')  # the ignored last line is no class
    spec = dict(path=root, map_classes=('one', 'two'), split='val')
    source = sources.open_source(spec)
    assert source.map_classes == ('one', 'two') and capsys.readouterr().out == ''
    with pytest.raises(errors.UserError, match=r'd\.png has label 3, and there are 2 classes'):
        source[0]


def test_black_and_white_masks_ask_for_their_meaning(tmp_path):
    mask = np.array([[0, 255]], np.uint8)
    root = write(tmp_path, {'images/a.png': photo(0, 1, 2), 'masks/a.png': png(mask)})
    with pytest.raises(errors.UserError, match=r'set label_values=\(0,255\)'):
        _ = sources.open_source(root).map_classes
    source = sources.open_source(dict(path=root, label_values=(0, 255)))
    assert source.map_classes == ('0', '1') and source[0]['segmentation'].tolist() == [[0, 1]]


def test_a_subset_keeps_the_names_and_can_go_without_maps(tmp_path):
    root = write(tmp_path, splits_of('kind first') | {'classes.txt': 'a\nb\nc'})
    some = subset.Subset(sources.open_source(root), np.array([2, 1]))
    assert some.map_classes == ('a', 'b', 'c') and values(some) == [2, 1]
    assert set(maps.images_only(some)[0]) == {'image'} and 'segmentation' in some[0]
    assert subset.Subset(maps.images_only(some), [0]).map_classes is None


def test_the_classes_of_two_sources_are_joined():
    def source(*names):
        found = scenes.Scenes(1, 16)
        found.map_classes = names
        return found

    assert maps.class_names(source('0', '1'), source('0', '1', '2')) == ('0', '1', '2')
    assert maps.class_names(scenes.Scenes(1, 16))[:2] == ('background', 'disc')
    with pytest.raises(errors.UserError, match='give both the same map_classes'):
        maps.class_names(source('a', 'b'), source('b', 'a'))


def test_the_fingerprint_changes_with_the_maps_and_their_meaning(tmp_path):
    root = write(tmp_path, splits_of('kind first'))
    seen = {sources.open_source(root).fingerprint}
    seen.add(sources.open_source(dict(path=root, ignore=1)).fingerprint)
    seen.add(sources.open_source(dict(path=root, map_classes='abcde')).fingerprint)
    write(tmp_path, {'labels/train/a.png': label(4)})
    seen.add(sources.open_source(root).fingerprint)
    assert len(seen) == 4


# Layouts.


def ade():
    stems = [('training', 'ADE_train_1'), ('training', 'ADE_train_2'), ('validation', 'ADE_val_1')]
    files = {f'images/{s}/{n}.jpg': photo(k) for k, (s, n) in enumerate(stems)}
    files |= {f'annotations/{s}/{n}.png': label(k) for k, (s, n) in enumerate(stems)}
    return {f'ADEChallengeData2016/{k}': v for k, v in files.items()}


def test_ade20k_counts_from_1(tmp_path):
    root = write(tmp_path, ade())
    source = sources.open_source(root)
    assert values(source) == [255, 0] and len(source.map_classes) == 150
    assert 'layout ade20k' in source.notes[1] and source.map_classes[149] == '149'
    assert values(sources.open_source(root, 'test')) == [1]
    table = 'Idx\tRatio\tTrain\tVal\tStuff\tName\n' + ''.join(
        f'{k}\t0\t0\t0\t1\tthing {k}\n' for k in range(1, 151)
    )
    write(tmp_path, {'ADEChallengeData2016/objectInfo150.txt': table})
    assert sources.open_source(root).map_classes[149] == 'thing 150'


def test_voc_uses_the_lists_and_the_palette(tmp_path):
    index = PIL.Image.fromarray(np.array([[0, 20, 255]], np.uint8))
    index.putpalette(list(range(256)) * 3)
    files = {f'JPEGImages/{k}.jpg': photo(k, 1, 3) for k in range(6)}
    files |= {f'SegmentationClass/{k}.png': png(index) for k in range(4)}
    files |= {f'SegmentationObject/{k}.png': label(k) for k in range(4)}
    files |= {'SegmentationClassAug/4.png': label(3, 1, 3)}
    files |= {'ImageSets/Segmentation/train.txt': '0\n1\n', 'ImageSets/Main/cat_train.txt': '0 -1'}
    files |= {'ImageSets/Segmentation/val.txt': '2\n3\n'}
    files |= {'ImageSets/Segmentation/train_aug.txt': '0\n1\n4\n'}
    root = write(tmp_path, {f'VOCdevkit/VOC2012/{k}': v for k, v in files.items()})
    top = f'{root}/VOCdevkit/VOC2012'
    for purpose, found in (('train', '01'), ('test', '23')):
        source = sources.open_source(root, purpose)
        assert names(source, top) == [f'JPEGImages/{k}.jpg' for k in found]
        assert source[0]['segmentation'].tolist() == [[0, 20, 255]] and source.classes is None
    assert source.map_classes[20] == 'tvmonitor' and len(source.map_classes) == 21
    assert values(sources.open_source(dict(path=root, split='train_aug'))) == [0, 0, 3]
    assert len(sources.open_source(root, 'all')) == 5


def test_cityscapes_has_19_of_its_34_labels_and_no_blank_test_maps(tmp_path):
    ids = png(np.array([[0, 7, 33, 30]], np.uint8))
    files = {}
    for split, city in (('train', 'aachen'), ('train', 'ulm'), ('val', 'lindau'), ('test', 'bonn')):
        stem = f'{split}/{city}/{city}_000000_000019'
        files[f'leftImg8bit/{stem}_leftImg8bit.png'] = photo(0, 1, 4)
        files[f'gtFine/{stem}_gtFine_labelIds.png'] = ids
        files[f'gtFine/{stem}_gtFine_color.png'] = photo(0, 1, 4)
        files[f'gtFine/{stem}_gtFine_instanceIds.png'] = label(1, 1, 4, np.uint16)
    root = write(tmp_path, files)
    train, test = sources.open_source(root), sources.open_source(root, 'test')
    assert len(train) == 2 and names(test, root)[0].startswith('leftImg8bit/val/lindau')
    assert test[0]['segmentation'].tolist() == [[255, 0, 18, 255]] and train.classes is None
    assert train.map_classes[0] == 'road' and train.map_classes[18] == 'bicycle'
    assert len(sources.open_source(root, 'all')) == 3


NYU = {
    'sync/kitchen/rgb_00001.jpg': photo(1),
    'sync/kitchen/sync_depth_00001.png': label(2000, dtype=np.uint16),
    'sync/kitchen/rgb_00002.jpg': photo(2),
    'official_splits/test/bath/rgb_00045.jpg': photo(3),
    'official_splits/test/bath/sync_depth_00045.png': label(500, dtype=np.uint16),
}


def test_nyuv2_is_in_millimetres_with_the_official_test_images(tmp_path):
    root = write(tmp_path, NYU)
    train, test = sources.open_source(root), sources.open_source(root, 'test')
    assert names(train, root) == ['sync/kitchen/rgb_00001.jpg'] and values(train, 'depth') == [2.0]
    assert values(test, 'depth') == [0.5] and train.classes is None and train.map_classes is None
    assert 'layout nyuv2' in train.notes[1] and 'leaves out 1 images without' in train.notes[1]


def test_a_list_of_pairs_is_a_split_and_finds_where_its_paths_begin(tmp_path):
    root = write(tmp_path, NYU)
    lines = '/kitchen/rgb_00001.jpg /kitchen/sync_depth_00001.png 518.8\n'
    lines += '/kitchen/rgb_00002.jpg None 518.8\n'
    write(tmp_path, {'train.txt': lines})
    spec = dict(path=root, layout='nyuv2', pairs=f'{root}/train.txt')
    source = sources.open_source(spec)
    assert names(source, root) == ['sync/kitchen/rgb_00001.jpg']
    assert values(source, 'depth') == [2.0] and 'leaves out 1 images' in ' '.join(source.notes)
    write(tmp_path, {'train.txt': lines + '/kitchen/rgb_00009.jpg None\n'})
    with pytest.raises(errors.UserError, match=r"names 'sync/kitchen/rgb_00009\.jpg', which is mi"):
        sources.open_source(spec)


@pytest.mark.parametrize('depth', ['annotations/{}', 'data_depth_annotated/{split}/{}'])
def test_kitti_pairs_by_drive_camera_and_number(tmp_path, depth):
    files = {}
    for day, drive, split in (('2011_09_26', '0001', 'train'), ('2011_09_28', '0002', 'val')):
        drive = f'{day}_drive_{drive}_sync'
        where = depth.format(drive, split=split) + '/proj_depth/groundtruth'
        for camera, value in (('image_02', 256), ('image_03', 512)):
            files[f'images/{day}/{drive}/{camera}/data/0000000005.png'] = photo()
            files[f'{where}/{camera}/0000000005.png'] = label(value, dtype=np.uint16)
    root = write(tmp_path, files)
    source = sources.open_source(root)
    has_splits = '{split}' in depth
    assert values(source, 'depth') == ([1.0, 2.0] if has_splits else [1.0, 2.0, 1.0, 2.0])
    assert len(sources.open_source(root, 'test')) == (2 if has_splits else 4)


def test_a_layout_that_is_named_must_be_there(tmp_path):
    root = write(tmp_path, {'a.png': photo()})
    with pytest.raises(errors.UserError, match="no image with a map where layout='voc' has them"):
        sources.open_source(dict(path=root, layout='voc'))
    with pytest.raises(errors.UserError, match="no layout 'vok': did you mean 'voc'"):
        sources.open_source(dict(path=root, layout='vok'))
    write(tmp_path, {'images/training/1.png': photo(), 'annotations/training/1.png': label(3)})
    assert values(sources.open_source(dict(path=root, layout='ade20k'))) == [2]
    assert values(sources.open_source(root)) == [3]
    assert set(layouts.LAYOUTS) == {'ade20k', 'voc', 'cityscapes', 'nyuv2', 'kitti'}


# Parquet and the stream.


def save(path, **columns):
    pq.write_table(pa.table(columns), path)


@pytest.mark.parametrize('name', ['annotation', 'segmentation', 'label'])
def test_columns_of_parquet_are_maps(tmp_path, name):
    images = [{'bytes': photo(k), 'path': None} for k in range(3)]
    classes = [{'bytes': label(k), 'path': None} for k in range(3)]
    metres = [png(np.full((6, 8), 1000 * (k + 1), np.uint16)) for k in range(3)]
    save(tmp_path / 'x.parquet', **{name: classes, 'depth_map': metres, 'image': images})
    spec = dict(path=str(tmp_path / 'x.parquet'), ignore=2, depth_scale=0.001)
    source = sources.open_source(spec)
    assert image_values(source) == [0, 1, 2] and values(source) == [0, 1, 255]
    np.testing.assert_allclose(values(source, 'depth'), [1, 2, 3])
    assert source.map_classes == ('0', '1') and f"from the column '{name}'" in source.notes[-1]
    assert 'label' not in source[0] and values(pickle.loads(pickle.dumps(source))) == [0, 1, 255]
    assert set(source.without_maps()[0]) == {'image'}
    assert sources.open_source(spec | {'ignore': None}).fingerprint != source.fingerprint


def test_the_image_column_is_not_that_of_the_maps_where_metadata_calls_both_images(tmp_path):
    columns = dict(annotation=[label(3)], image=[photo(7)])
    features_of = {k: {'_type': 'Image'} for k in columns}
    metadata = json.dumps({'info': {'features': features_of}})
    rows = pa.table(columns).replace_schema_metadata({'huggingface': metadata})
    pq.write_table(rows, tmp_path / 'x.parquet')
    source = sources.open_source(str(tmp_path))
    assert image_values(source) == [7] and values(source) == [3]


def test_words_of_a_command_line_make_a_spec(tmp_path):
    root = write(tmp_path, splits_of('kind first'))
    words = dict(ignore='(1,2)', map_classes="('a','b','c','d','e')", split='train')
    source = sources.open_source(sources.with_words(root, words))
    assert values(source) == [0, 255, 255] and source.map_classes[4] == 'e'


def test_a_row_of_parquet_without_a_map_is_named(tmp_path):
    save(tmp_path / 'x.parquet', photo=[photo(), photo()], mask=[label(), None], label=[0, 1])
    source = sources.open_source(str(tmp_path / 'x.parquet'))
    assert source[0]['label'] == 0 and values(subset.Subset(source, [0])) == [0]
    with pytest.raises(errors.UserError, match=r"row 1, column 'mask', has no map"):
        source[1]
    with pytest.raises(errors.UserError, match="no column 'mas'.*did you mean 'mask'"):
        sources.open_source(dict(path=str(tmp_path / 'x.parquet'), segmentation_column='mas'))


def test_extraction_yields_the_maps_that_are_asked_for(tmp_path):
    root = write(tmp_path, splits_of('kind first'))
    source = sources.open_source(root)
    options = dict(transform=4, batch_size=4, maps=('segmentation',))
    (batch,) = features.batches(lambda x: x[:, 0, 0], source, **options)
    assert batch['segmentation'].shape == (3, 4, 4)
    assert batch['segmentation'][:, 2, 2].tolist() == [0, 1, 2]


def test_camvid_opens_as_it_lies_there(data_dir):
    root = str(data_dir / 'camvid')
    for purpose, count in (('train', 367), ('test', 233)):
        source = sources.open_source(dict(path=root, ignore=11), purpose)
        assert len(source) == count and source.classes is None
        found = np.unique(source[count - 1]['segmentation'])
        assert found[-1] == 255 and found[-2] <= 10
    val = sources.open_source(dict(path=root, ignore=11, split='val'))
    assert len(val) == 101 and val.map_classes == tuple(str(k) for k in range(11))
