# SPDX-License-Identifier: Apache-2.0
"""Runs, imports and exports written by an earlier version (0.1, of 2026-11-26) open and go on.

`tests/earlier` holds them; `continued.json` has the metrics of two more steps by that version.
"""

import json
import pathlib
import tarfile

import cv2
import numpy as np
import pytest

from ssl_jax import config as config_lib
from ssl_jax import encoder, train
from ssl_jax.data import host
from ssl_jax.interop import export
from ssl_jax.run import weights as weights_lib

EARLIER = pathlib.Path(__file__).resolve().parents[1] / 'earlier'
LONG = ('dinov2', 'splitmask', 'distill', 'dinov2_distill')
RUNS = ('mae', *(pytest.param(name, marks=pytest.mark.slow) for name in LONG))
METHODS = {
    'mae': 'mae',
    'dinov2': 'dinov2',
    'splitmask': 'splitmask',
    'distill': 'distill',  # its method was named distill with form=features
    'dinov2_distill': 'dinov2_distill',  # and this one distill with form=dino
    'classifier': 'classifier',
    'imported': 'dinov2',
}


@pytest.fixture
def earlier(tmp_path):
    """earlier('mae') -> the folder, unpacked."""

    def unpack(name):
        with tarfile.open(EARLIER / f'{name}.tar.gz') as archive:
            archive.extractall(tmp_path, filter='data')
        return tmp_path / name

    return unpack


@pytest.mark.parametrize('name', METHODS)
def test_a_checkpoint_opens_as_its_method(earlier, name):
    opened = weights_lib.open_run(earlier(name))
    assert opened.config.method.name == METHODS[name]
    vit, params = opened.networks()['encoder']
    assert vit.embed_dim == 16 and params['blocks']['attn']['qkv']['kernel'].shape[0] == vit.depth


def earlier_resize(image, size):
    """Of crops by that version: area averages where they shrink. Today's are nearer to Pillow's."""
    h, w = image.shape[:2]
    if h > size or w > size:
        image = cv2.resize(image, (min(w, size), min(h, size)), interpolation=cv2.INTER_AREA)
    return cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC)


@pytest.mark.parametrize('name', RUNS)
def test_a_run_goes_on_as_the_earlier_version_would(earlier, name, capsys, monkeypatch):
    monkeypatch.setattr(host, 'resize', earlier_resize)
    workdir = earlier(name)
    config = config_lib.from_dict(json.loads((workdir / 'config.json').read_text()))[0]
    with config.unlocked():
        config.total_steps += 2
    train.train(config, workdir)
    assert 'continuing this run' in capsys.readouterr().out
    rows = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
    last = [row for row in rows if 'loss' in row][-1]
    want = json.loads((EARLIER / 'continued.json').read_text())[name]
    np.testing.assert_allclose([last[k] for k in want], list(want.values()), rtol=1e-3)


def test_a_stored_config_is_filled_from_the_defaults_and_what_was_filled_is_listed(earlier):
    stored = json.loads((earlier('mae') / 'config.json').read_text())
    del stored['method']['drop_path'], stored['log']['wandb']
    config, lines = config_lib.from_dict(stored)
    assert config.method.drop_path == 0.0 and config.log.wandb is False
    assert {'log.wandb', 'method.drop_path'} <= {line.partition(' ')[0] for line in lines}


@pytest.mark.parametrize('name', ['export_mae_hf', 'export_dinov2_official'])
def test_an_export_is_read_and_its_encoder_is_that_of_its_run(earlier, name):
    model = encoder.load_model(earlier(name))
    run = earlier({'export_mae_hf': 'mae', 'export_dinov2_official': 'dinov2'}[name])
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3)).astype(np.uint8)
    np.testing.assert_array_equal(model(images)['patch'], encoder.load_model(run)(images)['patch'])


def test_an_import_leaves_again_under_the_same_names_with_the_same_bits(earlier, tmp_path):
    source = earlier('export_dinov2_official') / 'model.safetensors'
    opened = weights_lib.open_run(earlier('imported'))
    out = export.export(opened, 'official', tmp_path / 'out', what='full')
    tensors = [export.files.read(path).tensors for path in (source, out)]
    assert list(tensors[0]) == list(tensors[1])
    for name in tensors[0]:
        np.testing.assert_array_equal(tensors[0][name], tensors[1][name])
