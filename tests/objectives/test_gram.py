# SPDX-License-Identifier: Apache-2.0
"""Gram anchoring as functions: known value, invariances, resizing as torch does it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from ssl_jax.objectives import gram


def known():
    """The student and teacher of the known value: 2 images, 9 patches, 4 channels."""
    b, i, k = np.meshgrid(np.arange(2), np.arange(9), np.arange(4), indexing='ij')
    return np.sin(1 + b + 2 * i + 3 * k), np.cos(2 + 3 * b + i * k + k)


def test_the_loss_of_the_known_patches():
    assert float(gram.loss(*known())) == pytest.approx(0.7863149902654557, abs=1e-6)


def test_equal_patches_cost_nothing_nor_do_rotated_and_scaled_ones():
    student, _ = known()
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))
    assert float(gram.loss(student, student)) == 0
    assert float(gram.loss(student, 3 * student @ turn)) < 1e-12


def test_only_the_student_gets_a_gradient_and_in_bfloat16_the_loss_is_float32():
    student, teacher = (jnp.asarray(x, jnp.bfloat16) for x in known())
    loss, (a, b) = jax.value_and_grad(gram.loss, (0, 1))(student, teacher)
    assert np.any(a) and not np.any(b) and loss.dtype == jnp.float32
    assert float(loss) == pytest.approx(0.786, abs=0.02)


@pytest.mark.parametrize(('how', 'n', 'side'), [('bicubic', 6, 3), ('antialias', 24, 10)])
def test_tokens_and_crops_are_resized_as_in_torch(how, n, side):
    x = np.random.default_rng(0).uniform(0, 255, (2, n, n, 3)).astype(np.float32)
    want = torch.nn.functional.interpolate(
        torch.tensor(x).permute(0, 3, 1, 2),
        (side, side),
        mode='bicubic',
        align_corners=False,
        antialias=how == 'antialias',
    )
    got = gram.resize(x, side, how)
    np.testing.assert_allclose(got, want.permute(0, 2, 3, 1), atol=2e-3)


def test_a_crop_of_one_colour_keeps_it_and_edges_stay_in_range():
    grey = gram.shrink(np.full((1, 16, 16, 3), 77, np.uint8), 8)
    np.testing.assert_allclose(grey, 77, atol=1e-3)
    edges = np.zeros((1, 16, 16, 3), np.uint8)
    edges[:, :, 8:] = 255
    small = np.asarray(gram.shrink(edges, 8))
    assert small.shape == (1, 8, 8, 3) and small.min() == 0 and small.max() == 255


class Means:
    """An encoder whose patch tokens are the mean pixels."""

    patch_size, embed_dim = 4, 3

    def apply(self, params, x):
        del params
        b, n = len(x), x.shape[1] // 4
        return {'patch_tokens': x.reshape(b, n, 4, n, 4, 3).mean(axis=(2, 4)).reshape(b, -1, 3)}


def test_the_teacher_answers_for_the_grid_of_the_student():
    crops = np.random.default_rng(0).normal(size=(2, 16, 16, 3))
    tokens = Means().apply({}, crops)['patch_tokens']
    np.testing.assert_array_equal(gram.targets(Means(), {}, crops, 4), tokens.astype(np.float32))
    want = gram.resize(tokens.reshape(2, 4, 4, 3), 2, 'bicubic').reshape(2, 4, 3)
    np.testing.assert_allclose(gram.targets(Means(), {}, crops, 2), want, atol=1e-6)


def test_the_copy_is_replaced_at_multiples_and_no_more_often_than_said():
    taken = [int(gram.replaced(0, 1, jnp.int32(done), 3, 2)) for done in range(1, 13)]
    assert taken == [0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0]
    assert int(gram.replaced(0, 1, jnp.int32(3), 3, 0)) == 0
