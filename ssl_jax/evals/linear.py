# SPDX-License-Identifier: Apache-2.0
"""Linear probe on frozen, cached features: every learning rate of the sweep trained at once.

The head is MAE's: BatchNorm without affine parameters, then one linear layer.  All learning rates
share the normalised input, so their heads are one matrix product of L * classes columns; a sweep
costs little more than a single run.  The best (feature, learning rate) is chosen on a held-out
part of the training set; the test set is looked at once, for that choice.

What differs from the published protocols and moves numbers by about a point: features are cached,
so there is no augmentation; the head that is tested was trained without the held-out part.

Reference: MAE `main_linprobe.py`; the sweep of DINOv2 `eval/linear.py` (Oquab et al.,
arXiv 2304.07193, B.3).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssl_jax import optim

# Times batch_size / 256.  Wide on purpose: BatchNorm fixes the input scale, the width does not.
LRS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
BN_EPS = 1e-6
BN_MOMENTUM = 0.1
OPTIMIZERS = ('sgd', 'lars')


def probe(
    train,
    train_y,
    test,
    test_y,
    *,
    num_classes,
    lrs=LRS,
    epochs=30,
    warmup_epochs=0,
    batch_size=1024,
    optimizer='sgd',
    holdout=0.1,
    seed=0,
):
    """Sweeps learning rates over every kind of feature and tests the best choice.

    Args:
      train, test: {kind: (n, d)} and {kind: (m, d)} features with the same kinds.
      train_y, test_y: (n,), (m,) labels in 0..num_classes-1.
      lrs: base learning rates; the rate is base * batch_size / 256, then a cosine to 0.
      epochs: passes over the fitted part; incomplete batches are dropped.
      warmup_epochs: linear warm-up (LARS wants 10 of 90).
      batch_size: at most the fitted part, otherwise all of it.
      optimizer: 'sgd' (momentum 0.9, no weight decay) or 'lars' (MAE's, trust 0.001).
      holdout: share of `train` kept for the choice, drawn with `seed`.

    Returns:
      rows, best: one dict(feature, lr, val_top1, train_loss) per pair and a copy of the best with
      test_top1, test_top5 and at_edge (the best rate is the smallest or largest of the sweep, so
      a wider one may do better).  Percent.  Ties go to the smaller rate, then to the first kind.
    """
    if not 0 <= warmup_epochs < epochs:
        raise ValueError(f'warmup_epochs={warmup_epochs} must be 0 or more and below {epochs=}.')
    _check(train, train_y, test, test_y, num_classes, lrs, optimizer, holdout)
    fit, val = split(len(train_y), holdout, seed)
    batch_size = min(batch_size, len(fit))
    steps = len(fit) // batch_size
    scale = batch_size / 256
    device = jax.local_devices()[0]  # every process computes the same, without communication

    def put(x, dtype):
        return jax.device_put(np.asarray(x, dtype), device)

    train_y, test_y = np.asarray(train_y), np.asarray(test_y)
    rows, heads = [], []
    for kind in train:
        x = np.asarray(train[kind], np.float32)
        head, losses = _train(
            put(x[fit], np.float32),
            put(train_y[fit], np.int32),
            put(np.asarray(lrs) * scale, np.float32),
            jax.random.key(seed),
            num_classes=num_classes,
            epochs=epochs,
            warmup_epochs=warmup_epochs,
            steps=steps,
            batch_size=batch_size,
            optimizer=optimizer,
        )
        ranks = _ranks(head, put(x[val], np.float32), put(train_y[val], np.int32))
        accuracy = 100.0 * (np.asarray(ranks) < 1).mean(axis=1)
        for i, lr in enumerate(lrs):
            loss = float(losses[i])
            rows.append(
                dict(feature=kind, lr=float(lr), val_top1=float(accuracy[i]), train_loss=loss)
            )
            heads.append((head, i))

    order = sorted(range(len(rows)), key=lambda j: (-rows[j]['val_top1'], rows[j]['lr'], j))
    best = dict(rows[order[0]])
    head, i = heads[order[0]]
    ranks = _ranks(head, put(test[best['feature']], np.float32), put(test_y, np.int32))
    ranks = np.asarray(ranks)[i]
    best['test_top1'] = 100.0 * float((ranks < 1).mean())
    best['test_top5'] = 100.0 * float((ranks < 5).mean())
    best['at_edge'] = len(lrs) > 1 and best['lr'] in (min(lrs), max(lrs))
    return rows, best


def protocol(
    n,
    *,
    num_classes,
    lrs=LRS,
    epochs=30,
    warmup_epochs=0,
    batch_size=1024,
    optimizer='sgd',
    holdout=0.1,
    seed=0,
):
    """What `probe` does with these arguments and n training images, for the result row."""
    fit = n - _holdout_size(n, holdout)
    name = {'sgd': 'SGD (optax.sgd), momentum 0.9', 'lars': 'LARS, momentum 0.9, trust 0.001'}
    return dict(
        head=f'BatchNorm(affine=False, eps={BN_EPS:g}, momentum={BN_MOMENTUM:g}) + linear',
        optimizer=name[optimizer] + ', weight decay 0',
        schedule=f'{warmup_epochs} warm-up epochs, cosine to 0',
        lrs=[float(lr) for lr in lrs],
        lr_scale=min(batch_size, fit) / 256,
        epochs=epochs,
        batch_size=min(batch_size, fit),
        augmentation='none (cached features)',
        selection=f'feature and rate by top-1 on {n - fit} held-out training images; '
        f'the head trained on the other {fit} is tested once',
        num_classes=num_classes,
        seed=seed,
    )


def split(n, holdout, seed):
    """Indices (fit, held out) of n examples, sorted; the same for the same (n, holdout, seed)."""
    order = np.random.default_rng(seed).permutation(n)
    size = _holdout_size(n, holdout)
    return np.sort(order[size:]), np.sort(order[:size])


def _holdout_size(n, holdout):
    return max(1, round(n * holdout))


def batch_norm(x, running, train):
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


def _optimizer(name):
    """Transformation with learning rate 1; the caller multiplies, as rates come after momentum."""
    if name == 'lars':
        return optim.lars(1.0, momentum=0.9, trust=0.001)
    return optax.sgd(1.0, momentum=0.9)


@functools.partial(
    jax.jit,
    static_argnames=('num_classes', 'epochs', 'warmup_epochs', 'steps', 'batch_size', 'optimizer'),
)
def _train(x, y, lrs, rng, *, num_classes, epochs, warmup_epochs, steps, batch_size, optimizer):
    """Trains one head per learning rate; returns dict(params, running) and the last losses (L,)."""
    n, d = x.shape
    warmup = warmup_epochs * steps
    tx = _optimizer(optimizer)
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
    """(L, n): how many classes score above the true one; ties to the smaller class number.

    A head that diverged (NaN) gets nothing right.
    """
    x, _ = batch_norm(x, head['running'], train=False)
    logits = _logits(head['params'], x)  # (L, n, C)
    classes = jnp.arange(logits.shape[-1])
    own = jnp.take_along_axis(logits, jnp.broadcast_to(y, logits.shape[:2])[..., None], axis=2)
    above = (logits > own) | ((logits == own) & (classes < y[:, None])) | jnp.isnan(logits)
    return above.sum(axis=2)


def _check(train, train_y, test, test_y, num_classes, lrs, optimizer, holdout):
    if optimizer not in OPTIMIZERS:
        raise ValueError(f'Probe optimizer {optimizer!r} is unknown; choose one of {OPTIMIZERS}.')
    if not lrs:
        raise ValueError('The sweep has no learning rate; pass at least one in lrs.')
    if not 0 < holdout < 1:
        raise ValueError(f'holdout={holdout} must lie between 0 and 1; 0.1 keeps every tenth.')
    if sorted(train) != sorted(test) or not train:
        raise ValueError(
            f'train has features {sorted(train)} and test has {sorted(test)}; '
            f'extract both with the same forward.'
        )
    for name, features, labels in (('train', train, train_y), ('test', test, test_y)):
        labels = np.asarray(labels)
        if len(labels) < 2 or labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(
                f'{name} has {len(labels)} labels in {labels.min(initial=0)}..'
                f'{labels.max(initial=0)} for num_classes={num_classes}; pass two images or more '
                f'and labels in 0..num_classes-1.'
            )
        for kind, x in features.items():
            if len(x) != len(labels):
                raise ValueError(
                    f'{name} feature {kind!r} has {len(x)} rows for {len(labels)} labels; '
                    f'extract features and labels in one pass.'
                )
