# SPDX-License-Identifier: Apache-2.0
"""Linear depth heads, their losses, kNN and inputs of the linear classifier against DINOv2."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden import load
from ssl_jax import encoder
from ssl_jax.evals import knn
from ssl_jax.interop import heads
from ssl_jax.models import dense
from ssl_jax.objectives import dense as losses

STEM = 'dinov2_eval_depth_knn_linear'
GRADIENT_WEIGHT = 0.5  # official, of GradientLoss


def nchw(depth):
    return np.asarray(depth)[:, None]


def build(f, name):
    """(module, taps, variables) of a head of the file."""
    h = f.hyper['heads'][name]
    module = dense.DepthLinear(
        h['min_depth'],
        h['max_depth'],
        bins=h['n_bins'] if h['classify'] else 1,
        norm=h['norm_strategy'],
        upsample=h['upsample'],
    )
    patches = jnp.moveaxis(f['in/patch_maps'], 2, -1)
    taps = [(patches[i], jnp.asarray(f['in/cls'][i])) for i in h['in_index']]
    abstract = jax.eval_shape(module.init, jax.random.key(0), taps)
    return module, taps, heads.from_torch(f.under(f'w/{name}'), abstract)


def run(f, name):
    """{key of the file: value} of a head, its losses and gradients."""
    module, taps, variables = build(f, name)
    gt = jnp.asarray(f['in/depth_gt'])

    def depths(variables):
        depth = module.apply(variables, taps)
        return depth, dense.bilinear(depth[..., None], gt.shape[2:], False)[..., 0]

    def terms(variables):
        _, depth = depths(variables)
        return losses.sig_loss(depth, gt[:, 0]), GRADIENT_WEIGHT * losses.gradient_loss(
            depth[:, None], gt
        )

    @jax.jit
    def everything(variables):
        depth, resized = depths(variables)
        sig, grad4 = terms(variables)
        out = {
            'depth': depth[:, None],
            'depth_resized': resized[:, None],
            'sigloss': sig,
            'gradient_loss_4d_as_called': grad4,
            'gradient_loss_2d_image0': GRADIENT_WEIGHT * losses.gradient_loss(resized[0], gt[0, 0]),
            'sigloss_warmup_first_call': losses.sig_loss(resized, gt[:, 0], warm_up=True),
        }
        return out, jax.grad(lambda v: sum(terms(v)))(variables)

    out, grads = everything(variables)
    out = {f'out/{name}/{key}': value for key, value in out.items()}
    return out | {f'grad/{name}/{k}': v for k, v in heads.to_torch(grads).items()}


def test_golden_dinov2_eval_depth_knn_linear_depths_losses_and_gradients_match():
    f = load(STEM)
    for name in f.hyper['heads']:
        found = run(f, name)
        want = [k for k in f.keys if k.split('/')[:2] in (['out', name], ['grad', name])]
        assert sorted(found) == sorted(want)
        for key in want:
            f.check(key, found[key])


def test_golden_dinov2_eval_depth_knn_linear_heads_are_written_back_bit_for_bit():
    f = load(STEM)
    for name in f.hyper['heads']:
        *_, variables = build(f, name)
        want = f.under(f'w/{name}')
        found = heads.to_torch(variables)
        assert sorted(found) == sorted(want)
        for key, value in want.items():
            np.testing.assert_array_equal(found[key], value)


def test_golden_dinov2_eval_depth_knn_linear_votes_and_their_accuracy_match():
    f = load(STEM)
    ks, temperature = tuple(f.hyper['knn_k']), f.hyper['knn_temperature']
    train, train_y = f['in/knn_train'], f['in/knn_train_labels'].astype(np.int32)
    test, classes = f['in/knn_test'], f.hyper['knn_classes']
    mesh = knn.sharding.make_mesh(devices=jax.local_devices()[:1])
    similarities, labels = knn.neighbours(
        train, train_y, np.ones(len(train), bool), test, max(ks), mesh
    )
    votes = knn.votes(similarities, labels, ks, temperature, classes)
    total = votes[max(ks)].sum(axis=1, keepdims=True)  # the softmax is over the largest k
    scores = knn.knn(
        train, train_y, test, f['in/knn_test_labels'],
        num_classes=classes, ks=ks, temperature=temperature,
    )  # fmt: skip
    for k in ks:
        f.check(f'out/knn_probas_k{k}', votes[k] / total)
        f.check(f'out/knn_top1_k{k}', np.float32(scores[k]['top1']))


@pytest.mark.parametrize('avgpool', [0, 1])
def test_golden_dinov2_eval_depth_knn_linear_inputs_of_the_linear_classifier_match(avgpool):
    f = load(STEM)
    names = [k for k in f.keys if k.startswith('out/linear_input_') and k.endswith(f'avg{avgpool}')]
    assert names
    for name in names:
        n = int(name.split('_n')[1].split('_')[0])
        patch = f['in/lin_patch'][-1].mean(axis=1) if avgpool else None
        f.check(name, encoder.linear_input(f['in/lin_cls'][-n:], patch))
