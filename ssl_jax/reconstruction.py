# SPDX-License-Identifier: Apache-2.0
"""What a model fills hidden patches with, as images; `viz.reconstruction_grid` lays them out."""

import jax.numpy as jnp

from ssl_jax import augment, losses


def pictures(images, hidden, prediction, **more):
    """dict of float32 (B, H, W, 3) in [0, 1].

    Args:
      images: in [0, 1].  hidden: (B, N), true where the encoder did not see the patch.
      prediction: of all patches.  more: other images to show.

    Returns:
      image; masked, grey where hidden; stitched, the prediction where hidden; prediction; and of
      `more` what there is: means where hidden (see `from_pixels`), words (see
      `tokenizers.draw`).
    """
    side = round(hidden.shape[1] ** 0.5)
    hidden = hidden.reshape(-1, side, side, 1) > 0
    for axis in (1, 2):
        hidden = hidden.repeat(images.shape[axis] // side, axis=axis)
    if 'means' in more:
        more['means'] = jnp.where(hidden, more['means'], images)
    return {
        'image': images,
        'masked': jnp.where(hidden, 0.5, images),
        'stitched': jnp.where(hidden, prediction, images),
        'prediction': prediction,
        **more,
    }


def from_pixels(images, hidden, pred, norm_pix_loss):
    """`pictures` of predicted pixels.

    Where norm_pix_loss was used, the prediction is un-normalised with each patch's own mean and
    standard deviation (raw it looks like noise), and `means` shows these means by themselves, so
    that nobody takes what was given for what the model knows.

    Args:
      images: uint8 (B, S, S, 3).  hidden: (B, N).  pred: (B, N, p*p*3), normalised as the target.
    """
    side = round(pred.shape[1] ** 0.5)
    patch_size = images.shape[1] // side

    def picture(patches):
        return augment.denormalize(losses.unpatchify(patches, (side, side), patch_size))

    pred, more = pred.astype(jnp.float32), {}
    if norm_pix_loss:
        patches = losses.patchify(augment.normalize(images), patch_size)
        mean, std = losses.patch_statistics(patches)
        pred = pred * std + mean
        more['means'] = picture(jnp.broadcast_to(mean, patches.shape))
    return pictures(images / 255.0, hidden, picture(pred), **more)
