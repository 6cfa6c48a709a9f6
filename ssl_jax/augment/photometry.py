# SPDX-License-Identifier: Apache-2.0
"""Photometric augmentation on the device: batched, jitted, one key per sample, float32 results."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ssl_jax.run import errors

# ImageNet statistics for values in [0, 1]; all released MAE, Pixio and DINOv2 weights expect them.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# Weights of red, green and blue in grey: ITU-R BT.601, with the digits of torchvision.
GREY = (0.2989, 0.587, 0.114)

# Probability of a Gaussian blur for the first global crop, the second, and local crops. 'intended'
# is that of DINO's paper and code. DINOv2's code passes 1 - p to a wrapper that expects p, so its
# released weights were trained with 'released' (facebookresearch/dinov2, pull request 411).
BLUR = {'released': (0.0, 0.9, 0.5), 'intended': (1.0, 0.1, 0.5), 'none': (0.0, 0.0, 0.0)}


def normalize(
    images: jax.Array, mean: Sequence[float] = MEAN, std: Sequence[float] = STD
) -> jax.Array:
    """(x / 255 - mean) / std, uint8 (..., 3) -> float32 (..., 3)."""
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)
    return (images.astype(jnp.float32) / 255.0 - mean) / std


def denormalize(x: jax.Array) -> jax.Array:
    """Inverse of `normalize` with MEAN and STD, float (..., 3) -> float32 clipped to [0, 1]."""
    mean, std = jnp.asarray(MEAN, jnp.float32), jnp.asarray(STD, jnp.float32)
    return jnp.clip(x.astype(jnp.float32) * std + mean, 0.0, 1.0)


def random_flip(keys: jax.Array, images: jax.Array, p: float) -> jax.Array:
    """Flips each image left-right with probability `p`; keys (B,), images (B, H, W, 3)."""
    if not p:
        return images
    flip = jax.vmap(lambda key: jax.random.bernoulli(key, p))(keys)  # (B,)
    return jnp.where(flip[:, None, None, None], images[:, :, ::-1], images)


def sample_keys(rng: jax.Array, rows: jax.Array) -> jax.Array:
    """One key per sample, a function of only `rng` and the row in the global batch.

    Neither the mesh nor the split into micro-batches changes the key of a sample.

    Args:
      rng: key of the step.
      rows: int (B,), position of each sample in the global batch.

    Returns:
      (B,) keys.
    """
    return jax.vmap(lambda row: jax.random.fold_in(rng, row))(rows)


class Photometry(NamedTuple):
    """Draws of `photometric`, one per sample."""

    jitter: jax.Array  # (B,) bool
    order: jax.Array  # (B, 4) int32, permutation of brightness 0, contrast 1, saturation 2, hue 3
    factors: jax.Array  # (B, 3), brightness, contrast, saturation; 1 changes nothing
    hue: jax.Array  # (B,), shift in turns of the colour circle
    grey: jax.Array  # (B,) bool
    blur: jax.Array  # (B,) bool
    sigma: jax.Array  # (B,), width of the blur in pixels
    solarize: jax.Array  # (B,) bool


def photometric(
    keys: jax.Array,
    images: jax.Array,
    *,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
    jitter_prob: float | jax.Array = 0.0,
    grey_prob: float | jax.Array = 0.0,
    blur_prob: float | jax.Array = 0.0,
    blur_kernel: int = 9,
    blur_sigma: tuple[float, float] = (0.1, 2.0),
    solarize_prob: float | jax.Array = 0.0,
    solarize_threshold: float = 128,
) -> jax.Array:
    """Applies colour jitter, grey, Gaussian blur and solarisation, in this order.

    Args:
      keys: (B,); the draws of a sample depend only on its key.
      images: (B, H, W, 3), uint8 or float in [0, 255].
      brightness: largest change b; the factor is U(max(0, 1 - b), 1 + b).
      contrast: the same for contrast.
      saturation: the same for saturation.
      hue: largest shift, in turns of the colour circle, at most 0.5.
      jitter_prob: probability of these four operations, applied together in random order; a number
        or (B,), as for all probabilities.
      grey_prob: probability of grey.
      blur_prob: probability of the blur.
      blur_kernel: taps of the blur, odd.
      blur_sigma: range of the width of the blur in pixels.
      solarize_prob: probability of solarisation.
      solarize_threshold: values of at least this are inverted.

    Returns:
      float32 (B, H, W, 3) in [0, 255], not rounded; input of `normalize`.

    References:
      DINOv2 `data/augmentations.py`; DINO, arXiv 2104.14294, §3.2
    """
    height, width = images.shape[1:3]
    if not 0 <= hue <= 0.5:
        raise errors.UserError(f'hue={hue} is not in [0, 0.5]; DINO takes 0.1.')
    if not 0 < blur_sigma[0] <= blur_sigma[1]:
        raise errors.UserError(
            f'blur_sigma={blur_sigma} is no range above 0; DINO takes (0.1, 2.0).'
        )
    if blur_kernel % 2 == 0 or min(height, width) <= blur_kernel // 2:
        raise errors.UserError(
            f'blur_kernel={blur_kernel} is even or reaches twice over the edge of {height}x{width} '
            f'px; DINOv2 takes 9.'
        )
    probs = (jitter_prob, grey_prob, blur_prob, solarize_prob)
    u = jax.vmap(lambda key: jax.random.uniform(key, (13,)))(keys)  # (B, 13)
    coins = [u[:, i] < p for i, p in enumerate(probs)]
    ranges = [(max(0.0, 1 - b), 1 + b) for b in (brightness, contrast, saturation)]
    low, high = (jnp.asarray(ends, jnp.float32) for ends in zip(*ranges, strict=True))
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
    # Operations of static probability 0 are not compiled.
    skip = tuple(isinstance(p, (int, float)) and not p for p in probs)
    return apply_photometry(
        images, draws, taps=blur_kernel, threshold=solarize_threshold, skip=skip
    )


def apply_photometry(
    images: jax.Array,
    draws: Photometry,
    *,
    taps: int = 9,
    threshold: float = 128,
    skip: tuple[bool, bool, bool, bool] = (False,) * 4,
) -> jax.Array:
    """`photometric` with given draws.

    The operations are those of torchvision on float images: each step of the jitter is clamped to
    [0, 255], and nothing is rounded. (The official code works on uint8 images, which differ by up
    to 1 after each operation.)

    Args:
      images: (B, H, W, 3), uint8 or float in [0, 255].
      draws: one draw per sample.
      taps: taps of the blur, odd.
      threshold: values of at least this are inverted by solarisation.
      skip: whether to leave out jitter, grey, blur, solarisation, regardless of `draws`.
    """

    def one(image, draw):
        # One plane per colour: vector units are slow on an axis of length 3.
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


def per_sample(one: Callable, images: jax.Array, draws: NamedTuple) -> jax.Array:
    """one(image, draw) for every sample: a loop on a single CPU device, else batched."""
    mesh = jax.sharding.get_abstract_mesh()
    batched = jax.vmap(one)
    if not (mesh.empty or mesh.size == 1):  # a loop would gather the batch from all devices
        return batched(images, draws)

    # One sample at a time, a CPU runs only the operations drawn, within its cache: 6 to 20 times as
    # fast. Accelerators run all operations on all samples and select the results.
    def loop(images, draws):
        return jax.lax.map(lambda xs: one(*xs), (images, draws))

    return jax.lax.platform_dependent(images, draws, cpu=loop, default=batched)


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


def luma(x: tuple[jax.Array, ...]) -> jax.Array:
    """Grey (H, W) of three planes (H, W)."""
    return sum(share * plane for share, plane in zip(GREY, x, strict=True))


def blend(x: tuple[jax.Array, ...], other: jax.Array, factor: jax.Array) -> tuple[jax.Array, ...]:
    """factor * x + (1 - factor) * other, clamped to [0, 255], for each plane of `x`.

    `other` is black for brightness, the mean grey for contrast and the grey of each pixel for
    saturation.
    """
    return tuple(jnp.clip(factor * plane + (1 - factor) * other, 0.0, 255.0) for plane in x)


def shift_hue(x: tuple[jax.Array, ...], turns: jax.Array) -> tuple[jax.Array, ...]:
    """Shifts the hue by `turns` of the colour circle; keeps saturation and value of HSV.

    With V = max, C = max - min and the hue h in [0, 6), each colour is V - C clip(min(k, 4 - k), 0,
    1), where k = (h + n) mod 6 and n = 5, 3, 1 for red, green, blue.
    """
    r, g, b = x
    value = jnp.maximum(jnp.maximum(r, g), b)
    chroma = value - jnp.minimum(jnp.minimum(r, g), b)
    inverse = 1 / jnp.where(chroma > 0, chroma, 1.0)  # chroma 0: the hue has no effect
    third = jnp.where(value == g, 2 + (b - r) * inverse, 4 + (r - g) * inverse)
    hue = jnp.where(value == r, (g - b) * inverse, third) + 6 * turns
    out = []
    for n in (5, 3, 1):
        k = (hue + n) - 6 * jnp.floor((hue + n) / 6)
        out.append(value - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0.0, 1.0))
    return tuple(out)


def gaussian_blur(x: tuple[jax.Array, ...], sigma: jax.Array, taps: int) -> tuple[jax.Array, ...]:
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


def solarize(x: tuple[jax.Array, ...], threshold: float) -> tuple[jax.Array, ...]:
    """Inverts values of at least `threshold`: 255 - value."""
    return tuple(jnp.where(plane >= threshold, 255 - plane, plane) for plane in x)
