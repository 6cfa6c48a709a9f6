# SPDX-License-Identifier: Apache-2.0
"""Chips: topologies by name, devices per chip, and our kernels compiled for each of them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

import tiny
from ssl_jax import sharding
from ssl_jax.kernels.segments import Segment, tokens_per_row
from ssl_jax.kernels.tpu import attention, rows
from ssl_jax.plan import chips, compile, report

ONE_HOST = {'v4': '2x2x1', 'v5e': '2x2', 'v5p': '2x2x1', 'v6e': '2x2', 'tpu7x': '2x2x1'}
SHORT, LONG = Segment(32, 50), Segment(1, 396, 4)


def needs_libtpu():
    pytest.importorskip('libtpu', reason="libtpu is missing: pip install 'ssl_jax[plan]'")


# Names


@pytest.mark.parametrize(
    'name, near',
    [
        ('v5e:3x4', 'v5e:2x4'), ('v5:4x4', 'v5e:4x4'), ('v5:4x4x4', 'v5p:4x4x4'),
        ('v5p:64', 'v5p:4x4x4'), ('ironwood:4x4x4', 'tpu7x:4x4x4'), ('v7x:2x2x1', 'tpu7x:2x2x1'),
        ('v7:4x4', 'tpu7x:2x2x4'), ('TPU7x:4x4x4', 'tpu7x:4x4x4'), ('tpu-v7x:8', 'tpu7x:2x2x2'),
        ('tpu7x:3x3x3', 'tpu7x:2x4x4'), ('trillium:4x4', 'v6e:4x4'),
        # With a dash accelerator types count cores; v5e and v6e have one per chip.
        ('tpu7x-128', 'tpu7x:4x4x4'), ('v5p-128', 'v5p:4x4x4'), ('v4-8', 'v4:2x2x1'),
        ('v6e-16', 'v6e:4x4'), ('v5litepod-16', 'v5e:4x4'),
    ],
)  # fmt: skip
def test_an_unknown_topology_is_answered_with_the_nearest(name, near):
    with pytest.raises(ValueError, match=f"no topology '{name}'; did you mean '{near}'"):
        chips.parse(name)


def test_every_name_is_read_as_it_is_written():
    for name in chips.names():
        chip, shape = chips.parse(name)
        assert f'{chip.name}:{"x".join(map(str, shape))}' == name


# Devices


@pytest.mark.parametrize('name', chips.CHIPS)
def test_a_host_has_four_chips_with_as_many_devices_as_the_table_says(name):
    needs_libtpu()
    devices = chips.devices(f'{name}:{ONE_HOST[name]}')
    assert len(devices) == 4 * chips.CHIPS[name].devices
    assert len({tuple(d.coords) for d in devices}) == 4


@pytest.mark.parametrize(
    'name, slices, want',
    [
        ('tpu7x:2x2x1', 1, (1, 8)), ('tpu7x:2x2x2', 1, (2, 8)), ('tpu7x:2x4x4', 1, (4, 16)),
        ('tpu7x:4x4x4', 1, (8, 16)), ('tpu7x:4x8x8', 1, (32, 16)),
        ('tpu7x:2x2x1', 2, (2, 8)), ('tpu7x:4x4x4', 2, (16, 16)), ('v5e:4x4', 2, (4, 8)),
    ],
)  # fmt: skip
def test_a_mesh_has_every_device_once_and_fsdp_within_a_slice(name, slices, want):
    needs_libtpu()
    devices = chips.devices(name, slices)
    mesh = sharding.make_mesh(data=-1, fsdp=-1, devices=devices)
    assert mesh.devices.shape == (*want, 1)
    assert {d.id for d in mesh.devices.flat} == {d.id for d in devices}
    assert all(sharding.num_slices(row) == 1 for row in mesh.devices[:, :, 0])


def test_the_two_devices_of_a_chip_exchange_shards_on_a_host():
    needs_libtpu()
    mesh = sharding.make_mesh(fsdp=2, devices=chips.devices('tpu7x:2x2x1'))
    assert all(len({tuple(d.coords) for d in row}) == 1 for row in mesh.devices[:, :, 0])


def test_a_plan_says_chips_and_devices_where_they_differ():
    needs_libtpu()
    config = tiny.config(dtype='bfloat16', mesh__fsdp=-1, method__drop_path=0.0)
    devices, chip = chips.devices('tpu7x:2x2x1'), chips.CHIPS['tpu7x']
    found = compile.plan(config, devices, chip)
    found.update(topology='tpu7x:2x2x1', command='ssl_jax plan')
    assert (found['chips'], found['devices']) == (4, 8)
    assert found['images_per_second_per_chip'] == found['images_per_second'] / 4
    assert found['mfu'] == pytest.approx(found['flops'] / found['step_seconds'] / (4 * 2307e12))
    assert {'all-gather', 'all-reduce'} <= {row['kind'] for row in found['collectives']}
    text = report.text(found)
    assert '4 chips of 2 devices, mesh fsdp 8' in text
    assert 'batch 16 = 2 per device' in text and 'HBM per device' in text
    assert 'of 94.75' in text and 'its half of the links' in text
    assert 'by XLA alone, without the kernels' in text  # as the tests have them off
    found['xla_alone'] = found | {'mfu': 0.125}
    assert 'without our kernels, by XLA alone: 0.' in report.text(found)
    assert 'MFU 0.125' in report.text(found)
    found['xla_alone'] = {'fits': False, 'over_gib': 1.5}
    assert 'without our kernels it does not fit, by 1.50 GiB' in report.text(found)


# Kernels


def programs(put, dtype):
    """{kernel: (function, its abstract arguments)} on one device."""

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=put)

    short, long = (tokens_per_row((s,)) for s in (SHORT, LONG))
    vector, kept = array(1, 128, dtype='float32'), Segment(2, 37, 3)
    images, ids = Segment(4, 37, 3), [array(1, 2, dtype='int32')]
    moved = array(tokens_per_row((images,)), 128)
    found = {
        'layer_norm': (
            lambda x, s, b: rows.layer_norm(x, s, b, 1e-6), (array(short, 128), vector, vector),
        ),
        'layer_norm_gradient': (
            lambda x, grad, other, s: rows.layer_norm_gradient(x, grad, other, scale=s, eps=1e-6),
            (*[array(short, 128)] * 3, vector),
        ),
        'sum_rows': (rows.sum_rows, (array(short, 128),)),
        'move_images': (
            lambda i, x: rows.move_images((images,), (kept,), (1.5,), i, x), (ids, moved),
        ),
    }  # fmt: skip
    for name, segment, count in (('short', SHORT, short), ('long', LONG, long)):
        found[f'attention of {name} images'] = (
            lambda qkv, s=segment: attention.attention(qkv, 2, (s,)),
            (array(count, 3 * 128),),
        )
        found[f'gradient of {name} images'] = (
            lambda qkv, grad, s=segment: attention.gradient(qkv, grad, 2, (s,)),
            (array(count, 3 * 128), array(count, 128)),
        )
    return found


@pytest.mark.parametrize('name', chips.CHIPS)
def test_every_kernel_compiles_for_the_chip(name):
    needs_libtpu()
    device = chips.devices(f'{name}:{ONE_HOST[name]}')[0]
    options = sharding.compiler_options(sharding.make_mesh(devices=[device]))
    for kernel, (fn, args) in programs(SingleDeviceSharding(device), jnp.bfloat16).items():
        compiled = jax.jit(fn, compiler_options=options).lower(*args).compile()
        assert 'tpu_custom_call' in compiled.as_text(), kernel
