# SPDX-License-Identifier: Apache-2.0
"""The kernels of attention on one TPU v5e chip by libtpu's schedule: cycles against the bound.

    python experiments/tpu/kernels.py encoder decoder large

The bound is that of the matrix unit with heads in tiles of 128 lanes: it sums over 128 channels and
returns 128, however few belong to a head. Needs libtpu, no TPU.
"""

import argparse

import jax
import jax.numpy as jnp
from blocks import SHAPES, segments_of
from jax.sharding import SingleDeviceSharding

from ssl_jax.kernels.segments import tokens_per_row
from ssl_jax.kernels.tpu import attention as tpu_attention
from ssl_jax.plan import chips, hlo


def measure(name):
    """Prints cycles of the forward and of the backward kernel."""
    (sizes, dim, heads), segments = SHAPES[name], segments_of(name)
    chip, put = chips.CHIPS['v5e'], SingleDeviceSharding(chips.devices('v5e:1x1')[0])

    def rows(width):
        shape = (tokens_per_row(segments), width)
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=put)

    def forward(qkv):
        return tpu_attention.attention(qkv, heads, segments)

    def backward(qkv, grad):
        return tpu_attention.gradient(qkv, grad, heads, segments)

    for direction, fn, products, args in (
        ('forward', forward, 2, (rows(3 * dim),)),
        ('backward', backward, 5, (rows(3 * dim), rows(dim))),
    ):
        compiled, bundles = chips.compile_program(jax.jit(fn).lower(*args))
        cycles = sum(hlo.kernel_cycles(hlo.parse(compiled.as_text()), bundles).values())
        squares = sum(n * tokens**2 for n, tokens in sizes)
        bound = products * heads * 2 * squares * 128 / chip.flops_per_cycle
        line = f'{direction}: {cycles / 1e3:,.0f} k, bound {bound / 1e3:,.0f} k'
        print(f'{name} {SHAPES[name]} {line}')


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('shapes', nargs='*', default=list(SHAPES))
    for shape in parser.parse_args().shapes:
        measure(shape)
