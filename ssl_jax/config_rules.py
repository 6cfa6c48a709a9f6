# SPDX-License-Identifier: Apache-2.0
"""What fits together in a config: checks across fields. Use them as `config.validate`."""

import math

UNITS = ('steps', 'epochs', 'examples')
# Fields that take one of a few words.
CHOICES = {
    'dtype': ('float32', 'bfloat16'),
    'remat': ('none', 'dots', 'full'),
    'optim.lr_scaling': ('linear', 'sqrt'),
    'optim.schedule': ('mae', 'dinov2'),
    'optim.clip_by': ('all', 'network', 'tensor'),
    'method.pos_embed': ('sincos', 'learned', 'none'),
    'method.pos_resize': ('bicubic', 'offset', 'antialias'),
    'method.ffn': ('mlp', 'swiglu'),
    'method.teacher_ffn': ('mlp', 'swiglu'),
    'method.form': ('features', 'dino'),
    'method.cls_loss': ('cosine', 'l1', 'mse'),
    'method.patch_loss': ('cosine', 'l1', 'mse'),
    'method.fuse': ('avg', 'sum'),
    'method.drop_path_mode': ('subset', 'image'),
    'method.centering': ('sinkhorn_knopp', 'centering', 'none'),
    'method.mask_sampler': ('dinov2', 'ibot'),
    'method.blur': ('released', 'intended', 'none'),
    'method.tokenizer': ('random_patches', 'random_projection', 'kmeans', 'dvae', 'pixel'),
    'method.token_norm': ('imagenet', 'signed', 'none'),
    'method.token_centre': ('auto', 'none', 'patch', 'channel'),
    'method.split': ('block', 'uniform'),
    'method.decoder_pos': ('mask', 'all'),
    'method.nce_negatives': ('other', 'both'),
    'method.pool': ('patch', 'cls'),
}
# (field, lowest, highest), both allowed.
RANGES = (
    ('seed', 0, 2**31 - 1),
    ('method.mask_ratio', 0.0, 0.999),
    ('method.drop_path', 0.0, 0.999),
    ('method.flip', 0.0, 1.0),
    ('method.jitter_prob', 0.0, 1.0),
    ('method.grey_prob', 0.0, 1.0),
    ('method.mask_probability', 0.0, 1.0),
    ('method.n_local_crops', 0, 64),
    ('method.num_register_tokens', 0, 64),
    ('method.center_momentum', 0.0, 1.0),
    ('method.momentum_teacher', 0.0, 1.0),
    ('method.final_momentum_teacher', 0.0, 1.0),
    ('method.student_temp', 1e-4, 100.0),
    ('method.teacher_temp', 1e-4, 100.0),
    ('method.num_cls_tokens', 0, 64),
    ('method.blur_prob', 0.0, 1.0),
    ('method.solarize_prob', 0.0, 1.0),
    ('method.vocab', 2, 2**24),
    ('method.min_perplexity', 0.0, 2.0**24),
    ('method.mask_patches', 1, 195),
    ('method.split_ratio', 0.01, 0.99),
    ('method.temperature', 1e-4, 100.0),
    ('method.w_mim', 0.0, 1e6),
    ('method.w_nce', 0.0, 1e6),
    ('method.proj_dim', 0, 2**16),
    ('method.num_classes', 2, 2**24),
    ('method.ema_decay', 0.0, 1.0),
    ('method.crop_pct', 0.1, 1.0),
    ('method.repeats', 1, 64),
    ('method.randaugment_layers', 0, 16),
    ('method.randaugment_prob', 0.0, 1.0),
    ('method.randaugment_magnitude', 0.0, 10.0),
    ('method.randaugment_std', 0.0, 10.0),
    ('method.erase_prob', 0.0, 1.0),
    ('method.mixup', 0.0, 100.0),
    ('method.cutmix', 0.0, 100.0),
    ('method.mixup_prob', 0.0, 1.0),
    ('method.mixup_switch_prob', 0.0, 1.0),
    ('method.label_smoothing', 0.0, 0.999),
    ('data.num_threads', 1, 1024),
    ('data.num_workers', 0, 1024),
    ('data.bad_budget', 0.0, 1.0),
    ('optim.b1', 0.0, 0.99999),
    ('optim.b2', 0.0, 0.99999),
    ('optim.base_lr', 0.0, 100.0),
    ('optim.weight_decay', 0.0, 10.0),
    ('optim.weight_decay_end', 0.0, 10.0),
    ('optim.layer_decay', 0.01, 1.0),
    ('checkpoint.keep', 1, 10**6),
    ('log.every_steps', 1, 10**9),
    ('eval.batch_size', 1, 10**6),
    ('eval.temperature', 1e-4, 100.0),
    ('nonfinite.in_a_row', 0, 10**9),
    ('nonfinite.total', 0, 10**9),
)


def duration(prefix, config):
    """(unit, value) of the one field of `{prefix}_{steps,epochs,examples}` that is set.

    (None, None) if none is; ValueError if several are, or if the value is negative.
    """
    found = [(u, config.get(f'{prefix}_{u}')) for u in UNITS]
    found = [(u, v) for u, v in found if v is not None]
    if len(found) > 1:
        both = ' and '.join(f'{prefix}_{u}={v}' for u, v in found)
        raise ValueError(f'{both} contradict each other: keep one and set the other to None.')
    if found and found[0][1] < 0:
        raise ValueError(f'{prefix}_{found[0][0]}={found[0][1]} is negative: durations start at 0.')
    return found[0] if found else (None, None)


def validate(config):
    """Checks fields against each other; raises ValueError with one sentence for the first error.

    Method fields are checked where the method has them.
    """
    for message in _errors(config):
        raise ValueError(message)


def _errors(c):
    """Yields a sentence for each violated rule; later rules may rely on earlier ones."""
    m = c.method
    if c.batch_size is None or c.batch_size < 1 or c.accum_steps < 1:
        yield (
            f'batch_size={c.batch_size} and accum_steps={c.accum_steps} must be positive integers: '
            'set batch_size=256.'
        )
    if c.batch_size % c.accum_steps:
        yield (
            f'batch_size={c.batch_size} is not divisible by accum_steps={c.accum_steps}: '
            f'use batch_size={_near_multiple(c.batch_size, c.accum_steps)}.'
        )
    for name, words in CHOICES.items():
        group, _, key = name.rpartition('.')
        value = (c[group] if group else c).get(key, words[0])
        if value not in words:
            yield f"{name}='{value}' is unknown: use one of {', '.join(words)}."
    if c.init_from and c.resume_from:
        yield (
            'init_from (weights only) and resume_from (weights, moments and step) are both set: '
            'set one of them to None.'
        )
    if any(size != -1 and size < 1 for size in c.mesh.values()) or (
        c.mesh.tensor == -1 and -1 in (c.mesh.data, c.mesh.fsdp)
    ):
        yield (
            f'mesh={c.mesh.to_dict()} must have positive sizes, and -1 (the rest) for one axis or '
            f'for data and fsdp.'
        )
    for prefix, sub in (('total', c), ('warmup', c), ('every', c.eval), ('warm_freeze', c.optim)):
        duration(prefix, sub)
    if duration('total', c) == (None, None):
        yield 'None of total_steps, total_epochs, total_examples is set: set total_epochs=100.'
    for unit in UNITS:
        total, warmup = c[f'total_{unit}'], c[f'warmup_{unit}']
        if total and warmup and warmup >= total:
            yield f'warmup_{unit}={warmup} does not end before total_{unit}={total}: lower it.'
    tuples = ('eval.knn_k', 'optim.no_decay', 'optim.freeze', 'optim.lr_mult', 'optim.warm_freeze')
    for name in tuples:
        group, key = name.split('.')
        if not isinstance(c[group][key], tuple):
            yield f'{name}={c[group][key]!r} must be a tuple, with a comma: ({c[group][key]!r},).'
    unit, length = duration('warm_freeze', c.optim)
    if c.optim.warm_freeze and not length:
        yield (
            f'optim.warm_freeze={c.optim.warm_freeze} has no length: set one of '
            f'optim.warm_freeze_{{steps,epochs,examples}}.'
        )
    if length and not c.optim.warm_freeze:
        yield (
            f'optim.warm_freeze_{unit}={length} freezes nothing: '
            "set optim.warm_freeze=('^encoder',)."
        )
    if length and c[f'total_{unit}'] and length >= c[f'total_{unit}']:
        yield (
            f'optim.warm_freeze_{unit}={length} does not end before total_{unit}='
            f'{c[f"total_{unit}"]}: lower it, or freeze for good with optim.freeze.'
        )
    for name, low, high in RANGES:
        group, _, key = name.rpartition('.')
        parent = c[group] if group else c
        value = parent.get(key)
        if value is not None and not low <= value <= high:
            yield f'{name}={value} is out of range: use a value from {low} to {high}.'
    for key in ('crop_scale', 'crop_ratio', 'global_crops_scale', 'local_crops_scale'):
        if key in m and not (len(m[key]) == 2 and 0 < m[key][0] <= m[key][1]):
            yield f'method.{key}={m[key]} must be (low, high) with 0 < low <= high.'
        if key.endswith('scale') and m.get(key) and m[key][1] > 1:
            yield f'method.{key}={m[key]} are fractions of the area: at most (.., 1.0).'
    yield from _shape_errors(m)
    if 'group_size' in m:
        yield from _dinov2_errors(c)
    if 'split_ratio' in m:
        yield from _splitmask_errors(c)
    if 'classes' in m:
        yield from _classifier_errors(m)


def _dinov2_errors(c):
    """Rules of crops, groups and durations of DINOv2."""
    m, batch, group = c.method, c.batch_size // c.accum_steps, c.method.group_size
    if m.n_local_crops and m.local_size % m.patch_size:
        yield (
            f'method.local_size={m.local_size} is not a multiple of method.patch_size='
            f'{m.patch_size}: use local_size={_near_multiple(m.local_size, m.patch_size)}.'
        )
    if not group or group < 1 or (batch > group and batch % group):
        yield (
            f'a batch of {batch} (batch_size / accum_steps) does not consist of groups of '
            f'method.group_size={group}: use {math.gcd(batch, max(group or 64, 1))}.'
        )
    if m.drop_path and m.drop_path_mode == 'subset' and not m.drop_path_uniform:
        yield (
            "method.drop_path_mode='subset' leaves out equally many images in every block: set "
            "method.drop_path_uniform=True, or drop_path_mode='image'."
        )
    low, high = m.mask_ratio_min_max
    if not 0 <= low <= high <= 1:
        yield f'method.mask_ratio_min_max={m.mask_ratio_min_max} must be fractions (low, high).'
    if m.koleo_weight and (batch if not m.koleo_per_group else min(batch, group or 1)) < 2:
        yield 'method.koleo_weight needs at least 2 images among which it keeps apart: set it to 0.'
    if m.get('form') == 'dino' and m.drop_path:
        yield 'Distillation drops no blocks of the student: set method.drop_path=0.'
    duration('warmup_teacher_temp', m)


def _splitmask_errors(c):
    """Rules of the split and of InfoNCE's negatives."""
    m, batch = c.method, c.batch_size // c.accum_steps
    if not m.split_complement and (m.split == 'block' or m.split_ratio < 0.5):
        yield (
            f"method.split_complement=False needs method.split='uniform' and split_ratio of at "
            f"least 0.5, not '{m.split}' and {m.split_ratio}: set split_complement=True."
        )
    if not m.w_mim and not m.w_nce:
        yield 'method.w_mim and method.w_nce are both 0, nothing is learned: set w_mim=1.'
    group = m.nce_group_size or batch
    if m.w_nce and (group < 2 or batch % group):
        yield (
            f'a batch of {batch} (batch_size / accum_steps) does not consist of groups of '
            f'method.nce_group_size={m.nce_group_size} or at least 2 images: use nce_group_size=0.'
        )
    heads = m.decoder_num_heads
    if heads and m.embed_dim and m.embed_dim % heads:
        yield (
            f'method.embed_dim={m.embed_dim}, also of the decoder, is not divisible by '
            f'method.decoder_num_heads={heads}: set decoder_num_heads=None.'
        )


def _classifier_errors(m):
    """Rules of tokens and of what is read from them."""
    if m.pool == 'cls' and not m.num_cls_tokens:
        yield "method.pool='cls' needs a class token, this encoder has none: set pool='patch'."
    if m.rel_pos not in (None, 'layer', 'shared'):
        yield f"method.rel_pos={m.rel_pos!r} is unknown: use 'layer', 'shared' or None."
    if m.rel_pos and (m.num_cls_tokens != 1 or m.num_register_tokens):
        yield (
            'method.rel_pos knows one class token and no registers: set method.num_cls_tokens=1 '
            'and num_register_tokens=0.'
        )


def _shape_errors(m):
    """Rules of the token grid and of the widths."""
    for key in ('size', 'embed_dim', 'depth', 'num_heads', 'patch_size', 'img_size'):
        if key in m and key != 'size' and m[key] is None:
            hint = "method.size='S'" if key in ('embed_dim', 'depth', 'num_heads') else 'a number'
            yield f'method.{key} is None: set it, or use {hint}.'
    if 'patch_size' in m and 'img_size' in m:
        if m.img_size % m.patch_size:
            yield (
                f'method.img_size={m.img_size} is not a multiple of method.patch_size='
                f'{m.patch_size}: use img_size={_near_multiple(m.img_size, m.patch_size)}.'
            )
        side = m.img_size // m.patch_size
        grid = m.get('mask_grid') or 1
        if side % grid:
            divisors = [g for g in range(1, side + 1) if side % g == 0]
            yield (
                f'method.mask_grid={grid} does not divide the {side}x{side} token grid of '
                f'img_size={m.img_size} and patch_size={m.patch_size}: use one of {divisors}.'
            )
        if 'mask_ratio' in m and int((side // grid) ** 2 * (1 - m.mask_ratio)) < 1:
            yield (
                f'method.mask_ratio={m.mask_ratio} leaves none of the {(side // grid) ** 2} mask '
                'cells visible: lower mask_ratio, mask_grid or patch_size.'
            )
    if m.get('pos_embed') == 'none' and not m.get('rel_pos'):
        yield "method.pos_embed='none' tells no positions: use 'learned' or 'sincos'."
    for prefix in ('', 'decoder_'):
        dim, heads = m.get(f'{prefix}embed_dim'), m.get(f'{prefix}num_heads')
        if dim and heads and dim % heads:
            yield (
                f'method.{prefix}embed_dim={dim} is not divisible by method.{prefix}num_heads='
                f'{heads}: use {prefix}embed_dim={_near_multiple(dim, heads)}.'
            )
        if dim and m.get('pos_embed') == 'sincos' and dim % 4:
            yield (
                f'method.{prefix}embed_dim={dim} is not divisible by 4, which '
                f"pos_embed='sincos' needs: use {_near_multiple(dim, 4)} or pos_embed='learned'."
            )


def _near_multiple(value, of):
    return max(round(value / of), 1) * of
