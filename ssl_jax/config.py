# SPDX-License-Identifier: Apache-2.0
"""Configuration: one locked `ConfigDict` with every field known, recipes, overrides, units, checks.

A recipe is a file in `configs/` with `get_config(arg='')` that starts from `default()` and sets
values. `load` finds it, applies `a.b=value` overrides, fills model sizes, checks and locks it.

Durations are written with their unit in the name: `total_epochs=800`, `warmup_steps=1000`,
`every_examples=1e6`. At most one field of such a group is set; `steps` converts it.
"""

import ast
import difflib
import importlib.util
import json
import pathlib

import ml_collections

from ssl_jax import config_finetune, config_infer, config_rules

SOURCES = ('data.train', 'data.eval_train', 'data.eval_test')  # free-form: sources own their keys

# Fields that may be None, with the type they have otherwise.
OPTIONAL = {
    'batch_size': int,
    'total_steps': int, 'total_epochs': float, 'total_examples': int,
    'warmup_steps': int, 'warmup_epochs': float, 'warmup_examples': int,
    'method.size': str, 'method.embed_dim': int, 'method.depth': int, 'method.num_heads': int,
    'method.patch_size': int, 'method.img_size': int, 'method.mask_grid': int,
    'method.decoder_embed_dim': int, 'method.decoder_depth': int, 'method.decoder_num_heads': int,
    'optim.lr': float, 'optim.clip': float, 'optim.weight_decay_end': float,
    'optim.layer_decay': float,
    'optim.warm_freeze_steps': int, 'optim.warm_freeze_epochs': float,
    'optim.warm_freeze_examples': int,
    'checkpoint.every_steps': int, 'checkpoint.every_minutes': float, 'checkpoint.keep_every': int,
    'eval.every_steps': int, 'eval.every_epochs': float, 'eval.every_examples': int,
    'eval.max_train': int, 'eval.max_test': int, 'eval.size': int,
    'method.teacher': str, 'method.teacher_size': str, 'method.teacher_embed_dim': int,
    'method.teacher_depth': int, 'method.teacher_num_heads': int,
    'method.local_size': int, 'method.dino_out_dim': int, 'method.ibot_out_dim': int,
    'method.vocab': int, 'method.token_patch_size': int,
    'method.layer_scale': float, 'method.warmup_teacher_temp_steps': int,
    'method.warmup_teacher_temp_epochs': float, 'method.warmup_teacher_temp_examples': int,
    'method.num_classes': int, 'method.ema_decay': float, 'method.rel_pos': str,
    'method.crop_pct': float,
    'dtype': str, 'init_from': str, 'resume_from': str,
}  # fmt: skip


def default():
    """Returns an unlocked `ConfigDict` with every field; recipes change it, never add to it.

    Two parts are exceptions: the sources (`data.train`, `data.eval_train`, `data.eval_test`) take
    the keys of `ssl_jax.data.sources.open_source`, and a recipe of another method replaces `method`
    by that method's own fields.
    """
    c = ml_collections.ConfigDict()
    c.name = ''  # recipe name, shown in banners and logs
    c.seed = 0  # all randomness is fold_in(key(seed), step)
    c.infer = False  # True: `infer` chooses the fields left None from the images and devices

    c.batch_size = 256  # images per optimizer step, over all devices and accumulation steps
    c.accum_steps = 1  # micro-batches per optimizer step
    c.total_steps = None  # length of the run: exactly one of total_{steps,epochs,examples};
    c.total_epochs = None  # an epoch is as many images as data.train has
    c.total_examples = None
    c.warmup_steps = None  # linear warm-up: at most one of warmup_{steps,epochs,examples}; none: 0
    c.warmup_epochs = None
    c.warmup_examples = None

    c.dtype = 'float32'  # compute type of the networks; parameters and moments are float32
    c.remat = 'none'  # what backward recomputes: 'none', norms and qkv ('dots'), 'full' blocks

    c.method = m = ml_collections.ConfigDict()
    m.name = 'mae'  # module in ssl_jax/methods
    m.size = 'S'  # key of models.vit.SIZES, fills the next three where they are None
    m.embed_dim = None  # encoder width, channels
    m.depth = None  # encoder blocks
    m.num_heads = None
    m.patch_size = 16  # pixels
    m.img_size = 224  # pixels, height and width of a training crop
    m.num_cls_tokens = 1
    m.pos_embed = 'sincos'  # fixed table ('sincos', MAE) or parameters ('learned', Pixio)
    m.decoder_embed_dim = 512
    m.decoder_depth = 8
    m.decoder_num_heads = 16
    m.mlp_ratio = 4.0  # hidden width of the MLP / embed_dim
    m.mask_ratio = 0.75  # fraction of the tokens that the encoder does not see
    m.mask_grid = 1  # side in patches of the squares that are masked together
    m.norm_pix_loss = True  # predict pixels normalised per patch
    m.drop_path = 0.0  # stochastic depth of the last encoder block; linear from 0 at the first
    m.crop_scale = (0.2, 1.0)  # RandomResizedCrop: fraction of the image's area
    m.crop_ratio = (3 / 4, 4 / 3)  # RandomResizedCrop: width / height
    m.flip = 0.5  # probability of a horizontal flip

    c.data = d = ml_collections.ConfigDict()
    d.train = ml_collections.ConfigDict(dict(source='scenes'))  # keys of open_source
    d.eval_train = None  # labelled images that evaluations learn from; None: no such evaluation
    d.eval_test = None  # labelled images that they are scored on
    d.num_threads = 16  # decoding threads per process
    d.num_workers = 0  # decoding processes per process; 0: threads only
    d.bad_budget = 0.01  # largest fraction of undecodable images before the run stops

    c.optim = o = ml_collections.ConfigDict()
    o.base_lr = 1.5e-4  # learning rate per `scale_batch` images: lr = base_lr * batch / scale_batch
    o.lr = None  # peak learning rate as it is; overrides base_lr
    o.scale_batch = 256  # images
    o.lr_scaling = 'linear'  # 'linear' as above, or base_lr * 'sqrt'(batch / scale_batch)
    o.schedule = 'mae'  # warm-up and cosine as 'mae' or as 'dinov2' has them, see ssl_jax.optim
    o.min_lr = 0.0  # learning rate at the end of the cosine
    o.b1 = 0.9  # AdamW
    o.b2 = 0.95
    o.eps = 1e-8
    o.weight_decay = 0.05  # decoupled: p <- p (1 - lr wd)
    o.weight_decay_end = None  # the decay moves there along half a cosine; None: it stays
    o.no_decay = ()  # regexes on slash paths, exempt from decay besides biases and 1-D parameters
    o.clip = None  # largest gradient norm ...
    o.clip_by = 'all'  # ... of 'all' gradients, of each 'network', or of each 'tensor'
    o.layer_decay = None  # factor per layer below the head, for fine-tuning
    o.lr_mult = ()  # ((regex, factor), ...): factors of all matching regexes multiply
    o.freeze = ()  # regexes: no update, no decay, no moments
    o.warm_freeze = ()  # regexes: rate 0 at the start of the run, for as long as ...
    o.warm_freeze_steps = None  # ... one of warm_freeze_{steps,epochs,examples} says
    o.warm_freeze_epochs = None
    o.warm_freeze_examples = None
    o.warm_freeze_moments = True  # whether their moments go on meanwhile (DINOv2), or wait too

    c.mesh = ml_collections.ConfigDict(dict(data=-1, fsdp=1, tensor=1))  # devices; -1: the rest

    c.checkpoint = k = ml_collections.ConfigDict()
    k.every_steps = None  # save every so many steps ...
    k.every_minutes = 15.0  # ... and after so many minutes; the end of a run always saves
    k.keep = 2  # newest checkpoints kept
    k.keep_every = None  # steps: multiples of it are kept for good

    c.log = ml_collections.ConfigDict(dict(every_steps=50, tensorboard=True, wandb=False))

    c.eval = e = ml_collections.ConfigDict()
    e.every_steps = None  # evaluations and pictures: at most one of every_{steps,epochs,examples};
    e.every_epochs = None  # none: only at the end
    e.every_examples = None
    e.knn = True  # nearest neighbours, where data.eval_train and data.eval_test are given
    e.knn_k = (10, 20, 100, 200)  # neighbours
    e.temperature = 0.07  # of the votes: exp(similarity / temperature)
    e.batch_size = 256  # images
    e.max_train = None  # images of eval_train used, None: all
    e.max_test = None
    e.size = None  # pixels, None: method.img_size
    e.pictures = True  # reconstructions and curves in the workdir
    e.num_pictures = 8

    c.nonfinite = ml_collections.ConfigDict(dict(in_a_row=3, total=10))  # skipped steps tolerated
    c.init_from = None  # start from these weights at step 0: a run, an export, a weights file
    c.resume_from = None  # continue another run: weights, moments and step
    c.compile_cache = True  # keep compiled programs on disk
    return c


def imagenet(root=''):
    """(train, eval_train, eval_test) sources of ImageNet-1k, for recipes.

    Args:
        root: folder (local or gs://) with train/ and val/, a subfolder per class in each; without
          it TFDS' imagenet2012, prepared in TFDS_DATA_DIR.
    """
    if root:
        train = dict(source='folder', path=root, split='train')
        test = dict(source='folder', path=root, split='val')
    else:
        train = dict(source='tfds', name='imagenet2012', split='train')
        test = dict(source='tfds', name='imagenet2012', split='validation')
    return tuple(ml_collections.ConfigDict(source) for source in (train, train, test))


def folder():
    """Folder of the recipes: `configs/` of a clone, or `ssl_jax/configs` of an installed wheel."""
    package = pathlib.Path(__file__).resolve().parent
    inside = package / 'configs'
    return inside if inside.is_dir() else package.parent / 'configs'


def recipes():
    """Sorted names that `load` accepts."""
    return sorted(p.stem for p in folder().glob('*.py') if not p.stem.startswith('_'))


# Cross-field checks and the choices for an unknown data set have a file of their own.
validate = config_rules.validate
infer = config_infer.infer


def load(spec, overrides=()):
    """Makes the config of a run.

    Args:
        spec: 'path.py', 'path.py:arg', or a name of `recipes()` with or without ':arg'.
        overrides: strings 'a.b=value', applied in order. A value is read by the type of the field;
            setting one unit of a duration clears its siblings, setting `method.size` the widths.

    Returns:
        A locked `ConfigDict` that passed `validate` (after `infer`, if `config.infer`).

    Raises:
        ValueError: unknown recipe, field or value, in one sentence.
    """
    name, _, arg = str(spec).partition(':')
    config = recipe(name, arg)
    for override in overrides:
        set_value(config, override)
    config_infer.fill_size(config.method)
    if config.init_from and 'classes' in config.method:
        config_finetune.follow(config, overrides)
    if not config.infer:
        validate(config)
    return lock(config)


def recipe(name, arg=''):
    """The unlocked config of a recipe, by name or path; recipes that vary another start with it."""
    path = pathlib.Path(name)
    if path.suffix != '.py':
        path = folder() / f'{name}.py'
        if not path.exists():
            raise ValueError(f"There is no recipe '{name}'{_nearest(name, recipes())}")
    if not path.exists():
        raise ValueError(f"There is no recipe file '{path}': give a path or one of {recipes()}.")
    loader = importlib.util.spec_from_file_location(f'ssl_jax_recipe_{path.stem}', path)
    module = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(module)
    return module.get_config(arg)


def lock(config):
    """Locks all but the sources, whose keys belong to them; returns `config`."""
    config.lock()
    for name in SOURCES:
        source = config.data[name.split('.')[1]]
        if isinstance(source, ml_collections.ConfigDict):
            source.unlock()
    return config


def set_value(config, override):
    """Applies one 'a.b=value' to `config` in place; see `load`."""
    name, equals, text = override.partition('=')
    name = name.strip().removeprefix('config.')
    if not equals:
        raise ValueError(f"Override '{override}' has no '=': write a.b=value.")
    keys = name.split('.')
    parent = config
    with config.unlocked():
        if '.'.join(keys[:2]) in SOURCES:
            _set_source(config, keys, text)
            return
        for key in keys[:-1]:
            parent = parent[key] if _has(parent, key) else None
        if not _has(parent, keys[-1]):
            raise ValueError(f"There is no field '{name}'{_nearest(name, flatten(config))}")
        old = parent[keys[-1]]
        if isinstance(old, ml_collections.ConfigDict):
            raise ValueError(f"'{name}' is a group; set one of its fields: {sorted(old.keys())}.")
        new = _parse(name, text, old)
        for other in _siblings(keys[-1], parent) if new is not None else ():
            parent[other] = None
        with parent.ignore_type():
            parent[keys[-1]] = new


def _set_source(config, keys, text):
    """data.train=PATH or data.train.key=value, where any key goes."""
    with config.ignore_type():
        if len(keys) == 2:  # a path, whatever it looks like
            config.data[keys[1]] = None if text.strip().lower() == 'none' else text.strip()
        else:
            if not isinstance(config.data[keys[1]], ml_collections.ConfigDict):
                config.data[keys[1]] = ml_collections.ConfigDict()
            config.data[keys[1]]['.'.join(keys[2:])] = _literal(text)


def _has(parent, key):
    return isinstance(parent, ml_collections.ConfigDict) and key in parent


def _siblings(key, parent):
    """Fields that setting `key` clears: other units of a duration; the widths for a size."""
    if key == 'size' and 'embed_dim' in parent:
        return [k for k in ('embed_dim', 'depth', 'num_heads') if k in parent]
    prefix, _, unit = key.rpartition('_')
    if unit not in config_rules.UNITS:
        return []
    return [f'{prefix}_{u}' for u in config_rules.UNITS if u != unit and f'{prefix}_{u}' in parent]


def _nearest(name, names):
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)
    return f": did you mean '{close[0]}'?" if close else '.'


def _literal(text):
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return text.strip()


def _parse(name, text, old):
    """Reads `text` as the type of field `name`, whose present value is `old`."""
    kind = OPTIONAL.get(name, type(old))
    value = {'true': True, 'false': False, 'none': None}.get(text.strip().lower(), _literal(text))
    if value is None and (name in OPTIONAL or old is None):
        return None
    if kind is str:
        return text.strip().strip('\'"')
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is bool and isinstance(value, bool):
        return value
    if kind is float and number:
        return float(value)
    if kind is int and number and float(value).is_integer():  # 1e6 is an int too
        return int(value)
    if kind is tuple and isinstance(value, (tuple, list)):
        return _tuples(value)
    if kind is type(None):
        return value
    allowed = f'{kind.__name__} or None' if name in OPTIONAL else kind.__name__
    example = {bool: 'True', float: '1e-3', int: '100', tuple: '(1, 2)'}.get(kind, '...')
    raise ValueError(f"'{name}' takes {allowed}, not '{text}': write {name}={example}.")


def flatten(config, prefix=''):
    """{'a.b': value} of all fields."""
    flat = {}
    for key in config:
        value = config[key]
        if isinstance(value, ml_collections.ConfigDict):
            flat.update(flatten(value, f'{prefix}{key}.'))
        else:
            flat[prefix + key] = value
    return flat


def diff(a, b):
    """{'a.b': (value in a, value in b)} where two configs differ; a missing field is None."""
    a, b = flatten(a), flatten(b)
    return {k: (a.get(k), b.get(k)) for k in sorted({*a, *b}) if a.get(k) != b.get(k)}


def to_json(config):
    """Stable text of a config: keys sorted, two spaces; read back by `from_json`."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + '\n'


def from_json(text):
    """Inverse of `to_json`: a locked config (JSON lists become tuples)."""
    return lock(ml_collections.ConfigDict(_tuples(json.loads(text))))


def _tuples(value):
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def steps(prefix, config, num_examples=None, batch_size=None, default=None):
    """Converts a duration of any unit to optimizer steps; see `clock` for those of one config.

    Vocabulary: a step is one optimizer update, an example one image seen (`batch_size` per step,
    all devices and micro-batches together), an epoch `num_examples` examples. Batches run across
    the borders of epochs, so E epochs are round(E * num_examples / batch_size) steps.

    Args:
        prefix: 'total', 'warmup', 'every' or 'warm_freeze': the fields `{prefix}_steps`, `_epochs`,
            `_examples`.
        config: the `ConfigDict` (or sub-dict, e.g. `config.eval`) that has them.
        num_examples: images in the training set; needed for epochs only.
        batch_size: images per step; needed for epochs and examples.
        default: returned if no unit is set; without one that is an error.

    Returns:
        int, at least 1 for a positive duration.
    """
    unit, value = config_rules.duration(prefix, config)
    if unit is None:
        if default is None:
            names = ', '.join(f'{prefix}_{u}' for u in config_rules.UNITS)
            raise ValueError(f'None of {names} is set: set one, such as {prefix}_steps=1000.')
        return default
    if unit == 'steps':
        return int(value)
    if not batch_size:
        raise ValueError(f'{prefix}_{unit} needs the batch size: set batch_size or {prefix}_steps.')
    if unit == 'epochs':
        if not num_examples:
            raise ValueError(
                f'{prefix}_epochs needs the number of images, which this source does not tell: '
                f'set {prefix}_steps or {prefix}_examples.'
            )
        value = value * num_examples
    return max(round(value / batch_size), int(value > 0))


def clock(config, num_examples=None):
    """`steps` of one config: (prefix, sub-dict or None for the whole, default) -> int."""

    def durations(prefix, part=None, default=None):
        part = config if part is None else part
        return steps(prefix, part, num_examples, config.batch_size, default)

    return durations
