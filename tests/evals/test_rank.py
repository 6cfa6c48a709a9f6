# SPDX-License-Identifier: Apache-2.0
import json

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from ssl_jax import cli
from ssl_jax.evals import monitors, rank


def spectrum(values, n=200, seed=0):
    """Centred features (n, d) with these eigenvalues of the covariance."""
    rng = np.random.default_rng(seed)
    d = len(values)
    u = rng.normal(size=(n, d))
    u = np.linalg.qr(u - u.mean(axis=0))[0]
    v = np.linalg.qr(rng.normal(size=(d, d)))[0]
    return (u * np.sqrt(np.asarray(values) * (n - 1))) @ v


def test_rankme_of_known_spectra():
    assert float(monitors.rankme(spectrum(np.ones(32)))) == pytest.approx(32, rel=1e-3)
    five = np.array([1.0] * 5 + [1e-20] * 27)
    assert float(monitors.rankme(spectrum(five))) == pytest.approx(5, rel=1e-2)
    x = spectrum(1 / np.arange(1, 33))
    p = np.sqrt(1 / np.arange(1, 33))
    p /= p.sum()
    assert float(monitors.rankme(x)) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-3)


@pytest.mark.parametrize('a', [0.5, 1.0, 2.0])
def test_alpha_of_known_spectra(a):
    assert rank.alpha(spectrum(np.arange(1, 129.0) ** -a)) == pytest.approx(a, abs=1e-6)
    # Outside the ranks 4 to 100 the spectrum does not matter.
    bent = np.arange(1, 129.0) ** -a
    bent[:3], bent[100:] = 7.0, 1e-4
    assert rank.alpha(spectrum(bent)) == pytest.approx(a, abs=1e-6)


def test_alpha_of_a_noisy_spectrum_weights_ranks_by_their_inverse():
    rng = np.random.default_rng(0)
    values = np.sort(np.arange(1, 129.0) ** -1.5 * np.exp(rng.normal(size=128)))[::-1]
    k = np.arange(4, 101)
    x, w = np.stack([-np.log(k), np.ones(97)], axis=1), (1 / k)[:, None]
    want = np.linalg.solve(x.T @ (w * x), x.T @ (w[:, 0] * np.log(values[3:100])))[0]
    assert rank.alpha(spectrum(values)) == pytest.approx(want, abs=1e-6)


def test_alpha_of_two_numbers_is_nothing():
    assert np.isnan(rank.alpha(spectrum([2.0, 1.0])))


def test_lidar_counts_the_directions_that_tell_images_apart():
    rng = np.random.default_rng(0)
    n, q, d = 200, 8, 16
    x = 0.1 * rng.normal(size=(n, q, d))
    x[..., :4] += rng.normal(size=(n, 1, 4))  # images differ in four directions
    assert rank.lidar(x) == pytest.approx(4, abs=0.3)
    # Spread within images does not count, however large.
    x[..., 4:8] += 30 * rng.normal(size=(n, q, 4))
    assert rank.lidar(x) == pytest.approx(4, abs=0.3)
    assert float(monitors.rankme(x.reshape(-1, d))) > 4.5


def test_lidar_agrees_with_the_matrices_of_the_paper():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(30, 5, 6)) + 2 * rng.normal(size=(30, 1, 6)) * np.arange(1, 7)
    means = x.mean(axis=1)
    s_b = np.cov(means.T)
    s_w = sum(np.outer(v, v) for v in (x - means[:, None]).reshape(-1, 6)) / (30 * 4)
    values, vectors = np.linalg.eigh(s_w + 1e-4 * np.eye(6))
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    p = np.linalg.eigvalsh(root @ s_b @ root)
    p = p / p.sum() + 1e-7
    assert rank.lidar(x) == pytest.approx(np.exp(-(p * np.log(p)).sum()))


def tokens(spread, images=16, patches=49, d=24, seed=0):
    """Patches of 24 kinds in every 8 images, three kinds in each image."""
    rng = np.random.default_rng(seed)
    kinds = np.linalg.qr(rng.normal(size=(d, d)))[0]
    index = (np.arange(images)[:, None] % 8 * 3 + rng.integers(0, 3, (images, patches))) % d
    return kinds[index] + spread * rng.normal(size=(images, patches, d))


def test_tight_clusters_have_a_higher_dse_than_loose_ones():
    tight, loose = (rank.dse_parts(tokens(spread)) for spread in (0.02, 0.5))
    assert tight['inter'] > loose['inter'] and tight['intra'] < 0.3 * loose['intra']
    flat = tokens(0.02)
    flat[..., 3:] *= 1e-3  # three directions
    assert rank.dse_parts(flat)['dim'] < 0.5 * tight['dim']
    assert tight == rank.dse_parts(tokens(0.02))


def test_equal_tokens_have_finite_numbers():
    parts = rank.dse_parts(np.ones((16, 9, 8)))
    assert all(map(np.isfinite, parts.values()))
    assert parts['dim'] == pytest.approx(1 / 8, rel=1e-3)


def test_the_two_parts_of_the_dse_get_equal_spread_over_checkpoints():
    rows = [dict(step=s, inter=i, intra=0.5, dim=d)
            for s, i, d in ((3, 1.0, 0.1), (1, 2.0, 0.3), (2, 4.0, 0.2))]  # fmt: skip
    got = rank.combined(rows)
    assert [row['step'] for row in got] == [1, 2, 3]
    weight = np.std([1, 2, 4]) / np.std([0.1, 0.2, 0.3])
    assert got[0]['DSE'] == pytest.approx(2 - 0.5 + weight * 0.3)


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    """A run with two checkpoints, the second of which has collapsed."""
    folder = tmp_path_factory.mktemp('run')
    tiny.save(tiny.config(), folder, step=4)
    tiny.save(tiny.config(), folder, step=6, change=lambda p: jax.tree.map(jnp.zeros_like, p))
    lines = [json.dumps({'step': s, 'knn/cls/20': v}) for s, v in ((2, 30.0), (4, 40.0))]
    (folder / 'metrics.jsonl').write_text('\n'.join(lines) + '\n')
    return folder


def test_checkpoints_are_ranked_and_a_second_call_reads_none_again(workdir, capsys, monkeypatch):
    cli.main(['rank', '--workdir', str(workdir), '--limit', '32'])
    out = capsys.readouterr().out
    stored = json.loads((workdir / 'rank.json').read_text())
    rows = stored['rows']
    assert [row['step'] for row in rows] == [4, 6]
    assert rows[0]['knn/cls/20'] == 40 and 'knn/cls/20' not in rows[1]
    assert 'knn/cls/20' in out and '40.000*' in out
    assert rows[1]['RankMe'] < 1.5 < rows[0]['RankMe']
    assert stored['protocol']['images'] == 32 and 'delta' in stored['protocol']['lidar']
    picture = cv2.imread(str(workdir / 'pictures' / 'rank.png'))
    assert min(picture.shape[:2]) > 200 and picture.std() > 10
    monkeypatch.setattr(rank, '_measure', None)
    assert rank.rank(workdir, limit=32) == rows


def test_a_folder_without_checkpoints_is_named(tmp_path):
    with pytest.raises(ValueError, match='there is no checkpoint in'):
        rank.rank(tmp_path)


def test_advice_says_what_the_numbers_cannot_tell():
    assert 'checkpoint.keep_every' in rank.advice([dict(step=1)])
    rows = [
        {'step': s, 'RankMe': r, 'LiDAR': 5.0 - s, 'alpha': a, 'DSE': s, 'knn/cls/20': 10 * s}
        for s, r, a in ((1, 1.0, 3.0), (2, 4.0, 0.9), (3, 3.0, 2.0), (4, 5.0, 2.5))
    ]
    text = rank.advice(rows)
    assert 'RankMe step 4, LiDAR step 1, alpha step 2, DSE step 4' in text
    assert 'necessary and not sufficient' in text
    assert 'RankMe +0.80, LiDAR -1.00' in text and 'DSE +1.00' in text
