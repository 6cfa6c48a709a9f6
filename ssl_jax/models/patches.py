# SPDX-License-Identifier: Apache-2.0
"""Patches of images, normalised patches as targets, reconstructions as images."""

import jax
import jax.numpy as jnp

from ssl_jax.augment import photometry
from ssl_jax.run import errors


def patchify(images: jax.Array, patch_size: int) -> jax.Array:
    """(B, H, W, 3) -> (B, N, p*p*3): patches in raster order; channel fastest, then column, row."""
    b, h, w, c = images.shape
    p = patch_size
    if h % p or w % p:
        raise errors.UserError(
            f'images of {h}x{w} px are not multiples of patch_size={p}: resize or crop them.'
        )
    x = images.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(patches: jax.Array, grid: tuple[int, int], patch_size: int) -> jax.Array:
    """Inverse of `patchify`: (B, h*w, p*p*3) -> (B, h*p, w*p, 3) for grid = (h, w)."""
    (h, w), p = grid, patch_size
    x = patches.reshape(len(patches), h, w, p, p, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(len(patches), h * p, w * p, -1)


def patch_statistics(patches: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and sqrt(unbiased variance + 1e-6) over the p*p*3 values of a patch, (B, N, 1) each."""
    mean = patches.mean(axis=-1, keepdims=True)
    var = jnp.square(patches - mean).sum(axis=-1, keepdims=True) / (patches.shape[-1] - 1)
    return mean, jnp.sqrt(var + 1e-6)


def normalize_patches(patches: jax.Array) -> jax.Array:
    """Target of `norm_pix_loss`: (patch - mean) / standard deviation, see `patch_statistics`.

    References:
      MAE §3 "Reconstruction target"; `models_mae.py: forward_loss`
    """
    mean, std = patch_statistics(patches)
    return (patches - mean) / std


def pictures(images, hidden, patch_size: int, prediction, **more) -> dict[str, jax.Array]:
    """Images to show for a reconstruction, float32 (B, H, W, 3) in [0, 1].

    Args:
      images: (B, H, W, 3) in [0, 1].
      hidden: (B, N), true where the encoder did not see the patch.
      patch_size: pixels.
      prediction: (B, H, W, 3) in [0, 1], predicted for all patches.
      **more: further images, returned unchanged.

    Returns:
      dict of image, masked (grey where hidden), stitched (the prediction where hidden), prediction
      and `more`.
    """
    return {
        'image': images,
        'masked': _fill(images, hidden, patch_size, 0.5),
        'stitched': _fill(images, hidden, patch_size, prediction),
        'prediction': prediction,
        **more,
    }


def from_pixels(images, hidden, patch_size: int, pred, norm_pix_loss: bool) -> dict[str, jax.Array]:
    """`pictures` of uint8 images and predicted pixels (B, N, p*p*3), normalised as the target.

    With norm_pix_loss, the prediction is denormalised with the mean and standard deviation of each
    true patch (without them it looks like noise). `means` then shows only these means where patches
    are hidden, to separate what was given from what the model predicts.
    """

    def picture(patches):
        x = unpatchify(patches, _grid(images, patch_size), patch_size)
        return photometry.denormalize(x)

    x, pred, more = images / 255.0, pred.astype(jnp.float32), {}
    if norm_pix_loss:
        patches = patchify(photometry.normalize(images), patch_size)
        mean, std = patch_statistics(patches)
        pred = pred * std + mean
        means = picture(jnp.broadcast_to(mean, patches.shape))
        more['means'] = _fill(x, hidden, patch_size, means)
    return pictures(x, hidden, patch_size, picture(pred), **more)


def _grid(images, patch_size):
    return images.shape[1] // patch_size, images.shape[2] // patch_size


def _fill(images, hidden, patch_size, filling):
    where = hidden.reshape(-1, *_grid(images, patch_size), 1) > 0
    for axis in (1, 2):
        where = where.repeat(patch_size, axis=axis)
    return jnp.where(where, filling, images)
