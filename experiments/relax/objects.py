# SPDX-License-Identifier: Apache-2.0
"""Importance on objects: does RELAX point at what scenes show?

    python experiments/relax/objects.py RUN [RUN ...] --scenes 40 --masks 1000

On rendered test scenes, whose objects are known. Per map: whether its largest value lies on an
object (pointing game), and the share on objects of its mass above its mean. Chance is the share of
the pixels that show objects; a map that is largest in the middle is what placement alone gives.
"""

import argparse
import dataclasses
import time

import jax
import numpy as np

from ssl_jax import encoder
from ssl_jax.data import scenes
from ssl_jax.run import weights


def scores(values, inside):
    """(pointing game, share of the mass above the mean) of maps (B, h, w) on bool (B, H, W)."""
    n = inside.shape[1] // values.shape[1]
    values = np.asarray(values, np.float64).repeat(n, axis=1).repeat(n, axis=2)
    values, inside = (x.reshape(len(x), -1) for x in (values, inside))
    hits = inside[np.arange(len(values)), values.argmax(axis=1)]
    mass = np.maximum(values - values.mean(axis=1, keepdims=True), 0)
    return hits, (mass * inside).sum(axis=1) / mass.sum(axis=1)


def models(workdir):
    """{name: encoder}, the trained one and the same with fresh parameters."""
    trained = encoder.load_model(workdir)
    run = weights.open_run(workdir)
    params, extra = jax.jit(run.method.init)(jax.random.key(run.config.seed))
    _, fresh = run.method.networks(params, extra)['encoder']
    return {'trained': trained, 'untrained': dataclasses.replace(trained, params=fresh)}


def maps(workdir, images, masks):
    """Yields (name, maps (B, h, w), seconds per image)."""
    found = models(workdir)
    for name, model in found.items():
        yield f'attention: {name}', encoder.attention(model, images).mean(axis=1), None
    middle = (np.arange(images.shape[1]) + 0.5) / images.shape[1] - 0.5
    distance = np.hypot(middle[:, None], middle)
    yield 'the middle of the image', np.broadcast_to(-distance, images.shape[:3]), None
    kinds = [
        ('trained, class token', 'trained', 'cls', {}),
        ('trained, mean patch', 'trained', 'patch', {}),
        ('trained, class token, dropped patches', 'trained', 'cls', dict(fast=True)),
        ('untrained, class token', 'untrained', 'cls', {}),
    ]
    for name, model, of, settings in kinds:
        encoder.explain(found[model], images[:1], of, num_masks=masks, **settings)  # compiles
        start = time.monotonic()
        out = encoder.explain(found[model], images, of, num_masks=masks, **settings)
        x = jax.device_get(out)
        seconds = (time.monotonic() - start) / len(images)
        yield f'importance: {name}', x['importance'], seconds
        if not settings:
            yield f'U-RELAX: {name}', x['u_relax'], None


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('runs', nargs='+')
    parser.add_argument('--scenes', type=int, default=40)
    parser.add_argument('--masks', type=int, default=1000)
    args = parser.parse_args()
    for workdir in args.runs:
        size = encoder.load_model(workdir).size
        source = scenes.Scenes(args.scenes, size, split='test')
        items = [source[i] for i in range(len(source))]
        images = np.stack([item['image'] for item in items])
        inside = np.stack([item['segmentation'] > 0 for item in items])
        print(
            f'{workdir}: {len(items)} scenes; objects are {100 * inside.mean():.1f} % of the pixels'
        )
        print('| map | largest value on an object (%) | mass on objects (%) | s an image |')
        print('|---|---|---|---|')
        for name, values, seconds in maps(workdir, images, args.masks):
            cells = [
                f'{100 * x.mean():.1f} ± {100 * x.std() / len(x) ** 0.5:.1f}'
                for x in scores(values, inside)
            ]
            print(
                '|',
                name,
                '|',
                *(f'{c} |' for c in cells),
                f'{seconds:.2f}' if seconds else '',
                '|',
                flush=True,
            )


if __name__ == '__main__':
    main()
