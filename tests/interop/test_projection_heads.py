# SPDX-License-Identifier: Apache-2.0
"""Projection heads travel with the backbone: teacher checkpoints of DINOv2, DINO and iBOT."""

import functools
import json
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import tiny
from ssl_jax import cli, methods
from ssl_jax import step as step_lib
from ssl_jax.interop import export, files, layouts
from ssl_jax.methods import base
from ssl_jax.run import checkpoint, clock, weights
from ssl_jax.run import start as run_start

# Sinkhorn-Knopp, so that a run consists of nothing but the two networks.
PLAIN = dict(method__centering='sinkhorn_knopp')


def drawn(config, seed=0):
    """(method, params, extra) with random numbers everywhere, so that no two arrays are equal."""
    method = methods.make(config)
    shapes = jax.eval_shape(method.init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    draw = lambda x: rng.standard_normal(x.shape, np.float32)  # noqa: E731
    return method, *jax.tree.map(draw, shapes)


def saved(config, workdir, seed=0):
    """(params, extra) of a run whose student and teacher differ, at step 2."""
    _, params, extra = drawn(config, seed)
    state = step_lib.TrainState(np.int32(2), params, {}, extra, np.zeros(2, np.int32))
    saver = checkpoint.Checkpointer(workdir / 'checkpoints')
    saver.save(2, state, {'config': config.to_dict()})
    saver.close()
    return params, extra


def same_bits(a, b):
    a, b = (jax.tree_util.tree_flatten_with_path(x)[0] for x in (a, b))
    same = [p for p, _ in a] == [p for p, _ in b]
    return same and all(np.array_equal(x, y) for (_, x), (_, y) in zip(a, b, strict=True))


def leave(workdir, to, out, what='backbone'):
    """The folder of an export."""
    return export.export(weights.open_run(workdir), to, out, what=what)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """(workdir, params, extra) of a DINOv2 run with two heads."""
    workdir = tmp_path_factory.mktemp('run')
    return workdir, *saved(tiny.dinov2(**PLAIN), workdir)


@pytest.fixture(scope='module')
def exported(trained, tmp_path_factory):
    """The folder of the teacher with its heads."""
    out = tmp_path_factory.mktemp('export') / 'out'
    return leave(trained[0], 'official', out, what='full')


@pytest.fixture(scope='module')
def imported(exported, tmp_path_factory):
    """(workdir, what was printed) of that folder's import."""
    workdir, lines = tmp_path_factory.mktemp('import') / 'w', []
    weights.import_weights(exported, workdir, log=lines.append)
    return workdir, '\n'.join(lines)


def torch_save(path, tree):
    """torch.save of a tree with numpy leaves."""
    torch = pytest.importorskip('torch')
    torch.save(jax.tree.map(torch.tensor, tree), path)
    return path


def header(path):
    """name -> shape as a safetensors file has them."""
    data = path.read_bytes()
    found = json.loads(data[8 : 8 + int.from_bytes(data[:8], 'little')])
    return {k: v['shape'] for k, v in found.items() if k != '__metadata__'}


# There and back


def test_the_teacher_leaves_with_its_heads_and_comes_back_to_the_bit(trained, imported):
    _, params, extra = trained
    run = weights.open_run(imported[0])
    assert same_bits(run.extra['teacher'], extra['teacher'])
    assert same_bits(run.params, extra['teacher'])
    assert not same_bits(run.params, params)


def test_an_import_opens_as_the_method_of_the_run(trained, imported):
    got, want = weights.open_run(imported[0]).method, weights.open_run(trained[0]).method
    assert got.vit == want.vit
    assert (got.dino_head, got.ibot_head) == (want.dino_head, want.ibot_head)
    assert got.centering == 'sinkhorn_knopp'


def test_official_names_are_in_the_file_and_nothing_else(exported):
    stored = header(exported / 'model.safetensors')
    assert {k.split('.')[0] for k in stored} == {'backbone', 'dino_head', 'ibot_head'}
    layer = [k for k in stored if k.startswith('ibot_head.')]
    mlp = [f'ibot_head.mlp.{i}.{x}' for i in (0, 2, 4) for x in ('weight', 'bias')]
    assert sorted(layer) == sorted(mlp + [f'ibot_head.last_layer.weight_{x}' for x in 'gv'])
    assert stored['dino_head.last_layer.weight_v'] == [64, 16]
    assert stored['dino_head.last_layer.weight_g'] == [64, 1]


def test_a_second_export_of_the_import_is_the_first(exported, imported, tmp_path):
    again = leave(imported[0], 'official', tmp_path / 'out', what='full')
    a, b = (files.read(folder).tensors for folder in (exported, again))
    assert same_bits(dict(a), dict(b))


def test_a_file_that_says_nothing_of_us_is_recognised(exported, trained, tmp_path):
    files.write(tmp_path / 'a.safetensors', files.read(exported).tensors)
    weights.import_weights(tmp_path / 'a.safetensors', tmp_path / 'w', log=None, num_heads=4)
    run = weights.open_run(tmp_path / 'w')
    assert same_bits(run.extra['teacher'], trained[2]['teacher'])
    assert run.method.vit.num_register_tokens == 1 and run.method.vit.pos_resize == 'antialias'


def test_the_backbone_alone_leaves_as_before(trained, tmp_path):
    out = leave(trained[0], 'hf', tmp_path / 'out')
    weights.import_weights(out, tmp_path / 'w', log=None)
    run = weights.open_run(tmp_path / 'w')
    assert run.method is None and set(run.params) == {'encoder'}
    assert same_bits(run.params['encoder'], trained[2]['teacher']['backbone'])


def test_an_import_prints_both_heads(imported):
    text = imported[1]
    assert 'dinov2, official names, encoder and projection heads' in text
    assert re.search(r'dino_head: +64 prototypes of 16 channels, 3 layers of 32', text)
    assert re.search(r'ibot_head: +32 prototypes of 16 channels', text)


def test_the_heads_are_part_of_what_json_holds(imported):
    w = weights.open_run(imported[0]).weights
    assert w.ibot_head.out_dim == 32
    assert layouts.from_dict(layouts.to_dict(w)) == w


def test_a_distillation_leaves_as_the_average_of_its_student(tmp_path):
    config = distillation(None)
    params, extra = saved(config, tmp_path / 'run')
    out = leave(tmp_path / 'run', 'official', tmp_path / 'out', what='full')
    weights.import_weights(out, tmp_path / 'w', log=None)
    run = weights.open_run(tmp_path / 'w')
    assert same_bits(run.params, extra['student']) and not same_bits(run.params, params)
    assert run.method.vit.embed_dim == 16


def test_a_network_of_dino_has_no_layer_scale_and_leaves_with_its_head_too(tmp_path):
    config = tiny.dinov2(
        **PLAIN,
        method__layer_scale=None,
        method__num_register_tokens=0,
        method__separate_heads=False,
        method__ibot_weight=0.0,
    )
    _, extra = saved(config, tmp_path / 'run')
    out = leave(tmp_path / 'run', 'official', tmp_path / 'out', what='full')
    weights.import_weights(out, tmp_path / 'w', log=None)
    assert same_bits(weights.open_run(tmp_path / 'w').params, extra['teacher'])


@pytest.mark.parametrize('to', ['hf', 'timm'])
def test_other_libraries_have_no_place_for_heads(trained, tmp_path, capsys, to):
    args = ['export', '--workdir', trained[0], '--to', to, '--what', 'full']
    with pytest.raises(SystemExit):
        cli.main([str(a) for a in [*args, '--out', tmp_path / 'out']])
    err = capsys.readouterr().err.strip()
    assert 'projection heads; use official; possible with this model: official' in err
    assert len(err.splitlines()) == 1 and not list(tmp_path.iterdir())


# Checkpoints of the official code


def official(f):
    """(teacher dict of a golden step file by its official names, hints)."""
    return f.under('w'), {'num_heads': f.hyper['num_heads']}


def check_teacher(f, tmp_path):
    """In as torch.save left it, out through the lines of the card: the same keys and bits."""
    torch = pytest.importorskip('torch')
    tensors, hints = official(f)
    theirs = {k[8:]: x for k, x in tensors.items() if k.startswith('teacher.')}
    path = torch_save(tmp_path / 'in.pth', {'teacher': theirs})
    weights.import_weights(path, tmp_path / 'w', log=None, **hints)
    run, h = weights.open_run(tmp_path / 'w'), f.hyper
    assert (run.method.ibot_head is not None) == h['separate_head']
    assert run.method.dino_head.out_dim == h['dino_K']
    assert run.method.vit.num_register_tokens == h['num_register_tokens']

    out = leave(tmp_path / 'w', 'official', tmp_path / 'out', what='full')
    code = (out / 'README.md').read_text().split('```python')[1].split('```')[0]
    target = tmp_path / 'teacher_checkpoint.pth'
    code = code.replace('DIR', str(out)).replace("'teacher_checkpoint.pth'", repr(str(target)))
    assert len([line for line in code.strip().splitlines() if line[0] != '#']) == 3
    exec(code)
    got = torch.load(target, weights_only=True)
    assert list(got) == ['teacher']
    assert {k: tuple(x.shape) for k, x in got['teacher'].items()} == {
        k: x.shape for k, x in theirs.items()
    }
    for key, x in got['teacher'].items():
        np.testing.assert_array_equal(x.numpy(), theirs[key], err_msg=key)


def test_golden_dinov2_step_centering_shared_teacher_goes_in_and_out(golden, tmp_path):
    check_teacher(golden('dinov2_step_centering_shared'), tmp_path)


def test_golden_dinov2_step_sinkhorn_separate_teacher_goes_in_and_out(golden, tmp_path):
    check_teacher(golden('dinov2_step_sinkhorn_separate'), tmp_path)


def test_golden_dino_v1_ibot_network_comes_in_with_its_head(golden, tmp_path):
    f = golden('dino_v1_ibot')
    theirs = {k: x for k, x in f.under('w').items() if k.startswith(('backbone.', 'head.'))}
    path = torch_save(tmp_path / 'dino.pth', {'student': {}, 'teacher': theirs, 'epoch': 1})
    lines = []
    weights.import_weights(path, tmp_path / 'w', log=lines.append, num_heads=f.hyper['num_heads'])
    assert 'The file has no mask token: it is zero.' in lines
    run = weights.open_run(tmp_path / 'w')
    network, head = run.extra['teacher'], run.method.dino_head
    assert (head.out_dim, head.hidden_dim) == (f.hyper['K'], f.hyper['hidden'])
    assert run.method.ibot_head is None and run.method.vit.pos_resize == 'offset'
    assert not network['backbone'].pop('mask_token').any()
    back = layouts.to_layout(*as_found(theirs, f.hyper, network))[0]
    assert same_bits(dict(back), theirs)


def as_found(theirs, hyper, network):
    """(Weights in the names of the file, our tree) of what was imported."""
    w = layouts.recognise(theirs, {'num_heads': hyper['num_heads']})
    network = {'encoder' if k == 'backbone' else k: v for k, v in network.items()}
    zero = np.zeros((1, w.vit.embed_dim), np.float32)
    return w, {**network, 'encoder': {**network['encoder'], 'mask_token': zero}}


@functools.cache
def teacher(separate=True):
    """Names of DINOv2 -> random arrays, 2 blocks of 32 channels."""
    config = tiny.dinov2(method__separate_heads=separate)
    method, params, _ = drawn(config, seed=5)
    parts = {'dino_head': method.dino_head, 'ibot_head': method.ibot_head}
    w = layouts.Weights('dinov2', 'official', 'full', method.vit, **parts)
    tree = {'encoder' if k == 'backbone' else k: v for k, v in params.items()}
    return layouts.to_layout(w, tree)[0]


def understood(tensors, prefix=''):
    """(Weights, our parameters) of tensors by name."""
    tensors = {prefix + k: x for k, x in tensors.items()}
    w = layouts.recognise(tensors, {'num_heads': 4})
    return w, layouts.to_ours(w, tensors)


@pytest.mark.parametrize('prefix', ['', 'teacher.', 'module.', 'teacher.module.'])
def test_prefixes_and_chunked_blocks_are_understood(prefix):
    _, want = understood(teacher())
    chunked = {re.sub(r'blocks\.(\d+)', r'blocks.0.\1', k): x for k, x in teacher().items()}
    w, got = understood(chunked, prefix)
    assert same_bits(got, want) and w.left_out == ()
    assert w.prefix == f'{prefix}backbone.'


def test_the_teacher_of_a_training_checkpoint_is_taken_and_the_student_left(tmp_path):
    tensors = {f'teacher.{k}': x for k, x in teacher().items()}
    tensors |= {f'student.{k}': x + 1 for k, x in teacher().items()}
    tensors['dino_loss.center'] = np.zeros((1, 64), np.float32)
    w, got = understood(tensors)
    assert same_bits(got, understood(teacher())[1])
    assert {'dino_loss.center', 'student.dino_head.mlp.0.bias'} <= set(w.left_out)


def ibot(own):
    """A teacher as iBOT saves it: own prototypes for patches, or (False) the class tokens'."""
    out = {k.replace('dino_head', 'head'): x for k, x in teacher(False).items()}
    del out['backbone.mask_token']
    for name in ('weight_g', 'weight_v'):
        x = out[f'head.last_layer.{name}']
        out[f'head.last_layer2.{name}'] = x[:20] + 1 if own else x
    return out


def test_heads_of_ibot_that_share_an_mlp_get_a_copy_each():
    w, got = understood(ibot(own=True))
    assert w.ibot_head.out_dim == 20 and w.dino_head.out_dim == 64
    assert got['ibot_head']['mlp_2'] is not got['dino_head']['mlp_2']
    for name in ('mlp_0', 'mlp_2', 'mlp_4'):
        assert same_bits(got['ibot_head'][name], got['dino_head'][name])
    want = ibot(own=True)['head.last_layer2.weight_v'].T
    np.testing.assert_array_equal(got['ibot_head']['last_layer']['weight_v'], want)
    assert 'share an MLP there; here each has its own copy' in ' '.join(layouts.notes(w))


def test_a_second_last_layer_of_ibot_that_is_the_first_is_one_head():
    w, got = understood(ibot(own=False))
    assert w.ibot_head is None and 'ibot_head' not in got
    assert 'share one head' in ' '.join(layouts.notes(w))


def test_the_masked_embed_of_ibot_is_the_mask_token():
    tensors = ibot(own=True)
    tensors['backbone.masked_embed'] = token = np.full((1, 32), 0.5, np.float32)
    w, got = understood(tensors)
    np.testing.assert_array_equal(got['encoder']['mask_token'], token)
    assert not w.absent
    alone = {k: x for k, x in tensors.items() if k.startswith('backbone.')}
    _, got = understood(alone)
    np.testing.assert_array_equal(got['encoder']['mask_token'], token)


@pytest.mark.parametrize('to,kind', [('hf', 'vit'), ('timm', 'vit_base_patch16_224')])
def test_an_imported_network_of_dino_leaves_as_the_plain_vit_it_is(tmp_path, to, kind):
    scales_and_registers = re.compile(r'\.ls\d\.|register_tokens')
    tensors = {k: x for k, x in ibot(own=False).items() if not scales_and_registers.search(k)}
    files.write(tmp_path / 'a.safetensors', tensors)
    weights.import_weights(tmp_path / 'a.safetensors', tmp_path / 'w', log=None, num_heads=4)
    out = leave(tmp_path / 'w', to, tmp_path / 'out')
    config = json.loads((out / 'config.json').read_text())
    assert config['model_type' if to == 'hf' else 'architecture'] == kind
    got, want = (weights.open_weights(x).networks() for x in (out, tmp_path / 'w'))
    assert same_bits(got['encoder'][1], want['encoder'][1])


def test_heads_of_other_widths_each_open(tmp_path):
    tensors = dict(teacher())
    rng = np.random.default_rng(0)
    for key in [k for k in tensors if k.startswith('ibot_head.mlp')]:
        shape = [{32: 24}.get(n, n) for n in tensors[key].shape]
        if key.endswith('mlp.0.weight'):
            shape[1] = 32
        tensors[key] = rng.standard_normal(shape).astype(np.float32)
    path = tmp_path / 'a.safetensors'
    files.write(path, tensors)
    weights.import_weights(path, tmp_path / 'w', log=None, num_heads=4)
    run = weights.open_run(tmp_path / 'w')
    assert (run.method.dino_head.hidden_dim, run.method.ibot_head.hidden_dim) == (32, 24)
    out = leave(tmp_path / 'w', 'official', tmp_path / 'out', what='full')
    weights.import_weights(out, tmp_path / 'again', log=None)
    assert same_bits(weights.open_run(tmp_path / 'again').params, run.params)


# What is incomplete


@pytest.mark.parametrize(
    'key', ['dino_head.mlp.2.bias', 'ibot_head.last_layer.weight_g', 'ibot_head.mlp.0.weight']
)
def test_without_one_tensor_no_head_is_taken_and_the_tensor_is_named(tmp_path, key):
    tensors = {k: x for k, x in teacher().items() if k != key}
    lines = []
    files.write(tmp_path / 'a.safetensors', tensors)
    weights.import_weights(
        tmp_path / 'a.safetensors', tmp_path / 'w', log=lines.append, num_heads=4
    )
    head, name = key.split('.', 1)
    said = f'{head} has no {name}, so projection heads are left out.'
    assert said in lines
    run = weights.open_run(tmp_path / 'w')
    assert run.method is None and set(run.params) == {'encoder'}


def test_a_head_of_another_kind_is_left_out_by_name():
    tensors = {k.replace('dino_head', 'head'): x for k, x in teacher(False).items()}
    tensors['head.mlp.1.running_mean'] = np.zeros(32, np.float32)
    w, _ = understood(tensors)
    assert w.what == 'backbone' and w.dino_head is None
    assert 'head has mlp.1.running_mean, which no head known' in ' '.join(layouts.notes(w))


def test_a_head_for_patches_alone_is_left_out():
    tensors = {k: x for k, x in teacher().items() if not k.startswith('dino_head.')}
    w, _ = understood(tensors)
    assert w.what == 'backbone'
    assert 'dino_head has no ' in layouts.notes(w)[0]


def test_a_head_that_does_not_fit_the_encoder_is_refused_by_name():
    tensors = {**teacher(), 'dino_head.mlp.0.weight': np.zeros((32, 31), np.float32)}
    with pytest.raises(ValueError, match=r'dino_head.mlp.0.weight has shape \(32, 31\)'):
        understood(tensors)


def test_an_export_of_ours_that_lost_a_tensor_is_refused_and_nothing_is_written(exported, tmp_path):
    file = files.read(exported)
    tensors = {k: x for k, x in file.tensors.items() if k != 'ibot_head.mlp.4.bias'}
    files.write(tmp_path / 'a.safetensors', tensors, file.metadata)
    with pytest.raises(ValueError, match='missing ibot_head.mlp.4.bias'):
        weights.import_weights(tmp_path / 'a.safetensors', tmp_path / 'w', log=None)
    assert not (tmp_path / 'w').exists()


# What they are for


def start(path, config):
    """(params, extra, lines) of a fresh state after init_from."""
    method, params, extra = drawn(config, seed=9)
    params, extra = jax.tree.map(jnp.asarray, (params, extra))
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (params, {}, extra)
    )
    state = step_lib.TrainState(0, params, {}, extra, 0)
    abstract = step_lib.TrainState(0, *abstract, 0)
    got = weights.load_into(str(path), method, state, abstract)
    return *jax.device_get(got[:2]), got[2]


def test_a_run_starts_from_all_of_an_imported_teacher(trained, imported):
    params, extra, lines = start(imported[0], tiny.dinov2(**PLAIN))
    assert same_bits(params, trained[2]['teacher'])
    assert same_bits(extra, {'teacher': trained[2]['teacher']})
    assert [line.split()[:2] for line in lines] == [
        ['taken', name] for name in ('backbone', 'dino_head', 'ibot_head', 'extra')
    ]


def test_a_run_that_centres_takes_all_but_the_centres(trained, imported):
    params, extra, lines = start(imported[0], tiny.dinov2())
    assert same_bits(params, trained[2]['teacher'])
    assert same_bits(extra['teacher'], trained[2]['teacher'])
    fresh = drawn(tiny.dinov2(), seed=9)[2]
    assert same_bits(extra['dino_center'], fresh['dino_center'])
    named = [line.split()[1] for line in lines if line.split()[0] == 'fresh']
    assert named == ['extra/dino_center', 'extra/ibot_center']


def test_a_run_of_dino_starts_from_all_of_a_checkpoint_of_dino(tmp_path):
    tensors = {k: x for k, x in ibot(own=True).items() if 'layer2' not in k}
    files.write(tmp_path / 'a.safetensors', tensors)
    weights.import_weights(tmp_path / 'a.safetensors', tmp_path / 'w', log=None, num_heads=4)
    config = tiny.dinov2(method__separate_heads=False, method__ibot_weight=0.0)
    params, extra, _ = start(tmp_path / 'w', config)
    assert same_bits(params, weights.open_run(tmp_path / 'w').params)
    assert same_bits(extra['teacher'], params)


def distillation(path):
    """A config of a half-size student under the teacher at `path`."""
    return tiny.dinov2(
        'dinov2_distill',
        **PLAIN,
        method__teacher=path and str(path),
        method__teacher_embed_dim=32,
        method__teacher_depth=2,
        method__teacher_num_heads=4,
        method__teacher_ffn='mlp',
        method__embed_dim=16,
        method__depth=1,
        method__drop_path=0.0,
    )


# What a distillation may look at before step 0.
FILES = base.Start(seed=0, fetch=None, batches=None, open=weights.open_weights, tensors=None)


def test_an_imported_teacher_teaches_with_its_heads(trained, imported):
    method, _, extra = drawn(distillation(imported[0]))
    found, lines = method.prepare(extra, FILES)
    assert set(found) == {'teacher'} and lines == [f'teacher: {imported[0]}']
    fresh = jax.tree.map(jnp.asarray, extra['teacher'])
    got = weights.place('teacher', found['teacher'], fresh)
    assert same_bits(jax.device_get(got), trained[2]['teacher'])


def test_an_imported_encoder_alone_is_refused_as_such_a_teacher(trained, tmp_path):
    out = leave(trained[0], 'official', tmp_path / 'out')
    weights.import_weights(out, tmp_path / 'w', log=None)
    method, _, extra = drawn(distillation(tmp_path / 'w'))
    with pytest.raises(ValueError, match='has no projection heads'):
        method.prepare(extra, FILES)


def first_state(config):
    """The state that a run of this config starts from."""
    method = methods.make(config, clock.Clock.of(config, 64))
    program = step_lib.make_program(config, method)
    saved = types.SimpleNamespace(latest=lambda: None)
    return run_start.first_state(config, method, program, saved, None)


def test_a_teacher_with_other_sizes_is_refused_by_the_field_that_names_it(imported):
    config = distillation(imported[0])
    with config.unlocked():
        config.method.teacher_embed_dim = 64
    with pytest.raises(ValueError, match=f'^method.teacher={imported[0]} does not fit, ') as error:
        first_state(config)
    assert 'teacher/' in str(error.value) and 'init_from' not in str(error.value)


def test_so_is_a_teacher_of_features(imported):
    config = tiny.changed(
        tiny.base('distill'),
        dict(
            method__teacher=str(imported[0]),
            method__teacher_embed_dim=64,
            method__teacher_depth=2,
            method__teacher_num_heads=4,
            method__num_cls_tokens=1,
        ),
    )
    with pytest.raises(ValueError, match='embed_dim is 32 there and 64 here') as error:
        first_state(config)
    assert f'The encoder of method.teacher={imported[0]} does not fit' in str(error.value)
