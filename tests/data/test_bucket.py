# SPDX-License-Identifier: Apache-2.0
"""Images in a bucket are those of a local copy, batches and messages alike; outages pass."""

import concurrent.futures
import io
import math
import os
import pathlib
import pickle
import shutil
import signal
import tarfile
import threading
import time

import msgpack
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tiny
from ssl_jax import train
from ssl_jax.data import files, fingerprint, host, loader, parquet, sources
from ssl_jax.data import stream as stream_lib
from ssl_jax.evals import feature_file
from ssl_jax.run import bucket as bucket_lib
from ssl_jax.run import errors, launch, patience

VIEWS = (host.View('image', 8, count=2),)


def png(value, side=12):
    out = io.BytesIO()
    pixels = np.random.default_rng(value).integers(0, 256, (side, side, 3), np.uint8)
    PIL.Image.fromarray(pixels).save(out, 'PNG')
    return out.getvalue()


def write(path, data=b''):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def upload(folder, root):
    """Copies a local folder to `root`."""
    paths = [p for p in pathlib.Path(folder).rglob('*') if p.is_file()]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(
            pool.map(
                lambda p: bucket_lib.write(f'{root}/{p.relative_to(folder)}', p.read_bytes()), paths
            )
        )


def make_folder(path):
    for i in range(12):
        write(path / f'{"ab"[i % 2]}/{i % 3}/{i}.png', png(i))


def make_parquet(path):
    for shard in range(2):
        images = [{'bytes': png(6 * shard + i), 'path': None} for i in range(6)]
        table = pa.table({'image': images, 'label': [i % 2 for i in range(6)]})
        write(path / f'train-{shard:05d}-of-00002.parquet')
        pq.write_table(table, path / f'train-{shard:05d}-of-00002.parquet', row_group_size=2)
    write(path / 'classes.txt', b'owl\nyak\n')


def make_records(path):
    module = pytest.importorskip('array_record.python.array_record_module')
    path.mkdir(parents=True, exist_ok=True)
    for shard in range(2):
        file = path / f'train.array_record-{shard:05d}-of-00002'
        writer = module.ArrayRecordWriter(str(file), 'group_size:1')
        for i in range(6):
            writer.write(msgpack.packb(dict(image=png(6 * shard + i), label=i % 2)))
        writer.close()
    write(path / 'classes.txt', b'owl\nyak\n')


def make_tar(path):
    path.mkdir(parents=True, exist_ok=True)
    for shard in range(2):
        with tarfile.open(path / f'train-{shard:05d}.tar', 'w') as archive:
            for i in range(6 * shard, 6 * shard + 6):
                for name, data in ((f'{i:03d}.png', png(i)), (f'{i:03d}.cls', b'01'[i % 2 :][:1])):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    write(path / 'classes.txt', b'owl\nyak\n')


MAKE = {
    'folder': make_folder,
    'parquet': make_parquet,
    'array_record': make_records,
    'tar': make_tar,
}


@pytest.fixture(autouse=True)
def caches_of_this_test(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))


@pytest.fixture
def folder(bucket, tmp_path):
    """Twelve images in two classes in the bucket, and the local copy."""
    make_folder(tmp_path / 'copy')
    upload(tmp_path / 'copy', bucket.root)
    bucket.requests()
    return tmp_path / 'copy'


def batches(source, count=3, **options):
    with stream_lib.train_stream(source, VIEWS, batch_size=8, seed=1, **options) as stream:
        return [next(stream) for _ in range(count)]


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert sorted(x) == sorted(y)
        for key in x:
            np.testing.assert_array_equal(x[key], y[key])


# What a bucket holds is what its copy on a disk holds.


@pytest.mark.parametrize('kind', MAKE)
def test_the_batches_are_those_of_a_local_copy(kind, bucket, tmp_path):
    MAKE[kind](tmp_path / 'copy')
    upload(tmp_path / 'copy', bucket.root)
    here, there = sources.open_source(str(tmp_path / 'copy')), sources.open_source(bucket.root)
    assert type(there).__name__.lower().replace('arrayr', 'array_r') == kind
    assert (len(there), there.classes, there.notes) == (12, here.classes, here.notes)
    assert [there[i] for i in range(12)] == [here[i] for i in range(12)]
    assert_same(batches(here), batches(there))
    assert_same(batches(here), batches(pickle.loads(pickle.dumps(there))))
    with stream_lib.eval_stream(here, 8, 5) as a, stream_lib.eval_stream(there, 8, 5) as b:
        assert_same(list(a), list(b))
    assert sources.typical_size(there) == (12, 12)


@pytest.mark.parametrize('kind', MAKE)
def test_a_copy_has_the_same_content_and_a_changed_object_another_fingerprint(
    kind, bucket, tmp_path
):
    MAKE[kind](tmp_path / 'copy')
    upload(tmp_path / 'copy', bucket.root)
    before = sources.open_source(bucket.root).fingerprint
    assert sources.open_source(bucket.root).fingerprint == before
    local = sources.open_source(str(tmp_path / 'copy')).fingerprint
    assert fingerprint.content(local) == fingerprint.content(before)
    last = sorted(
        o.name for o in bucket_lib.walk(bucket.root) if not o.name.endswith(('.txt', '.index'))
    )[-1]
    data = bucket_lib.read(f'{bucket.root}/{last}')
    bucket_lib.write(f'{bucket.root}/{last}', data)  # the same, written anew
    again = sources.open_source(bucket.root).fingerprint
    assert again != before and fingerprint.content(again) == fingerprint.content(before)


def test_a_folder_costs_one_listing_and_the_beginnings(bucket, folder):
    source = sources.open_source(bucket.root)
    assert bucket.requests() == {'GET list': 1, 'GET media': 12}
    assert source[0] and source[11] and bucket.requests() == {'GET media': 2}


def test_of_many_images_only_some_beginnings_are_read(bucket, folder, monkeypatch):
    monkeypatch.setattr(fingerprint, 'SAMPLE', 5)
    sources.open_source(bucket.root)
    assert bucket.requests() == {'GET list': 1, 'GET media': 5}


def test_a_listing_of_several_pages_is_complete(bucket, folder, monkeypatch):
    monkeypatch.setattr(bucket_lib, 'PAGE', 5)
    names, _ = files.walk(bucket.root, files.is_image)
    assert names == files.walk(str(folder), files.is_image)[0] and len(names) == 12


ODD = (
    'a b.png',
    'a#1.png',
    'a?b=c.png',
    'ä.png',
    '100%25.png',
    'a%20b.png',
    'x[1].png',
    'a+b&c.png',
)


def test_names_of_any_characters_are_read(bucket, tmp_path):
    for i, name in enumerate((*ODD, *(f'{name} d/e.png' for name in ODD))):
        write(tmp_path / 'copy' / name, png(i))
    upload(tmp_path / 'copy', bucket.root)
    here, there = sources.open_source(str(tmp_path / 'copy')), sources.open_source(bucket.root)
    assert fingerprint.content(here.fingerprint) == fingerprint.content(there.fingerprint)
    for i in range(2 * len(ODD)):
        assert there[i] == here[i]
        assert there.describe(i) == here.describe(i).replace(str(tmp_path / 'copy'), bucket.root)
    inside = sources.open_source(f'{bucket.root}/x[1].png d')
    assert len(inside) == 1


def test_what_is_left_out_is_counted_as_on_a_disk(bucket, tmp_path):
    for name in (
        'a.png',
        'notes.txt',
        'x/b.json',
        '._a.png',
        '.git/c.png',
        '@eaDir/d.png',
        'x/none',
    ):
        write(tmp_path / 'copy' / name, png(0))
    upload(tmp_path / 'copy', bucket.root)
    here, there = sources.open_source(str(tmp_path / 'copy')), sources.open_source(bucket.root)
    assert len(there) == 1 and there.ignored == here.ignored == 6
    said = here.notes[0].replace(
        'though an image by its first bytes: add the extension (x/none)', ''
    )
    assert there.notes[0].split('without')[0] == said.split('without')[0]


def test_markers_of_folders_and_empty_names_are_no_images(bucket, folder, monkeypatch):
    items = bucket_lib._gs_items

    def more(root):
        prefix = root.removeprefix('gs://')
        return [*items(root), (f'{prefix}/b/', {}), (f'{prefix}/', {}), (f'{prefix}//x.png', {})]

    monkeypatch.setattr(bucket_lib, '_gs_items', more)
    source = sources.open_source(bucket.root)
    assert len(source) == 12 and source.notes == ('left out: 1 with // in the name (/x.png)',)


def test_splits_are_chosen_and_index_maps_found_as_on_a_disk(bucket, tmp_path):
    for i, name in enumerate(('train/a/1.png', 'train/b/2.png', 'val/a/3.png', 'val/b/4.png')):
        write(tmp_path / 'copy/images' / name, png(i))
        index = io.BytesIO()
        PIL.Image.fromarray(np.full((12, 12), i, np.uint8)).save(index, 'PNG')
        write(tmp_path / 'copy/maps' / name, index.getvalue())
    upload(tmp_path / 'copy', bucket.root)
    for root in (str(tmp_path / 'copy'), bucket.root):
        source = sources.open_source(f'{root}/images')
        assert len(source) == 2 and 'uses 2 of train; leaves 2 of val' in source.notes[0]
        assert len(sources.open_source(f'{root}/images', 'all')) == 4
        spec = dict(source='folder', path=f'{root}/images', split='val')
        source = sources.open_source(dict(spec, segmentation=f'{root}/maps'))
        assert source.classes == ('a', 'b') and source[1]['segmentation'].max() == 3
    with pytest.raises(FileNotFoundError, match="does not exist in gs://.*did you mean 'maps'?"):
        sources.open_source(dict(spec, segmentation=f'{root}/map'))


def test_pairs_are_found_as_on_a_disk(bucket, tmp_path):
    index = io.BytesIO()
    PIL.Image.fromarray(np.full((12, 12), 3, np.uint8)).save(index, 'PNG')
    for split, name in (('train', 'a'), ('val', 'b')):
        write(tmp_path / f'copy/images/{split}/{name}.png', png(1))
        write(tmp_path / f'copy/labels/{split}/{name}.png', index.getvalue())
    write(tmp_path / 'copy/classes.txt', b'one\ntwo\nthree\nfour\n')
    upload(tmp_path / 'copy', bucket.root)
    found = [sources.open_source(root) for root in (str(tmp_path / 'copy'), bucket.root)]
    for source in found:
        assert len(source) == 1 and source[0]['segmentation'].max() == 3
        assert source.map_classes == ('one', 'two', 'three', 'four')
    one, two = (source.fingerprint.partition('+')[0] for source in found)
    assert one == two


@pytest.mark.parametrize(
    'pattern, count',
    [
        ('*.parquet', 12),
        ('train-00001-of-*.parquet', 6),
        ('train-00000-of-00002.parquet', 6),
        ('more/**/*.parquet', 6),
        ('[mn]ore/deep/?.parquet', 6),
    ],
)
def test_files_and_globs_are_found_as_on_a_disk(pattern, count, bucket, tmp_path):
    make_parquet(tmp_path / 'copy')
    (tmp_path / 'copy/more/deep').mkdir(parents=True)
    (tmp_path / 'copy/more/.hidden').mkdir()
    for name in ('more/deep/x.parquet', 'more/.hidden/y.parquet'):
        shutil.copy(tmp_path / 'copy/train-00000-of-00002.parquet', tmp_path / 'copy' / name)
    upload(tmp_path / 'copy', bucket.root)
    here = sources.open_source(f'{tmp_path / "copy"}/{pattern}')
    there = sources.open_source(f'{bucket.root}/{pattern}')
    assert len(here) == len(there) == count
    assert fingerprint.content(here.fingerprint) == fingerprint.content(there.fingerprint)


def test_what_lies_topmost_decides_what_a_folder_holds(bucket, tmp_path):
    make_parquet(tmp_path / 'shards/archive/data')
    write(tmp_path / 'shards/.cache/a.png', png(0))
    write(tmp_path / 'pictures/a/1.png', png(1))
    pq.write_table(pa.table({'text': ['a']}), tmp_path / 'pictures/about.parquet')
    upload(tmp_path / 'shards', f'{bucket.root}/shards')
    upload(tmp_path / 'pictures', f'{bucket.root}/pictures')
    assert isinstance(sources.open_source(f'{bucket.root}/shards'), parquet.Parquet)
    assert len(sources.open_source(f'{bucket.root}/pictures')) == 1


@pytest.mark.parametrize(
    'name, spec',
    [
        ('a near name', {'path': '{root}/folde'}),
        ('a near name below', {'path': '{root}/folder/c'}),
        ('nothing near', {'path': '{root}/no/such/thing'}),
        ('a file that is no image', {'path': '{root}/notes.txt'}),
        ('nothing but other files', {'path': '{root}/text'}),
        ('no such split', {'source': 'folder', 'path': '{root}/folder', 'split': 'valid'}),
        ('no such file', {'path': '{root}/parquet/nain.parquet'}),
        ('no match', {'path': '{root}/parquet/x*.parquet'}),
        ('no such split of shards', {'path': '{root}/parquet', 'split': 'val'}),
        ('not of that kind', {'source': 'parquet', 'path': '{root}/folder'}),
        ('no records', {'source': 'array_record', 'path': '{root}/folder'}),
        ('damaged', {'path': '{root}/bad.parquet'}),
        ('damaged records', {'path': '{root}/bad.array_record'}),
    ],
)
def test_mistakes_are_told_as_on_a_disk(name, spec, bucket, tmp_path):
    make_folder(tmp_path / 'folder')
    make_parquet(tmp_path / 'parquet')
    for file in ('notes.txt', 'text/a.txt', 'bad.parquet', 'bad.array_record'):
        write(tmp_path / file, b'PAR1 and no more')
    upload(tmp_path, bucket.root)
    said = []
    for root in (str(tmp_path), bucket.root):
        with pytest.raises((errors.UserError, FileNotFoundError)) as caught:
            sources.open_source({k: v.format(root=root) for k, v in spec.items()})
        said.append((caught.type, str(caught.value).replace(root, 'ROOT')))
    assert said[0] == said[1] and '\n' not in said[1][1] and 'ROOT' in said[1][1]


def test_an_absent_bucket_is_named(bucket):
    for path in ('gs://nowhere/images', 'gs://nowhere/a.parquet', 'gs://nowhere/*.array_record'):
        with pytest.raises(errors.UserError, match="there is no bucket 'nowhere'"):
            sources.open_source(path)


def test_array_records_on_s3_are_refused(monkeypatch):
    monkeypatch.setattr(files, 'exists', lambda path: True)
    monkeypatch.setattr(files, 'is_folder', lambda path: False)
    monkeypatch.setattr(files, 'is_file', lambda path: True)
    with pytest.raises(errors.UserError, match='not from s3://: copy them'):
        sources.open_source('s3://bucket/a.array_record')


# Parquet: a copy on the disk.


def test_row_groups_of_parquet_are_read_when_needed_and_kept(bucket, tmp_path):
    make_parquet(tmp_path / 'copy')
    upload(tmp_path / 'copy', bucket.root)
    here = sources.open_source(str(tmp_path / 'copy'))
    spec = dict(path=bucket.root, cache_dir=str(tmp_path / 'cache'))
    source = sources.open_source(spec)
    bucket.requests()
    assert source[0] == here[0] and source[1] == here[1]  # two rows of one group
    assert bucket.requests()['GET media'] <= 2
    assert [source[i] for i in range(12)] == [here[i] for i in range(12)]
    bucket.requests()
    again = sources.open_source(spec)
    # The beginnings, footers and labels of two files, and classes.txt.
    assert bucket.requests()['GET media'] <= 16
    bucket.requests()
    assert [again[i] for i in range(12)] == [here[i] for i in range(12)]
    assert not bucket.requests()


def test_a_cache_of_parquet_keeps_to_its_limit_and_says_so(bucket, tmp_path):
    make_parquet(tmp_path / 'copy')
    upload(tmp_path / 'copy', bucket.root)
    here = sources.open_source(str(tmp_path / 'copy'))
    spec = dict(path=bucket.root, cache_dir=str(tmp_path / 'cache'), cache_gb=4e-6)
    source = sources.open_source(spec)
    assert '(cache_gb)' in ' '.join(source.notes) and 'pack them as tar' in ' '.join(source.notes)
    for _ in range(2):
        assert [source[i] for i in range(12)] == [here[i] for i in range(12)]
    sizes = {p.suffix: p.stat().st_size for p in (tmp_path / 'cache').iterdir()}
    assert 0 < sizes['.bytes'] <= 4000


@pytest.mark.parametrize('kind', ['folder', 'tar', 'array_record'])
def test_images_are_kept_on_the_disk_up_to_a_limit_if_asked(kind, bucket, tmp_path):
    MAKE[kind](tmp_path / 'copy')
    upload(tmp_path / 'copy', bucket.root)
    plain = sources.open_source(bucket.root)
    spec = dict(path=bucket.root, cache_dir=str(tmp_path / 'cache'), cache_gb=3e-6)
    source = sources.open_source(spec)
    assert source.fingerprint == plain.fingerprint and source.classes == plain.classes
    assert_same(batches(source), batches(plain))
    bucket.requests()
    again = pickle.loads(pickle.dumps(sources.open_source(spec)))
    bucket.requests()
    assert [again[i] for i in range(12)] == [plain[i] for i in range(12)]
    assert 12 < bucket.requests()['GET media'] < 24  # some came from the disk, some did not
    kept = tmp_path / 'cache' / f'{plain.fingerprint}.bytes'
    assert 1000 < kept.stat().st_size <= 3000


def test_images_beside_parquet_and_in_another_bucket_are_read(bucket, folder, tmp_path):
    paths = ['a/0/0.png', f'{bucket.root}/b/1/1.png']
    pq.write_table(pa.table({'file_name': paths}), folder / 'list.parquet')
    upload(folder, bucket.root)
    there = sources.open_source(f'{bucket.root}/list.parquet')
    assert there.remote and [there[i]['image'] for i in range(2)] == [png(0), png(1)]
    here = sources.open_source(f'{folder}/list.parquet')
    assert [here[i]['image'] for i in range(2)] == [png(0), png(1)]


# Outages.


@pytest.mark.parametrize('rules', [{'status': 503}, {'status': 429}, {'drop': 1}, {'hang': 1}])
@pytest.mark.parametrize('kind', ['folder', 'array_record', 'tar'])
def test_a_batch_waits_out_an_outage_and_counts_no_image_as_bad(
    kind, rules, bucket, tmp_path, monkeypatch
):
    MAKE[kind](tmp_path / 'copy')
    upload(tmp_path / 'copy', bucket.root)
    source = sources.open_source(bucket.root)
    bucket.fault(match=r'alt=media|/bucket/', **rules)
    # Longer than the stream itself reads again after an OSError, in one of the cases.
    timer = threading.Timer(3 if (kind, rules) == ('folder', {'status': 503}) else 0.7, bucket.heal)
    timer.start()
    found = batches(source, 2)
    assert_same(found, batches(sources.open_source(str(tmp_path / 'copy')), 2))
    timer.join()


@pytest.mark.parametrize(
    'rules, reason', [({'status': 503}, '503'), ({'status': 403}, '403'), ({'hang': 1}, 'answer')]
)
def test_a_long_outage_ends_the_run_with_a_sentence(
    rules, reason, bucket, folder, tmp_path, monkeypatch
):
    source = sources.open_source(bucket.root)
    monkeypatch.setenv('SSL_JAX_BUCKET_PATIENCE', '0.3')
    bucket.fault(**rules)
    calls = [lambda: batches(source)]
    if 'hang' not in rules:  # gcsfs waits for two minutes, whatever the patience
        calls.append(lambda: sources.open_source(bucket.root))
    for call in calls:
        with pytest.raises(errors.UserError, match=reason) as caught:
            call()
        assert '\n' not in str(caught.value) and 'gs://bucket' in str(caught.value)
    bad = stream_lib.BadImages(source, tmp_path / 'bad.jsonl', 1.0)
    with pytest.raises(errors.UserError):
        bad.update({'bad': np.array([[3, -1]])})
    assert not (tmp_path / 'bad.jsonl').exists()


def test_an_outage_while_parquet_is_read_is_a_sentence(bucket, tmp_path, monkeypatch):
    make_parquet(tmp_path / 'copy')
    upload(tmp_path / 'copy', bucket.root)
    monkeypatch.setenv('SSL_JAX_BUCKET_PATIENCE', '0.2')
    bucket.fault(status=503, match='alt=media')
    with pytest.raises(errors.UserError, match='does not answer') as caught:
        sources.open_source(bucket.root)
    assert '\n' not in str(caught.value)
    bucket.heal()
    assert len(batches(sources.open_source(bucket.root))) == 3  # nothing half-written is used


def test_tar_shards_cost_an_index_once_and_then_a_request_per_image(bucket, tmp_path):
    make_tar(tmp_path / 'copy')
    upload(tmp_path / 'copy', bucket.root)
    sources.open_source(bucket.root)
    bucket.requests()
    source = sources.open_source(bucket.root)  # as the next host does, and the next start
    asked = bucket.requests()
    # Two indexes, two beginnings for the fingerprint, the class names; no header of a member.
    assert asked['GET list'] == 1 and asked['GET media'] <= 5 and not asked['POST upload']
    assert source[0] and source[11] and bucket.requests() == {'GET media': 2}


def test_tar_shards_of_somebody_else_are_indexed_in_the_cache(bucket, tmp_path):
    make_tar(tmp_path / 'copy')
    upload(tmp_path / 'copy', bucket.root)
    bucket.fault(status=403, methods='POST,PUT')
    spec = dict(path=bucket.root, cache_dir=str(tmp_path / 'cache'))
    assert len(sources.open_source(spec)) == 12 and len(os.listdir(tmp_path / 'cache')) == 2
    bucket.heal()
    assert not [o.name for o in bucket_lib.walk(bucket.root) if o.name.endswith('.index')]
    bucket.requests()
    assert len(sources.open_source(spec)) == 12 and not bucket.requests()['POST upload']


def test_a_tar_shard_written_anew_while_it_is_read_ends_with_a_sentence(bucket, tmp_path):
    make_tar(tmp_path / 'copy')
    upload(tmp_path / 'copy', bucket.root)
    source = sources.open_source(bucket.root)
    bucket_lib.write(
        f'{bucket.root}/train-00000.tar', (tmp_path / 'copy/train-00000.tar').read_bytes()
    )
    with pytest.raises(errors.UserError, match='train-00000.tar was written anew'):
        source[0]
    assert source[11]['image'] == png(11)


def test_a_deleted_image_is_a_bad_one(bucket, folder, tmp_path):
    source = sources.open_source(bucket.root)
    bucket_lib.remove(source.describe(4))
    bad = stream_lib.BadImages(source, tmp_path / 'bad.jsonl', 0.5)
    for batch in batches(source):
        bad.update(batch)
    assert bad.count == 1 and 'does not exist' in (tmp_path / 'bad.jsonl').read_text()


def test_one_line_is_said_however_many_threads_wait(bucket, folder, capfd, monkeypatch):
    monkeypatch.setenv('SSL_JAX_BUCKET_PATIENCE', '2')
    monkeypatch.setattr(patience, '_last', -math.inf)
    source = sources.open_source(bucket.root)
    bucket.fault(status=503)
    threading.Timer(1.7, bucket.heal).start()
    batches(source, num_threads=16)
    assert capfd.readouterr().err.count('trying again') == 1


@pytest.mark.parametrize('kind', ['folder', 'array_record', 'tar'])
def test_a_stream_that_waits_for_a_bucket_is_closed_at_once(kind, bucket, tmp_path):
    MAKE[kind](tmp_path / 'copy')
    upload(tmp_path / 'copy', bucket.root)
    stream = stream_lib.train_stream(sources.open_source(bucket.root), VIEWS, batch_size=8, seed=1)
    bucket.fault(hang=1)
    threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    start = time.monotonic()
    stream.close()
    assert time.monotonic() - start < loader.CLOSE_SECONDS + 1


def test_a_listing_that_hangs_can_be_interrupted(bucket, folder):
    bucket.fault(hang=1)
    threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        sources.open_source(bucket.root)
    bucket.heal()
    bucket.fault(hang=1, match='alt=media')
    threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()
    with pytest.raises(KeyboardInterrupt):
        sources.open_source(bucket.root)


# Threads, processes, runs.


def test_more_threads_than_cores_wait_for_a_bucket(bucket, folder, monkeypatch):
    monkeypatch.setattr(launch, 'cores', lambda: 3)
    with stream_lib.train_stream(
        sources.open_source(bucket.root), VIEWS, batch_size=8, seed=1
    ) as s:
        next(s)
        names = {t.name for t in threading.enumerate() if t.name.startswith('ssl_jax-loader')}
    assert len(names) == 12


def test_worker_processes_read_the_same(bucket, folder):
    source = sources.open_source(bucket.root)
    source[0]  # clients of this process must not get in their way
    assert_same(batches(source, 2), batches(source, 2, num_workers=1))


@pytest.mark.slow
def test_runs_evaluations_and_features_take_images_in_a_bucket(bucket, folder, tmp_path):
    images = {'path': bucket.root}
    config = tiny.config(
        data__train=images,
        data__eval_train=images,
        data__eval_test=images,
        eval__tasks__knn={'ks': (1,)},
        batch_size=8,
        total_steps=2,
        warmup_steps=1,
    )
    result = train.train(config, str(tmp_path / 'run'))
    assert result['step'] == 2 and result['knn/cls/1'] >= 0
    assert feature_file.extract(str(tmp_path / 'run'), bucket.root, str(tmp_path / 'f.npz')) == 12


def test_sigterm_ends_a_run_whose_images_do_not_come(bucket, folder, tmp_path):
    config = tiny.config(data__train={'path': bucket.root}, batch_size=8, total_steps=10**6)

    def stall():
        while not (tmp_path / 'run/metrics.jsonl').exists():
            time.sleep(0.05)
        bucket.fault(hang=1)
        time.sleep(1)
        times.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGTERM)

    times = []
    threading.Thread(target=stall, daemon=True).start()
    result = train.train(config, str(tmp_path / 'run'))
    assert result['preempted'] and time.monotonic() - times[0] < 10


def test_a_data_set_of_tfds_is_read_in_a_bucket(bucket, tfds_dir):
    upload(tfds_dir, bucket.root)
    here, there = (
        sources.open_source(dict(source='tfds', name='tiny_plates', path=root))
        for root in (tfds_dir, bucket.root)
    )
    assert there.remote and len(there) == 6
    assert [there[i] for i in range(6)] == [here[i] for i in range(6)]
    with pytest.raises(errors.UserError, match="did you mean 'tiny_plates'"):
        sources.open_source(dict(source='tfds', name='tiny_plate', path=bucket.root))
