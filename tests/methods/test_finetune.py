# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning: labels reach the loss, encoders come from runs, classifiers are scored exactly."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

import tiny
from ssl_jax import cli, methods, sharding, train
from ssl_jax import config as config_lib
from ssl_jax import step as step_lib
from ssl_jax.augment import mixup, photometry
from ssl_jax.data import host, loader, sources
from ssl_jax.data import stream as stream_lib
from ssl_jax.evals import accuracy
from ssl_jax.evals import command as eval_command
from ssl_jax.interop import export
from ssl_jax.run import checkpoint, metrics, start, weights
from ssl_jax.run import clock as clock_lib


def config(**fields):
    """A locked config of a two-block classifier of 64 rendered scenes."""
    c = tiny.base('classifier')
    c.method.update(num_classes=10, crop_pct=1.0, drop_path=0.2)
    c.method.update(randaugment_layers=0, erase_prob=0.0)  # they take long to compile
    config_lib.shared('finetune').optim(c.optim)
    c.optim.lr = 1e-3
    test = dict(source='scenes', n=50, size=32, split='test')
    c.data.eval_test = ml_collections.ConfigDict(test)
    return tiny.changed(c, fields)


def final_state(workdir, config):
    method = methods.make(config, clock_lib.Clock.of(config, 64))
    program = step_lib.make_program(config, method)
    saved = checkpoint.Checkpointer(workdir / 'checkpoints')
    state, _ = saved.restore(program.abstract)
    saved.close()
    return method, jax.tree.map(np.asarray, state)


def assert_same_bits(a, b):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True
    ):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


# From a model, from scratch


@pytest.fixture(scope='module')
def mae_run(tmp_path_factory):
    """(workdir, parameters) of an untrained MAE."""
    workdir = tmp_path_factory.mktemp('mae')
    return workdir, tiny.save(tiny.config(), workdir)


def load(model, *overrides):
    """The config of `ssl_jax finetune --config finetune_scenes --model ...`."""
    return config_lib.load('finetune_scenes', [f'init_from={model}', *overrides])


def completed(model, *overrides):
    """The same as the run completes it."""
    c = load(model, *overrides)
    return start.complete(c, sources.open_source(c.data.train))


SHORT = ('total_steps=1', 'warmup_steps=0', 'batch_size=16', 'data.train.n=32')
SHORT += ('data.eval_test.n=16', 'log.tensorboard=False', 'compile_cache=False', 'optim.lr=0.0')


def test_the_encoder_of_a_run_is_taken_with_its_fixed_positions_made_trainable(mae_run, tmp_path):
    workdir, params = mae_run
    train.train(load(workdir, *SHORT), tmp_path)
    c = config_lib.from_dict(json.loads((tmp_path / 'config.json').read_text()))[0]
    assert (c.method.embed_dim, c.method.patch_size, c.method.img_size) == (32, 8, 32)
    _, state = final_state(tmp_path, c)
    encoder = dict(state.params['encoder'])
    table = encoder.pop('pos_embed')
    assert_same_bits(encoder, params['encoder'])
    assert table.shape == (1, 17, 32) and np.allclose(table[0, 1, 16:24], [0, 0, 0, 0, 0, 0, 0, 0])


def test_another_image_size_resizes_the_positions(mae_run):
    c = completed(mae_run[0], 'method.img_size=48')
    assert c.method.img_size == 48 and methods.make(c).vit.img_size == 48


@pytest.mark.parametrize('field', ['depth=3', 'size=S', 'patch_size=4'])
def test_a_field_that_contradicts_the_model_is_one_sentence(mae_run, field):
    with pytest.raises(ValueError, match=r'contradicts the model .*: leave it out'):
        completed(mae_run[0], f'method.{field}')


def test_a_model_that_is_none_is_one_sentence(tmp_path):
    (tmp_path / 'notes.txt').write_text('no weights')
    with pytest.raises((ValueError, OSError), match='notes|weights|safetensors'):
        completed(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['dinov2', 'splitmask', 'beit'])
def test_encoders_of_other_methods_are_taken(kind, tmp_path):
    if kind == 'dinov2':
        other = tiny.dinov2()
    else:
        sizes = ('embed_dim=32', 'depth=2', 'num_heads=2', 'img_size=32', 'vocab=16')
        overrides = [f'method.{s}' for s in sizes]
        other = config_lib.load(f'scenes_{kind}', overrides)
    tiny.save(other, tmp_path / 'model')
    c = load(tmp_path / 'model', *SHORT, 'method.ema_decay=0.9')
    train.train(c, tmp_path / 'run')
    c = config_lib.from_dict(json.loads((tmp_path / 'run' / 'config.json').read_text()))[0]
    method, state = final_state(tmp_path / 'run', c)
    vit, want = methods.make(other).networks(*_fresh(other))['encoder']
    assert method.vit.rel_pos == ('layer' if vit.rel_pos else None)
    assert (method.vit.key_bias, method.vit.ffn) == (vit.key_bias, vit.ffn)
    np.testing.assert_array_equal(
        state.params['encoder']['blocks']['attn']['qkv']['kernel'],
        want['blocks']['attn']['qkv']['kernel'],
    )
    np.testing.assert_allclose(  # the average begins with the model too
        state.extra['ema']['encoder']['patch_embed']['proj']['kernel'],
        want['patch_embed']['proj']['kernel'], rtol=1e-6,
    )  # fmt: skip


def _fresh(config):
    return jax.device_get(jax.jit(methods.make(config).init)(jax.random.key(0)))


def command(*args):
    cli.main(['finetune', '--workdir', 'w', *args])


def test_the_command_picks_recipe_and_data(monkeypatch):
    found = []
    monkeypatch.setattr(train, 'command', lambda *args: found.append(args))
    command('--model', 'm', '--data', 'd', '--test', 't')
    fields = ['init_from=m', 'data.train=d', 'method.num_classes=None', 'data.eval_test=t']
    assert found.pop() == ('finetune_images', fields, 'w', None)
    command('--model', 'none', '--recipe', 'beit', 'batch_size=8')
    assert found.pop() == (
        'finetune_beit_vitb16',
        ['optim.layer_decay=None', 'batch_size=8'],
        'w',
        None,
    )


@pytest.mark.parametrize(
    ('args', 'says'),
    [
        (('--data', 'd', '--recipe', 'bert'), "'bert' is unknown: use one of mae, beit, splitmask"),
        ((), 'give --data LABELLED'),
        (('--recipe', 'mae', '--config', 'x'), '--recipe mae and --config x are both recipes'),
    ],
    ids=str,
)
def test_a_command_that_names_no_run_is_one_sentence(args, says, capsys):
    with pytest.raises(SystemExit) as stop:
        command('--model', 'm', *args)
    assert stop.value.code == 1 and says in capsys.readouterr().err


# Labels


def test_images_without_labels_are_refused_with_one_sentence(tmp_path):
    images = np.zeros((32, 32, 32, 3), np.uint8)
    spec = dict(source='arrays', images=images)
    with pytest.raises(ValueError, match='have no labels: put them in one folder per class'):
        methods.make(config()).complete(sources.open_source(spec))


def test_another_number_of_classes_is_refused_and_none_is_filled():
    labels = np.arange(32) % 3
    source = sources.Arrays(np.zeros((32, 8, 8, 3), np.uint8), labels, ('a', 'b', 'c'))
    with pytest.raises(ValueError, match='of 3 classes, method.num_classes is 10'):
        methods.make(config()).complete(source)
    found, lines = methods.make(config(method__num_classes=None)).complete(source)
    assert found == dict(num_classes=3, classes=('a', 'b', 'c'))
    assert lines[0] == 'classes   3: a, b, c'


def test_test_images_of_other_classes_are_refused():
    source = sources.Arrays(np.zeros((4, 8, 8, 3), np.uint8), [0, 1, 0, 1], ('a', 'c'))
    with pytest.raises(ValueError, match=r"differently from the training images \(\['b', 'c'\]\)"):
        accuracy.check_classes(('a', 'b'), source)
    accuracy.check_classes(('a', 'c'), source)


# The loop


@pytest.fixture(scope='module')
def unbroken(tmp_path_factory):
    c, workdir = config(method__ema_decay=0.5), tmp_path_factory.mktemp('unbroken')
    train.train(c, workdir)
    return c, workdir


def test_a_restart_continues_to_the_same_bits_with_the_average(unbroken, tmp_path, monkeypatch):
    c, want = unbroken
    real, left = loader.Stream.__next__, [5]

    class Killed(BaseException):
        pass

    def dying(self):
        if not left[0]:
            raise Killed
        left[0] -= 1
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(loader.Stream, '__next__', dying)
        with pytest.raises(Killed):
            train.train(config(method__ema_decay=0.5, checkpoint__every_steps=2), tmp_path)
    train.train(c, tmp_path)
    assert_same_bits(final_state(tmp_path, c)[1], final_state(want, c)[1])


def test_eval_of_the_run_says_its_accuracy(unbroken, capsys):
    workdir = unbroken[1]
    found = eval_command.evaluate_run(workdir)
    logged = [r for r in metrics.read(workdir) if 'test/top1' in r][-1]
    assert [row['model'] for row in found] == ['trained', 'ema']
    assert found[0]['top1'] == pytest.approx(logged['test/top1'])
    assert found[1]['top1'] == pytest.approx(logged['ema/top1'])
    assert 'the head of the run, one crop, 32 px' in capsys.readouterr().out
    with pytest.raises(ValueError, match='scored and not probed'):
        eval_command.evaluate_run(workdir, data='a', test='b')


def test_export_has_the_names_of_the_official_classifier(unbroken, tmp_path):
    from safetensors import numpy as safetensors

    run = weights.open_run(unbroken[1])
    out = export.export(run, 'official', tmp_path / 'out', what='full')
    tensors = safetensors.load_file(out / 'model.safetensors')
    np.testing.assert_array_equal(tensors['head.weight'], run.params['head']['kernel'].T)
    np.testing.assert_array_equal(tensors['fc_norm.weight'], run.params['fc_norm']['scale'])
    assert 'norm.weight' not in tensors and 'blocks.1.attn.qkv.weight' in tensors
    assert json.loads((out / 'config.json').read_text())['classes'][:2] == ['disc', 'ring']
    with pytest.raises(ValueError, match='names are known to=official'):
        export.export(run, 'hf', tmp_path / 'hf', what='full')


def test_pytorch_gives_the_logits_of_an_exported_classifier(unbroken, tmp_path):
    torch = pytest.importorskip('torch')
    from safetensors.torch import load_file

    run = weights.open_run(unbroken[1])
    out = export.export(run, 'official', tmp_path / 'out', what='full')
    tensors = load_file(out / 'model.safetensors')
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3)).astype(np.uint8)
    want = run.method.logits(run.params, run.extra, images)['test']
    x = np.moveaxis(np.asarray(photometry.normalize(images)), -1, 1)
    found = official_classifier(torch.from_numpy(x.copy()), tensors, run.method.vit.num_heads)
    np.testing.assert_allclose(found, want, atol=2e-5)
    assert not tensors  # each was used


def official_classifier(x, tensors, num_heads):
    """Logits of MAE's official classifier with mean pooling in PyTorch; empties `tensors`.

    Reference: mae `models_vit.py`, timm 0.3.2 `vision_transformer.py`.
    """
    import torch
    from torch.nn import functional as F

    def take(name):
        return [tensors.pop(f'{name}.{kind}') for kind in ('weight', 'bias')]

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], *take(name), eps=1e-6)

    kernel, bias = take('patch_embed.proj')
    x = F.conv2d(x, kernel, bias, stride=kernel.shape[-1]).flatten(2).transpose(1, 2)
    b, _, d = x.shape
    x = torch.cat([tensors.pop('cls_token').expand(b, 1, d), x], 1) + tensors.pop('pos_embed')
    for i in range(1 + max(int(k.split('.')[1]) for k in tensors if k.startswith('blocks.'))):
        qkv = F.linear(norm(x, f'blocks.{i}.norm1'), *take(f'blocks.{i}.attn.qkv'))
        qkv = qkv.reshape(b, -1, 3, num_heads, d // num_heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(*qkv).transpose(1, 2).reshape(b, -1, d)
        x = x + F.linear(y, *take(f'blocks.{i}.attn.proj'))
        y = F.gelu(F.linear(norm(x, f'blocks.{i}.norm2'), *take(f'blocks.{i}.mlp.fc1')))
        x = x + F.linear(y, *take(f'blocks.{i}.mlp.fc2'))
    return F.linear(norm(x[:, 1:].mean(1), 'fc_norm'), *take('head'))


def test_the_classes_are_kept_with_the_checkpoint(unbroken):
    run = weights.open_run(unbroken[1])
    assert run.method.classes[:2] == ('disc', 'ring') and run.method.num_classes == 10


def test_the_run_scores_the_weights_and_their_average(unbroken):
    c, workdir = unbroken
    scored = [r for r in metrics.read(workdir) if 'test/top1' in r][-1]
    assert scored['step'] == 8 and scored['test/images'] == 50
    method, state = final_state(workdir, c)
    source = sources.open_source(c.data.eval_test)
    images = np.stack([np.asarray(source[i]['image']) for i in range(50)])
    labels = np.array([source[i]['label'] for i in range(50)])
    for name, logits in method.logits(state.params, state.extra, images).items():
        order = np.argsort(-logits, axis=1, kind='stable')
        hits = order == labels[:, None]
        assert scored[f'{name}/top1'] == pytest.approx(100 * hits[:, 0].mean())
        assert scored[f'{name}/top5'] == pytest.approx(100 * hits[:, :5].any(axis=1).mean())
    leaves = zip(jax.tree.leaves(state.params), jax.tree.leaves(state.extra['ema']), strict=True)
    assert any(np.any(p != e) for p, e in leaves)


def test_the_average_follows_the_weights():
    method = dataclasses.replace(methods.make(config()), ema_decay=0.9)
    extra = method.after_update({'w': jnp.ones(2)}, {'ema': {'w': jnp.zeros(2)}}, 0)
    np.testing.assert_allclose(extra['ema']['w'], 0.1, rtol=1e-6)


def losses_on(devices, fields, **mesh):
    c = config(total_steps=3, warmup_steps=0, batch_size=16, **fields)
    method = methods.make(c, clock_lib.Clock.of(c))
    mesh = sharding.make_mesh(**mesh, devices=jax.devices()[:devices])
    program = step_lib.make_program(c, method, mesh)
    found, rows = [], sharding.process_rows(mesh, 16)
    source = sources.open_source(c.data.train)
    with jax.set_mesh(mesh):
        state = program.init()
        with stream_lib.train_stream(source, method.views(), batch_size=16, seed=0) as stream:
            for _ in range(3):
                batch = {k: v for k, v in next(stream).items() if k in ('image', 'label')}
                state, m = program.step(state, sharding.to_global(batch, mesh, rows, 16))
                found.append(float(m['loss']))
    return np.array(found)


@pytest.mark.parametrize(
    'fields',
    [
        {},
        pytest.param(
            dict(method__randaugment_layers=2, method__erase_prob=0.5), marks=pytest.mark.slow
        ),
    ],
    ids=['mixing', 'everything'],
)
def test_what_is_mixed_and_learned_does_not_depend_on_the_devices(fields):
    want = losses_on(1, fields)
    np.testing.assert_allclose(losses_on(8, fields, data=2, fsdp=4), want, rtol=1e-5)


def test_a_test_image_counts_once_and_a_nan_never():
    logits = np.array([[3.0, 1, 2], [1, 3, 2], [np.nan, 1, 2], [2, 2, 1]])
    count = accuracy._count(logits, np.array([0, 0, 0, 1]))
    assert count[0] == 4 and count[1] == 1  # ties go to the smaller number


# Mixing


def test_targets_sum_to_one_and_hold_both_classes():
    mix = mixup.Mix(jnp.float32(0.7), jnp.asarray(False), jnp.zeros(4, jnp.int32))
    found = np.asarray(mixup.targets(jnp.array([0, 1, 2]), 4, mix, smoothing=0.1))
    np.testing.assert_allclose(found.sum(axis=1), 1, rtol=1e-6)
    on, off = 0.9 + 0.1 / 4, 0.1 / 4
    want = [0.7 * on + 0.3 * off, off, 0.3 * on + 0.7 * off, off]
    np.testing.assert_allclose(found[0], want, rtol=1e-6)
    np.testing.assert_allclose(found[1], [off, on, off, off], rtol=1e-6)


@pytest.mark.parametrize('seed', range(5))
def test_the_box_of_cutmix_covers_what_its_target_says(seed):
    mix = mixup.draw(jax.random.key(seed), (24, 32), mixup=0.0, cutmix=1.0)
    x = jnp.stack([jnp.zeros((24, 32, 1)), jnp.ones((24, 32, 1))])
    found = mixup.images(x, mix)
    assert float(found[0].mean()) == pytest.approx(1 - float(mix.lam), abs=1e-6)
    assert set(np.unique(found)) <= {0.0, 1.0}


def test_mixup_blends_with_the_batch_in_reverse():
    mix = mixup.draw(jax.random.key(1), (4, 4), mixup=0.8, cutmix=0.0)
    x = jnp.arange(3.0)[:, None, None, None] * jnp.ones((3, 4, 4, 1))
    found, lam = mixup.images(x, mix), float(mix.lam)
    np.testing.assert_allclose(found[0], 2 * (1 - lam), rtol=1e-5)
    np.testing.assert_allclose(found[1], 1, rtol=1e-6)


def test_half_of_the_batches_are_cut_and_lambda_is_beta_distributed():
    keys = jax.random.split(jax.random.key(0), 2000)
    mix = jax.vmap(lambda k: mixup.draw(k, (32, 32), 0.8, 1.0))(keys)
    assert abs(float(mix.cut.mean()) - 0.5) < 0.04
    lam = np.asarray(mix.lam)[~np.asarray(mix.cut)]
    assert abs(lam.mean() - 0.5) < 0.04
    assert abs(lam.var() - 1 / (4 * (2 * 0.8 + 1))) < 0.01  # of Beta(a, a)


def test_no_alpha_mixes_nothing():
    mix = mixup.draw(jax.random.key(0), (8, 8), 0.0, 0.0)
    assert float(mix.lam) == 1.0


def test_rows_of_one_image_stand_together_and_have_other_crops():
    source = sources.open_source(dict(source='scenes', n=64, size=32, split='train'))
    views = (host.View('image', 16),)
    with stream_lib.train_stream(source, views, batch_size=12, seed=0, repeats=3) as stream:
        first, second = next(stream), next(stream)
    ids = np.concatenate([first['id'], second['id']])
    assert (ids.reshape(8, 3) == ids[::3, None]).all() and len(set(ids)) == 8
    assert not np.array_equal(first['image'][0], first['image'][1])


def test_without_regularisation_the_head_sees_normalised_pixels_and_plain_labels():
    c = config(method__flip=0.0)
    with c.unlocked():
        config_lib.shared('finetune').plain(c.method)
    images = np.random.default_rng(0).integers(0, 256, (4, 1, 32, 32, 3)).astype(np.uint8)
    batch = {'image': images, 'label': np.arange(4), 'row': np.arange(4)}
    x, targets = methods.make(c).augment(batch, jax.random.key(0))
    np.testing.assert_array_equal(x, photometry.normalize(images[:, 0]))
    np.testing.assert_array_equal(targets, np.eye(10)[:4])


def test_a_run_learns_its_scenes_by_heart(tmp_path):
    """Loss, labels, schedule and scoring belong together: chance is 10 %."""
    images = tiny.config().data.train.to_dict()
    fields = dict(optim__layer_decay=None, optim__lr=3e-3, total_steps=120, warmup_steps=10)
    c = config(**fields, data__eval_test=images, log__every_steps=40)
    with c.unlocked():
        config_lib.shared('finetune').plain(c.method)
        c.method.update(crop_scale=(1.0, 1.0), flip=0.0)
    assert train.train(c, tmp_path)['test/top1'] > 60
