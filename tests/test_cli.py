# SPDX-License-Identifier: Apache-2.0
"""The command as a stranger types it: a folder of images in, numbers and pictures out."""

import importlib.metadata
import json
from unittest import mock

import cv2
import numpy as np
import pytest

from ssl_jax import cli, plan
from ssl_jax import config as config_lib
from ssl_jax.data import scenes

SMALL = (
    'total_steps=4',
    'batch_size=8',
    'method.embed_dim=32',
    'method.depth=2',
    'method.num_heads=2',
    'method.decoder_embed_dim=16',
    'method.decoder_depth=1',
    'method.decoder_num_heads=2',
    'log.every_steps=2',
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """24 PNGs in two class folders, and one file that is no image."""
    root = tmp_path_factory.mktemp('images')
    source = scenes.Scenes(24, 48)
    for i in range(24):
        path = root / ('odd' if i % 2 else 'even') / f'{i:02}.png'
        path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), source[i]['image'][..., ::-1])
    (root / 'even' / 'zz.png').write_text('<html>404</html>')
    return root


@pytest.fixture(scope='module', params=['mae', pytest.param('pixio', marks=pytest.mark.slow)])
def run(request, folder, tmp_path_factory):
    """A workdir that `ssl_jax pretrain` made."""
    workdir = tmp_path_factory.mktemp('run') / 'w'
    cli.main(
        ['pretrain', '--data', str(folder), '--method', request.param]
        + ['--workdir', str(workdir), *SMALL]
    )
    return workdir


def test_pretrain_leaves_something_worth_opening(run):
    assert (run / 'checkpoints' / '4').is_dir()
    assert json.loads((run / 'config.json').read_text())['total_steps'] == 4
    picture = cv2.imread(str(run / 'pictures' / 'reconstruction_0000004.png'))
    assert min(picture.shape[:2]) > 100 and picture.std() > 10
    assert (run / 'pictures' / 'curves.png').stat().st_size > 1000
    rows = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
    assert rows[-1]['step'] == 4 and any('loss' in r for r in rows)
    report = (run / 'report.html').read_text()
    assert 'step 4 of 4, finished' in report and 'data:image/png' in report
    assert 'could not be made' not in report


def test_the_file_that_is_no_image_is_listed_with_its_reason(run):
    # 4 steps of 8 read all 25 files at least once.
    row = json.loads((run / 'bad_images.jsonl').read_text().splitlines()[0])
    assert row['path'].endswith('zz.png') and 'HTML' in row['reason']


def test_eval_prints_the_run_beside_the_untrained_encoder_and_raw_pixels(run, folder, capsys):
    cli.main(['eval', '--workdir', str(run), '--data', str(folder)])
    out = capsys.readouterr().out
    rows = json.loads((run / 'eval_4.json').read_text())
    assert {r['model'] for r in rows} == {'trained', 'untrained', 'raw_pixels'}
    assert {r['eval'] for r in rows} >= {'knn', 'linear'}
    assert all(r['protocol'] for r in rows)
    assert 'untrained' in out and 'even, odd' in out
    report = (run / 'report.html').read_text()
    assert 'Linear probe' in report
    assert all(row['protocol_id'] in report for row in rows)
    assert 'could not be made' not in report


def test_show_writes_pictures_of_other_images(run, folder, tmp_path, capsys):
    cli.main(['show', '--workdir', str(run), '--data', str(folder), '--out', str(tmp_path)])
    paths = capsys.readouterr().out.split()
    for kind in ('reconstruction', 'crops', 'pca', 'attention', 'curves'):
        assert any(kind in p for p in paths), kind
    assert all(np.prod(cv2.imread(p).shape) > 0 for p in paths)


@pytest.mark.parametrize(
    'args,message',
    [
        (['pretrain', '--workdir', 'w'], 'give --data DIR'),
        (['pretrain', '--workdir', 'w', '--data', '/nowhere'], '/nowhere'),
        (['pretrain', '--workdir', 'w', '--data', '.', '--method', 'mea'], 'mae, pixio'),
        (['pretrain', '--workdir', 'w', '--config', 'scene_mae'], 'scenes_mae'),
        (['pretrain', '--workdir', 'w', '--config', 'scenes_mae', 'batchsize=3'], 'batch_size'),
        (
            ['pretrain', '--workdir', 'w', '--config', 'scenes_mae', '--method', 'dinov2'],
            'both name a recipe',
        ),
        (['eval', '--workdir', '/nowhere/run'], '/nowhere/run'),
        (['show', '--workdir', '/nowhere/run'], '/nowhere/run'),
    ],
    ids=lambda x: ' '.join(x) if isinstance(x, list) else '',
)
def test_a_mistake_is_one_sentence_with_the_next_step(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 1 and message in err and len(err.splitlines()) == 1, err


@pytest.mark.parametrize(
    'args',
    (
        ['show', '--workdir', 'w', '--num', '0'],
        ['eval', '--workdir', 'w', '--limit', '-1'],
        ['features', '--model', 'm', '--data', 'd', '--out', 'o', '--batch', '0'],
        ['features', '--model', 'm', '--data', 'd', '--out', 'o', '--size', 'x'],
        ['plan', '--config', 'c', '--topology', 't', '--slices', '0'],
    ),
)
def test_an_argument_that_counts_is_one_or_more(args, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(args)
    assert end.value.code == 2
    assert f'argument {args[-2]}: ' in capsys.readouterr().err


def test_plan_takes_recipe_topology_and_fields_from_the_command_line(monkeypatch):
    run = mock.create_autospec(plan.run)
    monkeypatch.setattr(plan, 'run', run)
    cli.main(
        ['plan', '--config', 'scenes_mae', '--topology', 'v5e:2x2', '--slices', '2', 'batch_size=8']
    )
    (config, topology, fields), options = run.call_args
    assert (config, topology, fields) == ('scenes_mae', 'v5e:2x2', ['batch_size=8'])
    none = dict(mesh=None, out=None, save=None, images=None)
    assert options == dict(slices=2, search=False, xla_alone=False, **none)


def test_methods_and_recipes_are_listed_with_what_they_are(capsys):
    cli.main(['methods'])
    said = capsys.readouterr().out
    assert 'I-JEPA: predict the features' in said
    assert '--method takes beit, dinov2,' in said and 'pixio' in said
    assert said.rstrip().endswith('a recipe: classifier, dinov2_distill, distill.')
    cli.main(['recipes'])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(config_lib.recipes())
    assert all(line.split(maxsplit=1)[1:] for line in lines), 'a recipe without a docstring'


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit, match='0'):
        cli.main(['--version'])
    assert capsys.readouterr().out == f'ssl_jax {importlib.metadata.version("ssl_jax")}\n'
