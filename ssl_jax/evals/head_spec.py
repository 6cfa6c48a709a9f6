# SPDX-License-Identifier: Apache-2.0
"""Heads for dense prediction as the official codes build, feed and train them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from ssl_jax.augment import photometry
from ssl_jax.models import dense
from ssl_jax.models import vit as vit_lib
from ssl_jax.objectives import dense as losses


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How an official code feeds, trains and tests a head.

    The rate of step s of T is lr times a decay over all steps, 'poly' (1 - s/T)^power or 'cosine',
    times a linear warm-up from `warmup_from`.
    """

    blocks: str  # 'last', 'four' (the last four) or 'spread' (four over the depth)
    normed: bool  # whether their outputs go through the final norm
    lr: float
    weight_decay: float
    decay: str = 'poly'
    power: float = 1.0
    warmup: float = 0.0  # share of the steps
    warmup_from: float = 0.0  # share of the rate
    pixio: bool = False  # schedule, loss and windows of Pixio; otherwise of mmcv, used by DINOv2
    clip: float | None = None  # largest norm of the gradient
    stride: float | None = 2 / 3  # of test windows, in crops; None: whole images
    flip: bool = False  # whether the mirrored test image is averaged in


_SEG = Recipe('last', True, 1e-3, 1e-4, warmup=1500 / 40000, warmup_from=1e-6, stride=341 / 512)
_DEPTH = Recipe(
    'last', False, 1e-4, 1e-2, 'cosine', warmup=12800 / 38400, warmup_from=1e-3,
    clip=35.0, stride=None, flip=True,
)  # fmt: skip
_PIXIO = Recipe('last', True, 2e-4, 1e-2, power=0.9, pixio=True)
_change = dataclasses.replace
RECIPES = {
    ('seg_head', 'linear'): _SEG,
    ('seg_head', 'linear4'): _change(_SEG, blocks='four', stride=320 / 640),
    ('seg_head', 'pixio_linear'): _PIXIO,
    ('seg_head', 'pixio_dpt'): _change(_PIXIO, blocks='spread', lr=1e-4),
    ('depth', 'linear'): _DEPTH,
    ('depth', 'linear4'): _change(_DEPTH, blocks='spread'),
    ('depth', 'dpt'): _change(_DEPTH, blocks='spread'),
    ('depth', 'pixio_linear'): _change(_PIXIO, warmup=0.1),
    ('depth', 'pixio_dpt'): _change(_PIXIO, blocks='spread', lr=1e-4, warmup=0.1),
}


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a trained head depends on besides the encoder and the images."""

    task: str  # 'seg_head' or 'depth'
    head: str
    crop: tuple[int, int]  # of training; the first is the side of test windows
    steps: int
    batch_size: int
    lr: float
    seed: int = 0
    names: tuple = ()  # of the classes
    min_depth: float = 0.0
    max_depth: float = 0.0
    fixed: str = ''  # see `pairs.Crop`
    ratio: tuple[float, float] = (1.0, 1.0)  # of sizes that training images are resized to ...
    base: int | None = None  # ... in multiples of this short side; test images have it
    gradient: float = 0.0  # weight of `losses.gradient_loss`
    channels: int = 256  # width of a DPT head
    unit: str = ''  # of depth, for pictures

    @property
    def recipe(self) -> Recipe:
        return RECIPES[self.task, self.head]

    @property
    def map(self) -> str:
        """The map that is learned, by its name in the items of a source."""
        return 'segmentation' if self.task == 'seg_head' else 'depth'

    def module(self) -> Any:
        """The network, of `models.dense`."""
        depth = self.task == 'depth'
        outputs, top = (1, self.max_depth) if depth else (len(self.names), None)
        c = self.channels
        if self.head == 'pixio_linear':
            return dense.BNLinear(outputs, True, ('0', '1'), True, top)
        if self.head == 'pixio_dpt':
            return dense.PixioDPT(outputs, c, (c, 2 * c, 4 * c, 4 * c), top)
        if self.head == 'dpt':
            return dense.DPT(self.min_depth, c)
        if depth:
            return dense.DepthLinear(self.min_depth, self.max_depth)
        return dense.BNLinear(outputs)

    def rate(self, step: jax.Array) -> jax.Array:
        """Learning rate of a step, from 0."""
        r, total = self.recipe, self.steps
        s = step.astype(jnp.float32)
        warmup = r.warmup * total
        if r.pixio:  # sets the rate after the step: of the step before, and of the first in full
            s = jnp.maximum(s - 1, 0)
            left = jnp.clip(1 - (s - warmup) / max(total - warmup, 1), 0, 1)
            rate = jnp.where(s < warmup, s / max(warmup, 1), left**r.power)
            return self.lr * jnp.where(step == 0, 1.0, rate)
        left = jnp.clip(1 - s / total, 0, 1)
        rate = jnp.sin(jnp.pi / 2 * left) ** 2 if r.decay == 'cosine' else left**r.power
        start = jnp.clip(
            1 - s / max(warmup, 1e-9), 0, 1
        )  # 1 at the first step, 0 after the warm-up
        return self.lr * rate * (1 - start * (1 - r.warmup_from))

    def loss(self, out: jax.Array, batch: dict, step: jax.Array) -> jax.Array:
        """Loss of the head's output for a batch of `pairs.train_pairs`."""
        if self.task == 'seg_head':
            return losses.cross_entropy(out, batch['segmentation'])
        gt = batch['depth']
        if self.recipe.pixio:
            valid = losses.measured(gt, self.max_depth) & (gt >= self.min_depth)
            return losses.silog(jnp.maximum(out, self.min_depth), gt, valid)
        warm = step < min(100, self.steps // 10)
        loss = losses.sig_loss(out, gt, warm, self.max_depth)
        if self.gradient:
            fn = functools.partial(losses.gradient_loss, max_depth=self.max_depth)
            loss += self.gradient * jax.vmap(fn)(out, gt).mean()
        return loss

    def protocol(self) -> dict:
        """What a row says of the head."""
        values = dataclasses.asdict(self.recipe) | dataclasses.asdict(self)
        left_out = ['task', 'names', 'unit'] + ['channels'] * ('dpt' not in self.head)
        # What is off or has no meaning here is not said.
        values = {k: v for k, v in values.items() if v or k == 'seed'}
        values = {k: v for k, v in values.items() if k not in left_out}
        loss, windows = 'cross-entropy, 255 ignored', 'last shifted back'
        if self.task == 'depth':
            loss = 'SiLog' if self.recipe.pixio else 'SigLoss'
        if self.recipe.stride is None:
            windows = 'whole image'
        elif self.recipe.pixio:
            windows = 'not shifted back, zero-padded'
        return dict(
            values,
            loss=loss,
            optimizer='AdamW, betas 0.9 0.999, eps 1e-8',
            augmentation='crop, flip 0.5; no photometric distortion',
            resize='images bicubic, antialiased (Pillow), maps nearest',
            windows=windows,
        )


def numbers(recipe: Recipe, depth: int) -> tuple[int, ...]:
    """Blocks that a head sees, from 0, of an encoder with `depth`; see `Recipe`."""
    if recipe.blocks == 'last':
        return (depth - 1,)
    if recipe.blocks == 'four':
        return tuple(range(max(depth - 4, 0), depth))
    if recipe.pixio and depth >= 4:
        return tuple(depth // 4 * i - 1 for i in (1, 2, 3, 4))
    if depth == 24:  # DINOv2 of ViT-L
        return (4, 11, 17, 23)
    return tuple(-(-depth * i // 4) - 1 for i in (1, 2, 3, 4))


def taps(model: Any, images: jax.Array, recipe: Recipe) -> dense.Taps:
    """Input of a head from the encoder, see `models.dense`.

    Args:
      model: `encoder.Model` or `encoder.Pixels`.
      images: (B, H, W, 3), normalised, sides multiples of the patch size.
      recipe: of the head.
    """
    vit = getattr(model, 'vit', None)
    p = model.patch_size
    c, r = (vit.num_cls_tokens, vit.num_register_tokens) if vit else (0, 0)
    blocks = numbers(recipe, vit.depth if vit else 4)
    tokens = model(images, blocks=tuple(dict.fromkeys(blocks)))['blocks']
    grid = [side // p for side in images.shape[1:3]]
    out = []
    for block in blocks:
        x = tokens[block]
        if recipe.normed and vit and not vit.pooled_norm:
            x = vit_lib.final_norm(model.params, x, vit.eps)
        x = x.astype(jnp.float32)
        patch = x[:, c + r :].reshape(len(x), *grid, -1)
        out.append((patch, x[:, :c].mean(axis=1) if c else None))
    return out


def forward(model, spec, images):
    """Taps and size of images (B, H, W, 3), uint8 or normalised.

    Where the sides are no multiples of the patch size, zeros are added around, and the head's map
    is stretched over the image, as in DINOv2.
    """
    if images.dtype == jnp.uint8:
        t = model.transform
        images = photometry.normalize(images, t['mean'], t['std'])
    size = images.shape[1:3]
    p = model.patch_size
    fill = [((-n % p) // 2, -n % p - (-n % p) // 2) for n in size]
    images = jnp.pad(images, [(0, 0), *fill, (0, 0)])
    return taps(model, images, spec.recipe), size
