# SPDX-License-Identifier: Apache-2.0
"""Pictures in the loop: reconstructions of the same images over time, and curves."""

import dataclasses
import functools
import io
from typing import Annotated

import jax
import numpy as np

from ssl_jax import sharding
from ssl_jax.data import maps, subset
from ssl_jax.data import stream as stream_lib
from ssl_jax.evals import features
from ssl_jax.fields import Range
from ssl_jax.run import errors, launch, uploads
from ssl_jax.viz import draw


@dataclasses.dataclass(frozen=True)
class Options:
    """Fields of `eval.tasks.pictures`."""

    num_images: Annotated[int, Range(1, 1000)] = 8


def run(options, look, state, step) -> dict[str, float]:
    """Draws the same images with the same masks at every step, for comparison over time."""
    folder = look.workdir / 'pictures'
    transform = look.method.transform(look.method.img_size)
    images = spread_images(look.shown, transform, options.num_images)
    keys = jax.random.split(jax.random.key(look.config.seed), options.num_images)[: len(images)]
    drawn = _reconstruct(look.method, look.mesh, state.params, state.extra, images, keys)
    if drawn and launch.is_main():
        _put(draw.reconstruction_grid, drawn, folder / f'reconstruction_{step:07d}.png')
    return {}


def curves(metrics_path, workdir) -> None:
    """Redraws pictures/curves.png in `workdir` from a `metrics.jsonl`, in process 0."""
    if launch.is_main():
        _put(draw.curves, metrics_path, workdir / 'pictures' / 'curves.png')


def _put(draw_it, what, path):
    """Draws without waiting for a bucket."""
    data = io.BytesIO()
    draw_it(what, data)
    uploads.put(path, data.getvalue())


def _reconstruct(method, mesh, *args):
    """Runs `method.reconstruct` on all images in every process; returns numpy arrays."""
    run = _jitted_reconstruct(method, sharding.replicated(mesh))
    return jax.tree.map(np.asarray, run(*args))


@functools.lru_cache
def _jitted_reconstruct(method, replicated):
    return jax.jit(method.reconstruct, out_shardings=replicated)


def spread_images(source, transform: dict | int, count: int) -> np.ndarray:
    """uint8 (count, size, size, 3): one image from each of `count` equal parts of a source.

    Parts, because many sources are sorted by class. The place in each part is random but always the
    same: in other sources the classes take turns, and even steps would meet few of them. An image
    that does not decode is replaced by another, and the log says so. A small or broken source gives
    fewer. `transform`: see `features.batches`.

    Raises:
      UserError: no image decodes.
    """
    n = len(source)
    edges = np.arange(min(count, n) + 1) * n // min(count, n)
    spread = np.random.default_rng(0).integers(edges[:-1], edges[1:])
    order = dict.fromkeys(((spread + np.arange(4)[:, None]) % n).reshape(-1).tolist())
    images, bad, some = [], [], subset.Subset(maps.images_only(source), list(order))
    with stream_lib.eval_stream(some, transform, len(spread)) as stream:
        for batch in stream:
            bad += features.left_out(batch)
            images.extend(batch['image'][batch['mask']])
            if len(images) >= count:
                break
    stream_lib.say_left_out(some, bad)
    if not images:
        raise errors.UserError(f'None of {len(some)} images of {source.describe(0)} ... decodes.')
    return np.stack(images[:count])
