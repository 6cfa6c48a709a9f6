# SPDX-License-Identifier: Apache-2.0
"""`ssl_jax data score`: how hard each image is to reconstruct, how colourful, how large.

Pixio trains on hard images more often, by the reconstruction loss of a first model (arXiv
2512.15715, section 3.3); `data.scores` reads the file. That paper does not say how many masks it
averages or which histogram it takes: the means over `masks` and over the channels are ours.
"""

import io
from collections.abc import Callable
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from ssl_jax import sharding
from ssl_jax.augment import photometry
from ssl_jax.data import host, loader, maps, scores, sources
from ssl_jax.data import stream as stream_lib
from ssl_jax.data import transform as transform_lib
from ssl_jax.evals import feature_file, features
from ssl_jax.methods import mae
from ssl_jax.objectives import losses, masking
from ssl_jax.run import errors, launch, storage, weights

ENTROPY = 'mean over R, G and B of the entropy in bits of the histogram of 256 values, whole image'


def score(
    model: str,
    data: Any,
    out: epath.PathLike,
    *,
    masks: int = 4,
    limit: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    log: Callable = launch.log,
) -> int:
    """Writes the scores of a data set to a Parquet file; the same call continues after a kill.

    One row per image that decodes, in the order of the source: id (index), name, loss, entropy
    (bits), height and width (pixels). The loss is that of the method's training, of this image
    alone, the mean over masks that depend on (seed, id, k); the image is cut as in evaluations and
    not flipped. The metadata, key `ssl_jax`, has the fingerprint of the images and the protocol.

    Args:
      model: a run of MAE or Pixio, or weights with their decoder.
      data: a source, or a path or spec of `sources.open_source`, as in `data.train`.
      out: the file, local or in a bucket.
      masks: K, of each image.
      limit: number of images, chosen by a hash; default all. The others count as without a score.
      batch_size: images, rounded up to a multiple of the devices.
      seed: of the masks.
      log: called with each line.

    Returns:
      The number of rows.

    Raises:
      UserError: the weights reconstruct no pixels, or `out` or its parts are of something else.
    """
    out = epath.Path(out)
    if out.is_dir():
        raise errors.UserError(f'{out} is a folder: give a file, such as {out}/scores.parquet.')
    opened = weights.open_weights(model)
    found = weights.whole(opened)
    if found is None or not isinstance(found[0], mae.MAE) or 'decoder' not in found[1]:
        raise errors.UserError(
            f'{model} reconstructs no pixels: give a run of MAE or Pixio, or weights with decoder.'
        )
    method, params, _ = found
    source = data if hasattr(data, 'describe') else sources.open_source(data)
    source = maps.images_only(source)
    ids = np.arange(len(source))
    if limit and limit < len(source):
        ids = features.pick(len(source), limit)
    mesh = sharding.make_mesh(data=1, fsdp=-1)  # parameters split, so that large models fit
    batch_size = features.round_up(min(batch_size, len(ids)), mesh)
    transform = {**opened.transform, 'size': method.img_size}
    protocol = dict(
        loss='mean of the squared errors of hidden patches',
        **{name: getattr(method, name) for name in ('mask_ratio', 'mask_grid', 'norm_pix_loss')},
        masks=masks,
        seed=seed,
        entropy=ENTROPY,
    )
    about = dict(
        kind=scores.KIND,
        model=feature_file.digest(params, repr(method)),
        model_path=str(model),
        data=source.fingerprint,
        images=len(source),
        scored=len(ids),
        protocol=protocol,
        transform=transform,
        batch_size=batch_size,
    )

    def tables(start):
        placed = jax.device_put(params, sharding.infer(params, mesh))
        loss = _loss(method, placed, transform, masks, seed)
        samples = _Samples(source, batch_size, ids[start:], transform)
        for batch in _batches(samples, loss, mesh, stream_lib.num_reading(source, 16)):
            yield _table(batch, source), batch['id'][~batch['mask'] & (batch['id'] >= 0)]

    rows = feature_file.build(
        out,
        about,
        tables,
        source=source,
        total=len(ids),
        same=('model', 'data', 'images', 'scored', 'protocol', 'transform', 'batch_size'),
        kind=scores.KIND,
        lines=[
            f'{model}: {len(ids):,} images, {masks} masks each, {transform_lib.describe(transform)}'
        ],
        log=log,
    )
    for line in _summary(out, len(source)):
        log(line)
    return rows


def image_losses(
    method: mae.MAE, params: Any, images: jax.Array, ids: jax.Array, masks: int, seed: int = 0
) -> jax.Array:
    """float32 (B,): the loss of each image, the mean over masks.

    Args:
      method: with `params` of encoder and decoder.
      images: float (B, H, W, 3), normalised.
      ids: int (B,); mask k of an image is drawn from (seed, id, k).
      masks: number of masks.
    """
    target = method.target(images)
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(seed), i))(ids)

    def once(k):
        mask = masking.random_masking(
            jax.vmap(lambda key: jax.random.fold_in(key, k))(keys),
            method.grid,
            method.mask_ratio,
            method.mask_grid,
        )
        pred = method.forward(params, images, mask)['pred']
        return jax.vmap(losses.masked_mse)(pred, target, mask.mask)

    return jax.lax.map(once, jnp.arange(masks)).mean(axis=0)


def entropy(image: np.ndarray) -> float:
    """ENTROPY of uint8 (H, W, 3): 0 of one colour, at most 8."""
    total = 0.0
    for channel in range(3):
        count = cv2.calcHist([image], [channel], None, [256], [0, 256]).astype(np.float64)
        share = count[count > 0] / count.sum()
        total -= float((share * np.log2(share)).sum())
    return abs(total) / 3


def _loss(method, params, transform, masks, seed):
    """(uint8 images (B, S, S, 3), ids (B,)) -> losses (B,)."""
    mean, std = (tuple(transform[name]) for name in ('mean', 'std'))

    @jax.jit
    def loss(params, images, ids):
        images = photometry.normalize(images, mean, std)
        return image_losses(method, params, images, ids, masks, seed)

    return lambda images, ids: loss(params, images, ids)


class _Samples(stream_lib.Samples):
    """What is measured of the images `ids`, and what the network sees; beyond the end, padding."""

    def __init__(self, source, batch_size, ids, transform):
        super().__init__(source, batch_size, None)
        self._ids, self._transform = ids, transform

    def __len__(self):
        return -(-len(self._ids) // self._batch_size) * self._batch_size

    def _sample(self, step, row):
        position = step * self._batch_size + row
        if position >= len(self._ids):
            return self._row(-1)
        i = int(self._ids[position])
        try:
            whole = host.decode(stream_lib.read(self._source, i)['image'])
        except (host.DecodeError, OSError):
            return self._row(i)
        return self._row(i, whole)

    def _row(self, i, whole=None):
        size, is_image = self._transform['size'], whole is not None
        height, width = whole.shape[:2] if is_image else (0, 0)
        image = np.zeros((size, size, 3), np.uint8)
        return {
            'image': transform_lib.cut(whole, self._transform) if is_image else image,
            'id': np.int64(i),
            'mask': np.bool_(is_image),
            'entropy': np.float32(entropy(whole) if is_image else 0),
            'height': np.int32(height),
            'width': np.int32(width),
        }


def _batches(samples, loss, mesh, num_threads):
    """Batches of `samples` with their losses instead of images, as numpy."""
    size = len(samples.rows)
    rows, pending = np.arange(size), None
    with loader.stream(samples, num_threads) as stream:
        for batch in stream:
            given = (batch.pop('image'), np.maximum(batch['id'], 0).astype(np.uint32))
            with jax.set_mesh(mesh):
                out = loss(*sharding.to_global(given, mesh, rows, size))
            # Fetched one batch late: the device computes while the host decodes.
            if pending is not None:
                yield features.fetch(pending)
            pending = {**batch, 'loss': out}
        if pending is not None:
            yield features.fetch(pending)


def _table(batch, source):
    """The rows of a batch that decoded."""
    mask = batch['mask']
    ids = batch['id'][mask]
    columns = {'id': ids, 'name': [feature_file.name_of(source, int(i)) for i in ids]}
    columns |= {name: batch[name][mask] for name in ('loss', 'entropy', 'height', 'width')}
    return pa.table(columns)


def _summary(out, n):
    """Lines on what the scores are, and on their use."""
    table = pq.read_table(io.BytesIO(storage.read(out)), columns=list(scores.COLUMNS[1:]))
    loss, entropies = (table[name].to_numpy() for name in ('loss', 'entropy'))
    side = np.minimum(table['height'].to_numpy(), table['width'].to_numpy())
    for name, x in (('loss', loss), ('entropy', entropies), ('short side', side)):
        low, middle, high = np.percentile(x, (5, 50, 95))
        yield f'{name}: 5 % are below {low:.3g}, half below {middle:.3g}, 95 % below {high:.3g}'
    size = np.clip(np.nan_to_num(loss, nan=0.0), 0, 1).sum(dtype=np.float64)
    yield (
        f'data.train.scores={out} takes {size:,.0f} of {n:,} images in an epoch on average; '
        f'data.train.min_entropy and data.train.min_side leave more out'
    )
