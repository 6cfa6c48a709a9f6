# SPDX-License-Identifier: Apache-2.0
"""The device mesh (data, fsdp, tensor) and where every array lives on it.

Programs are written for the global batch; XLA inserts the collectives from these shardings.
"""

import math
import re

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ('data', 'fsdp', 'tensor')
BATCH = P(('data', 'fsdp'))

# (regex on the parameter path, dimension counted from the end that the tensor axis splits).
TENSOR_RULES = (
    (r'(qkv|fc1|w12)/(kernel|bias)$', -1),  # columns: each device owns some heads or hidden units
    (r'(attn/proj|fc2|w3)/kernel$', -2),  # rows: partial sums are added up
    (r'last_layer/weight_[vg]$', -1),  # each device owns some prototypes
)
MAX_FSDP = 16  # of 1,280 channels over 128 chips 10 rows are left, and XLA gathers by all-reduce
# Paths whose leading axis is the scan over blocks; splitting it would gather every iteration.
STACKED = re.compile(r'(^|/)\w*blocks/')


def make_mesh(data=-1, fsdp=1, tensor=1, devices=None):
    """A mesh over all devices (of all processes); for -1 see `mesh_sizes`."""
    devices = jax.devices() if devices is None else devices
    slices = len({getattr(d, 'slice_index', 0) for d in devices})
    sizes = mesh_sizes(data, fsdp, tensor, len(devices), slices)
    if slices > 1:  # the network between them is slow: only gradients cross it, once per step
        grid = mesh_utils.create_hybrid_device_mesh(
            (sizes[0] // slices, *sizes[1:]),
            (slices, 1, 1),
            devices,
            allow_split_physical_axes=True,
        )
    else:  # not jax.make_mesh, which knows no place for 16 of 4 x 8 chips
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    # Said explicitly: the default axis type is Explicit, under which a patchify reshape raises.
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def mesh_sizes(data, fsdp, tensor, count, slices=1):
    """(data, fsdp, tensor) for `count` devices in `slices`; an axis of -1 takes what is left.

    Where both data and fsdp are -1, fsdp takes the largest divisor up to MAX_FSDP (within a slice)
    and data the rest: copies of a state that is split far enough to be small, with shards that
    still fill the tiles of a TPU.
    """
    sizes = [data, fsdp, tensor]
    known = math.prod(s for s in sizes if s != -1)
    shape = f'data={data},fsdp={fsdp},tensor={tensor}'
    if tensor == -1 and -1 in (data, fsdp) or any(s == 0 or s < -1 for s in sizes):
        raise ValueError(
            f'mesh {shape}: sizes are positive, and -1 (the rest) is for one axis or for data and '
            f'fsdp.'
        )
    if -1 in sizes:
        if count % known:
            raise ValueError(
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
        raise ValueError(
            f'mesh {shape} needs {math.prod(sizes)} devices, there are {count}; '
            f'set one axis to -1 to use them all.'
        )
    if sizes[0] % slices:
        raise ValueError(
            f'mesh {shape} on {slices} slices: fsdp and tensor stay within a slice, so data is '
            f'a multiple of {slices}; set mesh.data={slices}.'
        )
    return tuple(sizes)


def constrain(x, spec=BATCH, multiple=1):
    """Constrains an activation to `spec` on the current mesh.

    Nothing happens where there is no mesh, or where the leading dimension, in multiples of so many
    rows, does not divide (the single dummy image that parameters are initialised with).
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[0] % (mesh.shape['data'] * mesh.shape['fsdp'] * multiple):
        return x
    return jax.lax.with_sharding_constraint(x, spec)


def whole(x):
    """Constrains a small array to be whole on every device of the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, P())


def num_devices():
    """Of the current mesh; 1 where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def only_rows(count):
    """Whether the current mesh splits `count` rows evenly and nothing else: no tensor axis."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.empty or mesh.shape['tensor'] == 1 and count % mesh.size == 0


def per_device(fn, split, whole=0):
    """fn, run on each device for its own part of the batch: for kernels, which XLA cannot split.

    The first `split` arguments are split over the batch (`only_rows`), and all results; `whole`
    more arguments are the same everywhere.
    """
    if num_devices() == 1:
        return fn
    specs = (BATCH,) * split + (P(),) * whole
    return jax.shard_map(fn, in_specs=specs, out_specs=BATCH, check_vma=False)


def path_str(path):
    """A tree path as 'encoder/blocks/attn/qkv/kernel'."""
    return '/'.join(str(getattr(k, 'key', getattr(k, 'name', getattr(k, 'idx', k)))) for k in path)


def spec_for(path, shape, mesh_shape):
    """The PartitionSpec of one array: a function of its path and shape only.

    The tensor axis by TENSOR_RULES; then the largest remaining dimension that `fsdp` divides goes
    to fsdp.  Arrays of one dimension (biases, norms, scalars) stay whole: their bytes do not count.
    """
    spec = [None] * len(shape)
    first = 1 if STACKED.search(path) else 0
    tensor, fsdp = mesh_shape['tensor'], mesh_shape['fsdp']
    if tensor > 1:
        for pattern, dim in TENSOR_RULES:
            if re.search(pattern, path) and shape and shape[dim] % tensor == 0:
                spec[dim] = 'tensor'
    if fsdp > 1 and len(shape) - first >= 2:
        free = [d for d in range(first, len(shape)) if spec[d] is None and shape[d] % fsdp == 0]
        free = [d for d in free if shape[d] > 1]
        if free:
            spec[max(free, key=lambda d: shape[d])] = 'fsdp'
    return P(*spec)


def infer(tree, mesh):
    """NamedShardings for a tree of arrays or ShapeDtypeStructs (parameters, moments, EMA alike)."""
    shape = dict(mesh.shape)
    return jax.tree_util.tree_map_with_path(
        lambda path, x: NamedSharding(mesh, spec_for(path_str(path), x.shape, shape)), tree
    )


def replicated_fraction(tree, shardings, mesh):
    """Share of the bytes of `tree` that no axis splits although fsdp could, 0..1."""
    if mesh.shape['fsdp'] * mesh.shape['tensor'] == 1:
        return 0.0
    whole = total = 0
    for x, s in zip(jax.tree.leaves(tree), jax.tree.leaves(shardings)):
        size = math.prod(x.shape) * np.dtype(x.dtype).itemsize if x.shape else 0
        total += size
        whole += size if s.is_fully_replicated else 0
    return whole / max(total, 1)


def check_replication(tree, shardings, mesh, limit=0.05, min_bytes=2**26):
    """Raises where more than `limit` of a large state stays whole on every device."""
    total = sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))
    fraction = replicated_fraction(tree, shardings, mesh)
    if total > min_bytes and fraction > limit:
        raise ValueError(
            f'{fraction:.0%} of the training state ({total / 2**30:.2f} GiB) stays replicated on '
            f'mesh {dict(mesh.shape)}; choose an fsdp size that divides the widths.'
        )


def replicated(mesh):
    return NamedSharding(mesh, P())


def compiler_options(mesh):
    """XLA's options for a step on `mesh`, for `jax.jit`; None for its defaults.

    On TPU a product may use 24 MiB of vector memory instead of 16, so its windows are larger. XLA
    would overlap the gathers of fsdp by cutting each product into parts and passing the weights
    around (1,362 collective-permutes in a step of MAE-L on four v5e chips), which its own estimate
    finds slower than no fsdp at all; plain gathers it finds faster (experiments/tpu).
    """
    if mesh.devices.flat[0].platform != 'tpu':
        return None
    options = {'xla_tpu_scoped_vmem_limit_kib': 24 * 1024}
    if mesh.shape['fsdp'] > 1:
        options['xla_jf_spmd_threshold_for_windowed_einsum_mib'] = 1_000_000  # never
    return options


def batch_sharding(mesh):
    return NamedSharding(mesh, BATCH)


def check_batch(batch_size, accum_steps, mesh):
    """The global batch must split evenly over micro-batches and over the batch axes."""
    ways = mesh.shape['data'] * mesh.shape['fsdp'] * accum_steps
    if batch_size % ways:
        raise ValueError(
            f'batch_size={batch_size} does not split over data x fsdp x accum_steps = '
            f'{mesh.shape["data"]} x {mesh.shape["fsdp"]} x {accum_steps}; '
            f'use a multiple of {ways}.'
        )


def uneven_groups(method, batch_size, mesh):
    """A sentence where groups of samples do not divide among the devices, else None.

    A group (DINOv2) is computed as one row of tokens. Rows that do not divide are exchanged
    between devices in every block: correct, and many times slower.
    """
    ways = mesh.shape['data'] * mesh.shape['fsdp']
    if not hasattr(method, 'groups') or method.groups(batch_size) % ways == 0:
        return None
    groups, own = method.groups(batch_size), batch_size // ways
    size = next(n for n in range(min(own, batch_size // groups), 0, -1) if own % n == 0)
    return (
        f'slow: groups of {batch_size // groups} images, {groups} in a batch, do not divide among '
        f'{ways} devices, which then exchange all activations: use method.group_size={size}.'
    )


def process_rows(mesh, batch_size):
    """Sorted rows of the global batch that this process's devices hold.

    Taken from the sharding itself: `rows[process::n]` would be wrong as soon as the tensor axis
    spans hosts, when several processes hold the same rows.
    """
    indices = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    rows = [np.arange(batch_size)[index] for index in indices.values()]
    return np.unique(np.concatenate(rows))


def to_global(batch, mesh, rows, batch_size):
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
