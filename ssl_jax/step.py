# SPDX-License-Identifier: Apache-2.0
"""Train state, the pure step that updates it, and the compiled program of both."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ssl_jax import optim, sharding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Content of a checkpoint."""

    # int32 scalar, number of finished steps, skipped ones included; data, keys and learning rate
    # are functions of it.
    step: jax.Array
    params: Any  # float32 parameters
    opt_state: Any  # optax state
    extra: Any  # teacher, centres, ...; {} if none
    skipped: jax.Array  # int32 (2,), updates skipped as non-finite: (in a row, in total)

    @classmethod
    def create(cls, params, extra, tx):
        """The state of step 0."""
        zero = jnp.zeros((), jnp.int32)
        return cls(zero, params, tx.init(params), extra, jnp.zeros((2,), jnp.int32))


def init(method, tx, seed):
    """Returns () -> TrainState, for `jax.jit(..., out_shardings=...)` or `jax.eval_shape`.

    Weights depend on the seed only, not on mesh, devices or processes.
    """

    def create():
        params, extra = method.init(jax.random.key(seed))
        return TrainState.create(params, extra, tx)

    return create


def _microbatches(batch, accum_steps):
    """(B, ...) -> (A, B/A, ...); row r is in micro-batch r % A, so rows stay on their device."""

    def split(x):
        x = x.reshape(x.shape[0] // accum_steps, accum_steps, *x.shape[1:])
        return jnp.moveaxis(x, 1, 0)

    return jax.tree.map(split, batch)


def make_step(method, tx, schedule, *, seed, accum_steps=1):
    """Returns step(state, batch) -> (state, metrics), to be jitted with the state donated.

    Random keys are fold_in(key(seed), step), then per sample by its row in the global batch. If
    the loss or a gradient is not finite, parameters, moments and extra keep their bits; only step
    and counters change.

    Args:
      method: see `ssl_jax.methods`.
      tx: optax transformation with the values of `schedule` as extra arguments, see `optim.make`.
      schedule: step -> dict of learning rate and others, see `optim.schedule`.
      seed: of the run.
      accum_steps: micro-batches per step; gradients, metrics and changes of extra are averaged
        over them, so that extra moves once per step.
    """

    def step(state, batch):
        # +1: the key of step 0 differs from that of the initial weights.
        rng = jax.random.fold_in(jax.random.key(seed), state.step + 1)
        rows = jnp.arange(jax.tree.leaves(batch)[0].shape[0], dtype=jnp.int32)
        batch = {**batch, 'row': rows}
        grad_fn = jax.value_and_grad(method.loss, has_aux=True)

        if accum_steps == 1:
            found, grads = grad_fn(state.params, state.extra, batch, rng, state.step)
        else:

            def micro(total, part):
                found, grads = grad_fn(state.params, state.extra, part, rng, state.step)
                return jax.tree.map(jnp.add, total, grads), found

            zeros = jax.tree.map(jnp.zeros_like, state.params)
            grads, found = jax.lax.scan(micro, zeros, _microbatches(batch, accum_steps))
            grads = jax.tree.map(lambda g: g / accum_steps, grads)
            found = jax.tree.map(lambda x: x.mean(axis=0), found)
        loss, (changes, metrics) = found

        with jax.named_scope('optimizer'):  # a name for plans and profiles
            grad_norm = optim.grad_norm(grads)
            now = schedule(state.step)
            updates, opt_state = tx.update(grads, state.opt_state, state.params, **now)
            params = optax.apply_updates(state.params, updates)
            extra = method.after_update(params, {**state.extra, **changes}, state.step)

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


@dataclasses.dataclass(frozen=True)
class Program:
    """The compiled parts of a run; used by training, tests and plans."""

    mesh: jax.sharding.Mesh  # devices
    abstract: TrainState  # TrainState of `jax.ShapeDtypeStruct`s with shardings
    batch: dict  # abstract batch with shardings
    init: Callable  # () -> TrainState, jitted
    step: Callable  # (state, batch) -> (state, metrics), jitted, state donated
    groups: str  # table of the parameter groups of the optimizer


def make_program(config, method, mesh=None) -> Program:
    """Builds mesh, shardings, and the jitted init and step of `config`.

    Args:
      config: of the run.
      method: with a clock.
      mesh: replaces that of the config.
    """
    mesh = sharding.make_mesh(**config.mesh) if mesh is None else mesh
    sharding.check_batch(config.batch_size, config.accum_steps, mesh)
    params, extra = jax.eval_shape(method.init, jax.random.key(0))
    tx, groups = optim.make(config.optim, params)
    schedule = optim.schedule(config, method.clock)
    fresh = init(method, tx, config.seed)
    abstract = jax.eval_shape(lambda *x: TrainState.create(*x, tx), params, extra)
    shardings = sharding.infer(abstract, mesh)
    sharding.check_replication(abstract, shardings, mesh)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
    )
    rows = sharding.batch_sharding(mesh)
    batch = {'label': jax.ShapeDtypeStruct((config.batch_size,), jnp.int32, sharding=rows)}
    batch = batch if method.labels else {}
    batch |= {
        v.name: jax.ShapeDtypeStruct(
            (config.batch_size, v.count, v.size, v.size, 3), jnp.uint8, sharding=rows
        )
        for v in method.views()
    }
    step = make_step(method, tx, schedule, seed=config.seed, accum_steps=config.accum_steps)
    return Program(
        mesh=mesh,
        abstract=abstract,
        batch=batch,
        init=jax.jit(fresh, out_shardings=shardings),
        step=jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(shardings, rows),
            out_shardings=(shardings, sharding.replicated(mesh)),
            compiler_options=sharding.compiler_options(mesh, config.xla),
        ),
        groups=groups,
    )
