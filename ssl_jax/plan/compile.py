# SPDX-License-Identifier: Apache-2.0
"""Numbers of the training step, compiled for a topology.

The program is `step.make_program`'s, from abstract state and batch: the one that runs.
"""

import collections
import math
import re
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from ssl_jax import methods, sharding
from ssl_jax import step as step_lib
from ssl_jax.kernels import forms
from ssl_jax.plan import chips, hlo
from ssl_jax.run import clock as clock_lib
from ssl_jax.run import errors

GIB = 2**30
# For durations in epochs: it changes constants of the schedule, no shape.
NUM_EXAMPLES = 1_281_167
MATMUL = 8192  # side of the product that checks the scale
# Parts of the step and the words of name scopes that mark them; the first match counts.
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


def lower(built: step_lib.Program) -> jax.stages.Lowered:
    """The lowered step."""
    with jax.set_mesh(built.mesh):
        return built.step.lower(built.abstract, built.batch)


def kernels(config) -> str:
    """The forms of a plan: no chip is asked here, so 'auto' is 'on'."""
    return 'off' if config.kernels == 'off' else 'on'


def plan(
    config,
    devices: list,
    chip: chips.Chip,
    num_examples: int = NUM_EXAMPLES,
    keep: Callable[[step_lib.Program, jax.stages.Compiled], None] | None = None,
) -> dict:
    """Compiles one step and returns its numbers as JSON can hold them.

    A program that does not fit is no error: `fits` is False, `over_gib` is the missing memory, and
    numbers of the compiled program are left out.

    Args:
      config: a valid one.
      devices: of `chips.devices`.
      chip: of the devices.
      num_examples: images in the training set.
      keep: called with the program and its compiled step, if it compiles.
    """
    method = methods.make(config, clock_lib.Clock.of(config, num_examples))
    built = step_lib.make_program(
        config, method, sharding.make_mesh(**config.mesh, devices=devices)
    )
    ways = built.mesh.shape['data'] * built.mesh.shape['fsdp']
    out = {
        'name': config.name or config.method.name,
        'batch_size': config.batch_size,
        'accum_steps': config.accum_steps,
        'remat': config.remat,
        'dtype': config.dtype,
        'mesh': dict(built.mesh.shape),
        'slices': sharding.num_slices(devices),
        'chip': chip.name,
        'chips': len(devices) // chip.devices,
        'devices': len(devices),
        'kernels': kernels(config) == 'on',
        'flops': float(method.flops(config.batch_size)),
        'parameters': sum(x.size for x in jax.tree.leaves(built.abstract.params)),
        'warnings': list(
            method.warnings(config.batch_size // config.accum_steps, ways, config.accum_steps)
        ),
        'hbm': {'capacity': chip.hbm_gib * GIB, **state_bytes(built.abstract)},
    }
    started = time.monotonic()
    with forms.using(kernels(config)):
        lowered = lower(built)
    out['seconds_to_trace'] = round(time.monotonic() - started, 1)
    started = time.monotonic()
    try:
        compiled, bundles = chips.compile_program(lowered)
    except jax.errors.JaxRuntimeError as error:
        numbers = out_of_memory(str(error), out['hbm']['capacity'])
        if numbers is None and config.xla:
            flags = ', '.join(f'xla.{flag}={value}' for flag, value in config.xla.items())
            raise errors.UserError(
                f'the step does not compile with {flags}: {" ".join(str(error).split())[:300]}; '
                f'plan it without to see whether they are the reason.'
            ) from error
        if numbers is None:  # a bug, shown with its traceback
            raise
        return out | numbers
    finally:
        out['seconds_to_compile'] = round(time.monotonic() - started, 1)
    if keep:
        keep(built, compiled)
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
    module = hlo.parse(compiled.as_text())
    sent = communication(module, built.mesh)
    return {
        **out,
        'fits': bool(free >= 0),
        'over_gib': round(max(-free, 0) / GIB, 2),
        **timing(module, out, chip, bundles),
        'collectives': sent,
        'link_seconds': sum(c['bytes'] for c in sent if not c['between_slices']) / chip.ici,
        'slice_bytes': sum(c['bytes'] for c in sent if c['between_slices']),
    }


def by_xla_alone(config, devices: list, chip: chips.Chip) -> dict:
    """`plan` of the same step without the kernels of `kernels/tpu`."""
    jax.clear_caches()  # of what was traced with them
    config = config.copy_and_resolve_references()
    config.kernels = 'off'
    return plan(config, devices, chip)


def state_bytes(state: step_lib.TrainState) -> dict[str, int]:
    """Bytes per device of a state with shardings, without padding."""

    def size(tree):
        return sum(
            math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
            for x in jax.tree.leaves(tree)
            if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        )

    fields = {'parameters': state.params, 'moments': state.opt_state, 'extra': state.extra}
    return {name: size(tree) for name, tree in fields.items()}


def out_of_memory(message: str, capacity: float) -> dict | None:
    """The compiler's numbers of a program that does not fit; None for other messages."""
    found = re.search(r'Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm', message) or re.search(
        r'HLO temporaries \(([\d.]+)([KMGT])\) exceeds available HBM', message
    )
    if not found:
        return None
    needed = float(found.group(1)) * {'K': 2**-20, 'M': 2**-10, 'G': 1, 'T': 2**10}[found.group(2)]
    return {'fits': False, 'needed_gib': needed, 'over_gib': round(needed - capacity / GIB, 2)}


def timing(module: hlo.Module, out: dict, chip: chips.Chip, bundles: dict | None = None) -> dict:
    """Cycles of a step as time, images per second and utilisation; the costliest operations.

    Args:
      out: batch_size, chips, devices and flops of a plan.
      bundles: of `chips.compile_program`.
    """
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

    def rows(counts, *names):
        return [dict(zip(names, key, strict=True), cycles=c, share=c / cycles) for key, c in counts]

    return {
        'cycles': cycles,
        'step_seconds': seconds,
        'images_per_second': out['batch_size'] / seconds,
        'images_per_second_per_chip': out['batch_size'] / seconds / out['chips'],
        'mfu': out['flops'] / out['devices'] / (cycles * chip.flops_per_cycle),
        'parts': rows(parts.most_common(), 'part', 'direction'),
        'costliest': rows(costly.most_common(25), 'part', 'direction', 'scope', 'opcode'),
        'loops_counted_once': unknown,
        'kernels_without_estimate': [name for name, c in kernels.items() if c is None],
    }


def scope(op_name: str) -> tuple[str, str, str]:
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


def communication(module: hlo.Module, mesh: jax.sharding.Mesh) -> list[dict]:
    """Rows of collectives by kind, axes and type, with the bytes that a device sends in a step.

    Between slices the axis is always data (`sharding.mesh_sizes`).
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


def matmul_scale(device: jax.Device, chip: chips.Chip) -> dict:
    """Estimated and ideal cycles of one large bfloat16 product: the error of the estimate."""
    x = jax.ShapeDtypeStruct((MATMUL,) * 2, jnp.bfloat16, sharding=SingleDeviceSharding(device))
    compiled = jax.jit(jnp.matmul).lower(x, x).compile()
    cycles = sum(o.cycles * o.times for o in hlo.operations(hlo.parse(compiled.as_text())))
    ideal = 2 * MATMUL**3 / chip.flops_per_cycle
    return {'side': MATMUL, 'cycles': cycles, 'ideal_cycles': ideal, 'mfu': ideal / cycles}
