# SPDX-License-Identifier: Apache-2.0
"""The `method` fields of fine-tuning, for recipes and for `config.load`; the model they follow."""

import math

import ml_collections

# Recipes of `ssl_jax finetune --recipe`.
RECIPES = {
    'mae': 'finetune_mae_vitb16',
    'beit': 'finetune_beit_vitb16',
    'splitmask': 'finetune_splitmask_vitb16',
    None: 'finetune_images',
}
# Fields that are those of the model that is fine-tuned.
FOLLOWED = (
    *('embed_dim', 'depth', 'num_heads', 'patch_size', 'num_cls_tokens', 'num_register_tokens'),
    *('mlp_ratio', 'pos_embed', 'pos_resize', 'rel_pos', 'key_bias', 'ffn', 'layer_scale', 'eps'),
    *('init_scheme', 'mean', 'std'),
)


def classifier():
    """An unlocked `ConfigDict` with the values of MAE's ViT-B; the encoder is from scratch.

    With `init_from` the fields of the encoder are those of that model, see `follow`.
    """
    m = ml_collections.ConfigDict()
    m.name = 'classifier'
    m.num_classes = None  # outputs of the head; None: as many as data.train has (unread: 1000)
    m.classes = ()  # their names, written by the run
    m.pool = 'patch'  # what the head sees: mean of the 'patch' tokens, then a fresh norm; or 'cls'
    m.ema_decay = None  # per step, of an average of the weights that is evaluated too; None: none
    m.crop_pct = 0.875  # test images: share of the short side that the central crop shows

    m.size = 'B'  # key of models.vit.SIZES, fills the next three where they are None
    m.embed_dim = None  # encoder width, channels
    m.depth = None  # encoder blocks
    m.num_heads = None
    m.patch_size = 16  # pixels
    m.img_size = 224  # pixels, height and width of a crop; position tables are resized to it
    m.num_cls_tokens = 1
    m.num_register_tokens = 0
    m.mlp_ratio = 4.0  # hidden width of the MLP / embed_dim
    m.pos_embed = 'learned'  # also where pretraining had the fixed table, which is the start
    m.pos_resize = 'bicubic'  # how a table is resized, see models.pos_embed
    m.rel_pos = None  # biases by relative position, a table per 'layer' (BEiT), or None
    m.key_bias = True  # False: keys without bias (BEiT)
    m.ffn = 'mlp'  # or 'swiglu'
    m.layer_scale = None  # start of the factor on each residual branch; None: none
    m.eps = 1e-6  # of the norms
    m.init_scheme = 'mae'  # start of what no model gives, see models.vit
    m.mean = (0.485, 0.456, 0.406)  # of the channels, for values in [0, 1]
    m.std = (0.229, 0.224, 0.225)
    m.drop_path = 0.1  # stochastic depth of the last encoder block; linear from 0 at the first

    m.crop_scale = (0.08, 1.0)  # RandomResizedCrop: fraction of the image's area
    m.crop_ratio = (3 / 4, 4 / 3)  # RandomResizedCrop: width / height
    m.flip = 0.5  # probability of a horizontal flip
    m.repeats = 1  # crops of each image in a batch, batch_size counts them all (Hoffer et al.)
    m.randaugment_layers = 2  # operations in a row, see ssl_jax.randaugment; 0: none
    m.randaugment_prob = 0.5  # of each
    m.randaugment_magnitude = 9.0  # of 10
    m.randaugment_std = 0.5  # of the magnitude
    m.erase_prob = 0.25  # probability that a rectangle becomes noise
    m.mixup = 0.8  # alpha of Beta(alpha, alpha); 0: no mixup
    m.cutmix = 1.0
    m.mixup_prob = 1.0  # probability that a batch is mixed at all
    m.mixup_switch_prob = 0.5  # probability of CutMix where both are on
    m.label_smoothing = 0.1
    return m


def optim(o):
    """MAE's optimizer of fine-tuning, in place in `config.optim`; ViT-B of the repository."""
    o.base_lr, o.scale_batch = 5e-4, 256
    o.min_lr = 1e-6
    o.b2 = 0.999
    o.weight_decay = 0.05
    o.no_decay = ('pos_embed$', 'cls_token$')
    o.layer_decay = 0.65


def beit(m):
    """The encoder of BEiT's base model, for training from scratch, in place."""
    m.pos_embed, m.rel_pos, m.key_bias = 'none', 'layer', False
    m.init_scheme = 'beit'
    with m.ignore_type():
        m.layer_scale = 0.1


def plain(m):
    """No regularisation but crops and flips, in place."""
    m.update(randaugment_layers=0, erase_prob=0.0, mixup=0.0, cutmix=0.0, label_smoothing=0.0)
    m.drop_path = 0.0


def follow(config, overrides=()):
    """Gives `config.method` the encoder of the model `config.init_from`, in place.

    The image size is the model's too, unless an override sets it.

    Args:
      overrides: strings 'a.b=value' of the user; one that contradicts the model is an error.
    """
    from ssl_jax.interop import load  # here, for it imports jax
    from ssl_jax.models import vit as vit_lib

    m, path = config.method, config.init_from
    loaded = load.load_backbone(path)
    given = {o.partition('=')[0].strip().removeprefix('config.') for o in overrides}
    theirs = {k: getattr(loaded.vit, k) for k in FOLLOWED if k not in ('mean', 'std')}
    theirs.update({k: tuple(map(float, loaded.transform[k])) for k in ('mean', 'std')})
    if theirs['pos_embed'] == 'sincos':
        theirs['pos_embed'] = 'learned'
    if theirs['rel_pos'] == 'shared':
        theirs['rel_pos'] = 'layer'
    if 'method.size' in given:  # the widths that it stands for
        given |= {'method.embed_dim', 'method.depth', 'method.num_heads'}
        widths = vit_lib.SIZES.get(m.size, ())
        m.update(dict(zip(('embed_dim', 'depth', 'num_heads'), widths)))
    for name, value in theirs.items():
        same = m[name] == value
        if isinstance(value, float) and m[name] is not None:
            same = math.isclose(m[name], value)
        if f'method.{name}' in given and not same and name != 'layer_scale':
            raise ValueError(
                f'method.{name}={m[name]} contradicts the model {path}, where it is {value}: '
                f'leave it out, or train from scratch with --model none.'
            )
    with config.unlocked(), m.ignore_type():
        m.update(theirs, size=None)
        if 'method.img_size' not in given:
            m.img_size = int(loaded.transform['size'])


def command(model, data=None, test=None, recipe=None, config=None):
    """(recipe, overrides) of `ssl_jax finetune` with these arguments."""
    if recipe and config:
        raise ValueError(f'--recipe {recipe} and --config {config} are both recipes: give one.')
    if recipe not in RECIPES:
        known = ', '.join(name for name in RECIPES if name)
        raise ValueError(f"--recipe '{recipe}' is unknown: use one of {known}.")
    if not data and not config and not recipe:
        raise ValueError('give --data LABELLED (your images) or --config RECIPE.')
    # From scratch the lower layers have as much to learn as the upper ones.
    fields = ['optim.layer_decay=None'] if model == 'none' else [f'init_from={model}']
    if data:
        fields += [f'data.train={data}', f'data.eval_test={test}', 'method.num_classes=None']
    elif test:
        fields += [f'data.eval_test={test}']
    return config or RECIPES[recipe], fields
