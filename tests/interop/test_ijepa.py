# SPDX-License-Identifier: Apache-2.0
"""I-JEPA's files: official checkpoints and transformers' IJepaModel, read and written."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
import tiny_weights
from ssl_jax import methods
from ssl_jax import step as step_lib
from ssl_jax.interop import export, files, layouts
from ssl_jax.interop.families import ijepa
from ssl_jax.models import vit as vit_lib
from ssl_jax.models.predictor import Predictor
from ssl_jax.run import errors, weights

torch = pytest.importorskip('torch')

VIT = vit_lib.ViT(**tiny_weights.PLAIN, num_cls_tokens=0, pos_embed='sincos')
PREDICTOR = Predictor(out_dim=32, embed_dim=16, depth=1, num_heads=4, grid=4, mlp_ratio=3.0)


def whole(layout='official'):
    return layouts.Weights('ijepa', layout, 'full', VIT, predictor=PREDICTOR)


def backbone(layout):
    return layouts.Weights('ijepa', layout, 'backbone', VIT)


def tensors(w, seed=0):
    return layouts.to_layout(w, tiny_weights.params(w, seed))[0]


def is_predictor(name):
    return name.startswith('predictor_') or name == 'mask_token'


def wrapped(state_dict, keep=lambda name: True):
    """A state dict as torch saves it from DistributedDataParallel."""
    return {
        f'module.{k}': torch.tensor(np.ascontiguousarray(x))
        for k, x in state_dict.items()
        if keep(k)
    }


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """A file with the keys that the official training writes."""
    path = tmp_path_factory.mktemp('ijepa') / 'jepa-latest.pth.tar'
    state = tensors(whole())
    parts = dict(
        encoder=wrapped(tensors(backbone('official'), seed=1)),
        predictor=wrapped(state, is_predictor),
        target_encoder=wrapped(state, lambda name: not is_predictor(name)),
    )
    moments = {'exp_avg': torch.zeros(3), 'exp_avg_sq': torch.zeros(3)}
    opt = {'state': {0: moments, 1: moments}, 'param_groups': [{'lr': 1e-3, 'params': [0, 1]}]}
    about = dict(epoch=300, loss=0.2, batch_size=64, world_size=16, lr=1e-6, scaler=None)
    torch.save({**parts, 'opt': opt, **about}, path)
    return path


@pytest.fixture(scope='module')
def imported(checkpoint, tmp_path_factory):
    """(workdir of the import, its log lines)."""
    workdir, lines = tmp_path_factory.mktemp('imported') / 'run', []
    weights.import_weights(checkpoint, workdir, log=lines.append, num_heads=4)
    return workdir, lines


def assert_same_bits(got, want):
    assert set(got) == set(want)
    for name, x in want.items():
        np.testing.assert_array_equal(got[name], x, err_msg=name)


def described(w):
    """Fields of `Weights` to compare."""
    return w.family, w.layout, w.what, w.vit, w.predictor


def test_a_checkpoint_is_read_as_its_target_encoder_and_predictor(checkpoint):
    file = files.read(checkpoint)
    assert file.taken == 'target_encoder' and file.others == ('encoder',)
    assert_same_bits(file.tensors, tensors(whole()))
    found = layouts.recognise(file.tensors, {'num_heads': 4})
    assert described(found) == described(whole()) and not found.left_out
    back, extra = layouts.to_layout(found, layouts.to_ours(found, file.tensors))
    assert_same_bits(back, tensors(whole()))
    assert not extra


def test_a_part_gives_the_context_encoder_that_transformers_converts(checkpoint):
    file = files.read(checkpoint, 'encoder')
    assert described(layouts.recognise(file.tensors, {'num_heads': 4})) == described(
        backbone('official')
    )
    assert_same_bits(file.tensors, tensors(backbone('official'), seed=1))


def test_an_import_starts_encoder_and_target_from_the_target_encoder_and_says_so(imported):
    workdir, lines = imported
    assert any("its part 'target_encoder'" in x and 'also there: encoder' in x for x in lines)
    assert any(x.startswith('predictor: ') for x in lines)
    opened = weights.open_weights(workdir)
    want = tiny_weights.params(whole())
    jax.tree.map(np.testing.assert_array_equal, opened.params, want)
    jax.tree.map(np.testing.assert_array_equal, opened.extra['target'], want['encoder'])
    assert opened.method.predictor.mlp_ratio == 3.0


def test_a_full_export_has_every_bit_and_its_card_makes_the_official_file(imported, tmp_path):
    opened = weights.open_weights(imported[0])
    out = export.export(opened, 'official', tmp_path / 'out', what='full')
    assert_same_bits(files.read(out).tensors, tensors(whole()))
    code = '\n'.join(ijepa.usage(whole())).replace('DIR', str(out))
    assert 'jepa.pth.tar' in (out / 'README.md').read_text()
    exec(code.replace('jepa.pth.tar', str(tmp_path / 'jepa.pth.tar')), {})
    saved = torch.load(tmp_path / 'jepa.pth.tar')
    assert {'encoder', 'predictor', 'target_encoder', 'epoch'} == set(saved)
    assert_same_bits(files.read(tmp_path / 'jepa.pth.tar').tensors, tensors(whole()))


@pytest.mark.parametrize('names', ['hub', 'memory'])
def test_transformers_names_are_recognised_and_come_back_bit_by_bit(names):
    w = backbone('hf')
    config = layouts.config_json(w)
    assert (config['model_type'], config['architectures']) == ('ijepa', ['IJepaModel'])
    state, table = tensors(w), ijepa.tables.HF_VIT
    if names == 'memory':
        rows = ijepa.tables.hf_encoder(VIT, table['memory'])
        state = ijepa.tables.to_torch(rows, tiny_weights.params(w), layouts.fixed(w))
    found = layouts.recognise(state, config)
    assert described(found) == described(w)
    back, _ = layouts.to_layout(found, layouts.to_ours(found, state))
    assert_same_bits(back, state)


def test_what_no_library_has_is_refused_with_what_is_possible(imported, tmp_path):
    opened = weights.open_weights(imported[0])
    for to, what, said in (
        ('hf', 'full', 'IJepaModel is the encoder alone'),
        ('timm', 'backbone', 'timm has no I-JEPA'),
    ):
        with pytest.raises(errors.UserError, match=said) as error:
            export.export(opened, to, tmp_path / 'out', what=what)
        assert 'official' in str(error.value)


def test_a_damaged_predictor_is_one_sentence():
    state = tensors(whole())
    del state['predictor_blocks.0.norm1.bias']
    found = layouts.recognise(state, {'num_heads': 4})
    with pytest.raises(errors.UserError, match=r'missing predictor_blocks\.0\.norm1\.bias'):
        layouts.to_ours(found, state)
    del state['predictor_embed.weight']
    with pytest.raises(errors.UserError, match=r'missing predictor_embed\.weight'):
        layouts.recognise(state, {'num_heads': 4})


def test_a_run_takes_encoder_and_predictor_of_an_official_file(checkpoint):
    c = tiny.base('ijepa')
    c.method.update(predictor_dim=16, predictor_depth=1, mlp_ratio=4.0)
    method = methods.make(c).with_modules(VIT, predictor=PREDICTOR)

    def fresh(x):
        return jnp.zeros(x.shape, x.dtype)

    def abstract(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)

    params, extra = jax.tree.map(fresh, jax.eval_shape(method.init, jax.random.key(0)))
    state = step_lib.TrainState(0, params, {}, extra, 0)
    shapes = step_lib.TrainState(0, *jax.tree.map(abstract, (params, {}, extra)), 0)
    path = f'{checkpoint} num_heads=4'
    params, extra, lines = weights.load_into(path, method, state, shapes)
    want = tiny_weights.params(whole())
    jax.tree.map(np.testing.assert_array_equal, params, want)
    jax.tree.map(np.testing.assert_array_equal, extra['target'], want['encoder'])
    assert [x.split()[:2] for x in lines] == [['taken', 'encoder'], ['taken', 'predictor']]


def test_golden_ijepa_forward_official_weights_come_back(golden):
    f = golden('ijepa_forward')
    parts = f.under('w')
    state = {k.partition('.')[2]: x for k, x in parts.items() if not k.startswith('encoder.')}
    found = layouts.recognise(state, {'num_heads': f.hyper['num_heads']})
    assert (found.family, found.what, found.left_out) == ('ijepa', 'full', ())
    assert found.predictor.embed_dim == f.hyper['pred_dim']
    assert found.predictor.depth == f.hyper['pred_depth']
    back, extra = layouts.to_layout(found, layouts.to_ours(found, state))
    assert set(back) == set(state) and not extra
    for name, x in state.items():  # fixed tables are computed anew
        atol = 1e-6 if name.endswith('pos_embed') else 0
        np.testing.assert_allclose(back[name], x, rtol=0, atol=atol, err_msg=name)


@pytest.mark.slow
def test_an_export_loads_strictly_in_transformers_and_gives_the_same_tokens(tmp_path):
    transformers = pytest.importorskip('transformers')
    w = backbone('hf')
    files.write(tmp_path / 'model.safetensors', tensors(w), {'format': 'pt'})
    (tmp_path / 'config.json').write_text(json.dumps(layouts.config_json(w)))
    model, info = transformers.IJepaModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    images = tiny_weights.images((32, 32))
    with torch.no_grad():
        pixels = torch.from_numpy(np.moveaxis(images, -1, 1).copy())
        want = model.eval()(pixels).last_hidden_state.numpy()
    params = {'params': tiny_weights.params(w)['encoder']}
    got = jax.jit(VIT.apply)(params, images)['patch_tokens']
    tiny_weights.assert_same_tokens(got, want)
