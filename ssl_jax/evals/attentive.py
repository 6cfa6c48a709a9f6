# SPDX-License-Identifier: Apache-2.0
"""Attentive probe: classification by one learned query that attends to frozen patch tokens.

  head(x) = W concat_h(sum_n softmax_n(q_h . K_h x_n / sqrt(d)) V_h x_n) + b

The head of CAPI, with d = 64 per attention head. It can pick the patches that show the object,
which a mean over patches cannot: encoders of masked image modelling gain most from it. As there is
one query, q_h K_h is a vector per head and V_h is applied to the weighted mean: the same function
with two small products instead of two on every token.

Differences from CAPI's protocol: tokens are cached as float16, so there is no augmentation; they
are standardised, so that one range of learning rates suits every encoder and raw pixels; the head
that is tested was trained without the held-out part.

References:
  Darcet et al., arXiv 2502.08769; CAPI `eval_classification.py`
"""

import dataclasses
import functools
import time
from collections.abc import Iterator
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ssl_jax.data import sources
from ssl_jax.data import stream as stream_lib
from ssl_jax.data import transform as transform_lib
from ssl_jax.evals import accuracy, features, knn, linear, task
from ssl_jax.fields import Range
from ssl_jax.run import errors, peers

NEEDS = 'label'
HEAD_DIM = 64
MAX_BYTES = 16 << 30  # of cached tokens


@dataclasses.dataclass(frozen=True)
class Settings:
    """Fields of `attentive.FIELD=VALUE`."""

    lrs: tuple = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # trained side by side
    weight_decay: Annotated[float, Range(0, 10)] = 1e-3
    epochs: Annotated[int, Range(1, 10**6)] = 20
    warmup: Annotated[float, Range(0, 1)] = 0.1  # share of the steps
    batch_size: Annotated[int, Range(1, 10**6)] = 128
    seed: int = 0


def evaluate(model: Any, data: task.Data, settings: Settings, work: task.Work) -> Iterator[dict]:
    """One row, see `task`."""
    train_source, test_source = (features.limited(x, work.limit) for x in data.split())
    sources.check_labels(train_source)
    num_classes = len(accuracy.check_classes(train_source.classes, test_source))
    train, labels = _tokens(model, train_source, work)
    if len(labels) < 2:
        raise errors.UserError('1 training image cannot be fitted and held out: give two or more.')
    fit, held = linear.split(len(labels), settings.seed)
    mean, std = _moments(train, fit)
    heads = _train(train, labels, fit, mean, std, num_classes, settings, work)
    score = functools.partial(_score, heads, mean, std, settings, work)
    top1 = 100.0 * (score(train[held], labels[held]) < 1).mean(axis=1)
    sweep = [dict(lr=r, val_top1=float(t)) for r, t in zip(settings.lrs, top1, strict=True)]
    at = min(range(len(sweep)), key=lambda i: (-sweep[i]['val_top1'], sweep[i]['lr']))
    ranks = score(*_tokens(model, test_source, work))[at]
    best = sweep[at]['lr']
    edge = len(sweep) > 1 and best in (min(settings.lrs), max(settings.lrs))
    d = train.shape[2]
    protocol = dict(
        **transform_lib.protocol(work.transform),
        normalization=f'mean {work.transform["mean"]}, std {work.transform["std"]}',
        head=f'one query, {_num_heads(d)} attention heads of {d // _num_heads(d)}, linear',
        standardised='by mean and standard deviation of the fitted tokens',
        tokens='float16, no augmentation',
        optimizer=f'AdamW (0.9, 0.999), weight decay {settings.weight_decay:g}',
        schedule=f'warm-up over {settings.warmup:g} of the steps, cosine to 0',
        lrs=list(settings.lrs),
        epochs=settings.epochs,
        batch_size=min(settings.batch_size, len(fit)),
        selection=f'rate by top-1 on {len(held)} held-out training images; the head trained on '
        f'the other {len(fit)} is tested',
        num_classes=num_classes,
        seed=settings.seed,
        limit=work.limit,
        **data.protocol(),
    )
    values = {f'top-{k}': 100.0 * float((ranks < k).mean()) for k in (1, 5)}
    yield task.row(
        'attentive', 'patch tokens', values, protocol, lr=best, at_edge=edge, sweep=sweep
    )


def _tokens(model, source, work):
    """float16 (n, N, D) and labels (n,) of the images that decode."""
    shape = jax.eval_shape(model, np.zeros((1, *[work.transform['size']] * 2, 3), np.uint8))
    _, count, d = shape['patch_tokens'].shape
    if (need := 2 * len(source) * count * d) > MAX_BYTES:
        most = MAX_BYTES // (2 * count * d)
        raise errors.UserError(
            f'the tokens of {len(source)} images need {need / 2**30:.0f} GiB of memory, more than '
            f'the {MAX_BYTES >> 30} GiB that attentive takes: use at most {most} images, --limit.'
        )

    def forward(images):
        return {'patch': model(images)['patch_tokens'].astype(jnp.float16)}

    tokens, labels, bad = [], [], []
    for batch in features.told(work.batches(forward, source), len(source), work.log):
        bad += features.left_out(batch)
        tokens.append(batch['features']['patch'][batch['mask']])
        labels.append(batch['label'][batch['mask']])
    stream_lib.say_left_out(source, bad)
    tokens, labels = np.concatenate(tokens), np.concatenate(labels)
    if not len(labels) or not np.isfinite(tokens).all():
        raise errors.UserError(
            f'The patch tokens of {source.describe(0)} ... are not finite, or none of the images '
            f'decodes: look for non-finite parameters in the checkpoint.'
        )
    return tokens, labels


def _moments(tokens, rows):
    """Mean and standard deviation (D,) of the tokens of some images."""
    n = len(rows) * tokens.shape[1]
    parts = np.array_split(rows, -(-len(rows) // 64))
    mean = sum(tokens[p].sum(axis=(0, 1), dtype=np.float64) for p in parts) / n
    var = sum(np.square(tokens[p] - mean).sum(axis=(0, 1)) for p in parts) / n
    return mean.astype(np.float32), np.sqrt(np.where(var > 0, var, 1)).astype(np.float32)


def _num_heads(d):
    """Heads of HEAD_DIM channels, or wider ones where they do not divide."""
    return next(h for h in range(max(1, d // HEAD_DIM), 0, -1) if d % h == 0)


def init(rng: jax.Array, d: int, num_classes: int) -> dict[str, jax.Array]:
    """Parameters of one head: truncated normal with 0.02, no bias on the keys, it cancels."""
    shapes = dict(query=(d,), key=(d, d), value=(d, d), kernel=(d, num_classes))
    draw = jax.nn.initializers.truncated_normal(0.02, lower=-100.0, upper=100.0)
    keys = jax.random.split(rng, len(shapes))
    params = {name: draw(key, shapes[name]) for name, key in zip(shapes, keys, strict=True)}
    return dict(params, value_bias=jnp.zeros(d), bias=jnp.zeros(num_classes))


def apply(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """Logits (B, num_classes) of tokens (B, N, D), see the top of this file."""
    b, _, d = x.shape
    h = _num_heads(d)
    heads = lambda name: params[name].reshape(d, h, d // h)  # noqa: E731
    query = params['query'].reshape(h, d // h)
    query = jnp.einsum('dhc,hc->hd', heads('key'), query, precision='highest')
    scores = jnp.einsum('bnd,hd->bhn', x, query, precision='highest') / (d // h) ** 0.5
    pooled = jnp.einsum('bhn,bnd->bhd', jax.nn.softmax(scores), x, precision='highest')
    pooled = jnp.einsum('bhd,dhc->bhc', pooled, heads('value'), precision='highest')
    pooled = pooled.reshape(b, d) + params['value_bias']
    return jnp.dot(pooled, params['kernel'], precision='highest') + params['bias']


@jax.jit
def _all(heads, x, mean, std):
    """Logits (L, B, num_classes) of all heads."""
    x = (x.astype(jnp.float32) - mean) / std
    return jax.vmap(apply, in_axes=(0, None))(heads, x)


def _put(work, *arrays):
    """A batch split over the devices, filled up with zeros."""
    return [knn.put_rows(x, work.mesh) for x in arrays]


def _train(tokens, labels, rows, mean, std, num_classes, settings, work):
    """One head per learning rate, leading axis L; a function of the arguments alone."""
    batch = min(settings.batch_size, len(rows))
    total = settings.epochs * (len(rows) // batch)
    warmup = round(settings.warmup * total)
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, warmup, max(total, warmup + 1))
    tx = optax.adamw(1.0, weight_decay=settings.weight_decay)
    lrs = jnp.asarray(settings.lrs, jnp.float32)

    @jax.jit
    def step(heads, state, index, x, y, share):
        def loss(heads):
            losses = optax.softmax_cross_entropy_with_integer_labels(
                _all(heads, x, mean, std), jnp.broadcast_to(y, (len(lrs), len(y)))
            )
            return (losses * share).sum()  # the heads share no parameter

        updates, state = jax.vmap(tx.update)(jax.grad(loss)(heads), state, heads)
        rate = lrs * schedule(index)
        heads = jax.tree.map(
            lambda p, u: p + rate.reshape(-1, *[1] * (u.ndim - 1)) * u, heads, updates
        )
        return jax.lax.with_sharding_constraint((heads, state), NamedSharding(work.mesh, P()))

    # One draw for all rates: the rows of a sweep differ in nothing but the rate.
    head = init(jax.random.key(settings.seed), tokens.shape[2], num_classes)
    heads = jax.tree.map(lambda p: jnp.broadcast_to(p, (len(lrs), *p.shape)), head)
    heads = jax.device_put(heads, NamedSharding(work.mesh, P()))
    state = jax.vmap(tx.init)(heads)
    start, index = time.monotonic(), 0
    said = start
    share = np.full(batch, 1 / batch, np.float32)
    for epoch in range(settings.epochs):
        order = np.random.default_rng((settings.seed, epoch)).permutation(rows)
        for some in order[: len(rows) // batch * batch].reshape(-1, batch):
            peers.progress()
            x, y, s = _put(work, tokens[some], labels[some].astype(np.int32), share)
            heads, state = step(heads, state, index, x, y, s)
            index += 1
        jax.block_until_ready(heads)
        now = time.monotonic()
        if now - said > 20:
            said, left = now, (now - start) / index * (total - index)
            work.log(f'attentive: epoch {epoch + 1} of {settings.epochs}, {left:.0f} s left')
    return heads


def _score(heads, mean, std, settings, work, tokens, labels):
    """(L, n): number of classes that score above the true one, for each head."""
    batch, ranks = min(settings.batch_size, len(labels)), []
    filled = np.resize(np.arange(len(labels)), -(-len(labels) // batch) * batch)
    for some in filled.reshape(-1, batch):
        peers.progress()
        x, y = _put(work, tokens[some], labels[some].astype(np.int32))
        ranks.append(np.asarray(_ranks(heads, x, y, mean, std, mesh=work.mesh))[:, :batch])
    return np.concatenate(ranks, axis=1)[:, : len(labels)]


@functools.partial(jax.jit, static_argnames='mesh')
def _ranks(heads, x, y, mean, std, *, mesh):
    ranks = accuracy.ranks(_all(heads, x, mean, std), y)
    return jax.lax.with_sharding_constraint(ranks, NamedSharding(mesh, P()))
