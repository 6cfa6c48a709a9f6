# SPDX-License-Identifier: Apache-2.0
"""Fine-tuned classifiers in official names: a run's export and released files come in whole."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import tiny
import tiny_weights
from ssl_jax import cli, encoder, methods
from ssl_jax.augment import photometry
from ssl_jax.data import sources
from ssl_jax.evals import command
from ssl_jax.interop import export, files, layouts
from ssl_jax.models import vit as vit_lib
from ssl_jax.run import weights

SCENES = dict(source='scenes', n=8, size=32, split='test')


def classifier(pool='patch', **fields):
    classes = sources.open_source(SCENES).classes
    c = tiny.base('classifier')
    words = dict(method__pool=pool, method__num_classes=len(classes), method__classes=classes)
    return tiny.changed(c, {**words, **fields})


def disturbed(params):
    """Nothing is as it was made, so that nothing hides: the two norms differ."""
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(x.dtype), params)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    made = {}

    def get(pool):
        if pool not in made:
            made[pool] = tmp_path_factory.mktemp(pool) / 'run'
            tiny.save(classifier(pool), made[pool], step=5, change=disturbed)
        return made[pool]

    return get


def images(n=2):
    return np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3)).astype(np.uint8)


def logits(opened):
    return opened.method.logits(opened.params, opened.extra, images())['test']


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize('pool', ['patch', 'cls'])
def test_a_fine_tuned_run_leaves_and_comes_back_to_the_bit_with_its_classes(run, tmp_path, pool):
    want = weights.open_run(run(pool))
    out = export.export(want, 'official', tmp_path / 'out', what='full')
    cli.main(['import', str(out), '--workdir', str(tmp_path / 'w')])
    got = weights.open_run(tmp_path / 'w')
    same(got.params, want.params)
    assert got.method.classes == want.method.classes and got.vit == want.vit
    np.testing.assert_array_equal(logits(got), logits(want))
    again = export.export(got, 'official', tmp_path / 'again', what='full')
    same(dict(files.read(again).tensors), dict(files.read(out).tensors))
    for path in (out, tmp_path / 'w'):
        a, b = (encoder.load_model(p)(images()) for p in (path, run(pool)))
        same(a, b)


def test_without_the_sidecar_features_are_what_the_head_sees(run, tmp_path):
    want = weights.open_run(run('patch'))
    out = export.export(want, 'official', tmp_path / 'out', what='full')
    alone = tmp_path / 'alone.safetensors'
    alone.write_bytes((out / 'model.safetensors').read_bytes())
    got = encoder.load_model(alone)(images())
    pixels = photometry.normalize(images())
    np.testing.assert_allclose(got['patch'], want.method.features(want.params, pixels), atol=1e-5)
    tokens = want.vit.apply({'params': want.params['encoder']}, pixels)
    np.testing.assert_allclose(got['cls_tokens'], tokens['pre_norm'][:, :1], atol=1e-5)


def test_eval_scores_the_imported_classifier_as_it_scores_the_run(run, tmp_path):
    out = export.export(weights.open_run(run('patch')), 'official', tmp_path / 'out', what='full')
    weights.import_weights(out, tmp_path / 'w', log=None)
    rows = [command.evaluate_run(w, test=SCENES) for w in (run('patch'), tmp_path / 'w')]
    assert rows[0][0]['top1'] == rows[1][0]['top1'] and rows[1][0]['model'] == 'trained'


def started(path, config):
    """(params, lines) of a run that starts from weights."""
    import ssl_jax.step as step_lib

    method = methods.make(config)
    params, extra = jax.jit(method.init)(jax.random.key(1))
    state = step_lib.TrainState(0, params, {}, extra, 0)

    def abstract(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    shapes = step_lib.TrainState(0, *jax.tree.map(abstract, (params, {}, extra)), 0)
    found, _, lines = weights.load_into(str(path), method, state, shapes)
    return jax.device_get(found), lines


@pytest.mark.parametrize('form', ['file', 'import'])
def test_fine_tuning_goes_on_from_it_with_the_norm_and_with_the_head_if_it_fits(
    run, tmp_path, form
):
    want = weights.open_run(run('patch'))
    out = export.export(want, 'official', tmp_path / 'out', what='full')
    path = out / 'model.safetensors'
    if form == 'import':
        path = tmp_path / 'w'
        weights.import_weights(out, path, log=None)
    got, _ = started(path, classifier())
    same(got['head'], want.params['head'])
    same(got['fc_norm'], want.params['fc_norm'])
    same(got['encoder']['blocks'], want.params['encoder']['blocks'])
    fewer = classifier(method__num_classes=4, method__classes=())
    got, lines = started(path, fewer)
    same(got['fc_norm'], want.params['fc_norm'])
    assert any('fresh' in x and 'head' in x and 'classes of this run' in x for x in lines)


@pytest.mark.parametrize('pool', ['patch', 'cls'])
def test_golden_mae_vit_classifier_a_released_file_gives_the_official_logits(
    golden, tmp_path, pool
):
    f = golden('mae_vit_classifier')
    other, name = ('norm.', 'global_pool') if pool == 'patch' else ('fc_norm.', 'cls')
    tensors = {k: x for k, x in f.under('w').items() if not k.startswith(other)}
    files.write(tmp_path / 'finetuned.safetensors', tensors)
    hint = f'num_heads={f.hyper["num_heads"]}'
    cli.main(['import', str(tmp_path / 'finetuned.safetensors'), '--workdir',
              str(tmp_path / 'w'), hint])  # fmt: skip
    opened = weights.open_run(tmp_path / 'w')
    params, pixels = opened.params, f.images()
    # The epsilon is in no tensor; the golden file has 1e-6, as the official code has.
    f.check(f'out/features_{name}', opened.method.features(params, pixels))
    out = opened.vit.apply({'params': params['encoder']}, pixels)
    seen = out['pooled'] if pool == 'patch' else out['cls_tokens'][:, 0]
    f.check(f'out/features_{name}', seen)
    assert opened.method.num_classes == f.hyper['num_classes'] and not opened.method.classes
    back = export.export(opened, 'official', tmp_path / 'out', what='full')
    same(dict(files.read(back).tensors), tensors)


def test_the_fine_tuned_form_of_beit_is_a_classifier_with_its_tables(tmp_path):
    vit = vit_lib.ViT(
        32, 2, 4, patch_size=8, img_size=32, pos_embed='none', rel_pos='layer', key_bias=False,
        layer_scale=0.1, init_scheme='beit', pooled_norm=True,
    )  # fmt: skip
    w = layouts.Weights('beit', 'official', 'full', vit, num_classes=7, pool='patch')
    params = tiny_weights.params(w)
    params['encoder']['norm'] = params['fc_norm']
    tensors, extra = layouts.to_layout(w, params)
    assert 'fc_norm.weight' in tensors and 'norm.weight' not in tensors and not extra
    found = layouts.recognise(tensors)
    assert dataclasses.replace(found, remarks=()) == dataclasses.replace(
        w, vit=vit.clone(layer_scale=1.0)
    )
    same(layouts.to_ours(found, tensors), params)


def test_a_pooled_encoder_leaves_alone_where_others_have_its_norm_and_else_says_why(run, tmp_path):
    out = export.export(weights.open_run(run('patch')), 'official', tmp_path / 'out', what='full')
    (out / files.EXTRA).unlink()
    weights.import_weights(out, tmp_path / 'w', log=None)
    opened = weights.open_run(tmp_path / 'w')
    assert opened.vit.pooled_norm
    for to in ('official', 'timm'):
        back = export.export(opened, to, tmp_path / to)
        assert 'fc_norm.weight' in files.read(back).tensors
        same(weights.open_weights(back).params['encoder'], opened.params['encoder'])
    args = json.loads((tmp_path / 'timm' / 'config.json').read_text())['model_args']
    assert args['fc_norm'] and args['global_pool'] == 'avg'
    with pytest.raises(ValueError, match='normalises every token'):
        export.export(opened, 'hf', tmp_path / 'hf')
    with pytest.raises(ValueError, match='give one from pretraining'):
        opened.encoder_for(opened.vit, opened.params['encoder'])
