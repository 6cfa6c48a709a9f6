# SPDX-License-Identifier: Apache-2.0
"""MAE and Pixio: hide three quarters of the patches, reconstruct their pixels.

Pixio is MAE with several class tokens, learned positions, masked blocks instead of single patches,
a deep decoder and no horizontal flip; all of that is configuration.

Reference: He et al., arXiv 2111.06377, `models_mae.py`; Pixio, arXiv 2512.15715,
`pretraining/models_pixio.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp

from ssl_jax.augment import photometry
from ssl_jax.data import view as view_lib
from ssl_jax.models import patches as patches_lib
from ssl_jax.models import vit as vit_lib
from ssl_jax.models.decoder import Decoder
from ssl_jax.objectives import losses, masking, reconstruction


@dataclasses.dataclass(frozen=True)
class MAE:
    """The method; see `ssl_jax.methods` for the contract."""

    vit: vit_lib.ViT
    decoder: Decoder
    mask_ratio: float = 0.75
    mask_grid: int = 1
    norm_pix_loss: bool = True
    crop_scale: tuple = (0.2, 1.0)
    crop_ratio: tuple = (3 / 4, 4 / 3)
    flip: float = 0.5

    @property
    def grid(self):
        side = self.vit.img_size // self.vit.patch_size
        return (side, side)

    def views(self):
        return (
            view_lib.View('image', self.vit.img_size, scale=self.crop_scale, ratio=self.crop_ratio),
        )

    def init(self, rng):
        enc_rng, dec_rng = jax.random.split(rng)
        vit = self.vit
        encoder = vit_lib.init_params(vit, enc_rng)
        n = self.decoder.num_patches
        latent = jnp.zeros((1, vit.num_cls_tokens + 1, vit.embed_dim))
        decoder = self.decoder.init(dec_rng, latent, jnp.zeros((1, n), jnp.int32))['params']
        return {'encoder': encoder, 'decoder': decoder}, {}

    def forward(self, params, images, mask, drop_keys=None):
        """Normalised images (B, H, W, 3) and a masking.Mask -> dict(latent, pred).

        latent (B, C + K, D): after the final norm, class tokens first, kept patches in the order
        of the noise.  pred (B, N, p*p*3).
        """
        out = self.vit.apply(
            {'params': params['encoder']}, images, ids_keep=mask.ids_keep, drop_keys=drop_keys
        )
        latent = jnp.concatenate([out['cls_tokens'], out['patch_tokens']], axis=1)
        pred = self.decoder.apply({'params': params['decoder']}, latent, mask.ids_restore)
        return {'latent': latent, 'pred': pred}

    def target(self, images):
        """What the decoder must predict, (B, N, p*p*3)."""
        patches = patches_lib.patchify(images, self.vit.patch_size)
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
        return loss, (extra, {})

    def after_update(self, params, extra, step):
        del params, step
        return extra

    def backbone(self, params, extra):
        del extra
        return self.vit, params['encoder']

    def with_backbone(self, params, extra, encoder):
        return {**params, 'encoder': encoder}, extra

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
        """uint8 images (B, S, S, 3), keys (B,) -> pictures, see `reconstruction.from_pixels`."""
        del extra
        mask = masking.random_masking(keys, self.grid, self.mask_ratio, self.mask_grid)
        pred = self.forward(params, photometry.normalize(images), mask)['pred']
        return reconstruction.from_pixels(
            images, mask.mask, self.vit.patch_size, pred, self.norm_pix_loss
        )


def from_config(config, clock=None):
    """Builds the method from `config.method`, `config.dtype` and `config.remat`."""
    del clock  # nothing here changes from step to step
    m = config.method
    dim, depth, heads = vit_lib.SIZES[m.size] if m.size else (None, None, None)
    common = dict(
        num_cls_tokens=m.num_cls_tokens,
        pos_embed=m.pos_embed,
        mlp_ratio=m.mlp_ratio,
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
    )
    vit = vit_lib.ViT(
        embed_dim=m.embed_dim or dim,
        depth=m.depth or depth,
        num_heads=m.num_heads or heads,
        patch_size=m.patch_size,
        img_size=m.img_size,
        drop_path=m.drop_path,
        **common,
    )
    decoder = Decoder(
        embed_dim=m.decoder_embed_dim,
        depth=m.decoder_depth,
        num_heads=m.decoder_num_heads,
        num_patches=(m.img_size // m.patch_size) ** 2,
        out_dim=3 * m.patch_size**2,
        **common,
    )
    return MAE(
        vit=vit,
        decoder=decoder,
        mask_ratio=m.mask_ratio,
        mask_grid=m.mask_grid,
        norm_pix_loss=m.norm_pix_loss,
        crop_scale=tuple(m.crop_scale),
        crop_ratio=tuple(m.crop_ratio),
        flip=m.flip,
    )
