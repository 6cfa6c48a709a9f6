# SPDX-License-Identifier: Apache-2.0
"""A run starts from weights that exist: what fits is taken to the bit, what does not is said."""

import contextlib
import dataclasses
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
import tiny_weights
from ssl_jax import methods, sharding, train
from ssl_jax import step as step_lib
from ssl_jax.data import loader
from ssl_jax.interop import export, files, layouts
from ssl_jax.models import pos_embed
from ssl_jax.run import checkpoint, metrics, weights

LEARNED = dict(method__pos_embed='learned', method__num_cls_tokens=2)


def start(path, config, change=lambda method: method, mesh=None):
    """(fresh params, params after init_from, the lines that were printed)."""
    method = change(methods.make(config))
    shapes, extra = jax.eval_shape(method.init, jax.random.key(0))  # nothing is compiled
    rng = np.random.default_rng(7)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes)
    if mesh is not None:
        params = jax.device_put(params, sharding.infer(params, mesh))
    state = step_lib.TrainState(0, params, {}, extra, 0)
    abstract = step_lib.TrainState(0, *jax.tree.map(_abstract, (params, {}, extra)), 0)
    before = jax.device_get(params)
    got, _, lines = weights.load_into(str(path), method, state, abstract)
    assert same_bits(state.params, before), 'the fresh state was changed'
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(params), strict=True):
        assert (x.sharding, x.dtype, x.shape) == (y.sharding, y.dtype, y.shape)
    return before, jax.device_get(got), lines


def _abstract(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def same_bits(a, b):
    a, b = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def leave(workdir, to, out, what='backbone'):
    """The folder of an export."""
    return export.export(weights.open_run(workdir), to, out, what=what)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """(workdir, its parameters) of a MAE with fixed positions."""
    workdir = tmp_path_factory.mktemp('run')
    return workdir, tiny.save(tiny.config(), workdir)


@pytest.fixture(scope='module')
def learned(tmp_path_factory):
    """The same with learned positions and two class tokens, as Pixio has them."""
    workdir = tmp_path_factory.mktemp('learned')
    return workdir, tiny.save(tiny.config(**LEARNED), workdir)


# What is taken


@pytest.mark.parametrize('layout', ['official', 'hf', 'timm'])
def test_a_file_with_the_encoder_alone_fills_it_to_the_bit_and_leaves_the_decoder(
    run, tmp_path, layout
):
    workdir, want = run
    folder = leave(workdir, layout, tmp_path / 'x')
    fresh, got, lines = start(folder, tiny.config())
    assert same_bits(got['encoder'], want['encoder'])
    assert same_bits(got['decoder'], fresh['decoder'])
    assert not same_bits(got['encoder'], fresh['encoder'])
    assert lines[0].split()[:2] == ['taken', 'encoder'] and 'arrays' in lines[0]
    assert lines[1].split()[:2] == ['fresh', 'decoder'] and 'the file has none' in lines[1]
    assert len(lines) == 2


def test_one_weights_file_does_too(run, tmp_path):
    workdir, want = run
    folder = leave(workdir, 'official', tmp_path / 'x')
    _, got, _ = start(folder / 'model.safetensors', tiny.config())
    assert same_bits(got['encoder'], want['encoder'])


def test_a_file_with_the_decoder_is_taken_whole(run, tmp_path):
    workdir, want = run
    folder = leave(workdir, 'official', tmp_path / 'x', what='full')
    _, got, lines = start(folder, tiny.config())
    assert same_bits(got, want)
    assert [line.split()[:2] for line in lines] == [['taken', 'encoder'], ['taken', 'decoder']]


@pytest.mark.parametrize('what', ['backbone', 'full'])
def test_an_imported_folder_is_taken_as_far_as_it_goes(run, tmp_path, what):
    workdir, want = run
    folder = leave(workdir, 'hf', tmp_path / 'x', what=what)
    weights.import_weights(folder, tmp_path / 'imported', log=None)
    fresh, got, _ = start(tmp_path / 'imported', tiny.config())
    assert same_bits(got['encoder'], want['encoder'])
    assert same_bits(got['decoder'], (want if what == 'full' else fresh)['decoder'])


def test_a_run_is_taken_whole_onto_any_mesh(run):
    workdir, want = run
    for mesh in (None, sharding.make_mesh(data=2, fsdp=4)):
        _, got, lines = start(workdir, tiny.config(), mesh=mesh)
        assert same_bits(got, want)
        assert [line.split()[0] for line in lines] == ['taken', 'taken']


def test_an_encoder_is_placed_on_the_mesh(run, tmp_path):
    workdir, want = run
    folder = leave(workdir, 'timm', tmp_path / 'x')
    mesh = sharding.make_mesh(data=2, fsdp=4)
    _, got, _ = start(folder, tiny.config(), mesh=mesh)
    assert same_bits(got['encoder'], want['encoder'])


@pytest.mark.parametrize('field', ['embed_dim', 'num_heads'])
def test_a_decoder_of_other_sizes_stays_fresh_and_the_table_says_so(run, field):
    workdir, want = run
    # Heads have no weights of their own: the shapes alone would fit.
    value = {'embed_dim': 8, 'num_heads': 4}[field]
    fresh, got, lines = start(workdir, tiny.config(**{f'method__decoder_{field}': value}))
    assert same_bits(got['encoder'], want['encoder'])
    assert same_bits(got['decoder'], fresh['decoder'])
    assert lines[1].split()[:2] == ['fresh', 'decoder'] and 'other sizes' in lines[1]


def test_a_mask_token_that_the_file_lacks_stays_fresh_and_one_too_many_is_left_out(
    run, tmp_path, monkeypatch
):
    workdir, want = run
    folder = leave(workdir, 'official', tmp_path / 'x')

    def with_token(method):
        return method.with_modules(encoder=method.vit.clone(mask_token=True))

    fresh, got, lines = start(folder, tiny.config(), with_token)
    assert same_bits(got['encoder'].pop('mask_token'), fresh['encoder']['mask_token'])
    assert same_bits(got['encoder'], want['encoder'])
    assert lines[1].split()[:2] == ['fresh', 'encoder/mask_token']

    opened = weights.open_weights(folder)
    encoder = {**opened.params['encoder'], 'mask_token': np.zeros((1, 32), np.float32)}
    opened = dataclasses.replace(opened, params={'encoder': encoder})
    monkeypatch.setattr(weights, 'open_weights', lambda path: opened)
    _, got, lines = start(folder, tiny.config())
    assert same_bits(got['encoder'], want['encoder'])
    assert lines[1].split()[:3] == ['left', 'out', 'encoder/mask_token']


def test_another_normalisation_and_eps_are_said(run, tmp_path, monkeypatch):
    opened = weights.open_weights(run[0])
    view = {**opened.transform, 'mean': [0.5] * 3, 'std': [0.5] * 3}
    method = opened.method.with_modules(encoder=opened.vit.clone(eps=1e-12))
    opened = dataclasses.replace(opened, method=method, stated=view)
    monkeypatch.setattr(weights, 'open_weights', lambda path: opened)
    _, _, lines = start(tmp_path, tiny.config())
    assert [line.split()[0] for line in lines] == ['taken', 'differs', 'differs', 'taken']
    assert '1e-12 there, 1e-06 here' in lines[1] and 'mean [0.5, 0.5, 0.5] there' in lines[2]


# Positions


def test_learned_positions_are_resized_to_the_grid_of_the_recipe(learned, tmp_path):
    workdir, want = learned
    folder = leave(workdir, 'official', tmp_path / 'x')
    config = tiny.config(method__img_size=48, **LEARNED)
    _, got, lines = start(folder, config)
    table = want['encoder'].pop('pos_embed')
    expected = pos_embed.resize(table, (6, 6), 2, 'bicubic')
    np.testing.assert_array_equal(got['encoder']['pos_embed'], expected)
    line = next(line for line in lines if 'resized' in line)
    assert line.split(maxsplit=2)[1:] == ['encoder/pos_embed', '4x4 to 6x6 patches, bicubic']
    want['encoder']['pos_embed'] = table

    old, new = methods.make(tiny.config(**LEARNED)).vit, methods.make(config).vit
    images = np.random.default_rng(0).normal(size=(2, 48, 48, 3)).astype(np.float32)
    a = old.apply({'params': want['encoder']}, images)['patch_tokens']
    b = new.apply({'params': got['encoder']}, images)['patch_tokens']
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_rule_of_the_files_own_encoder_resizes(learned, tmp_path, monkeypatch):
    workdir, want = learned
    folder = leave(workdir, 'official', tmp_path / 'x')
    real = weights.open_weights

    def offset(path):
        opened = real(path)
        vit = opened.vit.clone(pos_resize='offset')
        return dataclasses.replace(opened, weights=dataclasses.replace(opened.weights, vit=vit))

    monkeypatch.setattr(weights, 'open_weights', offset)
    _, got, _ = start(folder, tiny.config(method__img_size=48, **LEARNED))
    expected = pos_embed.resize(want['encoder']['pos_embed'], (6, 6), 2, 'offset')
    np.testing.assert_array_equal(got['encoder']['pos_embed'], expected)


def test_fixed_positions_become_the_start_of_learned_ones(run):
    workdir, want = run
    _, got, lines = start(workdir, tiny.config(method__pos_embed='learned', method__img_size=48))
    expected = pos_embed.resize(pos_embed.sincos(32, 4, 1), (6, 6), 1, 'bicubic')
    np.testing.assert_array_equal(got['encoder'].pop('pos_embed'), expected)
    assert same_bits(got['encoder'], want['encoder'])
    assert [line.split()[0] for line in lines] == ['taken', 'filled', 'resized', 'fresh']


# What does not fit


@pytest.mark.parametrize(
    ('changes', 'says'),
    [
        (dict(method__embed_dim=64), ['embed_dim is 32 there and 64 here']),
        (dict(method__depth=3), ['depth is 2 there and 3 here']),
        (dict(method__num_heads=2), ['num_heads is 4 there and 2 here']),
        (dict(method__patch_size=4), ['patch_size is 8 there and 4 here']),
        (dict(method__num_cls_tokens=3), ['num_cls_tokens is 1 there and 3 here']),
        (dict(method__mlp_ratio=2.0), ['mlp_ratio is 4.0 there and 2.0 here']),
        (
            dict(method__depth=1, method__embed_dim=16),
            ['embed_dim is 32 there and 16 here', 'depth is 2 there and 1 here'],
        ),
    ],
)
def test_an_encoder_that_does_not_fit_is_one_sentence_with_both_values(run, changes, says):
    with pytest.raises(ValueError) as error:
        start(run[0], tiny.config(**changes))
    text = str(error.value)
    assert all(s in text for s in says) and '\n' not in text
    assert text.startswith(f'The encoder of init_from={run[0]} does not fit, nothing was loaded: ')
    assert text.count(' there and ') == len(says)


def test_other_networks_of_equal_shapes_are_refused_too(run, learned):
    def swiglu(method):
        return method.with_modules(encoder=method.vit.clone(ffn='swiglu', layer_scale=1e-5))

    with pytest.raises(ValueError, match='ffn is mlp there and swiglu here, layer_scale is none'):
        start(run[0], tiny.config(), swiglu)
    with pytest.raises(ValueError, match='pos_embed is learned there and sincos here; set these'):
        start(learned[0], tiny.config(method__num_cls_tokens=2))


def test_a_path_without_weights_is_one_sentence(tmp_path):
    for path in (tmp_path / 'nothing', tmp_path):
        with pytest.raises(ValueError) as error:
            start(path, tiny.config())
        assert str(path) in str(error.value) and '\n' not in str(error.value)


def test_the_words_behind_a_path_start_a_run_from_the_file(tmp_path):
    w = tiny_weights.weights('vit', 'official')
    tree = tiny_weights.params(w)
    files.write(tmp_path / 'vit.safetensors', layouts.to_layout(w, tree)[0])
    config = tiny.config(method__pos_embed='learned')
    with pytest.raises(ValueError, match='as in num_heads=12'):
        start(tmp_path / 'vit.safetensors', config)
    _, got, lines = start(f'{tmp_path}/vit.safetensors num_heads=4', config)
    assert same_bits(got['encoder'], tree['encoder'])
    assert 'at other sizes offset there, bicubic here' in lines[1]


@pytest.mark.parametrize('form', ['run', 'other run', 'file', 'sidecar'])
def test_nan_in_what_a_run_starts_from_is_refused_by_name(tmp_path, form):
    def broken(params):
        proj = params['encoder']['blocks']['attn']['proj']
        proj['bias'] = proj['bias'].at[1, 2].set(np.nan)
        return params

    path, name = tmp_path / 'run', 'encoder/blocks/attn/proj/bias'
    fields = {'method__decoder_depth': 2} if form == 'other run' else {}
    if form == 'sidecar':
        w = tiny_weights.weights('dinov2', 'timm')
        tensors, extra = layouts.to_layout(w, tiny_weights.params(w))
        path.mkdir()
        files.write(path / files.WEIGHTS, tensors)
        files.write(path / files.EXTRA, {k: x * np.float32(np.inf) for k, x in extra.items()})
        path, name = f'{path} num_heads=4', 'encoder/mask_token'
    elif form == 'file':
        w = tiny_weights.weights('vit', 'hf')
        path, name = f'{path}.safetensors num_heads=4', 'encoder.layer.1.attention.output.dense'
        tensors, _ = layouts.to_layout(w, broken(jax.tree.map(jnp.asarray, tiny_weights.params(w))))
        files.write(tmp_path / 'run.safetensors', tensors)
    else:
        tiny.save(tiny.config(), path, change=broken, unseen=True)
    with pytest.raises(ValueError, match='NaN or inf') as error:
        start(path, tiny.config(**fields))
    assert name in str(error.value) and '\n' not in str(error.value)


# Whole runs: the encoder waits, then moves


def tensors(workdir):
    """(step, {name: checksum}) of the newest checkpoint, moments and counters included."""
    _, meta = checkpoint.restore_model(workdir)
    return meta['step'], {k: v['sum'] for k, v in meta['tensors'].items()}


def rows(workdir):
    return [{k: v for k, v in row.items() if k != 'time'} for row in metrics.read(workdir)]


@pytest.fixture(scope='module')
def warm(run, tmp_path_factory):
    """(config, workdir, what it printed) of 6 steps; an exported encoder waits for 3 of them."""
    folder = leave(run[0], 'hf', tmp_path_factory.mktemp('x') / 'x')
    config = tiny.config(
        init_from=str(folder),
        total_steps=6,
        optim__warm_freeze=('^encoder',),
        optim__warm_freeze_steps=3,
        optim__warm_freeze_moments=False,
        checkpoint__every_steps=1,
        checkpoint__keep=10,
    )
    workdir = tmp_path_factory.mktemp('warm')
    with contextlib.redirect_stdout(io.StringIO()) as said:
        train.train(config, workdir)
    return config, workdir, said.getvalue()


def test_the_encoder_keeps_every_bit_while_it_waits_and_moves_after_the_switch(run, warm):
    found = {}
    for step in range(1, 7):
        model, _ = checkpoint.restore_model(warm[1], step=step)
        found[step] = model['params']
        assert same_bits(found[step]['encoder'], run[1]['encoder']) == (step <= 3), step
        if step > 1:  # the first step has rate 0
            assert not same_bits(found[step]['decoder'], found[1]['decoder'])
    moved = jax.tree.map(lambda a, b: np.any(a != b), found[6]['encoder'], found[3]['encoder'])
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize('kill', [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_run_killed_around_the_switch_continues_to_the_same_bits(
    warm, tmp_path, monkeypatch, kill
):
    class Killed(BaseException):
        pass

    real, left = loader.Stream.__next__, [kill + 1]

    def dying(self):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return real(self)

    config, want, _ = warm
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loader.Stream, '__next__', dying)
        train.train(config, tmp_path)
    assert tensors(tmp_path)[0] in (kill, kill + 1)
    train.train(config, tmp_path)
    assert tensors(tmp_path) == tensors(want)
    assert rows(tmp_path) == rows(want)


def test_a_run_says_what_it_took(warm):
    config, _, said = warm
    assert f'weights of {config.init_from}:\n  taken     encoder' in said
    assert '  fresh     decoder' in said and 'start: these weights at step 0, 6 steps' in said
