# SPDX-License-Identifier: Apache-2.0
"""Crops to train dense heads on have the same geometry as their maps, whole images their own."""

import io

import numpy as np
import PIL.Image
import pytest

from ssl_jax.data import host, pairs, scenes, sources, stream
from ssl_jax.run import errors


def blocks(h, w, side=16):
    """An image in which every block has a colour, the class map and the depth of these blocks."""
    y, x = np.mgrid[:h, :w] // side
    labels = ((y * 5 + x) % 20).astype(np.uint8)
    image = np.stack([labels * 10, 200 - labels * 10, labels * 5], -1).astype(np.uint8)
    return {'image': image, 'segmentation': labels, 'depth': (labels + 1) / np.float32(4)}


class Blocks:
    """Sources of `blocks`; images in `bad` cannot be decoded."""

    classes, fingerprint, map_classes = None, 'blocks', tuple(map(str, range(20)))

    def __init__(self, n=5, h=48, w=64, bad=()):
        self.n, self.h, self.w, self.bad = n, h, w, bad

    def __len__(self):
        return self.n

    def __getitem__(self, i):
        item = blocks(self.h, self.w)
        return item | {'image': b'broken'} if i in self.bad else item

    def describe(self, i):
        return f'blocks {i}'


def batches(source, crop, count=1, **options):
    options = dict(batch_size=4, seed=7) | options
    with pairs.train_pairs(source, crop, **options) as loader:
        return [next(loader) for _ in range(count)]


def assert_aligned(batch):
    """Where a neighbourhood is of one class, the image has its colour and the depth its value."""
    for image, labels, depth in zip(
        batch['image'], batch['segmentation'], batch['depth'], strict=True
    ):
        flat = np.ones(labels.shape, bool)
        for axis in (0, 1):
            for shift in (-2, -1, 1, 2):
                flat &= np.roll(labels, shift, axis) == labels
        flat &= labels != 255
        assert flat.mean() > 0.1
        np.testing.assert_allclose(image[flat][:, 0], labels[flat] * 10.0, atol=3)
        inside = labels != 255
        np.testing.assert_array_equal(depth[inside], (labels[inside] + 1) / np.float32(4))


@pytest.mark.parametrize(
    'crop',
    [
        pairs.Crop((32, 32)),
        pairs.Crop((40, 24), ratio=(0.5, 2.0)),
        pairs.Crop((128, 160), ratio=(1.2, 1.2), flip=1.0),
        pairs.Crop((32, 48), ratio=(0.5, 2.0), base=96),
    ],
    ids=['plain', 'Pixio', 'padded', 'mmsegmentation'],
)
def test_an_image_and_its_maps_are_cut_alike(crop):
    for batch in batches(Blocks(h=96, w=128), crop, 3):
        h, w = crop.size
        assert batch['image'].shape == (4, h, w, 3) and batch['image'].dtype == np.uint8
        assert batch['segmentation'].shape == batch['depth'].shape == (4, h, w)
        assert batch['segmentation'].dtype == np.uint8 and batch['depth'].dtype == np.float32
        assert_aligned(batch)


def test_batches_are_a_function_of_seed_step_and_row():
    source, crop = scenes.Scenes(10, 48), pairs.Crop((32, 32), ratio=(0.5, 2.0))

    def same(one, two):
        assert one.keys() == two.keys()
        return all(np.array_equal(one[k], two[k]) for k in one)

    first = batches(source, crop, 3)
    assert all(map(same, first, batches(source, crop, 3)))
    assert same(first[2], batches(source, crop, 1, start_step=2)[0])
    part = batches(source, crop, 1, start_step=2, rows=[1, 3])[0]
    assert same(part, {k: v[[1, 3]] for k, v in first[2].items()})
    assert not same(first[0], batches(source, crop, 1, seed=8)[0])
    ids = np.concatenate([b['id'] for b in batches(source, crop, 5)])
    assert sorted(ids[:10]) == sorted(ids[10:]) == list(range(10))


def test_small_images_are_padded_right_and_below_where_nothing_counts():
    (batch,) = batches(Blocks(h=20, w=24), pairs.Crop((32, 40), flip=0.0))
    inside = np.zeros((32, 40), bool)
    inside[:20, :24] = True
    assert (batch['segmentation'][:, ~inside] == 255).all()
    assert not batch['depth'][:, ~inside].any() and not batch['image'][:, ~inside].any()
    expected = blocks(20, 24)['segmentation']
    np.testing.assert_array_equal(batch['segmentation'][0][:20, :24], expected)


def sizes(crop, h, w):
    """Sizes after the resize of 400 samples: a crop larger than all of them shows them."""
    rng, found = np.random.default_rng(0), []
    for _ in range(400):
        x = np.full((h, w), 1, np.uint8)
        out = pairs.cropped({'image': np.stack([x] * 3, -1), 'segmentation': x}, crop, rng)
        inside = out['segmentation'] != 255
        found.append((inside.any(1).sum(), inside.any(0).sum()))
    return np.array(found)


def test_the_long_side_becomes_any_whole_number_of_the_range():
    found = sizes(pairs.Crop((40, 64), ratio=(0.5, 2.0), flip=0.0), 12, 32)
    assert set(found[:, 1]) == set(range(16, 65))
    np.testing.assert_array_equal(found[:, 0], np.floor(found[:, 1] * 12 / 32 + 0.5))


def test_the_short_side_becomes_a_factor_of_the_base():
    found = sizes(pairs.Crop((90, 170), ratio=(0.5, 2.0), base=40, flip=0.0), 12, 24)
    assert found[:, 0].min() in range(20, 22) and found[:, 0].max() in range(79, 81)
    assert (abs(found[:, 1] - 2 * found[:, 0]) <= 1).all()
    long = sizes(pairs.Crop((90, 170), base=40, flip=0.0), 6, 60)  # at most 160 long
    assert (long == (16, 160)).all()


def test_a_crop_lies_anywhere_and_half_of_all_are_flipped():
    row = np.arange(16, dtype=np.uint8)
    arrays = {'image': np.stack([np.tile(row, (16, 1))] * 3, -1)}
    rng = np.random.default_rng(0)
    crop = pairs.Crop((4, 4))
    rows = [pairs.cropped(arrays, crop, rng)['image'][0, :, 0] for _ in range(400)]
    flipped = np.array([r[0] > r[1] for r in rows])
    assert 0.4 < flipped.mean() < 0.6
    assert {int(min(r)) for r in rows} == set(range(13))
    assert not any(
        (r := pairs.cropped(arrays, pairs.Crop((4, 4), flip=0), rng)['image'][0, :, 0])[0] > r[1]
        for _ in range(50)
    )


def test_crops_with_a_name_are_those_of_the_protocols():
    x = np.arange(480 * 640).reshape(480, 640)
    assert pairs.cut_fixed(x, 'eigen').shape == (426, 560)
    assert pairs.cut_fixed(x, 'eigen')[0, 0] == x[45, 41]
    y = np.arange(375 * 1242).reshape(375, 1242)
    assert pairs.cut_fixed(y, 'kb').shape == (352, 1216)
    assert pairs.cut_fixed(y, 'kb')[-1, 0] == y[374, 13] and pairs.cut_fixed(y, '') is y
    (batch,) = batches(Blocks(h=480, w=640), pairs.Crop((426, 560), flip=0.0, fixed='eigen'))
    expected = blocks(480, 640)['segmentation'][45:471, 41:601]
    np.testing.assert_array_equal(batch['segmentation'][3], expected)
    for name, said in (('eigen', 'is of images of 640x480'), ('kb', '1216x352'), ('garg', 'no cr')):
        with pytest.raises(errors.UserError, match=said):
            pairs.cut_fixed(np.zeros((100, 100)), name)


def test_whole_images_come_in_order_and_broken_ones_are_said(capsys):
    source = Blocks(5, bad=(1, 3))
    found = list(pairs.native(source))
    assert [x['id'] for x in found] == [0, 2, 4]
    for key in stream.MAPS:
        np.testing.assert_array_equal(found[1][key], blocks(48, 64)[key])
    assert '2 of 5 images cannot be read and do not count (blocks 1' in capsys.readouterr().out
    assert [x['id'] for x in pairs.native(source, [4, 0])] == [4, 0]
    used = np.concatenate([b['id'] for b in batches(source, pairs.Crop((8, 8)), 5)])
    assert set(used) == {0, 2, 4}


def test_a_wrong_map_and_a_source_without_maps_are_errors(tmp_path):
    class Wrong(Blocks):
        def __getitem__(self, i):
            return super().__getitem__(i) | {'segmentation': np.zeros((3, 3), np.uint8)}

    for run in (lambda s: list(pairs.native(s)), lambda s: batches(s, pairs.Crop((8, 8)))):
        with pytest.raises(errors.UserError, match='blocks . has 64x48 pixels and its map'):
            run(Wrong())
    out = io.BytesIO()
    PIL.Image.new('RGB', (8, 8)).save(out, 'PNG')
    (tmp_path / 'a.png').write_bytes(out.getvalue())
    with pytest.raises(errors.UserError, match='neither a class map nor a depth map'):
        batches(sources.open_source(str(tmp_path)), pairs.Crop((8, 8)))


def test_crops_of_camvid_have_their_labels(data_dir):
    source = sources.open_source(dict(path=str(data_dir / 'camvid'), ignore=11))
    (batch,) = batches(source, pairs.Crop((256, 256), ratio=(0.5, 2.0)), batch_size=8)
    assert batch['image'].shape == (8, 256, 256, 3)
    counted = batch['segmentation'] != 255
    assert counted.mean() > 0.4 and batch['segmentation'][counted].max() <= 10
    sky, road = (batch['image'][batch['segmentation'] == k].mean() for k in (0, 3))
    assert sky > road + 50  # the sky of CamVid is bright, its roads are dark
    first = next(pairs.native(source, [3]))
    assert first['image'].shape == (360, 480, 3) and first['segmentation'].shape == (360, 480)
    np.testing.assert_array_equal(first['image'], host.decode(source[3]['image']))
