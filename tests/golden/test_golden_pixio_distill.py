# SPDX-License-Identifier: Apache-2.0
"""Distillation of features against Pixio's official code."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden import load
from ssl_jax import config as config_lib
from ssl_jax import methods
from ssl_jax.interop import tables
from ssl_jax.methods import distill
from ssl_jax.objectives import masking

STEM = 'pixio_distill'
PROJECTION = [
    ('projection/0/kernel', 'last_proj.0.weight', 'linear'),
    ('projection/0/bias', 'last_proj.0.bias', 'same'),
    ('projection/1/scale', 'last_proj.1.weight', 'same'),
    ('projection/1/bias', 'last_proj.1.bias', 'same'),
    ('projection/3/kernel', 'last_proj.3.weight', 'linear'),
    ('projection/3/bias', 'last_proj.3.bias', 'same'),
]


def build(f):
    """(method, rows of the student's tensors)."""
    h, c = f.hyper, config_lib.default('distill')
    c.method.update(
        size=None,
        embed_dim=h['student_dim'],
        depth=h['student_depth'],
        num_heads=h['student_heads'],
        teacher_embed_dim=h['teacher_dim'],
        teacher_depth=h['teacher_depth'],
        teacher_num_heads=h['teacher_heads'],
        patch_size=h['patch_size'],
        img_size=h['img_size'],
        num_cls_tokens=h['n_cls_tokens'],
        mlp_ratio=h['mlp_ratio'],
        eps=h['ln_eps'],
        mask_grid=h['mask_grid'],
    )
    method = methods.make(c)
    return method, tables.encoder(method.vit) + PROJECTION


@functools.lru_cache
def weights():
    """(method, rows, student, teacher)."""
    f = load(STEM)
    method, rows = build(f)
    params, extra = jax.eval_shape(method.init, jax.random.key(0))
    teacher_rows = tables.encoder(method.teacher_vit, ours='')
    return (
        method,
        rows,
        tables.from_torch(rows, f.under('w/student'), params),
        tables.from_torch(teacher_rows, f.under('w/teacher'), extra['teacher']),
    )


def ids(f, ratio):
    """Kept patches of the file's noise, None where nothing is masked."""
    if not ratio:
        return None
    method, *_ = weights()
    noise = next(f[k] for k in f.keys if k.startswith('in/') and 'noise' in k)
    mask = masking.from_noise(jnp.asarray(noise), method.grid, ratio, f.hyper['mask_grid'])
    return mask.ids_keep


def test_golden_pixio_distill_teacher_and_student_tokens_match():
    f = load(STEM)
    method, _, student, teacher = weights()
    images = jnp.asarray(f.images())
    out = jax.jit(lambda p, x: method.teacher_vit.apply({'params': p}, x))(teacher, images)
    f.check('out/teacher', out['pre_norm'])
    for ratio in f.hyper['mask_ratios']:
        kept = ids(f, ratio)
        if kept is not None:
            name = next(k for k in f.keys if k.startswith('out/ids_keep'))
            np.testing.assert_array_equal(kept, f[name])
        name = f'out/student_r{ratio}'
        f.check(name, jax.jit(method.project)(student, images, kept))


def test_golden_pixio_distill_losses_of_every_kind_match():
    f = load(STEM)
    method, _, student, teacher = weights()
    for ratio in f.hyper['mask_ratios']:
        for cls_loss, patch_loss, fuse in f.hyper['losses']:
            m = dataclasses.replace(method, cls_loss=cls_loss, patch_loss=patch_loss, fuse=fuse)
            total, terms = jax.jit(m.objective)(
                student, teacher, jnp.asarray(f.images()), ids(f, ratio)
            )
            name = f'r{ratio}_{cls_loss}_{patch_loss}_{fuse}'
            f.check(f'out/total_{name}', total)
            f.check(f'out/cls_{name}', terms['cls'])
            f.check(f'out/patch_{name}', terms['patch'])


def test_golden_pixio_distill_gradients_match():
    f = load(STEM)
    method, rows, student, teacher = weights()
    for ratio in f.hyper['mask_ratios']:
        grads, _ = jax.jit(jax.grad(method.objective, has_aux=True))(
            student, teacher, jnp.asarray(f.images()), ids(f, ratio)
        )
        named = tables.to_torch(rows, grads)
        for key in f.under(f'grad_r{ratio}'):
            f.check(f'grad_r{ratio}/{key}', named[key])


def test_golden_pixio_distill_the_epsilon_of_the_projection_matches():
    f = load(STEM)
    method, _, student, _ = weights()
    first = jax.tree.map(lambda x: x * 2.0**-9, student['projection']['0'])
    probed = {**student, 'projection': {**student['projection'], '0': first}}
    out = jax.jit(method.project)(probed, jnp.asarray(f.images()))
    f.check('out/eps_probe/student_r0', out)


@pytest.mark.parametrize('kind', ['cosine', 'l1', 'mse'])
def test_equal_tokens_are_at_distance_zero(kind):
    x = jax.random.normal(jax.random.key(0), (2, 3, 8))
    assert float(distill.alignment(x, x, kind)) == pytest.approx(0, abs=1e-6)
