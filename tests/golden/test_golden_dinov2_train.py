# SPDX-License-Identifier: Apache-2.0
"""DINOv2 as a whole against the official training class: terms, gradients, trajectories."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden import load, pos_resize
from ssl_jax import config as config_lib
from ssl_jax import methods, optim
from ssl_jax import step as step_lib
from ssl_jax.interop import tables
from ssl_jax.interop.families import dinov2 as dinov2_family
from ssl_jax.models import blocks, vit
from ssl_jax.run import clock as clock_lib
from ssl_jax.run import trees

STEPS = ('step_centering_shared', 'step_sinkhorn_separate')
TRAINS = ('train_centering_shared', 'train_sinkhorn_separate')


def config(h):
    """The config of a golden file's hyper-parameters."""
    c = config_lib.default('dinov2')
    m = c.method
    m.update(
        size=None,
        embed_dim=h['embed_dim'],
        depth=h['depth'],
        num_heads=h['num_heads'],
        patch_size=h['patch_size'],
        img_size=h['global_size'],
        mlp_ratio=h['mlp_ratio'],
        ffn='mlp' if h['ffn_layer'] == 'mlp' else 'swiglu',
        layer_scale=1.0,
        num_register_tokens=h['num_register_tokens'],
        pos_resize=pos_resize(h),
        drop_path=h['drop_path'],
        n_local_crops=h['n_local'],
        local_size=h['local_size'],
        group_size=h['batch'],
        dino_weight=h['dino_weight'],
        ibot_weight=h['ibot_weight'],
        koleo_weight=h['koleo_weight'],
        separate_heads=h['separate_head'],
        dino_out_dim=h['dino_K'],
        dino_bottleneck_dim=h['dino_bottleneck'],
        head_hidden_dim=h['dino_hidden'],
        centering=h['centering'],
        center_momentum=h['center_momentum'],
        student_temp=h['student_temp'],
    )
    if h['separate_head']:
        m.update(ibot_out_dim=h['ibot_K'], ibot_bottleneck_dim=h['ibot_bottleneck'])
    c.batch_size = h['batch']
    if 'epochs' in h:
        length = h['epoch_length']
        c.total_steps = h['epochs'] * length
        c.warmup_steps = h['warmup_epochs'] * length
        m.update(
            warmup_teacher_temp=h['warmup_teacher_temp'],
            teacher_temp=h['teacher_temp'],
            patch_teacher_temp=h['teacher_temp'],
            warmup_teacher_temp_steps=h['warmup_teacher_temp_epochs'] * length,
            momentum_teacher=h['momentum_teacher'],
            final_momentum_teacher=h['final_momentum_teacher'],
        )
        c.optim.update(
            lr=h['lr'],
            min_lr=h['min_lr'],
            schedule='dinov2',
            b1=h['adamw_beta1'],
            b2=h['adamw_beta2'],
            weight_decay=h['weight_decay'],
            weight_decay_end=h['weight_decay_end'],
            clip=h['clip_grad'],
            clip_by='network',
            layer_decay=h['layerwise_decay'],
            lr_mult=(('patch_embed', h['patch_embed_lr_mult']),),
            warm_freeze=('last_layer',),
            warm_freeze_steps=h['freeze_last_layer_epochs'] * length,
        )
    else:
        c.total_steps = 10
    return config_lib.lock(c)


def method_of(c, h):
    """The method; hidden widths of the two heads may differ in a golden file."""
    method = methods.make(c, clock_lib.Clock.of(c))
    if method.ibot_head is not None and h.get('ibot_hidden'):
        head = method.ibot_head.clone(hidden_dim=h['ibot_hidden'])
        method = method.with_modules(encoder=method.vit, ibot_head=head)
    return method


def logged(h, metrics):
    """Our loss terms as in the official log: halves of two, and without the weights of three.

    Of the terms that a file has; one of weight 0 is not in our loss.
    """
    scales = {
        'dino_local_crops_loss': ('dino_local', h['dino_weight'] * (h['n_local'] > 0)),
        'dino_global_crops_loss': ('dino_global', h['dino_weight']),
        'koleo_loss': ('koleo', 2 * (h['koleo_weight'] > 0)),
        'ibot_loss': ('ibot', 2 * h['ibot_weight']),
    }
    return {key: metrics[name] / scale for key, (name, scale) in scales.items() if scale}


def by_sample(crops, size):
    """Official crop-major (n B, 3, H, W) -> (B, n, H, W, 3)."""
    x = np.moveaxis(crops, -3, -1)
    return jnp.asarray(x.reshape(-1, size, *x.shape[1:]).swapaxes(0, 1))


def batch(f, s):
    size = f.hyper['batch']
    masks = f['in/masks'][s]
    return (
        by_sample(f['in/global_crops'][s], size),
        by_sample(f['in/local_crops'][s], size) if f.hyper['n_local'] else None,
        jnp.asarray(masks.reshape(2, size, -1).swapaxes(0, 1)),
    )


def network(f, method, who=''):
    """Parameters of the weights whose names begin with `who`."""
    abstract, _ = jax.eval_shape(method.init, jax.random.key(0))
    weights = {tables.plain(k, who): v for k, v in f.under('w').items() if k.startswith(who)}
    return tables.from_torch(dinov2_family.network_rows(method), weights, abstract)


@functools.lru_cache
def step_run(name):
    """(file, method, params, [(loss, extra, metrics, grads) per step])."""
    f = load(f'dinov2_{name}')
    method = method_of(config(f.hyper), f.hyper)
    params = network(f, method, 'student.')
    extra = {'teacher': network(f, method, 'teacher.')}
    if method.centering == 'centering':
        extra['dino_center'] = jnp.asarray(f['w/dino_loss.center'])
        extra['ibot_center'] = jnp.asarray(f['w/ibot_patch_loss.center'][0])

    def loss(params, extra, crops, temp):
        value, (rows, metrics) = method.objective(params, extra, *crops, temps=(temp, temp))
        return value, (method.with_centers({**extra, **rows}), metrics)

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    rows = []
    for s, temp in enumerate(f.hyper['step_teacher_temps']):
        used = extra
        (value, (extra, metrics)), grads = run(params, extra, batch(f, s), temp)
        rows.append((value, used, metrics, grads))
    return f, method, params, rows, extra


@pytest.mark.parametrize('name', STEPS)
def test_golden_dinov2_step_every_term_and_the_total_match(name):
    f, _, _, rows, _ = step_run(name)
    for s, (value, _, metrics, _) in enumerate(rows):
        f.check(f'out/{s}/total_optimised', value)
        for key, value in logged(f.hyper, metrics).items():
            f.check(f'out/{s}/{key}', value)


@pytest.mark.parametrize('name', STEPS)
def test_golden_dinov2_step_every_gradient_matches(name):
    f, method, _, rows, _ = step_run(name)
    for s, (_, _, _, grads) in enumerate(rows):
        named = tables.to_torch(dinov2_family.network_rows(method), grads)
        for key in f.under(f'grad{s}'):
            f.check(f'grad{s}/{key}', named[tables.plain(key, 'student.')])


def test_golden_dinov2_step_centering_shared_centres_match():
    f, _, _, rows, extra = step_run('step_centering_shared')
    for s, (_, used, _, _) in enumerate(rows):
        f.check(f'out/{s}/dino_center_used', used['dino_center'])
        f.check(f'out/{s}/ibot_center_used', used['ibot_center'][None])
    f.check('out/dino_center_final', extra['dino_center'])
    f.check('out/ibot_center_final', extra['ibot_center'][None])


@pytest.mark.parametrize('name', STEPS)
def test_golden_dinov2_step_tokens_of_student_and_teacher_match(name):
    f, method, params, rows, _ = step_run(name)
    crops, local, masks = batch(f, 0)

    def official(x):  # (B, n, ...) -> crop-major
        return np.asarray(x).swapaxes(0, 1).reshape(-1, *x.shape[2:])

    run = jax.jit(lambda p, x, m: method.vit.apply({'params': p}, x, mask=m))
    student = run(params['backbone'], (crops, local), masks)
    f.check('out/0/student_global_cls', official(student[0]['cls_tokens'][:, :, 0]))
    f.check('out/0/student_local_cls', official(student[1]['cls_tokens'][:, :, 0]))
    f.check('out/0/student_global_patches', official(student[0]['patch_tokens']))
    teacher = rows[0][1]['teacher']
    out = run(teacher['backbone'], (crops,), None)[0]
    f.check('out/0/teacher_cls', official(out['cls_tokens'][:, :, 0]))
    logits, _ = method.project(teacher, out['cls_tokens'][:, :, 0], None)
    f.check('out/0/teacher_cls_logits', official(logits))


@functools.lru_cache
def train_run(name):
    """(file, method, per-step metrics, final state) of the official trajectory."""
    f = load(f'dinov2_{name}')
    c = config(f.hyper)
    method = method_of(c, f.hyper)
    params = network(f, method)
    extra = method.init(jax.random.key(0))[1]
    extra = {**extra, 'teacher': params}
    tx, _ = optim.make(c.optim, params)
    schedule = optim.schedule(c, clock_lib.Clock.of(c))

    class Given:
        """The method on crops and masks that are given instead of drawn."""

        after_update = staticmethod(method.after_update)

        @staticmethod
        def loss(params, extra, batch, rng, step):
            crops = batch['global'], batch['local'], batch['masks']
            return method.objective(params, extra, *crops, temps=method.temps(step))

    step = jax.jit(step_lib.make_step(Given, tx, schedule, seed=0))
    state = step_lib.TrainState.create(params, extra, tx)
    rows = []
    for s in range(len(f['in/masks'])):
        state, metrics = step(
            state, dict(zip(('global', 'local', 'masks'), batch(f, s), strict=True))
        )
        rows.append({k: np.asarray(v) for k, v in metrics.items()})
    return f, c, method, rows, state


@pytest.mark.parametrize('name', TRAINS)
def test_golden_dinov2_train_every_term_of_the_trajectory_matches(name):
    f, _, _, rows, _ = train_run(name)
    f.check('out/total_optimised', np.stack([r['loss'] for r in rows]))
    series = [logged(f.hyper, r) for r in rows]
    for key in series[0]:
        f.check(f'out/{key}', np.stack([terms[key] for terms in series]))


@pytest.mark.parametrize('name', TRAINS)
def test_golden_dinov2_train_gradient_norm_of_every_network_matches(name):
    f, _, _, rows, _ = train_run(name)
    for key in f.under('out/grad_norm_before_clip'):
        norms = np.stack([r[f'grad_norm/{key}'] for r in rows])
        f.check(f'out/grad_norm_before_clip/{key}', norms)


@pytest.mark.parametrize('name', TRAINS)
def test_golden_dinov2_train_schedules_match(name):
    f, c, method, _, _ = train_run(name)
    s = np.arange(len(f['out/lr']))
    values = optim.schedule(c, clock_lib.Clock.of(c))(s)
    np.testing.assert_allclose(values['lr'], f['out/lr'], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(values['weight_decay'], f['out/wd'], rtol=1e-6)
    held = np.where(values['warm'], 0, values['lr'])
    np.testing.assert_allclose(held, f['out/last_layer_lr'], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(1 - method.ema_rate(s), f['out/momentum'], rtol=1e-6)
    np.testing.assert_allclose(method.temps(s)[0], f['out/teacher_temp'], rtol=1e-6)


@pytest.mark.parametrize('name', TRAINS)
def test_golden_dinov2_train_final_student_and_teacher_match(name):
    f, _, method, _, state = train_run(name)
    rows = dinov2_family.network_rows(method)
    for who, tree in (('student', state.params), ('teacher', state.extra['teacher'])):
        named = tables.to_torch(rows, tree)
        for key in (k for k in f.under('final') if k.startswith(f'{who}.')):
            value, stored = named.pop(tables.plain(key, f'{who}.')), f'final/{key}'
            if key.endswith('qkv.bias'):  # the gradient of the key part is rounding noise
                compare_without_keys(f, stored, value)
            else:
                f.check(stored, value)
        assert not named


def compare_without_keys(f, key, value):
    want, third = f[key], len(value) // 3
    atol, _ = f.tolerance(key)
    for part in (slice(0, third), slice(2 * third, None)):
        assert np.abs(value[part] - want[part]).max() <= atol, key


def test_golden_dinov2_train_centering_shared_centres_match():
    f, _, _, _, state = train_run('train_centering_shared')
    for ours, key in (('dino_center', 'dino'), ('ibot_center', 'ibot')):
        names = [k for k in f.keys if k.startswith('out/') and key in k and 'center' in k]
        for name in names:
            f.check(name, state.extra[ours].reshape(f[name].shape))


def test_golden_dinov2_stochastic_depth_of_given_permutations_matches():
    f = load('dinov2_stochastic_depth')
    h = f.hyper
    model = vit.ViT(
        embed_dim=h['embed_dim'],
        depth=h['depth'],
        num_heads=h['num_heads'],
        patch_size=h['patch_size'],
        img_size=h['img_size'],
        mlp_ratio=h['mlp_ratio'],
        layer_scale=1.0,
        mask_token=True,
        pos_resize='offset',
        init_scheme='dinov2',
    )
    abstract = jax.eval_shape(functools.partial(vit.init_params, model), jax.random.key(0))
    rows = tables.encoder(model, ours='')
    params = tables.from_torch(rows, f.under('w'), abstract)
    crops = tuple(jnp.asarray(f.images(f'in/{k}_crops'))[None] for k in ('global', 'local'))
    drop = []
    for name, count in (('in/perm_global', h['ng']), ('in/perm_local', h['nl'])):
        kept = max(int(count * (1 - h['drop_path_rate'])), 1)
        drop.append(jnp.asarray(f[name][:, :kept]).reshape(h['depth'], 1, 2, kept))

    def scalar(params):
        big, small = model.apply(
            {'params': params}, crops, mask=jnp.asarray(f['in/masks'])[None], drop=tuple(drop)
        )
        value = jnp.square(big['patch_tokens']).mean() + jnp.abs(small['cls_tokens']).mean()
        return value, (big, small)

    (value, (big, small)), grads = jax.jit(jax.value_and_grad(scalar, has_aux=True))(params)
    f.check('out/global_prenorm', big['pre_norm'][0])
    f.check('out/local_prenorm', small['pre_norm'][0])
    f.check('out/global_cls', big['cls_tokens'][0, :, 0])
    f.check('out/local_cls', small['cls_tokens'][0, :, 0])
    f.check('out/scalar', value)
    named = tables.to_torch(rows, grads)
    for key in f.under('grad'):
        f.check(f'grad/{key}', named[key])


# Of the official default config, what the schedules are made from.
DEFAULTS = {
    'optim': {
        'epochs': 100,
        'warmup_epochs': 10,
        'freeze_last_layer_epochs': 1,
        'min_lr': 1e-6,
        'weight_decay': 0.04,
        'weight_decay_end': 0.4,
    },
    'teacher': {
        'momentum_teacher': 0.992,
        'final_momentum_teacher': 1.0,
        'warmup_teacher_temp': 0.04,
        'teacher_temp': 0.07,
        'warmup_teacher_temp_epochs': 30,
    },
}


def test_golden_dinov2_schedules_param_groups_schedules_match():
    f = load('dinov2_schedules_param_groups')
    for name, (length, overrides) in f.hyper['schedules'].items():
        o, t = ({**DEFAULTS[k], **overrides.get(k, {})} for k in ('optim', 'teacher'))
        total = o['epochs'] * length
        warm, freeze = o['warmup_epochs'] * length, o['freeze_last_layer_epochs'] * length
        hot = t['warmup_teacher_temp_epochs'] * length
        lr = optim.cosine(o['lr'], o['min_lr'], total, warm)
        wd = optim.cosine(o['weight_decay'], o['weight_decay_end'], total)
        momentum = optim.cosine(t['momentum_teacher'], t['final_momentum_teacher'], total)
        temp = optim.linear(t['warmup_teacher_temp'], t['teacher_temp'], hot)

        def last_layer_lr(steps, lr=lr, freeze=freeze):
            return np.where(steps < freeze, 0, lr(steps))

        for key, schedule, count in (
            ('lr', lr, total),
            ('wd', wd, total),
            ('momentum', momentum, total),
            ('teacher_temp', temp, hot),
            ('last_layer_lr', last_layer_lr, total),
        ):
            want, steps = f[f'out/{name}/{key}'], np.arange(count)
            np.testing.assert_allclose(schedule(steps), want, rtol=1e-6, atol=1e-12, err_msg=key)
            if f'out/{name}/{key}_past_end' in f.keys:
                past = f[f'out/{name}/{key}_past_end']
                steps = total + np.arange(len(past))
                np.testing.assert_allclose(schedule(steps), past, rtol=1e-6, err_msg=key)


def test_subsets_of_stochastic_depth_have_the_official_sizes():
    for count, rate, kept in ((128, 0.3, 89), (512, 0.3, 358), (64, 0.4, 38), (24, 0.4, 14)):
        drop = blocks.drop_path_subsets(jax.random.split(jax.random.key(0), 2), 3, rate, [count])
        assert drop[0].shape == (3, 2, 2, kept)
        assert all(len(set(ids)) == kept for ids in np.asarray(drop[0]).reshape(-1, kept))


def named_groups(method, o):
    """Torch name -> [lr multiplier, weight decay multiplier, is in the last layer]."""
    params, _ = jax.eval_shape(method.init, jax.random.key(0))
    factors = optim.lr_multipliers(params, o.layer_decay, o.lr_mult)
    decays = optim.decays(params, o.no_decay)
    late = optim.matching(o.warm_freeze, params)
    flat = [trees.named(tree) for tree in (params, factors, decays, late)]
    found = {}
    for path, key, _ in dinov2_family.network_rows(method):
        p, factor, decay, last = (tree[path] for tree in flat)
        for i in range(p.shape[0] if '{i}' in key else 1):
            each = np.broadcast_to(factor, p.shape)[i] if '{i}' in key else factor
            found[key.format(i=i)] = [float(np.max(each)), float(decay), last]
    return found


def check_groups(found, want):
    want = {tables.plain(k.removeprefix('backbone.')): v for k, v in want.items()}
    found = {k.removeprefix('backbone.'): v for k, v in found.items()}
    assert set(found) == set(want)
    for name, (factor, decay, last) in want.items():
        assert found[name][0] == pytest.approx(factor, rel=1e-6), name
        assert found[name][1:] == [decay, last], name


@pytest.mark.parametrize('name', TRAINS)
def test_golden_dinov2_train_parameter_groups_match(name):
    f = load(f'dinov2_{name}')
    c = config(f.hyper)
    check_groups(named_groups(method_of(c, f.hyper), c.optim), f.meta['param_groups'])


def test_golden_dinov2_schedules_param_groups_groups_match():
    f = load('dinov2_schedules_param_groups')
    h = f.hyper
    for variant, want in f.meta['param_groups'].items():
        c = config_lib.default('dinov2')
        c.method.update(
            size=None,
            embed_dim=8,
            depth=h['depth'],
            num_heads=2,
            ffn='swiglu' if 'swiglu' in variant else 'mlp',
            num_register_tokens=h['registers'],
            separate_heads=h['separate_head'],
            dino_out_dim=8,
            ibot_out_dim=8,
            head_hidden_dim=8,
        )
        config_lib.shared('dinov2').optim(c.optim)
        c.optim.layer_decay = h['layerwise_decay']
        c.optim.lr_mult = (('patch_embed', h['patch_embed_lr_mult']),)
        check_groups(named_groups(methods.make(c), c.optim), want)
