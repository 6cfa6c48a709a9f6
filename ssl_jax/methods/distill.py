# SPDX-License-Identifier: Apache-2.0
"""Distillation of a frozen teacher into a smaller encoder, as Pixio and as DINOv2 do it.

`features` (Pixio): the student's class and patch tokens, through a small projection, get the
direction of the teacher's tokens of the same image.  The student may see masked images, the teacher
sees them whole.

`dino` (DINOv2): the losses of `methods.dinov2` with the teacher and its heads frozen.  The student
sees no masks and drops no blocks; the patch loss is over all patches of the global crops; a moving
average of the student, which teaches nobody, is the result.

The teacher comes from `method.teacher`, a run of ours, imported weights or an export (`dino` needs
the heads: a run, or an imported teacher checkpoint), and is stored with the checkpoints: a restart
needs nothing else.

Reference: Pixio, arXiv 2512.15715, `distillation/models_distill.py`, `util/loss.py`; DINOv2, arXiv
2304.07193, section 5.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax.augment import photometry
from ssl_jax.data import view as view_lib
from ssl_jax.kernels import ops
from ssl_jax.methods import dinov2
from ssl_jax.models import blocks as blocks_lib
from ssl_jax.models import vit as vit_lib
from ssl_jax.objectives import losses, masking
from ssl_jax.run import init_from, runs


class Projection(nn.Module):
    """Tokens (..., D) -> the teacher's width (..., Dt): Linear, LayerNorm (eps 1e-5), GELU, Linear.

    Reference: Pixio `distillation/models_distill.py: last_proj`.
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
        cosine = losses.l2_normalize(student, 1e-8) * losses.l2_normalize(teacher, 1e-8)
        return 1 - cosine.sum(axis=-1).mean()
    difference = student - teacher
    return jnp.abs(difference).mean() if kind == 'l1' else jnp.square(difference).mean()


@dataclasses.dataclass(frozen=True)
class Features:
    """Pixio's form; see `ssl_jax.methods` for the contract."""

    vit: vit_lib.ViT
    teacher_vit: vit_lib.ViT
    projection: Projection
    teacher: str | None = None
    mask_ratio: float = 0.0
    mask_grid: int = 1
    cls_loss: str = 'cosine'
    patch_loss: str = 'cosine'
    fuse: str = 'avg'
    crop_scale: tuple = (0.2, 1.0)
    crop_ratio: tuple = (3 / 4, 4 / 3)
    flip: float = 0.0

    @property
    def grid(self):
        side = self.vit.img_size // self.vit.patch_size
        return (side, side)

    def views(self):
        return (
            view_lib.View('image', self.vit.img_size, scale=self.crop_scale, ratio=self.crop_ratio),
        )

    def init(self, rng):
        rngs = jax.random.split(rng, 3)
        tokens = jnp.zeros((1, self.vit.embed_dim))
        params = {
            'encoder': vit_lib.init_params(self.vit, rngs[0]),
            'projection': self.projection.init(rngs[1], tokens)['params'],
        }
        return params, {'teacher': vit_lib.init_params(self.teacher_vit, rngs[2])}

    def load_teacher(self, extra):
        """`extra` with the weights at `teacher` for its fresh ones."""
        teacher = init_from.encoder(self.teacher, self.teacher_vit, extra['teacher'])
        return {**extra, 'teacher': teacher}

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
        return total, (extra, metrics)

    def objective(self, params, teacher, images, ids_keep=None, drop_keys=None):
        """(loss, its terms) on normalised images (B, H, W, 3); all patches where ids_keep is None.

        loss = (cls + patch) / 2 for fuse 'avg'; for 'sum' each is weighted by its share of tokens.
        """
        with jax.named_scope('teacher'):
            target = self.teacher_vit.apply({'params': teacher}, images)['pre_norm']
        target = jax.lax.stop_gradient(target)
        c, r = self.teacher_vit.num_cls_tokens, self.teacher_vit.num_register_tokens
        patches = target[:, c + r :]
        if ids_keep is not None:
            patches = jnp.take_along_axis(patches, ids_keep[..., None], axis=1)
        ours = self.project(params, images, ids_keep, drop_keys)
        k = self.vit.num_cls_tokens
        cls = alignment(ours[:, :k], target[:, :c], self.cls_loss)
        patch = alignment(ours[:, k:], patches, self.patch_loss)
        share = 0.5 if self.fuse == 'avg' else k / ours.shape[1]
        return share * cls + (1 - share) * patch, {'cls': cls, 'patch': patch}

    def project(self, params, images, ids_keep=None, drop_keys=None):
        """The student's class and patch tokens in the teacher's width, (B, C + K, Dt)."""
        out = self.vit.apply(
            {'params': params['encoder']}, images, ids_keep=ids_keep, drop_keys=drop_keys
        )
        tokens = jnp.concatenate([out['cls_tokens'], out['patch_tokens']], axis=1)
        return self.projection.apply({'params': params['projection']}, tokens)

    def after_update(self, params, extra, step):
        del params, step
        return extra

    def backbone(self, params, extra):
        del extra
        return self.vit, params['encoder']

    def with_backbone(self, params, extra, encoder):
        return {**params, 'encoder': encoder}, extra

    def flops(self, batch_size):
        n, c = self.grid[0] * self.grid[1], self.vit.num_cls_tokens
        kept = masking.num_blocks(self.grid, self.mask_grid) * (1 - self.mask_ratio)
        kept = int(kept) * self.mask_grid**2
        student = _encoder_flops(self.vit, c + kept, kept)
        d, wide = self.vit.embed_dim, self.projection.out_dim
        student += 2 * (c + kept) * wide * (d + wide)
        return batch_size * (3 * student + _encoder_flops(self.teacher_vit, c + n, n))


def _encoder_flops(vit, tokens, patches):
    blocks = vit_lib.flops_per_image(vit.embed_dim, vit.depth, tokens, vit.mlp_ratio)
    return blocks + 2 * patches * 3 * vit.patch_size**2 * vit.embed_dim


@dataclasses.dataclass(frozen=True)
class Dino:
    """DINOv2's form: `dino` has the crops, heads and losses, and the big `teacher_vit`."""

    dino: dinov2.DINOv2
    teacher: str | None = None

    @property
    def vit(self):
        return self.dino.vit

    def views(self):
        return self.dino.views()

    def groups(self, batch_size):
        return self.dino.groups(batch_size)

    def init(self, rng):
        """extra: the frozen teacher with its heads, the student's average, the centres."""
        student_rng, teacher_rng = jax.random.split(rng)
        params, extra = self.dino.init(student_rng)
        teacher = dataclasses.replace(self.dino, vit=self.dino.teacher_vit)
        return params, {**extra, 'teacher': teacher.init(teacher_rng)[0], 'student': params}

    def load_teacher(self, extra):
        """`extra` with the teacher (the average, not the student) and centres of a DINOv2 run."""
        run = runs.open_run(self.teacher)
        if 'teacher' not in (run.extra or {}):
            raise ValueError(
                f'method.teacher={self.teacher} has no projection heads; give a run of dinov2 '
                f'(released weights hold the backbone alone).'
            )
        names = [k for k in extra if k in run.extra and k != 'student']
        found = {k: run.extra[k] for k in names}
        return {**extra, **init_from.placed(self.teacher, found, {k: extra[k] for k in names})}

    def loss(self, params, extra, batch, rng, step):
        crops = self.dino.augment(batch, rng)
        size, groups = crops[0].shape[0], self.groups(crops[0].shape[0])
        n = self.dino.grid[0] * self.dino.grid[1]
        count = 2 * size // groups * n
        everything = masking.Masked(
            jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (groups, count)),
            jnp.full((groups, count), 1 / n, jnp.float32),
            jnp.ones((groups, count), bool),
        )
        temps = self.dino.teacher_temp(step), self.dino.patch_teacher_temp(step)
        loss, (new, metrics) = self.dino.objective(
            params, extra, *crops, None, temps=temps, taken=everything
        )
        return loss, ({**extra, **new}, metrics)

    def after_update(self, params, extra, step):
        rate = self.dino.ema_rate(step)
        student = jax.tree.map(lambda a, s: a + rate * (s - a), extra['student'], params)
        return {**extra, 'student': student}

    def suspect(self, values, step):
        return self.dino.suspect(values, step)

    def backbone(self, params, extra):
        del params
        return self.dino.vit, extra['student']['backbone']

    def with_backbone(self, params, extra, encoder):
        student = {**extra['student'], 'backbone': encoder}
        return {**params, 'backbone': encoder}, {**extra, 'student': student}

    def flops(self, batch_size):
        big = self.dino.teacher_vit
        side = self.dino.grid[0] * self.dino.grid[1]
        tokens = side + 1 + big.num_register_tokens
        student = dataclasses.replace(self.dino, teacher_vit=None).flops(batch_size)
        small = _encoder_flops(self.vit, side + 1 + self.vit.num_register_tokens, side)
        return student + 2 * batch_size * (_encoder_flops(big, tokens, side) - small)


def from_config(config, clock):
    """Builds the form that `config.method.form` names."""
    m = config.method
    names = ('embed_dim', 'depth', 'num_heads')
    size = vit_lib.SIZES[m.teacher_size] if m.teacher_size else (None,) * 3
    teacher_shape = {k: m[f'teacher_{k}'] or default for k, default in zip(names, size)}
    if m.form == 'dino':
        student = dinov2.from_config(config, clock)
        big = student.vit.clone(ffn=m.teacher_ffn, drop_path=0.0, **teacher_shape)
        return Dino(dataclasses.replace(student, teacher_vit=big), m.teacher)
    common = dict(
        patch_size=m.patch_size,
        img_size=m.img_size,
        num_cls_tokens=m.num_cls_tokens,
        pos_embed=m.pos_embed,
        mlp_ratio=m.mlp_ratio,
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
    )
    size = vit_lib.SIZES[m.size] if m.size else (None,) * 3
    shape = {k: m[k] or default for k, default in zip(names, size)}
    teacher = vit_lib.ViT(**teacher_shape, **common)
    return Features(
        vit=vit_lib.ViT(drop_path=m.drop_path, **shape, **common),
        teacher_vit=teacher,
        projection=Projection(teacher.embed_dim, jnp.dtype(config.dtype)),
        teacher=m.teacher,
        mask_ratio=m.mask_ratio,
        mask_grid=m.mask_grid,
        cls_loss=m.cls_loss,
        patch_loss=m.patch_loss,
        fuse=m.fuse,
        crop_scale=tuple(m.crop_scale),
        crop_ratio=tuple(m.crop_ratio),
        flip=m.flip,
    )
