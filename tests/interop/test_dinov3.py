# SPDX-License-Identifier: Apache-2.0
"""DINOv3 for others: official names and those of transformers, there and back, and its oracle."""

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
from ssl_jax import step as step_lib
from ssl_jax.interop import card, export, files, layouts, processors
from ssl_jax.interop.families import dinov3
from ssl_jax.models import vit as vit_lib
from ssl_jax.run import weights

VIT = dict(
    embed_dim=32,
    depth=2,
    num_heads=4,
    patch_size=16,
    img_size=224,
    num_register_tokens=4,
    pos_embed='rope',
    key_bias=False,
    layer_scale=1.0,
    mask_token=True,
    init_scheme='dinov3',
    eps=1e-5,
)
KINDS = {
    'mlp': {},
    # Heads of width 12, three blocks, the FFN of the plus sizes; keys with bias, no registers.
    'swiglu': dict(embed_dim=36, depth=3, num_heads=3, ffn='swiglu', mlp_ratio=6.0),
    'keys': dict(key_bias=True, num_register_tokens=0, mlp_ratio=1.7, img_size=64),
}
LAYOUTS = ('official', 'hf')
CASES = [(kind, layout) for kind in KINDS for layout in LAYOUTS]
QUICK = {'xla_backend_optimization_level': 0}


@functools.cache
def exported(kind, layout):
    """(Weights, params, state dict)."""
    vit = vit_lib.ViT(**{**VIT, **KINDS[kind]})
    w = layouts.Weights('dinov3', layout, 'backbone', vit)
    params = tiny_weights.params(w)
    tensors, extra = layouts.to_layout(w, params)
    assert not extra
    return w, params, tensors


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def ours(vit, params, images, **kw):
    """All tokens after the final norm: class, registers, patches."""
    run = jax.jit(lambda p, x, kw: vit.apply({'params': p}, x, **kw), compiler_options=QUICK)
    out = run(params['encoder'], images, kw)
    return np.concatenate([out[f'{k}_tokens'] for k in ('cls', 'reg', 'patch')], axis=1)


# Names


@pytest.mark.parametrize('kind,layout', CASES)
def test_out_and_in_again_is_bit_identical_and_everything_is_found(kind, layout):
    w, params, tensors = exported(kind, layout)
    hints = json.loads(json.dumps(layouts.config_json(w))) or {'img_size': w.vit.img_size}
    found = layouts.recognise(tensors, hints)
    assert dataclasses.replace(found, remarks=(), names='hub') == w
    assert found.remarks == (dinov3.LICENCE,) and found.left_out == ()
    shapes = {k: x.shape for k, x in tensors.items()}
    assert layouts.recognise(shapes, hints) == found
    same(layouts.to_ours(found, tensors), params)
    assert layouts.from_dict(json.loads(json.dumps(layouts.to_dict(w)))) == w


def test_the_official_names_are_those_of_the_repository():
    _, params, tensors = exported('swiglu', 'official')
    block = [
        *('norm1.weight', 'norm1.bias', 'attn.qkv.weight', 'attn.qkv.bias', 'attn.qkv.bias_mask'),
        *('attn.proj.weight', 'attn.proj.bias', 'ls1.gamma', 'norm2.weight', 'norm2.bias'),
        *(f'mlp.w{i}.{k}' for i in (1, 2, 3) for k in ('weight', 'bias')),
        'ls2.gamma',
    ]
    names = ['cls_token', 'storage_tokens', 'mask_token', 'rope_embed.periods']
    names += ['patch_embed.proj.weight', 'patch_embed.proj.bias', 'norm.weight', 'norm.bias']
    assert set(tensors) == {*names, *(f'blocks.{i}.{k}' for i in range(3) for k in block)}
    qkv = params['encoder']['blocks']['attn']['qkv']
    bias = tensors['blocks.1.attn.qkv.bias']
    np.testing.assert_array_equal(bias[:36], qkv['q_bias'][1])
    np.testing.assert_array_equal(bias[36:72], 0)
    np.testing.assert_array_equal(bias[72:], qkv['v_bias'][1])
    np.testing.assert_array_equal(
        tensors['blocks.2.attn.qkv.bias_mask'], [1] * 36 + [0] * 36 + [1] * 36
    )
    np.testing.assert_allclose(tensors['rope_embed.periods'], [1, 100 ** (1 / 3), 100 ** (2 / 3)])
    gate, value = np.split(params['encoder']['blocks']['mlp']['w12']['kernel'][0], 2, axis=-1)
    np.testing.assert_array_equal(tensors['blocks.0.mlp.w1.weight'], gate.T)
    np.testing.assert_array_equal(tensors['blocks.0.mlp.w2.weight'], value.T)


def test_a_bias_that_the_mask_hides_is_not_read():
    w, params, tensors = exported('mlp', 'official')
    key = 'blocks.1.attn.qkv.bias'
    hidden = {**tensors, key: tensors[key] + np.repeat(np.array([0, 9, 0], np.float32), 32)}
    same(layouts.to_ours(layouts.recognise(hidden), hidden), params)


def test_the_heads_are_told_by_the_periods_and_the_widths():
    _, _, tensors = exported('swiglu', 'official')
    assert layouts.recognise(tensors).vit.num_heads == 3
    w, _, tensors = exported('mlp', 'hf')
    with pytest.raises(ValueError, match='2 blocks of width 32 .* give num_heads'):
        layouts.recognise(tensors)
    assert layouts.recognise(tensors, {'num_heads': 4}).vit == w.vit
    assert dinov3.HEADS[1280, 32] == 20 and dinov3.HEADS[4096, 40] == 32


def test_a_teacher_of_training_is_read_and_its_heads_are_named():
    _, params, tensors = exported('mlp', 'official')
    wrapped = {f'teacher.backbone.{k}': x for k, x in tensors.items()}
    wrapped['teacher.dino_head.last_layer.weight'] = np.zeros((8, 4), np.float32)
    wrapped['teacher.backbone.local_cls_norm.weight'] = np.ones(32, np.float32)
    found = layouts.recognise(wrapped)
    assert found.prefix == 'teacher.backbone.'
    local = 'teacher.backbone.local_cls_norm.weight'
    assert found.left_out == (local, 'teacher.dino_head.last_layer.weight')
    same(layouts.to_ours(found, wrapped), params)


@pytest.mark.parametrize('layout', LAYOUTS)
def test_weights_without_bias_in_attention_get_zeros_and_say_so(layout):
    _, params, tensors = exported('mlp', layout)
    less = {k: x for k, x in tensors.items() if not k.endswith(dinov3.BIASES)}
    assert len(less) < len(tensors)
    found = layouts.recognise(less, {'num_heads': 4})
    assert 'no bias there: it is zero here' in ' '.join(found.remarks)
    attn = layouts.to_ours(found, less)['encoder']['blocks']['attn']
    assert not attn['qkv']['q_bias'].any() and not attn['qkv']['v_bias'].any()
    np.testing.assert_array_equal(
        attn['proj']['bias'], params['encoder']['blocks']['attn']['proj']['bias']
    )


def broken(**changes):
    return {**exported('mlp', 'official')[2], **changes}


@pytest.mark.parametrize(
    'changes,message',
    [
        ({'blocks.1.attn.qkv.bias_mask': np.full(96, np.nan, np.float32)}, 'never initialised'),
        ({'blocks.0.attn.qkv.bias_mask': np.ones(96, np.float32)}, 'not 1 for queries and values'),
        ({'rope_embed.periods': np.array([1, 20], np.float32)}, r'not 100\^\(2 i / \(d/2\)\)'),
        ({'blocks.1.attn.qkv.bias': np.zeros(95, np.float32)}, r'v_bias has shape \(31,\)'),
    ],
)
def test_a_tensor_that_contradicts_its_name_is_refused(changes, message):
    tensors = broken(**changes)
    with pytest.raises(ValueError, match=message):
        layouts.to_ours(layouts.recognise(tensors), tensors)


def test_periods_rounded_to_bfloat16_are_known():
    tensors = broken()
    rounded = jnp.asarray(tensors['rope_embed.periods'], jnp.bfloat16)
    tensors['rope_embed.periods'] = np.asarray(rounded, np.float32)
    layouts.to_ours(layouts.recognise(tensors), tensors)


def test_a_norm_of_class_tokens_alone_is_refused():
    with pytest.raises(ValueError, match=r'final norm of class tokens alone \(cls_norm\)'):
        layouts.recognise(broken(**{'cls_norm.weight': np.ones(32, np.float32)}))


FOREIGN = {
    'timm': ({'patch_embed.proj.weight': (8, 3, 8, 8), 'reg_token': (1, 4, 8)}, {}),
    'timm by its config': ({'x': (8,)}, {'architecture': 'vit_small_patch16_dinov3'}),
    'convnext': ({'stages.0.weight': (8, 8)}, {'model_type': 'dinov3_convnext'}),
}


@pytest.mark.parametrize('form', FOREIGN)
def test_its_relatives_are_refused_by_name(form):
    with pytest.raises(ValueError, match='DINOv3.* read.*; known are MAE, Pixio, DINOv2, DINOv3'):
        layouts.recognise(*FOREIGN[form])


def test_another_base_of_the_periods_is_refused():
    w, _, tensors = exported('mlp', 'hf')
    for change in ({'rope_theta': 50.0}, {'hidden_act': 'silu'}, {'key_bias': True}):
        with pytest.raises(ValueError, match=f'config.json says {next(iter(change))}='):
            layouts.recognise(tensors, {**layouts.config_json(w), **change})


def test_an_encoder_that_is_not_quite_dinov3_cannot_leave_and_says_why():
    w, _, _ = exported('mlp', 'hf')

    def why(**changes):
        return layouts.refusals(dataclasses.replace(w, vit=w.vit.clone(**changes)))

    assert not why()['official', 'backbone'] and not why()['hf', 'backbone']
    assert 'one class token' in why(layer_scale=None)['official', 'backbone']
    assert 'eps' in why(eps=1e-4)['official', 'backbone'] and not why(eps=1e-4)['hf', 'backbone']
    assert 'official or hf' in why()['timm', 'backbone']


# transformers


@functools.cache
def their_model(kind, folder):
    """Their model of an export, with every key used and none of the model left out."""
    transformers = pytest.importorskip('transformers')
    w, _, tensors = exported(kind, 'hf')
    folder.mkdir()
    files.write(folder / 'model.safetensors', tensors, {'format': 'pt'})
    (folder / 'config.json').write_text(json.dumps(layouts.config_json(w)))
    kw = dict(output_loading_info=True, attn_implementation='eager')
    model, info = transformers.DINOv3ViTModel.from_pretrained(folder, **kw)
    for problem in ('missing_keys', 'unexpected_keys', 'mismatched_keys'):
        assert not info[problem], f'{problem} {info[problem]}'
    return model.eval()


@pytest.fixture(scope='module')
def theirs(tmp_path_factory):
    root = tmp_path_factory.mktemp('hf')
    return lambda kind: their_model(kind, root / kind)


@pytest.mark.parametrize(
    'kind,size',
    [
        ('mlp', (224, 224)),
        ('swiglu', (224, 320)),
        pytest.param('mlp', (224, 320), marks=pytest.mark.slow),
        pytest.param('swiglu', (224, 224), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_transformers_gives_the_same_tokens_masked_and_not(kind, size, theirs):
    torch = pytest.importorskip('torch')
    w, params, _ = exported(kind, 'hf')
    images = tiny_weights.images(size)
    pixels = torch.from_numpy(np.moveaxis(images, -1, 1).copy())
    n = size[0] * size[1] // 256
    masks = np.random.default_rng(1).random((2, 2, n)) < [[[0.4]], [[0.0]]]
    for mask in masks:
        kw = {'bool_masked_pos': torch.from_numpy(mask)} if mask.any() else {}
        with torch.no_grad():
            want = theirs(kind)(pixels, **kw).last_hidden_state.numpy()
        got = ours(w.vit, params, images, mask=jnp.asarray(mask))
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_the_attention_of_the_last_block_is_that_of_transformers(theirs):
    torch = pytest.importorskip('torch')
    w, params, _ = exported('mlp', 'hf')
    images = tiny_weights.images((32, 80))
    with torch.no_grad():
        pixels = torch.from_numpy(np.moveaxis(images, -1, 1).copy())
        want = theirs('mlp')(pixels, output_attentions=True).attentions[-1].numpy()
    run = jax.jit(functools.partial(vit_lib.last_attention, w.vit), compiler_options=QUICK)
    got = run(params['encoder'], images)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize('kind', KINDS)
def test_what_transformers_saves_and_holds_comes_back_bit_identical(kind, theirs, tmp_path):
    w, params, tensors = exported(kind, 'hf')
    model = theirs(kind)
    model.save_pretrained(tmp_path / 'again')
    file = files.read(tmp_path / 'again')
    assert set(file.tensors) == set(tensors)  # the names of the hub
    state_dict = {k: v.numpy() for k, v in model.state_dict().items()}
    for found_in, hints in ((file.tensors, file.hints), (state_dict, layouts.config_json(w))):
        found = layouts.recognise(found_in, hints)
        assert (found.family, found.layout, found.vit) == ('dinov3', 'hf', w.vit)
        assert found.remarks == (dinov3.LICENCE,)  # no field of config.json is strange
        same(layouts.to_ours(found, found_in), params)


@pytest.mark.parametrize(
    'size,hidden',
    [
        ('S+', 1536),
        *(
            pytest.param(*x, marks=pytest.mark.slow)
            for x in (('S', 1536), ('B', 3072), ('L', 4096), ('H+', 5120), ('7B', 8192))
        ),
    ],
)
def test_sizes_have_the_parameters_of_transformers(size, hidden):
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    method = methods.make(config_lib.load('continue_dinov3_vits16', (f'method.size={size}',)))
    w = layouts.Weights('dinov3', 'hf', 'backbone', method.vit)
    config = transformers.DINOv3ViTConfig(**layouts.config_json(w))
    assert config.intermediate_size == hidden
    with torch.device('meta'):
        model = transformers.DINOv3ViTModel(config)
    count = sum(x.numel() for x in model.parameters())
    assert count == card.num_parameters(layouts.abstract(w))


def test_the_images_of_a_published_folder_are_squashed_to_a_square():
    stated = dict(image_processor_type='DINOv3ViTImageProcessorFast', do_center_crop=None)
    stated |= dict(size=dict(height=224, width=224), resample=2, default_to_square=True)
    view = processors.transform_of(224, stated)
    assert (view['mode'], view['size'], view['interpolation']) == ('squash', 224, 'bilinear')
    bare = processors.transform_of(224, {'do_resize': True}, {'model_type': 'dinov3_vit'})
    assert bare == view and bare['mean'][0] == 0.485


# Whole commands


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """The workdir of a tiny run."""
    workdir = tmp_path_factory.mktemp('dinov3') / 'run'
    tiny.save(tiny.dinov2('dinov3', name='tiny dinov3'), workdir, step=2)
    return workdir


@pytest.mark.parametrize('to', ['hf', pytest.param('official', marks=pytest.mark.slow)])
def test_a_run_leaves_and_comes_back_and_gives_the_same_features(run, tmp_path, to):
    out = export.export(weights.open_run(run), to, tmp_path / 'out')
    lines = []
    weights.import_weights(out, tmp_path / 'w', log=lines.append)
    want = weights.open_run(run)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3)).astype(np.uint8)
    a = encoder.load_model(run)(images)
    for path in (out, tmp_path / 'w'):
        got = weights.open_weights(path)
        assert got.vit == want.vit
        same(got.networks()['encoder'][1], want.networks()['encoder'][1])
    b = encoder.load_model(out)(images)
    np.testing.assert_array_equal(a['patch_tokens'], b['patch_tokens'])
    text = (out / 'README.md').read_text()
    assert 'positions: rotary\n' in text and 'dino_head, ibot_head' in text
    assert 'DINOv3 License' not in text + ' '.join(lines)  # of no one else's weights


def test_the_licence_is_named_on_import_in_its_exports_and_in_those_of_runs_begun_from_it(
    run, tmp_path
):
    _, _, tensors = exported('mlp', 'official')
    files.write(tmp_path / 'published.safetensors', tensors)
    lines = []
    weights.import_weights(tmp_path / 'published.safetensors', tmp_path / 'w', log=lines.append)
    assert dinov3.LICENCE in lines
    out = export.export(weights.open_run(tmp_path / 'w'), 'hf', tmp_path / 'out')
    assert f'\n{dinov3.LICENCE}\n' in (out / 'README.md').read_text()
    again, lines = tmp_path / 'again', []
    weights.import_weights(out, tmp_path / 'w2', log=lines.append)
    export.export(weights.open_run(tmp_path / 'w2'), 'official', again)
    assert f'\n{dinov3.LICENCE}\n' in (again / 'README.md').read_text()
    opened = weights.open_run(run)
    opened.config.unlock()
    opened.config.init_from = 'published.safetensors'
    out = export.export(opened, 'hf', tmp_path / 'begun')
    want = f'This run began from `published.safetensors`. {dinov3.LICENCE}'
    assert want in (out / 'README.md').read_text()


def begun(config, path):
    """(params, extra, lines) of a run with `config` that begins with the weights at `path`."""
    method = methods.make(config)
    shapes = jax.eval_shape(method.init, jax.random.key(0))
    fresh = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), shapes)
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)  # noqa: E731
    state, abstract = (
        step_lib.TrainState(0, params, {}, extra, 0)
        for params, extra in (fresh, jax.tree.map(place, fresh))
    )
    return weights.load_into(str(path), method, state, abstract)


def test_a_run_begins_with_the_official_file_at_its_own_image_size(tmp_path):
    w, params, tensors = exported('mlp', 'official')
    files.write(tmp_path / 'published.safetensors', tensors)
    path = f'{tmp_path}/published.safetensors'
    sizes = dict(num_register_tokens=4, patch_size=16, mlp_ratio=4.0)
    config = tiny.dinov2('dinov3', **{f'method__{k}': x for k, x in sizes.items()})
    found, extra, lines = begun(config, path)
    for tree in (found, extra['teacher']):
        same(jax.device_get(tree['backbone']), params['encoder'])
    assert [line.split()[0] for line in lines] == ['taken', 'fresh', 'fresh']
    with pytest.raises(
        ValueError, match='key_bias is False there and True here.*pos_embed is rope'
    ):
        begun(tiny.dinov2(method__num_register_tokens=4, method__patch_size=16), path)
    follow = methods.get('classifier')().follow(weights.open_weights(path), set())
    config = config_lib.default('classifier')
    config.method.update(follow)
    vit = methods.make(config).vit  # without a mask token
    assert vit.clone(drop_path=0.0, mask_token=True) == w.vit


@pytest.mark.slow
@pytest.mark.parametrize('to', ['onnx', 'jax'])
def test_a_run_leaves_as_a_program(run, tmp_path, to):
    if to == 'onnx':
        pytest.importorskip('onnxruntime')
    out = export.export(weights.open_run(run), to, tmp_path / 'out')
    found = json.loads((out / card.PROVENANCE).read_text())
    assert found['largest_difference'] < 1e-5
