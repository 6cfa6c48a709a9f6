# SPDX-License-Identifier: Apache-2.0
"""LeJEPA: crops of an image have one embedding, and embeddings are standard normal.

One encoder and a projector see two global and several local crops, embeddings z of the class
tokens. The loss is

  (1 - w) invariance + w SIGReg,  w = sigreg_weight,

where the invariance pulls all crops to the mean of the global ones, and SIGReg tests random
one-dimensional projections of the batch for a normal distribution. No teacher, no prototypes, no
stop-gradient, no schedule besides the learning rate's. With `regularizer='visreg'` the mean, the
standard deviation and the shape of the distribution have a term each, which helps with few images.

Differences from the official code:
- The statistics of the regularizer and of BatchNorm, which sees all crops at once, are those of the
  global batch on any devices.

References:
  LeJEPA, arXiv 2511.08544; VISReg, arXiv 2606.02572
"""

import dataclasses
import functools
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from ssl_jax import fields
from ssl_jax.augment import photometry
from ssl_jax.methods import base
from ssl_jax.methods import crops as crops_lib
from ssl_jax.models import heads
from ssl_jax.models import vit as vit_lib
from ssl_jax.objectives import sigreg


@dataclasses.dataclass(frozen=True)
class LeJEPA(crops_lib.MultiCrop):
    """LeJEPA; the defaults are those of its runs on ImageNet."""

    drop_path: Annotated[float, fields.Range(0.0, 0.999)] = 0.1  # grows linearly from block 0

    n_local_crops: Annotated[int, fields.Range(0, 64)] = 6
    global_crops_scale: tuple = (0.3, 1.0)
    local_crops_scale: tuple = (0.05, 0.3)
    blur_prob: fields.Probability = 0.5
    solarize_prob: fields.Probability = 0.2

    regularizer: Literal['sigreg', 'visreg'] = 'sigreg'
    # w in (1 - w) invariance + w regularizer: 0.01 to 0.1 for SIGReg; for VISReg 0.9, or 0.6 for
    # few images. 0 demonstrates a collapse.
    sigreg_weight: fields.Probability = 0.05
    # Random projections per step; VISReg's paper has 4,096.
    num_slices: Annotated[int, fields.Range(1, 2**20)] = 1024
    proj_dim: Annotated[int, fields.Range(2, 2**16)] = 128  # channels of an embedding
    proj_hidden_dim: Annotated[int, fields.Range(1, 2**16)] = 2048  # of the projector's MLP

    def check(self, run):
        yield from super().check(run)
        if run.batch_size // run.accum_steps < 2:
            yield (
                f'a batch of {run.batch_size // run.accum_steps} (batch_size / accum_steps) has no '
                f'distribution, which {self.regularizer} tests: use batch_size='
                f'{128 * run.accum_steps}.'
            )

    @property
    def min_images(self):
        return 2

    def warnings(self, batch_size, ways, accum_steps=1):
        del ways
        name = {'sigreg': 'SIGReg', 'visreg': 'VISReg'}[self.regularizer]
        yield from base.micro_batches(f'{name} and BatchNorm', batch_size, accum_steps)

    @functools.cached_property
    def vit(self):
        # timm's ViT, which the paper trains, resizes positions with antialias.
        return self.encoder(pos_embed='learned', pos_resize='antialias', init_scheme='dinov2')

    @functools.cached_property
    def projector(self):
        return heads.BatchNormMLP(self.proj_dim, self.proj_hidden_dim, dtype=jnp.dtype(self.dtype))

    def init(self, rng):
        encoder_rng, projector_rng = jax.random.split(rng)
        tokens = jnp.zeros((1, self.vit.embed_dim))
        params = {
            'encoder': vit_lib.init_params(self.vit, encoder_rng),
            'projector': self.projector.init(projector_rng, tokens)['params'],
        }
        return params, {}

    def loss(self, params, extra, batch, rng, step):
        del extra, step
        crop_rng, drop_rng, slice_rng = jax.random.split(rng, 3)
        views = self.views()
        crops = []
        for view, key in zip(views, jax.random.split(crop_rng, len(views)), strict=True):
            blur, solarize = ((p,) * view.count for p in (self.blur_prob, self.solarize_prob))
            crops.append(self.distort(key, batch['row'], batch[view.name], blur, solarize))
        drop_keys = photometry.sample_keys(drop_rng, batch['row'])
        z = self.embed(params, tuple(crops), drop_keys)
        # Of the step and not of the rows: the same directions for all images.
        slices = sigreg.directions(slice_rng, self.proj_dim, self.num_slices)
        loss, terms = self.objective(z, slices)
        return loss, ({}, {**terms, **sigreg.monitors(z)})

    def embed(self, params, crops, drop_keys=None):
        """Embeddings (crops, B, proj_dim), global crops first.

        Args:
          params: of encoder and projector.
          crops: normalised global crops (B, 2, H, W, 3), and local ones (B, V, h, w, 3) if any.
          drop_keys: (B,), of stochastic depth; None to drop nothing.
        """
        outs = self.vit.apply({'params': params['encoder']}, crops, drop_keys=drop_keys)
        tokens = jnp.concatenate([out['cls_tokens'][:, :, 0] for out in outs], axis=1)
        z = self.projector.apply({'params': params['projector']}, tokens)  # (B, crops, proj_dim)
        return jnp.moveaxis(z, 1, 0)

    def objective(self, z, slices):
        """(loss, terms) of embeddings (crops, B, proj_dim); the terms are without their weights."""
        terms = {'invariance': sigreg.invariance(z, 2)}
        if self.regularizer == 'sigreg':
            terms['sigreg'] = regularizer = sigreg.sigreg(z, slices)
        else:
            parts = {'scale': sigreg.scale(z), 'centre': sigreg.centre(z)}
            parts['shape'] = sigreg.shape(z, slices)
            regularizer = sum(parts.values())
            terms |= parts
        w = self.sigreg_weight
        return (1 - w) * terms['invariance'] + w * regularizer, terms

    def suspect(self, values, step):
        """Reports a collapse of the embeddings, after the warm-up."""
        if step < self.clock.warmup or 'embedding_std' not in values:
            return None
        return sigreg.suspect(values, self.proj_dim)

    def flops(self, batch_size):
        vit, total = self.vit, 0.0
        for view in self.views():
            patches = (view.size // vit.patch_size) ** 2
            blocks = vit_lib.flops_per_image(vit.embed_dim, vit.depth, patches + 1, vit.mlp_ratio)
            embed = 2 * patches * 3 * vit.patch_size**2 * vit.embed_dim
            head = self.projector.flops_per_token(vit.embed_dim)
            head += 2 * self.proj_dim * self.num_slices  # the random projections
            total += view.count * (blocks + embed + head)
        return 3 * batch_size * total  # backward costs twice the forward


METHOD = LeJEPA
