# SPDX-License-Identifier: Apache-2.0
"""Every layout of images opens to the same few methods, and every mistake has its sentence."""

import base64
import io
import json
import os
import pickle
import re
import sys

import ml_collections
import msgpack
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ssl_jax import config, methods
from ssl_jax.data import host, parquet, sources, stream
from ssl_jax.evals import accuracy, report


def png(value, side=4):
    out = io.BytesIO()
    PIL.Image.fromarray(np.full((side, side, 3), value, np.uint8)).save(out, 'PNG')
    return out.getvalue()


def write(path, data=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(0) if data is None else data)


def sentence(error, spec):
    with pytest.raises(error) as e:
        sources.open_source(spec)
    assert '\n' not in str(e.value) and str(e.value)[-1] in '.?'
    return str(e.value)


# Folders.


def test_a_flat_folder_has_no_labels_and_the_order_of_its_names(tmp_path):
    for k, name in enumerate(('b.png', 'a.png', 'C.PNG')):
        write(tmp_path / name, png(k))
    source = sources.open_source(str(tmp_path))
    assert len(source) == 3 and source.classes is None and 'label' not in source[0]
    assert [os.path.basename(source.describe(i)) for i in range(3)] == ['C.PNG', 'a.png', 'b.png']
    assert host.decode(source[2]['image'])[0, 0, 0] == 0


def test_the_first_folder_level_gives_the_labels(tmp_path):
    for name in ('dog/1.png', 'cat/deep/er/2.png', 'cat/3.jpg', 'emu/4.png'):
        write(tmp_path / name)
    (tmp_path / 'empty').mkdir()
    source = sources.open_source(dict(source='folder', path=str(tmp_path)))
    assert source.classes == ('cat', 'dog', 'emu')
    assert [source[i]['label'] for i in range(4)] == [0, 0, 1, 2]


def test_images_beside_folders_or_in_one_folder_only_are_unlabelled(tmp_path):
    write(tmp_path / 'one/only/1.png')
    assert sources.open_source(str(tmp_path)).classes is None
    write(tmp_path / 'two/2.png')
    assert sources.open_source(str(tmp_path)).classes == ('one', 'two')
    write(tmp_path / '3.png')
    assert sources.open_source(str(tmp_path)).classes is None


def test_other_files_are_ignored_and_counted(tmp_path):
    for name in ('a.png', 'notes.txt', 'x/b.json', '._a.png'):
        write(tmp_path / name)
    source = sources.open_source(str(tmp_path))
    assert len(source) == 1 and source.ignored == 3


def test_symbolic_links_are_followed_once_and_loops_end(tmp_path):
    write(tmp_path / 'elsewhere/e.png')
    write(tmp_path / 'data/d/a.png')
    (tmp_path / 'data/d/loop').symlink_to(tmp_path / 'data')
    (tmp_path / 'data/link').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'data/again').symlink_to(tmp_path / 'elsewhere')
    (tmp_path / 'data/broken.png').symlink_to(tmp_path / 'nowhere.png')
    source = sources.open_source(str(tmp_path / 'data'))
    names = [os.path.relpath(source.describe(i), tmp_path / 'data') for i in range(len(source))]
    assert names == ['again/e.png', 'd/a.png'] and source.ignored == 1


@pytest.mark.skipif(sys.platform != 'linux', reason='other systems refuse such names')
def test_a_name_that_is_not_utf8_is_read_and_printable(tmp_path):
    with open(os.fsencode(tmp_path) + b'/caf\xe9.png', 'wb') as f:
        f.write(png(9))
    source = sources.open_source(str(tmp_path))
    assert host.decode(source[0]['image']).max() == 9
    source.describe(0).encode('utf-8')
    assert pickle.loads(pickle.dumps(source)).fingerprint == source.fingerprint


def test_the_fingerprint_follows_the_list_of_images(tmp_path):
    write(tmp_path / 'a.png')
    before = sources.open_source(str(tmp_path)).fingerprint
    assert sources.open_source(str(tmp_path)).fingerprint == before
    write(tmp_path / 'b.png')
    assert sources.open_source(str(tmp_path)).fingerprint != before


def test_a_folder_of_index_maps_becomes_segmentation(tmp_path):
    write(tmp_path / 'images/val/a.png')
    index = io.BytesIO()
    PIL.Image.fromarray(np.full((4, 4), 11, np.uint8)).save(index, 'PNG')
    write(tmp_path / 'maps/val/a.png', index.getvalue())
    spec = dict(source='folder', path=str(tmp_path / 'images'), split='val')
    source = sources.open_source(dict(spec, segmentation=str(tmp_path / 'maps')))
    assert source[0]['segmentation'].tolist() == np.full((4, 4), 11).tolist()


# Parquet.


def table(values, labels=None, structs=True, metadata=None):
    images = [png(v) for v in values]
    if structs:
        images = [dict(bytes=b, path=None) for b in images]
        column = pa.array(images, pa.struct([('bytes', pa.binary()), ('path', pa.string())]))
    else:
        column = pa.array(images, pa.binary())
    columns = {'image': column} | ({} if labels is None else {'label': labels})
    out = pa.table(columns)
    if metadata:
        out = out.replace_schema_metadata({'huggingface': json.dumps(metadata)})
    return out


def pixel(source, i):
    return int(host.decode(source[i]['image'])[0, 0, 0])


@pytest.mark.parametrize('structs', [True, False])
def test_parquet_rows_are_read_from_structs_and_from_raw_bytes(tmp_path, structs):
    pq.write_table(table(range(10), list(range(10)), structs), tmp_path / 'x.parquet', 3)
    source = sources.open_source(str(tmp_path / 'x.parquet'))
    assert [pixel(source, i) for i in range(10)] == list(range(10))
    assert [source[i]['label'] for i in range(10)] == list(range(10))
    assert source.classes == tuple('0123456789') and source.describe(7).endswith('x.parquet row 7')


def test_parquet_shards_join_in_the_order_of_their_names(tmp_path):
    for k in (1, 0):
        name = f'data/train-0000{k}-of-00002.parquet'
        (tmp_path / 'data').mkdir(exist_ok=True)
        pq.write_table(table([10 * k, 10 * k + 1]), tmp_path / name)
    pq.write_table(table([99]), tmp_path / 'data/test-00000-of-00001.parquet')
    specs = (
        dict(path=str(tmp_path), split='train'),
        dict(source='parquet', path=str(tmp_path / 'data/train-*.parquet')),
    )
    for spec in specs:
        source = sources.open_source(spec)
        assert [pixel(source, i) for i in range(len(source))] == [0, 1, 10, 11]
        assert source.classes is None
        assert source.describe(3).endswith('00001-of-00002.parquet row 1')


def test_class_names_come_from_the_metadata_else_from_classes_txt(tmp_path):
    (tmp_path / 'classes.txt').write_text('owl\nyak\n')
    pq.write_table(table([0, 1], [1, 0]), tmp_path / 'plain.parquet')
    assert sources.open_source(str(tmp_path / 'plain.parquet')).classes == ('owl', 'yak')
    features = dict(
        image=dict(_type='Image'), label=dict(_type='ClassLabel', names=['newt', 'toad'])
    )
    tagged = table([0, 1], [1, 0], metadata=dict(info=dict(features=features)))
    pq.write_table(tagged, tmp_path / 'tagged.parquet')
    assert sources.open_source(str(tmp_path / 'tagged.parquet')).classes == ('newt', 'toad')


def test_labels_that_are_all_minus_one_count_as_none(tmp_path):
    pq.write_table(table([0, 1], [-1, -1]), tmp_path / 'test.parquet')
    source = sources.open_source(str(tmp_path / 'test.parquet'))
    assert source.classes is None and 'label' not in source[0]


def test_text_labels_name_their_classes(tmp_path):
    pq.write_table(table([0, 1, 2], ['yak', 'owl', 'yak']), tmp_path / 'x.parquet')
    source = sources.open_source(str(tmp_path / 'x.parquet'))
    assert source.classes == ('owl', 'yak') and [source[i]['label'] for i in range(3)] == [1, 0, 1]


def test_null_bytes_are_read_from_the_path_beside_the_file(tmp_path):
    write(tmp_path / 'files/a.png', png(42))
    kind = pa.struct([('bytes', pa.binary()), ('path', pa.string())])
    rows = pa.array([dict(bytes=None, path='files/a.png'), None], kind)
    pq.write_table(pa.table({'image': rows}), tmp_path / 'x.parquet')
    source = sources.open_source(str(tmp_path / 'x.parquet'))
    assert pixel(source, 0) == 42
    with pytest.raises(host.DecodeError, match='empty'):
        host.decode(source[1]['image'])


def test_a_large_parquet_is_mapped_from_a_cache_with_the_same_rows(tmp_path, monkeypatch, capsys):
    pq.write_table(table(range(9), list(range(9))), tmp_path / 'x.parquet', 4)
    monkeypatch.setattr(parquet, 'MEMORY_BYTES', 10)
    spec = dict(source='parquet', path=str(tmp_path / 'x.parquet'), cache_dir=str(tmp_path / 'c'))
    source = sources.open_source(spec)
    assert [pixel(source, i) for i in range(9)] == list(range(9))
    assert 'once' in capsys.readouterr().out and len(os.listdir(tmp_path / 'c')) == 1
    assert pixel(sources.open_source(spec), 8) == 8 and not capsys.readouterr().out


def test_a_parquet_source_is_sent_to_workers_without_its_images(tmp_path):
    pq.write_table(table(range(50), [0] * 50), tmp_path / 'x.parquet')
    source = sources.open_source(str(tmp_path / 'x.parquet'))
    sent = pickle.dumps(source)
    assert len(sent) < 50 * len(png(0)) and pixel(pickle.loads(sent), 33) == 33


# Columns of Parquet files.


def save(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_paths_are_read_relative_to_the_file_or_absolute(tmp_path):
    write(tmp_path / 'meta/files/a.png', png(1))
    write(tmp_path / 'elsewhere/b.png', png(2))
    paths = ['files/a.png', str(tmp_path / 'elsewhere/b.png'), '../elsewhere/b.png', 'no.png', None]
    kinds = {
        'text': pa.array(paths),
        'categories': pa.array(paths).dictionary_encode(),
        'structs': pa.array(
            [p and dict(bytes=None, path=p) for p in paths],
            pa.struct([('bytes', pa.binary()), ('path', pa.string())]),
        ),
        'structs of paths': pa.array([p and dict(path=p) for p in paths]),
    }
    for name, column in kinds.items():
        source = sources.open_source(save(tmp_path / 'meta/x.parquet', image=column))
        assert [pixel(source, i) for i in range(3)] == [1, 2, 2], name
        with pytest.raises(FileNotFoundError):
            source[3]
        assert source[4]['image'] == b''
    source = sources.open_source(save(tmp_path / 'meta/x.parquet', file_name=paths[:3]))
    assert [pixel(source, i) for i in range(3)] == [1, 2, 2]


@pytest.mark.parametrize(
    'column, message',
    [
        ([[png(0)], [png(1)]], r"'image' of .* holds list<.*binary>"),
        ([base64.b64encode(png(0)).decode()] * 2, 'no path of an image .*base64'),
        (['https://x.org/a.png'] * 2, 'holds addresses .*download'),
        ([[[0, 0], [0, 0]]] * 2, 'one image in each row'),
        ([1.5, 2.5], 'holds double'),
    ],
    ids=['lists', 'base64', 'addresses', 'pixels', 'numbers'],
)
def test_columns_that_hold_no_images_are_a_sentence(column, message, tmp_path):
    path = save(tmp_path / 'x.parquet', image=column)
    assert re.search(message, sentence(ValueError, path))


def test_every_shard_is_looked_at(tmp_path):
    save(tmp_path / 'a.parquet', image=[png(0)], label=[0])
    save(tmp_path / 'b.parquet', image=['b.png'], label=[1])
    assert re.search('bytes in .*a.parquet and paths in .*b.par', sentence(ValueError, tmp_path))
    save(tmp_path / 'b.parquet', picture=[png(0)], label=[1])
    assert "no column 'image' in" in sentence(ValueError, tmp_path)
    save(tmp_path / 'b.parquet', image=[png(1)], label=['one'])
    assert re.search('numbers in .*a.parquet and text in .*b.par', sentence(ValueError, tmp_path))
    save(tmp_path / 'b.parquet', label=[1], image=pa.array([png(1)], pa.large_binary()))
    source = sources.open_source(tmp_path)
    assert [(pixel(source, i), source[i]['label']) for i in range(2)] == [(0, 0), (1, 1)]
    save(tmp_path / 'b.parquet', image=[png(1)])
    assert sources.open_source(tmp_path).labels.tolist() == [0, -1]


def test_shards_that_name_their_classes_differently_are_refused(tmp_path):
    for name, classes in (('a', ['owl', 'yak']), ('b', ['yak', 'owl'])):
        features = dict(label=dict(_type='ClassLabel', names=classes))
        tagged = table([0, 1], [0, 1], metadata=dict(info=dict(features=features)))
        pq.write_table(tagged, tmp_path / f'{name}.parquet')
    assert "name the classes of 'label' differently" in sentence(ValueError, tmp_path)


def test_a_cache_holds_shards_of_different_types(tmp_path, monkeypatch):
    save(tmp_path / 'a.parquet', image=[png(0)])
    save(tmp_path / 'b.parquet', image=pa.array([png(1)], pa.large_binary()))
    monkeypatch.setattr(parquet, 'MEMORY_BYTES', 1)
    spec = dict(source='parquet', path=str(tmp_path), cache_dir=str(tmp_path / 'c'))
    assert [pixel(sources.open_source(spec), i) for i in range(2)] == [0, 1]


@pytest.mark.parametrize(
    'labels, expected, classes',
    [
        (pa.array(['b', 'a', 'b']).dictionary_encode(), [1, 0, 1], ('a', 'b')),
        ([True, False, True], [1, 0, 1], ('False', 'True')),
        ([1.0, 0.0, 2.0], [1, 0, 2], ('0', '1', '2')),
        (pa.array([1, 0, 1], pa.uint8()), [1, 0, 1], ('0', '1')),
        ([10, 500, 90_000], [0, 1, 2], ('10', '500', '90000')),
        ([-1, 7 * 10**12, 5], [-1, 1, 0], ('5', '7000000000000')),
        ([1, 2, 3], [1, 2, 3], ('0', '1', '2', '3')),
        (['b', None, ''], [0, -1, -1], ('b',)),
        ([1.0, None, float('nan')], [1, -1, -1], ('0', '1')),
        (pa.array([1, None, 0]).dictionary_encode(), [1, -1, 0], ('0', '1')),
    ],
    ids=str,
)
def test_labels_of_every_kind_count_classes(labels, expected, classes, tmp_path):
    source = sources.open_source(save(tmp_path / 'x.parquet', image=[png(0)] * 3, label=labels))
    assert source.labels.tolist() == expected and source.classes == classes
    sparse = '90000' in classes or '5' in classes
    assert any('each is a class' in note for note in source.notes) == sparse


@pytest.mark.parametrize('labels', [[0.5, 1.0], [[1], [2]], [None, None]], ids=str)
def test_columns_that_hold_no_classes_are_not_labels(labels, tmp_path):
    source = sources.open_source(save(tmp_path / 'x.parquet', image=[png(0)] * 2, label=labels))
    assert source.classes is None and 'label' not in source[0]
    assert labels[0] is None or "no labels: the column 'label'" in source.notes[0]


def test_missing_labels_are_refused_with_their_number_where_labels_are_used(tmp_path):
    path = save(tmp_path / 'x.parquet', image=[png(0)] * 4, label=[0, -1, 1, None])
    source = sources.open_source(path)
    classifier = methods.make(config.load('finetune_images', [f'data.train={path}']))
    for use in (
        lambda: sources.check_labels(source),
        lambda: classifier.complete(source),
        lambda: accuracy.check_classes(source.classes, source),
        lambda: report.evaluate({}, source, transform=8, log=None),
    ):
        with pytest.raises(ValueError, match='2 of 4 images .*row 1 is the first.* have no label'):
            use()
    assert source.classes == ('0', '1')  # and nobody minds where they are not used


@pytest.mark.parametrize(
    'train, test, expected',
    [
        ([10, 500, 90_000], [500, 10], [1, 0]),
        ([0, 1, 2, 3], [3, 3], [3, 3]),
        ([0, 1, 2, 3], [0, 1], [0, 1]),
        (range(1000), [999, 17], [999, 17]),
        ([4, 40, 400], [40, -1], [1, -1]),
    ],
    ids=str,
)
def test_a_test_set_that_lacks_numbers_counts_in_those_of_the_training_set(train, test, expected):
    def made(labels):
        return sources.Arrays([png(0)] * len(labels), list(labels))

    names = made(train).classes
    agreed = sources.in_classes(made(test), names)
    assert agreed.labels.tolist() == expected and agreed.classes == names
    assert [agreed[i].get('label') for i in range(2)] == expected


def test_a_test_set_of_other_numbers_or_names_is_left_to_the_check():
    for names, labels, own in ((('10', '500'), [11, 500], None), (('a', 'b'), [0, 1], ('b', 'a'))):
        source = sources.Arrays([png(0)] * 2, labels, own)
        assert sources.in_classes(source, names) is source
        with pytest.raises(ValueError, match='differently'):
            accuracy.check_classes(names, source)


def test_images_beside_a_table_that_has_none_are_a_folder(tmp_path):
    save(tmp_path / 'features.parquet', name=['a'], cls=[[0.5]])
    write(tmp_path / 'a/1.png')
    write(tmp_path / 'b/1.png')
    assert sources.open_source(tmp_path).classes == ('a', 'b')
    save(tmp_path / 'meta.parquet', file_name=['a/1.png'])
    (tmp_path / 'features.parquet').unlink()
    assert len(sources.open_source(tmp_path)) == 1


def test_shards_are_listed_once_and_without_what_is_hidden(tmp_path):
    save(tmp_path / 'data/x.parquet', image=[png(0)])
    save(tmp_path / '@eaDir/x.parquet', image=[png(1)])
    save(tmp_path / '.cache/x.parquet', image=[png(1)])
    (tmp_path / 'data/x.parquet.tmp').write_text('half')
    (tmp_path / 'data/again').symlink_to(tmp_path)
    os.mkfifo(tmp_path / 'data/y.parquet')
    source = sources.open_source(tmp_path)
    assert len(source) == 1 and '1 in @eaDir' in source.notes[0]


# ArrayRecord, TFDS, arrays.


def test_array_records_hold_raw_images_or_maps_with_labels(tmp_path):
    from array_record.python import array_record_module

    raw = str(tmp_path / 'raw.array_record')
    writer = array_record_module.ArrayRecordWriter(raw, 'group_size:1')
    for value in (3, 4):
        writer.write(png(value))
    writer.close()
    source = sources.open_source(raw)
    assert [pixel(source, i) for i in range(2)] == [3, 4] and source.classes is None

    maps = str(tmp_path / 'maps.array_record')
    writer = array_record_module.ArrayRecordWriter(maps, 'group_size:1')
    writer.write(msgpack.packb(dict(image=png(5), label=1)))
    writer.close()
    (tmp_path / 'classes.txt').write_text('owl\nyak\n')
    source = pickle.loads(pickle.dumps(sources.open_source(maps)))
    assert source.classes == ('owl', 'yak') and source[0] == dict(image=png(5), label=1)


@pytest.mark.parametrize('damage', [lambda x: x[:-1000], lambda x: b'', lambda x: b'x' * len(x)])
def test_a_damaged_shard_of_records_is_named_and_not_taken_for_empty(damage, tmp_path):
    from array_record.python import array_record_module

    for k in range(2):
        writer = array_record_module.ArrayRecordWriter(
            str(tmp_path / f'{k}.array_record'), 'group_size:1'
        )
        writer.write(png(k))
        writer.close()
    assert len(sources.open_source(str(tmp_path))) == 2
    second = tmp_path / '1.array_record'
    second.write_bytes(damage(second.read_bytes()))
    assert '1.array_record is no readable' in sentence(ValueError, str(tmp_path))


def test_a_damaged_record_is_a_bad_image(tmp_path):
    from array_record.python import array_record_module

    file = tmp_path / 'a.array_record'
    writer = array_record_module.ArrayRecordWriter(str(file), 'group_size:1,uncompressed')
    records = [png(k, 64) for k in range(8)]
    for record in records:
        writer.write(record)
    writer.close()
    data = file.read_bytes()
    at = data.index(records[3]) + 50
    file.write_bytes(data[:at] + b'damage' + data[at + 6 :])
    source = sources.open_source(str(file))
    with pytest.raises(host.DecodeError, match='Corrupted'):
        source[3]
    with stream.train_stream(source, [host.View('image', 8)], batch_size=8, seed=0) as batches:
        bad = next(batches)['bad']
    assert set(bad[bad >= 0].tolist()) == {3}


def test_a_tfds_data_set_is_read_without_tensorflow(tfds_dir):
    source = sources.open_source(dict(source='tfds', name='tiny_plates', path=tfds_dir))
    assert len(source) == 6 and source.classes == ('owl', 'yak')
    assert sorted(pixel(source, i) for i in range(6)) == list(range(6))
    assert all(pixel(source, i) % 2 == source[i]['label'] for i in range(6))
    assert 'tensorflow' not in sys.modules
    half = dict(source='tfds', name='tiny_plates', path=tfds_dir, split='train[:50%]')
    assert len(sources.open_source(half)) == 3


def test_mistakes_with_tfds_are_named(tfds_dir):
    spec = dict(source='tfds', path=tfds_dir)
    assert "did you mean 'tiny_plates'" in sentence(ValueError, dict(spec, name='tiny_plate'))
    assert 'there is train' in sentence(ValueError, dict(spec, name='tiny_plates', split='val'))
    assert 'is not prepared' in sentence(FileNotFoundError, dict(spec, name='mnist'))
    assert 'source=tfds' in sentence(ValueError, f'{tfds_dir}/tiny_plates/1.0.0')


def test_arrays_in_memory_are_a_source():
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    source = sources.open_source(dict(source='arrays', images=images, labels=[2, 0]))
    assert len(source) == 2 and source.classes == ('0', '1', '2') and source[0]['label'] == 2
    np.testing.assert_array_equal(source[1]['image'], images[1])


# What the user may get wrong.


def test_misspelt_names_are_answered_with_the_nearest_one(tmp_path):
    assert "did you mean 'parquet'?" in sentence(ValueError, dict(source='parket', path='x'))
    assert "did you mean 'split'?" in sentence(ValueError, dict(source='scenes', splt='x'))
    write(tmp_path / 'pictures/a.png')
    assert "did you mean 'pictures'?" in sentence(FileNotFoundError, str(tmp_path / 'picture'))
    assert 'does not exist' in sentence(FileNotFoundError, str(tmp_path / 'no/such/thing'))


def test_folders_without_images_are_refused(tmp_path):
    assert 'is empty' in sentence(FileNotFoundError, str(tmp_path))
    write(tmp_path / 'notes.txt')
    assert '1 of extension .txt' in sentence(FileNotFoundError, str(tmp_path))
    assert 'neither a folder' in sentence(ValueError, str(tmp_path / 'notes.txt'))


def test_what_a_source_needs_is_asked_for():
    assert "needs 'path'" in sentence(ValueError, dict(source='folder', path=''))
    assert "needs 'name'" in sentence(ValueError, dict(source='tfds'))
    assert 'one of folder' in sentence(ValueError, dict(split='train'))


def test_damaged_or_odd_parquet_is_refused(tmp_path):
    write(tmp_path / 'bad.parquet', b'PAR1 no more')
    assert 'not a readable Parquet' in sentence(ValueError, str(tmp_path / 'bad.parquet'))
    pq.write_table(table([]), tmp_path / 'none.parquet')
    assert 'no rows' in sentence(ValueError, str(tmp_path / 'none.parquet'))
    pq.write_table(pa.table({'text': ['a']}), tmp_path / 'text.parquet')
    assert 'set image_column' in sentence(ValueError, str(tmp_path / 'text.parquet'))
    pq.write_table(table([1]), tmp_path / 'x.parquet')
    spec = dict(source='parquet', path=str(tmp_path / 'x.parquet'), image_column='imag')
    assert "did you mean 'image'?" in sentence(ValueError, spec)
    spec = dict(source='parquet', path=str(tmp_path), split='val')
    assert "split 'val'" in sentence(FileNotFoundError, spec)


def test_a_config_may_keep_the_keys_of_another_source(tmp_path):
    write(tmp_path / 'a.png')
    spec = dict(source='folder', path=str(tmp_path), n=100, size=96, name=None, images='')
    assert len(sources.open_source(ml_collections.ConfigDict(spec))) == 1


def test_the_real_sets_open(data_dir):
    source = sources.open_source(str(data_dir / 'cifar10/test.parquet'))
    assert len(source) == 10_000 and source.classes[3] == 'cat'
    assert host.decode(source[9_999]['image']).shape == (32, 32, 3)
    spec = dict(source='folder', path=str(data_dir / 'camvid/images'), split='val')
    source = sources.open_source(dict(spec, segmentation=str(data_dir / 'camvid/labels')))
    assert len(source) == 101 and source[100]['segmentation'].max() <= 11
