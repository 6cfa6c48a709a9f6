# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning: an encoder and a linear classifier learn from labelled images.

The input of the head is the mean of the patch tokens after the last block through a new norm (the
encoder's final norm is unused), or the class tokens after the final norm. Flip, RandAugment,
erasing, mixup or CutMix and stochastic depth run on the device.

References:
  MAE `models_vit.py`, `engine_finetune.py`; BEiT `modeling_finetune.py`.
"""

import dataclasses
import functools
import math
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from ssl_jax import fields
from ssl_jax.augment import mixup as mixup_lib
from ssl_jax.augment import photometry, randaugment
from ssl_jax.data import sources
from ssl_jax.methods import base
from ssl_jax.models import blocks as blocks_lib
from ssl_jax.models import vit as vit_lib
from ssl_jax.objectives import losses
from ssl_jax.run import errors

# Fields taken from the model that is fine-tuned.
FOLLOWED = (
    *('embed_dim', 'depth', 'num_heads', 'patch_size', 'num_cls_tokens', 'num_register_tokens'),
    *('mlp_ratio', 'pos_embed', 'pos_resize', 'rel_pos', 'key_bias', 'ffn', 'layer_scale', 'eps'),
    'init_scheme',
)
NEW_NAMES = {'sincos': 'learned', 'shared': 'layer'}  # positions, in fine-tuning


def head_init(key, shape, dtype=jnp.float32):
    """N(0, 2e-5): logits start at almost 0 (MAE `main_finetune.py`; BEiT scales 0.02 by 0.001)."""
    return 2e-5 * jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype)


@dataclasses.dataclass(frozen=True)
class Classifier(base.OneView):
    """Fine-tuning; the defaults are those of MAE's ViT-B, its encoder from scratch.

    With `init_from` the fields of the encoder come from that model, see `follow`.
    """

    labels = True
    follows = True
    lr_at_1024 = None
    max_epochs = (100, 'fine-tuning is short')
    removed = {
        'crop_ratio': (3 / 4, 4 / 3),
        'mixup_prob': 1.0,
        'mixup_switch_prob': 0.5,
        'randaugment_prob': 0.5,
        'randaugment_std': 0.5,
    }

    # Outputs of the head; None: the number of classes of the training images (unread: 1000).
    num_classes: Annotated[int | None, fields.Range(2, 2**24)] = None
    classes: tuple = ()  # class names, set by the run
    # Input of the head: mean of the patch tokens through a new norm, or the class token.
    pool: Literal['patch', 'cls'] = 'patch'
    # Decay per step of a moving average of the weights, evaluated too; None: none.
    ema_decay: Annotated[float | None, fields.Range(0.0, 1.0)] = None
    # Share of the short side in the central crop of test images. These four are those of the model
    # that is fine-tuned where its folder states them, see `data.transform`.
    crop_pct: Annotated[float | None, fields.Range(0.1, 10.0)] = 0.875
    crop_mode: Literal['center', 'squash', 'border', 'none'] = 'center'
    interpolation: Literal['nearest', 'lanczos', 'bilinear', 'bicubic', 'box', 'hamming'] = (
        'bicubic'
    )
    library: Literal['transformers', 'timm', 'torchvision'] = 'transformers'

    size: vit_lib.Size | None = 'B'
    num_cls_tokens: Annotated[int, fields.Range(0, 64)] = 1
    num_register_tokens: Annotated[int, fields.Range(0, 64)] = 0
    # 'learned' also after pretraining with the fixed table, which initializes it.
    pos_embed: Literal['learned', 'sincos', 'rope', 'none'] = 'learned'
    pos_resize: Literal['bicubic', 'offset', 'antialias'] = 'bicubic'  # to img_size, of a table
    rel_pos: Literal['layer', 'shared'] | None = None  # biases by relative position (BEiT)
    key_bias: bool = True  # False: keys without bias (BEiT, DINOv3)
    ffn: Literal['mlp', 'swiglu'] = 'mlp'
    layer_scale: float | None = None  # initial factor of each residual branch; None: none
    # Initializers, where no model is given.
    init_scheme: Literal['mae', 'dinov2', 'dinov3', 'beit'] = 'mae'
    mean: tuple = photometry.MEAN  # of the channels, for values in [0, 1]
    std: tuple = photometry.STD
    drop_path: Annotated[float, fields.Range(0.0, 0.999)] = 0.1

    crop_scale: tuple = (0.08, 1.0)
    # Crops per image in a batch, all counted by batch_size (Hoffer et al., arXiv 1901.09335).
    repeats: Annotated[int, fields.Range(1, 64)] = 1
    randaugment_layers: Annotated[int, fields.Range(0, 16)] = 2  # operations in a row; 0: none
    randaugment_magnitude: Annotated[float, fields.Range(0.0, 10.0)] = 9.0  # of 10
    erase_prob: fields.Probability = 0.25  # probability of a rectangle of noise
    mixup: Annotated[float, fields.Range(0.0, 100.0)] = 0.8  # alpha of Beta(alpha, alpha); 0: none
    cutmix: Annotated[float, fields.Range(0.0, 100.0)] = 1.0
    label_smoothing: Annotated[float, fields.Range(0.0, 0.999)] = 0.1

    def check(self, run):
        yield from super().check(run)
        if self.crop_pct is None:
            yield 'method.crop_pct is None: set it, such as crop_pct=0.875.'
        if self.pool == 'cls' and not self.num_cls_tokens:
            yield "method.pool='cls' needs a class token, this encoder has none: set pool='patch'."
        if self.pos_embed == 'none' and not self.rel_pos:
            yield "method.pos_embed='none' has no positions: use 'learned' or 'sincos'."
        if self.rel_pos and (self.num_cls_tokens != 1 or self.num_register_tokens):
            yield (
                'method.rel_pos knows one class token and no registers: set '
                'method.num_cls_tokens=1 and num_register_tokens=0.'
            )
        yield from base.sincos(self, 'embed_dim')

    def infer(self, facts, choose):
        size, _ = self.infer_crop(facts, choose)
        why = 'share of the short side that is tested'
        choose('crop_pct', 1.0 if facts.short_side * 0.875 < size else 0.875, why)
        self.infer_encoder(facts, choose)

    def follow(self, opened, fixed):
        """Encoder fields and image size of the model that is fine-tuned.

        Raises:
          UserError: a field of `fixed` contradicts the model.
        """
        vit, view = opened.vit, opened.transform
        found = {name: getattr(vit, name) for name in FOLLOWED}
        found |= {
            name: NEW_NAMES.get(found[name], found[name]) for name in ('pos_embed', 'rel_pos')
        }
        found |= {name: tuple(map(float, view[name])) for name in ('mean', 'std')}
        cut = {}
        if opened.stated and view['library'] != 'torchvision':  # stated by its folder
            cut = {'crop_pct': view['crop'], 'crop_mode': view['mode']}
            cut |= {name: view[name] for name in ('interpolation', 'library')}
        values = {name: getattr(self, name) for name in found}
        if 'size' in fixed:  # the widths that it stands for
            names = ('embed_dim', 'depth', 'num_heads')
            fixed = {*fixed, *names}
            values |= dict(zip(names, vit_lib.SIZES.get(self.size, ()), strict=False))
        for name, value in found.items():
            same = values[name] == value
            if isinstance(value, float) and values[name] is not None:
                same = math.isclose(values[name], value)
            if name in fixed and not same and name != 'layer_scale':
                raise errors.UserError(
                    f'method.{name}={values[name]} contradicts the model {opened.path}, where it '
                    f'is {value}: leave it out, or train from scratch with --model none.'
                )
        if 'img_size' not in fixed:
            found['img_size'] = int(view['size'])
        return {**found, **{k: v for k, v in cut.items() if k not in fixed}, 'size': None}

    def complete(self, source):
        """The classes of the training images.

        Raises:
          UserError: the images have no labels, or not as many classes as `num_classes`.
        """
        names = tuple(source.classes or ())
        if not names:
            raise errors.UserError(
                f'The training images ({source.describe(0)} is the first) have no labels: put them '
                f'in one folder per class, or use `ssl_jax pretrain`, which needs none.'
            )
        sources.check_labels(source)
        if len(names) < 2:
            raise errors.UserError(
                f'The training images are all of one class ({names[0]}): give several.'
            )
        if self.num_classes not in (None, len(names)):
            raise errors.UserError(
                f'The training images are of {len(names)} classes, method.num_classes is '
                f'{self.num_classes}: set method.num_classes=None.'
            )
        if self.classes and tuple(self.classes) != names:
            odd = sorted({*self.classes} ^ {*names})[:10]
            raise errors.UserError(
                f'The training images have other classes than this run began with ({", ".join(odd)}'
                f'{" on one side only" if odd else ", in another order"}): give a new --workdir.'
            )
        shown = ', '.join(names[:10]) + (', ...' if len(names) > 10 else '')
        lines = [f'classes   {len(names)}: {shown}']
        return {'num_classes': len(names), 'classes': names}, lines

    @functools.cached_property
    def vit(self):
        names = (
            *('num_cls_tokens', 'num_register_tokens', 'pos_embed', 'pos_resize', 'rel_pos'),
            *('key_bias', 'ffn', 'layer_scale', 'init_scheme'),
        )
        return self.encoder(**{name: getattr(self, name) for name in names})

    @property
    def outputs(self):
        """Number of classes; a run reads it from its images, see `complete`."""
        return self.num_classes or 1000

    @property
    def head(self):
        return blocks_lib.Dense(self.outputs, self.vit.dtype, head_init)

    def init(self, rng):
        enc_rng, head_rng = jax.random.split(rng)
        tokens = jnp.zeros((1, self.vit.embed_dim))
        params = {
            'encoder': vit_lib.init_params(self.vit, enc_rng),
            'head': self.head.init(head_rng, tokens)['params'],
        }
        if self.pool == 'patch':
            params['fc_norm'] = blocks_lib.LayerNorm(self.vit.eps).init(head_rng, tokens)['params']
        # A copy, since a donated buffer may appear only once.
        extra = {} if self.ema_decay is None else {'ema': jax.tree.map(jnp.copy, params)}
        return params, extra

    def features(self, params, images, drop_keys=None):
        """Normalised images (B, H, W, 3) -> input of the head, (B, D) float32."""
        out = self.vit.apply({'params': params['encoder']}, images, drop_keys=drop_keys)
        if self.pool == 'cls':
            return out['cls_tokens'].astype(jnp.float32).mean(axis=1)
        first = self.vit.num_cls_tokens + self.vit.num_register_tokens
        pooled = out['pre_norm'][:, first:].astype(jnp.float32).mean(axis=1)
        return blocks_lib.LayerNorm(self.vit.eps).apply({'params': params['fc_norm']}, pooled)

    def forward(self, params, images, drop_keys=None):
        """Normalised images (B, H, W, 3) -> logits (B, K) float32."""
        x = self.features(params, images, drop_keys)
        return self.head.apply({'params': params['head']}, x).astype(jnp.float32)

    def logits(self, params, extra, images):
        """uint8 images (B, H, W, 3) -> {name: logits (B, K)}: 'test', and 'ema' of the average."""
        x = photometry.normalize(images, self.mean, self.std)
        out = {'test': self.forward(params, x)}
        if 'ema' in extra:
            out['ema'] = self.forward(extra['ema'], x)
        return out

    def augment(self, batch, rng):
        """A batch of crops -> (normalised, augmented and mixed images, targets (B, K))."""
        *rngs, mix_rng = jax.random.split(rng, 4)
        rows, images = batch['row'], batch['image'][:, 0]
        flip_keys, op_keys, erase_keys = (photometry.sample_keys(k, rows) for k in rngs)
        images = photometry.random_flip(flip_keys, images, self.flip)
        if self.randaugment_layers:
            images = randaugment.rand_augment(
                op_keys,
                images,
                layers=self.randaugment_layers,
                magnitude=self.randaugment_magnitude,
                mean=self.mean,
            )
        images = photometry.normalize(images, self.mean, self.std)
        if self.erase_prob:
            images = randaugment.erase(erase_keys, images, self.erase_prob)
        # Micro-batches have different first rows.
        mix_rng = jax.random.fold_in(mix_rng, rows[0])
        mix = mixup_lib.draw(mix_rng, images.shape[1:3], self.mixup, self.cutmix)
        targets = mixup_lib.targets(batch['label'], self.outputs, mix, self.label_smoothing)
        mixed = self.mixup or self.cutmix
        return (mixup_lib.images(images, mix) if mixed else images), targets

    def loss(self, params, extra, batch, rng, step):
        del step
        augment_rng, drop_rng = jax.random.split(rng)
        images, targets = self.augment(batch, augment_rng)
        drop_keys = photometry.sample_keys(drop_rng, batch['row'])
        logits = self.forward(params, images, drop_keys)
        loss = losses.cross_entropy(targets, logits, 1.0).mean()
        # Of mixed images: whether the prediction is the class with the largest share.
        hits = logits.argmax(axis=-1) == targets.argmax(axis=-1)
        return loss, ({}, {'train_acc': hits.mean()})

    def after_update(self, params, extra, step):
        """ema <- d ema + (1 - d) params."""
        del step
        if self.ema_decay is None:
            return extra
        d = self.ema_decay
        return {'ema': jax.tree.map(lambda e, p: d * e + (1 - d) * p, extra['ema'], params)}

    def networks(self, params, extra):
        networks = super().networks(params, extra)
        return {**networks, 'head': (self.head, params['head'])}

    def with_networks(self, params, extra, found):
        if 'ema' in extra:
            extra = {'ema': {**extra['ema'], **found}}
        return {**params, **found}, extra

    def flops(self, batch_size):
        vit = self.vit
        n = (vit.img_size // vit.patch_size) ** 2
        tokens = n + vit.num_cls_tokens + vit.num_register_tokens
        total = vit_lib.flops_per_image(vit.embed_dim, vit.depth, tokens, vit.mlp_ratio)
        total += 2 * n * 3 * vit.patch_size**2 * vit.embed_dim
        return 3 * batch_size * (total + 2 * vit.embed_dim * self.outputs)


METHOD = Classifier
