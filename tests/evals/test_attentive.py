# SPDX-License-Identifier: Apache-2.0
"""The attentive probe is one query's cross-attention, and finds what a mean hides."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import encoder, sharding
from ssl_jax.data import sources
from ssl_jax.data import transform as transform_lib
from ssl_jax.evals import attentive, task
from ssl_jax.run import errors

TRANSFORM = dict(transform_lib.of(16), mean=[0.5] * 3, std=[0.25] * 3)


def marked(n, seed):
    """Noise of random colour with one marked patch, in which a bright corner is the class."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, n)
    images = rng.integers(0, 120, (n, 16, 16, 3))
    for image, label in zip(images, labels, strict=True):
        y, x = 4 * rng.integers(0, 4, 2)
        patch = image[y : y + 4, x : x + 4]
        patch[:] = 128
        patch[..., 0] = 255
        top, left = 2 * (label // 2), 2 * (label % 2)
        patch[top : top + 2, left : left + 2, 1:] = 255
    return sources.Arrays(images.astype(np.uint8), labels, classes=('a', 'b', 'c', 'd'))


def evaluated(folder, devices=1, limit=None, **fields):
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    quiet = lambda *lines: None  # noqa: E731
    work = task.Work(mesh, TRANSFORM, pathlib.Path(folder), batch_size=64, limit=limit, log=quiet)
    data = task.Data(marked(400, 0), marked(100, 1))
    settings = attentive.Settings(**fields)
    model = encoder.Pixels(4, TRANSFORM)
    (row,) = attentive.evaluate(model, data, settings, work)
    return row


def test_logits_are_those_of_cross_attention_written_out():
    rng, (b, n, d, c) = np.random.default_rng(0), (3, 5, 128, 4)
    params = attentive.init(jax.random.key(0), d, c)
    params = {k: 20 * v + 0.1 * rng.normal(size=v.shape) for k, v in params.items()}
    x = rng.normal(size=(b, n, d))
    p = {k: np.asarray(v, np.float64) for k, v in params.items()}
    expected = []
    for tokens in x:
        out = []
        for h in range(2):  # heads of 64 channels
            part = slice(64 * h, 64 * (h + 1))
            keys, values = tokens @ p['key'][:, part], tokens @ p['value'][:, part]
            a = np.exp(keys @ p['query'][part] / 8)
            out.append(a / a.sum() @ values)
        expected.append((np.concatenate(out) + p['value_bias']) @ p['kernel'] + p['bias'])
    got = attentive.apply({k: jnp.float32(v) for k, v in params.items()}, jnp.float32(x))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_it_finds_the_one_patch_that_shows_the_class(tmp_path):
    row = evaluated(tmp_path, epochs=15, lrs=(1e-3, 1e-2))
    assert row['scores']['top-1'] > 80  # of four classes
    assert row['lr'] == max(row['sweep'], key=lambda r: r['val_top1'])['lr']
    assert row['scores']['top-5'] == 100


def test_eight_devices_train_the_heads_of_one(tmp_path):
    fields = dict(epochs=2, lrs=(1e-3, 1e-2), batch_size=30, limit=70)
    one, eight = (evaluated(tmp_path, n, **fields) for n in (1, 8))
    assert one['protocol_id'] == eight['protocol_id']
    assert one['scores'] == pytest.approx(eight['scores'], abs=1.6)  # one image of 70
    assert one['sweep'] == [pytest.approx(r, abs=15) for r in eight['sweep']]


def test_tokens_beyond_the_memory_are_an_error_before_they_are_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(attentive, 'MAX_BYTES', 2**19)
    with pytest.raises(errors.UserError, match='use at most 341 images, --limit'):
        evaluated(tmp_path)
