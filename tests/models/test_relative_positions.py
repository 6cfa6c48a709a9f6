# SPDX-License-Identifier: Apache-2.0
"""Relative positions for another grid: the official rule, at the start of a run and whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import interpolate

import tiny
import tiny_weights
from ssl_jax import methods
from ssl_jax import step as step_lib
from ssl_jax.interop import files, layouts
from ssl_jax.models import pos_embed
from ssl_jax.run import weights


def table(n, heads=3, seed=0, lead=()):
    shape = (*lead, (2 * n - 1) ** 2 + 3, heads)
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def distances(n_in, n_out):
    """Where the old distances lie among the new ones, by solving for the ratio as a polynomial."""
    poly = np.ones(n_in - 1)  # 1 + q + … + q^(n_in - 2) = n_out - 1
    poly[-1] -= n_out - 1
    roots = np.roots(poly)
    real = roots[(abs(roots.imag) < 1e-9) & (roots.real > 0)].real
    q = float(np.clip(real[0], 1.01, 1.5))
    steps = np.array([sum(q**j for j in range(i + 1)) for i in range(n_in - 1)])
    return np.concatenate([-steps[::-1], [0.0], steps])


def by_fitpack(values, n_in, n_out):
    """The official code's interp2d, on a regular grid the same as RectBivariateSpline."""
    x, at = distances(n_in, n_out), np.arange(1 - n_out, n_out, dtype=float)
    d = 2 * n_in - 1
    heads = [
        interpolate.RectBivariateSpline(x, x, z.reshape(d, d), kx=3, ky=3, s=0)(at, at).reshape(-1)
        for z in values[: d * d].T.astype(np.float64)
    ]
    return np.concatenate([np.stack(heads, axis=-1), values[d * d :]])


@pytest.mark.parametrize(
    'n_in,n_out', [(14, 24), (14, 32), (4, 6), (3, 5), (14, 7), (6, 4), (4, 16)], ids=str
)
def test_a_table_is_resized_as_the_official_code_does_it(n_in, n_out):
    values = table(n_in)
    got = pos_embed.resize_relative(values, n_in, n_out)
    assert got.shape == ((2 * n_out - 1) ** 2 + 3, 3) and got.dtype == np.float32
    want = by_fitpack(values, n_in, n_out)
    # The ratio is bisected to 1e-6, and the farthest of 13 distances moves by 1e-3 with it.
    np.testing.assert_allclose(got, want, atol=2e-3 if n_in > 6 else 1e-4)
    np.testing.assert_array_equal(got[-3:], values[-3:])


@pytest.mark.parametrize('n_in,n_out', [(14, 24), (14, 7), (4, 16)], ids=str)
def test_at_the_distances_themselves_the_spline_equals_fitpack(n_in, n_out):
    values, d = table(n_in, heads=1), 2 * n_in - 1
    x, at = pos_embed.relative_distances(n_in, n_out), np.arange(1 - n_out, n_out, dtype=float)
    spline = interpolate.RectBivariateSpline(x, x, values[:-3].reshape(d, d), kx=3, ky=3, s=0)
    got = pos_embed.resize_relative(values, n_in, n_out)[:-3]
    np.testing.assert_allclose(got.reshape(len(at), -1), spline(at, at), atol=1e-5)


def test_near_distances_keep_their_biases_and_the_farthest_reaches_the_border():
    x = pos_embed.relative_distances(14, 24)
    assert x[13] == 0 and x[14] == 1 and x[-1] == pytest.approx(23, abs=1e-3)
    assert pos_embed.relative_distances(14, 7)[14:].tolist() == pytest.approx(
        np.cumsum(1.01 ** np.arange(13)), rel=1e-4
    )
    w = pos_embed.relative_weights(14, 24)
    np.testing.assert_allclose(w[[22, 23, 24]], np.eye(27)[[12, 13, 14]], atol=1e-12)
    np.testing.assert_allclose(w.sum(axis=1), 1, atol=1e-12)


def test_tables_of_all_blocks_are_resized_at_once_and_an_equal_grid_is_left_alone():
    stack = table(4, lead=(2,))
    got = pos_embed.resize_relative(stack, 4, 6)
    for one, all_ in zip(stack, got, strict=True):
        np.testing.assert_array_equal(pos_embed.resize_relative(one, 4, 6), all_)
    assert pos_embed.resize_relative(stack, 4, 4) is stack


def config(name, **fields):
    fields = {'token_patch_size': 8, 'vocab': 64, 'drop_path': 0.0, **fields}
    return tiny.changed(tiny.base(name), {f'method__{k}': x for k, x in fields.items()})


def noisy(params):
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda x: x + rng.normal(size=x.shape).astype(np.float32), params)


def start(path, config):
    """(params, extra, lines) of a run with `config` that begins with the weights at `path`."""
    method = methods.make(config)
    params, extra = jax.eval_shape(method.init, jax.random.key(0))
    rng = np.random.default_rng(7)
    fresh = [
        jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), t)
        for t in (params, extra)
    ]
    state = step_lib.TrainState(0, fresh[0], {}, fresh[1], 0)
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)  # noqa: E731
    abstract = step_lib.TrainState(
        0, jax.tree.map(place, fresh[0]), {}, jax.tree.map(place, fresh[1]), 0
    )
    params, extra, lines = weights.load_into(str(path), method, state, abstract)
    return jax.device_get(params), jax.device_get(extra), lines


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """method -> (workdir, its parameters), whose tables of positions are no zeros."""
    made = {}

    def get(name):
        if name not in made:
            workdir = tmp_path_factory.mktemp(name)
            made[name] = workdir, tiny.save(config(name), workdir, change=noisy)
        return made[name]

    return get


def file(folder, **fields):
    """(a file in official names, the parameters in it)."""
    vit = methods.make(config('beit', **fields)).vit
    w = layouts.Weights('beit', 'official', 'backbone', vit)
    params = tiny_weights.params(w)
    files.write(folder / 'beit.safetensors', layouts.to_layout(w, params)[0])
    return folder / 'beit.safetensors', params['encoder']


def test_weights_of_others_start_a_run_on_larger_images(tmp_path):
    path, old = file(tmp_path)
    params, _, lines = start(path, config('beit', img_size=48))
    new = dict(params['encoder'])
    expected = pos_embed.resize_relative(old.pop('rel_pos_bias'), 4, 6)
    np.testing.assert_array_equal(new.pop('rel_pos_bias'), expected)
    jax.tree.map(np.testing.assert_array_equal, new, old)
    resized = [line.split(maxsplit=2)[1:] for line in lines if 'resized' in line]
    assert resized == [['encoder/rel_pos_bias', '4x4 to 6x6 patches, cubic spline']]
    assert any('head' in line and 'words of this run' in line for line in lines)
    assert not any('pos_embed' in line for line in lines)


@pytest.mark.parametrize('name', ['beit', pytest.param('splitmask', marks=pytest.mark.slow)])
def test_a_whole_run_continues_on_larger_images_with_its_words(runs, name):
    workdir, want = runs(name)
    params, extra, lines = start(workdir, config(name, img_size=48))
    np.testing.assert_array_equal(params['head']['kernel'], want['head']['kernel'])
    assert extra['codebook']['vectors'].shape == (64, 192)
    resized = [line.split()[1] for line in lines if line.split()[0] == 'resized']
    if name == 'beit':
        assert resized == ['params/encoder/rel_pos_bias']
        assert params['encoder']['rel_pos_bias'].shape == (11**2 + 3, 4)
    else:  # the decoder's table has no class row
        assert resized == ['params/decoder/decoder_pos_embed', 'params/encoder/pos_embed']
        old, new = (p['decoder']['decoder_pos_embed'] for p in (want, params))
        np.testing.assert_array_equal(new, pos_embed.resize(old, (6, 6), 0, 'bicubic'))


def test_a_grid_too_small_for_a_spline_is_one_sentence_and_nothing_is_loaded(tmp_path):
    path, _ = file(tmp_path, img_size=16)
    with pytest.raises(ValueError, match='nothing was loaded: a table .* of 2x2 patches') as error:
        start(path, config('beit', img_size=48))
    assert '\n' not in str(error.value) and str(path) in str(error.value)
