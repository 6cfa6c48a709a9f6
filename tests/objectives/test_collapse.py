# SPDX-License-Identifier: Apache-2.0
"""The collapse of a teacher shows in the information of its targets about an image."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.objectives import collapse


def softmax(rows, k, scale, seed=0):
    logits = scale * np.random.default_rng(seed).normal(size=(rows, k))
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (p / p.sum(axis=1, keepdims=True)).astype(np.float32)


def named(p):
    return collapse.suspect_teacher(collapse.teacher_monitors(p), p.shape[-1])


def test_numbers_of_targets_match_their_definitions():
    p = softmax(40, 12, 3)
    got = collapse.teacher_monitors(p)
    wide = p.astype(np.float64)
    mean = wide.mean(axis=0)
    entropy = -(wide * np.log(wide)).sum(axis=1).mean()
    assert float(got['teacher_entropy']) == pytest.approx(entropy, abs=1e-5)
    assert float(got['kl_uniform']) == pytest.approx((mean * np.log(12 * mean)).sum(), abs=1e-5)
    assert float(got['prototype_use']) == pytest.approx(len(set(p.argmax(axis=1))) / 12)


def test_rows_that_do_not_exist_count_nowhere():
    p = softmax(30, 12, 3)
    padded = np.concatenate([p[:20], np.full((10, 12), np.nan, np.float32)])
    got = jax.jit(collapse.teacher_monitors)(padded, np.arange(30) < 20)
    for name, want in collapse.teacher_monitors(p[:20]).items():
        assert float(got[name]) == pytest.approx(float(want), abs=1e-6), name


def test_every_row_with_a_prototype_of_its_own_uses_all_it_could():
    assert float(collapse.teacher_monitors(np.eye(8, 100, dtype=np.float32))['prototype_use']) == 1
    assert (
        float(collapse.teacher_monitors(np.eye(100, 8, dtype=np.float32)[:9])['prototype_use']) == 1
    )


def test_spread_targets_are_not_suspect():
    assert named(softmax(256, 64, 4)) is None
    assert named(np.eye(64, 512, dtype=np.float32)) is None


def test_targets_collapsed_to_uniform_are_named_with_their_entropy():
    p = softmax(256, 64, 0.01)
    assert 'Collapse to uniform' in named(p)
    assert f'entropy {math.log(64):.3f} of at most {math.log(64):.3f}' in named(p)
    assert 'lower the teacher temperature' in named(p)


def test_targets_collapsed_to_a_constant_are_named_with_their_divergence():
    p = np.repeat(softmax(1, 64, 20), 256, axis=0)
    assert 'Collapse to a constant' in named(p)
    assert 'centre the teacher' in named(p)


def test_targets_that_share_few_prototypes_are_named():
    p = softmax(3, 512, 20)[np.arange(256) % 3]
    assert 'few prototypes' in named(p)
    assert '1.2%' in named(p)


def test_targets_that_are_not_finite_are_named():
    assert 'nan' in collapse.suspect_teacher(
        dict(teacher_entropy=np.nan, kl_uniform=0.1, prototype_use=0.5), 64
    )


def test_monitored_targets_get_no_gradient():
    grad = jax.grad(lambda p: collapse.teacher_monitors(p)['teacher_entropy'])(
        jnp.full((4, 8), 0.125)
    )
    assert not np.any(grad)
