# SPDX-License-Identifier: Apache-2.0
"""Schedules and optimizers: AdamW with the official parameter groups, LARS for linear probes.

The learning rate is an argument of every update, computed from the step of the run. The optimizer's
count only corrects Adam's bias: it stands still if a non-finite step is skipped, while data and
schedule move on. Blocks are stacked over depth by scan (`blocks/...`: (depth, ...)): rules on a
parameter's dimensions leave that axis out, layer decay is a vector along it.
"""

import dataclasses
import functools
import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssl_jax.fields import Range
from ssl_jax.run import clock as clock_lib
from ssl_jax.run import errors, trees


@dataclasses.dataclass(frozen=True)
class Optim:
    """Fields of `config.optim`."""

    # Learning rate per `scale_batch` images: lr = base_lr * batch / scale_batch.
    base_lr: Annotated[float, Range(0.0, 100.0)] = 1.5e-4
    lr: float | None = None  # peak learning rate, not scaled; overrides base_lr
    scale_batch: int = 256  # images
    lr_scaling: Literal['linear', 'sqrt'] = 'linear'  # or base_lr * sqrt(batch / scale_batch)
    schedule: Literal['mae', 'dinov2'] = 'mae'  # forms of warm-up and cosine, see `schedule`
    min_lr: float = 0.0  # learning rate at the end of the cosine
    b1: Annotated[float, Range(0.0, 0.99999)] = 0.9  # AdamW
    b2: Annotated[float, Range(0.0, 0.99999)] = 0.95
    eps: float = 1e-8
    weight_decay: Annotated[float, Range(0.0, 10.0)] = 0.05  # decoupled: p <- p (1 - lr wd)
    # The decay moves there along half a cosine; None: it stays.
    weight_decay_end: Annotated[float | None, Range(0.0, 10.0)] = None
    no_decay: tuple = ()  # regexes on slash paths, exempt besides biases and 1-D parameters
    clip: float | None = None  # largest gradient norm, see `clip_by_norm`
    clip_by: Literal['all', 'network', 'tensor'] = 'all'
    # Factor per layer below the head, for fine-tuning.
    layer_decay: Annotated[float | None, Range(0.01, 1.0)] = None
    lr_mult: tuple = ()  # ((regex, factor), ...): factors of all matching regexes multiply
    freeze: tuple = ()  # regexes: no update, no decay, no moments
    warm_freeze: tuple = ()  # regexes: rate 0 at the start of the run, for one of ...
    warm_freeze_steps: int | None = None
    warm_freeze_epochs: float | None = None
    warm_freeze_examples: int | None = None
    warm_freeze_moments: bool = True  # whether their moments go on meanwhile (DINOv2), or wait too


STACKS = ('blocks', 'decoder_blocks')
# Parameters below the first block: layer 0 of layer decay.
BOTTOM = ('cls_token', 'pos_embed', 'mask_token', 'register_tokens', 'patch_embed')


def lr_schedule(
    peak: float, total_steps: float, warmup_steps: float = 0, min_lr: float = 0.0
) -> Callable:
    """MAE's schedule: linear warm-up from 0, then half a cosine to `min_lr`.

    lr(s) = peak s / w                                                    for s < w,
            min_lr + (peak - min_lr) (1 + cos(pi (s - w) / (T - w))) / 2  from there on,

    as MAE's `util/lr_sched.py` does with fractional epochs e = s / steps_per_epoch. The first step
    has rate 0.

    Args:
      peak, min_lr: learning rates at the end of the warm-up and of the run.
      total_steps, warmup_steps: T and w, not necessarily integers.

    Returns:
      Function of the step: float64 of a numpy or Python number (host, logs, tests), float32 of a
      jax array or tracer.
    """
    return _warm_cosine(peak, min_lr, total_steps, warmup_steps, warmup_steps)


def cosine(start: float, end: float, total_steps: float, warmup_steps: float = 0) -> Callable:
    """DINO's schedule: `lr_schedule` with a warm-up of s / (w - 1).

    The warm-up includes both ends: the peak is at step w - 1 and again at step w. `end` is at step
    T, after the last. Learning rate, weight decay and teacher momentum of DINO, iBOT and DINOv2
    have this schedule (`train/train.py: build_schedulers`).
    """
    return _warm_cosine(start, end, total_steps, warmup_steps, warmup_steps - 1)


def _warm_cosine(peak, end, total, warmup, rise):
    """The cosine is computed as sin^2(pi (T - s) / (2 (T - w))): equal, and precise in float32 near
    the end, where the form of `lr_schedule` is rounding noise."""
    if not 0 <= warmup < max(total, 1):
        raise errors.UserError(
            f'warmup_steps={warmup} does not end before total_steps={total}: lower it.'
        )

    def schedule(step):
        xp, step = _floating(step)
        left = xp.clip((total - step) / (total - warmup), 0, 1)
        after = end + (peak - end) * xp.sin(math.pi / 2 * left) ** 2
        return xp.where(step < warmup, peak * step / max(rise, 1e-9), after)

    return schedule


def linear(start: float, end: float, steps: float) -> Callable:
    """From `start` at step 0 to `end` at step `steps` - 1 and later."""

    def schedule(step):
        xp, step = _floating(step)
        return end + (start - end) * xp.clip(1 - step / max(steps - 1, 1e-9), 0, 1)

    return schedule


def _floating(step):
    """(numpy, float64 step), or (jax.numpy, float32 step) for a jax array or tracer."""
    if isinstance(step, jax.Array):
        return jnp, step.astype(jnp.float32)
    return np, np.asarray(step, np.float64)


def scaled_lr(optim: Any, batch_size: int) -> tuple[float, str]:
    """Peak learning rate, and its rule for the log.

    It is `optim.lr` if given, else base_lr * batch / scale_batch ('linear': MAE, DINO) or base_lr *
    sqrt(batch / scale_batch) ('sqrt': DINOv2).
    """
    if optim.lr is not None:
        return optim.lr, f'lr {optim.lr:g} (optim.lr, not scaled with the batch)'
    ratio = batch_size / optim.scale_batch
    rule = f'batch {batch_size} / {optim.scale_batch}'
    if optim.lr_scaling == 'sqrt':
        ratio, rule = math.sqrt(ratio), f'sqrt({rule})'
    lr = optim.base_lr * ratio
    return lr, f'lr {lr:g} = base_lr {optim.base_lr:g} x {rule}'


def schedule(config: Any, clock: clock_lib.Clock) -> Callable[[Any], dict]:
    """Arguments of the update as functions of the step.

    Args:
      config: of the run.
      clock: of the run.

    Returns:
      step -> dict of lr, weight_decay and warm (whether `optim.warm_freeze` holds).
    """
    optim, total, warmup = config.optim, clock.total, clock.warmup
    peak, _ = scaled_lr(optim, config.batch_size)
    freeze = clock.steps('warm_freeze', optim, default=0)
    if optim.schedule == 'mae':
        lr = lr_schedule(peak, total, warmup, optim.min_lr)
    else:
        lr = cosine(peak, optim.min_lr, total, warmup)
    end = optim.weight_decay if optim.weight_decay_end is None else optim.weight_decay_end
    weight_decay = cosine(optim.weight_decay, end, total)
    return lambda step: dict(lr=lr(step), weight_decay=weight_decay(step), warm=step < freeze)


def grad_norm(grads: Any) -> jax.Array:
    """Global L2 norm of a tree, in float32."""
    return optax.global_norm(jax.tree.map(lambda g: g.astype(jnp.float32), grads))


def make(optim: Any, params: Any) -> tuple[optax.GradientTransformationExtraArgs, str]:
    """AdamW with decoupled decay as torch, p <- p (1 - lr m wd) - lr m mhat / (sqrt(vhat) + eps).

    m is the parameter's multiplier (layer decay, `lr_mult`), see `lr_multipliers`; wd is 0 where
    `decays` is False. Frozen parameters keep every bit, have no moments and do not count for the
    clipping norm. Moments are float32.

    Parameters of `optim.warm_freeze` have rate 0 while `warm` holds: no update and no decay. With
    `optim.warm_freeze_moments` their moments go on, as in DINOv2's last layer. Without it they are
    as if absent: moments and a separate count for Adam's bias stand still, and they do not count
    for the clipping norm. No gradient of a fresh decoder then reaches a released encoder, and the
    first step is that of a fresh AdamW (with the common count it would be (1 - b1) / sqrt(1 - b2)
    times as long, 3 times for (0.9, 0.999)). `warm` compares the step inside the compiled program:
    nothing is compiled at the switch, and a restart needs only the step. Moments and gradients of
    these parameters cost memory and time from the start.

    Args:
      optim: `config.optim`.
      params: parameters, or their shapes (`jax.eval_shape`).

    Returns:
      (tx, table): `tx.update(grads, state, params, **schedule(step))` gives the updates for
      `optax.apply_updates` and the state; `table` is a text with one line per group.
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
            nothing = jnp.full_like(p, -0.0)  # p + -0 keeps every bit, p + 0 does not for p = -0
            if not trains:
                return nothing
            if decays:
                direction = direction + weight_decay * p
            direction = -(lr * multiplier) * direction
            return jnp.where(warm, nothing, direction) if late else direction

        return jax.tree.map(scale, directions, params, decay, multipliers, train, late), state

    table = describe(params, decay, multipliers, train, late, optim.weight_decay)
    return optax.GradientTransformationExtraArgs(tx.init, update), table


def scale_by_adam(b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with float32 moments and an exact bias correction.

    optax computes 1 - b2^t in float32, with a relative error of 1e-5 for b2 = 0.999 and small t;
    -expm1(t log b2) has none. This alone decides the tolerance of the golden trajectories.
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
    """Tree of bools: whether a trained parameter matches a regex of `warm_freeze`."""
    tree = jax.tree.map(operator.and_, matching(regexes, params), train)
    found = {
        late for late, trains in zip(*map(jax.tree.leaves, (tree, train)), strict=True) if trains
    }
    if regexes and found != {True, False}:
        raise errors.UserError(
            f'optim.warm_freeze={regexes} matches {"every" if True in found else "no"} parameter '
            f'that trains; their paths begin with {", ".join(sorted(params))}.'
        )
    return tree


def _waiting(tx):
    """`tx` with a state that stands still while `warm` holds; its updates are invalid then."""

    def update(updates, state, params=None, *, warm, **_):
        updates, new = tx.update(updates, state, params)
        return updates, jax.tree.map(lambda old, new: jnp.where(warm, old, new), state, new)

    return optax.GradientTransformationExtraArgs(tx.init, update)


def decays(params: Any, no_decay: Sequence[str] = ()) -> Any:
    """Tree of bools: whether weight decay applies, by MAE's and Pixio's rule.

    Exempt are biases, parameters of at most one dimension (besides the stack axis) and slash paths
    that match a regex of `no_decay`. Class, mask and position tokens have three dimensions in the
    official codes and do decay (fine-tuning exempts them by `no_decay`); so do BEiT's tables of
    relative positions.
    """

    def rule(path, p):
        ndim = len(p.shape) - _stacked(path)
        return ndim > 1 and path.split('/')[-1] != 'bias' and not _matches(no_decay, path)

    return trees.map_named(rule, params)


def lr_multipliers(
    params: Any, layer_decay: float | None = None, lr_mult: Sequence[tuple[str, float]] = ()
) -> Any:
    """Tree of factors on the learning rate: numpy scalars, or (depth, 1, ...) for stacked blocks.

    layer_decay^(depth + 1 - id) with id 0 for tokens, positions and patch embedding, k + 1 for
    block k of `blocks`, depth + 1 for all else (heads, norms, decoders), times the factor of every
    `lr_mult` regex that matches the path.
    """
    leaves = trees.named(params)
    depth = max((p.shape[0] for k, p in leaves.items() if 'blocks' in k.split('/')), default=0)
    if layer_decay is not None and not depth:
        raise errors.UserError(
            'optim.layer_decay needs stacked blocks, this model has none: set None.'
        )

    def rule(path, p):
        parts = path.split('/')
        factor = np.float64(math.prod(f for regex, f in lr_mult if re.search(regex, path)))
        if layer_decay is not None and 'decoder' not in parts:
            if 'blocks' in parts:
                scales = layer_decay ** (depth - np.arange(depth, dtype=np.float64))
                factor = factor * scales.reshape(depth, *[1] * (len(p.shape) - 1))
            elif set(parts) & set(BOTTOM):
                factor = factor * layer_decay ** (depth + 1)
        return np.asarray(factor, np.float32)

    return trees.map_named(rule, params)


def trainable(params: Any, freeze: Sequence[str]) -> Any:
    """Tree of bools: False where the slash path matches a regex of `freeze`."""
    tree = jax.tree.map(operator.not_, matching(freeze, params))
    if not any(jax.tree.leaves(tree)):
        raise errors.UserError(
            f'optim.freeze={freeze} freezes every parameter: narrow the regexes.'
        )
    return tree


def describe(params, decay, multipliers, train, late, weight_decay) -> str:
    """Text table of the parameter groups: lr factor, weight decay, arrays, parameters, example.

    The factor of a group that is frozen at first is marked: '0.25 later'.
    """
    groups = {}
    leaves = trees.named(params).items()
    rows = zip(leaves, *map(jax.tree.leaves, (decay, multipliers, train, late)), strict=True)
    for (path, p), d, m, t, waits in rows:
        low, high = float(np.min(m)), float(np.max(m))
        lr = f'{low:.4g}' if low == high else f'{low:.4g}..{high:.4g}'
        lr += ' later' if waits else ''
        key = (lr, f'{weight_decay:g}' if d else '0') if t else ('frozen', '-')
        groups.setdefault(key, []).append((path, math.prod(p.shape)))
    width = max(16, *(len(lr) for lr, _ in groups))
    lines = [f'{"lr factor":>{width}} {"decay":>6} {"arrays":>7} {"parameters":>14}  for example']
    for (lr, wd), members in groups.items():
        count = sum(n for _, n in members)
        lines.append(f'{lr:>{width}} {wd:>6} {len(members):>7} {count:>14,}  {members[0][0]}')
    return '\n'.join(lines)


def clip_by_norm(limit: float, by: str = 'all') -> optax.GradientTransformation:
    """Scales gradients by min(1, limit / (norm + 1e-6)), as torch's `clip_grad_norm_`.

    Args:
      limit: largest norm.
      by: one norm for 'all' gradients, one per 'network' on the first level of the tree (DINOv2:
        backbone and heads), or one per 'tensor' (DINO, iBOT), in stacked blocks one per block.
    """

    def clipped(tree):
        scale = jnp.minimum(1.0, limit / (grad_norm(tree) + 1e-6))
        return jax.tree.map(lambda g: g * scale, tree)

    def tensor(path, g):
        return (jax.vmap(clipped) if _stacked(path) else clipped)(g)

    def update(grads, state, params=None):
        if by == 'tensor':
            return trees.map_named(tensor, grads), state
        if by == 'network':
            return {name: clipped(tree) for name, tree in grads.items()}, state
        return clipped(grads), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def lars(
    lr: float | Callable, momentum: float = 0.9, trust: float = 0.001, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """LARS as in MAE's `util/lars.py`, for linear probes.

    For parameters of more than one dimension: g <- g + wd p, then g <- g trust |p| / |g| (factor 1
    if either norm is 0). For all: mu <- momentum mu + g, p <- p - lr mu.

    Args:
      lr: number, or function of the number of past updates.
    """

    def matrices(params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    return optax.chain(
        optax.masked(optax.add_decayed_weights(weight_decay), matrices),
        optax.masked(optax.scale_by_trust_ratio(trust_coefficient=trust), matrices),
        optax.trace(decay=momentum),
        optax.scale_by_learning_rate(lr),
    )


def _stacked(path):
    return bool(set(path.split('/')) & set(STACKS))


def matching(regexes: Sequence[str], tree: Any) -> Any:
    """Tree of bools: whether the slash path matches one of `regexes`."""
    return trees.map_named(lambda path, _: _matches(regexes, path), tree)


def _matches(regexes, path):
    return any(re.search(regex, path) for regex in regexes)
