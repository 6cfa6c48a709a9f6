# SPDX-License-Identifier: Apache-2.0
"""Attention, dense layers, GELU and LayerNorm against float64, with all their gradients."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from ssl_jax import sharding
from ssl_jax.kernels import attention, forms, ops
from ssl_jax.kernels.segments import Segment, tokens_per_row
from ssl_jax.kernels.tpu import attention as tpu_attention
from ssl_jax.kernels.tpu import rows as tpu_rows

erf = np.vectorize(math.erf, otypes=[np.float64])


def normal(seed, *shape, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def attention64(qkv, grad, heads):
    """Output and gradient of attention in float64 numpy, with the (N, N) Jacobian spelled out."""
    b, n, width = qkv.shape
    q, k, v = qkv.astype(np.float64).reshape(b, n, 3, heads, -1).transpose(2, 0, 3, 1, 4)
    grad = grad.astype(np.float64).reshape(b, n, heads, -1).transpose(0, 2, 1, 3)
    scale = q.shape[-1] ** -0.5
    logits = q @ k.swapaxes(-1, -2) * scale
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    d_weights = grad @ v.swapaxes(-1, -2)
    d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * scale
    parts = (d_logits @ k, d_logits.swapaxes(-1, -2) @ q, weights.swapaxes(-1, -2) @ grad)
    d_qkv = np.stack(parts).transpose(1, 3, 0, 2, 4).reshape(b, n, width)
    return (weights @ v).swapaxes(1, 2).reshape(b, n, width // 3), d_qkv


def attend(qkv, heads):
    """`attention.attention` of images (B, N, 3 D)."""
    b, n, width = qkv.shape
    y = attention.attention(qkv.reshape(b * n, width), heads, (Segment(1, n),))
    return y.reshape(b, n, width // 3)


def forward_and_gradient(fn, *args, grad, **compiler_options):
    """Output and gradients of fn for the cotangent `grad`, compiled."""

    def both(args, grad):
        out, vjp = jax.vjp(fn, *args)
        return out, vjp(grad)

    return jax.jit(both, compiler_options=compiler_options)(args, grad)


@pytest.mark.parametrize('tokens', [1, 17, 197])
@pytest.mark.parametrize('head_dim', [8, 32, 64, 80])
def test_attention_and_its_gradient_equal_float64(tokens, head_dim):
    qkv, grad = normal(0, 2, tokens, 3 * 2 * head_dim), normal(1, 2, tokens, 2 * head_dim)
    out, (d_qkv,) = forward_and_gradient(lambda x: attend(x, 2), qkv, grad=grad)
    want, d_want = attention64(qkv, grad, heads=2)
    np.testing.assert_allclose(out, want, atol=2e-6)
    np.testing.assert_allclose(d_qkv, d_want, atol=5e-6)


@pytest.mark.parametrize('batch', [4, 5])
def test_attention_in_chunks_of_samples_is_the_same(batch, monkeypatch):
    qkv, grad = normal(0, batch, 9, 48), normal(1, batch, 9, 16)
    monkeypatch.setattr(attention, 'CHUNK_BYTES', 2 * 4 * 9**2 * 4)  # two samples at a time
    out, (d_qkv,) = forward_and_gradient(lambda x: attend(x, 4), qkv, grad=grad)
    want, d_want = attention64(qkv, grad, heads=4)
    np.testing.assert_allclose(out, want, atol=2e-6)
    np.testing.assert_allclose(d_qkv, d_want, atol=5e-6)


# Images and tokens: whole windows, windows that begin between multiples of 8, two images to a
# window, images that do not fill the last block; heads that are a part of 128 lanes, all of them,
# and some that lie across two tiles.
@pytest.mark.parametrize(
    'images, tokens, head_dim, heads',
    [
        (9, 17, 32, 4),
        (4, 50, 64, 2),
        (3, 12, 80, 8),
        (2, 52, 128, 1),
        (2, 132, 64, 2),
    ],
)
def test_the_tpu_kernels_of_attention_equal_float64(images, tokens, head_dim, heads):
    width = heads * head_dim
    qkv, grad = normal(0, images, tokens, 3 * width), normal(1, images, tokens, width)
    rows = jnp.asarray(qkv.reshape(-1, 3 * width)), jnp.asarray(grad.reshape(-1, width))
    out = tpu_attention.attention(rows[0], heads, (Segment(1, tokens),), interpret=True)
    d_qkv = tpu_attention.gradient(*rows, heads, (Segment(1, tokens),), interpret=True)
    want, d_want = attention64(qkv, grad, heads=heads)
    np.testing.assert_allclose(out.reshape(want.shape), want, atol=2e-6)
    np.testing.assert_allclose(d_qkv.reshape(d_want.shape), d_want, atol=5e-6)


@pytest.mark.parametrize(
    'sizes',
    [
        ((2, 19), (3, 5)),
        pytest.param(((11, 19, 5), (7, 5, 3)), marks=pytest.mark.slow),
        ((3, 16), (2, 8)),
        ((1, 397, 3), (2, 5, 3)),
    ],
)
def test_attention_of_images_of_several_sizes_is_that_of_each_size_by_itself(sizes):
    segments, batch = tuple(Segment(*s) for s in sizes), 3
    rows = batch * tokens_per_row(segments)
    qkv, grad = normal(0, rows, 3 * 128), normal(1, rows, 128)
    parts = attention._images(jnp.asarray(grad), segments)
    grad = attention._rows(parts, segments)  # no gradient of padding
    fn = functools.partial(attention.attention, num_heads=2, segments=segments)
    out, (d_qkv,) = forward_and_gradient(fn, qkv, grad=grad)
    kernels = (
        tpu_attention.attention(jnp.asarray(qkv), 2, segments, interpret=True),
        tpu_attention.gradient(*map(jnp.asarray, (qkv, grad)), 2, segments, interpret=True),
    )
    images = [attention._images(jnp.asarray(x), segments) for x in (qkv, grad)]
    wants = [attention64(*map(np.asarray, pair), heads=2) for pair in zip(*images, strict=True)]
    for found, want in zip((out, d_qkv), zip(*wants, strict=True), strict=True):
        np.testing.assert_allclose(found, attention._rows(want, segments), atol=5e-6)
    for found, want in zip(kernels, zip(*wants, strict=True), strict=True):
        np.testing.assert_allclose(found, attention._rows(want, segments), atol=5e-6)


def test_many_images_of_several_sizes_go_through_the_kernels_size_by_size():
    """Rows of whole groups of samples, of which DINOv2 leaves images out."""
    segments = (Segment(12, 9), Segment(22, 4))
    qkv, grad = (jnp.asarray(normal(i, 196, w)) for i, w in ((0, 3 * 128), (1, 128)))
    assert tpu_attention.takes(qkv, 2, (Segment(2, 19), Segment(6, 5)))
    assert not tpu_attention.takes(qkv, 2, segments)
    fn = functools.partial(attention.attention, num_heads=2, segments=segments)
    out, (want,) = forward_and_gradient(fn, qkv, grad=grad)
    forward = functools.partial(tpu_attention.attention, interpret=True)
    gradient = functools.partial(tpu_attention.gradient, interpret=True)
    found = attention._kernel_by_size(forward, 2, segments, qkv)
    np.testing.assert_allclose(found, out, atol=5e-6)
    found = attention._kernel_by_size(gradient, 2, segments, qkv, grad)
    np.testing.assert_allclose(found, want, atol=1e-5)


def test_the_tpu_kernels_take_no_notice_of_other_images():
    """Not even of logits beyond float32's exponentials."""
    qkv, grad = normal(0, 4, 50, 3 * 128), normal(1, 4, 50, 128)

    def run(qkv):
        rows = jnp.asarray(qkv.reshape(-1, 3 * 128)), jnp.asarray(grad.reshape(-1, 128))
        out = tpu_attention.attention(rows[0], 2, (Segment(1, 50),), interpret=True)
        d_qkv = tpu_attention.gradient(*rows, 2, (Segment(1, 50),), interpret=True)
        return out[50:100], d_qkv[50:100]

    others = qkv.copy()
    others[[0, 2, 3]] *= 1e3
    for one, other in zip(run(qkv), run(others), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize('shape', [(8, 128), (1576, 640), (1688, 128)])  # the last: no divisor
def test_the_tpu_kernel_that_sums_rows_equals_float64(shape):
    x = normal(0, *shape)
    parts = tpu_rows.sum_rows(jnp.asarray(x), interpret=True)
    np.testing.assert_allclose(parts.sum(0), x.astype(np.float64).sum(0), atol=1e-4)
    assert tpu_rows.sum_rows(jnp.asarray(x, jnp.bfloat16), interpret=True).dtype == jnp.float32


@pytest.mark.parametrize('shape', [(8, 128), (48, 256), (536, 256)])
def test_the_tpu_kernels_of_layer_norm_equal_float64(shape):
    x, grad = 3 + normal(0, *shape, scale=2), normal(1, *shape)
    scale, bias = normal(2, shape[1]), normal(3, shape[1])
    want, (d_x, d_scale, d_bias) = layer_norm64(x, scale, bias, grad, 1e-6)
    other = normal(4, *shape)
    x, grad, scale, bias = jnp.asarray(x), jnp.asarray(grad), scale[None], bias[None]
    y = tpu_rows.layer_norm(x, scale, bias, 1e-6, interpret=True)
    arrays = x, grad, jnp.asarray(other)
    found = tpu_rows.layer_norm_gradient(*arrays, scale=scale, eps=1e-6, interpret=True)
    np.testing.assert_allclose(y, want, atol=5e-6)
    np.testing.assert_allclose(found[0], d_x + other, atol=5e-6)
    np.testing.assert_allclose(found[1].sum(0), d_scale, atol=1e-4)
    np.testing.assert_allclose(found[2].sum(0), d_bias, atol=1e-4)


def calls_a_kernel(fn, *args, on='tpu'):
    return 'tpu_custom_call' in jax.jit(fn).trace(*args).lower(lowering_platforms=(on,)).as_text()


@pytest.mark.parametrize(
    'dim, heads, tokens, kernel',
    [
        (256, 4, 17, True),
        (160, 2, 17, False),  # heads of 80 channels fill five tiles, not 1.25
        (96, 3, 17, False),
        (256, 4, 577, False),  # logits too large
        (1280, 16, 257, False),  # eight images by five tiles too large
    ],
)
@pytest.mark.usefixtures('tpu_kernels_on')
def test_on_tpu_a_kernel_attends_within_whole_tiles_of_lanes(dim, heads, tokens, kernel):
    qkv = jnp.zeros((2, tokens, 3 * dim))
    assert calls_a_kernel(lambda x: attend(x, heads), qkv) == kernel
    assert not calls_a_kernel(lambda x: attend(x, heads), qkv, on='cpu')


@pytest.mark.usefixtures('tpu_kernels_on')
def test_on_a_mesh_each_device_runs_the_kernels_on_its_part_and_cpu_computes_the_same():
    qkv, x = jnp.asarray(normal(0, 16 * 8, 384)), jnp.asarray(normal(1, 16 * 8, 128))

    def loss(qkv, x):
        y = ops.layer_norm(x, jnp.ones(128), jnp.zeros(128))
        y += attention.attention(qkv, 2, (Segment(1, 8),))
        return jnp.square(ops.dense(y, jnp.eye(128), jnp.zeros(128))).sum()

    alone = jax.jit(jax.grad(loss, argnums=(0, 1)))(qkv, x)
    mesh = sharding.make_mesh(2, 4, devices=jax.devices()[:8])
    put = NamedSharding(mesh, sharding.BATCH)
    with jax.set_mesh(mesh):
        split = [jax.device_put(a, put) for a in (qkv, x)]
        traced = jax.jit(lambda *a: jax.grad(loss, argnums=(0, 1))(*a)).trace(*split)
        text = traced.lower(lowering_platforms=('tpu',)).as_text()
        found = traced.lower().compile()(*split)
    # A part is 16 rows of the 128: 2 images, padded by no one.
    assert 'tpu_custom_call' in text and 'tensor<16x384xf32>' in text
    for a, b in zip(found, alone, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_without_a_word_all_of_a_tpu_program_is_xlas():
    def block(x):
        y = ops.layer_norm(x, jnp.ones(128), jnp.zeros(128))
        qkv = ops.dense(y, jnp.ones((128, 384)), jnp.zeros(384))
        return attention.attention(qkv, 2, (Segment(1, 8),)).sum()

    x = jnp.zeros((16, 128))
    assert not calls_a_kernel(jax.grad(block), x)
    with forms.using('on'):
        assert calls_a_kernel(jax.grad(lambda x: block(x)), x)
        with forms.using('off'):
            assert not calls_a_kernel(jax.grad(lambda x: block(x)), x)


def test_attention_survives_logits_of_ten_thousand():
    qkv, grad = normal(0, 1, 17, 96, scale=50.0), normal(1, 1, 17, 32)
    out, (d_qkv,) = forward_and_gradient(lambda x: attend(x, 1), qkv, grad=grad)
    want, d_want = attention64(qkv, grad, heads=1)
    np.testing.assert_allclose(out, want, rtol=1e-3, atol=1e-2)
    # Softmax is one-hot here, so gradients of q and k vanish and the one of v is a permutation.
    np.testing.assert_allclose(d_qkv, d_want, atol=5e-2)


def test_attention_says_what_is_wrong_with_the_width():
    with pytest.raises(ValueError, match='3 \\* num_heads = 15'):
        attention.attention(jnp.zeros((2, 48)), 5, (Segment(1, 2),))


def test_gelu_and_its_gradient_equal_float64():
    x = np.concatenate([np.linspace(-12, 12, 4001), [-1e4, -30, 0, 30, 1e4]]).astype(np.float32)
    y = x.astype(np.float64)
    cdf = 0.5 * (1 + erf(y / math.sqrt(2)))
    # As outside the tests: the emitters of conftest are off by 6.5e-7 at -5.3.
    emitters = {'xla_cpu_use_fusion_emitters': True}
    out, (d_x,) = forward_and_gradient(ops.gelu, x, grad=np.ones_like(x), **emitters)
    np.testing.assert_allclose(out, y * cdf, rtol=2e-7, atol=6e-7)
    density = np.exp(-0.5 * y * y) / math.sqrt(2 * math.pi)
    np.testing.assert_allclose(d_x, cdf + y * density, atol=6e-7)


def layer_norm64(x, scale, bias, grad, eps):
    """Output and gradients in float64, from the Jacobian of each row."""
    x, scale, bias, grad = (np.asarray(a, np.float64) for a in (x, scale, bias, grad))
    d = x.shape[-1]
    centred = x - x.mean(-1, keepdims=True)
    inverse = 1 / np.sqrt((centred**2).mean(-1, keepdims=True) + eps)
    hat = centred * inverse
    jacobian = inverse[..., None] * (np.eye(d) - 1 / d - hat[..., :, None] * hat[..., None, :] / d)
    d_x = np.einsum('...i,...ij->...j', grad * scale, jacobian)
    rows = tuple(range(x.ndim - 1))
    return hat * scale + bias, (d_x, (grad * hat).sum(rows), grad.sum(rows))


@pytest.mark.parametrize('mean', [0.0, 100.0])
def test_layer_norm_and_its_gradients_equal_float64(mean):
    x = normal(0, 3, 17, 48) + np.float32(mean)
    scale, bias, grad = 1 + normal(1, 48), normal(2, 48), normal(3, 3, 17, 48)
    fn = lambda *a: ops.layer_norm(*a, 1e-6)  # noqa: E731
    out, grads = forward_and_gradient(fn, x, scale, bias, grad=grad)
    want, wanted = layer_norm64(x, scale, bias, grad, 1e-6)
    # One unit in the last place of x itself is 8e-6 at a mean of 100.
    tolerance = 5e-6 if mean == 0 else 1e-4
    np.testing.assert_allclose(out, want, atol=tolerance)
    for got, expected in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(got, expected, atol=5 * tolerance)


@pytest.mark.parametrize('k, m', [(24, 40), (40, 24)])
@pytest.mark.parametrize('activation', [False, True])
def test_dense_and_its_gradients_equal_float64(k, m, activation):
    x, kernel, bias, grad = normal(0, 3, 17, k), normal(1, k, m), normal(2, m), normal(3, 3, 17, m)
    fn = ops.gelu_dense if activation else ops.dense
    out, (d_x, d_kernel, d_bias) = forward_and_gradient(fn, x, kernel, bias, grad=grad)
    y, w, g = (a.astype(np.float64) for a in (x, kernel, grad))
    inner, slope = y, 1.0
    if activation:
        cdf = 0.5 * (1 + erf(y / math.sqrt(2)))
        slope = cdf + y * np.exp(-0.5 * y * y) / math.sqrt(2 * math.pi)
        inner = y * cdf
    np.testing.assert_allclose(out, inner @ w + bias, atol=3e-5)
    np.testing.assert_allclose(d_x, (g @ w.T) * slope, atol=3e-5)
    np.testing.assert_allclose(d_kernel, np.einsum('bnk,bnm->km', inner, g), atol=3e-5)
    np.testing.assert_allclose(d_bias, g.sum((0, 1)), atol=3e-5)


def block(x, scale, w1, w2):
    """A small block that uses every function: (B, N, 16) -> (B, N, 16)."""
    zeros = functools.partial(jnp.zeros, dtype=x.dtype)
    y = ops.layer_norm(x, scale, jnp.zeros_like(scale))
    y = attend(ops.dense(y, w1, zeros(48)), 2)
    return x + ops.gelu_dense(y, w2, zeros(16))


WEIGHTS = (np.ones(16, np.float32), normal(1, 16, 48, scale=0.3), normal(2, 16, 16, scale=0.3))


def loss(weights, x):
    return jnp.square(block(x, *weights)).sum()


def assert_trees_close(got, want, **tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, want)


def test_scan_remat_and_vmap_give_the_gradients_of_a_plain_call():
    x = jnp.asarray(normal(0, 6, 5, 16))

    def by_scan(weights, x):
        step = jax.checkpoint(lambda total, row: (total + loss(weights, row[None]), None))
        return jax.lax.scan(step, 0.0, x)[0]

    def by_vmap(weights, x):
        return jax.vmap(lambda row: loss(weights, row))(x.reshape(3, 2, 5, 16)).sum()

    want = jax.jit(jax.grad(loss))(WEIGHTS, x)
    for other in (by_scan, by_vmap):
        assert_trees_close(jax.jit(jax.grad(other))(WEIGHTS, x), want, rtol=2e-5, atol=2e-5)


def test_bfloat16_stays_bfloat16_and_close_to_float32():
    x = jnp.asarray(normal(0, 4, 17, 16))
    low = [jnp.asarray(w, jnp.bfloat16) for w in WEIGHTS[1:]]
    out, vjp = jax.vjp(lambda x, *w: block(x, WEIGHTS[0], *w), x.astype(jnp.bfloat16), *low)
    grads = vjp(jnp.ones_like(out))
    want, vjp = jax.vjp(lambda x, *w: block(x, WEIGHTS[0], *w), x, *WEIGHTS[1:])
    assert {a.dtype for a in (out, *grads)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(out.astype(np.float32), want, atol=0.06)
    for got, expected in zip(grads, vjp(jnp.ones_like(want)), strict=True):
        error = np.abs(got.astype(np.float32) - expected).max() / np.abs(expected).max()
        assert error < 0.03


def test_on_eight_devices_a_split_batch_is_never_gathered(monkeypatch):
    monkeypatch.setattr(attention, 'CHUNK_BYTES', 0)  # one device would loop over the samples
    mesh = sharding.make_mesh(devices=jax.devices()[:8])
    x = jnp.asarray(normal(0, 16, 17, 16))
    want = jax.jit(jax.grad(loss, argnums=(0, 1)))(WEIGHTS, x)
    rows = NamedSharding(mesh, sharding.BATCH)
    with jax.set_mesh(mesh):
        whole = sharding.replicated(mesh)
        step = jax.jit(
            jax.grad(loss, argnums=(0, 1)),
            in_shardings=(whole, rows),
            out_shardings=(whole, rows),
        )
        text = step.lower(WEIGHTS, x).compile().as_text()
        got = step(WEIGHTS, jax.device_put(x, rows))
    assert not re.search('all-gather|all-to-all|collective-permute', text)
    assert_trees_close(got, want, rtol=2e-5, atol=2e-5)


def test_the_loop_over_samples_is_for_cpu_alone(monkeypatch):
    monkeypatch.setattr(attention, 'CHUNK_BYTES', 0)
    traced = jax.jit(lambda x: attend(x, 2)).trace(jnp.zeros((4, 5, 48)))
    assert 'stablehlo.while' in traced.lower(lowering_platforms=('cpu',)).as_text()
    assert 'stablehlo.while' not in traced.lower(lowering_platforms=('tpu',)).as_text()
