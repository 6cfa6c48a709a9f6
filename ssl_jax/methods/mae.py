# SPDX-License-Identifier: Apache-2.0
"""MAE and Pixio: hide three quarters of the patches, reconstruct their pixels.

Pixio is MAE with several class tokens, learned positions, masked blocks instead of single patches,
a deep decoder and no horizontal flip: the same code with other fields.

References:
  He et al., arXiv 2111.06377, `models_mae.py`; Pixio, arXiv 2512.15715,
  `pretraining/models_pixio.py`.
"""

import dataclasses
import functools
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from ssl_jax import fields
from ssl_jax.augment import photometry
from ssl_jax.methods import base
from ssl_jax.models import patches as patches_lib
from ssl_jax.models import vit as vit_lib
from ssl_jax.models.decoder import Decoder
from ssl_jax.objectives import losses, masking


@dataclasses.dataclass(frozen=True)
class MAE(base.OneView):
    """Masked autoencoder; the defaults are MAE's."""

    removed = {'crop_ratio': (3 / 4, 4 / 3)}

    num_cls_tokens: Annotated[int, fields.Range(0, 64)] = 1
    pos_embed: Literal['sincos', 'learned'] = 'sincos'  # fixed table (MAE) or parameters (Pixio)
    decoder_embed_dim: int | None = 512
    decoder_depth: int | None = 8
    decoder_num_heads: int | None = 16
    mask_ratio: Annotated[float, fields.Range(0.0, 0.999)] = 0.75  # fraction of patches hidden
    mask_grid: int | None = 1  # side in patches of the squares that are masked together
    norm_pix_loss: bool = True  # predict pixels normalised per patch

    def check(self, run):
        yield from super().check(run)
        yield from base.mask_rules(self)
        if not self.mask_ratio:
            yield 'method.mask_ratio=0 hides no patch, and the loss is over hidden ones: use 0.75.'
        for name in ('decoder_embed_dim', 'decoder_depth', 'decoder_num_heads'):
            if getattr(self, name) is None:
                yield f'method.{name} is None: set it.'
        yield from base.divisible(self, 'decoder_embed_dim', 'decoder_num_heads')
        yield from base.sincos(self, 'embed_dim')
        yield from base.sincos(self, 'decoder_embed_dim')

    def infer(self, facts, choose):
        grid = self.infer_grid(facts, choose)
        dim, depth = self.infer_encoder(facts, choose)
        width = 96 if dim < 300 else 256 if dim < 700 else 512
        width = choose('decoder_embed_dim', width, f'for an encoder of {dim}')
        # Large masked squares need a deep decoder (Pixio, table 13), single patches do not.
        deep = max(depth * (2 if grid > 1 else 1) // 3, 2)
        choose('decoder_depth', deep, f'for an encoder of {depth} blocks')
        heads = width // 32 if width % 32 == 0 else 4
        choose('decoder_num_heads', heads, '32 channels each')

    def infer_grid(self, facts, choose):
        """Chooses crop, patch and mask size from the short side; returns `mask_grid`."""
        short = facts.short_side
        most = 96 if facts.cpu else 256 if self.mask_grid is None else 224
        size = self.img_size or min(short, most)
        patch = choose('patch_size', base.patch_for(size), f'for crops of about {size} pixels')
        coarse = 1 if self.mask_grid == 1 else 4 if size >= 16 * patch else 2
        unit = patch * (self.mask_grid or coarse)
        size = max(size // unit, 2) * unit
        side = choose('img_size', size, f'short side of the images {short}') // patch
        grid = coarse if side % coarse == 0 else 1
        return choose('mask_grid', grid, f'squares on the grid of {side}x{side} patches')

    @functools.cached_property
    def vit(self):
        return self.encoder(num_cls_tokens=self.num_cls_tokens, pos_embed=self.pos_embed)

    @functools.cached_property
    def decoder(self):
        return Decoder(
            embed_dim=self.decoder_embed_dim,
            depth=self.decoder_depth,
            num_heads=self.decoder_num_heads,
            num_patches=self.num_patches,
            num_cls_tokens=self.num_cls_tokens,
            out_dim=3 * self.patch_size**2,
            pos_embed=self.pos_embed,
            mlp_ratio=self.mlp_ratio,
            eps=self.eps,
            dtype=jnp.dtype(self.dtype),
            remat=self.remat,
        )

    def init(self, rng):
        enc_rng, dec_rng = jax.random.split(rng)
        latent = jnp.zeros((1, self.num_cls_tokens + 1, self.vit.embed_dim))
        ids = jnp.zeros((1, self.num_patches), jnp.int32)
        params = {
            'encoder': vit_lib.init_params(self.vit, enc_rng),
            'decoder': self.decoder.init(dec_rng, latent, ids)['params'],
        }
        return params, {}

    def forward(self, params, images, mask, drop_keys=None):
        """Latent tokens and predicted pixels.

        Args:
          images: (B, H, W, 3), normalised.
          mask: `masking.Mask`.
          drop_keys: (B,), of stochastic depth; None to drop nothing.

        Returns:
          dict(latent, pred): latent (B, C + K, D) after the final norm, class tokens first, then
          kept patches in the order of `mask.ids_keep`; pred (B, N, p*p*3).
        """
        out = self.vit.apply(
            {'params': params['encoder']}, images, ids_keep=mask.ids_keep, drop_keys=drop_keys
        )
        latent = jnp.concatenate([out['cls_tokens'], out['patch_tokens']], axis=1)
        pred = self.decoder.apply({'params': params['decoder']}, latent, mask.ids_restore)
        return {'latent': latent, 'pred': pred}

    def target(self, images):
        """Targets of the decoder, (B, N, p*p*3)."""
        patches = patches_lib.patchify(images, self.patch_size)
        return patches_lib.normalize_patches(patches) if self.norm_pix_loss else patches

    def loss(self, params, extra, batch, rng, step):
        del step
        images = batch['image'][:, 0]
        flip_keys, mask_keys, drop_keys = jax.random.split(rng, 3)
        rows = batch['row']
        images = photometry.random_flip(photometry.sample_keys(flip_keys, rows), images, self.flip)
        images = photometry.normalize(images)
        mask = masking.random_masking(
            photometry.sample_keys(mask_keys, rows), self.grid, self.mask_ratio, self.mask_grid
        )
        out = self.forward(params, images, mask, photometry.sample_keys(drop_keys, rows))
        loss = losses.masked_mse(out['pred'], self.target(images), mask.mask)
        return loss, ({}, {})

    def networks(self, params, extra):
        networks = super().networks(params, extra)
        return {**networks, 'decoder': (self.decoder, params['decoder'])}

    def flops(self, batch_size):
        vit, dec = self.vit, self.decoder
        n, c = dec.num_patches, vit.num_cls_tokens
        kept = int(masking.num_blocks(self.grid, self.mask_grid) * (1 - self.mask_ratio))
        kept *= self.mask_grid**2
        pixels = 3 * vit.patch_size**2
        encoder = vit_lib.flops_per_image(vit.embed_dim, vit.depth, c + kept, vit.mlp_ratio)
        decoder = vit_lib.flops_per_image(dec.embed_dim, dec.depth, c + n, dec.mlp_ratio)
        ends = 2 * kept * pixels * vit.embed_dim + 2 * (c + n) * pixels * dec.embed_dim
        ends += 2 * (c + kept) * vit.embed_dim * dec.embed_dim
        return 3 * batch_size * (encoder + decoder + ends)  # backward costs twice the forward

    def reconstruct(self, params, extra, images, keys):
        del extra
        mask = masking.random_masking(keys, self.grid, self.mask_ratio, self.mask_grid)
        return self._pictures(params, images, mask)

    def reconstruct_hidden(self, params, extra, images, order, visible):
        del extra
        return self._pictures(params, images, masking.from_order(order, visible))

    def _pictures(self, params, images, mask):
        pred = self.forward(params, photometry.normalize(images), mask)['pred']
        return patches_lib.from_pixels(images, mask.mask, self.patch_size, pred, self.norm_pix_loss)


METHOD = MAE
