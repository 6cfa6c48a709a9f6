# SPDX-License-Identifier: Apache-2.0
"""SplitMask: split an image in two, inpaint either half from the other, match the two.

The patches of one crop are split into two disjoint sets.  One encoder runs on each set, without
mask tokens; a shallow decoder completes each with mask embeddings and classifies the visual words
of the missing patches.  The mean of all decoder outputs describes the image: InfoNCE pulls together
the two descriptors of an image, against the other images of the batch.  No second view, no teacher.

There is no public code.  What the paper leaves open is a field of `config_splitmask.splitmask`,
marked [I] with the choice made here: the class token (given to both branches, in neither loss), the
decoder's heads, norm (a LayerNorm before head and pooling) and positions, LayerScale, descriptors
of length 1, negatives from the other branch and no projector, the weights of the losses, the
reading of 75 % masking, the tokenizer's scaling and centring.  The start is BEiT's.

Both branches are rows of one batch, next to each other, so that no image crosses devices.

Reference: El-Nouby et al., Are large-scale datasets necessary for self-supervised pre-training?,
arXiv 2112.10740, sections 4 and 5.5.
"""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ssl_jax import sharding
from ssl_jax.augment import photometry
from ssl_jax.kernels import ops
from ssl_jax.methods import beit
from ssl_jax.models import blocks as blocks_lib
from ssl_jax.models import pos_embed
from ssl_jax.models import vit as vit_lib
from ssl_jax.objectives import losses, masking


class Branch(NamedTuple):
    visible: jax.Array  # (B, K) patches that this branch sees
    missing: jax.Array  # (B, N - K) patches that it predicts
    restore: jax.Array  # (B, N) position of raster patch j in [visible | missing]


def branch(perm, start, count):
    """The branch that sees perm[:, start : start + count], for permutations (B, N) of patches.

    [visible | missing] is perm turned by `start`, so its inverse is that of perm minus `start`,
    modulo N: one sort serves both branches.
    """
    turned = jnp.roll(perm, -start, axis=1)
    restore = (jnp.argsort(perm, axis=1) - start) % perm.shape[1]
    return Branch(turned[:, :count], turned[:, count:], restore)


class Decoder(nn.Module):
    """(latent (B, C + K, D), restore (B, N)) -> (B, C + N, D), after a LayerNorm; raster order.

    A missing patch enters as the mask embedding plus its position; visible patches carry the
    position of the encoder, and get another one only where `pos` is 'all'.
    """

    embed_dim: int
    depth: int
    num_heads: int
    num_patches: int
    num_cls_tokens: int
    pos: str = 'mask'
    pos_embed: str = 'learned'
    mlp_ratio: float = 4.0
    layer_scale: float | None = None
    eps: float = 1e-6
    dtype: Any = jnp.float32
    remat: str = 'none'

    @nn.compact
    def __call__(self, latent, restore):
        c, dim, init = self.num_cls_tokens, self.embed_dim, blocks_lib.truncated_normal
        mask_token = self.param('mask_token', init, (1, 1, dim))
        if self.pos_embed == 'sincos':
            table = jnp.asarray(pos_embed.sincos(dim, round(self.num_patches**0.5), 0))
        else:
            table = self.param('decoder_pos_embed', init, (1, self.num_patches, dim))
        visible, last = latent[:, c:], latent.shape[1] - c - 1
        seen = jnp.take_along_axis(visible, jnp.minimum(restore, last)[..., None], axis=1)
        if self.pos == 'all':
            seen = seen + table.astype(seen.dtype)
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
            layer_scale=self.layer_scale,
            eps=self.eps,
            dtype=self.dtype,
            kernel_init=init,
            capture=False,
        )
        x, _ = blocks(x, None)
        return blocks_lib.LayerNorm(self.eps, name='decoder_norm')(x)


class Projector(nn.Module):
    """Descriptors (B, D) -> (B, out_dim): Linear, GELU, Linear."""

    out_dim: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        dense = dict(dtype=self.dtype, kernel_init=blocks_lib.truncated_normal)
        x = blocks_lib.Dense(x.shape[-1], name='0', **dense)(x)
        return blocks_lib.Dense(self.out_dim, name='2', fn=ops.gelu_dense, **dense)(x)


@dataclasses.dataclass(frozen=True)
class SplitMask(beit.Words):
    """The method; see `ssl_jax.methods` for the contract and `config_splitmask` for the fields."""

    decoder: Decoder | None = None
    projector: Projector | None = None
    split: str = 'block'
    split_ratio: float = 0.5
    split_complement: bool = True
    w_mim: float = 1.0
    w_nce: float = 1.0
    temperature: float = 0.2
    nce_normalize: bool = True
    nce_negatives: str = 'other'
    nce_group_size: int = 0
    nce_moco_scale: bool = False

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
        rngs = jax.random.split(rng, 5)
        dim, c = self.vit.embed_dim, self.vit.num_cls_tokens
        latent, restore = jnp.zeros((1, c + 1, dim)), jnp.zeros((1, self.num_patches), jnp.int32)
        params = {
            'encoder': vit_lib.init_params(self.vit, rngs[0]),
            'decoder': self.decoder.init(rngs[1], latent, restore)['params'],
            'head': self.head.init(rngs[2], latent[:, 0])['params'],
        }
        if self.projector is not None:
            params['projector'] = self.projector.init(rngs[3], latent[:, 0])['params']
        return params, self.init_extra(rngs[4])

    def permutation(self, keys):
        """(B, N): patches of the first branch, of the second, the rest; each ascending."""
        n = self.num_patches
        if self.split == 'block':
            mask = masking.block_masks(
                keys,
                self.grid,
                self.hidden,
                min_patches=self.on_grid(self.min_block),
                max_patches=self.on_grid(self.max_block),
                exact=True,
            )
            return jnp.argsort(mask, axis=1, stable=True).astype(jnp.int32)
        noise = jax.vmap(lambda key: jax.random.uniform(key, (n,)))(keys)
        order = jnp.argsort(noise, axis=1).astype(jnp.int32)
        ends = [start + count for start, count in self.ranges]
        parts = jnp.split(order, ends, axis=1)
        return jnp.concatenate([jnp.sort(part, axis=1) for part in parts], axis=1)

    def loss(self, params, extra, batch, rng, step):
        del step
        see_rng, split_rng, drop_rng = jax.random.split(rng, 3)
        images = self.see(batch, see_rng)
        targets, extra, stats = self.targets(extra, images)
        perm = self.permutation(photometry.sample_keys(split_rng, batch['row']))
        drop_keys = photometry.sample_keys(drop_rng, batch['row'])
        parts = [branch(perm, *span) for span in self.ranges]
        loss, metrics = self.objective(
            params, photometry.normalize(images), parts, targets, drop_keys
        )
        if 'mim' in metrics:
            stats = self.log(metrics['mim'], stats)
        return loss, (extra, {**metrics, **stats})

    def reconstruct(self, params, extra, images, keys):
        """uint8 images (B, S, S, 3), keys (B,) -> pictures of the first branch, see `draw`.

        {} of matching alone, which predicts no patches.
        """
        if not self.w_mim:
            return {}
        part = branch(self.permutation(keys), *self.ranges[0])
        out = self._one(params, photometry.normalize(images), part, None)
        hidden = part.restore >= part.visible.shape[1]
        return self.draw(params, extra, images, out[:, self.vit.num_cls_tokens :], hidden)

    def objective(self, params, images, parts, targets, drop_keys=None):
        """(loss, terms) on normalised images (B, H, W, 3), the two `Branch`es and all targets."""
        outs = self.forward(params, images, parts, drop_keys)
        c, loss, metrics = self.vit.num_cls_tokens, 0.0, {}
        if self.w_mim:
            tokens, wanted = [], []
            for out, part in zip(outs, parts):
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
            if self.projector is not None:
                x = [self.projector.apply({'params': params['projector']}, y) for y in x]
            nce, hits = losses.info_nce(
                *x,
                self.temperature,
                normalize=self.nce_normalize,
                negatives=self.nce_negatives,
                groups=len(images) // (self.nce_group_size or len(images)),
            )
            metrics |= {'nce': nce, 'nce_acc': hits}
            scale = 2 * self.temperature if self.nce_moco_scale else 1.0
            loss += self.w_nce * scale * nce
        return loss, metrics

    def forward(self, params, images, parts, drop_keys=None):
        """Decoder outputs of both branches, two arrays (B, C + N, D) in raster order."""
        keys = [None, None]
        if drop_keys is not None:
            keys = [jax.vmap(lambda k, i=i: jax.random.fold_in(k, i))(drop_keys) for i in (0, 1)]
        if parts[0].visible.shape != parts[1].visible.shape:
            return [self._one(params, images, part, key) for part, key in zip(parts, keys)]

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


def from_config(config, clock=None):
    """Builds the method from `config.method`, `config.dtype` and `config.remat`."""
    del clock  # nothing here changes from step to step
    m = config.method
    vit = beit.encoder_from_config(config, pos_embed=m.pos_embed, num_cls_tokens=m.num_cls_tokens)
    decoder = Decoder(
        embed_dim=vit.embed_dim,
        depth=m.decoder_depth,
        num_heads=m.decoder_num_heads or vit.num_heads,
        num_patches=(m.img_size // m.patch_size) ** 2,
        num_cls_tokens=m.num_cls_tokens,
        pos=m.decoder_pos,
        pos_embed=m.pos_embed,
        mlp_ratio=m.mlp_ratio,
        layer_scale=m.layer_scale,
        dtype=vit.dtype,
        remat=config.remat,
    )
    return SplitMask(
        vit=vit,
        decoder=decoder,
        projector=Projector(m.proj_dim, vit.dtype) if m.proj_dim else None,
        split=m.split,
        split_ratio=m.split_ratio,
        split_complement=m.split_complement,
        w_mim=m.w_mim,
        w_nce=m.w_nce,
        temperature=m.temperature,
        nce_normalize=m.nce_normalize,
        nce_negatives=m.nce_negatives,
        nce_group_size=m.nce_group_size,
        nce_moco_scale=m.nce_moco_scale,
        **beit.words_from_config(config),
    )
