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
    """MAE's schedule: linear warm-up from 0, then half a cosine to `min_lr`.

    lr(s) = peak s / w                                                    for s < w,
            min_lr + (peak - min_lr) (1 + cos(pi (s - w) / (T - w))) / 2  from there on,

    as MAE's `util/lr_sched.py` does with fractional epochs e = s / steps_per_epoch. The first step
    has rate 0.

    Args:
      peak, min_lr: learning rates at the end of the warm-up and of the run.
      total_steps, warmup_steps: T and w; numbers, need not be whole.

    Returns:
      Function of the step. A numpy or Python number gives float64 (host, logs, tests), a jax array
      or tracer float32.
    """
    return _warm_cosine(peak, min_lr, total_steps, warmup_steps, warmup_steps)


def cosine(start, end, total_steps, warmup_steps=0):
    """DINO's schedule: as `lr_schedule`, but the warm-up is s / (w - 1) and reaches the peak.

    Both ends of the warm-up are included: the peak comes at step w - 1, and again at step w; `end`
    is only reached at step T, after the last. Learning rate, weight decay and teacher momentum of
    DINO, iBOT and DINOv2 are such schedules (`train/train.py: build_schedulers`).
    """
    return _warm_cosine(start, end, total_steps, warmup_steps, warmup_steps - 1)


def _warm_cosine(peak, end, total, warmup, rise):
    """The cosine is computed as the equal sin^2(pi (T - s) / (2 (T - w))), which keeps its relative
    precision in float32 near the end, where the other form is rounding noise."""
    if not 0 <= warmup < max(total, 1):
        raise ValueError(
            f'warmup_steps={warmup} does not end before total_steps={total}: lower it.'
        )

    def schedule(step):
        xp, step = _floating(step)
        left = xp.clip((total - step) / (total - warmup), 0, 1)
        after = end + (peak - end) * xp.sin(math.pi / 2 * left) ** 2
        return xp.where(step < warmup, peak * step / max(rise, 1e-9), after)

    return schedule


def linear(start, end, steps):
    """From `start` at step 0 to `end` at step `steps` - 1, and `end` ever after."""

    def schedule(step):
        xp, step = _floating(step)
        return end + (start - end) * xp.clip(1 - step / max(steps - 1, 1e-9), 0, 1)

    return schedule


def _floating(step):
    """(numpy, float64 step), or (jax.numpy, float32 step) for a jax array or tracer."""
    if isinstance(step, jax.Array):
        return jnp, step.astype(jnp.float32)
    return np, np.asarray(step, np.float64)


def scaled_lr(optim, batch_size):
    """Peak learning rate from base_lr and the batch by `lr_scaling`, unless lr is given.

    'linear': base_lr * batch / scale_batch (MAE, DINO); 'sqrt': base_lr * sqrt(batch / scale_batch)
    (DINOv2).

    Returns:
      (lr, sentence for the log that says which rule gave it)
    """
    if optim.lr is not None:
        return optim.lr, f'lr {optim.lr:g} (optim.lr, not scaled with the batch)'
    ratio = batch_size / optim.scale_batch
    rule = f'batch {batch_size} / {optim.scale_batch}'
    if optim.lr_scaling == 'sqrt':
        ratio, rule = math.sqrt(ratio), f'sqrt({rule})'
    lr = optim.base_lr * ratio
    return lr, f'lr {lr:g} = base_lr {optim.base_lr:g} x {rule}'


def schedule(config, clock):
    """What changes from step to step, as a function of the step: arguments of the update.

    Args:
      config: a whole config.
      clock: durations in steps, see `config.clock`.

    Returns:
      step -> dict of lr, weight_decay and warm (whether `optim.warm_freeze` still holds).
    """
    optim, total = config.optim, clock('total')
    peak, _ = scaled_lr(optim, config.batch_size)
    warmup, freeze = clock('warmup', default=0), clock('warm_freeze', optim, default=0)
    shape = {'mae': lr_schedule, 'dinov2': dino_lr}[optim.schedule]
    lr = shape(peak, total, warmup, optim.min_lr)
    end = optim.weight_decay if optim.weight_decay_end is None else optim.weight_decay_end
    weight_decay = cosine(optim.weight_decay, end, total)
    return lambda step: dict(lr=lr(step), weight_decay=weight_decay(step), warm=step < freeze)


def dino_lr(peak, total_steps, warmup_steps=0, min_lr=0.0):
    """`cosine` with the arguments of `lr_schedule`."""
    return cosine(peak, min_lr, total_steps, warmup_steps)


def grad_norm(grads):
    """Global L2 norm in float32 of a tree."""
    return optax.global_norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))


def make(optim, params):
    """AdamW with decoupled decay as torch, p <- p (1 - lr m wd) - lr m mhat / (sqrt(vhat) + eps).

    m is the parameter's multiplier (layer decay, `lr_mult`), see `lr_multipliers`; wd is 0 where
    `decays` says so; frozen parameters are left bitwise as they are, have no moments and do not
    count for the clipping norm. Moments are float32.

    Parameters of `optim.warm_freeze` have rate 0 while `warm` holds: no update and no decay. With
    `optim.warm_freeze_moments` theirs go on, as those of DINOv2's last layer do. Without it they
    are as if absent: moments and their own count for Adam's bias stand still, and they do not count
    for the clipping norm, so that nothing a fresh decoder sends into a released encoder is ever
    used, and the first step is that of a fresh AdamW (with the common count it would be
    (1 - b1) / sqrt(1 - b2) times as long, 3 times for (0.9, 0.999)). `warm` is a comparison with
    the step inside the one compiled program: nothing is compiled at the switch, and a restart needs
    nothing but the step. The price is that their moments exist, and their gradients are computed,
    from the start.

    Args:
      optim: `config.optim`.
      params: parameters, or their shapes (`jax.eval_shape`).

    Returns:
      (tx, table): `tx.init(params)`, `tx.update(grads, state, params, **schedule(step))` ->
      updates, state, to be added with `optax.apply_updates`; a text with one line per group.
    """
    decay = decays(params, optim.no_decay)
    multipliers = lr_multipliers(params, optim.layer_decay, optim.lr_mult)
    train = trainable(params, optim.freeze)
    late = _late(params, optim.warm_freeze, train)
    adam = scale_by_adam(optim.b1, optim.b2, optim.eps)
    waits = bool(optim.warm_freeze) and not optim.warm_freeze_moments
    if waits:
        rule = functools.partial(matching, optim.warm_freeze)
        first = optax.masked(adam, lambda tree: jax.tree.map(operator.not_, rule(tree)))
        adam = optax.chain(first, optax.masked(_waiting(adam), rule))
    clip = clip_by_norm(optim.clip, optim.clip_by) if optim.clip else optax.identity()
    tx = optax.masked(optax.chain(clip, adam), train)

    def update(grads, state, params, *, lr, weight_decay, warm=False):
        if waits:
            grads = jax.tree.map(lambda g, late: jnp.where(warm, 0, g) if late else g, grads, late)
        directions, state = tx.update(grads, state, params, warm=warm)

        def scale(direction, p, decays, multiplier, trains, late):
            nothing = jnp.full_like(p, -0.0)  # p + -0 is p to the bit, p + 0 is not for p = -0
            if not trains:
                return nothing
            if decays:
                direction = direction + weight_decay * p
            direction = -(lr * multiplier) * direction
            return jnp.where(warm, nothing, direction) if late else direction

        return jax.tree.map(scale, directions, params, decay, multipliers, train, late), state

    table = describe(params, decay, multipliers, train, late, optim.weight_decay)
    return optax.GradientTransformationExtraArgs(tx.init, update), table


def scale_by_adam(b1, b2, eps):
    """`optax.scale_by_adam` with float32 moments and an exact correction of their bias.

    optax computes 1 - b2^t in float32, which for b2 = 0.999 and the first t is off by 1e-5 of its
    value; -expm1(t log b2) is not. That alone decides the tolerance of the golden trajectories.
    """
    logs = [math.log(b) if b else -math.inf for b in (b1, b2)]

    def update(grads, state, params=None):
        del params
        count = state.count + 1
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        c1, c2 = (-jnp.expm1(count.astype(jnp.float32) * log) for log in logs)
        mu = jax.tree.map(lambda g, m: (1 - b1) * g + b1 * m, grads, state.mu)
        nu = jax.tree.map(lambda g, v: (1 - b2) * jnp.square(g) + b2 * v, grads, state.nu)
        updates = jax.tree.map(lambda m, v: m / c1 / (jnp.sqrt(v / c2) + eps), mu, nu)
        return updates, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    init = optax.scale_by_adam(b1, b2, eps, mu_dtype=jnp.float32).init
    return optax.GradientTransformation(init, update)


def _late(params, regexes, train):
    """Tree of bools: True where the slash path matches a regex of `warm_freeze` and trains."""
    tree = jax.tree.map(operator.and_, matching(regexes, params), train)
    found = {late for late, trains in zip(*map(jax.tree.leaves, (tree, train))) if trains}
    if regexes and found != {True, False}:
        raise ValueError(
            f'optim.warm_freeze={regexes} matches {"every" if True in found else "no"} parameter '
            f'that trains; their paths begin with {", ".join(sorted(params))}.'
        )
    return tree


def _waiting(tx):
    """`tx` whose state stands still while `warm` holds; its updates are not for use then."""

    def update(updates, state, params=None, *, warm, **_):
        updates, new = tx.update(updates, state, params)
        return updates, jax.tree.map(lambda old, new: jnp.where(warm, old, new), state, new)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def decays(params, no_decay=()):
    """Tree of bools: whether weight decay applies, by MAE's and Pixio's rule.

    Exempt are parameters of at most one dimension (besides the stack axis), those named bias, and
    those whose slash path matches a regex of `no_decay`. Class, mask and position tokens have three
    dimensions in the official codes and do decay (fine-tuning exempts them by `no_decay`); so do
    BEiT's tables of relative positions.
    """

    def rule(path, p):
        path = sharding.path_str(path)
        ndim = len(p.shape) - _stacked(path)
        return ndim > 1 and path.split('/')[-1] != 'bias' and not _matches(no_decay, path)

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
    tree = jax.tree.map(operator.not_, matching(freeze, params))
    if not any(jax.tree.leaves(tree)):
        raise ValueError(f'optim.freeze={freeze} freezes every parameter: narrow the regexes.')
    return tree


def describe(params, decay, multipliers, train, late, weight_decay):
    """Text table of the parameter groups: lr factor, weight decay, arrays, parameters, example.

    The factor of a group that is frozen at first says so: '0.25 later'.
    """
    groups = collections.OrderedDict()
    leaves = jax.tree_util.tree_leaves_with_path(params)
    rows = zip(leaves, *map(jax.tree.leaves, (decay, multipliers, train, late)))
    for (path, p), d, m, t, waits in rows:
        low, high = float(np.min(m)), float(np.max(m))
        lr = f'{low:.4g}' if low == high else f'{low:.4g}..{high:.4g}'
        lr += ' later' if waits else ''
        key = (lr, f'{weight_decay:g}' if d else '0') if t else ('frozen', '-')
        groups.setdefault(key, []).append((sharding.path_str(path), math.prod(p.shape)))
    width = max(16, *(len(lr) for lr, _ in groups))
    lines = [f'{"lr factor":>{width}} {"decay":>6} {"arrays":>7} {"parameters":>14}  for example']
    for (lr, wd), members in groups.items():
        count = sum(n for _, n in members)
        lines.append(f'{lr:>{width}} {wd:>6} {len(members):>7} {count:>14,}  {members[0][0]}')
    return '\n'.join(lines)


def clip_by_norm(limit, by='all'):
    """Scales gradients by min(1, limit / (norm + 1e-6)), torch's `clip_grad_norm_`.

    by: the norm of what: 'all' gradients; each 'network' on the first level of the tree (DINOv2:
    backbone and heads apart); each 'tensor' (DINO, iBOT), of stacked blocks each block's.
    """

    def clipped(tree):
        scale = jnp.minimum(1.0, limit / (grad_norm(tree) + 1e-6))
        return jax.tree.map(lambda g: g * scale, tree)

    def tensor(path, g):
        return (jax.vmap(clipped) if _stacked(sharding.path_str(path)) else clipped)(g)

    def update(grads, state, params=None):
        if by == 'tensor':
            return jax.tree_util.tree_map_with_path(tensor, grads), state
        if by == 'network':
            return {name: clipped(tree) for name, tree in grads.items()}, state
        return clipped(grads), state

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


def matching(regexes, tree):
    """Tree of bools: whether the slash path matches one of `regexes`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: _matches(regexes, sharding.path_str(path)), tree
    )


def _matches(regexes, path):
    return any(re.search(regex, path) for regex in regexes)
