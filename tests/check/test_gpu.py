# SPDX-License-Identifier: Apache-2.0
"""The script for a GPU machine: twins of our shapes, and a table that a cut does not lose."""

import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest
from packaging import requirements

from ssl_jax import step as step_lib

FOLDER = pathlib.Path(__file__).resolve().parents[2] / 'experiments' / 'gpu'


def script(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run = script('run')


@pytest.mark.parametrize('name', run.MODELS)
def test_a_twin_has_our_parameters_and_learns(name, monkeypatch):
    torch = pytest.importorskip('torch')
    monkeypatch.setattr(torch, 'compile', lambda fn, **_: fn)
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda *_, **__: None)
    torch.set_num_threads(1)  # two wait for each other where other tests run
    method, config = run.method_and_config(name, 8, tiny=True)
    step, count = script('twin').make(method, 8, 'cpu')
    ours = step_lib.make_program(config, method).abstract.params
    assert count == sum(x.size for x in jax.tree.leaves(ours))
    losses = [step().item() for _ in range(4)]
    assert np.isfinite(losses).all() and losses[-1] < losses[0]


@pytest.mark.parametrize('name', run.MODELS)
def test_the_full_sizes_are_those_of_the_recipes(name):
    method, config = run.method_and_config(name, run.MODELS[name][1], tiny=False)
    width, depth = {'MAE-L': (1024, 24), 'Pixio-H': (1280, 32), 'DINOv2-L': (1024, 24)}[name]
    assert (method.embed_dim, method.depth, config.dtype) == (width, depth, 'bfloat16')
    assert method.drop_path == 0 and config.batch_size == run.MODELS[name][1]


def test_each_part_is_on_disk_when_it_ends_and_one_that_takes_too_long_is_cut(tmp_path):
    report = run.Report(tmp_path, 1.0)
    for which, rate in (('jax', 300.0), ('torch', 200.0)):
        report.add(part='MAE-L', side=which, batch=256, images_per_second=rate, mfu=0.41, how='x')
    assert len(json.loads((tmp_path / 'results.json').read_text())) == 2
    line = (tmp_path / 'table.md').read_text().splitlines()[2]
    assert line == '| MAE-L | jax | 256 | 300 | 41.0% | 1.50 | x |'
    code = 'import time; print("so far"); time.sleep(60)'
    text, how = report.run(['-c', code], 5, tmp_path / 'log.txt')
    assert 'so far' in text and how == 'stopped after 5 s: so far'
    report.end = 0.0
    assert report.run(['-c', code], 5, tmp_path / 'log.txt')[1] == 'no time was left'


def test_wheels_are_of_what_the_project_needs():
    ours = (FOLDER.parents[1] / 'requirements.txt').read_text()
    needs = {r.name: r for r in map(requirements.Requirement, run.MISSING)}
    assert {'grain', 'ml_collections', 'simplejpeg', 'tensorboardX'} < needs.keys()
    for line in ours.splitlines():
        if line and not line.startswith('#'):
            need = requirements.Requirement(line.partition('#')[0])
            assert needs.get(need.name, need).specifier == need.specifier, line
