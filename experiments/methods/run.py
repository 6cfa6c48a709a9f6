# SPDX-License-Identifier: Apache-2.0
"""Every method on CIFAR-10 for the same time.

    SSL_JAX_DATA=/data python experiments/methods/run.py OUT

Each method's step is timed in a run of 60 steps, alone on the machine; the length of its training
follows from that, so that a machine that is busy later makes no difference. Starts again where it
was stopped.
"""

import argparse
import json
import pathlib
import subprocess

METHODS = 'mae', 'pixio', 'dinov2', 'ijepa', 'lejepa', 'splitmask'
FEATURES = 'cls', 'patch', 'grid4'


def rows(run, key):
    """Rows of the metrics of a run that have `key` among their times."""
    lines = (run / 'metrics.jsonl').read_text().splitlines()
    return [row for row in map(json.loads, lines) if key in row.get('time', {})]


def command(*words):
    print('$', *words, flush=True)
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)


def train(method, run, steps):
    command(
        *('ssl_jax', 'pretrain', '--config', f'cifar10_{method}', '--workdir', str(run)),
        *('total_epochs=None', 'warmup_epochs=None', f'total_steps={steps}'),
        *(f'warmup_steps={steps // 20}', 'eval.every_epochs=None', 'log.every_steps=20'),
    )


def seconds_per_step(method, out):
    run = out / f'{method}_timed'
    if not (run / 'checkpoints/60').exists():
        train(method, run, 60)
    return rows(run, 'seconds_per_step')[-1]['time']['seconds_per_step']


def scores(run, limit):
    """{(model, feature): (kNN with k = 20 or None, linear or None)} in percent."""
    if not list(run.glob('eval_*.json')):
        command('ssl_jax', 'eval', '--workdir', str(run), '--tasks', 'knn,linear', *limit)
    (path,) = run.glob('eval_*.json')
    found = {}
    for row in json.loads(path.read_text()):
        if row['eval'] == 'linear':
            found[row['model'], 'linear'] = row['top1']
        elif row.get('k') == 20:
            found[row['model'], row['feature']] = row['top1']
    return found


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('out', type=pathlib.Path)
    parser.add_argument('--seconds', type=float, default=300, help='of training steps per method')
    parser.add_argument('--limit', default='10000', help='most images of each set to evaluate on')
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    times = {method: seconds_per_step(method, args.out) for method in METHODS}
    print('| encoder | images | kNN class token | kNN patches | kNN grid4 | linear |')
    print('|---|---|---|---|---|---|')
    for method in METHODS:
        run, steps = args.out / method, int(args.seconds / times[method])
        if not (run / f'checkpoints/{steps}').exists():
            train(method, run, steps)
        config = json.loads((run / 'config.json').read_text())
        config = config.get('config', config)
        found = scores(run, ('--limit', args.limit))
        for model in ('trained', 'untrained'):
            cells = [found.get((model, name)) for name in (*FEATURES, 'linear')]
            cells = ['' if x is None else f'{x:.1f}' for x in cells]
            images = f'{steps * config["batch_size"]:,}' if model == 'trained' else ''
            print('|', ' | '.join([f'{method}, {model}', images, *cells]), '|', flush=True)
        pixels = found['raw_pixels', 'pixels'], found['raw_pixels', 'linear']
        print(f'| raw pixels beside {method} | | | | {pixels[0]:.1f} | {pixels[1]:.1f} |')


if __name__ == '__main__':
    main()
