# SPDX-License-Identifier: Apache-2.0
"""BEiT against the official PyTorch code and transformers: pretraining, classifier, gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from golden import load
from ssl_jax import config as config_lib
from ssl_jax import config_splitmask, losses
from ssl_jax.interop import tables
from ssl_jax.methods import beit
from ssl_jax.models import layers, vit

PROBE = 2.0**-9
# What writes to the residual stream; the epsilon probe of the golden set scales these.
WRITES = ('patch_embed.proj', 'pos_embed', 'cls_token', 'mask_token', 'attn.proj', 'mlp.fc2')
INDEX = 'relative_position_index'  # not a weight; checked by itself

# Names of the official code that differ from those of `tables.encoder`.
OFFICIAL = {
    'rel_pos_bias': 'rel_pos_bias.relative_position_bias_table',
    'attn/qkv/q_bias': 'attn.q_bias',
    'attn/qkv/v_bias': 'attn.v_bias',
    'attn/rel_pos_bias': 'attn.relative_position_bias_table',
    'ls1/gamma': 'gamma_1',
    'ls2/gamma': 'gamma_2',
}
# Names on disk of transformers' BeitModel, inside a layer.
HF_BLOCK = {
    'norm1/scale': 'layernorm_before.weight',
    'norm1/bias': 'layernorm_before.bias',
    'norm2/scale': 'layernorm_after.weight',
    'norm2/bias': 'layernorm_after.bias',
    'attn/qkv/kernel': tuple(
        f'attention.attention.{k}.weight' for k in ('query', 'key', 'value')
    ),
    'attn/qkv/q_bias': 'attention.attention.query.bias',
    'attn/qkv/v_bias': 'attention.attention.value.bias',
    'attn/proj/kernel': 'attention.output.dense.weight',
    'attn/proj/bias': 'attention.output.dense.bias',
    'mlp/fc1/kernel': 'intermediate.dense.weight',
    'mlp/fc1/bias': 'intermediate.dense.bias',
    'mlp/fc2/kernel': 'output.dense.weight',
    'mlp/fc2/bias': 'output.dense.bias',
    'ls1/gamma': 'lambda_1',
    'ls2/gamma': 'lambda_2',
}


def how(path):
    if 'patch_embed' in path and path.endswith('kernel'):
        return 'conv'
    return 'linear' if path.endswith('kernel') else 'same'


def leaf(path):
    """The torch name of a path that differs in its last part only."""
    path = path.replace('kernel', 'weight').replace('scale', 'weight')
    return path.replace('/', '.')


def official_rows(params):
    """(our path, official key, how) of a parameter tree of ours without its `encoder` level."""
    rows = []
    for path, _ in tables._flatten(params):
        if path.startswith('blocks/'):
            inside = path.removeprefix('blocks/')
            key = f'blocks.{{i}}.{OFFICIAL.get(inside, leaf(inside))}'
        else:
            key = OFFICIAL.get(path, leaf(path))
        rows.append((path, key, how(path)))
    return rows


def hf_rows(params):
    rows = []
    names = {
        'cls_token': 'embeddings.cls_token',
        'mask_token': 'embeddings.mask_token',
        'patch_embed/proj/kernel': 'embeddings.patch_embeddings.projection.weight',
        'patch_embed/proj/bias': 'embeddings.patch_embeddings.projection.bias',
        'rel_pos_bias': 'encoder.relative_position_bias.relative_position_bias_table',
        'norm/scale': 'pooler.layernorm.weight',
        'norm/bias': 'pooler.layernorm.bias',
    }
    for path, _ in tables._flatten(params):
        if path.startswith('blocks/'):
            keys = HF_BLOCK[path.removeprefix('blocks/')]
            keys = (keys,) if isinstance(keys, str) else keys
            keys = tuple(f'encoder.layer.{{i}}.{k}' for k in keys)
            rows.append((path, keys if len(keys) > 1 else keys[0], how(path)))
        else:
            rows.append((path, names[path], how(path)))
    return rows


def from_torch(rows, weights, abstract):
    """`tables.from_torch`; the mask token has a leading axis more there than here."""
    weights = {
        k: v[0] if k.endswith('mask_token') else v for k, v in weights.items() if INDEX not in k
    }
    return tables.from_torch(rows, weights, abstract)


def make_method(h):
    """The method of a golden file's hyper-parameters."""
    c = config_lib.default()
    c.method = m = config_splitmask.beit()
    m.update(
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
    return beit.from_config(c)


@functools.lru_cache
def pretraining(probe=False):
    """(file, method, rows, params) with `encoder` and `head` at one level, as the names are."""
    f = load('beit')
    method = make_method(f.hyper)
    abstract, _ = jax.eval_shape(method.init, jax.random.key(0))
    flat = {**abstract['encoder'], 'lm_head': abstract['head']}
    rows = official_rows(flat)
    weights = f.under('w/pretrain')
    if probe:
        weights = {k: v * PROBE if any(w in k for w in WRITES) else v for k, v in weights.items()}
    flat = from_torch(rows, weights, flat)
    return f, method, rows, {'head': flat.pop('lm_head'), 'encoder': flat}


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


def test_golden_beit_relative_positions_match():
    f, method, _, params = pretraining()
    table = params['encoder']['rel_pos_bias']
    window = method.grid
    index = f[f'w/pretrain/rel_pos_bias.{INDEX}']
    np.testing.assert_array_equal(layers.relative_index(window), index)
    assert layers.relative_rows(window) == len(table)
    f.check('out/rel_pos_bias', layers.relative_bias(table, window))


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
    f, method, rows, params = pretraining()
    run = objective(f, method)
    grads = jax.jit(jax.grad(lambda p: run(p)[0]))(params)
    named = tables.to_torch(rows, {**grads['encoder'], 'lm_head': grads['head']})
    assert set(named) == set(f.under('grad'))
    for key, value in named.items():
        f.check(f'grad/{key}', value[None] if key == 'mask_token' else value)


def test_golden_beit_every_epsilon_matches():
    f, method, _, params = pretraining(probe=True)
    out = encode(method, params, f.images(), jnp.asarray(f['in/bool_masked_pos']))
    tokens = jnp.concatenate([out['cls_tokens'], out['patch_tokens']], axis=1)
    f.check('out/eps_probe/features', tokens)


def classifier():
    """(file, rows, params, features(params, images)) of fine-tuning: no final norm, `fc_norm`."""
    f = load('beit')
    h = f.hyper
    model = make_method(h).vit.clone(rel_pos='layer', mask_token=False)
    abstract = jax.eval_shape(functools.partial(vit.init_params, model), jax.random.key(0))
    dim = model.embed_dim
    norm = {k: jax.ShapeDtypeStruct((dim,), jnp.float32) for k in ('scale', 'bias')}
    head = {
        'kernel': jax.ShapeDtypeStruct((dim, h['classes']), jnp.float32),
        'bias': jax.ShapeDtypeStruct((h['classes'],), jnp.float32),
    }
    flat = {k: v for k, v in abstract.items() if k != 'norm'} | {'fc_norm': norm, 'head': head}
    rows = official_rows(flat)
    params = from_torch(rows, f.under('w/finetune'), flat)
    unused = {'scale': jnp.ones(dim), 'bias': jnp.zeros(dim)}

    def features(params, images):
        encoder = {k: v for k, v in params.items() if k not in ('fc_norm', 'head')}
        out = model.apply({'params': {**encoder, 'norm': unused}}, images)
        mean = out['pre_norm'][:, 1:].mean(axis=1)
        return layers.LayerNorm().apply({'params': params['fc_norm']}, mean)

    return f, rows, params, features


def test_golden_beit_classifier_matches():
    f, rows, params, features = classifier()
    labels = jnp.asarray(f['in/labels'])

    def run(params):
        x = features(params, jnp.asarray(f.images()))
        logits = x @ params['head']['kernel'] + params['head']['bias']
        return losses.word_cross_entropy(logits, labels).mean(), (x, logits)

    (loss, (x, logits)), grads = jax.jit(jax.value_and_grad(run, has_aux=True))(params)
    f.check('out/finetune_features', x)
    f.check('out/finetune_logits', logits)
    f.check('out/finetune_ce', loss)
    named = tables.to_torch(rows, grads)
    wanted = f.under('grad_finetune')
    assert wanted
    for key in wanted:
        f.check(f'grad_finetune/{key}', named[key])


@pytest.mark.parametrize('masked', [False, True])
def test_golden_hf_beit_model_tokens_match(masked):
    f = load('hf_BeitModel')
    h = f.hyper['config']
    model = vit.ViT(
        embed_dim=h['hidden_size'],
        depth=h['num_hidden_layers'],
        num_heads=h['num_attention_heads'],
        patch_size=h['patch_size'],
        img_size=h['image_size'],
        mlp_ratio=h['intermediate_size'] / h['hidden_size'],
        pos_embed='learned' if h['use_absolute_position_embeddings'] else 'none',
        rel_pos='shared' if h['use_shared_relative_position_bias'] else 'layer',
        key_bias=False,
        layer_scale=h['layer_scale_init_value'],
        mask_token=h['use_mask_token'],
        init_scheme='beit',
        eps=f.hyper['resolved_config']['layer_norm_eps'],
    )
    abstract = jax.eval_shape(functools.partial(vit.init_params, model), jax.random.key(0))
    params = from_torch(hf_rows(abstract), f.under('w'), abstract)
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
    x = layers.LayerNorm(model.eps).apply({'params': norm1}, before)
    x = x.reshape(*x.shape[:2], heads, width)
    want = before + jnp.einsum('bhnm,bmhd->bnhd', weights, x).reshape(before.shape)
    np.testing.assert_allclose(after, want, atol=1e-5)


@pytest.mark.parametrize(
    ('change', 'says'),
    [
        (dict(size=40), 'are for whole images of 32x32 px'),
        (dict(keep=True), 'without some patches'),
        (dict(cls=2), 'one class token and no registers, not 2 and 0'),
    ],
    ids=str,
)
def test_relative_positions_refuse_what_they_do_not_know(change, says):
    model = vit.ViT(
        32, 1, 4, patch_size=8, img_size=32, rel_pos='shared', num_cls_tokens=change.get('cls', 1)
    )
    size = change.get('size', 32)
    ids = jnp.zeros((1, 4), jnp.int32) if change.get('keep') else None
    with pytest.raises(ValueError) as error:
        jax.eval_shape(
            lambda x: model.init(jax.random.key(0), x, ids_keep=ids), jnp.zeros((1, size, size, 3))
        )
    assert says in str(error.value)
