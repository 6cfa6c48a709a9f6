# SPDX-License-Identifier: Apache-2.0
"""Images that skip a residual branch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.kernels import subsets
from ssl_jax.kernels.segments import Segment, tokens_per_row
from ssl_jax.kernels.tpu import rows as tpu_rows

SEGMENTS = Segment(4, 5, 3), Segment(6, 13, 3)  # rows of 8 and of 16
IDS = [jnp.array([[2, 0, 3], [1, 2, 0]]), jnp.array([[5, 1], [0, 3]])]


def rows(seed, segments, batch=2, dim=128):
    return jax.random.normal(jax.random.key(seed), (batch * tokens_per_row(segments), dim))


def test_the_gradient_is_that_of_picking_images_and_adding_what_became_of_them():
    x = rows(0, SEGMENTS, dim=8)

    def branch(y, kept):
        assert kept == (Segment(3, 5, 3), Segment(2, 13, 3))
        return jnp.sin(y)

    def plainly(x):
        out = x.reshape(2, -1, 8)
        for row in range(2):
            start = 0
            for s, ids in zip(SEGMENTS, IDS, strict=True):
                for i in np.asarray(ids[row]):
                    here = slice(start + i * s.length, start + (i + 1) * s.length)
                    change = jnp.sin(x.reshape(2, -1, 8)[row, here])
                    out = out.at[row, here].add(s.images / ids.shape[1] * change)
                start += s.images * s.length
        return out.reshape(x.shape)

    weight = rows(1, SEGMENTS, dim=8)
    found, want = (
        jax.value_and_grad(lambda x, fn=fn: (fn(x) * weight).sum())(x)
        for fn in (lambda x: subsets.residual(branch, x, SEGMENTS, IDS), plainly)
    )
    np.testing.assert_allclose(found[0], want[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], want[1], atol=1e-5)


@pytest.mark.parametrize('weighted', [False, True])
def test_the_tpu_kernel_moves_images_as_the_plain_form_does(weighted):
    kept = Segment(3, 5, 3), Segment(2, 13, 3)
    where = [subsets.where(i, s.images) for s, i in zip(SEGMENTS, IDS, strict=True)]
    weights = (4 / 3, 3.0) if weighted else (1.0, 1.0)
    kernel = functools.partial(tpu_rows.move_images, interpret=True)
    x, y = rows(0, SEGMENTS), rows(1, kept)

    taken = kernel(SEGMENTS, kept, weights, IDS, x)
    np.testing.assert_allclose(taken, subsets.move(SEGMENTS, kept, IDS, weighted, x), rtol=1e-6)
    added = kernel(kept, SEGMENTS, weights, where, y, x)
    want = subsets.move(kept, SEGMENTS, where, weighted, y, x)
    np.testing.assert_allclose(added, want, rtol=1e-6, atol=1e-6)


def test_what_is_left_out_never_reaches_the_branch():
    """Not even a number that is none."""
    x = rows(0, SEGMENTS).reshape(2, -1, 128)
    x = x.at[0, 8:16].set(jnp.nan).reshape(-1, 128)  # image 1 of the first row, left out
    out = subsets.residual(lambda y, kept: y.at[:].set(y.sum()), x, SEGMENTS, IDS)
    assert int(jnp.isnan(out).sum()) == 8 * 128
