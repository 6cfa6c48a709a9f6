# SPDX-License-Identifier: Apache-2.0
"""Models and work for the tests of evaluations of frozen encoders."""

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ssl_jax import encoder, sharding
from ssl_jax.augment import photometry
from ssl_jax.data import sources
from ssl_jax.data import transform as transform_lib
from ssl_jax.evals import task
from ssl_jax.models import vit as vit_lib


def transform(size=32):
    return {**transform_lib.of(size), 'mean': photometry.MEAN, 'std': photometry.STD}


def work(folder, size=32, devices=1, **fields):
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    fields = {'batch_size': 8, 'log': lambda line: None, **fields}
    return task.Work(mesh, transform(size), epath.Path(folder), **fields)


def pixels(size=32, patch_size=8):
    return encoder.Pixels(patch_size, transform(size))


def untrained(size=32, patch_size=8, depth=3):
    shape = dict(embed_dim=16, depth=depth, num_heads=2)
    vit = vit_lib.ViT(**shape, patch_size=patch_size, img_size=size)
    params = vit_lib.init_params(vit, jax.random.key(0))
    return encoder.Model(vit, params, transform(size), 'untrained')


def run(name, model, data, work, **settings):
    """Rows of an evaluation as `ssl_jax eval --tasks` gets them."""
    words = {key: str(value) for key, value in settings.items()}
    return task.run(name, model, data, task.settings(name, words), work)


class Maps(sources.Arrays):
    """Arrays with class maps."""

    def __init__(self, images, maps, names=None):
        super().__init__(images)
        self._maps, self._names = maps, names
        self.map_classes = None

    def __getitem__(self, i):
        return {**super().__getitem__(i), 'segmentation': self._maps[i]}

    def describe(self, i):
        return self._names[i] if self._names else super().describe(i)


class Positions:
    """A model whose tokens say where each pixel of the picture came from.

    Images of `position_image` hold their coordinates as colours; a token is the mean colour of its
    patch, lifted so that the cosine falls with the distance.
    """

    patch_size = 8

    def __call__(self, images, blocks=()):
        b, h, w, _ = images.shape
        p = self.patch_size
        x = jnp.asarray(images, jnp.float32).reshape(b, h // p, p, w // p, p, 3).mean(axis=(2, 4))
        x = x.reshape(b, -1, 3)[..., :2] / 255
        # On a sphere of radius 1: angles are small, so cosines are monotonous in the distance.
        tokens = jnp.concatenate([x, jnp.sqrt(4 - (x**2).sum(axis=-1, keepdims=True))], axis=-1)
        return {'patch_tokens': tokens, 'patch': tokens.mean(axis=1)}


def position_image(side=160):
    ramp = np.linspace(0, 255, side)
    y, x = np.meshgrid(ramp, ramp, indexing='ij')
    return np.stack([x, y, np.zeros_like(x)], axis=-1).round().astype(np.uint8)
