# SPDX-License-Identifier: Apache-2.0
"""Numbers of TPU chips, and topologies as devices that libtpu compiles for without a TPU."""

import dataclasses
import functools
import importlib.util
import math
import os
import pathlib
import re
import tempfile

import jax

from ssl_jax.run import errors


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of chip; all numbers are of one device of JAX, which may be half a chip."""

    name: str
    hbm_gib: float  # usable by a program; the compiler keeps the rest of the nominal size
    peak: float  # dense bfloat16 FLOP/s
    clock: float  # Hz at which the matrix units reach that peak: cycles = seconds x clock
    hbm: float  # bytes/s to and from memory
    ici: float  # bytes/s sent to neighbours, all links together
    dims: int  # of its torus
    cores: int = 1  # that share the steps of a kernel
    devices: int = 1  # per chip

    @property
    def flops_per_cycle(self) -> float:
        return self.peak / self.clock


# Peak, nominal HBM (32, 16, 95, 32 GB; 1.23, 0.82, 2.77, 1.64 TB/s) and interconnect (2400, 1600,
# 4800, 3584 Gbit/s one way) are from cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}. hbm_gib is what
# libtpu reports when a program does not fit. The clock is peak / (2 x units x width^2): 8 units of
# 128 x 128 in v4 and v5p, 4 in v5e, 4 of 256 x 256 in v6e and in each device of tpu7x (Ironwood).
# tpu7x has two devices per chip, each with half of its 2,307 TFLOP/s, 192 GiB, 7,380 GB/s and
# 1,200 GB/s both ways (docs.cloud.google.com/tpu/docs/tpu7x); what the two send each other does not
# use these links.
CHIPS = {
    'v4': Chip('v4', 30.5, 275e12, 1.05e9, 1.23e12, 300e9, 3, cores=2),
    'v5e': Chip('v5e', 15.75, 197e12, 1.5e9, 0.82e12, 200e9, 2),
    'v5p': Chip('v5p', 95.74, 459e12, 1.75e9, 2.77e12, 600e9, 3, cores=2),
    'v6e': Chip('v6e', 31.25, 918e12, 1.75e9, 1.64e12, 448e9, 2),
    'tpu7x': Chip('tpu7x', 94.75, 1153.5e12, 2.2e9, 3.69e12, 300e9, 3, devices=2),
}
NICKNAMES = {'ironwood': 'tpu7x', 'trillium': 'v6e', 'v5lite': 'v5e', 'v5litepod': 'v5e'}
FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
CUBES = (
    '2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8', '8x8x16', '8x16x16',
    '16x16x16', '16x16x24',
)  # fmt: skip


def names() -> list[str]:
    """Topologies as one rents them."""
    return [f'{c.name}:{s}' for c in CHIPS.values() for s in (FLAT if c.dims == 2 else CUBES)]


def parse(name: str) -> tuple[Chip, tuple[int, ...]]:
    """'v5e:4x4' -> (Chip, (4, 4)).

    Raises:
      UserError: there is no such topology; it names the nearest.
    """
    if name not in names():
        raise errors.UserError(f"There is no topology '{name}'; did you mean '{_nearest(name)}'?")
    chip, _, shape = name.partition(':')
    return CHIPS[chip], tuple(map(int, shape.split('x')))


def _nearest(name):
    """The valid name with a similar chip and a similar number of chips.

    'v5p-128' and 'tpu7x-128' count cores, as accelerator types do: they have 64 chips.
    """
    word, _, shape = name.lower().partition(':')
    if cores := re.fullmatch(r'(.+)-(\d+)', word):
        word, shape = cores.groups()
    sizes = list(map(int, re.findall(r'\d+', shape)))
    chip = CHIPS[_kind(word, len(sizes))]
    count = math.prod(sizes) / (chip.cores * chip.devices if cores else 1)
    valid = [n for n in names() if n.startswith(f'{chip.name}:')]
    return min(valid, key=lambda n: abs(math.prod(parse(n)[1]) - count)) if sizes else valid[3]


def _kind(word, dims):
    """The name of a chip: of its nickname, else of its generation and dimensions, else similar."""
    word = word.removeprefix('tpu-').removeprefix('tpu ')
    if word in CHIPS or word in NICKNAMES:
        return NICKNAMES.get(word, word)
    digits = re.findall(r'\d', word)
    found = [c for c in CHIPS.values() if digits and digits[0] in c.name] or list(CHIPS.values())
    found = [c.name for c in found if c.dims == dims] or [c.name for c in found]
    return errors.close(word, found, cutoff=0.0)[0]


@functools.cache
def _schedules():
    """Temporary folder for the schedules of libtpu's programs.

    libtpu reads the flag when it is loaded: call this before.
    """
    folder = tempfile.TemporaryDirectory(prefix='ssl_jax_plan_')
    flags = (
        f'--xla_jf_dump_to={folder.name} --xla_jf_dump_llo_text=true '
        f'--xla_jf_dump_llo_pass_label_regex=final_bundles'
    )
    given = os.environ.get('LIBTPU_INIT_ARGS', '')
    os.environ['LIBTPU_INIT_ARGS'] = f'{given} {flags}'.strip()
    return folder


def compile_program(lowered) -> tuple[jax.stages.Compiled, dict[str, int]]:
    """(compiled, {name: bundles}) of a lowered program and its kernels.

    A bundle is what a core issues in a cycle. XLA has no estimate for Pallas kernels; this counts
    their instructions, loops once.
    """
    folder = pathlib.Path(_schedules().name)
    for old in folder.iterdir():
        old.unlink()
    compiled = lowered.compile()
    found = {}
    for path in folder.glob('*-schedule-analysis_final_bundles.txt'):
        total = re.search(r'total scheduled bundles:\s+(\d+)', path.read_text())
        if total:  # <time>-<name of the instruction>-<pass>-schedule-analysis...
            found[path.name.split('-', 1)[1].rsplit('-', 3)[0]] = int(total.group(1))
    return compiled, found


def devices(name: str, slices: int = 1) -> list:
    """Devices of `slices` slices of a topology: they compile and cannot run.

    Raises:
      UserError: libtpu is missing, or there is no such topology.
    """
    chip, shape = parse(name)
    if importlib.util.find_spec('libtpu') is None:
        raise errors.UserError(
            "planning compiles with libtpu, which is missing: pip install 'ssl_jax[plan]'."
        )
    quiet = {
        'TPU_SKIP_MDS_QUERY': '1',  # it would wait for the metadata server of a TPU VM
        'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',  # a training run may hold the chips
        'TPU_MIN_LOG_LEVEL': '3',
        'TPU_STDERR_LOG_LEVEL': '3',
        'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
        'TPU_WORKER_HOSTNAMES': 'localhost',
    }
    for key, value in quiet.items():
        os.environ.setdefault(key, value)
    _schedules()
    from jax.experimental import topologies

    options = {'num_slices': slices} if slices > 1 else {}
    if chip.name == 'v4':  # else the two cores of a chip are two devices; tpu7x has only those
        options['chip_config_name'] = 'megacore'
    if math.prod(shape) == 1:
        options['chips_per_host_bounds'] = [1, 1, 1]
    try:
        return topologies.get_topology_desc(platform='tpu', topology_name=name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise errors.UserError(f'libtpu has no topology {name} x {slices}: {error}') from error
