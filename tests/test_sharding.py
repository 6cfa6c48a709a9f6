# SPDX-License-Identifier: Apache-2.0
"""Where arrays live is a function of path and shape; bad meshes are explained."""

import math

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import tiny
from ssl_jax import methods, sharding
from ssl_jax.plan import chips


@pytest.mark.parametrize(
    'path,shape,want',
    [
        ('encoder/blocks/attn/qkv/kernel', (4, 32, 96), P(None, 'fsdp', 'tensor')),
        ('encoder/blocks/attn/proj/kernel', (4, 32, 32), P(None, 'tensor', 'fsdp')),
        ('opt_state/mu/encoder/blocks/mlp/fc2/kernel', (4, 128, 32), P(None, 'tensor', 'fsdp')),
        ('encoder/blocks/norm1/scale', (4, 32), P(None, None)),
        ('encoder/norm/bias', (32,), P(None)),
        ('encoder/pos_embed', (1, 65, 32), P(None, None, 'fsdp')),
        ('encoder/pos_embed', (1, 65, 33), P(None, None, None)),
        ('step', (), P()),
    ],
)
def test_the_spec_is_a_function_of_path_and_shape(path, shape, want):
    assert sharding.spec_for(path, shape, {'data': 2, 'fsdp': 2, 'tensor': 2}) == want


def test_the_stack_axis_is_never_split():
    spec = sharding.spec_for('encoder/blocks/x/kernel', (64, 2, 3), dict(fsdp=2, tensor=1))
    assert spec[0] is None


def test_minus_one_takes_the_remaining_devices():
    mesh = sharding.make_mesh(data=-1, fsdp=2, tensor=2)
    assert dict(mesh.shape) == {'data': len(jax.devices()) // 4, 'fsdp': 2, 'tensor': 2}


@pytest.mark.parametrize(
    'count, slices, want',
    [(8, 1, (1, 8)), (64, 1, (4, 16)), (48, 1, (3, 16)), (24, 1, (2, 12)), (64, 4, (8, 8)),
     (128, 2, (8, 16)), (32, 4, (4, 8)), (16, 1, (2, 8))],
)  # fmt: skip
def test_data_and_fsdp_of_minus_one_split_the_state_at_most_16_times(count, slices, want):
    assert sharding.mesh_sizes(-1, -1, 1, count, slices) == (*want, 1)


@pytest.mark.parametrize(
    'sizes,message',
    [
        (dict(data=3), 'needs 3 devices, there are 8'),
        (dict(data=-1, fsdp=3), 'does not divide 8 devices'),
        (dict(data=-1, tensor=-1), 'for one axis or for data and fsdp'),
        (dict(data=0), 'sizes are positive'),
    ],
)
def test_an_impossible_mesh_is_one_sentence(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(**sizes)


def test_a_batch_lands_in_order_on_every_mesh():
    for sizes in (dict(data=8), dict(data=2, fsdp=2, tensor=2), dict(data=1, tensor=8)):
        mesh = sharding.make_mesh(**sizes)
        rows = sharding.process_rows(mesh, 16)
        x = sharding.to_global({'a': np.arange(16)}, mesh, rows, 16)['a']
        np.testing.assert_array_equal(x, np.arange(16))
        assert x.sharding.is_equivalent_to(sharding.batch_sharding(mesh), 1)


def test_a_large_state_that_stays_replicated_is_refused():
    mesh = sharding.make_mesh(data=1, fsdp=8)
    tree = {'kernel': jax.ShapeDtypeStruct((4099, 4099), np.float32)}
    with pytest.raises(ValueError, match='stays replicated'):
        sharding.check_replication(tree, sharding.infer(tree, mesh), mesh)


def test_every_pod_has_the_mesh_of_the_recipes():
    pytest.importorskip('libtpu', reason="libtpu is missing: pip install 'ssl_jax[plan]'")
    for name in chips.names():
        if math.prod(chips.parse(name)[1]) <= 256:  # 16 of 4 x 8 chips are no rectangle
            mesh = sharding.make_mesh(-1, -1, devices=chips.devices(name))
            assert mesh.shape['fsdp'] == (8 if mesh.size == 16 else min(mesh.size, 16)), name


@pytest.mark.parametrize('group_size, use', [(12, 8), (8, None), (4, None), (3, 2), (6, 4)])
def test_groups_that_do_not_divide_among_devices_are_named_with_the_size_to_use(group_size, use):
    method = methods.make(tiny.dinov2(method__group_size=group_size))
    said = list(method.warnings(batch_size=48, ways=6))
    assert len(said) == (use is not None)
    assert all(line.endswith(f'use method.group_size={use}.') for line in said)


def test_a_method_without_groups_has_no_warning():
    assert list(methods.make(tiny.config()).warnings(batch_size=48, ways=6)) == []
