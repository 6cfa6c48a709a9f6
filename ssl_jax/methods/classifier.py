# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning: an encoder and a linear classifier learn from labelled images.

The head sees the mean of the patch tokens after the last block through a norm of its own (the
encoder's final norm is then unused), or the class tokens after the final norm.  Everything random
beside the crops happens here, on the device: flip, RandAugment, erasing, mixup or CutMix, and
stochastic depth.

Reference: MAE `models_vit.py`, `engine_finetune.py`; BEiT `modeling_finetune.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ssl_jax.augment import mixup as mixup_lib
from ssl_jax.augment import photometry, randaugment
from ssl_jax.data import view as view_lib
from ssl_jax.models import blocks
from ssl_jax.models import vit as vit_lib
from ssl_jax.objectives import losses


def head_init(key, shape, dtype=jnp.float32):
    """N(0, 2e-5): logits start at almost 0 (MAE `main_finetune.py`; BEiT scales 0.02 by 0.001)."""
    return 2e-5 * jax.random.truncated_normal(key, -2.0, 2.0, shape, dtype)


@dataclasses.dataclass(frozen=True)
class Classifier:
    """The method; see `ssl_jax.methods` for the contract and `config_finetune` for the fields."""

    vit: vit_lib.ViT
    num_classes: int
    pool: str = 'patch'
    ema_decay: float | None = None
    crop_pct: float = 0.875
    mean: tuple = photometry.MEAN
    std: tuple = photometry.STD
    crop_scale: tuple = (0.08, 1.0)
    crop_ratio: tuple = (3 / 4, 4 / 3)
    flip: float = 0.5
    repeats: int = 1
    randaugment_layers: int = 2
    randaugment_prob: float = 0.5
    randaugment_magnitude: float = 9.0
    randaugment_std: float = 0.5
    erase_prob: float = 0.25
    mixup: float = 0.8
    cutmix: float = 1.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    label_smoothing: float = 0.1
    labels: bool = True  # batches carry them
    classes: tuple = ()  # their names

    @property
    def head(self):
        return blocks.Dense(self.num_classes, self.vit.dtype, head_init)

    def views(self):
        return (
            view_lib.View('image', self.vit.img_size, scale=self.crop_scale, ratio=self.crop_ratio),
        )

    def init(self, rng):
        enc_rng, head_rng = jax.random.split(rng)
        tokens = jnp.zeros((1, self.vit.embed_dim))
        params = {
            'encoder': vit_lib.init_params(self.vit, enc_rng),
            'head': self.head.init(head_rng, tokens)['params'],
        }
        if self.pool == 'patch':
            params['fc_norm'] = blocks.LayerNorm(self.vit.eps).init(head_rng, tokens)['params']
        # Not the same buffers: what is donated may not be there twice.
        extra = {} if self.ema_decay is None else {'ema': jax.tree.map(jnp.copy, params)}
        return params, extra

    def features(self, params, images, drop_keys=None):
        """Normalised images (B, H, W, 3) -> what the head sees, (B, D) float32."""
        out = self.vit.apply({'params': params['encoder']}, images, drop_keys=drop_keys)
        if self.pool == 'cls':
            return out['cls_tokens'].astype(jnp.float32).mean(axis=1)
        first = self.vit.num_cls_tokens + self.vit.num_register_tokens
        pooled = out['pre_norm'][:, first:].astype(jnp.float32).mean(axis=1)
        return blocks.LayerNorm(self.vit.eps).apply({'params': params['fc_norm']}, pooled)

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

    def see(self, batch, rng):
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
                std=self.randaugment_std,
                prob=self.randaugment_prob,
                mean=self.mean,
            )
        images = photometry.normalize(images, self.mean, self.std)
        if self.erase_prob:
            images = randaugment.erase(erase_keys, images, self.erase_prob)
        # Micro-batches differ in their first row.
        mix_rng = jax.random.fold_in(mix_rng, rows[0])
        prob = self.mixup_prob if self.mixup or self.cutmix else 0.0
        mix = mixup_lib.draw(
            mix_rng, images.shape[1:3], self.mixup, self.cutmix, prob, self.mixup_switch_prob
        )
        targets = mixup_lib.targets(batch['label'], self.num_classes, mix, self.label_smoothing)
        return (mixup_lib.images(images, mix) if prob else images), targets

    def loss(self, params, extra, batch, rng, step):
        del step
        see_rng, drop_rng = jax.random.split(rng)
        images, targets = self.see(batch, see_rng)
        drop_keys = photometry.sample_keys(drop_rng, batch['row'])
        logits = self.forward(params, images, drop_keys)
        loss = losses.cross_entropy(targets, logits, 1.0).mean()
        # Of mixed images: how often the answer is the class of which there is most.
        hits = logits.argmax(axis=-1) == targets.argmax(axis=-1)
        return loss, (extra, {'train_acc': hits.mean()})

    def after_update(self, params, extra, step):
        """ema <- d ema + (1 - d) params."""
        del step
        if self.ema_decay is None:
            return extra
        d = self.ema_decay
        return {'ema': jax.tree.map(lambda e, p: d * e + (1 - d) * p, extra['ema'], params)}

    def backbone(self, params, extra):
        del extra
        return self.vit, params['encoder']

    def with_backbone(self, params, extra, encoder):
        if 'ema' in extra:
            extra = {'ema': {**extra['ema'], 'encoder': encoder}}
        return {**params, 'encoder': encoder}, extra

    def flops(self, batch_size):
        vit = self.vit
        n = (vit.img_size // vit.patch_size) ** 2
        tokens = n + vit.num_cls_tokens + vit.num_register_tokens
        total = vit_lib.flops_per_image(vit.embed_dim, vit.depth, tokens, vit.mlp_ratio)
        total += 2 * n * 3 * vit.patch_size**2 * vit.embed_dim
        return 3 * batch_size * (total + 2 * vit.embed_dim * self.num_classes)


def complete(config, source):
    """The config with the classes of the training images, and a line on them for the log.

    Raises:
      ValueError: if the images have no labels, or not as many classes as the config says.
    """
    names, m = tuple(source.classes or ()), config.method
    if not names or 'label' not in source[0]:
        raise ValueError(
            f'The training images ({source.describe(0)} is the first) have no labels: put them in '
            f'one folder per class, or use `ssl_jax pretrain`, which needs none.'
        )
    if len(names) < 2:
        raise ValueError(f'The training images are all of one class ({names[0]}): give several.')
    if m.num_classes not in (None, len(names)):
        raise ValueError(
            f'The training images are of {len(names)} classes, method.num_classes is '
            f'{m.num_classes}: set method.num_classes=None.'
        )
    with config.unlocked(), m.ignore_type():
        m.num_classes, m.classes = len(names), names
    shown = ', '.join(names[:10]) + (', ...' if len(names) > 10 else '')
    lines = [f'classes   {len(names)}: {shown}']
    if not config.data.eval_test:
        lines.append('test      no images: accuracy is not measured; give --test LABELLED')
    return config, lines


def from_config(config, clock=None):
    """Builds the method from `config.method`, `config.dtype` and `config.remat`."""
    del clock  # nothing here changes from step to step
    m = config.method
    dim, depth, heads = vit_lib.SIZES[m.size] if m.size else (None, None, None)
    vit = vit_lib.ViT(
        embed_dim=m.embed_dim or dim,
        depth=m.depth or depth,
        num_heads=m.num_heads or heads,
        **{k: m[k] for k in VIT_FIELDS},
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
    )
    fields = {f.name for f in dataclasses.fields(Classifier)} - {'vit', 'labels'}
    fields = {k: _frozen(m[k]) for k in fields}
    fields['num_classes'] = m.num_classes or 1000  # a run has asked its images, see `complete`
    return Classifier(vit=vit, **fields)


VIT_FIELDS = (
    *('patch_size', 'img_size', 'num_cls_tokens', 'num_register_tokens', 'mlp_ratio', 'pos_embed'),
    *('pos_resize', 'rel_pos', 'key_bias', 'ffn', 'layer_scale', 'eps', 'init_scheme', 'drop_path'),
)


def _frozen(value):
    return tuple(value) if isinstance(value, (list, tuple)) else value
