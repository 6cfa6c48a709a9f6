# SPDX-License-Identifier: Apache-2.0
"""The command `ssl_jax`: pretrain | finetune | eval | show | features | export | import.

ssl_jax pretrain --data DIR --method mae --workdir W     # everything else inferred and printed
ssl_jax finetune --model W --data LABELLED --test LABELLED --workdir W2   # a classifier
ssl_jax eval --workdir W --data LABELLED                 # kNN and linear probe, with baselines
ssl_jax show --workdir W --data DIR                      # reconstructions and curves
ssl_jax features --model W --data DIR --out F.parquet    # class and pooled features of images
ssl_jax export --workdir W --to hf --out DIR             # weights for PyTorch
ssl_jax import FILE_OR_DIR --workdir W                   # and from PyTorch
"""

import argparse
import functools
import os
import sys

from ssl_jax import plan as plan_lib
from ssl_jax.run import hugepages


def main(argv=None):
    """Parses and runs one command; a user's error is one sentence and exit code 1."""
    if argv is None:
        hugepages.restart()
    parser = argparse.ArgumentParser(
        prog='ssl_jax', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest='command', required=True)

    p = commands.add_parser('pretrain', help='train an encoder on your images')
    p.add_argument('--data', help='folder of images, Parquet file or folder, ArrayRecord files')
    p.add_argument('--method', default='mae', help='mae, pixio, dinov2, splitmask or beit')
    p.add_argument('--config', help='a recipe instead of the inferred one, e.g. scenes_mae')
    p.add_argument('--workdir', required=True, help='where the run lives; start again to continue')
    p.add_argument('fields', nargs='*', metavar='FIELD=VALUE', help='e.g. batch_size=128')

    p = commands.add_parser('finetune', help='train encoder and classifier on labelled images')
    p.add_argument(
        '--model', required=True, help='a run, an export, HF or timm folder, a file; none: scratch'
    )
    p.add_argument('--data', help="labelled images; default: the recipe's own")
    p.add_argument('--test', help='labelled images to score; default: none with --data')
    p.add_argument('--recipe', help='mae, beit or splitmask: the settings of that paper')
    p.add_argument('--config', help='a recipe by name or path, e.g. finetune_cifar10')
    p.add_argument('--workdir', required=True, help='a new run; start again to continue')
    p.add_argument('fields', nargs='*', metavar='FIELD=VALUE', help='e.g. batch_size=128')

    p = commands.add_parser('eval', help='kNN and linear probe of a run, beside two baselines')
    p.add_argument('--workdir', required=True, help='the run, or a bare checkpoint folder')
    p.add_argument('--data', help="labelled images to learn from; default: the run's own eval set")
    p.add_argument('--test', help='labelled images to score; default: a fifth of --data')
    p.add_argument('--step', type=int, help='which checkpoint; default: the newest')
    p.add_argument('--limit', type=int, help='at most so many images of each set')
    p.add_argument('--out', help='the JSON file; default: WORKDIR/eval_<step>.json')
    p.add_argument(
        '--last-blocks',
        type=int,
        default=0,
        help='probe the class tokens of so many blocks too (DINOv2: 4)',
    )

    p = commands.add_parser('show', help='pictures of a run')
    p.add_argument('--workdir', required=True)
    p.add_argument('--data', help="images to reconstruct; default: the run's own training set")
    p.add_argument('--out', help='folder for the pictures; default: WORKDIR/pictures')
    p.add_argument('--num', type=int, default=8, help='number of images')

    p = commands.add_parser('features', help='features of every image in a Parquet file')
    p.add_argument('--model', required=True, help='a run, an export, an HF or timm folder, a file')
    p.add_argument('--data', required=True, help='folder of images, Parquet, ArrayRecord files')
    p.add_argument('--out', required=True, help='the file; start again to continue after a kill')
    p.add_argument('--size', type=int, help="pixels; default: the model's own")
    p.add_argument('--batch', type=int, default=64, help='images at a time')

    p = commands.add_parser('export', help='weights for PyTorch: safetensors and a model card')
    p.add_argument('--workdir', required=True, help='a run, or a bare checkpoint folder')
    p.add_argument('--to', required=True, help='names of: official, hf or timm')
    p.add_argument('--out', required=True, help='folder to write')
    p.add_argument('--step', type=int, help='which checkpoint; default: the newest')
    p.add_argument('--what', default='backbone', help='backbone, or full with decoder or heads')
    p.add_argument('--dtype', default='float32', help='float32 or bfloat16')

    p = commands.add_parser('import', help='weights of another program as a checkpoint of step 0')
    p.add_argument('path', help='safetensors, .pth, .npz, or an HF or timm folder')
    p.add_argument('--workdir', required=True, help='a new one')
    p.add_argument('hints', nargs='*', metavar='HINT=VALUE', help='e.g. num_heads=12')

    p = commands.add_parser('plan', help='will it fit, how fast: for a TPU topology, without a TPU')
    plan_lib.add_arguments(p)

    p = commands.add_parser('demo', help='train on rendered scenes for some minutes, then evaluate')
    p.add_argument('--workdir', default='runs/demo')

    args, more = parser.parse_known_args(argv)
    if args.command == 'import' and not any(word.startswith('-') for word in more):
        args.hints, more = args.hints + more, []  # argparse takes no FIELD=VALUE after an option
    if more:
        parser.error(f'unrecognized arguments: {" ".join(more)}')
    try:
        {
            'pretrain': pretrain,
            'finetune': finetune,
            'eval': evaluate,
            'show': show,
            'features': features,
            'export': export,
            'import': import_,
            'plan': plan,
            'demo': demo,
        }[args.command](args)
    except (ValueError, OSError, RuntimeError) as error:
        if os.environ.get('SSL_JAX_TRACEBACK'):
            raise
        print(f'ssl_jax {args.command}: {error}', file=sys.stderr)
        sys.exit(1)


def pretrain(args):
    """`ssl_jax pretrain`."""
    from ssl_jax import config as config_lib
    from ssl_jax import train
    from ssl_jax.run import launch

    if not args.config and not args.data:
        raise ValueError('give --data DIR (your images) or --config RECIPE (e.g. scenes_mae).')
    recipe = args.config or f'images_{args.method}'
    if recipe.startswith('images_') and recipe not in config_lib.recipes():
        known = [r.removeprefix('images_') for r in config_lib.recipes() if r.startswith('images_')]
        raise ValueError(f'--method {args.method} is unknown; use one of {", ".join(known)}.')
    fields = [f'data.train={args.data}'] if args.data else []
    launch.initialize_distributed()
    train.run(lambda: config_lib.load(recipe, fields + args.fields), args.workdir)


def finetune(args):
    """`ssl_jax finetune`."""
    from ssl_jax import config as config_lib
    from ssl_jax import config_finetune, train
    from ssl_jax.run import launch

    recipe, fields = config_finetune.command(
        args.model, args.data, args.test, args.recipe, args.config
    )
    launch.initialize_distributed()
    train.run(lambda: config_lib.load(recipe, fields + args.fields), args.workdir)


def evaluate(args):
    """`ssl_jax eval`."""
    from ssl_jax.evals import report

    report.evaluate_run(
        args.workdir,
        data=args.data,
        test=args.test,
        step=args.step,
        limit=args.limit,
        out=args.out,
        last_blocks=args.last_blocks,
    )


def show(args):
    """`ssl_jax show`."""
    from ssl_jax.viz import show as show_lib

    for path in show_lib.show(args.workdir, data=args.data, out=args.out, num=args.num):
        print(path)


def features(args):
    """`ssl_jax features`."""
    from ssl_jax import encoder as encoder_lib

    log = functools.partial(print, flush=True)  # a pipe sees every line at once
    encoder_lib.extract(
        args.model, args.data, args.out, size=args.size, batch_size=args.batch, log=log
    )


def export(args):
    """`ssl_jax export`."""
    if 'jax' not in sys.modules:  # all of it happens on the host; accelerators may be busy
        os.environ['JAX_PLATFORMS'] = 'cpu'
    from ssl_jax.interop import export as export_lib

    out = export_lib.export(
        args.workdir, args.to, args.out, step=args.step, what=args.what, dtype=args.dtype
    )
    print(f'written to {out}: {", ".join(sorted(p.name for p in out.iterdir()))}')


def import_(args):
    """`ssl_jax import`."""
    if 'jax' not in sys.modules:
        os.environ['JAX_PLATFORMS'] = 'cpu'
    from ssl_jax.interop import load

    hints = {}
    for hint in args.hints:
        name, equals, value = hint.partition('=')
        if not equals:
            raise ValueError(f"'{hint}' has no '='; write HINT=VALUE, e.g. num_heads=12.")
        hints[name] = int(value) if value.isdigit() else value
    load.import_weights(args.path, args.workdir, **hints)


def plan(args):
    """`ssl_jax plan`."""
    if 'jax' not in sys.modules:  # a machine with chips plans too, and leaves them alone
        os.environ['JAX_PLATFORMS'] = 'cpu'
    plan_lib.run(
        (args.config, args.fields),
        args.topology,
        args.slices,
        mesh=args.mesh,
        out=args.out,
        search=args.search,
    )


def demo(args):
    """`ssl_jax demo`: the recipe scenes_mae, then the evaluation, both on rendered scenes."""
    from ssl_jax import config as config_lib
    from ssl_jax import train
    from ssl_jax.evals import report

    train.run(lambda: config_lib.load('scenes_mae'), args.workdir)
    rows = report.evaluate_run(args.workdir)
    linear = {row['model']: row['top1'] for row in rows if row['eval'] == 'linear'}
    print(
        f'learned: a linear probe on the features names {linear["trained"]:.1f} % of the scenes, '
        f'on those of the same encoder untrained {linear["untrained"]:.1f} %, on raw pixels '
        f'{linear["raw_pixels"]:.1f} %'
    )
    print(f'pictures: {os.path.join(args.workdir, "pictures")}')


if __name__ == '__main__':
    main()
