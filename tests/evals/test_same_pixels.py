# SPDX-License-Identifier: Apache-2.0
"""`ssl_jax features` of a folder of transformers: its own processor and model give the same."""

import io
import json

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest

import photos as photos_lib
from ssl_jax import cli
from ssl_jax.evals import feature_file

torch = pytest.importorskip('torch')
transformers = pytest.importorskip('transformers')

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2)
SIZES |= dict(image_size=48, patch_size=8)
MLP = dict(SIZES, intermediate_size=64)
IMAGENET = dict(image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225])
CROP = dict(size={'shortest_edge': 55}, crop_size=dict(height=48, width=48))
# Family: (class, arguments, config, processor as published, at a small size).
FAMILIES = {
    'mae': (
        'ViTMAEForPreTraining',
        {},
        dict(MLP, decoder_hidden_size=16, decoder_num_hidden_layers=1, mask_ratio=0.0)
        | dict(decoder_num_attention_heads=2, decoder_intermediate_size=32),
        dict(image_processor_type='ViTImageProcessor', size=48, resample=3, **IMAGENET),
    ),
    'vit': (
        'ViTModel',
        dict(add_pooling_layer=False),
        dict(MLP, image_size=224, patch_size=32),
        dict(image_processor_type='ViTImageProcessor'),
    ),
    'pixio': (
        'PixioModel',
        {},
        dict(SIZES, n_cls_tokens=3),
        dict(image_processor_type='BitImageProcessor', **CROP, **IMAGENET),
    ),
    'dinov2': (
        'Dinov2Model',
        {},
        dict(SIZES),
        dict(image_processor_type='BitImageProcessor', **CROP, **IMAGENET),
    ),
    'dinov2_reg': (
        'Dinov2WithRegistersModel',
        {},
        dict(SIZES, num_register_tokens=2),
        dict(image_processor_type='BitImageProcessor', **CROP),
    ),
    'beit': (
        'BeitModel',
        dict(add_pooling_layer=False),
        dict(MLP, use_mean_pooling=False, use_shared_relative_position_bias=True),
        dict(image_processor_type='BeitImageProcessor', size=54, do_center_crop=True, crop_size=48),
    ),
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """The photographs."""
    folder = tmp_path_factory.mktemp('photos')
    for name, data in photos_lib.photos().items():
        (folder / name).write_bytes(data)
    return folder


def publish(family, out):
    """Writes a random model as transformers does, with its processor; returns the model."""
    name, options, config, processor = FAMILIES[family]
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**config), **options).eval()
    model.save_pretrained(out)
    (out / 'preprocessor_config.json').write_text(json.dumps(processor))
    return model


@torch.no_grad()
def theirs(model, processor, files):
    """(mean class token, mean patch token) by the library's processor and model."""
    vit = getattr(model, 'vit', model)
    count = 1 if vit.config.model_type != 'pixio' else vit.config.n_cls_tokens
    first = count + getattr(vit.config, 'num_register_tokens', 0)
    images = [PIL.Image.open(io.BytesIO(data)).convert('RGB') for data in files]
    pixels = processor(images, return_tensors='pt')['pixel_values']
    x = vit(pixels).last_hidden_state
    return x[:, :count].mean(1).numpy(), x[:, first:].mean(1).numpy()


def same(path, folder, want):
    rows = pq.read_table(path).to_pydict()
    assert rows['name'] == sorted(p.name for p in folder.iterdir())
    for name, there in zip(('cls', 'patch'), want, strict=True):
        error = np.abs(np.array(rows[name]) - there).max() / np.abs(there).max()
        assert error <= 1e-4, f'{name} differs by {error:.1e} of the largest'


@pytest.mark.parametrize('family', FAMILIES)
def test_features_are_those_of_the_library(family, folder, tmp_path):
    model = publish(family, tmp_path / 'hf')
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / 'hf', backend='pil')
    files = [p.read_bytes() for p in sorted(folder.iterdir())]
    feature_file.extract(tmp_path / 'hf', str(folder), tmp_path / 'f.parquet', log=None)
    same(tmp_path / 'f.parquet', folder, theirs(model, processor, files))


def test_an_import_and_its_export_keep_the_pixels(folder, tmp_path):
    """Through the checkpoint of an import, by the commands."""
    model = publish('beit', tmp_path / 'hf')
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / 'hf', backend='pil')
    files = [p.read_bytes() for p in sorted(folder.iterdir())]
    want = theirs(model, processor, files)
    cli.main(['import', str(tmp_path / 'hf'), '--workdir', str(tmp_path / 'w')])
    cli.main(['export', '--workdir', str(tmp_path / 'w'), '--to', 'hf', '--out', f'{tmp_path}/out'])
    for name in ('w', 'out'):
        out = tmp_path / f'{name}.parquet'
        cli.main(['features', '--model', str(tmp_path / name)]
                 + ['--data', str(folder), '--out', str(out)])  # fmt: skip
        same(out, folder, want)
