# SPDX-License-Identifier: Apache-2.0
"""Schedules and optimizers: AdamW with the official parameter groups, LARS for linear probes.

The learning rate is an argument of every update, a function of the step of the run. The optimizer's
own count only corrects Adam's bias: it stands still when a non-finite step is skipped, while data
and schedule move on. Blocks are stacked over depth by scan (`blocks/...`: (depth, ...)): rules that
look at a parameter's dimensions leave that axis out, layer decay is a vector along it.
"""

import collections
import functools
import math
import operator
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssl_jax import sharding

STACKS = ('blocks', 'decoder_blocks')
# Parameters below the first block: layer 0 of layer decay.
BOTTOM = ('cls_token', 'pos_embed', 'mask_token', 'register_tokens', 'patch_embed')


def lr_schedule(peak, total_steps, warmup_steps=0, min_lr=0.0):
    """Linear warm-up from 0, then half a cosine to `min_lr`.

    lr(s) = peak s / w                                                    for s < w,
            min_lr + (peak - min_lr) (1 + cos(pi (s - w) / (T - w))) / 2  from there on,

    as MAE's `util/lr_sched.py` does with fractional epochs e = s / steps_per_epoch. The first step
    has rate 0. The cosine is computed as the equal sin^2(pi (T - s) / (2 (T - w))), which keeps its
    relative precision in float32 near the end, where the other form is rounding noise.

    Args:
      peak, min_lr: learning rates at the end of the warm-up and of the run.
      total_steps, warmup_steps: T and w; numbers, need not be whole.

    Returns:
      Function of the step. A numpy or Python number gives float64 (host, logs, tests), a jax array
      or tracer float32.
    """
    if not 0 <= warmup_steps < max(total_steps, 1):
        raise ValueError(
            f'warmup_steps={warmup_steps} does not end before total_steps={total_steps}: lower it.'
        )

    def schedule(step):
        if isinstance(step, jax.Array):
            xp, step = jnp, step.astype(jnp.float32)
        else:
            xp, step = np, np.asarray(step, np.float64)
        left = xp.clip((total_steps - step) / (total_steps - warmup_steps), 0, 1)
        cosine = min_lr + (peak - min_lr) * xp.sin(math.pi / 2 * left) ** 2
        return xp.where(step < warmup_steps, peak * step / max(warmup_steps, 1e-9), cosine)

    return schedule


def scaled_lr(optim, batch_size):
    """Peak learning rate by the linear rule base_lr * batch_size / scale_batch, unless lr is given.

    Returns:
      (lr, sentence for the log that says which rule gave it)
    """
    if optim.lr is not None:
        return optim.lr, f'lr {optim.lr:g} (optim.lr, not scaled with the batch)'
    lr = optim.base_lr * batch_size / optim.scale_batch
    rule = f'base_lr {optim.base_lr:g} x batch {batch_size} / {optim.scale_batch}'
    return lr, f'lr {lr:g} = {rule}'


def schedule(config, total_steps, warmup_steps):
    """`lr_schedule` of a whole config: peak by `scaled_lr`, end at `optim.min_lr`."""
    peak, _ = scaled_lr(config.optim, config.batch_size)
    return lr_schedule(peak, total_steps, warmup_steps, config.optim.min_lr)


def grad_norm(grads):
    """Global L2 norm in float32 of a tree."""
    return optax.global_norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))


def make(optim, params, warm_freeze_steps=0):
    """AdamW with decoupled decay as torch, p <- p (1 - lr m wd) - lr m mhat / (sqrt(vhat) + eps).

    m is the parameter's multiplier (layer decay, `lr_mult`), see `lr_multipliers`; wd is 0 where
    `decays` says so; frozen parameters are left bitwise as they are, have no moments and do not
    count for the clipping norm. Moments are float32.

    Parameters of `optim.warm_freeze` are frozen for the first `warm_freeze_steps` steps of the run:
    no update, no decay, no share in the clipping norm, and their moments and their own count for
    Adam's bias stand still, so that their first step is that of a fresh AdamW. (With the common
    count, mhat / sqrt(vhat) would be off by (1 - b1) / sqrt(1 - b2), a step 3 times too long for
    (0.9, 0.999).) Whether a step is frozen is `step < warm_freeze_steps` inside the one compiled
    program: nothing is compiled at the switch and a restart needs nothing but the step. The price
    is that moments are there, and gradients are computed, from the start.

    Args:
      optim: `config.optim`.
      params: parameters, or their shapes (`jax.eval_shape`).
      warm_freeze_steps: `config.steps('warm_freeze', config.optim, ...)`.

    Returns:
      (tx, table): `tx.init(params)`, `tx.update(grads, state, params, lr=lr, step=step) -> updates,
      state`, to be added with `optax.apply_updates` (`step` is read only with `warm_freeze`); a
      text with one line per parameter group.
    """
    decay = decays(params, optim.no_decay)
    multipliers = lr_multipliers(params, optim.layer_decay, optim.lr_mult)
    train = trainable(params, optim.freeze)
    late = _warm_frozen(params, optim.warm_freeze)
    found = {f for f, trains in zip(*map(jax.tree.leaves, (late, train))) if trains}
    if optim.warm_freeze and found != {True, False}:
        raise ValueError(
            f'optim.warm_freeze={optim.warm_freeze} matches '
            f'{"every" if True in found else "no"} parameter that trains; their paths begin with '
            f'{", ".join(sorted(params))}.'
        )
    adam = optax.scale_by_adam(optim.b1, optim.b2, optim.eps, mu_dtype=jnp.float32)
    if optim.warm_freeze:
        rule = functools.partial(_warm_frozen, regexes=optim.warm_freeze)
        first = optax.masked(adam, lambda tree: jax.tree.map(operator.not_, rule(tree)))
        adam = optax.chain(first, optax.masked(_standing_still(adam), rule))
    clip = clip_by_global_norm(optim.clip) if optim.clip else optax.identity()
    tx = optax.masked(optax.chain(clip, adam), train)

    def update(grads, state, params, *, lr, step=None):
        thawed = True if not optim.warm_freeze else step >= warm_freeze_steps
        grads = jax.tree.map(lambda g, late: jnp.where(thawed, g, 0) if late else g, grads, late)
        directions, state = tx.update(grads, state, params, thawed=thawed)

        def scale(direction, p, decays, multiplier, trains, late):
            nothing = jnp.full_like(p, -0.0)  # p + -0 is p to the bit, p + 0 is not for p = -0
            if not trains:
                return nothing
            if decays:
                direction = direction + optim.weight_decay * p
            direction = -(lr * multiplier) * direction
            return jnp.where(thawed, direction, nothing) if late else direction

        updates = jax.tree.map(scale, directions, params, decay, multipliers, train, late)
        return updates, state

    from_step = jax.tree.map(lambda late: warm_freeze_steps if late else 0, late)
    table = describe(params, decay, multipliers, train, optim.weight_decay, from_step)
    return optax.GradientTransformationExtraArgs(tx.init, update), table


def _warm_frozen(params, regexes):
    """Tree of bools: True where the slash path matches a regex of `warm_freeze`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, p: _matches(regexes, sharding.path_str(path)), params
    )


def _standing_still(tx):
    """`tx`, but its state does not move while `thawed` is false; the updates are not for use."""

    def update(grads, state, params=None, *, thawed, **_):
        updates, new = tx.update(grads, state, params)
        return updates, jax.tree.map(lambda a, b: jnp.where(thawed, a, b), new, state)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def decays(params, no_decay=()):
    """Tree of bools: whether weight decay applies, by MAE's and Pixio's rule.

    Exempt are parameters of at most one dimension (besides the stack axis), those named bias, and
    those whose slash path matches a regex of `no_decay`. Class, mask and position tokens have three
    dimensions in the official codes and do decay (fine-tuning exempts them by `no_decay`).
    """

    def rule(path, p):
        path = sharding.path_str(path)
        ndim = len(p.shape) - _stacked(path)
        return ndim > 1 and not path.endswith('bias') and not _matches(no_decay, path)

    return jax.tree_util.tree_map_with_path(rule, params)


def lr_multipliers(params, layer_decay=None, lr_mult=()):
    """Tree of factors on the learning rate: numpy scalars, or (depth, 1, ...) for stacked blocks.

    layer_decay^(depth + 1 - id) with id 0 for the tokens, positions and patch embedding, k + 1 for
    block k of `blocks`, depth + 1 for all else (heads, norms, decoders), times the factor of every
    `lr_mult` regex that matches the path.
    """
    leaves = {sharding.path_str(k): p for k, p in jax.tree_util.tree_leaves_with_path(params)}
    depth = max((p.shape[0] for k, p in leaves.items() if 'blocks' in k.split('/')), default=0)
    if layer_decay is not None and not depth:
        raise ValueError('optim.layer_decay needs stacked blocks, this model has none: set None.')

    def rule(path, p):
        parts, path = sharding.path_str(path).split('/'), sharding.path_str(path)
        factor = np.float64(math.prod(f for regex, f in lr_mult if re.search(regex, path)))
        if layer_decay is not None and 'decoder' not in parts:
            if 'blocks' in parts:
                scales = layer_decay ** (depth - np.arange(depth, dtype=np.float64))
                factor = factor * scales.reshape(depth, *[1] * (len(p.shape) - 1))
            elif set(parts) & set(BOTTOM):
                factor = factor * layer_decay ** (depth + 1)
        return np.asarray(factor, np.float32)

    return jax.tree_util.tree_map_with_path(rule, params)


def trainable(params, freeze=()):
    """Tree of bools: False where the slash path matches a regex of `freeze`."""
    tree = jax.tree_util.tree_map_with_path(
        lambda path, p: not _matches(freeze, sharding.path_str(path)), params
    )
    if not any(jax.tree.leaves(tree)):
        raise ValueError(f'optim.freeze={freeze} freezes every parameter: narrow the regexes.')
    return tree


def describe(params, decay, multipliers, train, weight_decay, from_step):
    """Text table of the parameter groups: lr factor, weight decay, arrays, parameters, example.

    A group that is frozen at first has its first step behind the factor: '0.25 from 500'.
    """
    groups = collections.OrderedDict()
    leaves = jax.tree_util.tree_leaves_with_path(params)
    rows = zip(leaves, *map(jax.tree.leaves, (decay, multipliers, train, from_step)))
    for (path, p), d, m, t, start in rows:
        low, high = float(np.min(m)), float(np.max(m))
        lr = f'{low:.4g}' if low == high else f'{low:.4g}..{high:.4g}'
        lr += f' from {start}' if start else ''
        key = (lr, f'{weight_decay:g}' if d else '0') if t else ('frozen', '-')
        groups.setdefault(key, []).append((sharding.path_str(path), math.prod(p.shape)))
    width = max(16, *(len(lr) for lr, _ in groups))
    lines = [f'{"lr factor":>{width}} {"decay":>6} {"arrays":>7} {"parameters":>14}  for example']
    for (lr, wd), members in groups.items():
        count = sum(n for _, n in members)
        lines.append(f'{lr:>{width}} {wd:>6} {len(members):>7} {count:>14,}  {members[0][0]}')
    return '\n'.join(lines)


def clip_by_global_norm(limit):
    """Scales a tree by min(1, limit / (norm + 1e-6)), torch's `clip_grad_norm_`."""

    def update(grads, state, params=None):
        scale = jnp.minimum(1.0, limit / (grad_norm(grads) + 1e-6))
        return jax.tree.map(lambda g: g * scale, grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def lars(lr, momentum=0.9, trust=0.001, weight_decay=0.0):
    """LARS as in MAE's `util/lars.py`, for linear probes.

    Where a parameter has over one dimension: g <- g + wd p, then g <- g trust |p| / |g| (factor
    1 if either norm is 0). For all: mu <- momentum mu + g, p <- p - lr mu.

    Args:
      lr: number, or function of the number of updates done.
    """

    def init(params):
        return jnp.zeros([], jnp.int32), jax.tree.map(jnp.zeros_like, params)

    def update(grads, state, params):
        count, velocity = state

        def scale(g, p):
            if p.ndim <= 1:
                return g
            g = g + weight_decay * p
            p_norm, g_norm = jnp.linalg.norm(p), jnp.linalg.norm(g)
            usable = (p_norm > 0) & (g_norm > 0)
            return g * jnp.where(usable, trust * p_norm / jnp.where(usable, g_norm, 1.0), 1.0)

        scaled = jax.tree.map(scale, grads, params)
        velocity = jax.tree.map(lambda v, g: momentum * v + g, velocity, scaled)
        rate = lr(count) if callable(lr) else lr
        return jax.tree.map(lambda v: -rate * v, velocity), (count + 1, velocity)

    return optax.GradientTransformation(init, update)


def _stacked(path):
    return bool(set(path.split('/')) & set(STACKS))


def _matches(regexes, path):
    return any(re.search(regex, path) for regex in regexes)
