# SPDX-License-Identifier: Apache-2.0
"""Visual words: what the masked patches of BEiT and SplitMask are classified into.

A tokenizer turns the patches of an image into V words.  Its codebook is a pytree of arrays that is
stored with the checkpoints, for it is part of the task.  Four kinds:

  random_patches     words are patches of training images
  kmeans             words are centroids of training patches
  random_projection  words are drawn element-wise from U(low, high); needs no data
  dvae               words of DALL-E's encoder, whose weights are given

The first three assign argmax_i <x, e_i> with |e_i| = 1, where x is a patch in pixel space.
SplitMask found all four equally good (75.3, 75.0, 75.2, 75.2 % on iNaturalist 2019, table 2) but
does not say how pixels are scaled or centred, or the range of the uniform.  That decides whether a
random projection works at all: brightness dominates the product, and of 8,192 words as few as 5 are
effectively used.  So `statistics` are logged by every run and `check` refuses poor codebooks.

The tokenizer looks at a smaller image: patches of 16 pixels of the encoder are averaged to 8.
(BEiT renders the crop a second time at half the size, with a Lanczos filter.)

Reference: SplitMask, arXiv 2112.10740, section 3.3, equation 1; BEiT, arXiv 2106.08254, section
2.1; DALL-E, arXiv 2102.12092, and `dall_e/encoder.py` of its code.
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.augment import photometry
from ssl_jax.models import patches as patches_lib
from ssl_jax.objectives import losses

KINDS = ('random_patches', 'random_projection', 'kmeans', 'dvae')
FITTED = ('random_patches', 'kmeans')  # words are made of training patches, and look like them
NORMS = ('imagenet', 'signed', 'none')
CENTRES = ('auto', 'none', 'patch', 'channel')
CHUNK = 1024  # words that are compared at a time: all 8,192 for a large batch are gigabytes
MAX_BATCHES = 32  # from which random patches are drawn, and words counted before step 0
COUNTED = 65_536  # patches whose words are counted before step 0


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A rule from images to words; the numbers it needs are in the codebook.

    Attributes:
      kind: one of KINDS.
      vocab: V.
      image_patch: pixels, side of the encoder's patches.
      patch: pixels, side of a patch after averaging; divides image_patch.
      norm: pixels as (x - mean) / std of ImageNet ('imagenet'), in [-1, 1] ('signed') or [0, 1]
        ('none').
      centre: what is subtracted from a patch: its mean over all values ('patch'), over the pixels
        of each colour ('channel'), nothing ('none'); 'auto' is 'channel' for a random projection.
      low, high: range of a random projection.
      fit_patches: patches that k-means sees.
      width: hidden channels of the dVAE's first group.
    """

    kind: str
    vocab: int = 8192
    image_patch: int = 16
    patch: int = 8
    norm: str = 'imagenet'
    centre: str = 'auto'
    low: float = -1.0
    high: float = 1.0
    fit_patches: int = 3_000_000
    width: int = 256

    def __post_init__(self):
        for name, words in (('kind', KINDS), ('norm', NORMS), ('centre', CENTRES)):
            if getattr(self, name) not in words:
                raise ValueError(
                    f'tokenizer {name}={getattr(self, name)!r} is unknown: use one of '
                    f'{", ".join(words)}.'
                )
        if self.patch < 1 or self.image_patch % self.patch:
            raise ValueError(
                f'method.token_patch_size={self.patch} does not divide method.patch_size='
                f'{self.image_patch}: use {_divisor(self.image_patch, self.patch)}.'
            )
        if self.kind == 'dvae' and self.patch != 8:
            raise ValueError(
                f'the dVAE makes a word of every 8 pixels: set method.token_patch_size=8, not '
                f'{self.patch}.'
            )
        if not self.low < self.high:
            raise ValueError(f'method.token_range=({self.low}, {self.high}) is empty: use (-1, 1).')

    @property
    def dim(self):
        """Length of a patch vector."""
        return 3 * self.patch**2


def _divisor(n, near):
    return min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - near))


def small_image(tok, x):
    """(B, H, W, 3) -> what the tokenizer sees: means over squares of image_patch / patch pixels."""
    f = tok.image_patch // tok.patch
    if f == 1:
        return x
    b, h, w, c = x.shape
    return x.reshape(b, h // f, f, w // f, f, c).mean(axis=(2, 4))


def patches(tok, x):
    """(B, H, W, 3) in [0, 1] -> patch vectors (B, N, dim), float32, as `norm` and `centre` say."""
    x = _scaled(tok, x)
    return x - _mean(tok, x)


def _scaled(tok, x):
    x = small_image(tok, x.astype(jnp.float32))
    if tok.norm == 'imagenet':
        x = (x - jnp.asarray(photometry.MEAN)) / jnp.asarray(photometry.STD)
    elif tok.norm == 'signed':
        x = 2 * x - 1
    return patches_lib.patchify(x, tok.patch)


def _mean(tok, x):
    """What `centre` subtracts from patches (B, N, dim)."""
    centre = tok.centre
    if centre == 'auto':
        centre = 'channel' if tok.kind == 'random_projection' else 'none'
    if centre == 'patch':
        return x.mean(axis=-1, keepdims=True)
    if centre == 'channel':
        return jnp.tile(x.reshape(*x.shape[:2], -1, 3).mean(axis=2), tok.patch**2)
    return 0.0


def init(tok, rng):
    """A codebook to start from: that of a random projection, or zeros for the dVAE."""
    if tok.kind == 'dvae':
        return {k: jnp.zeros(s) for k, s in dvae_shapes(tok.width, tok.vocab).items()}
    shape = (tok.vocab, tok.dim)
    words = jax.random.uniform(rng, shape, minval=tok.low, maxval=tok.high)
    return {'vectors': losses.l2_normalize(words)}


def fit(tok, codebook, batches, seed):
    """The codebook of random patches or k-means from training images; others come back unchanged.

    Args:
      codebook: of `init`.
      batches: iterator of uint8 (B, H, W, 3); as many are taken as are needed.
      seed: int; with the images it determines the codebook.
    """
    if tok.kind not in FITTED:
        return codebook
    unit = jax.jit(losses.l2_normalize)
    vectors, seen = _sample(tok, batches, seed)
    if tok.kind == 'random_patches':
        return {'vectors': unit(vectors)}
    means, counts = unit(vectors), np.zeros(tok.vocab, np.float32)
    done, batches = 0, itertools.chain(seen, batches)
    while done < tok.fit_patches and (images := next(batches, None)) is not None:
        x = _patches(tok, images)
        means, counts = kmeans_step(means, counts, unit(x.reshape(-1, tok.dim)))
        done += math.prod(x.shape[:2])
    return {'vectors': unit(means)}


@functools.partial(jax.jit, static_argnums=0)
def _patches(tok, images):
    return patches(tok, images / 255.0)


def _sample(tok, batches, seed):
    """V patches, from different images as far as there are enough, and the batches taken."""
    rng = np.random.default_rng(seed)
    batches = iter(batches)
    seen = [next(batches)]
    size = len(seen[0])
    seen += itertools.islice(batches, min(-(-tok.vocab // size), MAX_BATCHES) - 1)
    each = -(-tok.vocab // (size * len(seen)))  # of every image
    found = []
    for images in seen:
        x = np.asarray(_patches(tok, images))
        if each > x.shape[1]:
            raise ValueError(
                f'method.vocab={tok.vocab} is more than the {len(seen) * size * x.shape[1]} '
                f'patches of {len(seen)} batches: lower it.'
            )
        # A patch without contrast has no direction once it is centred: the last choice.
        flat = np.square(x).sum(axis=-1) < 1e-6
        order = np.argsort(rng.random(x.shape[:2]) + 2 * flat, axis=1)[:, :each]
        found.append(np.take_along_axis(x, order[..., None], axis=1))
    return np.concatenate([x.reshape(-1, tok.dim) for x in found])[: tok.vocab], seen


@jax.jit
def kmeans_step(means, counts, x):
    """One mini-batch of spherical k-means: every mean moves to that of all x it was given so far.

    Args:
      means: (V, d).  counts: (V,), vectors each mean is of.  x: (M, d) of length 1.

    Reference: Sculley, Web-scale k-means clustering, 2010: a rate of 1 / count for each centre.
    """
    words = nearest(losses.l2_normalize(means), x)
    new = jax.ops.segment_sum(jnp.ones(len(x)), words, len(means))
    total = jax.ops.segment_sum(x, words, len(means))
    share = (1 / jnp.maximum(counts + new, 1))[:, None]
    moved = (means * counts[:, None] + total) * share
    return jnp.where((counts + new)[:, None] > 0, moved, means), counts + new


def nearest(vectors, x):
    """argmax_i <x, vectors_i>, the first of equals: (V, d), (..., d) -> int32 (...).

    In float32 also on accelerators: rounded products would give other words to close calls.
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


def tokens(tok, codebook, x):
    """Images (B, H, W, 3) in [0, 1] -> words int32 (B, N), raster order; no gradient."""
    codebook, x = jax.lax.stop_gradient((codebook, x))
    if tok.kind == 'dvae':
        logits = dvae_logits(codebook, small_image(tok, x.astype(jnp.float32)))
        return logits.argmax(axis=-1).reshape(len(x), -1).astype(jnp.int32)
    return nearest(codebook['vectors'], patches(tok, x))


def draw(tok, codebook, words, x):
    """Images (B, H, W, 3) in [0, 1] with words (B, N) for patches.

    A word is a direction, so the length is given, of each patch of x, and so is the mean that
    `centre` took away.  Only words that were made of patches look like something (`FITTED`).
    """
    whole = _scaled(tok, x)
    mean = _mean(tok, whole)
    length = jnp.linalg.norm(whole - mean, axis=-1, keepdims=True)
    grid = x.shape[1] // tok.image_patch, x.shape[2] // tok.image_patch
    drawn = patches_lib.unpatchify(codebook['vectors'][words] * length + mean, grid, tok.patch)
    if tok.norm == 'imagenet':
        drawn = photometry.denormalize(drawn)
    elif tok.norm == 'signed':
        drawn = (drawn + 1) / 2
    for axis in (1, 2):
        drawn = drawn.repeat(tok.image_patch // tok.patch, axis=axis)
    return jnp.clip(drawn, 0.0, 1.0)


def flops_per_patch(tok):
    """FLOPs of finding the word of one patch: 2 per multiply-add."""
    if tok.kind != 'dvae':
        return 2 * tok.vocab * tok.dim
    total = 0
    for name, shape in dvae_shapes(tok.width, tok.vocab).items():
        group = int(name.split('_')[1]) if 'group' in name else 1 if 'input' in name else 4
        total += 2 * math.prod(shape) * 4 ** (4 - group) if len(shape) == 4 else 0
    return total


def count(words, vocab):
    """How often each word occurs, float32 (V,)."""
    words = words.reshape(-1)
    return jnp.zeros(vocab).at[words].add(1.0)


def statistics(counts):
    """How a codebook is used, from the counts (V,) of its words; float32 scalars.

    token_perplexity: exp(entropy); V if all words are equally frequent, 1 if there is one.
    token_top:        share of the most frequent word.
    token_unigram:    entropy in nats, the cross-entropy of a model that knows the frequencies and
                      no image: what is learned is how far the loss is below it.
    """
    p = counts / jnp.maximum(counts.sum(), 1e-30)
    entropy = -jax.scipy.special.xlogy(p, p).sum()
    return {
        'token_perplexity': jnp.exp(entropy),
        'token_top': p.max(),
        'token_unigram': entropy,
    }


def survey(tok, codebook, batches):
    """Counts (V,) of the words of COUNTED patches, or of MAX_BATCHES batches if they have fewer."""
    run = jax.jit(lambda book, x: count(tokens(tok, book, x / 255.0), tok.vocab))
    counts = np.zeros(tok.vocab, np.float32)
    for images in itertools.islice(batches, MAX_BATCHES):
        counts += np.asarray(run(codebook, images))
        if counts.sum() >= COUNTED:
            break
    return counts


def check(tok, stats, minimum):
    """Raises ValueError where the perplexity is below `minimum`: the task would be trivial."""
    found = float(stats['token_perplexity'])
    if found >= minimum:
        return
    hint = 'method.tokenizer=random_patches'
    if tok.kind == 'random_projection' and tok.centre not in ('auto', 'channel'):
        hint = 'method.token_centre=channel'
    raise ValueError(
        f'The {tok.vocab} words of tokenizer={tok.kind} are used as if there were {found:.1f} '
        f'(perplexity; the commonest has {float(stats["token_top"]):.0%}), fewer than '
        f'method.min_perplexity={minimum:g}: set {hint}, or min_perplexity=0 to train on them.'
    )


def dvae_shapes(width, vocab):
    """name -> shape of the weights of DALL-E's encoder (out, in, height, width), and its biases.

    Names are those of the published module with `_` for dots, without the leading `blocks`.
    """
    shapes = {'input_w': (width, 3, 7, 7)}
    before = width
    for group in range(1, 5):
        after = width * 2 ** (group - 1)
        for block in (1, 2):
            name, hidden = f'group_{group}_block_{block}', after // 4
            if before != after:
                shapes[f'{name}_id_path_w'] = (after, before, 1, 1)
            channels = (before, hidden, hidden, hidden, after)
            for i in range(4):
                side = 3 if i < 3 else 1
                shapes[f'{name}_res_path_conv_{i + 1}_w'] = (
                    channels[i + 1],
                    channels[i],
                    side,
                    side,
                )
            before = after
    shapes['output_conv_w'] = (vocab, before, 1, 1)
    return shapes | {k[:-1] + 'b': (s[0],) for k, s in shapes.items()}


def dvae_codebook(tok, weights):
    """The codebook of given weights of DALL-E's encoder.

    Args:
      weights: name -> array in the names of its state dict, `blocks.group_1.block_1.…`; the
        published `encoder.pkl` is a pickled module: save its `state_dict()` as safetensors first.

    Raises:
      ValueError: naming the first weight that is missing, or has another shape.
    """
    found = {k.removeprefix('blocks.').replace('.', '_'): k for k in weights}
    codebook = {}
    for name, shape in dvae_shapes(tok.width, tok.vocab).items():
        value = np.asarray(weights[found[name]], np.float32) if name in found else None
        if value is None or value.shape != shape:
            what = 'is missing' if value is None else f'has shape {value.shape}'
            raise ValueError(
                f'The dVAE does not fit, nothing was loaded: {name} {what}, expected {shape}; give '
                f"the state dict of DALL-E's encoder, with method.vocab and method.dvae_width as "
                f'there.'
            )
        codebook[name] = value
    return codebook


def dvae_logits(weights, x):
    """DALL-E's encoder: images (B, H, W, 3) in [0, 1] -> logits (B, H / 8, W / 8, V).

    Pixels enter as 0.8 x + 0.1.  Blocks: identity (1x1 convolution where the width changes) plus
    1/64 of ReLU-conv3 three times and ReLU-conv1; maxima of 2x2 after the first three groups.
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
