# SPDX-License-Identifier: Apache-2.0
"""Train states of random numbers, their meshes, and checkpoints of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from ssl_jax import sharding
from ssl_jax import step as step_lib
from ssl_jax.run import checkpoint

TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def make_mesh(data, fsdp):
    devices = jax.devices()[: data * fsdp]
    auto = (jax.sharding.AxisType.Auto,) * 3
    return jax.make_mesh((data, fsdp, 1), sharding.AXES, axis_types=auto, devices=devices)


def make_state(seed=0, width=64, name='head'):
    """A state whose leaves are all random, so that no two of them could be confused."""
    zeros = {
        'blocks': {'qkv': jnp.zeros((2, width, 3 * width))},
        'norm': jnp.zeros(width),
        name: jnp.zeros((width, 10), jnp.bfloat16),
    }
    state = step_lib.TrainState.create(zeros, {'teacher': zeros}, TX)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (100 * rng.normal(size=x.shape)).astype(x.dtype), state)


def shardings(state, mesh):
    def one(x):
        split = x.ndim and x.shape[-1] % mesh.shape['fsdp'] == 0
        spec = [None] * (x.ndim - 1) + ['fsdp'] if split else []
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(one, state)


def abstract(state, mesh):
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        state,
        shardings(state, mesh),
    )


def on(mesh, state):
    return jax.tree.map(jax.device_put, state, shardings(state, mesh))


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes(), jax.tree_util.keystr(path)


def save(directory, *steps, **kwargs):
    """Checkpoints in which step s holds make_state(s)."""
    saved = checkpoint.Checkpointer(directory, **kwargs)
    for step in steps:
        saved.save(step, on(make_mesh(1, 8), make_state(step)), {'config': {'name': 'test'}})
    saved.close()
    return saved


def restore(directory, mesh=None, state=None):
    saved = checkpoint.Checkpointer(directory)
    return saved.restore(abstract(state or make_state(), mesh or make_mesh(1, 8)))
