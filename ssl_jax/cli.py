# SPDX-License-Identifier: Apache-2.0
"""The command `ssl_jax`.

    ssl_jax pretrain --data DIR --method mae --workdir W     # everything else inferred and printed
    ssl_jax finetune --model W --data LABELLED --test LABELLED --workdir W2   # a classifier
    ssl_jax eval --workdir W --data LABELLED                 # kNN and linear probe, with baselines
    ssl_jax show --workdir W --data DIR                      # reconstructions and curves
    ssl_jax report --workdir W                               # all of a run as one HTML page
    ssl_jax rank --workdir W                                 # which checkpoint, without labels
    ssl_jax explore --model W --data DIR                     # the same and more on a local web page
    ssl_jax features --model W --data DIR --out F.parquet    # class and pooled features of images
    ssl_jax data pack DIR --to tar --out SHARDS              # and check, info, bench: the images
    ssl_jax data score --model W --data DIR --out S.parquet  # how hard each image is, for sampling
    ssl_jax data curate --pool DIR --model W --out DIR       # fewer and better images to train on
    ssl_jax export --workdir W --to hf --out DIR             # weights for PyTorch, ONNX, JAX
    ssl_jax import FILE_OR_DIR --workdir W                   # and from PyTorch
    ssl_jax plan --config RECIPE --topology v5e:4x4          # will it fit, how fast
    ssl_jax check --workdir W --data DIR                     # this machine or pod, in two minutes
    ssl_jax demo                                             # a few minutes on rendered scenes
    ssl_jax methods                                          # what there is to train with,
    ssl_jax recipes                                          # and the runs of the papers

Each command imports its modules when it runs, so that `ssl_jax --help` is quick.
"""

import argparse
import importlib.metadata
import json
import os
import sys

from ssl_jax.run import errors, hints

# --recipe of `ssl_jax finetune` -> recipe
FINETUNE = {
    'mae': 'finetune_mae_vitb16',
    'beit': 'finetune_beit_vitb16',
    'splitmask': 'finetune_splitmask_vitb16',
    None: 'finetune_images',
}


def main(argv: list[str] | None = None) -> None:
    """Parses and runs one command; a user's error is one sentence and exit code 1."""
    parser = _parser()
    args, more = parser.parse_known_args(argv)
    for name in ('hints', 'words'):
        if hasattr(args, name) and not any(word.startswith('-') for word in more):
            # argparse takes no NAME=VALUE after an option.
            setattr(args, name, getattr(args, name) + more)
            more = []
    unknown = [word for word in more if word.startswith('-')]
    words = (*more, *getattr(args, 'fields', ()), *getattr(args, 'hints', ()))
    paths = [word for word in words if '=' not in word]
    if unknown or (more and not getattr(args, 'data', None)):
        parser.error(f'unrecognized arguments: {" ".join(more)}')
    name = ' '.join(filter(None, ('ssl_jax', args.command, getattr(args, 'job', None))))
    with errors.in_a_sentence(name):
        if args.run in (export, import_, plan, data_pack, data_check, data_info, data_bench):
            _on_cpu()
        _ask_buckets(args)
        if paths and getattr(args, 'data', None):
            raise errors.UserError(
                f"'{paths[0]}' has no '=': write NAME=VALUE, such as batch_size=64; if it is a "
                f'second folder, give --data or --test the one that holds both.'
            )
        args.run(args)


def _parser():
    parser = argparse.ArgumentParser(
        prog='ssl_jax', description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    version = importlib.metadata.version('ssl_jax')
    parser.add_argument('--version', action='version', version=f'ssl_jax {version}')
    commands = parser.add_subparsers(dest='command', required=True)

    def command(run, help):
        p = commands.add_parser(run.__name__.rstrip('_'), help=help)
        p.set_defaults(run=run)
        return p

    def data(p, help, required=False):
        p.add_argument('--data', required=required, action=_Once, help=help)
        p.add_argument('--split', help='of --data, such as val; all: every image')

    def compiled(p):
        text = 'folder of compiled programs, to load or to keep them: later starts take seconds'
        p.add_argument('--compiled', metavar='DIR', help=text)

    def fields(p):
        p.add_argument('fields', nargs='*', metavar='FIELD=VALUE', help='e.g. batch_size=128')

    def about(p):
        text = 'of a file that does not say all, e.g. num_heads=12 or part=state_dict_ema'
        p.add_argument('hints', nargs='*', metavar='NAME=VALUE', help=text)

    p = command(pretrain, help='train an encoder on your images')
    data(p, 'folder of images, tar, Parquet or ArrayRecord files')
    names = 'mae (the default), pixio, dinov2, dinov3, ijepa, lejepa, splitmask, beit or qb_heat'
    p.add_argument('--method', help=names)
    p.add_argument('--config', help='a recipe instead of the inferred one, e.g. scenes_mae')
    p.add_argument('--workdir', required=True, help='folder of the run; start again to continue')
    compiled(p)
    fields(p)

    p = command(finetune, help='train encoder and classifier on labelled images')
    p.add_argument(
        '--model', required=True, help='a run, an export, HF or timm folder, a file; none: scratch'
    )
    data(p, 'labelled images; default: those of the recipe')
    p.add_argument(
        '--test', action=_Once, help='labelled images to score; default: none with --data'
    )
    p.add_argument('--recipe', help='mae, beit or splitmask: the settings of that paper')
    p.add_argument('--config', help='a recipe by name or path, e.g. finetune_cifar10')
    p.add_argument('--workdir', required=True, help='a new run; start again to continue')
    compiled(p)
    fields(p)

    p = command(eval_, help='what the frozen features of a run can do, beside two baselines')
    p.add_argument('--workdir', required=True, help='the run, or a bare checkpoint folder')
    data(p, "labelled images to learn from; default: the run's eval set")
    p.add_argument('--tasks', help='e.g. knn,linear,seg,depth,retrieval,pck,video')
    p.add_argument(
        '--test', action=_Once, help='labelled images to score; default: a fifth of --data'
    )
    p.add_argument('--step', type=int, help='which checkpoint; default: the newest')
    p.add_argument('--limit', type=_positive, help='most images of each set')
    p.add_argument('--size', type=_positive, help='pixels; default: those of the run')
    p.add_argument('--out', help='the JSON file; default: WORKDIR/eval_<step>.json')
    p.add_argument(
        '--last-blocks', type=int, default=0,
        help='probe class tokens of the last N blocks too (DINOv2: 4)',
    )  # fmt: skip
    p.add_argument(
        'fields', nargs='*', metavar='NAME.FIELD=VALUE', help='e.g. depth.steps=500 data.ignore=11'
    )

    p = command(show, help='reconstructions, features and curves of a run')
    p.add_argument('--workdir', required=True)
    data(p, "images to reconstruct; default: the run's training set")
    p.add_argument('--out', help='folder for the pictures; default: WORKDIR/pictures')
    p.add_argument('--num', type=_positive, default=8, help='number of images')
    p.add_argument(
        '--explain', type=_positive, nargs='?', const=3000, metavar='MASKS',
        help='also which pixels the features depend on; masks per image, default: 3000',
    )  # fmt: skip

    p = command(report, help='all that is known of a run as one HTML page; several: a comparison')
    p.add_argument('--workdir', required=True, action='append', help='of a run; may be repeated')
    p.add_argument('--out', help='the HTML file; default: report.html in the (first) workdir')

    p = command(rank, help='numbers of every checkpoint of a run, without labels')
    p.add_argument('--workdir', required=True)
    data(p, "images; default: the run's training set")
    p.add_argument('--limit', type=_positive, help='most images; default: 1024')

    p = command(explore, help='a local web page to try an encoder on your images')
    p.add_argument('--model', required=True, help='a run, an export, an HF or timm folder, a file')
    data(p, 'folder of images, tar, Parquet or ArrayRecord files', required=True)
    p.add_argument('--port', type=_positive, default=7860, help='default: 7860')
    p.add_argument(
        '--host', default='127.0.0.1', help='0.0.0.0: everyone who reaches this machine may look'
    )
    p.add_argument(
        '--limit', type=_positive, default=2000, help='most images to search; default: 2000'
    )

    p = command(features, help='features of every image in a Parquet file')
    p.add_argument('--model', required=True, help='a run, an export, an HF or timm folder, a file')
    data(p, 'folder of images, tar, Parquet or ArrayRecord files', required=True)
    p.add_argument('--out', required=True, help='a Parquet file; start again to continue')
    p.add_argument('--size', type=_positive, help='pixels; default: those of the model')
    p.add_argument('--batch', type=_positive, default=64, help='images at a time')
    about(p)

    p = commands.add_parser('data', help='pack, check, describe and measure a set of images')
    jobs = p.add_subparsers(dest='job', required=True, metavar='COMMAND')

    def job(run, help):
        p = jobs.add_parser(run.__name__.removeprefix('data_'), help=help)
        p.set_defaults(run=run)
        text = 'folder of images, Parquet, ArrayRecord or tar files; source=tfds name=NAME'
        p.add_argument('path', metavar='SRC', help=text)
        p.add_argument('--split', help='of SRC, such as val; all: every image')
        return p

    def words(p, text='more of the source, e.g. layout=voc ignore=11'):
        p.add_argument('words', nargs='*', metavar='NAME=VALUE', help=text)

    p = job(data_pack, help='any set of images as shards')
    p.add_argument('--to', required=True, help='arrayrecord, tar or parquet')
    p.add_argument('--out', required=True, help='folder to write; start again to continue')
    p.add_argument('--shards', type=_positive, help='files; default: one for every 10,000 images')
    p.add_argument(
        '--max-side', type=_positive, help='images with a longer side become JPEGs of this size'
    )
    p.add_argument('--quality', type=_positive, default=90, help='of these JPEGs; default: 90')
    words(p)

    p = job(data_check, help='opens every file: what is broken, odd or there twice')
    p.add_argument('--out', default='data_check', help='folder of the list and the picture')
    words(p)

    p = job(data_info, help='what it is: number, classes, sizes, encodings, splits')
    words(p)

    p = job(data_bench, help='images per second by stage, and what to change')
    p.add_argument('--method', help='whose crops to cut; default: mae')
    words(p, 'fields as of pretrain, e.g. method.img_size=112')

    p = jobs.add_parser('score', help='how hard each image is, to show hard ones more often')
    p.set_defaults(run=data_score)
    p.add_argument('--model', required=True, help='a run of MAE or Pixio, or weights with decoder')
    data(p, 'the images, as they are trained on', required=True)
    p.add_argument('--out', required=True, help='a Parquet file; start again to continue')
    p.add_argument('--masks', type=_positive, default=4, help='of each image; default: 4')
    p.add_argument('--limit', type=_positive, help='most images; default: all')
    p.add_argument('--batch', type=_positive, default=64, help='images at a time')

    p = jobs.add_parser('curate', help='a manifest of images: no copies, like yours, balanced')
    p.set_defaults(run=data_curate)
    p.add_argument('--pool', required=True, help='images to select from')
    p.add_argument(
        '--query', nargs='+', action='extend', default=[], help='sets of images to find more of'
    )
    p.add_argument(
        '--against', nargs='+', action='extend', default=[],
        help='sets of images of evaluations that must not be among them',
    )  # fmt: skip
    p.add_argument('--model', help='an encoder: a run, an export, an HF or timm folder, a file')
    p.add_argument(
        '--embeddings', nargs='+', action='extend', default=[], metavar='FILE',
        help='instead: a Parquet file for each set, pool, queries, evaluations',
    )  # fmt: skip
    p.add_argument('--out', required=True, help='a folder, or manifest.parquet; again: continues')
    text = 'e.g. dedup.threshold=0.7 balance.target=100000'
    p.add_argument('hints', nargs='*', metavar='STAGE.FIELD=VALUE', help=text)

    p = command(export, help='weights for PyTorch, ONNX Runtime or plain JAX')
    p.add_argument('--workdir', required=True, help='a run, or a bare checkpoint folder')
    p.add_argument('--to', required=True, help='official, hf, timm (all for PyTorch), onnx or jax')
    p.add_argument('--out', required=True, help='folder to write')
    p.add_argument('--step', type=int, help='which checkpoint; default: the newest')
    p.add_argument('--what', default='backbone', help='backbone, or full with decoder or heads')
    p.add_argument('--dtype', default='float32', help='float32 or bfloat16')

    p = command(import_, help='weights of other frameworks as a checkpoint of step 0')
    p.add_argument('path', help='safetensors, .pth, .npz, or an HF or timm folder')
    p.add_argument('--workdir', required=True, help='a new one')
    about(p)

    p = command(plan, help='will it fit, how fast: for a TPU topology, without a TPU')
    p.add_argument('--config', required=True, help='recipe: path.py, path.py:arg or its name')
    p.add_argument('--topology', required=True, help='chips to rent, e.g. v5e:16x16; local: here')
    p.add_argument(
        '--slices', type=_positive, default=1, help='number of slices, joined by a network'
    )
    p.add_argument('--mesh', help="data=4,fsdp=64,tensor=1; default: the recipe's")
    p.add_argument('--out', help='folder for plan.txt, plan.json and plan.png')
    p.add_argument(
        '--search', action='store_true', help='try meshes, remat policies and batch sizes too'
    )
    p.add_argument('--save', metavar='DIR', help='keep the compiled step for pretrain --compiled')
    p.add_argument(
        '--images', type=_positive, help='training images, for --save and durations in epochs'
    )
    p.add_argument(
        '--xla-alone', action='store_true', help='plan the step without our TPU kernels too'
    )
    fields(p)

    p = command(check, help='what machine, workdir and data can do; on all hosts of a pod')
    p.add_argument('--workdir', help='can it be written, how fast; is there space')
    data(p, 'images per second that can be loaded')
    p.add_argument('--method', help='of the crops and the step, as of pretrain')
    p.add_argument('--config', help='a recipe instead; its step is measured')
    fields(p)

    p = command(demo, help='train on rendered scenes for a few minutes, then evaluate')
    p.add_argument('--workdir', default='runs/demo')

    command(methods, help='the methods, a line each')
    command(recipes, help='the recipes, a line each')

    return parser


def _ask_buckets(args):
    """Refuses paths in buckets that are misspelled or cannot be read, before anything else."""
    names = ('out', 'model', 'path', 'data', 'test', 'pool')
    paths = [path for path in (getattr(args, name, None) for name in names) if path and ':' in path]
    workdirs = getattr(args, 'workdir', None) or ()
    workdirs = [workdirs] if isinstance(workdirs, str) else workdirs
    workdirs = [workdir for workdir in workdirs if ':' in workdir]
    if paths or workdirs:
        from ssl_jax.run import storage

        for workdir in workdirs:
            storage.require_workdir(workdir)
        storage.require(*paths)


class _Once(argparse.Action):
    """An option that is no list: the second of two would replace the first."""

    def __call__(self, parser, namespace, values, option_string=None):
        if getattr(namespace, self.dest) is not None:
            parser.error(f'{option_string} takes one folder or file: give the folder of them all.')
        setattr(namespace, self.dest, values)


def _data(args):
    """The spec of --data and --split for `sources.open_source`; None without --data."""
    if args.split and not args.data:
        raise errors.UserError(f'--split {args.split} is of --data: give --data too.')
    return {'path': args.data, 'split': args.split} if args.split else args.data


def _data_fields(args):
    """Overrides of --data and --split."""
    fields = [f'data.train={args.data}'] if _data(args) else []
    return fields + ([f'data.train.split={args.split}'] if args.split else [])


def _recipe(args):
    """The recipe of --config or --method."""
    from ssl_jax import config

    if args.config and args.method:
        raise errors.UserError(
            f'--config {args.config} and --method {args.method} both name a recipe: give one.'
        )
    recipe = args.config or f'images_{args.method or "mae"}'
    if recipe.startswith('images_') and recipe not in config.recipes():
        known = [r.removeprefix('images_') for r in config.recipes() if r.startswith('images_')]
        raise errors.UserError(f'--method {args.method} is unknown; use one of {", ".join(known)}.')
    return recipe


def _positive(text):
    """An argument that counts, 1 or more."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of 1 or more")
    return int(text)


def pretrain(args):
    """`ssl_jax pretrain`."""
    from ssl_jax import train
    from ssl_jax.run import launch

    fields = _data_fields(args)
    if not args.config and not args.data:
        raise errors.UserError(
            'give --data DIR (your images) or --config RECIPE (e.g. scenes_mae).'
        )
    recipe = _recipe(args)
    launch.initialize_distributed()
    train.command(recipe, hints.behind(fields + args.fields), args.workdir, args.compiled)


def finetune(args):
    """`ssl_jax finetune`."""
    from ssl_jax import train
    from ssl_jax.run import launch

    own = _data_fields(args)
    if args.recipe and args.config:
        raise errors.UserError(
            f'--recipe {args.recipe} and --config {args.config} are both recipes: give one.'
        )
    if args.recipe not in FINETUNE:
        known = ', '.join(name for name in FINETUNE if name)
        raise errors.UserError(f"--recipe '{args.recipe}' is unknown: use one of {known}.")
    if not args.data and not args.config and not args.recipe:
        raise errors.UserError('give --data LABELLED (your images) or --config RECIPE.')
    # From scratch the lower layers have as much to learn as the upper ones.
    scratch = args.model == 'none'
    fields = ['optim.layer_decay=None'] if scratch else [f'init_from={args.model}']
    if own:
        fields += [*own, 'method.num_classes=None']
    if args.data or args.test:
        fields.append(f'data.eval_test={args.test}')
    launch.initialize_distributed()
    fields = hints.behind(fields + args.fields)
    train.command(args.config or FINETUNE[args.recipe], fields, args.workdir, args.compiled)


def eval_(args):
    """`ssl_jax eval`."""
    from ssl_jax import report as report_lib
    from ssl_jax.evals import command
    from ssl_jax.viz import show as show_lib

    rows = command.evaluate_run(
        args.workdir,
        data=_data(args),
        test=args.test,
        step=args.step,
        limit=args.limit,
        out=args.out,
        last_blocks=args.last_blocks,
        size=args.size,
        tasks=args.tasks and tuple(filter(None, args.tasks.split(','))),
        words=args.fields,
    )
    if any('scores' in row for row in rows):
        for path in show_lib.predictions(args.workdir, rows[0]['step']):
            print(path)
    report_lib.refresh(args.workdir)


def show(args):
    """`ssl_jax show`."""
    from ssl_jax.viz import show as show_lib

    paths = show_lib.show(
        args.workdir, data=_data(args), out=args.out, num=args.num, explain=args.explain
    )
    for path in paths:
        print(path)


def report(args):
    """`ssl_jax report`."""
    from ssl_jax import report as report_lib

    print(report_lib.write(args.workdir, args.out))


def rank(args):
    """`ssl_jax rank`."""
    from ssl_jax.evals import rank as rank_lib

    rank_lib.rank(args.workdir, data=_data(args), limit=args.limit)


def explore(args):
    """`ssl_jax explore`."""
    from ssl_jax.app import page

    page.explore(args.model, _data(args), args.host, args.port, args.limit)


def features(args):
    """`ssl_jax features`."""
    from ssl_jax import encoder
    from ssl_jax.evals import feature_file
    from ssl_jax.run import launch

    words = hints.of_words(args.hints)
    model = encoder.load_model(args.model, **words) if words else args.model
    feature_file.extract(
        model, _data(args), args.out, size=args.size, batch_size=args.batch, log=launch.log
    )


def data_pack(args):
    """`ssl_jax data pack`; exit code 1 if images are left out."""
    from ssl_jax.prepare import pack

    left_out = pack.pack(
        _spec(args),
        args.out,
        args.to,
        shards=args.shards,
        split=args.split,
        max_side=args.max_side,
        quality=args.quality,
    )
    sys.exit(bool(left_out))


def data_check(args):
    """`ssl_jax data check`; exit code 1 if something is broken."""
    from ssl_jax.prepare import inspect

    sys.exit(not inspect.inspect(_spec(args), args.out))


def data_info(args):
    """`ssl_jax data info`."""
    from ssl_jax.prepare import info

    info.info(_spec(args))


def data_bench(args):
    """`ssl_jax data bench`."""
    from ssl_jax.prepare import bench

    args.config, args.data = None, args.path
    bench.bench(_recipe(args), hints.behind(_data_fields(args) + args.words))


def _spec(args):
    """The spec of SRC, --split and NAME=VALUE."""
    from ssl_jax.data import sources

    words = [args.path, *args.words]
    is_path = '=' not in args.path or os.path.exists(args.path)
    spec = {'path': words.pop(0)} if is_path else {}
    for word in words:
        if '=' not in word:
            raise errors.UserError(f"'{word}' has no '=': write NAME=VALUE, such as ignore=11.")
    spec |= {'split': args.split} if args.split else {}
    return sources.with_words(spec, dict(word.split('=', 1) for word in words))


def data_score(args):
    """`ssl_jax data score`."""
    from ssl_jax.prepare import score as score_lib

    score_lib.score(
        args.model, _data(args), args.out,
        masks=args.masks, limit=args.limit, batch_size=args.batch,
    )  # fmt: skip


def data_curate(args):
    """`ssl_jax data curate`."""
    from ssl_jax.curate import command
    from ssl_jax.run import launch

    launch.initialize_distributed()
    several = {'queries': args.query, 'against': args.against, 'embeddings': args.embeddings}
    words = list(args.hints)
    for name, values in several.items():  # which argparse fills with the words behind them too
        words += (own := [x for x in values if '=' in x and not os.path.exists(x)])
        several[name] = [x for x in values if x not in own]
    command.curate(args.pool, args.out, model=args.model, words=words, **several)


def export(args):
    """`ssl_jax export`."""
    from ssl_jax.evals import heads, report
    from ssl_jax.interop import export as export_lib
    from ssl_jax.run import storage, weights

    opened = weights.open_run(args.workdir, args.step)
    rows, table = f'{args.workdir}/eval_{opened.step}.json', []
    if storage.exists(rows):
        table = report.table(json.loads(storage.read(rows))).splitlines()
    # Of the evaluations seg_head and depth of this checkpoint.
    trained = heads.find(f'{args.workdir}/evals/{opened.step}/trained')
    out = export_lib.export(
        opened, args.to, args.out,
        what=args.what, dtype=args.dtype, evaluation=table, trained_heads=trained,
    )  # fmt: skip
    print(f'written to {out}: {", ".join(storage.names(out))}')


def import_(args):
    """`ssl_jax import`."""
    from ssl_jax.run import weights

    weights.import_weights(args.path, args.workdir, **hints.of_words(args.hints))


def plan(args):
    """`ssl_jax plan`."""
    if args.topology != 'local':
        _on_cpu()
    from ssl_jax import plan as plan_lib

    plan_lib.run(
        args.config,
        args.topology,
        args.fields,
        slices=args.slices,
        mesh=args.mesh,
        out=args.out,
        search=args.search,
        save=args.save,
        images=args.images,
        xla_alone=args.xla_alone,
    )


def check(args):
    """`ssl_jax check`; exit code 1 if something is bad."""
    from ssl_jax import check as check_lib
    from ssl_jax.run import launch

    recipe = _recipe(args) if args.config or args.data else None
    if not recipe and (args.method or args.fields):
        raise errors.UserError('--method and fields are of --data or --config: give one of them.')
    fields = hints.behind(_data_fields(args) + args.fields)
    launch.initialize_distributed()
    is_wanted = bool(args.config or args.method)
    sys.exit(not check_lib.run(args.workdir, recipe, fields, step=is_wanted))


def demo(args):
    """`ssl_jax demo`: the recipe scenes_mae, then the evaluation, both on rendered scenes."""
    from ssl_jax import report as report_lib
    from ssl_jax import train
    from ssl_jax.evals import command
    from ssl_jax.viz import show as show_lib

    train.command('scenes_mae', [], args.workdir)
    words = [
        'seg.max_patches=16384',
        'seg.ks=(1,3)',
        'seg.cs=(0.05,2,70)',
        'depth.steps=300',
        'depth.lr=1e-2',
    ]
    rows = command.evaluate_run(args.workdir, tasks=('linear', 'seg', 'depth'), words=words)

    def best(task, metric):
        found = [(row['model'], row.get('scores', row)) for row in rows if row['eval'] == task]
        return {model: scores[metric] for model, scores in found}

    for what, scores in {
        'classes named by a linear probe (%)': best('linear', 'top1'),
        'segmentation by logistic regression of patches (mIoU)': best('seg', 'mIoU'),
        'error of depth by a linear head (RMSE)': best('depth', 'RMSE'),
    }.items():
        numbers = (f'{name.replace("_", " ")} {value:.2f}' for name, value in scores.items())
        print(f'{what}: {", ".join(numbers)}')
    for path in show_lib.predictions(args.workdir, rows[0]['step']):
        print(path)
    report_lib.refresh(args.workdir)
    print(f'pictures: {os.path.join(args.workdir, "pictures")}')


def methods(args):
    """`ssl_jax methods`."""
    from ssl_jax import listing

    del args
    print('\n'.join(listing.method_names()))


def recipes(args):
    """`ssl_jax recipes`."""
    from ssl_jax import listing

    del args
    print('\n'.join(listing.recipes()))


def _on_cpu():
    """Keeps JAX off accelerators, which may be busy. To call before jax is imported."""
    if 'jax' not in sys.modules:
        os.environ['JAX_PLATFORMS'] = 'cpu'


if __name__ == '__main__':
    main()
