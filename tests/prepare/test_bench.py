# SPDX-License-Identifier: Apache-2.0
"""`ssl_jax data bench`: the stages are those of the stream, and the advice follows the largest."""

import numpy as np
import pytest

from folders import encode, image, write
from ssl_jax import cli
from ssl_jax.data import host, sources, stream
from ssl_jax.prepare import bench
from ssl_jax.run import errors

VIEWS = (host.View('global', 24, 2, (0.3, 1.0)), host.View('local', 12, 3, (0.05, 0.3)))


def test_the_stages_do_what_the_stream_does(folder, monkeypatch):
    source, cut = sources.open_source(folder), []
    crop = host.random_resized_crop

    def recorded(*arguments):
        cut.append(crop(*arguments))
        return cut[-1]

    monkeypatch.setattr(host, 'random_resized_crop', recorded)
    stages, count, about = bench.measure(source, VIEWS, seed=3, seconds=0)
    names = [stage.name for stage in stages]
    assert names[0] == 'read' and names[1] == 'decode' and names[-1] == 'copy into the batch'
    assert names[2:4] == ['crop and resize 2 x 24 px', 'crop and resize 3 x 12 px']
    assert count == 8 and all(0 < stage.cpu <= 2 * stage.wall + 1e-3 for stage in stages)
    assert set(about['kinds']) == {'JPEG', 'PNG', 'WEBP'} and about['side'] == 40
    monkeypatch.setattr(host, 'random_resized_crop', crop)
    with stream.train_stream(source, VIEWS, batch_size=9, seed=3) as batches:
        batch = next(batches)
    for g in range(9):
        mine = cut[5 * g : 5 * g + 5]
        assert all((a == b).all() for a, b in zip(mine[:2], batch['global'][g], strict=True))
        assert all((a == b).all() for a, b in zip(mine[2:], batch['local'][g], strict=True))


def test_images_that_cannot_be_decoded_are_passed_over(folder, tmp_path):
    for i in range(10):
        write(folder / 'owl' / f'bad {i}.jpg', b'no image')
    assert bench.measure(sources.open_source(folder), VIEWS, 0, 0)[1] == 8
    for i in range(3):
        write(tmp_path / 'bad' / f'{i}.jpg', b'no image')
    with pytest.raises(errors.UserError, match='None of the 4 images can be decoded'):
        bench.measure(sources.open_source(tmp_path / 'bad'), VIEWS, 0, 0)


def advice(walls, cpus, kind='JPEG', side=500.0):
    names = ('read', 'decode', 'crop and resize 1 x 224 px', 'copy into the batch')
    stages = [bench.Stage(*x) for x in zip(names, walls, cpus, strict=True)]
    views = [host.View('image', 224, 1, (0.2, 1.0))]
    (line,) = bench.advice(stages, views, {'kinds': {kind: 9, 'GIF': 1}, 'side': side}, 'D')
    return line


@pytest.mark.parametrize(
    ('walls', 'cpus', 'more', 'words'),
    [
        ((9, 2, 1, 1), (1, 2, 1, 1), {}, 'largest: read, 69 % of the time, most of it waiting'),
        ((9, 2, 1, 1), (9, 2, 1, 1), {}, 'pack D --to arrayrecord'),
        ((1, 5, 1, 1), (1, 5, 1, 1), {}, 'largest: decode, 62 % of the CPU time: they are small'),
        ((1, 5, 1, 1), (1, 5, 1, 1), {'side': 2000.0}, 'pack D --to tar --out DIR --max-side 672'),
        ((1, 5, 1, 1), (1, 5, 1, 1), {'kind': 'PNG'}, 'PNG takes longer than JPEG'),
        ((1, 2, 5, 1), (1, 2, 5, 1), {}, 'largest: crop and resize, 56 % of the CPU time: fewer'),
        ((1, 2, 5, 1), (1, 2, 5, 1), {'side': 4000.0}, '--max-side 672'),
        ((1, 2, 1, 5), (1, 2, 1, 5), {}, 'memory is the limit'),
    ],
)
def test_the_largest_stage_is_named_with_what_to_change(walls, cpus, more, words):
    assert words in advice(walls, cpus, **more)


def test_the_report_has_each_stage_the_stream_and_the_advice(tmp_path):
    for i in range(12):
        write(tmp_path / f'{i}.jpg', encode(image(i, 64, 80)))
    said = []
    fields = [f'data.train={tmp_path}', 'method.embed_dim=32', 'method.depth=1']
    fields += ['method.num_heads=2', 'method.img_size=32', 'batch_size=8']
    bench.bench('images_mae', fields, seconds=0.2, log=said.append)
    text = '\n'.join(said)
    for words in ('12 images; crops of mae: 1 x 32 px', 'decode', 'stream', 'largest: '):
        assert words in text
    rate = float(said[-2].split()[1].replace(',', ''))
    assert np.isfinite(rate) and rate > 0


def test_the_command_takes_method_split_and_fields(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(bench, 'bench', lambda *arguments: asked.append(arguments))
    command = ['data', 'bench', str(tmp_path), '--method', 'dinov2', '--split', 'val']
    cli.main([*command, 'method.img_size=32'])
    fields = [f'data.train={tmp_path}', 'data.train.split=val', 'method.img_size=32']
    assert asked == [('images_dinov2', fields)]
