# SPDX-License-Identifier: Apache-2.0
"""Contract of a method, and the glossary of the repository.

A method is one frozen dataclass in one file of this folder. Its fields are `config.method`: name,
type, default and comment are written there, once. The loop, evaluations, plan and export call the
methods of `Method`, which are pure: parameters are arguments and results.

Glossary:
  run           one training, and its workdir: checkpoints/, config.json, metrics.jsonl, pictures/
  recipe        a file in configs/ that makes a config
  step          one optimizer update; `examples` are images seen, an epoch the whole training set
  batch         images of one step over all devices; micro-batches where `accum_steps` > 1
  row           index of a sample in the global batch; its random numbers depend on it
  source        random access to images, with labels or without (`ssl_jax.data.sources`)
  view, crop    part of an image cut by the host: `views()` lists them, `batch[name]` has them
  patch, grid   square of pixels; rows and columns of patches
  token         a patch, class, register or mask vector of width `embed_dim`
  params        arrays the optimizer trains; `extra`: arrays it does not (teacher, codebook)
  encoder       the ViT that a run is for; decoder, heads: networks behind it, for training only
  networks      {name: (module, params)}: content of exports and imports
  student, teacher   the trained network; its moving average, or a larger frozen one
  prototype, centre  outputs of DINO's head; the running mean subtracted from them
  words, codebook    classes of patches (BEiT, SplitMask); the arrays that assign them
  family, layout     origin of a network (mae, pixio, dinov2, beit, vit); naming of its tensors
                     (official, hf, timm)
  protocol      settings of an evaluation; its id is stored beside each number
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from ssl_jax import fields
from ssl_jax.augment import photometry
from ssl_jax.data import host
from ssl_jax.data import transform as transform_lib
from ssl_jax.models import vit as vit_lib
from ssl_jax.run import clock as clock_lib

Params = Any  # a pytree of arrays
CHECKED = ('img_size', 'patch_size', 'embed_dim', 'depth', 'num_heads')


class Facts(NamedTuple):
    """Images and devices, for `Method.infer`."""

    num_images: int  # in the training set
    short_side: int  # pixels, of a typical image
    cpu: bool  # whether the run is on a CPU
    per_device: int  # images of a micro-batch on one device


class Start(NamedTuple):
    """Access to images and files before step 0, for `Method.prepare`."""

    seed: int  # of the run
    fetch: Callable  # arrays of `extra` -> numpy, complete on every process
    batches: Callable  # () -> context manager of an endless iterator over host batches of the views
    open: Callable  # path -> `run.weights.Opened`
    tensors: Callable  # path of a file of weights -> {torch name: array}
    init_from: str | None = None  # what the run starts from, loaded already; None: fresh weights


@dataclasses.dataclass(frozen=True)
class Method:
    """A way to train a ViT. Subclasses define at least `vit`, `views`, `init`, `loss`, `flops`."""

    labels: ClassVar[bool] = False  # whether batches need batch['label'], int32 (B,)
    repeats: ClassVar[int] = 1  # consecutive rows of a batch that are crops of one image
    follows: ClassVar[bool] = False  # whether encoder fields are taken from `init_from`
    remade: ClassVar[tuple] = ()  # entries of `extra` that `prepare` makes, never of `init_from`
    monitored: ClassVar[str] = 'cls'  # feature checked for collapse, see `evals.monitors`
    classes: ClassVar[tuple] = ()  # class names of a classifier
    mean: ClassVar[tuple] = photometry.MEAN  # per channel, for values in [0, 1]
    std: ClassVar[tuple] = photometry.STD
    # Of images outside training, see `data.transform`:
    crop_pct: ClassVar[float] = 1.0  # share of the short side in the central crop
    crop_mode: ClassVar[str] = 'center'
    interpolation: ClassVar[str] = 'bicubic'
    library: ClassVar[str] = 'transformers'
    # For inferred runs:
    min_images: ClassVar[int] = 1  # per device; more where images are compared
    lr_at_1024: ClassVar[float | None] = 1.5e-3  # rate at batch 1,024; None: the recipe's
    max_epochs: ClassVar[tuple] = (1600, 'more passes over few images bring little')
    removed: ClassVar[dict] = {}  # fields of earlier versions: their fixed value now, ... for any

    size: vit_lib.Size | None = 'S'  # default of the next three
    embed_dim: int | None = None  # encoder width, channels
    depth: int | None = None  # encoder blocks
    num_heads: int | None = None
    patch_size: int | None = 16  # pixels
    img_size: int | None = 224  # pixels, height and width of a training crop
    mlp_ratio: float = 4.0  # hidden width of the MLP / embed_dim
    drop_path: Annotated[float, fields.Range(0.0, 0.999)] = 0.0  # stochastic depth, last block
    eps: float = 1e-6  # of the norms

    dtype: str = fields.given('float32')  # config.dtype: compute type of the networks
    remat: str = fields.given('none')  # config.remat: what backward recomputes
    clock: clock_lib.Clock | None = fields.given(None)  # of the run; None outside training
    modules: tuple = fields.given(())  # (name, network), see `with_modules`

    def check(self, run) -> Iterator[str]:
        """Yields a sentence for each invalid field; later checks may rely on earlier ones.

        Args:
          run: the whole config: `batch_size`, `accum_steps`, ...
        """
        del run
        yield from fields.problems(type(self), self, 'method.')
        for name in CHECKED:
            if getattr(self, name) is None:
                hint = 'a number' if name in ('img_size', 'patch_size') else "method.size='S'"
                yield f'method.{name} is None: set it, or use {hint}.'
        if self.img_size % self.patch_size:
            yield (
                f'method.img_size={self.img_size} is not a multiple of method.patch_size='
                f'{self.patch_size}: use img_size={near_multiple(self.img_size, self.patch_size)}.'
            )
        yield from divisible(self, 'embed_dim', 'num_heads')

    def infer(self, facts: Facts, choose: Callable[[str, Any, str], Any]) -> None:
        """Chooses fields that are None.

        Args:
          facts: images and devices.
          choose: (field, value, reason) -> value of the field, `value` if it was None.
        """
        self.infer_crop(facts, choose)
        self.infer_encoder(facts, choose)

    def infer_crop(self, facts, choose):
        """Chooses and returns crop and patch size, from the short side of the images."""
        size = self.img_size or min(facts.short_side, 64 if facts.cpu else 224)
        patch = choose('patch_size', patch_for(size), f'for crops of about {size} pixels')
        size = max(size // patch, 2) * patch
        size = choose('img_size', size, f'short side of the images {facts.short_side}')
        return size, patch

    def infer_encoder(self, facts, choose):
        """Chooses the encoder from the number of images; returns its width and depth."""
        n, size = facts.num_images, self.size
        if size is None and self.embed_dim is None and not facts.cpu:
            size = choose(
                'size', 'S' if n < 30_000 else 'B' if n < 2_000_000 else 'L', f'for {n:,} images'
            )
        if size is None:
            names, why = ('embed_dim', 'depth', 'num_heads'), 'small enough for a CPU'
            return [choose(*row, why) for row in zip(names, SMALL, strict=True)][:2]
        return self.embed_dim or vit_lib.SIZES[size][0], self.depth or vit_lib.SIZES[size][1]

    def follow(self, opened, fixed: set[str]) -> dict:
        """Fields to take from the weights of `init_from`, if `follows`.

        Args:
          opened: `run.weights.Opened`.
          fixed: fields set by the user.
        """
        del opened, fixed
        return {}

    def complete(self, source) -> tuple[dict, list[str]]:
        """(fields, log lines) read from the training images, a source."""
        del source
        return {}, []

    def warnings(self, batch_size: int, ways: int, accum_steps: int = 1) -> Iterator[str]:
        """Yields a sentence for each setting that is slow, or changes what a batch is.

        Args:
          batch_size: images per micro-batch.
          ways: devices that share it.
          accum_steps: micro-batches per step.
        """
        del batch_size, ways, accum_steps
        yield from ()

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches of a training crop."""
        side = self.img_size // self.patch_size
        return (side, side)

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    def transform(self, size: int | None = None) -> dict:
        """What happens to images outside training, see `data.transform`.

        Args:
          size: pixels; default that of the first view.
        """
        return {
            **transform_lib.of(size or self.views()[0].size),
            'mode': self.crop_mode,
            'crop': self.crop_pct,
            'interpolation': self.interpolation,
            'library': self.library,
            'mean': list(self.mean),
            'std': list(self.std),
        }

    @functools.cached_property
    def vit(self) -> vit_lib.ViT:
        """The encoder."""
        raise TypeError(f'{type(self).__name__} defines no encoder')

    def with_modules(self, encoder: Any, **modules: Any) -> 'Method':
        """A copy with these networks: those of an import may differ from what fields describe."""
        return dataclasses.replace(self, modules=(('vit', encoder), *modules.items()))

    def __post_init__(self):
        self.__dict__.update(self.modules)  # the cache of cached_property

    def encoder(self, prefix: str = '', **more) -> vit_lib.ViT:
        """A ViT of the fields above and of `more`.

        Args:
          prefix: 'teacher_' for the fields teacher_size, teacher_embed_dim, ...
          **more: fields of `ViT`.
        """
        names = ('embed_dim', 'depth', 'num_heads')
        size = getattr(self, f'{prefix}size')
        sizes = vit_lib.SIZES[size] if size else (None,) * 3
        widths = {
            name: getattr(self, f'{prefix}{name}') or default
            for name, default in zip(names, sizes, strict=True)
        }
        common = ('patch_size', 'img_size', 'mlp_ratio', 'drop_path', 'eps', 'remat')
        common = {name: getattr(self, name) for name in common}
        return vit_lib.ViT(**{**widths, **common, 'dtype': jnp.dtype(self.dtype), **more})

    def views(self) -> tuple[host.View, ...]:
        """Crops for the host to cut; batch[view.name] is uint8 (B, count, size, size, 3)."""
        raise TypeError(f'{type(self).__name__} defines no views')

    def init(self, rng: jax.Array) -> tuple[Params, dict]:
        """Fresh (params, extra)."""
        raise TypeError(f'{type(self).__name__} defines no init')

    def prepare(self, extra: dict, start: Start) -> tuple[dict, list[str]]:
        """(entries of `extra` computed from files or images, as numpy; log lines).

        Called once in a fresh run, after `init_from` is loaded.
        """
        del extra, start
        return {}, []

    def loss(self, params: Params, extra: dict, batch: dict, rng: jax.Array, step: jax.Array):
        """(loss, (changes, metrics)) of a micro-batch.

        The changes are entries for `extra`, {} if none. All micro-batches of a step start from the
        same `extra`; the mean of their changes is put into it before `after_update`. So a change is
        a mean over the batch, or a moving average with such a mean.

        Args:
          batch: uint8 crops per view, and 'row', int32 (B,); randomness is a function of rng and
            row only, see `photometry.sample_keys`.
        """
        raise TypeError(f'{type(self).__name__} defines no loss')

    def after_update(self, params: Params, extra: dict, step: jax.Array) -> dict:
        """`extra` of the next step: moving averages.

        Args:
          params: after the optimizer update.
          extra: of this step, with the changes by `loss`; entries that are not in `init` are
            removed here.
        """
        del params, step
        return extra

    def networks(self, params: Params, extra: dict) -> dict[str, tuple[Any, Params]]:
        """{name: (module, params)} for evaluation, export and `init_from`; 'encoder' is required.

        Modules that exist in no other code are left out.
        """
        del extra
        return {'encoder': (self.vit, params['encoder'])}

    def with_networks(self, params: Params, extra: dict, found: dict[str, Params]):
        """(params, extra) with `found` {name: params} wherever the method has these networks."""
        return {**params, **found}, extra

    def left_behind(self) -> str:
        """A sentence for the model card on what an export lacks; '' if nothing."""
        return ''

    def logits(self, params: Params, extra: dict, images: jax.Array) -> dict[str, jax.Array]:
        """Logits {name: (B, K)} of uint8 images (B, S, S, 3); {} if it is no classifier."""
        del params, extra, images
        return {}

    def reconstruct(self, params: Params, extra: dict, images: jax.Array, keys: jax.Array) -> dict:
        """Images of `models.patches.pictures`; {} if the method reconstructs nothing.

        Args:
          images: uint8 (B, S, S, 3).
          keys: (B,), for the masks.
        """
        del params, extra, images, keys
        return {}

    def reconstruct_hidden(
        self, params: Params, extra: dict, images: jax.Array, order: jax.Array, visible: int
    ) -> dict:
        """`reconstruct` of chosen patches.

        Args:
          images: uint8 (B, S, S, 3).
          order: int (B, N), all patches of an image, those that the encoder sees first.
          visible: how many it sees, 1 to N - 1.
        """
        del params, extra, images, order, visible
        return {}

    def suspect(self, values: dict[str, float], step: int) -> str | None:
        """A sentence if the latest metrics show a collapse, else None."""
        del values, step
        return None

    def flops(self, batch_size: int) -> float:
        """FLOPs of one step without recomputation."""
        raise TypeError(f'{type(self).__name__} defines no flops')


SMALL = (192, 6, 3)  # embed_dim, depth, num_heads of inferred runs on a CPU


@dataclasses.dataclass(frozen=True)
class OneView(Method):
    """A method that trains on one random crop per image."""

    crop_scale: tuple = (0.2, 1.0)  # RandomResizedCrop: fraction of the image's area
    flip: fields.Probability = 0.5  # probability of a horizontal flip

    def check(self, run):
        yield from super().check(run)
        yield from interval(self, 'crop_scale')

    def views(self):
        return (host.View('image', self.img_size, scale=self.crop_scale),)


def micro_batches(terms: str, batch_size: int, accum_steps: int) -> Iterator[str]:
    """Says that `terms` of a loss compare the images of a micro-batch, if there are several."""
    if accum_steps > 1:
        yield (
            f'accum_steps={accum_steps}: the {batch_size} images of a micro-batch, not the '
            f'{batch_size * accum_steps} of a step, are compared by {terms}, so the loss is '
            f'another one than with accum_steps=1.'
        )


def interval(method, name: str) -> Iterator[str]:
    """Checks a pair (low, high) of fractions of the image area."""
    value = getattr(method, name)
    if len(value) != 2 or not 0 < value[0] <= value[1] <= 1:
        yield f'method.{name}={value} must be fractions of the area, 0 < low <= high <= 1.'


def mask_rules(method) -> Iterator[str]:
    """Checks `mask_ratio` and `mask_grid` on the grid of a method."""
    side, grid = method.grid[0], method.mask_grid or 1
    if side % grid:
        divisors = [g for g in range(1, side + 1) if side % g == 0]
        yield (
            f'method.mask_grid={grid} does not divide the {side}x{side} token grid of '
            f'img_size={method.img_size} and patch_size={method.patch_size}: use one of {divisors}.'
        )
    cells = (side // grid) ** 2
    if int(cells * (1 - method.mask_ratio)) < 1:
        yield (
            f'method.mask_ratio={method.mask_ratio} leaves none of the {cells} mask cells visible: '
            f'lower mask_ratio, mask_grid or patch_size.'
        )


def divisible(method, width: str, heads: str, fix: str = '') -> Iterator[str]:
    """Checks that the heads divide a width."""
    dim, count = getattr(method, width), getattr(method, heads)
    if dim and count and dim % count:
        yield (
            f'method.{width}={dim} is not divisible by method.{heads}={count}: '
            f'use {fix or f"{width}={near_multiple(dim, count)}"}.'
        )


def sincos(method, width: str) -> Iterator[str]:
    """Checks that a width fits sin-cos positions."""
    dim = getattr(method, width)
    if dim and method.pos_embed == 'sincos' and dim % 4:
        yield (
            f"method.{width}={dim} is not divisible by 4, which pos_embed='sincos' needs: use "
            f"{near_multiple(dim, 4)} or pos_embed='learned'."
        )


def near_multiple(value: int, of: int) -> int:
    """The multiple of `of` nearest to `value`, at least one."""
    return max(round(value / of), 1) * of


def patch_for(size: int) -> int:
    """Patch size in pixels for crops of `size` pixels."""
    return 4 if size < 64 else 8 if size < 160 else 16
