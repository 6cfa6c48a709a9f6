# SPDX-License-Identifier: Apache-2.0
"""Photometry does what torchvision's operations do, with their odds, and as a function of keys."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import sharding
from ssl_jax.augment import photometry

JITTER = dict(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
DINO = dict(**JITTER, jitter_prob=0.8, grey_prob=0.2, blur_prob=0.5, solarize_prob=0.2)
NOTHING = photometry.Photometry(
    jitter=False, order=(0, 1, 2, 3), factors=(1.0, 1.0, 1.0), hue=0.0,
    grey=False, blur=False, sigma=1.0, solarize=False,
)  # fmt: skip


def pictures(n=6, height=12, width=16, seed=0):
    """Random pixels with pure grey, black, white and saturated ones among them."""
    x = np.random.default_rng(seed).integers(0, 256, (n, height, width, 3), dtype=np.uint8)
    x[:, 0, :6] = [[0, 0, 0], [255, 255, 255], [255, 0, 0], [0, 255, 0], [0, 0, 255], [77, 77, 77]]
    x[:, 1, :3] = [[200, 200, 10], [10, 200, 200], [200, 10, 200]]  # two colours share the maximum
    return x


def keys(n, seed=0):
    return photometry.sample_keys(jax.random.key(seed), np.arange(n))


@functools.lru_cache
def compiled(**options):
    return jax.jit(functools.partial(photometry.photometric, **options))


def photometric(keys, images, **options):
    return np.asarray(compiled(**options)(keys, images))


apply_photometry = jax.jit(
    photometry.apply_photometry, static_argnames=('taps', 'threshold', 'skip')
)


def apply(images, threshold=128, **draws):
    """One set of draws for all images."""
    draws = NOTHING._replace(**draws)
    spread = [np.broadcast_to(np.asarray(v), (len(images), *np.shape(v))) for v in draws]
    draws = photometry.Photometry(*spread)
    return np.asarray(apply_photometry(images, draws, threshold=threshold))


@pytest.mark.parametrize('p', [0.0, 0.25, 0.5, 1.0])
def test_a_flip_mirrors_the_columns_with_its_probability(p):
    image = pictures(1)
    n = 4000
    out = np.asarray(photometry.random_flip(keys(n), np.repeat(image, n, axis=0), p))
    mirrored = (out == image[:, :, ::-1]).all(axis=(1, 2, 3))
    assert ((out == image).all(axis=(1, 2, 3)) != mirrored).all()
    assert abs(mirrored.mean() - p) < 4 * (p * (1 - p) / n) ** 0.5 + 1e-9


def torch_hsv_shift(x, turns):
    """x (..., 3, H, W) in [0, 1]: to HSV, add to the hue, and back by the six sectors."""
    import torch

    r, g, b = x.unbind(-3)
    top, low = x.max(-3).values, x.min(-3).values
    span = torch.where(top == low, torch.ones_like(top), top - low)
    saturation = (top - low) / torch.where(top == low, torch.ones_like(top), top)
    from_r, from_g, from_b = (g - b) / span, 2 + (b - r) / span, 4 + (r - g) / span
    hue = torch.where(top == r, from_r, torch.where(top == g, from_g, from_b)) / 6
    hue = (hue + turns) % 1.0
    sector = torch.floor(hue * 6)
    f = hue * 6 - sector
    p, q, t = (top * (1 - saturation * k) for k in (1, f, 1 - f))
    table = [(top, t, p), (q, top, p), (p, top, t), (p, q, top), (t, p, top), (top, p, q)]
    out = torch.zeros_like(x)
    for i, colours in enumerate(table):
        out = torch.where((sector % 6 == i).unsqueeze(-3), torch.stack(colours, -3), out)
    return out


def torch_reference(images, draws):
    """`apply_photometry`, sample by sample, as torchvision does it on float images."""
    torch = pytest.importorskip('torch', reason='torch is the oracle of this test')
    F = torch.nn.functional
    weights = torch.tensor([0.2989, 0.587, 0.114], dtype=torch.float64)[:, None, None]

    def grey(x):
        return (x * weights).sum(0, keepdim=True)

    out = []
    for i, image in enumerate(images):
        x = torch.from_numpy(image.astype(np.float64)).permute(2, 0, 1) / 255
        d = [np.asarray(v)[i] for v in draws]
        jitter, order, (b, c, s), hue, to_grey, blur, sigma, solarize = d
        if jitter:
            for op in order:
                if op == 0:
                    x = (b * x).clamp(0, 1)
                elif op == 1:
                    x = (c * x + (1 - c) * grey(x).mean()).clamp(0, 1)
                elif op == 2:
                    x = (s * x + (1 - s) * grey(x)).clamp(0, 1)
                else:
                    x = torch_hsv_shift(x, hue)
        if to_grey:
            x = grey(x).expand(3, -1, -1)
        if blur:
            at = torch.linspace(-4, 4, 9, dtype=torch.float64)
            kernel = torch.exp(-0.5 * (at / float(sigma)) ** 2)
            kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
            x = F.pad(x[:, None], (4, 4, 4, 4), mode='reflect')
            x = F.conv2d(x, kernel[None, None])[:, 0]
        if solarize:
            x = torch.where(x >= 128 / 255, 1 - x, x)
        out.append((255 * x).permute(1, 2, 0).numpy())
    return np.stack(out)


def random_draws(n, seed=0, **fixed):
    rng = np.random.default_rng(seed)
    draws = photometry.Photometry(
        jitter=rng.random(n) < 0.8,
        order=np.stack([rng.permutation(4) for _ in range(n)]).astype(np.int32),
        factors=rng.uniform(0.3, 1.7, (n, 3)).astype(np.float32),
        hue=rng.uniform(-0.5, 0.5, n).astype(np.float32),
        grey=rng.random(n) < 0.3,
        blur=rng.random(n) < 0.5,
        sigma=rng.uniform(0.1, 2.0, n).astype(np.float32),
        solarize=np.zeros(n, bool),  # a step at 128 would compare rounding, not arithmetic
    )
    return draws._replace(**fixed)


def test_the_whole_chain_equals_torchvisions_on_float_images():
    images, draws = pictures(48), random_draws(48)
    got = np.asarray(apply_photometry(images, draws))
    assert np.abs(got - torch_reference(images, draws)).max() < 2e-3  # in 1/255


@pytest.mark.parametrize('name, value', [('brightness', 0), ('contrast', 1), ('saturation', 2)])
def test_each_blend_equals_torchvisions_by_itself(name, value):
    images, off = pictures(8), np.zeros(8, bool)
    draws = random_draws(8, value, jitter=~off, grey=off, blur=off, hue=np.zeros(8, np.float32))
    draws.factors[:, [i for i in range(3) if i != value]] = 1.0
    got = np.asarray(apply_photometry(images, draws))
    assert np.abs(got - torch_reference(images, draws)).max() < 2e-3
    assert np.abs(got - images).max() > 20


def test_brightness_contrast_and_saturation_of_known_pixels():
    x = np.full((1, 12, 16, 3), 100, np.uint8)
    x[..., 2] = 200
    mean = 0.2989 * 100 + 0.587 * 100 + 0.114 * 200
    bright = apply(x, jitter=True, factors=(1.5, 1.0, 1.0))
    assert np.allclose(bright[..., :2], 150) and np.allclose(bright[..., 2], 255)  # clamped
    flat = apply(x, jitter=True, factors=(1.0, 0.0, 1.0))
    assert np.allclose(flat, mean, atol=1e-3)
    half = apply(x, jitter=True, factors=(1.0, 1.0, 0.5))
    assert np.allclose(half[0, 0, 0], [50 + mean / 2, 50 + mean / 2, 100 + mean / 2], atol=1e-3)


def test_a_third_of_the_colour_circle_turns_red_into_green_and_leaves_grey():
    x = pictures(1)
    turned = apply(x, jitter=True, hue=1 / 3)[0, 0]
    want = [[0, 0, 0], [255, 255, 255], [0, 255, 0], [0, 0, 255], [255, 0, 0], [77, 77, 77]]
    assert np.allclose(turned[:6], want, atol=1e-3)
    assert np.allclose(apply(x, jitter=True, hue=0.0), x, atol=1e-3)
    assert np.allclose(apply(x, jitter=True, hue=1.0), x, atol=1e-3)


def test_the_order_of_the_jitter_is_the_one_drawn():
    x = pictures(1)
    args = dict(jitter=True, factors=(1.9, 0.3, 1.8), hue=0.2)
    results = [apply(x, order=o, **args) for o in ((0, 1, 2, 3), (1, 0, 2, 3), (3, 2, 1, 0))]
    assert all(np.abs(a - b).max() > 5 for a, b in itertools.pairwise(results))


def test_grey_has_three_equal_channels():
    out = apply(pictures(), grey=True)
    assert (out[..., 0] == out[..., 1]).all() and (out[..., 0] == out[..., 2]).all()
    assert np.allclose(out[0, 0, 2:5, 0], [0.2989 * 255, 0.587 * 255, 0.114 * 255], atol=1e-3)


def test_blur_keeps_constants_spreads_a_point_and_almost_nothing_at_small_sigma():
    assert np.allclose(apply(np.full((1, 12, 16, 3), 90, np.uint8), blur=True), 90, atol=1e-3)
    point = np.zeros((1, 12, 16, 3), np.uint8)
    point[0, 6, 8] = 200
    taps = np.exp(-0.5 * (np.arange(-4, 5) / 1.5) ** 2)
    taps /= taps.sum()
    out = apply(point, blur=True, sigma=1.5)[0, ..., 0]
    assert np.allclose(out[2:11, 4:13], 200 * np.outer(taps, taps), atol=1e-4)
    assert np.allclose(apply(pictures(), blur=True, sigma=0.1), pictures(), atol=1e-3)


def test_solarisation_inverts_from_128_on_and_is_undone_by_inverting_again():
    x = pictures()
    out = apply(x, solarize=True)
    assert (out == np.where(x >= 128, 255.0 - x, x)).all()
    assert out.max() <= 127
    again = apply(apply(x, threshold=0, solarize=True), threshold=0, solarize=True)
    assert (again == x).all()


def test_probability_zero_leaves_the_images_and_makes_them_float():
    x = pictures()
    static = photometric(keys(6), x, **JITTER)
    assert static.dtype == np.float32 and (static == x).all()
    run = jax.jit(lambda p: photometry.photometric(
        keys(6), x, **JITTER, jitter_prob=p, grey_prob=p, blur_prob=p, solarize_prob=p
    ))  # fmt: skip
    assert (np.asarray(run(jnp.zeros(6))) == x).all()
    assert np.abs(np.asarray(run(jnp.ones(6))) - x).max((1, 2, 3)).min() > 1


def test_each_sample_may_have_its_own_probability():
    x, p = pictures(), np.array([0, 1, 0, 1, 1, 0], np.float32)
    out = np.asarray(
        jax.jit(lambda p: photometry.photometric(keys(6), x, solarize_prob=p, blur_prob=0.0))(p)
    )
    changed = (out != x).any((1, 2, 3))
    assert (changed == (p == 1)).all()


def test_the_draws_have_the_odds_and_ranges_asked_for(monkeypatch):
    seen = {}

    def spy(images, draws, **kw):
        seen.update(draws=jax.tree.map(np.asarray, draws), **kw)
        return images

    monkeypatch.setattr(photometry, 'apply_photometry', spy)
    n = 4000
    photometry.photometric(keys(n), np.zeros((n, 6, 6, 3), np.uint8), **DINO)
    d = seen['draws']
    for name, p in (('jitter', 0.8), ('grey', 0.2), ('blur', 0.5), ('solarize', 0.2)):
        assert abs(getattr(d, name).mean() - p) < 4 * math.sqrt(p * (1 - p) / n)
    for values, low, high in (
        (d.factors[:, 0], 0.6, 1.4), (d.factors[:, 1], 0.6, 1.4), (d.factors[:, 2], 0.8, 1.2),
        (d.hue, -0.1, 0.1), (d.sigma, 0.1, 2.0),
    ):  # fmt: skip
        assert low <= values.min() and values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 4 * (high - low) / math.sqrt(12 * n)
    orders, counts = np.unique(d.order, axis=0, return_counts=True)
    assert len(orders) == 24 and abs(counts - n / 24).max() < 5 * math.sqrt(n / 24)
    coins = np.stack([d.jitter, d.grey, d.blur, d.solarize, d.factors[:, 0], d.sigma])
    correlation = np.corrcoef(coins.astype(float)) - np.eye(6)
    assert np.abs(correlation).max() < 5 / math.sqrt(n)


def test_a_factor_is_never_negative(monkeypatch):
    monkeypatch.setattr(photometry, 'apply_photometry', lambda images, draws, **kw: draws)
    n = 500
    draws = photometry.photometric(keys(n), np.zeros((n, 6, 6, 3), np.uint8), brightness=3.0)
    assert 0 <= draws.factors[:, 0].min() < 0.1 and draws.factors[:, 0].max() > 3.8


def test_a_sample_depends_on_step_and_row_and_not_on_its_place_in_the_batch():
    x, k = pictures(), keys(6)
    out = photometric(k, x, **DINO)
    assert (out == photometric(k, x, **DINO)).all()
    order = np.array([3, 0, 5, 1, 4, 2])
    assert (photometric(k[order], x[order], **DINO) == out[order]).all()
    assert (photometric(keys(6, seed=1), x, **DINO) != out).any((1, 2, 3)).all()


def test_several_devices_give_what_one_gives():
    """Several devices work on all samples at once, one CPU in a loop; both round alike to 1e-3."""
    x, k = pictures(8), keys(8)
    out = photometric(k, x, **DINO)
    devices = jax.devices()[:4]
    if len(devices) < 4:
        pytest.skip('needs 4 devices')
    auto = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((4, 1, 1), sharding.AXES, axis_types=auto, devices=devices)
    with jax.set_mesh(mesh):
        split = jax.NamedSharding(mesh, jax.P('data'))
        shards = jax.device_put((k, x), split)
        many = jax.jit(functools.partial(photometry.photometric, **DINO))(*shards)
    assert np.abs(np.asarray(many) - out).max() < 2e-3


def test_blur_has_the_odds_of_the_released_weights_or_of_the_paper():
    assert photometry.BLUR['released'] == (0.0, 0.9, 0.5)
    assert photometry.BLUR['intended'] == (1.0, 0.1, 0.5)


@pytest.mark.parametrize(
    'options, words',
    [
        (dict(hue=0.6), r'hue=0.6 is not in \[0, 0.5\]'),
        (dict(blur_kernel=8), 'blur_kernel=8 is even'),
        (dict(blur_kernel=25), 'over the edge of 12x16 px'),
        (dict(blur_sigma=(0.0, 2.0)), 'is no range above 0'),
    ],
)
def test_impossible_options_are_one_sentence(options, words):
    with pytest.raises(ValueError, match=words):
        photometry.photometric(keys(2), pictures(2), **options)
