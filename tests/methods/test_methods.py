# SPDX-License-Identifier: Apache-2.0
"""What every method and every recipe owes the loop; new ones are found by themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax import config as config_lib
from ssl_jax import methods, optim, sharding
from ssl_jax import step as step_lib
from ssl_jax.run import clock as clock_lib

# The smallest recipe of each method: change only sizes here.
SHRINK = ('method.embed_dim=32', 'method.depth=2', 'method.num_heads=2', 'batch_size=16')
SHRINK_MORE = {  # what no recipe for rendered scenes has in small
    'dinov2_vitb14_distill': (
        *('method.teacher_size=None', 'method.teacher_embed_dim=48', 'method.teacher_depth=2'),
        *('method.teacher_num_heads=2', 'method.img_size=56', 'method.local_size=28'),
        *('method.n_local_crops=2', 'method.dino_out_dim=64', 'method.ibot_out_dim=64'),
        *('method.dino_bottleneck_dim=16', 'method.ibot_bottleneck_dim=16'),
        *('method.head_hidden_dim=32', 'method.layer_scale=1.0', 'method.group_size=2'),
        *('method.jitter_prob=0', 'method.blur=none', 'dtype=float32'),
    )
}
RECIPES = [r for r in config_lib.recipes() if not config_lib.load(r).infer]
SMALL = [r for r in RECIPES if 'scenes' in r or r in SHRINK_MORE]
# Tracing takes seconds each: one recipe of every kind here, all others among the slow tests.
FIRST = ('mae_vitb16', 'pixio_vit5b16', 'dinov2_vitl16_short', 'dino_vits16', 'splitmask_vitb16')
FIRST += ('dinov2_vitb14_distill', 'pixio_vitl16_distill', 'beit_vitb16')
FIRST += tuple(r for r in SMALL if r != 'scenes_dinov3')  # `test_dinov3` traces it in small
FIRST += ('finetune_mae_vitb16', 'finetune_beit_vitb16')
EVERY = [r if r in FIRST else pytest.param(r, marks=pytest.mark.slow) for r in RECIPES]
# Their methods share most with others of SMALL.
LONG = ('scenes_distill', 'scenes_beit', 'scenes_pixio', 'dinov2_vitb14_distill', 'scenes_dinov3')
MOST = [pytest.param(r, marks=pytest.mark.slow) if r in LONG else r for r in SMALL]
# The photometry of crops compiles for long; the others are MAE's and I-JEPA's kind of program.
HEAVY = ('scenes_dinov2', 'scenes_lejepa', 'scenes_ijepa', 'scenes_qb_heat')
FEW = [pytest.param(r, marks=pytest.mark.slow) if r in HEAVY else r for r in MOST]
CLOCK = clock_lib.Clock(total=1000, warmup=1, batch_size=16, num_examples=16_000)


def shrunk(recipe):
    config = config_lib.load(recipe, (*SHRINK, *SHRINK_MORE.get(recipe, ())))
    if config.optim.warm_freeze:
        config_lib.set_value(config, 'optim.warm_freeze_steps=5')
    return config


def batch(config, method):
    rng = np.random.default_rng(0)
    size = config.batch_size
    images = {
        v.name: rng.integers(0, 256, (size, v.count, v.size, v.size, 3)).astype(np.uint8)
        for v in method.views()
    }
    labels = {'label': rng.integers(0, method.num_classes, size)} if method.labels else {}
    return images | labels


def test_every_method_has_a_small_recipe():
    assert {config_lib.load(r).method.name for r in SMALL} == set(methods.names())


@pytest.mark.parametrize('recipe', FEW)
def test_the_loss_of_a_repeated_batch_falls_on_eight_devices(recipe):
    config = shrunk(recipe)
    method = methods.make(config, CLOCK)
    mesh = sharding.make_mesh(data=2, fsdp=4)
    program = step_lib.make_program(config, method, mesh)
    data = sharding.to_global(batch(config, method), mesh, np.arange(16), 16)
    with jax.set_mesh(mesh):
        state, losses = program.init(), []
        for _ in range(12):
            state, m = program.step(state, data)
            losses.append(float(m['loss']))
    assert np.isfinite(losses).all()
    assert np.mean(losses[-3:]) < losses[0]


@pytest.mark.parametrize('recipe', MOST)
def test_no_gradient_reaches_extra(recipe):
    config = shrunk(recipe)
    method = methods.make(config, CLOCK)
    _, extra = jax.eval_shape(method.init, jax.random.key(0))
    if not any(jnp.issubdtype(x.dtype, jnp.floating) for x in jax.tree.leaves(extra)):
        return  # nothing that a gradient could reach
    params, extra = method.init(jax.random.key(0))
    data = {**batch(config, method), 'row': np.arange(16)}
    loss = jax.jit(lambda e: method.loss(params, e, data, jax.random.key(1), 0)[0])
    grads = jax.grad(loss)(extra)
    assert all(not np.any(g) for g in jax.tree.leaves(grads))


@pytest.mark.parametrize('recipe', EVERY)
def test_every_recipe_traces_at_full_size(recipe):
    """Shapes, types and the length of the schedule fit; nothing is computed."""
    config = config_lib.load(recipe)
    method = methods.make(config, clock_lib.Clock.of(config, num_examples=1_000_000))
    params, _ = jax.eval_shape(method.init, jax.random.key(0))
    tx, groups = optim.make(config.optim, params)
    state = jax.eval_shape(step_lib.init(method, tx, config.seed))
    accum = config.accum_steps
    schedule = optim.schedule(config, method.clock)
    step = step_lib.make_step(method, tx, schedule, seed=0, accum_steps=accum)
    size = config.batch_size
    data = {
        v.name: jax.ShapeDtypeStruct((size, v.count, v.size, v.size, 3), jnp.uint8)
        for v in method.views()
    }
    if method.labels:
        data['label'] = jax.ShapeDtypeStruct((size,), jnp.int32)
    after, metrics = jax.eval_shape(step, state, data)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), state
    )
    assert metrics['loss'].shape == () and metrics['loss'].dtype == jnp.float32
    assert method.flops(size) > 0 and 'decay' in groups


@pytest.mark.parametrize('recipe', EVERY)
def test_every_recipe_shards_over_fsdp_with_little_replicated(recipe):
    config = config_lib.load(recipe)
    method = methods.make(config)
    params, _ = jax.eval_shape(method.init, jax.random.key(0))
    mesh = sharding.make_mesh(data=1, fsdp=8)
    assert sharding.replicated_fraction(params, sharding.infer(params, mesh), mesh) < 0.03


def test_an_unknown_method_is_one_sentence_with_the_nearest_name():
    config = config_lib.default()
    config.method.name = 'mea'
    with pytest.raises(ValueError, match="'mea' is unknown: did you mean 'mae'"):
        methods.make(config)
