# SPDX-License-Identifier: Apache-2.0
"""Heads, targets and losses against the official DINOv2 modules, over several centre updates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden import ibot_weights, move, student_temp
from ssl_jax.interop import tables
from ssl_jax.interop.families import dinov2 as dinov2_family
from ssl_jax.models import heads
from ssl_jax.objectives import losses

TARGETS = pytest.mark.parametrize('target', ['center', 'sinkhorn'])


def build(h, weights):
    """(DINOHead, params, rename table) of an official head; params below 'head'."""
    head = heads.DINOHead(
        h['out_dim'], h['hidden_dim'], h['bottleneck_dim'], num_layers=h['nlayers']
    )
    x = jnp.zeros((1, h['in_dim']))
    abstract = jax.eval_shape(lambda key: head.init(key, x)['params'], jax.random.key(0))
    rows = dinov2_family.head_rows('head', 'head', h['nlayers'])
    weights = {f'head.{key}': value for key, value in weights.items()}
    return head, tables.from_torch(rows, weights, {'head': abstract}), rows


def test_golden_dinov2_heads_losses_heads_and_their_gradients_match(golden):
    f = golden('dinov2_heads_losses')
    x = jnp.asarray(f['in/head_x'])
    for name, h in f.hyper['heads'].items():
        head, params, rows = build(h, f.under(f'w/{name}'))
        cotangent = jnp.asarray(f['in/head_cot'][:, : h['out_dim']])

        @jax.jit
        @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
        def value(params, x, head=head, cotangent=cotangent):
            logits = head.apply({'params': params['head']}, x)
            return (logits * cotangent).sum(), logits

        (_, logits), (grads, grad_x) = value(params, x)
        f.check(f'out/{name}/logits', logits)
        f.check(f'grad/{name}/x', grad_x)
        for key, grad in tables.to_torch(rows, grads).items():
            f.check(f'grad/{name}/{key.removeprefix("head.")}', grad)


def cls_targets(f):
    """Per step {'center': (2, B, K), 'sinkhorn': ...} and the centre that entered the step."""
    center = jnp.zeros(f.hyper['K'])
    for s, temp in enumerate(f.hyper['teacher_temps']):
        logits = jnp.asarray(f['in/teacher_cls'][s])
        targets = {
            'center': losses.softmax_center(logits, center, temp),
            'sinkhorn': losses.sinkhorn_knopp(logits, temp),
        }
        yield s, center, targets
        center = move(f, center, losses.mean_rows(logits))
    f.check('out/center_final_cls', center[None])


def patch_targets(f):
    """As `cls_targets`, in a buffer of all patches of which the masked ones are valid."""
    center = jnp.zeros(f.hyper['K'])
    for s, temp in enumerate(f.hyper['teacher_temps']):
        logits = jnp.asarray(f['in/teacher_patch'][s])
        mask = jnp.asarray(f['in/masks'][s])
        rows, valid = logits.reshape(-1, logits.shape[-1]), mask.reshape(-1)
        targets = {
            'center': losses.softmax_center(rows, center, temp),
            'sinkhorn': losses.sinkhorn_knopp(rows, temp, valid),
        }
        yield s, center, targets, mask
        center = move(f, center, losses.mean_rows(logits, mask))
    f.check('out/center_final_patch', center[None, None])


def test_golden_dinov2_heads_losses_class_targets_match_over_centre_updates(golden):
    f = golden('dinov2_heads_losses')
    for s, center, targets in cls_targets(f):
        f.check(f'out/center_used_cls/{s}', center[None])
        f.check(f'out/softmax_center_cls/{s}', targets['center'])
        f.check(f'out/sinkhorn_cls/{s}', targets['sinkhorn'])


def test_golden_dinov2_heads_losses_patch_targets_match_among_padding(golden):
    f = golden('dinov2_heads_losses')
    for s, center, targets, mask in patch_targets(f):
        valid = np.asarray(mask).reshape(-1)
        f.check(f'out/center_used_patch/{s}', center[None, None])
        f.check(f'out/softmax_center_patch/{s}', targets['center'][valid])
        f.check(f'out/sinkhorn_patch/{s}', targets['sinkhorn'][valid])


@TARGETS
def test_golden_dinov2_heads_losses_dino_loss_matches(golden, target):
    f = golden('dinov2_heads_losses')
    assert f.hyper['n_teacher_views'] == 2
    for s, _, targets in cls_targets(f):
        logits = jnp.asarray(f['in/student_cls'][s])  # (V, B, K)
        views = targets[target].reshape(2, *logits.shape[1:])
        pairs = 2 + 2 * len(logits)

        def value(logits, views=views, pairs=pairs):
            # The file holds the sum over all pairs; ours is its share of the mean over all pairs.
            other = jnp.zeros((2, *logits.shape[1:]))
            return pairs * losses.dino_loss(views, other, logits, student_temp(f))[1]

        loss, grad = jax.value_and_grad(value)(logits)
        f.check(f'out/dino_loss_{target}/{s}', loss)
        f.check(f'grad/dino_loss_{target}/{s}', grad)


@TARGETS
def test_golden_dinov2_heads_losses_masked_patch_loss_matches(golden, target):
    f = golden('dinov2_heads_losses')
    for s, _, targets, mask in patch_targets(f):
        logits = jnp.asarray(f['in/student_patch'][s])
        weights = ibot_weights(mask).reshape(-1)
        valid = np.asarray(mask).reshape(-1)
        f.check(f'out/masks_weight/{s}', weights[valid])

        def value(logits, weights=weights, targets=targets, mask=mask):
            rows = logits.reshape(-1, logits.shape[-1])
            return losses.ibot_loss(targets[target], rows, weights, len(mask), student_temp(f))

        loss, grad = jax.value_and_grad(value)(logits)
        f.check(f'out/ibot_masked_{target}/{s}', loss)
        f.check(f'out/ibot_masked_noweight_{target}/{s}', loss)
        grad = grad.reshape(-1, grad.shape[-1])
        f.check(f'grad/ibot_masked_{target}/{s}', grad[valid])
        assert not np.any(grad[~valid])


def test_golden_dinov2_heads_losses_dense_patch_loss_matches(golden):
    f = golden('dinov2_heads_losses')
    for s, temp in enumerate(f.hyper['teacher_temps']):
        mask = jnp.asarray(f['in/masks'][s])
        targets = losses.softmax_center(jnp.asarray(f['in/teacher_patch'][s]), 0, temp)
        loss = losses.ibot_loss(
            targets,
            jnp.asarray(f['in/student_patch'][s]),
            ibot_weights(mask),
            len(mask),
            student_temp(f),
        )
        f.check(f'out/ibot_dense/{s}', loss)


def test_golden_dinov2_heads_losses_koleo_matches_also_with_equal_rows(golden):
    f = golden('dinov2_heads_losses')
    loss, grad = jax.value_and_grad(losses.koleo)(jnp.asarray(f['in/koleo_x']))
    f.check('out/koleo', loss)
    f.check('grad/koleo', grad)
    f.check('out/koleo_duplicate_rows', losses.koleo(jnp.asarray(f['in/koleo_dup'])))
