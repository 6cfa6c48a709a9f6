# SPDX-License-Identifier: Apache-2.0
"""Dense heads, losses, sliding windows, metrics and kNN against Pixio's official evaluation."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden import load
from ssl_jax import encoder
from ssl_jax.evals import dense_scores, head_spec, knn
from ssl_jax.interop import heads, tables
from ssl_jax.models import dense, vit
from ssl_jax.objectives import dense as losses

STEM = 'pixio_eval_heads_metrics'
HEADS = pytest.mark.parametrize('name', ['seg_linear', 'seg_dpt', 'depth_linear', 'depth_dpt'])
SCORES = dict(
    abs_rel='AbsRel', sq_rel='SqRel', rmse='RMSE', rmse_log='RMSElog', log10='log10', silog='SiLog',
    d1='d1', d2='d2', d3='d3',
)  # fmt: skip


@functools.lru_cache
def model():
    """The encoder of the file as `encoder.Model`."""
    f = load(STEM)
    h = f.hyper
    net = vit.ViT(
        embed_dim=h['embed_dim'],
        depth=h['depth'],
        num_heads=h['num_heads'],
        patch_size=h['patch_size'],
        img_size=h['img_size'],
        mlp_ratio=h['mlp_ratio'],
        num_cls_tokens=h['n_cls_tokens'],
        eps=h.get('ln_eps', 1e-6),
    )
    abstract = jax.eval_shape(functools.partial(vit.init_params, net), jax.random.key(0))
    params = tables.from_torch(tables.encoder(net, ours=''), f.under('w/encoder'), abstract)
    return encoder.Model(net, params, {'size': h['img_size'], 'mean': (), 'std': ()}, STEM)


@functools.lru_cache
def build(name):
    """(module with logits or depths in 0..1, recipe, taps of in/images, variables) of a head."""
    f = load(STEM)
    h, (task, kind) = f.hyper, name.split('_')
    outputs, top = (h['nclass'], None) if task == 'seg' else (1, 1.0)
    recipe = head_spec.RECIPES['seg_head' if task == 'seg' else 'depth', f'pixio_{kind}']
    if kind == 'linear':
        module = dense.BNLinear(outputs, True, ('0', '1'), True, top)
    else:
        module = dense.PixioDPT(outputs, h['features'], tuple(h['out_channels']), top)
    inputs = jax.jit(lambda x: head_spec.taps(model(), x, recipe))(f.images())
    abstract = jax.eval_shape(module.init, jax.random.key(0), inputs)
    return module, recipe, inputs, heads.from_torch(f.under(f'w/{name}'), abstract)


def objective(f, name, out):
    """The official loss of a head's output."""
    h = f.hyper
    if name.startswith('seg'):
        return losses.cross_entropy(out, f['in/seg_mask'])
    gt = f['in/depth']
    valid = (f['in/valid'] == 1) & (gt >= h['min_depth']) & (gt <= h['max_depth'])
    return losses.silog(jnp.maximum(out * h['max_depth'], h['min_depth']), jnp.asarray(gt), valid)


def as_torch(out):
    return np.moveaxis(np.asarray(out), 3, 1) if out.ndim == 4 else np.asarray(out)


@HEADS
def test_golden_pixio_eval_heads_metrics_outputs_losses_statistics_and_gradients_match(name):
    f = load(STEM)
    module, _, inputs, variables = build(name)
    size = f['in/images'].shape[2:]

    @jax.jit
    def train(params):
        now = {**variables, 'params': params}
        out, changed = module.apply(now, inputs, size, True, mutable=['batch_stats'])
        return objective(f, name, out), (out, changed)

    f.check(
        f'out/{name}/eval',
        as_torch(jax.jit(module.apply, static_argnums=2)(variables, inputs, size)),
    )
    grad_fn = jax.value_and_grad(train, has_aux=True)
    (loss, (out, changed)), grads = grad_fn(variables['params'])
    f.check(f'out/{name}/train', as_torch(out))
    f.check(f'out/{name}/loss', loss)
    for key in [k for k in f.keys if k.startswith(f'out/{name}/running_')]:
        stat = {'running_mean_after': 'mean', 'running_var_after': 'var'}[key.split('/')[-1]]
        f.check(key, changed['batch_stats']['0'][stat])
    found, want = heads.to_torch({'params': grads}), f.under(f'grad/{name}')
    for key in want:
        f.check(f'grad/{name}/{key}', found.pop(key))
    assert all(key.startswith('scratch.refinenet4.resConfUnit1') for key in found)
    assert not any(np.any(value) for value in found.values())


@HEADS
def test_golden_pixio_eval_heads_metrics_heads_are_written_back_bit_for_bit(name):
    f = load(STEM)
    want = f.under(f'w/{name}')
    count = int(want.get('0.num_batches_tracked', 0))
    found = heads.to_torch(build(name)[3], steps=count)
    assert sorted(found) == sorted(want)
    for key, value in want.items():
        assert found[key].dtype == value.dtype
        np.testing.assert_array_equal(found[key], value)


def slide(f, name):
    """The prediction for in/big_image by windows."""
    module, recipe, _, variables = build(name)
    crop = f.hyper['crop_size']

    @jax.jit
    def predict(windows):
        out = module.apply(variables, head_spec.taps(model(), windows, recipe), (crop, crop))
        return jax.nn.softmax(out) if name.startswith('seg') else out * f.hyper['max_depth']

    (found,) = dense_scores.sliding(
        f.images('in/big_image'),
        predict,
        crop=crop,
        stride=int(crop * recipe.stride),
        shifted=False,
        batch_size=4,
    )
    return found


@pytest.mark.parametrize('kind', ['linear', 'dpt'])
def test_golden_pixio_eval_heads_metrics_depth_by_sliding_windows_matches(kind):
    f = load(STEM)
    name, h = f'depth_{kind}', f.hyper
    depth = slide(f, name)
    f.check(f'out/{name}/sliding_depth', depth[None])
    gt = f['in/big_depth'][0]
    mask = dense_scores.scored(gt, dense_scores.Region(h['min_depth'], h['max_depth']))
    scores = dense_scores.depth_scores(depth[mask], gt[mask])
    for key, ours in SCORES.items():
        f.check(f'out/{name}/metric_{key}', np.float32(scores[ours]))


@pytest.mark.parametrize('kind', ['linear', 'dpt'])
def test_golden_pixio_eval_heads_metrics_classes_by_sliding_windows_match(kind):
    f = load(STEM)
    name = f'seg_{kind}'
    pred = slide(f, name).argmax(axis=-1)
    counts = dense_scores.intersection_union(pred, f['in/big_seg_mask'][0], f.hyper['nclass'])
    per_class = dense_scores.iou(*counts)
    f.check(f'out/{name}/sliding_iou_per_class', np.nan_to_num(per_class))
    f.check(f'out/{name}/sliding_miou', np.float32(dense_scores.mean_iou(per_class, 'zero')))


def test_golden_pixio_eval_heads_metrics_iou_over_several_maps_matches():
    f = load(STEM)
    counts = np.sum(
        [
            dense_scores.intersection_union(pred, gt, f.hyper['nclass'])
            for pred, gt in zip(f['in/miou_pred'], f['in/miou_gt'], strict=True)
        ],
        axis=0,
    )
    f.check('out/intersection', np.float32(counts[0]))
    f.check('out/union', np.float32(counts[1]))
    per_class = dense_scores.iou(*counts)
    f.check('out/miou_per_class', np.nan_to_num(per_class))
    f.check('out/miou', np.float32(dense_scores.mean_iou(per_class, 'zero')))


def test_golden_pixio_eval_heads_metrics_silog_and_depth_scores_match():
    f = load(STEM)
    pred, gt, valid = (f[f'in/silog_{name}'] for name in ('pred', 'gt', 'valid'))
    loss, grad = jax.value_and_grad(losses.silog)(jnp.asarray(pred), gt, valid)
    f.check('out/silog', loss)
    f.check('grad/silog', grad)
    scores = dense_scores.depth_scores(pred[valid], gt[valid])
    for key, ours in SCORES.items():
        f.check(f'out/depth_metric_{key}', np.float32(scores[ours]))


def test_golden_pixio_eval_heads_metrics_knn_matches():
    f = load(STEM)
    h = f.hyper
    scores = knn.knn(
        f['in/knn_train'], f['in/knn_train_labels'], f['in/knn_test'], f['in/knn_test_labels'],
        num_classes=h['knn_classes'], ks=tuple(h['knn_k']), temperature=h['knn_temperature'],
    )  # fmt: skip
    for k in h['knn_k']:
        f.check(f'out/knn_top1_k{k}', np.float32(scores[k]['top1']))
        f.check(f'out/knn_top5_k{k}', np.float32(scores[k]['top5']))
