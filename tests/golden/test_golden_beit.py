# SPDX-License-Identifier: Apache-2.0
"""BEiT against the official PyTorch code and transformers: pretraining, classifier, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden import load
from ssl_jax import config as config_lib
from ssl_jax import methods
from ssl_jax.interop import layouts
from ssl_jax.models import blocks, vit
from ssl_jax.objectives import losses

PROBE = 2.0**-9
# What writes to the residual stream; the epsilon probe of the golden set scales these.
WRITES = ('patch_embed.proj', 'pos_embed', 'cls_token', 'mask_token', 'attn.proj', 'mlp.fc2')
INDEX = 'relative_position_index'  # not a weight; checked by itself


def make_method(h):
    """The method of a golden file's hyper-parameters."""
    c = config_lib.default('beit')
    c.method.update(
        size=None,
        embed_dim=h['embed_dim'],
        depth=h['depth'],
        num_heads=h['num_heads'],
        patch_size=h['patch_size'],
        img_size=h['img_size'],
        mlp_ratio=h['mlp_ratio'],
        abs_pos=h['abs_pos'],
        token_patch_size=h['patch_size'],
        vocab=h['vocab'],
    )
    return methods.make(c)


@functools.lru_cache
def pretraining(probe=False):
    """(file, method, Weights, params) of the official pretraining model."""
    f = load('beit')
    weights = f.under('w/pretrain')
    if probe:
        weights = {k: v * PROBE if any(w in k for w in WRITES) else v for k, v in weights.items()}
    found = layouts.recognise(weights)
    return f, make_method(f.hyper), found, layouts.to_ours(found, weights)


def objective(f, method):
    images, mask = jnp.asarray(f.images()), jnp.asarray(f['in/bool_masked_pos'])
    words = jnp.asarray(f['in/token_ids'], jnp.int32)
    most = int(mask.sum(axis=1).max())

    def run(params):
        return method.objective(params, images, mask, words, bound=most)

    return run


def encode(method, params, images, mask=None):
    run = jax.jit(lambda p, x: method.vit.apply({'params': p}, x, mask=mask))
    return run(params['encoder'], jnp.asarray(images))


@pytest.mark.parametrize('under', ['w/pretrain', 'w/finetune'])
def test_golden_beit_keys_and_numbers_come_back(under):
    weights = load('beit').under(under)
    found = layouts.recognise(weights)
    back, extra = layouts.to_layout(found, layouts.to_ours(found, weights))
    assert not extra and set(back) == set(weights) - set(found.left_out)
    assert not found.left_out and found.what == 'full'
    for key, x in back.items():
        assert x.dtype == weights[key].dtype
        np.testing.assert_array_equal(x, weights[key], err_msg=key)


def test_golden_beit_is_the_network_of_our_method():
    _, method, found, _ = pretraining()
    assert found.vit == method.vit.clone(layer_scale=found.vit.layer_scale, drop_path=0.0)
    assert found.vocab == method.head.features


def test_golden_beit_relative_positions_match():
    f, method, _, params = pretraining()
    table = params['encoder']['rel_pos_bias']
    window = method.grid
    index = f[f'w/pretrain/rel_pos_bias.{INDEX}']
    np.testing.assert_array_equal(blocks.relative_index(window), index)
    assert blocks.relative_rows(window) == len(table)
    f.check('out/rel_pos_bias', blocks.relative_bias(table, window))


def test_golden_beit_features_and_logits_match():
    f, method, _, params = pretraining()
    mask = jnp.asarray(f['in/bool_masked_pos'])
    out = encode(method, params, f.images(), mask)
    tokens = jnp.concatenate([out['cls_tokens'], out['patch_tokens']], axis=1)
    f.check('out/features', tokens)
    logits = np.asarray(method.head.apply({'params': params['head']}, out['patch_tokens']))
    f.check('out/logits_all', logits)
    f.check('out/logits_masked', logits[f['in/bool_masked_pos']])


def test_golden_beit_loss_and_accuracy_match():
    f, method, _, params = pretraining()
    loss, terms = jax.jit(objective(f, method))(params)
    f.check('out/loss', loss)
    f.check('out/mlm_acc', terms['mim_acc'])


def test_golden_beit_every_gradient_matches():
    f, method, found, params = pretraining()
    run = objective(f, method)
    grads = jax.jit(jax.grad(lambda p: run(p)[0]))(params)
    named, _ = layouts.to_layout(found, grads)
    named = {k: v for k, v in named.items() if INDEX not in k}
    assert set(named) == set(f.under('grad'))
    for key, value in named.items():
        f.check(f'grad/{key}', value)


def test_golden_beit_every_epsilon_matches():
    f, method, _, params = pretraining(probe=True)
    out = encode(method, params, f.images(), jnp.asarray(f['in/bool_masked_pos']))
    tokens = jnp.concatenate([out['cls_tokens'], out['patch_tokens']], axis=1)
    f.check('out/eps_probe/features', tokens)


def classifier():
    """(file, Weights, params, features(params, images)) of fine-tuning: the norm of the mean."""
    f = load('beit')
    weights = f.under('w/finetune')
    found = layouts.recognise(weights)
    params = layouts.to_ours(found, weights)

    def features(params, images):
        out = found.vit.apply({'params': params['encoder']}, images)
        return out['pooled']

    return f, found, params, features


def test_golden_beit_classifier_matches():
    f, found, params, features = classifier()
    labels = jnp.asarray(f['in/labels'])

    def run(params):
        x = features(params, jnp.asarray(f.images()))
        logits = x @ params['head']['kernel'] + params['head']['bias']
        return losses.word_cross_entropy(logits, labels).mean(), (x, logits)

    (loss, (x, logits)), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    f.check('out/finetune_features', x)
    f.check('out/finetune_logits', logits)
    f.check('out/finetune_ce', loss)
    grads['fc_norm'] = grads['encoder']['norm']  # which is the norm of the mean
    named, _ = layouts.to_layout(found, grads)
    wanted = f.under('grad_finetune')
    assert wanted
    for key in wanted:
        f.check(f'grad_finetune/{key}', named[key])


def test_golden_hf_beit_model_keys_numbers_and_config_come_back():
    f = load('hf_BeitModel')
    config, weights = f.hyper['resolved_config'], f.under('w')
    found = layouts.recognise(weights, config)
    assert layouts.family(found).hf_class(found) == f.hyper['class']
    back, extra = layouts.to_layout(found, layouts.to_ours(found, weights))
    assert not extra and set(back) == set(weights)
    for key, x in back.items():
        np.testing.assert_array_equal(x, weights[key], err_msg=key)
    written = layouts.config_json(found)
    written.pop('architectures')
    assert written == {k: config.get(k) for k in written}


@pytest.mark.parametrize('masked', [False, True])
def test_golden_hf_beit_model_tokens_match(masked):
    f = load('hf_BeitModel')
    found = layouts.recognise(f.under('w'), f.hyper['resolved_config'])
    model, params = found.vit, layouts.to_ours(found, f.under('w'))['encoder']
    mask = jnp.asarray(f['in/bool_masked_pos']) if masked else None
    ids = tuple(range(model.depth))
    out = jax.jit(lambda p, x: model.apply({'params': p}, x, mask=mask, capture=ids))(
        params, jnp.asarray(f.images('in/pixel_values'))
    )
    end = '_masked' if masked else ''
    for i, x in enumerate(out['blocks']):
        f.check(f'out/hidden_states{end}/{i + 1}', x)
    # With mean pooling transformers has no final norm; ours is the norm of its pooler.
    f.check(f'out/last_hidden_state{end}', out['pre_norm'])
    mean = out['pre_norm'][:, 1:].mean(axis=1)
    f.check(f'out/pooler_output{end}', vit.final_norm(params, mean, model.eps))


def test_golden_beit_attention_maps_are_those_of_the_last_block():
    """With values and projection of our own choice the block returns the weights themselves."""
    f, method, _, params = pretraining()
    model, images = method.vit.clone(depth=1), jnp.asarray(f.images())
    encoder = jax.tree.map(jnp.asarray, params['encoder'])
    encoder['blocks'] = jax.tree.map(lambda p: p[-1:], encoder['blocks'])
    weights = jax.jit(lambda p, x: vit.last_attention(model, p, x))(encoder, images)
    dim, heads = model.embed_dim, model.num_heads
    # Values are the first channels of the input, the projection is the identity, no MLP.
    attn = encoder['blocks']['attn']
    width = dim // heads
    values = jnp.eye(dim)
    attn['qkv']['kernel'] = attn['qkv']['kernel'].at[0, :, 2 * dim :].set(values)
    attn['qkv']['v_bias'] = jnp.zeros((1, dim))
    attn['proj'] = {'kernel': values[None], 'bias': jnp.zeros((1, dim))}
    encoder['blocks']['ls1']['gamma'] = jnp.ones((1, dim))
    encoder['blocks']['ls2']['gamma'] = jnp.zeros((1, dim))
    zero = {**encoder, 'blocks': jax.tree.map(jnp.zeros_like, encoder['blocks'])}
    run = jax.jit(lambda p: model.apply({'params': p}, images)['pre_norm'])
    before, after = run(zero), run(encoder)
    norm1 = jax.tree.map(lambda p: p[0], encoder['blocks']['norm1'])
    x = blocks.LayerNorm(model.eps).apply({'params': norm1}, before)
    x = x.reshape(*x.shape[:2], heads, width)
    want = before + jnp.einsum('bhnm,bmhd->bnhd', weights, x).reshape(before.shape)
    np.testing.assert_allclose(after, want, atol=1e-5)


@pytest.mark.parametrize(
    ('change', 'says'),
    [
        (dict(keep=True), 'not for some of their patches'),
        (dict(cls=2), 'one class token and no registers, not 2 and 0'),
    ],
    ids=str,
)
def test_relative_positions_refuse_what_they_do_not_know(change, says):
    model = vit.ViT(
        32, 1, 4, patch_size=8, img_size=32, rel_pos='shared', num_cls_tokens=change.get('cls', 1)
    )
    ids = jnp.zeros((1, 4), jnp.int32) if change.get('keep') else None
    with pytest.raises(ValueError) as error:
        jax.eval_shape(
            lambda x: model.init(jax.random.key(0), x, ids_keep=ids), jnp.zeros((1, 32, 32, 3))
        )
    assert says in str(error.value)
