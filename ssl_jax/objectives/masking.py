# SPDX-License-Identifier: Apache-2.0
"""Which patches are hidden.  Static shapes; noise or keys in, masks or index arrays out."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Rounds of the block sampler: each places one block or ends the mask.  Of 20,000 masks of 14x14
# patches none took more than 15, of 3,000 of 64x64 none more than 22.
ROUNDS = 32
TRIALS = 10  # blocks that are tried in a round


class Mask(NamedTuple):
    ids_keep: jax.Array  # (B, K) visible tokens, in the order of the noise (not raster order)
    ids_restore: jax.Array  # (B, N) position of raster token j in [visible | masked]
    mask: jax.Array  # (B, N) float32, 1 = masked, raster order


def num_blocks(grid, mask_grid):
    """Number of noise values per image for a token `grid` (h, w) cut in blocks of mask_grid²."""
    h, w = grid
    if h % mask_grid or w % mask_grid:
        raise ValueError(
            f'mask_grid={mask_grid} does not divide the token grid {h}x{w}; '
            f'choose a divisor of both sides (1 masks single patches, as MAE does).'
        )
    return (h // mask_grid) * (w // mask_grid)


def from_noise(noise, grid, mask_ratio, mask_grid=1):
    """Masking of MAE (mask_grid 1) and Pixio (square blocks of mask_grid x mask_grid patches).

    The int(blocks * (1 - mask_ratio)) blocks of smallest noise stay visible; each kept block is
    expanded in place, in raster order inside the block.

    Args:
      noise: (B, num_blocks(grid, mask_grid)), uniform, free of ties.
      grid: (h, w) in patches.

    Reference: MAE `models_mae.py: random_masking`; Pixio `models_pixio.py: random_masking`.
    """
    h, w = grid
    blocks = num_blocks(grid, mask_grid)
    if noise.shape[-1] != blocks:
        raise ValueError(f'noise has {noise.shape[-1]} values per image for {blocks} blocks.')
    kept = int(blocks * (1 - mask_ratio))
    order = jnp.argsort(noise, axis=-1)  # (B, blocks)
    if mask_grid > 1:
        # Token ids of every block, (blocks, mask_grid²): blocks in raster order, tokens too.
        ids = np.arange(h * w).reshape(h // mask_grid, mask_grid, w // mask_grid, mask_grid)
        ids = jnp.asarray(ids.transpose(0, 2, 1, 3).reshape(blocks, -1))
        order = ids[order].reshape(noise.shape[0], h * w)
        kept *= mask_grid**2
    ids_restore = jnp.argsort(order, axis=-1)
    return Mask(order[:, :kept], ids_restore, (ids_restore >= kept).astype(jnp.float32))


def random_masking(keys, grid, mask_ratio, mask_grid=1):
    """`from_noise` with uniform noise of one key per sample.  keys (B,)."""
    n = num_blocks(grid, mask_grid)
    noise = jax.vmap(lambda key: jax.random.uniform(key, (n,)))(keys)
    return from_noise(noise, grid, mask_ratio, mask_grid)


class Masked(NamedTuple):
    indices: jax.Array  # (..., M) int32, positions of masked patches in R * N, ascending, then 0
    weights: jax.Array  # (..., M) float32, 1 / number of masked patches in the image, then 0
    valid: jax.Array  # (..., M) bool, False where it is padding


def block_masks(
    keys, grid, targets, *, min_patches=4, max_patches=None, min_aspect=0.3, exact=False
):
    """Masks made of rectangles, bool (B, h * w) in raster order, True = masked.

    Block by block, with budget = min(target - patches masked so far, max_patches), up to ten
    trials of: area ~ U(min_patches, budget), also where min_patches is the larger; aspect =
    exp(U(ln min_aspect, -ln min_aspect)); height = round(sqrt(area aspect)); width =
    round(sqrt(area / aspect)); a uniform place.  The first trial that is shorter and narrower than
    the grid and masks 1 to `budget` new patches is taken.  Where all fail the mask ends below its
    target; it never exceeds it.

    Args:
      keys: (B,); a mask depends on its key and its target alone.
      grid: (h, w) in patches.
      targets: (B,) or scalar, number of patches to mask, need not be whole; 0 masks none.
      min_patches: 4 in DINOv2, 16 in BEiT and SplitMask.
      max_patches: None for no limit, 75 in SplitMask.
      min_aspect: smallest height / width; the largest is its inverse.
      exact: single patches, uniform among the free ones, bring each mask to int(target).

    Reference: BEiT, arXiv 2106.08254, Algorithm 1, and `masking_generator.py`; the sampler of
    DINOv2 (`data/masking.py`) and iBOT (`loader.py`) is the same.
    """
    h, w = grid
    limit = h * w if max_patches is None else max_patches
    targets = jnp.broadcast_to(jnp.asarray(targets, jnp.float32), keys.shape)
    # All draws at once, for a loop over small draws is mostly latency; and along one axis, for
    # XLA takes 2 s longer to compile random numbers of three.
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
    # A fixed number of rounds: a loop until the last mask is full would make all devices wait for
    # one another in each of them.
    (mask, count, _), _ = jax.lax.scan(round_, start, jnp.moveaxis(u, 1, 0))
    mask = mask.reshape(len(keys), h * w) > 0
    if exact:
        noise = jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, 0), (h * w,)))(keys)
        rank = jnp.argsort(jnp.argsort(jnp.where(mask, 2.0, noise), axis=1), axis=1)
        mask |= rank < (jnp.floor(targets) - count)[:, None]
    return mask


def _strata(num_crops, grid, sampler, probability, ratio):
    """Ends of the intervals of DINOv2's targets, float64 (masked crops + 1,); of iBOT's, (2,)."""
    low, high = ratio
    if not 0 <= low <= high <= 1:
        raise ValueError(f'mask_ratio_min_max={tuple(ratio)} is no range within 0 and 1.')
    masked = 1
    if sampler == 'dinov2':
        masked = int(num_crops * probability)
    elif sampler != 'ibot':
        raise ValueError(f"mask_sampler={sampler!r} is unknown; give 'dinov2' or 'ibot'.")
    if masked < 1:
        raise ValueError(
            f'mask_probability={probability} masks none of {num_crops} crops; '
            f'give {1 / num_crops:.3g} or more.'
        )
    # The small sum keeps 0.3 of 100 patches from becoming 29.
    return grid[0] * grid[1] * np.linspace(low, high, masked + 1) + 1e-6


def upper_bound(num_crops, grid, *, sampler='dinov2', probability=0.5, ratio=(0.1, 0.5)):
    """Most patches that `crop_masks` masks in one group, an int that depends on nothing drawn."""
    most = np.floor(_strata(num_crops, grid, sampler, probability, ratio)).astype(int)[1:]
    return int(most.sum()) if sampler == 'dinov2' else num_crops * int(most[-1])


def crop_masks(keys, num_crops, grid, *, sampler='dinov2', probability=0.5, ratio=(0.1, 0.5)):
    """Block masks of the global crops of groups of images, bool (G, num_crops, h * w).

    sampler 'dinov2': floor(num_crops * probability) crops of a group, chosen at random, are masked;
    the target of the i-th of them is floor(h w U(r_i, r_{i+1})) for equally spaced r from ratio[0]
    to ratio[1], so that the total of a group hardly varies.
    sampler 'ibot': each crop is masked with `probability`, its target is h w U(ratio), and blocks
    are larger, of nominally (min(h, w) // 3)² patches or more.

    Args:
      keys: (G,), one key per group; a group's masks depend on its key alone.
      grid: (h, w) in patches.

    Reference: DINOv2 `data/collate.py`; iBOT `loader.py`, with pred_ratio 0 and 0.3 +- 0.2.
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
    # The official limit, 0.5 * H // p * W // p from left to right: 98 of 14x14, 666 of 37x37.
    masks = block_masks(
        block_keys.reshape(-1), grid, targets.reshape(-1), max_patches=h // 2 * w
    ).reshape(groups, masked, h * w)
    masks = jnp.pad(masks, ((0, 0), (0, num_crops - masked), (0, 0)))
    return jnp.take_along_axis(masks, order[..., None], axis=1)


def masked_indices(masks, bound):
    """Where the masked patches are, with a static size: `Masked` of bool (..., R, N).

    Positions count through the R * N patches of a group of R images.

    Args:
      bound: M, at least the number of masked patches in each group, see `upper_bound`; patches
        beyond it are left out.
    """
    counts = masks.sum(axis=-1, dtype=jnp.int32)  # (..., R)
    ends = jnp.cumsum(counts, axis=-1)
    slots = jnp.arange(bound, dtype=jnp.int32)
    # Two short searches by comparison, first the image, then the patch: no scatter, no sort.
    image = (ends[..., None, :] <= slots[:, None]).sum(axis=-1, dtype=jnp.int32)  # (..., M)
    valid = image < masks.shape[-2]
    image = jnp.minimum(image, masks.shape[-2] - 1)
    rank = slots - jnp.take_along_axis(ends - counts, image, axis=-1)
    upto = jnp.cumsum(masks, axis=-1, dtype=jnp.int32)  # (..., R, N)
    upto = jnp.take_along_axis(upto, image[..., None], axis=-2)  # (..., M, N)
    patch = (upto <= rank[..., None]).sum(axis=-1, dtype=jnp.int32)
    weights = 1 / jnp.take_along_axis(counts, image, axis=-1).astype(jnp.float32)
    indices = image * masks.shape[-1] + patch
    return Masked(jnp.where(valid, indices, 0), jnp.where(valid, weights, 0.0), valid)
