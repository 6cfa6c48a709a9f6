# SPDX-License-Identifier: Apache-2.0
"""Cues of SplitMask's matching: how often a half finds its other half among 64 images.

    SSL_JAX_DATA=/data python experiments/splitmask/matching.py RUN [RUN ...]

For 1,024 test images of CIFAR-10: as in training; by the mask alone (the other half is of another
image, with the complement of the mask); by the image alone (its half has a mask of its own).
"""

import os
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax.augment import photometry
from ssl_jax.data import sources
from ssl_jax.evals import pictures
from ssl_jax.methods import splitmask
from ssl_jax.objectives import losses
from ssl_jax.run import weights

CIFAR = pathlib.Path(os.environ.get('SSL_JAX_DATA', '../shared/data')) / 'cifar10'
BATCH, IMAGES = 64, 1024


def matches(method, params, images, key):
    """{how: share of the images whose other half is the most similar}."""
    images = photometry.normalize(images)

    def halves(key):
        perm = method.permutation(jax.random.split(key, len(images)))
        return [splitmask.branch(perm, *span) for span in method.ranges]

    def described(images, half):
        one, _ = method.forward(params, images, [half, half])
        return one[:, method.vit.num_cls_tokens :].astype(jnp.float32).mean(axis=1)

    (own, other), (_, unrelated) = map(halves, jax.random.split(key))
    first = described(images, own)
    others = {
        'as in training': described(images, other),
        'mask alone': described(jnp.roll(images, 1, axis=0), other),
        'image alone': described(images, unrelated),
    }
    return {how: losses.info_nce(first, x)[1] for how, x in others.items()}


def main(workdirs):
    source = sources.open_source(CIFAR / 'test.parquet')
    for workdir in workdirs:
        run = weights.open_run(workdir)
        images = pictures.spread_images(source, run.method.vit.img_size, IMAGES)
        fn = jax.jit(lambda *args, method=run.method: matches(method, *args))
        found = [
            fn(run.params, images[i : i + BATCH], jax.random.key(i))
            for i in range(0, len(images), BATCH)
        ]
        means = {how: float(np.mean([f[how] for f in found])) for how in found[0]}
        print(workdir, {how: f'{100 * share:.1f} %' for how, share in means.items()})


if __name__ == '__main__':
    main(sys.argv[1:])
