# SPDX-License-Identifier: Apache-2.0
"""`ssl_jax plan`: will it fit, what is sent, how fast, for a TPU topology and without a TPU.

libtpu compiles the step of the loop on a machine without TPUs. `hlo` reads the optimized program,
`compile` makes a plan, `search` varies it, `report` shows it, `chips` has the hardware.
"""

import json
from collections.abc import Callable, Sequence

from ssl_jax import config as config_lib
from ssl_jax import sharding
from ssl_jax.plan import chips, report
from ssl_jax.plan import compile as compile_lib
from ssl_jax.plan import search as search_lib
from ssl_jax.run import errors, start, storage


def run(
    config: str,
    topology: str,
    fields: Sequence[str] = (),
    *,
    slices: int = 1,
    mesh: str | None = None,
    out: str | None = None,
    search: bool = False,
    log: Callable = print,
) -> dict:
    """Plans a recipe; returns the plan, see `compile.plan`.

    Args:
      config: a recipe as `config.load` takes it.
      topology: one of `chips.names()`.
      fields: overrides 'a.b=value'.
      slices: number of slices of this topology.
      mesh: 'data=4,fsdp=64' instead of the recipe's; other axes are 1.
      out: local or remote folder for plan.txt, plan.json, plan.png; None writes nothing.
      search: whether to plan the alternatives too, one compilation each.
    """
    storage.require(out)
    loaded = config_lib.load(config, [*_mesh_fields(mesh), *fields])
    if loaded.infer:
        raise errors.UserError(
            f'recipe {config} chooses its sizes from the images at hand; plan one that states '
            f'them, such as mae_vitb16.'
        )
    loaded = start.follow(loaded)
    config_lib.validate(loaded)
    chip, _ = chips.parse(topology)
    devices = chips.devices(topology, slices)
    plan = compile_lib.plan(loaded, devices, chip)
    command = ['ssl_jax plan --config', config, '--topology', topology]
    command += ['--slices', str(slices)] if slices > 1 else []
    command += ['--mesh', mesh] if mesh else []
    plan.update(topology=topology, command=' '.join([*command, *fields]))
    plan['scale'] = compile_lib.matmul_scale(devices[0], chip)
    if search:
        log(report.text(plan))
        found = search_lib.search(loaded, devices, chip, log)
        plan['search'] = found
        text = f'{report.text(plan)}\nalternatives, best first\n{search_lib.frontier(found)}\n'
    else:
        if not plan['fits']:
            plan['advice'] = search_lib.advice(loaded, plan, devices, chip, log)
        text = report.text(plan)
    log(text)
    if out:
        storage.atomic_write(f'{out}/plan.txt', text)
        storage.atomic_write(f'{out}/plan.json', json.dumps(plan, indent=1) + '\n')
        if 'cycles' in plan:
            with storage.atomic_file(f'{out}/plan.png') as file:
                report.picture(plan, file)
    return plan


def _mesh_fields(mesh):
    """'data=4,fsdp=64' -> overrides of all three axes."""
    if not mesh:
        return []
    sizes = dict.fromkeys(sharding.AXES, '1')
    for part in mesh.split(','):
        axis, equals, size = part.partition('=')
        if axis not in sizes or not equals:
            raise errors.UserError(
                f"--mesh {mesh}: '{part}' is not one of data=N, fsdp=N, tensor=N."
            )
        sizes[axis] = size
    return [f'mesh.{axis}={size}' for axis, size in sizes.items()]
