# SPDX-License-Identifier: Apache-2.0
"""Visual words, the classes of masked patches in BEiT and SplitMask.

A tokenizer maps every patch of an image to one of V words. Its codebook is a pytree of arrays that
is stored in checkpoints, because it is part of the task. There are four kinds:

  random_patches     words are patches of training images
  kmeans             words are centroids of training patches
  random_projection  words are drawn element-wise from U(-1, 1); needs no data
  dvae               words of DALL-E's encoder, with given weights

The first three assign argmax_i <x, e_i> with |e_i| = 1, where x is a patch in pixel space, scaled
by ImageNet's mean and std. SplitMask found all four equally good (75.3, 75.0, 75.2, 75.2 % on
iNaturalist 2019, table 2), but does not specify the scaling and centring of pixels or the range of
the uniform. These decide whether a random projection works at all: if brightness dominates the
product, as few as 5 of 8,192 words are effectively used. A random projection therefore subtracts
the mean colour of each patch, every run logs `statistics`, and `check` rejects poor codebooks.

The tokenizer sees a smaller image: 16-pixel patches of the encoder are averaged to 8 pixels. (BEiT
renders the crop a second time at half the size, with a Lanczos filter.)

References:
  SplitMask, arXiv 2112.10740, section 3.3, equation 1; BEiT, arXiv 2106.08254, section 2.1;
  DALL-E, arXiv 2102.12092, and `dall_e/encoder.py` of its code
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.augment import photometry
from ssl_jax.models import blocks
from ssl_jax.models import patches as patches_lib
from ssl_jax.run import errors

FITTED = ('random_patches', 'kmeans')  # words come from training patches and look like them
CHUNK = 1024  # words compared at a time: scores of all 8,192 for a large batch take gigabytes
MAX_BATCHES = 32  # batches for random patches, and for the counts of words before step 0
COUNTED = 65_536  # patches whose words are counted before step 0
FIT_PATCHES = 3_000_000  # for k-means
DVAE_WIDTH = 256  # channels of the first group of DALL-E's encoder


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Static settings of a tokenizer; its arrays are in the codebook."""

    kind: str  # 'random_patches', 'kmeans', 'random_projection' or 'dvae'
    vocab: int = 8192  # V, number of words
    image_patch: int = 16  # side of the encoder's patches, pixels
    patch: int = 8  # side of a patch after averaging, pixels; divides image_patch

    def __post_init__(self):
        if self.patch < 1 or self.image_patch % self.patch:
            raise errors.UserError(
                f'method.token_patch_size={self.patch} does not divide method.patch_size='
                f'{self.image_patch}: use {_divisor(self.image_patch, self.patch)}.'
            )
        if self.kind == 'dvae' and self.patch != 8:
            raise errors.UserError(
                f'the dVAE has patches of 8 pixels: set method.token_patch_size=8, not '
                f'{self.patch}.'
            )

    @property
    def dim(self) -> int:
        """Length of a patch vector."""
        return 3 * self.patch**2


def _divisor(n, near):
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - near))


def small_image(tok: Tokenizer, x: jax.Array) -> jax.Array:
    """(B, H, W, 3) -> tokenizer input: means over squares of image_patch / patch pixels."""
    f = tok.image_patch // tok.patch
    if f == 1:
        return x
    b, h, w, c = x.shape
    return x.reshape(b, h // f, f, w // f, f, c).mean(axis=(2, 4))


def patches(tok: Tokenizer, x: jax.Array) -> jax.Array:
    """(B, H, W, 3) in [0, 1] -> patch vectors (B, N, dim), float32, as the words compare them."""
    x = small_image(tok, x.astype(jnp.float32))
    x = (x - jnp.asarray(photometry.MEAN)) / jnp.asarray(photometry.STD)
    x = patches_lib.patchify(x, tok.patch)
    if tok.kind != 'random_projection':
        return x
    return x - jnp.tile(x.reshape(*x.shape[:2], -1, 3).mean(axis=2), tok.patch**2)


def init(tok: Tokenizer, rng: jax.Array) -> dict[str, jax.Array]:
    """Initial codebook: that of a random projection, or zeros for the dVAE."""
    if tok.kind == 'dvae':
        return {k: jnp.zeros(s) for k, s in dvae_shapes(tok.vocab).items()}
    shape = (tok.vocab, tok.dim)
    words = jax.random.uniform(rng, shape, minval=-1.0, maxval=1.0)
    return {'vectors': blocks.l2_normalize(words)}


def fit(tok: Tokenizer, codebook: dict, batches: Iterator[np.ndarray], seed: int) -> dict:
    """Fits the codebook of random patches or k-means to training images.

    Args:
      tok: the tokenizer.
      codebook: result of `init`; returned unchanged for kinds that are not FITTED.
      batches: iterator of uint8 (B, H, W, 3); only the batches needed are consumed.
      seed: seed of the sampling; it determines the codebook together with the images.

    Returns:
      The codebook.
    """
    if tok.kind not in FITTED:
        return codebook
    unit = jax.jit(blocks.l2_normalize)
    vectors, seen = _sample(tok, batches, seed)
    if tok.kind == 'random_patches':
        return {'vectors': unit(vectors)}
    means, counts = unit(vectors), np.zeros(tok.vocab, np.float32)
    done, batches = 0, itertools.chain(seen, batches)
    while done < FIT_PATCHES and (images := next(batches, None)) is not None:
        x = _patches(tok, images)
        means, counts = kmeans_step(means, counts, unit(x.reshape(-1, tok.dim)))
        done += math.prod(x.shape[:2])
    return {'vectors': unit(means)}


@functools.partial(jax.jit, static_argnums=0)
def _patches(tok, images):
    return patches(tok, images / 255.0)


def _sample(tok, batches, seed):
    """Returns V patches, from different images where possible, and the batches consumed."""
    rng = np.random.default_rng(seed)
    batches = iter(batches)
    seen = [next(batches)]
    size = len(seen[0])
    seen += itertools.islice(batches, min(-(-tok.vocab // size), MAX_BATCHES) - 1)
    per_image = -(-tok.vocab // (size * len(seen)))
    sampled = []
    for images in seen:
        x = np.asarray(_patches(tok, images))
        if per_image > x.shape[1]:
            raise errors.UserError(
                f'method.vocab={tok.vocab} is more than the {len(seen) * size * x.shape[1]} '
                f'patches of {len(seen)} batches: lower it.'
            )
        # A patch without contrast has no direction once it is centred: it is the last choice.
        flat = np.square(x).sum(axis=-1) < 1e-6
        order = np.argsort(rng.random(x.shape[:2]) + 2 * flat, axis=1)[:, :per_image]
        sampled.append(np.take_along_axis(x, order[..., None], axis=1))
    return np.concatenate([x.reshape(-1, tok.dim) for x in sampled])[: tok.vocab], seen


@jax.jit
def kmeans_step(means: jax.Array, counts: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """One mini-batch of spherical k-means: each mean becomes that of all x assigned to it so far.

    Args:
      means: (V, d).
      counts: (V,), number of vectors in each mean.
      x: (M, d) unit vectors.

    Returns:
      New means and counts.

    References:
      Sculley, Web-scale k-means clustering, 2010: a rate of 1 / count for each centre
    """
    words = nearest(blocks.l2_normalize(means), x)
    new = jax.ops.segment_sum(jnp.ones(len(x)), words, len(means))
    total = jax.ops.segment_sum(x, words, len(means))
    share = (1 / jnp.maximum(counts + new, 1))[:, None]
    moved = (means * counts[:, None] + total) * share
    return jnp.where((counts + new)[:, None] > 0, moved, means), counts + new


def nearest(vectors: jax.Array, x: jax.Array) -> jax.Array:
    """argmax_i <x, vectors_i>, the first in a tie: (V, d), (..., d) -> int32 (...).

    Float32 also on accelerators: rounded products would change words that nearly tie.
    """
    v = len(vectors)
    chunk = CHUNK if v % CHUNK == 0 else v

    def best_of(part):
        scores = jnp.einsum('...d,vd->...v', x, part, precision='highest')
        return scores.max(axis=-1), scores.argmax(axis=-1).astype(jnp.int32)

    def compare(best, part):
        start, part = part
        score, word = best_of(part)
        better = score > best[0]
        return (jnp.where(better, score, best[0]), jnp.where(better, start + word, best[1])), None

    if chunk == v:
        return best_of(vectors)[1]
    parts = vectors.reshape(v // chunk, chunk, -1)
    starts = jnp.arange(0, v, chunk, dtype=jnp.int32)
    none = (jnp.full(x.shape[:-1], -jnp.inf), jnp.zeros(x.shape[:-1], jnp.int32))
    return jax.lax.scan(compare, none, (starts, parts))[0][1]


def tokens(tok: Tokenizer, codebook: dict, x: jax.Array) -> jax.Array:
    """Images (B, H, W, 3) in [0, 1] -> words int32 (B, N), raster order; no gradient."""
    codebook, x = jax.lax.stop_gradient((codebook, x))
    if tok.kind == 'dvae':
        logits = dvae_logits(codebook, small_image(tok, x.astype(jnp.float32)))
        return logits.argmax(axis=-1).reshape(len(x), -1).astype(jnp.int32)
    return nearest(codebook['vectors'], patches(tok, x))


def draw(tok: Tokenizer, codebook: dict, words: jax.Array, x: jax.Array) -> jax.Array:
    """Draws words (B, N) of a FITTED tokenizer as images (B, H, W, 3) in [0, 1].

    A word is only a direction; each patch of x provides its length.
    """
    length = jnp.linalg.norm(patches(tok, x), axis=-1, keepdims=True)
    grid = x.shape[1] // tok.image_patch, x.shape[2] // tok.image_patch
    drawn = patches_lib.unpatchify(codebook['vectors'][words] * length, grid, tok.patch)
    drawn = photometry.denormalize(drawn)
    for axis in (1, 2):
        drawn = drawn.repeat(tok.image_patch // tok.patch, axis=axis)
    return drawn


def flops_per_patch(tok: Tokenizer) -> int:
    """FLOPs to find the word of one patch: 2 per multiply-add."""
    if tok.kind != 'dvae':
        return 2 * tok.vocab * tok.dim
    total = 0
    for name, shape in dvae_shapes(tok.vocab).items():
        group = int(name.split('_')[1]) if 'group' in name else 1 if 'input' in name else 4
        total += 2 * math.prod(shape) * 4 ** (4 - group) if len(shape) == 4 else 0
    return total


def count(words: jax.Array, vocab: int) -> jax.Array:
    """Occurrences of each word, float32 (V,)."""
    words = words.reshape(-1)
    return jnp.zeros(vocab).at[words].add(1.0)


def statistics(counts: jax.Array) -> dict[str, jax.Array]:
    """Statistics of the use of a codebook.

    Args:
      counts: (V,), occurrences of each word.

    Returns:
      dict of float32 scalars:
        token_perplexity: exp(entropy); V if all words are equally frequent, 1 if there is one.
        token_top: share of the most frequent word.
        token_unigram: entropy in nats, the cross-entropy of a model that knows the frequencies but
          no image; a trained model must be below it.
    """
    p = counts / jnp.maximum(counts.sum(), 1e-30)
    entropy = -jax.scipy.special.xlogy(p, p).sum()
    return {'token_perplexity': jnp.exp(entropy), 'token_top': p.max(), 'token_unigram': entropy}


def survey(tok: Tokenizer, codebook: dict, batches: Iterator[np.ndarray]) -> np.ndarray:
    """Counts (V,) of the words of COUNTED patches, or of MAX_BATCHES batches if they have fewer."""
    run = jax.jit(lambda book, x: count(tokens(tok, book, x / 255.0), tok.vocab))
    counts = np.zeros(tok.vocab, np.float32)
    for images in itertools.islice(batches, MAX_BATCHES):
        counts += np.asarray(run(codebook, images))
        if counts.sum() >= COUNTED:
            break
    return counts


def check(tok: Tokenizer, stats: dict, minimum: float) -> None:
    """Checks that a codebook is not trivial.

    Args:
      tok: the tokenizer.
      stats: result of `statistics`.
      minimum: lowest perplexity allowed.

    Raises:
      ValueError: the perplexity is below `minimum`.
    """
    perplexity = float(stats['token_perplexity'])
    if perplexity >= minimum:
        return
    other = 'kmeans' if tok.kind == 'random_patches' else 'random_patches'
    raise errors.UserError(
        f'The {tok.vocab} words of tokenizer={tok.kind} have a perplexity of {perplexity:.1f} (the '
        f'most frequent has {float(stats["token_top"]):.0%}), below method.min_perplexity='
        f'{minimum:g}: set method.tokenizer={other}, or min_perplexity=0 to train on them.'
    )


def dvae_shapes(vocab: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights (out, in, height, width) and biases of DALL-E's encoder, by name.

    Names are those of the published module with `_` for dots, without the leading `blocks`.
    """
    shapes = {'input_w': (DVAE_WIDTH, 3, 7, 7)}
    before = DVAE_WIDTH
    for group in range(1, 5):
        after = DVAE_WIDTH * 2 ** (group - 1)
        for block in (1, 2):
            name, hidden = f'group_{group}_block_{block}', after // 4
            if before != after:
                shapes[f'{name}_id_path_w'] = (after, before, 1, 1)
            channels = (before, hidden, hidden, hidden, after)
            for i, side in enumerate((3, 3, 3, 1)):
                shape = (channels[i + 1], channels[i], side, side)
                shapes[f'{name}_res_path_conv_{i + 1}_w'] = shape
            before = after
    shapes['output_conv_w'] = (vocab, before, 1, 1)
    return shapes | {k[:-1] + 'b': (s[0],) for k, s in shapes.items()}


def dvae_codebook(tok: Tokenizer, weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Codebook of given weights of DALL-E's encoder.

    Args:
      tok: the tokenizer.
      weights: {name: array} of its state dict, `blocks.group_1.block_1.…`. The published
        `encoder.pkl` is a pickled module: save its `state_dict()` as safetensors first.

    Raises:
      ValueError: names the first weight that is missing or has another shape.
    """
    keys = {k.removeprefix('blocks.').replace('.', '_'): k for k in weights}
    codebook = {}
    for name, shape in dvae_shapes(tok.vocab).items():
        value = np.asarray(weights[keys[name]], np.float32) if name in keys else None
        if value is None or value.shape != shape:
            problem = 'is missing' if value is None else f'has shape {value.shape}'
            raise errors.UserError(
                f'The dVAE does not fit, nothing was loaded: {name} {problem}, expected {shape}; '
                f"give the state dict of DALL-E's encoder, and set method.vocab to its number of "
                f'words (8192 in the published one).'
            )
        codebook[name] = value
    return codebook


def dvae_logits(weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """DALL-E's encoder: images (B, H, W, 3) in [0, 1] -> logits (B, H / 8, W / 8, V).

    The input is 0.8 x + 0.1. A block is the identity (a 1x1 convolution where the width changes)
    plus 1/64 of three ReLU-conv3 and one ReLU-conv1. The first three groups end in a 2x2 max pool.
    """

    def conv(name, x):
        y = jax.lax.conv_general_dilated(
            x, weights[f'{name}_w'], (1, 1), 'SAME', dimension_numbers=('NHWC', 'OIHW', 'NHWC')
        )
        return y + weights[f'{name}_b']

    x = conv('input', 0.8 * x + 0.1)
    for group in range(1, 5):
        for block in (1, 2):
            name = f'group_{group}_block_{block}'
            y = x
            for i in range(1, 5):
                y = conv(f'{name}_res_path_conv_{i}', jax.nn.relu(y))
            same = conv(f'{name}_id_path', x) if f'{name}_id_path_w' in weights else x
            x = same + y / 64
        if group < 4:
            b, h, w, c = x.shape
            x = x.reshape(b, h // 2, 2, w // 2, 2, c).max(axis=(2, 4))
    return conv('output_conv', jax.nn.relu(x))
