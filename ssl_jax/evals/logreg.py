# SPDX-License-Identifier: Apache-2.0
"""Multinomial logistic regression of frozen features with an L2 penalty, by L-BFGS on the device.

  minimise over W, b   sum_i -log softmax(x_i W + b)[y_i]  +  |W|^2 / (2 C)

The bias is not penalised, and C is the inverse strength, as in scikit-learn and cuML. The problem
is convex: the result depends on the data and C alone, up to where float32 ends. DINOv2 fits its
twelve small transfer sets so, CAPI its segmentation.

A step costs two products with the features, one with the direction and one for the gradient: along
the direction u the logits are z + t x u, so the line search needs no further product. The diagonal
of the Hessian, where all classes are as likely, is the first estimate of its curvature.

References:
  DINOv2 `eval/log_regression.py`; CAPI `eval_segmentation.py`
  the line search: Hager and Zhang, A New Conjugate Gradient Method, 2005, (4.1)
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ssl_jax import sharding
from ssl_jax.evals import accuracy, features, knn, linear
from ssl_jax.fields import Range
from ssl_jax.run import errors, peers

MEMORY = 10  # pairs of steps and changes of the gradient
# It stops where no entry of the gradient of the mean objective is larger than the first, or where
# a step promises to lower the objective by less than the second of its value: float32 ends there.
GRADIENT, DECREASE = 1e-6, 1e-8
TRIALS = 40  # lengths of one step


@dataclasses.dataclass(frozen=True)
class Settings:
    """Fields logreg.FIELD=VALUE of `ssl_jax eval`."""

    cs: tuple = tuple(float(c) for c in 10 ** np.linspace(-6, 5, 45))  # values of C; of DINOv2
    max_steps: Annotated[int, Range(1, 10**6)] = 1000  # of L-BFGS, for each C
    seed: Annotated[int, Range(0, 2**31)] = 0  # of the choice of the held-out tenth


def probe(
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
    *,
    num_classes: int,
    cs: tuple = Settings.cs,
    max_steps: int = Settings.max_steps,
    seed: int = Settings.seed,
    mesh: jax.sharding.Mesh | None = None,
    log: Callable | None = None,
) -> tuple[list[dict], dict, dict]:
    """DINOv2's protocol: C is chosen on a tenth of the training set, then all of it is fitted.

    Args:
      train_x, train_y, test_x, test_y: (n, d), (n,), (m, d), (m,), labels in 0..num_classes-1.
      cs: values of C.
      max_steps: of L-BFGS, for each C.
      seed: of the choice of the tenth, see `linear.split`.
      mesh: splits the images over its data and fsdp axes, default one device.
      log: called with a line of progress after 20 s and more.

    Returns:
      rows, best, protocol: one dict(c, val_top1, steps, gradient) per C; a copy of the best with
      the steps and the gradient of the last fit, test_top1, test_top5 and at_edge (the best C is
      the smallest or largest of several); the settings for JSON. Percent. Ties go to the smaller C.
    """
    for name, x, y in (('train', train_x, train_y), ('test', test_x, test_y)):
        accuracy.check_labels(name, y, num_classes)
        features.check_finite(name, x)
    if not cs or min(cs) <= 0 or max_steps < 1:
        raise errors.UserError(f'cs={cs} must be above 0, at least one, and max_steps at least 1.')
    if len(train_y) < 2:
        raise errors.UserError('1 training image cannot be fitted and held out: give two or more.')
    mesh = mesh or sharding.make_mesh(devices=jax.local_devices()[:1])
    held = np.zeros(len(train_y), bool)
    held[linear.split(len(train_y), seed)[1]] = True
    x, y = (knn.put_rows(np.asarray(v), mesh) for v in (train_x, train_y.astype(np.int32)))
    rows, said = [], time.monotonic()
    fields = dict(num_classes=num_classes, max_steps=max_steps, mesh=mesh)
    for c, params, found in path(x, y, ~held, cs, **fields):
        ranks = np.asarray(_ranks(x, y, params, mesh=mesh))[: len(held)]
        rows.append(dict(c=c, val_top1=100.0 * float((ranks[held] < 1).mean()), **found))
        if log and time.monotonic() - said > 20:
            said = time.monotonic()
            log(
                f'logistic regression: {len(rows)} of {len(cs)} values of C, {found["steps"]} steps'
            )
    at = min(range(len(rows)), key=lambda i: (-rows[i]['val_top1'], rows[i]['c']))
    params, found = fit(x, y, np.ones(len(held)), rows[at]['c'], **fields)
    best = dict(rows[at], **found)
    tx, ty = (knn.put_rows(np.asarray(v), mesh) for v in (test_x, test_y.astype(np.int32)))
    ranks = np.asarray(_ranks(tx, ty, params, mesh=mesh))[: len(test_y)]
    best['test_top1'] = 100.0 * float((ranks < 1).mean())
    best['test_top5'] = 100.0 * float((ranks < 5).mean())
    best['at_edge'] = len(cs) > 1 and best['c'] in (min(cs), max(cs))
    settings = dict(
        **protocol(cs, max_steps),
        selection=f'C by top-1 on {held.sum()} held-out training images, then all {len(held)} are '
        f'fitted',
        num_classes=num_classes,
        seed=seed,
    )
    return rows, best, settings


def protocol(cs: tuple, max_steps: int) -> dict:
    """The settings of a sweep for JSON."""
    return dict(
        head='multinomial logistic regression, L2 penalty, bias not penalised',
        optimizer=f'L-BFGS, {MEMORY} pairs, float32, at most {max_steps} steps, until the largest '
        f'gradient of the mean is {GRADIENT:g} or a step gains less than {DECREASE:g}',
        cs=[float(c) for c in cs],
    )


def path(x, y, weight, cs, *, num_classes, max_steps=Settings.max_steps, mesh):
    """Yields (C, params, dict(steps, gradient)) with C rising, each fit from the one before.

    Args: see `fit`.
    """
    params = None
    for c in sorted(cs):
        peers.progress()
        params, found = fit(
            x, y, weight, c, params, num_classes=num_classes, max_steps=max_steps, mesh=mesh
        )
        yield float(c), params, found


def fit(
    x: jax.Array,
    y: jax.Array,
    weight: np.ndarray,
    c: float,
    start: jax.Array | None = None,
    *,
    num_classes: int,
    max_steps: int = Settings.max_steps,
    mesh: jax.sharding.Mesh,
) -> tuple[jax.Array, dict]:
    """The minimum for one C.

    Args:
      x, y: (n, d) and int32 (n,), split over the mesh, see `knn.put_rows`.
      weight: (up to n,) of the rows; 0 leaves a row out, rows beyond the array too.
      c: inverse strength of the penalty, see the top of this file.
      start: (d + 1, num_classes), default zeros.

    Returns:
      float32 (d + 1, num_classes), the last row is the bias; dict(steps, gradient) with the
      largest entry of the gradient of the mean objective.
    """
    whole = np.zeros(x.shape[0], np.float32)
    whole[: len(weight)] = weight
    if start is None:
        start = np.zeros((x.shape[1] + 1, num_classes), np.float32)
    scale = np.float32(1 / (c * whole.sum(dtype=np.float64)))
    share = knn.put_rows((whole / whole.sum(dtype=np.float64)).astype(np.float32), mesh)
    params, steps, gradient = _minimise(x, y, share, scale, start, max_steps=max_steps, mesh=mesh)
    return params, dict(steps=int(steps), gradient=float(gradient))


def logits(x: jax.Array, params: jax.Array) -> jax.Array:
    """(n, d), (d + 1, C) -> (n, C)."""
    return jnp.dot(x, params[:-1], precision='highest') + params[-1]


@functools.partial(jax.jit, static_argnames='mesh')
def predict(x: jax.Array, params: jax.Array, *, mesh: jax.sharding.Mesh) -> jax.Array:
    """int32 (n,): the class of every row."""
    classes = logits(x, params).argmax(axis=1).astype(jnp.int32)
    return jax.lax.with_sharding_constraint(classes, NamedSharding(mesh, P()))


@functools.partial(jax.jit, static_argnames='mesh')
def _ranks(x, y, params, *, mesh):
    ranks = accuracy.ranks(logits(x, params), y)
    return jax.lax.with_sharding_constraint(ranks, NamedSharding(mesh, P()))


@functools.partial(jax.jit, static_argnames=('max_steps', 'mesh'))
def _minimise(x, y, share, scale, start, *, max_steps, mesh):
    """L-BFGS on sum_i share_i CE_i + scale / 2 |W|^2; (params, steps, largest gradient)."""
    penalty = scale * jnp.ones_like(start).at[-1].set(0)
    truth = jax.nn.one_hot(y, start.shape[1])
    # The inverse of the Hessian's diagonal where all classes are as likely: weights and biases, and
    # features of different scale, are of different stiffness.
    squares = jnp.dot(share, jnp.square(x), precision='highest')
    squares = jnp.concatenate([squares, jnp.ones(1)])[:, None]
    soft = 1 / (squares * (1 - 1 / start.shape[1]) / start.shape[1] + penalty + 1e-12)

    def value_and_grad(params, z):
        log_p = jax.nn.log_softmax(z)
        value = -(share * (truth * log_p).sum(axis=1)).sum()
        residual = share[:, None] * (jnp.exp(log_p) - truth)
        grad = jnp.dot(residual.T, x, precision='highest').T  # x.T @ residual is slower
        grad = jnp.concatenate([grad, residual.sum(axis=0)[None]]) + penalty * params
        grad = jax.lax.with_sharding_constraint(grad, NamedSharding(mesh, P()))
        return value + (penalty * params**2).sum() / 2, grad

    def going(s):
        return (s['step'] < max_steps) & ~s['done']

    def step(s):
        direction = -_inverse_hessian(s, soft)
        slope = jnp.vdot(s['grad'], direction)
        along = logits(x, direction)

        def slope_at(t):
            p = jax.nn.softmax(s['z'] + t * along)
            bend = (penalty * (s['params'] + t * direction) * direction).sum()
            return (share * ((p - truth) * along).sum(axis=1)).sum() + bend

        t, found = _length(slope, slope_at)
        params, z = s['params'] + t * direction, s['z'] + t * along
        value, grad = value_and_grad(params, z)
        ds, dg = params - s['params'], grad - s['grad']
        curvature = jnp.vdot(ds, dg)
        at = s['step'] % MEMORY
        moved = dict(
            params=params,
            z=z,
            value=value,
            grad=grad,
            ds=s['ds'].at[at].set(ds),
            dg=s['dg'].at[at].set(dg),
            rho=s['rho'].at[at].set(jnp.where(curvature > 0, 1 / curvature, 0)),
            gamma=jnp.where(curvature > 0, curvature / jnp.vdot(dg, soft * dg), s['gamma']),
        )
        # A direction that no longer descends, or has no length that helps, is one of rounding.
        lost = ~(slope < 0) | ~found
        new = {k: jnp.where(lost, s[k], v) for k, v in moved.items()}
        small = -slope * t <= DECREASE * jnp.abs(value)
        done = lost | small | (jnp.abs(new['grad']).max() <= GRADIENT)
        return dict(new, step=s['step'] + 1, done=done)

    z = logits(x, start)
    value, grad = value_and_grad(start, z)
    pairs = jnp.zeros((MEMORY, *start.shape))
    state = dict(params=start, z=z, value=value, grad=grad, ds=pairs, dg=pairs)
    state |= dict(rho=jnp.zeros(MEMORY), gamma=jnp.ones(()), step=0)
    state['done'] = jnp.abs(grad).max() <= GRADIENT
    state = jax.lax.while_loop(going, step, state)
    _, grad = value_and_grad(state['params'], logits(x, state['params']))
    return state['params'], state['step'], jnp.abs(grad).max()


def _inverse_hessian(s, soft):
    """The gradient times the estimate of the inverse Hessian: the two loops of L-BFGS."""
    q, order = s['grad'], [(s['step'] - 1 - i) % MEMORY for i in range(MEMORY)]
    alphas = []
    for i in order:  # newest first; rho is 0 where there is no pair yet
        alphas.append(s['rho'][i] * jnp.vdot(s['ds'][i], q))
        q = q - alphas[-1] * s['dg'][i]
    q = s['gamma'] * soft * q
    for i, alpha in zip(reversed(order), reversed(alphas), strict=True):
        beta = s['rho'][i] * jnp.vdot(s['dg'][i], q)
        q = q + (alpha - beta) * s['ds'][i]
    return q


def _length(slope, slope_at):
    """(t, found): a step length by Hager and Zhang's approximate Wolfe conditions.

    They look at slopes alone, which float32 resolves near the minimum where it resolves no
    difference of values; for a convex function they imply a decrease.
    """
    steepest, steep = 0.9 * slope, -0.8 * slope

    def going(s):
        t, lo, hi, at, trial = s
        return ((at < steepest) | (at > steep)) & (trial < TRIALS)

    def step(s):
        t, lo, hi, at, trial = s
        far = at > steep
        lo, hi = jnp.where(far, lo, t), jnp.where(far, t, hi)
        t = jnp.where(jnp.isinf(hi), 2 * t, (lo + hi) / 2)
        return t, lo, hi, slope_at(t), trial + 1

    one = jnp.ones(())
    t, _, _, at, trial = jax.lax.while_loop(
        going, step, (one, 0 * one, jnp.inf * one, slope_at(one), 0)
    )
    return t, trial < TRIALS
