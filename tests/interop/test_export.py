# SPDX-License-Identifier: Apache-2.0
"""`ssl_jax export` and `ssl_jax import`: there and back through files, and what is refused."""

import argparse
import dataclasses
import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np
import pytest

import tiny
from ssl_jax import cli, methods
from ssl_jax.augment import photometry
from ssl_jax.data import transform as transform_lib
from ssl_jax.evals import command
from ssl_jax.interop import export, families, files, layouts
from ssl_jax.models import decoder as decoder_lib
from ssl_jax.models import vit as vit_lib
from ssl_jax.run import checkpoint, errors, weights

KINDS = {
    'mae': {},
    'pixio': dict(
        method__num_cls_tokens=3,
        method__pos_embed='learned',
        method__mask_grid=2,
        method__flip=0.0,
    ),
}
# What each kind can leave as; the test below says that this is all.
WAYS = [
    ('mae', 'official', 'backbone'),
    ('mae', 'official', 'full'),
    ('mae', 'hf', 'backbone'),
    ('mae', 'hf', 'full'),
    ('mae', 'timm', 'backbone'),
    ('pixio', 'official', 'backbone'),
    ('pixio', 'official', 'full'),
    ('pixio', 'hf', 'backbone'),
]
HEADS = dict(num_heads=4, decoder_num_heads=2)  # of the tiny model: no tensor tells them


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """kind -> the workdir of a run with a checkpoint of step 2."""
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / 'run'
            tiny.save(tiny.config(name=f'tiny {kind}', **KINDS[kind]), made[kind], step=2)
        return made[kind]

    return get


@pytest.fixture(scope='module')
def exported(trained, tmp_path_factory):
    """(kind, to, what) -> folder; tests that write take a copy."""
    made = {}

    def get(kind, to, what='backbone'):
        if (kind, to, what) not in made:
            out = tmp_path_factory.mktemp('export') / 'out'
            made[kind, to, what] = leave(trained(kind), to, out, what=what)
        return made[kind, to, what]

    return get


def leave(workdir, to, out, step=None, **options):
    """The folder of an export."""
    return export.export(weights.open_run(workdir, step), to, out, **options)


def params_of(workdir, what='backbone'):
    run = weights.open_run(workdir)
    return run.params if what == 'full' else run.networks()['encoder'][1]


def assert_same_bits(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


def snapshot(folder):
    """{file: content} below a folder, which must not change."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob('*') if p.is_file()}


def fails(args, capsys):
    """The sentence and exit code 1 of a command that must fail."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in args])
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 1 and len(err.splitlines()) == 1, err
    return err


# There and back


@pytest.mark.parametrize('kind,to,what', WAYS)
def test_export_and_import_give_back_every_bit(trained, exported, tmp_path, kind, to, what):
    out = exported(kind, to, what)
    weights.import_weights(out, tmp_path / 'w', log=None)
    assert_same_bits(params_of(tmp_path / 'w', what), params_of(trained(kind), what))
    vit = weights.open_run(tmp_path / 'w').vit
    assert vit.clone(drop_path=0.2) == weights.open_run(trained(kind)).vit


@pytest.mark.parametrize('kind,to,what', WAYS)
def test_a_folder_that_says_nothing_of_us_is_recognised(
    trained, exported, tmp_path, kind, to, what
):
    strange = tmp_path / 'strange'
    strange.mkdir()
    out = exported(kind, to, what)
    files.write(strange / files.WEIGHTS, files.read(out).tensors, {'format': 'pt'})
    hints = HEADS
    if to != 'official':
        shutil.copy(out / 'config.json', strange)
        hints = {}
    weights.import_weights(strange, tmp_path / 'w', log=None, **hints)
    assert_same_bits(params_of(tmp_path / 'w', what), params_of(trained(kind), what))


@pytest.mark.parametrize('kind', KINDS)
def test_every_layout_that_exists_is_tried_here(trained, kind):
    method = weights.open_run(trained(kind)).method
    modules = method.vit, method.decoder
    can = layouts.refusals(layouts.Weights(families.of(*modules), 'official', 'full', *modules))
    assert {k for k, why in can.items() if not why} == {w[1:] for w in WAYS if w[0] == kind}


def test_a_mae_without_class_tokens_leaves_whole_too(tmp_path):
    tiny.save(tiny.config(method__num_cls_tokens=0), tmp_path / 'run')
    out = leave(tmp_path / 'run', 'official', tmp_path / 'out', what='full')
    files.write(tmp_path / 'a.safetensors', files.read(out).tensors)
    for path, hints in ((out, {}), (tmp_path / 'a.safetensors', HEADS)):
        workdir = tmp_path / f'from {path.name}'
        weights.import_weights(path, workdir, log=None, **hints)
        assert_same_bits(params_of(workdir, 'full'), params_of(tmp_path / 'run', 'full'))


def test_a_second_export_of_an_import_is_the_first(exported, tmp_path):
    first = exported('mae', 'hf', 'full')
    weights.import_weights(first, tmp_path / 'w', log=None)
    second = leave(tmp_path / 'w', 'hf', tmp_path / 'out', what='full')
    for name in ('model.safetensors', 'config.json', 'preprocessor_config.json'):
        a, b = (first / name).read_bytes(), (second / name).read_bytes()
        assert a == b or name == 'model.safetensors'
    a, b = files.read(first).tensors, files.read(second).tensors
    assert_same_bits(dict(a), dict(b))


def registers(**fields):
    """A DINOv2 encoder with registers and a mask token, and random parameters."""
    vit = vit_lib.ViT(
        embed_dim=64,
        depth=2,
        num_heads=1,
        patch_size=14,
        img_size=56,
        num_register_tokens=4,
        pos_resize='antialias',
        layer_scale=1.0,
        mask_token=True,
        init_scheme='dinov2',
        **fields,
    )
    params = jax.jit(lambda key: vit_lib.init_params(vit, key))(jax.random.key(0))
    rng = np.random.default_rng(0)
    draw = lambda x: rng.normal(size=x.shape).astype(np.float32)  # noqa: E731
    return vit, jax.tree.map(draw, params)


def test_the_card_keeps_the_run_through_imports_and_exports(trained, exported, tmp_path):
    folder, layouts_ = exported('mae', 'official'), ('hf', 'timm')
    first = (folder / 'README.md').read_text()
    for i, to in enumerate(layouts_):
        weights.import_weights(folder, tmp_path / f'w{i}', log=None)
        folder = export.export(weights.open_run(tmp_path / f'w{i}'), to, tmp_path / f'out{i}')
        text = (folder / 'README.md').read_text()
        for start in ('# ', '- Method: mae, 2 steps', '- Data: '):
            line = next(x for x in first.splitlines() if x.startswith(start))
            assert line in text.splitlines()
        assert 'Exported by ssl_jax and imported again from `' in text
        assert 'field `imported.origin.config`' in text
    said = json.loads((folder / 'provenance.json').read_text())['imported']['origin']
    assert said['run'] == str(trained('mae')) and said['step'] == 2
    assert said['config']['method']['name'] == 'mae'


def test_it_keeps_the_file_that_others_trained_too(exported, tmp_path):
    bare = tmp_path / 'theirs.safetensors'
    files.write(bare, files.read(exported('mae', 'official')).tensors)
    path = bare
    for i in range(3):
        hint = {} if i else {'num_heads': 4}
        weights.import_weights(path, tmp_path / f'w{i}', log=None, **hint)
        path = export.export(weights.open_run(tmp_path / f'w{i}'), 'hf', tmp_path / f'o{i}')
        text = (path / 'README.md').read_text()
        assert f'Imported from `{bare}` (sha256 `{files.read(bare).sha256}`)' in text
        assert ('imported again' in text) == (i > 0)


@pytest.fixture(scope='module')
def dinov2(tmp_path_factory):
    """(vit, params, the workdir of an import) of an encoder alone."""
    vit, params = registers()
    root = tmp_path_factory.mktemp('dinov2')
    w = layouts.Weights('dinov2', 'official', 'backbone', vit)
    tensors, _ = layouts.to_layout(w, {'encoder': params})
    files.write(root / 'hub.safetensors', tensors)
    weights.import_weights(root / 'hub.safetensors', root / 'w', log=None, num_heads=1)
    return vit, params, root / 'w'


@pytest.mark.parametrize('to', export.LAYOUTS)
def test_an_imported_encoder_leaves_again_in_every_layout(dinov2, tmp_path, to):
    vit, params, workdir = dinov2
    out = leave(workdir, to, tmp_path / 'out')
    assert (out / files.EXTRA).exists() == (to == 'timm')
    weights.import_weights(out, tmp_path / 'w', log=None)
    run = weights.open_run(tmp_path / 'w')
    assert run.method is None and run.vit == vit
    assert_same_bits(run.networks()['encoder'][1], params)


def test_without_the_sidecar_what_was_made_up_is_said(dinov2, tmp_path):
    vit, params, workdir = dinov2
    out, lines = leave(workdir, 'timm', tmp_path / 'out'), []
    (out / files.EXTRA).unlink()
    weights.import_weights(out, tmp_path / 'w', log=lines.append)
    got = params_of(tmp_path / 'w')
    assert not got['mask_token'].any() and not got['pos_embed'][:, 0].any()
    np.testing.assert_array_equal(
        got['cls_token'], params['cls_token'] + params['pos_embed'][:, :1]
    )
    assert any('mask token' in line and 'zero' in line for line in lines)


@pytest.mark.parametrize('wrap', ['plain', 'official', 'teacher'])
def test_a_pth_as_official_code_saves_it_is_imported(trained, exported, tmp_path, wrap):
    torch = pytest.importorskip('torch')
    file = files.read(exported('mae', 'official', 'full'))
    state = {k: torch.tensor(v) for k, v in file.tensors.items()}
    if wrap == 'official':
        state = dict(model=state, optimizer={'state': {}}, epoch=1, args=argparse.Namespace(lr=1))
    if wrap == 'teacher':
        state = {'teacher': {f'module.backbone.{k}': v for k, v in state.items()}}
    torch.save(state, tmp_path / 'm.pth')
    weights.import_weights(tmp_path / 'm.pth', tmp_path / 'w', log=None, **HEADS)
    assert_same_bits(params_of(tmp_path / 'w', 'full'), params_of(trained('mae'), 'full'))


def test_a_bfloat16_export_holds_the_rounded_weights(trained, tmp_path):
    for kind in KINDS:
        out = leave(trained(kind), 'hf', tmp_path / kind, dtype='bfloat16')
        assert json.loads((out / 'config.json').read_text())['dtype'] == 'bfloat16'
        weights.import_weights(out, tmp_path / f'{kind}_w', log=None)
        want = jax.tree.map(
            lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), params_of(trained(kind))
        )
        assert_same_bits(params_of(tmp_path / f'{kind}_w'), want)
    sizes = [
        (f / 'model.safetensors').stat().st_size
        for f in (out, leave(trained('pixio'), 'hf', tmp_path / 'full'))
    ]
    assert sizes[0] < 0.6 * sizes[1]


# What an export is


def test_the_folder_holds_what_torch_users_look_for_and_no_pickle(exported):
    out = exported('mae', 'hf')
    assert sorted(p.name for p in out.iterdir()) == [
        'README.md',
        'config.json',
        'model.safetensors',
        'preprocessor_config.json',
        'provenance.json',
    ]
    for path in out.iterdir():
        assert path.suffix == '.safetensors' or path.read_text()
        assert not zipfile.is_zipfile(path)


def test_provenance_says_from_what_and_how_it_was_made(trained, exported):
    p = json.loads((exported('mae', 'hf') / 'provenance.json').read_text())
    run = weights.open_run(trained('mae'))
    assert (p['step'], p['seed'], p['layout'], p['dtype']) == (2, 0, 'hf', 'float32')
    assert p['config'] == run.meta['config'] and p['config']['total_steps'] == 8
    assert len(p['checkpoint_sha256']) == 64 and p['versions']['jax'] == jax.__version__
    numbers = sum(x.size for x in jax.tree.leaves(run.networks()['encoder'][1]))
    assert p['parameters'] == numbers
    assert p['tensors'] == len(files.read(exported('mae', 'hf')).tensors)


def test_the_card_tells_data_and_steps_and_claims_no_licence(exported):
    text = (exported('pixio', 'hf') / 'README.md').read_text()
    assert '2 steps of 16 images (32 images seen)' in text and '"source": "scenes"' in text
    assert 'eval_2.json' in text and 'No licence is claimed' in text


@pytest.fixture(scope='module')
def evaluated(exported, tmp_path_factory):
    """(rows, workdir) of an imported encoder with a mean and std of its own."""
    root = tmp_path_factory.mktemp('evaluated')
    shutil.copytree(exported('mae', 'hf'), root / 'hf')
    processor = json.loads((root / 'hf' / 'preprocessor_config.json').read_text())
    processor.update(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    (root / 'hf' / 'preprocessor_config.json').write_text(json.dumps(processor))
    weights.import_weights(root / 'hf', root / 'w', log=None)
    data = dict(source='scenes', n=30, size=32)
    rows = command.evaluate_run(root / 'w', data=data, ks=(5,), linear_options=False)
    return rows, root / 'w'


def test_an_imported_encoder_is_evaluated_beside_its_untrained_twin(evaluated):
    rows, _ = evaluated
    assert {r['model'] for r in rows} == {'trained', 'untrained', 'raw_pixels'}
    assert rows[0]['protocol']['resolution'] == 32


def test_other_statistics_of_the_channels_stand_in_the_protocol(evaluated):
    protocol = evaluated[0][0]['protocol']
    assert protocol['normalization'] == 'mean [0.5, 0.5, 0.5], std [0.5, 0.5, 0.5]'


def test_the_card_shows_the_scores_with_their_protocols(evaluated, tmp_path):
    rows, workdir = evaluated
    out = tmp_path / 'out'
    cli.main(['export', '--workdir', str(workdir), '--to', 'hf', '--out', str(out)])
    text = (out / 'README.md').read_text()
    scored = [r for r in rows if 'top1' in r]
    assert scored and all(r['protocol_id'] in text for r in scored)
    assert 'untrained' in text and 'raw_pixels' in text


@pytest.mark.parametrize(
    'kind,what,name', [('mae', 'backbone', 'ViT'), ('pixio', 'backbone', 'Pixio')]
)
def test_transformers_takes_the_folder_with_its_processor(exported, kind, what, name):
    transformers = pytest.importorskip('transformers')
    folder = exported(kind, 'hf', what)
    model, info = transformers.AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == f'{name}Model'
    assert not info['unexpected_keys'] and not info['mismatched_keys']
    assert all('pooler' in k for k in info['missing_keys'])
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    image = np.random.default_rng(0).integers(0, 256, (48, 80, 3)).astype(np.uint8)
    pixels = processor(image, return_tensors='np')['pixel_values']
    ours = jax.numpy.moveaxis(_as_in_our_evaluation(image, 32), -1, 0)
    np.testing.assert_allclose(pixels[0], ours, atol=0.02)


@pytest.mark.parametrize('kind,to,what', [w for w in WAYS if w[1] == 'hf'])
def test_the_lines_of_the_card_work_as_printed(exported, kind, to, what):
    pytest.importorskip('transformers')
    folder = exported(kind, to, what)
    code = (folder / 'README.md').read_text().split('```python')[1].split('```')[0]
    found = {}
    exec(code.replace('DIR', str(folder)), found)
    assert (type(found['model']).__name__ == 'ViTMAEForPreTraining') == (what == 'full')


def _as_in_our_evaluation(image, size):
    return photometry.normalize(transform_lib.cut(image, transform_lib.of(size)))


def test_a_transform_survives_the_way_out_and_in(exported, tmp_path):
    out = tmp_path / 'out'
    shutil.copytree(exported('mae', 'hf'), out)
    processor = json.loads((out / 'preprocessor_config.json').read_text())
    processor.update(size={'shortest_edge': 64}, image_mean=[0.5] * 3, image_std=[0.25] * 3)
    (out / 'preprocessor_config.json').write_text(json.dumps(processor))
    want = {**transform_lib.of(32), 'crop': 0.5, 'mean': [0.5] * 3, 'std': [0.25] * 3}
    assert weights.open_weights(out).transform == want
    weights.import_weights(out, tmp_path / 'w', log=None)
    assert weights.open_run(tmp_path / 'w').transform == want
    for to, library in (('hf', 'transformers'), ('official', 'transformers'), ('timm', 'timm')):
        again = leave(tmp_path / 'w', to, tmp_path / to)
        assert weights.open_weights(again).transform == {**want, 'library': library}
    (again / 'preprocessor_config.json').unlink()  # timm reads its own config alone
    assert weights.open_weights(again).transform == {**want, 'library': 'timm'}


# Where it reads from


def test_a_bare_folder_one_step_and_an_older_step_are_exported(tmp_path):
    for step in (1, 2):
        tiny.save(tiny.config(), tmp_path / 'run', seed=step, step=step)
    saved = tmp_path / 'run' / 'checkpoints'
    for workdir, step in ((saved, None), (saved / '2', None), (tmp_path / 'run', 1)):
        out = leave(workdir, 'official', tmp_path / 'out', step=step)
        p = json.loads((out / 'provenance.json').read_text())
        assert p['step'] == (step or 2)
        got, want = weights.open_weights(out), weights.open_run(tmp_path / 'run', p['step'])
        assert_same_bits(*(x.networks()['encoder'][1] for x in (got, want)))
    with pytest.raises(errors.UserError, match='no complete checkpoint of step 7'):
        leave(saved, 'official', tmp_path / 'out', step=7)


def test_moments_are_not_read(trained, tmp_path):
    shutil.copytree(trained('mae'), tmp_path / 'run')
    shutil.rmtree(tmp_path / 'run' / 'checkpoints' / '2' / 'opt')
    leave(tmp_path / 'run', 'hf', tmp_path / 'out')


def test_the_command_needs_no_accelerator(trained, tmp_path):
    env = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
    env['JAX_PLATFORMS'] = 'tpu'  # which is not here, or trains
    out = subprocess.run(
        [sys.executable, '-m', 'ssl_jax.cli', 'export', '--workdir', str(trained('mae'))]
        + ['--to', 'hf', '--out', str(tmp_path / 'out')],
        env=env,
        capture_output=True,
        text=True,
    )
    assert out.returncode == 0, out.stderr
    assert 'model.safetensors' in out.stdout


def test_open_weights_takes_runs_checkpoints_folders_and_files(trained, exported):
    workdir, out = trained('pixio'), exported('pixio', 'official')
    want = params_of(workdir)
    for path in (workdir, workdir / 'checkpoints', out, out / 'model.safetensors'):
        got = weights.open_weights(path)
        assert_same_bits(got.networks()['encoder'][1], want)
        assert got.vit.num_cls_tokens == 3 and got.transform['size'] == 32
        assert got.path == str(path)


# What an import is


def test_import_prints_what_it_found(exported, tmp_path, capsys):
    cli.main(['import', str(exported('pixio', 'hf')), '--workdir', str(tmp_path / 'w')])
    text = capsys.readouterr().out
    for part in ('pixio, hf names, encoder', '2 blocks of 32 channels, 4 heads', '8 px', '3 class'):
        assert part in text
    count = sum(x.size for x in jax.tree.leaves(params_of(tmp_path / 'w')))
    assert f'{count:,} parameters' in text and 'mlp, ratio 4' in text


def test_hints_may_follow_the_options(exported, tmp_path, capsys):
    out = tmp_path / 'bare.safetensors'
    files.write(out, files.read(exported('mae', 'official')).tensors)
    err = fails(['import', out, '--workdir', tmp_path / 'w'], capsys)
    assert 'num_heads' in err and not (tmp_path / 'w').exists()
    cli.main(['import', str(out), '--workdir', str(tmp_path / 'w'), 'num_heads=4'])
    assert weights.open_run(tmp_path / 'w').vit.num_heads == 4
    err = fails(['import', out, '--workdir', tmp_path / 'v', 'heads=4'], capsys)
    assert "did you mean 'num_heads'?" in err


@pytest.mark.parametrize('kind', KINDS)
def test_an_imported_method_restores_onto_the_devices_of_a_run(trained, exported, tmp_path, kind):
    weights.import_weights(exported(kind, 'official', 'full'), tmp_path / 'w', log=None)
    run = weights.open_run(trained(kind))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[1])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        {'params': run.params, 'extra': run.extra},
    )
    model, meta = checkpoint.restore_model(tmp_path / 'w', abstract)
    assert_same_bits(jax.device_get(model['params']), run.params)
    assert meta['step'] == 0


def test_a_method_made_from_tensors_is_that_of_the_run(trained, exported, tmp_path):
    for kind in KINDS:
        weights.import_weights(exported(kind, 'official', 'full'), tmp_path / kind, log=None)
        got, want = weights.open_run(tmp_path / kind).method, weights.open_run(trained(kind)).method
        assert got.decoder == want.decoder and got.flip == want.flip
        assert (got.mask_grid > 1) == (want.mask_grid > 1)


@pytest.mark.parametrize('stated', [True, False, None])
def test_what_a_decoder_predicts_is_what_the_config_of_the_folder_says(exported, tmp_path, stated):
    out = tmp_path / 'out'
    shutil.copytree(exported('mae', 'hf', 'full'), out)
    config = json.loads((out / 'config.json').read_text())
    assert config.pop('norm_pix_loss') is True
    if stated is not None:
        config['norm_pix_loss'] = stated
    (out / 'config.json').write_text(json.dumps(config))
    weights.import_weights(out, tmp_path / 'w', log=None)
    run = weights.open_run(tmp_path / 'w')
    assert run.method.norm_pix_loss is (stated is not False)
    again = leave(tmp_path / 'w', 'hf', tmp_path / 'again', what='full')
    config = json.loads((again / 'config.json').read_text())
    assert config['norm_pix_loss'] is (stated is not False)


# What is refused, and that nothing is touched


def broken(tmp_path, exported, how):
    """(a file that cannot be imported, what the sentence must hold)."""
    source = exported('mae', 'official', 'full')
    tensors = dict(files.read(source).tensors)
    path = tmp_path / 'broken.safetensors'
    key = 'blocks.1.attn.qkv.weight'
    words = [key]
    if how == 'truncated safetensors':
        path.write_bytes((source / 'model.safetensors').read_bytes()[:-100])
        return path, ['truncated', 'broken.safetensors']
    if how == 'missing path':
        return tmp_path / 'nowhere.pth', ['nowhere.pth']
    if how == 'renamed key':
        tensors['blocks.1.attn.qkv.weigth'] = tensors.pop(key)
        words += ['nearest: blocks.1.attn.qkv.weigth']
    elif how == 'missing tensor':
        del tensors[key]
        words += ['missing']
    elif how == 'wrong size':
        tensors[key] = tensors[key][:-1]
        words += ['(95, 32)', '(96, 32)']
    elif how == 'unknown family':
        tensors = {f'layer{i}.conv.weight': x for i, x in enumerate(tensors.values())}
        words = ['known']
    files.write(path, tensors)
    return path, words


@pytest.mark.parametrize(
    'how',
    [
        'truncated safetensors',
        'missing path',
        'renamed key',
        'missing tensor',
        'wrong size',
        'unknown family',
    ],
)
def test_broken_weights_are_refused_with_the_key_and_nothing_is_written(
    tmp_path, exported, capsys, how
):
    path, words = broken(tmp_path, exported, how)
    before = snapshot(tmp_path)
    hints = [f'{k}={v}' for k, v in HEADS.items()]
    err = fails(['import', path, '--workdir', tmp_path / 'w', *hints], capsys)
    assert all(word in err for word in words), err
    assert snapshot(tmp_path) == before and not (tmp_path / 'w').exists()


class Shell:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f'touch "{self.marker}"',)


def test_a_pth_that_holds_code_runs_nothing_and_writes_nothing(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / 'evil.pth', 'w') as file:
        file.writestr('a/data.pkl', pickle.dumps({'model': Shell(tmp_path / 'it ran')}, 2))
    before = snapshot(tmp_path)
    err = fails(['import', tmp_path / 'evil.pth', '--workdir', tmp_path / 'w'], capsys)
    assert 'system' in err and 'none of it was run' in err
    assert snapshot(tmp_path) == before and not (tmp_path / 'it ran').exists()


@pytest.mark.parametrize('how', ['truncated', 'optimizer'])
def test_a_pth_that_is_no_model_is_refused(tmp_path, capsys, how):
    torch = pytest.importorskip('torch')
    path = tmp_path / 'a.pth'
    parameter = torch.nn.Parameter(torch.ones(300))
    optimizer = torch.optim.AdamW([parameter])
    parameter.sum().backward()
    optimizer.step()
    torch.save({'optimizer': optimizer.state_dict(), 'epoch': 1}, path)
    if how == 'truncated':
        path.write_bytes(path.read_bytes()[:-50])
    err = fails(['import', path, '--workdir', tmp_path / 'w'], capsys)
    assert how in err and not (tmp_path / 'w').exists()


@pytest.mark.parametrize(
    'kind,args,words',
    [
        ('mae', ['--to', 'offical'], ['to=offical', 'did you mean official']),
        ('mae', ['--to', 'hf', '--what', 'ful'], ['what=ful', 'did you mean full']),
        ('mae', ['--to', 'hf', '--dtype', 'bf16'], ['dtype=bf16', 'did you mean bfloat16']),
        ('mae', ['--to', 'timm', '--what', 'full'], ['timm has no decoders', 'official']),
        ('pixio', ['--to', 'timm'], ['timm has no Pixio', 'official or hf']),
        ('mae', ['--to', 'hf', '--step', '9'], ['step 9']),
    ],
    ids=lambda x: ' '.join(x) if isinstance(x, list) and '--to' in x else '',
)
def test_an_export_that_cannot_be_names_what_can(
    trained, exported, tmp_path, capsys, kind, args, words
):
    target = tmp_path / 'out'
    shutil.copytree(exported('mae', 'official'), target)
    before = snapshot(target)
    err = fails(['export', '--workdir', trained(kind), '--out', target, *args], capsys)
    assert all(word in err for word in words), err
    assert snapshot(target) == before
    assert [p.name for p in tmp_path.iterdir()] == ['out']


def test_an_encoder_alone_has_no_full_export(dinov2, tmp_path):
    with pytest.raises(ValueError, match='use what=backbone'):
        leave(dinov2[2], 'official', tmp_path / 'out', what='full')


def test_a_network_of_no_known_name_stays_in_the_checkpoint(trained, tmp_path):
    opened = weights.open_run(trained('mae'))

    class Predicting(type(opened.method)):
        def networks(self, params, extra):
            predictor = nn.Conv(3, (1, 1))  # of a class that no family has names for
            return {**super().networks(params, extra), 'predictor': (predictor, {})}

    fields = {f.name: getattr(opened.method, f.name) for f in dataclasses.fields(opened.method)}
    opened = dataclasses.replace(opened, method=Predicting(**fields))
    for what in export.WHATS:
        out = export.export(opened, 'official', tmp_path / what, what=what)
        got = weights.open_weights(out)
        assert set(got.networks()) == {'encoder'} | ({'decoder'} if what == 'full' else set())
        assert_same_bits(got.params, {k: opened.params[k] for k in got.params})
        line = 'Only in the checkpoint, as no layout has a place for it: predictor.'
        assert line in (out / 'README.md').read_text()
    assert (
        'Only in the checkpoint'
        not in (leave(trained('mae'), 'official', tmp_path / 'known') / 'README.md').read_text()
    )


def test_a_decoder_that_no_family_has_names_for_stays_too(trained, tmp_path):
    opened = weights.open_run(trained('mae'))
    method = opened.method.with_modules(encoder=opened.vit, decoder=nn.Dense(3))
    opened = dataclasses.replace(opened, method=method)
    out = export.export(opened, 'official', tmp_path / 'out')
    assert 'no layout has a place for it: decoder.' in (out / 'README.md').read_text()
    with pytest.raises(ValueError, match='use what=backbone'):
        export.export(opened, 'official', tmp_path / 'full', what='full')


def test_there_is_no_run_to_export(tmp_path, capsys):
    err = fails(['export', '--workdir', tmp_path / 'no', '--to', 'hf', '--out', tmp_path], capsys)
    assert str(tmp_path / 'no') in err


def test_a_folder_of_other_files_is_not_replaced(trained, tmp_path, capsys):
    (tmp_path / 'thesis.tex').write_text('x')
    args = ['export', '--workdir', trained('mae'), '--to', 'hf', '--out', tmp_path]
    assert 'holds files that are no export' in fails(args, capsys)
    assert [p.name for p in tmp_path.iterdir()] == ['thesis.tex']


def test_a_full_disk_leaves_the_old_export(trained, exported, tmp_path, monkeypatch, capsys):
    target = tmp_path / 'out'
    shutil.copytree(exported('mae', 'official'), target)
    before, real = snapshot(target), files.write

    def full(path, *args, **kwargs):
        real(path, *args, **kwargs)
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(files, 'write', full)
    args = ['export', '--workdir', trained('mae'), '--to', 'hf', '--out', target]
    assert 'No space left' in fails(args, capsys)
    assert snapshot(target) == before and [p.name for p in tmp_path.iterdir()] == ['out']


def test_a_workdir_that_holds_a_run_is_not_imported_into(trained, exported, capsys):
    before = snapshot(trained('mae'))
    args = ['import', exported('mae', 'hf'), '--workdir', trained('mae')]
    err = fails(args, capsys)
    assert str(trained('mae')) in err and 'holds a run' in err
    assert snapshot(trained('mae')) == before


def test_a_run_is_not_imported(trained, tmp_path):
    with pytest.raises(ValueError, match='run of ssl_jax already'):
        weights.import_weights(trained('mae'), tmp_path / 'w')


def test_an_imported_encoder_has_no_images_to_show(dinov2, capsys):
    assert 'give --data' in fails(['show', '--workdir', dinov2[2]], capsys)


# Not ru_maxrss, which a process inherits from the one that started it.
MEASURE = """
import pathlib, re, sys
import jax
import orbax.checkpoint
from ssl_jax.interop import export
from ssl_jax.run import weights

def peak():
    return int(re.search(r'VmHWM:\\s+(\\d+) kB', pathlib.Path('/proc/self/status').read_text())[1])

jax.devices()
before = peak()
opened = weights.open_run(sys.argv[1])
export.export(opened, sys.argv[2], sys.argv[3], what=sys.argv[4], dtype=sys.argv[5])
print('KIB', peak() - before)
"""


@pytest.mark.slow
def test_an_export_of_vit_l_needs_at_most_twice_the_size_of_the_model(tmp_path):
    config = tiny.config(
        method__embed_dim=1024,
        method__depth=24,
        method__num_heads=16,
        method__patch_size=16,
        method__img_size=224,
        method__decoder_embed_dim=512,
        method__decoder_depth=8,
        method__decoder_num_heads=16,
    )
    method = methods.make(config)
    assert isinstance(method.decoder, decoder_lib.Decoder)
    w = layouts.Weights('mae', 'official', 'full', method.vit, method.decoder)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), layouts.abstract(w))
    tensors, _ = layouts.to_layout(w, params)
    files.write(tmp_path / 'l.safetensors', tensors)
    weights.import_weights(tmp_path / 'l.safetensors', tmp_path / 'w', log=None)
    del params, tensors
    size = (tmp_path / 'l.safetensors').stat().st_size
    for to, what, dtype in (
        ('official', 'full', 'float32'),
        ('hf', 'full', 'float32'),
        ('official', 'full', 'bfloat16'),
    ):
        out = subprocess.run(
            [sys.executable, '-c', MEASURE, tmp_path / 'w', to, tmp_path / 'out', what, dtype],
            capture_output=True,
            text=True,
            env={k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'},
        )
        assert out.returncode == 0, out.stderr
        ratio = 1024 * int(out.stdout.split('KIB')[1]) / size
        print(f'{to} {what} {dtype}: {ratio:.2f} x the size of the model')
        assert 0.9 < ratio <= 2
