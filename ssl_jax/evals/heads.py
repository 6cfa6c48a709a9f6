# SPDX-License-Identifier: Apache-2.0
"""Heads for dense prediction on a frozen encoder: their training, kept state and predictions.

head = heads.fit(model, source, spec, work)     # or heads.load(folder, model)
heads.predict(head, image)                      # class map uint8 or depth float32, (H, W)
"""

import collections
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
from etils import epath

from ssl_jax import sharding
from ssl_jax import step as step_lib
from ssl_jax.data import fingerprint, pairs
from ssl_jax.data import maps as maps_lib
from ssl_jax.evals import dense_scores, features, head_spec
from ssl_jax.models import dense
from ssl_jax.run import checkpoint, errors, hashing, launch, peers, storage, trees

LOG_SECONDS = 10.0
WINDOW_ELEMENTS = 2**26  # of the predictions of windows that are computed together


@dataclasses.dataclass(frozen=True)
class Head:
    """A trained head on its encoder."""

    model: Any  # `encoder.Model` or `encoder.Pixels`
    spec: head_spec.Spec
    variables: Any  # of `Spec.module`
    folder: epath.Path

    @functools.cached_property
    def run(self) -> Callable:
        """`make_predict` on one device, compiled once."""
        return make_predict(self)


def _with(model, params):
    """The encoder with other arrays as parameters, for a program that takes them as arguments."""
    return model if params is None else dataclasses.replace(model, params=params)


def _placed(model, mesh):
    """Parameters of the encoder on a mesh, None without any."""
    params = getattr(model, 'params', None)
    return params and jax.device_put(params, sharding.infer(params, mesh))


def optimizer(spec: head_spec.Spec, params: Any) -> optax.GradientTransformation:
    """AdamW over all parameters of the head, biases and norms too, as in the official codes."""

    def used(path, _):  # what gets no gradient is left as it is
        return 'refinenet4/resConfUnit1' not in path

    mask = trees.map_named(used, params)
    adam = optax.adamw(spec.rate, weight_decay=spec.recipe.weight_decay, mask=mask)
    clip = spec.recipe.clip
    return optax.chain(optax.clip_by_global_norm(clip), adam) if clip else adam


def fit(model: Any, source: Any, spec: head_spec.Spec, work: Any) -> Head:
    """Trains a head, or continues where an earlier call was cut off, to the same bits.

    Its state is in a folder of `work.folder` named by task, head and a hash of all that it depends
    on. The encoder runs inside the step, since every step has other crops.

    Args:
      model: `encoder.Model` or `encoder.Pixels`.
      source: training images with maps, see `data.pairs`.
      spec: of the head.
      work: `task.Work`.
    """
    mesh, source = work.mesh, features.limited(source, work.limit)
    sharding.check_batch(spec.batch_size, 1, mesh)
    _check_crop(spec, model)
    key = dict(
        spec=dataclasses.asdict(spec),
        data=fingerprint.content(source.fingerprint),
        transform=model.transform,
    )
    digest = hashing.text_id(json.dumps(key, sort_keys=True))
    folder = work.folder / f'{spec.task}-{spec.head}-{digest}'
    whole = sharding.replicated(mesh)
    create = functools.partial(_start, model, spec)
    saver = checkpoint.Checkpointer(folder, keep=1)
    try:
        if launch.main_number(saver.latest() or 0):
            abstract = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
                jax.eval_shape(create),
            )
            state, _ = saver.restore(abstract)
        else:
            state = jax.jit(create, out_shardings=whole)()
        state = _train(model, source, spec, work, state, saver)
    finally:
        saver.close()
    return Head(model, spec, {'params': state.params, 'batch_stats': state.extra}, folder)


def _check_crop(spec, model):
    """Pixio's heads have no other sizes than whole patches."""
    for side in spec.crop if spec.recipe.pixio else ():
        features.check_size(side, model.patch_size, f'{spec.task}.crop')


def _start(model, spec):
    """The train state of step 0."""
    images = jax.ShapeDtypeStruct((1, *spec.crop, 3), np.uint8)
    shapes = jax.eval_shape(lambda x: head_spec.forward(model, spec, x)[0], images)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    variables = spec.module().init(jax.random.key(spec.seed), zeros)
    params, extra = variables['params'], variables.get('batch_stats', {})
    return step_lib.TrainState.create(params, extra, optimizer(spec, params))


def _train(model, source, spec, work, state, saver):
    """The state after the last step."""
    mesh, module, params = work.mesh, spec.module(), _placed(model, work.mesh)
    tx = optimizer(spec, state.params)

    def step(state, params, batch):
        inputs, size = head_spec.forward(_with(model, params), spec, batch['image'])

        def objective(head):
            variables = {'params': head, 'batch_stats': state.extra}
            out, changed = module.apply(variables, inputs, size, True, mutable=['batch_stats'])
            return spec.loss(out, batch, state.step), changed.get('batch_stats', {})

        (loss, extra), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        head = optax.apply_updates(state.params, updates)
        now = dict(step=state.step + 1, params=head, opt_state=opt_state, extra=extra)
        return dataclasses.replace(state, **now), loss

    step = jax.jit(
        step,
        donate_argnums=0,
        out_shardings=sharding.replicated(mesh),
        compiler_options=sharding.compiler_options(mesh),
    )
    first = done = int(state.step)
    if done == spec.steps:
        return state
    name = f'{spec.task} {spec.head}'
    if done:
        work.log(f'{name}: continues at step {done} of {spec.steps}')
    rows = sharding.process_rows(mesh, spec.batch_size)
    crop = pairs.Crop(spec.crop, spec.ratio, spec.base, fixed=spec.fixed)
    every = max(spec.steps // 10, 1)
    began = said = before = None
    with pairs.train_pairs(
        source, crop, batch_size=spec.batch_size, seed=spec.seed, start_step=done, rows=rows
    ) as stream:
        while done < spec.steps:
            batch = next(stream)
            batch = {k: batch[k] for k in ('image', spec.map)}
            _check_map(batch[spec.map], spec)
            batch = sharding.to_global(batch, mesh, rows, spec.batch_size)
            with jax.set_mesh(mesh):
                state, loss = step(state, params, batch)
            done += 1
            peers.progress()
            if done % every == 0 or done == spec.steps:
                saver.save(done, state, {'head': dataclasses.asdict(spec)})
            now = time.monotonic()
            began, said = began or now, said or now  # after the compilation
            if now - said > LOG_SECONDS or done == spec.steps:
                said, left = now, (spec.steps - done) * (now - began) / max(done - first - 1, 1)
                work.log(f'{name}: step {done}/{spec.steps}, loss {loss:.4f}, {left:.0f} s left')
            if before is not None:  # one late: the device stays busy
                jax.block_until_ready(before)
            before = loss
    return state


def _check_map(labels, spec):
    """Raises where a class is none of the names."""
    if spec.task == 'seg_head':
        top = int(labels[labels != maps_lib.IGNORED].max(initial=0))
        if top >= len(spec.names):
            raise errors.UserError(
                f'A class map has class {top}, and the source names {len(spec.names)} classes: '
                f'give names for all, or 255 where nothing is to be learned.'
            )


def load(folder: epath.PathLike, model: Any) -> Head:
    """A head that `fit` has trained.

    Args:
      folder: of the head, see `find`.
      model: the encoder that it was trained on.

    Raises:
      UserError: there is none, or it does not fit the encoder.
    """
    folder = epath.Path(folder)
    spec = dict(checkpoint.read_meta(folder)['head'])
    spec = head_spec.Spec(**{k: tuple(v) if isinstance(v, list) else v for k, v in spec.items()})
    state = jax.eval_shape(functools.partial(_start, model, spec))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        {'params': state.params, 'extra': state.extra},
    )
    found, _ = checkpoint.restore_model(folder, abstract)
    return Head(model, spec, {'params': found['params'], 'batch_stats': found['extra']}, folder)


def find(folder: epath.PathLike) -> list[epath.Path]:
    """Folders of trained heads in the folder of a model's evaluations."""
    folder, tasks = epath.Path(folder), {task for task, _ in head_spec.RECIPES}
    names = [n for n in storage.names(folder) if n.split('-')[0] in tasks]
    return [folder / n for n in sorted(names) if checkpoint.steps(folder / n)]


def make_predict(head: Head, mesh: jax.sharding.Mesh | None = None) -> Callable:
    """A function of images: (n, h, w, 3) numpy, uint8 or normalised -> numpy maps.

    The maps are class probabilities (n, h, w, K), or depths (n, h, w) within the range of the head.

    Args:
      head: a trained one.
      mesh: n is a multiple of the devices that share a batch; default one device.
    """
    spec, module = head.spec, head.spec.module()
    mesh = mesh or sharding.make_mesh(devices=jax.local_devices()[:1])
    params = _placed(head.model, mesh)
    variables = jax.device_put(head.variables, sharding.replicated(mesh))

    def once(params, variables, images):
        return module.apply(variables, *head_spec.forward(_with(head.model, params), spec, images))

    @jax.jit
    def run(params, variables, images):
        out = once(params, variables, images)
        if spec.recipe.flip:
            out = (out + once(params, variables, images[:, :, ::-1])[:, :, ::-1]) / 2
        if spec.task == 'seg_head':
            return jax.nn.softmax(out)
        return jnp.clip(out, spec.min_depth, spec.max_depth)

    def predict(images):
        rows = sharding.process_rows(mesh, len(images))
        images = sharding.to_global(images[rows], mesh, rows, len(images))
        with jax.set_mesh(mesh):
            return features.fetch(run(params, variables, images))

    return predict


def predict(head: Head, image: np.ndarray) -> np.ndarray:
    """The prediction for one image of any size.

    Args:
      head: a trained one; the program is compiled once for each size of windows.
      image: uint8 (H, W, 3).

    Returns:
      Class map uint8 (H, W), or depth float32 (H, W).
    """
    ((_, found),) = _predicted(head, [image], head.run, 1)
    return found


def _predicted(head, images, run, batch_size):
    """Yields (image, its map) for uint8 images of any sizes, in order."""
    spec, recipe = head.spec, head.spec.recipe
    t = head.model.transform
    mean, std = np.float32(t['mean']), np.float32(t['std'])
    waiting = collections.deque()

    def inputs():
        for image in images:
            waiting.append(image)
            resized = _short_side(image, spec.base)
            yield (np.float32(resized) / 255 - mean) / std

    crop = None if recipe.stride is None else spec.crop[0]
    maps = dense_scores.sliding(
        inputs(),
        run,
        crop=crop,
        stride=int(crop * recipe.stride) if crop else 0,
        shifted=not recipe.pixio,
        batch_size=batch_size,
    )
    for found in maps:
        image = waiting.popleft()
        size = image.shape[:2]
        if found.shape[:2] != size:
            found = _stretched(found, size)
        if spec.task == 'seg_head':
            found = found.argmax(axis=-1).astype(np.uint8)
        yield image, found


def _short_side(image, base):
    """The image resized as training crops are with ratio 1, see `pairs.Crop`."""
    h, w = image.shape[:2]
    if base is None:
        return image
    scale = min(base / min(h, w), 4 * base / max(h, w))
    size = [max(1, int(n * scale + 0.5)) for n in (w, h)]
    if size == [w, h]:
        return image
    return np.asarray(PIL.Image.fromarray(image).resize(size, PIL.Image.Resampling.BICUBIC))


def _stretched(maps, size):
    """(h, w, K) -> (*size, K), bilinear, in numpy."""
    rows, columns = (
        dense.bilinear_weights(n, m, False) for n, m in zip(maps.shape[:2], size, strict=True)
    )
    return np.einsum('yh,hwk,xw->yxk', rows, maps, columns, optimize=True)


def predictions(
    head: Head, source: Any, work: Any, fixed: str = ''
) -> Iterator[tuple[dict, np.ndarray]]:
    """(item, prediction) of all images of a source, in order, see `predict`.

    Args:
      head: a trained one.
      source: test images with maps.
      work: `task.Work`.
      fixed: crop of images and maps before the prediction, see `pairs.cut_fixed`.
    """
    source = features.limited(source, work.limit)
    waiting, run, read = collections.deque(), make_predict(head, work.mesh), 0

    def images():
        nonlocal read
        for item in pairs.native(source):
            read += 1
            for key in ('image', head.spec.map):
                item[key] = pairs.cut_fixed(item[key], fixed)
            waiting.append(item)
            yield item['image']

    elements = np.prod(head.spec.crop) * max(len(head.spec.names), 1)
    size = int(np.clip(WINDOW_ELEMENTS // elements, 1, work.batch_size))
    size = features.round_up(size, work.mesh)
    began = said = time.monotonic()
    for _, found in _predicted(head, images(), run, size):
        peers.progress()
        now = time.monotonic()
        if now - said > LOG_SECONDS:
            said, left = now, (len(source) - read) * (now - began) / read
            name = f'{head.spec.task} {head.spec.head}'
            work.log(f'{name}: {read}/{len(source)} images, {left:.0f} s left')
        yield waiting.popleft(), found
