# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run: reconstructions of any images, the training crops, and the curves."""

import jax
from etils import epath

from ssl_jax import runs, viz
from ssl_jax.data import pipeline, sources
from ssl_jax.evals import online


def show(workdir, data=None, out=None, num=8):
    """Writes the pictures of a run and returns their paths.

    Args:
      workdir: a run.  data: images to show, a path or spec; default its own training set.
      out: folder; default workdir/pictures.  num: how many images.
    """
    run = runs.open_run(workdir)
    if run.method is None:
        raise ValueError(
            f'{workdir} holds an imported encoder alone, and what is shown here are crops and '
            f'reconstructions of training; use `ssl_jax eval` or `ssl_jax features`.'
        )
    source = sources.open_source(data or run.config.data.train)
    num = min(num, len(source))
    workdir, out = epath.Path(workdir), epath.Path(out or epath.Path(workdir) / 'pictures')
    out.mkdir(parents=True, exist_ok=True)
    views = run.method.views()
    paths = []
    with pipeline.train_stream(
        source, views, batch_size=num, seed=run.config.seed, start_step=run.step
    ) as stream:
        batch = next(stream)
    for view in views:
        crops = batch[view.name]
        paths.append(out / f'crops_{view.name}.png')
        viz.contact_sheet(crops.reshape(-1, *crops.shape[2:]), paths[-1])
    if hasattr(run.method, 'reconstruct'):
        images = online.first_images(source, views[0].size, num)
        keys = jax.random.split(jax.random.key(run.config.seed), len(images))
        made = jax.jit(run.method.reconstruct)(run.params, images, keys)
        paths.append(out / f'reconstruction_{run.step:07d}.png')
        viz.reconstruction_grid(made, paths[-1])
    if (workdir / 'metrics.jsonl').exists():
        paths.append(out / 'curves.png')
        viz.curves(workdir / 'metrics.jsonl', paths[-1])
    return paths
