# SPDX-License-Identifier: Apache-2.0
"""`ssl_jax data curate` finds what was planted, says what it did, and continues after a kill."""

import os

import jax
import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest

import frozen
import planted
import processes
from ssl_jax import cli, sharding
from ssl_jax.curate import command, output, search, steps
from ssl_jax.data import host, manifest, sources
from ssl_jax.run import errors


def read(path):
    return pq.read_table(path).to_pydict()


def curate(pool, out, **options):
    return command.curate(str(pool), str(out), **options)


@pytest.fixture
def cifar(data_dir):
    """500 encoded images of CIFAR-10."""
    table = pq.read_table(data_dir / 'cifar10' / 'train.parquet').slice(0, 500)
    return [row['bytes'] for row in table['image'].to_pylist()]


@pytest.fixture(autouse=True)
def pictures(monkeypatch):
    """Draws the pictures, which take most of the time and are left out."""
    draw = output.draw
    monkeypatch.setattr(output, 'draw', lambda work, state: None)
    return draw


def decoded(images):
    return [host.decode(data) for data in images]


@pytest.mark.parametrize(
    ('plant', 'threshold', 'recall', 'precision'),
    [
        (planted.recompressed, 0.98, 1.0, 1.0),
        (planted.resized, 0.98, 1.0, 1.0),
        (planted.cropped, 0.93, 0.65, 0.85),
    ],
)
def test_planted_copies_are_found(plant, threshold, recall, precision, cifar, tmp_path):
    """500 images of CIFAR-10 as 8 x 8 pixels, and copies of 150 of them."""
    rng = np.random.default_rng(0)
    of = rng.choice(len(cifar), 150, replace=False)
    copies = [plant(image, rng) for image in decoded([cifar[i] for i in of])]
    images = cifar + copies
    pool = planted.write_set(tmp_path / 'pool.parquet', images)
    vectors = planted.write_vectors(tmp_path / 'x.parquet', planted.pixels(images))
    words = ['embed.centre=True', f'dedup.threshold={threshold}', 'dedup.keep=first']
    path = curate(pool, tmp_path / 'out', embeddings=[vectors], words=words)
    kept, dropped = read(path), read(tmp_path / 'out' / 'dropped.parquet')
    assert sorted(kept['index'] + dropped['index']) == list(range(650))
    assert sum(kept['copies']) == 650 and set(dropped['stage']) <= {'dedup'}
    gone = np.array(dropped['index'])
    right = {f'{pool} row {of[i - 500]}' for i in gone[gone >= 500]}
    found = (gone >= 500).sum() / 150
    assert found >= recall and (gone >= 500).mean() >= precision, (found, (gone >= 500).mean())
    assert len(right & set(dropped['like'])) >= recall * 150
    text = (tmp_path / 'out' / 'report.txt').read_text()
    assert f'{len(kept["index"]):,}' in text and f'cosine above {threshold}' in text
    assert len(sources.open_source(path)) == len(kept['index'])
    about = manifest.about(path)
    assert about['sets'] == {'pool': {'path': pool}} and about['stages'][1][0] == 'dedup'
    assert about['settings']['dedup']['threshold'] == threshold


def test_of_copies_the_one_with_most_pixels_is_kept(cifar, tmp_path):
    images = decoded(cifar[:40])
    double = [planted.encoded(x.repeat(2, axis=0).repeat(2, axis=1)) for x in images[:10]]
    everything = cifar[:40] + double
    pool = planted.write_set(tmp_path / 'pool.parquet', everything)
    vectors = planted.write_vectors(tmp_path / 'x.parquet', planted.pixels(everything))
    words = ['embed.centre=True', 'dedup.threshold=0.98']
    path = curate(pool, tmp_path / 'm.parquet', embeddings=[vectors], words=words)
    kept = read(path)
    assert kept['index'] == list(range(10, 50)) and kept['copies'] == [1] * 30 + [2] * 10


def test_mirrored_copies_are_found_if_asked_for(cifar, tmp_path):
    rng = np.random.default_rng(0)
    images = cifar[:30] + [planted.mirrored(x, rng) for x in decoded(cifar[:6])]
    pool = planted.write_set(tmp_path / 'pool.parquet', images)
    model, options = frozen.untrained(depth=1), ['dedup.threshold=0.99999', 'embed.feature=patch']
    plain = read(curate(pool, tmp_path / 'plain', model=model, words=options))['index']
    words = [*options, 'dedup.mirrored=True']
    found = read(curate(pool, tmp_path / 'mirrored', model=model, words=words))['index']
    assert plain == list(range(36)) and found == list(range(30))


def test_images_of_evaluations_are_kept_out_with_all_that_is_joined_to_them(cifar, tmp_path):
    """60 of 200 images of an evaluation set are in the pool, recompressed."""
    rng = np.random.default_rng(1)
    tests = cifar[200:400]
    copies = [planted.recompressed(x, rng) for x in decoded(tests[:60])]
    images = cifar[:200] + copies
    pool = planted.write_set(tmp_path / 'pool.parquet', images)
    other = planted.write_set(tmp_path / 'test.parquet', tests)
    another = planted.write_set(tmp_path / 'more.parquet', cifar[400:410])
    x = planted.pixels(cifar[:200] + copies + tests + cifar[400:410])
    files = [
        planted.write_vectors(tmp_path / f'{k}.parquet', part)
        for k, part in zip('abc', np.split(x, [260, 460]), strict=True)
    ]
    words = ['embed.centre=True', 'dedup.threshold=0.98', 'against.threshold=0.98']
    path = curate(pool, tmp_path / 'o', against=[other, another], embeddings=files, words=words)
    kept, dropped = read(path), read(tmp_path / 'o' / 'dropped.parquet')
    assert kept['index'] == list(range(200)) and dropped['stage'] == ['against'] * 60
    assert dropped['like'] == [f'{other} row {i}' for i in range(60)]
    assert dropped['like_set'] == ['against0'] * 60 and min(dropped['similarity']) > 0.98


def chain(steps, width=24):
    """Unit vectors, each `cosine` to the next."""
    angle = np.arccos(0.9)
    x = np.zeros((steps, width))
    for i in range(steps):
        x[i, :2] = np.cos(i * angle), np.sin(i * angle)
    return x


def test_what_is_joined_to_an_evaluation_through_others_goes_unless_switched_off(tmp_path):
    images = [planted.encoded(np.full((4, 4, 3), i, np.uint8)) for i in range(8)]
    pool = planted.write_set(tmp_path / 'pool.parquet', images)
    tests = planted.write_set(tmp_path / 'test.parquet', images[:1])
    x = np.concatenate([chain(4), np.eye(24)[10:14]])
    files = [planted.write_vectors(tmp_path / 'p.parquet', x)]
    files += [planted.write_vectors(tmp_path / 't.parquet', chain(1))]
    options = dict(against=[tests], embeddings=files)
    words = ['dedup.threshold=None', 'against.threshold=0.85']
    joined = read(curate(pool, tmp_path / 'a', words=words, **options))['index']
    words += ['against.components=False']
    alone = read(curate(pool, tmp_path / 'b', words=words, **options))['index']
    assert joined == [4, 5, 6, 7] and alone == [2, 3, 4, 5, 6, 7]


def test_planted_neighbours_are_retrieved(cifar, tmp_path):
    """Queries are edited versions of 50 of 400 images."""
    rng = np.random.default_rng(2)
    of = np.sort(rng.choice(400, 50, replace=False))
    asked = [planted.cropped(x, rng) for x in decoded([cifar[i] for i in of])]
    pool = planted.write_set(tmp_path / 'pool.parquet', cifar[:400])
    queries = planted.write_set(tmp_path / 'query.parquet', asked)
    files = [
        planted.write_vectors(tmp_path / 'p.parquet', planted.pixels(cifar[:400])),
        planted.write_vectors(tmp_path / 'q.parquet', planted.pixels(asked)),
    ]
    words = ['embed.centre=True', 'dedup.threshold=None', 'retrieve.by=sample']
    words += ['retrieve.nearest=1']
    path = curate(pool, tmp_path / 'o', queries=[queries], embeddings=files, words=words)
    kept = read(path)
    assert len(kept['index']) <= 50 and np.isin(of, kept['index']).mean() >= 0.96
    row = {index: query for index, query in zip(kept['index'], kept['query'], strict=True)}
    right = [row.get(i) == f'{queries} row {k}' for k, i in enumerate(of)]
    assert np.mean(right) >= 0.96 and set(kept['query_set']) == {'query0'}


@pytest.fixture
def blobs(tmp_path):
    """400 images of four things, 280 of the first; ten queries of the second and third."""
    rng = np.random.default_rng(0)
    truth = np.repeat(np.arange(4), [280, 60, 40, 20])
    centres = np.eye(4, 16)
    x = centres[truth] + 0.02 * rng.normal(size=(400, 16))
    q = centres[[1] * 6 + [2] * 4] + 0.02 * rng.normal(size=(10, 16))
    images = [planted.encoded(np.full((4, 4, 3), 60 * k, np.uint8)) for k in truth]
    return dict(
        truth=truth,
        pool=planted.write_set(tmp_path / 'pool.parquet', images),
        query=planted.write_set(tmp_path / 'query.parquet', images[:10]),
        files=[
            planted.write_vectors(tmp_path / 'p.parquet', x),
            planted.write_vectors(tmp_path / 'q.parquet', q),
        ],
    )


def test_clusters_with_queries_are_retrieved_whole(blobs, tmp_path):
    words = ['dedup.threshold=None', 'retrieve.clusters=4', 'retrieve.per_cluster=50']
    options = dict(queries=[blobs['query']], embeddings=blobs['files'], words=words)
    kept = read(curate(blobs['pool'], tmp_path / 'o', **options))
    assert np.bincount(blobs['truth'][kept['index']]).tolist() == [0, 50, 40]
    assert len(set(kept['cluster'])) == 2
    words = [*words, 'retrieve.min_queries=7']
    with pytest.raises(errors.UserError, match='lower retrieve.min_queries'):
        curate(blobs['pool'], tmp_path / 'o', **{**options, 'words': words})


BALANCE = ['dedup.threshold=None', 'balance.target=60', 'balance.clusters=(20,4)']


def test_a_balanced_manifest_has_as_many_of_rare_things(blobs, tmp_path):
    files = blobs['files'][:1]
    path = curate(blobs['pool'], tmp_path / 'o', embeddings=files, words=BALANCE)
    kept = read(path)
    assert np.bincount(blobs['truth'][kept['index']]).tolist() == [15] * 4
    one = sharding.make_mesh(devices=jax.devices()[:1])
    other = curate(blobs['pool'], tmp_path / 'one', embeddings=files, words=BALANCE, mesh=one)
    assert read(other) == kept  # eight devices above


def test_the_pictures_show_pairs_clusters_and_what_was_dropped(
    pictures, blobs, tmp_path, monkeypatch
):
    monkeypatch.setattr(output, 'draw', pictures)
    everything(blobs, tmp_path / 'o')
    found = {p.stem: np.asarray(PIL.Image.open(p)) for p in (tmp_path / 'o/pictures').iterdir()}
    assert set(found) == {'pairs', 'against', 'similarities', 'clusters', 'dropped'}
    greys = {60 * k for k in range(4)}
    for name in ('pairs', 'clusters', 'dropped'):
        plain = found[name][..., :3]
        assert any((plain == grey).all(axis=2).sum() > 100**2 for grey in greys), name


# Continuing.

ALL = ['dedup.threshold=0.9985', 'against.threshold=0.999', 'balance.target=30']
ALL += ['balance.clusters=(20,4)', 'retrieve.by=sample', 'retrieve.nearest=12']


def everything(blobs, out, words=ALL):
    query, (x, q) = blobs['query'], blobs['files']
    sets = dict(queries=[query], against=[query], embeddings=[x, q, q])
    return curate(blobs['pool'], out, words=words, **sets)


@pytest.mark.parametrize('step', [step.__name__ for step in command.STEPS[1:]])
def test_a_curation_that_was_killed_before_a_stage_continues_there(
    step, blobs, tmp_path, monkeypatch, capsys
):
    whole = everything(blobs, tmp_path / 'whole')

    def killed(work, state):
        raise KeyboardInterrupt

    at = [s.__name__ for s in command.STEPS].index(step)
    with monkeypatch.context() as patch:
        patch.setattr(command, 'STEPS', (*command.STEPS[:at], killed))
        with pytest.raises(KeyboardInterrupt):
            everything(blobs, tmp_path / 'killed')
    assert not (tmp_path / 'killed' / 'manifest.parquet').exists()
    capsys.readouterr()
    path = everything(blobs, tmp_path / 'killed')
    log = capsys.readouterr().out
    stages = ['neighbours', 'dedup', 'against', 'query0', 'tree']
    assert [s for s in stages if f'{s:<12} as before' in log] == stages[:at]
    assert read(path) == read(whole)


KILLED = """
    import os, signal
    from ssl_jax.curate import command, output, search, stages
    search.PART, left, real = 64, [3], stages.write
    output.draw = lambda work, state: None

    def write(path, **arrays):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        real(path, **arrays)

    stages.write = write
    command.curate({pool!r}, {out!r}, queries=[{query!r}], against=[{query!r}],
        embeddings={files!r}, words={words!r})
"""


@pytest.mark.slow
def test_a_process_that_is_killed_after_every_third_write_comes_to_the_same_manifest(
    blobs, tmp_path
):
    whole, (x, q) = everything(blobs, tmp_path / 'whole'), blobs['files']
    code = KILLED.format(
        pool=blobs['pool'], query=blobs['query'], files=[x, q, q], words=ALL,
        out=str(tmp_path / 'killed'),
    )  # fmt: skip
    codes = []
    while not codes or codes[-1]:
        codes.append(processes.finish(processes.start(code, devices=2))[0])
        assert len(codes) < 10
    assert codes == [-9] * 3 + [0] or codes == [-9] * 4 + [0], codes
    assert read(tmp_path / 'killed' / 'manifest.parquet') == read(whole)


def test_a_search_that_was_killed_goes_on_with_its_next_part(blobs, tmp_path, monkeypatch):
    monkeypatch.setattr(search, 'PART', 64)
    whole = everything(blobs, tmp_path / 'whole', ['dedup.threshold=0.999'])
    real, queries = search._merge, []

    def merge(block, first, n, q, *rest, **options):
        queries.append(len(q))
        if len(queries) == 4 and stop:
            raise KeyboardInterrupt
        return real(block, first, n, q, *rest, **options)

    monkeypatch.setattr(search, '_merge', merge)
    stop = True
    with pytest.raises(KeyboardInterrupt):
        everything(blobs, tmp_path / 'o', ['dedup.threshold=0.999'])
    stop = False
    queries.clear()
    path = everything(blobs, tmp_path / 'o', ['dedup.threshold=0.999'])
    assert len(queries) == (7 - 3) + 7  # of seven parts the rest; then the evaluation set
    assert read(path) == read(whole)
    assert not [name for name in os.listdir(tmp_path / 'o') if name.endswith('.parts')]


def test_a_higher_threshold_repeats_no_search(blobs, tmp_path, capsys):
    def run(*words):
        capsys.readouterr()
        curate(blobs['pool'], tmp_path / 'o', embeddings=blobs['files'][:1], words=words)
        return 'neighbours   as before' in capsys.readouterr().out

    assert not run('dedup.threshold=0.99') and run('dedup.threshold=0.999')
    assert not run('dedup.threshold=0.9') and run('dedup.threshold=0.99')
    assert not run('dedup.threshold=0.99', 'search.k=8')


# Sentences.


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['dedup.treshold=0.7'], "no setting 'dedup.treshold': did you mean 'threshold'"),
        (['dedupe.threshold=1'], "no stage 'dedupe': did you mean 'dedup'"),
        (['threshold'], 'is not STAGE.FIELD=VALUE'),
        (['dedup.threshold=2'], 'out of range'),
        (['dedup.mirrored=True'], 'give --model'),
        (['embed.feature=cls'], "no embeddings 'cls'"),
        (['balance.target=9', 'balance.clusters=(4,20)'], 'lowest level first'),
        (['dedup.threshold=None', 'against.threshold=-1'], 'No image of the pool is left'),
    ],
)
def test_mistakes_are_a_sentence(words, message, blobs, tmp_path):
    against = dict(against=[blobs['query']]) if 'against' in words[-1] else {}
    files = blobs['files'][: 1 + len(against)]
    with pytest.raises(errors.UserError, match=message):
        curate(blobs['pool'], tmp_path / 'o', embeddings=files, words=words, **against)


def test_embeddings_that_do_not_fit_are_a_sentence(blobs, tmp_path):
    def refused(message, files, **options):
        with pytest.raises(errors.UserError, match=message):
            curate(blobs['pool'], tmp_path / 'o', embeddings=files, **options)

    refused('1 files of embeddings for 2 sets', blobs['files'][:1], queries=[blobs['query']])
    refused('give --model, or --embeddings', [])
    wrong = planted.write_vectors(tmp_path / 'w.parquet', np.ones((401, 16)))
    refused('401 rows and the set 400 images', [wrong])
    wrong = planted.write_vectors(tmp_path / 'w.parquet', np.ones((0, 16)))
    refused('has no rows', [wrong])
    wrong = planted.write_vectors(tmp_path / 'w.parquet', np.full((400, 16), np.nan))
    refused('pool features have NaN', [wrong])
    wrong = planted.write_vectors(tmp_path / 'w.parquet', np.ones((10, 8)))
    refused('both must be of one model', [blobs['files'][0], wrong], queries=[blobs['query']])


def test_images_without_an_embedding_are_listed(blobs, tmp_path):
    x = np.random.default_rng(0).normal(size=(398, 8))
    ids = np.r_[0:5, 7:400]
    file = planted.write_vectors(tmp_path / 'w.parquet', x, id=ids)
    path = curate(blobs['pool'], tmp_path / 'o', embeddings=[file], words=['dedup.threshold=1'])
    assert read(path)['index'] == ids.tolist()
    dropped = read(tmp_path / 'o' / 'dropped.parquet')
    assert dropped['index'] == [5, 6] and dropped['stage'] == ['embedded'] * 2


def test_the_command_line_takes_sets_and_settings_in_any_order(blobs, tmp_path, capsys):
    x, q = blobs['files']
    words = ['--pool', blobs['pool'], '--embeddings', x, q, 'dedup.threshold=None']
    words += ['--query', blobs['query'], 'retrieve.by=sample', '--out', str(tmp_path / 'o')]
    cli.main(['data', 'curate', *words])
    out = capsys.readouterr().out
    assert 'retrieve' in out and f'--data {tmp_path}/o/manifest.parquet' in out
    kept = read(tmp_path / 'o' / 'manifest.parquet')['index']
    assert np.bincount(blobs['truth'][kept], minlength=4)[[0, 3]].tolist() == [0, 0]
    assert steps.MIRRORED not in out
