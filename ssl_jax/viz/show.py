# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run: crops, reconstructions, features, attention, predictions, curves."""

import time

import jax
import numpy as np
from etils import epath

from ssl_jax import encoder
from ssl_jax.data import sources
from ssl_jax.data import stream as stream_lib
from ssl_jax.evals import features, pictures, task
from ssl_jax.run import errors, launch, storage, weights
from ssl_jax.viz import draw
from ssl_jax.viz import tokens as tokens_lib

EXPLAINED = 8  # images in a picture of importance
IMPORTANCE = (
    'importance: mean cosine of the {feature} to that of the whole image while the pixel is shown, '
    'over {masks:,} random masks; uncertainty: the variance of that cosine; U-RELAX: importance '
    'where the uncertainty is at most its median, white elsewhere'
)


def show(
    workdir, data=None, out=None, num: int = 8, explain: int | None = None
) -> list[epath.Path]:
    """Writes the pictures of a run and returns their paths: `ssl_jax show`.

    Args:
      workdir: of a run, or an imported encoder (without crops, reconstructions and curves).
      data: images to show, a path or spec; default the training set of the run.
      out: folder; default workdir/pictures.
      num: number of images.
      explain: masks per image of pictures of importance, see `encoder.explain`; None for none.
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
    model = encoder.Model(vit, jax.device_put(params), transform, str(workdir))
    paths = _features(model, images, source, out)
    if explain:
        paths += explanations(model, images, out, explain)
    paths += predictions(workdir, run.step, out)
    if run.method is not None:
        if transform['size'] != run.method.img_size:
            transform = {**transform, 'size': run.method.img_size}
            images = pictures.spread_images(source, transform, num)
        paths += _training(run, source, images, num, out)
    if storage.exists(workdir / 'metrics.jsonl') or storage.names(workdir / 'metrics'):
        paths.append(out / 'curves.png')
        draw.curves(workdir / 'metrics.jsonl', paths[-1])
    return paths


def _features(model, images, source, out):
    """Draws principal components of the patch tokens and the attention of the class token."""
    grid = (model.size // model.vit.patch_size,) * 2
    paths = [out / 'pca.png']
    many = pictures.spread_images(source, model.transform, min(tokens_lib.AVERAGED, len(source)))
    mean = _mean_tokens(model, many, len(images))
    tokens = model(images)['patch_tokens']
    draw.pca_patches(tokens, grid, images, paths[0], mean, len(many))
    if model.vit.num_cls_tokens:
        paths.append(out / 'attention.png')
        draw.attention_maps(encoder.attention(model, images), images, paths[1])
    return paths


def _mean_tokens(model, images, batch_size):
    """(N, D): the mean token of each position; no more images at once than are drawn."""
    total = 0.0
    for i in range(0, len(images), batch_size):
        batch = images[i : i + batch_size]
        filled = np.concatenate([batch, np.repeat(batch[-1:], batch_size - len(batch), axis=0)])
        total += np.asarray(model(filled)['patch_tokens'], np.float32)[: len(batch)].sum(axis=0)
    return total / len(images)


def explanations(model: encoder.Model, images: np.ndarray, out, masks: int) -> list[epath.Path]:
    """Draws which pixels the features of images depend on (RELAX), EXPLAINED images a picture.

    Args:
      model: its class token is explained, without one the mean of its patches.
      images: uint8 (B, H, W, 3).
      out: folder of the pictures.
      masks: per image; each is a forward pass.

    Returns:
      Paths of the pictures.
    """
    cls = model.vit.num_cls_tokens
    note = IMPORTANCE.format(feature='class token' if cls else 'mean patch', masks=masks)
    note += '; attention: of the class token in the last block, mean of the heads.' if cls else '.'
    found, start = [], time.monotonic()
    for i, image in enumerate(images):
        maps = jax.device_get(encoder.explain(model, image[None], seed=i, num_masks=masks))
        kept = maps['uncertainty'] <= np.nanmedian(maps['uncertainty'])
        columns = {
            'importance': maps['importance'],
            'uncertainty': maps['uncertainty'],
            'U-RELAX': np.where(kept, maps['u_relax'], np.nan),
        }
        if cls:
            columns['attention'] = np.asarray(encoder.attention(model, image[None]).mean(axis=1))
        found.append(columns)
        seconds = (time.monotonic() - start) / (i + 1)
        launch.log(f'explained {i + 1} of {len(images)} images, {seconds:.1f} s an image')
    paths = []
    for i in range(0, len(images), EXPLAINED):
        some = found[i : i + EXPLAINED]
        maps = {name: np.concatenate([x[name] for x in some]) for name in some[0]}
        paths.append(out / f'importance_{i // EXPLAINED}.png')
        draw.importance_rows(images[i : i + EXPLAINED], maps, paths[-1], note)
    return paths


def predictions(workdir, step: int, out=None) -> list[epath.Path]:
    """Draws what evaluations predict of test images, beside the truth and other models.

    Args:
      workdir: of the run.
      step: of the checkpoint that was evaluated, see `evals.task.keep`.
      out: folder of the pictures; default workdir/pictures.

    Returns:
      Paths of the pictures, one for each evaluation.
    """
    folder = epath.Path(workdir) / 'evals' / str(step)
    out = epath.Path(out or epath.Path(workdir) / 'pictures')
    models = ['trained', 'untrained', 'raw_pixels']
    kept = {model: task.kept(folder / model) for model in models}
    paths = []
    for name, (about, shown) in kept['trained'].items():
        found = {model: kept[model][name] for model in models if name in kept[model]}
        images, truth, _ = (_stack(x) for x in zip(*shown, strict=True))
        maps = {'truth': truth}
        for model, (_, other) in found.items():
            maps[model.replace('_', ' ')] = _stack([prediction for *_, prediction in other])
        metric = next(iter(about['scores']))
        scores = ', '.join(
            f'{model.replace("_", " ")} {other["scores"][metric]:.4g}'
            for model, (other, _) in found.items()
        )
        note = f'{about["task"]}, {about["head"]}, on frozen features. {metric}: {scores}.'
        paths.append(out / f'{name}.png')
        if 'classes' in about:
            draw.segmentation_rows(images, maps, about['classes'], paths[-1], note)
        else:
            draw.depth_rows(images, maps, paths[-1], about['unit'], note)
    return paths


def _stack(arrays):
    """One array; those of another size than the first are brought to it."""
    h, w = arrays[0].shape[:2]
    index = [(np.arange(h) * len(x) // h, np.arange(w) * x.shape[1] // w) for x in arrays]
    return np.stack([x[rows][:, columns] for x, (rows, columns) in zip(arrays, index, strict=True)])


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
