# SPDX-License-Identifier: Apache-2.0
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.evals import monitors


def gaussian(b=256, d=32, seed=0):
    return np.random.default_rng(seed).normal(size=(b, d)).astype(np.float32)


def test_numbers_match_their_definitions():
    x = (gaussian(40, 12) * np.linspace(0.1, 3, 12) + 1).astype(np.float32)
    got = monitors.monitors(x)
    z = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert float(got['std']) == pytest.approx(np.sqrt(12) * z.std(0).mean(), rel=1e-4)
    sigma = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    p = sigma / sigma.sum() + 1e-7
    assert float(got['rankme']) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)
    cosines = (z @ z.T)[~np.eye(40, dtype=bool)]
    assert float(got['cosine']) == pytest.approx(cosines.mean(), abs=1e-5)
    assert float(got['rankme_max']) == 12


def test_isotropic_features_have_std_one_and_are_not_suspect():
    got = monitors.monitors(gaussian(2000, 32))
    assert float(got['std']) == pytest.approx(1.0, abs=0.02)
    assert float(got['cosine']) == pytest.approx(0.0, abs=0.01)
    assert float(got['rankme']) > 30
    assert monitors.suspect(got) is None


def test_large_common_direction_alone_is_not_suspect():
    got = monitors.monitors(gaussian() + 4)
    assert float(got['cosine']) > 0.9
    assert monitors.suspect(got) is None


def test_constant_features_are_suspect_by_their_std():
    got = monitors.monitors(1 + 1e-3 * gaussian())
    assert float(got['std']) < 0.01
    assert 'feature std is 0.00' in monitors.suspect(got)


def test_features_on_one_line_are_suspect_by_rankme():
    got = monitors.monitors(np.outer(gaussian(256, 1), np.arange(1, 33)))
    assert float(got['rankme']) == pytest.approx(1.0, abs=0.01)
    assert 'RankMe is 1.0 of at most 32' in monitors.suspect(got)


def test_high_cosine_is_named_when_the_std_is_not_yet_low():
    text = monitors.suspect(dict(std=0.2, cosine=0.9995, rankme=20.0, rankme_max=32.0))
    assert 'mean cosine between two images is 0.9995' in text


def test_non_finite_features_are_named():
    assert 'nan' in monitors.suspect(dict(std=np.nan, cosine=0.1, rankme=3.0, rankme_max=32.0))


def test_zero_features_give_finite_numbers():
    got = monitors.monitors(np.zeros((8, 4), np.float32))
    assert all(np.isfinite(float(v)) for v in got.values())


def test_half_precision_input_is_computed_in_float32():
    x = gaussian().astype(np.float16)
    got, want = monitors.monitors(x), monitors.monitors(x.astype(np.float32))
    assert all(float(got[k]) == float(want[k]) and got[k].dtype == np.float32 for k in want)


def test_a_single_image_is_refused():
    with pytest.raises(ValueError, match='2 or more'):
        monitors.monitors(np.zeros((1, 4), np.float32))


def softmax(rows, k, scale, seed=0):
    logits = scale * np.random.default_rng(seed).normal(size=(rows, k))
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (p / p.sum(axis=1, keepdims=True)).astype(np.float32)


def named(p):
    return monitors.suspect_teacher(monitors.teacher_monitors(p), p.shape[-1])


def test_numbers_of_targets_match_their_definitions():
    p = softmax(40, 12, 3)
    got = monitors.teacher_monitors(p)
    wide = p.astype(np.float64)
    mean = wide.mean(axis=0)
    entropy = -(wide * np.log(wide)).sum(axis=1).mean()
    assert float(got['teacher_entropy']) == pytest.approx(entropy, abs=1e-5)
    assert float(got['kl_uniform']) == pytest.approx((mean * np.log(12 * mean)).sum(), abs=1e-5)
    assert float(got['prototype_use']) == pytest.approx(len(set(p.argmax(axis=1))) / 12)


def test_rows_that_do_not_exist_count_nowhere():
    p = softmax(30, 12, 3)
    padded = np.concatenate([p[:20], np.full((10, 12), np.nan, np.float32)])
    got = jax.jit(monitors.teacher_monitors)(padded, np.arange(30) < 20)
    for name, want in monitors.teacher_monitors(p[:20]).items():
        assert float(got[name]) == pytest.approx(float(want), abs=1e-6), name


def test_every_row_with_a_prototype_of_its_own_uses_all_it_could():
    assert float(monitors.teacher_monitors(np.eye(8, 100, dtype=np.float32))['prototype_use']) == 1
    assert (
        float(monitors.teacher_monitors(np.eye(100, 8, dtype=np.float32)[:9])['prototype_use']) == 1
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
    assert 'nan' in monitors.suspect_teacher(
        dict(teacher_entropy=np.nan, kl_uniform=0.1, prototype_use=0.5), 64
    )


def test_monitored_targets_get_no_gradient():
    grad = jax.grad(lambda p: monitors.teacher_monitors(p)['teacher_entropy'])(
        jnp.full((4, 8), 0.125)
    )
    assert not np.any(grad)
