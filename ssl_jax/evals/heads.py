# SPDX-License-Identifier: Apache-2.0
"""Heads for dense prediction on a frozen encoder: their training, kept state and predictions.

head = heads.fit(model, source, spec, work)     # or heads.load(folder, model)
heads.predict(head, image)                      # class map uint8 or depth float32, (H, W)
"""

import collections
import dataclasses
import functools
import io
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
from ssl_jax.augment import photometry
from ssl_jax.data import fingerprint, pairs
from ssl_jax.evals import dense_scores, features
from ssl_jax.models import dense
from ssl_jax.models import vit as vit_lib
from ssl_jax.objectives import dense as losses
from ssl_jax.run import checkpoint, errors, hashing, launch, peers, storage, trees

SHOWN = 8  # test images of which predictions are kept
LOG_SECONDS = 10.0
WINDOW_ELEMENTS = 2**26  # of the predictions of windows that are computed together


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How an official code feeds, trains and tests a head.

    The rate of step s of T is lr times a decay over all steps, 'poly' (1 - s/T)^power or 'cosine',
    times a linear warm-up from `warmup_from`.
    """

    blocks: str  # 'last', 'four' (the last four) or 'spread' (four over the depth)
    normed: bool  # whether their outputs go through the final norm
    lr: float
    weight_decay: float
    decay: str = 'poly'
    power: float = 1.0
    warmup: float = 0.0  # share of the steps
    warmup_from: float = 0.0  # share of the rate
    pixio: bool = False  # schedule, loss and windows of Pixio; otherwise of mmcv, used by DINOv2
    clip: float | None = None  # largest norm of the gradient
    stride: float | None = 2 / 3  # of test windows, in crops; None: whole images
    flip: bool = False  # whether the mirrored test image is averaged in


_SEG = Recipe('last', True, 1e-3, 1e-4, warmup=1500 / 40000, warmup_from=1e-6, stride=341 / 512)
_DEPTH = Recipe(
    'last', False, 1e-4, 1e-2, 'cosine', warmup=12800 / 38400, warmup_from=1e-3,
    clip=35.0, stride=None, flip=True,
)  # fmt: skip
_PIXIO = Recipe('last', True, 2e-4, 1e-2, power=0.9, pixio=True)
_change = dataclasses.replace
RECIPES = {
    ('seg_head', 'linear'): _SEG,
    ('seg_head', 'linear4'): _change(_SEG, blocks='four', stride=320 / 640),
    ('seg_head', 'pixio_linear'): _PIXIO,
    ('seg_head', 'pixio_dpt'): _change(_PIXIO, blocks='spread', lr=1e-4),
    ('depth', 'linear'): _DEPTH,
    ('depth', 'linear4'): _change(_DEPTH, blocks='spread'),
    ('depth', 'dpt'): _change(_DEPTH, blocks='spread'),
    ('depth', 'pixio_linear'): _change(_PIXIO, warmup=0.1),
    ('depth', 'pixio_dpt'): _change(_PIXIO, blocks='spread', lr=1e-4, warmup=0.1),
}


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a trained head depends on besides the encoder and the images."""

    task: str  # 'seg_head' or 'depth'
    head: str
    crop: tuple[int, int]  # of training; the first is the side of test windows
    steps: int
    batch_size: int
    lr: float
    seed: int = 0
    names: tuple = ()  # of the classes
    min_depth: float = 0.0
    max_depth: float = 0.0
    fixed: str = ''  # see `pairs.Crop`
    ratio: tuple[float, float] = (1.0, 1.0)  # of sizes that training images are resized to ...
    base: int | None = None  # ... in multiples of this short side; test images have it
    gradient: float = 0.0  # weight of `losses.gradient_loss`
    channels: int = 256  # width of a DPT head

    @property
    def recipe(self) -> Recipe:
        return RECIPES[self.task, self.head]

    @property
    def map(self) -> str:
        """The map that is learned, by its name in the items of a source."""
        return 'segmentation' if self.task == 'seg_head' else 'depth'

    def module(self) -> Any:
        """The network, of `models.dense`."""
        depth = self.task == 'depth'
        outputs, top = (1, self.max_depth) if depth else (len(self.names), None)
        c = self.channels
        if self.head == 'pixio_linear':
            return dense.BNLinear(outputs, True, ('0', '1'), True, top)
        if self.head == 'pixio_dpt':
            return dense.PixioDPT(outputs, c, (c, 2 * c, 4 * c, 4 * c), top)
        if self.head == 'dpt':
            return dense.DPT(self.min_depth, c)
        if depth:
            return dense.DepthLinear(self.min_depth, self.max_depth)
        return dense.BNLinear(outputs)

    def rate(self, step: jax.Array) -> jax.Array:
        """Learning rate of a step, from 0."""
        r, total = self.recipe, self.steps
        s = step.astype(jnp.float32)
        warmup = r.warmup * total
        if r.pixio:  # sets the rate after the step: of the step before, and of the first in full
            s = jnp.maximum(s - 1, 0)
            left = jnp.clip(1 - (s - warmup) / max(total - warmup, 1), 0, 1)
            rate = jnp.where(s < warmup, s / max(warmup, 1), left**r.power)
            return self.lr * jnp.where(step == 0, 1.0, rate)
        left = jnp.clip(1 - s / total, 0, 1)
        rate = jnp.sin(jnp.pi / 2 * left) ** 2 if r.decay == 'cosine' else left**r.power
        start = jnp.clip(1 - s / max(warmup, 1e-9), 0, 1)  # 1 at the first step, 0 after the warm-up
        return self.lr * rate * (1 - start * (1 - r.warmup_from))

    def loss(self, out: jax.Array, batch: dict, step: jax.Array) -> jax.Array:
        """Loss of the head's output for a batch of `pairs.train_pairs`."""
        if self.task == 'seg_head':
            return losses.cross_entropy(out, batch['segmentation'])
        gt = batch['depth']
        if self.recipe.pixio:
            valid = losses.measured(gt, self.max_depth) & (gt >= self.min_depth)
            return losses.silog(jnp.maximum(out, self.min_depth), gt, valid)
        warm = step < min(100, self.steps // 10)
        loss = losses.sig_loss(out, gt, warm, self.max_depth)
        if self.gradient:
            fn = functools.partial(losses.gradient_loss, max_depth=self.max_depth)
            loss += self.gradient * jax.vmap(fn)(out, gt).mean()
        return loss

    def protocol(self) -> dict:
        """What a row says of the head."""
        values = dataclasses.asdict(self) | dataclasses.asdict(self.recipe) | {'lr': self.lr}
        seg = ('min_depth', 'max_depth', 'gradient')
        left_out = ('task', 'names', *(seg if self.task == 'seg_head' else ()))
        values = {name: value for name, value in values.items() if name not in left_out}
        loss = 'cross-entropy, 255 ignored'
        if self.task == 'depth':
            loss = 'SiLog' if self.recipe.pixio else 'SigLoss'
        return dict(
            values,
            loss=loss,
            optimizer='AdamW, betas 0.9 0.999, eps 1e-8',
            augmentation='crop, flip 0.5; no photometric distortion',
            windows='whole image' if self.recipe.stride is None else
            'not shifted back, zero-padded' if self.recipe.pixio else 'last shifted back',
        )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Head:
    """A trained head on its encoder."""

    model: Any  # `encoder.Model` or `encoder.Pixels`
    spec: Spec
    variables: Any  # of `Spec.module`
    folder: epath.Path

    @functools.cached_property
    def run(self) -> Callable:
        """`make_predict` on one device, compiled once."""
        return make_predict(self)


def numbers(recipe: Recipe, depth: int) -> tuple[int, ...]:
    """Blocks that a head sees, from 0, of an encoder with `depth`; see `Recipe`."""
    if recipe.blocks == 'last':
        return (depth - 1,)
    if recipe.blocks == 'four':
        return tuple(range(max(depth - 4, 0), depth))
    if recipe.pixio and depth >= 4:
        return tuple(depth // 4 * i - 1 for i in (1, 2, 3, 4))
    if depth == 24:  # DINOv2 of ViT-L
        return (4, 11, 17, 23)
    return tuple(-(-depth * i // 4) - 1 for i in (1, 2, 3, 4))


def taps(model: Any, images: jax.Array, recipe: Recipe) -> dense.Taps:
    """Input of a head from the encoder, see `models.dense`.

    Args:
      model: `encoder.Model` or `encoder.Pixels`.
      images: (B, H, W, 3), normalised, sides multiples of the patch size.
      recipe: of the head.
    """
    vit = getattr(model, 'vit', None)
    p = vit.patch_size if vit else model.patch_size
    c, r = (vit.num_cls_tokens, vit.num_register_tokens) if vit else (0, 0)
    blocks = numbers(recipe, vit.depth if vit else 4)
    tokens = model(images, blocks=tuple(dict.fromkeys(blocks)))['blocks']
    grid = [side // p for side in images.shape[1:3]]
    out = []
    for block in blocks:
        x = tokens[block]
        if recipe.normed and vit and not vit.pooled_norm:
            x = vit_lib.final_norm(model.params, x, vit.eps)
        x = x.astype(jnp.float32)
        patch = x[:, c + r :].reshape(len(x), *grid, -1)
        out.append((patch, x[:, :c].mean(axis=1) if c else None))
    return out


def _forward(model, spec, images):
    """Taps and size of images (B, H, W, 3), uint8 or normalised.

    Where the sides are no multiples of the patch size, zeros are added around, and the head's map
    is stretched over the image, as in DINOv2.
    """
    if images.dtype == jnp.uint8:
        t = model.transform
        images = photometry.normalize(images, t['mean'], t['std'])
    size = images.shape[1:3]
    p = model.vit.patch_size if hasattr(model, 'vit') else model.patch_size
    fill = [((-n % p) // 2, -n % p - (-n % p) // 2) for n in size]
    images = jnp.pad(images, [(0, 0), *fill, (0, 0)])
    return taps(model, images, spec.recipe), size


def _with(model, params):
    """The encoder with other arrays as parameters, for a program that takes them as arguments."""
    return model if params is None else dataclasses.replace(model, params=params)


def _placed(model, mesh):
    """Parameters of the encoder on a mesh, None without any."""
    params = getattr(model, 'params', None)
    return params and jax.device_put(params, sharding.infer(params, mesh))


def optimizer(spec: Spec, params: Any) -> optax.GradientTransformation:
    """AdamW over all parameters of the head, biases and norms too, as in the official codes."""

    def used(path, _):  # what gets no gradient is left as it is
        return 'refinenet4/resConfUnit1' not in path

    mask = trees.map_named(used, params)
    adam = optax.adamw(spec.rate, weight_decay=spec.recipe.weight_decay, mask=mask)
    clip = spec.recipe.clip
    return optax.chain(optax.clip_by_global_norm(clip), adam) if clip else adam


def fit(model: Any, source: Any, spec: Spec, work: Any) -> Head:
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
    p = model.vit.patch_size if hasattr(model, 'vit') else model.patch_size
    for side in spec.crop if spec.recipe.pixio else ():
        features.check_size(side, p, f'{spec.task}.crop')


def _start(model, spec):
    """The train state of step 0."""
    images = jax.ShapeDtypeStruct((1, *spec.crop, 3), np.uint8)
    shapes = jax.eval_shape(lambda x: _forward(model, spec, x)[0], images)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    variables = spec.module().init(jax.random.key(spec.seed), zeros)
    params, extra = variables['params'], variables.get('batch_stats', {})
    return step_lib.TrainState.create(params, extra, optimizer(spec, params))


def _train(model, source, spec, work, state, saver):
    """The state after the last step."""
    mesh, module, params = work.mesh, spec.module(), _placed(model, work.mesh)
    tx = optimizer(spec, state.params)

    def step(state, params, batch):
        inputs, size = _forward(_with(model, params), spec, batch['image'])

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
    began = said = None
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
            jax.block_until_ready(loss)
    return state


def _check_map(maps, spec):
    """Raises where a class is none of the names."""
    if spec.task == 'seg_head':
        top = int(maps[maps != dense_scores.IGNORE].max(initial=0))
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
      UserError: there is none, or it is of another encoder.
    """
    folder = epath.Path(folder)
    spec = dict(checkpoint.read_meta(folder)['head'])
    spec = Spec(**{k: tuple(v) if isinstance(v, list) else v for k, v in spec.items()})
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
    folder, tasks = epath.Path(folder), {task for task, _ in RECIPES}
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
        return module.apply(variables, *_forward(_with(head.model, params), spec, images))

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
    """The image with a short side of `base` pixels, or as it is."""
    h, w = image.shape[:2]
    if base is None or min(h, w) == base:
        return image
    size = [max(round(n * base / min(h, w)), base) for n in (w, h)]
    return np.asarray(PIL.Image.fromarray(image).resize(size, PIL.Image.Resampling.BILINEAR))


def _stretched(maps, size):
    """(h, w, K) -> (*size, K), bilinear, in numpy."""
    rows, columns = (
        dense.bilinear_weights(n, m, False) for n, m in zip(maps.shape[:2], size, strict=True)
    )
    return np.einsum('yh,hwk,xw->yxk', rows, maps, columns, optimize=True)


def predictions(
    head: Head, source: Any, work: Any, view: Callable = lambda item: item
) -> Iterator[tuple[dict, np.ndarray]]:
    """(item, prediction) of all images of a source, in order, see `predict`.

    Args:
      head: a trained one.
      source: test images with maps.
      work: `task.Work`.
      view: item -> item, before the prediction.
    """
    source = features.limited(source, work.limit)
    waiting, run = collections.deque(), make_predict(head, work.mesh)

    def images():
        for item in pairs.native(source):
            waiting.append(view(item))
            yield waiting[-1]['image']

    elements = np.prod(head.spec.crop) * max(len(head.spec.names), 1)
    size = int(np.clip(WINDOW_ELEMENTS // elements, 1, work.batch_size))
    size = features.round_up(size, work.mesh)
    began = said = time.monotonic()
    for i, (_, found) in enumerate(_predicted(head, images(), run, size), 1):
        peers.progress()
        now = time.monotonic()
        if now - said > LOG_SECONDS:
            said, left = now, (len(source) - i) * (now - began) / i
            name = f'{head.spec.task} {head.spec.head}'
            work.log(f'{name}: {i}/{len(source)} images, {left:.0f} s left')
        yield waiting.popleft(), found


def keep(head: Head, shown: list[tuple[dict, np.ndarray]]) -> epath.Path:
    """Writes images, truth and predictions for pictures: process 0.

    Returns:
      The file predictions.npz in the folder of the head, with image_<i>, truth_<i> and
      prediction_<i>.
    """
    arrays = {}
    for i, (item, found) in enumerate(shown):
        arrays[f'image_{i}'] = item['image']
        arrays[f'truth_{i}'] = item[head.spec.map]
        arrays[f'prediction_{i}'] = found
    path = head.folder / 'predictions.npz'
    if launch.is_main():
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        storage.atomic_write(path, buffer.getvalue())
    return path
