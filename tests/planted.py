# SPDX-License-Identifier: Apache-2.0
"""Sets with planted copies, and embeddings of pixels."""

import io

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

from ssl_jax.data import host


def encoded(image, kind='PNG', **options):
    out = io.BytesIO()
    PIL.Image.fromarray(image).save(out, kind, **options)
    return out.getvalue()


def recompressed(image, rng):
    return encoded(image, 'JPEG', quality=int(rng.integers(40, 80)))


def resized(image, rng):
    side = int(rng.choice([20, 24, 40, 48]))
    return encoded(np.asarray(PIL.Image.fromarray(image).resize((side, side))))


def cropped(image, rng):
    """80 % of the area."""
    side = round(image.shape[0] * 0.8**0.5)
    y, x = rng.integers(0, image.shape[0] - side + 1, 2)
    return encoded(image[y : y + side, x : x + side])


def mirrored(image, rng):
    return encoded(image[:, ::-1])


def write_set(path, images):
    """A Parquet file of encoded images."""
    pq.write_table(pa.table({'image': pa.array(images, pa.binary())}), path)
    return str(path)


def write_vectors(path, vectors, **columns):
    """A Parquet file of embeddings."""
    rows = pa.array(list(np.asarray(vectors, np.float32)), pa.list_(pa.float32()))
    pq.write_table(pa.table({'embedding': rows, **columns}), path)
    return str(path)


def pixels(images, side=8):
    """(n, 3 side^2): encoded images as few pixels."""

    def small(data):
        image = PIL.Image.fromarray(host.decode(data))
        return np.asarray(image.resize((side, side), PIL.Image.BILINEAR), np.float32).reshape(-1)

    return np.stack([small(data) for data in images])
