# SPDX-License-Identifier: Apache-2.0
"""Distillation of a frozen teacher by the losses of DINOv2.

The teacher is a larger DINOv2 with its heads. The student has no masks and no stochastic depth; the
patch loss is over all patches of the global crops; the result is a moving average of the student.

The teacher is read from `method.teacher`, a run of dinov2 or an import with heads, and stored in
the checkpoints, so that a restart needs no other file.

References:
  DINOv2, arXiv 2304.07193, section 5.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp

from ssl_jax.methods import dinov2, distill
from ssl_jax.models import vit as vit_lib
from ssl_jax.objectives import masking
from ssl_jax.run import errors


@dataclasses.dataclass(frozen=True)
class DINOv2Distill(dinov2.DINOv2):
    """Distillation of a DINOv2; the student has the fields of `DINOv2`."""

    teacher: str | None = None  # a run of dinov2, or an import with heads; None: random, to try out
    teacher_size: vit_lib.Size | None = None  # as size, embed_dim, ... of the student
    teacher_embed_dim: int | None = None
    teacher_depth: int | None = None
    teacher_num_heads: int | None = None
    teacher_ffn: Literal['mlp', 'swiglu'] = 'swiglu'

    def check(self, run):
        yield from super().check(run)
        yield from distill.teacher_rules(self)
        if self.drop_path:
            yield 'Distillation drops no blocks of the student: set method.drop_path=0.'
        if self.gram_weight:
            yield 'Distillation has no Gram anchoring: set method.gram_weight=0.'

    @functools.cached_property
    def teacher_vit(self):
        sizes = self.encoder('teacher_')
        widths = {k: getattr(sizes, k) for k in ('embed_dim', 'depth', 'num_heads')}
        return self.vit.clone(**widths, ffn=self.teacher_ffn)

    def init(self, rng):
        """extra: the frozen teacher with its heads, the student's average, the centres."""
        student_rng, teacher_rng = jax.random.split(rng)
        params, extra = super().init(student_rng)
        teacher = self.init_network(teacher_rng, self.teacher_vit)
        return params, {**extra, 'teacher': teacher, 'student': params}

    def prepare(self, extra, start):
        """Teacher and centres of a DINOv2 run."""
        if not self.teacher:
            return {}, []
        found = start.open(self.teacher).extra
        if 'teacher' not in found:
            raise errors.UserError(
                f'method.teacher={self.teacher} has no projection heads; give a run of dinov2 '
                f'(released weights hold the backbone alone).'
            )
        names = [name for name in extra if name in found and name != 'student']
        return {name: found[name] for name in names}, [f'teacher: {self.teacher}']

    def loss(self, params, extra, batch, rng, step):
        *crops, _ = self.augment(batch, rng)
        size, groups = crops[0].shape[0], self.groups(crops[0].shape[0])
        n = self.num_patches
        count = 2 * size // groups * n
        everything = masking.Masked(
            jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32), (groups, count)),
            jnp.full((groups, count), 1 / n, jnp.float32),
            jnp.ones((groups, count), bool),
        )
        return self.objective(params, extra, *crops, None, temps=self.temps(step), taken=everything)

    def after_update(self, params, extra, step):
        extra = self.with_centers(extra)
        return {**extra, 'student': self.average(extra['student'], params, step)}

    def networks(self, params, extra):
        del params
        return self._networks(extra['student'])

    def with_networks(self, params, extra, found):
        found = {dinov2.PARAMS.get(name, name): tree for name, tree in found.items()}
        return {**params, **found}, {**extra, 'student': {**extra['student'], **found}}

    def flops(self, batch_size):
        teacher, n = self.teacher_vit, self.num_patches
        tokens = n + 1 + self.num_register_tokens
        student = super().flops(batch_size)
        large = distill.encoder_flops(teacher, tokens, n)
        small = distill.encoder_flops(self.vit, tokens, n)
        return student + 2 * batch_size * (large - small)


METHOD = DINOv2Distill
