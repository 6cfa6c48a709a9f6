# SPDX-License-Identifier: Apache-2.0
"""`ssl_jax plan`: will it fit, what is sent, how fast, for a TPU topology and without a TPU.

libtpu compiles the step of the loop on a machine without TPUs. `hlo` reads the optimized program,
`compile` makes a plan, `search` varies it, `report` shows it, `chips` has the hardware.
"""

import contextlib
import json
from collections.abc import Callable, Sequence

import jax

from ssl_jax import config as config_lib
from ssl_jax import methods, sharding
from ssl_jax import step as step_lib
from ssl_jax.kernels import forms
from ssl_jax.plan import chips, report
from ssl_jax.plan import compile as compile_lib
from ssl_jax.plan import search as search_lib
from ssl_jax.run import clock as clock_lib
from ssl_jax.run import compiled, errors, start, storage

# The devices of this machine, as a topology.
LOCAL = 'local'


def run(
    config: str,
    topology: str,
    fields: Sequence[str] = (),
    *,
    slices: int = 1,
    mesh: str | None = None,
    out: str | None = None,
    search: bool = False,
    save: str | None = None,
    images: int | None = None,
    xla_alone: bool = False,
    log: Callable = print,
) -> dict:
    """Plans a recipe; returns the plan, see `compile.plan`.

    Args:
      config: a recipe as `config.load` takes it.
      topology: one of `chips.names()`, or 'local' for the devices of this machine.
      fields: overrides 'a.b=value'.
      slices: number of slices of this topology.
      mesh: 'data=4,fsdp=64' instead of the recipe's; other axes are 1.
      out: local or remote folder for plan.txt, plan.json, plan.png; None writes nothing.
      search: whether to plan the alternatives too, one compilation each.
      save: folder for the compiled programs, see `run.compiled`; None keeps none.
      images: number of training images, for durations in epochs.
      xla_alone: whether to plan the same step without the kernels of `kernels/tpu` too.
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
    if save and not images and (epochs := compiled.in_epochs(loaded)):
        raise errors.UserError(
            f'--save {save}: {epochs[0]} is a number of steps for known images only, and the step '
            f'has that number in it: give --images N, the images that the run will count.'
        )
    on_cpu = topology == LOCAL and jax.devices()[0].platform not in forms.PLATFORMS
    if save and loaded.kernels == 'auto' and not on_cpu:
        raise errors.UserError(
            f'--save {save}: with kernels=auto a run chooses forms by measuring on its chips, so '
            f'its step is not known before: add kernels=off or kernels=on, here and to the run.'
        )
    if topology == LOCAL:
        if search or slices > 1:
            raise errors.UserError(
                f'--topology {LOCAL} has neither --search nor --slices: name a TPU topology.'
            )
        plan = local(loaded, save, images, log)
        return _finish(plan, report.local(plan), out, log)
    chip, _ = chips.parse(topology)
    devices = chips.devices(topology, slices)
    keep, sealed = None, contextlib.nullcontext()
    if save:
        keep, sealed = _keep(save, loaded, images, log), compiled.without_cache()
    with sealed:
        plan = compile_lib.plan(loaded, devices, chip, images or compile_lib.NUM_EXAMPLES, keep)
    if save and not plan['fits']:
        log(f'nothing is kept in {save}: the step does not fit')
    command = ['ssl_jax plan --config', config, '--topology', topology]
    command += ['--slices', str(slices)] if slices > 1 else []
    command += ['--mesh', mesh] if mesh else []
    command += ['--xla-alone'] if xla_alone else []
    plan.update(topology=topology, command=' '.join([*command, *fields]))
    plan['scale'] = compile_lib.matmul_scale(devices[0], chip)
    if xla_alone:
        other = compile_lib.by_xla_alone(loaded, devices, chip)
        keys = ('fits', 'over_gib', 'hbm', 'cycles', 'step_seconds', 'images_per_second', 'mfu')
        plan['xla_alone'] = {k: other[k] for k in keys if k in other}
    if search:
        log(report.text(plan))
        found = search_lib.search(loaded, devices, chip, log)
        plan['search'] = found
        text = f'{report.text(plan)}\nalternatives, best first\n{search_lib.frontier(found)}\n'
    else:
        if not plan['fits']:
            plan['advice'] = search_lib.advice(loaded, plan, devices, chip, log)
        text = report.text(plan)
    return _finish(plan, text, out, log)


def local(
    config, save: str | None = None, images: int | None = None, log: Callable = print
) -> dict:
    """Compiles the programs of a valid config for the devices of this machine; returns numbers.

    With `save` they are kept there, or loaded if they are there already.
    """
    clock = clock_lib.Clock.of(config, images or compile_lib.NUM_EXAMPLES)
    built = step_lib.make_program(config, methods.make(config, clock))
    platform = forms.PLATFORMS.get(jax.devices()[0].platform)
    # Nothing is measured here: 'auto' is XLA's forms, as it is on a CPU.
    chosen = ('on', platform) if platform and config.kernels == 'on' else ('off',)
    kept = compiled.Kept.of(save, config, built, images)
    with forms.using(*chosen):
        step = kept.beside(kernels=forms.words(*chosen)).get('step')
    memory = step.memory_analysis()
    if save:
        kept.get('init')
    return {
        'name': config.name or config.method.name,
        'topology': LOCAL,
        'devices': f'{jax.device_count()} x {jax.devices()[0].device_kind}',
        'mesh': dict(built.mesh.shape),
        'batch_size': config.batch_size,
        'state_and_batch': memory.argument_size_in_bytes,
        'peak': memory.peak_memory_in_bytes,
        'program': memory.generated_code_size_in_bytes,
    }


def _keep(folder, config, images, log):
    """The function that `compile.plan` calls with what it compiled."""

    def keep(built, step):
        kept = compiled.Kept.of(folder, config, built, images)
        forms_of_step = forms.words(compile_lib.kernels(config))
        log(f'step kept as {kept.beside(kernels=forms_of_step).save("step", step)}')
        log(f'init kept as {kept.save("init", kept.lower("init").compile())}')

    return keep


def _finish(plan, text, out, log):
    """Shows and writes a plan."""
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
