# SPDX-License-Identifier: Apache-2.0
"""What a file does not say is asked for by name and said in one form, on every command."""

import numpy as np
import pytest

import tiny
import tiny_weights
from ssl_jax import cli, encoder, train
from ssl_jax.evals import feature_file
from ssl_jax.interop import export, files, layouts
from ssl_jax.run import hints, weights


@pytest.fixture(scope='module')
def flat(tmp_path_factory):
    """A bare file of an encoder whose heads are in no tensor."""
    path = tmp_path_factory.mktemp('flat') / 'my vit.safetensors'
    w = tiny_weights.weights('vit', 'official')
    files.write(path, layouts.to_layout(w, tiny_weights.params(w))[0])
    return path


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """A .pth with weights, their average, an optimizer and another average further down."""
    torch = pytest.importorskip('torch')
    w = tiny_weights.weights('dinov2', 'official')
    parts = [layouts.to_layout(w, tiny_weights.params(w, seed))[0] for seed in range(3)]
    parts = [{k: torch.from_numpy(np.array(x)) for k, x in part.items()} for part in parts]
    path = tmp_path_factory.mktemp('parts') / 'last.pth'
    tree = {'state_dict': parts[0], 'state_dict_ema': parts[1], 'more': {'average': parts[2]}}
    torch.save({**tree, 'optimizer': {'state': {0: parts[0]}}, 'epoch': 3}, path)
    return path


def fails(args, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([str(a) for a in args])
    assert end.value.code == 1
    err = capsys.readouterr().err
    assert err.count('\n') == 1
    return err


def mask_token(seed):
    w = tiny_weights.weights('dinov2', 'official')
    return tiny_weights.params(w, seed)['encoder']['mask_token']


# Numbers


def test_features_asks_for_the_heads_and_takes_them_behind_its_words(
    flat, tmp_path, capsys, monkeypatch
):
    args = ['features', '--model', flat, '--data', tmp_path, '--out', tmp_path / 'f.parquet']
    err = fails(args, capsys)
    assert 'give num_heads behind the other words of the command, as in num_heads=12' in err
    seen = []
    monkeypatch.setattr(feature_file, 'extract', lambda model, *a, **kw: seen.append(model))
    cli.main([*map(str, args), 'num_heads=4'])
    assert seen[0].vit.num_heads == 4


def test_finetune_and_pretrain_take_them_too_and_keep_them_in_the_config(flat, monkeypatch):
    seen = []
    monkeypatch.setattr(train, 'command', lambda recipe, fields, *_: seen.append(fields))
    words = ['num_heads=4', 'optim.lr=0.1', 'part=model']
    cli.main(['finetune', '--model', str(flat), '--config', 'x', '--workdir', 'w', *words])
    assert seen[-1] == [f'init_from={flat} num_heads=4 part=model', 'optim.lr=0.1']
    cli.main(['pretrain', '--config', 'x', '--workdir', 'w', f'init_from={flat}', *words])
    assert seen[-1] == [f'init_from={flat} num_heads=4 part=model', 'optim.lr=0.1']
    # Without a file they are fields of the config, which says what it has.
    cli.main(['pretrain', '--config', 'x', '--workdir', 'w', 'img_size=64'])
    assert seen[-1] == ['img_size=64']


def test_a_path_in_a_config_carries_the_words_and_may_have_spaces_of_its_own(flat):
    assert weights.header(f'{flat} num_heads=8').vit.num_heads == 8
    assert weights.open_weights(f'{flat}  img_size=32 num_heads=2').vit.num_heads == 2
    assert hints.split(str(flat)) == (str(flat), {})
    assert hints.split('runs/lr=0.1 heads=3') == ('runs/lr=0.1 heads=3', {})
    assert hints.split(flat.parent / 'a num_heads=3')[1] == {'num_heads': 3}


@pytest.mark.parametrize(
    'word,says',
    [
        ('num_heads=x', 'num_heads=x is no number of 1 or more; write it as in num_heads=12'),
        ('num_heads=0', 'num_heads=0 is no number'),
        ('img_size=-32', 'img_size=-32 is no number'),
        ('patch_size=8.0', 'patch_size=8.0 is no number'),
        ('pos_resize=cubic', 'pos_resize=cubic is unknown; use one of bicubic'),
        ('part=', 'part= has no value'),
        ('num_head=4', "did you mean 'num_heads'"),
        ('4', "'4' has no '='"),
    ],
)
def test_a_word_that_says_nothing_is_one_sentence(flat, tmp_path, capsys, word, says):
    for args in (
        ['import', flat, '--workdir', tmp_path / 'w'],
        ['features', '--model', flat, '--data', tmp_path, '--out', tmp_path / 'f.parquet'],
    ):
        assert says in fails([*args, word], capsys)


def test_a_run_needs_no_words_and_an_export_is_not_contradicted(tmp_path, capsys):
    tiny.save(tiny.config(), tmp_path / 'run')
    with pytest.raises(ValueError, match='is a run, which says all of itself; leave num_heads'):
        weights.open_weights(tmp_path / 'run', num_heads=4)
    out = export.export(weights.open_run(tmp_path / 'run'), 'official', tmp_path / 'out')
    assert weights.header(out, num_heads=4).vit.num_heads == 4
    with pytest.raises(ValueError, match='num_heads=2 contradicts the file, where it is 4'):
        weights.header(out, num_heads=2)
    err = fails(['eval', '--workdir', out / 'model.safetensors'], capsys)
    assert 'is a file and no run; make one of it with `ssl_jax import' in err


# Parts


def test_the_part_that_is_taken_is_said_and_the_others_are_named(checkpoint, tmp_path, capsys):
    cli.main(['import', str(checkpoint), '--workdir', str(tmp_path / 'w'), 'num_heads=4'])
    text = capsys.readouterr().out
    assert "its part 'state_dict'; also there: state_dict_ema, more" in text
    assert 'part=NAME takes another' in text and 'optimizer' not in text


@pytest.mark.parametrize(
    'part,seed', [('state_dict', 0), ('state_dict_ema', 1), ('average', 2), ('more/average', 2)]
)
def test_any_part_can_be_named(checkpoint, tmp_path, part, seed):
    opened = weights.open_weights(checkpoint, num_heads=4, part=part)
    np.testing.assert_array_equal(opened.params['encoder']['mask_token'], mask_token(seed))
    model = encoder.load_model(f'{checkpoint} num_heads=4 part={part}')
    np.testing.assert_array_equal(model.params['mask_token'], mask_token(seed))


def test_a_part_that_is_not_there_is_answered_with_the_nearest(checkpoint, flat, capsys, tmp_path):
    args = ['import', checkpoint, '--workdir', tmp_path / 'w', 'num_heads=4']
    err = fails([*args, 'part=state_dict_em'], capsys)
    assert 'part=state_dict_em is not in' in err and "did you mean 'state_dict_ema'" in err
    err = fails(['import', flat, '--workdir', tmp_path / 'w', 'part=ema'], capsys)
    assert 'which holds one set of tensors; leave part out' in err


def test_the_student_of_one_flat_dict_can_be_taken(tmp_path):
    w = tiny_weights.weights('dinov2', 'official')
    tensors = {}
    for seed, who in enumerate(('teacher', 'student')):
        part = layouts.to_layout(w, tiny_weights.params(w, seed))[0]
        tensors |= {f'{who}.backbone.{k}': x for k, x in part.items()}
    files.write(tmp_path / 'a.safetensors', tensors)
    file = files.read(tmp_path / 'a.safetensors')
    assert (file.taken, file.others) == ('teacher', ('student',))
    for part, seed in (('teacher', 0), ('student', 1)):
        opened = weights.open_weights(tmp_path / 'a.safetensors', num_heads=4, part=part)
        np.testing.assert_array_equal(opened.params['encoder']['mask_token'], mask_token(seed))


def test_an_average_alone_is_found(tmp_path, checkpoint):
    torch = pytest.importorskip('torch')
    tree = torch.load(checkpoint)
    torch.save({'model_ema': tree['state_dict_ema'], 'epoch': 1}, tmp_path / 'ema.pth')
    opened = weights.open_weights(tmp_path / 'ema.pth', num_heads=4)
    np.testing.assert_array_equal(opened.params['encoder']['mask_token'], mask_token(1))


# Numbers that are none


@pytest.mark.parametrize('value', [np.nan, np.inf, -np.inf])
def test_a_tensor_with_nan_or_inf_is_refused_by_name(flat, tmp_path, capsys, value):
    tensors = dict(files.read(flat).tensors)
    tensors['blocks.1.mlp.fc1.bias'][3] = value
    files.write(tmp_path / 'bad.safetensors', tensors)
    args = ['import', tmp_path / 'bad.safetensors', '--workdir', tmp_path / 'w', 'num_heads=4']
    assert 'blocks.1.mlp.fc1.bias holds NaN or infinite numbers' in fails(args, capsys)
    assert not (tmp_path / 'w').exists()
