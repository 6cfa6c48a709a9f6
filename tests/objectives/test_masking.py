# SPDX-License-Identifier: Apache-2.0
"""Masks are exact in number, block-shaped where asked, and a function of the key."""

import functools
import math
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.augment import photometry
from ssl_jax.objectives import masking


def spec_noise(rows, n, offset):
    """frac(sin(12.9898 j + offset) * 43758.5453), the noise of the published examples."""
    j = np.arange(1, n + 1)
    x = np.sin(12.9898 * j[None] + np.asarray(offset)[:, None]) * 43758.5453
    return (x - np.floor(x)).astype(np.float32)[:rows]


def visible(mask):
    return [sorted(np.flatnonzero(row == 0)) for row in np.asarray(mask.mask)]


def test_single_patches_match_the_published_example():
    noise = spec_noise(1, 64, [78.233])
    mask = masking.from_noise(noise, (8, 8), 0.75)
    assert visible(mask)[0] == [3, 9, 16, 21, 24, 26, 28, 34, 37, 38, 42, 46, 53, 55, 60, 63]
    assert list(mask.ids_restore[0, :8]) == [45, 34, 25, 13, 50, 46, 29, 32]


def test_blocks_of_two_match_the_published_example():
    mask = masking.from_noise(spec_noise(1, 16, [78.233]), (8, 8), 0.75, mask_grid=2)
    want = [6, 7, 14, 15, 34, 35, 42, 43, 48, 49, 52, 53, 56, 57, 60, 61]
    assert visible(mask)[0] == want
    assert list(mask.ids_restore[0, :8]) == [48, 49, 36, 37, 20, 21, 4, 5]


def test_blocks_of_four_are_expanded_in_place_in_the_order_of_the_noise():
    mask = masking.from_noise(spec_noise(1, 16, [78.233]), (16, 16), 0.75, mask_grid=4)
    ids = list(mask.ids_keep[0])
    assert ids[::16] == [132, 12, 200, 192]
    assert ids[:8] == [132, 133, 134, 135, 148, 149, 150, 151]


@pytest.mark.parametrize('grid,ratio', [((14, 14), 0.75), ((16, 16), 0.6), ((7, 5), 0.5)])
def test_every_image_keeps_the_same_number_of_patches(grid, ratio):
    keys = jax.random.split(jax.random.key(0), 5)
    mask = masking.random_masking(keys, grid, ratio)
    n = grid[0] * grid[1]
    assert mask.ids_keep.shape == (5, int(n * (1 - ratio)))
    assert (np.asarray(mask.mask).sum(axis=1) == n - int(n * (1 - ratio))).all()


def test_ids_restore_puts_kept_patches_back():
    mask = masking.random_masking(jax.random.split(jax.random.key(1), 3), (8, 8), 0.75, 2)
    kept = mask.ids_keep.shape[1]
    for ids, restore in zip(np.asarray(mask.ids_keep), np.asarray(mask.ids_restore), strict=True):
        assert list(restore[ids]) == list(range(kept))


def test_a_grid_that_blocks_do_not_divide_is_one_sentence():
    with pytest.raises(ValueError, match='mask_grid=4 does not divide the token grid 14x14'):
        masking.num_blocks((14, 14), 4)


def test_what_a_sample_draws_depends_on_its_row_alone():
    rng = jax.random.key(3)
    whole = photometry.sample_keys(rng, np.arange(8))
    part = photometry.sample_keys(rng, np.array([2, 6]))
    assert (jax.random.key_data(whole)[np.array([2, 6])] == jax.random.key_data(part)).all()


def reference_block_mask(rng, grid, target, min_patches, max_patches, min_aspect=0.3):
    """The block sampler as the specification tells it, one image at a time; bool (h * w,)."""
    h, w = grid
    mask, count = np.zeros(grid, bool), 0
    while count < target:
        budget, found = min(target - count, max_patches), 0
        for _ in range(10):
            area = rng.uniform(min_patches, budget)
            aspect = math.exp(rng.uniform(math.log(min_aspect), -math.log(min_aspect)))
            bh, bw = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if bh < h and bw < w:
                top, left = rng.randint(0, h - bh), rng.randint(0, w - bw)
                block = mask[top : top + bh, left : left + bw]
                found = int((~block).sum())
                if 0 < found <= budget:
                    block[:] = True
                    break
                found = 0
        if not found:
            break
        count += found
    return mask.reshape(-1)


@functools.lru_cache
def block_masks(grid, target, n=1500, seed=0, **options):
    keys = jax.random.split(jax.random.key(seed), n)
    draw = jax.jit(functools.partial(masking.block_masks, grid=grid, **options))
    return np.asarray(draw(keys, targets=target))


def edges(masks, grid):
    """Borders between masked and visible patches, per mask: small for few large blocks."""
    x = masks.reshape(-1, *grid)
    return (x[:, 1:] ^ x[:, :-1]).sum((1, 2)) + (x[:, :, 1:] ^ x[:, :, :-1]).sum((1, 2))


def distance(a, b):
    """Difference of two means in standard errors."""
    return abs(a.mean() - b.mean()) / math.sqrt(a.var() / len(a) + b.var() / len(b) + 1e-12)


@pytest.mark.parametrize(
    'grid, target, min_patches, max_patches',
    [
        ((14, 14), 75, 16, 75),  # BEiT
        ((14, 14), 98, 16, 75),  # SplitMask
        ((14, 14), 40, 4, 98),  # DINOv2
        ((8, 8), 32, 5, 24),
        ((4, 9), 14, 4, 18),
    ],
)
def test_blocks_are_distributed_as_in_the_reference(grid, target, min_patches, max_patches):
    limits = dict(min_patches=min_patches, max_patches=max_patches)
    ours = block_masks(grid, target, **limits)
    rng = random.Random(1)
    theirs = np.stack([reference_block_mask(rng, grid, target, **limits) for _ in range(1500)])
    a, b = ours.sum(1), theirs.sum(1)
    assert a.max() == b.max() == target
    assert distance(a, b) < 4 and distance(a == target, b == target) < 4
    assert distance(edges(ours, grid), edges(theirs, grid)) < 4
    spread = np.sqrt((ours.var(0) + theirs.var(0)) / 1500)
    assert np.abs((ours.mean(0) - theirs.mean(0)) / spread).max() < 4.5


def test_no_block_is_as_high_or_as_wide_as_the_grid():
    # 36 patches of 4 x 9 would be one block of the grid's height, or none.
    assert not block_masks((4, 9), 36, n=200, min_patches=36).any()
    assert not block_masks((9, 4), 36, n=200, min_patches=36).any()


def test_a_patch_is_masked_as_often_as_its_mirror_images():
    share = block_masks((14, 14), 98, min_patches=16, max_patches=75).mean(0).reshape(14, 14)
    error = math.sqrt(0.5 / 1500)
    for mirrored in (share[::-1], share[:, ::-1], share.T):
        assert np.abs(share - mirrored).max() < 4.5 * error
    assert share[7, 7] > share[0, 0] + 0.1  # blocks inside the grid meet in its middle


@pytest.mark.parametrize(
    'grid, target, limits, hits',
    [((14, 14), 75, (16, 75), 0.67), ((14, 14), 98, (16, 75), 0.71), ((8, 8), 32, (5, 24), 0.95)],
)
def test_masks_end_at_their_target_as_often_as_was_measured(grid, target, limits, hits):
    count = block_masks(grid, target, min_patches=limits[0], max_patches=limits[1]).sum(1)
    assert abs((count == target).mean() - hits) < 4 * math.sqrt(hits * (1 - hits) / 1500)


@pytest.mark.parametrize('grid, target, limits', [((14, 14), 98, (16, 75)), ((8, 8), 32, (5, 24))])
def test_exact_masks_add_single_patches_until_the_target_is_met(grid, target, limits):
    limits = dict(min_patches=limits[0], max_patches=limits[1])
    blocks, exact = (block_masks(grid, target, **limits, exact=e) for e in (False, True))
    assert (exact.sum(1) == target).all()
    assert (exact >= blocks).all() and 0 < (exact & ~blocks).sum(1).mean() < 1


def test_exact_masks_fill_a_grid_that_no_block_fits():
    keys = jax.random.split(jax.random.key(0), 4)
    masks = np.asarray(masking.block_masks(keys, (2, 2), 3, min_patches=4, exact=True))
    assert (masks.sum(1) == 3).all() and len({tuple(m) for m in masks}) > 1


def test_each_image_has_its_own_target_and_zero_masks_nothing():
    targets = np.array([0, 1, 5, 30, 98, 0.5, 20.7])
    keys = jax.random.split(jax.random.key(2), 7)
    count = np.asarray(masking.block_masks(keys, (14, 14), targets)).sum(1)
    assert count[0] == count[5] == 0
    assert (count <= targets).all() and (count[[1, 2, 3, 4]] > 0.5 * targets[[1, 2, 3, 4]]).all()


@pytest.mark.parametrize(
    'side, crops, bound', [(14, 128, 3771), (16, 64, 2496), (16, 24, 967), (37, 8, 1914)]
)
def test_the_bound_on_masked_patches_is_the_official_one(side, crops, bound):
    assert masking.upper_bound(crops, (side, side)) == bound


@functools.lru_cache
def crop_masks(num_crops=128, grid=(14, 14), groups=40, seed=0, **options):
    draw = jax.jit(lambda keys: masking.crop_masks(keys, num_crops, grid, **options))
    return np.asarray(draw(jax.random.split(jax.random.key(seed), groups)))


def test_half_of_the_crops_are_masked_and_their_total_hardly_varies():
    masks = crop_masks()
    assert ((masks.any(-1)).sum(1) == 64).all()
    total = masks.sum((1, 2))
    assert total.max() <= 3771 and abs(total.mean() - 3728) < 4 and total.std() < 10
    # One target per stratum: the i-th smallest mask is no larger than the end of the i-th one.
    count = np.sort(masks.sum(-1), axis=1)[:, 64:]
    ends = 196 * np.linspace(0.1, 0.5, 65)
    assert (count <= ends[1:]).all() and (count >= ends[:-1] - 12).all()
    assert abs(count.mean() / (np.mean(ends) - 0.5) - 0.9987) < 0.002  # floored targets


def test_which_crops_are_masked_and_how_much_is_shuffled():
    count = crop_masks(num_crops=8, grid=(8, 8), groups=1500).sum(-1)
    assert np.abs((count > 0).mean(0) - 0.5).max() < 4 * 0.5 / math.sqrt(1500)
    mean = count.mean(0)
    assert np.abs(mean - mean.mean()).max() < 4 * count.std() / math.sqrt(1500)
    together = (count[:, 0] > 0) & (count[:, 1] > 0)  # the two crops of one image: 3 / 14
    assert abs(together.mean() - 3 / 14) < 4 * math.sqrt(3 / 14 * 11 / 14 / 1500)


def test_an_odd_number_of_crops_is_rounded_down():
    masks = crop_masks(num_crops=7, grid=(8, 8), groups=6)
    assert (masks.any(-1).sum(1) == 3).all()
    assert masks.sum((1, 2)).max() <= masking.upper_bound(7, (8, 8))


def test_ibot_masks_each_crop_by_a_coin_with_larger_blocks():
    masks = crop_masks(num_crops=32, groups=60, sampler='ibot')
    count = masks.sum(-1).reshape(-1)
    n = len(count)
    assert abs((count > 0).mean() - 0.5) < 4 * 0.5 / math.sqrt(n)
    some = count[count > 0] / 196
    assert some.max() <= 0.5 and abs(some.mean() - 0.3) < 0.02
    assert masks.sum((1, 2)).max() <= masking.upper_bound(32, (14, 14), sampler='ibot') == 32 * 98
    rng = random.Random(3)
    targets = [196 * rng.uniform(0.1, 0.5) for _ in range(n)]
    theirs = np.stack([reference_block_mask(rng, (14, 14), t, 16, 196) for t in targets])
    ours = masks.reshape(n, -1)[count > 0]
    assert distance(edges(ours, (14, 14)), edges(theirs, (14, 14))) < 4
    assert distance(ours.sum(1), theirs.sum(1)) < 4


@pytest.mark.parametrize('sampler', ['dinov2', 'ibot'])
def test_the_masks_of_a_group_depend_on_its_key_alone_and_not_on_devices(sampler):
    draw = jax.jit(lambda keys: masking.crop_masks(keys, 6, (8, 8), sampler=sampler))
    keys = photometry.sample_keys(jax.random.key(5), np.arange(8))
    masks = np.asarray(draw(keys))
    assert len({m.tobytes() for m in masks}) == 8
    assert (np.asarray(draw(keys[::-1])) == masks[::-1]).all()
    devices = jax.devices()[:4]
    auto = (jax.sharding.AxisType.Auto,)
    mesh = jax.make_mesh((len(devices),), ('data',), axis_types=auto, devices=devices)
    spread = jax.device_put(keys, jax.NamedSharding(mesh, jax.P('data')))
    assert (np.asarray(draw(spread)) == masks).all()


def test_masked_indices_are_the_masked_positions_in_order_and_then_padding():
    masks = crop_masks(num_crops=16, grid=(8, 8), groups=5)
    bound = masking.upper_bound(16, (8, 8))
    got = jax.jit(masking.masked_indices, static_argnums=1)(masks, bound)
    for group, *row in zip(masks, *map(np.asarray, got), strict=True):
        want = np.flatnonzero(group)
        weight = np.repeat(1 / np.maximum(group.sum(1), 1), group.sum(1))
        pad = bound - len(want)
        indices, weights, valid = row
        assert (indices == np.pad(want, (0, pad))).all() and indices.dtype == np.int32
        assert np.allclose(weights, np.pad(weight, (0, pad))) and weights.dtype == np.float32
        assert (valid == (np.arange(bound) < len(want))).all()
        assert np.isclose(weights.sum(), group.any(1).sum())  # one per masked image


@pytest.mark.parametrize('fill', [0, 1])
def test_masked_indices_of_nothing_and_of_everything(fill):
    masks = jnp.full((3, 5), fill, bool)
    got = masking.masked_indices(masks, 15)
    assert (np.asarray(got.indices) == np.arange(15) * fill).all()
    assert np.allclose(got.weights, 0.2 * fill) and (np.asarray(got.valid) == fill).all()


@pytest.mark.parametrize(
    'options, words',
    [
        (dict(num_crops=4, probability=0.2), 'masks none of 4 crops; give 0.25 or more'),
        (dict(num_crops=4, ratio=(0.5, 0.1)), r'\(0.5, 0.1\) is no range within 0 and 1'),
        (dict(num_crops=4, sampler='beit'), "'beit' is unknown; give 'dinov2' or 'ibot'"),
    ],
)
def test_impossible_plans_are_one_sentence(options, words):
    keys = jax.random.split(jax.random.key(0), 2)
    for plan in (masking.upper_bound, functools.partial(masking.crop_masks, keys)):
        with pytest.raises(ValueError, match=words):
            plan(grid=(8, 8), **options)
