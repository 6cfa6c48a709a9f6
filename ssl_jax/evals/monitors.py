# SPDX-License-Identifier: Apache-2.0
"""Numbers that show a collapse, of features or of a teacher, before an accuracy does."""

import math

import jax
import jax.numpy as jnp

EPS = 1e-7  # of RankMe
NAMES = ('std', 'rankme', 'rankme_max', 'cosine')
TEACHER_NAMES = ('teacher_entropy', 'kl_uniform', 'prototype_use')


@jax.jit
def monitors(features):
    """Spread of a batch of features, in float32.

    With z the L2-normalised rows:
      std:     sqrt(d) * mean over dimensions of the standard deviation of z over the batch;
               1 for directions spread evenly over the sphere, 0 if all are the same.
      rankme:  exp(-sum p log p), p = sigma / |sigma|_1 + eps, sigma the singular values of the
               features as they are (not centred); between 1 and min(B, d).
      cosine:  mean cosine of two different rows; 1 if all point the same way.

    Args:
      features: (B, d), B at least 2; a few hundred rows or more, as rankme is bounded by B.

    Returns:
      dict of float32 scalars: std, rankme, rankme_max = min(B, d), cosine.

    Reference: RankMe, Garrido et al., arXiv 2210.02885, eq. 1; std as in Chen and He,
    arXiv 2011.10566, figure 2.
    """
    b, d = features.shape
    if b < 2:
        raise ValueError(f'Monitors compare images with each other: pass 2 or more, not {b}.')
    x = features.astype(jnp.float32)
    z = x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    sigma = jnp.linalg.svd(x, compute_uv=False)
    p = sigma / jnp.maximum(sigma.sum(), 1e-30) + EPS
    # |sum z|^2 holds every pair twice and every row with itself.
    cosine = (jnp.square(z.sum(axis=0)).sum() - jnp.square(z).sum()) / (b * (b - 1))
    return {
        'std': jnp.sqrt(d) * z.std(axis=0).mean(),
        'rankme': jnp.exp(-(p * jnp.log(p)).sum()),
        'rankme_max': jnp.float32(min(b, d)),
        'cosine': cosine,
    }


def suspect(values):
    """One sentence that names the number which shows a collapse and what to try; None if healthy.

    The limits are far out on purpose: healthy class tokens share a large common direction, which
    alone drives the cosine above 0.9.  Early in training all of them can be crossed for a while.

    Args:
      values: what `monitors` returned, as numbers.
    """
    v = {name: float(x) for name, x in values.items()}
    advice = (
        'halve the learning rate, lengthen the warm-up, and look at kNN before you trust the loss'
    )
    bad = [name for name, x in v.items() if not abs(x) < float('inf')]
    if bad:
        return (
            f'Collapse suspected: {bad[0]} of the features is {v[bad[0]]}; '
            f'resume from an earlier checkpoint with half the learning rate.'
        )
    if v['std'] < 0.03:
        return (
            f'Collapse suspected: feature std is {v["std"]:.3f} (1 = spread evenly, 0 = all images '
            f'alike), mean cosine {v["cosine"]:.4f}; {advice}.'
        )
    if v['cosine'] > 0.999:
        return (
            f'Collapse suspected: the mean cosine between two images is {v["cosine"]:.4f} '
            f'(1 = all alike); {advice}.'
        )
    if v['rankme'] < max(1.5, 0.01 * v['rankme_max']):
        return (
            f'Dimensional collapse suspected: RankMe is {v["rankme"]:.1f} of at most '
            f'{v["rankme_max"]:.0f}; {advice}.'
        )
    return None


def teacher_monitors(targets, valid=None):
    """How a self-distillation teacher spreads a batch over its K prototypes, in float32.

    With p_i the rows and p their mean:
      teacher_entropy: mean entropy of p_i in nats; log K where every row is uniform, 0 one-hot.
      kl_uniform:      KL(p || uniform) = log K - entropy of p; 0 if all prototypes are used alike.
      prototype_use:   distinct argmaxes of the rows / min(rows, K); 1 if no two rows share one.
        The exponential of the entropy of p would only repeat kl_uniform; this one also sees rows
        that agree on their first choice while their tails still differ.

    log K - kl_uniform - teacher_entropy is what a target tells about its image (their mutual
    information, at most the log of the rows): 0 in both kinds of collapse, see `suspect_teacher`.

    Args:
      targets: (..., K), of the teacher; rows sum to 1.
      valid: bool (...), rows that exist; all if None.

    Returns:
      dict of float32 scalars; cheap enough to be computed inside the loss.
    """
    k = targets.shape[-1]
    p = jax.lax.stop_gradient(targets).astype(jnp.float32).reshape(-1, k)
    valid = jnp.ones(len(p), bool) if valid is None else valid.reshape(-1)
    rows = jnp.maximum(valid.sum(), 1)
    mean = jnp.where(valid[:, None], p, 0).sum(axis=0) / rows
    used = jnp.zeros(k, bool).at[p.argmax(axis=-1)].max(valid)
    return {
        'teacher_entropy': jnp.where(valid, _entropy(p), 0).sum() / rows,
        'kl_uniform': jnp.log(jnp.float32(k)) - _entropy(mean),
        'prototype_use': used.sum() / jnp.minimum(rows, k).astype(jnp.float32),
    }


def _entropy(p):
    return -jax.scipy.special.xlogy(p, p).sum(axis=-1)


def suspect_teacher(values, num_prototypes):
    """One sentence that names a collapse of the teacher and what to try; None if healthy.

    The number that decides is what a target tells about its image, see `teacher_monitors`: in small
    trials 2 to 3.5 nats where training went well, below 0.01 within 200 steps where it collapsed,
    and 0.1 after 700 steps where targets drifted to uniform and class tokens learned nothing.
    Before anything is learned, targets can be near uniform too: ask once the warm-up is over.

    Args:
      values: what `teacher_monitors` returned, as numbers.
      num_prototypes: K.
    """
    v = {name: float(values[name]) for name in TEACHER_NAMES}
    bad = [name for name, x in v.items() if not abs(x) < float('inf')]
    if bad:
        return (
            f'Collapse suspected: {bad[0]} is {v[bad[0]]}; '
            f'resume from an earlier checkpoint with half the learning rate.'
        )
    most = math.log(num_prototypes)
    information = most - v['kl_uniform'] - v['teacher_entropy']
    numbers = (
        f'teacher entropy {v["teacher_entropy"]:.3f} of at most {most:.3f}, KL to uniform '
        f'{v["kl_uniform"]:.3f}, {information:.3f} nats left about the image'
    )
    if information > 0.2:
        if v['prototype_use'] > 0.05:
            return None
        return (
            f'Collapse to few prototypes suspected: the rows share {v["prototype_use"]:.1%} of the '
            f'prototypes they could use ({numbers}); centre the teacher (centering or '
            f'sinkhorn_knopp), or add KoLeo.'
        )
    if v['teacher_entropy'] > v['kl_uniform']:
        return (
            f'Collapse to uniform suspected: every target is nearly uniform ({numbers}; the loss '
            f'stays at log K); lower the teacher temperature well below that of the student, or '
            f'halve the learning rate.'
        )
    return (
        f'Collapse to a constant suspected: all images get the same few prototypes ({numbers}; '
        f'the loss falls to the teacher entropy); centre the teacher (centering or '
        f'sinkhorn_knopp), raise its temperature, or add KoLeo.'
    )
