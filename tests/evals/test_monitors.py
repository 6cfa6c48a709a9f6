# SPDX-License-Identifier: Apache-2.0
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
