# SPDX-License-Identifier: Apache-2.0
"""Heads in the names of official files, and DINOv2's DPT head against that of transformers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.interop import heads
from ssl_jax.models import dense

B, H, W, D = 2, 3, 5, 16


def taps(rng, n=4):
    return [
        (
            jnp.asarray(rng.normal(size=(B, H, W, D)), jnp.float32),
            jnp.asarray(rng.normal(size=(B, D)), jnp.float32),
        )
        for _ in range(n)
    ]


def random_variables(module, inputs, rng):
    shapes = jax.eval_shape(module.init, jax.random.key(0), inputs)
    return jax.tree.map(lambda x: jnp.asarray(0.1 * rng.normal(size=x.shape), jnp.float32), shapes)


MODULES = {
    'seg': dense.BNLinear(7),
    'depth': dense.DepthLinear(0.001, 10.0, bins=8),
    'dpt': dense.DPT(0.001, 8),
    'pixio': dense.BNLinear(7, True, ('0', '1'), True),
    'pixio_dpt': dense.PixioDPT(7, 8, (4, 6, 8, 10)),
}
SOME_NAMES = {
    'seg': {'bn.weight', 'bn.running_mean', 'bn.num_batches_tracked', 'conv_seg.weight'},
    'depth': {'conv_depth.weight', 'conv_depth.bias'},
    'dpt': {
        'reassemble_blocks.readout_projects.3.0.weight',
        'reassemble_blocks.projects.0.conv.bias',
        'reassemble_blocks.resize_layers.3.weight',
        'convs.2.conv.weight',
        'fusion_blocks.0.res_conv_unit2.conv1.conv.weight',
        'fusion_blocks.3.res_conv_unit1.conv2.conv.weight',
        'fusion_blocks.1.project.conv.bias',
        'project.conv.weight',
        'conv_depth.head.4.bias',
    },
    'pixio': {'0.running_var', '1.weight'},
    'pixio_dpt': {'scratch.refinenet4.resConfUnit1.conv1.bias', 'scratch.output_conv.2.weight'},
}


@pytest.mark.parametrize('name', sorted(MODULES))
def test_a_head_has_the_official_names_and_comes_back_bit_for_bit(name):
    rng = np.random.default_rng(0)
    module, inputs = MODULES[name], taps(rng, 4 if 'dpt' in name else 1)
    variables = random_variables(module, inputs, rng)
    written = heads.to_torch(variables, 'decode_head.', steps=3)
    assert {f'decode_head.{key}' for key in SOME_NAMES[name]} <= set(written)
    back = heads.from_torch({**written, 'backbone.x': np.zeros(1)}, variables, 'decode_head.')
    jax.tree.map(np.testing.assert_array_equal, back, dict(variables))
    assert jax.tree.structure(back) == jax.tree.structure(dict(variables))


RENAMES = (  # official -> transformers
    (r'^reassemble_blocks\.readout_projects', 'neck.reassemble_stage.readout_projects'),
    (r'^reassemble_blocks\.projects\.(\d)\.conv', r'neck.reassemble_stage.layers.\1.projection'),
    (r'^reassemble_blocks\.resize_layers\.(\d)', r'neck.reassemble_stage.layers.\1.resize'),
    (r'^convs\.(\d)\.conv', r'neck.convs.\1'),
    (r'^fusion_blocks\.(\d)\.project\.conv', r'neck.fusion_stage.layers.\1.projection'),
    (
        r'^fusion_blocks\.(\d)\.res_conv_unit(\d)\.conv(\d)\.conv',
        r'neck.fusion_stage.layers.\1.residual_layer\2.convolution\3',
    ),
    (r'^project\.conv', 'head.projection'),
    (r'^conv_depth\.head', 'head.head'),
)


def renamed(key):
    for pattern, to in RENAMES:
        key, count = re.subn(pattern, to, key)
        if count:
            return key
    raise AssertionError(f'{key} has no name in transformers')


def test_dinov2_dpt_head_gives_the_depths_of_transformers():
    """An odd grid: the deepest map is rounded up, so shallower ones are resized to fit."""
    torch = pytest.importorskip('torch')
    pytest.importorskip('transformers')
    from transformers import Dinov2Config, DPTConfig
    from transformers.models.dpt import modeling_dpt

    rng = np.random.default_rng(1)
    channels, inputs = (4, 6, 8, 10), taps(rng)
    module = dense.DPT(0.25, channels=channels)  # 256 features: fixed in transformers
    variables = random_variables(module, inputs, rng)
    depth = jax.jit(module.apply)(variables, inputs)
    config = DPTConfig(
        backbone_config=Dinov2Config(
            hidden_size=D, num_hidden_layers=4, num_attention_heads=2, out_indices=[1, 2, 3, 4]
        ),
        hidden_size=D,
        neck_hidden_sizes=list(channels),
        add_projection=True,
        use_bias_in_fusion_residual=False,
        use_batch_norm_in_fusion_residual=False,
        readout_type='project',
    )
    theirs = torch.nn.ModuleDict(
        {'neck': modeling_dpt.DPTNeck(config), 'head': modeling_dpt.DPTDepthEstimationHead(config)}
    )
    weights = {
        renamed(key): torch.from_numpy(value.copy())
        for key, value in heads.to_torch(variables).items()
    }
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all('fusion_stage.layers.0.residual_layer1' in key for key in missing)
    states = [
        torch.from_numpy(np.concatenate([cls[:, None], patch.reshape(B, H * W, D)], axis=1))
        for patch, cls in inputs
    ]
    with torch.no_grad():
        want = theirs['head'](theirs['neck'](states, H, W)).numpy() + 0.25
    assert want.std() > 1e-3
    np.testing.assert_allclose(depth, want, atol=2e-5 * np.abs(want).max())
