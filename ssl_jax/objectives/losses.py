# SPDX-License-Identifier: Apache-2.0
"""Losses as pure functions; everything in float32."""

import jax
import jax.numpy as jnp

TINY = 1e-37  # keeps a sum over no rows from being divided by


def masked_mse(pred, target, mask):
    """sum(mask * mean over the patch of (pred - target)²) / sum(mask), a scalar in float32.

    Args:
      pred, target: (B, N, p*p*3); mask: (B, N), 1 = counted.

    Reference: MAE `models_mae.py: forward_loss`; the same in Pixio.
    """
    error = jnp.square(pred.astype(jnp.float32) - target.astype(jnp.float32)).mean(axis=-1)
    return (error * mask).sum() / mask.sum()


def l2_normalize(x, eps=1e-12, axis=-1):
    """x / max(|x|, eps) along `axis`, in float32; a row of zeros stays zero, with gradient."""
    x = x.astype(jnp.float32)
    squares = jnp.square(x).sum(axis=axis, keepdims=True)
    return x / jnp.sqrt(jnp.maximum(squares, eps**2))


def softmax_center(logits, center, temp):
    """Teacher targets softmax((logits - center) / temp) over the last axis; no gradient.

    Args:
      logits: (..., K) of the teacher; center: (K,) or (..., K), running mean of such logits.
      temp: teacher temperature.

    Returns:
      (..., K) float32, rows sum to 1.

    Reference: DINO, arXiv 2104.14294, §3.1 "Avoiding collapse".
    """
    logits = jax.lax.stop_gradient(logits).astype(jnp.float32)
    return jax.nn.softmax((logits - center) / temp, axis=-1)


def mean_rows(x, valid=None):
    """Mean of x (..., K) over all leading axes, (K,) in float32; only rows where `valid` (...)."""
    x = jax.lax.stop_gradient(x).astype(jnp.float32).reshape(-1, x.shape[-1])
    if valid is None:
        return x.mean(axis=0)
    valid = valid.reshape(-1, 1)
    return jnp.where(valid, x, 0).sum(axis=0) / jnp.maximum(valid.sum(), 1)


def update_center(center, batch_mean, momentum=0.9):
    """momentum * center + (1 - momentum) * batch_mean.

    `batch_mean` is over all teacher rows of the global batch.  DINO and iBOT use the new centre
    from the next step on because they update after the loss; DINOv2 because its all-reduce is
    awaited a step later: with one update per step, after the loss, both are the same.
    """
    return momentum * center + (1 - momentum) * batch_mean


def sinkhorn_knopp(logits, temp, valid=None, num_iters=3):
    """Teacher targets with prototypes used equally (almost) and rows that sum to 1; no gradient.

    From Q = exp(logits / temp), `num_iters` times: every prototype's column is scaled to the same
    total, then every row to sum 1.  Kept as one scale per column and one per row, in float32.

    Args:
      logits: (n, K) of the teacher, rows of the whole batch.
      temp: teacher temperature.
      valid: bool (n,), rows that exist; others (padding) count nowhere and come out as zeros.
      num_iters: 1 or more.

    Returns:
      (n, K) float32.

    Reference: SwAV, arXiv 2006.09882, §3.1; DINOv2 `loss/dino_clstoken_loss.py`.
    """
    z = jax.lax.stop_gradient(logits).astype(jnp.float32) / temp
    if valid is None:
        valid = jnp.ones(z.shape[:1], bool)
    exists = valid[:, None]
    # The first iteration in logarithms.  It leaves every row with an entry of at least 1/K, from
    # where on no sum can vanish: plain products are safe, whatever the range of the logits was.
    z = z - jax.nn.logsumexp(z, axis=0, where=exists)
    q = jnp.where(exists, jax.nn.softmax(jnp.where(exists, z, 0), axis=1), 0)
    rows, columns = valid.astype(jnp.float32), jnp.ones(z.shape[1])
    for _ in range(num_iters - 1):
        columns = 1 / jnp.maximum((q * rows[:, None]).sum(axis=0), TINY)
        rows = valid / jnp.maximum((q * columns).sum(axis=1), TINY)
    return q * columns * rows[:, None]


def cross_entropy(targets, logits, temp):
    """-sum_k targets_k log softmax(logits / temp)_k for each row, in float32.

    Args:
      targets: (..., K), no gradient; need not sum to 1.  logits: (..., K).  Leading axes broadcast.
    """
    targets = jax.lax.stop_gradient(targets).astype(jnp.float32)
    return -(targets * jax.nn.log_softmax(logits.astype(jnp.float32) / temp)).sum(axis=-1)


def word_cross_entropy(logits, words):
    """-log softmax(logits)_word for each row in float32: (..., V), int (...) -> (...)."""
    logits = logits.astype(jnp.float32)
    picked = jnp.take_along_axis(logits, words[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - picked


def info_nce(a, b, temp=0.2, *, normalize=True, negatives='other', groups=1):
    """Symmetric InfoNCE between two descriptors of the same images, in float32.

    (1/2n) sum_i [-log softmax_j(<a_i, b_j> / temp)_i - log softmax_j(<b_i, a_j> / temp)_i].

    Args:
      a, b: (n, D), row i of both is image i; both get gradient.
      normalize: rows to length 1 first.
      negatives: 'other': of the other branch, n - 1 for each row; 'both': also the other images of
        its own branch, 2 (n - 1).
      groups: negatives are looked for within n / groups consecutive rows; 1 is the whole batch.

    Returns:
      (loss, share of rows whose own image is the most similar).

    Reference: SplitMask, arXiv 2112.10740, equation 2 (whose print lacks the minus and the log);
    MoCo v3, arXiv 2104.02057, algorithm 1.
    """
    n, dim = a.shape
    if n % groups or n // groups < 2:
        raise ValueError(
            f'info_nce needs at least 2 images per group, {n} images do not give {groups} such '
            f'groups: use fewer groups or a larger batch.'
        )
    if negatives not in ('other', 'both'):
        raise ValueError(f"negatives={negatives!r} is unknown: use 'other' or 'both'.")
    size = n // groups
    a, b = (l2_normalize(x) if normalize else x.astype(jnp.float32) for x in (a, b))
    a, b = (x.reshape(groups, size, dim) for x in (a, b))
    own = jnp.eye(size, dtype=bool)

    def direction(x, y):
        logits = jnp.einsum('gnd,gmd->gnm', x, y, precision='highest') / temp
        hits = logits.argmax(axis=-1) == jnp.arange(size)
        total = logits
        if negatives == 'both':
            same = jnp.einsum('gnd,gmd->gnm', x, x, precision='highest') / temp
            total = jnp.concatenate([logits, jnp.where(own, -jnp.inf, same)], axis=-1)
        positive = jnp.where(own, logits, 0).sum(axis=-1)
        return (jax.nn.logsumexp(total, axis=-1) - positive).mean(), hits.mean()

    (loss_a, hits_a), (loss_b, hits_b) = direction(a, b), direction(b, a)
    return (loss_a + loss_b) / 2, (hits_a + hits_b) / 2


def dino_loss(targets, global_logits, local_logits=None, temp=0.1):
    """Mean cross-entropy over the pairs (teacher view, student view) of different crops.

    With V local crops there are 2 + 2 V such pairs of 2 teacher views: a student's global crop
    meets the other global crop, a local crop meets both.  Each pair is a mean over the batch.

    Args:
      targets: (2, B, K), row v of the teacher's view v.
      global_logits: (2, B, K), the student's, in the same order (nothing swapped).
      local_logits: (V, B, K) or None.
      temp: student temperature.

    Returns:
      (global, local): the two shares of that mean, scalars; their sum is the loss of DINO, iBOT
      (class tokens) and DINOv2, which logs them apart.

    Reference: DINO `main_dino.py: DINOLoss`; DINOv2 `train/ssl_meta_arch.py`.
    """
    if len(targets) != 2 or len(global_logits) != 2:
        raise ValueError(
            f'dino_loss pairs 2 global views, got {len(targets)} of the teacher and '
            f'{len(global_logits)} of the student: pass arrays (2, B, K).'
        )
    num_local = 0 if local_logits is None else len(local_logits)
    pairs = 2 + 2 * num_local
    batch = targets.shape[1]
    global_term = cross_entropy(targets[::-1], global_logits, temp).sum() / (batch * pairs)
    if not num_local:
        return global_term, jnp.zeros_like(global_term)
    # Cross-entropy is linear in the target: one sum over K for both teacher views.
    local_term = cross_entropy(targets.sum(axis=0), local_logits, temp).sum() / (batch * pairs)
    return global_term, local_term


def mask_weights(mask):
    """1 / (number of masked patches of the image) where masked, else 0; (..., N) float32."""
    mask = mask.astype(jnp.float32)
    return mask / jnp.maximum(mask.sum(axis=-1, keepdims=True), 1)


def ibot_loss(targets, logits, weights, num_images, temp=0.1):
    """sum(weights * cross-entropy) / num_images over patch rows.

    Args:
      targets, logits: (..., K) of teacher and student at masked patches, or at all patches.
      weights: (...), 1 / (masked patches of the row's image), see `mask_weights`; 0 for padding
        and for patches that are not masked.
      num_images: all global crops, those without a mask included.
      temp: student temperature.

    Reference: iBOT, arXiv 2111.07832, `main_ibot.py`; DINOv2 `loss/ibot_patch_loss.py`.
    """
    return (weights * cross_entropy(targets, logits, temp)).sum() / num_images


def koleo(x, eps=1e-8, groups=1):
    """Kozachenko-Leonenko regulariser, -mean log(distance to the nearest other row + eps).

    Rows are L2-normalised; the neighbour is the row of largest cosine; the distance is
    |x_i - x_nn + eps| as torch's PairwiseDistance has it.  Gradient flows into both rows, none
    through the choice.  Always float32: in half precision eps is 0, and two equal rows give inf.

    Args:
      x: (n, D), class tokens before the head.
      groups: neighbours are looked for within n / groups consecutive rows; 1 is the whole batch.
        The official code sees one device's rows only: groups = number of devices reproduces it.

    Reference: Sablayrolles et al., arXiv 1806.03198; DINOv2 `loss/koleo_loss.py`.
    """
    n, dim = x.shape
    if n % groups or n // groups < 2:
        raise ValueError(
            f'koleo needs at least 2 rows per group, {n} rows do not give {groups} such groups; '
            f'use fewer groups or a larger batch.'
        )
    x = l2_normalize(x, eps).reshape(groups, n // groups, dim)
    cosine = jnp.einsum('gnd,gmd->gnm', *[jax.lax.stop_gradient(x)] * 2, precision='float32')
    cosine = jnp.where(jnp.eye(n // groups, dtype=bool), -1.0, cosine)
    nearest = jnp.take_along_axis(x, cosine.argmax(axis=-1)[..., None], axis=1)
    distance = jnp.sqrt(jnp.square(x - nearest + eps).sum(axis=-1))
    return -jnp.log(distance + eps).mean()
