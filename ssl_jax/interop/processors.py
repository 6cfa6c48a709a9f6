# SPDX-License-Identifier: Apache-2.0
"""Transforms of images (see `data.transform`) from and to the files of transformers and timm."""

import math

from ssl_jax.augment import photometry
from ssl_jax.data import transform as transform_lib
from ssl_jax.run import errors

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)
TIMM_CROP = 0.875  # of a config without crop_pct
# Values of transformers' classes for the fields that a file leaves out.
COMMON = dict(
    do_resize=True,
    default_to_square=True,
    do_center_crop=False,
    crop_size=None,
    do_pad=False,
    do_rescale=True,
    rescale_factor=1 / 255,
    do_normalize=True,
    image_mean=HALF,
    image_std=HALF,
)
BILINEAR, BICUBIC = map(transform_lib.INTERPOLATIONS.index, ('bilinear', 'bicubic'))
VIT = dict(COMMON, size=224, resample=BILINEAR)
BEIT = dict(COMMON, size=224, resample=BICUBIC, crop_size=224)
DEIT = dict(COMMON, size=256, resample=BICUBIC, do_center_crop=True, crop_size=224)
BIT = dict(DEIT, size=224, default_to_square=False, image_mean=CLIP_MEAN, image_std=CLIP_STD)
DINOV3 = dict(VIT, image_mean=photometry.MEAN, image_std=photometry.STD)
CLASSES = {
    'ViTImageProcessor': VIT,
    'BeitImageProcessor': BEIT,
    'DeiTImageProcessor': DEIT,
    'BitImageProcessor': BIT,
    'CLIPImageProcessor': BIT,
    'DINOv3ViTImageProcessor': DINOV3,
}
# Classes of files that name none, by the model_type of config.json.
OF_MODEL = {
    'dinov2': 'BitImageProcessor',
    'dinov2_with_registers': 'BitImageProcessor',
    'dinov3_vit': 'DINOv3ViTImageProcessor',
    'pixio': 'BitImageProcessor',
    'beit': 'BeitImageProcessor',
    'deit': 'DeiTImageProcessor',
}
FILE = 'preprocessor_config.json'
# Measured with transformers 5.24 and torchvision 0.29 on photographs of 480x360.
FAST = (
    "Pixels are those of transformers' Pillow backend (`backend='pil'`). Its torchvision backend, "
    'the default where torchvision is installed, resizes tensors: pixels differ by up to 2 of 255 '
    '(0.004 on average), features by up to 3e-4 of the largest.'
)


def transform_of(
    size: int,
    processor: dict | None = None,
    hints: dict | None = None,
    mean: tuple = photometry.MEAN,
    std: tuple = photometry.STD,
) -> dict:
    """The transform that a folder states, or that of the official code.

    Args:
      size: pixels, where the folder names none.
      processor: preprocessor_config.json of transformers.
      hints: config.json; that of timm has `pretrained_cfg`, the only file that timm reads.
      mean, std: where the folder states none.

    Raises:
      UserError: a field asks for what is not done here.
    """
    if cfg := (hints or {}).get('pretrained_cfg'):
        return _of_timm(cfg, size, mean, std)
    if processor:
        return _of_transformers(processor, (hints or {}).get('model_type'))
    ours = {**transform_lib.of(size), 'library': 'torchvision'}
    return {**ours, 'mean': list(mean), 'std': list(std)}


def _of_timm(cfg, size, mean, std):
    """The transform of timm's `create_transform(**resolve_data_config(cfg))`."""
    where = 'config.json, pretrained_cfg'
    shape = cfg.get('input_size') or (3, size, size)
    if len(shape) != 3 or shape[1] != shape[2]:
        raise _refusal(where, 'input_size', list(shape), 'square images only')
    mode = cfg.get('crop_mode') or 'center'
    if mode not in ('center', 'squash', 'border'):
        raise _refusal(where, 'crop_mode', mode, "'center', 'squash' or 'border'")
    interpolation = cfg.get('interpolation') or 'bicubic'
    if interpolation not in transform_lib.INTERPOLATIONS:
        known = ', '.join(transform_lib.INTERPOLATIONS)
        raise _refusal(where, 'interpolation', interpolation, f'one of {known}')
    crop = float(cfg.get('crop_pct') or TIMM_CROP)
    if not 0 < crop <= 10:
        raise _refusal(where, 'crop_pct', crop, 'a share of the image, such as 0.9')
    return dict(
        size=int(shape[1]),
        mode=mode,
        crop=crop,
        interpolation=interpolation,
        library='timm',
        mean=_channels(where, 'mean', cfg.get('mean') or mean),
        std=_channels(where, 'std', cfg.get('std') or std),
    )


def _of_transformers(processor, model_type):
    """The transform of the class of transformers that the file names, in its Pillow backend."""
    kind = processor.get('image_processor_type') or processor.get('feature_extractor_type')
    kind = kind or OF_MODEL.get(model_type, 'ViTImageProcessor')
    name = kind.replace('FeatureExtractor', 'ImageProcessor').removesuffix('Fast')
    name = name.removesuffix('Pil')
    if name not in CLASSES:
        raise _refusal(FILE, 'image_processor_type', kind, f'one of {", ".join(CLASSES)}')
    f = {**CLASSES[name], **processor}
    f['resample'] = f['resample'] if f['do_resize'] else BICUBIC
    if f['do_pad']:
        raise _refusal(FILE, 'do_pad', f['do_pad'], 'false')
    if f['resample'] not in range(len(transform_lib.INTERPOLATIONS)):
        raise _refusal(FILE, 'resample', f['resample'], "one of Pillow's numbers 0 to 5")
    mode, to = 'none', None
    if f['do_resize']:
        given = f['size'] if isinstance(f['size'], dict) else _as_dict(f['size'], f)
        mode = 'center' if set(given) == {'shortest_edge'} else 'squash'
        to = _square('size', given, 'shortest_edge')
    if f['do_center_crop']:
        given = f['crop_size']
        size = _square('crop_size', given if isinstance(given, dict) else _as_dict(given))
    elif mode == 'squash':
        size = to
    else:
        raise _refusal(
            FILE, 'do_center_crop', False, 'true with a crop_size, as images here are squares'
        )
    mean = _channels(FILE, 'image_mean', f['image_mean'] if f['do_normalize'] else 0.0)
    std = _channels(FILE, 'image_std', f['image_std'] if f['do_normalize'] else 1.0)
    # (x factor - mean) / std as (x / 255 - mean') / std'.
    factor = f['rescale_factor'] if f['do_rescale'] else 1.0
    if not isinstance(factor, (int, float)) or not 0 < factor < math.inf:
        raise _refusal(FILE, 'rescale_factor', factor, 'a positive number')
    scale = 255.0 * factor
    if not math.isclose(scale, 1.0, rel_tol=1e-6):
        mean, std = ([x / scale for x in values] for values in (mean, std))
    return dict(
        size=size,
        mode=mode,
        crop=1.0 if to is None else size / to,
        interpolation=transform_lib.INTERPOLATIONS[f['resample']],
        library='transformers',
        mean=mean,
        std=std,
    )


def _as_dict(size, f=None):
    """A size of an older file, 224 or [224, 224], as transformers reads it."""
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return dict(height=size[0], width=size[1])
    if f is not None and not f['default_to_square']:
        return dict(shortest_edge=size)
    return dict(height=size, width=size)


def _square(name, given, *others):
    """Pixels of {'height': n, 'width': n}, or of the key `others`."""
    sides = [given[k] for k in given]
    known = [{'height', 'width'}, *({k} for k in others)]
    whole = all(isinstance(n, int) and n > 0 for n in sides)
    if set(given) not in known or len(set(sides)) != 1 or not whole:
        forms = ' or '.join(["{'height': N, 'width': N}", *(f"{{'{k}': N}}" for k in others)])
        raise _refusal(FILE, name, given, forms)
    return sides[0]


def _channels(where, name, value):
    """Three finite numbers; a single one stands for all."""
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    values = values * 3 if len(values) == 1 else values
    numbers = all(isinstance(x, (int, float)) and math.isfinite(x) for x in values)
    if len(values) != 3 or not numbers or (name.endswith('std') and not all(values)):
        raise _refusal(where, name, value, 'three numbers')
    return [float(x) for x in values]


def _refusal(where, name, value, known):
    return errors.UserError(
        f'{where}: {name}={value!r} is not done here: make it {known}, or take the file away for '
        f'the transform of our own evaluations.'
    )


def processor_of(transform: dict) -> dict:
    """preprocessor_config.json of a transform, for transformers' AutoImageProcessor.

    BitImageProcessor resizes and cuts out the centre in every release; DINOv2's folders name it
    too.

    Raises:
      UserError: transformers has no such transform.
    """
    size, mode = transform['size'], transform['mode']
    if mode == 'border':
        raise errors.UserError(
            "transformers has no processor for these images (crop_mode 'border' of timm); use "
            'to=timm.'
        )
    to = transform_lib.side(transform)
    square = dict(height=size, width=size)
    return dict(
        image_processor_type='BitImageProcessor',
        do_convert_rgb=True,
        do_resize=mode != 'none',
        size=dict(height=to, width=to) if mode == 'squash' else {'shortest_edge': to},
        resample=transform_lib.INTERPOLATIONS.index(transform['interpolation']),
        do_center_crop=mode != 'squash' or to != size,
        crop_size=square,
        do_rescale=True,
        rescale_factor=1 / 255,
        do_normalize=True,
        image_mean=list(transform['mean']),
        image_std=list(transform['std']),
    )


def timm_of(transform: dict) -> dict:
    """The fields of timm's `pretrained_cfg` that say what happens to images.

    Raises:
      UserError: timm has no such transform.
    """
    if transform['mode'] == 'none':
        raise errors.UserError(
            'timm has no transform without a resize (do_resize false of transformers); use to=hf.'
        )
    size, crop = transform['size'], transform['crop']
    to = transform_lib.side(transform)
    if math.floor(size / crop) != to:  # timm rounds down
        crop = size / (to + 0.5)
    return dict(
        input_size=[3, size, size],
        crop_pct=crop,
        crop_mode=transform['mode'],
        interpolation=transform['interpolation'],
        mean=list(transform['mean']),
        std=list(transform['std']),
    )


def differences(transform: dict, to: str) -> list[str]:
    """Sentences on what the library of an export does otherwise than we, for the model card."""
    lines = [
        "EXIF rotation is applied here; transformers' and timm's pipelines do it only if you call "
        'ImageOps.exif_transpose.'
    ]
    ours = transform['library'] == 'transformers'
    if transform['mode'] != 'squash' and ours == (to == 'timm'):
        lines.append(
            'Where an odd number of pixels is cut off, the crop may lie one pixel further there: '
            f'here it is rounded as in {transform["library"]}.'
        )
    if to != 'timm':
        lines.append(FAST)
    return lines
