# SPDX-License-Identifier: Apache-2.0
"""I-JEPA: predict the features of blocks of an image from the features of its context.

The encoder sees some of the patches outside four target blocks. A narrow predictor gets its tokens
and mask tokens at the positions of one block, and predicts what the target encoder, a moving
average of the encoder, makes of the whole image there.

Differences from the official code:
- Shapes are static. The encoder sees `context_patches`, drawn from the context at random; the
  official code cuts the row-major lists of a batch to its shortest, which hides the lower half of
  most images. Target blocks have all shapes of one area, drawn per image. `reference_collator` has
  the official blocks and the official cut, at the fixed length `context_patches`.
- Learning rate and weight decay start at index 0 of their schedules, the official ones at 1.
- The encoder starts as MAE's (Xavier: 0.018 to 0.028 at the width of ViT-H), in the official code
  with 0.02 at every width, which is little for narrow networks.

References:
  Assran et al., arXiv 2301.08243; `src/train.py`, `src/masks/multiblock.py`,
  `src/models/vision_transformer.py`
"""

import dataclasses
import functools
import math
from typing import Annotated, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax import fields, optim
from ssl_jax.augment import photometry
from ssl_jax.methods import base
from ssl_jax.models import vit as vit_lib
from ssl_jax.models.predictor import Predictor

ASPECT = (0.75, 1.5)  # of target blocks, height / width
TRIES = 8  # placements of the blocks of an image; the first that leaves enough context is taken
CONTEXT = 0.265  # of the patches in `context_patches`: what the official cut leaves of 14 x 14
STD = ('target_std', 'target_std_images')  # metrics, see `IJEPA.objective`


class Masks(NamedTuple):
    """Patches of the context and of the target blocks."""

    context: jax.Array  # int (B, K)
    targets: jax.Array  # int (B, M, T)
    count: jax.Array | None = None  # int (), how many of the T are meant; None: all


@dataclasses.dataclass(frozen=True)
class IJEPA(base.OneView):
    """I-JEPA; the defaults are those of ViT-B/16."""

    monitored = 'patch'
    min_images = 2

    size: vit_lib.Size | None = 'B'
    predictor_dim: int | None = 384  # channels; it has as many heads as the encoder
    predictor_depth: int | None = 6  # blocks
    num_targets: Annotated[int, fields.Range(1, 16)] = 4  # target blocks of an image
    target_scale: tuple = (0.15, 0.2)  # fraction of the patches in a target block
    # Fraction of the patches in the square that the context is taken from, target blocks included.
    context_scale: tuple = (0.85, 1.0)
    # Patches that the encoder sees; None: 26.5 % of the image, or what target blocks leave.
    context_patches: int | None = None
    # The official sampling of blocks: one size for all images of a step, in which height follows
    # area; no block touches the last row and column. Of the context the first `context_patches` in
    # row-major order are seen: give the mean of the shortest list of a batch, of 128 images 12 on a
    # grid of 8 x 8, 52 on 14 x 14, 70 on 16 x 16.
    reference_collator: bool = False
    crop_scale: tuple = (0.3, 1.0)
    flip: fields.Probability = 0.0
    # Momentum of the target encoder, linear from the first to the second.
    momentum: fields.Probability = 0.996
    final_momentum: fields.Probability = 1.0

    def check(self, run):
        yield from super().check(run)
        yield from base.interval(self, 'target_scale')
        yield from base.interval(self, 'context_scale')
        for name in ('predictor_dim', 'predictor_depth'):
            if getattr(self, name) is None:
                yield f'method.{name} is None: set it.'
        yield from base.divisible(self, 'predictor_dim', 'num_heads')
        for name in ('embed_dim', 'predictor_dim'):
            dim = getattr(self, name)
            if dim and dim % 4:
                yield (
                    f'method.{name}={dim} is not divisible by 4, which sin-cos positions need: use '
                    f'{base.near_multiple(dim, 4)}.'
                )
        if self.grid[0] < 4:
            yield (
                f'method.img_size={self.img_size} and method.patch_size={self.patch_size} make '
                f'{self.grid[0]}x{self.grid[0]} patches, too few for blocks: use img_size='
                f'{4 * self.patch_size} or more.'
            )
            return
        if self.free < 1:
            yield (
                f'method.num_targets={self.num_targets} blocks of {self.area} patches can cover '
                f'all {self.num_patches}: lower num_targets or target_scale.'
            )
        elif not 0 < self.kept <= self.most:
            yield (
                f'method.context_patches={self.kept} must be from 1 to {self.most}, the patches '
                f'outside the target blocks: use {min(max(self.kept, 1), self.most)}.'
            )

    def infer(self, facts, choose):
        self.infer_crop(facts, choose)
        dim, depth = self.infer_encoder(facts, choose)
        choose('predictor_dim', dim // 2, f'half of an encoder of {dim}')
        choose('predictor_depth', max(depth // 2, 2), f'half of {depth} blocks')

    # Blocks.

    @functools.cached_property
    def shapes(self):
        """Shapes (h, w) of target blocks, int (S, 2): those of the area that most have."""
        side, (low, high) = self.grid[0], self.target_scale
        h, w = (x.reshape(-1) for x in np.mgrid[1 : side + 1, 1 : side + 1])
        fits = (h / w >= ASPECT[0]) & (h / w <= ASPECT[1])
        area = h * w / side**2
        if not (fits & (area >= low) & (area <= high)).any():  # a small grid
            low = high = area[fits][abs(area[fits] - low).argmin()]
        fits &= (area >= low) & (area <= high)
        areas, counts = np.unique((h * w)[fits], return_counts=True)
        fits &= h * w == areas[counts.argmax()]
        return np.stack([h[fits], w[fits]], axis=1)

    @functools.cached_property
    def area(self):
        """T, patches of a target block; of the reference the most that it can have."""
        if not self.reference_collator:
            return int(self.shapes[0].prod())
        draws = np.linspace(0, 1, 100_001)
        h, w = reference_shape(draws, self.target_scale, ASPECT, self.grid[0])
        return int((h * w).max())

    @property
    def free(self):
        """Patches outside the target blocks wherever these lie."""
        return self.num_patches - self.num_targets * self.area

    @property
    def most(self):
        """Largest `context_patches`: the reference does not see all that an image has."""
        return self.num_patches - self.area if self.reference_collator else self.free

    @property
    def kept(self):
        """K, patches of the context."""
        default = min(max(round(CONTEXT * self.num_patches), 1), self.most)
        return default if self.context_patches is None else self.context_patches

    def masks(self, keys, rng):
        """Masks of images with these keys (B,).

        Args:
          rng: of the step, for the sizes that all images of the reference share.
        """
        if not self.reference_collator:
            return Masks(*jax.vmap(lambda key: self._place(key, None))(keys))
        target, context = jax.random.uniform(rng, (2,))
        target = reference_shape(target, self.target_scale, ASPECT, self.grid[0])
        context = reference_shape(context, self.context_scale, (1.0, 1.0), self.grid[0])
        masks = jax.vmap(lambda key: self._place(key, (target, context)))(keys)
        return Masks(*masks, jnp.minimum(target[0] * target[1], self.area))

    def _place(self, key, shared):
        """(context (K,), targets (M, T)) of one image; in ascending order.

        Where no try leaves K patches, the rest of K comes from outside the square, and from the
        target blocks last; without the reference there are K outside them.

        Args:
          shared: ((h, w) of the target blocks, (h, w) of the context) for all images of a step, or
            None to draw them.
        """
        side, n, m = self.grid[0], self.num_patches, self.num_targets
        # One draw, as many small ones are mostly latency.
        u = jax.random.uniform(key, (n + TRIES * 2 * (m + 2),))
        order, u = u[:n], u[n:].reshape(TRIES, 2, m + 2)
        if shared is None:
            shapes, (low, high) = jnp.asarray(self.shapes), self.context_scale
            block = shapes[(u[:, 0, 0] * len(shapes)).astype(jnp.int32)].T  # h, w (TRIES,)
            square = jnp.round(jnp.sqrt((low + u[:, 1, 0] * (high - low)) * n)).astype(jnp.int32)
            square = [jnp.clip(square, 1, side)] * 2
        else:
            target, context = shared
            block, square = ([jnp.full(TRIES, x) for x in shape] for shape in (target, context))
        cells, inside = jnp.arange(n), True
        for axis, line in enumerate((cells // side, cells % side)):  # rows, columns
            length = jnp.stack([square[axis], *[block[axis]] * m], axis=1)  # (TRIES, 1 + M)
            places = side - length + (shared is None)  # the official bound excludes the last
            start = jnp.minimum((u[:, axis, 1:] * places).astype(jnp.int32), places - 1)[..., None]
            inside = inside & (line >= start) & (line < start + length[..., None])

        targets = inside[:, 1:]  # (TRIES, M, N)
        context = inside[:, 0] & ~targets.any(axis=1)
        best = jnp.argmax(jnp.minimum(context.sum(axis=1), self.kept))
        targets, context = targets[best], context[best]
        if shared is not None:
            order = cells / n
        order = order + jnp.where(context, 0, jnp.where(targets.any(axis=0), 2, 1))
        ids = jnp.sort(jnp.argsort(order)[: self.kept])
        blocks = jax.vmap(lambda t: jnp.nonzero(t, size=self.area)[0])(targets)
        return ids.astype(jnp.int32), blocks.astype(jnp.int32)

    # Networks and loss.

    @functools.cached_property
    def vit(self):
        return self.encoder(num_cls_tokens=0, pos_embed='sincos')

    @functools.cached_property
    def predictor(self):
        return Predictor(
            out_dim=self.vit.embed_dim,
            embed_dim=self.predictor_dim,
            depth=self.predictor_depth,
            num_heads=self.vit.num_heads,
            grid=self.grid[0],
            mlp_ratio=self.mlp_ratio,
            eps=self.eps,
            dtype=jnp.dtype(self.dtype),
            remat=self.remat,
        )

    def init(self, rng):
        encoder_rng, predictor_rng = jax.random.split(rng)
        ids = jnp.zeros((1, 1), jnp.int32)
        tokens = jnp.zeros((1, 1, self.vit.embed_dim))
        params = {
            'encoder': vit_lib.init_params(self.vit, encoder_rng),
            'predictor': self.predictor.init(predictor_rng, tokens, ids, ids[None])['params'],
        }
        # A copy, since a donated buffer may appear only once.
        return params, {'target': jax.tree.map(jnp.copy, params['encoder'])}

    def loss(self, params, extra, batch, rng, step):
        del step
        *rngs, size_rng = jax.random.split(rng, 4)
        keys = [photometry.sample_keys(k, batch['row']) for k in rngs]
        flip_keys, mask_keys, drop_keys = keys
        images = photometry.random_flip(flip_keys, batch['image'][:, 0], self.flip)
        images = photometry.normalize(images)
        masks = self.masks(mask_keys, size_rng)
        loss, metrics = self.objective(params, extra, images, masks, drop_keys)
        return loss, ({}, metrics)

    def objective(self, params, extra, images, masks, drop_keys=None):
        """(loss, metrics) on normalised images (B, H, W, 3).

        The loss is the smooth L1 of the official code (beta 1, mean over all numbers), where the
        paper has squares. Metrics, both of the targets and 0 in a collapse:
          target_std: standard deviation over images and patches, mean of channels; at most 1.
          target_std_images: the same over images alone, mean of patches and channels.
        """
        targets = self.targets(extra, images)
        pred = self.predict(params, images, masks, drop_keys)
        error = jnp.abs(pred.astype(jnp.float32) - blocks_of(targets, masks.targets))
        error = jnp.where(error < 1, 0.5 * error**2, error - 0.5).mean(axis=(0, 1, 3))  # (T,)
        if masks.count is None:
            loss = error.mean()
        else:
            loss = jnp.where(jnp.arange(len(error)) < masks.count, error, 0).sum() / masks.count
        if len(images) == 1:  # which differs from no other
            return loss, {}
        stds = targets.std(axis=(0, 1)).mean(), targets.std(axis=0).mean()
        return loss, dict(zip(STD, stds, strict=True))

    def predict(self, params, images, masks, drop_keys=None):
        """Predicted features of the target blocks, (B, M, T, D)."""
        out = self.vit.apply(
            {'params': params['encoder']}, images, ids_keep=masks.context, drop_keys=drop_keys
        )
        return self.predictor.apply({'params': params['predictor']}, out['patch_tokens'], *masks)

    @jax.named_scope('teacher')
    def targets(self, extra, images):
        """Tokens of the target encoder, normalised over channels; float32 (B, N, D)."""
        x = self.vit.apply({'params': extra['target']}, images)['patch_tokens']
        x = jax.lax.stop_gradient(x).astype(jnp.float32)
        mean, var = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
        return (x - mean) * jax.lax.rsqrt(var + 1e-5)

    def after_update(self, params, extra, step):
        rate = optim.linear(1 - self.momentum, 1 - self.final_momentum, self.clock.total + 1)(step)
        target = jax.tree.map(lambda o, n: o + rate * (n - o), extra['target'], params['encoder'])
        return {**extra, 'target': target}

    def suspect(self, values, step):
        """Reports a collapse of the targets, after the warm-up."""
        if step < self.clock.warmup or any(name not in values for name in STD):
            return None
        std, images = (values[name] for name in STD)
        remedy = 'halve the learning rate, lengthen the warm-up or raise method.momentum.'
        if not math.isfinite(std):
            return (
                f'Collapse suspected: {STD[0]} is {std}; resume from an earlier checkpoint with '
                f'half the learning rate.'
            )
        if std < 0.05:
            return (
                f'Collapse to a constant suspected: targets have a standard deviation of {std:.3f} '
                f'over images and patches (0 = all alike, at most 1), and the loss falls for no '
                f'good reason; {remedy}'
            )
        if images < 0.05:
            return (
                f'Collapse to positions suspected: targets of the same patch have a standard '
                f'deviation of {images:.3f} over images (0 = all images alike), of {std:.3f} with '
                f'that over patches; {remedy}'
            )
        return None

    def networks(self, params, extra):
        return {
            'encoder': (self.vit, extra['target']),
            'predictor': (self.predictor, params['predictor']),
        }

    def with_networks(self, params, extra, found):
        target = found.get('encoder', extra['target'])
        return {**params, **found}, {**extra, 'target': target}

    def flops(self, batch_size):
        vit, n, k, t = self.vit, self.num_patches, self.kept, self.area
        embed = 2 * 3 * vit.patch_size**2 * vit.embed_dim
        flops = functools.partial(vit_lib.flops_per_image, mlp_ratio=vit.mlp_ratio)
        teacher = flops(vit.embed_dim, vit.depth, n) + n * embed
        student = flops(vit.embed_dim, vit.depth, k) + k * embed
        ends = 2 * vit.embed_dim * self.predictor_dim
        predictor = flops(self.predictor_dim, self.predictor_depth, k + t) + t * ends
        student += self.num_targets * predictor + k * ends
        return batch_size * (teacher + 3 * student)  # backward costs twice the forward


def blocks_of(tokens, targets):
    """Tokens (B, N, D) at the patches `targets` (B, M, T): (B, M, T, D)."""
    return jnp.take_along_axis(tokens[:, None], targets[..., None], axis=2)


def reference_shape(draw, scale, aspect, side):
    """Height and width of a block of the official sampler, ints of the shape of `draw`.

    One draw from [0, 1) chooses area and aspect, and no block is as high or wide as the grid.

    References:
      I-JEPA `src/masks/multiblock.py: _sample_block_size`
    """
    xp = jnp if isinstance(draw, jax.Array) else np
    area = xp.floor(side**2 * (scale[0] + draw * (scale[1] - scale[0])))
    ratio = aspect[0] + draw * (aspect[1] - aspect[0])
    sides = xp.round(xp.sqrt(area * ratio)), xp.round(xp.sqrt(area / ratio))
    return tuple(xp.clip(x, 1, side - 1).astype(np.int32) for x in sides)


METHOD = IJEPA
