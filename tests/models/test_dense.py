# SPDX-License-Identifier: Apache-2.0
"""Parts of heads for dense prediction."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.models import dense


def test_corners_stay_where_they_are_if_aligned():
    x = jnp.arange(4.0).reshape(1, 2, 2, 1)
    got = dense.bilinear(x, (3, 5), True)[0, :, :, 0]
    np.testing.assert_allclose(got, np.arange(3)[:, None] + np.arange(5) / 4, atol=1e-6)


@pytest.mark.parametrize('size', [(7, 9), (3, 20), (16, 4)])
def test_edges_stay_where_they_are_if_not_aligned(size):
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    want = jax.image.resize(x, (2, *size, 5), 'linear')
    np.testing.assert_allclose(dense.bilinear(x, size, False), want, atol=1e-6)


def test_batch_statistics_are_those_of_torch():
    """mean 0.1 of the batch, variance unbiased, in 0.9 of what was there."""
    x = jax.random.normal(jax.random.key(1), (2, 3, 2, 4)) * 3 + 1
    norm = dense.BatchNorm()
    variables = norm.init(jax.random.key(0), x, True)
    assert not np.any(variables['batch_stats']['mean'])  # making parameters counts nothing
    y, changed = norm.apply(variables, x, True, mutable=['batch_stats'])
    np.testing.assert_allclose(y.std(axis=(0, 1, 2)), 1, atol=1e-5)
    rows = np.asarray(x).reshape(-1, 4)
    np.testing.assert_allclose(changed['batch_stats']['mean'], 0.1 * rows.mean(0), rtol=1e-5)
    want = 0.9 + 0.1 * rows.var(0, ddof=1)
    np.testing.assert_allclose(changed['batch_stats']['var'], want, rtol=1e-5)


def test_an_expanding_convolution_is_torchs_transposed_one():
    torch = pytest.importorskip('torch')
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    layer = dense.Expand(6, 2)
    params = layer.init(jax.random.key(1), x)
    kernel = np.asarray(params['params']['kernel']).transpose(2, 3, 0, 1)
    want = torch.nn.functional.conv_transpose2d(
        torch.from_numpy(np.moveaxis(np.asarray(x), 3, 1).copy()),
        torch.from_numpy(kernel.copy()),
        torch.from_numpy(np.array(params['params']['bias'])),
        stride=2,
    )
    np.testing.assert_allclose(np.moveaxis(layer.apply(params, x), 3, 1), want, atol=1e-5)


def test_a_depth_head_without_class_tokens_reads_patches_alone():
    patch = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    for module in (dense.DPT(0.1, 8), dense.PixioDPT(1, 8, (4, 4, 4, 4), 10.0)):
        make = functools.partial(module.init_with_output, size=(9, 10))
        out, variables = jax.eval_shape(make, jax.random.key(0), [(patch, None)] * 4)
        assert out.shape == (2, 9, 10)
        assert 'readout_projects_0_0' not in str(jax.tree.structure(variables))
