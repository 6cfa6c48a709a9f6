# SPDX-License-Identifier: Apache-2.0
"""Ten minutes on one accelerator machine without network: what is slow, what fails, how fast.

In this order, each part within its time: `ssl_jax check`; a training step of MAE-L, Pixio-H and
DINOv2-L in bfloat16 as images/s and MFU, beside a PyTorch twin (twin.py) of the same shapes; then
CIFAR-10. Each side of a step has a process of its own. results.json and table.md are written anew
after each part, so that what ends the machine loses nothing.

Commands:
  python experiments/gpu/run.py --wheels          # before, with network: packages to carry along
  python experiments/gpu/run.py --out $OUT [--data DIR]   # there; DIR/cifar10/{train,test}.parquet
  python experiments/gpu/run.py --tiny --out /tmp/tiny    # all of it on a CPU, tiny
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
REPO = HERE.parents[1]
WHEELS = HERE / 'wheels'
# What a machine with jax, flax, optax, orbax and torch lacks.
MISSING = (
    'array_record', 'grain>=0.2.17', 'ml_collections>=1.0', 'orbax-checkpoint>=0.12.3,<0.13',
    'portpicker', 'simplejpeg', 'tensorboardX',
)  # fmt: skip
# name -> (recipe, images per step)
MODELS = {
    'MAE-L': ('mae_vitl16', 256),
    'Pixio-H': ('pixio_vith16', 128),
    'DINOv2-L': ('dinov2_vitl16_short', 64),
}
SMALL = dict(embed_dim=32, depth=2, num_heads=2, img_size=32, patch_size=4)
TINY = {
    'MAE-L': dict(SMALL, decoder_embed_dim=16, decoder_depth=1, decoder_num_heads=2),
    'Pixio-H': dict(SMALL, decoder_embed_dim=16, decoder_depth=2, decoder_num_heads=2),
    'DINOv2-L': dict(SMALL, local_size=16, dino_out_dim=64, ibot_out_dim=64, head_hidden_dim=32),
}
CHECK, CIFAR = 130, 60  # seconds: at most, and at least


def method_and_config(name, batch, tiny, remat='none'):
    """Our method and config: the recipe on one device, without stochastic depth and photometry."""
    from ssl_jax import config as config_lib
    from ssl_jax import methods
    from ssl_jax.run import clock

    fields = {'batch_size': batch, 'mesh.data': -1, 'mesh.fsdp': 1, 'remat': remat}
    method = dict(drop_path=0.0, flip=0.0)
    if name == 'DINOv2-L':
        method |= dict(jitter_prob=0.0, grey_prob=0.0, blur='none', solarize=(0.0, 0.0, 0.0))
        method |= dict(group_size=min(64, batch))
    if tiny:
        method |= dict(TINY[name], size=None)
    fields |= {f'method.{key}': value for key, value in method.items()}
    config = config_lib.load(MODELS[name][0], [f'{key}={value}' for key, value in fields.items()])
    config_lib.validate(config)
    return methods.make(config, clock.Clock.of(config, 1_281_167)), config


def jax_side(name, batch, tiny):
    """Seconds of a step of the program that a run has; less memory if it does not fit."""
    import jax

    from ssl_jax import step as step_lib
    from ssl_jax.check import data

    for remat in ('none', 'dots', 'full'):
        method, config = method_and_config(name, batch, tiny, remat)
        program = step_lib.make_program(config, method)
        try:
            seconds = data.step_seconds(program, 2 if tiny else 10)
        except jax.errors.JaxRuntimeError as error:
            if 'RESOURCE_EXHAUSTED' not in str(error) or remat == 'full':
                raise
            continue
        count = sum(x.size for x in jax.tree.leaves(program.abstract.params))
        device = jax.devices()[0].device_kind
        break
    return method, seconds, count, device, f'jax {jax.__version__}, remat={remat}'


def torch_side(name, batch, tiny):
    os.environ['JAX_PLATFORMS'] = 'cpu'  # jax only counts FLOPs here
    import torch
    import twin

    on_gpu = torch.cuda.is_available()
    method, _ = method_and_config(name, batch, tiny)
    step, count = twin.make(method, batch, 'cuda' if on_gpu else 'cpu')
    steps = 2 if tiny else 10
    for timed in (False, True):
        begin = time.perf_counter()
        for _ in range(steps if timed else 3):
            loss = step()
        value = loss.item()  # waits
        seconds = (time.perf_counter() - begin) / steps
    assert value == value, 'the loss is not a number'
    device = torch.cuda.get_device_name() if on_gpu else 'cpu'
    return method, seconds, count, device, f'torch {torch.__version__}, compile, sdpa'


def side(which, name, batch, tiny):
    """Prints the row of one side as JSON."""
    from ssl_jax.run import launch

    run = {'jax': jax_side, 'torch': torch_side}[which]
    method, seconds, count, device, how = run(name, batch, tiny)
    row = dict(images_per_second=batch / seconds, step_seconds=seconds, parameters=count)
    peak = launch.peak_flops(device)
    row |= dict(mfu=method.flops(batch) / seconds / peak if peak else None, device=device, how=how)
    print('RESULT', json.dumps(row), flush=True)


class Report:
    """Rows on disk after each part, and the time that is left."""

    def __init__(self, out, minutes):
        self.out, self.end, self.rows = out, time.monotonic() + 60 * minutes, []
        out.mkdir(parents=True, exist_ok=True)

    def left(self):
        return self.end - time.monotonic() - 15  # to end a program, and itself

    def add(self, **row):
        self.rows.append(row)
        (self.out / 'results.json').write_text(json.dumps(self.rows, indent=1) + '\n')
        (self.out / 'table.md').write_text(table(self.rows))
        print(json.dumps(row), flush=True)

    def run(self, command, most, log):
        """Output of a command and how it ended, after `most` seconds at most (SIGTERM)."""
        most = int(min(most, self.left()))
        if most < 5:
            return '', 'no time was left'
        command = ['timeout', '--kill-after=10', str(most), sys.executable, *command]
        env = {**os.environ, 'PYTHONPATH': str(REPO), 'PYTHONUNBUFFERED': '1'}
        with open(log, 'w') as file:
            code = subprocess.run(
                command, stdout=file, stderr=subprocess.STDOUT, env=env
            ).returncode
        text = log.read_text(errors='replace')
        last = ([x.strip() for x in text.splitlines() if x.strip()] or ['no output'])[-1][:300]
        return text, f'stopped after {most} s: {last}' if code in (124, 137) else last


def table(rows):
    """Markdown of the rows."""
    names = ('part', 'side', 'images per step', 'images/s', 'MFU', 'of the twin', 'how')
    lines = ['| ' + ' | '.join(names) + ' |', '|---' * len(names) + '|']
    twins = {r['part']: r.get('images_per_second') for r in rows if r.get('side') == 'torch'}
    for r in rows:
        rate, twin, mfu = r.get('images_per_second'), twins.get(r['part']), r.get('mfu')
        cells = [r['part'], r.get('side', ''), r.get('batch', '')]
        cells += [f'{rate:,.0f}' if rate else '', f'{mfu:.1%}' if mfu else '']
        cells += [f'{rate / twin:.2f}' if rate and twin and r['side'] == 'jax' else '', r['how']]
        lines.append('| ' + ' | '.join(map(str, cells)) + ' |')
    return '\n'.join(lines) + '\n'


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', default=os.environ.get('OUT', 'runs/gpu'))
    parser.add_argument('--data', default=str(HERE / 'data'), help='holds cifar10/')
    parser.add_argument('--minutes', type=float, default=9.5)
    parser.add_argument('--tiny', action='store_true', help='sizes for a CPU')
    parser.add_argument('--wheels', action='store_true', help='download what is missing there')
    parser.add_argument('--side', nargs=3, help=argparse.SUPPRESS)  # jax|torch, model, batch
    args = parser.parse_args()
    if args.side:
        return side(*args.side[:2], int(args.side[2]), args.tiny)
    if args.wheels:
        return download()
    install()
    report, scratch = Report(pathlib.Path(args.out), args.minutes), tempfile.mkdtemp()
    os.environ['SSL_JAX_DATA'] = args.data
    cifar = pathlib.Path(args.data, 'cifar10', 'train.parquet')
    words = ['--data', cifar, '--method', 'mae'] if cifar.exists() else []
    command = ['-m', 'ssl_jax.cli', 'check', '--workdir', f'{scratch}/check', *words]
    report.add(part='check', how=report.run(command, CHECK, report.out / 'check.txt')[1])
    sides = [(name, which) for name in MODELS for which in ('jax', 'torch')]
    for i, (name, which) in enumerate(sides):
        batch = 8 if args.tiny else MODELS[name][1]
        one = [__file__, '--side', which, name, str(batch), *['--tiny'] * args.tiny]
        # A slow part may take from those after it, but not all.
        most = 1.6 * (report.left() - CIFAR) / (len(sides) - i)
        text, how = report.run(one, most, report.out / f'{which}.txt')
        found = [x for x in text.splitlines() if x.startswith('RESULT ')]
        row = json.loads(found[-1].removeprefix('RESULT ')) if found else dict(how=how)
        report.add(part=name, side=which, batch=batch, **row)
    fields = ['total_epochs=0.2', 'warmup_epochs=0.02'] if args.tiny else []
    command = ['-m', 'ssl_jax.cli', 'pretrain', '--config', 'cifar10_mae', *fields]
    command += ['--workdir', f'{scratch}/cifar10']  # a signal ends it, after saving
    how = report.run(command, report.left(), report.out / 'cifar10.txt')[1]
    rows = pathlib.Path(scratch, 'cifar10', 'metrics.jsonl')
    steps = [json.loads(x) for x in rows.read_text().splitlines()] if rows.exists() else []
    rates = sorted(r['time']['images_per_second'] for r in steps if 'time' in r)
    last = {k: v for r in steps for k, v in r.items() if k in ('step', 'loss') or 'top1' in k}
    rate = rates[len(rates) // 2] if rates else None
    report.add(part='CIFAR-10', side='jax', images_per_second=rate, how=f'{last}; {how}')
    shutil.rmtree(scratch, ignore_errors=True)


def download():
    """Wheels for Python 3.12 on x86-64 Linux, without what they need."""
    shutil.rmtree(WHEELS, ignore_errors=True)
    platforms = [f'manylinux_2_{n}_x86_64' for n in (28, 27, 17)]
    platforms += ['manylinux2014_x86_64', 'manylinux1_x86_64']
    words = [w for p in platforms for w in ('--platform', p)]
    subprocess.run(
        [sys.executable, '-m', 'pip', 'download', '--no-deps', '--only-binary=:all:']
        + ['--python-version', '3.12', '--implementation', 'cp', *words, '-d', WHEELS, *MISSING],
        check=True,
    )


def install():
    """Installs the carried wheels if one is needed, and this checkout, without network."""
    from packaging import requirements

    pip = [sys.executable, '-m', 'pip', 'install', '-q', '--no-index', '--no-deps']
    needs = map(requirements.Requirement, MISSING)
    wheels = sorted(WHEELS.glob('*.whl'))
    if wheels and not all(r.specifier.contains(version(r.name) or '0') for r in needs):
        subprocess.run([*pip, *wheels], check=True)
    if version('ssl_jax') is None:  # runs ask for its version
        subprocess.run([*pip, '--no-build-isolation', '-e', REPO], check=True)


def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == '__main__':
    main()
