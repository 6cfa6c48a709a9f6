# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run: crops, reconstructions, features and attention of any images, curves."""

import jax
from etils import epath

from ssl_jax.augment import photometry
from ssl_jax.data import sources
from ssl_jax.data import stream as stream_lib
from ssl_jax.evals import features, pictures
from ssl_jax.models import vit as vit_lib
from ssl_jax.run import errors, launch, storage, weights
from ssl_jax.viz import draw


def show(workdir, data=None, out=None, num: int = 8) -> list[epath.Path]:
    """Writes the pictures of a run and returns their paths: `ssl_jax show`.

    Args:
      workdir: of a run, or an imported encoder (without crops, reconstructions and curves).
      data: images to show, a path or spec; default the training set of the run.
      out: folder; default workdir/pictures.
      num: number of images.
    """
    run = weights.open_run(workdir)
    if run.method is None and not data:
        raise errors.UserError(
            f'{workdir} holds an imported encoder, which has no images: give --data.'
        )
    source = sources.open_source(data or run.config.data.train)
    launch.log(*getattr(source, 'notes', ()))
    num = min(num, len(source))
    workdir, out = epath.Path(workdir), epath.Path(out or epath.Path(workdir) / 'pictures')
    vit, params = run.networks()['encoder']
    transform = run.transform
    features.check_size(transform['size'], vit.patch_size, 'size')
    images = pictures.spread_images(source, transform, num)
    paths = _features(vit, params, images, transform, out)
    if run.method is not None:
        if transform['size'] != run.method.img_size:
            transform = {**transform, 'size': run.method.img_size}
            images = pictures.spread_images(source, transform, num)
        paths += _training(run, source, images, num, out)
    if storage.exists(workdir / 'metrics.jsonl') or storage.names(workdir / 'metrics'):
        paths.append(out / 'curves.png')
        draw.curves(workdir / 'metrics.jsonl', paths[-1])
    return paths


def _features(vit, params, images, transform, out):
    """Draws principal components of the patch tokens and the attention of the class token."""
    side = transform['size'] // vit.patch_size
    x = photometry.normalize(images, transform['mean'], transform['std'])
    paths = [out / 'pca.png']
    tokens = jax.jit(lambda p, x: vit.apply({'params': p}, x)['patch_tokens'])(params, x)
    draw.pca_patches(tokens, (side, side), images, paths[0])
    if vit.num_cls_tokens:
        paths.append(out / 'attention.png')
        attention = jax.jit(lambda p, x: vit_lib.last_attention(vit, p, x))(params, x)
        first = vit.num_cls_tokens + vit.num_register_tokens
        maps = attention[:, :, 0, first:].reshape(len(images), vit.num_heads, side, side)
        draw.attention_maps(maps, images, paths[1])
    return paths


def _training(run, source, images, num, out):
    """Draws training crops, and reconstructions if the method makes them."""
    paths, views = [], run.method.views()
    with stream_lib.train_stream(
        source, views, batch_size=num, seed=run.config.seed, start_step=run.step
    ) as stream:
        batch = next(stream)
    for view in views:
        crops = batch[view.name]
        paths.append(out / f'crops_{view.name}.png')
        draw.contact_sheet(crops.reshape(-1, *crops.shape[2:]), paths[-1])
    keys = jax.random.split(jax.random.key(run.config.seed), len(images))
    drawn = jax.jit(run.method.reconstruct)(run.params, run.extra, images, keys)
    if drawn:
        paths.append(out / f'reconstruction_{run.step:07d}.png')
        draw.reconstruction_grid(drawn, paths[-1])
    return paths
