# SPDX-License-Identifier: Apache-2.0
"""Photometry on the device: batched, jitted, one key per sample, uint8 in and float32 out."""

import jax
import jax.numpy as jnp

# ImageNet statistics in units of [0, 1]; every released MAE, Pixio and DINOv2 weight expects them.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


def normalize(images, mean=MEAN, std=STD):
    """(x / 255 - mean) / std.  uint8 (..., 3) -> float32 (..., 3)."""
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return (images.astype(jnp.float32) / 255.0 - mean) / std


def denormalize(x):
    """Inverse of `normalize` up to the clip to [0, 1].  float (..., 3) -> float32 in [0, 1]."""
    mean, std = jnp.asarray(MEAN, jnp.float32), jnp.asarray(STD, jnp.float32)
    return jnp.clip(x.astype(jnp.float32) * std + mean, 0.0, 1.0)


def random_flip(keys, images, p):
    """Mirrors each image left-right with probability `p`.  keys (B,), images (B, H, W, 3)."""
    if not p:
        return images
    flip = jax.vmap(lambda key: jax.random.bernoulli(key, p))(keys)  # (B,)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def sample_keys(rng, rows):
    """One key per sample: a function of (rng, row in the global batch) and of nothing else.

    Args:
      rng: the key of the step.
      rows: int (B,), position of each sample in the global batch, so that neither the mesh nor
        the split into micro-batches changes what a sample draws.
    """
    return jax.vmap(lambda row: jax.random.fold_in(rng, row))(rows)
