# SPDX-License-Identifier: Apache-2.0
"""Compiles the step of the loop for a topology and takes its numbers.

The program is `train.make_program`'s, from abstract state and batch: what runs is what is planned.
"""

import collections
import math
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from ssl_jax import config as config_lib
from ssl_jax import methods, sharding, train
from ssl_jax.plan import chips, hlo

GIB = 2**30
# Durations in epochs need a number of images; they change constants of the schedule, no shape.
NUM_EXAMPLES = 1_281_167
MATMUL = 8192  # side of the product that the scale is checked with
# Words of a name scope that tell which part of the step an operation belongs to, in this order.
PARTS = (
    ('optimizer', ('optimizer',)),
    ('teacher', ('teacher',)),
    ('heads', ('DINOHead', 'Prototypes', 'Projector', 'Projection')),
    ('decoder', ('Decoder',)),
    ('encoder', ('ViT', 'blocks', 'patch_embed')),
    ('losses, augmentation', ('jvp', 'batch')),
)
NOISE = re.compile(
    r'^(while|body|closed_call|checkpoint|rematted_computation|cond|branch_.*|(jit|jvp|transpose).*)$'
)


def program(config, devices):
    """(method, Program) of a config on these devices."""
    clock = config_lib.clock(config, NUM_EXAMPLES)
    method = methods.from_config(config, clock)
    mesh = sharding.make_mesh(**config.mesh, devices=devices)
    return method, train.make_program(config, method, clock, mesh=mesh)


def lower(built):
    """The lowered step of a Program."""
    with jax.set_mesh(built.mesh):
        return built.step.lower(built.abstract, built.batch)


def plan(config, devices, chip):
    """Compiles one step and returns its numbers, a dict that JSON can hold.

    What does not fit is no error: then `fits` is False, `over_gib` says by how much, and what only
    a compiled program tells is missing.
    """
    method, built = program(config, devices)
    out = {
        'name': config.name or config.method.name,
        'batch_size': config.batch_size,
        'accum_steps': config.accum_steps,
        'remat': config.remat,
        'dtype': config.dtype,
        'mesh': dict(built.mesh.shape),
        'slices': len({getattr(d, 'slice_index', 0) for d in devices}),
        'chip': chip.name,
        'chips': len(devices),
        'flops': float(method.flops(config.batch_size)),
        'parameters': sum(x.size for x in jax.tree.leaves(built.abstract.params)),
    }
    slow = sharding.uneven_groups(method, config.batch_size // config.accum_steps, built.mesh)
    out['warnings'] = [slow] if slow else []
    out['hbm'] = {'capacity': chip.hbm_gib * GIB, **state_bytes(built.abstract)}
    started = time.monotonic()
    lowered = lower(built)
    out['seconds_to_trace'] = round(time.monotonic() - started, 1)
    started = time.monotonic()
    try:
        compiled, bundles = chips.compile_program(lowered)
    except jax.errors.JaxRuntimeError as error:
        out['seconds_to_compile'] = round(time.monotonic() - started, 1)
        return {**out, **out_of_memory(str(error), out['hbm']['capacity'])}
    out['seconds_to_compile'] = round(time.monotonic() - started, 1)
    memory = compiled.memory_analysis()
    state = sum(out['hbm'][k] for k in ('parameters', 'moments', 'extra'))
    used = {
        'batch, padding': memory.argument_size_in_bytes - state,
        # At the peak: temp_size_in_bytes adds up what need not live at the same time.
        'activations, temporaries': memory.peak_memory_in_bytes - memory.argument_size_in_bytes,
        'program': memory.generated_code_size_in_bytes,
    }
    out['hbm'].update(used, total=state + sum(used.values()))
    free = out['hbm']['capacity'] - out['hbm']['total']
    out.update(fits=bool(free >= 0), over_gib=round(max(-free, 0) / GIB, 2))
    module = hlo.parse(compiled.as_text())
    out.update(timing(module, out, chip, bundles))
    out['collectives'] = communication(module, built.mesh)
    within = sum(c['bytes'] for c in out['collectives'] if not c['between_slices'])
    out['link_seconds'] = within / chip.ici
    out['slice_bytes'] = sum(c['bytes'] for c in out['collectives'] if c['between_slices'])
    return out


def state_bytes(state):
    """Bytes per device of a TrainState with shardings, without padding."""

    def size(tree):
        return sum(
            math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
            for x in jax.tree.leaves(tree)
            if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        )

    return {
        'parameters': size(state.params),
        'moments': size(state.opt_state),
        'extra': size(state.extra),
    }


def out_of_memory(message, capacity):
    """What the compiler says of a program that does not fit.

    Raises:
      RuntimeError: the message is of something else.
    """
    used = re.search(r'Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT]) hbm', message)
    total = re.search(r'HLO temporaries \(([\d.]+)([KMGT])\) exceeds available HBM', message)
    if not used and not total:
        raise RuntimeError(f'the step does not compile: {message.splitlines()[0][:500]}')
    scale = {'K': 2**-20, 'M': 2**-10, 'G': 1.0, 'T': 2.0**10}
    found = used or total
    needed = float(found.group(1)) * scale[found.group(2)]
    return {'fits': False, 'needed_gib': needed, 'over_gib': round(needed - capacity / GIB, 2)}


def timing(module, out, chip, bundles=None):
    """Cycles of a step as time, images per second and utilisation; what costs most."""
    unknown = []
    kernels = hlo.kernel_cycles(module, bundles or {}, chip.cores)
    operations = hlo.operations(module, unknown, kernels, chip.hbm / chip.clock)
    cycles = sum(o.cycles * o.times for o in operations)
    seconds = cycles / chip.clock
    parts, costly = collections.Counter(), collections.Counter()
    for o in operations:
        part, direction, detail = scope(o.op_name)
        parts[part, direction] += o.cycles * o.times
        costly[part, direction, detail, o.opcode] += o.cycles * o.times
    return {
        'cycles': cycles,
        'step_seconds': seconds,
        'images_per_second': out['batch_size'] / seconds,
        'images_per_second_per_chip': out['batch_size'] / seconds / out['chips'],
        'mfu': out['flops'] / out['chips'] / (cycles * chip.flops_per_cycle),
        'parts': [
            {'part': p, 'direction': d, 'cycles': c, 'share': c / cycles}
            for (p, d), c in parts.most_common()
        ],
        'costliest': [
            {'part': p, 'direction': d, 'scope': s, 'opcode': op, 'cycles': c, 'share': c / cycles}
            for (p, d, s, op), c in costly.most_common(25)
        ],
        'loops_counted_once': unknown,
        'kernels_without_estimate': [name for name, c in kernels.items() if c is None],
    }


def scope(op_name):
    """op_name -> (part of the step, 'forward' | 'backward' | 'recomputed' | '', finer scope).

    'jit(step)/transpose(jvp(ViT))/while/body/.../blocks/mlp/fc1/dot_general' is ('encoder',
    'backward', 'blocks/mlp/fc1/dot_general').
    """
    words = set(re.findall(r'\w+', op_name))
    part = next((name for name, signs in PARTS if words & set(signs)), 'no scope')
    direction = ''
    if 'jvp' in words:
        direction = 'backward' if 'transpose(' in op_name else 'forward'
        direction = 'recomputed' if 'rematted_computation' in op_name else direction
    path = [p for p in op_name.split(';')[0].split('/') if not NOISE.match(p)]
    return part, direction, '/'.join(path[:4] + path[4:][-1:])


def communication(module, mesh):
    """Rows of collectives by kind, axes and type; bytes are what one device sends in a step.

    Between slices it is data alone (`sharding.mesh_sizes`).
    """
    rows = collections.defaultdict(lambda: [0, 0.0])
    for c in hlo.collectives(module, mesh.size):
        axes = hlo.axes_of(c.groups, dict(mesh.shape)) if c.groups else ('data',)
        row = rows[c.kind, axes, '+'.join(c.dtypes), not c.groups]
        row[0] += c.times
        row[1] += c.wire * c.times
    return [
        {'kind': k, 'axes': list(a), 'dtype': t, 'count': n, 'bytes': b, 'between_slices': far}
        for (k, a, t, far), (n, b) in sorted(rows.items(), key=lambda r: -r[1][1])
    ]


def matmul_scale(device, chip):
    """Estimated over ideal cycles of one large bfloat16 product: how far the estimate can be."""
    x = jax.ShapeDtypeStruct((MATMUL,) * 2, jnp.bfloat16, sharding=SingleDeviceSharding(device))
    compiled = jax.jit(jnp.matmul).lower(x, x).compile()
    cycles = sum(o.cycles * o.times for o in hlo.operations(hlo.parse(compiled.as_text())))
    ideal = 2 * MATMUL**3 / chip.flops_per_cycle
    return {'side': MATMUL, 'cycles': cycles, 'ideal_cycles': ideal, 'mfu': ideal / cycles}
