# SPDX-License-Identifier: Apache-2.0
"""Losses of class and depth maps where the golden files do not look."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.objectives import dense as losses


def depths(seed, shape):
    return jnp.exp(jax.random.normal(jax.random.key(seed), shape))


LOSSES = {
    'sig': lambda pred, gt: losses.sig_loss(pred, gt),
    'gradient': lambda pred, gt: losses.gradient_loss(pred, gt),
    'silog': lambda pred, gt: losses.silog(pred, gt, gt > 0),
}
GRADS = {name: jax.jit(jax.value_and_grad(loss)) for name, loss in LOSSES.items()}


@pytest.mark.parametrize('name', sorted(LOSSES))
def test_pixels_without_a_depth_have_no_loss_and_no_gradient(name):
    pred, gt = depths(0, (8, 9)), depths(1, (8, 9))
    gt = gt.at[:, :4].set(0)
    other = pred.at[:, :4].multiply(7)
    loss, grad = GRADS[name](pred, gt)
    assert float(GRADS[name](other, gt)[0]) == pytest.approx(float(loss), rel=1e-5)
    assert not np.any(grad[:, :4]) and np.any(grad[:, 4:])


@pytest.mark.parametrize('name', sorted(LOSSES))
@pytest.mark.parametrize('measured', [False, True])
def test_an_empty_map_and_a_perfect_one_have_no_loss_and_finite_gradients(name, measured):
    pred = depths(0, (8, 9))
    loss, grad = GRADS[name](pred, pred if measured else 0 * pred)
    assert float(loss) == 0 and np.all(np.isfinite(grad))


def test_depths_beyond_the_range_do_not_count():
    pred, gt = depths(0, (8, 9)), depths(1, (8, 9))
    far = gt.at[0].set(99.0)
    assert float(losses.sig_loss(pred, far, max_depth=90.0)) == pytest.approx(
        float(losses.sig_loss(pred, far.at[0].set(0)))
    )


def test_differences_are_within_an_image_or_as_called_officially_between_images():
    """Officially called with (B, 1, H, W), which has nothing two apart in one or two images."""
    pred, gt = depths(0, (3, 6, 7)), depths(1, (3, 6, 7))
    loss = jax.jit(losses.gradient_loss)
    assert float(loss(pred[0], gt[0])) > 0
    assert float(loss(pred[:2, None], gt[:2, None])) == 0
    error = np.log(pred + losses.EPS) - np.log(gt + losses.EPS)
    want = np.abs(error[0] - error[2]).sum() / error.size  # the other scales have one image
    assert float(loss(pred[:, None], gt[:, None])) == pytest.approx(want, rel=1e-4)


def test_ignored_pixels_have_no_cross_entropy():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    labels = jnp.full((2, 3, 4), 255, jnp.uint8).at[1, 2, 3].set(4)
    want = -jax.nn.log_softmax(logits[1, 2, 3])[4]
    assert float(losses.cross_entropy(logits, labels)) == pytest.approx(float(want), rel=1e-5)
    assert float(losses.cross_entropy(logits, jnp.full_like(labels, 255))) == 0
