# SPDX-License-Identifier: Apache-2.0
"""Estimated cycles of a stack of transformer blocks, forward and backward, on one TPU v5e chip.

    python experiments/tpu/blocks.py encoder decoder --remat dots --ops 12

compiles in about a minute what takes minutes inside a whole step.  libtpu, no TPU.
"""

import argparse
import collections
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from ssl_jax.models import layers, vit
from ssl_jax.plan import chips, compile, hlo

# name: (images per chip, tokens, width, heads)
SHAPES = {
    'encoder': (64, 50, 1024, 16),
    'decoder': (64, 197, 512, 16),
    'large': (64, 257, 1024, 16),
    'pixio_h': (64, 72, 1280, 16),
    'pixio_decoder': (64, 264, 512, 16),
}
DEPTH = 4


def lower(shape, remat='dots', device=None):
    """The gradient of a stack of blocks, lowered for `device`."""
    batch, tokens, dim, heads = shape

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            blocks = layers.block_stack(
                DEPTH, remat=remat, name='blocks', num_heads=heads, mlp_ratio=4.0, ffn='mlp',
                layer_scale=None, eps=1e-6, dtype=jnp.bfloat16, capture=False,
                kernel_init=nn.initializers.xavier_uniform(),
            )  # fmt: skip
            return blocks(x, None)[0]

    stack = Stack()
    x = jax.ShapeDtypeStruct((batch, tokens, dim), jnp.bfloat16)
    zeros = jnp.zeros(x.shape, x.dtype)
    params = jax.eval_shape(lambda: stack.init(jax.random.key(0), zeros))

    def loss(params, x):
        return jnp.square(stack.apply(params, x).astype(jnp.float32)).sum()

    put = SingleDeviceSharding(device)
    params, x = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=put), (params, x)
    )
    return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x)


def report(name, remat, ops=10, dump=None):
    """Prints cycles, utilisation, and the costliest operations; returns the utilisation."""
    chip = chips.CHIPS['v5e']
    started = time.monotonic()
    device = chips.devices('v5e:1x1')[0]
    compiled, bundles = chips.compile_program(lower(SHAPES[name], remat, device))
    text = compiled.as_text()
    if dump:
        with open(dump, 'w') as f:
            f.write(text)
    batch, tokens, dim, _ = SHAPES[name]
    flops = 3 * batch * vit.flops_per_image(dim, DEPTH, tokens)
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
