# SPDX-License-Identifier: Apache-2.0
"""Estimated cycles of a stack of transformer blocks, forward and backward, on one TPU v5e chip.

    python experiments/tpu/blocks.py encoder decoder --remat dots --ops 12

A block compiles in about a minute, a whole step takes several. Needs libtpu, no TPU.
"""

import argparse
import collections
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from ssl_jax import sharding
from ssl_jax.kernels import forms
from ssl_jax.kernels.segments import Segment, tokens_per_row
from ssl_jax.models import blocks as blocks_lib
from ssl_jax.models import vit
from ssl_jax.plan import chips, compile, hlo

# name: ((images, tokens) of each size on a chip, width, heads)
SHAPES = {
    'encoder': ([(64, 50)], 1024, 16),
    'decoder': ([(64, 197)], 512, 16),
    'large': ([(64, 257)], 1024, 16),
    'pixio_h': ([(64, 72)], 1280, 16),
    'pixio_decoder': ([(64, 264)], 512, 16),
    'dinov2': ([(128, 197), (512, 37)], 1024, 16),
}
DROP_PATH = {'dinov2': 0.3}  # share of the images that skip a branch; these have LayerScale too
DEPTH = 4


def segments_of(name):
    """`Segment`s of a shape; images that may be left out are padded, as `vit.ViT` does."""
    multiple = 8 if name in DROP_PATH else 1
    return tuple(Segment(n, tokens, -tokens % multiple) for n, tokens in SHAPES[name][0])


def lower(name, remat='dots', device=None, **options):
    """The gradient of a stack of blocks, lowered for `device`; `options` are XLA's."""
    sizes, dim, heads = SHAPES[name]
    drop, dropped, segments = None, name in DROP_PATH, segments_of(name)
    if dropped:
        counts = [n for n, _ in sizes]
        keys = jax.random.split(jax.random.key(0), 1)
        drop = blocks_lib.drop_path_subsets(keys, DEPTH, DROP_PATH[name], counts)

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x, drop):
            blocks = blocks_lib.block_stack(
                DEPTH, remat=remat, name='blocks', num_heads=heads, mlp_ratio=4.0, ffn='mlp',
                layer_scale=1e-5 if dropped else None, eps=1e-6, dtype=jnp.bfloat16, capture=False,
                kernel_init=nn.initializers.xavier_uniform(), segments=segments,
            )  # fmt: skip
            return blocks(x, drop)[0]

    stack = Stack()
    x = jax.ShapeDtypeStruct((1, tokens_per_row(segments), dim), jnp.bfloat16)
    init = lambda: stack.init(jax.random.key(0), jnp.zeros(x.shape, x.dtype), drop)  # noqa: E731
    params = jax.eval_shape(init)

    def loss(params, x, drop):
        return jnp.square(stack.apply(params, x, drop).astype(jnp.float32)).sum()

    put = SingleDeviceSharding(device)
    mesh = sharding.make_mesh(1, 1, devices=[device])
    options = (sharding.compiler_options(mesh) or {}) | options
    args = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=put), (params, x, drop)
    )
    with forms.using('on', 'tpu'):
        return jax.jit(jax.grad(loss, argnums=(0, 1)), compiler_options=options).lower(*args)


def report(name, remat, ops=10, dump=None):
    """Prints cycles, utilisation, and the costliest operations; returns the utilisation."""
    chip = chips.CHIPS['v5e']
    started = time.monotonic()
    device = chips.devices('v5e:1x1')[0]
    compiled, bundles = chips.compile_program(lower(name, remat, device))
    text = compiled.as_text()
    if dump:
        with open(dump, 'w') as f:
            f.write(text)
    sizes, dim, _ = SHAPES[name]
    flops = 3 * sum(n * vit.flops_per_image(dim, DEPTH, tokens) for n, tokens in sizes)
    flops *= 1 - DROP_PATH.get(name, 0)
    module = hlo.parse(text)
    kernels = hlo.kernel_cycles(module, bundles)
    found = hlo.operations(module, None, kernels, chip.hbm / chip.clock)
    cycles = sum(o.cycles * o.times for o in found)
    mfu = flops / chip.flops_per_cycle / cycles
    print(
        f'{name} {SHAPES[name]} remat {remat}: {cycles / DEPTH / 1e3:,.0f} k cycles per block, '
        f'MFU {mfu:.3f}, temporaries {compiled.memory_analysis().temp_size_in_bytes / 2**20:.0f} '
        f'MiB, compiled in {time.monotonic() - started:.0f} s',
        flush=True,
    )
    costly = collections.Counter()
    for o in found:
        _, direction, where = compile.scope(o.op_name)
        costly[direction, where, o.opcode] += o.cycles * o.times
    for (direction, where, opcode), c in costly.most_common(ops):
        print(f'  {c / cycles:6.1%} {c / DEPTH / 1e3:8,.0f} k  {direction:<11}{opcode:<8}{where}')
    return mfu


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('shapes', nargs='*', default=['encoder', 'decoder'])
    parser.add_argument('--remat', default='dots')
    parser.add_argument('--ops', type=int, default=10)
    parser.add_argument('--dump', help='file for the optimized HLO of the last shape')
    args = parser.parse_args()
    for shape in args.shapes:
        report(shape, args.remat, args.ops, args.dump)
