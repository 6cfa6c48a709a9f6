# SPDX-License-Identifier: Apache-2.0
"""A pool that is nine tenths junk, its curation, and a random selection of the same size.

    SSL_JAX_DATA=/data python experiments/curation/pool.py OUT [SCALE]

Of 100,000 images (times SCALE): 10,000 distinct ones of CIFAR-10's training set; 60,000 copies of
300 of these, compressed again, resized, cropped to nine tenths, in other brightness; 29,500 of
noise, plain colours, gradients, stripes and checks; 500 copies of test images. Writes pool.parquet,
query.parquet (2,000 other training images), truth.npz, embeddings of 8 x 8 pixels, curated/ and
random.parquet, and prints what each stage did to each kind of image.
"""

import io
import os
import pathlib
import sys

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

from ssl_jax.curate import command
from ssl_jax.data import manifest, sources

KINDS = ('distinct', 'copy', 'noise', 'test copy')
# Of the embedding: pixels of natural images are all alike, their mean goes. See curated/pictures.
WORDS = ('embed.centre=True', 'dedup.threshold=0.97', 'against.threshold=0.98')
WORDS += ('retrieve.by=sample', 'retrieve.nearest=16')


def encoded(image, rng):
    out = io.BytesIO()
    PIL.Image.fromarray(image).save(out, 'JPEG', quality=int(rng.integers(60, 95)))
    return out.getvalue()


def copy(image, rng):
    """An edited version: part, size, brightness, compression."""
    side = int(rng.integers(30, 33))
    y, x = rng.integers(0, 33 - side, 2)
    image = image[y : y + side, x : x + side]
    size = int(rng.integers(24, 49))
    small = np.asarray(PIL.Image.fromarray(image).resize((size, size)), np.float32)
    return np.clip(small * rng.uniform(0.9, 1.1), 0, 255).astype(np.uint8)


def junk(rng):
    """Noise, a plain colour, a gradient, stripes or checks."""
    kind = rng.integers(5)
    y, x = np.mgrid[:32, :32] / 32
    one, two = rng.integers(0, 256, (2, 3))
    if kind == 0:
        return rng.integers(0, 256, (32, 32, 3), np.uint8)
    period, angle = rng.uniform(1, 6), rng.uniform(0, np.pi)
    ramp = np.cos(angle) * x + np.sin(angle) * y
    share = {
        1: np.zeros_like(x),
        2: np.clip(ramp, 0, 1),
        3: (ramp * period) % 1 > 0.5,
        4: ((x * period) % 1 > 0.5) ^ ((y * period) % 1 > 0.5),
    }[int(kind)]
    image = one + np.asarray(share, np.float32)[..., None] * (two - one)
    return np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8)


def decode(data):
    return np.asarray(PIL.Image.open(io.BytesIO(data)).convert('RGB'))


def pixels(images):
    """8 x 8 pixels of encoded images."""
    size = (8, 8), PIL.Image.Resampling.BILINEAR
    small = [PIL.Image.fromarray(decode(x)).resize(*size) for x in images]
    return np.stack([np.asarray(x, np.float32).reshape(-1) for x in small])


def write(out, name, images):
    """A set and its embeddings; returns both paths."""
    paths = str(out / f'{name}.parquet'), str(out / f'{name}.pixels.parquet')
    pq.write_table(pa.table({'image': pa.array(images, pa.binary())}), paths[0])
    values = pa.array(list(pixels(images)), pa.list_(pa.float32()))
    pq.write_table(pa.table({'pixels': values}), paths[1])
    return paths


def main(out, scale=1.0):
    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    data = pathlib.Path(os.environ['SSL_JAX_DATA']) / 'cifar10'
    train, test = (
        [row['bytes'] for row in pq.read_table(data / f'{k}.parquet')['image'].to_pylist()]
        for k in ('train', 'test')
    )
    n = int(10_000 * scale)
    order = rng.permutation(len(train))
    good, asked = order[:n], order[n : n + max(200, n // 5)]
    popular = rng.choice(good, max(10, n * 3 // 100), replace=False)
    leaked = rng.choice(len(test), n // 20, replace=False)
    images = [train[i] for i in good]
    images += [encoded(copy(decode(train[rng.choice(popular)]), rng), rng) for _ in range(6 * n)]
    rest = 9 * n - 6 * n - len(leaked)
    images += [encoded(junk(rng), rng) for _ in range(rest)]
    images += [encoded(copy(decode(test[i]), rng), rng) for i in leaked]
    kind = np.repeat(np.arange(4), [n, 6 * n, rest, len(leaked)])
    mixed = rng.permutation(len(images))
    images, kind = [images[i] for i in mixed], kind[mixed]
    np.savez(out / 'truth.npz', kind=kind)
    pool, x = write(out, 'pool', images)
    query, q = write(out, 'query', [train[i] for i in asked])
    against, t = write(out, 'test', test)
    sets = dict(queries=[query], against=[against], embeddings=[x, q, t])
    path = command.curate(pool, out / 'curated', words=WORDS, **sets)
    kept = pq.read_table(path)['index'].to_numpy()
    dropped = pq.read_table(out / 'curated' / 'dropped.parquet')
    stage, index = np.array(dropped['stage']), dropped['index'].to_numpy()
    print(f'\n{"":<12}' + ''.join(f'{k:>12}' for k in KINDS))
    rows = {'pool': np.arange(len(images))}
    rows |= {s: index[stage == s] for s in ('dedup', 'against', 'retrieve')} | {'curated': kept}
    for name, of in rows.items():
        print(f'{name:<12}' + ''.join(f'{(kind[of] == k).sum():>12,}' for k in range(4)))
    chosen = np.sort(rng.choice(len(images), len(kept), replace=False))
    source = sources.open_source(pool)
    manifest.write(out / 'random.parquet', [manifest.table(chosen)], source, {'path': pool})


if __name__ == '__main__':
    main(sys.argv[1], *map(float, sys.argv[2:]))
