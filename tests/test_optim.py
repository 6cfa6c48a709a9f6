# SPDX-License-Identifier: Apache-2.0
"""Schedules, parameter groups and updates behave as the official codes do."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssl_jax import config, optim
from ssl_jax.run import clock as clock_lib

DEPTH, WIDTH = 3, 8


def tree(seed=0):
    """An encoder with stacked blocks and a decoder, leaves drawn from `seed`."""
    rng = np.random.default_rng(seed)

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        'encoder': {
            'cls_token': array(1, 1, WIDTH),
            'pos_embed': array(1, 5, WIDTH),
            'patch_embed': {'proj': {'kernel': array(12, WIDTH), 'bias': array(WIDTH)}},
            'blocks': {
                'norm1': {'scale': array(DEPTH, WIDTH), 'bias': array(DEPTH, WIDTH)},
                'mlp': {'fc1': {'kernel': array(DEPTH, WIDTH, 16), 'bias': array(DEPTH, 16)}},
            },
            'norm': {'scale': array(WIDTH), 'bias': array(WIDTH)},
        },
        'decoder': {
            'mask_token': array(1, 1, 4),
            'decoder_blocks': {'ls1': {'gamma': array(2, 4)}, 'fc': {'kernel': array(2, 4, 4)}},
        },
    }


def settings(**changes):
    c = config.default().optim
    with c.ignore_type():
        c.update(changes)
    return c


def flat(values):
    paths = jax.tree_util.tree_leaves_with_path(values)
    return {'/'.join(k.key for k in path): value for path, value in paths}


def run(c, params, grads, lrs):
    tx, _ = optim.make(c, params)
    state = tx.init(params)
    wd = c.weight_decay
    update = jax.jit(lambda g, s, p, lr: tx.update(g, s, p, lr=lr, weight_decay=wd))
    for grad, lr in zip(grads, lrs, strict=True):
        updates, state = update(grad, state, params, jnp.float32(lr))
        params = optax.apply_updates(params, updates)
    return params, state


# Schedules


@pytest.mark.parametrize(
    ('epoch', 'lr', 'tolerance'),
    [(0, 0, 0), (1, 6e-5, 1e-12), (20, 1.2e-3, 1e-12), (40, 2.4e-3, 1e-12), (420, 1.2e-3, 1e-12),
     (799, 1.03e-8, 0.01e-8)],
)  # fmt: skip
def test_schedule_gives_the_rates_of_the_800_epoch_recipe(epoch, lr, tolerance):
    schedule = optim.lr_schedule(2.4e-3, total_steps=800 * 312, warmup_steps=40 * 312)
    assert abs(schedule(epoch * 312) - lr) <= tolerance


@pytest.mark.parametrize(
    ('epoch', 'mean'),
    [(0, 7.974358974358974e-05), (14, 0.0023197435897435886), (274, 4.710730622788812e-05),
     (289, 8.037363382341063e-06)],
)  # fmt: skip
def test_schedule_reproduces_the_epoch_means_of_a_published_official_log(epoch, mean):
    schedule = optim.lr_schedule(2.4e-3, total_steps=300 * 312, warmup_steps=15 * 312)
    rates = schedule(np.arange(epoch * 312, (epoch + 1) * 312))
    np.testing.assert_allclose(rates.mean(), mean, rtol=1e-12)


def test_schedule_keeps_its_relative_precision_in_float32_up_to_the_last_step():
    schedule = optim.lr_schedule(8e-4, total_steps=1_284_000, warmup_steps=128_400)
    last = np.arange(1_284_000 - 2000, 1_284_000)
    rates = jax.jit(schedule)(jnp.asarray(last, jnp.int32))
    assert rates.dtype == jnp.float32
    np.testing.assert_allclose(rates, schedule(last), rtol=1e-6)


def test_schedule_ends_at_the_minimum_and_stays_there():
    schedule = optim.lr_schedule(1.0, total_steps=10, warmup_steps=2, min_lr=0.1)
    np.testing.assert_allclose(schedule(np.array([10, 11, 100])), 0.1)


def test_schedule_without_warm_up_starts_at_the_peak():
    assert optim.lr_schedule(0.5, total_steps=10)(0) == 0.5
    assert float(jax.jit(optim.lr_schedule(0.5, total_steps=10))(jnp.int32(0))) == 0.5


def test_warm_up_as_long_as_the_run_is_refused():
    with pytest.raises(ValueError, match='warmup_steps=10 does not end before total_steps=10'):
        optim.lr_schedule(1.0, total_steps=10, warmup_steps=10)


def test_peak_follows_the_linear_rule_and_says_so():
    lr, rule = optim.scaled_lr(settings(base_lr=1.5e-4), batch_size=4096)
    assert lr == pytest.approx(2.4e-3)
    assert rule == 'lr 0.0024 = base_lr 0.00015 x batch 4096 / 256'


def test_absolute_peak_is_not_scaled():
    lr, rule = optim.scaled_lr(settings(lr=0.1), batch_size=4096)
    assert lr == 0.1
    assert 'not scaled' in rule


# Groups


def test_biases_and_one_dimensional_parameters_of_a_stack_do_not_decay():
    decays = flat(optim.decays(tree()))
    assert {path for path, decay in decays.items() if decay} == {
        'encoder/cls_token',
        'encoder/pos_embed',
        'encoder/patch_embed/proj/kernel',
        'encoder/blocks/mlp/fc1/kernel',
        'decoder/mask_token',
        'decoder/decoder_blocks/fc/kernel',
    }


def test_tables_of_relative_positions_decay():
    blocks = {'attn': {'rel_pos_bias': jnp.ones((2, 12, 4)), 'qkv': {'q_bias': jnp.ones((2, 8))}}}
    found = optim.decays({'encoder': {'blocks': blocks, 'rel_pos_bias': jnp.ones((12, 4))}})
    assert found['encoder']['rel_pos_bias'] and found['encoder']['blocks']['attn']['rel_pos_bias']
    assert not found['encoder']['blocks']['attn']['qkv']['q_bias']


def test_no_decay_exempts_what_its_regexes_match():
    decays = flat(optim.decays(tree(), no_decay=('cls_token$', 'pos_embed$')))
    assert not decays['encoder/cls_token']
    assert not decays['encoder/pos_embed']
    assert decays['decoder/mask_token']


def test_layer_decay_is_a_vector_along_the_stack():
    factors = flat(optim.lr_multipliers(tree(), layer_decay=0.5))
    assert factors['encoder/blocks/mlp/fc1/kernel'].shape == (DEPTH, 1, 1)
    assert factors['encoder/blocks/norm1/scale'].shape == (DEPTH, 1)
    np.testing.assert_array_equal(factors['encoder/blocks/norm1/scale'][:, 0], [0.125, 0.25, 0.5])


def test_layer_decay_is_smallest_below_the_blocks_and_one_after_them():
    factors = flat(optim.lr_multipliers(tree(), layer_decay=0.5))
    for bottom in ('cls_token', 'pos_embed', 'patch_embed/proj/kernel', 'patch_embed/proj/bias'):
        assert factors[f'encoder/{bottom}'] == 0.5**4
    for top in ('encoder/norm/scale', 'decoder/mask_token', 'decoder/decoder_blocks/fc/kernel'):
        assert factors[top] == 1


def test_lr_mult_multiplies_all_matches_and_layer_decay():
    mult = (('patch_embed', 0.2), ('bias$', 3.0))
    factors = flat(optim.lr_multipliers(tree(), layer_decay=0.5, lr_mult=mult))
    assert factors['encoder/patch_embed/proj/kernel'] == np.float32(0.2 * 0.5**4)
    assert factors['encoder/patch_embed/proj/bias'] == np.float32(0.6 * 0.5**4)
    assert factors['encoder/norm/bias'] == 3


def test_layer_decay_without_blocks_is_refused():
    with pytest.raises(ValueError, match='needs stacked blocks'):
        optim.lr_multipliers({'head': jnp.ones((2, 2))}, layer_decay=0.5)


def test_groups_are_the_same_for_arrays_and_for_their_shapes():
    shapes = jax.eval_shape(tree)
    c = settings(layer_decay=0.5)
    assert optim.make(c, shapes)[1] == optim.make(c, tree())[1]


def test_table_lists_every_group_with_its_number_of_parameters():
    _, table = optim.make(settings(freeze=('^decoder/',)), tree())
    rows = [line.split() for line in table.splitlines()[1:]]
    counts = {tuple(row[:2]): int(row[3].replace(',', '')) for row in rows}
    assert counts[('frozen', '-')] == 4 + 8 + 32
    assert counts[('1', '0')] == 3 * WIDTH + 2 * DEPTH * WIDTH + DEPTH * 16
    assert sum(counts.values()) == sum(x.size for x in jax.tree.leaves(tree()))


# Updates


def test_adamw_equals_torch_with_the_same_groups():
    torch = pytest.importorskip('torch', reason='the oracle of this test is torch')
    params, grads = tree(0), [tree(seed) for seed in range(1, 7)]
    lrs = [0.0, 1e-3, 3e-2, 1e-2, 5e-3, 1e-3]
    c = settings(weight_decay=0.3, lr_mult=(('norm', 0.5),))

    decays = flat(optim.decays(params))
    tensors = {k: torch.tensor(np.array(v), requires_grad=True) for k, v in flat(params).items()}
    groups = [
        {'params': [t], 'weight_decay': 0.3 * decays[k], 'factor': 0.5 if 'norm' in k else 1.0}
        for k, t in tensors.items()
    ]
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=(c.b1, c.b2), eps=c.eps)
    for grad, lr in zip(grads, lrs, strict=True):
        for k, g in flat(grad).items():
            tensors[k].grad = torch.tensor(np.array(g))
        for group in adamw.param_groups:
            group['lr'] = lr * group['factor']
        adamw.step()

    ours, _ = run(c, params, grads, lrs)
    for k, value in flat(ours).items():
        np.testing.assert_allclose(value, tensors[k].detach().numpy(), rtol=2e-6, atol=2e-6)


def test_clipping_equals_torch():
    torch = pytest.importorskip('torch', reason='the oracle of this test is torch')
    grads = tree(3)
    tensors = {k: torch.zeros(v.shape, requires_grad=True) for k, v in flat(grads).items()}
    for k, t in tensors.items():
        t.grad = torch.tensor(np.array(flat(grads)[k]))
    norm = torch.nn.utils.clip_grad_norm_(tensors.values(), 0.7)
    clipped, _ = optim.clip_by_norm(0.7).update(grads, optax.EmptyState())
    assert float(optim.grad_norm(grads)) == pytest.approx(float(norm), rel=1e-6)
    for k, value in flat(clipped).items():
        np.testing.assert_allclose(value, tensors[k].grad.numpy(), rtol=1e-5, atol=1e-8)


def test_clipping_leaves_small_gradients_as_they_are():
    grads = tree(3)
    same, _ = optim.clip_by_norm(1e6).update(grads, optax.EmptyState())
    for a, b in zip(jax.tree.leaves(same), jax.tree.leaves(grads), strict=True):
        np.testing.assert_array_equal(a, b)


def test_clip_is_part_of_the_optimizer():
    huge = jax.tree.map(lambda g: 1e3 * g, tree(1))
    clipped, _ = optim.clip_by_norm(0.1).update(huge, optax.EmptyState())
    # Large eps, for Adam hides the scale of its gradients otherwise.
    with_clip, _ = run(settings(clip=0.1, eps=1.0), tree(), [huge], [1.0])
    by_hand, _ = run(settings(eps=1.0), tree(), [clipped], [1.0])
    without, _ = run(settings(eps=1.0), tree(), [huge], [1.0])
    np.testing.assert_array_equal(
        with_clip['encoder']['cls_token'], by_hand['encoder']['cls_token']
    )
    assert np.abs(with_clip['encoder']['cls_token'] - without['encoder']['cls_token']).max() > 0.1


def test_frozen_parameters_keep_every_bit_and_have_no_moments():
    c = settings(freeze=('^encoder/',), weight_decay=0.5)
    params, state = run(c, tree(), [tree(1), tree(2)], [0.1, 0.1])
    before = flat(tree())
    for path, value in flat(params).items():
        same = np.array_equal(
            np.asarray(value).view(np.int32), np.asarray(before[path]).view(np.int32)
        )
        assert same == path.startswith('encoder/'), path
    moments = sum(x.size for x in jax.tree.leaves(state))
    trained = sum(x.size for k, x in before.items() if k.startswith('decoder/'))
    assert moments == 2 * trained + 1


def test_frozen_gradients_do_not_count_for_the_clipping_norm():
    grads = tree(1)
    grads['encoder'] = jax.tree.map(lambda g: 1e6 * g, grads['encoder'])
    c = dict(freeze=('^encoder/',), eps=1.0)
    clipped, _ = run(settings(clip=1e3, **c), tree(), [grads], [1.0])
    free, _ = run(settings(**c), tree(), [grads], [1.0])
    np.testing.assert_array_equal(clipped['decoder']['mask_token'], free['decoder']['mask_token'])


def test_freezing_everything_is_refused():
    with pytest.raises(ValueError, match='freezes every parameter'):
        optim.make(settings(freeze=('',)), tree())


def warm_run(c, grads, start=0, params=None, state=None, steps=2):
    """Steps start, start + 1, ... of a run whose encoder has rate 0 for `steps` steps."""
    params = tree() if params is None else params
    tx, _ = optim.make(c, params)
    state = tx.init(params) if state is None else state
    rest = dict(lr=0.1, weight_decay=c.weight_decay)
    update = jax.jit(lambda g, s, p, step: tx.update(g, s, p, warm=step < steps, **rest))
    for step, grad in enumerate(grads, start):
        updates, state = update(grad, state, params, jnp.int32(step))
        params = optax.apply_updates(params, updates)
    assert update._cache_size() == 1, 'the switch compiled something'
    return params, state


WARM = dict(warm_freeze=('^encoder/',), weight_decay=0.5)


@pytest.mark.parametrize('moments', [True, False])
def test_warm_frozen_parameters_stand_still_to_the_bit_and_then_move(moments):
    c, start = settings(warm_freeze_moments=moments, **WARM), tree()
    start['encoder']['norm']['bias'] = start['encoder']['norm']['bias'].at[0].set(-0.0)
    after, state = warm_run(c, [tree(1), tree(2)], params=start)
    for path, value in flat(after).items():
        same = np.asarray(value).tobytes() == np.asarray(flat(start)[path]).tobytes()
        assert same == path.startswith('encoder/'), path
    after, state = warm_run(c, [tree(3)], 2, after, state)
    for path, value in flat(after).items():
        assert np.asarray(value).tobytes() != np.asarray(flat(start)[path]).tobytes(), path


def test_moments_of_warm_frozen_parameters_go_on_as_in_dinov2():
    """The first steps afterwards are those of a run in which the rate was 0 until then."""
    grads = [tree(k) for k in range(1, 6)]
    thawed, _ = warm_run(settings(**WARM), grads)
    same, _ = run(settings(weight_decay=0.5), tree(), grads, [0.0, 0.0, 0.1, 0.1, 0.1])
    assert_same(thawed['encoder'], same['encoder'])
    whole, _ = run(settings(weight_decay=0.5), tree(), grads, [0.1] * 5)
    assert_same(thawed['decoder'], whole['decoder'])


def assert_same(a, b):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=1e-6, err_msg=jax.tree_util.keystr(path))


WAIT = dict(warm_freeze_moments=False, **WARM)


def test_moments_can_wait_as_well_and_the_first_steps_are_those_of_a_fresh_optimizer():
    grads = [tree(k) for k in range(1, 6)]
    _, state = warm_run(settings(**WAIT), grads[:2])
    late = [x for k, x in jax.tree_util.tree_leaves_with_path(state) if 'encoder' in str(k)]
    assert late and not any(np.any(x) for x in late)
    thawed, _ = warm_run(settings(**WAIT), grads)
    fresh, _ = run(settings(weight_decay=0.5), tree(), grads[2:], [0.1] * 3)
    assert_same(thawed['encoder'], fresh['encoder'])
    whole, _ = run(settings(weight_decay=0.5), tree(), grads, [0.1] * 5)
    assert_same(thawed['decoder'], whole['decoder'])


def test_gradients_of_waiting_parameters_do_not_count_for_the_clipping_norm():
    grads = tree(1)
    grads['encoder'] = jax.tree.map(lambda g: 1e6 * g, grads['encoder'])
    clipped, _ = warm_run(settings(clip=1e3, eps=1.0, **WAIT), [grads])
    free, _ = warm_run(settings(eps=1.0, **WAIT), [grads])
    np.testing.assert_array_equal(clipped['decoder']['mask_token'], free['decoder']['mask_token'])


def test_table_says_which_groups_train_later():
    _, table = optim.make(settings(warm_freeze=('^encoder/',)), tree())
    trains = {'encoder' in line: '1 later ' in line for line in table.splitlines()[1:]}
    assert trains == {True: True, False: False}


def test_weight_decay_moves_along_half_a_cosine():
    c = config.default()
    c.update(total_steps=100, warmup_steps=10)
    c.optim.update(weight_decay=0.04, weight_decay_end=0.4)
    values = optim.schedule(c, clock_lib.Clock.of(c))
    np.testing.assert_allclose(
        [values(s)['weight_decay'] for s in (0, 50, 100)], [0.04, 0.22, 0.4], rtol=1e-9
    )


def test_the_official_dinov2_schedules_have_their_published_values():
    """Spec section 6.2: vitl16_short at 2048 images."""
    lr = optim.cosine(4e-3 * 2**0.5, 1e-6, 125_000, 12_500)
    want = {1: 4.52584547e-07, 1250: 5.65730683e-4, 12499: 0.00565685425, 62500: 0.00331999152}
    np.testing.assert_allclose([lr(s) for s in want], list(want.values()), rtol=1e-8)
    assert lr(12_499) == pytest.approx(lr(12_500))
    temp = optim.linear(0.04, 0.07, 37_500)
    assert float(temp(12_500)) == pytest.approx(0.0500002667) and temp(10**6) == 0.07


@pytest.mark.parametrize('by', ['network', 'tensor'])
def test_each_network_or_tensor_is_clipped_by_its_own_norm(by):
    grads = tree(1)
    grads['encoder'] = jax.tree.map(lambda g: 1e3 * g, grads['encoder'])
    clipped, _ = optim.clip_by_norm(0.5, by).update(grads, optax.EmptyState())
    parts = clipped.values()
    if by == 'tensor':
        kernel = clipped['decoder']['decoder_blocks']['fc']['kernel']  # a tensor per block
        parts = [*kernel, clipped['encoder']['cls_token'], clipped['decoder']['mask_token']]
    np.testing.assert_allclose([float(optim.grad_norm(p)) for p in parts], 0.5, rtol=1e-5)


@pytest.mark.parametrize(
    ('freeze', 'warm', 'says'),
    [
        ((), ('^encodr',), "warm_freeze=('^encodr',) matches no parameter that trains"),
        ((), ('coder',), "warm_freeze=('coder',) matches every parameter that trains"),
        (('^decoder',), ('^encoder',), 'matches every parameter that trains'),
        (('^encoder',), ('^encoder',), 'matches no parameter that trains'),
    ],
)
def test_a_warm_freeze_of_nothing_or_everything_is_refused(freeze, warm, says):
    with pytest.raises(ValueError) as error:
        optim.make(settings(freeze=freeze, warm_freeze=warm), tree())
    assert says in str(error.value) and 'begin with decoder, encoder' in str(error.value)


@pytest.mark.parametrize('warm', [WARM, dict(WARM, warm_freeze_moments=False)])
def test_warm_freeze_and_freeze_go_together(warm):
    c = settings(freeze=('cls_token',), **warm)
    after, _ = warm_run(c, [tree(k) for k in range(1, 4)])
    same = {k for k, v in flat(after).items() if np.array_equal(v, flat(tree())[k])}
    assert same == {'encoder/cls_token'}


def test_a_step_with_rate_zero_moves_moments_but_not_parameters():
    params, state = run(settings(), tree(), [tree(1)], [0.0])
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(tree()), strict=True):
        np.testing.assert_array_equal(a, b)
    adam = state.inner_state[1]
    assert int(adam.count) == 1
    assert float(optim.grad_norm(adam.mu)) > 0


def test_moments_are_float32_whatever_the_gradients_are():
    tx, _ = optim.make(settings(), tree())
    params = tree()
    grads = jax.tree.map(lambda g: g.astype(jnp.bfloat16), tree(1))
    _, state = tx.update(grads, tx.init(params), params, lr=0.1, weight_decay=0.0)
    adam = state.inner_state[1]
    assert {x.dtype for x in jax.tree.leaves((adam.mu, adam.nu))} == {jnp.dtype('float32')}


def test_layer_decay_scales_the_update_of_each_block():
    plain, _ = run(settings(weight_decay=0.1), tree(), [tree(1)], [0.1])
    decayed, _ = run(settings(weight_decay=0.1, layer_decay=0.5), tree(), [tree(1)], [0.1])
    start = flat(tree())['encoder/blocks/mlp/fc1/kernel']
    whole = flat(plain)['encoder/blocks/mlp/fc1/kernel'] - start
    scaled = flat(decayed)['encoder/blocks/mlp/fc1/kernel'] - start
    for k, factor in enumerate((0.125, 0.25, 0.5)):
        np.testing.assert_allclose(scaled[k], factor * whole[k], atol=1e-6)


def test_grad_norm_is_the_norm_of_all_leaves_together():
    assert float(optim.grad_norm({'a': jnp.array([3.0]), 'b': jnp.array([[4.0]])})) == 5.0


# LARS


def test_lars_scales_matrices_by_the_ratio_of_norms_and_vectors_not():
    params = {'w': jnp.full((2, 2), 2.0), 'b': jnp.full((2,), 2.0)}
    grads = {'w': jnp.full((2, 2), 0.5), 'b': jnp.full((2,), 0.5)}
    tx = optim.lars(0.1, trust=0.01)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates['w'], -0.1 * 0.01 * 4 / 1 * 0.5, rtol=1e-6)
    np.testing.assert_allclose(updates['b'], -0.1 * 0.5, rtol=1e-6)


def test_lars_decays_matrices_only():
    params = {'w': jnp.full((2, 2), 2.0), 'b': jnp.full((2,), 2.0)}
    tx = optim.lars(1.0, weight_decay=0.1)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert (updates['w'] < 0).all()
    assert (updates['b'] == 0).all()


def test_lars_ratio_is_one_for_a_zero_matrix():
    params, grads = {'w': jnp.zeros((2, 2))}, {'w': jnp.ones((2, 2))}
    tx = optim.lars(0.1)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates['w'], -0.1)


def test_lars_takes_a_schedule():
    params, grads = {'b': jnp.zeros(2)}, {'b': jnp.ones(2)}
    tx = optim.lars(lambda count: jnp.where(count == 0, 0.0, 1.0), momentum=0.0)
    first, state = tx.update(grads, tx.init(params), params)
    second, _ = tx.update(grads, state, params)
    assert (first['b'] == 0).all()
    assert (second['b'] == -1).all()
