# SPDX-License-Identifier: Apache-2.0
"""What each half of SplitMask gives, and what a small set teaches by itself, on CIFAR-10.

    SSL_JAX_DATA=/data python experiments/splitmask/run.py controls [--out DIR] [--seeds 0 1 2]
    SSL_JAX_DATA=/data python experiments/splitmask/run.py target   [--out DIR] [--seeds 0 1 2]
    SSL_JAX_DATA=/data python experiments/splitmask/run.py rates    [--out DIR] [--seeds 0 1 2]

`controls`: SplitMask whole, without matching, matching alone, MAE and BEiT; the same encoder,
images and number of updates; linear probe, kNN and fine-tuning.  `target`: 5,000 images are all
there is: SplitMask on them, then fine-tuning on them, against training from scratch for the total
CPU time.  `rates`: the whole loss and matching alone at higher and higher learning rates.

Every run is a command of `ssl_jax`, printed before it starts; finished ones are not repeated, so a
stopped experiment continues; another number of updates, or depth, wants another folder.
DIR/controls.md, DIR/target.md and DIR/rates.md are the tables.
"""

import argparse
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq

CIFAR = pathlib.Path(os.environ.get('SSL_JAX_DATA', '../shared/data')) / 'cifar10'
SMALL = ['method.embed_dim=64', 'method.num_heads=4']
CONTROLS = {
    'SplitMask: split, inpaint, match': ('cifar10_splitmask', []),
    'split and inpaint': ('cifar10_splitmask', ['method.w_nce=0']),
    'match only': ('cifar10_splitmask', ['method.w_mim=0']),
    'MAE': ('cifar10_mae', []),
    'BEiT': ('cifar10_beit', []),
}
BATCH, IMAGES = 64, 5000
EPOCHS = 10  # of fine-tuning in `target`; `controls` has half as many


def run(*words):
    """Seconds of CPU time that one `ssl_jax` command took; its last lines if it fails."""
    words = [str(w) for w in words]
    print('$ ssl_jax', *words, flush=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, '-m', 'ssl_jax.cli', *words], capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f'{done.stdout[-2000:]}\n{done.stderr[-2000:]}')
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def subset(out):
    """The first 5,000 training images as a file of their own."""
    path = out / f'train_{IMAGES}.parquet'
    if not path.exists():
        pq.write_table(pq.read_table(CIFAR / 'train.parquet').slice(0, IMAGES), path)
        shutil.copy(CIFAR / 'classes.txt', out)
    return path


def pretrain(recipe, fields, workdir, seed, data, updates):
    """Seconds of CPU time that the run took (kept beside it)."""
    taken = workdir / 'seconds.json'
    if not taken.exists():
        seconds = run(
            'pretrain', '--config', recipe, '--workdir', workdir, '--data', data,
            f'seed={seed}', f'total_steps={updates}', 'total_epochs=None', 'warmup_epochs=None',
            f'warmup_steps={updates // 10}', f'batch_size={BATCH}', 'eval.every_epochs=None',
            'eval.knn=False', *SMALL, *fields,
        )  # fmt: skip
        taken.write_text(json.dumps(seconds))
    return json.loads(taken.read_text())


def probe(workdir):
    """Top-1 of linear probe and kNN, of the best feature, with 5,000 images each; RankMe."""
    path = workdir / 'probe.json'
    if not path.exists():
        run(
            'eval', '--workdir', workdir, '--out', path, '--limit', IMAGES,
            '--data', CIFAR / 'train.parquet', '--test', CIFAR / 'test.parquet',
        )  # fmt: skip
    rows = json.loads(path.read_text())
    rank = next(r['rankme'] for r in rows if r.get('rankme') and r['feature'] == 'patch')
    best = {
        f'{model} {kind}': max(r['top1'] for r in rows if (r['model'], r['eval']) == (model, kind))
        for model in ('trained', 'untrained', 'raw_pixels')
        for kind in ('linear', 'knn')
    }
    return {**best, 'rankme': rank}


def finetune(model, workdir, seed, epochs, data):
    """(top-1 on the test images at the end, seconds of CPU time)."""
    taken = workdir / 'seconds.json'
    if not taken.exists():
        fields = SMALL if model == 'none' else []
        seconds = run(
            'finetune', '--config', 'finetune_cifar10', '--model', model, '--workdir', workdir,
            '--data', data, '--test', CIFAR / 'test.parquet', f'seed={seed}',
            f'total_epochs={epochs}', 'warmup_epochs=1', f'batch_size={BATCH}',
            'eval.every_epochs=None', *fields,
        )  # fmt: skip
        taken.write_text(json.dumps(seconds))
    lines = (workdir / 'metrics.jsonl').read_text().splitlines()
    found = [row['test/top1'] for row in map(json.loads, lines) if 'test/top1' in row]
    return found[-1], json.loads(taken.read_text())


def spread(values, digits=1):
    """Mean and, of several values, their sample standard deviation."""
    std = f' ± {np.std(values, ddof=1):.{digits}f}' if len(values) > 1 else ''
    return f'{np.mean(values):.{digits}f}{std}'


def controls(out, seeds, updates):
    data, rows = subset(out), {name: [] for name in CONTROLS}
    for seed in seeds:  # outermost, so that a stopped experiment has whole seeds
        for i, (name, (recipe, fields)) in enumerate(CONTROLS.items()):
            workdir = out / f'control{i}_{seed}'
            pretrain(recipe, fields, workdir, seed, CIFAR / 'train.parquet', updates)
            tuned = finetune(workdir, out / f'control{i}_{seed}_tuned', seed, EPOCHS // 2, data)[0]
            rows[name].append({**probe(workdir), 'tuned': tuned})
    scratch = [finetune('none', out / f'scratch_{s}', s, EPOCHS // 2, data)[0] for s in seeds]
    text = [
        f'{updates} updates of batch {BATCH}, seeds {", ".join(map(str, seeds))}: mean ± standard '
        f'deviation, top-1 in %. Probes: {IMAGES} training and test images; '
        f'fine-tuned on {IMAGES}, {EPOCHS // 2} epochs.',
        '',
        '| pretraining | linear probe | kNN | fine-tuned |',
        '|---|---|---|---|',
    ]
    for name, found in rows.items():
        columns = [[f[k] for f in found] for k in ('trained linear', 'trained knn', 'tuned')]
        text.append(f'| {name} | ' + ' | '.join(map(spread, columns)) + ' |')
    first = next(iter(rows.values()))
    columns = [[f[k] for f in first] for k in ('untrained linear', 'untrained knn')]
    text.append('| none | ' + ' | '.join(map(spread, [*columns, scratch])) + ' |')
    columns = [[first[0][k]] for k in ('raw_pixels linear', 'raw_pixels knn')]
    text.append('| raw pixels | ' + ' | '.join(f'{c[0]:.1f}' for c in columns) + ' | |')
    return '\n'.join(text)


def target(out, seeds, updates):
    data, pretrained, scratch, seconds = subset(out), [], [], []
    for seed in seeds:
        workdir = out / f'target_{seed}'
        before = pretrain('cifar10_splitmask', [], workdir, seed, data, updates)
        top1, after = finetune(workdir, out / f'target_{seed}_tuned', seed, EPOCHS, data)
        pretrained.append(top1)
        epochs = round(EPOCHS * (before + after) / after)
        control, taken = finetune('none', out / f'target_{seed}_scratch', seed, epochs, data)
        few = finetune('none', out / f'target_{seed}_short', seed, EPOCHS, data)[0]
        scratch.append((few, control))
        seconds.append((before + after, taken, epochs))
    short, long = zip(*scratch)
    ours, theirs, epochs = np.mean(seconds, axis=0)
    ours_was = f'SplitMask {updates} updates, then {EPOCHS} epochs'
    return '\n'.join([
        f'{IMAGES} images of CIFAR-10, seeds {", ".join(map(str, seeds))}: top-1 in % on 10,000.',
        '',
        '| training | CPU seconds | top-1 |',
        '|---|---|---|',
        f'| {ours_was} | {ours:.0f} | {spread(pretrained)} |',
        f'| from scratch, {epochs:.0f} epochs: the same CPU time | {theirs:.0f} | {spread(long)} |',
        f'| from scratch, {EPOCHS} epochs: the same labels seen | | {spread(short)} |',
    ])  # fmt: skip


def rates(out, seeds, updates, lrs):
    text = [
        f'{updates} updates of batch {BATCH}, seeds {", ".join(map(str, seeds))}: mean ± standard '
        f'deviation. InfoNCE of equal descriptors is ln {BATCH} = {np.log(BATCH):.2f}. Probes: '
        f'{IMAGES} training and test images, top-1 in %.',
        '',
        '| pretraining | rate | InfoNCE at the end | RankMe of patch means | linear probe | kNN |',
        '|---|---|---|---|---|---|',
    ]
    for name in ('SplitMask: split, inpaint, match', 'match only'):
        recipe, fields = CONTROLS[name]
        for lr in lrs:
            found = []
            for seed in seeds:
                workdir = out / f'rate{lr:g}_{name.split()[0][:5]}_{seed}'
                own = [*fields, f'optim.lr={lr}']
                pretrain(recipe, own, workdir, seed, CIFAR / 'train.parquet', updates)
                lines = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
                nce = [row['nce'] for row in lines if 'nce' in row][-1]
                found.append({**probe(workdir), 'nce': nce})
            columns = [[f[k] for f in found] for k in ('rankme', 'trained linear', 'trained knn')]
            first = spread([f['nce'] for f in found], 2)
            text.append(f'| {name} | {lr:g} | {first} | ' + ' | '.join(map(spread, columns)) + ' |')
    return '\n'.join(text)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('what', choices=('controls', 'target', 'rates'))
    parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('runs/splitmask'))
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--updates', type=int, default=800, help='of pretraining')
    parser.add_argument('--depth', type=int, default=4, help='blocks of the encoder')
    parser.add_argument(
        '--lrs', type=float, nargs='+', default=[1e-2, 3e-2],
        help="of `rates`; `controls` has the recipe's, 7e-4",
    )  # fmt: skip
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    SMALL.append(f'method.depth={args.depth}')
    make = {'controls': controls, 'target': target, 'rates': rates}[args.what]
    more = [args.lrs] if args.what == 'rates' else []
    table = make(args.out, args.seeds, args.updates, *more)
    (args.out / f'{args.what}.md').write_text(table + '\n')
    print(table)
