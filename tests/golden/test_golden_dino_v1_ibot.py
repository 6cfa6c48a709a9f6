# SPDX-License-Identifier: Apache-2.0
"""The shared ViT, head and losses against the official DINO v1 and iBOT codes."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np

from golden import ibot_weights, move, student_temp
from ssl_jax import optim
from ssl_jax.interop import tables
from ssl_jax.interop.families import dinov2 as dinov2_family
from ssl_jax.models import heads, vit
from ssl_jax.objectives import losses

PROBE = 2.0**-9
WRITES = ('patch_embed.proj', 'pos_embed', 'cls_token', 'attn.proj', 'mlp.fc2')


def build(f, weights):
    """(ViT, DINOHead, params, rename table) of the file."""
    h = f.hyper
    model = vit.ViT(
        embed_dim=h['embed_dim'],
        depth=h['depth'],
        num_heads=h['num_heads'],
        patch_size=h['patch_size'],
        img_size=h['img_size'],
        mlp_ratio=h['mlp_ratio'],
        pos_resize='offset',
        init_scheme='dinov2',
    )
    head = heads.DINOHead(h['K'], h['hidden'], h['bottleneck'])

    def init(key):
        tokens = jnp.zeros((1, h['embed_dim']))
        return {
            'backbone': vit.init_params(model, key),
            'head': head.init(key, tokens)['params'],
        }

    rows = [
        (f'backbone/{ours}', f'backbone.{key}', how)
        for ours, key, how in tables.encoder(model, ours='')
    ] + dinov2_family.head_rows('head', 'head')
    params = tables.from_torch(rows, weights, jax.eval_shape(init, jax.random.key(0)))
    return model, head, params, rows


def images_of(f, size):
    return jnp.asarray(f.images(f'in/images_{size[0]}x{size[1]}'))


def test_golden_dino_v1_ibot_features_and_logits_match_at_every_size(golden):
    f = golden('dino_v1_ibot')
    model, head, params, _ = build(f, f.under('w'))
    last_two = (model.depth - 2, model.depth - 1)

    @jax.jit
    def forward(params, images):
        out = model.apply({'params': params['backbone']}, images, capture=last_two)
        maps = [vit.final_norm(params['backbone'], x) for x in out['blocks']]
        cls = out['cls_tokens'][:, 0]
        return cls, head.apply({'params': params['head']}, cls), maps

    for size in f.hyper['sizes']:
        where = f'out/{size[0]}x{size[1]}'
        cls, logits, maps = forward(params, images_of(f, size))
        f.check(f'{where}/cls', cls)
        f.check(f'{where}/logits', logits)
        for i, tokens in enumerate(maps):
            f.check(f'{where}/intermediate{i}', tokens)


def test_golden_dino_v1_ibot_last_self_attention_matches_at_every_size(golden):
    f = golden('dino_v1_ibot')
    model, _, params, _ = build(f, f.under('w'))
    attention = jax.jit(functools.partial(vit.last_attention, model))
    for size in f.hyper['sizes']:
        weights = attention(params['backbone'], images_of(f, size))
        f.check(f'out/{size[0]}x{size[1]}/attention_last', weights)


def test_golden_dino_v1_ibot_epsilon_matches(golden):
    f = golden('dino_v1_ibot')
    weights = {k: v * PROBE if any(w in k for w in WRITES) else v for k, v in f.under('w').items()}
    model, _, params, _ = build(f, weights)
    out = model.apply({'params': params['backbone']}, images_of(f, f.hyper['sizes'][0]))
    f.check('out/eps_probe/cls', out['cls_tokens'][:, 0])


def gradients(f):
    """(gradients of sum(logits * cotangent) at the first size, rename table)."""
    model, head, params, rows = build(f, f.under('w'))
    images, cotangent = images_of(f, f.hyper['sizes'][0]), jnp.asarray(f['in/head_cot'])

    def value(params):
        out = model.apply({'params': params['backbone']}, images)
        logits = head.apply({'params': params['head']}, out['cls_tokens'][:, 0])
        return (logits * cotangent).sum()

    return jax.jit(jax.grad(value))(params), rows


def test_golden_dino_v1_ibot_gradients_match(golden):
    f = golden('dino_v1_ibot')
    grads = tables.to_torch(*reversed(gradients(f)))
    assert f.hyper['norm_last_layer'] == ('head.last_layer.weight_g' not in f.under('grad'))
    for key, grad in grads.items():
        if f'grad/{key}' in f.keys:  # weight_g is frozen
            f.check(f'grad/{key}', grad)
    assert {k for k in f.under('grad') if k.startswith(('backbone', 'head'))} <= set(grads)


def test_golden_dino_v1_ibot_clipping_of_every_tensor_matches(golden):
    f = golden('dino_v1_ibot')
    grads, rows = gradients(f)
    names = [f'backbone.{name}' for name in f.meta['clip_norm_order']]
    before = tables.to_torch(rows, grads)
    f.check('out/clip_norms', [np.linalg.norm(before[name]) for name in names])
    clip = optim.clip_by_norm(f.hyper['clip_grad'], by='tensor')
    clipped, _ = clip.update(grads, clip.init(grads))
    after = tables.to_torch(rows, clipped)
    assert set(f.under('grad_clipped')) == set(names)
    for name in names:
        f.check(f'grad_clipped/{name}', after[name])


def test_golden_dino_v1_ibot_schedules_match(golden):
    f = golden('dino_v1_ibot')
    for i, row in enumerate(f.hyper['cosine']):
        base, final, epochs, length, warmup_epochs, start = (*row, 0, 0)[:6]
        total, warmup = epochs * length, warmup_epochs * length
        steps = np.arange(total)
        got = optim.cosine(base, final, total, warmup)(steps)
        if start:  # ours starts at 0, as all training scripts do
            got = np.where(steps < warmup, optim.linear(start, base, warmup)(steps), got)
        np.testing.assert_allclose(got, f[f'out/schedule{i}'], rtol=1e-12, atol=1e-18)


def test_golden_dino_v1_ibot_teacher_temperatures_match(golden):
    f = golden('dino_v1_ibot')
    h = f.hyper
    rise = (h['warmup_teacher_temp'], h['teacher_temp'], h['warmup_teacher_temp_epochs'])
    f.check('out/teacher_temp_schedule', optim.linear(*rise)(np.arange(h['nepochs'])))


def steps(f):
    """(step, class temperature, patch temperature), temperatures by the epoch of the step."""
    (offset,) = (float(x) for x in re.findall(r'patch temperatures are \+([\d.]+)', groups(f)))
    for s, epoch in enumerate(f.hyper['epochs_of_steps']):
        temp = float(f['out/teacher_temp_schedule'][epoch])
        yield s, temp, temp + offset


def groups(f):
    """What the file says of its arrays."""
    return '; '.join(text for _, text in f.meta['groups'])


def class_loss(temp, student, targets):
    """Sum of both shares for crop-major student logits (V + 2, B, K) and targets (2, B, K)."""
    return sum(losses.dino_loss(targets, student[:2], student[2:], temp))


def test_golden_dino_v1_ibot_dino_loss_and_centre_match_over_steps(golden):
    f = golden('dino_v1_ibot')
    batch, k = f.hyper['B'], f.hyper['K']
    center = jnp.zeros(k)
    for s, temp, _ in steps(f):
        teacher = jnp.asarray(f['in/teacher'][s])
        targets = losses.softmax_center(teacher, center, temp).reshape(2, batch, k)
        student = jnp.asarray(f['in/student'][s]).reshape(-1, batch, k)
        assert len(student) == f.hyper['ncrops']
        loss, grad = jax.value_and_grad(class_loss, argnums=1)(student_temp(f), student, targets)
        center = move(f, center, losses.mean_rows(teacher))
        f.check(f'out/dino_loss/{s}', loss)
        f.check(f'grad/dino_loss/{s}', grad.reshape(-1, k))
        f.check(f'out/center_after/{s}', center[None])


def test_golden_dino_v1_ibot_class_and_patch_terms_match_over_steps(golden):
    f = golden('dino_v1_ibot')
    h = f.hyper
    batch, k = h['B'], h['K']
    center, patch_center = jnp.zeros(k), jnp.zeros(h['Kp'])

    def patch_loss(student, targets, mask):
        return losses.ibot_loss(targets, student, ibot_weights(mask), len(mask), student_temp(f))

    for s, temp, patch_temp in steps(f):
        teacher = jnp.asarray(f['in/teacher'][s])
        targets = losses.softmax_center(teacher, center, temp).reshape(2, batch, k)
        student = jnp.asarray(f['in/student'][s]).reshape(-1, batch, k)
        cls, grad_cls = jax.value_and_grad(class_loss, argnums=1)(student_temp(f), student, targets)

        teacher_patch = jnp.asarray(f['in/teacher_patch'][s])  # (2B, N, Kp)
        patch_targets = losses.softmax_center(teacher_patch, patch_center, patch_temp)
        mask = jnp.asarray(f['in/masks'][s]).reshape(teacher_patch.shape[:2])
        student_patch = jnp.asarray(f['in/student_patch'][s])
        patch, grad_patch = jax.value_and_grad(patch_loss)(student_patch, patch_targets, mask)

        center = move(f, center, losses.mean_rows(teacher))
        patch_center = move(f, patch_center, losses.mean_rows(teacher_patch))
        a, b = h['lambda1'], h['lambda2']
        f.check(f'out/ibot_cls/{s}', a * cls)
        f.check(f'out/ibot_patch/{s}', b * patch)
        f.check(f'out/ibot_loss/{s}', a * cls + b * patch)
        f.check(f'grad/ibot_cls/{s}', a * grad_cls.reshape(-1, k))
        f.check(f'grad/ibot_patch/{s}', b * grad_patch)
        f.check(f'out/ibot_center_after/{s}', center[None])
        f.check(f'out/ibot_center2_after/{s}', patch_center[None, None])
