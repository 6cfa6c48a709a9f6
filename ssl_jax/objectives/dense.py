# SPDX-License-Identifier: Apache-2.0
"""Losses of class maps and depth maps, in float32."""

import jax
import jax.numpy as jnp
import optax

EPS = 1e-3  # added to depths before the logarithm by SigLoss and GradientLoss
SIG_MEAN = 0.15  # weight of the mean in SigLoss


def cross_entropy(logits: jax.Array, labels: jax.Array, ignore: int = 255) -> jax.Array:
    """Mean cross-entropy over the pixels whose label is not `ignore`; 0 if there are none.

    Args:
      logits: (..., K).
      labels: int (...), 0..K-1 or `ignore`.
    """
    valid = labels != ignore
    labels = jnp.where(valid, labels, 0).astype(jnp.int32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    return jnp.where(valid, losses, 0).sum() / jnp.maximum(valid.sum(), 1)


def measured(depth: jax.Array, max_depth: float | None = None) -> jax.Array:
    """Where there is a depth, and one of at most `max_depth`."""
    valid = depth > 0
    return valid if max_depth is None else valid & (depth <= max_depth)


def sig_loss(
    pred: jax.Array,
    gt: jax.Array,
    warm_up: jax.Array | bool = False,
    max_depth: float | None = None,
) -> jax.Array:
    """DINOv2's scale-invariant loss, sqrt(var(g) + 0.15 mean(g)^2) with g = log(pred) - log(gt).

    The variance is unbiased.

    Args:
      pred, gt: depths, the second 0 where not measured.
      warm_up: whether only the term of the mean counts, as in the first 100 steps.
      max_depth: larger depths do not count.

    References:
      DINOv2 `eval/depth/models/losses/sigloss.py`
    """
    valid = measured(gt, max_depth)
    n = valid.sum()
    g = jnp.where(valid, jnp.log(pred + EPS) - jnp.log(gt + EPS), 0)
    mean = g.sum() / jnp.maximum(n, 1)
    var = jnp.where(valid, jnp.square(g - mean), 0).sum() / jnp.maximum(n - 1, 1)
    square = var + SIG_MEAN * jnp.square(mean)
    whole = _root(square)
    return jnp.where(warm_up, SIG_MEAN**0.5 * jnp.abs(mean), whole)


def gradient_loss(pred: jax.Array, gt: jax.Array, max_depth: float | None = None) -> jax.Array:
    """DINOv2's loss of differences over two pixels of the log error, at four scales.

    Rows and columns are the first two axes, of depth maps (H, W). The official code calls it with
    (B, 1, H, W): then it takes differences between images and none within, and is 0 for one or two
    images.

    References:
      DINOv2 `eval/depth/models/losses/gradientloss.py`; Li & Snavely, arXiv 1804.00607
    """
    error = jnp.log(pred + EPS) - jnp.log(gt + EPS)
    valid = measured(gt, max_depth)
    total = 0.0
    for step in (1, 2, 4, 6):
        g, mask = error[::step, ::step], valid[::step, ::step]
        n = jnp.maximum(mask.sum(), 1)
        for _ in range(2):  # down, then across
            both = mask[:-2] & mask[2:]
            total += jnp.where(both, jnp.abs(g[:-2] - g[2:]), 0).sum() / n
            g, mask = g.swapaxes(0, 1), mask.swapaxes(0, 1)
    return total


def silog(pred: jax.Array, gt: jax.Array, valid: jax.Array, weight: float = 0.5) -> jax.Array:
    """Pixio's scale-invariant loss, sqrt(mean(g^2) - weight mean(g)^2), g = log(gt) - log(pred).

    Args:
      pred, gt: positive depths where `valid`.
      valid: bool, the pixels that count.

    References:
      Pixio `monodepth/util/misc.py: SiLogLoss`; Eigen et al., arXiv 1406.2283
    """
    n = jnp.maximum(valid.sum(), 1)
    g = jnp.where(valid, jnp.log(jnp.where(valid, gt, 1)) - jnp.log(jnp.where(valid, pred, 1)), 0)
    square = jnp.square(g).sum() / n - weight * jnp.square(g.sum() / n)
    return _root(square)


def _root(x):
    """The square root, of what is not positive 0 with gradient 0."""
    return jnp.sqrt(jnp.where(x > 0, x, 1.0)) * (x > 0)
