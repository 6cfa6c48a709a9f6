# SPDX-License-Identifier: Apache-2.0
"""Frozen encoders: features of images, in Python and for evaluations.

model = ssl_jax.load_model('runs/mine')    # or an HF, timm or official folder or file
out = model(images)                        # uint8 (B, H, W, 3)
out['cls'], out['patch_tokens']            # (B, D), (B, N, D)
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.augment import photometry
from ssl_jax.models import patches as patches_lib
from ssl_jax.models import vit as vit_lib
from ssl_jax.objectives import relax
from ssl_jax.run import errors, weights

MAX_GRID = 8192  # numbers per image: a million images in 32 GiB


@dataclasses.dataclass(frozen=True)
class Model:
    """A frozen encoder; call it with images."""

    vit: vit_lib.ViT  # `models.vit.ViT`
    params: Any  # its parameters, on the device
    transform: dict  # what happens to images before, see `data.transform`
    source: str  # path of the weights

    @property
    def size(self) -> int:
        """Side in pixels of the images it was made for; others work too."""
        return self.transform['size']

    @property
    def patch_size(self) -> int:
        """Pixels per side of a patch."""
        return self.vit.patch_size

    @property
    def mean(self) -> tuple:
        """Of the channels, for values in [0, 1]."""
        return tuple(self.transform['mean'])

    @property
    def std(self) -> tuple:
        """Of the channels, for values in [0, 1]."""
        return tuple(self.transform['std'])

    def __call__(self, images: jax.Array | np.ndarray, blocks: tuple = ()) -> dict:
        """Tokens and features of images, compiled once per shape.

        Args:
          images: (B, H, W, 3), sides multiples of the patch size. uint8 is normalised here with
            `mean` and `std`; floating point must be normalised already.
          blocks: numbers of blocks whose raw outputs to return, from 0, negative from the end.

        Returns:
          jax arrays: cls_tokens (B, C, D), reg_tokens (B, R, D), patch_tokens (B, N, D) after the
          final norm, patches in raster order; cls, cls_pre, patch (B, D) and cls_patch (B, 2 D),
          float32, see `make_forward` (only `patch` without class tokens); with `blocks` also
          blocks, {number: (B, C + R + N, D)} before the final norm.

        Raises:
          UserError: shape or dtype of the images, or the number of a block, is wrong.
        """
        _check(self.vit, images)
        depth = self.vit.depth
        for block in blocks:
            if not -depth <= block < depth:
                raise errors.UserError(
                    f'There is no block {block}: this encoder has 0 to {depth - 1}.'
                )
        numbers = tuple(block % depth for block in blocks)
        out = _tokens(self.vit, self.params, images, self.mean, self.std, numbers)
        if blocks:
            out['blocks'] = dict(zip(blocks, out['blocks'], strict=True))
        return out


@dataclasses.dataclass(frozen=True)
class Pixels:
    """The encoder without learning: the tokens of a patch are its normalised pixels."""

    patch_size: int
    transform: dict
    source: str = 'raw pixels'

    @property
    def size(self) -> int:
        return self.transform['size']

    def __call__(self, images: jax.Array | np.ndarray, blocks: tuple = ()) -> dict:
        """patch_tokens (B, N, 3 p^2) and their mean `patch`; as `blocks` the same tokens again."""
        tokens = _pixels(
            images, self.patch_size, tuple(self.transform['mean']), tuple(self.transform['std'])
        )
        out = {'patch_tokens': tokens, 'patch': tokens.mean(axis=1)}
        if blocks:
            out['blocks'] = {block: tokens for block in blocks}
        return out


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _pixels(images, patch_size, mean, std):
    if images.dtype == jnp.uint8:
        images = photometry.normalize(images, mean, std)
    return patches_lib.patchify(images, patch_size)


def _check(vit, images):
    if not hasattr(images, 'dtype'):
        raise errors.UserError(f'Images are one array (B, H, W, 3), not {type(images).__name__}.')
    shape, dtype, p = tuple(images.shape), images.dtype, vit.patch_size
    if len(shape) != 4 or shape[3] != 3:
        hint = ': add an axis with images[None]' if len(shape) == 3 and shape[2] == 3 else ''
        raise errors.UserError(f'Images have shape (B, H, W, 3), not {shape}{hint}.')
    if dtype != np.uint8 and not jnp.issubdtype(dtype, jnp.floating):
        raise errors.UserError(f'Images are uint8, or floating point and normalised, not {dtype}.')
    for side in shape[1:3]:
        if side % p or not side:
            raise errors.UserError(
                f'Images of {shape[1]}x{shape[2]} do not divide into patches of {p} pixels: '
                f'resize them, for instance to {max(round(side / p), 1) * p} instead of {side}.'
            )


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5))  # outside the class: shared by all models
def _tokens(vit, params, images, mean, std, blocks):
    if images.dtype == jnp.uint8:
        images = photometry.normalize(images, mean, std)
    tokens = vit.apply({'params': params}, images, capture=blocks)
    names = ('cls_tokens', 'reg_tokens', 'patch_tokens', 'blocks')
    return {**{name: tokens[name] for name in names if name in tokens}, **pooled(vit, tokens)}


def load_model(path, *, dtype=None, **hints) -> Model:
    """Loads an encoder.

    Args:
      path: the workdir of a run, a checkpoint folder, an export, an HF or timm folder, or a file
        of weights, see `run.weights.open_weights`.
      dtype: compute type of the layers, e.g. 'bfloat16'; default that of the run, else float32.
      hints: see `run.hints`, for what the tensors do not show.

    Raises:
      ValueError: the weights cannot be read, in one sentence.
    """
    opened = weights.open_weights(path, **hints)
    vit, params = opened.networks()['encoder']
    if dtype is not None:
        vit = vit.clone(dtype=jnp.dtype(dtype))
    return Model(
        vit=vit,
        params=jax.device_put(params),
        transform=opened.transform,
        source=str(path),
    )


def attention(model: Model, images: jax.Array | np.ndarray) -> jax.Array:
    """Attention of the class token to the patches in the last block, one map per head.

    Args:
      model: with class tokens; of several the mean.
      images: see `Model.__call__`.

    Returns:
      float32 (B, heads, h, w).
    """
    _check(model.vit, images)
    return _attention(model.vit, model.params, images, model.mean, model.std)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def _attention(vit, params, images, mean, std):
    if images.dtype == jnp.uint8:
        images = photometry.normalize(images, mean, std)
    c, first = vit.num_cls_tokens, vit.num_cls_tokens + vit.num_register_tokens
    weights = vit_lib.last_attention(vit, params, images)[:, :, :c, first:].mean(axis=2)
    grid = (side // vit.patch_size for side in images.shape[1:3])
    return weights.reshape(*weights.shape[:2], *grid)


def explain(
    model: Model,
    images: jax.Array | np.ndarray,
    of: str | tuple[int, int] = '',
    *,
    seed: int = 0,
    repeats: int = 1,
    **settings,
) -> dict[str, jax.Array]:
    """Which pixels an embedding depends on, and how certain that is (RELAX).

    Every image costs as many forward passes as there are masks, in batches of bounded memory.

    Args:
      model: any encoder.
      images: see `Model.__call__`. Each has masks of its own: with the same ones, what the draw
        happened to favour would show in all maps and look like a finding.
      of: the embedding: a feature of `make_forward` such as 'cls' or 'patch', or (row, column) of
        one patch. Default: 'cls', without class tokens 'patch'.
      seed: of the masks; those of image i, counted from 0, come from it and i.
      repeats: number of estimates, each with masks of its own. The maps are their means.
      settings: fields of `objectives.relax.Settings`, e.g. num_masks=500, fast=True.

    Returns:
      dict of float32 (B, H, W)
        importance: mean similarity to the whole image while the pixel is shown;
        uncertainty: the variance of that similarity;
        u_relax: the importance where the uncertainty is at most its median, else 0;
        spread, important: with several repeats, see `relax.agreement`.

    Raises:
      UserError: images, `of` or a setting are wrong, or the encoder cannot drop patches (fast).
    """
    _check(model.vit, images)
    vit, settings = model.vit, relax.Settings(**settings)
    grid = tuple(side // vit.patch_size for side in images.shape[1:3])
    if not isinstance(of, str):
        of = tuple(map(int, of))
    of = of or ('cls' if vit.num_cls_tokens else 'patch')
    _check_explained(vit, grid, of, settings, repeats)
    found = []
    for i, image in enumerate(images):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), i), repeats)
        run = functools.partial(_explain, vit, model.params, image, model.mean, model.std)
        maps = [run(of, settings, key) for key in keys]
        importance, uncertainty = (jnp.stack(x) for x in zip(*maps, strict=True))
        out = {'importance': importance.mean(axis=0), 'uncertainty': uncertainty.mean(axis=0)}
        out['u_relax'] = relax.certain(**out)
        found.append(out if repeats == 1 else {**out, **relax.agreement(importance)})
    return jax.tree.map(lambda *x: jnp.stack(x), *found)


def _check_explained(vit, grid, of, settings, repeats):
    known = ['patch', *(['cls', 'cls_pre', 'cls_patch'] if vit.num_cls_tokens else [])]
    if isinstance(of, str):
        if of not in known:
            raise errors.UserError(f'There is no feature {of!r}{errors.nearest(of, known)}')
    elif not all(0 <= i < n for i, n in zip(of, grid, strict=True)):
        raise errors.UserError(f'There is no patch {of}: the grid is {grid[0]}x{grid[1]}.')
    if repeats < 1:
        raise errors.UserError(f'repeats={repeats}: use 1 or more.')
    if settings.fast and (vit.pos_embed == 'rope' or vit.rel_pos):
        raise errors.UserError(
            'This encoder has rotary or relative positions and cannot drop patches: use fast=False.'
        )


@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5, 6))
def _explain(vit, params, image, mean, std, of, settings, key):
    """`relax.estimate` of one image (H, W, 3): importance and uncertainty, (H, W)."""
    if image.dtype == jnp.uint8:
        image = photometry.normalize(image, mean, std)
    size, p = image.shape[:2], vit.patch_size
    grid = tuple(side // p for side in size)
    number = None if isinstance(of, str) else of[0] * grid[1] + of[1]
    kept = min(max(round(settings.keep * grid[0] * grid[1]), 1), grid[0] * grid[1])

    def embed(images, ids=None):
        tokens = vit.apply({'params': params}, images, ids_keep=ids)
        if number is None:
            return pooled(vit, tokens)[of]
        if ids is None:
            return tokens['patch_tokens'][:, number]
        where = (ids == number).argmax(axis=1)[:, None, None]
        return jnp.take_along_axis(tokens['patch_tokens'], where, axis=1)[:, 0]

    def distances(masks):
        if settings.fast:
            images = jnp.broadcast_to(image, (len(masks), *image.shape))
            found = embed(images, relax.kept_ids(masks, kept))
        else:
            found = embed(image * masks[..., None])
        return relax.distance(found, whole, settings.similarity)

    def draw(key):
        if settings.fast:
            return relax.patch_mask(key, grid, kept, settings.cells, number)
        return relax.soft_mask(key, size, settings.cells, settings.keep, settings.shift)

    whole = embed(image[None])
    mean, variance = relax.estimate(distances, draw, key, settings.num_masks, settings.batch)
    importance = -mean if settings.similarity == 'l2' else 1 - mean
    if settings.fast:
        importance, variance = (jnp.kron(x, jnp.ones((p, p))) for x in (importance, variance))
    return importance, variance


def make_forward(
    vit: vit_lib.ViT,
    params,
    *,
    mean: tuple = photometry.MEAN,
    std: tuple = photometry.STD,
    last_blocks: int = 0,
) -> Callable:
    """The forward of an encoder, uint8 images (B, H, W, 3) -> {feature: float32 (B, d)}.

    Features:
      cls:        mean of the class tokens after the final norm (MAE, DINOv2: one token)
      cls_pre:    mean of the class tokens before it (input of Pixio's kNN)
      patch:      mean of the patch tokens after the norm
      cls_patch:  cls and patch side by side
      grid<n>:    means of the patch tokens over n x n cells of the image side by side, see
                  `cell_means`; n is 4, or fewer, see `grid_cells`
      cls<n>, cls<n>_patch: the same with the class tokens of the last n = `last_blocks` blocks,
                  each after the final norm (n = 4 in DINOv2's linear protocol)
    An encoder without class tokens has only `patch` and `grid<n>`.

    Args:
      vit, params: the encoder.
      mean, std: of the channels, for values in [0, 1].
      last_blocks: 0 for none; needs memory for the tokens of all blocks.
    """
    channels = tuple(mean), tuple(std)
    return lambda images: _features(vit, params, images, *channels, last_blocks)


# One compilation per ViT, shared by all its forwards.
@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5))
def _features(vit, params, images, mean, std, last_blocks):
    last = tuple(range(vit.depth))[-last_blocks:] if last_blocks else ()
    tokens = vit.apply({'params': params}, photometry.normalize(images, mean, std), capture=last)
    features = pooled(vit, tokens)
    grid = [side // vit.patch_size for side in images.shape[1:3]]
    cells = grid_cells(grid, vit.embed_dim)
    if cells > 1:
        features[f'grid{cells}'] = cell_means(tokens['patch_tokens'], grid, cells)
    if last and vit.num_cls_tokens:
        cls = tokens['blocks'][:, :, : vit.num_cls_tokens]
        if not vit.pooled_norm:
            cls = vit_lib.final_norm(params, cls, vit.eps)
        cls = cls.astype(jnp.float32).mean(axis=2)  # (n, B, D)
        features[f'cls{len(last)}'] = linear_input(cls)
        features[f'cls{len(last)}_patch'] = linear_input(cls, features['patch'])
    return features


def linear_input(cls: jax.Array, patch: jax.Array | None = None) -> jax.Array:
    """DINOv2's input of a linear classifier, (B, n D) or (B, (n + 1) D).

    Args:
      cls: (n, B, D), normed class tokens of the last n blocks, last block at the end.
      patch: (B, D), mean of the normed patch tokens of the last block, or None.

    References:
      dinov2 `eval/linear.py: create_linear_input`
    """
    return jnp.concatenate([*cls, *([] if patch is None else [patch])], axis=-1)


def pooled(vit: vit_lib.ViT, tokens: dict) -> dict[str, jax.Array]:
    """cls, cls_pre, patch and cls_patch of `make_forward`, from the output of `vit`."""
    c = vit.num_cls_tokens
    patch = tokens.get('pooled')  # of a fine-tuned encoder, whose norm is that of the mean
    if patch is None:
        patch = tokens['patch_tokens'].astype(jnp.float32).mean(axis=1)
    if not c:
        return {'patch': patch}
    cls = tokens['cls_tokens'].astype(jnp.float32).mean(axis=1)
    return {
        'cls': cls,
        'cls_pre': tokens['pre_norm'][:, :c].astype(jnp.float32).mean(axis=1),
        'patch': patch,
        'cls_patch': jnp.concatenate([cls, patch], axis=1),
    }


def grid_cells(grid: tuple[int, int], embed_dim: int) -> int:
    """Cells per side of the feature `grid<n>`: 4, or fewer where 4 x 4 x embed_dim > MAX_GRID."""
    return max(n for n in range(1, min(4, *grid) + 1) if n == 1 or n * n * embed_dim <= MAX_GRID)


def cell_means(patch_tokens: jax.Array, grid: tuple[int, int], cells: int) -> jax.Array:
    """Means of the patch tokens over cells x cells parts of the image.

    They keep the rough position of things, as raw pixels do and one mean over the image does not:
    a fair comparison with raw pixels for tiny images with centred objects. If the rows do not
    divide, neighbouring cells share one, as in torch's `adaptive_avg_pool2d`.

    Args:
      patch_tokens: (B, N, D), row by row.
      grid: (rows, columns), rows * columns = N.
      cells: per side.

    Returns:
      float32 (B, cells^2 D), cells row by row.
    """
    b, _, d = patch_tokens.shape

    def weights(n):
        w = np.zeros((cells, n), np.float32)
        for i in range(cells):
            first, end = i * n // cells, -(-(i + 1) * n // cells)
            w[i, first:end] = 1 / (end - first)
        return w

    x = patch_tokens.astype(jnp.float32).reshape(b, *grid, d)
    rows, columns = map(weights, grid)
    x = jnp.einsum('ir,brcd,jc->bijd', rows, x, columns, precision='highest')
    return x.reshape(b, cells * cells * d)
