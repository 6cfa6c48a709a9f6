# SPDX-License-Identifier: Apache-2.0
"""What each half of SplitMask gives, and what a small set teaches by itself.

    SSL_JAX_DATA=/data python experiments/splitmask/run.py controls [--out DIR] [--seeds 0 1 2]
    python experiments/splitmask/run.py scenes --updates 4000 [--out DIR] [--seeds 0 1 2]
    SSL_JAX_DATA=/data python experiments/splitmask/run.py target   [--out DIR] [--seeds 0 1 2]
    SSL_JAX_DATA=/data python experiments/splitmask/run.py rates    [--out DIR] [--seeds 0 1 2]

`controls`: SplitMask, without matching, matching alone, MAE and BEiT on CIFAR-10; the same
encoder, images and number of updates; linear probe, kNN and fine-tuning.
`scenes`: the first three on rendered scenes (`scenes_splitmask`), where colours tell nothing of the
classes.
`target`: 5,000 images of CIFAR-10 are all there is: SplitMask on them, then fine-tuning on them,
against training from scratch for the total CPU time. `rates`: the whole loss and matching alone at
increasing learning rates, on CIFAR-10.

Every run is a command of `ssl_jax`, printed before it starts. Finished runs are not repeated, so a
stopped experiment continues; use another folder for another number of updates or depth.
DIR/controls.md, scenes.md, target.md and rates.md are the tables.
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
CONTROLS = {
    'SplitMask: split, inpaint, match': ('cifar10_splitmask', []),
    'split and inpaint': ('cifar10_splitmask', ['method.w_nce=0']),
    'match only': ('cifar10_splitmask', ['method.w_mim=0']),
    'MAE': ('cifar10_mae', []),
    'BEiT': ('cifar10_beit', []),
}
BATCH, IMAGES = 64, 5000
PROBE = ('--data', CIFAR / 'train.parquet', '--test', CIFAR / 'test.parquet', '--limit', IMAGES)
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
    """File of the first 5,000 training images."""
    path = out / f'train_{IMAGES}.parquet'
    if not path.exists():
        pq.write_table(pq.read_table(CIFAR / 'train.parquet').slice(0, IMAGES), path)
        shutil.copy(CIFAR / 'classes.txt', out)
    return path


def cifar(data, args):
    """Arguments that pretrain a small encoder on these images of CIFAR-10."""
    return ['--data', data, f'batch_size={BATCH}', *args.small]


def pretrain(recipe, words, workdir, seed, updates):
    """Seconds of CPU time of the run, stored in its folder."""
    taken = workdir / 'seconds.json'
    if not taken.exists():
        seconds = run(
            'pretrain', '--config', recipe, '--workdir', workdir, *words, f'seed={seed}',
            f'total_steps={updates}', f'warmup_steps={updates // 10}', 'total_epochs=None',
            'warmup_epochs=None', 'eval.every_steps=None', 'eval.every_epochs=None',
            'eval.tasks.knn=None',
        )  # fmt: skip
        taken.write_text(json.dumps(seconds))
    return json.loads(taken.read_text())


def probe(workdir, *words):
    """Top-1 of linear probe and kNN, each of its best feature; RankMe. `words` name the data."""
    path = workdir / 'probe.json'
    if not path.exists():
        run('eval', '--workdir', workdir, '--out', path, *words)
    rows = json.loads(path.read_text())
    rank = next(r['rankme'] for r in rows if r.get('rankme') and r['feature'] == 'patch')
    best = {
        f'{model} {kind}': max(r['top1'] for r in rows if (r['model'], r['eval']) == (model, kind))
        for model in ('trained', 'untrained', 'raw_pixels')
        for kind in ('linear', 'knn')
    }
    return {**best, 'rankme': rank}


def finetune(model, workdir, seed, epochs, data, fields=()):
    """(top-1 on the test images at the end, seconds of CPU time)."""
    taken = workdir / 'seconds.json'
    if not taken.exists():
        seconds = run(
            'finetune', '--config', 'finetune_cifar10', '--model', model, '--workdir', workdir,
            '--data', data, '--test', CIFAR / 'test.parquet', f'seed={seed}',
            f'total_epochs={epochs}', 'warmup_epochs=1', f'batch_size={BATCH}',
            'eval.every_epochs=None', *fields,
        )  # fmt: skip
        taken.write_text(json.dumps(seconds))
    return last(workdir, 'test/top1'), json.loads(taken.read_text())


def last(workdir, name):
    """The last logged value of a metric, None without one."""
    rows = map(json.loads, (workdir / 'metrics.jsonl').read_text().splitlines())
    return ([None] + [row[name] for row in rows if name in row])[-1]


def named(seeds):
    return f'seeds {", ".join(map(str, seeds))}: mean ± standard deviation'


def spread(values, digits=1):
    """Mean and, for several values, their sample standard deviation."""
    std = f' ± {np.std(values, ddof=1):.{digits}f}' if len(values) > 1 else ''
    return f'{np.mean(values):.{digits}f}{std}'


def probed(found, model):
    """Columns linear probe and kNN of 'trained', 'untrained' or 'raw_pixels' in these probes."""
    return ' | '.join(spread([f[f'{model} {kind}'] for f in found]) for kind in ('linear', 'knn'))


def controls(args):
    data, rows = subset(args.out), {name: [] for name in CONTROLS}
    train, epochs = CIFAR / 'train.parquet', EPOCHS // 2
    scratch = []
    for seed in args.seeds:  # outermost, so that a stopped experiment has whole seeds
        for i, (name, (recipe, fields)) in enumerate(CONTROLS.items()):
            workdir = args.out / f'control{i}_{seed}'
            pretrain(recipe, [*cifar(train, args), *fields], workdir, seed, args.updates)
            tuned = args.out / f'control{i}_{seed}_tuned'
            top1, _ = finetune(workdir, tuned, seed, epochs, data)
            rows[name].append({**probe(workdir, *PROBE), 'tuned': top1})
        folder = args.out / f'scratch_{seed}'
        scratch.append(finetune('none', folder, seed, epochs, data, args.small)[0])
    text = [
        f'{args.updates} updates of batch {BATCH}, {named(args.seeds)}; top-1 in %. Probes: '
        f'{IMAGES} training and test images; fine-tuned on {IMAGES}, {epochs} epochs.',
        '',
        '| pretraining | linear probe | kNN | fine-tuned |',
        '|---|---|---|---|',
    ]
    for name, found in rows.items():
        columns = [[f[k] for f in found] for k in ('trained linear', 'trained knn', 'tuned')]
        text.append(f'| {name} | ' + ' | '.join(map(spread, columns)) + ' |')
    first = next(iter(rows.values()))
    text.append(f'| none | {probed(first, "untrained")} | {spread(scratch)} |')
    text.append(f'| raw pixels | {probed(first[:1], "raw_pixels")} | |')
    return text


def scenes(args):
    rows = {name: [] for name in list(CONTROLS)[:3]}
    for seed in args.seeds:
        for i, (name, found) in enumerate(rows.items()):
            workdir = args.out / f'scenes{i}_{seed}'
            pretrain('scenes_splitmask', CONTROLS[name][1], workdir, seed, args.updates)
            found.append({**probe(workdir), 'nce': last(workdir, 'nce')})
    text = [
        f'{args.updates} updates of batch 32, {named(args.seeds)}; top-1 in % of 10 classes. '
        f'Probes: 4,096 training, 1,000 test images. InfoNCE of equal descriptors is ln 32 = 3.47.',
        '',
        '| pretraining | InfoNCE at the end | linear probe | kNN |',
        '|---|---|---|---|',
    ]
    for name, found in rows.items():
        nce = spread([f['nce'] for f in found], 2) if found[0]['nce'] else ''
        text.append(f'| {name} | {nce} | {probed(found, "trained")} |')
    text.append(f'| none | | {probed(found, "untrained")} |')
    text.append(f'| raw pixels | | {probed(found[:1], "raw_pixels")} |')
    return text


def target(args):
    data, pretrained, short, long, seconds = subset(args.out), [], [], [], []
    for seed in args.seeds:
        workdir = args.out / f'target_{seed}'
        before = pretrain('cifar10_splitmask', cifar(data, args), workdir, seed, args.updates)
        top1, after = finetune(workdir, args.out / f'target_{seed}_tuned', seed, EPOCHS, data)
        pretrained.append(top1)
        epochs = round(EPOCHS * (before + after) / after)
        folder = args.out / f'target_{seed}_scratch'
        top1, taken = finetune('none', folder, seed, epochs, data, args.small)
        long.append(top1)
        folder = args.out / f'target_{seed}_short'
        short.append(finetune('none', folder, seed, EPOCHS, data, args.small)[0])
        seconds.append((before + after, taken, epochs))
    pretrained_cpu, scratch_cpu, epochs = np.mean(seconds, axis=0)
    name = f'SplitMask {args.updates} updates, then {EPOCHS} epochs'
    return [
        f'{IMAGES} images of CIFAR-10, {named(args.seeds)}; top-1 in % on 10,000.',
        '',
        '| training | CPU seconds | top-1 |',
        '|---|---|---|',
        f'| {name} | {pretrained_cpu:.0f} | {spread(pretrained)} |',
        f'| from scratch, {epochs:.0f} epochs: the same CPU time | {scratch_cpu:.0f} '
        f'| {spread(long)} |',
        f'| from scratch, {EPOCHS} epochs: the same labels seen | | {spread(short)} |',
    ]


def rates(args):
    text = [
        f'{args.updates} updates of batch {BATCH}, {named(args.seeds)}. InfoNCE of equal '
        f'descriptors is ln {BATCH} = {np.log(BATCH):.2f}. Probes: {IMAGES} training and test '
        f'images, top-1 in %.',
        '',
        '| pretraining | rate | InfoNCE at the end | RankMe of patch means | linear probe | kNN |',
        '|---|---|---|---|---|---|',
    ]
    words = cifar(CIFAR / 'train.parquet', args)
    for name in ('SplitMask: split, inpaint, match', 'match only'):
        recipe, fields = CONTROLS[name]
        for lr in args.lrs:
            found = []
            for seed in args.seeds:
                workdir = args.out / f'rate{lr:g}_{name.split()[0][:5]}_{seed}'
                more = [*words, *fields, f'optim.lr={lr}']
                pretrain(recipe, more, workdir, seed, args.updates)
                found.append({**probe(workdir, *PROBE), 'nce': last(workdir, 'nce')})
            columns = [[f[k] for f in found] for k in ('rankme', 'trained linear', 'trained knn')]
            nce = spread([f['nce'] for f in found], 2)
            text.append(f'| {name} | {lr:g} | {nce} | ' + ' | '.join(map(spread, columns)) + ' |')
    return text


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    modes = {f.__name__: f for f in (controls, scenes, target, rates)}
    parser.add_argument('what', choices=modes)
    parser.add_argument('--out', type=pathlib.Path, default=pathlib.Path('runs/splitmask'))
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--updates', type=int, default=800, help='of pretraining')
    parser.add_argument('--depth', type=int, default=4, help='blocks of the encoder, on CIFAR-10')
    parser.add_argument(
        '--lrs', type=float, nargs='+', default=[1e-2, 3e-2],
        help="of `rates`; the others have their recipe's",
    )  # fmt: skip
    args = parser.parse_args()
    args.small = ['method.embed_dim=64', 'method.num_heads=4', f'method.depth={args.depth}']
    args.out.mkdir(parents=True, exist_ok=True)
    table = '\n'.join(modes[args.what](args))
    (args.out / f'{args.what}.md').write_text(table + '\n')
    print(table)
