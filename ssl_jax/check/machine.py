# SPDX-License-Identifier: Apache-2.0
"""What this machine is, and whether jax, libtpu, driver and the versions of packages fit it."""

import glob
import importlib
import os
import platform
import shutil
import subprocess
from importlib import metadata

import jax
from packaging import requirements, version

from ssl_jax.check.rows import Row, caught
from ssl_jax.run import errors, launch

GIB = 2**30
# Extras of jax whose packages must fit it, where they are installed.
JAX_EXTRAS = ('', 'tpu', 'cuda12', 'cuda13')
# Oldest driver by major version of CUDA, docs.jax.dev/en/latest/installation.html.
DRIVERS = {'13': '580', '12': '525'}
WHY = "see why: python -c 'import jax; print(jax.devices())'"


def rows(found: list[Row]) -> None:
    """Appends the rows; a backend that does not start is one of them."""
    found.append(Row('CPU cores', launch.cores(), 'cores', odd=0.0))
    with caught(found, 'memory'):
        pages = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE')
        found.append(Row('memory', pages / GIB, 'GiB'))
    found.append(Row('versions', _versions(), same=True))
    misfits = []
    with caught(misfits, 'packages'):
        misfits += packages()
    found += misfits or [Row('packages', 'all fit')]
    driver = None
    with caught(found, 'driver'):
        driver = nvidia_driver()
    with caught(found, 'accelerator', _held()):
        found.append(accelerator(jax.default_backend(), driver))
    if driver:
        found.append(_driver(driver))


def _versions():
    names = ('ssl_jax', 'jax', 'jaxlib', 'libtpu', 'jax-cuda12-plugin', 'jax-cuda13-plugin')
    found = {name: installed(name) for name in names}
    words = [f'{name} {number}' for name, number in found.items() if number]
    return ', '.join([f'python {platform.python_version().rpartition(".")[0]}', *words])


def installed(name: str) -> str | None:
    """The version of a package, None if it is missing."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def packages() -> list[Row]:
    """A row for each package that is missing or of another version than ssl_jax and jax need."""
    found = {}
    for owner, extras in (('ssl_jax', ('',)), ('jax', JAX_EXTRAS)):
        if installed(owner) is None:
            fix = 'pip install -e .'
            found[owner] = Row(f'package {owner}', 'not installed', verdict='bad', next=fix)
            continue
        for line in metadata.requires(owner) or ():
            need = requirements.Requirement(line)
            here = installed(need.name)
            where = [e for e in extras if not need.marker or need.marker.evaluate({'extra': e})]
            if not where or (here is None and '' not in where):
                continue
            if here is None or not need.specifier.contains(here, prereleases=True):
                wanted = f'{need.name}{need.specifier}'
                row = Row(
                    f'package {need.name}',
                    here or 'missing',
                    expected=f'{wanted}, says {owner} {installed(owner)}',
                    verdict='bad',
                    next=f"pip install '{wanted}'",
                )
                found.setdefault(need.name, row)
    return list(found.values())


def accelerator(backend: str, driver: str | None) -> Row:
    """Whether jax uses the chips that are there: where it cannot, it falls back to the CPU.

    Args:
      backend: of jax.
      driver: of NVIDIA, None without one.
    """
    chips, gpus, kept = tpu_chips(), num_gpus(), os.environ.get('JAX_PLATFORMS', '')
    there = f'{chips} TPU chips' if chips else f'{max(gpus, 1)} NVIDIA GPU(s)'
    if backend == 'cpu' and (chips or gpus or driver):
        if kept == 'cpu':
            text = f'{there}, and JAX_PLATFORMS=cpu keeps jax off them'
            return Row('accelerator', text, verdict='warn', next='unset JAX_PLATFORMS')
        if chips:
            has, part, fix = installed('libtpu'), 'libtpu', "pip install 'ssl_jax[tpu]'"
        else:
            cuda = next((c for c, d in DRIVERS.items() if _at_least(driver, d)), '12')
            has = next(filter(None, (installed(f'jax-cuda{c}-plugin') for c in DRIVERS)), None)
            part, fix = "jax's plugin for CUDA", f"pip install 'jax[cuda{cuda}]'"
        text = f'{there}, and jax runs on the CPU: {part} '
        text += f'{has} did not start' if has else 'is missing'
        return Row('accelerator', text, verdict='bad', next=f'{_held()}; {WHY}' if has else fix)
    devices = jax.local_devices()
    kind, used = devices[0].device_kind, len(devices)
    memory = (devices[0].memory_stats() or {}).get('bytes_limit')
    text = f'{used} x {kind}' + (f', {memory / GIB:.0f} GiB each' if memory else '')
    if jax.process_count() > 1:
        text += f'; {jax.device_count()} in {jax.process_count()} processes'
    elif used < (chips or gpus):
        fix = 'unset TPU_VISIBLE_CHIPS, CUDA_VISIBLE_DEVICES'
        return Row('accelerator', text, expected=there, verdict='warn', next=fix)
    return Row('accelerator', text, same=True)


def _held():
    return (
        'end the program that holds the devices (nvidia-smi; sudo lsof -w /dev/accel* /dev/vfio/*)'
    )


def tpu_chips() -> int:
    """TPU chips attached to this machine, whether jax can use them or not."""
    try:  # private to jax; it knows the chips by their PCI numbers
        hardware = importlib.import_module('jax._src.hardware_utils')
        return hardware.num_available_tpu_chips_and_device_id()[0]
    except (ImportError, AttributeError, TypeError, OSError):
        return len(glob.glob('/dev/accel[0-9]*'))


def num_gpus() -> int:
    """NVIDIA GPUs attached to this machine."""
    return len(glob.glob('/dev/nvidia[0-9]*'))


def nvidia_driver() -> str | None:
    """Version of the driver, None without one.

    Raises:
      UserError: the driver does not answer.
    """
    if shutil.which('nvidia-smi') is None:
        return None
    command = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if answer.returncode:
        words = ' '.join((answer.stdout + answer.stderr).split())
        raise errors.UserError(f'nvidia-smi ends with code {answer.returncode}: {words}')
    return answer.stdout.split('\n')[0].strip() or None


def _driver(driver):
    """Whether the driver is new enough for the CUDA of jax's plugin."""
    cuda = next((c for c in DRIVERS if installed(f'jax-cuda{c}-plugin')), None)
    if cuda is None or _at_least(driver, DRIVERS[cuda]):
        return Row('driver', f'NVIDIA {driver}', same=True)
    older = ", or pip install 'jax[cuda12]'" if cuda == '13' else ''
    return Row(
        'driver',
        f'NVIDIA {driver}',
        expected=f'{DRIVERS[cuda]} or newer for CUDA {cuda}',
        verdict='bad',
        next=f'install a newer driver{older}',
        same=True,
    )


def _at_least(found, wanted):
    try:
        return version.parse(found or '0') >= version.parse(wanted)
    except version.InvalidVersion:
        return False
