# SPDX-License-Identifier: Apache-2.0
"""DINOv2, and as configurations of it iBOT and DINO: a student learns from its own average.

The teacher, a moving average of the student, sees two global crops; the student sees the same crops
with masked patches and several local crops.  DINO: class tokens of different crops agree.  iBOT:
the student's masked patches agree with the teacher's.  KoLeo: class tokens keep apart.

What differs from the official code:
- Crops are stored by sample, (B, crops, H, W, 3), so that nothing crosses devices; means do not
  care.  Global and local crops share the dense layers in one pass, see `models.vit`.
- What an official GPU does with its own batch (mask ratios drawn from a grid, the fixed share of
  images that stochastic depth skips, the buffer of masked patches) happens in groups of
  `group_size` samples.  Groups belong to the recipe, so results do not depend on the devices.
- Centres and Sinkhorn are over the global batch, the patch centre over all its masked patches (the
  official code averages the devices' means); KoLeo is over the global batch, or per group.
- Everything after the backbone is float32.

Reference: DINOv2, arXiv 2304.07193, `train/ssl_meta_arch.py`; iBOT, arXiv 2111.07832; DINO, arXiv
2104.14294.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ssl_jax import optim
from ssl_jax.augment import photometry as augment
from ssl_jax.data import view as view_lib
from ssl_jax.evals import monitors
from ssl_jax.models import blocks as blocks_lib
from ssl_jax.models import heads
from ssl_jax.models import vit as vit_lib
from ssl_jax.objectives import losses, masking


@dataclasses.dataclass(frozen=True)
class DINOv2:
    """The method; see `ssl_jax.methods` for the contract and `config_dinov2` for the fields."""

    vit: vit_lib.ViT
    dino_head: heads.DINOHead
    ibot_head: heads.DINOHead | None  # None: patches share the class tokens' head
    teacher_temp: Callable  # functions of the step
    patch_teacher_temp: Callable
    ema_rate: Callable  # 1 - momentum of the teacher: keeps its precision near momentum 1
    warmup_steps: int = 0  # before which no collapse is suspected
    teacher_vit: vit_lib.ViT | None = None  # None: the student's
    local_size: int = 96
    n_local_crops: int = 8
    group_size: int = 64
    subset_drop: bool = True
    dino_weight: float = 1.0
    ibot_weight: float = 1.0
    koleo_weight: float = 0.1
    koleo_per_group: bool = False
    centering: str = 'sinkhorn_knopp'
    center_momentum: float = 0.9
    student_temp: float = 0.1
    mask_sampler: str = 'dinov2'
    mask_probability: float = 0.5
    mask_ratio_min_max: tuple = (0.1, 0.5)
    global_crops_scale: tuple = (0.32, 1.0)
    local_crops_scale: tuple = (0.05, 0.32)
    crop_ratio: tuple = (3 / 4, 4 / 3)
    flip: float = 0.5
    photometry: tuple = ()  # ((name, value), ...) for augment.photometric, the same for all crops
    blur: tuple = (0.0, 0.9, 0.5)  # probabilities for global crop 1, global crop 2, local crops
    solarize: tuple = (0.0, 0.2, 0.0)

    @property
    def grid(self):
        side = self.vit.img_size // self.vit.patch_size
        return (side, side)

    def views(self):
        common = dict(ratio=self.crop_ratio, interpolation='bicubic')
        views = (
            view_lib.View(
                'global', self.vit.img_size, count=2, scale=self.global_crops_scale, **common
            ),
        )
        if self.n_local_crops:
            local = dict(count=self.n_local_crops, scale=self.local_crops_scale)
            views += (view_lib.View('local', self.local_size, **local, **common),)
        return views

    def init(self, rng):
        rngs = jax.random.split(rng, 3)
        tokens = jnp.zeros((1, self.vit.embed_dim))
        params = {
            'backbone': vit_lib.init_params(self.vit, rngs[0]),
            'dino_head': self.dino_head.init(rngs[1], tokens)['params'],
        }
        if self.ibot_head is not None:
            params['ibot_head'] = self.ibot_head.init(rngs[2], tokens)['params']
        extra = {'teacher': params}
        if self.centering == 'centering':
            extra['dino_center'] = jnp.zeros((1, self.dino_head.out_dim))
            extra['ibot_center'] = jnp.zeros((1, self._patch_head()[1].out_dim))
        return params, extra

    def _patch_head(self):
        """(name in params, module) of the head that patches go through."""
        if self.ibot_head is None:
            return 'dino_head', self.dino_head
        return 'ibot_head', self.ibot_head

    def groups(self, batch_size):
        """How many groups of samples a batch of this size has."""
        return max(batch_size // self.group_size, 1)

    def loss(self, params, extra, batch, rng, step):
        size = batch['global'].shape[0]
        groups = self.groups(size)
        crop_rng, mask_rng, drop_rng = jax.random.split(rng, 3)
        global_crops, local_crops = self.augment(batch, crop_rng)
        # A group is named by its first row, which no other micro-batch has.
        group_ids = batch['row'].reshape(groups, -1)[:, 0]
        masks = None
        if self.ibot_weight:
            masks = self.masks(augment.sample_keys(mask_rng, group_ids), 2 * size // groups)
            masks = masks.reshape(size, 2, -1)
        return self.objective(
            params,
            extra,
            global_crops,
            local_crops,
            masks,
            temps=(self.teacher_temp(step), self.patch_teacher_temp(step)),
            drop=self.stochastic_depth(drop_rng, batch['row'], group_ids),
        )

    def augment(self, batch, rng):
        """uint8 crops -> normalised float (B, 2, H, W, 3) and (B, V, h, w, 3) or None."""

        def view(name, rng, blur, solarize):
            crops = batch[name]
            size, count = crops.shape[:2]
            keys = jax.vmap(lambda k: jax.random.split(k, count))(
                augment.sample_keys(rng, batch['row'])
            ).reshape(-1)
            flip_keys, color_keys = jax.vmap(jax.random.split, out_axes=1)(keys)
            x = crops.reshape(-1, *crops.shape[2:])
            x = augment.random_flip(flip_keys, x, self.flip)
            x = augment.photometric(
                color_keys,
                x,
                blur_prob=jnp.tile(jnp.asarray(blur), size) if any(blur) else 0.0,
                solarize_prob=jnp.tile(jnp.asarray(solarize), size) if any(solarize) else 0.0,
                **dict(self.photometry),
            )
            return augment.normalize(x).reshape(crops.shape)

        global_rng, local_rng = jax.random.split(rng)
        out = view('global', global_rng, self.blur[:2], self.solarize[:2])
        if not self.n_local_crops:
            return out, None
        n = self.n_local_crops
        return out, view('local', local_rng, self.blur[2:] * n, self.solarize[2:] * n)

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
        """Most patches that `masks` hides among so many crops."""
        return masking.upper_bound(
            num_crops,
            self.grid,
            sampler=self.mask_sampler,
            probability=self.mask_probability,
            ratio=self.mask_ratio_min_max,
        )

    def stochastic_depth(self, rng, rows, group_ids):
        """What the blocks drop, see `layers.Block`; None where nothing is dropped."""
        vit, n = self.vit, self.n_local_crops
        if not vit.drop_path:
            return None
        if self.subset_drop:
            samples = len(rows) // len(group_ids)
            counts = [2 * samples] + ([n * samples] if n else [])
            keys = augment.sample_keys(rng, group_ids)
            return blocks_lib.drop_path_subsets(keys, vit.depth, vit.drop_path, counts)
        keys = augment.sample_keys(rng, rows)
        return blocks_lib.drop_path_keep(
            keys, vit.depth, vit.drop_path, vit.drop_path_uniform, 2 + n
        )

    def objective(
        self, params, extra, global_crops, local_crops, masks, *, temps, drop=None, taken=None
    ):
        """The loss on given crops, masks and temperatures.

        Args:
          global_crops: (B, 2, H, W, 3); local_crops: (B, V, h, w, 3) or None; both normalised.
          masks: bool (B, 2, N), or None where iBOT's weight is 0.
          temps: teacher temperatures of class and patch tokens.
          drop: stochastic depth of the student, see `stochastic_depth`.
          taken: the patches of iBOT's loss (masking.Masked), where they are not the masked ones.

        Returns:
          loss, (extra with new centres, metrics).  The terms in the metrics are what is optimised,
          weights included: they add up to the loss.  (The official log shows half of the iBOT and
          KoLeo terms.)
        """
        size = global_crops.shape[0]
        groups = self.groups(size)
        if masks is not None:
            masked = masks.reshape(groups, -1, masks.shape[-1])  # (G, 2B/G, N)
            taken = masking.masked_indices(masked, self.upper_bound(masked.shape[1]))
        targets, new_extra, stats = self.targets(extra, global_crops, taken, temps)

        # Rows of the student: groups where whole images are left out, samples otherwise.
        rows = groups if isinstance(drop, tuple) else size
        crops = [global_crops] if local_crops is None else [global_crops, local_crops]
        outs = self.vit.apply(
            {'params': params['backbone']},
            tuple(x.reshape(rows, -1, *x.shape[2:]) for x in crops),
            mask=None if masks is None else masks.reshape(rows, -1, masks.shape[-1]),
            drop=drop,
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
        terms['dino_global'], terms['dino_local'] = (self.dino_weight * term for term in pairs)
        if taken is not None:
            terms['ibot'] = self.ibot_weight * losses.ibot_loss(
                targets['patch'], patch_logits, taken.weights, 2 * size, self.student_temp
            )
        if self.koleo_weight:
            per = groups if self.koleo_per_group else 1
            values = [losses.koleo(tokens[0][:, i], groups=per) for i in (0, 1)]
            terms['koleo'] = self.koleo_weight * sum(values)
        return sum(terms.values()), (new_extra, {**terms, **stats})

    @jax.named_scope('teacher')
    def targets(self, extra, global_crops, taken, temps):
        """Teacher targets: dict of class (B, 2, K) and patch (G, M, K); extra with new centres."""
        teacher, size = extra['teacher'], global_crops.shape[0]
        out = (self.teacher_vit or self.vit).apply(
            {'params': teacher['backbone']}, global_crops.reshape(-1, *global_crops.shape[2:])
        )
        tokens = out['cls_tokens'].reshape(size, 2, -1)
        patches = None if taken is None else _take(out['patch_tokens'], taken.indices)
        logits = dict(zip(('class', 'patch'), self.project(teacher, tokens, patches)))
        valid = {'class': None, 'patch': None if taken is None else taken.valid}
        centers = {'class': 'dino_center', 'patch': 'ibot_center'}
        targets, new_extra = {}, dict(extra)
        for (kind, x), temp in zip(logits.items(), temps):
            if x is None:
                continue
            x = jax.lax.stop_gradient(x)
            if self.centering == 'centering':
                center = extra[centers[kind]]
                targets[kind] = losses.softmax_center(x, center, temp)
                new_extra[centers[kind]] = losses.update_center(
                    center, losses.mean_rows(x, valid[kind]), self.center_momentum
                )
            elif self.centering == 'sinkhorn_knopp':
                rows = None if valid[kind] is None else valid[kind].reshape(-1)
                flat = losses.sinkhorn_knopp(x.reshape(-1, x.shape[-1]), temp, rows)
                targets[kind] = flat.reshape(x.shape)
            else:  # nothing keeps such a teacher from collapsing: for showing just that
                targets[kind] = jax.nn.softmax(x / temp)
        stats = monitors.teacher_monitors(targets['class'])
        return targets, new_extra, stats

    def project(self, params, tokens, patches):
        """Logits of class tokens (B, n, D) and of masked patches (G, M, D) or None."""
        head = self.dino_head
        name, patch_head = self._patch_head()
        if patches is None:
            return head.apply({'params': params['dino_head']}, tokens), None
        if name == 'dino_head':  # one call: the prototypes are the largest matrix of the step
            groups = patches.shape[0]
            grouped = tokens.reshape(groups, -1, tokens.shape[-1])
            both = jnp.concatenate([grouped, patches], axis=1)
            logits = head.apply({'params': params[name]}, both)
            count = grouped.shape[1]
            return logits[:, :count].reshape(*tokens.shape[:2], -1), logits[:, count:]
        class_logits = head.apply({'params': params['dino_head']}, tokens)
        return class_logits, patch_head.apply({'params': params[name]}, patches)

    def after_update(self, params, extra, step):
        rate = self.ema_rate(step)
        teacher = jax.tree.map(lambda t, s: t + rate * (s - t), extra['teacher'], params)
        return {**extra, 'teacher': teacher}

    def suspect(self, values, step):
        """Names a collapse of the teacher; None if it is healthy or the warm-up is not over."""
        if step < self.warmup_steps or 'teacher_entropy' not in values:
            return None
        return monitors.suspect_teacher(values, self.dino_head.out_dim)

    def backbone(self, params, extra):
        del params
        return self.vit, extra['teacher']['backbone']

    def with_backbone(self, params, extra, encoder):
        teacher = {**extra['teacher'], 'backbone': encoder}
        return {**params, 'backbone': encoder}, {**extra, 'teacher': teacher}

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
        kept = 1 - vit.drop_path if self.subset_drop else 1.0
        teacher = 2 * (blocks + embed)
        student = kept * (2 * blocks + n * local_blocks) + 2 * embed + n * local_embed
        per_class = heads.flops_per_token(self.dino_head, vit.embed_dim)
        teacher += 2 * per_class
        student += (2 + n) * per_class
        if self.ibot_weight:
            per_patch = heads.flops_per_token(self._patch_head()[1], vit.embed_dim)
            low, high = self.mask_ratio_min_max
            share = self.mask_probability * (low + high) / 2
            count = 2 * self.grid[0] * self.grid[1] * share  # mean number, padding is not useful
            teacher += count * per_patch
            student += count * per_patch
        return batch_size * (teacher + 3 * student)  # backward costs twice the forward


def _take(patch_tokens, indices):
    """Patches (B, n, N, D) or (B n, N, D) in groups, those at `indices` (G, M): (G, M, D)."""
    flat = patch_tokens.reshape(indices.shape[0], -1, patch_tokens.shape[-1])
    return jnp.take_along_axis(flat, indices[..., None], axis=1)


def from_config(config, clock):
    """Builds the method from `config.method`, `config.dtype` and `config.remat`."""
    m = config.method
    dim, depth, num_heads = vit_lib.SIZES[m.size] if m.size else (None, None, None)
    dtype = jnp.dtype(config.dtype)
    vit = vit_lib.ViT(
        embed_dim=m.embed_dim or dim,
        depth=m.depth or depth,
        num_heads=m.num_heads or num_heads,
        patch_size=m.patch_size,
        img_size=m.img_size,
        mlp_ratio=m.mlp_ratio,
        num_cls_tokens=1,
        num_register_tokens=m.num_register_tokens,
        pos_embed='learned',
        pos_resize=m.pos_resize,
        ffn=m.ffn,
        layer_scale=m.layer_scale,
        mask_token=True,
        drop_path=m.drop_path,
        drop_path_uniform=m.drop_path_uniform,
        init_scheme='dinov2',
        dtype=dtype,
        remat=config.remat,
    )
    head = dict(hidden_dim=m.head_hidden_dim, num_layers=m.head_num_layers, dtype=dtype)
    total = clock('total')
    warmup = clock('warmup_teacher_temp', m, default=0)
    return DINOv2(
        vit=vit,
        dino_head=heads.DINOHead(m.dino_out_dim, bottleneck_dim=m.dino_bottleneck_dim, **head),
        ibot_head=heads.DINOHead(m.ibot_out_dim, bottleneck_dim=m.ibot_bottleneck_dim, **head)
        if m.separate_heads
        else None,
        teacher_temp=optim.linear(m.warmup_teacher_temp, m.teacher_temp, warmup),
        patch_teacher_temp=optim.linear(m.warmup_teacher_temp, m.patch_teacher_temp, warmup),
        ema_rate=optim.cosine(1 - m.momentum_teacher, 1 - m.final_momentum_teacher, total),
        warmup_steps=max(clock('warmup', default=0), warmup),
        local_size=m.local_size,
        n_local_crops=m.n_local_crops,
        group_size=m.group_size,
        subset_drop=m.drop_path_mode == 'subset',
        dino_weight=m.dino_weight,
        ibot_weight=m.ibot_weight,
        koleo_weight=m.koleo_weight,
        koleo_per_group=m.koleo_per_group,
        centering=m.centering,
        center_momentum=m.center_momentum,
        student_temp=m.student_temp,
        mask_sampler=m.mask_sampler,
        mask_probability=m.mask_probability,
        mask_ratio_min_max=tuple(m.mask_ratio_min_max),
        global_crops_scale=tuple(m.global_crops_scale),
        local_crops_scale=tuple(m.local_crops_scale),
        crop_ratio=tuple(m.crop_ratio),
        flip=m.flip,
        photometry=tuple(
            (name, m[name])
            for name in ('brightness', 'contrast', 'saturation', 'hue', 'jitter_prob', 'grey_prob')
        ),
        blur=augment.BLUR[m.blur],
        solarize=tuple(m.solarize),
    )
