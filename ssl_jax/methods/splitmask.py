# SPDX-License-Identifier: Apache-2.0
"""SplitMask: split an image in two, inpaint either half from the other, match the two.

The patches of one crop are split into two disjoint sets. One encoder runs on each set, without
mask tokens; a shallow decoder completes each with mask embeddings and classifies the visual words
of the missing patches. The mean of all decoder outputs describes the image: InfoNCE pulls together
the two descriptors of an image, against the other images of the batch. No second view, no teacher.

There is no public code. The paper leaves open, and this file chooses: a class token, given to both
branches, in neither loss; learned positions, added to the mask embeddings in the decoder; the
encoder's heads and MLP ratio for the decoder, whose LayerNorm is before head and pooling; no
LayerScale; descriptors of length 1, negatives from the other branch of the global batch, no
projector; equal weights of both losses; whether 75 % masking hides the same patches from both
branches (`split_complement`); scaling and centring of the tokenizer. Initializers are BEiT's.

Both branches are adjacent rows of one batch, so that no image moves between devices.

References:
  El-Nouby et al., Are large-scale datasets necessary for self-supervised pre-training?,
  arXiv 2112.10740, sections 4 and 5.5.
"""

import dataclasses
import functools
from typing import Annotated, Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax import fields, sharding
from ssl_jax.augment import photometry
from ssl_jax.methods import base, beit
from ssl_jax.models import blocks as blocks_lib
from ssl_jax.models import vit as vit_lib
from ssl_jax.objectives import losses

TEMPERATURE = 0.2  # of InfoNCE


class Branch(NamedTuple):
    visible: jax.Array  # (B, K) patches that this branch sees
    missing: jax.Array  # (B, N - K) patches that it predicts
    restore: jax.Array  # (B, N) position of raster patch j in [visible | missing]


def branch(perm, start, count):
    """The branch that sees perm[:, start : start + count], for permutations (B, N) of patches.

    [visible | missing] is perm rolled by `start`, so its inverse is that of perm minus `start`,
    modulo N: both branches share one sort.
    """
    turned = jnp.roll(perm, -start, axis=1)
    restore = (jnp.argsort(perm, axis=1) - start) % perm.shape[1]
    return Branch(turned[:, :count], turned[:, count:], restore)


class Decoder(nn.Module):
    """(latent (B, C + K, D), restore (B, N)) -> (B, C + N, D), after a LayerNorm; raster order.

    A missing patch is the mask embedding plus its position; visible patches have the position of
    the encoder.
    """

    embed_dim: int
    depth: int
    num_heads: int
    num_patches: int
    num_cls_tokens: int
    mlp_ratio: float = 4.0
    eps: float = 1e-6
    dtype: Any = jnp.float32
    remat: str = 'none'

    @nn.compact
    def __call__(self, latent, restore):
        c, dim, init = self.num_cls_tokens, self.embed_dim, blocks_lib.truncated_normal
        mask_token = self.param('mask_token', init, (1, 1, dim))
        table = self.param('decoder_pos_embed', init, (1, self.num_patches, dim))
        visible, last = latent[:, c:], latent.shape[1] - c - 1
        seen = jnp.take_along_axis(visible, jnp.minimum(restore, last)[..., None], axis=1)
        missing = (mask_token + table).astype(seen.dtype)
        patches = jnp.where((restore > last)[..., None], missing, seen)
        x = sharding.constrain(jnp.concatenate([latent[:, :c], patches], axis=1))
        blocks = blocks_lib.block_stack(
            self.depth,
            remat=self.remat,
            name='decoder_blocks',
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            ffn='mlp',
            layer_scale=None,
            eps=self.eps,
            dtype=self.dtype,
            kernel_init=init,
            capture=False,
        )
        x, _ = blocks(x, None)
        return blocks_lib.LayerNorm(self.eps, name='decoder_norm')(x)


@dataclasses.dataclass(frozen=True)
class SplitMask(beit.Words):
    """SplitMask; the defaults are those of its runs on ImageNet."""

    removed = {
        **beit.Words.removed,
        'decoder_num_heads': None,
        'decoder_pos': 'mask',
        'layer_scale': None,
        'nce_group_size': 0,
        'nce_moco_scale': False,
        'nce_negatives': 'other',
        'nce_normalize': True,
        'num_cls_tokens': 1,
        'pos_embed': 'learned',
        'proj_dim': 0,
        'temperature': 0.2,
    }

    decoder_depth: int = 2  # of encoder width
    split: Literal['block', 'uniform'] = 'block'  # masks; 'uniform' for the smallest data sets
    # Share of the patches hidden from the first branch; 0.75 with 'uniform'.
    split_ratio: Annotated[float, fields.Range(0.01, 0.99)] = 0.5
    split_complement: bool = True  # the second branch sees exactly those; False: as many others
    w_mim: Annotated[float, fields.Range(0.0, 1e6)] = 1.0  # weight of cross-entropy; 0: match only
    # Weight of InfoNCE, half for each direction; 0: split and inpaint only.
    w_nce: Annotated[float, fields.Range(0.0, 1e6)] = 1.0

    def check(self, run):
        yield from super().check(run)
        if not self.split_complement and (self.split == 'block' or self.split_ratio < 0.5):
            yield (
                f"method.split_complement=False needs method.split='uniform' and split_ratio of at "
                f"least 0.5, not '{self.split}' and {self.split_ratio}: set split_complement=True."
            )
        if not self.w_mim and not self.w_nce:
            yield 'method.w_mim and method.w_nce are both 0, nothing is learned: set w_mim=1.'
        if self.w_nce and run.batch_size // run.accum_steps < 2:
            yield (
                'method.w_nce compares the images of a micro-batch: set batch_size to 2 or more '
                'times accum_steps, or method.w_nce=0.'
            )

    @property
    def min_images(self):
        return 2 if self.w_nce else 1

    def warnings(self, batch_size, ways, accum_steps=1):
        """InfoNCE sees micro-batches."""
        if self.w_nce:
            yield from base.micro_batches('InfoNCE', batch_size, accum_steps)

    @functools.cached_property
    def vit(self):
        return self.encoder(pos_embed='learned', init_scheme='beit')

    @functools.cached_property
    def decoder(self):
        vit = self.vit
        return Decoder(
            embed_dim=vit.embed_dim,
            depth=self.decoder_depth,
            num_heads=vit.num_heads,
            num_patches=self.num_patches,
            num_cls_tokens=vit.num_cls_tokens,
            mlp_ratio=self.mlp_ratio,
            eps=self.eps,
            dtype=vit.dtype,
            remat=self.remat,
        )

    @property
    def hidden(self):
        """Patches hidden from the first branch."""
        return int(self.num_patches * self.split_ratio + 1e-6)

    @property
    def ranges(self):
        """(start, count) of what either branch sees in the permutation of the patches."""
        kept = self.num_patches - self.hidden
        return ((0, kept), (kept, self.hidden if self.split_complement else kept))

    def init(self, rng):
        rngs = jax.random.split(rng, 5)  # the fourth is free
        dim, c = self.vit.embed_dim, self.vit.num_cls_tokens
        latent, restore = jnp.zeros((1, c + 1, dim)), jnp.zeros((1, self.num_patches), jnp.int32)
        params = {
            'encoder': vit_lib.init_params(self.vit, rngs[0]),
            'decoder': self.decoder.init(rngs[1], latent, restore)['params'],
            'head': self.head.init(rngs[2], latent[:, 0])['params'],
        }
        return params, self.init_extra(rngs[4])

    def permutation(self, keys):
        """(B, N): patches of the first branch, of the second, the rest; each ascending."""
        n = self.num_patches
        if self.split == 'block':
            mask = self.block_masks(keys, self.hidden)
            return jnp.argsort(mask, axis=1, stable=True).astype(jnp.int32)
        noise = jax.vmap(lambda key: jax.random.uniform(key, (n,)))(keys)
        order = jnp.argsort(noise, axis=1).astype(jnp.int32)
        ends = [start + count for start, count in self.ranges]
        parts = jnp.split(order, ends, axis=1)
        return jnp.concatenate([jnp.sort(part, axis=1) for part in parts], axis=1)

    def loss(self, params, extra, batch, rng, step):
        del step
        augment_rng, split_rng, drop_rng = jax.random.split(rng, 3)
        images = self.augment(batch, augment_rng)
        targets, changes, stats = self.targets(extra, images)
        perm = self.permutation(photometry.sample_keys(split_rng, batch['row']))
        drop_keys = photometry.sample_keys(drop_rng, batch['row'])
        parts = [branch(perm, *span) for span in self.ranges]
        loss, metrics = self.objective(
            params, photometry.normalize(images), parts, targets, drop_keys
        )
        if 'mim' in metrics:
            stats = self.metrics(metrics['mim'], stats)
        return loss, (changes, {**metrics, **stats})

    def reconstruct(self, params, extra, images, keys):
        """Pictures of the first branch; {} of matching alone, which predicts no patches."""
        part = branch(self.permutation(keys), *self.ranges[0])
        return self._pictures(params, extra, images, part)

    def reconstruct_hidden(self, params, extra, images, order, visible):
        return self._pictures(params, extra, images, branch(order, 0, visible))

    def _pictures(self, params, extra, images, part):
        if not self.w_mim:
            return {}
        out = self._one(params, photometry.normalize(images), part, None)
        hidden = part.restore >= part.visible.shape[1]
        return self.draw(params, extra, images, out[:, self.vit.num_cls_tokens :], hidden)

    def objective(self, params, images, parts, targets, drop_keys=None):
        """(loss, terms) on normalised images (B, H, W, 3), the two `Branch`es and all targets."""
        outs = self.forward(params, images, parts, drop_keys)
        c, loss, metrics = self.vit.num_cls_tokens, 0.0, {}
        if self.w_mim:
            tokens, wanted = [], []
            for out, part in zip(outs, parts, strict=True):
                ids = part.missing
                tokens.append(jnp.take_along_axis(out[:, c:], ids[..., None], axis=1))
                ids = ids if targets.ndim == 2 else ids[..., None]
                wanted.append(jnp.take_along_axis(targets, ids, axis=1))
            mim, metrics = self.inpaint(
                params, jnp.concatenate(tokens, axis=1), jnp.concatenate(wanted, axis=1)
            )
            metrics = {**metrics, 'mim': mim}
            loss += self.w_mim * mim
        if self.w_nce:
            x = [out[:, c:].astype(jnp.float32).mean(axis=1) for out in outs]
            nce, hits = losses.info_nce(*x, TEMPERATURE)
            metrics |= {'nce': nce, 'nce_acc': hits}
            loss += self.w_nce * nce
        return loss, metrics

    def forward(self, params, images, parts, drop_keys=None):
        """Decoder outputs of both branches, two arrays (B, C + N, D) in raster order."""
        keys = [None, None]
        if drop_keys is not None:
            keys = [jax.vmap(lambda k, i=i: jax.random.fold_in(k, i))(drop_keys) for i in (0, 1)]
        if parts[0].visible.shape != parts[1].visible.shape:
            return [
                self._one(params, images, part, key) for part, key in zip(parts, keys, strict=True)
            ]

        def rows(x, y):  # row 2 i is the first branch of image i, row 2 i + 1 the second
            return jnp.stack([x, y], axis=1).reshape(-1, *x.shape[1:])

        both = jax.tree.map(rows, *parts)
        keys = None if drop_keys is None else rows(*keys)
        out = self._one(params, rows(images, images), both, keys)
        out = out.reshape(-1, 2, *out.shape[1:])
        return [out[:, 0], out[:, 1]]

    def _one(self, params, images, part, drop_keys):
        out = self.vit.apply(
            {'params': params['encoder']}, images, ids_keep=part.visible, drop_keys=drop_keys
        )
        latent = jnp.concatenate([out['cls_tokens'], out['patch_tokens']], axis=1)
        return self.decoder.apply({'params': params['decoder']}, latent, part.restore)

    def flops(self, batch_size):
        vit, dec, n = self.vit, self.decoder, self.num_patches
        c, total, counts = vit.num_cls_tokens, 0, [count for _, count in self.ranges]
        for count in counts:
            total += vit_lib.flops_per_image(vit.embed_dim, vit.depth, c + count, vit.mlp_ratio)
            total += vit_lib.flops_per_image(vit.embed_dim, dec.depth, c + n, dec.mlp_ratio)
        predicted = 2 * n - sum(counts) if self.w_mim else 0
        return batch_size * (3 * total + self.ends_flops(sum(counts), predicted))


METHOD = SplitMask
