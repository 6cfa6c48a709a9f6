# SPDX-License-Identifier: Apache-2.0
"""RELAX: which parts of an image an embedding depends on, and how certain that is.

Random masks m_n hide parts of the image; d_n is the distance of the embedding of what is left to
that of the whole image, and s_n = 1 - d_n the similarity. At every position,

  importance R = sum_n m_n s_n / sum_n m_n,  uncertainty U = sum_n m_n (s_n - R)² / sum_n m_n

Both come from three sums in one pass, of the distances: they are 0 where nothing changes, which
keeps the difference of the sums exact there.

References:
  RELAX, arXiv 2112.10161, section 3 and its code, which leaves U without the denominator.
  RISE, arXiv 1806.07421, section 3.2 and `explanations.py`, for the masks.
  REPEAT, arXiv 2412.08513, for repeated estimates.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from ssl_jax.models import blocks
from ssl_jax.run import errors

REFERENCE_SHIFT = 3  # pixels to either side


@dataclasses.dataclass(frozen=True)
class Settings:
    """How importance is estimated; 3,000 masks estimate a cosine to 0.025 (Hoeffding, 95 %)."""

    num_masks: int = 3000
    batch: int = 64  # masks that the encoder sees at once; results do not depend on it
    cells: int = 7  # of a mask, per side
    keep: float = 0.5  # probability that a cell is shown
    # 'cell': the grid is shifted by up to one cell (RISE). 'pixels': by up to three pixels (the
    # code of RELAX), so it lies nearly still and its pattern shows in the maps.
    shift: Literal['cell', 'pixels'] = 'cell'
    # 'cosine', R up to 1; or 'l2', R is minus the distance.
    similarity: Literal['cosine', 'l2'] = 'cosine'
    # Hidden patches are dropped from the sequence instead of becoming the mean colour: cheaper by
    # the share that is dropped, for encoders that were trained so (MAE, Pixio). One value a patch.
    fast: bool = False

    def __post_init__(self):
        for name in ('num_masks', 'batch', 'cells'):
            if getattr(self, name) < 1:
                raise errors.UserError(f'{name}={getattr(self, name)}: use 1 or more.')
        if not 0 < self.keep < 1:
            raise errors.UserError(f'keep={self.keep}: use a share between 0 and 1, such as 0.5.')
        for name, known in (('shift', ('cell', 'pixels')), ('similarity', ('cosine', 'l2'))):
            value = getattr(self, name)
            if value not in known:
                raise errors.UserError(f'{name}={value!r}{errors.nearest(value, known)}')


def estimate(
    distances: Callable[[jax.Array], jax.Array],
    draw: Callable[[jax.Array], jax.Array],
    key: jax.Array,
    num_masks: int,
    batch: int = 64,
) -> tuple[jax.Array, jax.Array]:
    """Mean and variance of distances at every position, weighted by the masks.

    Args:
      distances: masks (batch, h, w) -> (batch,), how far the embedding moves.
      draw: key -> one mask (h, w) in [0, 1], 1 where the image is shown.
      key: mask n is drawn with `fold_in(key, n)`, so that masks do not depend on `batch`.
      num_masks: of all batches; the last may be filled up with masks that do not count.
      batch: masks at once.

    Returns:
      Two float32 (h, w); NaN where no mask shows the image.
    """

    def add(sums, first):
        numbers = first + jnp.arange(batch)
        masks = jax.vmap(lambda n: draw(jax.random.fold_in(key, n)))(numbers)
        d = distances(masks).astype(jnp.float32)
        counted = masks * (numbers < num_masks)[:, None, None]
        powers = jnp.stack([jnp.ones_like(d), d, d * d])  # (3, batch)
        return sums + jnp.einsum('pn,nhw->phw', powers, counted, precision='highest'), None

    zeros = jnp.zeros((3, *jax.eval_shape(draw, key).shape), jnp.float32)
    (weight, first, second), _ = jax.lax.scan(add, zeros, jnp.arange(0, num_masks, batch))
    mean = first / weight
    return mean, jnp.maximum(second / weight - mean**2, 0)


def distance(a: jax.Array, b: jax.Array, similarity: str = 'cosine') -> jax.Array:
    """1 - cosine, or Euclidean distance, of embeddings (..., D): float32 (...,)."""
    if similarity == 'l2':
        difference = a.astype(jnp.float32) - b.astype(jnp.float32)
        return jnp.sqrt(jnp.square(difference).sum(axis=-1))
    # Half the square of the chord: exact near 1, where 1 - a.b has only noise left.
    return jnp.square(blocks.l2_normalize(a) - blocks.l2_normalize(b)).sum(axis=-1) / 2


def soft_mask(
    key: jax.Array, size: tuple[int, int], cells: int = 7, keep: float = 0.5, shift: str = 'cell'
) -> jax.Array:
    """One mask of pixels: random cells, enlarged bilinearly, at a random shift.

    Args:
      key: of the mask.
      size: (H, W) in pixels.
      cells, keep, shift: see `Settings`.

    Returns:
      float32 (H, W) in [0, 1].
    """
    of_grid, *of_sides = jax.random.split(key, 3)
    shown = jax.random.bernoulli(of_grid, keep, (cells, cells)).astype(jnp.float32)
    sides = []
    for k, side in zip(of_sides, size, strict=True):
        limit = -(-side // cells) if shift == 'cell' else 2 * REFERENCE_SHIFT + 1
        sides.append(interpolation(side, cells, jax.random.randint(k, (), 0, limit), shift))
    return jnp.einsum('yk,kl,xl->yx', sides[0], shown, sides[1], precision='highest')


def interpolation(side: int, cells: int, offset: jax.Array, shift: str = 'cell') -> jax.Array:
    """Bilinear weights (side, cells) of the cells of a mask along one side.

    Args:
      side: pixels.
      cells: of the mask.
      offset: 'cell': pixels that are cut off from (cells + 1) cells of ceil(side / cells) pixels;
        'pixels': of `side` pixels, reflected by three at the borders.
      shift: see `Settings`.
    """
    at, length = jnp.arange(side) + offset, side
    if shift == 'cell':
        length = (cells + 1) * -(-side // cells)
    else:
        at = jnp.abs(at - REFERENCE_SHIFT)
        at = side - 1 - jnp.abs(side - 1 - at)
    centre = jnp.clip((at + 0.5) * cells / length - 0.5, 0, cells - 1)
    return jnp.maximum(1 - jnp.abs(centre[:, None] - jnp.arange(cells)), 0)


def patch_mask(
    key: jax.Array, grid: tuple[int, int], kept: int, cells: int = 7, always: int | None = None
) -> jax.Array:
    """One mask of patches of which exactly `kept` are shown, in connected parts.

    They are the highest of noise that is as coarse as the cells of `soft_mask`.

    Args:
      key: of the mask.
      grid: (h, w) in patches.
      kept: number of patches.
      cells: of the noise per side; more than patches are as many as patches.
      always: number of a patch that is shown in every mask.

    Returns:
      float32 (h, w) of 0 and 1.
    """
    of_noise, *of_sides = jax.random.split(key, 3)
    cells = min(cells, *grid)
    noise = jax.random.uniform(of_noise, (cells + 2,) * 2)
    sides = []
    for k, side in zip(of_sides, grid, strict=True):
        centre = (jnp.arange(side) + 0.5) * cells / side + jax.random.uniform(k)
        sides.append(jnp.maximum(1 - jnp.abs(centre[:, None] - jnp.arange(cells + 2)), 0))
    height = jnp.einsum('yk,kl,xl->yx', sides[0], noise, sides[1]).reshape(-1)
    if always is not None:
        height = height.at[always].set(jnp.inf)
    shown = jnp.argsort(-height)[:kept]
    return jnp.zeros(len(height), jnp.float32).at[shown].set(1).reshape(grid)


def kept_ids(masks: jax.Array, kept: int) -> jax.Array:
    """Numbers of the shown patches, ascending, (n, kept), of masks (n, h, w) of `patch_mask`."""
    return jnp.argsort(-masks.reshape(len(masks), -1), axis=1, stable=True)[:, :kept]


def certain(importance: jax.Array, uncertainty: jax.Array) -> jax.Array:
    """U-RELAX: importance where the uncertainty is at most its median, else 0; (..., h, w)."""
    median = jnp.nanmedian(uncertainty, axis=(-2, -1), keepdims=True)
    return jnp.where(uncertainty <= median, importance, 0)


def agreement(importance: jax.Array) -> dict[str, jax.Array]:
    """What several estimates of one map agree on.

    Args:
      importance: (K, h, w) of different keys.

    Returns:
      dict of float32 (h, w)
        spread: standard deviation over the estimates;
        important: share p of the estimates in which the position is above the map's mean. As a
          Bernoulli variable, p (1 - p) is its variance (REPEAT; the threshold is ours).
    """
    above = importance > jnp.nanmean(importance, axis=(-2, -1), keepdims=True)
    return {
        'spread': importance.std(axis=0),
        'important': above.mean(axis=0, dtype=jnp.float32),
    }
