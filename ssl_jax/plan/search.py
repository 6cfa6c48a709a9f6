# SPDX-License-Identifier: Apache-2.0
"""Other meshes, rematerialisation policies and batch sizes: what fits, and how fast it would be."""

import itertools

from ssl_jax import config as config_lib
from ssl_jax.plan import compile as compile_lib


def meshes(devices, slices=1):
    """Candidates [{'data', 'fsdp', 'tensor'}]: data alone, fsdp alone, a square between them."""
    inside = devices // slices
    sizes = {1, inside, 2 ** (inside.bit_length() // 2)}
    found = [f for f in sorted(sizes) if inside % f == 0]
    return [{'data': devices // f, 'fsdp': f, 'tensor': 1} for f in found]


def candidates(config, devices, slices=1):
    """Configs around `config`: meshes x remat policies x batches of 1/2, 1 and 2 times its own."""
    for mesh, remat, factor in itertools.product(
        meshes(devices, slices), ('none', 'dots', 'full'), (0.5, 1, 2)
    ):
        c = config.copy_and_resolve_references()
        with c.unlocked():
            c.batch_size = int(config.batch_size * factor)
            c.remat = remat
            c.mesh.update(mesh)
        yield c


def search(config, devices, chip, log=print):
    """Plans every candidate; returns the plans, those that fit first, the fastest of them first.

    Larger batches than one that does not fit, with the same mesh and policy, are not compiled; nor
    are candidates whose batch does not split over the mesh.
    """
    plans, too_large = [], {}
    slices = len({getattr(d, 'slice_index', 0) for d in devices})
    for c in candidates(config, len(devices), slices):
        key = (*c.mesh.values(), c.remat)
        if c.batch_size > too_large.get(key, float('inf')):
            continue
        try:
            config_lib.validate(c)
            found = compile_lib.plan(c, devices, chip)
        except ValueError as error:
            log(f'{_name(c)}: left out, {error}')
            continue
        if not found['fits']:
            too_large[key] = c.batch_size
        plans.append(found)
        log(row(found))
    return sorted(plans, key=lambda p: (not p['fits'], -p.get('images_per_second', 0)))


def _name(config):
    mesh = ','.join(f'{k}={v}' for k, v in config.mesh.items())
    return f'{mesh} remat={config.remat} batch_size={config.batch_size}'


def row(plan):
    """One line of the frontier."""
    mesh = ','.join(f'{k}={v}' for k, v in plan['mesh'].items() if v > 1) or 'one device'
    start = f'  {mesh:<24}{plan["remat"]:<6}{plan["batch_size"]:>7}'
    if not plan['fits']:
        return f'{start}   does not fit, by {plan["over_gib"]:.2f} GiB'
    return (
        f'{start}{plan["hbm"]["total"] / 2**30:9.2f} GiB{plan["images_per_second"]:12,.0f} images/s'
        f'   MFU {plan["mfu"]:.3f}'
    )


def frontier(plans):
    """The table of `search`, best first."""
    return '\n'.join(
        ['  mesh                    remat   batch   per device        estimate', *map(row, plans)]
    )


def advice(config, plan, devices, chip, log=print):
    """For a plan that does not fit: the first single change that does, found by compiling it.

    Tries a stronger remat policy, then all devices on fsdp, then both, then a smaller batch too.
    """
    slices = plan['slices']
    sharded = {'data': slices, 'fsdp': len(devices) // slices, 'tensor': 1}
    policies = [r for r in ('dots', 'full') if r != plan['remat'] and plan['remat'] != 'full']
    changes = [{'remat': r} for r in policies]
    if plan['mesh'] != sharded:
        changes.append({'mesh': sharded})
        changes += [{'remat': 'full', 'mesh': sharded}] if policies else []
    strongest = dict(changes[-1]) if changes else {}
    batch = config.batch_size
    while batch % 2 == 0 and (batch // 2) % len(devices) == 0:
        batch //= 2
        changes.append({**strongest, 'batch_size': batch})
    lines = []
    for change in changes:
        c = config.copy_and_resolve_references()
        with c.unlocked():
            for key, value in change.items():
                c.mesh.update(value) if key == 'mesh' else setattr(c, key, value)
        words = ' '.join(_words(k, v) for k, v in change.items())
        try:
            config_lib.validate(c)
            found = compile_lib.plan(c, devices, chip)
        except ValueError as error:
            log(f'{words}: {error}')
            continue
        if found['fits']:
            free = (found['hbm']['capacity'] - found['hbm']['total']) / 2**30
            return [*lines, f'with {words} it fits, {free:.2f} GiB are then free (compiled too)']
        lines.append(f'with {words} it does not, by {found["over_gib"]:.2f} GiB')
    return [*lines, 'no change that was tried fits: take more chips']


def _words(key, value):
    if key != 'mesh':
        return f'{key}={value}'
    return ' '.join(f'mesh.{k}={v}' for k, v in value.items())
