# SPDX-License-Identifier: Apache-2.0
"""cuDNN's attention, as far as a machine without a GPU can tell: what is lowered, and its maths."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from ssl_jax import sharding
from ssl_jax.kernels import attention, forms
from ssl_jax.kernels.segments import Segment, tokens_per_row


@pytest.fixture(autouse=True)
def found(monkeypatch):
    """JAX finds a cuDNN."""
    monkeypatch.setattr(cudnn, 'check_cudnn_version', lambda: 91100)


def gradient(heads, segments):
    def loss(qkv):
        return attention.attention(qkv, heads, segments).astype(jnp.float32).sum()

    return jax.grad(loss)


def calls(qkv, heads, segments, on='cuda', chosen='on', platform='cuda'):
    """[(kind, batch, tokens)] of cuDNN's calls in the lowered gradient."""
    with forms.using(chosen, platform):
        traced = jax.jit(gradient(heads, segments)).trace(qkv)
    text = traced.lower(lowering_platforms=(on,)).as_text()
    pattern = r'__cudnn\$fmhaSoftmax(\w*)\(.*?\) .*: \(tensor<(\d+)x(\d+)x'
    return [(k, int(b), int(n)) for k, b, n in re.findall(pattern, text)]


@pytest.mark.parametrize(
    'dtype, heads, dim, fits',
    [
        ('bfloat16', 2, 128, True),
        ('float16', 16, 128, True),  # heads of 8 channels
        ('bfloat16', 2, 256, True),  # of 128
        ('float32', 2, 128, False),
        ('bfloat16', 2, 24, False),  # of 12
        ('bfloat16', 1, 256, False),  # of 256
    ],
)
def test_cudnn_is_called_where_it_takes_the_heads(dtype, heads, dim, fits):
    qkv = jnp.zeros((2 * 50, 3 * dim), dtype)
    both = [('', 2, 50), ('Backward', 2, 50)]
    assert calls(qkv, heads, (Segment(1, 50),)) == (both if fits else [])


def test_each_image_size_has_its_calls_and_odd_ones_one_token_more():
    segments = Segment(2, 16), Segment(3, 7, 1), Segment(1, 9)
    qkv = jnp.zeros((2 * tokens_per_row(segments), 384), jnp.bfloat16)
    found = calls(qkv, 2, segments)
    sizes = {(4, 16), (6, 8), (2, 10)}
    assert {(b, n) for kind, b, n in found if not kind} == sizes
    assert {(b, n) for kind, b, n in found if kind == 'Backward'} == sizes
    assert len(found) == 6


def test_without_a_verdict_and_on_tpu_there_is_no_call():
    qkv, segments = jnp.zeros((2 * 50, 384), jnp.bfloat16), (Segment(1, 50),)
    assert calls(qkv, 2, segments, chosen='off') == []
    assert calls(qkv, 2, segments, chosen={}) == []
    assert calls(qkv, 2, segments, on='tpu', platform='tpu') == []
    with forms.recording('cuda') as seen:
        jax.eval_shape(gradient(2, segments), qkv)
    ((call, names),) = seen.items()
    assert names == ('cudnn',)
    assert len(calls(qkv, 2, segments, chosen={call.key: 'cudnn'})) == 2


def test_on_a_mesh_each_device_calls_it_on_its_images():
    mesh, segments = sharding.make_mesh(2, 4, devices=jax.devices()[:8]), (Segment(1, 7),)
    rows = sharding.batch_sharding(mesh)
    with jax.set_mesh(mesh):
        qkv = jax.ShapeDtypeStruct((16 * 7, 384), jnp.bfloat16, sharding=rows)
        assert calls(qkv, 2, segments) == [('', 2, 8), ('Backward', 2, 8)]
        few = jax.ShapeDtypeStruct((4 * 7, 384), jnp.bfloat16)  # fewer than devices
        assert calls(few, 2, segments) == []


@pytest.mark.parametrize('segments', [(Segment(1, 17),), (Segment(2, 6, 2), Segment(3, 5, 3))])
def test_its_arguments_are_those_of_our_attention(monkeypatch, segments):
    """With JAX's own form in place of cuDNN's, which takes the same arguments."""
    plain = jax.nn.dot_product_attention

    def xla(q, k, v, implementation, **masked):
        assert implementation == 'cudnn' and q.shape[1] % 2 == 0
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        return plain(q, k, v, implementation='xla', **masked).astype(jnp.float16)

    monkeypatch.setattr(jax.nn, 'dot_product_attention', xla)
    rng = np.random.default_rng(0)
    rows = 3 * tokens_per_row(segments)
    qkv, grad = (jnp.asarray(rng.normal(size=(rows, n)), jnp.float16) for n in (3 * 128, 128))

    def both(x):
        fn = functools.partial(attention.attention, num_heads=2, segments=segments)
        out, backward = jax.vjp(fn, x)
        return out, *backward(grad)

    want, d_want = jax.jit(lambda x: both(x))(qkv)
    with forms.using('on', 'cuda'):
        found, d_found = jax.jit(lambda x: both(x))(qkv)
    np.testing.assert_allclose(found, want, atol=4e-3)
    np.testing.assert_allclose(d_found, d_want, atol=1e-2)


def test_a_width_that_is_no_multiple_is_refused_before():
    with forms.using('on', 'cuda'), pytest.raises(ValueError, match='3 \\* num_heads = 15'):
        attention.attention(jnp.zeros((2, 48), jnp.bfloat16), 5, (Segment(1, 2),))
