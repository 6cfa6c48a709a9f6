# SPDX-License-Identifier: Apache-2.0
"""Distillation of a frozen teacher's features, as Pixio does it.

The student's class and patch tokens, after a small projection, are aligned with the teacher's
tokens of the same image. Only the student's images may be masked. For distillation by the losses of
DINOv2 see `dinov2_distill`.

The teacher is read from `method.teacher`, a run, imported weights or an export, and stored in the
checkpoints, so that a restart needs no other file.

References:
  Pixio, arXiv 2512.15715, `distillation/models_distill.py`, `util/loss.py`.
"""

import dataclasses
import functools
from typing import Annotated, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax import fields
from ssl_jax.augment import photometry
from ssl_jax.kernels import ops
from ssl_jax.methods import base
from ssl_jax.models import blocks as blocks_lib
from ssl_jax.models import vit as vit_lib
from ssl_jax.objectives import masking

Distance = Literal['cosine', 'l1', 'mse']


class Projection(nn.Module):
    """Tokens (..., D) -> the teacher's width (..., Dt): Linear, LayerNorm (eps 1e-5), GELU, Linear.

    References:
      Pixio `distillation/models_distill.py: last_proj`.
    """

    out_dim: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x):
        dense = dict(dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform())
        x = blocks_lib.Dense(self.out_dim, name='0', **dense)(x)
        x = blocks_lib.LayerNorm(1e-5, name='1')(x)
        return blocks_lib.Dense(self.out_dim, name='3', fn=ops.gelu_dense, **dense)(x)


def alignment(student, teacher, kind):
    """Mean distance of tokens (..., D) in float32: 'cosine' is 1 - cosine, 'l1', 'mse'."""
    student, teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)
    if kind == 'cosine':
        # torch's cosine_similarity limits the product of the norms, here each norm, at 1e-8.
        cosine = blocks_lib.l2_normalize(student, 1e-8) * blocks_lib.l2_normalize(teacher, 1e-8)
        return 1 - cosine.sum(axis=-1).mean()
    difference = student - teacher
    return jnp.abs(difference).mean() if kind == 'l1' else jnp.square(difference).mean()


@dataclasses.dataclass(frozen=True)
class Distill(base.OneView):
    """Distillation of features; the defaults are Pixio's."""

    removed = {'crop_ratio': (3 / 4, 4 / 3)}

    teacher: str | None = None  # a run, imported weights or an export; None: random, to try out
    teacher_size: vit_lib.Size | None = None  # as size, embed_dim, ... of the student
    teacher_embed_dim: int | None = None
    teacher_depth: int | None = None
    teacher_num_heads: int | None = None
    size: vit_lib.Size | None = 'L'
    img_size: int | None = 256
    num_cls_tokens: Annotated[int, fields.Range(0, 64)] = 8
    pos_embed: Literal['sincos', 'learned'] = 'learned'
    mask_ratio: Annotated[float, fields.Range(0.0, 0.999)] = 0.0  # patches hidden from the student
    mask_grid: int = 4  # side in patches of the squares that are masked together
    cls_loss: Distance = 'cosine'
    patch_loss: Distance = 'cosine'
    fuse: Literal['avg', 'sum'] = 'avg'  # the losses averaged, or summed in proportion to tokens
    flip: fields.Probability = 0.0

    def check(self, run):
        yield from super().check(run)
        yield from base.mask_rules(self)
        yield from base.sincos(self, 'embed_dim')
        yield from teacher_rules(self)

    @functools.cached_property
    def vit(self):
        return self.encoder(num_cls_tokens=self.num_cls_tokens, pos_embed=self.pos_embed)

    @functools.cached_property
    def teacher_vit(self):
        """The teacher's encoder."""
        return self.encoder(
            'teacher_', drop_path=0.0, num_cls_tokens=self.num_cls_tokens, pos_embed=self.pos_embed
        )

    @functools.cached_property
    def projection(self):
        return Projection(self.teacher_vit.embed_dim, jnp.dtype(self.dtype))

    def init(self, rng):
        rngs = jax.random.split(rng, 3)
        tokens = jnp.zeros((1, self.vit.embed_dim))
        params = {
            'encoder': vit_lib.init_params(self.vit, rngs[0]),
            'projection': self.projection.init(rngs[1], tokens)['params'],
        }
        return params, {'teacher': vit_lib.init_params(self.teacher_vit, rngs[2])}

    def prepare(self, extra, start):
        if not self.teacher:
            return {}, []
        teacher = start.open(self.teacher).encoder_for(self.teacher_vit, extra['teacher'])
        return {'teacher': teacher}, [f'teacher: {self.teacher}']

    def loss(self, params, extra, batch, rng, step):
        del step
        flip_keys, mask_keys, drop_keys = (
            photometry.sample_keys(k, batch['row']) for k in jax.random.split(rng, 3)
        )
        images = photometry.random_flip(flip_keys, batch['image'][:, 0], self.flip)
        images = photometry.normalize(images)
        ids = None
        if self.mask_ratio:
            ids = masking.random_masking(
                mask_keys, self.grid, self.mask_ratio, self.mask_grid
            ).ids_keep
        total, metrics = self.objective(params, extra['teacher'], images, ids, drop_keys)
        return total, ({}, metrics)

    def objective(self, params, teacher, images, ids_keep=None, drop_keys=None):
        """(loss, its terms) on normalised images (B, H, W, 3).

        loss = (cls + patch) / 2 for fuse 'avg'; for 'sum' each is weighted by its share of tokens.

        Args:
          ids_keep: (B, K), patches of the student's input; None for all.
          drop_keys: (B,), of stochastic depth; None to drop nothing.
        """
        with jax.named_scope('teacher'):
            target = self.teacher_vit.apply({'params': teacher}, images)['pre_norm']
        target = jax.lax.stop_gradient(target)
        c, r = self.teacher_vit.num_cls_tokens, self.teacher_vit.num_register_tokens
        patches = target[:, c + r :]
        if ids_keep is not None:
            patches = jnp.take_along_axis(patches, ids_keep[..., None], axis=1)
        tokens = self.project(params, images, ids_keep, drop_keys)
        k = self.vit.num_cls_tokens
        cls = alignment(tokens[:, :k], target[:, :c], self.cls_loss)
        patch = alignment(tokens[:, k:], patches, self.patch_loss)
        share = 0.5 if self.fuse == 'avg' else k / tokens.shape[1]
        return share * cls + (1 - share) * patch, {'cls': cls, 'patch': patch}

    def project(self, params, images, ids_keep=None, drop_keys=None):
        """Class and patch tokens of the student, projected: (B, C + K, Dt)."""
        out = self.vit.apply(
            {'params': params['encoder']}, images, ids_keep=ids_keep, drop_keys=drop_keys
        )
        tokens = jnp.concatenate([out['cls_tokens'], out['patch_tokens']], axis=1)
        return self.projection.apply({'params': params['projection']}, tokens)

    def flops(self, batch_size):
        n, c = self.num_patches, self.vit.num_cls_tokens
        kept = masking.num_blocks(self.grid, self.mask_grid) * (1 - self.mask_ratio)
        kept = int(kept) * self.mask_grid**2
        student = encoder_flops(self.vit, c + kept, kept)
        d, wide = self.vit.embed_dim, self.projection.out_dim
        student += 2 * (c + kept) * wide * (d + wide)
        return batch_size * (3 * student + encoder_flops(self.teacher_vit, c + n, n))


def teacher_rules(method):
    """Checks the sizes of the teacher."""
    names = ('teacher_embed_dim', 'teacher_depth', 'teacher_num_heads')
    if method.teacher_size is None and any(getattr(method, name) is None for name in names):
        yield f'the teacher has no size: set method.teacher_size, or {", ".join(names)}.'
    yield from base.divisible(method, 'teacher_embed_dim', 'teacher_num_heads')


def encoder_flops(vit, tokens, patches):
    """Forward FLOPs of an encoder for one image, its patch embedding included."""
    blocks = vit_lib.flops_per_image(vit.embed_dim, vit.depth, tokens, vit.mlp_ratio)
    return blocks + 2 * patches * 3 * vit.patch_size**2 * vit.embed_dim


METHOD = Distill
