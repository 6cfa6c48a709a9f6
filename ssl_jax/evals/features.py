# SPDX-License-Identifier: Apache-2.0
"""Frozen features of a labelled source: images in, numpy arrays out, once, in order.

A `forward` is any function of uint8 images (B, H, W, 3) that returns {name: float32 (B, d)}; two
are made here.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from ssl_jax import sharding
from ssl_jax.augment import photometry
from ssl_jax.data import stream as stream_lib
from ssl_jax.models import vit as vit_lib

MAX_GRID = 8192  # numbers per image: a million images in 32 GiB


class Stopped(Exception):
    """`should_stop` became true in the middle of an extraction; nothing is returned."""


def make_forward(
    vit, params, *, dtype=None, mean=photometry.MEAN, std=photometry.STD, last_blocks=0
):
    """The forward of an encoder; images are normalised, by default with ImageNet's statistics.

    Its features, in float32:
      cls:        mean of the class tokens after the final norm (MAE, DINOv2: one token)
      cls_pre:    mean of the class tokens before it (what Pixio's kNN takes)
      patch:      mean of the patch tokens after the norm
      cls_patch:  cls and patch side by side
      grid<n>:    the patch tokens' means over n x n cells of the image side by side, see
                  `cell_means`; n is 4, or what the patches and MAX_GRID allow
      cls<n>, cls<n>_patch: the same with the class tokens of the last n = `last_blocks` blocks,
                  each after the final norm (DINOv2's linear protocol takes n = 4)
    An encoder without class tokens has only `patch` and `grid<n>`.

    Args:
      vit: `models.vit.ViT`.
      params: its parameters.
      dtype: of the layers; default the one that the ViT was made with.
      mean, std: of the channels, for values in [0, 1].
      last_blocks: 0 for none; needs memory for the tokens of all blocks.
    """
    if dtype is not None:
        vit = vit.clone(dtype=dtype)
    channels = tuple(mean), tuple(std)
    return lambda images: _features(vit, params, images, *channels, last_blocks)


# One compilation per ViT, however many forwards.
@functools.partial(jax.jit, static_argnums=(0, 3, 4, 5))
def _features(vit, params, images, mean, std, last_blocks):
    last = tuple(range(vit.depth))[-last_blocks:] if last_blocks else ()
    tokens = vit.apply({'params': params}, photometry.normalize(images, mean, std), capture=last)
    found = pooled(vit, tokens)
    grid = [side // vit.patch_size for side in images.shape[1:3]]
    cells = grid_cells(grid, vit.embed_dim)
    if cells > 1:
        found[f'grid{cells}'] = cell_means(tokens['patch_tokens'], grid, cells)
    if last and vit.num_cls_tokens:
        cls = vit_lib.final_norm(params, tokens['blocks'][:, :, : vit.num_cls_tokens], vit.eps)
        cls = cls.astype(jnp.float32).mean(axis=2)  # (n, B, D)
        found[f'cls{len(last)}'] = linear_input(cls)
        found[f'cls{len(last)}_patch'] = linear_input(cls, found['patch'])
    return found


def linear_input(cls, patch=None):
    """DINOv2's input of a linear classifier, (B, n D) or (B, (n + 1) D).

    Args:
      cls: (n, B, D), normed class tokens of the last n blocks, oldest first.
      patch: (B, D), mean of the normed patch tokens of the last block; None to do without.

    Reference: dinov2 `eval/linear.py: create_linear_input`.
    """
    return jnp.concatenate([*cls, *([] if patch is None else [patch])], axis=-1)


def pooled(vit, tokens):
    """The features of `make_forward`, from the tokens that `vit` returned."""
    c = vit.num_cls_tokens
    patch = tokens['patch_tokens'].astype(jnp.float32).mean(axis=1)
    if not c:
        return {'patch': patch}
    cls = tokens['cls_tokens'].astype(jnp.float32).mean(axis=1)
    return {
        'cls': cls,
        'cls_pre': tokens['pre_norm'][:, :c].astype(jnp.float32).mean(axis=1),
        'patch': patch,
        'cls_patch': jnp.concatenate([cls, patch], axis=1),
    }


def grid_cells(grid, embed_dim):
    """Cells per side of the feature `grid<n>`: 4, or fewer where 4 x 4 x embed_dim > MAX_GRID."""
    return max(n for n in range(1, min(4, *grid) + 1) if n == 1 or n * n * embed_dim <= MAX_GRID)


def cell_means(patch_tokens, grid, cells):
    """Means of the patch tokens over cells x cells parts of the image.

    They keep roughly where something is, as raw pixels do and one mean over the image does not:
    the fair feature beside raw pixels where images are tiny and their objects centred.  Where the
    rows do not divide, neighbouring cells share one, as in torch's `adaptive_avg_pool2d`.

    Args:
      patch_tokens: (B, N, D), row by row.
      grid: (rows, columns), N of them.
      cells: per side.

    Returns:
      float32 (B, cells^2 D), cells row by row.
    """
    b, _, d = patch_tokens.shape

    def weights(n):
        w = np.zeros((cells, n), np.float32)
        for i in range(cells):
            first, end = i * n // cells, -(-(i + 1) * n // cells)
            w[i, first:end] = 1 / (end - first)
        return w

    x = patch_tokens.astype(jnp.float32).reshape(b, *grid, d)
    rows, columns = map(weights, grid)
    x = jnp.einsum('ir,brcd,jc->bijd', rows, x, columns, precision='highest')
    return x.reshape(b, cells * cells * d)


def raw_pixels(size=32):
    """The forward that learns nothing, {'pixels': (B, 3 size^2)}: a baseline for every encoder.

    Images are resized (bilinear, antialiased) to size x size, or kept if they are smaller,
    normalised and flattened.
    """

    @jax.jit
    def forward(images):
        b, h, w, c = images.shape
        small = (b, min(size, h), min(size, w), c)
        x = jax.image.resize(images.astype(jnp.float32), small, 'linear', antialias=True)
        return {'pixels': photometry.normalize(x).reshape(b, -1)}

    return forward


def together(forwards):
    """One forward of {model: forward}, to decode images once; its names are 'model/feature'."""

    def forward(images):
        return {f'{m}/{k}': x for m, f in forwards.items() for k, x in f(images).items()}

    return forward


def extract(
    forward,
    source,
    *,
    size,
    resize=None,
    batch_size=256,
    mesh=None,
    limit=None,
    should_stop=None,
):
    """Features and labels of a source, in its order.

    Every batch has the same shape (the last is padded), so `forward` is compiled once.  With a
    mesh, images are split over its data and fsdp axes; with several processes each decodes its own
    rows and all of them return everything.  Images that cannot be decoded are left out.

    Args:
      forward: see the top of this file.
      source: see `data.sources`.
      size, resize: pixels; the central crop of side `size` after the short side was resized
        (Pillow's bicubic) to `resize`, by default `size`.
      batch_size: rounded up to a multiple of the devices that share a batch.
      limit: at most so many images, chosen by a hash of the index (sources are often sorted by
        class, the first images would be of few classes).
      should_stop: asked before every batch; if true on any process, all raise `Stopped`.

    Returns:
      {name: float32 (n, d)} and int32 labels (n,), or None where the source has none.

    Raises:
      ValueError: if no image could be decoded.
    """
    if limit is not None and limit < len(source):
        source = Subset(source, pick(len(source), limit))
    collected = []
    for batch in batches(
        forward,
        source,
        size=size,
        resize=resize,
        batch_size=min(batch_size, len(source)),
        mesh=mesh,
        should_stop=should_stop,
    ):
        mask = batch.pop('mask')
        collected.append(jax.tree.map(lambda x, mask=mask: x[mask], batch))
    if not any(len(c['id']) for c in collected):
        raise ValueError(f'None of the {len(source)} images of {source.describe(0)} ... decodes.')
    features = {
        k: np.concatenate([c['features'][k] for c in collected]) for k in collected[0]['features']
    }
    labels = None
    if 'label' in collected[0]:
        labels = np.concatenate([c['label'] for c in collected])
    return features, labels


def batches(
    forward, source, *, size, resize=None, batch_size=256, mesh=None, should_stop=None, start=0
):
    """The features of a source batch by batch, in its order; see `extract` for the arguments.

    Args:
      start: the image to begin with.  From a multiple of the batch size (`round_up`) the batches
        are those of the whole source, bit for bit.

    Yields:
      numpy arrays of one batch as a dict: features {name: (B, d)}, id (B,), mask (B,), False where
      a row is padding or did not decode, and label (B,) where the source has labels.
    """
    batch_size = round_up(batch_size, mesh)
    rows = sharding.process_rows(mesh, batch_size) if mesh is not None else None
    rest = Subset(source, np.arange(start, len(source))) if start else source
    pending = None
    with stream_lib.eval_stream(rest, size, batch_size, resize=resize, rows=rows) as stream:
        for batch in stream:
            if should_stop is not None and _any_process(should_stop()):
                raise Stopped
            kept = {k: batch[k] for k in ('id', 'mask', 'label') if k in batch}
            kept['id'] = kept['id'] + start
            images = batch['image']
            if mesh is not None:
                images = sharding.to_global(images, mesh, rows, batch_size)
                if jax.process_count() > 1:
                    kept = sharding.to_global(kept, mesh, rows, batch_size)
                with jax.set_mesh(mesh):
                    out = forward(images)
            else:
                out = forward(images)
            # Fetched one batch late: the device computes while the host decodes.
            if pending is not None:
                yield _fetch(pending)
            pending = {'features': out, **kept}
        if pending is not None:
            yield _fetch(pending)


def round_up(batch_size, mesh):
    """The next multiple of the devices that share a batch."""
    shards = mesh.shape['data'] * mesh.shape['fsdp'] if mesh is not None else 1
    return -(-batch_size // shards) * shards


def _fetch(tree):
    """Numpy arrays of the whole batch."""
    if jax.process_count() > 1:
        tree = multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(np.asarray, tree)


def _any_process(flag):
    if jax.process_count() == 1:
        return bool(flag)
    return bool(multihost_utils.process_allgather(np.asarray(bool(flag))).any())


class Subset:
    """The images `indices` of another source."""

    def __init__(self, source, indices):
        self._source = source
        self._indices = np.asarray(indices)
        self.classes = getattr(source, 'classes', None)
        self.fingerprint = f'{getattr(source, "fingerprint", "?")}[{len(self._indices)}]'

    def __len__(self):
        return len(self._indices)

    def __getitem__(self, i):
        return self._source[int(self._indices[i])]

    def describe(self, i):
        return self._source.describe(int(self._indices[i]))


def pick(n, count, seed=0):
    """`count` of 0..n-1, ascending: those whose hash with `seed` is smallest."""
    return np.sort(np.argsort(_hash(n, seed), kind='stable')[:count])


def split(source, fraction=0.2, seed=0):
    """A labelled source in two without a list: (train, test), by a hash of the image's index.

    The same image falls on the same side on every machine and in every version.
    """
    n = len(source)
    if n < 2:
        raise ValueError(f'{n} image cannot be split in train and test; give at least two.')
    test = pick(n, min(n - 1, max(1, round(n * fraction))), seed)
    return Subset(source, np.setdiff1d(np.arange(n), test)), Subset(source, test)


def _hash(n, seed):
    """uint64 (n,): splitmix64 of the index, not numpy's generator, whose streams may change."""
    with np.errstate(over='ignore'):
        h = np.arange(n, dtype=np.uint64) + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
        h += np.uint64(0x9E3779B97F4A7C15)
        h = (h ^ (h >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return h ^ (h >> np.uint64(31))
