# SPDX-License-Identifier: Apache-2.0
"""Losses as pure functions, all in float32."""

import jax
import jax.numpy as jnp

from ssl_jax.models import blocks
from ssl_jax.run import errors

TINY = 1e-37  # lower bound of a divisor: a sum over no rows is 0


def masked_mse(pred: jax.Array, target: jax.Array, mask: jax.Array) -> jax.Array:
    """sum(mask * mean over the patch of (pred - target)²) / sum(mask), a scalar.

    Args:
      pred: (B, N, p*p*3).
      target: (B, N, p*p*3).
      mask: (B, N), 1 = counted.

    References:
      MAE `models_mae.py: forward_loss`; the same in Pixio
    """
    error = jnp.square(pred.astype(jnp.float32) - target.astype(jnp.float32)).mean(axis=-1)
    return (error * mask).sum() / mask.sum()


def softmax_center(logits: jax.Array, center: jax.Array, temp: float | jax.Array) -> jax.Array:
    """Teacher targets softmax((logits - center) / temp) over the last axis; no gradient.

    Args:
      logits: (..., K) teacher logits.
      center: (K,) or (..., K), running mean of teacher logits.
      temp: teacher temperature.

    Returns:
      (..., K) float32, rows sum to 1.

    References:
      DINO, arXiv 2104.14294, §3.1 "Avoiding collapse"
    """
    logits = jax.lax.stop_gradient(logits).astype(jnp.float32)
    return jax.nn.softmax((logits - center) / temp, axis=-1)


def sum_rows(x: jax.Array, valid: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Sum of x (..., K) over all leading axes, (K,), and the number of rows, both float32.

    Args:
      x: rows.
      valid: (...), the rows that count; default all.
    """
    x = jax.lax.stop_gradient(x).astype(jnp.float32).reshape(-1, x.shape[-1])
    if valid is None:
        return x.sum(axis=0), jnp.float32(x.shape[0])
    valid = valid.reshape(-1, 1)
    return jnp.where(valid, x, 0).sum(axis=0), valid.sum().astype(jnp.float32)


def mean_of(rows: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Mean row of a `sum_rows`, or of the mean of several; 0 of no rows."""
    total, count = rows
    return total / jnp.where(count > 0, count, 1)


def mean_rows(x: jax.Array, valid: jax.Array | None = None) -> jax.Array:
    """Mean of x (..., K) over all leading axes, (K,); only rows where `valid` (...)."""
    return mean_of(sum_rows(x, valid))


def update_center(center: jax.Array, batch_mean: jax.Array, momentum: float = 0.9) -> jax.Array:
    """momentum * center + (1 - momentum) * batch_mean.

    Call it once per step, after the loss. The new centre is then used from the next step on, as in
    DINO and iBOT, which update after the loss, and in DINOv2, which waits for its all-reduce one
    step later.

    Args:
      center: (K,).
      batch_mean: (K,), mean over all teacher rows of the global batch.
      momentum: share of the old centre.
    """
    return momentum * center + (1 - momentum) * batch_mean


def sinkhorn_knopp(
    logits: jax.Array, temp: float | jax.Array, valid: jax.Array | None = None, num_iters: int = 3
) -> jax.Array:
    """Teacher targets that use prototypes almost equally, with rows that sum to 1; no gradient.

    Starts from Q = exp(logits / temp). Each iteration scales the columns (prototypes) to equal
    totals, then every row to sum 1. Stores one scale per column and one per row.

    Args:
      logits: (n, K) teacher logits of the global batch.
      temp: teacher temperature.
      valid: bool (n,), False for padding, which has no effect and yields zeros.
      num_iters: number of iterations, 1 or more.

    Returns:
      (n, K) float32.

    References:
      SwAV, arXiv 2006.09882, §3.1; DINOv2 `loss/dino_clstoken_loss.py`
    """
    z = jax.lax.stop_gradient(logits).astype(jnp.float32) / temp
    if valid is None:
        valid = jnp.ones(z.shape[:1], bool)
    mask = valid[:, None]
    # The first iteration is in log space. It leaves an entry of at least 1/K in every row, so no
    # later sum can vanish and plain products are safe for any range of the logits.
    z = z - jax.nn.logsumexp(z, axis=0, where=mask)
    q = jnp.where(mask, jax.nn.softmax(jnp.where(mask, z, 0), axis=1), 0)
    rows, columns = valid.astype(jnp.float32), jnp.ones(z.shape[1])
    for _ in range(num_iters - 1):
        columns = 1 / jnp.maximum((q * rows[:, None]).sum(axis=0), TINY)
        rows = valid / jnp.maximum((q * columns).sum(axis=1), TINY)
    return q * columns * rows[:, None]


def cross_entropy(targets: jax.Array, logits: jax.Array, temp: float | jax.Array) -> jax.Array:
    """-sum_k targets_k log softmax(logits / temp)_k for each row; leading axes broadcast.

    Args:
      targets: (..., K), no gradient; need not sum to 1.
      logits: (..., K).
      temp: student temperature.

    Returns:
      (...) float32.
    """
    targets = jax.lax.stop_gradient(targets).astype(jnp.float32)
    return -(targets * jax.nn.log_softmax(logits.astype(jnp.float32) / temp)).sum(axis=-1)


def word_cross_entropy(logits: jax.Array, words: jax.Array) -> jax.Array:
    """-log softmax(logits)_word for each row: logits (..., V), words int (...) -> (...)."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, words[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def info_nce(a: jax.Array, b: jax.Array, temp: float = 0.2) -> tuple[jax.Array, jax.Array]:
    """Symmetric InfoNCE between two descriptors of the same images.

    (1/2n) sum_i [-log softmax_j(<a_i, b_j> / temp)_i - log softmax_j(<b_i, a_j> / temp)_i] with
    L2-normalised rows.

    Args:
      a: (n, D), with gradient.
      b: (n, D), with gradient; row i is the same image as row i of `a`.
      temp: temperature.

    Returns:
      (loss, share of rows whose nearest descriptor is that of the same image).

    References:
      SplitMask, arXiv 2112.10740, equation 2 (printed without the minus and the log); MoCo v3,
      arXiv 2104.02057, algorithm 1
    """
    n = len(a)
    if n < 2:
        raise errors.UserError(
            f'info_nce compares images with each other: pass 2 or more, not {n}.'
        )
    a, b = blocks.l2_normalize(a), blocks.l2_normalize(b)

    def direction(x, y):
        logits = jnp.einsum('nd,md->nm', x, y, precision='highest') / temp
        hits = logits.argmax(axis=-1) == jnp.arange(n)
        positive = jnp.where(jnp.eye(n, dtype=bool), logits, 0).sum(axis=-1)
        return (jax.nn.logsumexp(logits, axis=-1) - positive).mean(), hits.mean()

    (loss_a, hits_a), (loss_b, hits_b) = direction(a, b), direction(b, a)
    return (loss_a + loss_b) / 2, (hits_a + hits_b) / 2


def dino_loss(
    targets: jax.Array,
    global_logits: jax.Array,
    local_logits: jax.Array | None = None,
    temp: float = 0.1,
) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy over the pairs (teacher crop, student crop) of different crops.

    With V local crops there are 2 + 2 V pairs: each global crop of the student is paired with the
    other global crop, each local crop with both. A pair is averaged over the batch.

    Args:
      targets: (2, B, K), index v is global crop v of the teacher.
      global_logits: (2, B, K) student logits in the same order, not swapped.
      local_logits: (V, B, K) student logits, or None.
      temp: student temperature.

    Returns:
      (global, local): two scalars whose sum is that mean, the loss of DINO, iBOT (class tokens) and
      DINOv2, which logs them separately.

    References:
      DINO `main_dino.py: DINOLoss`; DINOv2 `train/ssl_meta_arch.py`
    """
    if len(targets) != 2 or len(global_logits) != 2:
        raise errors.UserError(
            f'dino_loss pairs 2 global views, got {len(targets)} of the teacher and '
            f'{len(global_logits)} of the student: pass arrays (2, B, K).'
        )
    num_local = 0 if local_logits is None else len(local_logits)
    pairs = 2 + 2 * num_local
    batch = targets.shape[1]
    global_term = cross_entropy(targets[::-1], global_logits, temp).sum() / (batch * pairs)
    if not num_local:
        return global_term, jnp.zeros_like(global_term)
    # Cross-entropy is linear in the target: one sum over K serves both teacher crops.
    local_term = cross_entropy(targets.sum(axis=0), local_logits, temp).sum() / (batch * pairs)
    return global_term, local_term


def ibot_loss(
    targets: jax.Array, logits: jax.Array, weights: jax.Array, num_images: int, temp: float = 0.1
) -> jax.Array:
    """sum(weights * cross-entropy) / num_images over patches.

    Args:
      targets: (..., K) teacher targets at masked patches, or at all patches.
      logits: (..., K) student logits at the same patches.
      weights: (...), 1 / (masked patches of the image), 0 for patches that are not masked and for
        padding; see `masking.Masked`.
      num_images: number of global crops, including those without a mask.
      temp: student temperature.

    References:
      iBOT, arXiv 2111.07832, `main_ibot.py`; DINOv2 `loss/ibot_patch_loss.py`
    """
    return (weights * cross_entropy(targets, logits, temp)).sum() / num_images


def koleo(x: jax.Array, eps: float = 1e-8) -> jax.Array:
    """Kozachenko-Leonenko regulariser, -mean log(distance to the nearest other row + eps).

    Rows are L2-normalised. The nearest row has the largest cosine; the distance is
    |x_i - x_nn + eps| as in torch's PairwiseDistance. Both rows get gradient, the choice of the
    neighbour gets none. Always float32: in half precision eps is 0, and two equal rows give inf.

    Args:
      x: (n, D), class tokens before the head.
      eps: added to distances.

    References:
      Sablayrolles et al., arXiv 1806.03198; DINOv2 `loss/koleo_loss.py` (rows of one device only)
    """
    n = len(x)
    if n < 2:
        raise errors.UserError(f'koleo keeps rows apart from each other: pass 2 or more, not {n}.')
    x = blocks.l2_normalize(x, eps)
    cosine = jnp.einsum('nd,md->nm', *[jax.lax.stop_gradient(x)] * 2, precision='float32')
    cosine = jnp.where(jnp.eye(n, dtype=bool), -1.0, cosine)
    nearest = x[cosine.argmax(axis=-1)]
    distance = jnp.sqrt(jnp.square(x - nearest + eps).sum(axis=-1))
    return -jnp.log(distance + eps).mean()
