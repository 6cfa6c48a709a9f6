# SPDX-License-Identifier: Apache-2.0
"""Linear probe on frozen, cached features: all learning rates of the sweep train at once.

The head is MAE's: BatchNorm without affine parameters, then one linear layer. All learning rates
share the normalised input, so their heads are one matrix product of L * classes columns, and a
sweep costs little more than a single run. The best (feature, learning rate) is chosen on a held-out
part of the training set; only that choice is scored on the test set.

Two differences from the published protocols move numbers by about a point: features are cached, so
there is no augmentation; the head that is tested was trained without the held-out part.

References:
  MAE `main_linprobe.py`
  the sweep: DINOv2 `eval/linear.py`, Oquab et al., arXiv 2304.07193, B.3
"""

import dataclasses
import functools
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssl_jax import optim
from ssl_jax.evals import accuracy
from ssl_jax.fields import Range
from ssl_jax.run import errors

BN_EPS = 1e-6
BN_MOMENTUM = 0.1
HOLDOUT = 0.1  # share of the training images
# Name -> (transformation, its name in the protocol). Rates come after momentum: the caller
# multiplies the updates of learning rate 1.
OPTIMIZERS = {
    'sgd': (optax.sgd(1.0, momentum=0.9), 'SGD (optax.sgd), momentum 0.9'),
    'lars': (optim.lars(1.0, momentum=0.9, trust=0.001), 'LARS, momentum 0.9, trust 0.001'),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Fields linear.FIELD=VALUE of `ssl_jax eval`."""

    # Times batch_size / 256. Wide on purpose: BatchNorm fixes the input scale, the width does not.
    lrs: tuple = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
    epochs: Annotated[int, Range(1, 10000)] = 30
    warmup_epochs: Annotated[int, Range(0, 10000)] = 0
    batch_size: Annotated[int, Range(1, 10**6)] = 1024
    optimizer: Literal['sgd', 'lars'] = 'sgd'
    seed: Annotated[int, Range(0, 2**31)] = 0


def probe(
    train: dict[str, np.ndarray],
    train_y: np.ndarray,
    test: dict[str, np.ndarray],
    test_y: np.ndarray,
    *,
    num_classes: int,
    lrs: tuple = Settings.lrs,
    epochs: int = Settings.epochs,
    warmup_epochs: int = Settings.warmup_epochs,
    batch_size: int = Settings.batch_size,
    optimizer: str = Settings.optimizer,
    seed: int = Settings.seed,
) -> tuple[list[dict], dict, dict]:
    """Sweeps learning rates over features and tests the best choice.

    Args:
      train, test: {name: (n, d)} and {name: (m, d)} features with the same names.
      train_y, test_y: (n,), (m,) labels in 0..num_classes-1.
      lrs: base learning rates; the rate is base * batch_size / 256, then a cosine to 0.
      epochs: passes over the fitted part; incomplete batches are dropped.
      warmup_epochs: linear warm-up (LARS wants 10 of 90).
      batch_size: at most the fitted part.
      optimizer: 'sgd' (momentum 0.9, no weight decay) or 'lars' (MAE's, trust 0.001).
      seed: of the split, the start and the order of batches.

    Returns:
      rows, best, protocol: one dict(feature, lr, val_top1, train_loss) per pair; a copy of the best
      with test_top1, test_top5 and at_edge (the best rate is the smallest or largest of the sweep,
      so a wider one may do better); the settings, as JSON can hold them. Percent. Ties go to the
      smaller rate, then to the first feature.
    """
    for name, labels in (('train', train_y), ('test', test_y)):
        accuracy.check_labels(name, labels, num_classes)
    if len(train_y) < 2:
        raise errors.UserError('1 training image cannot be fitted and held out: give two or more.')
    fit, val = split(len(train_y), seed)
    batch_size = min(batch_size, len(fit))
    scale = batch_size / 256
    rows, heads = [], []
    for name, x in train.items():
        head, losses = _train(
            x[fit],
            train_y[fit],
            (np.asarray(lrs) * scale).astype(np.float32),
            jax.random.key(seed),
            num_classes=num_classes,
            epochs=epochs,
            warmup_epochs=warmup_epochs,
            batch_size=batch_size,
            optimizer=optimizer,
        )
        top1 = 100.0 * (np.asarray(_ranks(head, x[val], train_y[val])) < 1).mean(axis=1)
        for i, (lr, score, loss) in enumerate(zip(lrs, top1.tolist(), losses, strict=True)):
            row = dict(feature=name, lr=float(lr), val_top1=score, train_loss=float(loss))
            rows.append(row)
            heads.append((head, i))

    at = min(range(len(rows)), key=lambda j: (-rows[j]['val_top1'], rows[j]['lr'], j))
    best, (head, i) = dict(rows[at]), heads[at]
    ranks = np.asarray(_ranks(head, test[best['feature']], test_y))[i]
    best['test_top1'] = 100.0 * float((ranks < 1).mean())
    best['test_top5'] = 100.0 * float((ranks < 5).mean())
    best['at_edge'] = len(lrs) > 1 and best['lr'] in (min(lrs), max(lrs))
    protocol = dict(
        head=f'BatchNorm(affine=False, eps={BN_EPS:g}, momentum={BN_MOMENTUM:g}) + linear',
        optimizer=OPTIMIZERS[optimizer][1] + ', weight decay 0',
        schedule=f'{warmup_epochs} warm-up epochs, cosine to 0',
        lrs=[float(lr) for lr in lrs],
        lr_scale=scale,
        epochs=epochs,
        batch_size=batch_size,
        augmentation='none (cached features)',
        selection=f'feature and rate by top-1 on {len(val)} held-out training images; '
        f'the head trained on the other {len(fit)} is tested once',
        num_classes=num_classes,
        seed=seed,
    )
    return rows, best, protocol


def split(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sorted indices (fit, held out) of n examples, a function of n and seed."""
    order = np.random.default_rng(seed).permutation(n)
    size = max(1, round(n * HOLDOUT))
    return np.sort(order[size:]), np.sort(order[:size])


def batch_norm(x: jax.Array, running: tuple, train: bool) -> tuple[jax.Array, tuple]:
    """BatchNorm1d without affine parameters, as torch computes it.

    y = (x - mean) / sqrt(var + eps); in training with the batch's mean and biased variance, and
    running <- (1 - 0.1) running + 0.1 (mean, unbiased variance); otherwise with the running pair.

    Args:
      x: (B, d).
      running: (mean, var), each (d,); starts as (0, 1).

    Returns:
      y (B, d) and the new running pair.
    """
    if not train:
        mean, var = running
        return (x - mean) * jax.lax.rsqrt(var + BN_EPS), running
    mean, var = x.mean(axis=0), x.var(axis=0)
    unbiased = var * (x.shape[0] / max(x.shape[0] - 1, 1))
    new = jax.tree.map(
        lambda old, now: (1 - BN_MOMENTUM) * old + BN_MOMENTUM * now, running, (mean, unbiased)
    )
    return (x - mean) * jax.lax.rsqrt(var + BN_EPS), new


def _logits(params, x):
    """x (B, d), kernel (L, d, C), bias (L, C) -> (L, B, C)."""
    # As one (B, d) x (d, L * C) product; a batched one is several times slower on a CPU.
    n, d, c = params['kernel'].shape
    kernel = params['kernel'].transpose(1, 0, 2).reshape(d, n * c)
    out = jnp.dot(x, kernel, precision='highest').reshape(-1, n, c)
    return out.transpose(1, 0, 2) + params['bias'][:, None]


@functools.partial(
    jax.jit, static_argnames=('num_classes', 'epochs', 'warmup_epochs', 'batch_size', 'optimizer')
)
def _train(x, y, lrs, rng, *, num_classes, epochs, warmup_epochs, batch_size, optimizer):
    """Trains one head per learning rate; returns dict(params, running) and the last losses (L,)."""
    n, d = x.shape
    steps = n // batch_size
    warmup = warmup_epochs * steps
    tx = OPTIMIZERS[optimizer][0]
    # One draw for all rates: the rows of a sweep differ in nothing but the rate.
    kernel = 0.01 * jax.random.truncated_normal(
        jax.random.fold_in(rng, 0), -200.0, 200.0, (d, num_classes)
    )
    params = {
        'kernel': jnp.broadcast_to(kernel, (len(lrs), d, num_classes)),
        'bias': jnp.zeros((len(lrs), num_classes)),
    }
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(0.0, 1.0, max(warmup, 1)),
            optax.cosine_decay_schedule(1.0, epochs * steps - warmup),
        ],
        [warmup],
    )

    def loss_fn(params, x, y):
        logits = _logits(params, x)
        labels = jnp.broadcast_to(y, logits.shape[:2])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(axis=1)
        return losses.sum(), losses  # the heads share no parameter: the sum trains each alone

    def step(carry, now):
        params, opt_state, running = carry
        index, rows = now
        xb, running = batch_norm(x[rows], running, train=True)
        grads, losses = jax.grad(loss_fn, has_aux=True)(params, xb, y[rows])
        # vmap over the rates, since LARS takes norms per head.
        updates, opt_state = jax.vmap(tx.update)(grads, opt_state, params)
        rate = lrs * schedule(index)  # (L,)
        params = jax.tree.map(
            lambda p, u: p + rate.reshape(-1, *[1] * (u.ndim - 1)) * u, params, updates
        )
        return (params, opt_state, running), losses

    def epoch(carry, number):
        order = jax.random.permutation(jax.random.fold_in(rng, number + 1), n)
        rows = order[: steps * batch_size].reshape(steps, batch_size)
        carry, losses = jax.lax.scan(step, carry, (number * steps + jnp.arange(steps), rows))
        return carry, losses.mean(axis=0)

    carry = params, jax.vmap(tx.init)(params), (jnp.zeros(d), jnp.ones(d))
    (params, _, running), losses = jax.lax.scan(epoch, carry, jnp.arange(epochs))
    return {'params': params, 'running': running}, losses[-1]


@jax.jit
def _ranks(head, x, y):
    """(L, n): number of classes that score above the true one; a NaN counts as above."""
    x, _ = batch_norm(x, head['running'], train=False)
    return accuracy.ranks(_logits(head['params'], x), y)
