# SPDX-License-Identifier: Apache-2.0
"""Configuration: recipes, overrides, stored configs, inferred fields, checks.

A config is a locked `ConfigDict`; its groups are the dataclasses below, `config.method` is the
dataclass of its method. A recipe is a file in `configs/` with `get_config(arg='')`, which sets
values of `default()`. `load` applies `a.b=value` overrides to it, checks and locks it; no weights
are read.

For durations (`total_epochs`, `warmup_steps`, ...) see `run.clock`.
"""

import copy
import dataclasses
import importlib.util
import json
import math
import pathlib
import tempfile
from collections.abc import Iterable, Iterator
from typing import Annotated, Literal

from ml_collections import ConfigDict

from ssl_jax import fields, methods, optim
from ssl_jax.data import mixture
from ssl_jax.fields import Range
from ssl_jax.methods import base
from ssl_jax.models import vit as vit_lib
from ssl_jax.run import clock as clock_lib
from ssl_jax.run import errors, launch, profile, storage

# Groups with free keys: those of a source or of an evaluation, and flags of XLA for the step.
OPEN = ('data.train', 'data.eval_train', 'data.eval_test', 'eval.tasks', 'xla')
# FLOP/s of one CPU core in training small models (measured: 77e9 on two cores); seconds of an
# inferred run on a CPU.
CPU_FLOPS, CPU_SECONDS = 30e9, 240


@dataclasses.dataclass(frozen=True)
class Run:
    """Fields at the top of a config."""

    name: str = ''  # recipe name, shown in banners and logs
    seed: Annotated[int, Range(0, 2**31 - 1)] = 0  # all randomness is fold_in(key(seed), step)
    infer: bool = False  # whether `infer` chooses the fields that are None
    overrides: tuple = ()  # 'a.b=value' as typed by the user

    batch_size: int | None = 256  # images per step, over all devices and micro-batches
    accum_steps: int = 1  # micro-batches per step
    total_steps: int | None = None  # length of the run: exactly one of total_*
    total_epochs: float | None = None
    total_examples: int | None = None
    warmup_steps: int | None = None  # linear warm-up of the rate: at most one; none: 0
    warmup_epochs: float | None = None
    warmup_examples: int | None = None

    dtype: Literal['float32', 'bfloat16'] | None = 'float32'  # the networks' compute type; state
    # is float32
    remat: Literal['none', 'dots', 'full'] = 'none'  # what backward recomputes: norms and qkv
    # ('dots'), 'full' blocks
    init_from: str | None = None  # start from these weights at step 0: a run, an export, a file
    resume_from: str | None = None  # continue another run: weights, moments and step
    kernels: Literal['auto', 'on', 'off'] = 'auto'  # hand-written forms of operations on TPU, GPU:
    # those that the device finds right and faster ('auto'), all that fit ('on'), none ('off')
    compile_cache: bool = True  # keep compiled programs on disk, and what 'auto' found


@dataclasses.dataclass(frozen=True)
class Data:
    """Images. `train`, `eval_train` and `eval_test` are arguments of `sources.open_source`."""

    # Decoding threads per process, None: one per core; more may help where files are far away.
    num_threads: Annotated[int | None, Range(1, 1024)] = None
    num_workers: Annotated[int, Range(0, 1024)] = 0  # decoding processes per process; 0: threads
    bad_budget: fields.Probability = 0.01  # share of undecodable images that stops the run
    # Other images than those that the run began with: stop, or go on with them.
    changed: Literal['refuse', 'accept'] = 'refuse'


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Number of devices along each axis; -1: the rest."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Checkpoints; the end of a run always saves."""

    every_steps: int | None = None  # save every N steps ...
    every_minutes: float | None = 15.0  # ... and every N minutes
    keep: Annotated[int, Range(1, 10**6)] = 2  # newest checkpoints kept
    keep_every: int | None = None  # keep all checkpoints of multiples of N steps


@dataclasses.dataclass(frozen=True)
class Log:
    """Metrics."""

    every_steps: Annotated[int, Range(1, 10**9)] = 50
    tensorboard: bool = True
    wandb: bool = False
    profile: str | None = None  # steps to trace: '100:105', see `run.profile`


Minutes = Annotated[float | None, Range(0, 10**6)]


@dataclasses.dataclass(frozen=True)
class Watchdog:
    """Stalls, see `run.watchdog`; minutes without progress, four times as many before step 1."""

    dump_minutes: Minutes = 10.0  # until the stacks of all threads are written; 0 or None: never
    exit_minutes: Minutes = 30.0  # until all processes end with code 1; 0 or None: never


@dataclasses.dataclass(frozen=True)
class Eval:
    """Evaluations in the loop; `tasks` has their names and options, see `evals.base`."""

    every_steps: int | None = None  # at most one of every_*; none: only at the end
    every_epochs: float | None = None
    every_examples: int | None = None
    batch_size: Annotated[int, Range(1, 10**6)] = 256  # images
    max_train: int | None = None  # images of eval_train used, None: all
    max_test: int | None = None
    size: int | None = None  # pixels, None: method.img_size


@dataclasses.dataclass(frozen=True)
class Nonfinite:
    """Updates that may be skipped because loss or gradients are not finite."""

    in_a_row: Annotated[int, Range(0, 10**9)] = 3
    total: Annotated[int, Range(0, 10**9)] = 10


GROUPS = {
    'data': Data,
    'optim': optim.Optim,
    'mesh': Mesh,
    'checkpoint': Checkpoint,
    'log': Log,
    'watchdog': Watchdog,
    'eval': Eval,
    'nonfinite': Nonfinite,
}


def default(method: str = 'mae') -> ConfigDict:
    """An unlocked config with every field; recipes change values and never add fields."""
    c = fields.group(Run)
    for name, cls in GROUPS.items():
        # `data.train` may be a path, a spec or a list of them; `validate` checks the other fields.
        c[name] = fields.group(cls, type_safe=name != 'data')
    c.data.train = ConfigDict(dict(source='scenes'))
    c.data.eval_train = None  # labelled images that evaluations learn from
    c.data.eval_test = None  # labelled images that they are scored on
    c.eval.tasks = ConfigDict(dict(monitors={}, knn={}, seg={}, accuracy={}, pictures={}))
    c.xla = ConfigDict()  # {flag: value}, over those of `sharding.FLAGS`; None: XLA's own default
    c.method = ConfigDict(dict(name=method))
    c.method.update(fields.group(methods.get(method)))
    return c


def spec(config: ConfigDict, name: str) -> fields.Spec:
    """What may be written into the field 'a.b' of a config."""
    group, _, key = name.rpartition('.')
    cls = methods.get(config.method.name) if group == 'method' else GROUPS.get(group, Run)
    if name == 'method.name':
        return fields.Spec(str, False, (), None, 'mae')
    return fields.specs(cls)[key]


# Recipes.


def folder() -> pathlib.Path:
    """Folder of the recipes: `configs/` of a clone, or `ssl_jax/configs` of an installed wheel."""
    package = pathlib.Path(__file__).resolve().parent
    inside = package / 'configs'
    return inside if inside.is_dir() else package.parent / 'configs'


def recipes() -> list[str]:
    """Sorted names that `load` accepts."""
    return sorted(p.stem for p in folder().glob('*.py') if not p.stem.startswith('_'))


def load(name: str, overrides: Iterable[str] = ()) -> ConfigDict:
    """The config of a run.

    Args:
      name: 'path.py', 'path.py:arg' (also in a bucket), or a name of `recipes()` with or without
        ':arg'.
      overrides: strings 'a.b=value', applied in order. A value is read by the type of the field;
        setting one unit of a duration clears its siblings, setting `method.size` the widths.

    Returns:
      A locked config that passed `validate` (after `infer`, if `config.infer`).

    Raises:
      UserError: unknown recipe, field or value, in one sentence.
    """
    path, arg = _split(str(name))
    config, overrides = recipe(path, arg), tuple(overrides)
    for override in overrides:
        set_value(config, override)
    with config.unlocked():
        config.overrides = overrides
        fill_size(config.method)
        for name in ('train', 'eval_train', 'eval_test'):
            if isinstance(listed := config.data[name], (list, tuple)):
                del config.data[name]  # a field that was a list makes a list of a tuple
                config.data[name] = mixture.entries(listed)
    if not config.infer:
        validate(config)
    return lock(config)


def _split(name):
    """(path, arg) of 'path.py:arg'; the path may be in a bucket."""
    scheme, slashes, rest = name.partition('://')
    if not slashes or '.py' in scheme or ':' in scheme:
        scheme, slashes, rest = '', '', name
    path, _, arg = rest.partition(':')
    return f'{scheme}{slashes}{path}', arg


def recipe(name: str, arg: str = '') -> ConfigDict:
    """Unlocked config of a recipe, by name or path; also for recipes that vary another."""
    if storage.is_remote(name):
        return _remote(name).get_config(arg)
    path = pathlib.Path(name)
    if path.suffix != '.py':
        path = folder() / f'{name}.py'
        if not path.exists():
            hint = errors.nearest(name, recipes(), cutoff=0.0)
            raise errors.UserError(f"There is no recipe '{name}'{hint}")
    if not path.exists():
        raise errors.UserError(
            f"There is no recipe file '{path}': give a path or one of {recipes()}."
        )
    return _module(path).get_config(arg)


def _remote(path):
    """The module of a recipe in a bucket."""
    try:
        text = storage.read(path)
    except FileNotFoundError as error:
        raise errors.UserError(f"There is no recipe file '{path}': check its name.") from error
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder, path.rpartition('/')[2])
        file.write_bytes(text)
        return _module(file)


def shared(name: str):
    """The module `configs/_{name}.py`, shared by recipes."""
    return _module(folder() / f'_{name}.py')


def _module(path):
    loader = importlib.util.spec_from_file_location(f'ssl_jax_recipe_{path.stem}', path)
    module = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(module)
    return module


def lock(config: ConfigDict) -> ConfigDict:
    """Locks all but the groups in `OPEN`; returns `config`."""
    config.lock()
    for name in OPEN:
        group, part = _parent(config, name)
        if isinstance(group[part], ConfigDict):
            group[part].unlock()
    return config


def _parent(tree, name):
    """'a.b' -> (the group a of a config or nested dict, 'b'); a name alone is at the top."""
    *groups, part = name.split('.')
    for group in groups:
        tree = tree.get(group, {})
    return tree, part


def fill_size(m: ConfigDict) -> None:
    """Sets embed_dim, depth and num_heads of `config.method` from its size where they are None."""
    if m.size is None:
        return
    if m.size not in vit_lib.SIZES:
        raise errors.UserError(
            f"method.size='{m.size}' is unknown: use one of {', '.join(vit_lib.SIZES)}."
        )
    for key, value in zip(WIDTHS, vit_lib.SIZES[m.size], strict=True):
        if m[key] is None:
            m[key] = value


WIDTHS = ('embed_dim', 'depth', 'num_heads')


# Overrides.


def set_value(config: ConfigDict, override: str) -> None:
    """Applies one 'a.b=value' to `config` in place; see `load`."""
    name, equals, text = override.partition('=')
    name = name.strip().removeprefix('config.')
    if not equals:
        raise errors.UserError(f"Override '{override}' has no '=': write a.b=value.")
    keys = name.split('.')
    with config.unlocked():
        if keys[0] == 'xla':
            _set_flag(config, keys, text)
            return
        if '.'.join(keys[:2]) in OPEN:
            _set_open(config, keys, text)
            return
        parent = config
        for key in keys[:-1]:
            parent = parent[key] if _has(parent, key) else None
        if not _has(parent, keys[-1]):
            hint = errors.nearest(name, flatten(config), cutoff=0.0)
            raise errors.UserError(f"There is no field '{name}'{hint}")
        if isinstance(parent[keys[-1]], ConfigDict):
            raise errors.UserError(
                f"'{name}' is a group; set one of its fields: {sorted(parent[keys[-1]].keys())}."
            )
        if name == 'method.name' and text != config.method.name:
            raise errors.UserError(
                f'method.name={text} has other fields: start from a recipe of that method, such as '
                f'images_{text}.'
            )
        new = fields.parse(name, text, spec(config, name))
        if new is not None:
            for other in _siblings(keys[-1], parent):
                parent[other] = None
        parent[keys[-1]] = new


def _set_open(config, keys, text):
    """Applies an override below `OPEN`: data.train=PATH, eval.tasks.knn.ks=(10,)."""
    with config.ignore_type():
        parent = config[keys[0]]
        if len(keys) == 2 and keys[0] == 'data':  # a path, or a list of sources
            value = None if text.strip().lower() == 'none' else mixture.parse(text.strip())
            parent[keys[1]] = value
            return
        if keys[0] == 'data' and isinstance(parent.get(keys[1]), (list, tuple)):
            raise errors.UserError(
                f"'{'.'.join(keys[:2])}' is a list of sources: write {keys[2]} into its entries."
            )
        for key in keys[1:-1]:
            if not isinstance(value := parent.get(key), ConfigDict):
                path = keys[0] == 'data' and value  # data.train=DIR data.train.split=val
                parent[key] = ConfigDict({'path': value} if path else {})
            parent = parent[key]
        value = {'none': None}.get(text.strip().lower(), fields.literal(text))
        parent[keys[-1]] = fields.tuples(value)


def _set_flag(config, keys, text):
    """Applies an override of a flag of XLA: xla.xla_tpu_scoped_vmem_limit_kib=65536."""
    if len(keys) != 2 or not keys[1]:
        raise errors.UserError(
            f"'{'.'.join(keys)}' is no flag of XLA: write xla.FLAG=value, such as "
            f'xla.xla_tpu_scoped_vmem_limit_kib=65536.'
        )
    words = {'true': True, 'false': False, 'none': None}
    with config.ignore_type():
        value = words.get(text.strip().lower(), fields.literal(text))
        config.xla[keys[1]] = fields.tuples(value)


def lay_over(stored: ConfigDict, overrides: Iterable[str]) -> ConfigDict:
    """A locked copy of a stored config with the overrides of a command.

    An override that the run has had already changes nothing: its `None` may have become a value
    since, such as the number of classes.
    """
    config, new = copy.deepcopy(stored), [o for o in overrides if o not in stored.overrides]
    for override in new:
        set_value(config, override)
    replaced = {_slot(o) for o in new}
    with config.unlocked():
        config.overrides = (*(o for o in stored.overrides if _slot(o) not in replaced), *new)
        fill_size(config.method)
    return lock(config)


def _slot(override):
    """The field of an override; the units of one duration share it."""
    name = override.partition('=')[0].strip().removeprefix('config.')
    prefix, _, unit = name.rpartition('_')
    return prefix if unit in clock_lib.UNITS else name


def _has(parent, key):
    return isinstance(parent, ConfigDict) and key in parent


def _siblings(key, parent):
    """Fields cleared by setting `key`: other units of a duration, widths of a size."""
    if key == 'size' and 'embed_dim' in parent:
        return WIDTHS
    prefix, _, unit = key.rpartition('_')
    if unit not in clock_lib.UNITS:
        return ()
    others = (f'{prefix}_{u}' for u in clock_lib.UNITS if u != unit)
    return [name for name in others if name in parent]


# Stored configs.


def to_json(config: ConfigDict) -> str:
    """Stable text of a config: keys sorted, two spaces."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + '\n'


def from_dict(stored: dict) -> tuple[ConfigDict, list[str]]:
    """Reads a stored config of this or an earlier version: (locked config, log lines).

    Missing fields get their defaults, removed fields are dropped. The lines list the former, and
    the latter if their value is not the one that is now fixed.

    Raises:
      UserError: a field is unknown, or has a value of another type.
    """
    stored = fields.tuples(_upgraded(json.loads(json.dumps(stored))))
    name = stored.get('method', {}).get('name', 'mae')
    config, lines = default(name), []
    if 'method' not in stored:  # imported weights of an encoder
        del config['method']
    removed = {f'method.{k}': v for k, v in methods.get(name).removed.items()}
    known, found = set(flatten(config)), flatten(stored)
    with config.ignore_type():
        for key in OPEN:
            (was, part), (group, _) = _parent(stored, key), _parent(config, key)
            if part in was:
                value = was.pop(part)
                group[part] = ConfigDict(value) if isinstance(value, dict) else value
    for key, value in flatten(stored).items():
        if key in removed:
            if removed[key] not in (value, ...):
                lines.append(
                    f'{key} = {value!r} is no field any more, this version has {removed[key]!r}'
                )
            continue
        if key not in known:
            hint = errors.nearest(key, known)
            raise errors.UserError(
                f'the stored config has {key}={value!r}, which this version does not know{hint}'
            )
        parent, (*groups, leaf) = config, key.split('.')
        for group in groups:
            parent = parent[group]
        try:
            parent[leaf] = value
        except TypeError as e:
            raise errors.UserError(f'the stored config has {key}={value!r}: {e}.') from e
    for key in sorted(known - set(found)):
        if not key.startswith(OPEN) and key not in ('overrides', 'method.eps'):
            lines.append(f'{key} = {flatten(config)[key]!r}: not in the stored config, the default')
    return lock(config), lines


def _upgraded(stored):
    """Renames the fields of earlier versions.

    Distillation was one method with two forms, evaluations were fields of `eval`.
    """
    m = stored.get('method', {})
    if 'form' in m:
        m['name'] = {'features': 'distill', 'dino': 'dinov2_distill'}[m.pop('form')]
    e = stored.get('eval', {})
    if 'knn' in e:
        knn = {'ks': e.pop('knn_k'), 'temperature': e.pop('temperature')}
        knn = knn if e.pop('knn') else None
        pictures = {'num_images': e.pop('num_pictures')}
        pictures = pictures if e.pop('pictures') else None
        e['tasks'] = dict(monitors={}, knn=knn, accuracy={}, pictures=pictures)
    return stored


def flatten(config, prefix: str = '') -> dict:
    """{'a.b': value} of all fields of a config or nested dict."""
    flat = {}
    for key in config:
        value = config[key]
        if isinstance(value, (ConfigDict, dict)):
            flat.update(flatten(value, f'{prefix}{key}.'))
        else:
            flat[prefix + key] = value
    return flat


def diff(a, b) -> dict:
    """{'a.b': (value in a, value in b)} of fields that differ; a missing field is None."""
    a, b = flatten(a), flatten(b)
    return {k: (a.get(k), b.get(k)) for k in sorted({*a, *b}) if a.get(k) != b.get(k)}


# Inferred fields.


def infer(config, num_images, image_hw, platform, device_count, cores=None):
    """Chooses every field that is None, for the given images and devices.

    A run on a CPU lasts about four minutes. On accelerators it has 400 epochs, up to 1600 for few
    images.

    Args:
      config: a config with `infer=True`, one of the recipes `images_*`.
      num_images: size of the training set.
      image_hw: (height, width) in pixels of a typical image.
      platform: 'cpu', 'gpu' or 'tpu'.
      device_count: devices of all processes.
      cores: CPU cores of this process, None: those of the system.

    Returns:
      (config, decisions): a valid config, and a sentence per decision.
    """
    config, decisions = copy.deepcopy(config), []
    cpu, cores = platform == 'cpu', cores or launch.cores()
    if num_images < 1:
        raise errors.UserError('The training set has no images: give a folder that holds some.')

    def choose(name, value, why):
        group, _, key = name.rpartition('.')
        parent = config[group] if group else config
        if parent[key] is None:
            parent[key] = value
            decisions.append(f'{name} = {value}: {why}.')
        return parent[key]

    with config.unlocked():
        config.infer = False
        choose('dtype', 'float32' if cpu else 'bfloat16', f'the fast type on {platform}')
        cls = methods.get(config.method.name)
        limit = 32 if cpu else 128 * device_count
        batch = 2 ** math.floor(math.log2(max(min(limit, 4096, num_images / 4), 1)))
        ways = device_count * config.accum_steps
        batch = max(batch // ways, methods.make(config).min_images) * ways
        choose('batch_size', batch, f'{num_images:,} images, {device_count} device(s)')
        facts = base.Facts(
            num_images=num_images,
            short_side=min(image_hw),
            cpu=cpu,
            per_device=max(config.batch_size // ways, 1),
        )

        def choose_own(name, value, why):
            return choose(f'method.{name}', value, why)

        methods.make(config).infer(facts, choose_own)
        fill_size(config.method)
        if cls.lr_at_1024:
            # Square root, as MAE's linear rule is too low for small batches.
            lr = float(f'{cls.lr_at_1024 * math.sqrt(config.batch_size / 1024):.2g}')
            why = f'{cls.lr_at_1024:g} at batch 1024, with the root of the batch'
            choose('optim.lr', lr, why)
        if clock_lib.duration('total', config)[0] is None:
            if cpu:
                examples = CPU_SECONDS * cores * CPU_FLOPS / methods.make(config).flops(1)
                why = f'about {CPU_SECONDS // 60} minutes on {cores} cores'
            else:
                examples = min(max(16e6, 400 * num_images), 1e9)
                why = 'small sets need many passes, large ones 400'
            most, reason = cls.max_epochs
            if examples > most * num_images:
                examples, why = most * num_images, reason
            epochs = float(f'{max(examples, config.batch_size) / num_images:.3g}')
            choose('total_epochs', epochs, why)
        free = clock_lib.Clock(1, 0, config.batch_size, num_images)
        total = max(free.steps('total', config), 1)
        if clock_lib.duration('warmup', config)[0] is None:
            choose('warmup_steps', total // 20, 'a twentieth of the run')
        if clock_lib.duration('every', config.eval)[0] is None:
            choose('eval.every_steps', max(total // 5, 1), 'five rounds of pictures and scores')
        validate(config)
    return config, decisions


# Checks.


def validate(config: ConfigDict) -> None:
    """Checks all fields.

    Raises:
      UserError: a sentence for the first invalid field.
    """
    for message in _problems(config):
        raise errors.UserError(message)


def _problems(c) -> Iterator[str]:
    """Yields a sentence for each invalid field; later checks may rely on earlier ones."""
    if c.batch_size is None or c.batch_size < 1 or c.accum_steps < 1:
        yield (
            f'batch_size={c.batch_size} and accum_steps={c.accum_steps} must be positive integers: '
            'set batch_size=256.'
        )
    if c.batch_size % c.accum_steps:
        yield (
            f'batch_size={c.batch_size} is not divisible by accum_steps={c.accum_steps}: '
            f'use batch_size={base.near_multiple(c.batch_size, c.accum_steps)}.'
        )
    yield from fields.problems(Run, c)
    for name, cls in GROUPS.items():
        yield from fields.problems(cls, c[name], f'{name}.')
    for flag, value in c.xla.items():
        if not isinstance(value, bool | int | float | str | None):
            yield f'xla.{flag}={value!r} must be a number, True, False, a word or None.'
    if c.dtype is None:
        yield "dtype is None: set dtype='float32'."
    profile.parse(c.log.profile)
    dump, end = c.watchdog.dump_minutes, c.watchdog.exit_minutes
    if dump and end and dump > end:
        yield (
            f'watchdog.dump_minutes={dump} is after watchdog.exit_minutes={end}: lower it, or set '
            f'it to None.'
        )
    if c.init_from and c.resume_from:
        yield (
            'init_from (weights only) and resume_from (weights, moments and step) are both set: '
            'set one of them to None.'
        )
    if any(size != -1 and size < 1 for size in c.mesh.values()) or (
        c.mesh.tensor == -1 and -1 in (c.mesh.data, c.mesh.fsdp)
    ):
        yield (
            f'mesh={c.mesh.to_dict()} must have positive sizes, and -1 (the rest) for one axis or '
            f'for data and fsdp.'
        )
    for prefix, part in (('total', c), ('warmup', c), ('every', c.eval), ('warm_freeze', c.optim)):
        clock_lib.duration(prefix, part)
    if clock_lib.duration('total', c) == (None, None):
        yield 'None of total_steps, total_epochs, total_examples is set: set total_epochs=100.'
    for unit in clock_lib.UNITS:
        total, warmup = c[f'total_{unit}'], c[f'warmup_{unit}']
        if total and warmup and warmup >= total:
            yield f'warmup_{unit}={warmup} does not end before total_{unit}={total}: lower it.'
    unit, length = clock_lib.duration('warm_freeze', c.optim)
    if c.optim.warm_freeze and not length:
        yield (
            f'optim.warm_freeze={c.optim.warm_freeze} has no length: set one of '
            f'optim.warm_freeze_{{steps,epochs,examples}}.'
        )
    if length and not c.optim.warm_freeze:
        yield (
            f'optim.warm_freeze_{unit}={length} freezes nothing: '
            "set optim.warm_freeze=('^encoder',)."
        )
    if length and c[f'total_{unit}'] and length >= c[f'total_{unit}']:
        yield (
            f'optim.warm_freeze_{unit}={length} does not end before total_{unit}='
            f'{c[f"total_{unit}"]}: lower it, or freeze for good with optim.freeze.'
        )
    yield from methods.make(c).check(c)
