# SPDX-License-Identifier: Apache-2.0
"""DINOv2, and its configurations iBOT and DINO: a student learns from its own moving average.

The teacher, a moving average of the student, sees two global crops; the student sees the same crops
with masked patches and several local crops. DINO: class tokens of different crops agree. iBOT: the
student's masked patches agree with the teacher's. KoLeo: class tokens spread out. Gram anchoring
(off by default): patches keep the similarities that they have in a frozen copy of the teacher.

Differences from the official code:
- Crops are stored per sample, (B, crops, H, W, 3), so that none moves between devices. Global and
  local crops share the dense layers in one pass, see `models.vit`.
- Mask ratios drawn from a grid, the fixed share of images skipped by stochastic depth and the
  buffer of masked patches are per group of `group_size` samples, where the official code has them
  per GPU. Results therefore do not depend on the devices.
- Centres, Sinkhorn-Knopp and KoLeo use the global batch, the patch centre all masked patches (the
  official code averages the means of the GPUs).
- All layers after the backbone are float32.

References:
  DINOv2, arXiv 2304.07193, `train/ssl_meta_arch.py`; iBOT, arXiv 2111.07832; DINO, arXiv
  2104.14294.
"""

import dataclasses
import functools
import math
from typing import Annotated, ClassVar, Literal

import jax
import jax.numpy as jnp

from ssl_jax import fields, optim
from ssl_jax.augment import photometry
from ssl_jax.methods import base, crops
from ssl_jax.models import blocks as blocks_lib
from ssl_jax.models import heads
from ssl_jax.models import vit as vit_lib
from ssl_jax.objectives import collapse, gram, losses, masking
from ssl_jax.run import clock as clock_lib

PARAMS = {'encoder': 'backbone'}  # name of a network -> its key in `params`, where they differ
CENTERS = {'class': 'dino_center', 'patch': 'ibot_center'}  # keys in `extra`
# Fields of the encoder that weights of any method determine, see `DINOv2.follow` ...
ENCODER = (
    *('embed_dim', 'depth', 'num_heads', 'patch_size', 'img_size', 'mlp_ratio', 'eps', 'ffn'),
    *('layer_scale', 'num_register_tokens', 'pos_resize'),
)
# ... and those of this method that each stage of a run has anew.
OF_A_STAGE = (
    *('group_size', 'momentum_teacher', 'final_momentum_teacher', 'warmup_teacher_temp_steps'),
    *('warmup_teacher_temp_epochs', 'warmup_teacher_temp_examples', 'gram_weight', 'gram_size'),
    *('gram_from', 'gram_every', 'gram_updates'),
)


@dataclasses.dataclass(frozen=True)
class DINOv2(crops.MultiCrop):
    """DINOv2; the defaults are those of its large runs."""

    removed = {'crop_ratio': (3 / 4, 4 / 3), 'koleo_per_group': False}
    encoder_fields: ClassVar[tuple] = ENCODER
    remade = ('gram',)

    ffn: Literal['mlp', 'swiglu'] = 'mlp'
    layer_scale: float | None = 1e-5  # initial factor of each residual branch; None: none
    num_register_tokens: Annotated[int, fields.Range(0, 64)] = 0
    # Resizing of positions to other image sizes; 'antialias' for models with registers.
    pos_resize: Literal['bicubic', 'offset', 'antialias'] = 'offset'
    # Stochastic depth: skips a fixed share of each group, or each image at random.
    drop_path_mode: Literal['subset', 'image'] = 'subset'
    drop_path_uniform: bool = True  # same rate in all blocks; False: linear from 0

    blur: Literal['released', 'intended', 'none'] = 'released'  # probabilities, photometry.BLUR
    solarize: tuple = (0.0, 0.2, 0.0)  # probability for global crop 1, global crop 2, local crops

    group_size: int | None = 64  # samples that share mask ratios, patch buffer, dropped images
    mask_sampler: Literal['dinov2', 'ibot'] = 'dinov2'  # ratios from a grid, or drawn per image
    mask_probability: fields.Probability = 0.5  # share of global crops with masked patches
    mask_ratio_min_max: tuple = (0.1, 0.5)  # share of masked patches in such a crop

    dino_weight: float = 1.0
    ibot_weight: float = 1.0  # 0: no masks, no patch loss (DINO)
    koleo_weight: float = 0.1
    separate_heads: bool = True  # False: patches go through the class tokens' head
    dino_out_dim: int | None = 65536  # prototypes
    dino_bottleneck_dim: int = 256  # channels before the prototypes
    ibot_out_dim: int | None = 65536  # of the patch head; unused without separate heads
    ibot_bottleneck_dim: int = 256
    head_hidden_dim: int = 2048
    head_num_layers: int = 3

    # 'none' demonstrates a collapse.
    centering: Literal['sinkhorn_knopp', 'centering', 'none'] = 'sinkhorn_knopp'
    center_momentum: fields.Probability = 0.9
    student_temp: Annotated[float, fields.Range(1e-4, 100.0)] = 0.1
    # Teacher temperatures: the first at the start, then linear to the other two in the warm-up.
    warmup_teacher_temp: Annotated[float, fields.Range(1e-4, 100.0)] = 0.04
    teacher_temp: Annotated[float, fields.Range(1e-4, 100.0)] = 0.07
    patch_teacher_temp: Annotated[float, fields.Range(1e-4, 100.0)] = 0.07
    warmup_teacher_temp_steps: int | None = None
    warmup_teacher_temp_epochs: float | None = None
    warmup_teacher_temp_examples: int | None = None
    # Momentum of the moving average, half a cosine from the first to the second.
    momentum_teacher: fields.Probability = 0.992
    final_momentum_teacher: fields.Probability = 1.0

    # Gram anchoring, see `objectives.gram`; 0: off.
    gram_weight: Annotated[float, fields.Range(0.0, 1000.0)] = 0.0
    gram_size: int | None = None  # pixels of the frozen teacher's crops; None: twice img_size
    gram_from: str = ''  # weights of the frozen teacher, such as a run; '': this run's at its start
    # Every `gram_every` steps the moving average replaces the frozen teacher, `gram_updates` times.
    gram_every: Annotated[int, fields.Range(1, 10**9)] = 10_000
    gram_updates: Annotated[int, fields.Range(0, 10**6)] = 3

    def check(self, run):
        yield from super().check(run)
        batch, group = run.batch_size // run.accum_steps, self.group_size
        if not group or group < 1 or (batch > group and batch % group):
            yield (
                f'a batch of {batch} (batch_size / accum_steps) does not consist of groups of '
                f'method.group_size={group}: use {math.gcd(batch, max(group or 64, 1))}.'
            )
        for name in ('dino_out_dim', 'ibot_out_dim'):
            if getattr(self, name) is None:
                yield f'method.{name} is None: set it, such as {name}=65536.'
        if self.drop_path and self.drop_path_mode == 'subset' and not self.drop_path_uniform:
            yield (
                "method.drop_path_mode='subset' leaves out equally many images in every block: set "
                "method.drop_path_uniform=True, or drop_path_mode='image'."
            )
        low, high = self.mask_ratio_min_max
        if not 0 <= low <= high <= 1:
            pair = self.mask_ratio_min_max
            yield f'method.mask_ratio_min_max={pair} must be fractions (low, high).'
        if self.koleo_weight and batch < 2:
            yield (
                'method.koleo_weight needs at least 2 images among which it keeps apart: set it to '
                '0.'
            )
        clock_lib.duration('warmup_teacher_temp', self)
        if self.gram_from and not self.gram_weight:
            yield (
                f'method.gram_from={self.gram_from} is used by Gram anchoring alone, which is off: '
                f'set method.gram_weight=2, or leave gram_from out.'
            )
        size, patch = self.gram_pixels, self.patch_size
        if self.gram_weight and (size % patch or size < self.img_size):
            near = base.near_multiple(max(size, self.img_size), patch)
            yield (
                f'method.gram_size={size} must be a multiple of method.patch_size={patch} and at '
                f'least method.img_size={self.img_size}: use gram_size={near}.'
            )

    @property
    def gram_pixels(self):
        """Side in pixels of the crops that the frozen teacher of Gram anchoring sees."""
        return 2 * self.img_size if self.gram_size is None else self.gram_size

    @property
    def follows(self):
        """Whether the network is that of `init_from`: where no size is given."""
        return self.size is None and self.embed_dim is None

    def follow(self, opened, fixed):
        """Network and losses of a run of this method; of other weights the encoder."""
        if type(opened.method) is type(self):
            source, names = opened.method, {*fields.specs(type(self))} - {*OF_A_STAGE}
        else:
            source, names = opened.vit, self.encoder_fields
        found = {name: getattr(source, name) for name in names}
        return {**{k: v for k, v in found.items() if k not in fixed}, 'size': None}

    @property
    def min_images(self):
        return 2 if self.koleo_weight else 1

    def infer(self, facts, choose):
        self.infer_crop(facts, choose)
        n = facts.num_images
        count = 1024 if n < 20_000 else 8192 if n < 2_000_000 else 65_536
        for name in ('dino_out_dim', 'ibot_out_dim'):
            choose(name, count, f'prototypes for {n:,} images')
        self.infer_encoder(facts, choose)
        own = facts.per_device
        choose('group_size', divisor(own, 64), f'of the {own} images of a device')

    def warnings(self, batch_size, ways, accum_steps=1):
        """Terms that see micro-batches, and groups that the devices do not divide.

        A group is one row of tokens. Rows that cannot be divided are exchanged between devices in
        every block, which is many times slower.
        """
        terms = ['Sinkhorn-Knopp'] if self.centering == 'sinkhorn_knopp' else []
        terms += ['KoLeo'] if self.koleo_weight else []
        if terms:
            yield from base.micro_batches(' and '.join(terms), batch_size, accum_steps)
        groups, own = self.groups(batch_size), batch_size // ways
        if groups % ways:
            yield (
                f'slow: groups of {batch_size // groups} images, {groups} in a batch, do not '
                f'divide among {ways} devices, which then exchange all activations: use '
                f'method.group_size={divisor(own, batch_size // groups)}.'
            )

    @functools.cached_property
    def vit(self):
        return self.encoder(
            num_cls_tokens=1,
            num_register_tokens=self.num_register_tokens,
            pos_embed='learned',
            pos_resize=self.pos_resize,
            ffn=self.ffn,
            layer_scale=self.layer_scale,
            mask_token=True,
            drop_path_uniform=self.drop_path_uniform,
            init_scheme='dinov2',
        )

    @property
    def teacher_vit(self):
        """Encoder of the teacher; a larger one in `dinov2_distill`."""
        return self.vit

    @functools.cached_property
    def dino_head(self):
        """Head of class tokens."""
        return self._head(self.dino_out_dim, self.dino_bottleneck_dim)

    @functools.cached_property
    def ibot_head(self):
        """Head of patches; None if they share that of class tokens."""
        if not self.separate_heads:
            return None
        return self._head(self.ibot_out_dim, self.ibot_bottleneck_dim)

    def _head(self, out_dim, bottleneck_dim):
        return heads.DINOHead(
            out_dim,
            bottleneck_dim=bottleneck_dim,
            hidden_dim=self.head_hidden_dim,
            num_layers=self.head_num_layers,
            dtype=jnp.dtype(self.dtype),
        )

    @property
    def dino_weights(self):
        """Weights of the class-token terms of global and of local crops."""
        return self.dino_weight, self.dino_weight

    def pos_scale(self, rng):
        """Factor of the student's coordinates in a step, None for 1; see `models.rope`."""
        del rng

    @property
    def temp_warmup(self):
        """Steps of the warm-up of the teacher's temperatures."""
        return self.clock.steps('warmup_teacher_temp', self, default=0)

    def temps(self, step):
        """Teacher temperatures of class and patch tokens at a step."""
        start, warmup = self.warmup_teacher_temp, self.temp_warmup
        ends = (self.teacher_temp, self.patch_teacher_temp)
        return tuple(optim.linear(start, end, warmup)(step) for end in ends)

    def ema_rate(self, step):
        """1 - momentum of the teacher at a step, which is precise near momentum 1."""
        start, end = 1 - self.momentum_teacher, 1 - self.final_momentum_teacher
        return optim.cosine(start, end, self.clock.total)(step)

    def transform(self, size=None):
        return super().transform(size or self.img_size)

    @property
    def cut_size(self):
        return self.gram_pixels if self.gram_weight else self.img_size

    def init(self, rng):
        params = self.init_network(rng, self.vit)
        extra = {'teacher': params}
        if self.centering == 'centering':
            extra['dino_center'] = jnp.zeros((1, self.dino_head.out_dim))
            extra['ibot_center'] = jnp.zeros((1, self._patch_head()[1].out_dim))
        if self.gram_weight:
            extra['gram'] = params['backbone']
        return params, extra

    def prepare(self, extra, start):
        """The frozen teacher of Gram anchoring."""
        if not self.gram_weight:
            return {}, []
        every, end = self.gram_every, min(self.gram_every * self.gram_updates, self.clock.total)
        steps = ', '.join(f'{n:,}' for n in range(every, end + 1, every))
        line = f'gram: frozen teacher {self.gram_from or "of this start"}, '
        lines = [line + (f'replaced after steps {steps}' if steps else 'never replaced')]
        if self.gram_from:
            opened = start.open(self.gram_from)
            copy = opened.encoder_for(self.vit, extra['gram'], 'method.gram_from')
        else:
            copy = start.fetch(extra['teacher']['backbone'])
            if start.init_from is None:
                lines.append(
                    'gram: a copy of random weights anchors nothing; give init_from, a run to go '
                    'on from, or method.gram_from.'
                )
        return {'gram': copy}, lines

    def init_network(self, rng, vit):
        """Fresh parameters of a backbone and the heads."""
        rngs = jax.random.split(rng, 3)
        tokens = jnp.zeros((1, vit.embed_dim))
        params = {
            'backbone': vit_lib.init_params(vit, rngs[0]),
            'dino_head': self.dino_head.init(rngs[1], tokens)['params'],
        }
        if self.ibot_head is not None:
            params['ibot_head'] = self.ibot_head.init(rngs[2], tokens)['params']
        return params

    def _patch_head(self):
        """(key in params, module) of the head for patches."""
        if self.ibot_head is None:
            return 'dino_head', self.dino_head
        return 'ibot_head', self.ibot_head

    def groups(self, batch_size):
        """Number of groups in a batch."""
        return max(batch_size // self.group_size, 1)

    def loss(self, params, extra, batch, rng, step):
        size = batch['global'].shape[0]
        groups = self.groups(size)
        crop_rng, mask_rng, drop_rng = jax.random.split(rng, 3)
        global_crops, local_crops, plain_crops = self.augment(batch, crop_rng)
        # The id of a group is its first row, unique among micro-batches.
        group_ids = batch['row'].reshape(groups, -1)[:, 0]
        masks = None
        if self.ibot_weight:
            masks = self.masks(photometry.sample_keys(mask_rng, group_ids), 2 * size // groups)
            masks = masks.reshape(size, 2, -1)
        return self.objective(
            params,
            extra,
            global_crops,
            local_crops,
            masks,
            temps=self.temps(step),
            drop=self.stochastic_depth(drop_rng, batch['row'], group_ids),
            pos_scale=self.pos_scale(rng),
            plain_crops=plain_crops,
        )

    def augment(self, batch, rng):
        """uint8 crops -> normalised float crops.

        Returns:
          global (B, 2, H, W, 3); local (B, V, h, w, 3), or None; of Gram anchoring the global ones
          flipped alike, but larger and without photometry, (B, 2, S, S, 3), or None.
        """
        global_rng, local_rng = jax.random.split(rng)
        rows, blur, solarize = batch['row'], photometry.BLUR[self.blur], self.solarize
        out = self.distort(global_rng, rows, batch['global'], blur[:2], solarize[:2], self.img_size)
        local, plain, n = None, None, self.n_local_crops
        if n:
            crops = batch['local']
            local = self.distort(local_rng, rows, crops, blur[2:] * n, solarize[2:] * n)
        if self.gram_weight:
            plain = photometry.normalize(self.flipped(global_rng, rows, batch['global']))
        return out, local, plain

    def masks(self, keys, num_crops):
        """bool (groups, num_crops, N): masked patches of the global crops, a key per group."""
        return masking.crop_masks(
            keys,
            num_crops,
            self.grid,
            sampler=self.mask_sampler,
            probability=self.mask_probability,
            ratio=self.mask_ratio_min_max,
        )

    def upper_bound(self, num_crops):
        """Largest number of patches that `masks` hides in `num_crops` crops."""
        return masking.upper_bound(
            num_crops,
            self.grid,
            sampler=self.mask_sampler,
            probability=self.mask_probability,
            ratio=self.mask_ratio_min_max,
        )

    def stochastic_depth(self, rng, rows, group_ids):
        """Stochastic depth for `blocks.Block`; None if nothing is dropped."""
        vit, n = self.vit, self.n_local_crops
        if not vit.drop_path:
            return None
        if self.drop_path_mode == 'subset':
            samples = len(rows) // len(group_ids)
            counts = [2 * samples] + ([n * samples] if n else [])
            keys = photometry.sample_keys(rng, group_ids)
            return blocks_lib.drop_path_subsets(keys, vit.depth, vit.drop_path, counts)
        keys = photometry.sample_keys(rng, rows)
        return blocks_lib.drop_path_keep(
            keys, vit.depth, vit.drop_path, vit.drop_path_uniform, 2 + n
        )

    def objective(
        self,
        params,
        extra,
        global_crops,
        local_crops,
        masks,
        *,
        temps,
        drop=None,
        taken=None,
        pos_scale=None,
        plain_crops=None,
    ):
        """The loss on given crops, masks and temperatures.

        Args:
          global_crops: (B, 2, H, W, 3); local_crops: (B, V, h, w, 3) or None; both normalised.
          masks: bool (B, 2, N), or None where iBOT's weight is 0.
          temps: teacher temperatures of class and patch tokens.
          drop: stochastic depth of the student, see `stochastic_depth`.
          taken: `masking.Masked`, patches of iBOT's loss if they are not those of `masks`.
          pos_scale: of the student's positions, see the method of that name.
          plain_crops: (B, 2, S, S, 3), of Gram anchoring, see `augment`; None without it.

        Returns:
          loss, (rows for `with_centers`, metrics). The terms in the metrics include their weights
          and add up to the loss. (The official log shows half of the iBOT and KoLeo terms.)
        """
        size = global_crops.shape[0]
        groups = self.groups(size)
        if masks is not None:
            masked = masks.reshape(groups, -1, masks.shape[-1])  # (G, 2B/G, N)
            taken = masking.masked_indices(masked, self.upper_bound(masked.shape[1]))
        targets, rows_seen, stats = self.targets(extra, global_crops, taken, temps)

        # Rows of the student: groups if stochastic depth skips whole images, else samples.
        rows = groups if isinstance(drop, tuple) else size
        crops = [global_crops] if local_crops is None else [global_crops, local_crops]
        outs = self.vit.apply(
            {'params': params['backbone']},
            tuple(x.reshape(rows, -1, *x.shape[2:]) for x in crops),
            mask=None if masks is None else masks.reshape(rows, -1, masks.shape[-1]),
            drop=drop,
            pos_scale=pos_scale,
        )
        tokens = [out['cls_tokens'].reshape(size, -1, self.vit.embed_dim) for out in outs]
        patches = None
        if taken is not None:
            patches = _take(outs[0]['patch_tokens'], taken.indices)
        class_logits, patch_logits = self.project(params, jnp.concatenate(tokens, 1), patches)
        class_logits = jnp.moveaxis(class_logits, 1, 0)  # (2 + V, B, K)

        terms = {}
        pairs = losses.dino_loss(
            jnp.moveaxis(targets['class'], 1, 0),
            class_logits[:2],
            class_logits[2:] if local_crops is not None else None,
            self.student_temp,
        )
        for name, weight, term in zip(('global', 'local'), self.dino_weights, pairs, strict=True):
            terms[f'dino_{name}'] = weight * term
        if taken is not None:
            terms['ibot'] = self.ibot_weight * losses.ibot_loss(
                targets['patch'], patch_logits, taken.weights, 2 * size, self.student_temp
            )
        if self.koleo_weight:
            values = [losses.koleo(tokens[0][:, i]) for i in (0, 1)]
            terms['koleo'] = self.koleo_weight * sum(values)
        if plain_crops is not None:
            plain = plain_crops.reshape(-1, *plain_crops.shape[2:])
            anchor = gram.targets(self.vit, extra['gram'], plain, self.grid[0])
            patches = outs[0]['patch_tokens'].reshape(anchor.shape)
            terms['gram'] = self.gram_weight * gram.loss(patches, anchor)
        return sum(terms.values()), (rows_seen, {**terms, **stats})

    @jax.named_scope('teacher')
    def targets(self, extra, global_crops, taken, temps):
        """Teacher targets: dict of class (B, 2, K) and patch (G, M, K); rows for `with_centers`."""
        teacher, size = extra['teacher'], global_crops.shape[0]
        out = self.teacher_vit.apply(
            {'params': teacher['backbone']}, global_crops.reshape(-1, *global_crops.shape[2:])
        )
        tokens = out['cls_tokens'].reshape(size, 2, -1)
        patches = None if taken is None else _take(out['patch_tokens'], taken.indices)
        logits = dict(zip(('class', 'patch'), self.project(teacher, tokens, patches), strict=True))
        valid = {'class': None, 'patch': None if taken is None else taken.valid}
        targets, rows = {}, {}
        for (kind, x), temp in zip(logits.items(), temps, strict=True):
            if x is None:
                continue
            x = jax.lax.stop_gradient(x)
            if self.centering == 'centering':
                targets[kind] = losses.softmax_center(x, extra[CENTERS[kind]], temp)
                rows[kind] = losses.sum_rows(x, valid[kind])
            elif self.centering == 'sinkhorn_knopp':
                taking = None if valid[kind] is None else valid[kind].reshape(-1)
                flat = losses.sinkhorn_knopp(x.reshape(-1, x.shape[-1]), temp, taking)
                targets[kind] = flat.reshape(x.shape)
            else:  # 'none'
                targets[kind] = jax.nn.softmax(x / temp)
        stats = collapse.teacher_monitors(targets['class'])
        return targets, {'rows': rows} if rows else {}, stats

    def project(self, params, tokens, patches):
        """Logits of class tokens (B, n, D) and of masked patches (G, M, D) or None."""
        head = self.dino_head
        name, patch_head = self._patch_head()
        if patches is None:
            return head.apply({'params': params['dino_head']}, tokens), None
        if name == 'dino_head':  # one call, as the prototypes are the largest matrix of the step
            groups = patches.shape[0]
            grouped = tokens.reshape(groups, -1, tokens.shape[-1])
            both = jnp.concatenate([grouped, patches], axis=1)
            logits = head.apply({'params': params[name]}, both)
            count = grouped.shape[1]
            return logits[:, :count].reshape(*tokens.shape[:2], -1), logits[:, count:]
        class_logits = head.apply({'params': params['dino_head']}, tokens)
        return class_logits, patch_head.apply({'params': params[name]}, patches)

    def after_update(self, params, extra, step):
        extra = self.with_centers(extra)
        extra['teacher'] = self.average(extra['teacher'], params, step)
        if self.gram_weight:
            new, plan = extra['teacher']['backbone'], (self.gram_every, self.gram_updates)
            extra['gram'] = gram.replaced(extra['gram'], new, step + 1, *plan)
        return extra

    def with_centers(self, extra):
        """`extra` with centres moved by extra['rows'], {kind: `losses.sum_rows`}, now left out."""
        extra = dict(extra)
        for kind, rows in extra.pop('rows', {}).items():
            name = CENTERS[kind]
            extra[name] = losses.update_center(
                extra[name], losses.mean_of(rows), self.center_momentum
            )
        return extra

    def average(self, old, new, step):
        """Moving average `old` updated with `new`."""
        rate = self.ema_rate(step)
        return jax.tree.map(lambda o, n: o + rate * (n - o), old, new)

    def suspect(self, values, step):
        """Reports a collapse of the teacher, after the warm-up."""
        if step < max(self.clock.warmup, self.temp_warmup) or 'teacher_entropy' not in values:
            return None
        return collapse.suspect_teacher(values, self.dino_head.out_dim)

    def networks(self, params, extra):
        return self._networks(extra['teacher'])

    def _networks(self, trees):
        modules = {'encoder': self.vit, 'dino_head': self.dino_head, 'ibot_head': self.ibot_head}
        return {
            name: (module, trees[PARAMS.get(name, name)])
            for name, module in modules.items()
            if module is not None
        }

    def with_networks(self, params, extra, found):
        found = {PARAMS.get(name, name): tree for name, tree in found.items()}
        return {**params, **found}, {**extra, 'teacher': {**extra['teacher'], **found}}

    def flops(self, batch_size):
        vit = self.vit
        dense = dict(embed_dim=vit.embed_dim, depth=vit.depth, mlp_ratio=vit.mlp_ratio)

        def image(side):
            patches = (side // vit.patch_size) ** 2
            tokens = patches + vit.num_cls_tokens + vit.num_register_tokens
            embed = 2 * patches * 3 * vit.patch_size**2 * vit.embed_dim
            return vit_lib.flops_per_image(num_tokens=tokens, **dense), embed

        (blocks, embed), n = image(vit.img_size), self.n_local_crops
        local_blocks, local_embed = image(self.local_size) if n else (0, 0)
        kept = 1 - vit.drop_path if self.drop_path_mode == 'subset' else 1.0
        teacher = 2 * (blocks + embed)
        student = kept * (2 * blocks + n * local_blocks) + 2 * embed + n * local_embed
        per_class = heads.flops_per_token(self.dino_head, vit.embed_dim)
        teacher += 2 * per_class
        student += (2 + n) * per_class
        if self.ibot_weight:
            per_patch = heads.flops_per_token(self._patch_head()[1], vit.embed_dim)
            low, high = self.mask_ratio_min_max
            share = self.mask_probability * (low + high) / 2
            count = 2 * self.num_patches * share  # mean number, without padding
            teacher += count * per_patch
            student += count * per_patch
        if self.gram_weight:
            teacher += 2 * gram.flops(vit, self.gram_pixels, self.grid[0])
        return batch_size * (teacher + 3 * student)  # backward costs twice the forward


def _take(patch_tokens, indices):
    """Patches (B, n, N, D) or (B n, N, D) at `indices` (G, M) within their group: (G, M, D)."""
    flat = patch_tokens.reshape(indices.shape[0], -1, patch_tokens.shape[-1])
    return jnp.take_along_axis(flat, indices[..., None], axis=1)


def divisor(n, most):
    """The largest divisor of `n` that is at most `most`."""
    return next(k for k in range(min(n, most), 0, -1) if n % k == 0)


METHOD = DINOv2
