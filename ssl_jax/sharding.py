# SPDX-License-Identifier: Apache-2.0
"""Device mesh (data, fsdp, tensor) and the sharding of every array.

Programs are written for the global batch; XLA inserts the collectives from these shardings.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from ssl_jax.run import errors, trees

AXES = ('data', 'fsdp', 'tensor')
BATCH = P(('data', 'fsdp'))

# (regex on the parameter path, dimension counted from the end that the tensor axis splits).
TENSOR_RULES = (
    (r'(qkv|fc1|w12)/(kernel|bias)$', -1),  # columns: each device has some heads or hidden units
    (r'(attn/proj|fc2|w3)/kernel$', -2),  # rows: partial sums are added up
    (r'last_layer/weight(_[vg])?$', -1),  # each device has some prototypes
)
MAX_FSDP = 16  # with 128, shards of 1,280 channels have 10 rows, and XLA gathers by all-reduce
# Paths whose leading axis is the scan over blocks; splitting it would gather every iteration.
STACKED = re.compile(r'(^|/)\w*blocks/')
# Flags of libtpu for a step: {kind of device: {flag: (value, reason)}}. 'TPU' is for every kind,
# the row of a kind goes over it, 'fsdp' is for meshes with that axis. The numbers behind are in
# experiments/tpu.
FLAGS = {
    'TPU': {
        'xla_tpu_scoped_vmem_limit_kib': (
            24 * 1024,
            'a product may use 24 MiB of vector memory instead of 16, for larger windows',
        ),
    },
    'TPU v6 lite': {
        'xla_tpu_scoped_vmem_limit_kib': (
            32 * 1024,
            '2 to 5 % fewer cycles than with 24 MiB in blocks of MAE-L and DINOv2-L; 64 are worse',
        ),
    },
    'TPU7x': {
        'xla_tpu_scoped_vmem_limit_kib': (
            32 * 1024,
            '2 to 10 % fewer cycles than with 24 MiB in blocks of MAE-L and DINOv2-L',
        ),
        'xla_tpu_control_large_2nd_minor_layout_for_x16': (
            False,
            'the kernels in kernels/tpu count rows in eights; on this chip XLA would lay out '
            'bfloat16 in tiles of 16 rows, for which they do not compile',
        ),
    },
    'fsdp': {
        'xla_jf_spmd_threshold_for_windowed_einsum_mib': (
            1_000_000,  # never
            'XLA would overlap the gathers of fsdp by cutting each product into parts and passing '
            'the weights around (1,362 collective-permutes in a step of MAE-L on four v5e chips): '
            'by its own estimate slower than no fsdp at all, and plain gathers are faster',
        ),
    },
}


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence | None = None
) -> Mesh:
    """A mesh over all devices (of all processes); for -1 see `mesh_sizes`."""
    devices = jax.devices() if devices is None else devices
    slices = num_slices(devices)
    sizes = mesh_sizes(data, fsdp, tensor, len(devices), slices)
    if slices > 1:  # the network between them is slow: only gradients cross it, once per step
        grid = mesh_utils.create_hybrid_device_mesh(
            (sizes[0] // slices, *sizes[1:]),
            (slices, 1, 1),
            devices,
            allow_split_physical_axes=True,
        )
    else:  # jax.make_mesh cannot place 16 of 4 x 8 chips
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    # The default axis type is Explicit, under which the reshape of patchify raises.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def num_slices(devices: Sequence) -> int:
    return len({getattr(d, 'slice_index', 0) for d in devices})


def mesh_sizes(
    data: int, fsdp: int, tensor: int, count: int, slices: int = 1
) -> tuple[int, int, int]:
    """(data, fsdp, tensor) for `count` devices in `slices`; an axis of -1 takes what is left.

    If data and fsdp are both -1, fsdp is the largest divisor up to MAX_FSDP (within a slice) and
    data the rest: the state is split far enough to be small, and shards still fill TPU tiles.
    """
    sizes = [data, fsdp, tensor]
    known = math.prod(s for s in sizes if s != -1)
    shape = f'data={data},fsdp={fsdp},tensor={tensor}'
    if tensor == -1 and -1 in (data, fsdp) or any(s == 0 or s < -1 for s in sizes):
        raise errors.UserError(
            f'mesh {shape}: sizes are positive, and -1 (the rest) is for one axis or for data and '
            f'fsdp.'
        )
    if -1 in sizes:
        if count % known:
            raise errors.UserError(
                f'mesh {shape} does not divide {count} devices; '
                f'choose sizes whose product divides it.'
            )
        rest = count // known
        if data == fsdp == -1:
            inside = rest // slices
            # Over all of 4x4 chips libtpu adds gradients by all-reduce, a third more to send.
            most = MAX_FSDP // 2 if inside == MAX_FSDP else MAX_FSDP
            sizes[1] = max(n for n in range(1, most + 1) if inside % n == 0)
            rest //= sizes[1]
        sizes[sizes.index(-1)] = rest
    if math.prod(sizes) != count:
        raise errors.UserError(
            f'mesh {shape} needs {math.prod(sizes)} devices, there are {count}; '
            f'set one axis to -1 to use them all.'
        )
    if sizes[0] % slices:
        raise errors.UserError(
            f'mesh {shape} on {slices} slices: fsdp and tensor stay within a slice, so data is '
            f'a multiple of {slices}; set mesh.data={slices}.'
        )
    return tuple(sizes)


def constrain(x: jax.Array, multiple: int = 1) -> jax.Array:
    """Splits the rows of an activation over the batch axes of the current mesh.

    Without a mesh, or if the rows in units of `multiple` do not divide (the dummy image that
    initializes parameters), x is returned as it is.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[0] % (mesh.shape['data'] * mesh.shape['fsdp'] * multiple):
        return x
    return jax.lax.with_sharding_constraint(x, BATCH)


def whole(x: jax.Array) -> jax.Array:
    """Replicates a small array on every device of the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, P())


def num_devices() -> int:
    """Devices of the current mesh; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def only_rows(count: int) -> bool:
    """Whether the current mesh splits `count` rows evenly and has no tensor axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.shape['tensor'] == 1 and count % mesh.size == 0


def per_device(fn: Callable, split: int, whole: int = 0) -> Callable:
    """`fn`, run per device on its part of the batch: for kernels, which XLA cannot split.

    Args:
      fn: function of arrays.
      split: number of leading arguments that are split over the batch, as all results are.
      whole: number of further arguments, replicated.
    """
    if num_devices() == 1:
        return fn
    specs = (BATCH,) * split + (P(),) * whole
    return jax.shard_map(fn, in_specs=specs, out_specs=BATCH, check_vma=False)


def spec_for(path: str, shape: tuple[int, ...], mesh_shape: dict[str, int]) -> P:
    """PartitionSpec of an array, from its path and shape only.

    TENSOR_RULES place the tensor axis; fsdp then splits the largest remaining dimension that it
    divides. Arrays of one dimension (biases, norms, scalars) stay whole: they are small.
    """
    spec = [None] * len(shape)
    first = 1 if STACKED.search(path) else 0
    tensor, fsdp = mesh_shape['tensor'], mesh_shape['fsdp']
    if tensor > 1:
        for pattern, dim in TENSOR_RULES:
            if re.search(pattern, path) and shape and shape[dim] % tensor == 0:
                spec[dim] = 'tensor'
    if fsdp > 1 and len(shape) - first >= 2:
        dims = range(first, len(shape))
        free = [d for d in dims if not spec[d] and shape[d] > 1 and shape[d] % fsdp == 0]
        if free:
            spec[max(free, key=lambda d: shape[d])] = 'fsdp'
    return P(*spec)


def infer(tree: Any, mesh: Mesh) -> Any:
    """NamedShardings for a tree of arrays or ShapeDtypeStructs (parameters, moments, EMA alike)."""
    shape = dict(mesh.shape)
    return trees.map_named(
        lambda path, x: NamedSharding(mesh, spec_for(path, x.shape, shape)), tree
    )


def replicated_fraction(tree: Any, shardings: Any, mesh: Mesh) -> float:
    """Share of the bytes of `tree` that no axis splits, in [0, 1]; 0 on a mesh of data only."""
    if mesh.shape['fsdp'] * mesh.shape['tensor'] == 1:
        return 0.0
    whole = total = 0
    for x, s in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings), strict=True):
        size = math.prod(x.shape) * np.dtype(x.dtype).itemsize if x.shape else 0
        total += size
        whole += size if s.is_fully_replicated else 0
    return whole / max(total, 1)


def check_replication(
    tree: Any, shardings: Any, mesh: Mesh, limit: float = 0.05, min_bytes: int = 2**26
) -> None:
    """Raises UserError if more than `limit` of a large state is replicated."""
    total = sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
    fraction = replicated_fraction(tree, shardings, mesh)
    if total > min_bytes and fraction > limit:
        raise errors.UserError(
            f'{fraction:.0%} of the training state ({total / 2**30:.2f} GiB) stays replicated on '
            f'mesh {dict(mesh.shape)}; choose an fsdp size that divides the widths.'
        )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())


def compiler_options(mesh: Mesh, flags: Mapping[str, Any] | None = None) -> dict | None:
    """Options of XLA for a step on `mesh`, for `jax.jit`; None for its defaults.

    Args:
      mesh: of the step; its devices need not be there.
      flags: a user's {flag: value}, over those of `FLAGS`; None leaves a flag to XLA.

    Raises:
      UserError: XLA of this platform refuses one of `flags`.
    """
    device, options = mesh.devices.flat[0], {}
    if device.platform == 'tpu':
        options = {name: value for name, (value, _) in FLAGS['TPU'].items()}
        options |= {name: value for name, (value, _) in FLAGS.get(device.device_kind, {}).items()}
        if mesh.shape['fsdp'] > 1:
            options |= {name: value for name, (value, _) in FLAGS['fsdp'].items()}
    options |= flags or {}
    options = {name: value for name, value in options.items() if value is not None}
    if flags:
        _try(options, flags, mesh)
    return options or None


def _try(options, flags, mesh):
    """Compiles next to nothing with `options`: XLA alone knows its flags."""
    mine = [d for d in mesh.devices.flat if d.process_index == jax.process_index()]
    where = SingleDeviceSharding((mine or list(mesh.devices.flat))[0])
    x = jax.ShapeDtypeStruct((), np.float32, sharding=where)
    try:
        jax.jit(lambda x: x + 1, compiler_options=options).lower(x).compile()
    except jax.errors.JaxRuntimeError as error:
        said = ' '.join(str(error).split()).removeprefix('INVALID_ARGUMENT: ').rstrip('. ')
        named = [flag for flag in flags if flag in said] or list(flags)
        shown = ', '.join(f'xla.{flag}={flags[flag]}' for flag in named)
        raise errors.UserError(
            f'XLA for {mesh.devices.flat[0].device_kind} refuses {shown}: {said}; correct the flag '
            f'or leave it out.'
        ) from error


def batch_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, BATCH)


def check_batch(batch_size: int, accum_steps: int, mesh: Mesh) -> None:
    """Raises UserError if the batch does not split over micro-batches and batch axes."""
    ways = mesh.shape['data'] * mesh.shape['fsdp'] * accum_steps
    if batch_size % ways:
        raise errors.UserError(
            f'batch_size={batch_size} does not split over data x fsdp x accum_steps = '
            f'{mesh.shape["data"]} x {mesh.shape["fsdp"]} x {accum_steps}; '
            f'use a multiple of {ways}.'
        )


def process_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
    """Sorted rows of the global batch that the devices of this process hold.

    Read from the sharding: `rows[process::n]` is wrong if the tensor axis spans hosts, since
    several processes then hold the same rows.
    """
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    rows = [np.arange(batch_size)[index] for index in indices.values()]
    return np.unique(np.concatenate(rows))


def to_global(batch: Any, mesh: Mesh, rows: np.ndarray, batch_size: int) -> Any:
    """Host arrays holding `rows` of the global batch -> global jax.Arrays split over the mesh."""
    sharding = batch_sharding(mesh)

    def put(x):
        if jax.process_count() == 1:
            return jax.device_put(x, sharding)
        return jax.make_array_from_callback(
            (batch_size, *x.shape[1:]),
            sharding,
            lambda index: x[np.searchsorted(rows, np.arange(batch_size)[index[0]])],
        )

    return jax.tree.map(put, batch)
