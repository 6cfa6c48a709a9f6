# SPDX-License-Identifier: Apache-2.0
"""The programs that measure compile for a TPU, with the kernels in a loop that XLA cannot empty."""

import jax
import numpy as np
import pytest

from ssl_jax import sharding
from ssl_jax.kernels import choice
from ssl_jax.kernels.choice import Call
from ssl_jax.kernels.segments import Segment
from ssl_jax.plan import chips, hlo

KEPT = Segment(1, 13, 3), Segment(2, 5, 3)
CROPS = Segment(2, 13, 3), Segment(4, 5, 3)


@pytest.mark.parametrize(
    'call, kernels',
    [
        (
            Call('attention', (8 * 50, 384), 'bfloat16', (2, (Segment(1, 50),))),
            {'attention', 'attention_gradient'},
        ),
        (
            Call('layer_norm', (400, 128), 'bfloat16', (1e-6, True)),
            {'layer_norm', 'layer_norm_gradient'},
        ),
        (Call('sum_rows', (400, 256), 'bfloat16'), {'sum_rows'}),
        (
            Call('move_images', (8 * 64, 128), 'bfloat16', (CROPS, KEPT, True, True)),
            {'move_images'},
        ),
    ],
    ids=lambda x: getattr(x, 'op', ''),
)
def test_a_program_that_measures_compiles_with_its_kernels_inside_the_loop(call, kernels):
    pytest.importorskip('libtpu', reason="libtpu is missing: pip install 'ssl_jax[plan]'")
    device = chips.devices('v5e:2x2')[0]
    example = choice.OPS[call.op](call, choice._draw(call))
    place = jax.sharding.SingleDeviceSharding(device)
    args, grads = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        (example.args, example.grads),
    )
    example = example._replace(args=args, grads=grads)
    mesh = jax.sharding.Mesh(np.array([device]).reshape(1, 1, 1), sharding.AXES)
    with jax.set_mesh(mesh):
        lowered = choice._lowered(example, {call.key: 'pallas'}, 'tpu')
        plain = choice._lowered(example, {}, 'tpu').compile()
    compiled, _ = chips.compile_program(lowered)
    module = hlo.parse(compiled.as_text())
    inside = [(place, i) for place, i, _ in hlo.walk(module) if i.is_kernel]
    assert {i.name.split('.')[0] for _, i in inside} == kernels
    assert all(place != module.entry for place, _ in inside)
    # XLA's products and sums are in the loop as well.
    module = hlo.parse(plain.as_text())
    found = [(place, i) for place, i, _ in hlo.walk(module)]
    assert not any(i.is_kernel for _, i in found)
    cycles = {place: sum(i.cycles or 0 for p, i in found if p == place) for place, _ in found}
    assert cycles.pop(module.entry) < sum(cycles.values())
