# SPDX-License-Identifier: Apache-2.0
"""Preprocessing of imported folders: the pixels of transformers and timm, or a sentence."""

import functools
import io
import json

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest

import photos as photos_lib
import tiny
from ssl_jax.augment import photometry
from ssl_jax.data import host
from ssl_jax.data import transform as transform_lib
from ssl_jax.interop import export, processors
from ssl_jax.run import errors, weights

SQUARE = dict(height=48, width=48)
HALF, OTHER = [0.5] * 3, dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
# Files of transformers, as its hub has them, at small sizes.
PROCESSORS = {
    'vit': dict(image_processor_type='ViTImageProcessor'),  # values of the class: 224, squashed
    'mae': dict(image_processor_type='ViTImageProcessor', size=SQUARE, resample=3, **OTHER),
    'vit_old': dict(feature_extractor_type='ViTFeatureExtractor', size=48, resample=2),
    'dinov2': dict(
        image_processor_type='BitImageProcessor', size={'shortest_edge': 55}, crop_size=SQUARE
    )
    | OTHER,
    'pixio': dict(image_processor_type='BitImageProcessorFast', size={'shortest_edge': 48})
    | dict(crop_size=48, resample=3, **OTHER),
    'beit': dict(image_processor_type='BeitImageProcessor', size=dict(height=54, width=54))
    | dict(do_center_crop=True, crop_size=SQUARE, image_mean=HALF, image_std=HALF),
    'deit': dict(image_processor_type='DeiTImageProcessor', size=55, crop_size=48, resample=1),
    'padded': dict(image_processor_type='BitImageProcessor', size={'shortest_edge': 41})
    | dict(crop_size=SQUARE),
    'not_resized': dict(image_processor_type='BitImageProcessor', do_resize=False)
    | dict(crop_size=SQUARE),
    'not_normalised': dict(image_processor_type='ViTImageProcessor', size=48, do_normalize=False),
    'not_rescaled': dict(image_processor_type='ViTImageProcessor', size=48, do_rescale=False)
    | dict(image_mean=127.5, image_std=[60.0, 70.0, 80.0]),
    'rescaled': dict(image_processor_type='ViTImageProcessor', size=48, rescale_factor=1 / 127.5)
    | dict(image_mean=[1.0] * 3, image_std=[1.0] * 3),
    'null': dict(
        image_processor_type='ViTImageProcessor', size=48, do_center_crop=None, do_pad=None
    ),
    'box': dict(image_processor_type='ViTImageProcessor', size=48, resample=4),
}
TIMM = {
    f'{mode}_{pct:g}_{kind}': dict(
        input_size=[3, 224 if pct == 0.9 else 48, 224 if pct == 0.9 else 48],
        crop_mode=mode,
        crop_pct=pct,
        interpolation=kind,
        mean=[0.485, 0.456, 0.406],
        std=[0.229, 0.224, 0.225],
    )
    for mode in ('squash', 'center', 'border')
    for pct, kind in ((0.95, 'bicubic'), (0.9, 'bilinear'), (1.0, 'bicubic'), (0.875, 'lanczos'))
}


@functools.cache
def files():
    return photos_lib.photos()


def ours(data, transform):
    image = transform_lib.cut(host.decode(data), transform)
    return np.asarray(photometry.normalize(image, transform['mean'], transform['std']))


def processor_class(name):
    """The class of transformers in its Pillow backend, which needs no torchvision."""
    transformers = pytest.importorskip('transformers')
    name = name.replace('FeatureExtractor', 'ImageProcessor').removesuffix('Fast')
    found = getattr(transformers, f'{name}Pil', None)
    if found is None:
        pytest.skip(f'transformers {transformers.__version__} has no {name}Pil')
    return found


@pytest.mark.parametrize('name', PROCESSORS)
def test_pixels_are_those_of_transformers(name):
    fields = PROCESSORS[name]
    kind = fields.get('image_processor_type') or fields['feature_extractor_type']
    processor = processor_class(kind).from_dict(dict(fields))
    transform = processors.transform_of(16, fields)
    for photo, data in files().items():
        image = PIL.Image.open(io.BytesIO(data))
        want = processor(image, return_tensors='np')['pixel_values'][0].transpose(1, 2, 0)
        got = ours(data, transform)
        assert got.shape == want.shape == (transform['size'], transform['size'], 3)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6 * np.ptp(want), err_msg=photo)


@pytest.mark.parametrize('name', TIMM)
def test_pixels_are_those_of_timm(name):
    cfg = TIMM[name]
    transform = processors.transform_of(16, None, {'pretrained_cfg': cfg})
    assert transform['mean'] == cfg['mean'] and transform['std'] == cfg['std']
    for photo, data in files().items():
        want = np.asarray(photos_lib.timm_eval(PIL.Image.open(io.BytesIO(data)), cfg))
        got = transform_lib.cut(host.decode(data), transform)
        np.testing.assert_array_equal(got, want, err_msg=photo)


def test_timm_rounds_the_resized_side_down_and_has_its_own_defaults():
    got = processors.transform_of(224, None, {'pretrained_cfg': dict(crop_pct=0.9)})
    assert transform_lib.side(got) == 248
    bare = processors.transform_of(224, None, {'pretrained_cfg': dict(tag='x')})
    assert (transform_lib.side(bare), bare['mode']) == (256, 'center')
    assert bare['interpolation'] == 'bicubic'


def test_files_without_a_class_take_that_of_their_model():
    models = {'vit_mae': ('squash', 224), 'pixio': ('center', 224), 'deit': ('squash', 256)}
    for model, (mode, side) in models.items():
        got = processors.transform_of(16, dict(do_rescale=True), dict(model_type=model))
        assert (got['mode'], transform_lib.side(got), got['size']) == (mode, side, 224)


@pytest.mark.parametrize(
    'fields,says',
    [
        (dict(size={'shortest_edge': 48}), 'do_center_crop=False .*true with a crop_size'),
        (dict(do_resize=False), 'do_center_crop=False'),
        (dict(size={'height': 48, 'width': 64}), "size={'height': 48, 'width': 64}"),
        (dict(size={'longest_edge': 48}), 'longest_edge'),
        (dict(size={'shortest_edge': 48, 'longest_edge': 64}), 'longest_edge'),
        (dict(do_center_crop=True, crop_size=[48, 32]), 'crop_size='),
        (dict(do_center_crop=True), 'crop_size='),
        (dict(do_pad=True), 'do_pad=True is not done here: make it false'),
        (dict(resample=7), 'resample=7'),
        (dict(resample=None), 'resample=None'),
        (dict(rescale_factor=0), 'rescale_factor=0'),
        (dict(image_mean=[0.5, 0.5]), r'image_mean=\[0.5, 0.5\] .*three numbers'),
        (dict(image_std=[0.5, 0, 0.5]), 'image_std='),
        (dict(image_processor_type='ConvNextImageProcessor'), "'ConvNextImage.*one of ViTImage"),
        (dict(image_mean=None), 'image_mean=None'),
        (dict(rescale_factor=None), 'rescale_factor=None'),
        (dict(size='large'), "size="),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_not_done_here_is_one_sentence_with_the_field(fields, says):
    with pytest.raises(errors.UserError, match=f'preprocessor_config.json: .*{says}'):
        processors.transform_of(16, dict(image_processor_type='ViTImageProcessor') | fields)


@pytest.mark.parametrize(
    'cfg,says',
    [
        (dict(crop_mode='middle'), "crop_mode='middle'"),
        (dict(input_size=[3, 48, 64]), r'input_size=\[3, 48, 64\]'),
        (dict(interpolation='random'), "interpolation='random'"),
        (dict(crop_pct=-1), 'crop_pct=-1'),
        (dict(mean=[0.5] * 4), 'mean='),
    ],
    ids=str,
)
def test_what_timm_alone_does_is_one_sentence_with_the_field(cfg, says):
    with pytest.raises(errors.UserError, match=f'config.json, pretrained_cfg: {says}'):
        processors.transform_of(16, None, {'pretrained_cfg': cfg})


def test_a_refusal_names_the_folder(tmp_path):
    tiny.save(tiny.config(), tmp_path / 'run')
    folder = export.export(weights.open_run(tmp_path / 'run'), 'hf', tmp_path / 'hf')
    path = folder / processors.FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(do_pad=True)))
    with pytest.raises(errors.UserError, match=f'{folder}: preprocessor_config.json: do_pad=True'):
        weights.open_weights(folder)


# And back


@pytest.mark.parametrize('name', PROCESSORS)
def test_an_exported_processor_gives_the_same_pixels(name):
    transform = processors.transform_of(16, PROCESSORS[name])
    fields = processors.processor_of(transform)
    again = processors.transform_of(16, fields)
    for key in ('mean', 'std'):
        np.testing.assert_allclose(again.pop(key), transform[key])
    assert again == {k: v for k, v in transform.items() if k in again}
    assert json.loads(json.dumps(transform)) == transform
    processor = processor_class('BitImageProcessor').from_dict(fields)
    data = files()['odd.jpg']
    want = processor(PIL.Image.open(io.BytesIO(data)), return_tensors='np')['pixel_values'][0]
    np.testing.assert_allclose(ours(data, transform), want.transpose(1, 2, 0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', [*PROCESSORS, *TIMM])
def test_an_exported_config_of_timm_resizes_to_the_same_sides(name):
    given = ({}, {'pretrained_cfg': TIMM[name]}) if name in TIMM else (PROCESSORS[name], {})
    transform = processors.transform_of(16, *given)
    if transform['mode'] == 'none':
        with pytest.raises(errors.UserError, match='use to=hf'):
            processors.timm_of(transform)
        return
    again = processors.transform_of(16, None, {'pretrained_cfg': processors.timm_of(transform)})
    for size in ((360, 480), (333, 251)):
        assert transform_lib.resized(*size, again) == transform_lib.resized(*size, transform)
    assert {**again, 'library': 0, 'crop': 0} == {**transform, 'library': 0, 'crop': 0}


def test_a_border_has_no_processor_in_transformers(tmp_path):
    tiny.save(tiny.config(), tmp_path / 'run')
    opened = weights.open_run(tmp_path / 'run')
    folder = export.export(opened, 'timm', tmp_path / 'timm')
    config = json.loads((folder / 'config.json').read_text())
    config['pretrained_cfg'].update(crop_mode='border', crop_pct=0.9)
    (folder / 'config.json').write_text(json.dumps(config))
    weights.import_weights(folder, tmp_path / 'w', log=None)
    opened = weights.open_run(tmp_path / 'w')
    with pytest.raises(errors.UserError, match="'border' of timm.*use to=timm"):
        export.export(opened, 'hf', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()
    again = export.export(opened, 'timm', tmp_path / 'out')
    assert weights.open_weights(again).transform == opened.transform
    assert not (again / processors.FILE).exists()


def test_the_card_says_what_the_libraries_do_otherwise(tmp_path):
    tiny.save(tiny.config(), tmp_path / 'run')
    opened = weights.open_run(tmp_path / 'run')
    cards = {
        to: (export.export(opened, to, tmp_path / to) / 'README.md').read_text()
        for to in export.LAYOUTS
    }
    assert all('ImageOps.exif_transpose' in card for card in cards.values())
    assert ('torchvision backend' in cards['hf'], 'torchvision backend' in cards['timm']) == (1, 0)
    assert ('one pixel further' in cards['hf'], 'one pixel further' in cards['timm']) == (0, 1)
    assert '32 px (bicubic)' in cards['hf']


def test_rotation_by_exif_is_theirs_after_exif_transpose():
    image = PIL.Image.open(io.BytesIO(files()['odd.jpg']))
    exif, file = PIL.Image.Exif(), io.BytesIO()
    exif[0x0112] = 6
    image.save(file, 'JPEG', exif=exif)
    upright = PIL.ImageOps.exif_transpose(PIL.Image.open(file))
    np.testing.assert_array_equal(host.decode(file.getvalue()), np.asarray(upright))
