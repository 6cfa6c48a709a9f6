# SPDX-License-Identifier: Apache-2.0
"""`ssl_jax export --to onnx`: a graph that gives our features in ONNX Runtime."""

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import tiny
import tiny_weights
from ssl_jax import cli
from ssl_jax.interop import export, files, layouts, onnx, program
from ssl_jax.models import vit as vit_lib
from ssl_jax.objectives import masking
from ssl_jax.run import errors, weights

for module in onnx.MODULES:
    pytest.importorskip(module, reason=f"{module} is missing: pip install 'ssl_jax[onnx]'")

import onnx as theirs  # noqa: E402
import onnxruntime  # noqa: E402

NAMES = {
    'README.md',
    'config.json',
    'model.onnx',
    'preprocessor_config.json',
    'provenance.json',
}


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    path = tmp_path_factory.mktemp('mae') / 'run'
    tiny.save(tiny.config(dtype='bfloat16'), path, step=2)  # the graph is float32 all the same
    return path


@pytest.fixture(scope='module')
def out(trained, tmp_path_factory):
    """Its export, for tests that only read."""
    return leave(trained, tmp_path_factory.mktemp('out') / 'out')


def imported(tmp_path, vit, processor=None):
    """The workdir of an import of an encoder with random weights."""
    w, _ = layouts.of_networks({'encoder': vit}, 'official')
    w = layouts.Weights(w.family, 'official', 'backbone', vit)
    (tmp_path / 'in').mkdir()
    tensors, _ = layouts.to_layout(w, tiny_weights.params(w))
    metadata = {export.METADATA: json.dumps(layouts.to_dict(w))}
    files.write(tmp_path / 'in' / files.WEIGHTS, tensors, metadata)
    if processor:
        (tmp_path / 'in' / 'preprocessor_config.json').write_text(json.dumps(processor))
    weights.import_weights(tmp_path / 'in', tmp_path / 'w', log=None)
    return tmp_path / 'w'


def leave(workdir, out, to='onnx', **options):
    return export.export(weights.open_run(workdir), to, out, **options)


def run(out, **feed):
    path = str(out / onnx.GRAPH)
    return onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider']).run(None, feed)


def ours(workdir, images):
    """All tokens after the final norm, float32."""
    vit, params = weights.open_run(workdir).networks()['encoder']
    found = jax.jit(vit.clone(dtype=np.float32).apply)({'params': params}, images)
    parts = [found[f'{k}_tokens'] for k in ('cls', 'reg', 'patch')]
    return np.concatenate(parts, axis=1)


def channels_first(images):
    return np.ascontiguousarray(np.moveaxis(images, -1, 1))


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def assert_gives_the_tokens_of(workdir, out, size):
    """On a batch that the export did not try itself."""
    images = tiny_weights.images((size, size), n=5, seed=1)
    (got,) = run(out, pixel_values=channels_first(images))
    assert_close(got, ours(workdir, images))


def test_a_run_leaves_as_a_graph_with_its_tokens(trained, out):
    assert_gives_the_tokens_of(trained, out, 32)
    assert {p.name for p in out.iterdir()} == NAMES


RELATIVE = dict(rel_pos='shared', pos_embed='none', key_bias=False, init_scheme='beit')
OTHERS = {
    'dinov2_reg': tiny_weights.ENCODERS['dinov2_reg'],
    'beit': dict(tiny_weights.PLAIN, mask_token=True, layer_scale=0.1, **RELATIVE),
}


@pytest.mark.parametrize('name', ['dinov2_reg', pytest.param('beit', marks=pytest.mark.slow)])
def test_an_imported_encoder_leaves_as_a_graph_with_its_tokens(name, tmp_path):
    vit = vit_lib.ViT(**OTHERS[name])
    workdir = imported(tmp_path, vit)
    out = leave(workdir, tmp_path / 'out')
    assert_gives_the_tokens_of(workdir, out, vit.img_size)
    assert {p.name for p in out.iterdir()} == NAMES
    tokens = f'{vit.num_cls_tokens} class, '
    tokens += f'{vit.num_register_tokens} register, ' if vit.num_register_tokens else ''
    assert (
        f'{tokens}{(vit.img_size // vit.patch_size) ** 2} patch tokens'
        in (out / 'README.md').read_text()
    )


def test_what_the_graph_says_of_itself(out):
    model = theirs.load(out / onnx.GRAPH)
    theirs.checker.check_model(model, full_check=True)
    assert [(x.domain, x.version) for x in model.opset_import] == [('', onnx.OPSET)]
    ends = {
        x.name: [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim]
        for x in (*model.graph.input, *model.graph.output)
    }
    assert ends == {'pixel_values': ['batch', 3, 32, 32], 'last_hidden_state': ['batch', 17, 32]}
    content = (out / onnx.GRAPH).read_bytes()
    assert b'.py' not in content and b'/' + b'site-packages' not in content


def test_the_sides_and_the_preprocessing_are_those_of_the_encoder(tmp_path):
    # transformers has no place for its mask token, which a frozen encoder does not need.
    vit = vit_lib.ViT(**tiny_weights.ENCODERS['vit'], mask_token=True)
    processor = dict(size={'shortest_edge': 64}, crop_size=48, do_center_crop=True)
    workdir = imported(tmp_path, vit, processor)
    assert weights.open_run(workdir).transform['size'] == 48
    out = leave(workdir, tmp_path / 'out')
    assert_gives_the_tokens_of(workdir, out, 32)
    assert {p.name for p in out.iterdir()} == NAMES
    found = json.loads((out / 'preprocessor_config.json').read_text())
    assert found['crop_size'] == {'height': 32, 'width': 32}
    assert '## Images\n\nshort side 43, central 32 px' in (out / 'README.md').read_text()


def test_the_lines_of_the_card_run_in_a_process_without_this_project(trained, out, tmp_path):
    text = (out / 'README.md').read_text()
    assert 'library_name: onnx' in text and 'PyTorch' not in text and 'Opset 18' in text
    code = text.split('```python')[1].split('```')[0].replace('DIR', str(out))
    images = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    np.save(tmp_path / 'images.npy', images)
    zeros = next(line for line in code.splitlines() if line.startswith('images = '))
    code = code.replace(zeros, "images = np.load('images.npy')")
    block = "import sys\nfor name in ('ssl_jax', 'jax', 'torch'):\n    sys.modules[name] = None\n"
    code = f"{block}{code}\nnp.savez('features.npz', cls=cls, patch=patch)\n"
    (tmp_path / 'run.py').write_text(code)
    done = subprocess.run(
        [sys.executable, '-I', 'run.py'], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    view = weights.open_run(trained).transform
    pixels = ((images / 255 - view['mean']) / view['std']).astype(np.float32)
    want = ours(trained, pixels)
    with np.load(tmp_path / 'features.npz') as got:
        assert_close(got['cls'], want[:, 0])
        assert_close(got['patch'], want[:, 1:].mean(axis=1))


def test_a_mae_leaves_with_its_decoder_and_its_noise_as_an_input(trained, tmp_path):
    out = leave(trained, tmp_path / 'out', what='full')
    opened = weights.open_run(trained)
    images = tiny_weights.images((32, 32), n=5, seed=1)
    noise = np.random.default_rng(2).random((5, 16), np.float32)
    logits, hidden = run(out, pixel_values=channels_first(images), noise=noise)
    method = opened.method.with_modules(
        encoder=opened.vit.clone(dtype=np.float32),
        decoder=opened.method.decoder.clone(dtype=np.float32),
    )
    mask = masking.from_noise(noise, (4, 4), method.mask_ratio)
    np.testing.assert_array_equal(hidden, mask.mask)
    assert_close(logits, jax.jit(method.forward)(opened.params, images, mask)['pred'])
    assert 'the 4 patches with the smallest numbers' in (out / 'README.md').read_text()


@pytest.mark.slow
def test_large_weights_lie_in_a_second_file_beside_the_graph(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx, 'ONE_FILE', 1000)
    workdir = imported(tmp_path, vit_lib.ViT(**tiny_weights.ENCODERS['pixio']))
    out = leave(workdir, tmp_path / 'out')
    assert {p.name for p in out.iterdir()} == NAMES | {'model.onnx.data'}
    shutil.move(out, tmp_path / 'moved')
    assert_gives_the_tokens_of(workdir, tmp_path / 'moved', 32)


def test_provenance_says_how_far_it_is_from_the_encoder_and_who_made_it(out):
    found = json.loads((out / 'provenance.json').read_text())
    assert found['layout'] == 'onnx' and 0 < found['largest_difference'] <= 1e-5
    assert found['versions']['onnxruntime'] == onnxruntime.__version__


# Refused


def test_a_graph_that_differs_is_refused_with_the_number_and_the_old_one_stays(
    trained, out, tmp_path, monkeypatch
):
    target = tmp_path / 'out'
    shutil.copytree(out, target)
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    real = onnx._load

    def damaged(folder, w):
        model = real(folder, w)
        model.layernorm.weight.data *= 1.0001
        return model

    monkeypatch.setattr(onnx, '_load', damaged)
    with pytest.raises(errors.UserError, match=r'model.onnx was not written: .* by \d.\d\de-0\d'):
        leave(trained, target)
    assert {p.name: p.read_bytes() for p in target.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ['out']


@pytest.mark.parametrize('missing', ['onnxruntime', 'onnxscript', 'torch'])
def test_a_missing_package_is_named_with_its_extra(trained, tmp_path, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(errors.UserError) as error:
        leave(trained, tmp_path / 'out')
    assert str(error.value) == f"{missing} is missing: pip install 'ssl_jax[onnx]'."
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'name,fields',
    [
        ('registers of a MAE', dict(tiny_weights.ENCODERS['mae'], num_register_tokens=2)),
        ('no class token', dict(tiny_weights.PLAIN, num_cls_tokens=0)),
        ('a ratio of Pixio', tiny_weights.ENCODERS['pixio'] | {'mlp_ratio': 2.5}),
    ],
    ids=lambda x: x if isinstance(x, str) else '',
)
def test_what_transformers_has_no_class_for_is_refused_in_its_sentence(tmp_path, name, fields):
    workdir = imported(tmp_path, vit_lib.ViT(**fields))
    said = {}
    for to in ('hf', 'onnx'):
        with pytest.raises(errors.UserError, match='transformers') as error:
            leave(workdir, tmp_path / 'out', to)
        said[to] = str(error.value)
    assert said['onnx'] == said['hf'].replace('to=hf', 'to=onnx')
    assert said['onnx'].endswith('jax, official, timm.') or 'jax, official.' in said['onnx']
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    'args,words',
    [
        (['--to', 'onx'], ['to=onx', 'did you mean onnx?', 'official, hf, timm, onnx, jax']),
        (['--to', 'onnx', '--dtype', 'bfloat16'], ['dtype=bfloat16', 'use dtype=float32']),
        (['--to', 'ONNX'], ['to=ONNX is unknown']),
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


def test_heads_and_words_stay_in_the_checkpoint(tmp_path):
    vit = vit_lib.ViT(**OTHERS['beit'])
    for w, said in (
        (tiny_weights.weights('dinov2', 'official', 'full'), 'no class for projection heads'),
        (layouts.Weights('beit', 'official', 'full', vit, vocab=11), 'no graph .* visual words'),
    ):
        tensors, _ = layouts.to_layout(w, tiny_weights.params(w))
        metadata = {export.METADATA: json.dumps(layouts.to_dict(w))}
        files.write(tmp_path / f'{w.family}.safetensors', tensors, metadata)
        workdir = tmp_path / w.family
        weights.import_weights(tmp_path / f'{w.family}.safetensors', workdir, log=None)
        with pytest.raises(errors.UserError, match=said):
            leave(workdir, tmp_path / 'out', what='full')


def test_a_graph_is_not_imported(out, tmp_path):
    with pytest.raises(errors.UserError, match='neither a run nor weights'):
        weights.import_weights(out, tmp_path / 'w', log=None)
    assert program.TOLERANCE == 1e-5 and not (tmp_path / 'w').exists()
