# SPDX-License-Identifier: Apache-2.0
"""The training state and the one pure step that advances it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ssl_jax import optim


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a checkpoint holds.

    Attributes:
      step: int32 scalar, number of steps done, skipped ones included: data, keys and learning
        rate are functions of it.
      params: float32 parameters.  opt_state: optax state.  extra: teacher, centres; {} if none.
      skipped: int32 (2,), updates skipped as non-finite: (in a row, in total).
    """

    step: jax.Array
    params: Any
    opt_state: Any
    extra: Any
    skipped: jax.Array

    @classmethod
    def create(cls, params, extra, tx):
        """A fresh state around `params`."""
        zero = jnp.zeros((), jnp.int32)
        return cls(zero, params, tx.init(params), extra, jnp.zeros((2,), jnp.int32))


def init(method, tx, seed):
    """A function () -> TrainState for `jax.jit(..., out_shardings=...)` or `jax.eval_shape`.

    Weights depend on the seed alone: not on the mesh, the devices or the processes.
    """

    def create():
        params, extra = method.init(jax.random.key(seed))
        return TrainState.create(params, extra, tx)

    return create


def _microbatches(batch, accum_steps):
    """(B, ...) -> (A, B/A, ...); row r goes to micro-batch r % A, so no device sends its rows."""

    def split(x):
        x = x.reshape(x.shape[0] // accum_steps, accum_steps, *x.shape[1:])
        return jnp.moveaxis(x, 1, 0)

    return jax.tree.map(split, batch)


def make_step(method, tx, schedule, *, seed, accum_steps=1):
    """Builds step(state, batch) -> (state, metrics), to be jitted with the state donated.

    All randomness is fold_in(key(seed), step), then per sample by its row in the global batch.
    A non-finite loss or gradient leaves parameters, moments and extra untouched, bit by bit; only
    the step and the counters move.

    Args:
      method: see `ssl_jax.methods`.
      tx: optax transformation that takes what `schedule` gives, see `optim.make`.
      schedule: step -> dict of learning rate and the like, see `optim.schedule`.
      accum_steps: micro-batches per step; gradients are averaged over them.
    """

    def step(state, batch):
        # +1 keeps the keys of the steps apart from the key that made the weights.
        rng = jax.random.fold_in(jax.random.key(seed), state.step + 1)
        rows = jnp.arange(jax.tree.leaves(batch)[0].shape[0], dtype=jnp.int32)
        batch = {**batch, 'row': rows}
        grad_fn = jax.value_and_grad(method.loss, has_aux=True)

        if accum_steps == 1:
            (loss, (extra, metrics)), grads = grad_fn(
                state.params, state.extra, batch, rng, state.step
            )
        else:

            def micro(carry, part):
                extra, total = carry
                (loss, (extra, metrics)), grads = grad_fn(
                    state.params, extra, part, rng, state.step
                )
                return (extra, jax.tree.map(jnp.add, total, grads)), (loss, metrics)

            zeros = jax.tree.map(jnp.zeros_like, state.params)
            (extra, grads), (loss, metrics) = jax.lax.scan(
                micro, (state.extra, zeros), _microbatches(batch, accum_steps)
            )
            grads = jax.tree.map(lambda g: g / accum_steps, grads)
            loss, metrics = jax.tree.map(lambda x: x.mean(axis=0), (loss, metrics))

        with jax.named_scope('optimizer'):  # so that plans and profiles can tell it apart
            grad_norm = optim.grad_norm(grads)
            now = schedule(state.step)
            updates, opt_state = tx.update(grads, state.opt_state, state.params, **now)
            params = optax.apply_updates(state.params, updates)
            extra = method.after_update(params, extra, state.step)

            finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
            old = (state.params, state.opt_state, state.extra)
            params, opt_state, extra = jax.tree.map(
                lambda new, old: jnp.where(finite, new, old), (params, opt_state, extra), old
            )
        in_a_row, total = state.skipped
        skipped = jnp.where(finite, jnp.stack([jnp.zeros_like(in_a_row), total]), state.skipped + 1)
        metrics = {
            **metrics,
            'loss': loss,
            'lr': jnp.asarray(now['lr'], jnp.float32),
            'grad_norm': grad_norm,
            **{f'grad_norm/{name}': optim.grad_norm(tree) for name, tree in grads.items()},
            'skipped_in_a_row': skipped[0],
            'skipped_total': skipped[1],
        }
        return TrainState(state.step + 1, params, opt_state, extra, skipped), metrics

    return step
