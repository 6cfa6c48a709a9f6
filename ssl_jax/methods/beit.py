# SPDX-License-Identifier: Apache-2.0
"""BEiT: masked patches are classified into visual words.

Blocks of patches, 40 % of an image, are replaced by a mask token; the encoder sees all positions
and a linear layer predicts the words of the masked ones.  Attention knows relative positions
only, keys have no bias.

What differs from the official code:
- The words come from any tokenizer of `ssl_jax.tokenizers`; theirs is the dVAE.
- Masks are filled up to their target with single patches, as shapes are static (`mask_exact`).

Reference: BEiT, arXiv 2106.08254, `modeling_pretrain.py`, `engine_for_pretraining.py`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.augment import photometry as photometry_lib
from ssl_jax.data import view as view_lib
from ssl_jax.interop import files
from ssl_jax.models import blocks as blocks_lib
from ssl_jax.models import patches as patches_lib
from ssl_jax.models import vit as vit_lib
from ssl_jax.objectives import losses, masking, reconstruction
from ssl_jax.objectives import words as words_lib

KEPT = 0.99  # of the running word frequencies from step to step


@dataclasses.dataclass(frozen=True)
class Words:
    """What BEiT and SplitMask share: crops, photometry, words and what is logged of them.

    Attributes:
      tokenizer: None where pixels are the target, normalised per patch as in MAE.
    """

    monitored = 'patch'  # features that must not collapse; the class token has no task of its own

    vit: vit_lib.ViT
    head: blocks_lib.Dense
    tokenizer: words_lib.Tokenizer | None
    dvae: str = ''
    min_perplexity: float = 50.0
    min_block: int = 16
    max_block: int = 75
    crop_scale: tuple = (0.08, 1.0)
    crop_ratio: tuple = (3 / 4, 4 / 3)
    flip: float = 0.5
    photometry: tuple = ()  # ((name, value), ...) for augment.photometric, () for none

    @property
    def grid(self):
        side = self.vit.img_size // self.vit.patch_size
        return (side, side)

    @property
    def num_patches(self):
        return self.grid[0] * self.grid[1]

    def on_grid(self, patches):
        """A number of patches of a 14x14 grid in proportion to this one, at least 1."""
        return max(round(patches * self.num_patches / 196), 1)

    def views(self):
        return (
            view_lib.View('image', self.vit.img_size, scale=self.crop_scale, ratio=self.crop_ratio),
        )

    def init_extra(self, rng):
        """extra: codebook, running word frequencies (V,), and whether `prepare` has run."""
        if self.tokenizer is None:
            return {}
        return {
            'codebook': words_lib.init(self.tokenizer, rng),
            'word_frequency': jnp.zeros(self.tokenizer.vocab),
            'prepared': jnp.zeros(()),
        }

    def prepare(self, extra, batches, seed):
        """Makes the codebook before step 0, once; see `ssl_jax.methods`.

        Raises:
          ValueError: if its words are used too unevenly, see `tokenizers.check`.
        """
        if self.tokenizer is None or bool(extra['prepared']):
            return extra, []
        images = (batch['image'][:, 0] for batch in batches)
        if self.tokenizer.kind == 'dvae':
            book = words_lib.dvae_codebook(self.tokenizer, files.read(self.dvae).tensors)
        else:
            book = words_lib.fit(self.tokenizer, jax.device_get(extra['codebook']), images, seed)
        counts = words_lib.survey(self.tokenizer, book, images)
        stats = {k: float(v) for k, v in jax.jit(words_lib.statistics)(counts).items()}
        words_lib.check(self.tokenizer, stats, self.min_perplexity)
        line = (
            f'words     {self.tokenizer.vocab:,} by {self.tokenizer.kind}, perplexity '
            f'{stats["token_perplexity"]:,.0f} on {counts.sum():,.0f} patches, the commonest '
            f'{stats["token_top"]:.2%}, unigram cross-entropy {stats["token_unigram"]:.3f} nats'
        )
        frequency = counts / counts.sum()
        return {'codebook': book, 'word_frequency': frequency, 'prepared': np.ones(())}, [line]

    def see(self, batch, rng):
        """uint8 crops -> augmented images (B, H, W, 3) in [0, 255]."""
        flip_keys, color_keys = (
            photometry_lib.sample_keys(k, batch['row']) for k in jax.random.split(rng)
        )
        images = photometry_lib.random_flip(flip_keys, batch['image'][:, 0], self.flip)
        if self.photometry:
            images = photometry_lib.photometric(color_keys, images, **dict(self.photometry))
        return images

    def targets(self, extra, images):
        """(targets of all patches, new extra, statistics): words (B, N), or pixels (B, N, p*p*3).

        The frequencies behind the statistics are a running mean over some hundred batches: of one
        small batch they would look more uneven than they are.
        """
        if self.tokenizer is None:
            pixels = patches_lib.patchify(photometry_lib.normalize(images), self.vit.patch_size)
            return patches_lib.normalize_patches(pixels), extra, {}
        words = words_lib.tokens(self.tokenizer, extra['codebook'], images / 255.0)
        now = words_lib.count(words, self.tokenizer.vocab) / words.size
        frequency = KEPT * extra['word_frequency'] + (1 - KEPT) * now
        new = {**extra, 'word_frequency': jax.lax.stop_gradient(frequency)}
        return words, new, words_lib.statistics(new['word_frequency'])

    def inpaint(self, params, tokens, targets, valid=None):
        """Mean loss of predicting `targets` from tokens (B, M, D), of `valid` ones, and accuracy.

        Cross-entropy of words, or squared error of pixels (no accuracy then).
        """
        logits = self.head.apply({'params': params['head']}, tokens)
        weights = jnp.ones(logits.shape[:-1]) if valid is None else valid.astype(jnp.float32)

        def mean(x):
            return (x * weights).sum() / weights.sum()

        if self.tokenizer is None:
            error = jnp.square(logits.astype(jnp.float32) - targets).mean(axis=-1)
            return mean(error), {}
        hits = logits.argmax(axis=-1) == targets
        return mean(losses.word_cross_entropy(logits, targets)), {'mim_acc': mean(hits)}

    def draw(self, params, extra, images, tokens, hidden):
        """Pictures of what the head makes of tokens (B, N, D): the likeliest words, or pixels.

        {} where words have no look, those of a random projection and the dVAE.

        Args:
          images: uint8 (B, S, S, 3).  hidden: (B, N).
        """
        tok, x, p = self.tokenizer, images / 255.0, self.vit.patch_size
        if tok is not None and tok.kind not in words_lib.FITTED:
            return {}
        out = self.head.apply({'params': params['head']}, tokens)
        if tok is None:
            return reconstruction.from_pixels(images, hidden, p, out, norm_pix_loss=True)
        book = extra['codebook']
        drawn = words_lib.draw(tok, book, out.argmax(axis=-1), x)
        words = words_lib.draw(tok, book, words_lib.tokens(tok, book, x), x)
        return reconstruction.pictures(x, hidden, p, drawn, words=words)

    def log(self, mim, stats):
        """The statistics of the words, and what is learned: how far the loss is below unigram."""
        if self.tokenizer is None:
            return {'mim': mim}
        return {'mim': mim, 'mim_gain': stats['token_unigram'] - mim, **stats}

    def suspect(self, values, step):
        """Names words that have become too few, as a change of the data may make them."""
        del step
        found = values.get('token_perplexity', self.min_perplexity)
        if found >= self.min_perplexity:
            return None
        return (
            f'The visual words are used as if there were {found:.1f}, fewer than '
            f'method.min_perplexity={self.min_perplexity:g}: the task has become too easy.'
        )

    def after_update(self, params, extra, step):
        del params, step
        return extra

    def backbone(self, params, extra):
        del extra
        return self.vit, params['encoder']

    def with_backbone(self, params, extra, encoder):
        return {**params, 'encoder': encoder}, extra

    def ends_flops(self, embedded, predicted):
        """FLOPs of forward and backward beside the blocks, for so many patches of an image."""
        dim = self.vit.embed_dim
        embed = 2 * embedded * 3 * self.vit.patch_size**2 * dim
        head = 2 * predicted * dim * self.head.features
        words = 0
        if self.tokenizer is not None:
            words = self.num_patches * words_lib.flops_per_patch(self.tokenizer)
        return 3 * (embed + head) + words


@dataclasses.dataclass(frozen=True)
class BEiT(Words):
    """The method; see `ssl_jax.methods` for the contract and `config_splitmask` for the fields."""

    mask_patches: int = 75
    mask_exact: bool = True

    @property
    def target(self):
        """Patches that a mask aims at."""
        return self.on_grid(self.mask_patches)

    def init(self, rng):
        rngs = jax.random.split(rng, 3)
        params = {
            'encoder': vit_lib.init_params(self.vit, rngs[0]),
            'head': self.head.init(rngs[1], jnp.zeros((1, self.vit.embed_dim)))['params'],
        }
        return params, self.init_extra(rngs[2])

    def loss(self, params, extra, batch, rng, step):
        del step
        see_rng, mask_rng, drop_rng = jax.random.split(rng, 3)
        images = self.see(batch, see_rng)
        targets, extra, stats = self.targets(extra, images)
        mask = self.masks(photometry_lib.sample_keys(mask_rng, batch['row']))
        drop_keys = photometry_lib.sample_keys(drop_rng, batch['row'])
        loss, metrics = self.objective(
            params, photometry_lib.normalize(images), mask, targets, drop_keys
        )
        return loss, (extra, {**metrics, **self.log(loss, stats)})

    def masks(self, keys):
        """Keys (B,) -> (B, N), true where a patch is hidden."""
        return masking.block_masks(
            keys,
            self.grid,
            self.target,
            min_patches=self.on_grid(self.min_block),
            max_patches=self.on_grid(self.max_block),
            exact=self.mask_exact,
        )

    def reconstruct(self, params, extra, images, keys):
        """uint8 images (B, S, S, 3), keys (B,) -> pictures, see `draw`."""
        mask, x = self.masks(keys), photometry_lib.normalize(images)
        out = self.vit.apply({'params': params['encoder']}, x, mask=mask)
        return self.draw(params, extra, images, out['patch_tokens'], mask)

    def objective(self, params, images, mask, targets, drop_keys=None, bound=None):
        """(loss, accuracy) on normalised images, for masks (B, N) and the targets of all patches.

        The mean is over all masked patches of the batch, of which an image has at most `bound`,
        by default the target of the sampler.
        """
        out = self.vit.apply({'params': params['encoder']}, images, mask=mask, drop_keys=drop_keys)
        taken = masking.masked_indices(mask[:, None], bound or self.target)
        rows = jnp.arange(len(mask))[:, None]
        tokens = out['patch_tokens'][rows, taken.indices]
        return self.inpaint(params, tokens, targets[rows, taken.indices], taken.valid)

    def flops(self, batch_size):
        vit, n = self.vit, self.num_patches
        blocks = vit_lib.flops_per_image(vit.embed_dim, vit.depth, 1 + n, vit.mlp_ratio)
        return batch_size * (3 * blocks + self.ends_flops(n, self.target))


def words_from_config(config):
    """The fields of `Words` except the encoder, as keyword arguments."""
    m = config.method
    tokenizer, outputs = None, 3 * m.patch_size**2
    if m.tokenizer != 'pixel':
        tokenizer, outputs = (
            words_lib.Tokenizer(
                kind=m.tokenizer,
                vocab=m.vocab,
                image_patch=m.patch_size,
                patch=m.token_patch_size,
                norm=m.token_norm,
                centre=m.token_centre,
                low=m.token_range[0],
                high=m.token_range[1],
                fit_patches=m.kmeans_patches,
                width=m.dvae_width,
            ),
            m.vocab,
        )
    if m.tokenizer == 'dvae' and not m.dvae:
        raise ValueError(
            "method.tokenizer='dvae' needs weights: set method.dvae to the state dict of DALL-E's "
            "encoder, or method.tokenizer='random_patches'."
        )
    names = ('brightness', 'contrast', 'saturation', 'hue')
    probs = ('jitter_prob', 'grey_prob', 'blur_prob', 'solarize_prob')
    photometry = tuple((k, m[k]) for k in names + probs) if any(m[k] for k in probs) else ()
    return dict(
        head=blocks_lib.Dense(outputs, jnp.dtype(config.dtype), blocks_lib.truncated_normal),
        tokenizer=tokenizer,
        dvae=m.dvae,
        min_perplexity=m.min_perplexity,
        min_block=m.min_block,
        max_block=m.max_block,
        crop_scale=tuple(m.crop_scale),
        crop_ratio=tuple(m.crop_ratio),
        flip=m.flip,
        photometry=photometry,
    )


def encoder_from_config(config, **fields):
    """The ViT of `config.method` with some more fields, started as BEiT starts it."""
    m = config.method
    dim, depth, heads = vit_lib.SIZES[m.size] if m.size else (None, None, None)
    return vit_lib.ViT(
        embed_dim=m.embed_dim or dim,
        depth=m.depth or depth,
        num_heads=m.num_heads or heads,
        patch_size=m.patch_size,
        img_size=m.img_size,
        mlp_ratio=m.mlp_ratio,
        layer_scale=m.layer_scale,
        drop_path=m.drop_path,
        init_scheme='beit',
        dtype=jnp.dtype(config.dtype),
        remat=config.remat,
        **fields,
    )


def from_config(config, clock=None):
    """Builds the method from `config.method`, `config.dtype` and `config.remat`."""
    del clock  # nothing here changes from step to step
    m = config.method
    vit = encoder_from_config(
        config,
        pos_embed='learned' if m.abs_pos else 'none',
        rel_pos='shared',
        key_bias=False,
        mask_token=True,
    )
    return BEiT(
        vit=vit,
        mask_patches=m.mask_patches,
        mask_exact=m.mask_exact,
        **words_from_config(config),
    )
