# SPDX-License-Identifier: Apache-2.0
"""`ssl_jax export --to jax`: a program that gives the features of the encoder without this code."""

import json
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
from jax import export as jax_export
from safetensors import numpy as safetensors_numpy

import ssl_jax
import tiny
import tiny_weights
from ssl_jax import cli
from ssl_jax.interop import export, files, layouts, program
from ssl_jax.models import vit as vit_lib
from ssl_jax.run import errors, weights


def run_of(path, **fields):
    tiny.save(tiny.config(**fields), path, step=2)
    return path


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    # Trained in bfloat16: the program computes in the type that the export names all the same.
    return run_of(tmp_path_factory.mktemp('mae') / 'run', dtype='bfloat16')


@pytest.fixture(scope='module')
def out(trained, tmp_path_factory):
    """Its export, for tests that only read."""
    return leave(trained, tmp_path_factory.mktemp('out') / 'out')


def imported(tmp_path, w, params, processor=None):
    """The workdir of an import of these weights."""
    (tmp_path / 'in').mkdir()
    tensors, _ = layouts.to_layout(w, params)
    metadata = {export.METADATA: json.dumps(layouts.to_dict(w))}
    files.write(tmp_path / 'in' / files.WEIGHTS, tensors, metadata)
    if processor:
        (tmp_path / 'in' / 'preprocessor_config.json').write_text(json.dumps(processor))
    weights.import_weights(tmp_path / 'in', tmp_path / 'w', log=None)
    return tmp_path / 'w'


def leave(workdir, out, to='jax', **options):
    return export.export(weights.open_run(workdir), to, out, **options)


def opened(out):
    """(the program, its weights) of a folder."""
    model = jax_export.deserialize(bytearray((out / program.PROGRAM).read_bytes()))
    return model.call, safetensors_numpy.load_file(out / files.WEIGHTS)


def pictures(n, size):
    return np.random.default_rng(n).integers(0, 256, (n, size, size, 3), np.uint8)


def assert_gives_the_features_of(workdir, out):
    """On a batch that the export did not try itself."""
    call, held = opened(out)
    model = ssl_jax.load_model(workdir, dtype='float32')
    images = pictures(5, model.size)
    got, want = call(held, images), model(images)
    names = {'cls', 'cls_tokens', 'patch', 'patch_tokens'}
    assert set(got) == {k for k in names if k in want and want[k].size}
    for k in got:
        np.testing.assert_allclose(got[k], want[k], rtol=0, atol=1e-5 * np.abs(want[k]).max())


def test_a_run_leaves_as_a_program_with_its_features(trained, out):
    assert_gives_the_features_of(trained, out)
    names = {program.PROGRAM, files.WEIGHTS, 'README.md', 'provenance.json'}
    assert {p.name for p in out.iterdir()} == names


RELATIVE = dict(rel_pos='shared', pos_embed='none', key_bias=False, init_scheme='beit')
OTHERS = {
    'dinov2_reg_odd': {},
    'registers of a MAE': dict(tiny_weights.ENCODERS['mae'], num_register_tokens=2),
    'beit': dict(tiny_weights.PLAIN, mask_token=True, layer_scale=0.1, **RELATIVE),
}


@pytest.mark.parametrize(
    'name',
    [x if x == 'dinov2_reg_odd' else pytest.param(x, marks=pytest.mark.slow) for x in OTHERS],
)
def test_an_imported_encoder_leaves_as_a_program_with_its_features(name, tmp_path):
    vit = vit_lib.ViT(**(OTHERS[name] or tiny_weights.ENCODERS[name]))
    w, _ = layouts.of_networks({'encoder': vit}, 'official')
    w = layouts.Weights(w.family, 'official', 'backbone', vit)
    workdir = imported(tmp_path, w, tiny_weights.params(w))
    assert_gives_the_features_of(workdir, leave(workdir, tmp_path / 'out'))


BLOCKED = """
import sys
sys.modules['ssl_jax'] = None  # an import of it fails
{code}
assert not {{'flax', 'orbax', 'optax', 'torch'}} & set(sys.modules)
images = np.load('images.npy')
np.savez('features.npz', **model(weights, images))
"""


def test_the_lines_of_the_card_run_in_a_process_without_this_project(trained, out, tmp_path):
    code = (out / 'README.md').read_text().split('```python')[1].split('```')[0]
    assert len(code.strip().splitlines()) <= 7
    (tmp_path / 'run.py').write_text(BLOCKED.format(code=code.replace('DIR', str(out))))
    images = pictures(4, 32)
    np.save(tmp_path / 'images.npy', images)
    done = subprocess.run(
        [sys.executable, '-I', 'run.py'], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    want = ssl_jax.load_model(trained, dtype='float32')(images)
    with np.load(tmp_path / 'features.npz') as got:
        assert {'cls', 'patch', 'patch_tokens'} <= set(got)
        for k in got:
            np.testing.assert_allclose(got[k], want[k], rtol=0, atol=1e-5 * np.abs(want[k]).max())


def test_it_is_lowered_for_three_platforms_without_kernels_of_ours(tpu_kernels_on, tmp_path):
    # Wide and long enough for every kernel of `kernels/tpu/`.
    fields = dict(method__embed_dim=128, method__num_heads=2, method__img_size=64)
    workdir = run_of(tmp_path / 'run', **fields, method__num_cls_tokens=0)
    out = leave(workdir, tmp_path / 'out')
    model = jax_export.deserialize(bytearray((out / program.PROGRAM).read_bytes()))
    assert model.platforms == ('cpu', 'cuda', 'tpu')
    assert 'tpu_custom_call' not in model.mlir_module()
    assert_gives_the_features_of(workdir, out)  # those of the patches: it has no class token
    assert str(model.in_avals[-1].shape) == '(batch, 64, 64, 3)'


def _encoder(workdir):
    return program.trees.named(weights.open_run(workdir).networks()['encoder'][1])


def test_the_weights_in_the_file_are_those_of_the_run_bit_for_bit(trained, out):
    _, held = opened(out)
    jax.tree.map(np.testing.assert_array_equal, held, dict(_encoder(trained)))


def test_in_bfloat16_the_weights_are_rounded_and_the_layers_compute_so(trained, tmp_path):
    out = leave(trained, tmp_path / 'out', dtype='bfloat16')
    call, held = opened(out)
    for name, x in _encoder(trained).items():
        np.testing.assert_array_equal(held[name], x.astype(ml_dtypes.bfloat16))
    images = pictures(3, 32)
    want = ssl_jax.load_model(trained, dtype='float32')(images)['patch_tokens']
    got = call(held, images)['patch_tokens']
    assert got.dtype == np.float32
    error = np.abs(got - want).max() / np.abs(want).max()
    assert 1e-5 < error < 0.05


def test_the_sides_are_those_of_the_preprocessing(tmp_path):
    w = tiny_weights.weights('pixio', 'official')
    workdir = imported(
        tmp_path,
        w,
        tiny_weights.params(w),
        dict(size={'shortest_edge': 64}, crop_size=48, do_center_crop=True, image_mean=[0.5] * 3),
    )
    out = leave(workdir, tmp_path / 'out')
    assert_gives_the_features_of(workdir, out)
    assert 'uint8 (batch, 48, 48, 3)' in (out / 'README.md').read_text()


def test_provenance_and_card_say_how_far_it_is_from_the_encoder(out):
    found = json.loads((out / 'provenance.json').read_text())
    assert found['layout'] == 'jax' and 0 <= found['largest_difference'] <= 1e-5
    text = (out / 'README.md').read_text()
    assert 'library_name: jax' in text and '## Use in JAX' in text and 'PyTorch' not in text
    assert f'was {found["largest_difference"]:.2g} of the largest value' in text


# Refused


def nan(tree):
    dense = tree['encoder']['blocks']['mlp']['fc1']
    dense['kernel'] = dense['kernel'].at[1, 0, 0].set(np.nan)
    return tree


@pytest.fixture(scope='module')
def lost(tmp_path_factory):
    """The workdir of a run with one NaN in its weights."""
    path = tmp_path_factory.mktemp('lost') / 'run'
    tiny.save(tiny.config(), path, step=2, change=nan, unseen=True)
    return path


def huge(tree):
    """Finite weights whose features are not."""
    tree['encoder']['patch_embed']['proj']['kernel'] *= 1e38
    return tree


@pytest.mark.parametrize('to', export.TARGETS)
def test_a_checkpoint_with_nan_is_refused_by_name_in_every_form(lost, to, tmp_path):
    if to == 'onnx':
        pytest.importorskip('onnxruntime')
    with pytest.raises(errors.UserError, match='step 2: .*/blocks/mlp/fc1/kernel has NaN'):
        leave(lost, tmp_path / 'out', to)
    assert not list(tmp_path.iterdir())


def test_features_that_are_not_finite_are_refused(tmp_path):
    tiny.save(tiny.config(), tmp_path / 'run', step=2, change=huge)
    with pytest.raises(errors.UserError, match='gives NaN or infinity'):
        leave(tmp_path / 'run', tmp_path / 'out')
    assert [p.name for p in tmp_path.iterdir()] == ['run']


def test_a_program_that_differs_is_refused_with_the_number_and_the_old_one_stays(
    trained, tmp_path, monkeypatch
):
    out = leave(trained, tmp_path / 'out')
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    real = safetensors_numpy.load_file

    def damaged(path):
        return {k: x * np.float32(1.001) for k, x in real(path).items()}

    monkeypatch.setattr(program.safetensors_numpy, 'load_file', damaged)
    with pytest.raises(errors.UserError, match=r'differ from those of the encoder by \d.\d\de-0\d'):
        leave(trained, out)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ['out']


@pytest.mark.parametrize(
    'args,words',
    [
        (['--to', 'jaxx'], ['to=jaxx', 'did you mean jax?', 'official, hf, timm, onnx, jax']),
        (['--to', 'jax', '--what', 'full'], ['the program is the encoder alone', 'official']),
        (['--to', 'JAX'], ['to=JAX is unknown']),
    ],
    ids=str,
)
def test_what_cannot_be_is_said_in_a_sentence(trained, tmp_path, capsys, args, words):
    with pytest.raises(SystemExit) as stop:
        cli.main(['export', '--workdir', str(trained), '--out', str(tmp_path / 'out'), *args])
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 1 and len(err.splitlines()) == 1
    assert all(word in err for word in words), err
    assert not list(tmp_path.iterdir())


def test_a_folder_of_other_files_is_not_replaced(trained, tmp_path):
    (tmp_path / 'thesis.tex').write_text('x')
    with pytest.raises(errors.UserError, match='no export'):
        leave(trained, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ['thesis.tex']


def test_an_earlier_export_of_another_form_is_replaced_whole(trained, tmp_path):
    leave(trained, tmp_path / 'out', 'hf')
    out = leave(trained, tmp_path / 'out')
    assert not (out / 'config.json').exists()


def test_a_program_is_not_imported(out, tmp_path):
    with pytest.raises(errors.UserError, match='of no family known here'):
        weights.import_weights(out, tmp_path / 'w', log=None)
    assert not (tmp_path / 'w').exists()
