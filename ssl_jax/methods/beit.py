# SPDX-License-Identifier: Apache-2.0
"""BEiT: masked patches are classified into visual words.

Blocks of patches, 40 % of an image, are replaced by a mask token; a linear layer on the encoder's
tokens predicts the words of the masked patches. Positions are relative, keys have no bias.

Differences from the official code:
- Words come from any tokenizer of `objectives.words`; the official one is the dVAE.
- Masks are filled up to the target with single patches, because shapes are static.

References:
  BEiT, arXiv 2106.08254, `modeling_pretrain.py`, `engine_for_pretraining.py`.
"""

import dataclasses
import functools
import math
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax import fields
from ssl_jax.augment import photometry
from ssl_jax.methods import base
from ssl_jax.models import blocks as blocks_lib
from ssl_jax.models import patches as patches_lib
from ssl_jax.models import vit as vit_lib
from ssl_jax.objectives import losses, masking
from ssl_jax.objectives import words as words_lib

KEPT = 0.99  # decay per step of the running word frequencies
MIN_BLOCK, MAX_BLOCK = 16, 75  # patches of a masked block, on a grid of 14x14


@dataclasses.dataclass(frozen=True)
class Words(base.OneView):
    """Crops, photometry, visual words and metrics of BEiT and SplitMask."""

    monitored = 'patch'  # no loss is on the class token
    removed = {
        'crop_ratio': (3 / 4, 4 / 3),
        'dvae_width': 256,
        'kmeans_patches': ...,  # needed before step 0
        'max_block': 75,
        'min_block': 16,
        'token_centre': 'auto',
        'token_norm': 'imagenet',
        'token_range': (-1.0, 1.0),
    }

    size: vit_lib.Size | None = 'B'
    drop_path: Annotated[float, fields.Range(0.0, 0.999)] = 0.1
    crop_scale: tuple = (0.08, 1.0)

    # Targets of masked patches, see `objectives.words`. BEiT used the dvae, SplitMask
    # random_projection (its scaling and centring are not published); 'pixel' is MAE's regression.
    tokenizer: Literal['random_patches', 'random_projection', 'kmeans', 'dvae', 'pixel'] = (
        'random_patches'
    )
    vocab: Annotated[int | None, fields.Range(2, 2**24)] = 8192  # words
    token_patch_size: int | None = 8  # pixels of a patch in the tokenizer's image
    dvae: str = ''  # weights of DALL-E's encoder, see words.dvae_codebook
    # A run that uses fewer words (by perplexity) is refused; 0: any.
    min_perplexity: Annotated[float, fields.Range(0.0, 2.0**24)] = 50.0

    brightness: float = 0.0  # colour jitter, largest changes as torchvision's ColorJitter has them
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    jitter_prob: fields.Probability = 0.0  # probability of any jitter
    grey_prob: fields.Probability = 0.0
    blur_prob: fields.Probability = 0.0
    solarize_prob: fields.Probability = 0.0

    def check(self, run):
        yield from super().check(run)
        if self.tokenizer == 'dvae' and not self.dvae:
            yield (
                "method.tokenizer='dvae' needs weights: set method.dvae to the state dict of "
                "DALL-E's encoder, or method.tokenizer='random_patches'."
            )

    def infer(self, facts, choose):
        _, patch = self.infer_crop(facts, choose)
        choose('token_patch_size', math.gcd(patch, 8), f'pixels, of patches of {patch}')
        n = facts.num_images
        count = 512 if n < 1000 else 2048 if n < 100_000 else 8192
        choose('vocab', count, f'visual words for {n:,} images')
        self.infer_encoder(facts, choose)

    @functools.cached_property
    def tok(self):
        """The `words.Tokenizer`; None where pixels are the target, normalised as in MAE."""
        if self.tokenizer == 'pixel':
            return None
        return words_lib.Tokenizer(
            kind=self.tokenizer,
            vocab=self.vocab,
            image_patch=self.patch_size,
            patch=self.token_patch_size,
        )

    @functools.cached_property
    def head(self):
        """Linear layer to words, or to pixels."""
        outputs = 3 * self.patch_size**2 if self.tok is None else self.vocab
        return blocks_lib.Dense(outputs, jnp.dtype(self.dtype), blocks_lib.truncated_normal)

    def on_grid(self, patches):
        """A number of patches of a 14x14 grid in proportion to this one, at least 1."""
        return max(round(patches * self.num_patches / 196), 1)

    def block_masks(self, keys, target):
        """Masks (B, N) of blocks, `target` patches each."""
        return masking.block_masks(
            keys,
            self.grid,
            target,
            min_patches=self.on_grid(MIN_BLOCK),
            max_patches=self.on_grid(MAX_BLOCK),
            exact=True,
        )

    def init_extra(self, rng):
        """extra: codebook, running word frequencies (V,), whether `prepare` has run."""
        if self.tok is None:
            return {}
        return {
            'codebook': words_lib.init(self.tok, rng),
            'word_frequency': jnp.zeros(self.vocab),
            'prepared': jnp.zeros(()),
        }

    def prepare(self, extra, start):
        """Makes the codebook before step 0, once.

        Raises:
          ValueError: its words are used too unevenly, see `words.check`.
        """
        if self.tok is None or bool(extra['prepared']):
            return {}, []
        tok, book = self.tok, start.fetch(extra['codebook'])
        with start.batches() as batches:
            images = (batch['image'][:, 0] for batch in batches)
            if tok.kind == 'dvae':
                book = words_lib.dvae_codebook(tok, start.tensors(self.dvae))
            else:
                book = words_lib.fit(tok, book, images, start.seed)
            counts = words_lib.survey(tok, book, images)
        stats = {k: float(v) for k, v in jax.jit(words_lib.statistics)(counts).items()}
        words_lib.check(tok, stats, self.min_perplexity)
        line = (
            f'words     {tok.vocab:,} by {tok.kind}, perplexity '
            f'{stats["token_perplexity"]:,.0f} on {counts.sum():,.0f} patches, the commonest '
            f'{stats["token_top"]:.2%}, unigram cross-entropy {stats["token_unigram"]:.3f} nats'
        )
        frequency = counts / counts.sum()
        return {'codebook': book, 'word_frequency': frequency, 'prepared': np.ones(())}, [line]

    def augment(self, batch, rng):
        """uint8 crops -> augmented images (B, H, W, 3) in [0, 255]."""
        flip_keys, color_keys = (
            photometry.sample_keys(k, batch['row']) for k in jax.random.split(rng)
        )
        images = photometry.random_flip(flip_keys, batch['image'][:, 0], self.flip)
        names = ('jitter_prob', 'grey_prob', 'blur_prob', 'solarize_prob')
        if any(getattr(self, name) for name in names):
            names += ('brightness', 'contrast', 'saturation', 'hue')
            strengths = {name: getattr(self, name) for name in names}
            images = photometry.photometric(color_keys, images, **strengths)
        return images

    def targets(self, extra, images):
        """(targets, changes of extra, statistics): words (B, N), or pixels (B, N, p*p*3).

        The statistics use a running mean of the frequencies over about 100 batches: those of one
        small batch look more uneven than they are.
        """
        if self.tok is None:
            pixels = patches_lib.patchify(photometry.normalize(images), self.patch_size)
            return patches_lib.normalize_patches(pixels), {}, {}
        words = words_lib.tokens(self.tok, extra['codebook'], images / 255.0)
        now = words_lib.count(words, self.vocab) / words.size
        frequency = KEPT * extra['word_frequency'] + (1 - KEPT) * now
        frequency = jax.lax.stop_gradient(frequency)
        return words, {'word_frequency': frequency}, words_lib.statistics(frequency)

    def inpaint(self, params, tokens, targets, valid=None):
        """(mean loss, accuracy) of predicting `targets` from tokens (B, M, D), where `valid`.

        The loss is the cross-entropy of words, or the squared error of pixels (no accuracy).
        """
        logits = self.head.apply({'params': params['head']}, tokens)
        weights = jnp.ones(logits.shape[:-1]) if valid is None else valid.astype(jnp.float32)

        def mean(x):
            return (x * weights).sum() / weights.sum()

        if self.tok is None:
            error = jnp.square(logits.astype(jnp.float32) - targets).mean(axis=-1)
            return mean(error), {}
        hits = logits.argmax(axis=-1) == targets
        return mean(losses.word_cross_entropy(logits, targets)), {'mim_acc': mean(hits)}

    def draw(self, params, extra, images, tokens, hidden):
        """Pictures of the most likely words, or of the pixels, predicted from tokens (B, N, D).

        {} where words are not patches: random projection and dVAE.

        Args:
          images: uint8 (B, S, S, 3).
          hidden: (B, N).
        """
        tok, x, p = self.tok, images / 255.0, self.patch_size
        if tok is not None and tok.kind not in words_lib.FITTED:
            return {}
        out = self.head.apply({'params': params['head']}, tokens)
        if tok is None:
            return patches_lib.from_pixels(images, hidden, p, out, norm_pix_loss=True)
        book = extra['codebook']
        drawn = words_lib.draw(tok, book, out.argmax(axis=-1), x)
        words = words_lib.draw(tok, book, words_lib.tokens(tok, book, x), x)
        return patches_lib.pictures(x, hidden, p, drawn, words=words)

    def metrics(self, mim, stats):
        """Loss, word statistics, and `mim_gain`: unigram cross-entropy minus loss."""
        if self.tok is None:
            return {'mim': mim}
        return {'mim': mim, 'mim_gain': stats['token_unigram'] - mim, **stats}

    def suspect(self, values, step):
        """Reports too few words in use, as after a change of the data."""
        del step
        found = values.get('token_perplexity', self.min_perplexity)
        if found >= self.min_perplexity:
            return None
        return (
            f'The visual words have a perplexity of {found:.1f}, below '
            f'method.min_perplexity={self.min_perplexity:g}: the task has become too easy.'
        )

    def left_behind(self):
        if self.tok is None:
            return ''
        return (
            f'The codebook of the {self.vocab:,} visual words ({self.tok.kind}) is in the '
            f'checkpoint, not in this export.'
        )

    def ends_flops(self, embedded, predicted):
        """FLOPs of forward and backward outside the blocks.

        Args:
          embedded: patches per image in the encoder.
          predicted: patches per image in the head.
        """
        dim = self.vit.embed_dim
        embed = 2 * embedded * 3 * self.patch_size**2 * dim
        head = 2 * predicted * dim * self.head.features
        words = 0
        if self.tok is not None:
            words = self.num_patches * words_lib.flops_per_patch(self.tok)
        return 3 * (embed + head) + words


@dataclasses.dataclass(frozen=True)
class BEiT(Words):
    """BEiT; the defaults are those of its base model."""

    removed = {**Words.removed, 'mask_exact': True}

    layer_scale: float | None = 0.1  # initial factor of each residual branch; large model: 1e-5
    abs_pos: bool = False  # adds learned absolute positions to the relative ones
    mask_patches: Annotated[int, fields.Range(1, 195)] = 75  # hidden, on a grid of 14x14
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    jitter_prob: fields.Probability = 1.0

    @functools.cached_property
    def vit(self):
        return self.encoder(
            pos_embed='learned' if self.abs_pos else 'none',
            rel_pos='shared',
            key_bias=False,
            mask_token=True,
            layer_scale=self.layer_scale,
            init_scheme='beit',
        )

    @property
    def target(self):
        """Number of patches that a mask hides."""
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
        augment_rng, mask_rng, drop_rng = jax.random.split(rng, 3)
        images = self.augment(batch, augment_rng)
        targets, changes, stats = self.targets(extra, images)
        mask = self.masks(photometry.sample_keys(mask_rng, batch['row']))
        drop_keys = photometry.sample_keys(drop_rng, batch['row'])
        images = photometry.normalize(images)
        loss, metrics = self.objective(params, images, mask, targets, drop_keys)
        return loss, (changes, {**metrics, **self.metrics(loss, stats)})

    def masks(self, keys):
        """Masks (B, N) of keys (B,), true where a patch is hidden."""
        return self.block_masks(keys, self.target)

    def reconstruct(self, params, extra, images, keys):
        return self._pictures(params, extra, images, self.masks(keys))

    def reconstruct_hidden(self, params, extra, images, order, visible):
        mask = masking.from_order(order, visible).mask > 0
        return self._pictures(params, extra, images, mask)

    def _pictures(self, params, extra, images, mask):
        x = photometry.normalize(images)
        out = self.vit.apply({'params': params['encoder']}, x, mask=mask)
        return self.draw(params, extra, images, out['patch_tokens'], mask)

    def objective(self, params, images, mask, targets, drop_keys=None, bound=None):
        """(loss, accuracy) on normalised images; the mean is over all masked patches of the batch.

        Args:
          mask: (B, N).
          targets: of all patches, see `targets`.
          bound: most patches hidden in an image; default the target of the sampler.
        """
        out = self.vit.apply({'params': params['encoder']}, images, mask=mask, drop_keys=drop_keys)
        taken = masking.masked_indices(mask[:, None], bound or self.target)
        rows = jnp.arange(len(mask))[:, None]
        tokens = out['patch_tokens'][rows, taken.indices]
        return self.inpaint(params, tokens, targets[rows, taken.indices], taken.valid)

    def networks(self, params, extra):
        networks = super().networks(params, extra)
        if self.tok is None:
            return networks
        return {**networks, 'head': (self.head, params['head'])}

    def flops(self, batch_size):
        vit, n = self.vit, self.num_patches
        blocks = vit_lib.flops_per_image(vit.embed_dim, vit.depth, 1 + n, vit.mlp_ratio)
        return batch_size * (3 * blocks + self.ends_flops(n, self.target))


METHOD = BEiT
