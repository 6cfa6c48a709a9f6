# SPDX-License-Identifier: Apache-2.0
"""Reads the golden files: numbers of the official PyTorch code, with their tolerances.

SSL_JAX_GOLDEN names the folder; the default is tests/golden/. Every shape and hyper-parameter comes
from a file's `meta`.
"""

import functools
import json
import math
import os
import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.objectives import losses

HERE = pathlib.Path(__file__).resolve().parent


FOLDER = pathlib.Path(os.environ.get('SSL_JAX_GOLDEN', HERE / 'golden'))


def _round_up(x):
    """Up to the next 1, 2 or 5 times a power of ten."""
    if x == 0:
        return 0.0
    power = 10.0 ** math.floor(math.log10(x))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= x * (1 - 1e-9))


def _group(key):
    """Arrays that the README of the golden set judges together."""
    head, *rest = key.split('/')
    if head.startswith('grad') or head == 'final':
        return head
    parents = '/'.join(rest[:-1])
    return re.sub(r'\d+', '#', f'{head}/{parents}') if parents else key


class File:
    """One golden file: `meta`, `hyper`, weights and arrays, and the check against them."""

    def __init__(self, path):
        self._z = np.load(path)
        self.meta = json.loads(str(self._z['meta']))
        self.hyper = self.meta['hyper_parameters']
        self.keys = self._z.files

    def __getitem__(self, key):
        return self._z[key]

    def under(self, prefix):
        """{name: array} of all keys below `prefix`/."""
        return {k[len(prefix) + 1 :]: self._z[k] for k in self.keys if k.startswith(prefix + '/')}

    def images(self, key='in/images'):
        """Images as NHWC."""
        return np.moveaxis(self._z[key], -3, -1)

    @functools.cached_property
    def _errors(self):
        table = self.meta['f32_vs_f64_maxabs_and_scale']
        return {k: v for k, v in table.items() if not k.startswith('KEYBIAS')}

    def tolerance(self, key):
        """(absolute tolerance of the key's group, relative tolerance of a single array).

        10 x the measured float32-float64 difference of the official code, at least 1e-6 x the
        largest value of the group, rounded up: the rule of the golden set's README.
        """
        group = [v for k, v in self._errors.items() if _group(k) == _group(key)]
        scale = max([v[1] for v in group] + [float(np.abs(self._z[key]).max())])
        atol = _round_up(max([10 * v[0] for v in group] + [1e-6 * scale]))
        worst = max(v[0] / v[1] for v in self._errors.values() if v[1] > 0)
        return atol, max(1e-5, _round_up(10 * worst))

    def check(self, key, value):
        """Asserts that `value` equals the stored array: exactly if integer, else in tolerance."""
        want = self._z[key]
        value = np.asarray(value)
        assert value.shape == want.shape, f'{key}: shape {value.shape}, expected {want.shape}'
        if want.dtype.kind in 'iub':
            np.testing.assert_array_equal(value, want, err_msg=key)
            return
        atol, rtol = self.tolerance(key)
        error = float(np.abs(value.astype(np.float64) - want).max())
        assert error <= atol, f'{key}: differs by {error:.2e}, tolerance {atol:.0e}'
        largest = float(np.abs(want).max())
        limit = max(rtol * largest, 1e-7)
        assert error <= limit, f'{key}: differs by {error:.2e} where its largest is {largest:.2e}'


@functools.lru_cache
def load(stem):
    """File `stem`.npz of the golden folder; skips the test where there is none."""
    path = FOLDER / f'{stem}.npz'
    if not path.exists():
        pytest.skip(f'{path} is not there')
    return File(path)


def pos_resize(h):
    """Our name for the rule by which the official backbone resizes positions."""
    rule = (h['interpolate_antialias'], h['interpolate_offset'])
    return {(True, 0.0): 'antialias', (False, 0.1): 'offset', (False, 0.0): 'bicubic'}[rule]


def student_temp(f):
    """The student's temperature, the official default where the file does not say."""
    return f.hyper.get('student_temp', 0.1)


def move(f, center, mean):
    """The centre moved by the mean of a batch, at the file's momentum or the official default."""
    return losses.update_center(center, mean, f.hyper.get('center_momentum', 0.9))


def ibot_weights(mask):
    """1 / (number of masked patches of the image) where masked, else 0; (..., N) float32."""
    return mask / jnp.maximum(jnp.sum(mask, axis=-1, keepdims=True), 1).astype(jnp.float32)
