# SPDX-License-Identifier: Apache-2.0
"""Choices where the fields of a config are left open. Use them as `config.infer`."""

import copy
import math
import os

from ssl_jax.config_rules import duration, validate

# FLOP/s of one CPU core in training small models (measured: 77e9 on two cores), and how long an
# inferred run should take there, in seconds.
CPU_FLOPS, CPU_SECONDS = 30e9, 240


def infer(config, num_images, image_hw, platform, device_count, cores=None):
    """Chooses every field left None for the images and devices at hand; keeps all that is set.

    On a CPU the run is made to last about four minutes, on accelerators to be worth its while: 400
    epochs, for few images up to 1600.

    Args:
      config: a config with `infer=True`, one of the recipes `images_*`.
      num_images: size of the training set.
      image_hw: (height, width) in pixels of a typical image.
      platform: 'cpu', 'gpu' or 'tpu'.
      device_count: devices of all processes.
      cores: CPU cores of this machine; asked of the system if None.

    Returns:
      (config, decisions): a valid config, locked as the given one, and a sentence per decision.
    """
    from ssl_jax import methods  # here, for it imports jax and flax

    config, decisions = copy.deepcopy(config), []
    cpu, m = platform == 'cpu', config.method
    cores = cores or os.cpu_count() or 1
    if num_images < 1:
        raise ValueError('The training set has no images: give a folder that holds some.')

    def choose(name, value, why):
        group, _, key = name.rpartition('.')
        parent = config[group] if group else config
        if parent[key] is None:
            parent[key] = value
            decisions.append(f'{name} = {value}: {why}.')
        return parent[key]

    with config.unlocked():
        config.infer = False
        if m.name == 'mae':
            _infer_images(choose, m, min(image_hw), cpu)
            _infer_encoder(choose, m, num_images, cpu)
            _infer_decoder(choose, m)
        elif 'classes' in m:
            _infer_views(choose, m, min(image_hw), cpu)
            _infer_encoder(choose, m, num_images, cpu)
        elif 'vocab' in m:
            _infer_words(choose, m, min(image_hw), num_images, cpu)
            _infer_encoder(choose, m, num_images, cpu)
        else:
            _infer_crops(choose, m, min(image_hw), num_images, cpu)
            _infer_encoder(choose, m, num_images, cpu)
        choose('dtype', 'float32' if cpu else 'bfloat16', f'the fast type on {platform}')

        limit = 32 if cpu else 128 * device_count
        batch = 2 ** math.floor(math.log2(max(min(limit, 4096, num_images / 4), 1)))
        ways = device_count * config.accum_steps
        # KoLeo and InfoNCE compare the images of a batch.
        compares = m.get('koleo_weight') or m.get('w_nce')
        batch = max(batch // ways, 2 if compares else 1) * ways
        choose('batch_size', batch, f'{num_images:,} images, {device_count} device(s)')
        if 'group_size' in m:
            own = max(config.batch_size // ways, 1)
            size = next(n for n in range(min(own, 64), 0, -1) if own % n == 0)
            choose('method.group_size', size, f'of the {own} images of a device')
        if config.optim.lr is None and 'classes' not in m:
            # Square root instead of MAE's linear rule, which would starve small batches.
            lr = float(f'{1.5e-3 * math.sqrt(config.batch_size / 1024):.2g}')
            choose('optim.lr', lr, '1.5e-3 at batch 1024, with the root of the batch')

        if duration('total', config)[0] is None:
            if cpu:
                flops = methods.from_config(config).flops(1)
                examples = CPU_SECONDS * cores * CPU_FLOPS / flops
                why = f'about {CPU_SECONDS // 60} minutes on {cores} cores'
            else:
                examples = min(max(16e6, 400 * num_images), 1e9)
                why = 'small sets need many passes, large ones 400'
            examples = min(examples, 1600 * num_images)
            if 'classes' in m and examples > 100 * num_images:
                examples, why = 100 * num_images, 'fine-tuning is short'
            epochs = float(f'{max(examples, config.batch_size) / num_images:.3g}')
            choose('total_epochs', epochs, why)
        total = _total_steps(config, num_images)
        if duration('warmup', config)[0] is None:
            choose('warmup_steps', total // 20, 'a twentieth of the run')
        if duration('every', config.eval)[0] is None:
            choose('eval.every_steps', max(total // 5, 1), 'five rounds of pictures and scores')
        validate(config)
    return config, decisions


def _infer_images(choose, m, short_side, cpu):
    """Crop, patch and mask size from the short side of the images."""
    size = m.img_size or min(short_side, 96 if cpu else 256 if m.mask_grid is None else 224)
    patch = _patch_size(choose, size)
    coarse = 1 if m.mask_grid == 1 else 4 if size >= 16 * patch else 2
    unit = patch * (m.mask_grid or coarse)
    size = max(size // unit, 2) * unit
    size = choose('method.img_size', size, f'short side of the images {short_side}')
    side = size // patch
    grid = coarse if side % coarse == 0 else 1
    choose('method.mask_grid', grid, f'squares on the grid of {side}x{side} patches')


def _patch_size(choose, size):
    """Patch size for crops of about so many pixels."""
    patch = 4 if size < 64 else 8 if size < 160 else 16
    return choose('method.patch_size', patch, f'for crops of about {size} pixels')


def _infer_views(choose, m, short_side, cpu):
    """Crops of a classifier; what a model has decided is kept."""
    size = m.img_size or min(short_side, 64 if cpu else 224)
    patch = _patch_size(choose, size)
    size = max(size // patch, 2) * patch
    size = choose('method.img_size', size, f'short side of the images {short_side}')
    small = short_side * 0.875 < size
    why = 'share of the short side that is tested'
    choose('method.crop_pct', 1.0 if small else 0.875, why)


def _infer_crops(choose, m, short_side, num_images, cpu):
    """Global and local crops of DINOv2, and its prototypes."""
    size = m.img_size or min(short_side, 64 if cpu else 224)
    patch = _patch_size(choose, size)
    size = max(size // patch, 2) * patch
    size = choose('method.img_size', size, f'short side of the images {short_side}')
    local = max(round(size * 3 / 7 / patch), 1) * patch
    choose('method.local_size', local, f'three sevenths of {size}, in whole patches')
    count = 1024 if num_images < 20_000 else 8192 if num_images < 2_000_000 else 65_536
    for head in ('dino', 'ibot'):
        choose(f'method.{head}_out_dim', count, f'prototypes for {num_images:,} images')


def _infer_words(choose, m, short_side, num_images, cpu):
    """Crop, patches and visual words of SplitMask and BEiT."""
    size = m.img_size or min(short_side, 64 if cpu else 224)
    patch = _patch_size(choose, size)
    size = max(size // patch, 2) * patch
    choose('method.img_size', size, f'short side of the images {short_side}')
    choose('method.token_patch_size', math.gcd(patch, 8), f'pixels, of patches of {patch}')
    count = 512 if num_images < 1000 else 2048 if num_images < 100_000 else 8192
    choose('method.vocab', count, f'visual words for {num_images:,} images')


def _infer_encoder(choose, m, num_images, cpu):
    """Encoder from the number of images."""
    if m.size is None and m.embed_dim is None:
        if cpu:
            why = 'small enough for a CPU'
            for key, value in (('embed_dim', 192), ('depth', 6), ('num_heads', 3)):
                choose(f'method.{key}', value, why)
        else:
            size = 'S' if num_images < 30_000 else 'B' if num_images < 2_000_000 else 'L'
            choose('method.size', size, f'for {num_images:,} images')
    fill_size(m)


def _infer_decoder(choose, m):
    """Decoder from the encoder and the masks."""
    small = m.embed_dim < 300
    width = 96 if small else 256 if m.embed_dim < 700 else 512
    # Large masked squares want a deep decoder (Pixio, table 13), single patches do not.
    depth = max(m.depth * (2 if m.mask_grid > 1 else 1) // 3, 2)
    choose('method.decoder_embed_dim', width, f'for an encoder of {m.embed_dim}')
    choose('method.decoder_depth', depth, f'for an encoder of {m.depth} blocks')
    heads = m.decoder_embed_dim // 32 if m.decoder_embed_dim % 32 == 0 else 4
    choose('method.decoder_num_heads', heads, '32 channels each')


def _total_steps(config, num_images):
    unit, value = duration('total', config)
    if unit == 'epochs':
        value *= num_images
    return max(round(value if unit == 'steps' else value / config.batch_size), 1)


def fill_size(m):
    """Sets embed_dim, depth and num_heads of `config.method` from its size where they are None."""
    if m.get('size') is None:
        return
    from ssl_jax.models import vit

    if m.size not in vit.SIZES:
        raise ValueError(f"method.size='{m.size}' is unknown: use one of {', '.join(vit.SIZES)}.")
    for key, value in zip(('embed_dim', 'depth', 'num_heads'), vit.SIZES[m.size]):
        if key in m and m[key] is None:
            m[key] = value
