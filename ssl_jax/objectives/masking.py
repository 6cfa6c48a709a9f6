# SPDX-License-Identifier: Apache-2.0
"""Masks of patches, with static shapes: noise or keys in, masks or index arrays out."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.run import errors

# Rounds of the block sampler: each places one block or ends the mask. 20,000 masks of 14x14 patches
# needed at most 15, 3,000 masks of 64x64 at most 22.
ROUNDS = 32
TRIALS = 10  # candidate blocks per round


class Mask(NamedTuple):
    """Masks of MAE and Pixio."""

    ids_keep: jax.Array  # (B, K) visible patches, in the order of the noise (not raster order)
    ids_restore: jax.Array  # (B, N) position of raster patch j in [visible | masked]
    mask: jax.Array  # (B, N) float32, 1 = masked, raster order


def num_blocks(grid: tuple[int, int], mask_grid: int) -> int:
    """Number of blocks of mask_grid x mask_grid patches in a `grid` (h, w)."""
    h, w = grid
    if h % mask_grid or w % mask_grid:
        raise errors.UserError(
            f'mask_grid={mask_grid} does not divide the token grid {h}x{w}; '
            f'choose a divisor of both sides (1 masks single patches, as MAE does).'
        )
    return (h // mask_grid) * (w // mask_grid)


def from_noise(
    noise: jax.Array, grid: tuple[int, int], mask_ratio: float, mask_grid: int = 1
) -> Mask:
    """Masking of MAE (mask_grid 1) and Pixio (square blocks of mask_grid x mask_grid patches).

    The int(blocks * (1 - mask_ratio)) blocks with the smallest noise stay visible. Each block is
    expanded in place to its patches, in raster order within the block.

    Args:
      noise: (B, num_blocks(grid, mask_grid)), uniform, without ties.
      grid: (h, w) in patches.
      mask_ratio: share of blocks to mask.
      mask_grid: side of a block in patches.

    References:
      MAE `models_mae.py: random_masking`; Pixio `models_pixio.py: random_masking`
    """
    h, w = grid
    blocks = num_blocks(grid, mask_grid)
    if noise.shape[-1] != blocks:
        raise errors.UserError(
            f'noise has {noise.shape[-1]} values per image for {blocks} blocks: pass one per block.'
        )
    kept = int(blocks * (1 - mask_ratio))
    order = jnp.argsort(noise, axis=-1)  # (B, blocks)
    if mask_grid > 1:
        # Patch ids of every block, (blocks, mask_grid²): blocks and patches in raster order.
        ids = np.arange(h * w).reshape(h // mask_grid, mask_grid, w // mask_grid, mask_grid)
        ids = jnp.asarray(ids.transpose(0, 2, 1, 3).reshape(blocks, -1))
        order = ids[order].reshape(noise.shape[0], h * w)
        kept *= mask_grid**2
    return from_order(order, kept)


def from_order(order: jax.Array, visible: int) -> Mask:
    """Masking that keeps the first `visible` of the patches `order` (B, N)."""
    ids_restore = jnp.argsort(order, axis=-1)
    return Mask(order[:, :visible], ids_restore, (ids_restore >= visible).astype(jnp.float32))


def random_masking(
    keys: jax.Array, grid: tuple[int, int], mask_ratio: float, mask_grid: int = 1
) -> Mask:
    """`from_noise` with uniform noise drawn from one key per sample, keys (B,)."""
    n = num_blocks(grid, mask_grid)
    noise = jax.vmap(lambda key: jax.random.uniform(key, (n,)))(keys)
    return from_noise(noise, grid, mask_ratio, mask_grid)


class Masked(NamedTuple):
    """Positions of masked patches, padded to a static size M."""

    # (..., M) int32, positions of masked patches in R * N, ascending; 0 for padding.
    indices: jax.Array
    weights: jax.Array  # (..., M) float32, 1 / number of masked patches in the image; 0 for padding
    valid: jax.Array  # (..., M) bool, False for padding


def block_masks(
    keys: jax.Array,
    grid: tuple[int, int],
    targets: jax.Array | float,
    *,
    min_patches: int = 4,
    max_patches: int | None = None,
    min_aspect: float = 0.3,
    exact: bool = False,
) -> jax.Array:
    """Masks that are unions of rectangles.

    Blocks are placed one after the other. With budget = min(target - patches masked so far,
    max_patches), a block has up to ten trials of:
      area ~ U(min_patches, budget), also if min_patches is the larger;
      aspect = exp(U(ln min_aspect, -ln min_aspect));
      height = round(sqrt(area aspect)), width = round(sqrt(area / aspect));
      uniform position.
    The first trial is taken that is shorter and narrower than the grid and masks 1 to `budget` new
    patches. If all trials fail, the mask ends below its target; it never exceeds it.

    Args:
      keys: (B,); a mask depends only on its key and its target.
      grid: (h, w) in patches.
      targets: (B,) or scalar, number of patches to mask, not necessarily an integer; 0 masks none.
      min_patches: 4 in DINOv2, 16 in BEiT and SplitMask.
      max_patches: None for no limit, 75 in SplitMask.
      min_aspect: smallest height / width; the largest is its inverse.
      exact: whether to fill each mask up to int(target) with uniform single patches.

    Returns:
      bool (B, h * w) in raster order, True = masked.

    References:
      BEiT, arXiv 2106.08254, Algorithm 1, and `masking_generator.py`; the sampler of DINOv2
      (`data/masking.py`) and iBOT (`loader.py`) is the same
    """
    h, w = grid
    limit = h * w if max_patches is None else max_patches
    targets = jnp.broadcast_to(jnp.asarray(targets, jnp.float32), keys.shape)
    # One draw, because a loop over small draws is mostly latency; along one axis, because XLA takes
    # 2 s longer to compile random numbers with three.
    u = jax.vmap(lambda key: jax.random.uniform(key, (ROUNDS * 4 * TRIALS,)))(keys)
    u = u.reshape(-1, ROUNDS, 4, TRIALS)
    rows, columns = jnp.arange(h), jnp.arange(w)

    def round_(state, u):
        mask, count, active = state  # (B, h, w), (B,), (B,); u (B, 4, TRIALS)
        budget = jnp.minimum(targets - count, limit)[:, None]
        area = min_patches + u[:, 0] * (budget - min_patches)  # (B, TRIALS), and so on
        aspect = jnp.exp((1 - 2 * u[:, 1]) * math.log(min_aspect))
        height, width = jnp.round(jnp.sqrt(area * aspect)), jnp.round(jnp.sqrt(area / aspect))
        top = jnp.floor(u[:, 2] * (h - height + 1))[..., None]
        left = jnp.floor(u[:, 3] * (w - width + 1))[..., None]
        in_rows = ((rows >= top) & (rows < top + height[..., None])).astype(jnp.float32)
        in_columns = ((columns >= left) & (columns < left + width[..., None])).astype(jnp.float32)
        # Products of zeros and ones: exact in any precision.
        old = (jnp.einsum('bth,bhw->btw', in_rows, mask) * in_columns).sum(axis=-1)
        new = height * width - old
        fits = (height < h) & (width < w) & (new > 0) & (new <= budget) & active[:, None]
        first = (fits & (jnp.cumsum(fits, axis=1) == 1)).astype(jnp.float32)
        block = jnp.einsum('bth,btw->bhw', in_rows * first[..., None], in_columns)
        count = count + (new * first).sum(axis=1)
        return (jnp.maximum(mask, block), count, fits.any(axis=1)), None

    start = (jnp.zeros((len(keys), h, w)), jnp.zeros(len(keys)), jnp.ones(len(keys), bool))
    # A fixed number of rounds: a loop until the last mask is full would synchronise all devices in
    # every round.
    (mask, count, _), _ = jax.lax.scan(round_, start, jnp.moveaxis(u, 1, 0))
    mask = mask.reshape(len(keys), h * w) > 0
    if exact:
        noise = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0), (h * w,)))(keys)
        rank = jnp.argsort(jnp.argsort(jnp.where(mask, 2.0, noise), axis=1), axis=1)
        mask |= rank < (jnp.floor(targets) - count)[:, None]
    return mask


def _strata(num_crops, grid, sampler, probability, ratio):
    """Interval ends of the targets, float64: (masked crops + 1,) of DINOv2, (2,) of iBOT."""
    low, high = ratio
    if not 0 <= low <= high <= 1:
        raise errors.UserError(
            f'mask_ratio_min_max={tuple(ratio)} is no range within 0 and 1: give (low, high).'
        )
    masked = 1
    if sampler == 'dinov2':
        masked = int(num_crops * probability)
    elif sampler != 'ibot':
        raise errors.UserError(f"mask_sampler={sampler!r} is unknown; give 'dinov2' or 'ibot'.")
    if masked < 1:
        raise errors.UserError(
            f'mask_probability={probability} masks none of {num_crops} crops; '
            f'give {1 / num_crops:.3g} or more.'
        )
    # The small constant keeps 0.3 of 100 patches from becoming 29.
    return grid[0] * grid[1] * np.linspace(low, high, masked + 1) + 1e-6


def upper_bound(
    num_crops: int,
    grid: tuple[int, int],
    *,
    sampler: str = 'dinov2',
    probability: float = 0.5,
    ratio: tuple[float, float] = (0.1, 0.5),
) -> int:
    """Static maximum of the number of patches that `crop_masks` masks in one group."""
    most = np.floor(_strata(num_crops, grid, sampler, probability, ratio)).astype(int)[1:]
    return int(most.sum()) if sampler == 'dinov2' else num_crops * int(most[-1])


def crop_masks(
    keys: jax.Array,
    num_crops: int,
    grid: tuple[int, int],
    *,
    sampler: str = 'dinov2',
    probability: float = 0.5,
    ratio: tuple[float, float] = (0.1, 0.5),
) -> jax.Array:
    """Block masks of the global crops of groups of images.

    Args:
      keys: (G,), one key per group; the masks of a group depend only on its key.
      num_crops: crops per group.
      grid: (h, w) in patches.
      sampler: one of
        'dinov2': masks floor(num_crops * probability) random crops of a group. The target of masked
          crop i is floor(h w U(r_i, r_{i+1})) for equally spaced r from ratio[0] to ratio[1], so
          the total of a group hardly varies.
        'ibot': masks each crop with `probability`. The target is h w U(ratio), and blocks are
          larger, nominally (min(h, w) // 3)² patches or more.
      probability: share of crops that are masked.
      ratio: range of the masked share of a crop.

    Returns:
      bool (G, num_crops, h * w).

    References:
      DINOv2 `data/collate.py`; iBOT `loader.py`, with pred_ratio 0 and 0.3 +- 0.2
    """
    h, w = grid
    groups = len(keys)
    ends = _strata(num_crops, grid, sampler, probability, ratio)
    if sampler == 'ibot':

        def draw(key):
            coin_key, ratio_key, key = jax.random.split(key, 3)
            coin = jax.random.bernoulli(coin_key, probability, (num_crops,))
            target = jax.random.uniform(ratio_key, (num_crops,), minval=ends[0], maxval=ends[1])
            return jax.random.split(key, num_crops), jnp.where(coin, target, 0.0)

        block_keys, targets = jax.vmap(draw)(keys)
        masks = block_masks(
            block_keys.reshape(-1), grid, targets.reshape(-1), min_patches=(min(h, w) // 3) ** 2
        )
        return masks.reshape(groups, num_crops, h * w)

    masked = len(ends) - 1
    low, high = jnp.asarray(ends[:-1], jnp.float32), jnp.asarray(ends[1:], jnp.float32)
    most = jnp.asarray(np.floor(ends[1:]), jnp.float32)  # rounding may not exceed the bound

    def draw(key):
        order_key, target_key, key = jax.random.split(key, 3)
        target = jnp.floor(low + jax.random.uniform(target_key, (masked,)) * (high - low))
        order = jax.random.permutation(order_key, num_crops)
        return order, jax.random.split(key, masked), jnp.minimum(target, most)

    order, block_keys, targets = jax.vmap(draw)(keys)
    # The official limit is 0.5 * H // p * W // p, from left to right: 98 of 14x14, 666 of 37x37.
    masks = block_masks(
        block_keys.reshape(-1), grid, targets.reshape(-1), max_patches=h // 2 * w
    ).reshape(groups, masked, h * w)
    masks = jnp.pad(masks, ((0, 0), (0, num_crops - masked), (0, 0)))
    return jnp.take_along_axis(masks, order[..., None], axis=1)


def masked_indices(masks: jax.Array, bound: int) -> Masked:
    """Positions of masked patches among the R * N patches of a group, with a static size.

    Args:
      masks: bool (..., R, N), masks of groups of R images.
      bound: M, at least the number of masked patches in each group, see `upper_bound`; further
        patches are dropped.
    """
    counts = masks.sum(axis=-1, dtype=jnp.int32)  # (..., R)
    ends = jnp.cumsum(counts, axis=-1)
    slots = jnp.arange(bound, dtype=jnp.int32)
    # Searches by comparison for the image, then for the patch: no scatter, no sort.
    image = (ends[..., None, :] <= slots[:, None]).sum(axis=-1, dtype=jnp.int32)  # (..., M)
    valid = image < masks.shape[-2]
    image = jnp.minimum(image, masks.shape[-2] - 1)
    rank = slots - jnp.take_along_axis(ends - counts, image, axis=-1)
    masked = jnp.cumsum(masks, axis=-1, dtype=jnp.int32)  # (..., R, N)
    masked = jnp.take_along_axis(masked, image[..., None], axis=-2)  # (..., M, N)
    patch = (masked <= rank[..., None]).sum(axis=-1, dtype=jnp.int32)
    weights = 1 / jnp.take_along_axis(counts, image, axis=-1).astype(jnp.float32)
    indices = image * masks.shape[-1] + patch
    return Masked(jnp.where(valid, indices, 0), jnp.where(valid, weights, 0.0), valid)
