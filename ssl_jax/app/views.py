# SPDX-License-Identifier: Apache-2.0
"""What the page shows, as functions of a model, a folder and an image; no web here.

Images come from the folder by index, or as the bytes of a file; nothing is opened by name.
"""

import dataclasses
import functools
import io
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import PIL.Image
from etils import epath

from ssl_jax import encoder
from ssl_jax.data import host, sources, subset
from ssl_jax.data import transform as transform_lib
from ssl_jax.evals import feature_file, features, heads
from ssl_jax.run import errors, launch, weights
from ssl_jax.viz import draw
from ssl_jax.viz import tokens as tokens_lib

LIMIT = 2000  # images that neighbours are searched among, unless told otherwise
OTHERS = 8  # images that are shown beside the chosen one
SHOWN = 40  # images offered to choose from with one click
BATCH = 16
PAINTED = 0.25  # of the pixels of a patch; it is hidden then
FINAL = 'after the final norm'  # the name of the last tokens among the blocks
FEATURES = {'cls': 'class token', 'patch': 'mean of the patches'}  # for neighbours


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image as the model sees it."""

    name: str
    image: np.ndarray  # uint8 (S, S, 3), S the size of the model
    square: np.ndarray  # uint8 (T, T, 3), T the size in training
    index: int = -1  # in the folder; -1 of an upload


@dataclasses.dataclass(frozen=True)
class Head:
    """A head that was trained on the frozen encoder."""

    name: str
    predict: Callable  # uint8 (H, W, 3) -> uint8 (H, W) classes, or float32 (H, W) depth
    classes: tuple = ()  # of a segmentation; () of depth
    unit: str = ''  # of depth; '' if it is not known


@dataclasses.dataclass(frozen=True, eq=False)
class Look:
    """A model and a folder of images."""

    model: encoder.Model
    source: Any
    ids: np.ndarray  # (n,) indices of the images that decoded, at most the limit
    features: dict[str, np.ndarray]  # {name of FEATURES: (n, D) of unit length}
    trained: tuple | None = None  # (method, params, extra) where patches can be reconstructed
    heads: tuple = ()  # of `Head`

    @functools.cached_property
    def grid(self) -> tuple[int, int]:
        """Patches of an image of the model, (rows, columns)."""
        return (self.model.size // self.model.vit.patch_size,) * 2

    @functools.cached_property
    def training_transform(self) -> dict:
        """Preprocessing for reconstructions, at the size of training."""
        size = self.trained[0].img_size if self.trained else self.model.size
        return {**self.model.transform, 'size': size}

    @property
    def blocks(self) -> list[str]:
        """What `tokens` takes: the last tokens, then the blocks from the last to the first."""
        depth = self.model.vit.depth
        return [FINAL, *(f'block {i + 1} of {depth}' for i in reversed(range(depth)))]


def look(path, data, limit: int = LIMIT) -> Look:
    """Opens weights and images, and computes the features of the images.

    Args:
      path: of weights, see `weights.open_weights`.
      data: path or spec of images.
      limit: most images that neighbours are searched among.

    Raises:
      UserError: weights or images cannot be read.
    """
    opened = weights.open_weights(path)
    vit, params = opened.networks()['encoder']
    model = encoder.Model(vit, jax.device_put(params), opened.transform, str(path))
    features.check_size(model.size, vit.patch_size, 'size')
    source = sources.open_source(data, 'all')
    launch.log(*sources.lines(source))
    chosen = np.arange(len(source))
    if len(source) > limit:
        chosen = features.pick(len(source), limit)
        launch.log(f'neighbours are searched among {limit:,} of them (--limit)')
    ids, found = _features(model, subset.Subset(source, chosen))
    return Look(model, source, chosen[ids], found, _trained(opened), _heads(model, opened))


def _features(model, source):
    """Indices of the images that decode, and their features of unit length."""
    forward = encoder.make_forward(model.vit, model.params, mean=model.mean, std=model.std)
    total, ids, found = len(source), [], []
    batches = features.batches(forward, source, transform=model.transform, batch_size=BATCH)
    for batch in features.told(batches, total, launch.log):
        kept = batch['mask']
        ids.append(batch['id'][kept])
        found.append({k: batch['features'][k][kept] for k in FEATURES if k in batch['features']})
    ids = np.concatenate(ids)
    if not len(ids):
        raise errors.UserError(f'None of {total} images of {source.describe(0)} ... decodes.')
    joined = jax.tree.map(lambda *x: np.concatenate(x), *found)
    return ids, {FEATURES[name]: _unit(x) for name, x in joined.items()}


def _unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _trained(opened):
    """(method, params, extra) on the device if they reconstruct patches, else None."""
    found = weights.whole(opened)
    if found is None:
        return None
    method, params, extra = found
    image = jax.ShapeDtypeStruct((1, method.img_size, method.img_size, 3), np.uint8)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 1))
    if not jax.eval_shape(method.reconstruct, params, extra, image, keys):
        return None
    return method, jax.device_put(params), jax.device_put(extra)


def _heads(model, opened):
    """Heads that `ssl_jax eval` has trained on a run at this step."""
    if not weights.is_checkpoint(opened.path):
        return ()
    found = []
    for folder in heads.find(epath.Path(opened.path) / 'evals' / str(opened.step) / 'trained'):
        head = heads.load(folder, model)
        predict, unit = functools.partial(heads.predict, head), head.spec.unit
        found.append(Head(folder.name, predict, tuple(head.spec.names), unit))
    return tuple(found)


# Images.


def choices(look: Look) -> list[int]:
    """Indices of images to choose from, spread over the folder."""
    return [int(look.ids[i]) for i in features.pick(len(look.ids), SHOWN)]


def picture(look: Look, index: Any) -> Picture:
    """An image of the folder.

    Raises:
      UserError: there is no such image, or it does not decode.
    """
    total = len(look.source)
    if not isinstance(index, (int, float)) or index != index or not 0 <= int(index) < total:
        raise errors.UserError(f'There is no image {index}: the folder has 0 to {total - 1:,}.')
    name = feature_file.name_of(look.source, int(index))
    return _picture(look, look.source[int(index)]['image'], name, int(index))


def upload(look: Look, data: bytes, name: str) -> Picture:
    """An image of the visitor.

    Raises:
      UserError: the bytes are no image that can be read.
    """
    return _picture(look, data, name, -1)


def _picture(look, data, name, index):
    try:
        pixels = host.decode(data)
    except (host.DecodeError, OSError) as error:
        raise errors.UserError(f'{name} cannot be shown: {error}.') from error
    image = transform_lib.cut(pixels, look.model.transform)
    return Picture(name, image, transform_lib.cut(pixels, look.training_transform), index)


@functools.lru_cache(maxsize=256)
def _cached(look, index):
    return picture(look, index)


# Features of patches.


def tokens(look: Look, images: np.ndarray, block: str = FINAL) -> np.ndarray:
    """Patch tokens (B, N, D) without the mean token of their position.

    Args:
      images: uint8 (B, S, S, 3).
      block: one of `look.blocks`.
    """
    return tokens_lib.centred(_tokens(look, images, block), _mean(look, block)[0])


def averaged(look: Look) -> int:
    """Number of images in the mean token of each position."""
    return min(tokens_lib.AVERAGED, len(look.ids))


def _tokens(look, images, block):
    number = _block(look, block)
    out = look.model(images, blocks=() if number is None else (number,))
    if number is None:
        return np.asarray(out['patch_tokens'], np.float32)
    patches = look.grid[0] * look.grid[1]
    return np.asarray(out['blocks'][number][:, -patches:], np.float32)


def _block(look, name):
    """Number of a block, None for FINAL."""
    if name not in look.blocks:
        raise errors.UserError(f'There is no {name!r}{errors.nearest(name, look.blocks)}')
    return None if name == FINAL else look.model.vit.depth - look.blocks.index(name)


@functools.lru_cache(maxsize=64)
def _mean(look, block):
    """(mean token of each position (N, D), tokens of some images, their indices)."""
    ids = [int(look.ids[i]) for i in features.pick(len(look.ids), averaged(look))]
    total, shown = 0.0, None
    for i in range(0, len(ids), BATCH):
        batch = [_cached(look, k).image for k in ids[i : i + BATCH]]
        batch += batch[-1:] * (min(BATCH, len(ids)) - len(batch))  # one compilation
        found = _tokens(look, np.stack(batch), block)[: len(ids[i : i + BATCH])]
        shown = found[: OTHERS + 1] if shown is None else shown
        total = total + found.sum(axis=0)
    return total / len(ids), shown, ids[: OTHERS + 1]


def pca(look: Look, shown: Picture, block: str = FINAL) -> list[tuple]:
    """Principal components of patch tokens as colours, of the image and of others together.

    Returns:
      [(name, image, colours of all patches, of the foreground)], the colours uint8 (h, w, 3).
    """
    mean, other, ids = _mean(look, block)
    found = tokens(look, shown.image[None], block)
    keep = [k for k, i in enumerate(ids) if i != shown.index][:OTHERS]
    joined = np.concatenate([found, tokens_lib.centred(other[keep], mean)])
    front = tokens_lib.foreground(joined, look.grid)
    whole = tokens_lib.colours(joined, look.grid)
    part = tokens_lib.colours(joined, look.grid, front)
    pictures = [shown, *(_cached(look, ids[k]) for k in keep)]
    return [(p.name, p.image, *x) for p, *x in zip(pictures, whole, part, strict=True)]


def similar(look: Look, shown: Picture, row: int, column: int, block: str = FINAL) -> list[tuple]:
    """Cosine similarity of a patch to the patches of its image and of the nearest other images.

    Args:
      row, column: of the patch.
      block: one of `look.blocks`.

    Returns:
      [(name, image, float32 (h, w))], the image of the patch first.
    """
    rows, columns = look.grid
    if not (0 <= row < rows and 0 <= column < columns):
        raise errors.UserError(
            f'There is no patch ({row}, {column}): the grid is {rows}x{columns}.'
        )
    near = [_cached(look, i) for i, _ in nearest(look, shown, OTHERS)]
    pictures = [shown, *near]
    found = tokens(look, np.stack([p.image for p in pictures]), block)
    maps = tokens_lib.similarity(found[0, row * columns + column], found)
    maps = maps.reshape(-1, rows, columns)
    return [(p.name, p.image, x) for p, x in zip(pictures, maps, strict=True)]


def attention(look: Look, shown: Picture) -> np.ndarray:
    """Attention of the class token to the patches, float32 (heads, h, w)."""
    return np.asarray(encoder.attention(look.model, shown.image[None])[0])


# Whole images.


def nearest(look: Look, shown: Picture, count: int, feature: str = '') -> list[tuple[int, float]]:
    """The nearest images of the folder, without itself: [(index, cosine similarity)].

    Args:
      count: at most.
      feature: one of `look.features`; default the first.
    """
    feature = feature or next(iter(look.features))
    if feature not in look.features:
        raise errors.UserError(f'There is no {feature!r}{errors.nearest(feature, look.features)}')
    name = {long: short for short, long in FEATURES.items()}[feature]
    query = _unit(np.asarray(look.model(shown.image[None])[name][0], np.float32))
    near = look.features[feature] @ query
    order = [k for k in np.argsort(-near, kind='stable') if look.ids[k] != shown.index][:count]
    return [(int(look.ids[k]), float(near[k])) for k in order]


# Reconstruction.


def painted(alpha: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    """Patches (h, w) of which at least PAINTED of the pixels are painted.

    Args:
      alpha: (H, W), above 0 where there is paint; of any size, of the proportions of the grid.
    """
    if alpha.ndim != 2 or min(alpha.shape) < max(grid):
        raise errors.UserError(f'A mask of shape {alpha.shape} has fewer pixels than patches.')
    share = (np.asarray(alpha) > 0).astype(np.float64)
    for axis, n in enumerate(grid):
        edges = np.arange(n) * share.shape[axis] // n
        counts = np.diff([*edges, share.shape[axis]])
        share = np.add.reduceat(share, edges, axis=axis) / np.expand_dims(counts, 1 - axis)
    return share >= PAINTED


def reconstruct(look: Look, shown: Picture, hidden: np.ndarray | None, seed: int = 0) -> dict:
    """Pictures of `models.patches.pictures` of one image, uint8 (T, T, 3).

    Args:
      hidden: bool (h, w) on the grid of training; None for a random mask as in training.
      seed: of the random mask.

    Raises:
      UserError: all patches are hidden, or none.
    """
    method, params, extra = look.trained
    images = shown.square[None]
    if hidden is None:
        keys = jax.random.split(jax.random.key(seed), 1)
        drawn = _random(method)(params, extra, images, keys)
    else:
        hidden = hidden.reshape(-1)
        count = int(hidden.sum())
        if not 0 < count < len(hidden):
            what = 'every patch' if count else 'no patch'
            raise errors.UserError(f'The paint hides {what}: paint over a part of the image.')
        order = np.argsort(hidden, kind='stable').astype(np.int32)[None]
        drawn = _chosen(method)(params, extra, images, order, len(hidden) - count)
    return {name: draw.uint8(x[0]) for name, x in drawn.items()}


@functools.lru_cache(maxsize=1)
def _random(method):
    return jax.jit(method.reconstruct)


@functools.lru_cache(maxsize=1)
def _chosen(method):
    return jax.jit(method.reconstruct_hidden, static_argnums=4)  # compiled for each count


# Trained heads.


def predictions(look: Look, shown: Picture) -> list[tuple[str, np.ndarray]]:
    """(name of a head, the image beside its prediction with a legend, uint8 (H, W, 3))."""
    out = []
    for head in look.heads:
        made, drawn = head.predict(shown.image)[None], io.BytesIO()
        if head.classes:
            draw.segmentation_rows(shown.image[None], {'prediction': made}, head.classes, drawn)
        else:
            draw.depth_rows(shown.image[None], {'prediction': made}, drawn, head.unit)
        out.append((head.name, np.asarray(PIL.Image.open(drawn).convert('RGB'))))
    return out
