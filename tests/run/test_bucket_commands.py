# SPDX-License-Identifier: Apache-2.0
"""Every command takes paths in buckets, and says in a sentence what is wrong with them."""

import gc
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import cv2
import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from etils import epath

import tiny
from ssl_jax import cli, config, plan
from ssl_jax.data import scenes
from ssl_jax.evals import feature_file
from ssl_jax.interop import export, files
from ssl_jax.run import bucket as bucket_lib
from ssl_jax.run import errors, storage, uploads, weights

TREE = {
    'norm.weight': np.arange(6, dtype=np.float32) / 7,
    'blocks.0.attn.qkv.weight': np.arange(24, dtype=np.float32).reshape(6, 4) - 3.3,
}


@pytest.fixture(autouse=True)
def queue(monkeypatch):
    monkeypatch.setattr(uploads, '_queue', uploads._Queue())


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A local workdir with a checkpoint."""
    workdir = tmp_path_factory.mktemp('run')
    tiny.save(tiny.config(), workdir)
    return workdir


def put(folder, target):
    """Copies a local folder into a bucket."""
    for path in folder.rglob('*'):
        if path.is_file():
            storage.atomic_write(f'{target}/{path.relative_to(folder)}', path.read_bytes())


def content(folder):
    """{name: bytes} of a folder in a bucket."""
    found = bucket_lib.walk(folder)
    return {o.name: bucket_lib.read(f'{folder}/{o.name}') for o in found}


# What is wrong is said before anything happens.

COMMANDS = {
    'pretrain --config scenes_mae --workdir': (),
    'finetune --model none --data nowhere --workdir': (),
    'eval --workdir': (),
    'eval --workdir nowhere --out': (),
    'show --workdir': (),
    'show --workdir nowhere --out': (),
    'report --workdir': (),
    'report --workdir nowhere --out': (),
    'features --data nowhere --out f.parquet --model': (),
    'features --data nowhere --model nowhere --out': (),
    'eval --workdir nowhere --data': (),
    'eval --workdir nowhere --data nowhere --test': (),
    'export --to hf --out out --workdir': (),
    'export --to hf --workdir nowhere --out': (),
    'import a.pth --workdir': (),
    'import': ('--workdir', 'nowhere'),
    'plan --config mae_vitb16 --topology v5e:4x4 --out': (),
    'demo --workdir': (),
}


def fails(command, path, capfd, more=()):
    with pytest.raises(SystemExit) as e:
        cli.main([*command.split(), path, *more])
    assert e.value.code == 1
    (line,) = (
        x for x in capfd.readouterr().err.splitlines() if 'trying again' not in x and x[:1] != 'I'
    )
    assert line.startswith(f'ssl_jax {command.split()[0]}: ')
    return line


@pytest.mark.parametrize('command', COMMANDS)
def test_every_command_names_a_bucket_that_is_not_there(bucket, capfd, command):
    line = fails(command, 'gs://nowhere/run', capfd, COMMANDS[command])
    assert "gs://nowhere/run: there is no bucket 'nowhere'" in line


@pytest.mark.parametrize('command', COMMANDS)
def test_every_command_names_a_misspelled_scheme(capfd, command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = fails(command, 'gs:/bucket/run', capfd, COMMANDS[command])
    assert 'did you mean gs://bucket/run?' in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('command', [c for c in COMMANDS if c.endswith('--workdir')])
def test_no_checkpoint_is_to_be_saved_where_orbax_cannot(capfd, command):
    line = fails(command, 's3://bucket/run', capfd)
    assert 's3://bucket/run cannot be a workdir' in line and 'gs://' in line


@pytest.mark.parametrize('command', [c for c in COMMANDS if c.endswith(('--out', '--model'))])
def test_a_missing_extra_is_named(capfd, command, monkeypatch):
    monkeypatch.setitem(sys.modules, 's3fs', None)
    assert "s3fs is missing: pip install 'ssl_jax[s3]'." in fails(command, 's3://b/run', capfd)


@pytest.mark.parametrize('status, reason', [(401, 'not valid'), (403, 'forbidden')])
def test_a_refusal_is_one_sentence_with_the_next_step(bucket, capfd, monkeypatch, status, reason):
    monkeypatch.setenv('SSL_JAX_BUCKET_PATIENCE', '0.1')
    bucket.fault(status=status)
    line = fails('pretrain --config scenes_mae --workdir', f'{bucket.root}/run', capfd)
    assert reason in line and 'gcloud auth application-default login' in line


@pytest.mark.slow
@pytest.mark.parametrize('rules', [{'status': 401}, {'status': 503}, {'drop': 1}])
def test_a_process_prints_a_sentence_and_no_traceback(bucket, rules):
    bucket.fault(**rules)
    env = {**bucket.env, 'SSL_JAX_BUCKET_PATIENCE': '1'}
    done = command(env, 'pretrain', '--config', 'scenes_mae', '--workdir', f'{bucket.root}/run')
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and len(lines) <= 3 and 'Traceback' not in done.stderr, lines


# Weights.


def test_weights_come_from_a_bucket_bit_by_bit(bucket, tmp_path):
    files.write(tmp_path / 'a.safetensors', TREE, {'format': 'pt'})
    np.savez(tmp_path / 'b.npz', **TREE)
    put(tmp_path, bucket.root)
    for name in ('a.safetensors', 'b.npz'):
        here, there = files.read(tmp_path / name), files.read(f'{bucket.root}/{name}')
        assert there.source == f'{bucket.root}/{name}' and there.sha256 == here.sha256
        for key, value in TREE.items():
            np.testing.assert_array_equal(there.tensors[key], value)


def test_of_a_folder_only_what_is_read_is_downloaded(bucket, tmp_path):
    files.write(tmp_path / 'model.safetensors', TREE, {'format': 'pt'})
    (tmp_path / 'config.json').write_text('{"model_type": "vit"}')
    for name in ('pytorch_model.bin', 'tf_model.h5', 'onnx/model.onnx'):
        storage.atomic_write(tmp_path / name, 'x' * 1000)
    put(tmp_path, bucket.root)
    for path in (bucket.root, f'{bucket.root}/', f'{bucket.root}/model.safetensors'):
        bucket.requests()
        file = files.read(path)
        assert bucket.requests()['GET media'] == 2
        assert file.hints == {'model_type': 'vit'} and sorted(file.tensors) == sorted(TREE)


def test_shards_and_their_index_come_from_a_bucket(bucket, tmp_path):
    names = dict(zip(TREE, ('model-1.safetensors', 'model-2.safetensors'), strict=True))
    for key, name in names.items():
        files.write(tmp_path / name, {key: TREE[key]}, {'format': 'pt'})
    (tmp_path / files.INDEXES[0]).write_text(json.dumps({'weight_map': names}))
    put(tmp_path, bucket.root)
    assert sorted(files.read(bucket.root).tensors) == sorted(TREE)


@pytest.mark.parametrize(
    'name, text',
    [('absent.pth', 'there is nothing at {}'), ('empty.pth', '{} is damaged'), ('x', '{}')],
)
def test_what_is_no_file_of_weights_is_named_by_its_own_path(bucket, name, text):
    storage.atomic_write(f'{bucket.root}/empty.pth', b'')
    storage.atomic_write(f'{bucket.root}/x/config.json', b'not JSON')
    with pytest.raises(ValueError) as e:
        files.read(f'{bucket.root}/{name}')
    assert text.format(f'{bucket.root}/{name}') in str(e.value) and 'tmp' not in str(e.value)


def test_the_copies_of_weights_are_gone_with_the_weights(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path / 'temporary'))
    (tmp_path / 'temporary').mkdir()
    files.write(tmp_path / 'a.safetensors', TREE, {'format': 'pt'})
    storage.atomic_write(f'{bucket.root}/a', (tmp_path / 'a.safetensors').read_bytes())
    file = files.read(f'{bucket.root}/a')
    assert list((tmp_path / 'temporary').iterdir())
    del file
    gc.collect()
    assert not list((tmp_path / 'temporary').iterdir())


def test_an_export_in_a_bucket_is_that_of_a_disk_and_comes_back(bucket, run, tmp_path):
    opened = weights.open_run(run)
    here, there = tmp_path / 'out', f'{bucket.root}/out'
    for out in (here, there):
        export.export(opened, 'hf', out)
    assert content(there) == {p.name: p.read_bytes() for p in here.iterdir()}
    weights.import_weights(there, f'{bucket.root}/again', log=None)
    again = weights.open_run(f'{bucket.root}/again').networks()['encoder'][1]
    first = opened.networks()['encoder'][1]
    jax.tree.map(np.testing.assert_array_equal, again, first)
    with pytest.raises(errors.UserError, match='holds a run already'):
        weights.import_weights(there, f'{bucket.root}/again', log=None)


def test_an_export_replaces_an_earlier_one_and_nothing_else(bucket, run):
    out, opened = f'{bucket.root}/out', weights.open_run(run)
    storage.atomic_write(f'{out}/notes.txt', 'mine')
    with pytest.raises(errors.UserError, match='holds files that are no export'):
        export.export(opened, 'timm', out)
    storage.remove(f'{out}/notes.txt')
    export.export(opened, 'hf', out)
    storage.atomic_write(f'{out}/of_the_first', '')
    export.export(opened, 'timm', out)
    assert 'of_the_first' not in content(out)
    assert json.loads(content(out)['provenance.json'])['layout'] == 'timm'


# Features.


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """20 images, and one file that is none."""
    root = tmp_path_factory.mktemp('images')
    source = scenes.Scenes(20, 40)
    for i in range(20):
        cv2.imwrite(str(root / f'{i:02}.png'), source[i]['image'][..., ::-1])
    (root / '07b.png').write_text('<html>404</html>')
    return root


def test_features_in_a_bucket_are_those_of_a_disk_also_after_a_kill(
    bucket, run, folder, tmp_path, monkeypatch
):
    out, lines = f'{bucket.root}/f.parquet', []
    monkeypatch.setattr(feature_file, 'PART_IMAGES', 8)
    options = dict(batch_size=8, log=lines.append)
    assert feature_file.extract(run, str(folder), tmp_path / 'f.parquet', **options) == 20
    real, written = feature_file._write, []

    def killed(table, path):
        if written:
            raise KeyboardInterrupt
        written.append(path)
        real(table, path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(feature_file, '_write', killed)
        feature_file.extract(run, str(folder), out, **options)
    assert not storage.exists(out) and len(storage.names(f'{out}.parts')) == 2
    assert feature_file.extract(run, str(folder), out, **options) == 20
    assert 'continuing at image 8 of 21' in lines
    assert sorted(content(bucket.root)) == ['f.parquet', 'f.parquet.bad.jsonl']
    assert storage.read(out) == (tmp_path / 'f.parquet').read_bytes()
    assert pq.read_table(tmp_path / 'f.parquet').num_rows == 20
    assert feature_file.extract(run, str(folder), out, **options) == 20
    assert lines[-1] == f'{out} is complete: 20 rows'
    with pytest.raises(errors.UserError, match='was made with'):
        feature_file.extract(run, str(folder), out, **{**options, 'size': 16})


# Recipes and plans.


def test_a_recipe_comes_from_a_bucket_with_its_argument(bucket):
    text = (config.folder() / 'mae_vitb16.py').read_bytes()
    storage.atomic_write(f'{bucket.root}/mine.py', text)
    for arg in ('', ':/data/imagenet', ':gs://bucket/imagenet'):
        mine = config.load(f'{bucket.root}/mine.py{arg}', ['batch_size=64'])
        assert mine.to_json() == config.load(f'mae_vitb16{arg}', ['batch_size=64']).to_json()
    with pytest.raises(errors.UserError, match=f"no recipe file '{bucket.root}/absent.py'"):
        config.load(f'{bucket.root}/absent.py')


def test_a_plan_is_written_into_a_bucket(bucket, monkeypatch):
    found = {'fits': True, 'cycles': 1}
    monkeypatch.setattr(plan.chips, 'devices', lambda *_: [None])
    monkeypatch.setattr(plan.compile_lib, 'plan', lambda *_: dict(found))
    monkeypatch.setattr(plan.compile_lib, 'matmul_scale', lambda *_: 1.0)
    monkeypatch.setattr(plan.report, 'text', lambda plan: 'it fits')
    monkeypatch.setattr(
        plan.report, 'picture', lambda plan, path: pathlib.Path(path).write_bytes(b'PNG')
    )
    plan.run('mae_vitb16', 'v5e:4x4', out=f'{bucket.root}/plan', log=lambda line: None)
    written = content(f'{bucket.root}/plan')
    assert sorted(written) == ['plan.json', 'plan.png', 'plan.txt']
    assert written['plan.txt'] == b'it fits' and written['plan.png'] == b'PNG'


# All of it, as in the README.


def command(env, *args):
    env = {**os.environ, **env, 'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu', 'PYTHONWARNINGS': 'ignore'}
    return subprocess.run(
        [os.environ.get('SSL_JAX_PYTHON', sys.executable), '-m', 'ssl_jax.cli', *map(str, args)],
        env=env,
        text=True,
        capture_output=True,
        timeout=600,
    )


@pytest.mark.slow
def test_the_commands_of_the_readme_in_a_bucket(bucket, folder, tmp_path):
    """SSL_JAX_PYTHON may be that of an environment with `pip install '.[gcs]'` alone."""
    root, images = bucket.root, tmp_path / 'images'
    for i, path in enumerate(sorted(folder.glob('??.png'))):
        (images / 'ab'[i % 2]).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, images / 'ab'[i % 2])

    def ok(*args):
        done = command(bucket.env, *args)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    small = ['batch_size=8', 'method.embed_dim=32', 'method.depth=2', 'method.num_heads=2']
    small += ['method.decoder_embed_dim=16', 'method.decoder_depth=1', 'method.decoder_num_heads=2']
    small += ['log.every_steps=1', 'checkpoint.every_steps=2']
    pretrain = ['pretrain', '--data', images, '--method', 'mae', '--workdir', f'{root}/run']
    ok(*pretrain, 'total_steps=2', *small)
    out = ok(*pretrain, 'total_steps=4', *small)
    assert 'continuing this run at step 2' in out
    assert 'this run is finished' in ok(*pretrain)
    assert 'untrained' in ok('eval', '--workdir', f'{root}/run', '--data', images)
    ok('eval', '--workdir', f'{root}/run', '--data', images, '--out', f'{root}/e.json')
    shown = ok('show', '--workdir', f'{root}/run', '--data', images).split()
    assert f'{root}/run/pictures/curves.png' in shown
    ok('features', '--model', f'{root}/run', '--data', images, '--out', f'{root}/f.parquet')
    for out in (f'{root}/hf', tmp_path / 'hf'):
        ok('export', '--workdir', f'{root}/run', '--to', 'hf', '--out', out)
    ok('import', f'{root}/hf', '--workdir', f'{root}/imported')
    tuned = ['finetune', '--model', f'{root}/hf', '--data', images, '--workdir', f'{root}/tuned']
    ok(*tuned, 'total_steps=2', 'batch_size=8', 'warmup_steps=1')
    names = {o.name for o in bucket_lib.walk(root)}
    assert names >= {'run/eval_4.json', 'e.json', 'f.parquet', 'hf/model.safetensors'}
    assert not [n for n in names if n.endswith('run.lock') or '/metrics/' in n]
    assert len(storage.read_lines(f'{root}/run/metrics.jsonl')) >= 4
    assert (tmp_path / 'hf' / 'model.safetensors').read_bytes() == storage.read(
        f'{root}/hf/model.safetensors'
    )
    assert json.loads(storage.read(f'{root}/run/eval_4.json'))
    assert epath.Path(f'{root}/tuned/checkpoints/2').exists()
