# SPDX-License-Identifier: Apache-2.0
"""Photometry on the device: batched, jitted, one key per sample, uint8 in and float32 out."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

# ImageNet statistics in units of [0, 1]; every released MAE, Pixio and DINOv2 weight expects them.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# Shares of red, green and blue in grey: ITU-R BT.601 with the digits of torchvision.
GREY = (0.2989, 0.587, 0.114)

# Probability of a Gaussian blur for the first global crop, the second, and local crops.  'intended'
# is what DINO's paper and code say.  DINOv2's code hands 1 - p to the wrapper that expects p, so
# this is what its released weights have seen (facebookresearch/dinov2, pull request 411).
BLUR = {
    'released': (0.0, 0.9, 0.5),
    'intended': (1.0, 0.1, 0.5),
    'none': (0.0, 0.0, 0.0),
}


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


class Photometry(NamedTuple):
    """What each sample gets; the leading axis is the batch."""

    jitter: jax.Array  # (B,) bool
    order: jax.Array  # (B, 4) int32, permutation of brightness 0, contrast 1, saturation 2, hue 3
    factors: jax.Array  # (B, 3) of brightness, contrast, saturation; 1 changes nothing
    hue: jax.Array  # (B,) shift in turns of the colour circle
    grey: jax.Array  # (B,) bool
    blur: jax.Array  # (B,) bool
    sigma: jax.Array  # (B,) of the blur, in pixels
    solarize: jax.Array  # (B,) bool


def photometric(
    keys,
    images,
    *,
    brightness=0.0,
    contrast=0.0,
    saturation=0.0,
    hue=0.0,
    jitter_prob=0.0,
    grey_prob=0.0,
    blur_prob=0.0,
    blur_kernel=9,
    blur_sigma=(0.1, 2.0),
    solarize_prob=0.0,
    solarize_threshold=128,
):
    """Colour jitter, grey, Gaussian blur and solarisation, in this order.

    Args:
      keys: (B,); what a sample gets depends on its key alone.
      images: (B, H, W, 3), uint8 or float in [0, 255].
      brightness, contrast, saturation: largest change b; the factor is U(max(0, 1 - b), 1 + b).
      hue: largest shift, in turns of the colour circle, at most 0.5.
      jitter_prob: probability of the four together, in a random order.
      grey_prob, blur_prob, solarize_prob: the same for these, a number or (B,).
      blur_kernel: taps of the blur, odd; blur_sigma: range of its width in pixels.
      solarize_threshold: values from here on are inverted.

    Returns:
      float32 (B, H, W, 3) in [0, 255], not rounded: what `normalize` takes.

    Reference: DINOv2 `data/augmentations.py`; DINO, arXiv 2104.14294, §3.2.
    """
    height, width = images.shape[1:3]
    if not 0 <= hue <= 0.5:
        raise ValueError(f'hue={hue} is not in [0, 0.5]; DINO takes 0.1.')
    if not 0 < blur_sigma[0] <= blur_sigma[1]:
        raise ValueError(f'blur_sigma={blur_sigma} is no range above 0; DINO takes (0.1, 2.0).')
    if blur_kernel % 2 == 0 or min(height, width) <= blur_kernel // 2:
        raise ValueError(
            f'blur_kernel={blur_kernel} is even or reaches over the edge of {height}x{width} px '
            f'twice; DINOv2 takes 9.'
        )
    probs = (jitter_prob, grey_prob, blur_prob, solarize_prob)
    u = jax.vmap(lambda key: jax.random.uniform(key, (13,)))(keys)  # (B, 13)
    coins = [u[:, i] < p for i, p in enumerate(probs)]
    ranges = [(max(0.0, 1 - b), 1 + b) for b in (brightness, contrast, saturation)]
    low, high = (jnp.asarray(ends, jnp.float32) for ends in zip(*ranges))
    draws = Photometry(
        jitter=coins[0],
        order=jnp.argsort(u[:, 4:8], axis=1),
        factors=low + u[:, 8:11] * (high - low),
        hue=hue * (2 * u[:, 11] - 1),
        grey=coins[1],
        blur=coins[2],
        sigma=blur_sigma[0] + u[:, 12] * (blur_sigma[1] - blur_sigma[0]),
        solarize=coins[3],
    )
    # What has probability 0 for all samples is not even compiled.
    skip = tuple(isinstance(p, (int, float)) and not p for p in probs)
    return apply_photometry(
        images, draws, taps=blur_kernel, threshold=solarize_threshold, skip=skip
    )


def apply_photometry(images, draws, *, taps=9, threshold=128, skip=(False,) * 4):
    """`photometric` with given draws.

    The operations are those of torchvision on float images: results are clamped to [0, 255] after
    each step of the jitter and nowhere rounded.  (The official code works on uint8 images, which
    differ by up to 1 after each operation.)

    Args:
      images: (B, H, W, 3), uint8 or float in [0, 255].
      draws: `Photometry`.
      taps: of the blur, odd.
      threshold: values from here on are inverted by solarisation.
      skip: do without jitter, grey, blur, solarisation, whatever was drawn.
    """

    def one(image, draw):
        # A plane per colour: an axis of length 3 would be the slowest place for vector units.
        x = tuple(image[..., c].astype(jnp.float32) for c in range(3))
        if not skip[0]:
            x = _maybe(draw.jitter, functools.partial(_jitter, draw), x)
        if not skip[1]:
            x = _maybe(draw.grey, lambda x: (luma(x),) * 3, x)
        if not skip[2]:
            x = _maybe(draw.blur, lambda x: gaussian_blur(x, draw.sigma, taps), x)
        if not skip[3]:
            x = _maybe(draw.solarize, lambda x: solarize(x, threshold), x)
        return jnp.stack(x, axis=-1)

    return per_sample(one, images, draws)


def per_sample(one, images, draws):
    """one(image, draw) of every sample of a batch, in the way that suits the device."""
    mesh = jax.sharding.get_abstract_mesh()
    every = jax.vmap(one)
    if not (mesh.empty or mesh.size == 1):  # a loop would gather the batch from all devices
        return every(images, draws)

    # One sample at a time, a CPU runs only the operations that were drawn, within its cache: 6 to
    # 20 times as fast.  Accelerators take all samples at once, and select after the fact.
    def loop(images, draws):
        return jax.lax.map(lambda xs: one(*xs), (images, draws))

    return jax.lax.platform_dependent(images, draws, cpu=loop, default=every)


def _maybe(flag, fn, x):
    return jax.lax.cond(flag, fn, lambda x: x, x)


def _jitter(draw, x):
    brightness, contrast, saturation = draw.factors
    black = jnp.zeros((), jnp.float32)
    operations = (
        lambda x: blend(x, black, brightness),
        lambda x: blend(x, luma(x).mean(), contrast),
        lambda x: blend(x, luma(x), saturation),
        lambda x: shift_hue(x, draw.hue),
    )
    for i in range(4):
        x = jax.lax.switch(draw.order[i], operations, x)
    return x


def luma(x):
    """Grey of the three planes (H, W)."""
    return sum(share * plane for share, plane in zip(GREY, x))


def blend(x, other, factor):
    """factor * x + (1 - factor) * other, clamped to [0, 255], for each plane of `x`.

    Brightness blends with black, contrast with the mean grey, saturation with the grey of each
    pixel.
    """
    return tuple(jnp.clip(factor * plane + (1 - factor) * other, 0.0, 255.0) for plane in x)


def shift_hue(x, turns):
    """Turns the hue by `turns` of the colour circle; keeps saturation and value of HSV.

    With V = max, C = max - min and the hue h in [0, 6), each colour is V - C clip(min(k, 4 - k), 0,
    1), where k = (h + n) mod 6 and n = 5, 3, 1 for red, green, blue.
    """
    r, g, b = x
    value = jnp.maximum(jnp.maximum(r, g), b)
    chroma = value - jnp.minimum(jnp.minimum(r, g), b)
    inverse = 1 / jnp.where(chroma > 0, chroma, 1.0)  # a grey pixel has no hue and needs none
    third = jnp.where(value == g, 2 + (b - r) * inverse, 4 + (r - g) * inverse)
    hue = jnp.where(value == r, (g - b) * inverse, third) + 6 * turns
    out = []
    for n in (5, 3, 1):
        k = (hue + n) - 6 * jnp.floor((hue + n) / 6)
        out.append(value - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0.0, 1.0))
    return tuple(out)


def gaussian_blur(x, sigma, taps):
    """Convolves the planes with exp(-d² / 2 sigma²), normalised over `taps` pixels per axis.

    Reflects at the edges without repeating the edge pixel.
    """
    half = taps // 2
    weights = jnp.exp(-0.5 * jnp.square(jnp.arange(half + 1) / sigma))
    weights = weights / (2 * weights.sum() - weights[0])

    def along(plane, axis):
        pad = [(half, half) if a == axis else (0, 0) for a in (0, 1)]
        # The barrier keeps XLA on CPU from reflecting again for each tap: twice as fast.
        padded = jax.lax.optimization_barrier(jnp.pad(plane, pad, mode='reflect'))

        def shifted(i):
            return jax.lax.slice_in_dim(padded, half + i, half + i + plane.shape[axis], axis=axis)

        pairs = (weights[i] * (shifted(-i) + shifted(i)) for i in range(1, half + 1))
        return sum(pairs, weights[0] * plane)

    return tuple(along(along(plane, 0), 1) for plane in x)


def solarize(x, threshold):
    """255 - value from `threshold` on."""
    return tuple(jnp.where(plane >= threshold, 255 - plane, plane) for plane in x)
