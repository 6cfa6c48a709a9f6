# SPDX-License-Identifier: Apache-2.0
"""What a model fills hidden patches with, as images; `viz.reconstruction_grid` lays them out."""

import jax.numpy as jnp

from ssl_jax.augment import photometry
from ssl_jax.models import patches as patches_lib


def pictures(images, hidden, patch_size, prediction, **more):
    """dict of float32 (B, H, W, 3) in [0, 1].

    Args:
      images: in [0, 1].  hidden: (B, N), true where the encoder did not see the patch.
      prediction: of all patches.  more: other images to show, as they are.

    Returns:
      image; masked, grey where hidden; stitched, the prediction where hidden; prediction; `more`.
    """
    return {
        'image': images,
        'masked': _fill(images, hidden, patch_size, 0.5),
        'stitched': _fill(images, hidden, patch_size, prediction),
        'prediction': prediction,
        **more,
    }


def from_pixels(images, hidden, patch_size, pred, norm_pix_loss):
    """`pictures` of predicted pixels.

    Where norm_pix_loss was used, the prediction is un-normalised with each patch's own mean and
    standard deviation (raw it looks like noise), and `means` has only these means where patches are
    hidden, so that nobody takes what was given for what the model knows.

    Args:
      images: uint8 (B, H, W, 3).  hidden: (B, N).  pred: (B, N, p*p*3), normalised as the target.
    """

    def picture(patches):
        x = patches_lib.unpatchify(patches, _grid(images, patch_size), patch_size)
        return photometry.denormalize(x)

    x, pred, more = images / 255.0, pred.astype(jnp.float32), {}
    if norm_pix_loss:
        patches = patches_lib.patchify(photometry.normalize(images), patch_size)
        mean, std = patches_lib.patch_statistics(patches)
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
