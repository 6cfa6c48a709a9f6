# SPDX-License-Identifier: Apache-2.0
"""QB-Heat, experimental: see a quarter of the image, extrapolate its features linearly.

The encoder sees one block of half the height and half the width. As a steady heat flow obeys
z_xx + S z_yy = 0, features are taken to obey dz/dx = A z and dz/dy = B z with learned matrices that
all images and places share: a step of one patch is z + A z. Steps over the side of the block lead
to the three hidden quarters, and a small decoder draws their pixels.

This follows the abstract of the paper and summaries of it, which give the visible quarter, the two
matrices, the linear extrapolation and the small decoder; there is no public code. All else is a
choice of this file:
- the block lies anywhere; where a step would leave the image, it goes the other way, with operators
  of its own for left and up, which for the exact flow would be inverses (`quarters`);
- features both to the side and above or below are the mean of both orders, since A and B need not
  commute;
- the operators start at 0, the identity, and their powers are scaled (`powers`);
- a ViT instead of a convolutional network. It sees the positions of its patches in the whole image,
  so that on whole images it has all positions that it was trained with;
- class token, decoder blocks, normalised pixels as targets and the recipe are MAE's. The class
  token reaches the decoder directly.

References:
  Chen et al., Self-Supervised Learning based on Heat Equation, arXiv 2211.13228.
"""

import dataclasses
import functools
from typing import Annotated

import jax
import jax.numpy as jnp

from ssl_jax import fields
from ssl_jax.augment import photometry
from ssl_jax.methods import base
from ssl_jax.models import patches as patches_lib
from ssl_jax.models import vit as vit_lib
from ssl_jax.models.decoder import Decoder
from ssl_jax.objectives import losses, masking

RIGHT, LEFT, DOWN, UP = range(4)  # leading axis of the operators


def quarters(corners: jax.Array, side: int) -> jax.Array:
    """Patches of the visible block, and of the quarters predicted from it.

    Patch (i, j) of the block predicts (i, j'), (i', j) and (i', j'), where i' is the one of
    i + side / 2 and i - side / 2 that is in the image, likewise j'. For any block these are all
    other patches, each once.

    Args:
      corners: int (B, 2), row and column of the first patch of each block, 0 to side / 2.
      side: patches per side of the image, even.

    Returns:
      int (B, side²), raster indices: the block, those beside it, those above or below, those both;
      each quarter in raster order of the block.
    """
    half = side // 2
    rows, columns = jnp.moveaxis(corners[..., None] + jnp.arange(half), 1, 0)  # (B, half) each

    def indices(rows, columns):
        return (rows[:, :, None] * side + columns[:, None]).reshape(len(corners), -1)

    other_rows, other_columns = (rows + half) % side, (columns + half) % side
    pairs = ((rows, columns), (rows, other_columns), (other_rows, columns))
    return jnp.concatenate([indices(*p) for p in (*pairs, (other_rows, other_columns))], axis=1)


def powers(operators: jax.Array, steps: int) -> jax.Array:
    """(I + A)^steps for each A of `operators` (n, D, D), up to a factor; by repeated squaring.

    The factor makes the Frobenius norm sqrt(D), that of the identity: extrapolated features keep
    their mean length, and no A makes them overflow. It is that of one linear operator (I + A) / s,
    whose direction in feature space is learned and whose overall growth is not.

    Args:
      operators: float32 (n, D, D), for features as rows: z + z A.
      steps: 1 or more.
    """
    size = operators.shape[-1]

    def scaled(m):
        return m * (size**0.5 / jnp.linalg.norm(m, axis=(-2, -1), keepdims=True))

    def product(a, b):
        return scaled(jnp.matmul(a, b, precision='highest'))

    square, result = scaled(jnp.eye(size) + operators), None
    while steps:
        if steps % 2:
            result = square if result is None else product(result, square)
        steps //= 2
        if steps:
            square = product(square, square)
    return result


def extrapolate(z: jax.Array, moves: jax.Array, block: jax.Array, side: int) -> jax.Array:
    """Features of all patches in the order of `quarters`, (B, 4 K, D).

    Args:
      z: (B, K, D), features of the visible block.
      moves: (4, D, D), `powers` of the operators for side / 2 steps.
      block: int (B, K), raster indices of the block.
      side: patches per side of the image.
    """
    moves = moves.astype(z.dtype)
    to_right = (block % side < side // 2)[..., None]
    to_below = (block // side < side // 2)[..., None]

    def beside(x):
        return jnp.where(to_right, x @ moves[RIGHT], x @ moves[LEFT])

    def above_or_below(x):
        return jnp.where(to_below, x @ moves[DOWN], x @ moves[UP])

    x, y = beside(z), above_or_below(z)
    return jnp.concatenate([z, x, y, (above_or_below(x) + beside(y)) / 2], axis=1)


@dataclasses.dataclass(frozen=True)
class QBHeat(base.OneView):
    """Extrapolation of a visible quarter by learned linear operators; experimental."""

    decoder_embed_dim: int | None = 512
    decoder_depth: Annotated[int | None, fields.Range(1, 64)] = 4
    decoder_num_heads: int | None = 16
    norm_pix_loss: bool = True  # predict pixels normalised per patch

    def check(self, run):
        yield from super().check(run)
        if self.grid[0] % 2:
            size = base.near_multiple(self.img_size, 2 * self.patch_size)
            yield (
                f'method.img_size={self.img_size} has {self.grid[0]} patches per side, and a '
                f'quarter needs an even number: use img_size={size}.'
            )
        for name in ('decoder_embed_dim', 'decoder_depth', 'decoder_num_heads'):
            if getattr(self, name) is None:
                yield f'method.{name} is None: set it.'
        yield from base.divisible(self, 'decoder_embed_dim', 'decoder_num_heads')
        for name in ('embed_dim', 'decoder_embed_dim'):
            dim = getattr(self, name)
            if dim % 4:
                yield (
                    f'method.{name}={dim} is not divisible by 4, which sine-cosine positions need: '
                    f'use {name}={base.near_multiple(dim, 4)}.'
                )

    def infer(self, facts, choose):
        size = self.img_size or min(facts.short_side, 96 if facts.cpu else 224)
        patch = choose('patch_size', base.patch_for(size), f'for crops of about {size} pixels')
        size = max(size // (2 * patch), 1) * 2 * patch
        why = f'an even number of patches; short side of the images {facts.short_side}'
        choose('img_size', size, why)
        dim, depth = self.infer_encoder(facts, choose)
        width = 96 if dim < 300 else 256 if dim < 700 else 512
        width = choose('decoder_embed_dim', width, f'for an encoder of {dim}')
        choose('decoder_depth', min(max(depth // 3, 2), 4), f'for an encoder of {depth} blocks')
        heads = width // 32 if width % 32 == 0 else 4
        choose('decoder_num_heads', heads, '32 channels each')

    @functools.cached_property
    def vit(self):
        # Of sine-cosine positions, a shift is a linear map: the operators can be exact on them.
        return self.encoder(num_cls_tokens=1, pos_embed='sincos')

    @functools.cached_property
    def decoder(self):
        """MAE's; every patch has a feature, so its mask token is never seen."""
        return Decoder(
            embed_dim=self.decoder_embed_dim,
            depth=self.decoder_depth,
            num_heads=self.decoder_num_heads,
            num_patches=self.num_patches,
            num_cls_tokens=1,
            out_dim=3 * self.patch_size**2,
            pos_embed='sincos',
            mlp_ratio=self.mlp_ratio,
            eps=self.eps,
            dtype=jnp.dtype(self.dtype),
            remat=self.remat,
        )

    def init(self, rng):
        enc_rng, dec_rng = jax.random.split(rng)
        dim = self.vit.embed_dim
        latent = jnp.zeros((1, 1 + self.num_patches, dim))
        ids = jnp.zeros((1, self.num_patches), jnp.int32)
        params = {
            'encoder': vit_lib.init_params(self.vit, enc_rng),
            # A right and left, B down and up. Decay pulls them to 0, to the identity.
            'operators': jnp.zeros((4, dim, dim)),
            'decoder': self.decoder.init(dec_rng, latent, ids)['params'],
        }
        return params, {}

    def mask(self, keys):
        """`masking.Mask` in the order of `quarters`, a block per key (B,), anywhere."""
        side = self.grid[0]
        corners = jax.vmap(lambda key: jax.random.randint(key, (2,), 0, side // 2 + 1))(keys)
        return masking.from_order(quarters(corners, side), self.num_patches // 4)

    def forward(self, params, images, mask, drop_keys=None):
        """Predicted pixels of all patches.

        Args:
          images: (B, H, W, 3), normalised.
          mask: `masking.Mask` of a block, see `mask`.
          drop_keys: (B,), of stochastic depth; None to drop nothing.

        Returns:
          (B, N, p*p*3), raster order.
        """
        side = self.grid[0]
        out = self.vit.apply(
            {'params': params['encoder']}, images, ids_keep=mask.ids_keep, drop_keys=drop_keys
        )
        moves = powers(params['operators'], side // 2)
        features = extrapolate(out['patch_tokens'], moves, mask.ids_keep, side)
        latent = jnp.concatenate([out['cls_tokens'], features], axis=1)
        return self.decoder.apply({'params': params['decoder']}, latent, mask.ids_restore)

    def loss(self, params, extra, batch, rng, step):
        """MSE over the hidden quarters; metric `operators`: root mean square singular value of A
        and B, 0 while features are only copied."""
        del step
        images, rows = batch['image'][:, 0], batch['row']
        flip_key, mask_key, drop_key = jax.random.split(rng, 3)
        images = photometry.random_flip(photometry.sample_keys(flip_key, rows), images, self.flip)
        images = photometry.normalize(images)
        mask = self.mask(photometry.sample_keys(mask_key, rows))
        pred = self.forward(params, images, mask, photometry.sample_keys(drop_key, rows))
        target = patches_lib.patchify(images, self.patch_size)
        if self.norm_pix_loss:
            target = patches_lib.normalize_patches(target)
        squares = jnp.square(jax.lax.stop_gradient(params['operators'])).sum(axis=-1).mean()
        return losses.masked_mse(pred, target, mask.mask), ({}, {'operators': jnp.sqrt(squares)})

    def left_behind(self):
        return 'The linear operators and the decoder of QB-Heat are in the checkpoint only.'

    def reconstruct(self, params, extra, images, keys):
        del extra
        return self._pictures(params, images, self.mask(keys))

    def reconstruct_hidden(self, params, extra, images, order, visible):
        """Shows the block with the fewest patches to hide, the first of several, and hides the
        rest: the encoder cannot see other shapes."""
        del extra
        side, most = self.grid[0], self.grid[0] // 2 + 1
        corners = jnp.indices((most, most)).reshape(2, -1).T  # (O, 2)
        blocks = quarters(corners, side)[:, : self.num_patches // 4]  # (O, K)
        hidden = jnp.argsort(order, axis=1) >= visible  # (B, N)
        best = hidden[:, blocks].sum(axis=-1).argmin(axis=1)
        mask = masking.from_order(quarters(corners[best], side), self.num_patches // 4)
        return self._pictures(params, images, mask)

    def _pictures(self, params, images, mask):
        pred = self.forward(params, photometry.normalize(images), mask)
        return patches_lib.from_pixels(images, mask.mask, self.patch_size, pred, self.norm_pix_loss)

    def flops(self, batch_size):
        vit, dec = self.vit, self.decoder
        n, kept, dim = self.num_patches, self.num_patches // 4, vit.embed_dim
        pixels, steps = 3 * vit.patch_size**2, self.grid[0] // 2
        encoder = vit_lib.flops_per_image(dim, vit.depth, 1 + kept, vit.mlp_ratio)
        decoder = vit_lib.flops_per_image(dec.embed_dim, dec.depth, 1 + n, dec.mlp_ratio)
        ends = 2 * kept * pixels * dim + 2 * (1 + n) * dec.embed_dim * (pixels + dim)
        moves = 8 * 2 * kept * dim**2
        squarings = 4 * 2 * dim**3 * (steps.bit_length() + steps.bit_count() - 2)
        # Backward costs twice the forward.
        return 3 * (batch_size * (encoder + decoder + ends + moves) + squarings)


METHOD = QBHeat
