# SPDX-License-Identifier: Apache-2.0
"""The plan: what is read off an optimized program, and the plan of a tiny run by libtpu."""

import importlib.util
import json
import os
import pathlib

import jax
import pytest

import tiny
from methods.test_methods import shrunk
from ssl_jax import config as config_lib
from ssl_jax import methods, plan, sharding
from ssl_jax import step as step_lib
from ssl_jax.data import scenes
from ssl_jax.kernels import attention, ops
from ssl_jax.kernels.segments import Segment
from ssl_jax.plan import chips, compile, hlo, report, search
from ssl_jax.run import clock, start, trees

MESH = {'data': 2, 'fsdp': 4, 'tensor': 1}
GOLDEN = pathlib.Path(__file__).parents[1] / 'golden_plans.json'
FAMILIES = ('scenes_mae', 'scenes_pixio', 'scenes_dinov2', 'scenes_splitmask')
OTHERS = ('scenes_dinov3', 'scenes_ijepa', 'scenes_lejepa', 'scenes_qb_heat')
EVERY = [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]

# As libtpu writes it, shortened: a loop of 24 trips around one fusion and an all-gather in pieces,
# then a fusion that keeps a part of an all-reduce.
TEXT = """
HloModule jit_step, is_scheduled=true

%wide.cond (wide.param: (s32[], bf16[8,4])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(24)
  %wide.param = (s32[]{:T(128)}, bf16[8,4]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %get-tuple-element.1 = s32[]{:T(128)} get-tuple-element(%wide.param), index=0
  ROOT %lt.1 = pred[]{:T(512)} compare(%get-tuple-element.1, %constant.1), direction=LT
}

%async_collective_fusion.1 (param_0: bf16[4,4]) -> bf16[8,4] {
  %param_0 = bf16[4,4]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[8,4]{1,0:T(8,128)(2,1)} all-gather(%param_0), channel_id=7, replica_groups=mesh['axis_0'=1,'axis_1'=2,'axis_2'=2], device_ids=([2,2]T(1,0)) {'axis_1'}, dimensions={0}
}

%async_collective_fusion.2 (param_1: bf16[4,4]) -> bf16[8,4] {
  %param_1 = bf16[4,4]{1,0:T(8,128)(2,1)} parameter(0)
  %copy.9 = bf16[4,4]{1,0} copy(%param_1), backend_config={"window_config":{"estimated_cycles":"999"}}
  ROOT %all-gather.2 = bf16[8,4]{1,0:T(8,128)(2,1)} all-gather(%copy.9), channel_id=7, replica_groups=mesh['axis_0'=1,'axis_1'=2,'axis_2'=2], device_ids=([2,2]T(1,0)) {'axis_1'}, dimensions={0}
}

%body (param: (s32[], bf16[8,4])) -> (s32[], bf16[8,4]) {
  %param = (s32[]{:T(128)}, /*index=1*/bf16[8,4]{1,0:T(8,128)(2,1)S(1)}) parameter(0)
  %fusion.1 = bf16[8,4]{1,0} fusion(%param), kind=kOutput, calls=%async_collective_fusion.1, metadata={op_name="jit(step)/jvp(ViT)/while/body/closed_call/blocks/mlp/fc1/dot_general" stack_frame_id=1}, backend_config={"flag_configs":[],"window_config":{"estimated_cycles":"100","iteration_bounds":["1"]}}
  %fusion.2 = bf16[8,4]{1,0} fusion(%fusion.1), kind=kOutput, calls=%async_collective_fusion.2, metadata={op_name="jit(step)/transpose(jvp(ViT))/while/body/checkpoint/rematted_computation/blocks/mlp/fc1/dot_general"}, backend_config={"window_config":{"estimated_cycles":"50"}}
  %copy.3 = bf16[8,4]{0,1} copy(%fusion.2), metadata={op_name="convert.68"}, backend_config={"window_config":{"estimated_cycles":"2"}}
  ROOT %tuple.1 = (s32[]{:T(128)}, bf16[8,4]{1,0}) tuple(%param, %fusion.2)
}

%all-reduce-scatter.1 (input: bf16[8,4]) -> bf16[4,4] {
  %input = bf16[8,4]{1,0} parameter(0)
  %all-reduce.1 = bf16[8,4]{1,0} all-reduce(%input), channel_id=9, replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %dynamic-slice.1 = bf16[4,4]{1,0} dynamic-slice(%all-reduce.1)
}

ENTRY %main.1 (arg: bf16[8,4]) -> bf16[4,4] {
  %arg = bf16[8,4]{1,0:T(8,128)(2,1)} parameter(0), metadata={op_name="batch[\\'image\\']"}
  %constant.2 = s32[]{:T(128)} constant(0)
  %copy.1 = s32[]{:T(128)} copy(%constant.2)
  %tuple.2 = (s32[]{:T(128)}, bf16[8,4]{1,0}) tuple(%copy.1, %arg)
  %while.1 = (s32[]{:T(128)}, bf16[8,4]{1,0}) while(%tuple.2), condition=%wide.cond, body=%body, metadata={op_name="jit(step)/jvp(ViT)/while"}
  %all-reduce.2 = f32[]{:T(128)} all-reduce(%arg), channel_id=3, replica_groups=[1,4]<=[4], to_apply=%add
  %copy.2 = bf16[8,4]{0,1} copy(%while.1), metadata={op_name="jit(step)/optimizer/mul"}, backend_config={"window_config":{"estimated_cycles":"7"}}
  ROOT %fusion.3 = bf16[4,4]{1,0} fusion(%copy.2), kind=kCustom, calls=%all-reduce-scatter.1
}
"""  # noqa: E501


def module():
    return hlo.parse(TEXT)


# What is read off a program


def test_cycles_are_counted_along_the_call_graph_times_the_trips_of_loops():
    found = {o.name: (o.cycles, o.times) for o in hlo.operations(module())}
    # Not the copy inside a fusion: the fusion's own estimate has it.
    assert found.pop('copy.3') == (2, 24)
    assert found == {'fusion.1': (100, 24), 'fusion.2': (50, 24), 'copy.2': (7, 1)}


def test_a_loop_that_starts_later_or_says_its_trips_is_counted_so():
    late = TEXT.replace('constant(0)', 'constant(4)')
    said = TEXT.replace('body=%body', 'body=%body, backend_config={"known_trip_count":{"n":"5"}}')
    for text, times in ((late, 20), (said, 5)):
        assert hlo.operations(hlo.parse(text))[0].times == times


def test_a_loop_of_unknown_length_counts_once_and_is_named():
    unknown = []
    found = hlo.operations(hlo.parse(TEXT.replace('direction=LT', 'direction=NE')), unknown)
    assert found[0].times == 1 and unknown == ['while.1']


KERNEL = """
  %attention.{number} = bf16[8,4]{{1,0}} custom-call(%arg, %arg), custom_call_target="tpu_custom_call", frontend_attributes={{kernel_metadata={{
{said}"steps":"{steps}"
}}}}, metadata={{op_name="jit(step)/jvp(ViT)/blocks/attn/attention/pallas_call"}}, backend_config={{"custom_call_config":{{"body":"TUzvUg"}}}}
"""  # noqa: E501


GATHER = """
  %gather.9 = bf16[2,4]{1,0} gather(%arg, %arg), offset_dims={1}, metadata={op_name="take"}
"""


def in_entry(lines):
    """`TEXT` with more lines in its entry."""
    return hlo.parse(TEXT.replace('  %all-reduce.2', lines + '  %all-reduce.2'))


def with_kernels(*kernels, said=''):
    """`TEXT` with kernels (number, steps) in its entry."""
    lines = (KERNEL.format(number=n, steps=k, said=said).lstrip('\n') for n, k in kernels)
    return in_entry(''.join(lines))


def test_a_kernel_takes_the_bundles_of_one_step_times_its_steps():
    module = with_kernels((3, 20))
    found = hlo.operations(module, kernels=hlo.kernel_cycles(module, {'attention.3': 50}))
    kernel = next(o for o in found if o.opcode == 'kernel')
    assert kernel.cycles == 20 * 50
    assert compile.scope(kernel.op_name)[2] == 'blocks/attn/attention/pallas_call'


def test_cores_share_the_parallel_parts_of_a_kernel():
    module = with_kernels((3, 20), (4, 20), said='"parallel":"5",\n')
    assert hlo.kernel_cycles(module, {'attention.3': 50}, cores=2)['attention.4'] == 3 * 4 * 50
    alone = with_kernels((3, 20))
    assert hlo.kernel_cycles(alone, {'attention.3': 50}, cores=2)['attention.3'] == 20 * 50


def test_a_kernel_takes_no_less_than_its_arrays_through_memory():
    found = hlo.operations(with_kernels((3, 20)), None, {'attention.3': 1000}, bytes_per_cycle=0.05)
    kernel = next(o for o in found if o.opcode == 'kernel')
    assert kernel.cycles == 2 * (8 * 4 * 2) / 0.05  # the operand once, though it is passed twice
    module = with_kernels((3, 20), said='"bytes":"300",\n')
    found = hlo.operations(module, None, {'attention.3': 1000}, bytes_per_cycle=0.05)
    assert next(o for o in found if o.opcode == 'kernel').cycles == 300 / 0.05


def test_a_gather_without_an_estimate_takes_what_it_moves():
    found = hlo.operations(in_entry(GATHER.lstrip('\n')), bytes_per_cycle=0.5)
    gather = next(o for o in found if o.name == 'gather.9')
    assert gather.cycles == 2 * (2 * 4 * 2) / 0.5  # not the whole of what it picks from


def test_the_largest_int64_as_an_estimate_is_none():
    line = (
        '  %fusion.7 = bf16[2,4]{1,0} fusion(%arg), kind=kLoop, backend_config='
        f'{{"window_config":{{"estimated_cycles":"{2**63 - 1}"}}}}\n'
    )
    found = hlo.operations(in_entry(line), bytes_per_cycle=0.5)
    assert next(o for o in found if o.name == 'fusion.7').cycles == 2 * (2 * 4 * 2) / 0.5


def test_a_kernel_that_was_compiled_once_for_several_takes_as_long_in_each():
    kernels = with_kernels((3, 20), (4, 20), (5, 10))
    found = hlo.kernel_cycles(kernels, {'attention.3': 50})
    assert found == {'attention.3': 1000, 'attention.4': 1000, 'attention.5': None}


def test_what_the_compiler_adds_to_a_loop_belongs_to_the_loop():
    copy = next(o for o in hlo.operations(module()) if o.name == 'copy.3')
    assert compile.scope(copy.op_name) == ('encoder', 'forward', 'copy')


def test_a_collective_in_pieces_counts_once_per_trip():
    gather = [c for c in hlo.collectives(module(), 4) if c.kind == 'all-gather']
    assert [(c.times, c.payload) for c in gather] == [(24, 8 * 4 * 2)]


def test_a_collective_that_runs_on_another_core_of_the_chip_counts_too():
    offloaded = """
  %all-gather.5.call-start = ((bf16[4,4]{1,0}, token[]), bf16[8,4]{1,0}) call-start(%arg, %token), async_execution_thread="sparsecore", to_apply=%called_computation
"""  # noqa: E501
    called = """
%called_computation (param_5: bf16[4,4], param_6: token[]) -> bf16[8,4] {
  %param_5 = bf16[4,4]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.6 = bf16[8,4]{1,0} all-gather(%param_5), channel_id=11, replica_groups={{0,1},{2,3}}, dimensions={0}
}, execution_thread="sparsecore"
"""  # noqa: E501
    text = TEXT.replace('  %fusion.2 = ', offloaded.lstrip('\n') + '  %fusion.2 = ')
    text = text.replace('\nENTRY', called + '\nENTRY')
    gathers = [c for c in hlo.collectives(hlo.parse(text), 4) if c.kind == 'all-gather']
    assert sorted((c.times, c.payload, c.groups) for c in gathers) == [
        (24, 64, ((0, 1), (2, 3))),  # in pieces beside fusions
        (24, 64, ((0, 1), (2, 3))),
    ]


def test_a_chip_sends_what_the_ring_algorithms_need():
    wire = {c.kind: c.wire for c in hlo.collectives(module(), 4)}
    assert wire == {
        'all-gather': 64 / 2,  # of 64 bytes, in pairs
        'all-reduce': 2 * 4 * 3 / 4,  # one float32 among four
        'reduce-scatter': 64 / 2,  # an all-reduce of which a part is kept
    }


@pytest.mark.parametrize(
    'text, groups',
    [
        ('replica_groups={{0,2},{1,3}}, x', ((0, 2), (1, 3))),
        ('replica_groups=[2,2]<=[4], x', ((0, 1), (2, 3))),
        ('replica_groups=[2,2]<=[2,2]T(1,0), x', ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['a'=4] {'a':(2)2}, x", ((0, 1), (2, 3))),
        ("replica_groups=mesh['a'=4] {'a':(1)2}, x", ((0, 2), (1, 3))),
        ('replica_groups={}, x', ((0, 1, 2, 3),)),
        ('channel_id=1, source_target_pairs={{0,1},{1,0}}', ((0, 1), (1, 0))),
    ],
)
def test_groups_are_read_in_every_way_xla_writes_them(text, groups):
    assert hlo.replica_groups(text, 4) == groups


def test_groups_are_named_by_the_axes_along_which_they_talk():
    mesh = {'data': 2, 'fsdp': 2, 'tensor': 2}
    assert hlo.axes_of(((0, 1), (2, 3), (4, 5), (6, 7)), mesh) == ('tensor',)
    assert hlo.axes_of(((0, 2), (1, 3), (4, 6), (5, 7)), mesh) == ('fsdp',)
    assert hlo.axes_of(((0, 2, 4, 6), (1, 3, 5, 7)), mesh) == ('data', 'fsdp')


@pytest.mark.parametrize(
    'op_name, wanted',
    [
        ('jit(step)/jvp(ViT)/while/body/closed_call/blocks/mlp/fc1/dot_general',
         ('encoder', 'forward', 'blocks/mlp/fc1/dot_general')),
        ('jit(step)/transpose(jvp(ViT))/while/body/checkpoint/rematted_computation/blocks/norm1/sub',
         ('encoder', 'recomputed', 'blocks/norm1/sub')),
        ('jit(step)/transpose(jvp(Decoder))/decoder_pred/add',
         ('decoder', 'backward', 'decoder_pred/add')),
        ('jit(step)/jvp(teacher)/ViT/norm/mul', ('teacher', 'forward', 'ViT/norm/mul')),
        ('jit(step)/jvp(DINOHead)/mlp/add', ('heads', 'forward', 'mlp/add')),
        ('jit(step)/optimizer/mul', ('optimizer', '', 'optimizer/mul')),
        ('jit(step)/jvp()/div', ('losses, augmentation', 'forward', 'div')),
        ('', ('no scope', '', '')),
    ],
)  # fmt: skip
def test_an_operation_belongs_to_the_part_that_its_scope_names(op_name, wanted):
    assert compile.scope(op_name) == wanted


def test_the_parts_of_the_step_add_up_to_its_cycles_and_to_its_speed():
    out = {'batch_size': 8, 'chips': 4, 'devices': 4, 'flops': 4 * 131_333.0 * 1000}
    found = compile.timing(module(), out, chips.CHIPS['v5e'])
    assert found['cycles'] == 24 * 152 + 7 == sum(row['cycles'] for row in found['parts'])
    assert found['images_per_second'] == pytest.approx(8 / (3655 / 1.5e9))
    assert found['mfu'] == pytest.approx(1000 / 3655, rel=1e-3)


def test_a_program_too_large_says_by_how_much():
    message = (
        'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space '
        'hbm. Used 20.25G of 15.75G hbm. Exceeded hbm capacity by 4.50G.'
    )
    found = compile.out_of_memory(message, 15.75 * 2**30)
    assert found == {'fits': False, 'needed_gib': 20.25, 'over_gib': 4.5}
    assert compile.out_of_memory('INTERNAL: something else', 1.0) is None


# What a user may get wrong


def test_without_libtpu_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'ssl_jax\[plan\]'"):
        plan.run('mae_vitb16', 'v5e:4x4')


def test_a_misspelled_mesh_axis_is_one_sentence():
    with pytest.raises(ValueError, match="'fdsp=2' is not one of data=N, fsdp=N, tensor=N"):
        plan.run('mae_vitb16', 'v5e:4x4', mesh='data=2,fdsp=2')


def test_a_recipe_that_looks_at_images_first_is_refused():
    with pytest.raises(ValueError, match='plan one that states them'):
        plan.run('images_mae', 'v5e:4x4')


def test_fine_tuning_is_planned_with_the_sizes_of_its_weights_as_it_is_trained(
    tmp_path, monkeypatch
):
    tiny.save(tiny.config(), tmp_path)
    planned = []
    monkeypatch.setattr(chips, 'devices', lambda *_: [None])
    monkeypatch.setattr(compile, 'plan', lambda *args: planned.append(args) or {'fits': True})
    monkeypatch.setattr(compile, 'matmul_scale', lambda *_: {})
    monkeypatch.setattr(report, 'text', lambda _: '')
    fields = [f'init_from={tmp_path}']
    plan.run('finetune_scenes', 'v5e:4x4', fields)
    trained = start.complete(config_lib.load('finetune_scenes', fields), scenes.Scenes(10, 64))
    fresh = config_lib.load('finetune_scenes').method
    names = ('embed_dim', 'depth', 'num_heads', 'patch_size', 'img_size')
    sizes = [[m[name] for name in names] for m in (planned[0][0].method, trained.method, fresh)]
    assert sizes[0] == sizes[1] != sizes[2]
    with pytest.raises(ValueError, match='method.depth=7 contradicts the model'):
        plan.run('finetune_scenes', 'v5e:4x4', [*fields, 'method.depth=7'])


@pytest.mark.usefixtures('tpu_kernels_on')
def test_the_step_without_our_kernels_is_planned_beside_the_one_with_them(monkeypatch):
    def planned(config, *_):
        mfu = 0.25 if config.kernels == 'off' else 0.5
        return {'fits': True, 'mfu': mfu, 'cycles': 1, 'name': config.name}

    monkeypatch.setattr(chips, 'devices', lambda *_: [None])
    monkeypatch.setattr(compile, 'plan', planned)
    monkeypatch.setattr(compile, 'matmul_scale', lambda *_: {})
    monkeypatch.setattr(report, 'text', lambda _: '')
    found = plan.run('mae_vitb16', 'v5e:2x2', xla_alone=True)
    assert found['mfu'] == 0.5
    assert found['xla_alone'] == {'fits': True, 'mfu': 0.25, 'cycles': 1}
    assert 'xla_alone' not in plan.run('mae_vitb16', 'v5e:2x2')


SEND = """
  %send.6 = (bf16[2,4]{1,0:T(8,128)(2,1)}, u32[], token[]) send(%arg, %arg), channel_id=2, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_reduce_operation="SUM",_xla_megascale_transfer_type="ALL_REDUCE"}
"""  # noqa: E501


def test_what_goes_between_slices_is_counted_as_what_a_chip_hands_to_its_host():
    mesh = sharding.make_mesh(2, 4)
    rows = compile.communication(in_entry(SEND.lstrip('\n')), mesh)
    far = [row for row in rows if row['between_slices']]
    assert far == [
        dict(kind='all-reduce', axes=['data'], dtype='bf16', count=1, bytes=16, between_slices=True)
    ]


def test_what_does_not_fit_is_not_kept_and_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(chips, 'devices', lambda *_: [None])
    monkeypatch.setattr(compile, 'plan', lambda *_: {'fits': False})
    monkeypatch.setattr(compile, 'matmul_scale', lambda *_: {})
    monkeypatch.setattr(search, 'advice', lambda *_: [])
    monkeypatch.setattr(report, 'text', lambda _: '')
    lines = []
    fields = ['kernels=off']
    plan.run('scenes_mae', 'v5e:1x1', fields, save=str(tmp_path / 'kept'), log=lines.append)
    assert f'nothing is kept in {tmp_path}/kept: the step does not fit' in lines


def test_several_slices_want_their_data_axis_between_them():
    class Device:
        def __init__(self, number):
            self.slice_index = number // 4

    with pytest.raises(ValueError, match='a multiple of 2; set mesh.data=2'):
        sharding.make_mesh(data=1, fsdp=8, devices=[Device(i) for i in range(8)])


def test_the_search_varies_mesh_policy_and_batch():
    found = list(search.candidates(tiny.config(), 8, slices=2))
    assert len({(*c.mesh.values(), c.remat, c.batch_size) for c in found}) == len(found)
    assert {c.remat for c in found} == {'none', 'dots', 'full'}
    assert {c.batch_size for c in found} == {8, 16, 32}
    assert all(c.mesh.data % 2 == 0 for c in found)  # between the slices


def pretend(config, devices, chip):
    """A plan of which the memory grows with the images per device and shrinks with remat."""
    policy = {'none': 4.0, 'dots': 2.0, 'full': 1.0}[config.remat]
    gib = config.batch_size * policy / len(devices) + 16 / config.mesh.fsdp
    return {
        'fits': gib <= 16, 'over_gib': max(gib - 16, 0), 'mesh': dict(config.mesh),
        'remat': config.remat, 'batch_size': config.batch_size, 'mfu': 0.5,
        'images_per_second': config.batch_size * policy, 'slices': 1,
        'hbm': {'total': gib * 2**30, 'capacity': 16 * 2**30},
    }  # fmt: skip


def test_the_search_leaves_out_what_is_larger_than_what_does_not_fit(monkeypatch):
    monkeypatch.setattr(compile, 'plan', pretend)
    found = search.search(tiny.config(batch_size=32), range(8), None, log=lambda line: None)
    assert [p['fits'] for p in found] == sorted([p['fits'] for p in found], reverse=True)
    rates = [p['images_per_second'] for p in found if p['fits']]
    assert rates == sorted(rates, reverse=True) and rates
    sizes = [p['batch_size'] for p in found if p['mesh']['fsdp'] == 1 and p['remat'] == 'none']
    assert sizes == [16]  # 32 and 64 are larger still
    assert 'does not fit, by' in search.frontier(found)


def test_what_does_not_fit_comes_with_a_change_that_does(monkeypatch):
    monkeypatch.setattr(compile, 'plan', pretend)
    config = tiny.config(batch_size=64, remat='none', mesh__data=8)
    lines = search.advice(config, pretend(config, range(8), None), range(8), None)
    assert lines[0].startswith('with remat=dots it does not, by')
    assert 'fsdp=8' in lines[-1] and 'it fits' in lines[-1]


# What each family sends and where its arrays live


@pytest.mark.parametrize('recipe', EVERY)
def test_shardings_and_collectives_of_the_family_are_the_golden_ones(recipe, request):
    config = shrunk(recipe)
    method = methods.make(config, clock.Clock(1000, 1, config.batch_size, 4096))
    mesh = sharding.make_mesh(**MESH)
    built = step_lib.make_program(config, method, mesh)
    named = trees.named(built.abstract.params)
    specs = {name: str(x.sharding.spec) for name, x in named.items()}
    # Not kept on disk: the step of scenes_mae hangs in test_methods when it is read from there.
    key = 'jax_persistent_cache_min_compile_time_secs'
    before = getattr(jax.config, key)
    jax.config.update(key, 1e9)
    request.addfinalizer(lambda: jax.config.update(key, before))
    program = compile.lower(built).compile()
    rows = compile.communication(hlo.parse(program.as_text()), mesh)
    sent = {f'{r["kind"]} {"x".join(r["axes"])} {r["dtype"]}': r['count'] for r in rows}
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get('SSL_JAX_UPDATE_GOLDEN'):
        sent = dict(sorted(sent.items()))
        golden[recipe] = {'jax': jax.__version__, 'collectives': sent, 'shardings': specs}
        GOLDEN.write_text(json.dumps(golden, indent=1) + '\n')
    how = f'if that is meant: SSL_JAX_UPDATE_GOLDEN=1 pytest {__file__}, and commit it'
    assert specs == golden[recipe]['shardings'], how
    if jax.__version__ != golden[recipe]['jax']:
        pytest.skip(f'collectives are pinned for jax {golden[recipe]["jax"]} and its XLA')
    assert sent == golden[recipe]['collectives'], how


# By libtpu


def test_a_tiny_run_is_planned_for_a_pod(tmp_path):
    pytest.importorskip('libtpu', reason="libtpu is missing: pip install 'ssl_jax[plan]'")
    config = tiny.config(dtype='bfloat16', mesh__data=2, mesh__fsdp=2, method__drop_path=0.0)
    devices = chips.devices('v5e:2x2')
    found = compile.plan(config, devices, chips.CHIPS['v5e'])
    found.update(topology='v5e:2x2', command='ssl_jax plan')
    assert found['fits'] and found['hbm']['total'] > found['hbm']['parameters'] > 0
    # Adam's moments are two copies, split as the parameters are.
    assert found['hbm']['moments'] == pytest.approx(2 * found['hbm']['parameters'], rel=0.01)
    assert found['cycles'] > 0 and not found['loops_counted_once']
    assert {'encoder', 'decoder', 'optimizer'} <= {row['part'] for row in found['parts']}
    assert {'all-gather', 'all-reduce'} <= {row['kind'] for row in found['collectives']}
    assert json.loads(json.dumps(found)) == found
    assert 'fits, 15.7' in report.text(found)
    report.picture(found, tmp_path / 'plan.png')
    assert (tmp_path / 'plan.png').stat().st_size > 10_000


SCALE = dict(side=1, cycles=1, ideal_cycles=1.0, mfu=1.0)


@pytest.mark.slow
def test_a_plan_keeps_its_programs_for_the_chips_that_it_was_made_for(tmp_path, monkeypatch):
    pytest.importorskip('libtpu', reason="libtpu is missing: pip install 'ssl_jax[plan]'")
    monkeypatch.setattr(config_lib, 'recipe', lambda *_: tiny.config(kernels='off'))
    monkeypatch.setattr(compile, 'matmul_scale', lambda *_: SCALE)
    plan.run('tiny', 'v5e:1x1', save=str(tmp_path), log=lambda line: None)
    heads = {p.name.split('-')[0]: p.open('rb').readline() for p in tmp_path.iterdir()}
    assert sorted(heads) == ['init', 'step']
    key = json.loads(heads['step'])['key']
    assert key.pop('kernels') == 'off' and key == json.loads(heads['init'])['key']
    assert key['devices'] == '1 x TPU v5 lite' and 'TFRT TPU v5 lite' in key['compiler']
    assert key['LIBTPU_INIT_ARGS'] == '' and 'processor' not in key
    assert 'loss' in json.loads(heads['step'])['outputs']


@pytest.mark.usefixtures('tpu_kernels_on')
@pytest.mark.parametrize(
    'topology, dtype',
    [('v5e:2x2', 'bfloat16'), ('v5e:2x2', 'float32'), ('tpu7x:2x2x1', 'bfloat16')],
)
def test_the_kernels_of_a_block_compile_for_several_chips(topology, dtype):
    pytest.importorskip('libtpu', reason="libtpu is missing: pip install 'ssl_jax[plan]'")
    mesh = sharding.make_mesh(2, -1, devices=chips.devices(topology))
    rows, vector = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))
        for shape, spec in (((mesh.size * 16 * 50, 384), sharding.BATCH), ((384,), jax.P()))
    )

    def loss(x, scale, bias):
        y = ops.dense(ops.layer_norm(x, scale, bias), scale * bias[:, None], bias)
        y = attention.attention(y, 2, (Segment(1, 50),))
        y = ops.dense(y, scale[:128] * bias[:128, None], bias[:128])
        return y.astype('float32').sum()

    with jax.set_mesh(mesh):
        step = jax.jit(
            jax.grad(loss, argnums=(0, 1, 2)), compiler_options=sharding.compiler_options(mesh)
        )
        lowered = step.lower(rows, vector, vector)
    compiled, bundles = chips.compile_program(lowered)
    found = hlo.kernel_cycles(hlo.parse(compiled.as_text()), bundles)
    kinds = {name.split('.')[0] for name in found}
    assert kinds >= {'layer_norm', 'layer_norm_gradient', 'attention_gradient', 'sum_rows'}
    assert all(found.values())


def test_products_of_a_sharded_step_are_not_cut_into_windows():
    pytest.importorskip('libtpu', reason="libtpu is missing: pip install 'ssl_jax[plan]'")
    mesh = sharding.make_mesh(1, 4, devices=chips.devices('v5e:2x2'))
    tokens, kernel = (
        jax.ShapeDtypeStruct(shape, 'bfloat16', sharding=jax.NamedSharding(mesh, spec))
        for shape, spec in (((12800, 1024), sharding.BATCH), ((1024, 4096), jax.P('fsdp')))
    )

    def kinds(options):
        product = jax.jit(lambda x, w: x @ w, compiler_options=options).lower(tokens, kernel)
        rows = compile.communication(hlo.parse(product.compile().as_text()), mesh)
        return {row['kind'] for row in rows}

    assert kinds(None) == {'collective-permute'}  # else the option is no longer needed
    assert kinds(sharding.compiler_options(mesh)) == {'all-gather'}
