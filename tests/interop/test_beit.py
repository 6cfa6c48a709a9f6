# SPDX-License-Identifier: Apache-2.0
"""BEiT and SplitMask for others: official names, transformers and timm, there and back."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
import tiny_weights
from ssl_jax import config as config_lib
from ssl_jax import encoder, methods
from ssl_jax.interop import card, export, families, files, layouts
from ssl_jax.interop.families import beit
from ssl_jax.models import vit as vit_lib
from ssl_jax.run import weights

BEIT = dict(
    embed_dim=32,
    depth=2,
    num_heads=4,
    patch_size=8,
    img_size=32,
    pos_embed='none',
    rel_pos='shared',
    key_bias=False,
    layer_scale=0.1,
    mask_token=True,
    init_scheme='beit',
)
KINDS = {
    'beit': {},
    # Heads of width 12, three blocks, a grid of odd side; what fine-tuned models have.
    'layer': dict(
        embed_dim=36, depth=3, num_heads=3, img_size=24, rel_pos='layer', mask_token=False
    ),
    'absolute': dict(pos_embed='learned', mlp_ratio=1.7, layer_scale=None),
}
CASES = [(kind, layout) for kind in KINDS for layout in export.LAYOUTS]
CASES = [(kind, layout, 'backbone') for kind, layout in CASES]
CASES += [('beit', 'official', 'full'), ('beit', 'hf', 'full')]
QUICK = {'xla_backend_optimization_level': 0}


def described(kind, layout, what='backbone'):
    """`layouts.Weights` of one of KINDS."""
    vit = vit_lib.ViT(**{**BEIT, **KINDS[kind]})
    return layouts.Weights('beit', layout, what, vit, vocab=11 if what == 'full' else None)


@functools.cache
def exported(kind, layout, what='backbone'):
    """(Weights, params, state dict, extra)."""
    w = described(kind, layout, what)
    params = tiny_weights.params(w)
    return w, params, *layouts.to_layout(w, params)


def rules(layout):
    """How the library of a layout resizes positions."""
    return {
        'official': dict(rel_resize='spline', pos_resize='bicubic'),
        'hf': dict(rel_resize='bilinear', pos_resize='bicubic'),
        'timm': dict(rel_resize='linear', pos_resize='antialias'),
    }[layout]


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def tokens(vit, params, images, **kw):
    """All tokens after the final norm: class, then patches."""
    out = jax.jit(vit.apply, compiler_options=QUICK)({'params': params['encoder']}, images, **kw)
    return np.concatenate([out['cls_tokens'], out['patch_tokens']], axis=1)


# Layouts


@pytest.mark.parametrize('kind,layout,what', CASES)
def test_out_and_in_again_is_bit_identical(kind, layout, what):
    w, params, state_dict, extra = exported(kind, layout, what)
    same(layouts.to_ours(w, state_dict, extra), params)


@pytest.mark.parametrize('kind,layout,what', CASES)
def test_everything_is_found_from_the_tensors_and_the_config(kind, layout, what):
    w, _, state_dict, _ = exported(kind, layout, what)
    hints = json.loads(json.dumps(layouts.config_json(w)))
    if w.vit.rel_pos is None:
        hints = hints or {'num_heads': w.vit.num_heads}
    found = layouts.recognise(state_dict, hints)
    scale = w.vit.layer_scale
    scale = scale if layout == 'hf' or scale is None else 1.0  # where it began is in HF's config
    vit = w.vit.clone(layer_scale=scale, mask_token=w.vit.mask_token or layout == 'timm')
    assert found == dataclasses.replace(w, vit=vit.clone(**rules(layout)))
    shapes = {k: x.shape for k, x in state_dict.items()}
    assert layouts.recognise(shapes, hints) == found


def test_the_heads_are_told_by_the_table_and_need_no_hint():
    _, _, state_dict, _ = exported('layer', 'official')
    assert layouts.recognise(state_dict).vit.num_heads == 3


def test_official_files_hold_the_index_of_the_tables_and_others_do_without():
    w, params, state_dict, _ = exported('layer', 'official')
    keys = [k for k in state_dict if k.endswith(beit.INDEX)]
    assert keys == [f'blocks.{i}.attn.{beit.INDEX}' for i in range(3)]
    assert all(state_dict[k].dtype == np.int64 for k in keys)
    less = {k: x for k, x in state_dict.items() if k not in keys}
    same(layouts.to_ours(layouts.recognise(less), less), params)
    turned = {**state_dict, keys[1]: state_dict[keys[1]].T}
    with pytest.raises(ValueError, match=r'blocks\.1.*is not the order'):
        layouts.to_ours(layouts.recognise(turned), turned)


def test_the_index_in_older_folders_of_transformers_is_checked_and_not_named():
    w, params, state_dict, _ = exported('beit', 'hf')
    key = f'encoder.relative_position_bias.{beit.INDEX}'
    old = {f'beit.{k}': x for k, x in {**state_dict, key: beit.index(w.vit)}.items()}
    found = layouts.recognise(old, layouts.config_json(w))
    assert found.prefix == 'beit.' and not found.left_out
    same(layouts.to_ours(found, old), params)


def test_a_renamed_key_and_a_wrong_table_are_listed_and_nothing_is_loaded():
    w, _, state_dict, _ = exported('beit', 'official', 'full')
    broken = dict(state_dict)
    broken['blocks.1.attn.vbias'] = broken.pop('blocks.1.attn.v_bias')
    broken['blocks.0.gamma_1'] = np.zeros(7, np.float32)
    with pytest.raises(ValueError) as error:
        layouts.to_ours(layouts.recognise(broken), broken)
    text = str(error.value)
    assert 'missing blocks.1.attn.v_bias (nearest: blocks.1.attn.vbias)' in text
    assert 'blocks.0.gamma_1 has shape (7,), expected (32,)' in text and '\n' not in text
    broken = {**state_dict, f'rel_pos_bias.{beit.TABLE}': np.zeros((50, 4), np.float32)}
    with pytest.raises(ValueError, match=r'has shape \(50, 4\), expected \(\(2 n - 1\)\^2 \+ 3'):
        layouts.recognise(broken)
    with pytest.raises(ValueError, match='img_size 64 .* 4 x 4 positions and patches of 8'):
        layouts.recognise(state_dict, {'img_size': 64})


def test_an_encoder_that_is_not_quite_beit_cannot_leave_and_says_why():
    def why(what, **changes):
        w = described('beit', 'hf', what)
        return layouts.refusals(dataclasses.replace(w, vit=w.vit.clone(**changes)))

    assert not any(why('full')[k] for k in (c[1:] for c in CASES))
    odd = why('backbone', num_cls_tokens=2)
    assert all('BEiT has one class token' in odd[layout, 'backbone'] for layout in export.LAYOUTS)
    eps = why('full', eps=1e-5)
    assert 'timm normalises with eps 1e-6' in eps['timm', 'backbone'] and not eps['hf', 'full']
    assert 'use what=backbone' in why('backbone')['hf', 'full']
    assert families.of(described('beit', 'hf').vit) == 'beit'


@pytest.mark.parametrize('kind', KINDS)
def test_the_description_names_the_positions(kind):
    w, params, _, _ = exported(kind, 'official')
    text = '\n'.join(card.describe(w, params, 1))
    want = {
        'beit': 'positions: relative, a table of biases for all blocks',
        'layer': 'positions: relative, a table of biases in each block',
        'absolute': 'positions: learned, and relative, a table of biases for all blocks',
    }
    assert want[kind] in text and 'beit, official names' in text
    assert layouts.from_dict(json.loads(json.dumps(layouts.to_dict(w)))) == w


# transformers


def their_model(folder, w):
    """Their model, with every key of the file used and none of the model left out."""
    transformers = pytest.importorskip('transformers')
    name = layouts.family(w).hf_class(w)
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    for problem in ('missing_keys', 'unexpected_keys', 'mismatched_keys'):
        assert not info[problem], f'{name}: {problem} {info[problem]}'
    return model.eval()


def write(folder, kind, what):
    """(Weights, params, folder): what an export writes for transformers."""
    w, params, tensors, _ = exported(kind, 'hf', what)
    folder.mkdir()
    files.write(folder / 'model.safetensors', tensors, {'format': 'pt'})
    (folder / 'config.json').write_text(json.dumps(layouts.config_json(w)))
    return w, params, folder


def as_torch(images):
    torch = pytest.importorskip('torch')
    return torch.from_numpy(np.moveaxis(images, -1, 1).copy())


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('masked', [False, True])
def test_transformers_gives_the_same_tokens(kind, masked, tmp_path):
    torch = pytest.importorskip('torch')
    w, params, folder = write(tmp_path / 'hf', kind, 'backbone')
    model, kw = their_model(folder, w), {}
    images = tiny_weights.images((w.vit.img_size,) * 2)
    mask = np.random.default_rng(1).random((len(images), 16)) < 0.4
    if masked and not w.vit.mask_token:
        pytest.skip('a fine-tuned model has no mask token')
    if masked:
        kw = {'bool_masked_pos': torch.from_numpy(mask)}
    with torch.no_grad():
        theirs = model(as_torch(images), **kw).last_hidden_state.numpy()
    ours = tokens(w.vit, params, images, mask=jnp.asarray(mask) if masked else None)
    tiny_weights.assert_same_tokens(ours, theirs)


def test_transformers_predicts_the_same_words(tmp_path):
    torch = pytest.importorskip('torch')
    w, params, folder = write(tmp_path / 'hf', 'beit', 'full')
    model = their_model(folder, w)
    images = tiny_weights.images((32, 32))
    mask = np.random.default_rng(1).random((len(images), 16)) < 0.4
    with torch.no_grad():
        theirs = model(as_torch(images), bool_masked_pos=torch.from_numpy(mask)).logits.numpy()
    ours = tokens(w.vit, params, images, mask=jnp.asarray(mask))[:, 1:]
    ours = ours @ params['head']['kernel'] + params['head']['bias']
    tiny_weights.assert_same_tokens(ours, theirs)


@pytest.mark.parametrize(
    'kind,what', [(kind, 'backbone') for kind in KINDS] + [('beit', 'full')], ids=str
)
def test_what_transformers_saves_and_holds_comes_back_bit_identical(kind, what, tmp_path):
    w, params, folder = write(tmp_path / 'hf', kind, what)
    model = their_model(folder, w)
    model.save_pretrained(tmp_path / 'again')
    file = files.read(tmp_path / 'again')
    state_dict = {k: v.numpy() for k, v in model.state_dict().items()}
    for tensors, hints in ((file.tensors, file.hints), (state_dict, layouts.config_json(w))):
        found = layouts.recognise(tensors, hints)
        assert (found.family, found.layout, found.what) == ('beit', 'hf', what)
        assert found.vit == w.vit.clone(**rules('hf')) and found.vocab == w.vocab
        same(layouts.to_ours(found, tensors), params)
        assert set(layouts.to_layout(found, params)[0]) == set(tensors)


def test_a_fine_tuned_classifier_of_transformers_is_read_and_its_head_named(tmp_path):
    transformers = pytest.importorskip('transformers')
    w, params, _, _ = exported('layer', 'hf')
    config = transformers.BeitConfig(
        **{**layouts.config_json(w), 'use_mean_pooling': True}, num_labels=3
    )
    model = transformers.BeitForImageClassification(config)
    model.save_pretrained(tmp_path / 'classifier')
    file = files.read(tmp_path / 'classifier')
    found = layouts.recognise(file.tensors, file.hints)
    assert found.vit == w.vit.clone(pooled_norm=True, **rules('hf'))
    assert found.left_out == ('classifier.bias', 'classifier.weight')
    first, second = layouts.notes(found)
    assert 'no final norm but pooler.layernorm, of the mean of patches' in first
    assert second == 'Left out, as no part of these weights: classifier.bias, classifier.weight.'
    norm = layouts.to_ours(found, file.tensors)['encoder']['norm']
    assert norm['scale'].tolist() == [1.0] * 36


# Whole commands


def leave(workdir, to, out, what='backbone'):
    """The folder of an export."""
    return export.export(weights.open_run(workdir), to, out, what=what)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """method -> the workdir of a tiny run of it."""
    made = {}

    def get(name):
        if name not in made:
            words = dict(name=f'tiny {name}', method__token_patch_size=8, method__vocab=64)
            made[name] = tmp_path_factory.mktemp(name) / 'run'
            tiny.save(tiny.changed(tiny.base(name), words), made[name], step=2)
        return made[name]

    return get


@pytest.mark.parametrize('to,what', [c[1:] for c in CASES if c[0] == 'beit'])
def test_a_run_leaves_and_comes_back_and_gives_the_same_features(run, tmp_path, to, what):
    workdir = run('beit')
    out = leave(workdir, to, tmp_path / 'out', what=what)
    weights.import_weights(out, tmp_path / 'w', log=None)
    want = weights.open_run(workdir)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    a = encoder.load_model(workdir)(images)
    for path in (out, tmp_path / 'w'):
        got = weights.open_weights(path)
        same(got.networks()['encoder'][1], want.params['encoder'])
        assert got.vit == want.vit
        library = 'timm' if to == 'timm' else 'transformers'
        assert got.transform == {**want.transform, 'library': library}
    b = encoder.load_model(out)(images)
    for name in ('cls', 'patch', 'patch_tokens'):
        np.testing.assert_array_equal(a[name], b[name])
    again = weights.open_run(tmp_path / 'w')
    assert again.method is None
    if what == 'full':
        same(again.params['head'], want.params['head'])
        second = leave(tmp_path / 'w', to, tmp_path / 'again', what='full')
        one, two = (files.read(folder).tensors for folder in (out, second))
        same(dict(one), dict(two))


def test_the_card_says_that_the_words_stay_behind_and_its_lines_work(run, tmp_path):
    for what, name in (('backbone', 'BeitModel'), ('full', 'BeitForMaskedImageModeling')):
        out = leave(run('beit'), 'hf', tmp_path / what, what=what)
        text = (out / 'README.md').read_text()
        assert 'The codebook of the 64 visual words (random_patches) is in the checkpoint' in text
        assert 'positions: relative, a table of biases for all blocks' in text
        assert ('layer to visual words' in text) == (what == 'full')
        pytest.importorskip('transformers')
        found = {}
        exec(text.split('```python')[1].split('```')[0].replace('DIR', str(out)), found)
        assert type(found['model']).__name__ == name


def test_published_files_of_beit_are_normalised_as_published(run, tmp_path):
    out = leave(run('beit'), 'official', tmp_path / 'out')
    half = [0.5, 0.5, 0.5]
    assert weights.open_weights(out).transform['mean'] != half
    bare = tmp_path / 'beit_base_patch16_224_pt22k.safetensors'
    files.write(bare, files.read(out).tensors)
    view = weights.open_weights(bare).transform
    assert view['mean'] == half and view['std'] == half


@pytest.mark.parametrize('key', ['model', 'module'])
def test_a_checkpoint_of_the_official_code_is_read(tmp_path, key):
    torch = pytest.importorskip('torch')
    w, params, state_dict, _ = exported('beit', 'official', 'full')
    tensors = {k: torch.from_numpy(np.array(x)) for k, x in state_dict.items()}
    torch.save({key: tensors, 'epoch': 3}, tmp_path / 'checkpoint.pth')
    file = files.read(tmp_path / 'checkpoint.pth')
    same(layouts.to_ours(layouts.recognise(file.tensors), file.tensors), params)


@pytest.mark.parametrize('to', export.LAYOUTS)
def test_a_splitmask_encoder_leaves_as_the_plain_vit_it_is(run, tmp_path, to):
    workdir = run('splitmask')
    out = leave(workdir, to, tmp_path / 'out')
    got = weights.open_weights(out)
    assert got.weights.family == 'vit' and got.vit.pos_embed == 'learned'
    same(got.networks()['encoder'][1], weights.open_run(workdir).params['encoder'])
    text = (out / 'README.md').read_text()
    assert 'Method: splitmask' in text
    assert 'The codebook of the 64 visual words (' in text
    assert 'is in the checkpoint, not in this export' in text
    with pytest.raises(ValueError, match='in names that others know, and this checkpoint has none'):
        leave(workdir, to, tmp_path / 'full', what='full')


# The encoder of SplitMask as it is, and what a run fine-tuned from scratch may make of it.
VARIANTS = {
    '': ({}, 'vit'),
    'sincos': (dict(pos_embed='sincos'), 'mae'),
    'scaled': (dict(layer_scale=0.1), 'dinov2'),
}


@pytest.mark.parametrize('kind', VARIANTS)
def test_an_encoder_without_mask_token_has_a_layout_or_a_reason(kind):
    c = config_lib.default('splitmask')
    c.method.size = 'Ti'
    fields, family = VARIANTS[kind]
    vit = methods.make(c).vit.clone(**fields)
    assert not vit.mask_token and families.of(vit) == family
    can = layouts.refusals(layouts.Weights(family, 'official', 'backbone', vit))
    assert not can['hf', 'backbone'] and not can['timm', 'backbone']
    assert bool(can['official', 'backbone']) == (kind == 'scaled')
    none = layouts.Weights(family, 'official', 'backbone', vit.clone(num_cls_tokens=0))
    none = layouts.refusals(none)
    assert 'class token' in none['hf', 'backbone'] and 'class token' in none['timm', 'backbone']


def test_beit_on_pixels_has_no_words_to_export():
    c = config_lib.default('beit')
    c.method.update(size='Ti', tokenizer='pixel')
    params, pixels = {'encoder': {}, 'head': {}}, methods.make(c)
    assert pixels.networks(params, {}) == {'encoder': (pixels.vit, {})}
    c.method.tokenizer = 'kmeans'
    assert methods.make(c).networks(params, {})['head'][0].features == 8192


# timm


def timm_keys(v):
    """Keys of timm's Beit with num_classes=0 and a norm before pooling.

    Source: timm 1.0.31 `timm/models/beit.py`, read off a state_dict().
    """
    keys = {'cls_token', 'patch_embed.proj.weight', 'patch_embed.proj.bias'}
    keys |= {'norm.weight', 'norm.bias'}
    if v.pos_embed == 'learned':
        keys.add('pos_embed')
    if v.rel_pos == 'shared':
        keys.add('rel_pos_bias.relative_position_bias_table')
    block = {f'{m}.{x}' for m in ('norm1', 'norm2', 'attn.proj') for x in ('weight', 'bias')}
    block |= {f'mlp.{m}.{x}' for m in ('fc1', 'fc2') for x in ('weight', 'bias')}
    block |= {'attn.qkv.weight', 'attn.q_bias', 'attn.v_bias'}
    if v.rel_pos == 'layer':
        block.add('attn.relative_position_bias_table')
    if v.layer_scale is not None:
        block |= {'gamma_1', 'gamma_2'}
    return keys | {f'blocks.{i}.{k}' for i in range(v.depth) for k in block}


@pytest.mark.parametrize('kind', KINDS)
def test_the_keys_are_those_of_timm(kind):
    w, _, tensors, extra = exported(kind, 'timm')
    assert set(tensors) == timm_keys(w.vit)
    assert set(extra) == ({'encoder/mask_token'} if w.vit.mask_token else set())


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_timm_gives_the_same_tokens_and_their_mean(kind, tmp_path):
    # timm that is there but not able to start, say without torchvision, is as good as none.
    timm = pytest.importorskip('timm', exc_type=ImportError)
    torch = pytest.importorskip('torch')
    w, params, tensors, _ = exported(kind, 'timm')
    files.write(tmp_path / 'model.safetensors', tensors, {'format': 'pt'})
    (tmp_path / 'config.json').write_text(json.dumps(layouts.config_json(w)))
    model = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert set(model.state_dict()) == set(tensors)
    images = tiny_weights.images((w.vit.img_size,) * 2)
    ours = tokens(w.vit, params, images)
    with torch.no_grad():
        theirs = model.forward_features(as_torch(images)).numpy()
        mean = model(as_torch(images)).numpy()
    tiny_weights.assert_same_tokens(ours, theirs)
    tiny_weights.assert_same_tokens(ours[:, 1:].mean(axis=1), mean)
