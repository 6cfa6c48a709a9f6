# SPDX-License-Identifier: Apache-2.0
"""I-JEPA: which patches are context and targets, by both samplers; padding, collapse, checks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import config as config_lib
from ssl_jax import methods
from ssl_jax.methods import ijepa
from ssl_jax.run import clock as clock_lib

SMALL = dict(size=None, embed_dim=16, depth=1, num_heads=2, predictor_dim=8, predictor_depth=1)
STEPS, BATCH = {False: 8, True: 40}, 128  # by the sampler


def make(**fields):
    c = config_lib.default('ijepa')
    c.method.update(**fields)
    return methods.make(c, clock_lib.Clock(100, 10, 8, 100))


@functools.cache
def sampled(reference=False):
    """(method, Masks) of some batches of 14 x 14 patches."""
    method = make(reference_collator=reference, context_patches=52)
    keys = jax.random.split(jax.random.key(0), (STEPS[reference], BATCH))
    rngs = jax.random.split(jax.random.key(1), STEPS[reference])
    return method, jax.device_get(jax.jit(jax.vmap(method.masks))(keys, rngs))


def on_grid(ids, side=14):
    """Index lists (..., K) -> bool (..., side, side)."""
    out = np.zeros((*ids.shape[:-1], side * side), bool)
    np.put_along_axis(out, ids.astype(int), True, axis=-1)
    return out.reshape(*ids.shape[:-1], side, side)


def spans(blocks):
    """Heights and widths of the rectangles around blocks (..., side, side), and their areas."""
    rows, columns = blocks.any(axis=-1), blocks.any(axis=-2)
    return rows.sum(axis=-1), columns.sum(axis=-1), blocks.sum(axis=(-2, -1))


def official(batches, side=14, batch=BATCH, seed=0):
    """The official collator in numpy, without its retries, which only matter below 14 x 14.

    Returns:
      (lengths of the context before the cut (batches, batch), after (batches,), rows in which the
      patches after the cut lie: share of those of each row (side,)).
    """
    rng = np.random.default_rng(seed)
    cells = np.arange(side)

    def blocks(h, w, *shape):
        top, left = rng.integers(0, side - h, shape), rng.integers(0, side - w, shape)
        inside = [
            (cells >= x[..., None]) & (cells < x[..., None] + n) for x, n in ((top, h), (left, w))
        ]
        return inside[0][..., :, None] & inside[1][..., None, :]

    before, after, rows = [], [], 0
    for _ in range(batches):
        h, w = official_size(rng.random(), (0.15, 0.2), (0.75, 1.5), side)
        ch, cw = official_size(rng.random(), (0.85, 1.0), (1.0, 1.0), side)
        targets = blocks(h, w, batch, 4).any(axis=1)
        context = (blocks(ch, cw, batch) & ~targets).reshape(batch, -1)
        before.append(context.sum(axis=1))
        after.append(before[-1].min())
        context &= np.cumsum(context, axis=1) <= after[-1]
        rows = rows + context.reshape(batch, side, side).mean(axis=(0, 2)) / batches
    return np.array(before), np.array(after), rows


def official_size(draw, scale, aspect, side):
    """Height and width of a block, as `_sample_block_size` of the official collator has them."""
    area = int(side * side * (scale[0] + draw * (scale[1] - scale[0])))
    ratio = aspect[0] + draw * (aspect[1] - aspect[0])
    h, w = int(round((area * ratio) ** 0.5)), int(round((area / ratio) ** 0.5))
    while h >= side:
        h -= 1
    while w >= side:
        w -= 1
    return h, w


def test_the_context_lies_outside_the_targets_in_every_image():
    _, m = sampled()
    assert not (on_grid(m.context) & on_grid(m.targets).any(axis=2)).any()
    assert (np.diff(m.context) > 0).all() and (np.diff(m.targets) > 0).all()


def test_target_blocks_are_rectangles_of_one_area_and_shapes_differ_between_images():
    method, m = sampled()
    h, w, area = spans(on_grid(m.targets))
    assert (h * w == method.area).all() and (area == method.area).all()
    assert {tuple(x) for x in method.shapes} == {*zip(h.ravel(), w.ravel(), strict=True)}
    assert (h == h[..., :1]).all()  # of one image all have one shape
    low, high = method.target_scale
    assert low <= method.area / method.num_patches <= high


def test_the_context_is_seen_from_all_sides_alike():
    share = on_grid(sampled()[1].context).mean(axis=(0, 1))
    for line in (share.mean(axis=0), share.mean(axis=1)):
        np.testing.assert_allclose(line, line[::-1], atol=0.03)
    assert share[-1].mean() > 0.3 and share[:, -1].mean() > 0.3  # targets cover borders least


def test_reference_blocks_have_the_official_sizes_for_every_draw():
    draws = np.random.default_rng(0).random(3000)
    for scale, aspect in (((0.15, 0.2), (0.75, 1.5)), ((0.85, 1.0), (1.0, 1.0))):
        for side in (8, 14, 16):
            want = [official_size(x, scale, aspect, side) for x in draws]
            got = np.stack(ijepa.reference_shape(draws, scale, aspect, side), axis=1)
            np.testing.assert_array_equal(got, want)
            on_device = ijepa.reference_shape(jnp.asarray(draws), scale, aspect, side)
            assert (np.stack(on_device, axis=1) == want).all(axis=1).mean() > 0.999  # float32


def test_reference_batches_have_one_size_of_target_blocks():
    method, m = sampled(reference=True)
    blocks = on_grid(np.where(np.arange(method.area) < m.count[:, None, None, None], m.targets, 0))
    blocks[..., 0, 0] &= m.targets[..., 0] == 0  # padding is patch 0
    h, w, area = spans(blocks)
    assert (h * w == area).all() and (area == m.count[:, None, None]).all()
    assert (h == h[:, :1, :1]).all() and len({*m.count.tolist()}) > 2
    assert m.count.min() >= 30 and m.count.max() <= 40


def test_the_emulated_official_collator_has_the_known_lengths():
    before, after, _ = official(200)
    assert abs(before.mean() - 82.7) < 2 and abs(after.mean() - 52.2) < 2
    before, after, _ = official(200, side=8)
    assert abs(before.mean() - 21.4) < 1 and abs(after.mean() - 11.7) < 1


def test_the_reference_covers_rows_as_the_official_collator_does():
    share = on_grid(sampled(reference=True)[1].context).mean(axis=(0, 1))
    rows = share.mean(axis=1)
    np.testing.assert_allclose(rows, official(200)[2], atol=0.05)
    assert abs(rows[:7].mean() - 0.41) < 0.03 and abs(rows[7:].mean() - 0.12) < 0.03
    assert abs(rows[0] - 0.74) < 0.05
    assert not rows[-1] and not share[:, -1].any()  # never context there


def test_the_reference_hides_targets_from_the_context():
    _, m = sampled(reference=True)
    hidden = on_grid(m.targets).any(axis=2)
    hidden[..., 0, 0] &= (m.targets[..., 0] == 0).any(axis=2)
    assert (on_grid(m.context) & hidden).mean() < 1e-5  # where eight placements leave too little


@functools.cache
def padded():
    """(images, patches behind the two that are meant) -> dict of what the objective makes of it."""
    method, rng = make(**SMALL, patch_size=8, img_size=32), np.random.default_rng(0)

    def draw(x):
        return jnp.asarray(rng.standard_normal(x.shape) * 0.3, x.dtype)

    params, extra = jax.tree.map(draw, jax.eval_shape(method.init, jax.random.key(0)))
    context = jnp.array([[0, 1, 4], [2, 3, 7]])

    @jax.jit
    def run(images, behind):
        targets = jnp.broadcast_to(jnp.array([9, 10, *behind]), (2, 1, 4))
        masks = ijepa.Masks(context, targets, jnp.int32(2))
        loss, metrics = method.objective(params, extra, images, masks)
        pred = method.predict(params, images, masks)
        want = ijepa.blocks_of(method.targets(extra, images), targets)
        return {**metrics, 'loss': loss, 'pred': pred[..., :2, :], 'want': want[..., :2, :]}

    return draw(jnp.zeros((2, 32, 32, 3))), run


def test_padding_of_target_blocks_changes_nothing():
    images, run = padded()
    one, other = run(images, (13, 14)), run(images, (5, 0))
    np.testing.assert_allclose(one['pred'], other['pred'], rtol=1e-5, atol=1e-6)
    error = np.abs(one['pred'] - one['want'])
    want = np.where(error < 1, error**2 / 2, error - 0.5).mean()
    np.testing.assert_allclose([one['loss'], other['loss']], want, rtol=1e-5)


def test_target_std_of_images_is_zero_only_where_all_images_are_alike():
    images, run = padded()
    different, same = run(images, (13, 14)), run(images[:1].repeat(2, axis=0), (13, 14))
    assert 0.05 < different['target_std_images'] <= different['target_std'] <= 1.01
    assert same['target_std_images'] < 1e-6 < 0.05 < same['target_std']


@pytest.mark.parametrize(
    'std,images,said',
    [
        (0.6, 0.4, None),
        (0.01, 0.01, 'constant'),
        (0.6, 0.01, 'positions'),
        (float('nan'), 0.4, 'target_std is nan'),
    ],
)
def test_a_collapse_is_named_after_the_warm_up(std, images, said):
    method = make()
    values = {'target_std': std, 'target_std_images': images}
    assert method.suspect(values, method.clock.warmup - 1) is None
    assert method.suspect({}, 50) is None
    sentence = method.suspect(values, 50)
    assert sentence is None if said is None else said in sentence


@pytest.mark.parametrize(
    'fields,said',
    [
        (dict(context_patches=90), 'use 76'),
        (dict(context_patches=0), 'use 1'),
        (dict(num_targets=16), 'lower num_targets'),
        (dict(img_size=32), 'use img_size=64'),
        (dict(predictor_dim=390), 'predictor_dim=384'),
        (dict(embed_dim=762, num_heads=6), 'use 760'),
        (dict(predictor_depth=None), 'predictor_depth is None'),
        (dict(target_scale=(0.3, 0.2)), 'target_scale'),
    ],
)
def test_what_cannot_be_is_one_sentence_with_what_to_type(fields, said):
    c = config_lib.default('ijepa')
    c.method.update(**fields)
    config_lib.fill_size(c.method)
    assert any(said in sentence for sentence in methods.make(c).check(c))


def test_an_imported_encoder_is_the_start_of_both():
    params, extra = dict(encoder=1, predictor=2), dict(target=1)
    params, extra = make().with_networks(params, extra, {'encoder': 3})
    assert (params, extra) == (dict(encoder=3, predictor=2), dict(target=3))
