# SPDX-License-Identifier: Apache-2.0
"""DINOv3: the losses of DINOv2 for an encoder with rotary positions.

What is new is the encoder: positions turn queries and keys (`models.rope`), in training at a random
scale; keys have no bias, four registers are the rule, prototypes no weight norm. Schedules are
constant after their warm-up, so that a run has no fixed end; the rate is so with `optim.min_lr`
equal to `optim.lr`. Gram anchoring is that of DINOv2, see its `gram_weight`.

Differences from the official code, beside those of `methods.dinov2`:
- The scale of the positions is drawn once per step, for all crops and blocks of the student; there
  each block draws another for each size of crops.
- Angles and rotation are float32 (some of its runs have them in bfloat16).
- Class tokens of local crops have no final norm of their own, as its 7B had in training.

References:
  DINOv3, arXiv 2508.10104; transformers `models/dinov3_vit`.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from ssl_jax import fields
from ssl_jax.methods import dinov2

# Size: its FFN and the ratio of that.
FFN = {
    'S+': ('swiglu', 6.0),
    'L+': ('swiglu', 6.0),
    'H+': ('swiglu', 6.0),
    '7B': ('swiglu', 3.0),
}
SCALE = 3  # folded into the rng of a step for the scale of the positions


@dataclasses.dataclass(frozen=True)
class DINOv3(dinov2.DINOv2):
    """DINOv3; the defaults are those of its encoders, of DINOv2 where nothing is said here."""

    removed = {}
    encoder_fields = (*(x for x in dinov2.ENCODER if x != 'pos_resize'), 'key_bias')

    size: Literal['Ti', 'S', 'S+', 'B', 'L', 'L+', 'H+', '7B'] | None = 'S'
    ffn: Literal['mlp', 'swiglu'] | None = None  # None: that of the size, else 'mlp'
    mlp_ratio: float | None = None  # SwiGLU: of the MLP that it replaces; None: that of the size
    eps: float = 1e-5
    num_register_tokens: Annotated[int, fields.Range(0, 64)] = 4
    key_bias: bool = False  # whether keys have a bias
    pos_resize: str = fields.given('bicubic')  # there is no table to resize
    # Training: coordinates times a number from 1/r to r, log-uniform; 1: never.
    rope_rescale: Annotated[float, fields.Range(1.0, 100.0)] = 2.0
    # Weight of the local crops' class-token term, times dino_weight; 0.5 in the Gram stage.
    local_weight: Annotated[float, fields.Range(0.0, 100.0)] = 1.0
    momentum_teacher: fields.Probability = 0.994
    final_momentum_teacher: fields.Probability = 0.994

    def check(self, run) -> Iterator[str]:
        yield from super().check(run)
        if self.embed_dim and self.num_heads and self.embed_dim % (4 * self.num_heads):
            yield (
                f'method.embed_dim={self.embed_dim} makes heads of '
                f'{self.embed_dim / self.num_heads:g} channels, and rotary positions need a '
                f'multiple of 4: use embed_dim={4 * self.num_heads * 16}.'
            )

    @functools.cached_property
    def vit(self):
        ffn, ratio = FFN.get(self.size, ('mlp', 4.0))
        return self.encoder(
            num_cls_tokens=1,
            num_register_tokens=self.num_register_tokens,
            pos_embed='rope',
            key_bias=self.key_bias,
            ffn=self.ffn or ffn,
            mlp_ratio=ratio if self.mlp_ratio is None else self.mlp_ratio,
            layer_scale=self.layer_scale,
            mask_token=True,
            drop_path_uniform=self.drop_path_uniform,
            init_scheme='dinov3',
        )

    def _head(self, out_dim, bottleneck_dim):
        return super()._head(out_dim, bottleneck_dim).clone(weight_norm=False)

    @property
    def dino_weights(self):
        return self.dino_weight, self.dino_weight * self.local_weight

    def pos_scale(self, rng):
        """exp of a number drawn from U(-ln r, ln r), one per step."""
        if self.rope_rescale == 1:
            return None
        rng, most = jax.random.fold_in(rng, SCALE), math.log(self.rope_rescale)
        return jnp.exp(jax.random.uniform(rng, minval=-most, maxval=most))


METHOD = DINOv3
