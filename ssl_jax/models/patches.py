# SPDX-License-Identifier: Apache-2.0
"""Images as patches, and patches normalised as targets."""

import jax.numpy as jnp


def patchify(images, patch_size):
    """(B, H, W, 3) -> (B, N, p*p*3): patches in raster order; channel fastest, then column, row."""
    b, h, w, c = images.shape
    p = patch_size
    if h % p or w % p:
        raise ValueError(f'images of {h}x{w} px are not multiples of patch_size={p}.')
    x = images.reshape(b, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, (h // p) * (w // p), p * p * c)


def unpatchify(patches, grid, patch_size):
    """Inverse of `patchify`: (B, h*w, p*p*3) -> (B, h*p, w*p, 3) for grid = (h, w)."""
    b = patches.shape[0]
    h, w = grid
    p = patch_size
    x = patches.reshape(b, h, w, p, p, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(b, h * p, w * p, x.shape[-1])


def patch_statistics(patches, eps=1e-6):
    """Mean and sqrt(unbiased variance + eps) over all p*p*3 values of a patch, (B, N, 1) each."""
    mean = patches.mean(axis=-1, keepdims=True)
    var = jnp.square(patches - mean).sum(axis=-1, keepdims=True) / (patches.shape[-1] - 1)
    return mean, jnp.sqrt(var + eps)


def normalize_patches(patches, eps=1e-6):
    """Target of `norm_pix_loss`: (patch - mean) / sqrt(unbiased variance + 1e-6), per patch.

    Reference: MAE §3 "Reconstruction target"; `models_mae.py: forward_loss`.
    """
    mean, std = patch_statistics(patches, eps)
    return (patches - mean) / std
