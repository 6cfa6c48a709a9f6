# SPDX-License-Identifier: Apache-2.0
"""SplitMask and BEiT by one command on a folder of images; what is refused before step 0."""

import contextlib
import io
import json
import shutil

import cv2
import numpy as np
import pytest

import ssl_jax
from ssl_jax import cli
from ssl_jax.data import scenes
from ssl_jax.run import weights

SMALL = (
    *('total_steps=2', 'batch_size=8', 'method.embed_dim=32', 'method.depth=1'),
    *('method.num_heads=2', 'method.img_size=32', 'method.patch_size=8', 'method.vocab=128'),
    *('log.tensorboard=False', 'eval.tasks.pictures=None'),
)


def write(root, images):
    for i, image in enumerate(images):
        path = root / ('odd' if i % 2 else 'even') / f'{i:02}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), image)
    return root


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    source = scenes.Scenes(16, 48)
    return write(tmp_path_factory.mktemp('images'), [source[i]['image'] for i in range(16)])


def pretrain(method, folder, workdir, *fields):
    """What the command printed."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        cli.main(
            ['pretrain', '--data', str(folder), '--method', method]
            + ['--workdir', str(workdir), *SMALL, *fields]
        )
    return said.getvalue()


@pytest.fixture(scope='module')
def beit(folder, tmp_path_factory):
    """(what was printed, workdir)."""
    workdir = tmp_path_factory.mktemp('beit') / 'w'
    return pretrain('beit', folder, workdir), workdir


def test_the_words_are_inferred_printed_and_in_the_checkpoint(beit):
    said, workdir = beit
    assert 'method.token_patch_size = 8: pixels, of patches of 8.' in said
    assert 'words     128 by random_patches, perplexity ' in said
    run = weights.open_run(workdir)
    assert run.extra['codebook']['vectors'].shape == (128, 192) and run.extra['prepared'] == 1
    rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    assert {'mim_gain', 'token_perplexity', 'features/std'} <= set().union(*rows)


def test_a_run_without_pictures_does_not_promise_them(beit):
    said, workdir = beit
    assert 'done: step 2' in said and 'pictures and curves' not in said
    assert not (workdir / 'pictures').exists()


def test_the_run_is_shown_and_gives_features(beit, folder, tmp_path, capsys):
    _, workdir = beit
    args = ['--workdir', str(workdir), '--data', str(folder)]
    cli.main(['show', *args, '--out', str(tmp_path / 'pictures'), '--num', '2'])
    shown = {line.rsplit('/')[-1] for line in capsys.readouterr().out.split()}
    always = {'crops_image.png', 'pca.png', 'attention.png', 'curves.png'}
    assert shown == always | {'reconstruction_0000002.png'}
    out = ssl_jax.load_model(workdir)(np.zeros((2, 32, 32, 3), np.uint8))
    assert out['patch_tokens'].shape == (2, 16, 32)
    with pytest.raises(SystemExit):
        cli.main(['eval', '--workdir', str(workdir)])
    assert 'give labelled images with --data' in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize('method', ['splitmask', 'beit'])
def test_a_run_is_evaluated_beside_its_untrained_twin(folder, tmp_path, method, capsys):
    said = pretrain(method, folder, tmp_path / 'w')
    assert 'mim_gain' in said and 'done: step 2' in said
    cli.main(['eval', '--workdir', str(tmp_path / 'w'), '--data', str(folder)])
    assert 'untrained' in capsys.readouterr().out


def test_splitmask_needs_two_images_to_compare(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        pretrain('splitmask', folder, tmp_path / 'v', 'batch_size=1')
    assert 'set batch_size to 2 or more' in capsys.readouterr().err


def test_images_without_contrast_are_no_task_and_the_sentence_says_what_to_do(tmp_path, capsys):
    flat = [np.full((48, 48, 3), 10 * (i % 3), np.uint8) for i in range(16)]
    folder = write(tmp_path / 'images', flat)
    with pytest.raises(SystemExit) as stop:
        pretrain('splitmask', folder, tmp_path / 'w')
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 1 and len(err.splitlines()) == 1
    assert 'words' in err and 'min_perplexity' in err
    assert not list((tmp_path / 'w').glob('checkpoints/*'))


def test_a_folder_of_broken_files_is_one_sentence(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / 'images')
    for path in (tmp_path / 'images').rglob('*.png'):
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(SystemExit) as stop:
        pretrain('beit', tmp_path / 'images', tmp_path / 'w')
    err = capsys.readouterr().err.strip()
    assert stop.value.code == 1 and len(err.splitlines()) == 1 and '.png' in err
