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

UNITS = ('steps', 'epochs', 'examples')
DTYPES = ('float32', 'bfloat16')
REMATS = ('none', 'dots', 'full')
# (field, lowest, highest), both allowed.
RANGES = (
    ('seed', 0, 2**31 - 1),
    ('method.mask_ratio', 0.0, 0.999),
    ('method.drop_path', 0.0, 0.999),
    ('method.flip', 0.0, 1.0),
    ('method.num_cls_tokens', 0, 64),
    ('data.num_threads', 1, 1024),
    ('data.num_workers', 0, 1024),
    ('data.bad_budget', 0.0, 1.0),
    ('optim.b1', 0.0, 0.99999),
    ('optim.b2', 0.0, 0.99999),
    ('optim.base_lr', 0.0, 100.0),
    ('optim.weight_decay', 0.0, 10.0),
    ('optim.layer_decay', 0.01, 1.0),
    ('checkpoint.keep', 1, 10**6),
    ('log.every_steps', 1, 10**9),
)
SOURCES = ('data.train', 'data.eval_train', 'data.eval_test')  # free-form: sources own their keys

# Fields that may be None, with the type they have otherwise.
OPTIONAL = {
    'batch_size': int,
    'total_steps': int, 'total_epochs': float, 'total_examples': int,
    'warmup_steps': int, 'warmup_epochs': float, 'warmup_examples': int,
    'method.size': str, 'method.embed_dim': int, 'method.depth': int, 'method.num_heads': int,
    'method.patch_size': int, 'method.img_size': int, 'method.mask_grid': int,
    'method.decoder_embed_dim': int, 'method.decoder_depth': int, 'method.decoder_num_heads': int,
    'optim.lr': float, 'optim.clip': float, 'optim.layer_decay': float,
    'checkpoint.every_steps': int, 'checkpoint.every_minutes': float, 'checkpoint.keep_every': int,
    'eval.every_steps': int, 'eval.every_epochs': float, 'eval.every_examples': int,
    'eval.max_train': int, 'eval.max_test': int, 'eval.size': int,
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
    c.remat = 'none'  # what backward recomputes: 'none', all but the 'dots', or 'full' blocks

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
    o.min_lr = 0.0  # learning rate at the end of the cosine
    o.b1 = 0.9  # AdamW
    o.b2 = 0.95
    o.eps = 1e-8
    o.weight_decay = 0.05  # decoupled: p <- p (1 - lr wd)
    o.no_decay = ()  # regexes on slash paths, exempt from decay besides biases and 1-D parameters
    o.clip = None  # largest global gradient norm
    o.layer_decay = None  # factor per layer below the head, for fine-tuning
    o.lr_mult = ()  # ((regex, factor), ...): factors of all matching regexes multiply
    o.freeze = ()  # regexes: no update, no decay, no moments

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
    e.pictures = True  # reconstructions in the workdir
    e.num_pictures = 8

    c.nonfinite = ml_collections.ConfigDict(dict(in_a_row=3, total=10))  # skipped steps tolerated
    c.init_from = None  # start from these weights, at step 0 (checkpoint or torch file)
    c.resume_from = None  # continue another run: weights, moments and step
    c.compile_cache = True  # keep compiled programs on disk
    return c


def folder():
    """Folder of the recipes: `configs/` of a clone, or `ssl_jax/configs` of an installed wheel."""
    package = pathlib.Path(__file__).resolve().parent
    inside = package / 'configs'
    return inside if inside.is_dir() else package.parent / 'configs'


def recipes():
    """Sorted names that `load` accepts."""
    return sorted(p.stem for p in folder().glob('*.py') if not p.stem.startswith('_'))


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
    path = pathlib.Path(name)
    if path.suffix != '.py':
        path = folder() / f'{name}.py'
        if not path.exists():
            raise ValueError(f"There is no recipe '{name}'{_nearest(name, recipes())}.")
    if not path.exists():
        raise ValueError(f"There is no recipe file '{path}': give a path or one of {recipes()}.")
    loader = importlib.util.spec_from_file_location(f'ssl_jax_recipe_{path.stem}', path)
    module = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(module)
    config = module.get_config(arg)
    for override in overrides:
        set_value(config, override)
    _fill_size(config)
    if not config.infer:
        validate(config)
    return lock(config)


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
            raise ValueError(f"There is no field '{name}'{_nearest(name, flatten(config))}.")
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
    value = _literal(text)
    with config.ignore_type():
        if len(keys) == 2:
            config.data[keys[1]] = value
        else:
            if not isinstance(config.data[keys[1]], ml_collections.ConfigDict):
                config.data[keys[1]] = ml_collections.ConfigDict()
            config.data[keys[1]]['.'.join(keys[2:])] = value


def _has(parent, key):
    return isinstance(parent, ml_collections.ConfigDict) and key in parent


def _siblings(key, parent):
    """Fields that setting `key` clears: other units of a duration; the widths for a size."""
    if key == 'size' and 'embed_dim' in parent:
        return [k for k in ('embed_dim', 'depth', 'num_heads') if k in parent]
    prefix, _, unit = key.rpartition('_')
    if unit not in UNITS:
        return []
    return [f'{prefix}_{u}' for u in UNITS if u != unit and f'{prefix}_{u}' in parent]


def _nearest(name, names):
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.0)
    return f": did you mean '{close[0]}'?" if close else ''


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
    if kind is int and number and value == int(value):  # 1e6 is an int too
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
    """Converts a duration of any unit to optimizer steps.

    Vocabulary: a step is one optimizer update, an example one image seen (`batch_size` per step,
    all devices and micro-batches together), an epoch `num_examples` examples. Batches run across
    the borders of epochs, so E epochs are round(E * num_examples / batch_size) steps.

    Args:
        prefix: 'total', 'warmup' or 'every': the fields `{prefix}_steps`, `_epochs`, `_examples`.
        config: the `ConfigDict` (or sub-dict, e.g. `config.eval`) that has them.
        num_examples: images in the training set; needed for epochs only.
        batch_size: images per step; needed for epochs and examples.
        default: returned if no unit is set; without one that is an error.

    Returns:
        int, at least 1 for a positive duration.
    """
    found = {u: config.get(f'{prefix}_{u}') for u in UNITS}
    found = {u: v for u, v in found.items() if v is not None}
    names = ', '.join(f'{prefix}_{u}' for u in UNITS)
    if len(found) > 1:
        both = ' and '.join(f'{prefix}_{u}={v}' for u, v in found.items())
        raise ValueError(f'{both} contradict each other: set one of {names}, the rest to None.')
    if not found:
        if default is None:
            raise ValueError(f'None of {names} is set: set one, for example {prefix}_steps=1000.')
        return default
    (unit, value), = found.items()
    if value < 0:
        raise ValueError(f'{prefix}_{unit}={value} is negative: durations start at 0.')
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


def _fill_size(config):
    """Sets method.embed_dim, depth and num_heads from method.size where they are None."""
    m = config.method
    if m.get('size') is None:
        return
    from ssl_jax.models import vit  # here, for it imports jax and flax

    if m.size not in vit.SIZES:
        raise ValueError(f"method.size='{m.size}' is unknown: use one of {', '.join(vit.SIZES)}.")
    for key, value in zip(('embed_dim', 'depth', 'num_heads'), vit.SIZES[m.size]):
        if key in m and m[key] is None:
            m[key] = value


def validate(config):
    """Checks fields against each other; raises ValueError with one sentence for the first error.

    Method fields are checked where the method has them.
    """
    for message in _errors(config):
        raise ValueError(message)


def _errors(c):
    """Yields a sentence for each violated rule; later rules may rely on earlier ones."""
    m = c.method
    if c.batch_size is None or c.batch_size < 1 or c.accum_steps < 1:
        yield (
            f'batch_size={c.batch_size} and accum_steps={c.accum_steps} must be positive integers: '
            'set batch_size=256.'
        )
    if c.batch_size % c.accum_steps:
        yield (
            f'batch_size={c.batch_size} is not divisible by accum_steps={c.accum_steps}: '
            f'use batch_size={_near_multiple(c.batch_size, c.accum_steps)}.'
        )
    if c.dtype not in DTYPES:
        yield f"dtype='{c.dtype}' is unknown: use one of {', '.join(DTYPES)}."
    if c.remat not in REMATS:
        yield f"remat='{c.remat}' is unknown: use one of {', '.join(REMATS)}."
    if c.init_from and c.resume_from:
        yield (
            'init_from (weights only) and resume_from (weights, moments and step) are both set: '
            'set one of them to None.'
        )
    if sum(size == -1 for size in c.mesh.values()) > 1 or any(
        size != -1 and size < 1 for size in c.mesh.values()
    ):
        yield f'mesh={c.mesh.to_dict()} must have positive sizes and at most one -1 (the rest).'
    for prefix, sub, default in (('total', c, None), ('warmup', c, 0), ('every', c.eval, 0)):
        try:  # only units and signs matter here, the number of images does not
            steps(prefix, sub, num_examples=1, batch_size=1, default=default)
        except ValueError as error:
            yield str(error)
    for unit in UNITS:
        total, warmup = c[f'total_{unit}'], c[f'warmup_{unit}']
        if total and warmup and warmup >= total:
            yield f'warmup_{unit}={warmup} does not end before total_{unit}={total}: lower it.'
    for name in ('eval.knn_k', 'optim.no_decay', 'optim.freeze', 'optim.lr_mult'):
        group, key = name.split('.')
        if not isinstance(c[group][key], tuple):
            yield f"{name}={c[group][key]!r} must be a tuple, with a comma: ({c[group][key]!r},)."
    for name, low, high in RANGES:
        group, _, key = name.rpartition('.')
        parent = c[group] if group else c
        value = parent.get(key)
        if value is not None and not low <= value <= high:
            yield f'{name}={value} is out of range: use a value from {low} to {high}.'
    for key in ('crop_scale', 'crop_ratio'):
        if key in m and not (len(m[key]) == 2 and 0 < m[key][0] <= m[key][1]):
            yield f'method.{key}={m[key]} must be (low, high) with 0 < low <= high.'
    if m.get('crop_scale') and m.crop_scale[1] > 1:
        yield f'method.crop_scale={m.crop_scale} are fractions of the area: at most (.., 1.0).'
    yield from _shape_errors(m)


def _shape_errors(m):
    """Rules of the token grid and of the widths."""
    for key in ('size', 'embed_dim', 'depth', 'num_heads', 'patch_size', 'img_size'):
        if key in m and key != 'size' and m[key] is None:
            hint = "method.size='S'" if key in ('embed_dim', 'depth', 'num_heads') else 'a number'
            yield f'method.{key} is None: set it, or use {hint}.'
    if 'patch_size' in m and 'img_size' in m:
        if m.img_size % m.patch_size:
            yield (
                f'method.img_size={m.img_size} is not a multiple of method.patch_size='
                f'{m.patch_size}: use img_size={_near_multiple(m.img_size, m.patch_size)}.'
            )
        side = m.img_size // m.patch_size
        grid = m.get('mask_grid') or 1
        if side % grid:
            divisors = [g for g in range(1, side + 1) if side % g == 0]
            yield (
                f'method.mask_grid={grid} does not divide the {side}x{side} token grid of '
                f'img_size={m.img_size} and patch_size={m.patch_size}: use one of {divisors}.'
            )
        if 'mask_ratio' in m and int((side // grid) ** 2 * (1 - m.mask_ratio)) < 1:
            yield (
                f'method.mask_ratio={m.mask_ratio} leaves none of the {(side // grid) ** 2} mask '
                'cells visible: lower mask_ratio, mask_grid or patch_size.'
            )
    for prefix in ('', 'decoder_'):
        dim, heads = m.get(f'{prefix}embed_dim'), m.get(f'{prefix}num_heads')
        if dim and heads and dim % heads:
            yield (
                f'method.{prefix}embed_dim={dim} is not divisible by method.{prefix}num_heads='
                f'{heads}: use {prefix}embed_dim={_near_multiple(dim, heads)}.'
            )
        if dim and m.get('pos_embed') == 'sincos' and dim % 4:
            yield (
                f'method.{prefix}embed_dim={dim} is not divisible by 4, which '
                f"pos_embed='sincos' needs: use {_near_multiple(dim, 4)} or pos_embed='learned'."
            )
    if m.get('pos_embed') not in (None, 'sincos', 'learned'):
        yield f"method.pos_embed='{m.pos_embed}' is unknown: use 'sincos' or 'learned'."


def _near_multiple(value, of):
    return max(round(value / of), 1) * of
