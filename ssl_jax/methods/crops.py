# SPDX-License-Identifier: Apache-2.0
"""Two global crops and several local ones per image, distorted: DINO's views.

References:
  SwAV, arXiv 2006.09882, section 3.2; DINOv2 `data/augmentations.py`
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from ssl_jax import fields
from ssl_jax.augment import photometry
from ssl_jax.data import host
from ssl_jax.methods import base
from ssl_jax.objectives import gram

JITTER = ('brightness', 'contrast', 'saturation', 'hue', 'jitter_prob', 'grey_prob')


@dataclasses.dataclass(frozen=True)
class MultiCrop(base.Method):
    """A method that trains on the crops of this module."""

    n_local_crops: Annotated[int, fields.Range(0, 64)] = 8  # 0 for single centred objects
    local_size: int | None = 96  # pixels, side of a local crop; img_size is that of a global crop
    global_crops_scale: tuple = (0.32, 1.0)  # RandomResizedCrop: fraction of the image's area
    local_crops_scale: tuple = (0.05, 0.32)
    flip: fields.Probability = 0.5  # probability of a horizontal flip
    brightness: float = 0.4  # colour jitter, largest changes as torchvision's ColorJitter has them
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    jitter_prob: fields.Probability = 0.8  # probability of any jitter
    grey_prob: fields.Probability = 0.2

    def check(self, run):
        yield from super().check(run)
        yield from base.interval(self, 'global_crops_scale')
        yield from base.interval(self, 'local_crops_scale')
        if self.n_local_crops and (self.local_size is None or self.local_size % self.patch_size):
            near = base.near_multiple(self.local_size or 96, self.patch_size)
            yield (
                f'method.local_size={self.local_size} is not a multiple of method.patch_size='
                f'{self.patch_size}: use local_size={near}.'
            )

    def infer_crop(self, facts, choose):
        size, patch = super().infer_crop(facts, choose)
        if self.n_local_crops:
            local = max(round(size * 3 / 7 / patch), 1) * patch
            choose('local_size', local, f'three sevenths of {size}, in whole patches')
        return size, patch

    @property
    def cut_size(self):
        """Pixels of a global crop as the host cuts it; `img_size` or more."""
        return self.img_size

    def views(self):
        views = (host.View('global', self.cut_size, count=2, scale=self.global_crops_scale),)
        if self.n_local_crops:
            local = dict(count=self.n_local_crops, scale=self.local_crops_scale)
            views += (host.View('local', self.local_size, **local),)
        return views

    def flipped(self, rng, rows, crops):
        """Crops (B, n, H, W, 3), each flipped or not, as `distort` does with the same key."""
        keys, _ = _keys(rng, rows, crops.shape[1])
        x = crops.reshape(-1, *crops.shape[2:])
        return photometry.random_flip(keys, x, self.flip).reshape(crops.shape)

    def distort(self, rng, rows, crops, blur, solarize, side=None):
        """Flips, shrinks, distorts and normalises crops.

        Args:
          rng: key of the view.
          rows: (B,), of the samples.
          crops: uint8 (B, n, H, W, 3).
          blur: probability for each of the n crops; solarize: the same.
          side: pixels of the result; None: those of the crops.

        Returns:
          float32 (B, n, side, side, 3).
        """
        size, count = crops.shape[:2]
        x = self.flipped(rng, rows, crops).reshape(-1, *crops.shape[2:])
        x = gram.shrink(x, side or x.shape[1])
        x = photometry.photometric(
            _keys(rng, rows, count)[1],
            x,
            blur_prob=jnp.tile(jnp.asarray(blur), size) if any(blur) else 0.0,
            solarize_prob=jnp.tile(jnp.asarray(solarize), size) if any(solarize) else 0.0,
            **{name: getattr(self, name) for name in JITTER},
        )
        return photometry.normalize(x).reshape(size, count, *x.shape[1:])


def _keys(rng, rows, count):
    """Keys of flips and of distortions, (B n,) each."""
    keys = jax.vmap(lambda k: jax.random.split(k, count))(photometry.sample_keys(rng, rows))
    return jax.vmap(jax.random.split, out_axes=1)(keys.reshape(-1))
