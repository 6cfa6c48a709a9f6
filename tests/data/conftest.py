# SPDX-License-Identifier: Apache-2.0
"""A data set of TensorFlow Datasets."""

import io

import numpy as np
import PIL.Image
import pytest


def _png(value):
    out = io.BytesIO()
    PIL.Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(out, 'PNG')
    return out.getvalue()


@pytest.fixture(scope='session')
def tfds_dir(tmp_path_factory):
    """A data_dir with the data set tiny_plates."""
    path = str(tmp_path_factory.mktemp('tfds'))
    tfds = pytest.importorskip('tensorflow_datasets')

    class TinyPlates(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version('1.0.0')
        url_infos = {}  # There is nothing to download.

        def _info(self):
            names = tfds.features.ClassLabel(names=['owl', 'yak'])
            features = tfds.features.FeaturesDict(dict(image=tfds.features.Image(), label=names))
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, manager):
            return {'train': self._generate_examples()}

        def _generate_examples(self):
            for i in range(6):
                yield i, dict(image=io.BytesIO(_png(i)), label=i % 2)

    TinyPlates(data_dir=path, file_format='array_record').download_and_prepare()
    return path
