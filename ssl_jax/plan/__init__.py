# SPDX-License-Identifier: Apache-2.0
"""`ssl_jax plan`: will it fit, what is sent, how fast, for a TPU topology and without a TPU.

libtpu compiles the very step of the loop on a machine without TPUs.  `hlo` reads the optimized
program, `compile` makes a plan, `search` varies it, `report` shows it, `chips` knows the hardware.
"""

import json
import pathlib


def add_arguments(parser):
    """The options of the command."""
    parser.add_argument('--config', required=True, help='recipe: path.py, path.py:arg or its name')
    parser.add_argument('--topology', required=True, help='chips to rent, e.g. v5e:16x16')
    parser.add_argument('--slices', type=int, default=1, help='so many of them, over the network')
    parser.add_argument('--mesh', help="data=4,fsdp=64,tensor=1; default: the recipe's")
    parser.add_argument('--out', help='folder for plan.txt, plan.json and plan.png')
    parser.add_argument(
        '--search', action='store_true', help='try meshes, remat policies and batch sizes too'
    )
    parser.add_argument('fields', nargs='*', metavar='FIELD=VALUE', help='e.g. batch_size=1024')


def run(config, topology, slices=1, *, mesh=None, out=None, search=False, log=print):
    """Plans a recipe; returns the plan, a dict (see `compile.plan`).

    Args:
      config: a recipe as `config.load` takes it, with a list of overrides: (name, ['a.b=value']).
      topology: one of `chips.names()`.  slices: how many of them.
      mesh: 'data=4,fsdp=64' instead of the recipe's; what is not named is 1.
      out: folder for plan.txt, plan.json, plan.png; None writes nothing.
      search: whether to plan the alternatives too, which takes a compilation each.
    """
    from ssl_jax import config as config_lib
    from ssl_jax.plan import chips, report
    from ssl_jax.plan import compile as compile_lib
    from ssl_jax.plan import search as search_lib

    name, fields = config
    loaded = config_lib.load(name, [*_mesh_fields(mesh), *fields])
    if loaded.infer:
        raise ValueError(
            f'recipe {name} chooses its sizes from the images at hand; plan one that states them, '
            f'such as mae_vitb16.'
        )
    chip, _ = chips.parse(topology)
    devices = chips.devices(topology, slices)
    plan = compile_lib.plan(loaded, devices, chip)
    plan.update(topology=topology, command=_command(name, topology, slices, mesh, fields))
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
        folder = pathlib.Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / 'plan.txt').write_text(text)
        (folder / 'plan.json').write_text(json.dumps(plan, indent=1) + '\n')
        if 'cycles' in plan:
            report.picture(plan, folder / 'plan.png')
    return plan


def _command(name, topology, slices, mesh, fields):
    """What to type for the same plan."""
    words = ['ssl_jax plan --config', name, '--topology', topology]
    words += ['--slices', str(slices)] if slices > 1 else []
    words += ['--mesh', mesh] if mesh else []
    return ' '.join([*words, *fields])


def _mesh_fields(mesh):
    """'data=4,fsdp=64' -> overrides of all three axes."""
    if not mesh:
        return []
    from ssl_jax import sharding

    sizes = dict.fromkeys(sharding.AXES, '1')
    for part in mesh.split(','):
        axis, equals, size = part.partition('=')
        if axis not in sizes or not equals:
            raise ValueError(f"--mesh {mesh}: '{part}' is not one of data=N, fsdp=N, tensor=N.")
        sizes[axis] = size
    return [f'mesh.{axis}={size}' for axis, size in sizes.items()]
