# SPDX-License-Identifier: Apache-2.0
"""Other meshes, rematerialisation policies and batch sizes: what fits, and the estimated speed."""

import itertools
from collections.abc import Callable, Iterator

from ssl_jax import config as config_lib
from ssl_jax import sharding
from ssl_jax.plan import chips
from ssl_jax.plan import compile as compile_lib


def candidates(config, devices: int, slices: int = 1) -> Iterator:
    """Configs around `config`: meshes x remat policies x half, equal and double batch.

    Meshes: data alone, fsdp alone (within a slice), and a square between them.
    """
    inside = devices // slices
    sizes = sorted({1, inside, 2 ** (inside.bit_length() // 2)})
    meshes = [dict(data=devices // f, fsdp=f, tensor=1) for f in sizes if inside % f == 0]
    for mesh, remat, factor in itertools.product(meshes, ('none', 'dots', 'full'), (0.5, 1, 2)):
        yield _changed(config, mesh, remat=remat, batch_size=int(config.batch_size * factor))


def search(config, devices: list, chip: chips.Chip, log: Callable = print) -> list[dict]:
    """Plans of every candidate: those that fit first, the fastest first.

    Left out are batches that do not split over the mesh, and those larger than one that does not
    fit with the same mesh and policy.
    """
    plans, too_large = [], {}
    for c in candidates(config, len(devices), sharding.num_slices(devices)):
        key = (*c.mesh.values(), c.remat)
        if c.batch_size > too_large.get(key, float('inf')):
            continue
        mesh = ','.join(f'{k}={v}' for k, v in c.mesh.items())
        name = f'{mesh} remat={c.remat} batch_size={c.batch_size}'
        if found := _plan(c, name, devices, chip, log):
            if not found['fits']:
                too_large[key] = c.batch_size
            plans.append(found)
            log(_row(found))
    return sorted(plans, key=lambda p: (not p['fits'], -p.get('images_per_second', 0)))


def frontier(plans: list[dict]) -> str:
    """The table of `search`, best first."""
    header = '  mesh                    remat   batch   per device        estimate'
    return '\n'.join([header, *map(_row, plans)])


def _row(plan):
    mesh = ','.join(f'{k}={v}' for k, v in plan['mesh'].items() if v > 1) or 'one device'
    start = f'  {mesh:<24}{plan["remat"]:<6}{plan["batch_size"]:>7}'
    if not plan['fits']:
        return f'{start}   does not fit, by {plan["over_gib"]:.2f} GiB'
    return (
        f'{start}{plan["hbm"]["total"] / 2**30:9.2f} GiB{plan["images_per_second"]:12,.0f} images/s'
        f'   MFU {plan["mfu"]:.3f}'
    )


def advice(config, plan: dict, devices: list, chip: chips.Chip, log: Callable = print) -> list[str]:
    """Lines for a plan that does not fit, up to the first change that does, compiled to know.

    Tries a stronger remat policy, then all devices on fsdp, then both, then a smaller batch too.
    """
    slices = plan['slices']
    sharded = {'data': slices, 'fsdp': len(devices) // slices, 'tensor': 1}
    policies = {'none': ('dots', 'full'), 'dots': ('full',), 'full': ()}[plan['remat']]
    changes = [{'remat': r} for r in policies]
    if plan['mesh'] != sharded:
        changes.append({'mesh': sharded})
        changes += [{'remat': 'full', 'mesh': sharded}] if policies else []
    strongest = changes[-1] if changes else {}
    batch = config.batch_size
    while batch % 2 == 0 and (batch // 2) % len(devices) == 0:
        batch //= 2
        changes.append({**strongest, 'batch_size': batch})
    lines = []
    for change in changes:
        fields = {k: v for k, v in change.items() if k != 'mesh'}
        fields |= {f'mesh.{k}': v for k, v in change.get('mesh', {}).items()}
        name = ' '.join(f'{k}={v}' for k, v in fields.items())
        found = _plan(_changed(config, **change), name, devices, chip, log)
        if found and found['fits']:
            free = (found['hbm']['capacity'] - found['hbm']['total']) / 2**30
            return [*lines, f'with {name} it fits, {free:.2f} GiB are then free (compiled too)']
        if found:
            lines.append(f'with {name} it does not, by {found["over_gib"]:.2f} GiB')
    return [*lines, 'no change that was tried fits: take more chips']


def _changed(config, mesh=None, **fields):
    c = config.copy_and_resolve_references()
    with c.unlocked():
        c.mesh.update(mesh or {})
        c.update(fields)
    return c


def _plan(config, name, devices, chip, log):
    """The plan of a valid config; None and a log line for others."""
    try:
        config_lib.validate(config)
        return compile_lib.plan(config, devices, chip)
    except ValueError as error:
        log(f'{name}: left out, {error}')
        return None
